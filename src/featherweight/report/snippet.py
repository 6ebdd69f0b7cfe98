"""How to run an artifact without this package: a few lines of Python that work when pasted."""

from __future__ import annotations

import json

ONNXRUNTIME = """\
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession({model}, options, providers=["CPUExecutionProvider"])
example = np.load({example})  # real inputs by name; put your own here
inputs = {{info.name: example[info.name] for info in session.get_inputs()}}
outputs = session.run(None, inputs)
for info, output in zip(session.get_outputs(), outputs):
    print(info.name, output.dtype, output.shape)
    print(output[:2])
"""

TORCH = """\
import numpy as np
import torch

model = torch.export.load({model}).module()
inputs = {{name: torch.from_numpy(array) for name, array in np.load({example}).items()}}  # put your own here
with torch.inference_mode():
    output = model(**inputs)
print(output)
"""

ANY = """\
from featherweight.core.target import Artifact

artifact = Artifact({folder})
model = artifact.open(threads=1)  # checks every file's digest, then loads it in its runtime
output = model(**artifact.example())  # real inputs by name; put your own here
print(output)
"""

NEEDS = {"onnxruntime": "onnxruntime numpy", "torch": "torch numpy"}
FILES = {"onnxruntime": "model.onnx", "torch": "model.pt2"}


def snippet(target: str, folder: str) -> str:
    """Python that runs the artifact in `folder` on its example; where the target is not known here, by this package."""
    lines = {"onnxruntime": ONNXRUNTIME, "torch": TORCH}.get(target, ANY)
    base = folder.rstrip("/")
    paths = {"folder": folder, "model": f"{base}/{FILES.get(target, '')}", "example": f"{base}/example.npz"}
    return lines.format(**{name: json.dumps(path, ensure_ascii=False) for name, path in paths.items()})


def needs(target: str) -> str:
    """What must be installed to run the snippet."""
    return NEEDS.get(target, "featherweight")
