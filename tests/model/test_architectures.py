"""Every architecture of the zoo: pruned by 30% from the graph to the exported file, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tasks import one_thread  # noqa: F401

pytest.importorskip("transformers")

from benchmarks.architectures import BOUND, NETWORKS, Side, backward, cell, prove, summary, task_of
from benchmarks.architectures import Row as Line
from featherweight.core.context import count_parameters
from featherweight.model.cost import parameters
from featherweight.model.cut import disagreement, remove, silence
from featherweight.model.groups import couple

OFTEN = sorted(NETWORKS)[::5]  # tried in every run of the tests; the others in the slow ones
EACH = [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow]) for name in NETWORKS]


def test_the_zoo_holds_what_is_in_use():
    assert len(NETWORKS) >= 50
    wanted = "ResNet DenseNet Inception VGG MobileNet ConvNeXt EfficientNet ShuffleNet ResNeXt U-Net FPN BERT ViT Swin"
    wanted += " GPT-2 GPT-NeoX OPT Llama Mistral Qwen2 Gemma Phi T5 BART Whisper CLIP LSTM GRU tied MLP-Mixer experts"
    assert not [part for part in wanted.split() if not any(part in name for name in NETWORKS)]


@pytest.mark.parametrize("name", EACH)
def test_silenced_equals_removed(name: str):
    """Half of every group goes; what is left gives what silencing gives, and costs what was said."""
    task = task_of(name, NETWORKS[name])
    coupling = couple(task.original, task.example)
    if NETWORKS[name].refused:
        assert not coupling.free()
        return
    cut = {place: np.arange(0, len(coupling.groups[place]) - 1, 2) for place in coupling.free()}
    assert disagreement(task.original, coupling, cut, task.example) == ""
    silent = silence(copy.deepcopy(task.original), coupling, cut)
    smaller = remove(copy.deepcopy(task.original), coupling, cut)
    kept = [len(group) - len(cut.get(place, ())) for place, group in enumerate(coupling.groups)]
    assert count_parameters(smaller) == parameters(coupling)(kept) < count_parameters(task.original)
    backward(smaller, task)
    with torch.no_grad():
        assert float(task.loss(smaller(**task.example), None)) == pytest.approx(
            float(task.loss(silent(**task.example), None)), rel=1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_saved_loaded_exported_and_run(name: str, tmp_path: Path):
    side = prove(task_of(name, NETWORKS[name]), tmp_path)
    if NETWORKS[name].refused:
        assert side.state == "refused" and NETWORKS[name].refused in side.reason
        return
    assert side.passes, side
    assert side.removed is not None and side.removed > 0.05
    assert side.difference is not None and side.difference <= BOUND


def test_the_page_says_what_fails_and_what_removes_nothing():
    good = Side(state="done", removed=0.3, difference=1e-7)
    moved = Side(state="done", removed=0.3, difference=1e-7, moved=0.4)
    nothing = Side(state="done", removed=0.0, difference=1e-7)
    late = Side(state="out of time", reason="did not end in 90 s")
    assert [each.passes for each in (good, moved, nothing, late)] == [True, True, False, False]
    assert cell(nothing) == "removes nothing, without a word"
    assert cell(moved) == "30%, 1e-07; moves by 0.4"
    assert cell(late) == "out of time: did not end in 90 s"
    lines = [Line(network="a", ours=good, peer=moved), Line(network="b", ours=good, peer=late, peer_heads=good)]
    said = " ".join(summary(lines))
    assert "featherweight: 2 of 2 pass" in said
    assert "1 pass as it comes, 2 with head counts; of those 1 do not move" in said
