"""Small networks with random weights, one for each architecture in use: what structured pruning has to cope with.

Built in code here; those of `transformers` are in `transformers_networks`. It imports nothing of featherweight, so that
the peers' environments read it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """How to build an architecture, what goes into it, and how many heads its query, key and value layers have.

    `heads` maps the last part of a layer's name to the number of its heads. `refused` is part of the line that says
    why nothing can be pruned, where that is so.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Example]
    heads: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""


NETWORKS: dict[str, Network] = {}


def network(name: str, example: Callable[[], Example], **rest: Any) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register a function that builds the architecture `name`."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[name] = Network(build, example, **rest)
        return build

    return register


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network in evaluation mode with weights, scales and statistics that are random everywhere.

    A mistake in what belongs together then shows in the outputs.
    """
    torch.manual_seed(0)
    model = build().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(tensor + 0.1 * noise if name.endswith("weight") else tensor + 0.05 * noise)
    return model


def image(size: int = 32, channels: int = 3, count: int = 2) -> Callable[[], Example]:
    return lambda: {"x": torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(2))}


def rows(length: int = 6, width: int = 12) -> Callable[[], Example]:
    return lambda: {"x": torch.randn(2, length, width, generator=torch.Generator().manual_seed(2))}


def ids(length: int = 7, words: int = 40) -> Callable[[], Example]:
    return lambda: {"x": torch.randint(0, words, (2, length), generator=torch.Generator().manual_seed(2))}


def conv(inner: int, out: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> nn.Sequential:
    """Convolution, batch norm, activation (None: none)."""
    layers = [nn.Conv2d(inner, out, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class Classifier(nn.Module):
    """A body of convolutions, the mean over space, and a linear layer."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """y(x) + shortcut(x), then an activation if there is one."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: bool = True):
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + self.shortcut(x)
        return F.relu(y) if self.act else y


def basic(inner: int, out: int, stride: int = 1) -> Residual:
    shortcut = conv(inner, out, 1, stride, act=None) if stride > 1 or inner != out else None
    return Residual(nn.Sequential(conv(inner, out, 3, stride), conv(out, out, act=None)), shortcut)


def bottleneck(inner: int, out: int, stride: int = 1, groups: int = 1, share: int = 4) -> Residual:
    width = out // share
    shortcut = conv(inner, out, 1, stride, act=None) if stride > 1 or inner != out else None
    layers = [conv(inner, width, 1), conv(width, width, 3, stride, groups), conv(width, out, 1, act=None)]
    return Residual(nn.Sequential(*layers), shortcut)


@network("ResNet, basic blocks", image())
def resnet_basic() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16), basic(16, 16), basic(16, 32, 2), basic(32, 32)), 32)


@network("ResNet, bottlenecks", image())
def resnet_bottleneck() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16), bottleneck(16, 64), bottleneck(64, 96, 2), bottleneck(96, 96)), 96)


@network("ResNeXt, grouped convolutions", image())
def resnext() -> nn.Module:
    return Classifier(
        nn.Sequential(conv(3, 16), bottleneck(16, 32, groups=4, share=1), bottleneck(32, 48, 2, 4, 1)), 48
    )


class PadShortcut(nn.Module):
    """A residual block whose shortcut pads channels with zeros (He et al., option A)."""

    def __init__(self, inner: int, out: int, stride: int):
        super().__init__()
        self.one, self.two, self.stride = conv(inner, out, 3, stride), conv(out, out, act=None), stride
        self.pad = (out - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.two(self.one(x)) + short)


@network("ResNet, padded shortcuts", image())
def resnet_padded() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16), PadShortcut(16, 32, 2), PadShortcut(32, 32, 1)), 32)


class PreActivation(nn.Module):
    """Norm and activation before each convolution (He et al., arXiv:1603.05027)."""

    def __init__(self, inner: int, out: int, stride: int = 1):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inner), nn.BatchNorm2d(out)])
        self.convs = nn.ModuleList([nn.Conv2d(inner, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)])
        self.short = nn.Conv2d(inner, out, 1, stride) if inner != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, layer in zip(self.norms, self.convs):
            y = layer(F.relu(norm(y)))
        return y + (x if self.short is None else self.short(x))


@network("ResNet, pre-activation", image())
def resnet_pre() -> nn.Module:
    return Classifier(nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), PreActivation(16, 16), PreActivation(16, 32, 2)), 32)


class Dense(nn.Module):
    """Each layer sees all that came before it (Huang et al., arXiv:1608.06993)."""

    def __init__(self, inner: int, growth: int, count: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inner + place * growth), nn.ReLU(), nn.Conv2d(inner + place * growth, growth, 3, 1, 1)
            )
            for place in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@network("DenseNet", image(16))
def densenet() -> nn.Module:
    turn = nn.Sequential(conv(28, 16, 1), nn.AvgPool2d(2))
    return Classifier(
        nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), Dense(16, 6, 2), turn, Dense(16, 6, 2), nn.BatchNorm2d(28)), 28
    )


class Inception(nn.Module):
    """Four branches side by side, concatenated (Szegedy et al., arXiv:1409.4842)."""

    def __init__(self, inner: int, widths: tuple[int, int, int, int]):
        super().__init__()
        one, three, five, pool = widths
        self.one = conv(inner, one, 1)
        self.three = nn.Sequential(conv(inner, three // 2, 1), conv(three // 2, three))
        self.five = nn.Sequential(conv(inner, five // 2, 1), conv(five // 2, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inner, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


@network("Inception", image(16))
def inception() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16), Inception(16, (8, 12, 8, 4)), Inception(32, (8, 16, 8, 8))), 40)


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Linear(32 * 16, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.body(x), 1))


@network("VGG", image(16))
def vgg() -> nn.Module:
    return Vgg()


def separable(inner: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inner, inner, 3, stride, inner), conv(inner, out, 1))


@network("MobileNetV1", image())
def mobilenet_v1() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16, 3, 2), separable(16, 32), separable(32, 48, 2), separable(48, 48)), 48)


class SqueezeExcite(nn.Module):
    """Channels scaled by gates that their means give (Hu et al., arXiv:1709.01507)."""

    def __init__(self, width: int, inner: int, gate: Callable[[Tensor], Tensor] = torch.sigmoid):
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def inverted(inner: int, out: int, stride: int = 1, act: Any = nn.ReLU6, gate: Any = None) -> nn.Module:
    """Wide depthwise convolutions between narrow ends (arXiv:1801.04381), with gates where `gate` is given."""
    wide = 3 * inner
    layers = [conv(inner, wide, 1, act=act), conv(wide, wide, 3, stride, wide, act=act)]
    layers += [SqueezeExcite(wide, inner // 2, gate)] if gate else []
    body = nn.Sequential(*layers, conv(wide, out, 1, act=None))
    return Residual(body, act=False) if stride == 1 and inner == out else body


@network("MobileNetV2", image())
def mobilenet_v2() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16, 3, 2), inverted(16, 16), inverted(16, 24, 2), inverted(24, 24)), 24)


@network("MobileNetV3", image())
def mobilenet_v3() -> nn.Module:
    rest = {"act": nn.Hardswish, "gate": F.hardsigmoid}
    blocks = [inverted(16, 16, **rest), inverted(16, 24, 2, **rest), inverted(24, 24, **rest)]
    return Classifier(nn.Sequential(conv(3, 16, 3, 2, act=nn.Hardswish), *blocks), 24)


@network("EfficientNet", image())
def efficientnet() -> nn.Module:
    rest = {"act": nn.SiLU, "gate": torch.sigmoid}
    blocks = [inverted(16, 16, **rest), inverted(16, 24, 2, **rest), inverted(24, 24, **rest)]
    return Classifier(nn.Sequential(conv(3, 16, 3, 2, act=nn.SiLU), *blocks, conv(24, 48, 1, act=nn.SiLU)), 48)


class ShuffleUnit(nn.Module):
    """Half of the channels is worked on, then halves are woven together (arXiv:1807.11164)."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(conv(half, half, 1), conv(half, half, 3, groups=half, act=None), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        y = torch.cat([one, self.body(other)], 1)
        count, width, *size = y.shape
        return y.view(count, 2, width // 2, *size).transpose(1, 2).reshape(count, width, *size)


@network("ShuffleNetV2", image(16))
def shufflenet() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 24, 3, 2), ShuffleUnit(24), ShuffleUnit(24), conv(24, 32, 1)), 32)


class ChannelsLast(nn.Module):
    """Layer norm over channels of N x C x H x W."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, then two linear layers on channels last, scaled (arXiv:2201.03545)."""

    def __init__(self, width: int):
        super().__init__()
        self.depth, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@network("ConvNeXt", image())
def convnext() -> nn.Module:
    turn = nn.Sequential(ChannelsLast(16), nn.Conv2d(16, 32, 2, 2))
    return Classifier(nn.Sequential(nn.Conv2d(3, 16, 4, 4), ConvNeXtBlock(16), turn, ConvNeXtBlock(32)), 32)


class UNet(nn.Module):
    """Down twice, up twice by transposed convolutions, with concatenations across (arXiv:1505.04597)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 12), conv(12, 24)])
        self.middle = conv(24, 32)
        self.ups = nn.ModuleList([nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(24, 12, 2, 2)])
        self.merge, self.head = nn.ModuleList([conv(48, 24), conv(24, 12)]), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for layer in self.down:
            x = layer(x)
            across.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge in zip(self.ups, self.merge):
            x = merge(torch.cat([up(x), across.pop()], 1))
        return self.head(x)


@network("U-Net", image(16))
def unet() -> nn.Module:
    return UNet()


class Pyramid(nn.Module):
    """Features of three scales, each added to the next finer one (arXiv:1612.03144)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 16, 3, 2), conv(16, 24, 3, 2), conv(24, 32, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(width, 20, 1) for width in (16, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(20, 20, 3, 1, 1) for _ in range(3))
        self.head = nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage, lateral in zip(self.stages, self.lateral):
            x = stage(x)
            features.append(lateral(x))
        for place in (1, 0):
            features[place] = features[place] + F.interpolate(features[place + 1], scale_factor=2.0)
        return [self.head(smooth(each)) for smooth, each in zip(self.smooth, features)]


@network("FPN", image())
def fpn() -> nn.Module:
    return Pyramid()
