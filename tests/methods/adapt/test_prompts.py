"""Trained vectors in front of sequences: as peft computes them, exported, saved, refused where they cannot be."""

import functools

import numpy as np
import pytest
import torch
from small_tasks import one_thread, tokens_task, transformer_task  # noqa: F401
from torch import nn

from featherweight import load_adapter, save_adapter
from featherweight.core.adapted import adapter_tensors, base_digest
from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import ArtifactError, TaskError
from featherweight.core.outputs import first
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.adapt.prompt import longer
from featherweight.model.prompts import Prefix, Prompt
from featherweight.model.replacing import replaced

CPU = torch.device("cpu")


def ids() -> torch.Tensor:
    return tokens_task().test.tensors[0][:40]


@functools.cache
def made(kind: str, base: str = "", tokens: int = 4) -> nn.Module:
    steps = [{"kind": base}] if base else []
    recipe = Recipe([*steps, {"kind": kind, "epochs": 1, "lr": 0.1, "tokens": tokens}])
    return run_recipe(recipe, Context(tokens_task(), device=CPU))[0]


@functools.cache
def llama() -> nn.Module:
    """A small language model of the Llama layout with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def text_task(model: nn.Module) -> Task:
    tokens = torch.randint(31, (16, 10), generator=torch.Generator().manual_seed(1))

    def loss(output, batch) -> torch.Tensor:
        return nn.functional.cross_entropy(first(output)[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    data = [{"input_ids": tokens[:8]}, {"input_ids": tokens[8:]}]
    splits = dict.fromkeys(("train", "calibrate", "validate", "test"), data)
    return Task(name="text", model=model, loss=loss, metric=tokens_task().metric, **splits)


def test_a_prompt_computes_what_peft_computes():
    import copy

    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(copy.deepcopy(llama()), config).eval()
    task = text_task(llama())
    model = longer(task.fresh(), 5, Context(task, device=CPU), "adapt.prompt")
    prompt = Prompt(5, 16)
    prompt.base = model.get_submodule("base.model.embed_tokens")
    with torch.no_grad():
        prompt.prompt.copy_(theirs.prompt_encoder["default"].embedding.weight)
        replaced(model, "base.model.embed_tokens", prompt)
        given = task.example["input_ids"]
        wanted = theirs(input_ids=given, attention_mask=torch.ones_like(given)).logits[:, 5:]
        assert torch.allclose(first(model(input_ids=given)), wanted, atol=1e-5)


def test_a_prefix_is_attended_to_by_every_position_and_by_nothing_else():
    """Attention over keys and values with the prefix in front, by hand."""
    model = made("adapt.prefix")
    attend = model.base.attend
    x = torch.randn(3, 4 + 16, 32, generator=torch.Generator().manual_seed(0))

    def heads(values: torch.Tensor) -> torch.Tensor:
        return values.view(3, -1, 4, 8).transpose(1, 2)

    with torch.no_grad():
        rest = x[:, 4:]
        keys, values = (
            torch.cat([layer.prompt.expand(3, -1, -1), layer.base(rest)], 1) for layer in (attend.key, attend.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(heads(attend.query(rest)), heads(keys), heads(values))
        wanted = attend.out(mixed.transpose(1, 2).reshape(3, -1, 32))
        assert isinstance(attend.key, Prefix) and torch.allclose(attend(x)[:, 4:], wanted, atol=1e-5)


@pytest.mark.parametrize("base", ["", "quantize.static"])
@pytest.mark.parametrize("kind", ["adapt.prompt", "adapt.prefix"])
def test_the_base_stays_and_files_and_artifacts_agree(kind, base, tmp_path):
    model, other = made(kind, base), made(kind, base, tokens=6)
    task = tokens_task()
    start = run_recipe(Recipe([{"kind": base}]), Context(task, device=CPU))[0] if base else task.original
    assert base_digest(model) == base_digest(start) == base_digest(other)
    file = save_adapter(model, tmp_path / "four.safetensors")
    assert torch.equal(load_adapter(start, file)(ids()), model(ids()))
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "base")
    runner = artifact.open()
    runner.use(file)
    wanted = model(ids()).detach().numpy()
    assert np.abs(runner(ids()) - wanted).max() < (0.3 if base else 1e-4) * np.abs(wanted).max()
    with pytest.raises(ArtifactError, match=r"of 6 x 32; this artifact takes 4 x 32"):
        runner.use(save_adapter(other, tmp_path / "six.safetensors"))
    with pytest.raises(ArtifactError, match="a prompt, which cannot be left out of this artifact"):
        runner.use(None)
    assert len(adapter_tensors(model)) == (1 if kind == "adapt.prompt" else 2)


def test_language_models_keep_the_shape_of_their_logits(tmp_path):
    task = text_task(llama())
    model, _ = run_step(step("adapt.prefix", epochs=1, tokens=3), task.fresh(), Context(task, device=CPU))
    assert first(model(**task.example)).shape == first(task.original(**task.example)).shape
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "model")
    assert artifact.manifest.agreement.relative < 1e-4


def test_models_that_take_no_longer_sequences_are_refused():
    with pytest.raises(
        TaskError, match=r"adapt.prompt needs an input of token ids \(N x T integers\); this model takes x"
    ):
        run_step(step("adapt.prompt"), transformer_task().fresh(), Context(transformer_task(), device=CPU))
    with pytest.raises(TaskError, match="the model cannot take 64 more positions"):
        run_step(step("adapt.prompt", tokens=64), tokens_task().fresh(), Context(tokens_task(), device=CPU))


@pytest.mark.parametrize("kind", ["adapt.prefix", "adapt.prompt"])
@pytest.mark.parametrize("before", ["adapt.prefix", "adapt.prompt"])
def test_a_second_prompt_or_prefix_is_refused(before, kind):
    with pytest.raises(TaskError, match=f"{kind}: the model has a prompt or prefix already; give that step more"):
        run_step(step(kind, epochs=0.1), made(before), Context(tokens_task(), device=CPU))
