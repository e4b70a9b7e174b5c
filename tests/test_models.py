"""Models: shapes, taps, gradients and printed sizes of each architecture that conf/ offers."""

from __future__ import annotations

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

torch.set_num_threads(1)
# How many taps, and their units for one image, as nets.NARROW makes the models: where the papers look at activations.
TAPS = {
    "net2c": (3, 14_820),
    "net5c": (5, 190_592),
    "vgg13": (10, 249_856),
    "resnet18": (17, 557_056),
    "mobilenet": (27, 411_648),
    "cnn11": (10, 350_460),
    "resnet56": (55, 532_480),
    "resnet110": (109, 1_048_576),
    "preact_resnet20": (20, 204_800),
    "preact_resnet18": (17, 153_600),
    "wrn28_10": (13, 131_072),
    "resnet50": (49, 367_616),
    "puzzle_resnet18": (16, 137_216),
    "puzzle_resnet50": (48, 363_520),
    "lenet": (4, 6_508),
    "densenet121": (26, 230_912),
}
MODELS = [*IMAGE, "resnet110"]
# Each model as its paper has it, and with another norm in the slow part; one model with all of them.
BARE = ("net2c", "lenet", "cnn11", "resnet56", "resnet110")
CASES = [(model, "none" if model in BARE else "bn") for model in MODELS]
CASES += [("resnet56", "bn"), *[("preact_resnet20", norm) for norm in NORMS if norm != "bn"]]
SLOW = [(model, ("gn", "unitization")[place % 2]) for place, model in enumerate(MODELS) if model != "preact_resnet20"]


@functools.cache
def config(model: str, norm: str) -> DictConfig:
    overrides = [f"model={model}", *NARROW.get(model, []), f"norm={norm}"]
    if norm == "gn" and model not in ("net2c", "lenet"):  # their channels are multiples of 8, and of 4 in cnn11
        overrides.append(f"norm.num_groups={4 if model == 'cnn11' else 8}")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides)


def make(model: str, norm: str, classes: int = 10, **options: object) -> Net:
    torch.manual_seed(0)
    return build(config(model, norm).model, "model")(num_classes=classes, **options)


def stirred(model: str, norm: str) -> Net:
    """With every parameter off its start: Fixup begins with zeros, through which nothing flows back. Dropout is off."""
    net, rng = make(model, norm), torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if not (name.endswith("weight") and parameter.any()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    return net


def images(model: str) -> Tensor:
    node = config(model, "none").model
    size = 28 if node._target_.startswith("models.cnn.") else 32
    return torch.randn(4, node.get("in_channels", 3), size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("model", "norm"), [*CASES, *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]])
def test_taps_logits_and_gradients(model: str, norm: str) -> None:
    net, x = stirred(model, norm), images(model)
    before, after = record(net, pre=True), record(net)
    order = [tap for tap in net.modules() if isinstance(tap, Tap)]
    seen: list[nn.Module] = []
    for tap in order:
        tap.register_forward_hook(lambda tap, _, out: seen.append(tap))
    logits = net(x)
    assert seen == order and len(after) == len(before) == len(order) / 2
    assert (len(after), sum(one[0].numel() for one in after)) == TAPS[model]
    for one, other in zip(before, after, strict=True):
        if norm != "none" or model not in ("resnet56", "resnet110"):  # there learned scalars come before the tap
            assert 0.05 < (one > 0).float().mean() < 0.95
            torch.testing.assert_close(other, nn.functional.elu(one) if model == "cnn11" else one.relu(), rtol=0, atol=0)

    assert logits.shape == (4, 10) and logits.dtype == torch.float32 and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name

    with torch.no_grad():
        h = net.eval().features(x)
        assert h.shape == (4, net.classifier.in_features)
        logits = net(x)
        torch.testing.assert_close(logits, h @ net.classifier.weight.T + net.classifier.bias)
        torch.testing.assert_close(logits[:2], net(x[:2]), rtol=1e-4, atol=1e-5)  # samples do not mix


def test_printed_sizes() -> None:
    for (model, norm, classes), count in {
        **{("net2c", "none", 10): 106_680, ("net5c", "gn", 10): 1_575_114, ("cnn11", "none", 10): 1_641_938},
        **{("vgg13", "bn", 10): 9_416_010, ("resnet18", "bn", 10): 11_173_962, ("mobilenet", "bn", 10): 3_217_226},
        **{("resnet56", "bn", 10): 848_954 + 2 * 2_032, ("resnet110", "none", 10): 1_719_866 + 272},
        **{("preact_resnet110", "bn", 100): 1_740_548, ("preact_resnet110", "unitization", 10): 1_738_762},
    }.items():
        with torch.device("meta"):  # nothing is drawn
            assert sum(parameter.numel() for parameter in make(model, norm, classes=classes).parameters()) == count, (model, norm)


def test_channels_classes_and_image_sizes() -> None:
    for model in MODELS:
        channels, size = 4 - config(model, "none").model.in_channels, images(model).shape[-1]
        sizes = (size,) if model in ("net2c", "net5c", "vgg13", "lenet") else (size, 36, 64)  # the others pool over the whole map
        with torch.device("meta"):
            net = make(model, "none", classes=7, in_channels=channels)
            assert {net(torch.randn(2, channels, side, side)).shape for side in sizes} == {(2, 7)}, model


def test_norm_follows_the_activation() -> None:
    for model in ("net2c", "net5c"):
        kinds = [type(module).__name__ for module in make(model, "bn").features.modules()]
        assert kinds.count("ReLU") == TAPS[model][0]
        assert all(kinds[i : i + 3] == ["ReLU", "Tap", "BatchNorm"] for i, kind in enumerate(kinds) if kind == "ReLU")


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Our weights and statistics, in the order in which the modules list them, to torch's, which count batches besides."""
    values, state = list(ours.state_dict().values()), theirs.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    assert [value.shape for value in values] == [state[name].shape for name in names]
    theirs.load_state_dict(state | dict(zip(names, values, strict=True)))


def test_resnet18_and_vgg13_are_torchvisions() -> None:
    """The same weights give the same logits, once torchvision's ResNet has this stem and no pooling after it; of VGG the features."""
    models = importlib.import_module("torchvision.models")
    theirs, ours, x = models.resnet18(num_classes=10), make("resnet18", "bn"), images("resnet18")
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    copied(ours, theirs)  # torchvision lists a block's projection last, as we do
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs, ours = models.vgg13_bn(num_classes=10).features, make("vgg13", "bn")
    copied(ours.features, theirs)
    torch.testing.assert_close(ours.features(x), theirs(x).flatten(1), rtol=1e-5, atol=1e-5)
