"""Prune architectures by 30% with Torch-Pruning, in its own environment: requests on standard input, answers after it.

As its documentation has it: the group pruner with norms of groups, the layer that computes last left alone, and, where
it is asked for, the numbers of heads handed over. Then forward, backward, save, load, export to ONNX and run. An answer
holds the share of parameters removed, the differences, and where it failed. Units are silenced (their outputs set to
zero) before they are removed: `moved` is how far their removal moves the outputs all the same.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import more_networks  # noqa: F401  registers
import numpy as np
import onnxruntime
import torch
import torch_pruning as tp
import transformers_networks  # noqa: F401  registers
from networks import NETWORKS, Network, seeded
from torch import Tensor, nn

warnings.simplefilter("ignore")


def outputs(model: nn.Module, example: dict[str, Tensor]) -> list[Tensor]:
    found = model(**example)
    return list(found) if isinstance(found, list | tuple) else [found]


def last_layer(model: nn.Module, example: dict[str, Tensor]) -> nn.Module:
    """The linear layer or convolution that computes last."""
    seen: list[nn.Module] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [
        module.register_forward_hook(lambda module, *_: seen.append(module))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        model(**example)
    for handle in handles:
        handle.remove()
    return seen[-1]


def head_counts(model: nn.Module, network: Network) -> dict[nn.Module, int]:
    return {
        module: network.heads[name.rpartition(".")[2]]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in network.heads
    }


@torch.no_grad()
def silence(group: Any) -> None:
    """Set what the group's layers give for the pruned units to zero."""
    for dependency, indices in group:
        layer, pruning = dependency.target.module, dependency.handler.__name__
        if isinstance(layer, nn.Module) and "out_channels" in pruning:
            for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if isinstance(tensor, Tensor):
                    turned = isinstance(layer, nn.modules.conv._ConvTransposeNd | nn.Embedding)
                    dim = 1 if turned and tensor.dim() > 1 else 0
                    tensor.index_fill_(dim, torch.tensor(indices), 0)


def relative(want: list[Tensor], got: list[Tensor]) -> float:
    """The worst root mean square of a difference over that of what is wanted; infinite where shapes differ."""
    worst = 0.0
    for one, other in zip(want, got, strict=True):
        if one.shape != other.shape:
            return float("inf")
        worst = max(worst, float((one - other).square().mean().sqrt() / one.square().mean().sqrt().clamp_min(1e-12)))
    return worst


def pruner_of(model: nn.Module, network: Network, example: dict[str, Tensor], heads: bool) -> Any:
    given = {"num_heads": head_counts(model, network), "prune_num_heads": True, "prune_head_dims": False}
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=0.3,
        ignored_layers=[last_layer(model, example)],
        **({**given, "head_pruning_ratio": 0.3} if heads else {}),
    )


def moved(model: nn.Module, network: Network, example: dict[str, Tensor], heads: bool) -> float:
    """How far the removal of silenced units moves the outputs, at worst, group by group."""
    worst = 0.0
    for group in pruner_of(model, network, example, heads).step(interactive=True):
        silence(group)
        with torch.no_grad():
            before = outputs(model, example)
        group.prune()
        with torch.no_grad():
            worst = max(worst, relative(before, outputs(model, example)))
    return worst


def backward(model: nn.Module, example: dict[str, Tensor]) -> None:
    sum(each.square().mean() for each in outputs(model, example)).backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not gradients or not all(bool(torch.isfinite(each).all()) for each in gradients):
        raise RuntimeError("no gradients, or not finite")
    model.zero_grad(set_to_none=True)


def exported(model: nn.Module, example: dict[str, Tensor]) -> float:
    """How far what ONNX Runtime gives for the exported file is from the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (), str(path), kwargs=example, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        got = session.run(None, {name: example[name].numpy() for name in names})
    with torch.no_grad():
        return relative(outputs(model, example), [torch.from_numpy(np.asarray(each)) for each in got])


def judge(name: str, heads: bool) -> dict[str, Any]:
    """All stages for one network; what the peer raises is its result."""
    network = NETWORKS[name]
    model, example = seeded(network.build), network.example()
    found: dict[str, Any] = {"stage": "prune"}
    before = sum(each.numel() for each in model.parameters())
    try:
        pruner_of(model, network, example, heads).step()
        found["removed"] = 1 - sum(each.numel() for each in model.parameters()) / before
        found["stage"] = "backward"
        backward(model, example)
        found["stage"] = "save"
        kept = io.BytesIO()
        torch.save(model, kept)
        again = torch.load(io.BytesIO(kept.getvalue()), weights_only=False)
        with torch.no_grad():
            if relative(outputs(model, example), outputs(again, example)) > 0:
                raise RuntimeError("the loaded model gives other outputs")
        found["stage"] = "export"
        found["difference"] = exported(model, example)
        found["stage"] = "done"
        found["moved"] = moved(seeded(network.build), network, example, heads)
    except Exception as error:
        found["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return found


def within(limit: float, name: str, heads: bool) -> dict[str, Any]:
    """What `judge` gives in a process of its own that is ended after `limit` seconds of its processor time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        os.dup2(2, 1)  # what the peer prints is no answer
        sender.send(judge(name, heads))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:  # the process ended without an answer
        late = process.join() or -(process.exitcode or 0) in (signal.SIGXCPU, signal.SIGKILL)
        reason = f"did not end in {limit:.0f} s" if late else f"its process ended with {process.exitcode}"
        found = {"stage": "late" if late else "start", "reason": reason}
    process.join()
    return found


def main() -> None:
    """Answer requests, one line of JSON each on standard input: {"name": ..., "heads": ..., "limit": ...}."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(within(asked["limit"], asked["name"], asked["heads"])), flush=True)


if __name__ == "__main__":
    main()
