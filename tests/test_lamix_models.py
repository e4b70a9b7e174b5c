"""LaMix's networks: their printed sizes, whole nets against torchvision's or by hand, and what they do not share with their namesakes."""

from __future__ import annotations

import importlib
import math

import hydra
import pytest
import torch
from nets import NARROW
from test_models import copied, make
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.cli import CONF
from experiments.config import build
from models.net import Net
from models.norm import BatchNorm

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
    ("model", "norm", "counts", "layers"),
    [
        ("preact_resnet18", "bn", [11_171_274, 11_217_444], {BatchNorm: 17, nn.Conv2d: 20}),  # 17: no last one
        ("resnet50", "bn", [23_520_842, 23_705_252], {BatchNorm: 53, nn.Conv2d: 53}),
        ("lenet", "none", [62_006, 69_656], {BatchNorm: 0, nn.Conv2d: 2}),
        ("lenet", "bn", [62_006 + 2 * 226, 69_656 + 2 * 226], {BatchNorm: 4, nn.Conv2d: 2}),
        ("densenet121", "bn", [6_956_298, 7_048_548], {BatchNorm: 120, nn.Conv2d: 120}),
        ("wrn28_10", "bn", [36_479_194, 36_536_884], {BatchNorm: 25, nn.Conv2d: 28}),
        ("puzzle_resnet18", "bn", [11_171_146, 11_217_316], {BatchNorm: 16, nn.Conv2d: 20}),  # neither the stem's nor a last one
        ("puzzle_resnet50", "bn", [23_509_066, 23_693_476], {BatchNorm: 48, nn.Conv2d: 53}),
    ],
)
def test_printed_sizes(model: str, norm: str, counts: list[int], layers: dict[type[nn.Module], int]) -> None:
    with torch.device("meta"):  # nothing is drawn
        nets = [whole(f"model={model}", f"norm={norm}", classes=classes) for classes in (10, 100)]
    assert [sum(parameter.numel() for parameter in net.parameters()) for net in nets] == counts
    assert {kind: sum(isinstance(module, kind) for module in nets[0].modules()) for kind in layers} == layers
    pools = [place for place, module in enumerate(nets[0].features) if isinstance(module, nn.AdaptiveAvgPool2d)]
    assert pools == ([] if model == "lenet" else [len(nets[0].features) - 2])


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


def test_resnet50_is_torchvisions_but_for_the_stem() -> None:
    ours, x = exact(whole("model=resnet50", "norm=bn"))
    theirs = importlib.import_module("torchvision.models").resnet50(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    copied(ours, theirs.double())
    torch.testing.assert_close(ours(x[:, :, :16, :16]), theirs(x[:, :, :16, :16]), rtol=1e-9, atol=1e-9)


def test_densenet121_is_torchvisions_but_for_the_stem() -> None:
    ours, x = exact(whole("model=densenet121", "model.growth=8", "norm=bn"))
    theirs = importlib.import_module("torchvision.models").DenseNet(8, (6, 12, 24, 16), num_init_features=16, num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(theirs.features, name)
    copied(ours, theirs.double())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_lenet_is_what_it_says() -> None:
    """Drawn with the same seed, layers as they are written down are the same net."""
    ours, x = make("lenet", "none"), torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    linear = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    written = nn.Sequential(*convolutions, nn.Flatten(), *linear)
    torch.testing.assert_close(ours(x), written(x), rtol=0, atol=0)
    kinds = " ".join(type(module).__name__ for module in make("lenet", "bn").features)
    block = "BatchNorm Tap ReLU Tap"
    assert kinds == f"Conv2d {block} MaxPool2d Conv2d {block} MaxPool2d Flatten Linear {block} Linear {block}"


@pytest.mark.parametrize("model", ["preact_resnet18", "resnet50", "puzzle_resnet18", "puzzle_resnet50"])
@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 4)])
def test_a_stem_with_stride_is_for_larger_images(model: str, stride: int, size: int) -> None:
    net = whole(f"model={model}", *NARROW[model], f"model.stem_stride={stride}")
    pool = next(module for module in net.features if isinstance(module, nn.AdaptiveAvgPool2d))
    maps: list[Tensor] = []
    pool.register_forward_hook(lambda _, args, out: maps.append(args[0]))
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert maps[0].shape[2:] == (size, size)


@pytest.mark.parametrize("model", ["lenet", *NARROW])
def test_weights_start_as_torchs(model: str) -> None:
    """Uniform within 1 / sqrt(fan-in)."""
    large = [m.weight for m in make(model, "bn").modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() > 1000]
    assert len(large) >= 3
    for weight in large:
        bound = 1 / math.sqrt(weight[0].numel())
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("depth", [4, 27, 29, -2])
def test_a_depth_of_no_wide_resnet_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^depth: {depth} is not allowed; it must be 6n \+ 4: 10, 16, 22, 28, \.\.\.$"):
        whole("model=wrn28_10", f"model.depth={depth}")


@pytest.mark.parametrize(("model", "least"), [("preact_resnet18", 16), ("puzzle_resnet18", 16), ("puzzle_resnet50", 4)])
def test_a_width_that_a_cpu_computes_wrongly_is_refused(model: str, least: int) -> None:
    """With the least allowed, no 1x1 convolution with stride has fewer than 16 channels (oneDNN, issue 6035)."""
    convolutions = [module for module in whole(f"model={model}", f"model.width={least}").modules() if isinstance(module, nn.Conv2d)]
    assert min(one.in_channels for one in convolutions if one.kernel_size == (1, 1) and one.stride == (2, 2)) == 16
    with pytest.raises(ValueError, match=f"^width: {least - 1} is not allowed; it must be at least {least}$"):
        whole(f"model={model}", f"model.width={least - 1}")
