"""Tasks: how inputs reach the model, what falls back to what, and one clear line for each thing that is wrong."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.core.data import Arrays, batches, to_device
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.metric import Metric, mean_squared_error
from featherweight.core.outputs import as_arrays, first, named_outputs, rebuild
from featherweight.core.task import Task, bind, cross_entropy, default_inputs, find_task, labels


class Two(nn.Module):
    def forward(self, ids, mask=None, *, scale=1.0):
        return {"logits": nn.functional.one_hot(ids, 3).float().sum(1) * (1 if mask is None else mask.sum(1)[:, None])}


def arrays(count: int = 10) -> Arrays:
    generator = torch.Generator().manual_seed(0)
    return Arrays(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


def linear_task(**changes) -> Task:
    torch.manual_seed(0)
    task = Task(name="plain", model=nn.Linear(4, 3).eval(), train=arrays(), test=arrays(6), batch_size=4)
    return replace(task, **changes)


# -- inputs ------------------------------------------------------------------------------------------------------------
def test_inputs_and_labels_of_any_batch():
    x, y = torch.zeros(2, 4), torch.tensor([0, 1])
    assert default_inputs((x, y)) is x and default_inputs([x]) is x and default_inputs(x) is x
    assert list(default_inputs({"ids": x, "mask": y, "labels": y})) == ["ids", "mask"]
    assert labels((x, y)) is y and labels({"target": y}) is y
    assert (
        default_inputs((x, y, y))[0] is x and default_inputs([x, y, y])[1] is y and len(default_inputs((x, y, y))) == 2
    )
    for batch in (x, (x,), {"ids": x}):
        with pytest.raises(TaskError, match="a batch has no labels"):
            labels(batch)


def test_mappings_go_in_by_keyword_and_tuples_by_place():
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    batch = {"ids": ids, "mask": mask, "labels": torch.tensor([0, 0])}
    task = Task(name="two", model=Two().eval(), test=[batch])
    assert task.input_names == ("ids", "mask") and list(task.named_inputs(batch)) == ["ids", "mask"]
    assert torch.equal(task.call(task.original, batch)["logits"], torch.tensor([[25.0, 0, 0]] * 2))
    task.check()
    pair = replace(task, test=[((ids, mask), torch.tensor([0, 0]))], inputs=lambda batch: batch[0])
    assert pair.input_names == ("ids", "mask") and torch.equal(
        first(pair.call(pair.original, pair.test[0])), torch.tensor([[25.0, 0, 0]] * 2)
    )
    pair.check()


def test_all_of_a_longer_tuple_but_its_last_goes_in_by_place():
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    task = Task(name="three", model=Two().eval(), test=[(ids, mask * 2, torch.tensor([0, 0]))])
    assert task.input_names == ("ids", "mask")
    assert torch.equal(first(task.call(task.original, task.test[0])), torch.tensor([[50.0, 0, 0]] * 2))
    task.check()


def test_a_model_of_the_hugging_face_kind_works_as_it_is():
    class Output(OrderedDict):
        pass

    class Wrapped(nn.Module):
        def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=True, **rest):
            assert labels is None
            return Output(loss=None, logits=input_ids.float() @ torch.ones(5, 2), hidden_states=None)

    batch = {
        "input_ids": torch.ones(3, 5, dtype=torch.long),
        "attention_mask": torch.ones(3, 5),
        "labels": torch.zeros(3),
    }
    task = Task(name="hf", model=Wrapped().eval(), test=[batch])
    task.check()
    assert {name: tensor.shape for name, tensor in task.example.items()} == {
        "input_ids": (2, 5),
        "attention_mask": (2, 5),
    }
    assert first(task.call(task.original, batch)).shape == (3, 2)


def test_the_example_is_two_inputs_of_the_calibration_split():
    task = linear_task(calibrate=Arrays(torch.full((5, 4), 7.0), torch.zeros(5)))
    assert (
        list(task.example) == ["input"] and task.example["input"].shape == (2, 4) and task.example["input"][0, 0] == 7
    )
    fixed = linear_task(dynamic={"input": {1: "width"}})
    assert (
        fixed.free("input") == {1: "width"}
        and fixed.free("other") == {}
        and linear_task().free("input") == {0: "batch"}
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nonsense": torch.zeros(1)}, "the inputs do not fit Two.forward.*missing a required argument: 'ids'"),
        ({"ids": torch.zeros(1), "nonsense": torch.zeros(1)}, "unexpected keyword argument 'nonsense'"),
        ((torch.zeros(1), torch.zeros(1), torch.zeros(1)), "too many positional arguments"),
        ((torch.zeros(1), 3), "the input 'mask' is int, not a tensor; wrap the model"),
        ({}, "missing a required argument: 'ids'"),
    ],
)
def test_inputs_that_do_not_fit_are_named(given, message):
    with pytest.raises(TaskError, match=message):
        bind(Two(), given)


# -- data --------------------------------------------------------------------------------------------------------------
def test_calibration_falls_back_to_training_and_stops():
    task = linear_task(calibration_limit=6)
    assert [len(batch[0]) for batch in task.batches("calibrate")] == [4, 4]
    assert task.has("calibrate") and not task.has("validate")
    with pytest.raises(TaskError, match="task plain has no 'validate' data, which this needs"):
        next(task.batches("validate"))


def test_shuffling_is_seeded_and_complete():
    orders = [
        torch.cat(
            [
                batch[1]
                for batch in batches(Arrays(torch.arange(9), torch.arange(9)), 4, torch.Generator().manual_seed(s))
            ]
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert orders[0].sort().values.tolist() == list(range(9))


def test_augmentation_only_where_a_generator_is_given():
    data = Arrays(torch.zeros(6, 2), torch.zeros(6), augment=lambda x, rng: x + 1, convert=lambda x: x * 10)
    assert next(iter(batches(data, 3)))[0].max() == 0
    assert next(iter(batches(data, 3, torch.Generator())))[0].min() == 10


def test_a_map_style_data_set_of_anybodys_is_collated():
    class Words:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"ids": torch.full((2,), index), "labels": index}

    assert [batch["ids"].tolist() for batch in batches(Words(), 2)] == [[[0, 0], [1, 1]], [[2, 2]]]


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"must have one length; they have \[3, 4\]"):
        Arrays(torch.zeros(3), torch.zeros(4))


def test_moving_keeps_the_form():
    moved = to_device({"a": (torch.zeros(1), [torch.ones(1)], "text")}, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][2] == "text"


def test_digests_follow_weights_data_and_fingerprint():
    base = linear_task()
    other = linear_task(model=nn.Linear(4, 3).eval())
    data = linear_task(train=arrays(11))
    assert base.digest == linear_task().digest
    assert len({base.digest, other.digest, data.digest, linear_task(fingerprint="v1").digest}) == 4
    assert linear_task(fingerprint="v1").digest == linear_task(fingerprint="v1", train=arrays(11)).digest


@pytest.mark.parametrize("kind", [np.array, list, lambda values: [str(value) for value in values]])
def test_labels_that_are_no_tensors_are_part_of_the_digest(kind):
    x = torch.ones(3, 4)
    digests = [linear_task(test=[(x, kind(values))]).digest for values in ([0, 1, 2], [0, 1, 2], [0, 2, 2])]
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_be_hashed_asks_for_a_fingerprint():
    task = linear_task(test=[(torch.ones(3, 4), object())])
    with pytest.raises(TaskError, match="a batch holds object, which has no digest; give the task a fingerprint"):
        _ = task.digest
    assert replace(task, fingerprint="v1").digest


def loader(shuffle: bool, seed: int = 0, labels: int = 3):
    pairs = [(x, int(y) % labels) for x, y in zip(*arrays(20).tensors)]
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(pairs, batch_size=6, shuffle=shuffle, generator=generator)


def test_the_order_of_a_loader_is_no_part_of_the_digest():
    digests = {linear_task(train=loader(shuffle, seed)).digest for shuffle, seed in ((False, 0), (True, 1), (True, 2))}
    assert len(digests) == 1
    assert linear_task(train=loader(False, labels=2)).digest not in digests
    x, y = arrays(6).tensors
    swapped = linear_task(train=[(x, y.flip(0))])
    assert swapped.digest != linear_task(train=[(x, y)]).digest, "which label belongs to which input counts"


@pytest.mark.parametrize("split", ["validate", "test"])
def test_a_split_to_judge_on_must_not_be_shuffled(split):
    linear_task(**{split: loader(False)}).check()
    linear_task(train=loader(True), calibrate=loader(True)).check()
    with pytest.raises(
        TaskError, match=f"the split '{split}' gives other batches when it is gone through again; turn off"
    ):
        linear_task(**{split: loader(True)}).check()


# -- the model ---------------------------------------------------------------------------------------------------------
def test_a_model_in_training_mode_is_not_touched():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    task = linear_task(model=model)
    assert not task.original.training and model.training and task.fresh() is not task.original


def test_a_factory_is_asked_once():
    made = []
    task = linear_task(model=lambda: made.append(1) or nn.Linear(4, 3))
    assert task.original is task.original and made == [1]


WIDE = Arrays(torch.zeros(4, 5), torch.zeros(4).long())
BROKEN = Arrays(torch.full((4, 4), torch.nan), torch.zeros(4).long())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": lambda: 3}, TaskError, "the model of task plain is int, not a torch.nn.Module"),
        ({"model": 3}, TaskError, "the model of task plain is int; it must be a function or the thing itself"),
        ({"model": lambda: Path("/no/such/weights").read_bytes()}, TaskError, "raised FileNotFoundError"),
        ({"train": []}, TaskError, "task plain: the split 'train' is empty"),
        ({"train": None, "test": None}, None, ""),
        ({"test": WIDE}, TaskError, r"split 'test', a batch of shapes \(4, 5\), \(4,\): the model fails on it"),
        ({"test": BROKEN}, NotFinite, "a batch of the split 'test' holds NaN"),
        ({"test": [torch.zeros(4, 4)]}, TaskError, "a batch has no labels"),
        ({"train": Arrays(torch.zeros(4, 4), torch.full((4,), 7))}, TaskError, "the loss or the metric fails on it"),
        ({"loss": lambda out, batch: out.sum() * torch.inf}, NotFinite, "the loss is"),
        ({"metric": Metric("none", lambda out, batch: np.zeros(0))}, TaskError, "the metric none gives no record"),
        ({"inputs": lambda batch: {"x": batch[0]}}, TaskError, "the model fails on it: TypeError"),
    ],
)  # fmt: skip
def test_each_bad_task_is_said_in_one_line(changes, kind, message):
    task = linear_task(**changes)
    if kind is None:
        task.check()
        with pytest.raises(TaskError, match="task plain has no data"):
            _ = task.example
        return
    with pytest.raises(kind, match=message) as caught:
        task.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["weight", "buffer"])
def test_nan_in_the_model_is_named(where):
    model = nn.BatchNorm1d(4)
    with torch.no_grad():
        (model.weight if where == "weight" else model.running_var)[1] = torch.nan
    name = "weight" if where == "weight" else "running_var"
    with pytest.raises(NotFinite, match=f"the weight '{name}' holds NaN"):
        _ = linear_task(model=model).original


def test_a_model_that_gives_nan_is_said():
    class Log(nn.Module):
        def forward(self, input):
            return input.log()

    with pytest.raises(NotFinite, match="the original model gives NaN"):
        linear_task(model=Log()).check()


# -- finding tasks -----------------------------------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(
        "import beside\nfrom torch import nn\nfrom featherweight.core.task import Task\n"
        "def good():\n    return Task(name='good', model=nn.Linear(1, 1))\n"
        "ready = Task(name='ready', model=nn.Linear(1, 1))\n"
        "def bad():\n    raise RuntimeError('first line\\nsecond line')\n"
        "def number():\n    return 3\n"
        "constant = 4\n"
    )
    (tmp_path / "beside.py").write_text("")
    return path


def test_a_task_from_a_file(file):
    assert find_task(f"{file}:good").source == f"{file}:good" and find_task(f"{file}:ready").name == "ready"
    task = linear_task()
    assert find_task(task) is task


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "has no 'nothing'"),
        ("bad", "raised RuntimeError: first line$"),
        ("number", "gives int, not a Task"),
        ("constant", "is int; it must be a function or the thing itself"),
    ],
)
def test_a_task_that_a_file_does_not_give(file, name, message):
    with pytest.raises(TaskError, match=message) as caught:
        find_task(f"{file}:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "names no task; write file.py:function"),
        ("zoo:nothing", "there is no task zoo:nothing; the zoo holds: .*digits"),
        ("nowhere.py:task", "there is no file nowhere.py"),
        ("no.such.module:task", "the module no.such.module cannot be imported"),
        (":task", "names no task"),
    ],
)
def test_a_task_that_is_nowhere(spec, message):
    with pytest.raises(TaskError, match=message) as caught:
        find_task(spec)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(TaskError, match=r"broken\.py cannot be imported: ModuleNotFoundError"):
        find_task(f"{tmp_path / 'broken.py'}:task")


# -- outputs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("output", "layout", "names"),
    [
        (torch.zeros(1), "single", ["output"]),
        ((torch.zeros(1), [torch.ones(1), None]), "tuple", ["output_0", "output_1.0"]),
        ({"logits": torch.zeros(1), "cache": None, "inner": {"a": torch.ones(1)}}, "dict", ["logits", "inner.a"]),
    ],
)
def test_outputs_by_name_and_back(output, layout, names):
    found, named = named_outputs(output)
    assert (found, list(named)) == (layout, names)
    again = rebuild(layout, {name: tensor.numpy() for name, tensor in named.items()})
    assert np.array_equal(first(again), first(as_arrays(output)))


@pytest.mark.parametrize("output", [3, {"a": object()}])
def test_outputs_that_are_no_tensors_are_refused(output):
    with pytest.raises(TaskError, match=r"must (return a tensor|be tensors)"):
        named_outputs(output)


def test_half_precision_outputs_become_floats():
    assert as_arrays(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert as_arrays(torch.ones(2, dtype=torch.int64)).dtype == np.int64


def test_another_loss_or_another_free_dimension_is_another_task() -> None:
    def other(output, batch):
        return cross_entropy(output, batch) * 2

    model = torch.nn.Linear(3, 2)
    data = Arrays(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))
    made = {"name": "digest", "model": model, "train": data, "test": data}
    before = Task(**made).digest
    assert Task(**made).digest == before
    assert before not in {Task(**made, loss=other).digest, Task(**made, dynamic={"input": {}}).digest}


def test_labels_in_a_column_are_compared_one_by_one() -> None:
    values = np.arange(4.0)
    assert mean_squared_error().record(values[:, None], (None, torch.arange(4.0))).tolist() == [0.0] * 4
    with pytest.raises(TaskError, match="do not fit"):
        mean_squared_error().record(values, (None, torch.zeros(4, 2)))
