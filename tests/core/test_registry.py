"""Packages that are needed and may not be installed."""

import importlib
import re

import pytest

from featherweight.core.errors import MissingExtra
from featherweight.core.registry import need


def _without(monkeypatch, missing):
    def import_module(package):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxruntime.quantization"])
def test_a_package_that_is_not_installed_names_its_extra(monkeypatch, missing):
    _without(monkeypatch, missing)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'featherweight[web]'")):
        need("onnxruntime.quantization", "web")


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime_extensions", "torch", None])
def test_a_package_that_lacks_another_says_so_itself(monkeypatch, missing):
    _without(monkeypatch, missing)
    with pytest.raises(ModuleNotFoundError, match=str(missing)):
        need("onnxruntime", "web")
