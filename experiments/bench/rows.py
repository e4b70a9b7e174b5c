"""Which rows each part of the table has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from experiments.bench import counts, gpu, language, methods, norms, puzzle
from experiments.bench.configs import Asked, on_gpu, title
from experiments.bench.epochs import EPOCHS, in_turn, loaded, resident, side_by_side, sized, usual, whole_suite
from experiments.bench.sides import Row, compare, convolution, noted, peer, suite
from experiments.bench.start import start_rows
from experiments.train import make_trainer

# The targets are for two CPU cores; a model without one is better off higher, or lower.
END_GOOD = {"net2c": ">= 3.3", "net5c": ">= 2.2", "resnet18": ">= 1.9"}
END_IMAGES = {"net2c": 6000, "net5c": 600}  # of an epoch, so that it takes seconds; 384 for a model that is not here
USE_GOOD = {"net5c": ">= 0.75", "resnet18": ">= 0.8"}
INPUT_IMAGES = 10_000  # far more than what a core's caches hold
# [batch, channels, size, size] of the convolutions whose best rate stands for what the machine can do
SHAPES = ((64, 64, 32), (64, 128, 16), (64, 256, 8), (64, 256, 16), (150, 128, 28), (150, 256, 14))


def end_rows(asked: Asked) -> Iterator[Row]:
    """The whole suite, epoch by epoch, over the usual loop: by default for speed, and with the usual precision."""
    for model in asked.models("net2c", "net5c", "resnet18"):
        train = None if asked.given("dataset.train") else END_IMAGES.get(model, 384)
        for precision in ("bf16", "fp32"):
            cfg = asked.cfg(model, *EPOCHS, f"precision={precision}")
            exact = asked.cfg(model, *EPOCHS, "precision=fp32")
            good = END_GOOD.get(model, "higher") if precision == "bf16" else "higher"
            what = f"{title(model, exact)} {precision}, suite"
            yield compare("C1", what, "usual loop, fp32", good, (whole_suite(cfg, train), usual(exact, train)), asked, faster=True)


def use_rows(asked: Asked) -> Iterator[Row]:
    """A training step's rate over that of the fastest convolution: how much of the machine is used."""
    models = asked.models("resnet18", "net5c", "net2c")
    device = make_trainer(asked.cfg(models[0])).device  # which also sets the number of threads
    sides = [convolution(*shape, device) for shape in SHAPES]
    rates = []
    for side, gflop in sides:
        side.seconds(2)
        rates.append(gflop / min(side.seconds(3) for _ in range(3)))
    best, best_gflop = sides[rates.index(max(rates))]
    batch, channels, size = SHAPES[rates.index(max(rates))]
    for model in models:
        cfg = asked.cfg(model, "precision=bf16")
        bundle = make_trainer(cfg).bundle
        shape = (cfg.batch_size, *bundle.splits["train"][0].shape[1:])
        gflop = 3 * counts.forward_gflop(cfg, shape, bundle.num_classes)
        over = f"conv {channels}x{size}x{size} b{batch}"
        row = compare(
            *("C2", f"{title(model, cfg)}, GFLOP/s", over, USE_GOOD.get(model, "higher"), (suite(cfg), best), asked),
            faster=True,
            scale=gflop / best_gflop,
        )
        yield noted(row, f"{1000 * gflop / row['ms a']:.0f} / {1000 * best_gflop / row['ms b']:.0f}")


def input_rows(asked: Asked) -> Iterator[Row]:
    """Augmented, normalised images per second."""
    (model,) = asked.models("resnet18")
    cfg = asked.cfg(model, *([] if asked.given("batch_size") else ["batch_size=128"]))
    bundle = sized(cfg, make_trainer(cfg).bundle, None if asked.given("dataset.train") else INPUT_IMAGES)
    count = len(bundle.splits["train"][1])
    for workers, good in ((0, "higher"), (2, ">= 12")):
        over = f"{workers}-worker DataLoader"
        sides = resident(cfg, bundle), loaded(cfg, bundle, workers)
        row = compare("C3", f"batches of {cfg.batch_size}, images/s", over, good, sides, asked, faster=True)
        yield noted(row, " / ".join(f"{count / row[f'ms {letter}']:.1f}k" for letter in "ab"))


def step_rows(asked: Asked) -> Iterator[Row]:
    """What the suite's structure costs."""
    for model in asked.models("net5c", "resnet18"):
        cfg = asked.cfg(model)
        yield compare("b", f"{title(model, cfg)}, suite", "minimal loop", "<= 1.03", (suite(cfg), peer(cfg)), asked)


def precision_rows(asked: Asked) -> Iterator[Row]:
    """Number formats and memory layouts; NHWC is channels_last."""
    for model in asked.models("resnet18", "net5c"):
        nhwc, nchw = "channels_last=true", "channels_last=false"
        pairs: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = [
            ("bf16 NHWC", "fp32 NCHW", ("precision=bf16", nhwc), ("precision=fp32", nchw)),
            ("bf16 NHWC", "fp32 NHWC", ("precision=bf16", nhwc), ("precision=fp32", nhwc)),
            ("fp32 NHWC", "fp32 NCHW", ("precision=fp32", nhwc), ("precision=fp32", nchw)),
        ]
        if on_gpu(asked.cfg(model)):
            pairs.append(("tf32 NHWC", "fp32 NHWC", ("precision=tf32", nhwc), ("precision=fp32", nhwc)))
            pairs.append(("graph, bf16", "eager, bf16", ("precision=bf16", "step=graph"), ("precision=bf16",)))
        for what, over, a, b in pairs:
            cfgs = asked.cfg(model, *a), asked.cfg(model, *b)
            what = f"{model} b{cfgs[0].batch_size}, {what}"
            yield compare("d", what, over, "lower", (suite(cfgs[0]), suite(cfgs[1])), asked)


def compile_rows(asked: Asked) -> Iterator[Row]:
    """torch.compile, which takes a minute and needs a C++ compiler."""
    for model in asked.models("resnet18"):
        for precision in ("bf16", "fp32"):
            on, off = (asked.cfg(model, f"precision={precision}", f"compile={value}") for value in ("true", "false"))
            yield compare("d", f"{title(model, on)}, compiled", "not compiled", "lower", (suite(on), suite(off)), asked)


def sweep_rows(asked: Asked) -> Iterator[Row]:
    """Two short runs, one thread each, over the same two with all threads each."""
    for model in asked.models("net2c", "net5c"):
        few = [] if asked.given("dataset.train") else [f"dataset.train={1500 if model == 'net2c' else 300}", "profile.test=100"]
        cfg = asked.cfg(model, *EPOCHS, *few, "precision=bf16")
        what = f"{title(model, cfg)}, 2 at once"
        yield compare("C11", what, "in turn", ">= 1.1", (side_by_side(cfg), in_turn(cfg)), asked, faster=True)


PARTS: dict[str, Callable[[Asked], Iterator[Row]]] = {
    "end": end_rows,
    "use": use_rows,
    "input": input_rows,
    "step": step_rows,
    "methods": methods.method_rows,
    "text": language.text_rows,
    "norms": norms.norm_rows,
    "puzzle": puzzle.puzzle_rows,
    "precision": precision_rows,
    "compile": compile_rows,
    "counts": methods.count_rows,
    "start": start_rows,
    "sweep": sweep_rows,
    "gpu": gpu.gpu_rows,
}


def chosen(parts: list[str], with_gpu: bool) -> list[str]:
    """The parts that are measured: those named, or all that suit the device."""
    return parts or [part for part in PARTS if with_gpu or part not in ("compile", "gpu")]
