"""The best path through a trellis: the Viterbi algorithm over many sequences at once."""

from __future__ import annotations

import torch
from torch import Tensor

HELD = 2**24  # costs that are held at once, if one sequence has no more


def tail_biting(target: Tensor, table: Tensor, bits: int, weight: Tensor | None = None) -> Tensor:
    """Symbols of circular paths close to `target` in weighted squared error, [steps, sequences] like `target`; uint8.

    A first, open path over the sequence turned by half its length gives the state in which the second must begin and
    end: Tseng et al., arXiv:2406.11235, algorithm 4. Raises `ValueError` if the sequences are shorter than a window.
    """
    states, steps = len(table), len(target)
    if bits * steps < states.bit_length() - 1:
        raise ValueError(f"{steps} steps of {bits} bits are shorter than a window of {states.bit_length() - 1} bits")
    found = []
    width = max(1, HELD // (states * steps))
    for place in range(0, target.shape[1], width):
        part = target[:, place : place + width]
        cost = None if weight is None else weight[:, place : place + width]
        half = steps // 2
        turned = None if cost is None else cost.roll(-half, 0)
        joint = viterbi(part.roll(-half, 0), table, bits, turned)[steps - half - 1] % (states >> bits)
        found.append(viterbi(part, table, bits, cost, joint) % 2**bits)
    return torch.cat(found, 1).to(torch.uint8)


def viterbi(
    target: Tensor, table: Tensor, bits: int, weight: Tensor | None = None, joint: Tensor | None = None
) -> Tensor:
    """The states, [steps, sequences], of the path of least `sum weight * (target - table[state])**2`.

    `target` and `weight` are [steps, sequences]; `table` has 2**window entries. From a state `s` the path goes to
    `s * 2**bits % len(table)` plus the next symbol (the bitshift trellis, arXiv:2406.11235). With `joint`, one integer
    of `window - bits` bits per sequence, these are the bits before the first symbol and at the end of the last state.
    """
    states, fan = len(table), 2**bits
    rest, (steps, sequences) = states // fan, target.shape
    numbers = torch.arange(states, device=table.device)[:, None]
    costs = torch.empty(steps, states, sequences, device=target.device, dtype=target.dtype)
    for step in range(steps):
        torch.sub(target[step], table[:, None], out=costs[step]).square_()
        if weight is not None:
            costs[step] *= weight[step]
        if step:
            costs[step].view(rest, fan, -1).add_(costs[step - 1].view(fan, rest, -1).amin(0)[:, None])
        elif joint is not None:
            costs[0].masked_fill_(numbers // fan != joint, torch.inf)
    if joint is not None:
        costs[-1].masked_fill_(numbers % rest != joint, torch.inf)
    return _trace(costs, fan)


def _trace(costs: Tensor, fan: int) -> Tensor:
    """The states from first to last of the cheapest path; `costs` [steps, states, sequences] are those to get there.

    The predecessors of one state are compared again here: that is far cheaper than keeping the best one of every state.
    """
    rest, sequences = costs.shape[1] // fan, torch.arange(costs.shape[2], device=costs.device)
    symbols = torch.arange(fan, device=costs.device)[:, None]
    path = [costs[-1].argmin(0)]
    for before in reversed(costs[:-1].unbind()):
        candidates = path[-1] // fan + symbols * rest
        path.append(candidates[before[candidates, sequences].argmin(0), sequences])
    return torch.stack(path[::-1])
