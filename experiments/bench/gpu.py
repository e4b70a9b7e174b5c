"""What only a GPU shows: launch costs, the rates of its kernels, and what recording the step as a CUDA graph brings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from experiments.bench.configs import Asked, on_gpu, title
from experiments.bench.counts import forward_gflop
from experiments.bench.sides import Row, Side, compare, convolution, noted, suite
from experiments.graph import aside, record
from experiments.train import make_trainer

# Dense bf16 in TFLOP/s that a large product reaches; an assumption, said beside every share of it.
PEAKS = {"H200": 790, "H100": 790, "A100": 312}
LAUNCHES = 1000
# Sizes of what is timed.
PRODUCT, BATCH, CHANNELS = 8192, 150, (16, 64, 256, 512)
UNITS, LENGTH, SEQUENCES = 650, 35, 20  # the language models' LSTM
NETS = ("mobilenet", "resnet18", "vgg13", "net5c", "net2c")


def gpu_rows(asked: Asked) -> Iterator[Row]:
    """Nothing without a GPU."""
    if on_gpu(asked.cfg(asked.models("net5c")[0])):
        device = torch.device("cuda")
        peak = assumed_peak(torch.cuda.get_device_name(device))
        yield from kernels(asked, device, peak)
        yield from networks(asked, peak)


def kernels(asked: Asked, device: torch.device, peak: int | None) -> Iterator[Row]:
    """What every estimate of a step's time starts from."""
    small = launches(device)
    row = compare("G0", f"{LAUNCHES} small operations, graph", "eager", "lower", (recorded(small), small), asked)
    yield noted(row, f"us each: {1000 * row['ms a'] / LAUNCHES:.1f} / {1000 * row['ms b'] / LAUNCHES:.1f}")
    product, product_gflop = matrices(PRODUCT, device)
    for channels in CHANNELS:
        side, gflop = convolution(BATCH, channels, 32, device)
        row = compare(
            *("G0", f"conv {channels}, 32x32, b{BATCH}", f"product {PRODUCT}, bf16", "higher", (side, product), asked),
            faster=True,
            scale=gflop / product_gflop,
        )
        yield noted(row, rate(gflop, row["ms a"], peak))
    sides = lstm(torch.bfloat16, device), lstm(torch.float32, device)
    yield compare("G0", f"LSTM 2x{UNITS}, T{LENGTH}, b{SEQUENCES}, bf16", "fp32", "lower", sides, asked)


def networks(asked: Asked, peak: int | None) -> Iterator[Row]:
    """The step recorded as a graph over the eager one, small networks and large."""
    for model in asked.models(*NETS):
        words = [*([] if asked.given("batch_size") else ["batch_size=150"]), "precision=bf16", "balanced=false"]  # no host read per epoch
        cfg, eager = (asked.cfg(model, *words, f"step={step}") for step in ("graph", "eager"))
        row = compare("G2", f"{title(model, cfg)}, graph", "eager", "lower", (suite(cfg), suite(eager)), asked)
        bundle = make_trainer(eager).bundle
        gflop = 3 * forward_gflop(cfg, (cfg.batch_size, *bundle.splits["train"][0].shape[1:]), bundle.num_classes)
        yield noted(row, f"{cfg.batch_size / row['ms a']:.0f}k/s, {rate(gflop, row['ms a'], peak)}")


def assumed_peak(name: str) -> int | None:
    """TFLOP/s in bf16 of the GPU of this name, if it is known."""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def rate(gflop: float, ms: float, peak: int | None) -> str:
    """Of this work in this time, with its share of the assumed peak."""
    tflops = gflop / ms
    return f"{tflops:.0f} TFLOP/s, " + (f"{tflops / peak:.0%} of {peak}" if peak else "peak unknown")


def launches(device: torch.device) -> Side:
    """Many operations on one number."""
    number = torch.zeros(1, device=device)

    def step() -> None:
        for _ in range(LAUNCHES):
            number.add_(1)

    return Side(step, device)


def recorded(side: Side) -> Side:
    """The same side, replayed from a CUDA graph."""

    def work() -> None:
        side.step()

    @functools.cache
    def replay() -> Callable[[], None]:
        aside(work)
        return record(work, []).replay

    return Side(lambda: replay()(), side.device)


def matrices(size: int, device: torch.device) -> tuple[Side, float]:
    """A bf16 product of two square matrices, and its GFLOP."""
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return Side(lambda: x @ x, device), 2 * size**3 / 1e9


def lstm(dtype: torch.dtype, device: torch.device) -> Side:
    """Forward and backward of two layers."""
    net = nn.LSTM(UNITS, UNITS, 2, device=device, dtype=dtype)
    x = torch.randn(LENGTH, SEQUENCES, UNITS, device=device, dtype=dtype, requires_grad=True)
    return Side(lambda: net(x)[0].sum().backward(), device)
