"""LaMix: its targets and their bounds, what trains the extra layer, the alternation, and why it needs the sigmoid and the gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import small
from test_mixing import at, batch, method, net
from test_regularizers import made
from test_trainer import data_home, same, train, trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.bundle import Batch
from experiments.config import ConfigError
from experiments.provenance import facts
from models.net import Net
from regularizers import lamix
from regularizers.base import Pass
from regularizers.lamix import LaMix
from regularizers.mixing import soft

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
CLEAN, MIXED = 0, 1


def ready(classes: int = 10, units: int = 7, scale: float = 1.0, **options: Any) -> LaMix:
    """A method with its layer, whose weights are `scale` times their start."""
    one = method("lamix", **options)
    h, logits = torch.zeros(2, units), torch.zeros(2, classes)
    one.setup(Pass(batch(2, classes), h, logits, ()))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter *= scale
    return one


def passed(given: Batch, classes: int, units: int = 7, seed: int = 0) -> Pass:
    rng = torch.Generator().manual_seed(seed)
    h, logits = (torch.randn(len(given.x), size, generator=rng) for size in (units, classes))
    return Pass(given, h.requires_grad_(), logits.requires_grad_(), ())


# the two labels


@pytest.mark.parametrize("classes", [10, 100, 200])
@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_the_global_label_is_bounded(classes: int, scale: float) -> None:
    """P-L1: in [1 / (1 + (K - 1) e), e / (e + K - 1)], and any m entries have at most m e / (m e + K - m), for any input."""
    one, h = ready(classes, scale=scale), 10 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    p = one.soft_label(h)
    assert p.shape == (50, classes) and (p.sum(1) - 1).abs().max() < 1e-5
    assert p.min() >= 1 / (1 + (classes - 1) * math.e) - 1e-7 and p.max() <= math.e / (math.e + classes - 1) + 1e-7
    sums = p.sort(1, descending=True).values.cumsum(1)
    m = torch.arange(1, classes + 1)
    assert (sums <= m * math.e / (m * math.e + classes - m) + 1e-5).all()
    if scale == 1000:  # and the bounds are reached
        assert p.min() < 1.8 / (1 + (classes - 1) * math.e) and sums[:, classes // 2].max() > 0.6


def test_the_target_is_that_of_the_formula() -> None:
    """Eqs. 2, 9, 10, by loops."""
    one, given = ready(beta=0.3), batch(6, 10)
    state = one.rng.get_state()
    mixed = at(MIXED, one).transform(given, net(10))
    one.rng.set_state(state)
    lam = torch.empty(()).uniform_(generator=one.rng)
    partner = torch.rand(6, generator=one.rng).argsort()
    out = passed(mixed, 10)
    target = one.retarget(out)
    for i, j in enumerate(partner.tolist()):
        torch.testing.assert_close(mixed.x[i], 0.5 * given.x[i] + 0.5 * given.x[j])
        u = [sum(one.head.weight[k, a] * out.features[i, a] for a in range(7)) + one.head.bias[k] for k in range(10)]
        e = [math.exp(1 / (1 + math.exp(-value.item()))) for value in u]
        for k in range(10):
            local = lam * (given.y[i] == k) + (1 - lam) * (given.y[j] == k)
            assert target[i, k].item() == pytest.approx(float(0.3 * local) + 0.7 * e[k] / sum(e), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"local_label": "half"}, {"global_label": "uniform"}, {"schedule": "mixed_only"}], ids=str)
def test_targets_are_distributions_above_their_local_part(options: dict[str, str]) -> None:
    """P-L2."""
    one, given = ready(scale=30, **options), batch(20, 10)
    for step in range(4):
        mixed = at(step, one).transform(given, net(10))
        target = one.retarget(passed(mixed, 10))
        assert (target.sum(1) - 1).abs().max() < 1e-6 and (target >= 0.5 * mixed.target).all()
        if not step % 2 and options.get("schedule") != "mixed_only":
            true = target.gather(1, given.y[:, None])
            assert torch.equal(mixed.target, soft(given.y, 10)) and true.min() >= 0.5196 and true.max() <= 0.6160 + 1e-4


def test_the_average_does_not_know_the_order_or_the_ratio() -> None:
    """P-L3: the pair's other image has the same mixed image, hence the same p, and the ratio the other way round."""
    one, given = ready(), batch(2, 10)
    given = replace(given, y=torch.tensor([3, 8]), target=torch.tensor([3, 8]))
    swap = torch.tensor([1, 0])
    for seed in range(6):
        one.rng.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lamix, "pairing", lambda count, rng, device: swap)
            mixed = at(MIXED, one).transform(given, net(10))
        assert torch.equal(mixed.x[0], mixed.x[1])
        assert mixed.target[0, 3] == pytest.approx(1 - mixed.target[1, 3].item()) and torch.equal(mixed.x[0], 0.5 * given.x.sum(0))
        assert mixed.target[0, 3].item() not in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_in_expectation_the_local_labels_are_the_same(detached: bool, loss: str) -> None:
    """P-L4: loss and gradient, averaged over a symmetric grid of ratios, are those of the half label."""
    one, given = ready(detach_global=detached), batch(6, 10)
    partner = torch.tensor([3, 1, 0, 5, 2, 4])
    first, other = soft(given.y, 10), soft(given.y[partner], 10)

    def result(lam: float) -> list[Tensor]:
        out = passed(given, 10)
        one.zero_grad()
        target = one.joined(lam * first + (1 - lam) * other, out.features)
        if loss == "ce":
            value = cross_entropy(out.logits, target)
        else:
            q = out.logits.softmax(1)
            value = -(target * q.log() + (1 - target) * (1 - q).log()).mean()
        value.backward()
        return [value.detach(), out.logits.grad, *(p.grad.clone() for p in one.parameters() if p.grad is not None)]

    grid = [k / 10 for k in range(11)]
    means = [torch.stack(values).mean(0) for values in zip(*map(result, grid), strict=True)]
    half = result(0.5)
    assert len(means) == (2 if detached else 4)
    for mean, value in zip(means, half, strict=True):
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)
    assert (result(0.2)[0] - half[0]).abs() > 1e-3


# what trains the extra layer


def test_the_gradient_is_the_printed_one() -> None:
    """P-L5: dE / du_k = (1 - beta) s_k (1 - s_k) p_k (-log yhat_k + sum_j p_j log yhat_j), u = W_t h, over the samples' mean."""
    one, given = ready(beta=0.3), batch(6, 10)
    out = passed(at(MIXED, one).transform(given, net(10)), 10)
    cross_entropy(out.logits, one.retarget(out)).backward()
    h, log = out.features.detach().double(), out.logits.detach().double().log_softmax(1)
    u = h @ one.head.weight.detach().double().T + one.head.bias.detach().double()
    s = 1 / (1 + torch.exp(-u))
    p = s.exp() / s.exp().sum(1, keepdim=True)
    du = 0.7 * s * (1 - s) * p * (-log + (p * log).sum(1, keepdim=True)) / 6
    torch.testing.assert_close(one.head.weight.grad.double(), du.T @ h, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one.head.bias.grad.double(), du.sum(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(out.features.grad.double(), du @ one.head.weight.detach().double(), rtol=1e-4, atol=1e-7)
    assert one.head.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"detach_global": True}, {"beta": 1}, {"global_label": "none"}, {"global_label": "uniform"}], ids=str)
def test_without_the_attached_label_the_target_is_a_constant(options: dict[str, Any]) -> None:
    """P-L5: nothing reaches W_t, and the network's gradient is that of the cross-entropy with a constant target."""
    one, given = ready(**options), batch(6, 10)
    assert (one.head is None) == ("detach_global" not in options)
    out = passed(at(MIXED, one).transform(given, net(10)), 10)
    target = one.retarget(out)
    cross_entropy(out.logits, target).backward()
    assert out.features.grad is None and all(parameter.grad is None for parameter in one.parameters())
    again = out.logits.detach().requires_grad_()
    cross_entropy(again, target.detach()).backward()
    assert torch.equal(out.logits.grad, again.grad)
    if options.get("global_label") == "uniform":
        torch.testing.assert_close(target, 0.5 * out.batch.target + 0.05)


@pytest.mark.parametrize(("classes", "least", "on"), [(10, 1.5098, 1), (100, 2.8892, 28), (200, 3.2555, 60)])
def test_the_loss_has_a_floor(classes: int, least: float, on: int) -> None:
    """P-L6: no network gets a clean batch below it; it is reached with `on` entries of p at their largest, and the prediction equal to
    the target."""
    one = ready(classes, units=classes)
    given = replace(batch(4, classes), y=torch.arange(4) % classes, target=torch.arange(4) % classes)
    for scale in (0, 1, 10):
        out = passed(at(CLEAN, one).transform(given, net(classes)), classes, units=classes)
        out = replace(out, logits=scale * out.logits)
        target = one.retarget(out)
        loss, entropy = cross_entropy(out.logits, target), torch.special.entr(target).sum(1).mean()
        assert loss >= entropy - 1e-5 and loss > least
    h = torch.zeros(4, classes)
    for i in range(4):  # its own class and `on` - 1 others
        h[i, [(i + k) % classes for k in range(on)]] = 1
    h /= on  # sigmoids of 200 / on - 100 and of -100
    with torch.no_grad():
        one.head.weight.copy_(400 * on * torch.eye(classes))
        one.head.bias.fill_(-200)
    out = replace(passed(at(CLEAN, one).transform(given, net(classes)), classes), features=h)
    target = one.retarget(out).detach()
    assert cross_entropy(target.log(), target).item() == pytest.approx(least, abs=2e-4)


# the alternation


def test_a_clean_batch_is_a_mixed_one_with_itself() -> None:
    """P-L7, bit for bit."""
    given = batch(6, 10)
    clean = at(CLEAN, ready()).transform(given, net(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamix, "pairing", lambda count, rng, device: torch.arange(count))
        mixed = at(MIXED, ready()).transform(given, net(10))
    assert torch.equal(clean.x, given.x) and torch.equal(mixed.x, given.x)
    assert torch.equal(clean.target, soft(given.y, 10)) and torch.equal(mixed.target, clean.target)


def test_without_global_label_and_ratio_it_is_mixup_at_a_half() -> None:
    """P-L8."""
    given, partner = batch(6, 10), torch.tensor([3, 1, 0, 5, 2, 4])
    one = ready(beta=1, local_label="half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamix, "pairing", lambda count, rng, device: partner)
        ours = at(MIXED, one).transform(given, net(10))
    theirs = method("mixup").mix(replace(given, target=soft(given.y, 10)), partner, torch.tensor(0.5))
    target = one.retarget(passed(ours, 10))
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-6, atol=1e-7)
    assert torch.equal(target, theirs.target)


def kinds(*overrides: str, epochs: int = 3) -> tuple[list[bool], Any]:
    """Of each step, whether it was mixed."""
    run, seen = trainer("method=lamix", *overrides), []
    one = run.regularizers["lamix"]
    transform = one.transform

    def watched(given: Batch, net: Net) -> Batch:
        changed = transform(given, net)
        seen.append(not torch.equal(changed.x, given.x))
        return changed

    one.transform = watched  # type: ignore[method-assign]
    for _ in range(epochs):
        run.train_epoch()
    return seen, run


def test_every_other_step_is_clean() -> None:
    """P-L9: of all steps of the run, not of each epoch: five are an odd number."""
    seen, run = kinds("epochs=3")
    assert seen == [False, True] * 7 + [False] and run.steps_per_epoch == 5
    assert [row["train/lamix/mixed"] for row in run.rows] == pytest.approx([0.4, 0.6, 0.4])
    assert (run.passes, run.forwarded, run.clock) == (15, 300, 15)
    known = facts(run.cfg, run)  # what result.json says of the cost
    assert (known["steps"], known["passes"], known["forwarded"]) == (15, 15, 300)


def test_steps_that_are_only_timed_alternate_too() -> None:
    run = trainer("method=lamix")
    for samples in run.samples():
        run.take_step(*samples)  # not by train_epoch, which counts the run's own steps
    assert run.step == 0 and run.clock == 5 and run.sums["lamix/mixed"] == 2


def test_double_takes_both_steps_of_each_batch() -> None:
    seen, run = kinds("method.lamix.schedule=double", epochs=2)
    assert seen == [False, True] * 10 and run.steps_per_epoch == 10 and (run.passes, run.forwarded) == (20, 400)
    plain, double = trainer("method=lamix"), trainer("method=lamix", "method.lamix.schedule=double")
    once, twice = ([samples[0] for samples in made.samples()] for made in (plain, double))
    assert len(once) == 5 and same(twice, [samples for samples in once for _ in range(2)])
    rates = [
        [row["lr"] for row in train("schedule.at=[1]", "method=lamix", f"method.lamix.schedule={name}").rows]
        for name in ("alternate", "double")
    ]
    assert rates[0] == rates[1] == pytest.approx([0.05, 0.01])


def test_mixed_only_has_no_clean_steps() -> None:
    seen, run = kinds("method.lamix.schedule=mixed_only", epochs=2)
    assert seen == [True] * 10 and run.rows[0]["train/lamix/mixed"] == 1


def test_the_layer_is_trained_and_serves_training_only() -> None:
    """P-L10; and it has the shape of the classifier (P-A1), a decay and a rate like any."""
    run = trainer("method=lamix")
    head = run.regularizers["lamix"].head
    assert head.weight.shape == run.net.classifier.weight.shape and head.bias.shape == run.net.classifier.bias.shape
    bound = run.net.classifier.in_features**-0.5
    assert 0.9 * bound < head.weight.abs().max() <= bound and 0.5 * bound < head.bias.abs().max() <= bound
    before = copy.deepcopy(head.state_dict())
    run.train_epoch()
    assert all((after != before[name]).any() for name, after in head.state_dict().items())
    seen = run.evaluate("test")
    with torch.no_grad():
        head.weight.normal_()
    assert run.evaluate("test") == seen
    groups = [group for group in run.optimizer.param_groups if any(parameter is head.weight for parameter in group["params"])]
    assert len(groups) == 1 and any(parameter is run.net.classifier.weight for parameter in groups[0]["params"])


def test_it_leaves_the_networks_start_and_dropout_alone() -> None:
    """Its layer starts from the method's own generator."""
    words = [*small("cnn11"), "norm=none"]
    plain, mixed = trainer(*words), trainer(*words, "method=lamix")
    assert same(plain.net.state_dict(), mixed.net.state_dict()) and torch.rand(3).shape == (3,)
    states = []
    for name in ("[]", "[lamix]"):
        trainer(*words, f"method={name}")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_targets_are_logged() -> None:
    """Figure 2's numbers, the means over the steps of the largest entries."""
    run, tops = trainer("method=lamix"), []
    one = run.regularizers["lamix"]
    retarget = one.retarget

    def watched(out: Pass) -> Tensor:
        target = retarget(out)
        tops.append([sorted(row, reverse=True)[:5] for row in target.tolist()])
        return target

    one.retarget = watched  # type: ignore[method-assign]
    run.train_epoch()
    means = torch.tensor(tops).mean(1)  # [steps, 5]
    for k in range(5):
        mixed, clean = (run.rows[0][f"train/lamix/target_{kind}/0{k + 1}"] for kind in ("mixed", "clean"))
        assert mixed == pytest.approx(means[1::2, k].sum().item() / 5, rel=1e-5) and clean == pytest.approx(means[::2, k].sum().item() / 5)


# why it is as it is


class WithoutSigmoid(LaMix):
    def soft_label(self, h: Tensor) -> Tensor:
        return self.head(h).softmax(1)


def clusters(kind: type[LaMix], **options: Any) -> tuple[dict[int, list[float]], float]:
    """Ten Gaussian clusters and a small network: the two largest entries of p on pairs at some steps, and the accuracy at the end."""
    rng = torch.Generator().manual_seed(0)
    centres = 6 / math.sqrt(20) * torch.randn(10, 20, generator=rng)

    def drawn(count: int) -> Batch:
        y = torch.randint(10, (count,), generator=rng)
        return Batch(centres[y] + torch.randn(count, 20, generator=rng), y, y)

    torch.manual_seed(1)
    features = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    model, one, tops = Net(features, nn.Linear(64, 10)), kind(**options), {}
    one.rng = torch.Generator().manual_seed(3)
    h = features(drawn(2).x)
    one.setup(Pass(drawn(2), h, model.classifier(h), ()))
    optimizer = torch.optim.SGD([*model.parameters(), *one.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(602):
        given = at(step, one).transform(drawn(128), model)
        h = features(given.x)
        out = Pass(given, h, model.classifier(h), ())
        if step in (51, 601):
            tops[step] = one.soft_label(h.detach()).topk(2).values.mean(0).tolist()
        optimizer.zero_grad()
        cross_entropy(out.logits, one.retarget(out)).backward()
        optimizer.step()
    test = drawn(2000)
    return tops, (model(test.x).argmax(1) == test.y).float().mean().item()


def test_the_sigmoid_and_the_attached_gradient_matter() -> None:
    """Protocol sheet, section 0: detached, p stays near uniform; without the sigmoid p and the prediction confirm each other, and it fails.

    For K = 10 the mean of the two largest entries of p on pairs can never exceed 0.2023.
    """
    tops, accuracy = clusters(LaMix)
    assert tops[601][0] > 0.18 and tops[601][1] > 0.15 and sum(tops[601]) / 2 < 0.2023 and tops[601][0] > tops[51][0] + 0.04
    assert accuracy > 0.98
    tops, accuracy = clusters(LaMix, detach_global=True)
    assert 0.1 < tops[601][0] < 0.12 and tops[601][0] < tops[51][0] + 0.005 and accuracy > 0.98
    tops, accuracy = clusters(WithoutSigmoid)
    assert tops[601][0] > 0.99 and accuracy < 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.2}, "beta: 1.2 is not between 0 and 1"),
        ({"local_label": "mean"}, "local_label: 'mean' is not known; allowed: lambda, half"),
        ({"global_label": "learnt"}, "global_label: 'learnt' is not known; allowed: learned, uniform, none"),
        ({"schedule": "both"}, "schedule: 'both' is not known; allowed: alternate, double, mixed_only"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made("lamix", **options)
