"""Probes: the EM distance by a critic, with its exact cases and bounds; activations, by NumPy and SciPy. Measuring changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nets import small
from scipy import stats
from torch import Tensor, nn
from trainers import data_home, parameters, same, train, trainer

from experiments.covariate_shift import CovariateShift, ascend, critic, distance
from experiments.figures.bounds import w1
from models.net import record

__all__ = ["data_home"]  # a fixture
torch.set_num_threads(1)
SHAPE = (4, 6, 6)
CLIP = 0.01 * (1 + 1e-6)
PROBE = ["probe=covariate_shift", "probe.layers=[1,3]", "probe.steps=3", "probe.batch=8", "probe.images=30"]
ACTIVATIONS = ["probe=activations", "probe.layers=[1,3]", "probe.images=40", "probe.slices=8", "norm=none"]
NAMES = ["layer1/em", "layer1/em_logit", "layer3/em", "layer3/em_logit", "shift/em", "shift/em_logit"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(count: int, shift: float = 0, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=rng(seed)) + shift


def trained(old: Tensor, new: Tensor, steps: int = 60) -> nn.Sequential:
    """A critic, with ten times the usual rate, for fewer steps."""
    net = critic(SHAPE, rng())
    ascend(net, old, new, torch.randint(len(old), (steps, 32), generator=rng(1)), clip=0.01, lr=5e-4)
    return net


def estimate(old: Tensor, new: Tensor) -> tuple[float, float]:
    """The distance that a critic trained on the first halves sees in the second halves."""
    half = len(old) // 2
    return distance(trained(old[:half], new[:half]), old[half:], new[half:])


def test_the_critic_is_the_paper_s() -> None:
    """3x3 convolutions with ReLU, by He's initial weights; one unit on the flattened map."""
    net = critic((64, 8, 8), rng())
    assert [type(layer).__name__ for layer in net] == ["Conv2d", "ReLU"] * 4 + ["Flatten", "Linear"]
    convolutions = [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in net if isinstance(layer, nn.Conv2d)]
    assert convolutions == [(64, 3, 2), (64, 3, 1), (128, 3, 2), (128, 3, 1)]
    assert net[2].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    for size in ((3, 7, 5), (100, 1, 1)):  # odd maps, and a layer without pixels
        assert critic(size, rng())(torch.randn(2, *size)).shape == (2, 1)


def test_equal_networks_are_exactly_0_apart() -> None:
    """Not only d: the critic gets no gradient, so that nothing moves but what the clipping moves."""
    x = features(80)
    net = trained(x, x.clone(), steps=5)
    assert distance(net, x, x.clone()) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    for ours, first in zip(net.parameters(), critic(SHAPE, rng()).parameters(), strict=True):
        assert torch.equal(ours, first.clamp(-0.01, 0.01))


def test_each_parameter_is_clipped_after_each_step() -> None:
    net, seen = critic(SHAPE, rng()), []
    net.register_forward_pre_hook(lambda net, _: seen.append([float(p.detach().abs().max()) for p in net.parameters()]))
    ascend(net, features(80), features(80, 0.5), torch.randint(80, (60, 8), generator=rng(1)), clip=0.01, lr=2e-4)
    net(features(1))
    assert max(seen[0]) > 0.1  # He's start is not clipped before the first step
    assert all(max(values) <= CLIP for values in seen[2:]) and max(seen[-1][1::2]) > 0.009  # biases too


def test_it_grows_with_a_shift_in_both_directions() -> None:
    """Of samples that are drawn apart; d has a ceiling at 1, what comes before the sigmoid has none."""
    distances, logits = zip(*(estimate(features(300), features(300, shift, seed=3)) for shift in (0, 0.1, 0.3, 1)), strict=True)
    assert abs(distances[0]) < 0.3 * distances[1]
    assert distances[0] < distances[1] < distances[2] < distances[3] < 1
    assert logits[1] < logits[2] < logits[3] and logits[3] > 2
    assert estimate(features(200, 0.3, seed=3), features(200))[0] > 0.005  # f and 1 - f are both critics


def test_it_is_below_what_w1_allows() -> None:
    """|E f(new) - E f(old)| <= K W1 between the samples, with K <= |w_fc| / 4 * the product of s_i |W_i|_F, s = 3 or 2 by stride."""
    old, new = features(60), features(60, 0.4, seed=3)
    net, lipschitz = trained(old, new), 0.25
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            overlap = 1 if isinstance(layer, nn.Linear) else {1: 3, 2: 2}[layer.stride[0]]
            lipschitz *= overlap * float(layer.weight.detach().norm())
    d, _ = distance(net, old, new)
    assert 0 < d <= lipschitz * float(w1(old.flatten(1).double(), new.flatten(1).double()))
    with torch.no_grad():
        wanted = (net(new).sigmoid() - net(old).sigmoid()).mean().item(), (net(new) - net(old)).mean().item()
    for size in (7, 1000):
        assert distance(net, old, new, size) == pytest.approx(wanted, rel=1e-4)


# The EM distance in a run


@pytest.mark.slow
def test_measuring_changes_nothing() -> None:
    """Neither weights, nor running statistics, nor random numbers of the training: of dropout, and of a method that draws some."""
    words = [*small("cnn11"), "method=per", "norm=bn"]
    plain, measured = train(*words), train(*words, *PROBE, "probe.layers=[1,10]")
    before, after = ({**made.state(), "seconds": 0, "rows": 0} for made in (plain, measured))
    assert before["rngs"] and same(before, after) and measured.net.training
    rows = [{name: value for name, value in row.items() if not name.startswith(("layer", "shift"))} for row in measured.rows]
    assert same(plain.rows, rows)


def test_rows_hold_the_distances_of_each_layer_and_their_means_after_a_resume_too() -> None:
    """Old is the network as the epoch began, with its running statistics."""
    whole, half, again = train(*PROBE), train(*PROBE, epochs=1), trainer(*PROBE)
    for row in whole.rows:
        assert [name for name in row if name.startswith(("layer", "shift"))] == NAMES
        for name in ("em", "em_logit"):
            assert row[f"shift/{name}"] == pytest.approx((row[f"layer1/{name}"] + row[f"layer3/{name}"]) / 2)
        assert row["shift/em_logit"] != 0
    again.load(half.state())
    again.train_epoch()
    assert same(whole.rows, again.rows) and same(again.probe.old, dict(half.state()["net"]))
    assert any("running" in name for name in again.probe.old)
    again.probe.begin(again)
    assert set(again.probe.end(again).values()) == {0.0}  # a network that stands still does not shift


@pytest.mark.parametrize("layers", [[], [2]])
def test_outputs_are_those_before_the_non_linearity(layers: list[int]) -> None:
    """Of the first training images, without augmentation, and of all test images; null means the last six layers, here all."""
    made = trainer("norm=bn", "batch_size=20")
    made.preactivations = record(made.net, pre=True)
    outputs = CovariateShift(layers or None, images=30).outputs(made)
    inputs: list[Tensor] = []
    for module in made.net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: inputs.append(args[0].detach()))
    made.net.eval()(made.bundle.prepare(made.bundle.splits["train"][0][:30]))
    assert sorted(outputs) == (layers or [1, 2, 3])
    for layer, (old, test) in outputs.items():
        assert old.shape[:2] == inputs[layer - 1].shape[:2] and old.dim() == 4 and len(test) == 60
        torch.testing.assert_close(old.flatten(1), inputs[layer - 1].flatten(1), rtol=1e-5, atol=1e-5)


# Activations

QUANTITIES = [f"{pre}{name}" for pre in ("", "pre_") for name in ("q25", "q50", "q75", "mean", "var")] + ["rms", "sw1", "sw1_sampled"]


def test_activations_give_rows_at_the_start_and_after_each_epoch_and_nothing_else_changes() -> None:
    plain, made = train("norm=none", "method=per"), train(*ACTIVATIONS, "method=per")
    assert [(row["step"], row["epoch"]) for row in made.rows] == [(0, 0), (5, 1), (10, 2)]
    for row in made.rows:
        assert [name for name in row if name.startswith("layer")] == [f"layer{layer}/{name}" for layer in (1, 3) for name in QUANTITIES]
    assert "test/ce" not in made.rows[0] and "test/ce" in made.rows[1]
    rows = [{name: value for name, value in row.items() if not name.startswith("layer")} for row in made.rows[1:]]
    assert same(parameters(plain), parameters(made)) and same(plain.rows, rows)
    other = train(*ACTIVATIONS, "seed=2", epochs=1)
    assert same(made.probe.directions, other.probe.directions) and made.rows[0]["layer1/mean"] != other.rows[0]["layer1/mean"]


@pytest.mark.parametrize("size", [7, 1000])
def test_activations_by_hand(size: int) -> None:
    made = train(*ACTIVATIONS, f"evaluate.batch_size={size}", epochs=1)
    x = made.bundle.prepare(made.bundle.splits["train"][0][:40])
    parts, row = [], made.rows[-1]
    for module in made.net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: parts.append(args[0].detach().double().flatten(1).numpy()))
    made.net.eval()(x)
    quantiles = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    for layer in (1, 3):
        z = parts[layer - 1]
        h = z.clip(0)
        (unit,) = (i for i in range(h.shape[1]) if np.isclose(h[:, i].mean(), row[f"layer{layer}/mean"], rtol=1e-4, atol=1e-9)
                   and np.isclose(z[:, i].mean(), row[f"layer{layer}/pre_mean"], rtol=1e-4))  # fmt: skip
        for pre, values in (("", h[:, unit]), ("pre_", z[:, unit])):
            wanted = [*np.quantile(values, (0.25, 0.5, 0.75)), values.var(ddof=1)]
            assert [row[f"layer{layer}/{pre}{name}"] for name in ("q25", "q50", "q75", "var")] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        assert row[f"layer{layer}/rms"] == pytest.approx(np.sqrt((h**2).mean()), rel=1e-4)
        theta = made.probe.directions[layer, h.shape[1]].double().numpy()  # type: ignore[union-attr]
        assert theta.shape == (8, h.shape[1]) and np.allclose((theta**2).sum(1), 1, atol=1e-6)
        distances = [stats.wasserstein_distance(line, quantiles) for line in theta @ h.T]
        assert row[f"layer{layer}/sw1"] == pytest.approx(np.mean(distances), rel=1e-3)
        assert row[f"layer{layer}/sw1_sampled"] == pytest.approx(np.mean(distances), abs=3 * 1.8 / 40**0.5 / 8**0.5)


def test_probes_refuse() -> None:
    for words, message in [
        ([*PROBE, "probe.layers=[4]"], r"^layers: 4 is not allowed; the network has layers 1 to 3$"),
        ([*PROBE, "probe.images=0"], r"^probe: images: 0 is not allowed; it must be above 0$"),
        ([*PROBE, *small("lstm")], r"^probe: covariate_shift looks at images, and the data set has words$"),
        ([*ACTIVATIONS, "probe.layers=[4]"], r"^probe.layers: 4 is not allowed; the network has layers 1 to 3$"),
        ([*ACTIVATIONS, "probe.images=1"], r"^probe: images: 1, slices: 8 are not allowed; at least 2 images and 1 slice$"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(*words, epochs=1)
