"""Models: shapes, taps, gradients and printed sizes of every architecture with every norm layer that conf/ offers."""

from __future__ import annotations

import copy
import functools
import importlib

import hydra
import pytest
import torch
from nets import IMAGE, NARROW, NORMS
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.cli import CONF
from experiments.config import build
from models.net import Net, Tap, record
from models.resnet import BasicBlock

torch.set_num_threads(1)
PAIRS = [(32, 64, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 512, 4), *[(512, 512, 4)] * 5, (512, 1024, 2), (1024, 1024, 2)]
TAPS: dict[str, list[tuple[int, ...]]] = {
    "net2c": [(20, 24, 24), (50, 8, 8), (100,)],
    "net5c": [(32, 26, 26), (64, 24, 24), (128, 24, 24), (256, 10, 10), (512, 8, 8)],
    "vgg13": [(width, size, size) for width, size in ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2)) for _ in range(2)],
    "resnet18": [(64, 32, 32)] * 5 + [(128, 16, 16)] * 4 + [(256, 8, 8)] * 4 + [(512, 4, 4)] * 4,
    # the stem; a pair without stride; then depthwise with or without stride, and pointwise
    "mobilenet": [(32, 32, 32), (32, 32, 32), (64, 32, 32), (64, 16, 16), (128, 16, 16)]
    + [(width, size, size) for first, second, size in PAIRS[1:] for width in (first, second)],
    "cnn11": [
        *[(192, 32, 32), (192, 16, 16), (240, 16, 16), (240, 8, 8), (260, 8, 8)],
        *[(260, 4, 4), (280, 4, 4), (280, 2, 2), (300, 2, 2), (300, 1, 1)],
    ],
    "resnet56": [(16, 32, 32)] * 19 + [(32, 16, 16)] * 18 + [(64, 8, 8)] * 18,
    "resnet110": [(16, 32, 32)] * 37 + [(32, 16, 16)] * 36 + [(64, 8, 8)] * 36,
    "preact_resnet20": [(16, 32, 32)] * 8 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6,
    # as nets.NARROW makes them. A block's first ReLU sees the map of the block before
    "preact_resnet18": [(16, 32, 32)] * 6 + [(32, 16, 16)] * 4 + [(64, 8, 8)] * 4 + [(128, 4, 4)] * 3,
    "wrn28_10": [(16, 32, 32)] * 5 + [(32, 16, 16)] * 4 + [(64, 8, 8)] * 4,
    # inside a bottleneck, the first ReLU comes before the stride
    "resnet50": [(8, 32, 32)]
    + [
        units
        for width, size, count in ((8, 32, 3), (16, 16, 4), (32, 8, 6), (64, 4, 3))
        for before in [min(2 * size, 32), *[size] * (count - 1)]
        for units in [(width, before, before), (width, size, size), (4 * width, size, size)]
    ],
    "puzzle_resnet18": [(16, 32, 32)] * 5 + [(32, 16, 16)] * 4 + [(64, 8, 8)] * 4 + [(128, 4, 4)] * 3,
    # a bottleneck's input, and twice its channels inside, before and after the stride
    "puzzle_resnet50": [
        units
        for first, width, size, count in ((8, 8, 32, 3), (32, 16, 16, 4), (64, 32, 8, 6), (128, 64, 4, 3))
        for channels, before in [(first, min(2 * size, 32)), *[(4 * width, size)] * (count - 1)]
        for units in [(channels, before, before), (width, before, before), (width, size, size)]
    ],
    "lenet": [(6, 28, 28), (16, 10, 10), (120,), (84,)],
    # each layer's input and its 32 channels inside; after each block, its transition's input, or the end
    "densenet121": [
        units
        for first, last, size in ((16, 32, 32), (16, 48, 16), (24, 48, 8), (24, 40, 4))
        for units in [*[(width, size, size) for before in range(first, last, 8) for width in (before, 32)], (last, size, size)]
    ],
}
# of the last hidden layer
WIDTH = {"net2c": 100, "net5c": 512, "vgg13": 512, "resnet18": 512, "mobilenet": 1024, "cnn11": 300, "resnet56": 64, "resnet110": 64}
WIDTH |= {"preact_resnet18": 128, "resnet50": 256, "lenet": 84, "densenet121": 40, "wrn28_10": 64}
WIDTH |= {"puzzle_resnet18": 128, "puzzle_resnet50": 256}
MODELS = [*IMAGE, "resnet110"]
EVERY = [(model, norm) for model in MODELS for norm in NORMS]
every = pytest.mark.parametrize(("model", "norm"), EVERY)


def config(model: str, norm: str) -> DictConfig:
    return copy.deepcopy(composed(model, norm))  # composing takes twenty times as long


@functools.cache
def composed(model: str, norm: str) -> DictConfig:
    overrides = [f"model={model}", *NARROW.get(model, []), f"norm={norm}"]
    if norm == "gn" and model not in ("net2c", "lenet"):  # their channels are multiples of 8, and of 4 in cnn11
        overrides.append(f"norm.num_groups={4 if model == 'cnn11' else 8}")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides)


def make(model: str, norm: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = build(config(model, norm).model, "model")(num_classes=10)
    assert isinstance(net, Net)
    return net


def stirred(model: str, norm: str) -> Net:
    """With every parameter off its start: Fixup begins with zeros, through which nothing flows back. Dropout is off."""
    net = make(model, norm)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if not (name.endswith("weight") and parameter.any()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    return net


def images(model: str, count: int = 4, seed: int = 0) -> Tensor:
    node = config(model, "none").model
    size = 28 if node._target_.startswith("models.cnn.") else 32
    return torch.randn(count, node.get("in_channels", 3), size, size, generator=torch.Generator().manual_seed(seed))


def test_folders_are_not_empty() -> None:
    assert {"net2c", "net5c"} <= set(MODELS) and {"none", "bn", "gn"} <= set(NORMS)


@every
def test_forward_and_backward(model: str, norm: str) -> None:
    net, x = stirred(model, norm), images(model)
    logits = net(x)
    assert logits.shape == (4, 10) and logits.dtype == torch.float32 and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@every
def test_logits_are_a_linear_layer_on_the_last_hidden_one(model: str, norm: str) -> None:
    net, x = make(model, norm).eval(), images(model)
    h = net.features(x)
    assert h.shape == (4, WIDTH.get(model, net.classifier.in_features))
    torch.testing.assert_close(net(x), h @ net.classifier.weight.T + net.classifier.bias)


@every
def test_taps_see_the_activations_in_order(model: str, norm: str) -> None:
    net, x = stirred(model, norm), images(model)
    before, activations = record(net, pre=True), record(net)
    order = [tap for tap in net.modules() if isinstance(tap, Tap)]
    seen: list[nn.Module] = []
    for tap in order:
        tap.register_forward_hook(lambda tap, _, out: seen.append(tap))
    net(x)
    assert seen == order and len(activations) == len(before) == len(order) / 2 >= 1
    shapes = [tuple(activation.shape) for activation in activations]
    assert shapes == [(4, *units) for units in TAPS.get(model, [shape[1:] for shape in shapes])]
    for one, after in zip(before, activations, strict=True):
        assert after.grad_fn is not None
        if norm != "none" or model not in ("resnet56", "resnet110"):  # there learned scalars come before the tap
            assert 0.05 < (one > 0).float().mean() < 0.95
            torch.testing.assert_close(after, nn.functional.elu(one) if model == "cnn11" else one.relu(), rtol=0, atol=0)
    first = [activation.detach().clone() for activation in activations]
    activations.clear()
    net(x)
    torch.testing.assert_close([activation.detach() for activation in activations], first, rtol=0, atol=0)


@every
def test_same_seed_same_net(model: str, norm: str) -> None:
    x = images(model)
    nets = make(model, norm), make(model, norm), make(model, norm, seed=1)
    for training in (True, False):
        outs = []
        for net in nets:
            net.train(training)
            torch.manual_seed(0)  # of dropout
            outs.append(net.features(x))
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert torch.equal(nets[0](x), nets[0](x))


@every
def test_samples_do_not_mix_in_evaluation(model: str, norm: str) -> None:
    net, x = stirred(model, norm).eval(), images(model)
    torch.testing.assert_close(net(x)[:2], net(x[:2]), rtol=1e-4, atol=1e-5)


@every
def test_bf16(model: str, norm: str) -> None:
    net, x = stirred(model, norm), images(model, 8)
    activations = record(net)
    with torch.autocast("cpu", torch.bfloat16):
        logits, again = net(x), net(x)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, again)
    assert [activation.shape[1:] for activation in activations[: len(activations) // 2]] == [torch.Size(units) for units in TAPS[model]]
    rounded = copy.deepcopy(net)
    for parameter in rounded.parameters():
        parameter.data = parameter.bfloat16().float()
    with torch.no_grad():
        exact, near = net(x), rounded(x.bfloat16().float())
    # what rounding does is the net's own, BN in 27 layers makes much of little: not much more than rounding the weights alone does
    assert 0 < (logits.float() - exact).norm() < 4 * (near - exact).norm() < 2 * exact.norm()
    nn.functional.cross_entropy(logits.float(), torch.arange(8)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("model", "norm", "count"),
    [
        *[("net2c", "none", 106_680), ("net2c", "bn", 106_680 + 2 * 170), ("net5c", "bn", 1_575_114), ("net5c", "gn", 1_575_114)],
        *[("vgg13", "bn", 9_416_010), ("resnet18", "bn", 11_173_962), ("mobilenet", "bn", 3_217_226)],
        *[("cnn11", "none", 1_641_938), ("cnn11", "bn", 1_641_938 + 2 * 2_544)],
        *[("resnet56", "none", 848_954 + 137), ("resnet110", "none", 1_719_866 + 272)],
        *[("resnet56", "bn", 848_954 + 2 * 2_032), ("resnet110", "bn", 1_719_866 + 2 * 4_048)],
    ],
)
def test_printed_sizes(model: str, norm: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in make(model, norm).parameters()) == count


def test_spatial_sizes_of_net5c() -> None:
    net, sizes = make("net5c", "bn"), [28]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            module.register_forward_hook(lambda module, _, out: sizes.append(out.shape[-1]))
    net(images("net5c"))
    assert sizes == [28, 26, 24, 24, 12, 10, 8, 1]


@pytest.mark.parametrize("model", ["net2c", "net5c"])
def test_norm_follows_the_activation(model: str) -> None:
    kinds = [type(module).__name__ for module in make(model, "bn").features.modules()]
    blocks = [kinds[i : i + 3] for i, kind in enumerate(kinds) if kind == "ReLU"]
    assert len(blocks) == len(TAPS[model]) and all(block == ["ReLU", "Tap", "BatchNorm"] for block in blocks)


@pytest.mark.parametrize("model", MODELS)
def test_channels_and_classes_are_options(model: str) -> None:
    node = config(model, "none").model
    channels, size = node.in_channels, images(model).shape[-1]
    node.in_channels = 4 - channels
    assert build(node, "model")(num_classes=7)(torch.randn(2, 4 - channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("model", ["resnet18", "mobilenet", "cnn11", "resnet56", *NARROW])
def test_global_pooling_takes_any_size(model: str) -> None:
    assert make(model, "bn")(torch.randn(2, 3, 64, 64)).shape == (2, 10) == make(model, "bn")(torch.randn(2, 3, 36, 36)).shape


def test_resnets_shortcuts() -> None:
    """1x1 convolutions where a stage begins with another width, else the input itself; blocks end in a ReLU of the sum."""
    blocks = [module for module in make("resnet18", "bn").modules() if isinstance(module, BasicBlock)]
    kinds = [type(block.shortcut).__name__ for block in blocks]
    assert kinds == ["Identity", "Identity", *["Sequential", "Identity"] * 3]
    for block in (blocks[1], blocks[2]):
        x = torch.randn(2, 64, 8, 8)
        torch.testing.assert_close(block(x), (block.residual(x) + block.shortcut(x)).relu())


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Our weights and statistics, in the order in which the modules list them, to torch's, which count batches besides."""
    values, state = list(ours.state_dict().values()), theirs.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    assert [value.shape for value in values] == [state[name].shape for name in names]
    theirs.load_state_dict(state | dict(zip(names, values, strict=True)))


def test_resnet18_is_torchvisions_but_for_the_stem() -> None:
    """The same weights give the same logits, once torchvision's net has this stem and no pooling after it."""
    theirs = importlib.import_module("torchvision.models").resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = make("resnet18", "bn")
    copied(ours, theirs)  # torchvision lists a block's projection last, as we do
    x = images("resnet18")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_vgg13_is_torchvisions_features() -> None:
    theirs = importlib.import_module("torchvision.models").vgg13_bn(num_classes=10).features
    ours = make("vgg13", "bn")
    copied(ours.features, theirs)
    x = images("vgg13")
    torch.testing.assert_close(ours.features(x), theirs(x).flatten(1), rtol=1e-5, atol=1e-5)


def test_tap_of_a_sequence_counts_steps_as_samples() -> None:
    net = nn.Sequential(Tap(sample_dims=2), nn.Linear(5, 3), Tap())
    activations = record(net)
    x = torch.randn(2, 4, 5)
    out = net(x)
    assert torch.equal(activations[0], x.reshape(8, 5)) and torch.equal(activations[1], out)
    net(x)
    assert len(activations) == 4  # clearing is the caller's business
