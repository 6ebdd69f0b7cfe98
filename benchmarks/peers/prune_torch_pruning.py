"""Prune a network with Torch-Pruning, in its own environment: python prune_torch_pruning.py NETS.py CALL WEIGHTS OUT.

CALL makes the network from the module NETS.py, such as `CifarResNet(9)`. Pruned as its examples prune this network:
norms of groups, ranked over the whole network, in many small steps until there are --fewer times fewer
multiply-accumulates; the last layer stays. Writes the state of the pruned network as safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file


def network(path: str, call: str) -> torch.nn.Module:
    """What `call` makes from the module at `path`."""
    spec = importlib.util.spec_from_file_location("nets", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name, _, given = call.rstrip(")").partition("(")
    return getattr(module, name)(*[int(each) for each in given.split(",") if each])


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("nets", "call", "weights", "out"):
        parser.add_argument(name)
    parser.add_argument("--fewer", type=float, default=2.5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 3, 32, 32])
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = network(given.nets, given.call)
    model.load_state_dict(load_file(given.weights))
    model.eval()
    example = torch.randn(given.shape)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    whole, _ = tp.utils.count_ops_and_params(model, example)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.95,
        iterative_steps=given.steps,
        ignored_layers=layers[-1:],
    )
    macs, parameters, turn = whole, 0, 0
    while macs * given.fewer > whole and turn < given.steps:
        pruner.step()
        macs, parameters = tp.utils.count_ops_and_params(model, example)
        turn += 1
    model(example)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, given.out)
    print(f"{turn} steps, {whole / macs:.2f}x fewer multiply-accumulates, {parameters:.0f} parameters")


if __name__ == "__main__":
    main()
