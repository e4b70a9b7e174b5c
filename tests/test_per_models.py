"""The networks of PER's tables on images: CNN-11, and narrow ResNets with Fixup or norm layers."""

from __future__ import annotations

import re

import pytest
import torch
from test_models import config, images, make, stirred
from torch import Tensor, nn

from experiments.config import build
from models.net import Tap, record
from models.resnet_thin import FixupBlock, Subsample

torch.set_num_threads(1)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
def test_cnn11_is_the_paper_s_by_its_counts(activation: str) -> None:
    """2,544 channels and 350,460 units over ten taps: PER's "2.5K" and "350K"; a learned scalar after each ReLU or LeakyReLU."""
    node = config("cnn11", "none").model
    node.activation = activation
    net = build(node, "model")(num_classes=10)
    activations, before = record(net), record(net, pre=True)
    net(images("cnn11"))
    assert [sum(part[0].numel() for part in parts) for parts in (activations, before)] == [350_460, 350_460]
    assert sum(part.shape[1] for part in activations) == 2_544 and len(activations) == 10
    scalars = [parameter for parameter in net.parameters() if parameter.dim() == 0]
    assert len(scalars) == (0 if activation == "elu" else 10) and not any(scalars)
    with torch.no_grad():
        for place, scalar in enumerate(scalars, 1):
            scalar.fill_(-place / 100)
    activations.clear(), before.clear()
    net(images("cnn11"))
    functions = {"relu": torch.relu, "leaky_relu": lambda z: torch.where(z > 0, z, 0.1 * z), "elu": nn.functional.elu}
    for place, (z, h) in enumerate(zip(before, activations, strict=True), 1):
        shift = 0 if activation == "elu" else -place / 100
        torch.testing.assert_close(h, functions[activation](z) + shift)


def test_cnn11_s_order_of_layers() -> None:
    """Pooling and dropout come after the tap; the 2x2 convolutions see one more row and column, at the bottom and at the right."""
    features = make("cnn11", "bn").features
    kinds = " ".join(type(module).__name__ for module in features if not isinstance(module, Tap))
    block, pooled = "Conv2d BatchNorm ELU", "Conv2d BatchNorm ELU MaxPool2d"
    four = [f"ZeroPad2d {pooled} Dropout {block}"] * 3
    wanted = [f"{pooled} {block}", f"{pooled} Dropout {block}", *four, "Dropout AdaptiveAvgPool2d Flatten"]
    assert kinds == " ".join(wanted)
    assert [module.p for module in features if isinstance(module, nn.Dropout)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    convolutions = [module for module in features if isinstance(module, nn.Conv2d)]
    assert [one.kernel_size[0] for one in convolutions] == [5, 1, 3, 1, 2, 1, 2, 1, 2, 1]
    assert not any(one.bias.any() for one in convolutions if one.bias is not None)
    x = torch.zeros(1, 240, 8, 8)
    x[..., -1, -1] = 1.0
    last = convolutions[4]
    out = last(next(module for module in features if isinstance(module, nn.ZeroPad2d))(x))
    torch.testing.assert_close(out[0, :, -1, -1], last.weight[:, :, 0, 0].sum(1))  # its window's first pixel; the others lie outside
    assert not out[0, :, :-2].any()


def test_cnn11_for_tiny_imagenet() -> None:
    node = config("cnn11", "none").model
    node.width = 2
    net = build(node, "model")(num_classes=200)
    activations = record(net)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 200)
    assert sum(part[0].numel() for part in activations) == 2_803_680
    assert [part.shape[1] for part in activations] == [384, 384, 480, 480, 520, 520, 560, 560, 600, 600]
    h = activations[-1]
    torch.testing.assert_close(net.eval().features(torch.zeros(2, 3, 64, 64)).shape, torch.Size([2, 600]))
    assert h.shape[2:] == (2, 2)


@pytest.mark.parametrize(("model", "blocks"), [("resnet56", 27), ("resnet110", 54)])
def test_fixup_starts_as_its_paper_says(model: str, blocks: int) -> None:
    net = make(model, "none")
    assert sum(p.dim() == 0 for p in net.parameters()) == 5 * blocks + 2
    found = [module for module in net.modules() if isinstance(module, FixupBlock)]
    assert len(found) == blocks and not net.classifier.weight.any()
    for block in found:
        assert not block.conv2.weight.any() and block.scale == 1
    for width in (16, 32, 64):
        first = torch.cat(
            [block.conv1.weight.flatten() for block in found if block.conv1.out_channels == width and block.subsample is None]
        )
        assert first.std().item() == pytest.approx((2 / (9 * width)) ** 0.5 / blocks**0.5, rel=0.02)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(found[0](x), x.relu(), rtol=0, atol=0)  # a zero residual
    stage = next(block for block in found if block.subsample is not None)
    out = stage(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2].relu()) and not out[:, 16:].any()


def test_fixup_block_by_hand() -> None:
    block = next(
        module for module in stirred("resnet56", "none").modules() if isinstance(module, FixupBlock) and module.subsample is not None
    )
    b1a, b1b, b2a, scale, b2b = block.enter[0].bias, block.middle[0].bias, block.middle[4].bias, block.scale, block.leave.bias
    assert len({float(value.detach()) for value in (b1a, b1b, b2a, scale, b2b)}) == 5
    x = torch.randn(2, 16, 8, 8)
    u = nn.functional.conv2d(x + b1a, block.conv1.weight, stride=2, padding=1) + b1b
    v = nn.functional.conv2d(u.relu() + b2a, block.conv2.weight, padding=1) * scale + b2b
    short = torch.cat([(x + b1a)[:, :, ::2, ::2], torch.zeros(2, 16, 4, 4)], 1)
    torch.testing.assert_close(block(x), (v + short).relu())


@pytest.mark.parametrize(("model", "count"), [("resnet56", 55), ("resnet110", 109)])
@pytest.mark.parametrize("norm", ["none", "bn"])
@pytest.mark.parametrize("tap", ["input", "post_act"])
def test_taps_of_the_narrow_resnets(model: str, count: int, norm: str, tap: str) -> None:
    node = config(model, norm).model
    node.tap = tap
    net = build(node, "model")(num_classes=10)
    taps = [module for module in net.modules() if isinstance(module, Tap)]
    assert [sum(one.pre == pre for one in taps) for pre in (False, True)] == [count, count]
    inputs: list[Tensor] = []
    for convolution in [module for module in net.modules() if isinstance(module, nn.Conv2d)][1:]:
        convolution.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1
    activations = record(net)
    net(images(model))
    assert len(inputs) == count - 1
    same = all(torch.equal(one, other) for one, other in zip(inputs, activations, strict=False))
    assert same == (tap == "input" or norm == "bn")
    assert sum(part[0].numel() for part in activations) == {55: 532_480, 109: 1_048_576}[count]


def test_narrow_resnets_with_norm_layers_start_as_he_s() -> None:
    net = make("resnet56", "bn")
    for width in (16, 32, 64):
        weights = torch.cat(
            [m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels == width]
        )
        assert weights.std().item() == pytest.approx((2 / (9 * width)) ** 0.5, rel=0.02)
    shortcut = next(module for module in net.modules() if isinstance(module, Subsample))
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(shortcut(x), torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 3, 3)], 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "norm", "option", "message"),
    [
        ("resnet56", "bn", "init=fixup", "init: fixup goes without norm layers, choose norm=none"),
        ("resnet56", "bn", "init=xavier", "init: 'xavier' is not known; allowed: fixup, he"),
        ("resnet110", "none", "tap=all", "tap: 'all' is not known; allowed: input, post_act"),
        ("cnn11", "none", "activation=gelu", "activation: 'gelu' is not known; allowed: relu, leaky_relu, elu"),
        ("cnn11", "none", "init=fixup", "init: 'fixup' is not known; allowed: default, he"),
    ],
)
def test_refused_options(model: str, norm: str, option: str, message: str) -> None:
    node = config(model, norm).model
    key, value = option.split("=")
    node[key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        build(node, "model")(num_classes=10)
