"""Training with the losses of routers beside the task's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.blocks import real_positions
from ...core.context import Context
from ...core.fit import Term
from ...model.experts import Router
from ...model.moments import without_padding
from .losses import load_balancing, router_z


def balanced(term: Term, balance: float, z: float) -> Term:
    """`term` plus, for each router, `balance` times its load-balancing loss and `z` times its z-loss, as means over
    routers, padding left out. The batch is run once more to see the routers.
    """

    def whole(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        loss = term(model, batch, output, ctx)
        seen: list[tuple[Tensor, Tensor]] = []
        real = real_positions(batch)

        def note(_module: nn.Module, _given: Any, made: tuple[Tensor, Tensor, Tensor]) -> None:
            seen.append((without_padding(made[0], real), without_padding(made[2], real)))

        handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
        try:
            if handles and (balance or z):
                ctx.task.call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for logits, indices in seen:
            loss = loss + (balance * load_balancing(logits, indices) + z * router_z(logits)) / len(seen)
        return loss

    return whole
