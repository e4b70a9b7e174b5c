"""How fast a device is: what a launch, a convolution and a recurrent layer cost, and the step of a network that the papers use."""

from __future__ import annotations

import torch

from experiments.bench.configs import composed
from experiments.bench.gpu import LAUNCHES, launches, lstm, recorded
from experiments.bench.sides import Side, convolution, suite
from experiments.check.processes import Result

FORMATS = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
STREAMS = (1, 4, 16)


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
        side, gflop = convolution(batch, 128, 32, place, *FORMATS[rest])
        flops = 1e9 * gflop / fastest(side)
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
