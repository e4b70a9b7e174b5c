"""The bench's two sides do the same work, take turns, and leave no process behind."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from experiments.bench import epochs, peers, sides
from experiments.bench.configs import Asked
from experiments.config import build
from experiments.rng import generator
from experiments.train import make_trainer

ONE = ["runtime.threads=1", "runtime.device=cpu"]
TINY = Asked(["model=net2c", "batch_size=20", "dataset.train=100", *ONE])
IMAGES = ["dataset=cifar10", "dataset.source=embedded", "dataset.size=28", "dataset.train=40"]
COLOUR = Asked(["model=net2c", "model.in_channels=3", "batch_size=20", *IMAGES, *ONE])


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The loops that people write.

SETTINGS = [[], ["optim.momentum=0.9", "optim.weight_decay=0.01", "norm=gn"], ["model=net5c", "optim.lr=0.001"]]


def twin(cfg, trainer):
    """A network of the same weights."""
    net = build(cfg.model, "model")(num_classes=10)
    net.load_state_dict(trainer.net.state_dict())
    return net


def close(trainer, net, tolerance=1e-6):
    for name, value in net.state_dict().items():
        assert torch.allclose(value, trainer.net.state_dict()[name], atol=tolerance), name


@pytest.mark.parametrize("more", [*SETTINGS, ["dataset.padding=2", "dataset.flip=true"]])
def test_minimal_loop_takes_the_same_steps_as_the_suite(more):
    cfg = TINY.cfg("net2c", *more)
    trainer = make_trainer(cfg)
    net = twin(cfg, trainer)
    rng = generator(cfg.seed, "data", "cpu")  # the trainer's: the same epochs
    peer = peers.minimal_loop(net, trainer.bundle, trainer.bundle.order(rng, cfg.balanced).split(cfg.batch_size), rng, cfg)
    losses, sums = [], [0.0]
    for _, samples in zip(range(3), trainer.samples(), strict=False):
        trainer.take_step(*samples)
        sums.append(float(trainer.sums["ce"]))
        losses.append(float(next(peer)))
        if len(losses) == 1:  # later ones differ more: a pooled maximum that rounding moves sends its gradient elsewhere
            close(trainer, net)
    ours = torch.tensor(sums).double().diff()
    assert losses[0] != losses[1]
    assert torch.allclose(ours, torch.tensor(losses).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", SETTINGS)
def test_usual_loop_takes_the_same_steps_as_the_suite(more):
    cfg = TINY.cfg("net2c", *more, "balanced=false", "channels_last=false")  # its layout
    trainer = make_trainer(cfg)
    bundle = epochs.sized(cfg, trainer.bundle, 60)
    net = twin(cfg, trainer)
    mean, std = (value / 255 for value in peers.statistics(bundle))
    # To the bit as torchvision: digits have flat areas, of which rounding picks the pooled maximum.
    trainer.bundle = replace(bundle, prepare=lambda images: images.float().div(255).sub(mean).div(std))
    with contextlib.closing(peers.usual_loop(net, bundle, cfg, workers=0, shuffle=False)) as loop:
        losses = next(loop)
    sums = [0.0]
    for chosen in torch.arange(60).split(20):
        trainer.take_step(chosen)
        sums.append(float(trainer.sums["ce"]))
    ours = torch.tensor(sums).double().diff()
    assert len(losses) == 3
    assert losses[0] != losses[1]
    assert torch.allclose(ours, torch.tensor(losses).double(), atol=1e-5, rtol=1e-5)
    close(trainer, net)
    tested, accuracy = peers.usual_pass(trainer.net, peers.loader(bundle, cfg, "test", 100, 0, False), trainer.device)
    assert accuracy == pytest.approx(trainer.evaluate("test")["accuracy"])
    assert tested == [pytest.approx(trainer.evaluate("test")["ce"], abs=1e-4)]


def test_usual_loop_shuffles_and_sees_each_image_once():
    cfg = TINY.cfg("net2c")
    bundle = make_trainer(cfg).bundle
    epoch = [torch.cat([x for x, _ in peers.loader(bundle, cfg, "train", 20, 0, True)]) for _ in range(2)]
    whole = bundle.prepare(bundle.splits["train"][0])
    assert not torch.equal(epoch[0], epoch[1])
    for images in epoch:
        assert torch.allclose(images.flatten(1).sum(1).sort().values, whole.flatten(1).sum(1).sort().values, atol=1e-2)


def test_loader_crops_and_mirrors_training_images_alone():
    bundle = make_trainer(COLOUR.cfg("net2c", "dataset.padding=2")).bundle
    image = bundle.splits["train"][0][:1]
    bundle = replace(bundle, splits={"train": (image.repeat(400, 1, 1, 1), torch.zeros(400)), "test": bundle.splits["test"]})
    for padding, flip in ((2, True), (0, True), (2, False)):
        cfg = COLOUR.cfg("net2c", f"dataset.padding={padding}", f"dataset.flip={flip}")
        padded = nn.functional.pad(image, (padding,) * 4)
        offsets = itertools.product(range(2 * padding + 1), repeat=2)
        windows = [padded[:, :, top : top + 28, left : left + 28] for top, left in offsets]
        windows += [window.flip(3) for window in windows] * flip
        allowed = bundle.prepare(torch.cat(windows))
        batch = torch.cat([x for x, _ in peers.loader(bundle, cfg, "train", 100, 0, True)])
        distance = torch.cdist(batch.flatten(1), allowed.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")  # exact
        assert distance.min(1).values.max() < 0.01
        assert len(distance.argmin(1).unique()) > 0.9 * len(torch.cat(windows).unique(dim=0))
    test = torch.cat([x for x, _ in peers.loader(bundle, COLOUR.cfg("net2c"), "test", 100, 0, False)])
    assert torch.allclose(test, bundle.prepare(bundle.splits["test"][0]), atol=1e-5)


def test_workers_end_with_their_side():
    cfg = TINY.cfg("net2c")
    bundle = make_trainer(cfg).bundle
    before = {*multiprocessing.active_children()}  # joblib keeps those of another test
    loop = peers.loader_passes(bundle, cfg, workers=2)
    assert [next(loop), next(loop)] == [100, 100]
    assert len({*multiprocessing.active_children()} - before) == 2
    with pytest.raises(KeyboardInterrupt):
        loop.throw(KeyboardInterrupt)
    assert not {*multiprocessing.active_children()} - before


def test_usual_loop_ends_its_workers():
    cfg = TINY.cfg("net2c")
    before = {*multiprocessing.active_children()}
    side = epochs.usual(cfg, 40)
    side.step()
    assert len({*multiprocessing.active_children()} - before) == 4
    side.close()
    assert not {*multiprocessing.active_children()} - before


# Sides whose step is an epoch.


def test_both_sides_see_as_many_images(monkeypatch):
    cfg = COLOUR.cfg("net2c", *epochs.EPOCHS)
    bundle = epochs.sized(cfg, make_trainer(cfg).bundle, 90)
    x, y = bundle.splits["train"]
    assert (len(x), len(y), len(bundle.splits["test"][1])) == (90, 90, 18)
    assert torch.equal(x[:40], x[40:80])
    taken = bundle.take(torch.arange(40, 90), torch.Generator()).x
    assert (taken.shape, float(taken.abs().max()) < 5) == ((50, 3, 28, 28), True)  # the augmentation has them all, and normalises
    assert len(epochs.sized(cfg, bundle, None).splits["train"][1]) == 90

    seen = []
    monkeypatch.setattr(epochs.Trainer, "take_step", lambda self, chosen: seen.append(chosen) or self.sums.update(ce=torch.zeros(())))
    side = epochs.whole_suite(cfg, 90)
    side.step()
    side.close()
    assert [len(chosen) for chosen in seen] == [20, 20, 20, 20, 10]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(90))


def test_whole_suite_leaves_what_a_run_leaves(monkeypatch):
    recorded = []
    real = epochs.checkpoint

    def checkpoint(run, *given):
        real(run, *given)
        recorded.append((run, {file.name.split(".")[0] for file in run.path.iterdir()}, len(run.metrics())))

    monkeypatch.setattr(epochs, "checkpoint", checkpoint)
    side = epochs.whole_suite(TINY.cfg("net2c", *epochs.EPOCHS), 40)
    side.step()
    side.step()
    side.close()
    assert [(names, metrics) for _, names, metrics in recorded] == [
        ({"checkpoint", "progress", "metrics", "events"}, rows) for rows in (1, 2)
    ]
    assert not recorded[0][0].path.exists()


# How sides are timed.


@pytest.fixture
def clock(monkeypatch):
    """Time passes when a side says so."""
    now = [0.0]
    monkeypatch.setattr(sides.time, "perf_counter", lambda: now[0])
    return now


def timed(clock, name, seconds, log):
    def step():
        log.append(name)
        clock[0] += seconds

    return sides.Side(step, torch.device("cpu"), close=lambda: log.append(f"{name} closed"))


def test_sides_take_turns(clock):
    log: list[str] = []
    row = sides.compare("x", "a", "b", "lower", (timed(clock, "a", 0.4, log), timed(clock, "b", 0.1, log)), Asked(rounds=3))
    assert (row["ratio"], row["q1"], row["q3"], row["note"]) == (pytest.approx(4), pytest.approx(4), pytest.approx(4), "")
    assert (row["ms a"], row["ms b"]) == (pytest.approx(400), pytest.approx(100))
    rounds = [name for name, _ in itertools.groupby(log[4:])]
    assert log[:4] == ["a", "a", "b", "b"]  # warmed up, then tried
    assert rounds == ["b", "a", "b", "a", "a closed", "b closed"]  # b a, a b, b a
    assert (log[4:].count("a"), log[4:].count("b")) == (3, 15)  # half a second each, at least a step


def test_ratios_turn_round_and_scale(clock):
    pair = timed(clock, "a", 0.4, []), timed(clock, "b", 0.1, [])
    asked = Asked(rounds=2, steps=1)
    assert sides.compare("x", "a", "b", "higher", pair, asked, faster=True)["ratio"] == pytest.approx(0.25)
    assert sides.compare("x", "a", "b", "higher", pair, asked, faster=True, scale=8)["ratio"] == pytest.approx(2)


def test_sides_are_closed_whatever_happens(clock):
    log: list[str] = []
    pair = timed(clock, "a", 1, log), timed(clock, "b", 1, log)
    pair[1].step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sides.compare("x", "a", "b", "lower", pair, Asked())
    assert log[-2:] == ["a closed", "b closed"]


def test_what_scatters_is_marked():
    assert sides.spread([1.0, 1.02, 0.99])["note"] == ""
    row = sides.spread([1.0, 1.3, 0.8])
    assert row["note"] == "noisy"
    assert sides.noted(row, "more")["note"] == "noisy, more"
    assert sides.noted(sides.spread([1.0, 1.0]), "more")["note"] == "more"


def test_mmd_sides_compute_the_same():
    for size in (20, 7):  # 7: three classes are missing
        cfg = TINY.cfg("net2c", f"batch_size={size}")
        at_once, one_by_one = (sides.matching(cfg, loop).step() for loop in (False, True))
        assert torch.allclose(at_once, one_by_one, atol=1e-5)


def test_a_last_smaller_batch_is_left_out(monkeypatch):
    cfg = TINY.cfg("net2c", "dataset.train=50")
    trainer = make_trainer(cfg)
    seen: list[Tensor] = []
    monkeypatch.setattr(trainer, "take_step", seen.append)
    monkeypatch.setattr(sides, "make_trainer", lambda cfg: trainer)
    side = sides.suite(cfg)
    for _ in range(5):
        side.step()
    assert [len(chosen) for chosen in seen] == [20] * 5
