"""The pre-activation residual networks: their sizes, their layers' numbers, a block by hand, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
from test_models import config, make
from torch import Tensor, nn

from experiments.config import build
from models.net import Net, record
from models.norm import BatchNorm
from models.resnet_preact import PreActBlock
from models.unitization import Unitization

torch.set_num_threads(1)
conv2d = nn.functional.conv2d


@pytest.mark.parametrize(
    ("model", "norm", "classes", "count"),
    [
        *[("preact_resnet20", "bn", 10, 273_098), ("preact_resnet20", "none", 10, 273_098 - 2 * 704)],
        *[("preact_resnet110", "bn", 10, 1_734_698), ("preact_resnet110", "bn", 100, 1_740_548)],
        *[("preact_resnet110", "unitization", 10, 1_738_762), ("preact_resnet110", "unitization", 100, 1_744_612)],
    ],
)
def test_printed_sizes(model: str, norm: str, classes: int, count: int) -> None:
    net = build(config(model, norm).model, "model")(num_classes=classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(("model", "blocks"), [("preact_resnet20", 3), ("preact_resnet110", 18)])
def test_layers_are_counted_as_in_the_paper(model: str, blocks: int) -> None:
    """The stem's norm is the first, a block has two, the last comes before the pooling; what is tapped is what the norm gives."""
    net = make(model, "unitization")
    norms = [module for module in net.modules() if isinstance(module, Unitization)]
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(norms) == 6 * blocks + 2 and sum(one.kernel_size == (3, 3) for one in convolutions) == 6 * blocks + 1
    outs: list[Tensor] = []
    for one in norms:
        one.register_forward_hook(lambda layer, _, out: outs.append(out))
    before, after = record(net, pre=True), record(net)
    net(torch.randn(2, 3, 32, 32))
    assert len(outs) == len(before) == len(norms) and all(torch.equal(*pair) for pair in zip(outs, before, strict=True))
    assert all(torch.equal(one.relu(), other) for one, other in zip(before, after, strict=True))
    shapes = [tuple(one.shape[1:]) for one in before]
    assert shapes == [(16, 32, 32)] * (2 + 2 * blocks) + [(32, 16, 16)] * 2 * blocks + [(64, 8, 8)] * 2 * blocks
    if blocks == 18:
        assert [shapes[layer - 1] for layer in (60, 69, 78, 87, 96, 105)] == [(32, 16, 16)] * 2 + [(64, 8, 8)] * 4


def blocks_of(net: Net) -> list[PreActBlock]:
    return [module for module in net.modules() if isinstance(module, PreActBlock)]


@pytest.mark.parametrize("padding", ["both", "tf_same"])
def test_a_block_by_hand(padding: str) -> None:
    """The shortcut takes the input itself, not what the first norm and ReLU make of it."""
    node = config("preact_resnet20", "none").model
    node.padding = padding
    torch.manual_seed(0)
    found = blocks_of(build(node, "model")(num_classes=10))
    assert [isinstance(block.shortcut, nn.Identity) for block in found] == [True] * 3 + [False, True, True] * 2
    for block in (found[0], found[3]):
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        first, second = (module for module in block.residual.modules() if isinstance(module, nn.Conv2d))
        stride = first.stride[0]
        x = torch.randn(2, 16, 8, 8)
        inside = x.relu()
        if padding == "tf_same" and stride == 2:  # TensorFlow: 0 before, 1 after
            inside = nn.functional.pad(inside, (0, 1, 0, 1))
            h = conv2d(inside, first.weight, first.bias, stride=2)
        else:
            h = conv2d(inside, first.weight, first.bias, stride=stride, padding=1)
        residual = conv2d(h.relu(), second.weight, second.bias, padding=1)
        short = x if stride == 1 else conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=2)
        torch.testing.assert_close(block(x), residual + short)


def test_both_paddings_see_the_same_image_at_another_place() -> None:
    """Shifted by a pixel, as far as no border is seen."""
    nets = []
    for padding in ("both", "tf_same"):
        node = config("preact_resnet20", "none").model
        node.padding = padding
        torch.manual_seed(0)
        nets.append(build(node, "model")(num_classes=10))
    ours, theirs = (blocks_of(net)[3] for net in nets)
    x = torch.randn(1, 16, 12, 12)
    moved = torch.roll(x, (-1, -1), (2, 3))
    assert not torch.allclose(ours(x), theirs(x))
    torch.testing.assert_close(theirs.residual(x)[..., 2:-2, 2:-2], ours.residual(moved)[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-5)


def test_weights_start_as_keras_draws_them() -> None:
    """A normal of variance 2 / fan-in cut off at two deviations, which leaves 0.8796 of its deviation; biases are 0."""
    net = make("preact_resnet110", "bn")
    for width in (16, 32, 64):
        same = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels == width]
        weights, std = torch.cat([one.weight.flatten() for one in same]), math.sqrt(2 / (9 * width))
        assert weights.std().item() == pytest.approx(0.87962566 * std, rel=0.01) and weights.abs().max() <= 2 * std
        assert weights.abs().max() > 1.98 * std
    assert net.classifier.weight.abs().max() <= 2 * math.sqrt(2 / 64)
    biases = [m.bias for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(biases) == 112 and not any(bias.any() for bias in biases if bias is not None)


def test_norm_layers_do_not_change_how_the_rest_starts() -> None:
    nets = [make("preact_resnet20", norm, seed=3) for norm in ("none", "bn", "gn", "unitization")]
    every = [[m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)] for net in nets]
    for other in every[1:]:
        assert all(torch.equal(*pair) for pair in zip(every[0], other, strict=True))


def test_unitization_starts_as_batch_norm() -> None:
    node = config("preact_resnet20", "bn").model
    node.norm.eps, node.norm.momentum = 1e-3, 0.01
    torch.manual_seed(0)
    plain, ours = build(node, "model")(num_classes=10), make("preact_resnet20", "unitization")
    x = torch.randn(8, 3, 32, 32)
    assert sum(isinstance(module, BatchNorm) for module in plain.modules()) == 20
    for training, tolerance in ((False, 1e-5), (True, 1e-2)):  # in training through 20 layers whose variances differ by 1e-3 / n
        torch.testing.assert_close(plain.train(training)(x), ours.train(training)(x), rtol=tolerance, atol=tolerance)


def test_an_unknown_padding_is_refused() -> None:
    node = config("preact_resnet20", "bn").model
    node.padding = "valid"
    with pytest.raises(ValueError, match="padding: 'valid' is not known; allowed: both, tf_same"):
        build(node, "model")(num_classes=10)
