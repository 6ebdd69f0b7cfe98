"""Every recipe that ships with the package runs on a small network, from its name to the artifact."""

from importlib.resources import files
from pathlib import Path

import pytest
from small_tasks import conv_task

from featherweight.core.recipe import Recipe
from featherweight.core.target import target
from featherweight.search.pipeline import apply

NAMED = sorted(
    path.name.removesuffix(".yaml") for path in files("featherweight.recipes").iterdir() if path.name.endswith(".yaml")
)


def test_there_are_some() -> None:
    assert {"int8", "int8-dynamic", "slim-int8"} <= set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe(name: str, out: Path) -> None:
    recipe = Recipe.read(name)
    assert recipe.name == name and recipe.notes
    run = apply(conv_task(), recipe, target("onnxruntime"), out, axes=["accuracy", "size"])
    assert [record.step["kind"] for record in run.steps] == [item.kind for item in recipe.steps]
    assert (out / "artifact" / "model.onnx").is_file() and "int8" in {layer.form for layer in run.layers}
