"""Training with the losses of routers beside the task's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.context import Context
from ...core.fit import Term
from ...model.experts import Router
from .losses import load_balancing, router_z


def balanced(term: Term, balance: float, z: float) -> Term:
    """`term` plus, for each router, `balance` times its load-balancing loss and `z` times its z-loss, as means over
    routers. The batch is run once more to see the routers.
    """

    def whole(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        loss = term(model, batch, output, ctx)
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_module: nn.Module, _given: Any, made: tuple[Tensor, Tensor, Tensor]) -> None:
            seen.append((made[0], made[2]))

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
