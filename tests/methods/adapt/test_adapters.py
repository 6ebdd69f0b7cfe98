"""Adapters: trained beside a frozen base, kept as small files, switched, merged."""

import functools

import numpy as np
import pytest
import torch
from small_tasks import one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight import load_adapter, save_adapter
from featherweight.core.adapted import adapter_tensors, base_digest
from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import ArtifactError, MissingExtra, RecipeError, TaskError
from featherweight.core.recipe import Recipe
from featherweight.core.soft import copied, encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.adapt import merging
from featherweight.model.adapter_files import without_adapters
from featherweight.model.adapters import LowRank
from featherweight.model.feedback import rerounded

CPU = torch.device("cpu")
BASES = {
    "float32": [],
    "int8": [{"kind": "quantize.static"}],
    "int4": [{"kind": "quantize.weights", "group": 8, "method": "rtn"}],
}
KEPT = {"epochs": 1, "lr": 1e-2, "merge": False}


@functools.cache
def base(form: str) -> nn.Module:
    return run_recipe(Recipe(BASES[form]), Context(transformer_task(), device=CPU))[0]


def adapted(form: str, kind: str = "adapt.lora", **settings) -> nn.Module:
    ctx = Context(transformer_task(), device=CPU)
    return run_step(step(kind, **{**KEPT, **settings}), copied(base(form)), ctx)[0]


def images() -> torch.Tensor:
    return transformer_task().test.tensors[0][:40]


@torch.no_grad()
def close(model: nn.Module, other: nn.Module, bound: float = 1e-5) -> bool:
    return bool(torch.allclose(model(images()), other(images()), atol=bound))


# -- training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["lora", "dora"])
def test_the_base_stays_and_the_adapter_learns(form, settings):
    made = adapted(form, **settings)
    assert base_digest(made) == base_digest(base(form))
    assert close(without_adapters(made), base(form), 0)
    assert not close(made, base(form))
    assert {form: found.form for form, found in encodings(base(form)).items()} == {
        name.replace(".base.", "."): found.form for name, found in encodings(made).items()
    }
    with torch.no_grad():
        task = transformer_task()
        losses = [task.loss(model(images()), (images(), task.test.tensors[1][:40])) for model in (base(form), made)]
    assert losses[1] != losses[0]


@pytest.mark.parametrize("dora", [False, True])
def test_what_stays_computes_what_peft_computes(dora):
    import peft

    model = copied(transformer_task().original)
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules="head|wide", use_dora=dora), model)
    for name in ("head", "wide"):
        layer = model.get_submodule(name)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        if dora:
            nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 0.5, 2)
    from featherweight.methods.adapt.lora import _turned

    ours = copied(transformer_task().original)
    for name in ("head", "wide"):
        setattr(ours, name, _turned(model.get_submodule(name)))
    assert close(ours.eval(), model.eval())


def test_merged_into_floats_the_outputs_stay():
    kept, merged = adapted("float32", dora=True), adapted("float32", dora=True, merge=None)
    assert not adapter_tensors(merged) and adapter_tensors(kept)
    assert [type(layer) for layer in merged.modules()] == [type(layer) for layer in base("float32").modules()]
    assert close(kept, merged)


@pytest.mark.parametrize("merge", [None, False])
def test_what_was_trained_before_can_be_trained_again(merge):
    made = without_adapters(adapted("float32", merge=merge))
    wanted = {name: each.requires_grad for name, each in base("float32").named_parameters()}
    assert {name: each.requires_grad for name, each in made.named_parameters()} == wanted


def test_ia3_goes_into_scales_without_rounding():
    kept = adapted("int4", "adapt.ia3", lr=0.05)
    merged = adapted("int4", "adapt.ia3", lr=0.05, merge=True, bound=0.01)
    before, after = encodings(base("int4")), encodings(merged)
    assert all(torch.equal(before[name].values, after[name].values) for name in before)
    assert close(kept, merged, 0.02)


def test_merging_into_integers_rounds_with_the_data_and_keeps_the_bound():
    wanted = adapted("int4", epochs=4)
    merged = adapted("int4", epochs=4, merge=True, bound=0.5)
    assert {found.form for found in encodings(merged).values()} == {"uint4"} and not adapter_tensors(merged)
    ctx, blind = Context(transformer_task(), device=CPU), copied(wanted)
    for name, module in list(blind.named_modules()):
        if isinstance(module, LowRank):
            merging.merge_rounded(blind, name, None)
    outputs = merging.outputs(wanted, ctx)
    ours, theirs = (merging.relative(merging.outputs(model, ctx), outputs) for model in (merged, blind))
    assert 0 < ours < 0.75 * theirs


def test_a_merge_beyond_its_bound_is_refused_with_the_figure():
    with pytest.raises(RecipeError, match=r"move by 0\.\d+ \(relative\), more than bound=1e-06; keep it beside"):
        adapted("int4", epochs=2, merge=True, bound=1e-6)


def test_rounding_again_is_no_worse_than_nearest():
    stored = encodings(base("int4"))["wide.weight"]
    generator = torch.Generator().manual_seed(0)
    weight = stored.decode() + 0.02 * torch.randn(stored.shape, generator=generator)
    inputs = torch.randn(256, weight.shape[1], generator=generator) @ torch.randn(32, 32, generator=generator)
    hessian = inputs.t() @ inputs / 256

    def loss(found) -> float:
        error = weight - found.decode()
        return float(((error @ hessian) * error).sum())

    assert loss(rerounded(stored, weight, hessian)) < 0.5 * loss(rerounded(stored, weight, None))
    same = rerounded(stored, stored.decode(), hessian)
    assert torch.equal(same.values, stored.values) and torch.equal(same.scale, stored.scale)


def test_a_second_adapter_stands_beside_the_base_not_beside_the_first():
    made = adapted("float32", only="head,wide", rank=2)
    ctx = Context(transformer_task(), device=CPU)
    _, record = run_step(step("adapt.lora", rank=3, **KEPT), copied(made), ctx)
    left = {each.layer: each.reason for each in record.left}
    assert {"head.base", "wide.base", "narrow"} <= set(record.changed)
    assert left["head.down"] == left["head.up"] == "is part of the adapter on 'head'"


# -- files and switching -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", BASES)
def test_adapters_of_unlike_ranks_switch_over_one_loaded_base(form, tmp_path):
    models = [adapted(form), adapted(form, rank=3, only="head,wide"), adapted(form, rank=5, skip=["head"])]
    files = [save_adapter(model, tmp_path / f"{place}.safetensors") for place, model in enumerate(models)]
    artifact = target("onnxruntime").export(models[0], transformer_task().example, tmp_path / "base")
    runner = artifact.open()
    session = runner.session.session
    bound = 1e-4 if form != "int8" else 0.2
    for model, file in zip([*models, models[0]], [*files, artifact.adapter]):
        runner.use(file)
        assert np.abs(runner(images()) - model(images()).detach().numpy()).max() < bound
        assert file.stat().st_size < 0.5 * artifact.bytes()
    runner.use(None)
    assert np.abs(runner(images()) - base(form)(images()).detach().numpy()).max() < bound
    assert runner.session.session is session
    assert artifact.manifest.base == base_digest(base(form))


def test_onnxruntimes_own_adapter_file_runs_the_same(tmp_path):
    import onnxruntime

    from featherweight.targets.onnxruntime.slots import native

    first, second = adapted("int4"), adapted("int4", rank=2)
    artifact = target("onnxruntime").export(first, transformer_task().example, tmp_path / "base")
    file = save_adapter(second, tmp_path / "second.safetensors")
    native(file, artifact, tmp_path / "second.onnx_adapter")
    with pytest.raises(ArtifactError, match="belongs to another base"):
        native(save_adapter(adapted("float32"), tmp_path / "other.safetensors"), artifact, tmp_path / "other")
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(tmp_path / "second.onnx_adapter"))
    options.add_active_adapter(adapter)
    runner = artifact.open()
    theirs = runner.session.session.run(None, {"x": images().numpy()}, options)[0]
    runner.use(file)
    assert np.array_equal(theirs, runner(images()))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adapt.lora", {}),
        ("adapt.lora", {"dora": True}),
        ("adapt.ia3", {"inputs": ["narrow"]}),
        ("adapt.bottleneck", {"merge": None}),
    ],
)
def test_a_file_put_back_on_the_base_gives_equal_outputs(kind, settings, tmp_path):
    settings = {name: value for name, value in settings.items() if name != "merge" or value is not None}
    ctx = Context(transformer_task(), device=CPU)
    given = {name: value for name, value in KEPT.items() if name != "merge" or kind != "adapt.bottleneck"}
    made = run_step(step(kind, **{**given, **settings}), copied(base("int8")), ctx)[0]
    file = save_adapter(made, tmp_path / "adapter.safetensors")
    again = load_adapter(base("int8"), file)
    assert torch.equal(again(images()), made(images()))
    assert torch.equal(load_adapter(adapted("int8", rank=2), file)(images()), made(images()))
    assert file.stat().st_size < 4 * sum(each.numel() for each in adapter_tensors(made).values()) + 8192


@pytest.mark.parametrize(
    ("kind", "settings"), [("adapt.lora", {"merge": False}), ("adapt.ia3", {"merge": False}), ("adapt.bottleneck", {})]
)
def test_a_base_of_halves_has_adapters_of_halves(kind, settings, tmp_path):
    task = transformer_task()
    splits = {}
    for name in ("train", "calibrate", "validate", "test"):
        given, labels = getattr(task, name).tensors
        splits[name] = Arrays(given.bfloat16(), labels)
    task = Task(name="halves", model=copied(task.original).bfloat16(), batch_size=64, **splits)
    model, _ = run_step(step(kind, epochs=1, lr=0.01, **settings), task.fresh(), Context(task, device=CPU))
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    again = load_adapter(task.original, save_adapter(model, tmp_path / "file"))
    assert torch.equal(again(images().bfloat16()), model(images().bfloat16()))


class Twice(nn.Module):
    """One layer under two names, and one block of two layers under two: N x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.block, self.head = (
            nn.Linear(64, 64),
            nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )
        self.other, self.again = self.one, self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.block(torch.relu(self.other(torch.relu(self.one(x.flatten(1))))))))


@functools.cache
def twice() -> Task:
    torch.manual_seed(0)
    given = transformer_task()
    splits = {name: getattr(given, name) for name in ("train", "calibrate", "validate", "test")}
    return Task(name="twice", model=Twice().eval(), **splits)


@pytest.mark.parametrize(
    ("kind", "settings"), [("adapt.lora", {"merge": False}), ("adapt.ia3", {"merge": False}), ("adapt.bottleneck", {})]
)
def test_a_layer_under_two_names_has_its_adapter_under_both(kind, settings, tmp_path):
    task = twice()
    model, _ = run_step(step(kind, epochs=1, lr=0.01, **settings), task.fresh(), Context(task, device=CPU))
    assert model.one is model.other and model.block is model.again
    assert type(model.one) is type(model.block[0]) is not nn.Linear
    file = save_adapter(model, tmp_path / "file")
    again = load_adapter(task.original, file)
    assert base_digest(model) == base_digest(task.original) and close(again, model, 0)
    runner = target("onnxruntime").export(model, task.example, tmp_path / "base").open()
    runner.use(file)
    assert np.abs(runner(images()) - model(images()).detach().numpy()).max() < 1e-4
    runner.use(None)
    assert np.abs(runner(images()) - task.original(images()).detach().numpy()).max() < 1e-4


def test_merged_into_a_layer_under_two_names_the_outputs_stay():
    task, outputs = twice(), []
    for merge in (None, False):
        item = step("adapt.lora", epochs=1, lr=0.01, merge=merge)
        outputs.append(run_step(item, task.fresh(), Context(task, device=CPU))[0](images()))
    assert torch.allclose(*outputs, atol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_an_adapter_for_another_base_is_refused(tmp_path):
    file = save_adapter(adapted("int4"), tmp_path / "adapter.safetensors")
    runner = target("onnxruntime").export(adapted("float32"), transformer_task().example, tmp_path / "base").open()
    with pytest.raises(ArtifactError, match=r"belongs to another base \(digest [0-9a-f]{12}, this one's is"):
        runner.use(file)
    with pytest.raises(ArtifactError, match="belongs to another base"):
        load_adapter(base("int8"), file)


@pytest.mark.parametrize(
    ("kind", "settings", "other", "given", "words"),
    [
        (
            "bottleneck",
            {},
            "bottleneck",
            {"activation": "relu"},
            r"has a Bottleneck \(activation: relu\) at 'attend.out'",
        ),
        ("ia3", {"inputs": ["attend.out"]}, "ia3", {}, r"computes a Scaled \(of: inputs\); export the base with"),
        ("bottleneck", {}, "lora", {}, "has a LowRank at 'attend.out', where this artifact computes a Bottleneck"),
    ],
)
def test_an_adapter_that_computes_otherwise_is_refused_though_its_sizes_fit(
    kind, settings, other, given, words, tmp_path
):
    def made(name: str, given: dict) -> nn.Module:
        settings = {"only": "attend.out", "epochs": 1, **({} if name == "bottleneck" else {"merge": False}), **given}
        item = step(f"adapt.{name}", **settings)
        return run_step(item, copied(base("float32")), Context(transformer_task(), device=CPU))[0]

    runner = target("onnxruntime").export(made(kind, settings), transformer_task().example, tmp_path / "base").open()
    with pytest.raises(ArtifactError, match=words):
        runner.use(save_adapter(made(other, given), tmp_path / "file"))


def test_damaged_files_and_models_without_adapters_are_refused(tmp_path):
    file = save_adapter(adapted("float32"), tmp_path / "adapter.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    (tmp_path / "altered").write_bytes(bytes(content))
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("nothing")
    for name, words in {
        "altered": "was altered",
        "short": "is damaged",
        "text": "is damaged",
        "none": "no adapter file",
    }.items():
        with pytest.raises(ArtifactError, match=words):
            load_adapter(base("float32"), tmp_path / name)
    with pytest.raises(TaskError, match="holds no adapter"):
        save_adapter(base("float32"), tmp_path / "nothing")
    plain = target("onnxruntime").export(base("float32"), transformer_task().example, tmp_path / "plain")
    with pytest.raises(ArtifactError, match="no adapter to switch"):
        plain.open().use(file)
    narrow = target("onnxruntime").export(adapted("float32", only="wide"), transformer_task().example, tmp_path / "one")
    with pytest.raises(ArtifactError, match="for which this artifact has no slot"):
        narrow.open().use(file)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank=0: input should be greater than or equal to 1"),
        ({"rank": 64}, r"rank=64 is more than any chosen layer has \(at most 32\); lower it"),
        (
            {"only": "attend.nothing"},
            "there is no linear layer 'attend.nothing'; the first of the model are: attend.key",
        ),
        ({"skip": ["nowhere"]}, "there is no linear layer 'nowhere'"),
        ({"kind": "adapt.ia3", "inputs": ["nowhere"]}, "there is no linear layer 'nowhere'"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, words):
    with pytest.raises(RecipeError, match=words):
        adapted("float32", **settings)


def test_without_peft_it_says_what_to_install(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(
        MissingExtra, match=r"step 1 \(adapt.lora\) needs peft; run: pip install 'featherweight\[adapters\]'"
    ):
        Recipe([{"kind": "adapt.lora"}]).check()


def test_a_merge_of_a_form_that_cannot_be_rounded_again_is_refused():
    ctx = Context(transformer_task(), device=CPU)
    coded = run_recipe(Recipe([{"kind": "share.codebook", "bits": 4}]), ctx)[0]
    with pytest.raises(RecipeError, match=r"cannot be merged: its base is stored as codebook4; set merge: false"):
        run_step(step("adapt.lora", epochs=1, merge=True), coded, ctx)
