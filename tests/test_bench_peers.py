"""The loops that the bench compares the suite with do the same work, and leave no process behind."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.bench import peers
from experiments.bench.measure import Asked
from experiments.config import build
from experiments.train import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
DIGITS = ["dataset.train=70", "balanced=false"]  # three batches, and ten images more
TINY = Asked(["model=net2c", "batch_size=20", "profile.test=30", "runtime.threads=1", "runtime.device=cpu"])
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "dataset.size=28", "dataset.train=40", "model.in_channels=3"]


def trainer_and_twin(cfg):
    """A trainer, and a network of the same weights."""
    trainer = make_trainer(cfg)
    net = build(cfg.model, "model")(num_classes=10)
    net.load_state_dict(trainer.net.state_dict())
    return trainer, net


def losses_of(trainer, samples):
    sums = [0.0]
    for chosen in samples:
        trainer.take_step(*chosen)
        sums.append(float(trainer.sums["ce"]))
    return torch.tensor(sums).double().diff()


OPTIM = ["optim.momentum=0.9", "optim.weight_decay=0.01", "norm=gn"]


@pytest.mark.parametrize("more", [OPTIM, ["model=net5c", "optim.lr=0.001", "dataset.padding=2", "dataset.flip=true"]])
def test_minimal_loop_takes_the_same_steps_as_the_suite(more):
    cfg = TINY.cfg("net2c", *DIGITS, *more)
    trainer, net = trainer_and_twin(cfg)
    trainer.rngs["data"] = torch.Generator().manual_seed(cfg.seed)  # the loop's
    loop = peers.minimal(cfg, net)
    theirs = torch.stack([loop.step() for _ in range(4)]).double()
    assert theirs[0] != theirs[1]
    torch.testing.assert_close(losses_of(trainer, itertools.islice(trainer.endless(), 4)), theirs, atol=1e-5, rtol=1e-5)


def test_usual_loop_takes_the_same_steps_as_the_suite():
    cfg = TINY.cfg("net2c", *DIGITS, *OPTIM, "channels_last=false", "drop_last=false")  # its layout
    trainer, net = trainer_and_twin(cfg)
    mean, std = (value / 255 for value in peers.mean_std(trainer.bundle))
    # To the bit as torchvision: digits have flat areas, of which rounding picks the pooled maximum.
    trainer.bundle = replace(trainer.bundle, prepare=lambda images: images.float().div(255).sub(mean).div(std))
    loop = peers.usual(cfg, net, workers=0, shuffle=False)
    theirs = torch.tensor(loop.step()).double()
    assert len(theirs) == 4 and theirs[0] != theirs[1]
    torch.testing.assert_close(losses_of(trainer, zip(torch.arange(70).split(20))), theirs, atol=1e-5, rtol=1e-5)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, trainer.net.state_dict()[name], atol=1e-6, rtol=0)
    (tested,), accuracy = peers.usual_pass(trainer.net, peers.loader(trainer.bundle, cfg, "test", 30, 0, False), trainer.device)
    assert [trainer.evaluate("test")[name] for name in ("accuracy", "ce")] == pytest.approx([accuracy, tested], abs=1e-4)


def test_loader_crops_and_mirrors_training_images_alone_and_shuffles_them():
    bundle = make_trainer(TINY.cfg("net2c", *COLOUR, "dataset.padding=2", "dataset.flip=true")).bundle
    image, test = bundle.splits["train"][0][:1], bundle.splits["test"]
    many = replace(bundle, splits={"train": (image.repeat(400, 1, 1, 1), torch.arange(400)), "test": test})
    for padding, flip in ((2, True), (2, False), (0, True)):
        cfg = TINY.cfg("net2c", *COLOUR, f"dataset.padding={padding}", f"dataset.flip={flip}")
        padded = nn.functional.pad(image, (padding,) * 4)
        windows = [padded[:, :, top : top + 28, left : left + 28] for top, left in itertools.product(range(2 * padding + 1), repeat=2)]
        windows += [window.flip(3) for window in windows] * flip
        x, y = (torch.cat(parts) for parts in zip(*peers.loader(many, cfg, "train", 100, 0, True), strict=True))
        allowed = bundle.prepare(torch.cat(windows)).flatten(1)
        distance = torch.cdist(x.flatten(1), allowed, compute_mode="donot_use_mm_for_euclid_dist")  # exact
        assert distance.min(1).values.max() < 0.01
        assert len(distance.argmin(1).unique()) > 0.9 * len(torch.cat(windows).unique(dim=0))
        assert not torch.equal(y, torch.arange(400)) and torch.equal(y.sort().values, torch.arange(400))
    shown = torch.cat([x for x, _ in peers.loader(bundle, cfg, "test", 100, 0, False)])
    assert torch.allclose(shown, bundle.prepare(test[0]), atol=1e-5)


def test_whole_suite_leaves_what_a_run_leaves(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(tmp_path))
    side = peers.whole_suite(TINY.cfg("net2c", *DIGITS, "evaluate.every=null"))
    for lines in (2, 3):
        side.step()
        assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"checkpoint", "progress", "metrics", "events"}
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == lines
    side.close()


@pytest.mark.slow
def test_processes_end_with_their_side():
    cfg, before = TINY.cfg("net2c", *DIGITS), {*multiprocessing.active_children()}  # joblib keeps those of another test
    sides = {"loaded": peers.loaded(cfg, 2), "usual": peers.usual(cfg), "two runs": peers.two_runs(cfg, at_once=True)}
    for (name, side), started in zip(sides.items(), (2, 4, 2), strict=True):
        side.step()
        assert len({*multiprocessing.active_children()} - before) == started, name
        side.close()
        assert not {*multiprocessing.active_children()} - before, name
