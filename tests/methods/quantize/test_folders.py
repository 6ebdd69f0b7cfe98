"""From a folder of shards into a folder: the same integers as in memory, and far less memory than the model takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_tasks import one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import ArtifactError, TaskError
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.quantize.folders import quantize_folder, read_weight
from featherweight.model.shards import Shards

CPU = torch.device("cpu")
STEP = {"bits": 3, "group": 16, "beam": 2, "refine": 1}


def llama(width: int = 32, blocks: int = 3) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def shards_of(model: nn.Module, folder) -> None:
    """Two files, as a large model is published."""
    folder.mkdir()
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = sorted(tensors)
    for place, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{place}.safetensors")


def batches() -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 24), generator=random)} for _ in range(3)]


def task() -> Task:
    data = [(batch["input_ids"], torch.zeros(2)) for batch in batches()]
    return Task(name="llama", model=llama, calibrate=data, test=data)


def test_the_folder_holds_what_quantizing_in_memory_gives(tmp_path):
    shards_of(llama(), tmp_path / "from")
    record = quantize_folder(step("quantize.weights", **STEP), llama, tmp_path / "from", tmp_path / "to", batches(),
                             Context(task(), device=CPU))  # fmt: skip
    model, whole = run_step(step("quantize.weights", **STEP), task().fresh(), Context(task(), device=CPU))
    shards, page = Shards(tmp_path / "to"), json.loads((tmp_path / "to" / "encodings.json").read_text())
    wanted = encodings(model)
    assert set(page) == set(wanted) and set(record.changed) == set(whole.changed) and len(page) == 21
    for name, encoding in wanted.items():
        assert torch.equal(read_weight(name, page[name], shards), encoding.decode()), name
    for name, parameter in llama().named_parameters():
        if name not in wanted:
            assert torch.equal(shards.read(name), parameter)
    index = json.loads((tmp_path / "to" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(shards.names())


class Mixed(nn.Module):
    """A block with a batch norm, a layer that never runs and an embedding: N x 16 to N x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.never, self.places = nn.Linear(16, 16), nn.Embedding(4, 16)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(2, 3)
        self.register_buffer("hidden", torch.ones(16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(torch.relu(self.norm(self.first(x)))) + self.places(torch.tensor(1)) * self.hidden
        return x if float(x.detach().abs().max()) < 1e9 else self.never(x)


class Stack(nn.Module):
    """Blocks behind a batch norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.blocks = nn.BatchNorm1d(16), nn.ModuleList(Mixed() for _ in range(2))
        self.norm.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return x


def stack() -> nn.Module:
    torch.manual_seed(0)
    return Stack().eval()


def fresh() -> nn.Module:
    """The network without its weights and statistics."""
    torch.manual_seed(9)
    return Stack().eval()


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn", "hqq"])
def test_blocks_of_any_kind_are_quantized_and_copied_whole(tmp_path, method):
    (tmp_path / "from").mkdir()
    save_file({key: value.clone() for key, value in stack().state_dict().items()}, tmp_path / "from" / "it.safetensors")
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    data = [(part, torch.zeros(16)) for part in x.split(16)]
    item = step("quantize.weights", bits=3, group=8, method=method, embeddings=True)
    ctx = Context(Task(name="stack", model=stack(), calibrate=data, test=data), device=CPU)
    record = quantize_folder(
        item, fresh, tmp_path / "from", tmp_path / "to", [{"x": part} for part in x.split(16)], ctx
    )
    model, _ = run_step(item, stack(), ctx)
    shards, page = Shards(tmp_path / "to"), json.loads((tmp_path / "to" / "encodings.json").read_text())
    wanted = encodings(model)
    assert set(page) == set(wanted) and len(page) == 8
    for name, encoding in wanted.items():
        assert torch.equal(read_weight(name, page[name], shards), encoding.decode()), name
    for name, value in stack().state_dict().items():
        if name not in page and not (method == "awq" and ".norm." in name):  # scales go into the norm
            assert torch.equal(shards.read(name), value), name
    assert not any("hidden" in name for name in shards.names())
    said = [text for text in record.warnings if "never" in text and "rounded to nearest" in text]
    assert len(said) == (2 if method in ("gptq", "awq") else 0)


def test_what_is_missing_or_cut_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no safetensors file"):
        Shards(tmp_path / "empty")
    shards_of(llama(), tmp_path / "from")
    part = tmp_path / "from" / "part-1.safetensors"
    part.write_bytes(part.read_bytes()[:-2000])
    item, ctx = step("quantize.weights", **STEP), Context(task(), device=CPU)
    with pytest.raises(ArtifactError, match="cut short"):
        quantize_folder(item, llama, tmp_path / "from", tmp_path / "to", batches(), ctx)
    part.unlink()
    with pytest.raises(ArtifactError, match="no shard holds the tensor"):
        quantize_folder(item, llama, tmp_path / "from", tmp_path / "to", batches(), ctx)
    assert not (tmp_path / "to").exists()
    with pytest.raises(TaskError, match="no calibration batches"):
        quantize_folder(item, llama, tmp_path / "from", tmp_path / "to", [], ctx)
    with pytest.raises(TaskError, match="no repeated blocks"):
        quantize_folder(item, lambda: nn.Linear(16, 16), tmp_path / "from", tmp_path / "to", batches(), ctx)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_folders import *
torch.set_num_threads(1)
item = step("quantize.weights", bits=4, group=32, beam=1, refine=0, compensate=False)
ctx = Context(task(), device=CPU)
make = lambda: llama(width=256, blocks=40)
run_step(item, task().fresh(), ctx)  # libraries take what they take once
def data():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = data() + {room}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.ones({room} // 3)
except (RuntimeError, MemoryError):
    print("limited")
quantize_folder(item, make, Path({source!r}), Path({out!r}), batches(), ctx)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_a_model_four_times_the_memory_it_may_use(tmp_path):
    model = llama(width=256, blocks=40)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    shards_of(model, tmp_path / "from")
    del model
    script = LIMITED.format(
        tests=str(Path(__file__).parent), room=size // 4, source=str(tmp_path / "from"), out=str(tmp_path / "to")
    )
    path = os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert found.stdout.split() == ["limited", "done"], found.stderr[-2000:]
    assert len(json.loads((tmp_path / "to" / "encodings.json").read_text())) == 40 * 7
