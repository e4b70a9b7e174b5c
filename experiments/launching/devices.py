"""Which GPU a run takes, and how many runs this machine trains at a time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from omegaconf import DictConfig

from experiments import store, timebox
from experiments.config import ConfigError

WAIT_SECONDS = 1.0
held: list[IO[bytes]] = []  # the places that this process has, until it ends


def cores() -> int:
    """The cores that this process may use; on a cluster those that its job was given."""
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    return int(given or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def uses_gpu(runtime: DictConfig) -> bool:
    """Whether a run with this `runtime` is trained on a GPU."""
    if runtime.device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()


def places(runtime: DictConfig) -> int:
    """How many runs `runtime` lets this machine train at a time."""
    return len(runtime.devices or [0]) * runtime.runs_per_device


def device(runtime: DictConfig, claim: bool = False) -> str:
    """The torch device of a run. Raises ConfigError on one that is not there.

    claim: of a GPU, wait for a free place, and keep it for as long as this process lives.
    """
    import torch

    wanted, count = runtime.device, torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not count and not runtime.devices):
        return "cpu"
    if not count:
        key = "devices" if runtime.devices else "device"
        raise ConfigError(f"runtime.{key}: {runtime[key]} was asked for, and torch finds no GPU; allowed here: auto, cpu")
    indices = list(runtime.devices or [int(wanted.partition(":")[2] or 0)])
    if unknown := [index for index in indices if index >= count]:
        raise ConfigError(f"runtime.devices: there is no GPU {unknown[0]}; allowed here: {', '.join(map(str, range(count)))}")
    index = indices[0]
    if claim:
        names = {one: str(torch.cuda.get_device_properties(one).uuid) for one in indices}
        index = take(names, runtime.runs_per_device, over=lambda: timebox.left(runtime) <= 0)
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def take(names: Mapping[int, str], runs_per_device: int, folder: Path | None = None, over: Callable[[], bool] = lambda: False) -> int:
    """Waits for a free place on the emptiest of these GPUs, and takes it for as long as this process lives.

    Raises TimeUp when none is free before the time is `over`.

    names: index -> a name of the GPU that is the same for every process: under SLURM each job's GPU has the index 0. A place is a file
    in this user's temporary folder that a process has locked, so that the place is free again however a run ends.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"retable-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    said = False
    while True:
        for place in range(runs_per_device):
            for index, name in names.items():
                if (handle := store.locked(folder / f"{name}.{place}")) is not None:
                    held.append(handle)
                    return index
        if over():
            raise timebox.TimeUp(f"no place on {_gpus(list(names))} became free")
        if not said:
            print(f"waiting for a place on {_gpus(list(names))} (runtime.runs_per_device={runs_per_device})", flush=True)
            said = True
        time.sleep(WAIT_SECONDS)


def _gpus(indices: Sequence[int]) -> str:
    return f"GPU{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
