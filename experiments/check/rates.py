"""How fast a device is: what a launch, a convolution and a recurrent layer cost, and the step of a network that the papers use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from experiments.bench.measure import Side, suite
from experiments.check.processes import Result
from experiments.compose import composed
from experiments.graph import aside, record

FORMATS = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
STREAMS = (1, 4, 16)
LAUNCHES = 1000


def fastest(side: Side, rounds: int = 3, least: float = 0.1) -> float:
    """Seconds of a step of a side, the least of a few rounds of at least so many seconds."""
    side.seconds(side.warm)
    steps = max(1, min(1000, round(least / max(side.seconds(1), 1e-6))))
    return min(side.seconds(steps) for _ in range(rounds))


def cases(device: str) -> list[str]:
    """What is measured."""
    on_gpu = device != "cpu"
    formats = [name for name in FORMATS if on_gpu or name != "tf32"]
    first = ["launches", *(["replays", "streams"] if on_gpu else []), *(f"convolution {name}" for name in formats)]
    steps = [f"ResNet-18 {name} {step}" for name in ("fp32", "bf16") for step in ("eager", *(["graph"] if on_gpu else []))]
    return [*first, "lstm fp32", "lstm bf16", *steps]


def rate(case: str, device: str) -> Result:
    """One of them, as a line and as a figure."""
    what, _, rest = case.partition(" ")
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # streams and graphs are made on the current one
    if what in ("launches", "replays"):
        small = launches(place)
        each = fastest(recorded(small) if what == "replays" else small) / LAUNCHES
        return Result(None, f"{1e6 * each:.2f} us for each of {LAUNCHES} small operations", {"seconds": each})
    if what == "streams":
        return streams(place)
    if what == "convolution":
        batch = 150 if device != "cpu" else 16
        flops = 1e9 * gflop(batch, 128, 32) / fastest(convolution(batch, 128, 32, place, *FORMATS[rest]))
        return Result(None, f"{flops / 1e9:,.0f} GFLOP/s, 3x3, 128 channels, 32x32, batch {batch}", {"flops": flops})
    if what == "lstm":
        seconds = fastest(lstm(FORMATS[rest][0], place))
        return Result(None, f"{1e3 * seconds:.2f} ms forward and backward: two layers of 650, 35 words, batch 20", {"seconds": seconds})
    precision, step = rest.split()
    batch = 128 if device != "cpu" else 32
    words = ["experiment=itdm_color", "dataset=cifar10", "dataset.source=embedded", "model=resnet18", "balanced=false", "optim.lr=0.01"]
    cfg = composed([*words, f"batch_size={batch}", f"precision={precision}", f"step={step}", f"runtime.device={device}"])
    images = batch / fastest(suite(cfg), rounds=1 if device == "cpu" else 3, least=0.5)
    return Result(None, f"{images:,.0f} images/s trained, batch {batch}", {"images": images})


def streams(device: torch.device) -> Result:
    """Small kernels a second, replayed from CUDA graphs on 1, 4 and 16 streams at once."""
    found = {}
    for count in STREAMS:
        pairs = [(torch.cuda.Stream(), recorded(launches(device))) for _ in range(count)]

        def step(pairs: list[tuple[torch.cuda.Stream, Side]] = pairs) -> None:
            for stream, side in pairs:
                with torch.cuda.stream(stream):
                    side.step()

        found[f"{count} streams"] = count * LAUNCHES / fastest(Side(step, device))
    text = ", ".join(f"{value / 1e6:.2f} M/s on {name}" for name, value in found.items())
    return Result(None, f"small kernels: {text}", found)


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


def convolution(
    batch: int, channels: int, size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, tf32: bool = False
) -> Side:
    """A 3x3 convolution on [batch, channels, size, size], channels_last, as many channels out."""
    options = {"dtype": dtype, "device": device}
    x = torch.randn(batch, channels, size, size, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = torch.randn(channels, channels, 3, 3, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Side(torch.no_grad()(lambda: nn.functional.conv2d(x, weight, padding=1)), device, tf32)


def gflop(batch: int, channels: int, size: int) -> float:
    """The products and sums of such a convolution, in 1e9."""
    return 2 * 9 * batch * channels**2 * size**2 / 1e9


def lstm(dtype: torch.dtype, device: torch.device) -> Side:
    """Forward and backward of the language models' two layers: 35 words, 20 rows."""
    net = nn.LSTM(650, 650, 2, device=device, dtype=dtype)
    x = torch.randn(35, 20, 650, device=device, dtype=dtype, requires_grad=True)
    return Side(lambda: net(x)[0].sum().backward(), device)
