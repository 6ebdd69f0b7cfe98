"""distill.features: which layers are matched, projections, the losses in training, and what cannot be matched."""

from dataclasses import replace

import pytest
import torch
from small_tasks import Deep, Transformer, blocks_task, conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import RecipeError, TaskError
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.methods.distill.features import DistillFeatures
from featherweight.methods.distill.pairs import Layer, Pair, Watch, automatic, find_pairs, seen, spread
from featherweight.model.graph import captured

CPU = torch.device("cpu")
LOSSES = ("hint", "attention", "rkd", "crd", "cosine")


def narrow() -> nn.Module:
    torch.manual_seed(5)
    return Transformer(16).eval()


def missed(model: nn.Module, task, pair: tuple[str, str], item: DistillFeatures) -> float:
    """The loss of one pair of equally wide features on the test split."""
    with Watch(model, [pair[0]]) as mine, Watch(task.original, [pair[1]]) as theirs, torch.no_grad():
        images = task.test.tensors[0]
        model.eval()(images), task.original(images)
        return float(item._of(mine.found[pair[0]], theirs.found[pair[1]], nn.Identity(), None, None))


# -- which layers ----------------------------------------------------------------------------------------------------
def row(*shapes: tuple[int, ...], block: bool = True) -> list[Layer]:
    return [Layer(f"{place}", shape, block) for place, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("mine", "theirs", "wanted"),
    [(3, 6, [(0, 1), (1, 3), (2, 5)]), (6, 3, [(3, 0), (4, 1), (5, 2)]), (2, 5, [(0, 1), (1, 4)]), (1, 4, [(0, 3)])],
)
def test_blocks_are_spread_over_the_teachers(mine, theirs, wanted):
    found = spread(row(*[(2, 4, 8)] * mine), row(*[(2, 4, 8)] * theirs))
    assert [(int(one.name), int(other.name)) for one, other in found] == wanted


def test_the_last_block_of_each_resolution_whatever_its_width():
    student = row((2, 4, 8, 8), (2, 8, 4, 4), (2, 8, 4, 4))
    teacher = row((2, 16, 8, 8), (2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2))
    assert [(one.name, other.name) for one, other in automatic(student, teacher, False)] == [("0", "1"), ("2", "2")]


def test_vectors_have_no_attention():
    layers = row((2, 4, 8, 8), (2, 8), block=False)
    assert len(automatic(layers, layers, False)) == 2 and len(automatic(layers, layers, True)) == 1


def test_blocks_and_layers_are_seen_but_not_what_gives_the_answer():
    task = blocks_task()
    found = seen(task.fresh(), Context(task, device=CPU))
    assert {name for name, layer in found.items() if layer.block} == {*(f"rows.{i}" for i in range(4)), "turned.0"}
    assert "head" not in found and found["rows.2"].shape == (2, 8, 8, 8)


def test_a_shorter_student_learns_from_blocks_at_the_same_depth():
    task, ctx = blocks_task(), Context(blocks_task(), device=CPU)
    student = Deep().eval()
    student.rows = student.rows[:2]
    found = find_pairs("x", student, task.original, ctx, {}, ((0, 1), (-1, -1)), False, False)
    assert found == [Pair("rows.0", "rows.1", (8, 8)), Pair("turned.0", "turned.0", (12, 12))]
    automatically = find_pairs("x", student, task.original, ctx, {}, (), False, False)
    assert [pair.teacher for pair in automatically] == ["rows.1", "rows.2", "turned.0"]


# -- in training -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", ["hint", "attention", "rkd", "cosine"])
def test_features_come_nearer_to_the_teachers(loss):
    task = transformer_task()
    torch.manual_seed(1)
    student = Transformer().eval()
    item = step(
        "distill.features", loss=loss, weight=0, feature_weight=100, layers={"narrow": "narrow"}, epochs=6, lr=5e-3
    )
    before = missed(student, task, ("narrow", "narrow"), item)
    model, record = run_step(item, student, Context(task, device=CPU))
    assert missed(model, task, ("narrow", "narrow"), item) < 0.7 * before
    assert "narrow from narrow" in record.changed["*"]


def test_a_contrast_learns_with_its_projections():
    """Its loss falls below what embeddings that know nothing of one another have."""
    task = transformer_task()
    settings = {"loss": "crd", "weight": 0, "feature_weight": 100, "lr": 5e-3, "batch_size": 32}
    found = [
        run_step(step("distill.features", epochs=epochs, **settings), narrow(), Context(task, device=CPU))[1]
        for epochs in (0.2, 8)
    ]
    losses = [float(record.changed["*"].split("last loss ")[1].split(":")[0]) for record in found]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_narrower_student_is_projected_and_stays_what_it_was(loss):
    task = transformer_task()
    before = {name: tensor.shape for name, tensor in narrow().state_dict().items()}
    model, record = run_step(step("distill.features", loss=loss), narrow(), Context(task, device=CPU))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in task.original.modules())
    assert ("projected" in record.changed["*"]) == (loss in ("hint", "crd", "cosine"))


def test_a_row_of_layers_is_a_student():
    """nn.Sequential runs all that it holds: nothing may be hung on it."""
    task = conv_task()
    rows = replace(task, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval())
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    model, record = run_step(step("distill.features", layers={"2": "2"}), student, Context(rows, device=CPU))
    assert len(model) == 4 and "2 from 2 (8 projected to 32)" in record.changed["*"]


def test_projections_are_trained():
    task = transformer_task()
    kept = []

    class Kept(DistillFeatures):
        def _projections(self, pairs):
            heads = super()._projections(pairs)
            kept.append((heads, [parameter.detach().clone() for parameter in heads.parameters()]))
            return heads

    Kept(loss="hint", epochs=1).apply(narrow(), Context(task, device=CPU))
    heads, before = kept[0]
    assert before and all(not torch.equal(one, other) for one, other in zip(heads.parameters(), before))


def test_the_recipe_of_distilbert_is_the_weighted_sum_of_three_losses():
    task = conv_task()
    ctx, batch = Context(task, device=CPU), next(iter(task.batches("train")))
    torch.manual_seed(2)
    student = type(task.original)().eval()
    item = step("distill.features", loss="cosine", weight=5 / 7, feature_weight=1 / 7, layers={"hidden": "hidden"})
    pairs = find_pairs("x", student, task.original, ctx, item.layers, (), False, False)
    with Watch(student, ["hidden"]) as mine, Watch(task.original, ["hidden"]) as theirs:
        term = item.features_term(pairs, item._projections(pairs), task.original, mine, theirs)
        output = task.call(student, batch)
        found = term(student, batch, output, ctx)
        one, other = mine.found["hidden"].double(), theirs.found["hidden"].double()
        cosine = (1 - (one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)).mean()
    p, q = (torch.softmax(each.double() / 4, -1) for each in (task.original(batch[0]), output))
    soft = 16 * (p * (p / q).log()).sum(-1).mean()
    wanted = (5 * soft + 2 * nn.functional.cross_entropy(output, batch[1]) + cosine) / 7
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_padding_is_not_compared():
    item = step("distill.features", loss="cosine")
    mine, theirs = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    found = item._of(mine, theirs, nn.Identity(), real, None)
    assert torch.allclose(found, item._of(mine[real], theirs[real], nn.Identity(), None, None))
    mine[~real] += 10
    assert torch.allclose(found, item._of(mine, theirs, nn.Identity(), real, None))


# -- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layers": {"nothing": "last"}}, "the student has no layer 'nothing'"),
        ({"layers": {"last": "nothing"}}, "the teacher has no layer 'nothing'"),
        ({"layers": {"head": "head"}}, "the student has no layer 'head' that runs once and gives features"),
        ({"blocks": [[0, 0]]}, "the student has 0 blocks in rows, none at place 0"),
        ({"teacher": "nonsense"}, "names no task"),
    ],
)
def test_layers_that_cannot_be_matched_are_refused_in_one_line(settings, text):
    task = transformer_task()
    with pytest.raises(TaskError, match=text) as caught:
        run_step(step("distill.features", **settings), task.fresh(), Context(task, device=CPU))
    assert "\n" not in str(caught.value)


def test_features_of_other_forms_are_refused():
    task = conv_task()
    ctx = Context(task, device=CPU)
    with pytest.raises(
        TaskError, match=r"hidden gives \(2, 32\), stem of the teacher \(2, 16, 8, 8\); they may differ"
    ):
        run_step(step("distill.features", layers={"hidden": "stem"}), task.fresh(), ctx)
    with pytest.raises(TaskError, match="attention needs features with positions"):
        run_step(step("distill.features", loss="attention", layers={"hidden": "hidden"}), task.fresh(), ctx)


def test_outputs_alone_teach_no_features(tmp_path):
    from featherweight.core.target import target

    task = transformer_task()
    target("torch").export(task.original, task.example, tmp_path / "artifact")
    with pytest.raises(TaskError, match=r"gives outputs alone; take it in distill\.logits"):
        run_step(step("distill.features", teacher=str(tmp_path / "artifact")), narrow(), Context(task, device=CPU))


def test_settings_are_plain_data():
    item = step("distill.features", layers={"a": "b"}, blocks=[[0, 1], [-1, -1]])
    assert Recipe.parse(Recipe([item]).dump()).steps[0] == item
    with pytest.raises(RecipeError, match=r"distill\.features: .*blocks"):
        step("distill.features", blocks=[[0]])


def test_layers_of_a_captured_graph_are_seen_by_the_operations_that_read_their_weights():
    task = conv_task()
    ctx = Context(task, device=CPU)
    graph = captured(task.fresh(), ctx.example, {})
    code, layers = graph.code, seen(task.fresh(), ctx)
    found = seen(graph, ctx)
    assert {name: found[name].shape for name in ("stem", "conv", "depth", "hidden")} == {
        name: layers[name].shape for name in ("stem", "conv", "depth", "hidden")
    }
    assert graph.code == code and not hasattr(graph, "taps")
    model, record = run_step(step("distill.features", epochs=1), graph, ctx)
    assert "depth from depth" in record.changed["*"]
    assert model.code == code
