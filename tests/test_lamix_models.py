"""LaMix's networks: their printed sizes, whole nets against torchvision's or by hand, and what they do not share with their namesakes."""

from __future__ import annotations

import importlib

import hydra
import pytest
import torch
from nets import NARROW
from test_models import copied
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.cli import CONF
from experiments.config import build
from models.net import Net

torch.set_num_threads(1)


def whole(*overrides: str, classes: int = 10) -> Net:
    """As conf/ has it, or with other options."""
    torch.manual_seed(0)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return build(hydra.compose("config", list(overrides)).model, "model")(num_classes=classes)


def exact(net: Net) -> tuple[Net, Tensor]:
    """In float64, where the order of sums does not show, and no two norm layers alike; and images for it."""
    rng = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return net.double(), torch.randn(4, 3, 32, 32, generator=rng).double()


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("preact_resnet18", [11_171_274, 11_217_444]),
        ("resnet50", [23_520_842, 23_705_252]),
        ("lenet", [62_006, 69_656]),
        ("densenet121", [6_956_298, 7_048_548]),
        ("wrn28_10", [36_479_194, 36_536_884]),
        ("puzzle_resnet18", [11_171_146, 11_217_316]),
        ("puzzle_resnet50", [23_509_066, 23_693_476]),
    ],
)
def test_printed_sizes(model: str, counts: list[int]) -> None:
    with torch.device("meta"):  # nothing is drawn
        nets = [whole(f"model={model}", f"norm={'none' if model == 'lenet' else 'bn'}", classes=classes) for classes in (10, 100)]
    assert [sum(parameter.numel() for parameter in net.parameters()) for net in nets] == counts


def by_hand(net: Net, x: Tensor, stages: list[tuple[int, int]], convolutions: int, raw: bool, last: bool) -> Tensor:
    """Logits in training of pre-activation nets, from the parameters as listed: `stages` of so many blocks and such a stride.

    convolutions: of a block; the last but one has the stride. raw: an identity takes the block's input, and the stem has no norm and
    ReLU; else what the block's first ReLU gives, and it has. last: norm and ReLU come at the end (Zagoruyko's).
    """
    listed = iter(net.parameters())
    take = listed.__next__

    def active(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, take(), take(), training=True).relu()

    x = F.conv2d(x, take(), padding=1)
    x = x if raw else active(x)
    for count, stride in stages:
        for block in range(count):
            a = out = active(x)
            for place in range(convolutions):
                out, weight = active(out) if place else a, take()
                here = stride if block == 0 and place == convolutions - 2 else 1
                out = F.conv2d(out, weight, stride=here, padding=weight.shape[2] // 2)
            x = out + (F.conv2d(a, take(), stride=stride) if out.shape != x.shape else x if raw else a)
    x = active(x) if last else x
    logits = F.linear(x.mean((2, 3)), take(), take())
    assert next(listed, None) is None
    return logits


@pytest.mark.parametrize(
    ("options", "stages", "convolutions", "raw", "last"),
    [
        (["model=preact_resnet18", "model.width=16"], [(2, 1), (2, 2), (2, 2), (2, 2)], 2, False, False),
        (["model=puzzle_resnet18", "model.width=16"], [(2, 1), (2, 2), (2, 2), (2, 2)], 2, True, False),
        (["model=puzzle_resnet50", "model.width=8"], [(3, 1), (4, 2), (6, 2), (3, 2)], 3, True, False),
        (["model=wrn28_10", "model.depth=16", "model.width=2"], [(2, 1), (2, 2), (2, 2)], 2, True, True),
    ],
)
def test_pre_activation_nets_by_hand(options: list[str], stages: list[tuple[int, int]], convolutions: int, raw: bool, last: bool) -> None:
    net, x = exact(whole(*options, "norm=bn"))
    torch.testing.assert_close(net(x), by_hand(net, x, stages, convolutions, raw, last), rtol=1e-9, atol=1e-9)
    assert (net.features(x).min() < 0) == (not last)  # a ReLU comes last in one of them


@pytest.mark.parametrize("model", ["resnet50", "densenet121"])
def test_is_torchvisions_but_for_the_stem(model: str) -> None:
    models = importlib.import_module("torchvision.models")
    if model == "resnet50":
        theirs = models.resnet50(num_classes=10)
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    else:
        theirs = models.DenseNet(8, (6, 12, 24, 16), num_init_features=16, num_classes=10)
        theirs.features.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        for name in ("norm0", "relu0", "pool0"):
            delattr(theirs.features, name)
    ours, x = exact(whole(f"model={model}", "norm=bn", *(["model.growth=8"] if model == "densenet121" else [])))
    copied(ours, theirs.double())
    x = x[:, :, :16, :16] if model == "resnet50" else x
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_lenet_drawn_with_the_same_seed_is_its_layers_as_they_are_written_down() -> None:
    ours, x = whole("model=lenet", "norm=none"), torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    linear = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    torch.testing.assert_close(ours(x), nn.Sequential(*convolutions, nn.Flatten(), *linear)(x), rtol=0, atol=0)


@pytest.mark.parametrize("model", ["preact_resnet18", "resnet50", "puzzle_resnet50"])
def test_a_stem_with_stride_is_for_larger_images(model: str) -> None:
    net, maps = whole(f"model={model}", *NARROW[model], "model.stem_stride=2"), []
    pool = next(module for module in net.features if isinstance(module, nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].shape[2:]))
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 10) and maps == [(4, 4)]


def test_refused_sizes() -> None:
    """Below the least width, 1x1 convolutions with stride have fewer than 16 channels, which oneDNN computes wrongly (issue 6035)."""
    for model, key, value, least in (
        ("wrn28_10", "depth", 27, r"6n \+ 4: 10, 16, 22, 28, \.\.\."),
        ("wrn28_10", "depth", 4, "6n"),
        ("preact_resnet18", "width", 15, "at least 16$"),
        ("puzzle_resnet50", "width", 3, "at least 4$"),
    ):
        with pytest.raises(ValueError, match=rf"^{key}: {value} is not allowed; it must be {least}"):
            whole(f"model={model}", f"model.{key}={value}")
