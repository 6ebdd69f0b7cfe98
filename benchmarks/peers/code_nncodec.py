"""Code the tensors of a network with nncodec, in its own environment: python code_nncodec.py STATE.npz OUT QP [QP ...].

With dependent (trellis-coded) quantization and its parameter optimization, as is its default, at each quantization
parameter. OUT gets QP.npz, what the stream decodes to, and figures.json: bytes, and processor seconds of both ways.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

# nncodec imports torchvision for its data sets, of which nothing is used here; no build of it fits a torch for CPUs
for _name in ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.datasets"):
    sys.modules[_name] = MagicMock()

from nncodec.nnc import compress, decompress  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("state")
    parser.add_argument("out", type=Path)
    parser.add_argument("qp", type=int, nargs="+")
    given = parser.parse_args()
    with np.load(given.state) as file:
        state = {name: file[name] for name in file.files}
    figures = {}
    for qp in given.qp:
        start = time.process_time()
        stream = compress(dict(state), qp=qp, return_bitstream=True, bitstream_path=str(given.out / "stream.nnc"))
        middle = time.process_time()
        decoded = decompress(stream)
        end = time.process_time()
        np.savez(given.out / f"{qp}.npz", **{name: np.asarray(decoded[name]) for name in state})
        figures[qp] = {"bytes": len(stream), "encode_seconds": middle - start, "decode_seconds": end - middle}
    (given.out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
