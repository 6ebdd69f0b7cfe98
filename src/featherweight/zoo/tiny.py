"""The MLPerf Tiny reference models (Banbury et al., arXiv:2106.07597) and the Keyword Transformer (Berg et al., arXiv:2104.00769).

Only their evaluation sets are at hand, so there is nothing to train on, and what validates and calibrates is a part of what tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.data import Arrays
from ..core.outputs import first
from ..core.task import Task, ready_made
from .metrics import anomaly_auc
from .source import Source
from .splits import balanced_order

VERSION = 1
KEYWORDS, PICTURES, SOUNDS = (f"mlperf_tiny/{name}.npz.xz" for name in ("kws", "vww", "ad"))
KWT_ORDER = "silence unknown yes no up down left right on off stop go".split()
FRAMES, BANDS = 5, 128  # an input of the autoencoder is this many log-mel frames of this many bands
WINDOWS = 196  # such inputs in a clip of 200 frames


def overlapping(labels: Tensor, calibrate: int) -> tuple[dict[str, Tensor], str]:
    """Indices of calibrate, validate and test where all N items test, and a note that says what overlaps.

    Half of the items validate, `calibrate` of that half calibrate (stratified and seeded); the other half is seen by the test alone.
    """
    order, half = balanced_order(labels), len(labels) // 2
    parts = {"calibrate": order[:calibrate], "validate": order[:half].sort().values, "test": torch.arange(len(labels))}
    return parts, (
        f"Only an evaluation set of {len(labels)} is at hand, and all of it tests. A seeded, stratified half also validates and {calibrate} of "
        "that half calibrate (without labels), so the test figure leans on data that choices were made on; the other half is unseen. "
        "There is nothing to train on."
    )


def decoded(source: Source, file: str) -> dict[str, Tensor]:
    """The numeric arrays of an .npz.xz file of the data folder."""

    def make() -> dict[str, Tensor]:
        found = source.module("load").npz_xz(source.path(file))
        arrays = {name: found[name] for name in found.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "iuf"}

    return source.cached(file, VERSION, make)


@ready_made("kws-dscnn")
def kws_dscnn() -> Task:
    """Keyword spotting by a depthwise separable network (MLPerf Tiny): 23,756 parameters, 1,000 one-second clips, 91.5% right."""
    weights = "mlperf_tiny/kws_dscnn.safetensors"
    source = Source("kws-dscnn", KEYWORDS, weights, "nets.py", "load.py")
    found = decoded(source, KEYWORDS)
    features, labels = (found["mfcc_int8"][:, None].float() - 83) * 0.5847029, found["y"].long()
    parts, note = overlapping(labels, calibrate=100)
    return Task(
        name="kws-dscnn",
        model=lambda: source.weights(source.module("nets").DSCNN(), weights),
        **{split: Arrays(features[index], labels[index]) for split, index in parts.items()},
        fingerprint=source.fingerprint(VERSION),
        notes=note,
    )


@ready_made("kws-kwt1")
def kws_kwt1() -> Task:
    """Keyword spotting by the Keyword Transformer KWT-1: 607,308 parameters, 920 one-second clips, 97.07% right."""
    weights, frontend = "kwt1/kwt1.safetensors", "kwt1/frontend.safetensors"
    source = Source("kws-kwt1", KEYWORDS, weights, frontend, "nets.py", "load.py")
    found, nets = decoded(source, KEYWORDS), source.module("nets")
    names = [str(name) for name in source.module("load").npz_xz(source.path(KEYWORDS))["names"]]
    labels = torch.tensor([KWT_ORDER.index(name) for name in names])[found["y"].long()]
    heard = labels != KWT_ORDER.index("silence")
    with torch.no_grad():
        features = source.weights(nets.KWTFrontend(), frontend)(found["wav"][heard].float() / 32768)
    labels = labels[heard]
    parts, note = overlapping(labels, calibrate=100)
    return Task(
        name="kws-kwt1",
        model=lambda: source.weights(nets.KWT(), weights),
        **{split: Arrays(features[index], labels[index]) for split, index in parts.items()},
        fingerprint=source.fingerprint(VERSION),
        notes=f"{note} The class 'silence' is left out: the network hears most of that class's loud background noise as words.",
    )


@ready_made("vww-mobilenet")
def vww_mobilenet() -> Task:
    """Visual wake words (is a person in the picture) by MobileNet v1 at a quarter of its width: 216,322 parameters, 1,000 pictures, 85.3% right."""
    weights = "mlperf_tiny/vww_mobilenetv1_025_96.safetensors"
    source = Source("vww-mobilenet", PICTURES, weights, "nets.py", "load.py")
    found = decoded(source, PICTURES)
    images, labels = found["x"].permute(0, 3, 1, 2), found["y"].long()
    parts, note = overlapping(labels, calibrate=100)
    return Task(
        name="vww-mobilenet",
        model=lambda: source.weights(source.module("nets").MobileNetV1_025(), weights),
        **{
            split: Arrays(images[index], labels[index], convert=lambda x: x.float() / 255)
            for split, index in parts.items()
        },
        fingerprint=source.fingerprint(VERSION),
        notes=note,
    )


class Spectrograms:
    """A map-style data set of clips (N x 200 x 128 log-mel energies): a clip is `WINDOWS` inputs, each of 5 frames, and one label."""

    def __init__(self, clips: Tensor, labels: Tensor):
        self.clips, self.labels = clips, labels

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        windows = self.clips[index].float().flatten(1).unfold(1, FRAMES * BANDS, BANDS)
        return {"x": windows.flatten(0, 1), "labels": self.labels[index]}


def reconstruction_loss(output: Any, batch: Any) -> Tensor:
    """Mean squared difference between input and output."""
    return nn.functional.mse_loss(first(output), batch["x"])


@ready_made("ad-autoencoder")
def ad_autoencoder() -> Task:
    """Anomalous sounds of toy cars by an autoencoder (MLPerf Tiny): 267,928 parameters, 248 clips, area under the curve 0.880."""
    weights = "mlperf_tiny/ad_autoencoder.safetensors"
    source = Source("ad-autoencoder", SOUNDS, weights, "nets.py", "load.py")
    found = decoded(source, SOUNDS)
    clips, labels = found["x"], found["y"].long()
    parts, note = overlapping(labels, calibrate=16)
    return Task(
        name="ad-autoencoder",
        model=lambda: source.weights(source.module("nets").AnomalyAE(), weights),
        **{split: Spectrograms(clips[index], labels[index]) for split, index in parts.items()},
        loss=reconstruction_loss,
        metric=anomaly_auc(WINDOWS),
        batch_size=16,
        calibration_limit=16 * WINDOWS,
        fingerprint=source.fingerprint(VERSION),
        notes=f"{note} The metric runs from 0 to 1: a drop of 0.005 is half a point.",
    )
