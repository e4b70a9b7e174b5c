"""The EM distance by a critic: its exact cases, its bounds, that it grows with a shift; and that measuring changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from nets import small
from test_trainer import buffers, data_home, same, train, trainer
from torch import Tensor, nn

from experiments.covariate_shift import CovariateShift, ascend, critic, distance
from experiments.figures.bounds import w1
from experiments.trainer import Trainer
from models.net import record

__all__ = ["data_home"]  # a fixture
torch.set_num_threads(1)
SHAPE = (4, 6, 6)
PROBE = ["probe=covariate_shift", "probe.layers=[1,3]", "probe.steps=3", "probe.batch=8", "probe.images=30"]
NAMES = ["layer1/em", "layer1/em_logit", "layer3/em", "layer3/em_logit", "shift/em", "shift/em_logit"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(count: int, shift: float = 0, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=rng(seed)) + shift


def chosen(steps: int, size: int, count: int) -> Tensor:
    return torch.randint(count, (steps, size), generator=rng(1))


def estimate(old: Tensor, new: Tensor, steps: int = 60, size: int = 32, seed: int = 0) -> tuple[nn.Sequential, float, float]:
    """A critic trained on the first half, and the distance that it sees in the second; with ten times the usual rate, for fewer steps."""
    net, half = critic(SHAPE, rng(seed)), len(old) // 2
    ascend(net, old[:half], new[:half], chosen(steps, size, half), clip=0.01, lr=5e-4)
    return net, *distance(net, old[half:], new[half:])


def test_the_critic_is_the_paper_s() -> None:
    """Four 3x3 convolutions of 64, 64, 128, 128 maps with strides 2, 1, 2, 1, each with ReLU; one unit on the flattened map."""
    net = critic((64, 8, 8), rng())
    assert [type(layer).__name__ for layer in net] == ["Conv2d", "ReLU"] * 4 + ["Flatten", "Linear"]
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [(one.out_channels, one.kernel_size, one.stride[0]) for one in convolutions] == [
        *[(64, (3, 3), 2), (64, (3, 3), 1), (128, (3, 3), 2), (128, (3, 3), 1)]
    ]
    assert sum(p.numel() for p in net.parameters()) == 2 * (64 * 64 * 9 + 64) + 64 * 128 * 9 + 128 + 128 * 128 * 9 + 128 + 128 * 4 + 1
    assert convolutions[1].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    for size in ((3, 7, 5), (100, 1, 1)):  # odd maps, and a layer without pixels
        assert critic(size, rng())(torch.randn(2, *size)).shape == (2, 1)


def test_the_same_seed_gives_the_same_critic_and_estimate() -> None:
    old, new = features(80), features(80, 0.1, seed=3)
    one, other, third = (estimate(old, new, steps=5, seed=seed) for seed in (0, 0, 1))
    assert one[1:] == other[1:] and one[1:] != third[1:]
    assert all(torch.equal(*pair) for pair in zip(one[0].parameters(), other[0].parameters(), strict=True))


def test_equal_networks_are_exactly_0_apart() -> None:
    """Not only d: the critic gets no gradient, so that nothing moves but what the clipping moves."""
    x = features(80)
    net, d, logit = estimate(x, x.clone(), steps=5)
    assert d == logit == 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    start = critic(SHAPE, rng())
    for ours, first in zip(net.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, first.clamp(-0.01, 0.01))


def test_every_parameter_is_clipped_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and biases; they do reach the box."""
    old, new = features(80), features(80, 0.5)
    net = critic(SHAPE, rng())
    seen: list[float] = []
    net.register_forward_pre_hook(lambda net, _: seen.append(max(float(p.detach().abs().max()) for p in net.parameters())))
    ascend(net, old, new, chosen(60, 8, 80), clip=0.01, lr=2e-4)
    assert seen[0] > 0.1  # He's start is not clipped before the first step
    assert max(seen[2:]) <= 0.01 * (1 + 1e-6) and all(float(p.detach().abs().max()) <= 0.01 * (1 + 1e-6) for p in net.parameters())
    biases = [layer.bias for layer in net if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert any(float(bias.detach().abs().max()) > 0.009 for bias in biases if bias is not None)


def test_it_ascends() -> None:
    """Above 0 in both directions: f and 1 - f are both critics."""
    old, new = features(200), features(200, 0.3, seed=3)
    (_, there, _), (_, back, _) = estimate(old, new), estimate(new, old)
    assert there > 0.005 and back > 0.005


def test_it_grows_with_a_shift() -> None:
    """Of samples that are drawn apart; d has a ceiling at 1, what comes before the sigmoid has none."""
    found = [estimate(features(300), features(300, shift, seed=3)) for shift in (0, 0.1, 0.3, 1)]
    distances, logits = ([one[place] for one in found] for place in (1, 2))
    assert abs(distances[0]) < 0.3 * distances[1]
    assert distances[0] < distances[1] < distances[2] < distances[3] < 1
    assert logits[1] < logits[2] < logits[3] and logits[3] > 2


def test_it_is_below_what_w1_allows() -> None:
    """|E f(new) - E f(old)| <= K W1 between the samples, with K <= |w_fc| / 4 * the product of s_i |W_i|_F, s = 3 or 2 by stride."""
    old, new = features(60), features(60, 0.4, seed=3)
    net = critic(SHAPE, rng())
    ascend(net, old, new, chosen(60, 32, 60), clip=0.01, lr=5e-4)
    lipschitz = 0.25
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            overlap = 1 if isinstance(layer, nn.Linear) else {1: 3, 2: 2}[layer.stride[0]]
            lipschitz *= overlap * float(layer.weight.detach().norm())
    d, _ = distance(net, old, new)
    assert 0 < d <= lipschitz * float(w1(old.flatten(1).double(), new.flatten(1).double()))
    x, y = features(500, seed=5), features(500, seed=6)
    slopes = (torch.sigmoid(net(x)) - torch.sigmoid(net(y))).abs().flatten() / (x - y).flatten(1).norm(dim=1)
    assert float(slopes.max().detach()) < lipschitz


def test_distance_is_the_mean_over_all_samples() -> None:
    net, old, new = critic(SHAPE, rng()), features(25), features(25, 0.2)
    with torch.no_grad():
        wanted = (net(new).sigmoid() - net(old).sigmoid()).mean().item(), (net(new) - net(old)).mean().item()
    for size in (7, 1000):
        assert distance(net, old, new, size) == pytest.approx(wanted, rel=1e-4)


# In a run


def probe(made: Trainer) -> CovariateShift:
    assert isinstance(made.probe, CovariateShift)
    return made.probe


def test_measuring_changes_nothing() -> None:
    """Neither the weights nor the running statistics nor any random number of the training, torch's own ones for dropout among them,
    with a method that draws some."""
    words = [*small("cnn11"), "method=per", "norm=bn"]
    plain = train(*words)
    before = plain.state()
    measured = train(*words, *PROBE, "probe.layers=[1,10]")
    after = measured.state()
    assert before["rngs"] and same({**before, "seconds": 0, "rows": 0}, {**after, "seconds": 0, "rows": 0}) and buffers(plain)
    rows = [{name: value for name, value in row.items() if not name.startswith(("layer", "shift"))} for row in measured.rows]
    assert same(plain.rows, rows) and measured.net.training


def test_means_are_over_the_layers() -> None:
    made = train(*PROBE, "probe.steps=40")
    for row in made.rows:
        assert [name for name in row if name.startswith(("layer", "shift"))] == NAMES
        for name in ("em", "em_logit"):
            assert row[f"shift/{name}"] == pytest.approx((row[f"layer1/{name}"] + row[f"layer3/{name}"]) / 2)
        assert all(-1 < row[f"layer{layer}/em"] < 1 for layer in (1, 3)) and row["shift/em_logit"] != 0


def test_old_is_the_network_as_the_epoch_began_with_its_statistics(tmp_path: Path) -> None:
    """Also in a run that goes on from its checkpoint: the same distances."""
    whole = train(*PROBE)
    half = train(*PROBE, epochs=1)
    torch.save(half.state(), tmp_path / "state")
    again = trainer(*PROBE)
    again.load(torch.load(tmp_path / "state", weights_only=True))
    again.train_epoch()
    assert same(whole.rows, again.rows)
    assert same(probe(again).old, dict(half.state()["net"])) and any("running" in name for name in probe(again).old)


def test_a_network_that_stands_still_does_not_shift() -> None:
    made = train(*PROBE, epochs=1)
    probe(made).begin(made)
    assert set(probe(made).end(made).values()) == {0.0}


@pytest.mark.parametrize("layers", [[], [2]])
def test_outputs_are_those_before_the_non_linearity(layers: list[int]) -> None:
    """Of the first training images, without augmentation, and of all test images; null means the last six layers, here all."""
    made = trainer("norm=bn", "batch_size=20")
    made.preactivations = record(made.net, pre=True)
    found = CovariateShift(layers or None, images=30).outputs(made)
    inputs: list[Tensor] = []
    for module in made.net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    x = made.bundle.prepare(made.bundle.splits["train"][0][:30])
    with torch.no_grad():
        made.net.eval()(x)
    assert sorted(found) == (layers or [1, 2, 3])
    for layer, (old, test) in found.items():
        wanted = inputs[layer - 1]
        assert old.shape[:2] == wanted.shape[:2] and old.dim() == 4 and len(test) == 60
        torch.testing.assert_close(old.flatten(1), wanted.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe.layers=[4]"], r"^layers: 4 is not allowed; the network has layers 1 to 3$"),
        (["probe.steps=0"], r"^probe: steps: 0 is not allowed; it must be above 0$"),
        (["probe.clip=-1"], r"^probe: clip: -1 is not allowed; it must be above 0$"),
        (["probe.images=0"], r"^probe: images: 0 is not allowed; it must be above 0$"),
    ],
)
def test_refused_options(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(*PROBE, *words, epochs=1)


def test_texts_are_refused() -> None:
    words = ["dataset=docs", "model=lstm", "balanced=false", "norm=none", "model.width=8", "profile.train=600", "profile.test=600"]
    with pytest.raises(ValueError, match=r"^probe: covariate_shift looks at images, and the data set has words$"):
        train(*PROBE, *words, epochs=1)
