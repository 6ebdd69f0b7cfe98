"""Runs as a search leaves them: a full one, and the ends at which something is missing."""

from __future__ import annotations

import math
from typing import Any

from featherweight.core.reading import Reading
from featherweight.core.record import LeftAlone, StepRecord
from featherweight.core.run import Budget, Candidate, Layer, Run, Stage

MACHINE = "AMD EPYC 9354 32-Core Processor, 2 cores, Linux x86_64"
RUNTIME = "onnxruntime 1.31.1"
NASTY = """</script><img src=x onerror="document.title='broken'"> & 'quoted' "twice" {{ 7*7 }} über 名前"""


def reading(subject: str, axis: str, name: str, value: float, unit: str, **rest: Any) -> Reading:
    return Reading(
        **{
            "subject": subject,
            "axis": axis,
            "name": name,
            "value": value,
            "unit": unit,
            "runtime": RUNTIME,
            "machine": MACHINE,
        }
        | rest
    )


def both(
    axis: str, name: str, before: float, after: float, unit: str, spread: float = 0.0, **rest: Any
) -> list[Reading]:
    """One figure of both artifacts, with an interval of relative width `spread`."""
    found = []
    for subject, value in (("original", before), ("compressed", after)):
        bounds = {"low": value * (1 - spread), "high": value * (1 + spread)} if spread else {}
        found.append(reading(subject, axis, name, value, unit, **bounds, **rest))
    return found


def readings() -> list[Reading]:
    accuracy: dict[str, Any] = {"n": 10_000, "split": "test", "conditions": {"batch": 64}}
    found = [
        reading("original", "accuracy", "top1", 87.82, "%", low=87.17, high=88.44, **accuracy),
        reading("compressed", "accuracy", "top1", 87.49, "%", low=86.83, high=88.13, **accuracy),
        reading("compressed", "accuracy", "drop", 0.33, "%", low=0.04, high=0.61, **accuracy),
        reading("compressed", "accuracy", "agreement", 95.31, "%", low=94.88, high=95.71, **accuracy),
        *both("size", "file_bytes", 1_155_492, 129_310, "bytes"),
        *both("size", "weight_bytes", 1_078_888, 118_204, "bytes"),
        *both("size", "parameters", 269_722, 112_394, ""),
        reading("compressed", "size", "ratio", 1_155_492 / 129_310, "x"),
        *both("size", "macs", 40_551_040, 17_330_112, ""),
        *both("size", "integer_macs", 0, 17_322_880, ""),
    ]
    for batch, p50, after in ((1, 1.3741, 0.5312), (32, 33.417, 8.912)):
        for name, factor in (("p50_ms", 1.0), ("p95_ms", 1.21), ("p99_ms", 1.52)):
            where = {"batch": batch, "threads": 1}
            found += both(
                "latency", name, p50 * factor, after * factor, "ms", 0.03, n=640, conditions=where, split="test"
            )
        rest: dict[str, Any] = {"n": 640, "conditions": where, "split": "test"}
        found += both("latency", "throughput", 1000 * batch / p50, 1000 * batch / after, "inputs/s", 0.03, **rest)
        found.append(
            reading(
                "compressed",
                "latency",
                "speedup",
                p50 / after * 1.01,
                "x",
                low=p50 / after * 0.98,
                high=p50 / after * 1.03,
                **rest,
            )
        )
    found += both("memory", "peak_bytes", 92_340_224, 90_112_000, "bytes", 0.021, n=3)
    modelled = {"kind": "modelled", "conditions": {"model": "Horowitz 2014, 45 nm"}}
    return found + both("energy", "mj_per_inference", 0.2191, 0.0311, "mJ", **modelled)


def recipe(keep: float, score: str = "taylor", epochs: int = 4, quantize: bool = True) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"kind": "prune.structured", "keep": keep, "score": score, "rounds": 2},
        {"kind": "distill.logits", "epochs": epochs, "temperature": 4.0, "lr": 0.003},
    ]
    return {"steps": steps + ([{"kind": "quantize.static", "calibration": "percentile"}] if quantize else [])}


def done(number: int, made: dict[str, Any], accuracy: float, size: int, latency: float, **rest: Any) -> Candidate:
    """A candidate that was measured; the original has 87.98 %."""
    figures = {"accuracy": accuracy, "drop": 87.98 - accuracy, "drop_high": 88.23 - accuracy, "bytes": size}
    return Candidate(
        number=number, recipe=made, state="done", latency_ms=latency, seconds=100.0 + number, **figures, **rest
    )


def unfit(number: int, made: dict[str, Any], state: str, reason: str) -> Candidate:
    return Candidate(number=number, recipe=made, state=state, reason=reason)  # type: ignore[arg-type]


def candidates() -> list[Candidate]:
    """25 recipes: 6 on the front, the others behind it, failed or refused."""
    found = [
        done(0, {"steps": [{"kind": "quantize.static"}]}, 87.9, 297_400, 0.801, feasible=True, front=True),
        unfit(
            1, {"steps": [{"kind": "quantize.dynamic"}]}, "refused", "step 1 (quantize.dynamic) has no layer to work on"
        ),
        done(2, recipe(0.7), 87.95, 212_100, 0.655, feasible=True, front=True),
        done(3, recipe(0.42), 87.66, 129_310, 0.531, feasible=True, front=True, chosen=True, energy_mj=0.0311),
        done(4, recipe(0.3), 86.71, 101_310, 0.468, front=True),
        done(5, recipe(0.2), 84.9, 74_120, 0.402, front=True),
        done(6, recipe(0.85, "l1", 6, quantize=False), 88.04, 962_000, 1.21, feasible=True, front=True),
        unfit(7, recipe(0.5, "bn"), "failed", f"NotFinite: the loss became nan at step 41 of 312; {NASTY}"),
        unfit(8, recipe(0.5), "refused", "step 2 needs a model that is still reshapable, but step 1 ended that"),
        done(9, recipe(0.1, "l2", 1), 41.2, 52_000, 0.35),
        unfit(10, recipe(0.6, "l1"), "failed", "ArtifactError: the outputs differ by 0.31 (relative), more than 0.1"),
    ]
    for number in range(11, 25):
        keep = 0.3 + 0.045 * (number - 11)
        accuracy = 88.0 - 2.4 * math.exp(-6 * (keep - 0.22)) - 0.25 - 0.1 * (number % 4)
        made = recipe(round(keep, 3), ("l1", "l2", "bn", "taylor")[number % 4], number % 5 + 1, number % 3 != 0)
        size, latency = (
            1_100_000 * keep * (0.27 if number % 3 else 1),
            (0.3 + 0.5 * keep) * (1.06 if number % 3 else 1.75),
        )
        found.append(done(number, made, accuracy, int(size), latency, feasible=87.98 - accuracy <= 0.25))
    return found


def layers() -> list[Layer]:
    """The 22 weights of a ResNet-20 with a batch norm and a removed convolution."""
    found = [
        Layer(
            name="conv1.weight",
            shape_before=[16, 3, 3, 3],
            shape_after=[16, 3, 3, 3],
            bytes_before=1728,
            bytes_after=496,
            form="int8",
        )
    ]
    for place in range(19):
        stage = min(3, place // 6 + 1)
        wide = 8 * 2**stage
        kept = max(8, wide * (3 + place % 3) // 8 // 8 * 8)
        name = f"layer{stage}.{place % 6 // 2}.conv{place % 2 + 1}.weight"
        before, after = wide * wide * 9 * 4, kept * kept * 9 + 4 * kept
        found.append(
            Layer(
                name=name,
                shape_before=[wide, wide, 3, 3],
                shape_after=[kept, kept, 3, 3],
                bytes_before=before,
                bytes_after=after,
                form="int8",
            )
        )
    found.append(
        Layer(
            name="layer3.2.shortcut.weight",
            shape_before=[64, 32, 1, 1],
            shape_after=None,
            bytes_before=8192,
            bytes_after=0,
            form="removed",
        )
    )
    found.append(
        Layer(
            name="linear.weight",
            shape_before=[10, 64],
            shape_after=[10, 40],
            bytes_before=2560,
            bytes_after=440,
            form="int8",
        )
    )
    return found


def steps() -> list[StepRecord]:
    left = [
        LeftAlone(layer=name, reason="its channels meet a padded shortcut that cannot be cut")
        for name in ("layer2.0.conv2", "layer3.0.conv2")
    ]
    return [
        StepRecord(
            step={
                "kind": "prune.structured",
                "keep": 0.42,
                "of": "macs",
                "score": "taylor",
                "rounds": 2,
                "retrain": {"epochs": 1.0, "lr": 0.003},
            },
            changed={f"layer{stage}.{block}.conv1": "32 -> 16" for stage in (1, 2, 3) for block in range(3)},
            left=[*left, LeftAlone(layer=f"head<{NASTY}>", reason="it is named in skip")],
            warnings=["asked for 0.42 of the multiply-accumulates, reached 0.427: widths are multiples of 8"],
            seconds=71.4,
            parameters_before=269_722,
            parameters_after=112_394,
        ),
        StepRecord(
            step={"kind": "distill.logits", "epochs": 4, "temperature": 4.0, "lr": 0.003},
            changed={"linear": "trained"},
            seconds=152.0,
            parameters_before=112_394,
            parameters_after=112_394,
        ),
        StepRecord(
            step={"kind": "prune.weights", "sparsity": 0.3},
            changed={"linear": "30% zeros"},
            seconds=0.4,
            parameters_before=112_394,
            parameters_after=112_394,
        ),
        StepRecord(
            step={"kind": "quantize.static", "calibration": "percentile"},
            changed={"conv1": "int8"},
            left=[LeftAlone(layer="shortcut.pad", reason="it has no weight")],
            seconds=7.9,
            parameters_before=112_394,
            parameters_after=112_394,
        ),
    ]


def stages() -> list[Stage]:
    return [
        Stage(after="original", accuracy=87.98, bytes=1_155_492, latency_ms=1.374, parameters=269_722, macs=40_551_040),
        Stage(
            after="prune.structured",
            accuracy=85.92,
            bytes=497_000,
            latency_ms=0.874,
            parameters=112_394,
            macs=17_330_112,
        ),
        Stage(
            after="distill.logits", accuracy=87.81, bytes=497_000, latency_ms=0.871, parameters=112_394, macs=17_330_112
        ),
        Stage(
            after="prune.weights",
            accuracy=87.74,
            bytes=497_000,
            latency_ms=0.876,
            parameters=112_394,
            macs=17_330_112,
        ),
        Stage(
            after="quantize.static",
            accuracy=87.66,
            bytes=129_310,
            latency_ms=0.531,
            parameters=112_394,
            macs=17_330_112,
        ),
    ]


def full() -> Run:
    """A search that went well."""
    return Run(
        task="zoo:cifar10-resnet20",
        task_name="cifar10-resnet20",
        target={"name": "onnxruntime", "activations": "auto"},
        budget=Budget(max_drop=0.5, objective="latency"),
        seed=0,
        command="featherweight compress zoo:cifar10-resnet20 --target onnxruntime --max-drop 0.5 --time 10m --out out",
        verdict="8.9x smaller and 2.6x faster (p50, batch 1, 1 thread) than the original in onnxruntime, 0.33 points "
        "of top1 lost (87.82 -> 87.49 %, n=10,000): meets the bar of at most 0.5 points lost",
        feasible=True,
        artifact="artifact",
        recipe={"name": f"slim {NASTY}", **recipe(0.42)},
        metric={"name": "top1", "unit": "%", "higher_is_better": True},
        readings=readings(),
        steps=steps(),
        stages=stages(),
        layers=layers(),
        candidates=candidates(),
        warnings=[
            "prune.weights bought nothing here: the target onnxruntime stores zeros as it stores any other value",
            f"a warning with nasty characters: {NASTY}",
        ],
        evidence={
            "integer_kernels": {"QLinearConv": 19, "QGemm": 1, "QLinearAdd": 9, "QLinearGlobalAveragePool": 1},
            "float_kernels": {"Conv": 0, "Gemm": 0},
            "integer_layers": [layer.name for layer in layers() if layer.form == "int8"],
            "float_layers": [],
            "activations": "uint8",
        },
        seconds=603.2,
        created="2025-01-31T12:00:00Z",
        versions={"python": "3.11.2", "featherweight": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1"},
    )


def applied() -> Run:
    """One recipe, no search and no bar: no candidates."""
    return full().model_copy(
        update={
            "candidates": [],
            "budget": Budget(),
            "command": "featherweight apply recipe.yaml zoo:cifar10-resnet20",
            "warnings": [],
        }
    )


def gained_nothing() -> Run:
    """The compressed artifact is larger and slower, and as good as the original."""
    shown = [
        *both("accuracy", "top1", 87.82, 87.82, "%", n=10_000, split="test"),
        *both("size", "file_bytes", 1_155_492, 1_190_000, "bytes"),
        *both("latency", "p50_ms", 1.37, 1.64, "ms", 0.02, n=300, conditions={"batch": 1, "threads": 1}),
    ]
    changes = {
        "readings": shown,
        "verdict": "1.20x slower and 1.03x larger than the original in onnxruntime, nothing lost",
    }
    return full().model_copy(
        update=changes | {"candidates": candidates()[:1], "stages": [], "steps": [], "layers": [], "evidence": {}}
    )


def infeasible() -> Run:
    """Nothing met the bar, and all that was tried failed or was refused."""
    lost = [
        item.model_copy(update={"feasible": False, "chosen": False, "front": False})
        for item in candidates()
        if item.state != "done"
    ]
    changes = {
        "feasible": False,
        "budget": Budget(max_drop=0.5, max_size=50_000, max_latency=0.2),
        "candidates": lost,
        "warnings": [],
    }
    return full().model_copy(
        update=changes
        | {"verdict": "Nothing met the bar of at most 50 kB; the nearest was 129 kB with 0.33 points lost."}
    )


def lower_is_better() -> Run:
    """A language model judged by perplexity, with a latency limit."""
    found = []
    for item in candidates():
        if item.accuracy is not None and item.drop is not None:
            item = item.model_copy(
                update={
                    "accuracy": 7.2 + item.drop,
                    "latency_ms": 9 * (item.latency_ms or 0),
                    "bytes": 9 * (item.bytes or 0),
                }
            )
        found.append(item)
    marks = [
        stage.model_copy(update={"accuracy": 7.2 + (87.98 - stage.accuracy), "latency_ms": 9 * stage.latency_ms})
        for stage in stages()
    ]
    shown = [item for item in readings() if item.axis != "accuracy"] + both(
        "accuracy", "perplexity", 7.21, 7.48, "", 0.02, n=150, split="test"
    )
    changes = {
        "metric": {"name": "perplexity", "unit": "", "higher_is_better": False},
        "candidates": found,
        "stages": marks,
        "readings": shown,
    }
    return full().model_copy(
        update=changes | {"budget": Budget(max_drop=0.5, max_latency=8.0), "task_name": "stories260k"}
    )


def empty() -> Run:
    """The least that a run can hold."""
    return Run(
        task="",
        task_name="nothing",
        target={"name": "torch"},
        budget=Budget(max_drop=1.0),
        seed=7,
        verdict="Nothing was measured.",
        feasible=False,
        artifact="",
        recipe={"steps": []},
        metric={"name": "top1"},
        readings=[],
    )


ALL = {
    "full": full,
    "applied": applied,
    "gained_nothing": gained_nothing,
    "infeasible": infeasible,
    "lower_is_better": lower_is_better,
    "empty": empty,
}
