"""PER's CNN-11 and narrow ResNets, Unitization's pre-activation ResNets: blocks by hand, the order of layers, and how they start."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pytest
import torch
from test_models import images, make, stirred
from torch import Tensor, nn

from models.net import Tap, record
from models.resnet_preact import PreActBlock
from models.resnet_thin import FixupBlock, Subsample
from models.unitization import Unitization

torch.set_num_threads(1)
conv2d = nn.functional.conv2d


def square(layers: Iterable[nn.Module], width: int) -> Tensor:
    """The weights of all convolutions of so many channels to as many."""
    return torch.cat([m.weight.flatten() for m in layers if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels == width])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
def test_cnn11_is_the_paper_s_by_its_counts(activation: str) -> None:
    """2,544 channels and 350,460 units over ten taps: PER's "2.5K" and "350K"; a learned scalar after each ReLU or LeakyReLU."""
    net = make("cnn11", "none", activation=activation)
    scalars = [parameter for parameter in net.parameters() if parameter.dim() == 0]
    assert len(scalars) == (0 if activation == "elu" else 10) and not any(scalars)
    for place, scalar in enumerate(scalars, 1):
        scalar.data.fill_(-place / 100)
    activations, before = record(net), record(net, pre=True)
    net(images("cnn11"))
    assert sum(h[0].numel() for h in activations) == 350_460 and sum(h.shape[1] for h in activations) == 2_544
    functions = {"relu": torch.relu, "leaky_relu": lambda z: torch.where(z > 0, z, 0.1 * z), "elu": nn.functional.elu}
    for place, (z, h) in enumerate(zip(before, activations, strict=True), 1):
        torch.testing.assert_close(h, functions[activation](z) - (0 if activation == "elu" else place / 100))


def test_cnn11_s_dropout_and_padding() -> None:
    """Dropout comes after the pooling; the 2x2 convolutions see one more row and column, at the bottom and at the right."""
    features = [module for module in make("cnn11", "bn").features if not isinstance(module, Tap)]
    dropouts = [(type(features[place - 1]).__name__, module.p) for place, module in enumerate(features) if isinstance(module, nn.Dropout)]
    assert dropouts == [*[("MaxPool2d", p) for p in (0.1, 0.2, 0.3, 0.4)], ("ELU", 0.5)]
    convolutions = [module for module in features if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size[0] for conv in convolutions] == [5, 1, 3, 1, 2, 1, 2, 1, 2, 1]
    assert not any(conv.bias.any() for conv in convolutions)
    x = torch.zeros(1, 240, 8, 8)
    x[..., -1, -1] = 1.0
    out = convolutions[4](next(module for module in features if isinstance(module, nn.ZeroPad2d))(x))
    torch.testing.assert_close(out[0, :, -1, -1], convolutions[4].weight[:, :, 0, 0].sum(1))  # its window's first pixel alone
    assert not out[0, :, :-2].any()


def test_narrow_resnets_start_as_their_papers_say() -> None:
    """Fixup's first convolutions as He's, by 27^-1/2, and the second ones zero; with norm layers all as He's."""
    net = make("resnet56", "none")
    assert sum(p.dim() == 0 for p in net.parameters()) == 5 * 27 + 2
    blocks = [module for module in net.modules() if isinstance(module, FixupBlock)]
    assert len(blocks) == 27 and not net.classifier.weight.any()
    assert all(not block.conv2.weight.any() and block.scale == 1 for block in blocks)
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(blocks[0](x), x.relu(), rtol=0, atol=0)  # a zero residual
    he = [*make("resnet56", "bn").modules()]
    for factor, layers in ((27**-0.5, [block.conv1 for block in blocks]), (1, he)):
        for width in (16, 32, 64):
            assert square(layers, width).std().item() == pytest.approx(factor * (2 / (9 * width)) ** 0.5, rel=0.02)
    shortcut = next(module for module in he if isinstance(module, Subsample))
    torch.testing.assert_close(shortcut(x), torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 3, 3)], 1), rtol=0, atol=0)


def test_fixup_block_by_hand() -> None:
    block = next(module for module in stirred("resnet56", "none").modules() if isinstance(module, FixupBlock) and module.subsample)
    b1a, b1b, b2a, scale, b2b = block.enter[0].bias, block.middle[0].bias, block.middle[4].bias, block.scale, block.leave.bias
    assert len({float(value.detach()) for value in (b1a, b1b, b2a, scale, b2b)}) == 5
    x = torch.randn(2, 16, 8, 8)
    u = conv2d(x + b1a, block.conv1.weight, stride=2, padding=1) + b1b
    v = conv2d(u.relu() + b2a, block.conv2.weight, padding=1) * scale + b2b
    short = torch.cat([(x + b1a)[:, :, ::2, ::2], torch.zeros(2, 16, 4, 4)], 1)
    torch.testing.assert_close(block(x), (v + short).relu())


@pytest.mark.parametrize(("norm", "tap"), [("none", "input"), ("none", "post_act"), ("bn", "post_act")])
def test_taps_of_the_narrow_resnets(norm: str, tap: str) -> None:
    """With tap=input they see the inputs of the convolutions behind Fixup's scalars; with norm layers both are the same."""
    net, inputs = make("resnet56", norm, tap=tap), []
    for convolution in [module for module in net.modules() if isinstance(module, nn.Conv2d)][1:]:
        convolution.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1
    activations = record(net)
    net(images("resnet56"))
    assert len(activations) == len(inputs) + 1 == 55
    assert all(torch.equal(*pair) for pair in zip(inputs, activations, strict=False)) == (tap == "input" or norm == "bn")


def test_layers_of_a_preact_resnet() -> None:
    """The stem's norm is the first, a block has two, the last comes before the pooling; the taps see what the norms give."""
    net = make("preact_resnet20", "unitization")
    norms = [module for module in net.modules() if isinstance(module, Unitization)]
    assert len(norms) == 20 and sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in net.modules()) == 19
    outs: list[Tensor] = []
    for norm in norms:
        norm.register_forward_hook(lambda layer, _, out: outs.append(out))
    before = record(net, pre=True)
    net(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(*pair) for pair in zip(outs, before, strict=True))
    assert [tuple(out.shape[1:]) for out in outs] == [(16, 32, 32)] * 8 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6


@pytest.mark.parametrize("padding", ["both", "tf_same"])
def test_preact_block_by_hand(padding: str) -> None:
    """The shortcut takes the input itself, not what the first norm and ReLU make of it."""
    blocks = [module for module in make("preact_resnet20", "none", padding=padding).modules() if isinstance(module, PreActBlock)]
    assert [isinstance(block.shortcut, nn.Identity) for block in blocks] == [True] * 3 + [False, True, True] * 2
    for block in (blocks[0], blocks[3]):
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        first, second = (module for module in block.residual.modules() if isinstance(module, nn.Conv2d))
        stride, x = first.stride[0], torch.randn(2, 16, 8, 8)
        if padding == "tf_same" and stride == 2:  # TensorFlow: 0 before, 1 after
            h = conv2d(nn.functional.pad(x.relu(), (0, 1, 0, 1)), first.weight, first.bias, stride=2)
        else:
            h = conv2d(x.relu(), first.weight, first.bias, stride=stride, padding=1)
        residual = conv2d(h.relu(), second.weight, second.bias, padding=1)
        short = x if stride == 1 else conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=2)
        torch.testing.assert_close(block(x), residual + short)


def test_preact_weights_start_as_keras_draws_them() -> None:
    """A normal of variance 2 / fan-in cut off at two deviations, which leaves 0.8796 of its deviation; biases are 0."""
    net = make("preact_resnet110", "bn")
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for width in (16, 32, 64):
        weights, std = square(layers, width), math.sqrt(2 / (9 * width))
        assert weights.std().item() == pytest.approx(0.87962566 * std, rel=0.01) and 1.98 * std < weights.abs().max() <= 2 * std
    assert net.classifier.weight.abs().max() <= 2 * math.sqrt(2 / 64)
    assert len(layers) == 112 and not any(module.bias.any() for module in layers)


def test_refused_options() -> None:
    for (model, norm, option), message in {
        ("resnet56", "bn", "init=fixup"): "init: fixup goes without norm layers, choose norm=none",
        ("resnet56", "none", "tap=all"): "tap: 'all' is not known; allowed: input, post_act",
        ("cnn11", "none", "activation=gelu"): "activation: 'gelu' is not known; allowed: relu, leaky_relu, elu",
        ("preact_resnet20", "bn", "padding=valid"): "padding: 'valid' is not known; allowed: both, tf_same",
    }.items():
        key, value = option.split("=")
        with pytest.raises(ValueError, match=re.escape(message)):
            make(model, norm, **{key: value})
