"""Runs in processes of their own: a CUDA failure, a lack of memory or a kill ends one run, and the others go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

from omegaconf import DictConfig

from experiments import timebox
from experiments.cli import RunFailed
from experiments.identity import run_dir

# Imported once, in a process from which those of the runs are forked: seconds saved at each. It touches no GPU and starts no thread.
PRELOADED = ["experiments.trainer", "experiments.board", "experiments.provenance"]


def apart(task: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    """`task(cfg)` in a process of its own; raises what it raises. Raises RunFailed when the process is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, cfg, there))
    error: Exception | None
    try:
        process.start()
        there.close()
        with timebox.child(process):
            error = here.recv()
    except (EOFError, OSError):
        if timebox.terminated:  # the signal has killed it, or the process that starts it: no failure of the run
            raise timebox.TimeUp("ended by SIGTERM") from None
        if process.pid is None:
            raise
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        error = RunFailed(f"{run_dir(cfg)}: its process {how}; ask again and it goes on from its last checkpoint")
    except KeyboardInterrupt:
        if process.pid is not None:
            process.kill()
        raise
    process.join()
    if error is not None:
        raise error


def _run(task: Callable[[DictConfig], None], cfg: DictConfig, there: Connection) -> None:
    error: Exception | None = None
    with timebox.heeding_sigterm(), contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches all processes; the first of them says so
        try:
            task(cfg)
        except Exception as raised:
            error = raised
        with contextlib.suppress(BrokenPipeError):  # who asked was killed
            there.send(error)


def kill_all() -> None:
    """Kill the processes that this one has started by multiprocessing: those of `apart`."""
    for process in multiprocessing.active_children():
        process.kill()
