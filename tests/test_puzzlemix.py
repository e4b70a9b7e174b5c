"""PuzzleMix in the trainer: its saliency pass, what a batch becomes, the choices of each step; and the binary cross-entropy."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from test_mixing import at
from torch import Tensor
from torch.nn import functional as F
from trainers import data_home, same, train, trainer

from data.bundle import Batch
from experiments.config import ConfigError
from experiments.loss import bce
from experiments.provenance import facts
from experiments.trainer import Diverged, Trainer
from regularizers.puzzle_mask import energy, minimum
from regularizers.puzzle_transport import assignment, moved
from regularizers.puzzlemix import FINEST, PuzzleMix

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "dataset.padding=2", "model=puzzle_resnet18", "model.width=16", "loss=bce"]


def ready(*overrides: str, method: str = "puzzlemix") -> tuple[Trainer, Any, Batch]:
    """A trainer on colour images, its method, and a batch."""
    run = trainer(*COLOUR, f"method={method}", "batch_size=12", *overrides)
    drawn, _ = run.take(*next(iter(run.samples())))
    return run, run.regularizers[method], drawn


def test_saliency_is_the_gradients_norm_over_channels() -> None:
    """In evaluation mode, pixel by pixel from autograd of an expression of its own; the network is left as it was."""
    run, method, drawn = ready("profile.train=24", "profile.test=20")
    run.train_epoch()  # so that statistics of BN are not those of a new network
    before, gradients = (copy.deepcopy(values) for values in (run.net.state_dict(), [p.grad for p in run.net.parameters()]))
    saliency = method.saliency(drawn, run.net)
    assert run.net.training and same(dict(run.net.state_dict()), dict(before))
    assert same([p.grad for p in run.net.parameters()], gradients) and None not in gradients
    twin = copy.deepcopy(run.net).double().eval()
    x = drawn.x.double().requires_grad_()
    loss = -torch.stack([twin(x).log_softmax(1)[i, label] for i, label in enumerate(drawn.y.tolist())]).sum() / len(x)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(saliency.double(), gradient.pow(2).mean(1).sqrt(), rtol=1e-3, atol=1e-8)
    assert saliency.shape == (12, 32, 32) and saliency.dtype == torch.float32 and not drawn.x.requires_grad


def test_clean_lam_trains_on_the_unmixed_batch_too() -> None:
    """In training mode: the weights' gradients are the mixed batch's and 2 clean_lam / K times those of the plain cross-entropy."""
    run, method, drawn = ready("method.puzzlemix.clean_lam=0.5", "profile.train=40")
    twin, rng = copy.deepcopy(run.net), method.rng.get_state()
    at(0, method)
    run.optimizer.zero_grad()
    loss, _ = run.loss(drawn, None)
    loss.backward()
    x = drawn.x.clone().requires_grad_()
    F.cross_entropy(twin(x), drawn.y).backward()
    saliency = x.grad.square().mean(1).sqrt()
    assert run.net.training and not same(dict(run.net.named_buffers()), dict(twin.named_buffers()))  # BN has seen both batches
    method.saliency, method.clean_lam = lambda *_: saliency, 0
    method.rng.set_state(rng)
    seen = [p.grad for p in run.net.parameters()]
    run.net.load_state_dict(twin.state_dict())
    mixed, _ = run.loss(drawn, None)
    for ours, gradient, clean in zip(seen, torch.autograd.grad(mixed, [*run.net.parameters()]), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, 2 * 0.5 / 10 * clean.grad + gradient, rtol=1e-3, atol=1e-5)


def test_masks_are_float32_under_autocast() -> None:
    """Given the same saliency, the mixed images are the same bits."""
    run, method, drawn = ready()
    at(0, method)
    saliency = torch.rand(12, 32, 32, generator=torch.Generator().manual_seed(0))
    method.saliency = lambda *_: saliency
    partner, lam = torch.arange(12).roll(1), torch.tensor(0.4)
    plain = method.mix(drawn, partner, lam, run.net)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(method.mix(drawn, partner, lam, run.net), plain) and plain[0].dtype == plain[1].dtype == torch.float32


@pytest.mark.parametrize(("n", "t_size", "side"), [(4, None, 0), (2, "4", 8), (16, "4", 16), (2, "null", 2), (8, "1", 32)])
def test_the_mixed_batch_by_hand(n: int, t_size: str | None, side: int) -> None:
    """P-P4: pixel by pixel from the mask, cells of at most t_size pixels moved as a whole, if any (side x side); each pair's target by its
    own mask. Trap 10: saliency goes with its image."""
    words = f"method.puzzlemix.t_size={t_size}" if t_size else "method.puzzlemix.transport=false"
    run, method, drawn = ready(words, f"method.puzzlemix.blocks=[{n}]")
    rng = method.rng.get_state()
    mixed = at(0, method).transform(drawn, run.net)
    method.rng.set_state(rng)
    partner = torch.rand(12, generator=method.rng).argsort()
    first, second = torch._standard_gamma(torch.ones(2, dtype=torch.float64), generator=method.rng)
    saliency = method.saliency(drawn, run.net)
    pixels = drawn.x * torch.tensor([0.2023, 0.1994, 0.2010])[:, None, None]
    costs = energy(saliency, pixels, partner, (first / (first + second)).float(), n, 1.2, 0.5, 0.2, 4)
    z = minimum(costs, 200 * n // FINEST).permute(2, 0, 1) / 2

    def whole(image: int, shown: Tensor) -> Tensor:
        """The image, its cells moved to where the mask shows it."""
        if not side:
            return drawn.x[image]
        cells = saliency[image].view(side, 32 // side, side, 32 // side).sum((1, 3))
        mask = shown[:: 32 // side, :: 32 // side]
        return moved(drawn.x[image, None], *assignment(mask[None], (cells / cells.sum())[None], 0.8))[0]

    for i, j in enumerate(partner.tolist()):
        share, a, b = z[i].mean().item(), drawn.y[i].item(), drawn.y[j].item()
        assert mixed.target[i].tolist() == pytest.approx([share * (k == a) + (1 - share) * (k == b) for k in range(10)])
        shown = torch.kron(z[i], torch.ones(32 // n, 32 // n))
        torch.testing.assert_close(mixed.x[i], shown * whole(i, shown) + (1 - shown) * whole(j, 1 - shown))
    assert torch.equal(mixed.y, drawn.y) and (mixed.target.sum(1) - 1).abs().max() < 1e-6 and (mixed.target >= 0).all()


def test_grids_are_drawn_evenly_and_from_the_seed() -> None:
    """Of successive steps, each of the 16 pairs as often, within 4.5 deviations; another seed draws others."""
    methods = [ready(f"seed={seed}")[1] for seed in (1, 1, 2)]
    drawn = [[at(step, method).n for step in range(2000)] for method in methods]
    assert drawn[0] == drawn[1] != drawn[2] and {*drawn[0]} == {2, 4, 8, 16}
    pairs = Counter(zip(drawn[0], drawn[0][1:], strict=False))
    assert len(pairs) == 16 and all(abs(count - 125) < 4.5 * math.sqrt(2000 * 15 / 256) for count in pairs.values())


def test_only_some_batches_are_mixed() -> None:
    run, method, drawn = ready("method.puzzlemix.prob=0.3")
    mixed = [bool(at(step, method).passes) for step in range(1000)]
    assert abs(sum(mixed) - 300) < 4 * math.sqrt(1000 * 0.21)
    left = at(mixed.index(False), method).transform(drawn, run.net)
    assert torch.equal(left.x, drawn.x) and torch.equal(left.target, F.one_hot(drawn.y, 10).float())


@pytest.mark.parametrize(("method", "passes"), [("puzzlemix", 10), ("lamix_puzzle", 7), ("[puzzlemix,itdm_c]", 20)])
def test_passes_are_counted(method: str, passes: int) -> None:
    """Five steps of twenty: two passes each; of LaMix only the two mixed ones; with ITDM's second batch twice as many."""
    run = train(f"method={method}", "epochs=1", epochs=1)
    cost = facts(run.cfg, run)
    assert (cost["steps"], cost["passes"], cost["forwarded"]) == (5, passes, 20 * passes)


def test_the_loss_is_torchs_bce_of_the_softmax() -> None:
    """The mean over samples and classes (P-P9). NaN stays NaN: torch's own refuses such probabilities as out of range."""
    rng = torch.Generator().manual_seed(0)
    logits, target = (5 * torch.randn(20, 7, generator=rng)).requires_grad_(), torch.rand(20, 7, generator=rng).softmax(1)
    losses = bce(logits, target), F.binary_cross_entropy(logits.softmax(1).clamp(max=1), target)
    assert torch.equal(*losses) and torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
    hard = torch.arange(20) % 7
    assert bce(logits, hard) == bce(logits, F.one_hot(hard, 7).float())
    extreme = torch.tensor([[200.0, 0, 0], [-200, 0, 0]], requires_grad=True)
    bce(extreme, torch.tensor([1, 0])).backward()
    assert extreme.grad.isfinite().all() and bce(torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), torch.tensor([0, 1])).isnan()
    for method in ("vanilla", "lamix"):  # whose target is of the network too
        run = trainer("loss=bce", "optim.lr=1e30", f"method={method}")
        with pytest.raises(Diverged, match=r"train/bce is (nan|inf)"):
            for _ in range(2):
                run.train_epoch()


def test_the_loss_is_the_experiments() -> None:
    """Of any method; it is logged under its name, and its perplexity is none."""
    row = train("method=[itdm_c,mixup]", "loss=bce", epochs=1).rows[0]
    assert 0 < row["train/bce"] < 0.4 and "train/ce" not in row and "train/perplexity" not in row and row["test/ce"] > 0
    words = train("dataset=docs", "dataset.bptt=5", "model=lstm", "model.width=8", "balanced=false", "norm=none", "loss=bce", epochs=1)
    assert words.rows[0]["train/bce"] < 0.1


def test_refused_options() -> None:
    for options, message in (
        ({"alpha": 0}, "alpha: 0 is not allowed; it must be above 0"),
        ({"blocks": []}, r"blocks: \[\] is not allowed; it must be a list of numbers of at least 2"),
        ({"gamma": 1}, "gamma: 1 is not allowed; it must be at least 0 and below 1"),
        ({"eta": -1}, "eta: -1 is not allowed"),
        ({"t_size": 0}, "t_size: 0 is not allowed; it must be at least 1, or null"),
        ({"mask_iters": 0}, "mask_iters: 0 is not allowed; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            PuzzleMix(**options)
    assert PuzzleMix(prob=0, beta=0, gamma=0, eta=0, neigh_size=1, t_size=1, t_eps=0, mask_iters=1).blocks == [2, 4, 8, 16]


def test_grids_and_data() -> None:
    """Grids that do not divide the images are left out; none may remain. The method compares pixels."""
    assert trainer("method=puzzlemix").regularizers["puzzlemix"].blocks == [2, 4]  # 28x28
    with pytest.raises(ConfigError, match=r"^method.puzzlemix: blocks: none of them divides images of 32x32, which must be square$"):
        ready("method.puzzlemix.blocks=[5]")
    with pytest.raises(ConfigError, match=r"^method.puzzlemix: it compares pixels, .*choose dataset.standardise=channels$"):
        ready("dataset.standardise=pixels")
