"""The page of a diagnosis: whole, small, without network, and true in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.core.diagnosis import Collapse, Diagnosis, LayerPrice
from featherweight.core.record import LeftAlone
from featherweight.report.build import build_diagnosis
from featherweight.report.diagnosis import lines, sentence


def price(layer: str, drop: float, signal: float | None) -> LayerPrice:
    return LayerPrice(layer=layer, how="int8", drop=drop, low=drop - 1, high=drop + 1, signal_db=signal)


def diagnosis(**given: object) -> Diagnosis:
    values: dict[str, object] = {
        "task": "zoo:<digits>",
        "method": {"kind": "quantize.static"},
        "split": "validate",
        "n": 300,
        "metric": {"name": "top1", "unit": "%", "higher_is_better": True},
        "bar": 0.5,
        "original": 99.0,
        "compressed": 60.0,
        "drop": 39.0,
        "layers": [price("stem", 30.0, 2.0), price("head", 0.0, None)],
        "left": [LeftAlone(layer="norm", reason="stays in floats")],
        "skip": ["stem"],
        "skipped_drop": 0.25,
    }
    return Diagnosis.model_validate(values | given)


def test_the_page_holds_every_layer_and_the_line(tmp_path: Path):
    page = build_diagnosis(diagnosis(), tmp_path / "diagnosis.html").read_text(encoding="utf-8")
    for text in ("stem", "head", "skip: [stem]", "30.00\u00a0points", "2.0 dB", "no noise", "stays in floats", "norm"):
        assert text in page
    assert "zoo:&lt;digits&gt;" in page and "<digits>" not in page
    assert len(page.encode()) < 200_000 and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "The worst layer is stem; skipped, the loss is within the bar of 0.50 % (0.25 points lost)."),
        ({"skip": [], "bar": None}, "No layer needs to be left out: the loss is within what chance explains."),
        ({"enough": False}, "leaving that out does not bring the loss within the bar"),
        (
            {"collapse": Collapse(how="top1 at chance", layer="stem", sign="its output is NaN or infinite")},
            "makes the model collapse: top1 at chance; it starts at stem (its output is NaN or infinite).",
        ),
    ],
)
def test_the_sentence_says_what_was_found(given: dict[str, object], said: str):
    assert said in sentence(diagnosis(**given)).replace("\u00a0", " ")


def test_bars_grow_with_noise():
    loud, quiet = lines(diagnosis())
    assert 90 < loud.bar <= 100 and quiet.bar == 0 and loud.skipped and not quiet.skipped
