"""What the methods cost: the time of a step with each, and what it sends to the device and keeps."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.bench import counts
from experiments.bench.configs import VARIANTS, Asked, on_gpu, title
from experiments.bench.sides import Row, compare, matching, optimizer, peer, suite

# What the second paper measures, on its own network: PER in its forms, and what it is held against.
IDS = {"per": "C4", "per analytic": "C4", "per toeplitz": "C4"} | dict.fromkeys(("vcl", "l1", "l2", "bn"), "C7")
TIME_GOOD = {"itdm_c": "<= 2.05", "itdm_j": "<= 2.05", "per": "<= 2.5", "per analytic": "<= 1.10", "per toeplitz": "<= 1.6"}
TIME_GOOD |= {"vcl": "<= 1.15", "l1": "<= 1.10", "l2": "<= 1.10"}
# What the fourth paper mixes, on its network: one batch a step, and a layer more at most.
MIXING = ("mixup", "cutmix", "lamix", "label_smoothing")
TIME_GOOD |= dict.fromkeys(MIXING, "<= 1.03")
CALLS_GOOD = {"suite": "a <= 190", "itdm_c": "a <= 520"}  # of resnet18
# Nothing but the activations that the penalty reads, of which autograd keeps nearly all anyway, and a few numbers for the log.
KEPT_GOOD = dict.fromkeys(("per", "per analytic", "per toeplitz", "l1", "l2"), "<= 1.03")


def method_rows(asked: Asked) -> Iterator[Row]:
    """What each method costs, and what ITDM-c's MMD would cost in a loop."""
    models = asked.models("net5c", "cnn11")
    pairs = [(models[0], name) for name in asked.methods]
    pairs += [(model, name) for model in models[1:] for name in asked.methods if name in IDS]
    if not asked.given("model"):
        rest = [("resnet18", "itdm_c"), *(("preact_resnet18", name) for name in MIXING)]
        pairs += [(model, name) for model, name in rest if name in asked.methods]
    for model, name in pairs:
        cfg, plain = asked.method(model, name), asked.without(model, name)
        what, over = f"{title(model, cfg)}, {name}", "no norm" if name == "bn" else "vanilla"
        yield compare(IDS.get(name, "C5"), what, over, TIME_GOOD.get(name, "lower"), (suite(cfg), suite(plain)), asked)
    cfg = asked.cfg(models[0])
    sides = matching(cfg, loop=False), matching(cfg, loop=True)
    yield compare("C5", "MMD at once", "class by class", "lower", sides, asked)


def count_rows(asked: Asked) -> Iterator[Row]:
    """What predicts a GPU's step without one: operations, host reads, memory."""
    small = [] if asked.given("batch_size") else ["batch_size=20"]  # calls, and bytes per image, are those of any batch
    for model in asked.models("resnet18", "cnn11"):
        yield from (over_vanilla if model == "cnn11" else over_loop)(asked, model, small)


def over_loop(asked: Asked, model: str, small: list[str]) -> Iterator[Row]:
    """Of the suite, and of each method, over the minimal loop."""
    cfg = asked.cfg(model, *small)
    target = CALLS_GOOD if model == "resnet18" else {}
    sides = {"suite": suite(cfg)}
    for name in asked.methods:
        if name not in VARIANTS:
            sides[name] = suite(asked.method(model, name, *small))
    loop = peer(cfg)
    for name, side in sides.items():
        yield counts.calls_row(f"{model}, {name}", "minimal loop", target.get(name, "lower"), (side, loop))
    yield counts.calls_row(f"{model}, optimizer", "minimal loop", "a <= 6", (optimizer(cfg), loop))
    yield counts.calls_row("MMD at once", "class by class", "lower", (matching(cfg, loop=False), matching(cfg, loop=True)))
    for name, side in sides.items():
        good = "<= 1.1" if name == "suite" else "lower"
        yield counts.kept_row(f"{model}, {name}", "minimal loop", good, (side, loop), cfg.batch_size)
        if on_gpu(cfg):
            yield counts.peak_row(f"{model}, {name}", "minimal loop", "lower", (side, loop))


def over_vanilla(asked: Asked, model: str, small: list[str]) -> Iterator[Row]:
    """Of PER and what it is held against, over the suite's own step without: what they add. Its data are not the minimal loop's."""
    plain = suite(asked.cfg(model, *small))
    for name in [name for name in asked.methods if name in IDS and name != "bn"]:
        cfg = asked.method(model, name, *small)
        side = suite(cfg)
        yield counts.calls_row(f"{model}, {name}", "vanilla", "lower", (side, plain))
        yield counts.kept_row(f"{model}, {name}", "vanilla", KEPT_GOOD.get(name, "lower"), (side, plain), cfg.batch_size)
