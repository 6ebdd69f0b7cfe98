"""Saving and rebuilding any model: structure, chains, ties, and what a damaged file says."""

import copy
import json
from pathlib import Path

import pytest
import torch
from small_tasks import ConvNet, Transformer, conv_task, one_thread  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context, fingerprint
from featherweight.core.errors import ArtifactError, OutputError, TaskError
from featherweight.core.fit import Training
from featherweight.core.outputs import first
from featherweight.core.soft import Mask, encodings
from featherweight.model.layers import describe, known, make
from featherweight.model.port import DynamicPort, Port
from featherweight.model.ported import PortedLinear, add_port
from featherweight.model.rounding import Rounding
from featherweight.model.skeleton import PAGE, TENSORS, load, save


def round_trip(folder: Path, model: nn.Module, like, *inputs) -> nn.Module:
    """Save and load; what comes back must be the same model in every respect that counts."""
    save(model, folder / "saved")
    found = load(folder / "saved", like)
    assert fingerprint(found) == fingerprint(model)
    names = [[name for name, _ in each.named_parameters(remove_duplicate=False)] for each in (found, model)]
    assert names[0] == names[1]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        assert torch.equal(first(found(*inputs)), first(model.eval()(*inputs)))
    assert not any(module.training for module in found.modules())
    return found


LAYERS = [
    nn.Linear(3, 4, bias=False),
    nn.Conv1d(2, 4, 3, padding="same"),
    nn.Conv2d(4, 8, (3, 1), 2, 1, groups=2, bias=False, padding_mode="reflect"),
    nn.Conv3d(1, 2, 3),
    nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
    nn.BatchNorm2d(4, momentum=None, affine=False),
    nn.BatchNorm1d(3, track_running_stats=False),
    nn.LayerNorm((3, 4), eps=1e-3, bias=False),
    nn.GroupNorm(2, 4, affine=False),
    nn.RMSNorm(4),
    nn.InstanceNorm2d(3, affine=True),
    nn.Embedding(5, 3, padding_idx=1),
    nn.EmbeddingBag(5, 3, mode="sum"),
    nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, batch_first=True, dropout=0.1),
    nn.GRU(3, 4, bias=False),
    nn.RNN(3, 4, nonlinearity="relu"),
    nn.LSTMCell(3, 4, bias=False),
    nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, kdim=4, batch_first=True),
    nn.Hardtanh(0, 6),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.2),
    nn.PReLU(3),
    nn.Softmax(-1),
    nn.Threshold(0.1, 0.2),
    nn.AvgPool2d((2, 3)),
    nn.MaxPool2d(2, ceil_mode=True),
    nn.AdaptiveAvgPool2d((1, None)),
    nn.Dropout(0.3),
    nn.Flatten(2),
    nn.Unflatten(1, (2, 3)),
    nn.Upsample(scale_factor=(2.0, 1.0)),
    nn.PixelShuffle(2),
    nn.ZeroPad2d((1, 2, 0, 0)),
    nn.ConstantPad2d(1, 0.5),
    nn.Identity(),
    nn.Bilinear(2, 3, 4),
    nn.Sequential(),
    nn.Module(),
    PortedLinear(3, 2),
    Port(0.1, 3),
    DynamicPort(),
    DynamicPort(tokens=True),
    PortedLinear(3, 2, tokens=True),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_known_layer_is_made_again_from_its_settings(layer):
    found = describe(layer)
    assert found is not None
    again = make(*json.loads(json.dumps(found)))
    assert type(again) is type(layer) and repr(again) == repr(layer)
    forms = [{name: (value.shape, value.dtype) for name, value in each.state_dict().items()} for each in (again, layer)]
    assert forms[0] == forms[1]


@pytest.mark.parametrize("layer", [nn.Hardtanh(-float("inf"), 1), nn.TransformerEncoderLayer(8, 2), nn.ParameterList()])
def test_a_layer_that_plain_values_cannot_make_is_left_to_like(layer):
    assert describe(layer) is None


def test_every_activation_of_torch_is_known():
    kinds = known()
    for name in nn.modules.activation.__all__:
        assert kinds[name] is getattr(nn, name)


def test_without_like_a_model_of_known_layers_comes_back(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Sequential(nn.Linear(4, 2), nn.GELU("tanh")),
    )
    model.train()(torch.randn(8, 1, 3, 3))
    round_trip(tmp_path, model, None, torch.randn(2, 1, 3, 3))


def test_pruned_masked_rounded_and_frozen_comes_back(tmp_path):
    original, x = ConvNet().eval(), torch.randn(2, 1, 8, 8)
    model = copy.deepcopy(original)
    model.depth = nn.Conv2d(16, 12, 3, padding=1, groups=4)
    model.hidden, model.drop = nn.Linear(48, 24), nn.Identity()
    model.head = nn.Linear(24, 10, bias=False)
    parametrize.register_parametrization(model.hidden, "weight", Mask(torch.rand(24, 48) > 0.5))
    parametrize.register_parametrization(model.hidden, "weight", Rounding(torch.full((24,), 0.01), axis=0, bits=4))
    add_port(model.hidden)
    model.stem.weight.requires_grad_(False)
    before = fingerprint(original)
    found = round_trip(tmp_path, model, original, x)
    assert fingerprint(original) == before
    assert isinstance(found.hidden, PortedLinear) and encodings(found)["hidden.weight"].form == "int4"
    round_trip(tmp_path, original, model, x)  # and the plain one from a compressed `like`


def test_what_comes_back_can_be_trained_compressed_and_saved_again(tmp_path):
    task = conv_task()
    model = task.fresh()
    parametrize.register_parametrization(model.head, "weight", Mask(model.head.weight.abs() > 0.05))
    found = round_trip(tmp_path, model, task.original, task.example["x"])
    before = found.head.weight.detach().clone()
    Context(task, device=torch.device("cpu")).fit(found, Training(epochs=1))
    assert not torch.equal(found.head.weight, before)
    assert torch.equal(found.head.weight == 0, before == 0)
    parametrize.register_parametrization(found.head, "weight", Rounding(torch.tensor(0.01)))
    round_trip(tmp_path, found, task.original, task.example["x"])


class Odd(nn.Module):
    """Ties, a shared module, two weights with foreign parametrizations, a passing buffer, an LSTM, raw parameters."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads, self.split, self.branch = heads, (heads, 2), None
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.recur = nn.LSTM(4, 4, 2, batch_first=True)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.raw = nn.Parameter(torch.ones(heads))
        self.extra = nn.Linear(4, 4)
        self.register_buffer("passing", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        hidden, _ = self.recur(self.embed(x))
        hidden = self.again(self.shared(self.norm(hidden))) * self.raw.sum() / self.heads + self.passing
        return self.out(hidden if self.extra is None else self.extra(hidden))


def test_ties_sharing_foreign_parametrizations_and_raw_parameters(tmp_path):
    torch.manual_seed(0)
    original, tokens = Odd(), torch.randint(0, 10, (2, 5))
    model = copy.deepcopy(original)
    model.raw, model.heads, model.split = nn.Parameter(torch.tensor([0.5, 2.0])), 2, (2, 2)
    model.extra, model.count = None, torch.tensor(7)
    model.passing = model.passing * 3
    before = original(tokens)
    found = round_trip(tmp_path, model, original, tokens)
    assert found.out.weight is found.embed.weight and found.again is found.shared
    assert (found.heads, found.split, found.extra) == (2, (2, 2), None) and found.count == 7
    assert "passing" not in found.state_dict()
    parametrize.register_parametrization(found.norm, "weight", Mask(torch.ones(4, 4)))
    parametrize.register_parametrization(found.norm, "bias", Mask(torch.tensor([1.0, 0, 1, 1])))
    round_trip(tmp_path, found, original, tokens)
    assert torch.equal(original(tokens), before)


def test_tied_weights_stay_tied_when_one_of_them_is_soft(tmp_path):
    model = Odd()
    parametrize.register_parametrization(model.out, "weight", Rounding(torch.tensor(0.02)))
    found = round_trip(tmp_path, model, Odd, torch.randint(0, 10, (2, 5)))
    assert found.out.parametrizations.weight.original is found.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_numbers(tmp_path, dtype):
    found = round_trip(tmp_path, nn.Sequential(nn.Linear(4, 4)).to(dtype), None, torch.randn(2, 4, dtype=dtype))
    assert found[0].weight.dtype == dtype


def test_a_hugging_face_model_on_its_own_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    original = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = copy.deepcopy(original)
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(32, 24, bias=False), nn.Linear(32, 24, bias=False)
        layer.mlp.down_proj = nn.Linear(24, 32, bias=False)
    found = round_trip(tmp_path, model, original, torch.randint(0, 50, (2, 7)))
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_type_of_the_users_own_needs_like(tmp_path):
    save(nn.Sequential(Transformer()), tmp_path / "saved")
    with pytest.raises(ArtifactError, match=r"'0' is Transformer.*give like="):
        load(tmp_path / "saved")
    with pytest.raises(ArtifactError, match=r"was Transformer, but in like= it is ConvNet"):
        load(tmp_path / "saved", nn.Sequential(ConvNet()))
    with pytest.raises(TaskError, match="like= gave int"):
        load(tmp_path / "saved", lambda: 3)


def test_foreign_parametrizations_need_like_to_have_them(tmp_path):
    save(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), tmp_path / "saved")
    with pytest.raises(ArtifactError, match=r"parametrized by _WeightNorm; give like="):
        load(tmp_path / "saved")


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

    with pytest.raises(TaskError, match="state that is no tensor"):
        save(Stateful(2, 2), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- damage ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path) -> Path:
    save(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5)), tmp_path / "saved")
    return tmp_path / "saved"


def test_no_file_is_a_pickle(saved):
    assert sorted(path.name for path in saved.iterdir()) == [PAGE, TENSORS]
    for path in saved.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("left", [0.0, 0.05, 0.5, 0.999])
def test_a_file_cut_short_names_what_is_lost(saved, left):
    path = saved / TENSORS
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    with pytest.raises(ArtifactError, match=r"header|the tensor '(0|1)\.weight' is not whole"):
        load(saved)


def test_a_changed_byte_names_the_tensor(saved):
    path = saved / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"the tensor '1\.weight' was altered"):
        load(saved)


def test_a_changed_page_is_refused(saved):
    page = json.loads((saved / PAGE).read_text())
    page["parts"]["0"]["settings"]["out_features"] = 10**12
    (saved / PAGE).write_text(json.dumps(page))
    with pytest.raises(ArtifactError, match="was altered"):
        load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"digest": "", "parts": 3}', "\xff\xfe"])
def test_a_page_that_is_none_is_refused_in_one_line(saved, text):
    (saved / PAGE).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError) as caught:
        load(saved)
    assert "\n" not in str(caught.value) and PAGE in str(caught.value)


def test_tensors_of_another_model_are_refused(saved, tmp_path):
    save(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 6)), tmp_path / "other")
    (tmp_path / "other" / TENSORS).replace(saved / TENSORS)
    with pytest.raises(ArtifactError, match=r"'1\.(weight|bias)' has another shape"):
        load(saved)
    save(nn.Sequential(nn.Linear(20, 30)), tmp_path / "other")
    (tmp_path / "other" / TENSORS).replace(saved / TENSORS)
    with pytest.raises(ArtifactError, match=r"'1\.bias' is missing"):
        load(saved)


def test_a_missing_file_is_named(saved, tmp_path):
    with pytest.raises(ArtifactError, match="no saved model"):
        load(tmp_path / "nowhere")
    (saved / TENSORS).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load(saved)


def test_saving_appears_whole_or_not_at_all(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featherweight.model.skeleton.save_file", full)
    with pytest.raises(OutputError, match="no space left"):
        save(nn.Sequential(nn.Linear(3, 3)), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
