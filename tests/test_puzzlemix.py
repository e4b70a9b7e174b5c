"""PuzzleMix in the trainer: its saliency pass, its targets, its loss, and LaMix on it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_mixing import at
from test_regularizers import made
from test_trainer import data_home, same, train, trainer
from torch import Tensor
from torch.nn import functional as F

from data.bundle import Batch
from experiments.config import ConfigError
from experiments.loss import bce
from experiments.provenance import facts
from experiments.trainer import Diverged, Trainer
from regularizers.base import Pass
from regularizers.puzzle_mask import cell, energy, minimum
from regularizers.puzzlemix import FINEST

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("puzzlemix", "lamix_puzzle")
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "dataset.padding=2", "model=puzzle_resnet18", "model.width=16", "loss=bce"]


def ready(*overrides: str, method: str = "puzzlemix") -> tuple[Trainer, Any, Batch]:
    """A trainer on colour images, its method, and a batch."""
    run = trainer(*COLOUR, f"method={method}", "batch_size=12", *overrides)
    drawn, _ = run.take(*next(iter(run.samples())))
    return run, run.regularizers[method], drawn


def buffers(run: Trainer) -> dict[str, Tensor]:
    return copy.deepcopy(dict(run.net.named_buffers()))


# saliency


def test_saliency_is_the_gradients_norm_over_channels() -> None:
    """In evaluation mode, pixel by pixel from autograd of an expression of its own; the network is left as it was."""
    run, method, drawn = ready()
    run.train_epoch()  # so that statistics of BN are not those of a new network
    before = buffers(run)
    found = method.saliency(drawn, run.net)
    assert run.net.training and same(buffers(run), before) and all(p.grad is not None for p in run.net.parameters())
    gradients = copy.deepcopy([p.grad for p in run.net.parameters()])
    method.saliency(drawn, run.net)
    assert same(gradients, [p.grad for p in run.net.parameters()])
    twin = copy.deepcopy(run.net).double().eval()
    x = drawn.x.double().requires_grad_()
    loss = -torch.stack([twin(x).log_softmax(1)[i, label] for i, label in enumerate(drawn.y.tolist())]).sum() / len(x)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found.double(), gradient.pow(2).mean(1).sqrt(), rtol=1e-3, atol=1e-8)
    assert found.shape == (12, 32, 32) and found.dtype == torch.float32 and not drawn.x.requires_grad


def test_clean_lam_trains_on_the_unmixed_batch_too() -> None:
    """In training mode: the weights' gradients are the mixed batch's and 2 clean_lam / K times those of the plain cross-entropy."""
    run, method, drawn = ready("method.puzzlemix.clean_lam=0.5", "profile.train=40")
    twin, rng = copy.deepcopy(run.net), method.rng.get_state()
    at(0, method)
    before = buffers(run)
    run.optimizer.zero_grad()
    loss, _ = run.loss(drawn, None)
    loss.backward()
    x = drawn.x.clone().requires_grad_()
    clean = F.cross_entropy(twin(x), drawn.y)
    clean.backward()
    saliency = x.grad.square().mean(1).sqrt()
    expected = [2 * 0.5 / 10 * p.grad for p in twin.parameters()]
    assert run.net.training and not same(buffers(run), before)  # BN has seen both batches

    method.saliency, method.clean_lam = lambda *_: saliency, 0
    method.rng.set_state(rng)
    run.net.load_state_dict(twin.state_dict())
    mixed, _ = run.loss(drawn, None)
    for one, gradient, parameter in zip(
        expected, torch.autograd.grad(mixed, [*run.net.parameters()]), [p.grad for p in run.net.parameters()], strict=True
    ):
        torch.testing.assert_close(parameter, one + gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_are_float32_under_autocast(precision: str) -> None:
    """The pass itself has the network's precision; given the same saliency, the mixed images are the same bits."""
    run, method, drawn = ready(f"precision={precision}")
    seen: list[torch.dtype] = []
    handle = run.net.classifier.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    at(0, method)
    run.run(drawn)
    handle.remove()
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == [wanted, wanted]
    saliency = torch.rand(12, 32, 32, generator=torch.Generator().manual_seed(0))
    method.saliency = lambda *_: saliency
    partner, lam = torch.arange(12).roll(1), torch.tensor(0.4)
    plain = method.mix(drawn, partner, lam, run.net)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(method.mix(drawn, partner, lam, run.net), plain) and plain[0].dtype == plain[1].dtype == torch.float32


# what a batch becomes


@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("transport", ["true", "false"])
def test_the_mixed_batch_by_hand(n: int, transport: str) -> None:
    """P-P4: block by block from the mask; each pair's target by its own mask. Traps 10: saliency goes with its image."""
    run, method, drawn = ready(f"method.puzzlemix.transport={transport}", f"method.puzzlemix.blocks=[{n}]")
    rng = method.rng.get_state()
    mixed = at(0, method).transform(drawn, run.net)
    method.rng.set_state(rng)
    partner = torch.rand(12, generator=method.rng).argsort()
    one, other = torch._standard_gamma(torch.ones(2, dtype=torch.float64), generator=method.rng)
    saliency = method.saliency(drawn, run.net)
    pixels = drawn.x * torch.tensor([0.2023, 0.1994, 0.2010])[:, None, None]
    costs = energy(saliency, pixels, partner, (one / (one + other)).float(), n, 1.2, 0.5, 0.2, 4)
    z = minimum(costs, 200 * n // FINEST).permute(2, 0, 1) / 2
    for i, j in enumerate(partner.tolist()):
        share = z[i].mean().item()
        a, b = drawn.y[i].item(), drawn.y[j].item()
        assert mixed.target[i].tolist() == pytest.approx([share * (k == a) + (1 - share) * (k == b) for k in range(10)])
        for row in range(n):
            for column in range(n):
                block = (slice(None), slice(row * 32 // n, (row + 1) * 32 // n), slice(column * 32 // n, (column + 1) * 32 // n))
                if transport == "false":
                    wanted = z[i, row, column] * drawn.x[i][block] + (1 - z[i, row, column]) * drawn.x[j][block]
                    torch.testing.assert_close(mixed.x[i][block], wanted)
    assert torch.equal(mixed.y, drawn.y) and mixed.x.shape == drawn.x.shape
    assert (mixed.target.sum(1) - 1).abs().max() < 1e-6 and (mixed.target >= 0).all()


@pytest.mark.parametrize(("t_size", "n", "side"), [(4, 2, 8), (4, 8, 8), (4, 16, 16), (None, 2, 2), (None, 16, 16), (1, 8, 32)])
def test_cells_that_move(t_size: int | None, n: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at most t_size pixels, each moved as a whole: the mask's values and the saliency are those of its cells."""
    from regularizers import puzzlemix

    run, method, drawn = ready(f"method.puzzlemix.t_size={'null' if t_size is None else t_size}", f"method.puzzlemix.blocks=[{n}]")
    seen: list[tuple[Tensor, Tensor]] = []
    plain = puzzlemix.assignment
    monkeypatch.setattr(puzzlemix, "assignment", lambda mask, each, xi: seen.append((mask, each)) or plain(mask, each, xi))
    at(0, method)
    method.mix(drawn, torch.arange(12).roll(3), torch.tensor(0.5), run.net)
    ((mask, each),) = seen
    saliency = method.saliency(drawn, run.net)
    assert mask.shape == each.shape == (24, side, side)
    cells = saliency.view(12, side, 32 // side, side, 32 // side).sum((2, 4))
    own = cells / cells.sum((1, 2), keepdim=True)
    torch.testing.assert_close(each, torch.cat([own, own[torch.arange(12).roll(3)]]))
    torch.testing.assert_close(mask[:12] + mask[12:], torch.ones(12, side, side))
    assert torch.equal(mask[:12], F.interpolate(mask[:12, None, :: side // n, :: side // n], size=(side, side))[:, 0])


@pytest.mark.parametrize(("block", "pixels", "side"), [(16, 4, 4), (2, 4, 2), (14, 4, 7), (7, 4, 7), (6, 4, 6), (12, 5, 6), (8, 1, 1)])
def test_cells_divide_blocks(block: int, pixels: int, side: int) -> None:
    """For powers of two the smaller of both, as published; 28x28 digits have cells of 7x7."""
    assert cell(block, pixels) == side


def test_a_whole_image_is_itself() -> None:
    """P-P6: z = 1 everywhere, which a ratio of 1 gives (P-P7), and z = 0 its partner."""
    run, method, drawn = ready()
    partner = torch.arange(12).roll(5)
    for step in range(8):
        at(step, method)
        for lam, wanted, share in ((1.0, drawn.x, 1), (0.0, drawn.x[partner], 0)):
            x, shares = method.mix(drawn, partner, torch.tensor(lam), run.net)
            assert torch.equal(x, wanted) and (shares == share).all()


def test_the_mean_share_follows_the_prior() -> None:
    """P-P8: 1/2 at a ratio of 1/2, by symmetry, within four deviations; and more of the image with more of the ratio."""
    run, method, drawn = ready("batch_size=50")
    means = {}
    for lam in (0.2, 0.5, 0.8):
        found = []
        for step in range(8):
            partner = torch.randperm(50, generator=torch.Generator().manual_seed(step))
            found.append(at(step, method).mix(drawn, partner, torch.tensor(lam), run.net)[1])
        each = torch.cat(found)
        means[lam], deviation = each.mean().item(), each.std().item() / math.sqrt(len(each))
    assert abs(means[0.5] - 0.5) < 4 * max(deviation, 0.01) and means[0.2] < 0.45 and means[0.8] > 0.55


# the host's choices


def test_grids_are_drawn_evenly_and_from_the_seed() -> None:
    """Each of the four as often, within four deviations, one after the other independently; another seed draws others."""
    runs = [ready(f"seed={seed}")[1] for seed in (1, 1, 2)]
    drawn = [[at(step, method).n for step in range(2000)] for method in runs]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = Counter(drawn[0])
    assert sorted(counts) == [2, 4, 8, 16] and all(abs(count - 500) < 4 * math.sqrt(2000 * 3 / 16) for count in counts.values())
    pairs = Counter(zip(drawn[0], drawn[0][1:], strict=False))
    assert len(pairs) == 16 and all(abs(count - 125) < 4.5 * math.sqrt(2000 * 15 / 256) for count in pairs.values())


def test_only_some_batches_are_mixed() -> None:
    run, method, drawn = ready("method.puzzlemix.prob=0.3")
    mixed = [bool(at(step, method).passes) for step in range(1000)]
    assert abs(sum(mixed) - 300) < 4 * math.sqrt(1000 * 0.21)
    left = at(mixed.index(False), method).transform(drawn, run.net)
    assert torch.equal(left.x, drawn.x) and torch.equal(left.target, F.one_hot(drawn.y, 10).float())


@pytest.mark.parametrize(("size", "blocks"), [(28, [2, 4]), (32, [2, 4, 8, 16]), (18, [2])])
def test_grids_that_do_not_divide_the_images_are_left_out(size: int, blocks: list[int]) -> None:
    words = [] if size == 28 else [*COLOUR, f"++dataset.size={size}"]
    assert trainer("method=puzzlemix", *words).regularizers["puzzlemix"].blocks == blocks


# what it costs


@pytest.mark.parametrize(("method", "passes"), [("puzzlemix", 30), ("lamix_puzzle", 22), ("[puzzlemix,itdm_c]", 60)])
def test_passes_are_counted(method: str, passes: int) -> None:
    """Fifteen steps of twenty: two passes each; of LaMix only the seven mixed ones; with ITDM's second batch twice as many."""
    run = train(f"method={method}", "epochs=3", epochs=3)
    known = facts(run.cfg, run)
    assert (known["steps"], known["passes"], known["forwarded"]) == (15, passes, 20 * passes)


# the loss


def test_the_loss_is_torchs_bce_of_the_softmax() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, target = 5 * torch.randn(20, 7, generator=rng), torch.rand(20, 7, generator=rng).softmax(1)
    p = logits.double().softmax(1)
    by_hand = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert bce(logits, target).item() == pytest.approx(by_hand.item(), rel=1e-5)
    hard = torch.arange(20) % 7
    assert bce(logits, hard) == bce(logits, F.one_hot(hard, 7).float())
    extreme = torch.tensor([[200.0, 0, 0], [-200, 0, 0]], requires_grad=True)
    bce(extreme, torch.tensor([1, 0])).backward()
    assert extreme.grad.isfinite().all()


def test_a_loss_that_is_no_number_is_one() -> None:
    """torch's own refuses such probabilities as out of range: the run would fail where it diverged."""
    logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0]], requires_grad=True)
    assert bce(logits, torch.tensor([0, 1])).isnan()
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        F.binary_cross_entropy(logits.softmax(1), F.one_hot(torch.tensor([0, 1])).float())
    for method in ("vanilla", "lamix"):  # whose target is of the network too
        made = trainer("loss=bce", "optim.lr=1e30", f"method={method}")
        with pytest.raises(Diverged, match=r"train/bce is (nan|inf)"):
            for _ in range(2):
                made.train_epoch()


def test_torch_s_own_bits_where_the_loss_is_a_number() -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    target = torch.randn(20, 7, generator=torch.Generator().manual_seed(1)).softmax(1)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    losses = bce(leaves[0], target), F.binary_cross_entropy(leaves[1].softmax(1).clamp(max=1), target)
    one, other = (torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True))
    assert torch.equal(losses[0], losses[1]) and torch.equal(one, other)


@pytest.mark.parametrize("classes", [10, 100])
def test_the_loss_is_a_kth_of_the_sum_over_classes(classes: int) -> None:
    """P-P9; and near the start about 2 / K of the cross-entropy's gradient, less what the other classes add."""
    rng = torch.Generator().manual_seed(0)
    logits = (0.1 * torch.randn(30, classes, generator=rng)).requires_grad_()
    y = torch.randint(classes, (30,), generator=rng)
    each = F.binary_cross_entropy(logits.softmax(1), F.one_hot(y, classes).float(), reduction="none").sum(1).mean()
    one, other, ce = (torch.autograd.grad(loss, logits)[0] for loss in (bce(logits, y), each, F.cross_entropy(logits, y)))
    torch.testing.assert_close(one, other / classes)
    assert (one.norm() / ce.norm()).item() == pytest.approx(1 / classes, rel=0.2)


def test_the_loss_is_the_experiments() -> None:
    """Of any method; it is logged under its name, and its perplexity is none."""
    for method in ("vanilla", "label_smoothing", "[itdm_c,mixup]"):
        run = train(f"method={method}", "loss=bce", epochs=1)
        row = run.rows[0]
        assert 0 < row["train/bce"] < 0.4 and "train/ce" not in row and "train/perplexity" not in row and row["test/ce"] > 0
    words = train("dataset=docs", "dataset.bptt=5", "model=lstm", "model.width=8", "balanced=false", "norm=none", "loss=bce", epochs=1)
    assert words.rows[0]["train/bce"] < 0.1


# LaMix on it


def test_lamix_takes_puzzlemixs_image_at_one_half_and_its_own_label() -> None:
    """Eq. 5: every other step; the mask's prior is for 1/2, and the labels are mixed in another ratio, the same for the batch."""
    run, method, drawn = ready(method="lamix_puzzle")
    clean = at(0, method).transform(drawn, run.net)
    assert torch.equal(clean.x, drawn.x) and torch.equal(clean.target, F.one_hot(drawn.y, 10).float())
    for step in (1, 3, 5):
        rng = method.rng.get_state()
        mixed = at(step, method).transform(drawn, run.net)
        method.rng.set_state(rng)
        lam = torch.zeros(()).uniform_(generator=method.rng)
        partner = torch.rand(12, generator=method.rng).argsort()
        x, _ = method.puzzle.mix(drawn, partner, torch.tensor(0.5), run.net)
        hot = F.one_hot(drawn.y, 10).float()
        assert torch.equal(mixed.x, x)
        torch.testing.assert_close(mixed.target, lam * hot + (1 - lam) * hot[partner])
        h = torch.randn(12, 128)
        out = Pass(mixed, h, run.net.classifier(h), ())
        assert torch.equal(method.retarget(out), mixed.target) and method.head is None  # beta = 1


@pytest.mark.parametrize("kind", ["half", "mask_ratio"])
def test_other_local_labels(kind: str) -> None:
    run, method, drawn = ready(f"method.lamix_puzzle.local_label={kind}", method="lamix_puzzle")
    rng = method.rng.get_state()
    mixed = at(1, method).transform(drawn, run.net)
    method.rng.set_state(rng)
    partner = torch.rand(12, generator=method.rng).argsort()
    _, share = method.puzzle.mix(drawn, partner, torch.tensor(0.5), run.net)
    ratio = torch.full((12, 1), 0.5) if kind == "half" else share[:, None]
    hot = F.one_hot(drawn.y, 10).float()
    torch.testing.assert_close(mixed.target, ratio * hot + (1 - ratio) * hot[partner])
    assert kind == "half" or len(share.unique()) > 2


def test_lamix_on_puzzlemix_learns_a_global_label_below_a_beta_of_one() -> None:
    run = train("method=lamix_puzzle", "method.lamix_puzzle.beta=0.5", epochs=1)
    head = run.regularizers["lamix_puzzle"].head
    assert head is not None and head.weight.grad.abs().max() > 0


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha: 0 is not allowed; it must be above 0"),
        ({"prob": 2}, "prob: 2 is not allowed; it must be between 0 and 1"),
        ({"blocks": []}, r"blocks: \[\] is not allowed; it must be a list of numbers of at least 2"),
        ({"gamma": 1}, "gamma: 1 is not allowed; it must be at least 0 and below 1"),
        ({"mask_iters": 0}, "mask_iters: 0 is not allowed; it must be at least 1"),
        ({"t_size": 0}, "t_size: 0 is not allowed; it must be at least 1, or null"),
        ({"blocks": 4}, "blocks: 4 is not allowed; it must be a list, each a whole number"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made("puzzlemix", **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.puzzlemix.blocks=[5]"], "^method.puzzlemix: blocks: none of them divides images of 32x32, which must be square$"),
        (["dataset.standardise=pixels"], "^method.puzzlemix: it compares pixels, .*choose dataset.standardise=channels$"),
    ],
)
def test_refused_data(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ready(*overrides)


def test_prob_is_lamixs_schedules() -> None:
    with pytest.raises(ConfigError, match=r"puzzle\.prob: 0\.5 is not allowed; it must be 1"):
        trainer("method=lamix_puzzle", "+method.lamix_puzzle.puzzle.prob=0.5")


def test_smoothing_composes() -> None:
    """In either order: what the mask's ratio gives is smoothed, and where it comes first nothing is lost."""
    rows = [train(f"method=[{names}]", epochs=1).rows for names in ("puzzlemix,label_smoothing", "label_smoothing,puzzlemix")]
    assert rows[0] == rows[1]
    run, method, drawn = ready(method="puzzlemix")
    mixed = at(0, method).transform(replace(drawn, target=torch.full((12, 10), 0.1)), run.net)
    torch.testing.assert_close(mixed.target, torch.full((12, 10), 0.1))
