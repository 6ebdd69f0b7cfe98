"""MLPerf Tiny's reference models (Banbury et al., arXiv:2106.07597), and the Keyword Transformer (arXiv:2104.00769).

Only their evaluation sets are at hand: nothing to train on, and what validates and calibrates is a part of what tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data import Arrays
from ..core.outputs import first
from ..core.task import Task, ready_made
from .metrics import anomaly_auc
from .source import DATA, Source, cached
from .splits import balanced_order, unit_range

VERSION = 1
KEYWORDS, PICTURES, SOUNDS = (f"mlperf_tiny/{name}.npz.xz" for name in ("kws", "vww", "ad"))
KWT_ORDER = ["silence", "unknown", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
FRAMES, BANDS = 5, 128  # an input of the autoencoder is this many log-mel frames of this many bands
WINDOWS = 196  # such inputs in a clip of 200 frames
NOTE = (
    "Only an evaluation set is at hand, and all of it tests. A seeded, stratified half also validates, and a part of "
    "that half calibrates (without labels), so the test figure leans on data that choices were made on; the other half "
    "is unseen. There is nothing to train on."
)


def overlapping(part: Callable[[Tensor], Any], labels: Tensor, calibrate: int) -> dict[str, Any]:
    """Splits where all N items test: half of them validate, `calibrate` of that half calibrate (stratified, seeded).

    `part(index)` gives the data set of some items.
    """
    order = balanced_order(labels)
    half = order[: len(labels) // 2].sort().values
    return {"calibrate": part(order[:calibrate]), "validate": part(half), "test": part(torch.arange(len(labels)))}


def decoded(source: Source, file: str) -> dict[str, Tensor]:
    """The numeric arrays of an .npz.xz file of the data folder."""

    def make() -> dict[str, Tensor]:
        found = source.module("load").npz_xz(source.path(file))
        arrays = {name: found[name] for name in found.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "iuf"}

    return source.cached(file, VERSION, make)


@ready_made("kws-dscnn", variables=(DATA,))
def kws_dscnn() -> Task:
    """Keyword spotting by a depthwise separable network (MLPerf Tiny, 23,756 parameters), 1,000 clips, 91.5% right."""
    weights = "mlperf_tiny/kws_dscnn.safetensors"
    source = Source("kws-dscnn", KEYWORDS, weights, "nets.py", "load.py")
    found = decoded(source, KEYWORDS)
    features, labels = (found["mfcc_int8"][:, None].float() - 83) * 0.5847029, found["y"].long()
    return Task(
        name="kws-dscnn",
        model=lambda: source.weights(source.module("nets").DSCNN(), weights),
        **overlapping(lambda index: Arrays(features[index], labels[index]), labels, calibrate=100),
        fingerprint=source.fingerprint(VERSION),
        notes=NOTE,
    )


@ready_made("kws-kwt1", variables=(DATA,))
def kws_kwt1() -> Task:
    """Keyword spotting by the Keyword Transformer KWT-1 (607,308 parameters), 920 one-second clips, 97.07% right."""
    weights, frontend = "kwt1/kwt1.safetensors", "kwt1/frontend.safetensors"
    source = Source("kws-kwt1", KEYWORDS, weights, frontend, "nets.py", "load.py")
    features, labels = heard(source, frontend)
    return Task(
        name="kws-kwt1",
        model=lambda: source.weights(source.module("nets").KWT(), weights),
        **overlapping(lambda index: Arrays(features[index], labels[index]), labels, calibrate=100),
        fingerprint=source.fingerprint(VERSION),
        notes=f"{NOTE} The class 'silence' is left out: the network hears most of its loud background noise as words.",
    )


def heard(source: Source, frontend: str) -> tuple[Tensor, Tensor]:
    """The features (N x 98 x 40) of the clips that are not "silence", and their labels."""

    def make() -> dict[str, Tensor]:
        found = source.module("load").npz_xz(source.path(KEYWORDS))
        labels = torch.tensor([KWT_ORDER.index(found["names"][place]) for place in found["y"]])
        kept = labels != KWT_ORDER.index("silence")
        features = source.weights(source.module("nets").KWTFrontend(), frontend)
        with torch.no_grad():
            return {"x": features(torch.from_numpy(found["wav"])[kept].float() / 32768), "y": labels[kept]}

    made = cached("kwt1-features", [source.fingerprint(VERSION)], make)
    return made["x"], made["y"]


@ready_made("vww-mobilenet", variables=(DATA,))
def vww_mobilenet() -> Task:
    """Is a person in the picture: MobileNet v1 of a quarter width (216,322 parameters), 1,000 pictures, 85.3% right."""
    weights = "mlperf_tiny/vww_mobilenetv1_025_96.safetensors"
    source = Source("vww-mobilenet", PICTURES, weights, "nets.py", "load.py")
    found = decoded(source, PICTURES)
    images, labels = found["x"].permute(0, 3, 1, 2), found["y"].long()
    return Task(
        name="vww-mobilenet",
        model=lambda: source.weights(source.module("nets").MobileNetV1_025(), weights),
        **overlapping(lambda index: Arrays(images[index], labels[index], convert=unit_range), labels, calibrate=100),
        fingerprint=source.fingerprint(VERSION),
        notes=NOTE,
    )


class Spectrograms:
    """A map-style data set of clips (N x 200 x 128 log-mel energies): each is `WINDOWS` inputs, and a label."""

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


@ready_made("ad-autoencoder", variables=(DATA,))
def ad_autoencoder() -> Task:
    """Anomalous sounds of toy cars by an autoencoder (MLPerf Tiny, 267,928 parameters), 248 clips, AUC 0.880."""
    weights = "mlperf_tiny/ad_autoencoder.safetensors"
    source = Source("ad-autoencoder", SOUNDS, weights, "nets.py", "load.py")
    found = decoded(source, SOUNDS)
    clips, labels = found["x"], found["y"].long()
    return Task(
        name="ad-autoencoder",
        model=lambda: source.weights(source.module("nets").AnomalyAE(), weights),
        **overlapping(lambda index: Spectrograms(clips[index], labels[index]), labels, calibrate=16),
        loss=reconstruction_loss,
        metric=anomaly_auc(WINDOWS),
        batch_size=16,
        calibration_limit=16 * WINDOWS,
        fingerprint=source.fingerprint(VERSION),
        notes=f"{NOTE} The metric runs from 0 to 1: a drop of 0.005 is half a point.",
    )
