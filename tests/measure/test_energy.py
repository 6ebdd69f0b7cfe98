"""Energy: counters that are known to the microjoule, and the stated model."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy_target import variant

from featherweight.core.axis import Bench
from featherweight.core.reading import find
from featherweight.core.target import Artifact, Work
from featherweight.measure.counters import nvml_counters, rapl_counters, spent
from featherweight.measure.energy import PICOJOULES, Energy, modelled

LIMIT = 262_143_328_850


def zone(folder: Path, name: str, label: str, value: int = 0) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "name").write_text(label + "\n")
    (made / "energy_uj").write_text(f"{value}\n")
    (made / "max_energy_range_uj").write_text(f"{LIMIT}\n")
    return made / "energy_uj"


@pytest.mark.parametrize("start", [0, LIMIT - 700])  # the second counter starts anew in the middle
def test_counted_joules_are_found(original: Artifact, bench: Callable[..., Bench], tmp_path: Path, start: int):
    path = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", start)
    made = bench(counter=str(path), microjoules=200)
    made.original = variant(original, tmp_path / "counted", counter=str(path), microjoules=500)
    readings = Energy(counters=str(tmp_path / "powercap"), seconds=0.2).read(made)
    one, other = (find(readings, subject, "mj_per_inference") for subject in ("original", "compressed"))
    assert one is not None and other is not None
    assert (one.value, other.value) == (pytest.approx(0.5), pytest.approx(0.2))
    assert one.kind == other.kind == "measured" and one.unit == "mJ" and one.n == 5
    assert one.conditions["counter"] == "RAPL package-0"
    ratio = find(readings, "compressed", "energy_ratio")
    assert ratio is not None and ratio.value == pytest.approx(2.5) and ratio.kind == "measured"


def test_joules_are_counted_once(tmp_path: Path):
    """A part of a package is in the package; the platform holds all; memory stands apart."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:0:1", "dram")
    zone(tmp_path, "intel-rapl:1", "psys")
    (tmp_path / "intel-rapl").mkdir()
    assert [counter.name for counter in rapl_counters(tmp_path)] == ["RAPL package-0", "RAPL dram"]


def test_a_counter_starts_anew():
    assert spent(10, 25, 100) == 15
    assert spent(95, 4, 100) == 10


@pytest.mark.parametrize("still", [False, True])
def test_without_a_counter_that_moves_the_figure_is_modelled(bench: Callable[..., Bench], tmp_path: Path, still: bool):
    if still:
        zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 77)
    made = bench(work={"integer_macs": 208, "weight_bytes": 253})
    readings = Energy(counters=str(tmp_path / "powercap"), seconds=0.05).read(made)
    assert {reading.kind for reading in readings} == {"modelled"}
    assert all(reading.conditions["model"] == "Horowitz 2014, 45 nm" for reading in readings)
    assert readings[0].conditions["activations"] == "the input's only"
    one, other, ratio = (
        find(readings, subject, name)
        for subject, name in (
            ("original", "mj_per_inference"),
            ("compressed", "mj_per_inference"),
            ("compressed", "energy_ratio"),
        )
    )
    assert one is not None and other is not None and ratio is not None
    assert ratio.value == pytest.approx(one.value / other.value)
    assert ratio.value > 3


def test_the_model_by_hand():
    """10 float and 20 integer multiply-accumulates, 80 bytes of weights, 12 bytes of activations."""
    work = Work(parameters=20, macs=30, integer_macs=20, weight_bytes=80, activation_bytes=12)
    rest = 10 * 4.6 + 20 * 0.3 + 2 * 12 / 8 * 100
    found = modelled(work, input_bytes=4)
    assert found.low == pytest.approx((rest + 10 * 1300) * 1e-9)
    assert found.high == pytest.approx((rest + 10 * 2600) * 1e-9)
    assert found.value == pytest.approx((rest + 10 * 1950) * 1e-9)


def test_bits_alone_buy_nothing():
    """Weights that are stored in fewer bits but computed on in floats save their bytes and nothing else."""
    floats = Work(parameters=1000, macs=10**6, weight_bytes=4000)
    stored = floats.model_copy(update={"weight_bytes": 1000})
    saved = modelled(floats, 0).value - modelled(stored, 0).value
    assert saved == pytest.approx(3000 / 8 * 1950e-9)


def test_the_table_is_the_published_one():
    assert (PICOJOULES["float32 multiply"], PICOJOULES["float32 add"]) == (3.7, 0.9)
    assert (PICOJOULES["int8 multiply"], PICOJOULES["int32 add"]) == (0.2, 0.1)


class Driver:
    """Stands for NVIDIA's library: a card whose counter runs in millijoules."""

    def __init__(self, answers: bool = True):
        self.answers, self.millijoules, self.asked = answers, 0, ""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        self.asked = f"index {index}"
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked = name.decode()
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        self.millijoules += 3
        value._obj.value = self.millijoules
        return 0 if self.answers else 3  # 3: not supported


@pytest.mark.parametrize(("visible", "asked"), [("", "index 0"), ("2,0", "index 2"), ("GPU-8a1b", "GPU-8a1b")])
def test_the_card_that_is_seen_is_read(monkeypatch: pytest.MonkeyPatch, visible: str, asked: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = Driver()
    (counter,) = nvml_counters(driver)
    assert driver.asked == asked
    before = counter.read()
    assert counter.read() - before == 3000  # microjoules


def test_a_card_without_a_counter_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvml_counters(Driver(answers=False)) == []


def test_no_driver_no_counter(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nvml_counters() == []
