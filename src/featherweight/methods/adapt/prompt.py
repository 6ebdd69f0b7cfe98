"""adapt.prompt, adapt.prefix: trained vectors in front of every sequence, as tokens, or as keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.utils._pytree as pytree
from pydantic import Field
from torch import Tensor, fx, nn

from featherweight.core.blocks import observed
from featherweight.core.context import Context
from featherweight.core.data import tensors_in
from featherweight.core.errors import TaskError
from featherweight.model.linears import opened_tables
from featherweight.model.prompts import Prefix, Prompt, Prompted, inputs_of
from featherweight.model.replacing import exchanged
from featherweight.model.select import excluded

from .training import AdapterStep, LearningStep

Tokens = Annotated[int, Field(ge=1, le=512)]


class PromptTuning(LearningStep, kind="adapt.prompt"):
    """Train vectors that stand in front of the embeddings of every sequence, with the whole model frozen.

    The model must take token ids (N x T integers) and look them up in a table; `tokens` more positions are put in front
    of them, and the vectors in place of their embeddings. They start as embeddings of tokens drawn at random. Every
    sequence gets so much longer, which costs time; outputs keep their shape. Raises `TaskError` for a model without
    token ids, or one that cannot take longer sequences.
    """

    paper: ClassVar[str] = "arXiv:2104.08691"

    tokens: Tokens = 8

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        opened_tables(model)
        wrapper = longer(model, self.tokens, ctx, self.kind)
        name, table = _table(wrapper, ctx)
        made = Prompt(self.tokens, table.embedding_dim)
        with torch.no_grad():
            made.prompt.copy_(table(_drawn(table.num_embeddings, self.tokens, ctx)))
        made.base = table
        exchanged(wrapper, name, made.to(ctx.device))
        loss = self.learn(wrapper, [made.prompt], ctx)
        where = name.removeprefix("base.")
        ctx.change("*", f"{self.tokens} trained vectors of {made.width} in front, behind {where}, last loss {loss:.4g}")
        return wrapper


class PrefixTuning(AdapterStep, kind="adapt.prefix"):
    """Train keys and values that every position of a sequence attends to, with the whole model frozen.

    `only` names the linear layers that make keys and values. `tokens` more positions are put in front of each sequence,
    and the outputs of these layers there are trained vectors; they start as what random tokens give. Rotary embeddings
    turn the trained keys as any others. Raises `TaskError` for a model without token ids, or one that cannot take
    longer sequences.
    """

    paper: ClassVar[str] = "arXiv:2101.00190"

    tokens: Tokens = 8
    only: str = "*k_proj,*v_proj,*key,*value"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = self._makers(model, ctx)
        if not layers:
            return model
        wrapper = longer(model, self.tokens, ctx, self.kind)
        starts = _starts(wrapper, [f"base.{name}" for name in layers], ctx)
        trained = []
        for name, layer in layers.items():
            start = starts[f"base.{name}"]
            made = Prefix(self.tokens, start.shape[-1])
            made.base = layer
            with torch.no_grad():
                made.prompt.copy_(start)
            exchanged(wrapper, f"base.{name}", made.to(ctx.device))
            trained.append(made.prompt)
        loss = self.learn(wrapper, trained, ctx)
        for name in layers:
            ctx.change(name, f"{self.tokens} trained positions in front of its outputs, last loss {loss:.4g}")
        return wrapper

    def _makers(self, model: nn.Module, ctx: Context) -> Mapping[str, nn.Module]:
        """The modules that make keys and values: whole, whatever other steps have put inside them."""
        if isinstance(model, fx.GraphModule):
            return self.chosen(model, ctx)
        self.check_names(model, {name for name, _ in model.named_modules()}, ctx)
        found: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if "parametrizations" in name.split(".") or any(name.startswith(f"{other}.") for other in found):
                continue
            reason = excluded(name, self.only, self.skip)
            if name and reason is None and any(True for _ in module.parameters()):
                found[name] = module
            elif any(True for _ in module.parameters(recurse=False)):
                ctx.leave(name or type(module).__name__, reason or "is the whole model")
        return found


@torch.no_grad()
def longer(model: nn.Module, tokens: int, ctx: Context, kind: str) -> Prompted:
    """`model` with `tokens` more positions in front of every sequence; raises `TaskError` where that cannot be."""
    if any(isinstance(module, Prompted) for module in model.modules()):
        raise TaskError(f"{kind}: the model has a prompt or prefix already; give that step more tokens instead")
    example = ctx.example
    ids = next((name for name, each in example.items() if _are_ids(each) and "mask" not in name), None)
    if ids is None:
        given = ", ".join(f"{name}: {each.dtype} {tuple(each.shape)}" for name, each in example.items())
        raise TaskError(f"{kind} needs an input of token ids (N x T integers); this model takes {given}")
    alike = [name for name, each in example.items() if name != ids and each.shape == example[ids].shape]
    ones = [name for name in alike if "mask" in name]
    made = Prompted(tokens, ids, ones, [name for name in alike if name not in ones], names=inputs_of(model, example))
    before = [leaf.shape for leaf in pytree.tree_leaves(model.eval()(**example))]
    made.base = model
    try:
        leaves = pytree.tree_leaves(model(**{name: made._longer(name, each) for name, each in example.items()}))
    except Exception as error:  # the user's own code runs here
        reason = " ".join(str(error).split())[:160]
        hint = " (a captured graph takes other lengths where the task's `dynamic` names that dimension)"
        hint = hint if isinstance(model, fx.GraphModule) else ""
        raise TaskError(f"{kind}: the model cannot take {tokens} more positions{hint}: {reason}") from error
    made.cut = [_grown(one, leaf.shape, tokens) for one, leaf in zip(before, leaves)]
    for one, leaf, cut in zip(before, leaves, made.cut):
        if not cut and one != leaf.shape:
            raise TaskError(
                f"{kind}: an output of {tuple(one)} becomes {tuple(leaf.shape)} with {tokens} more positions"
            )
    return made.eval()


def _are_ids(given: Tensor) -> bool:
    return given.dim() == 2 and given.dtype in (torch.int64, torch.int32)


def _grown(before: torch.Size, now: torch.Size, tokens: int) -> bool:
    return len(now) > 1 and now[1] == before[1] + tokens and (*before[:1], *before[2:]) == (*now[:1], *now[2:])


def _table(wrapper: Prompted, ctx: Context) -> tuple[str, nn.Embedding]:
    """The table that the model looks its token ids up in, by name."""
    wanted = wrapper._longer(wrapper.ids, ctx.example[wrapper.ids])
    found: list[str] = []

    def hook(name: str) -> Any:
        def note(given: tuple[Any, ...], _output: Any) -> None:
            ids = next(tensors_in(given), None)
            if ids is not None and ids.shape == wanted.shape and torch.equal(ids, wanted):
                found.append(name)

        return note

    tables = {name: each for name, each in wrapper.named_modules() if isinstance(each, nn.Embedding)}
    observed(wrapper, (), ctx.example, {name: hook(name) for name in tables})
    if len(set(found)) != 1:
        raise TaskError(
            f"adapt.prompt needs one table (nn.Embedding) that looks up the input {wrapper.ids!r}; "
            f"the model has {len(set(found))}"
        )
    return found[0], tables[found[0]]


def _drawn(rows: int, tokens: int, ctx: Context) -> Tensor:
    """Token ids drawn at random, with the seed of the run."""
    return torch.randint(rows, (tokens,), generator=ctx.generator("adapt.prompt")).to(ctx.device)


def _starts(wrapper: Prompted, names: list[str], ctx: Context) -> dict[str, Tensor]:
    """What these layers give for random tokens of the example at the start of a sequence, [tokens, width] each."""
    example = ctx.example
    ids = example[wrapper.ids]
    place = torch.randint(ids.numel(), (wrapper.tokens,), generator=ctx.generator("adapt.prefix")).to(ids.device)
    given = {name: wrapper._longer(name, each) for name, each in example.items()}
    given[wrapper.ids] = torch.cat([ids.flatten()[place].expand(len(ids), -1), ids], 1)
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(_given: tuple[Any, ...], output: Tensor) -> None:
            if output.dim() != 3 or output.shape[1] != given[wrapper.ids].shape[1]:
                raise TaskError(f"adapt.prefix: {name[5:]} gives {tuple(output.shape)}: no keys or values by position")
            found.setdefault(name, output[0, : wrapper.tokens].clone())

        return note

    observed(wrapper.base, (), given, {name.removeprefix("base."): hook(name) for name in names})
    return found
