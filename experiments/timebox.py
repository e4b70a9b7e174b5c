"""A command's time box: it ends `runtime.time_limit` seconds after the command began, or at SIGTERM.

No run is started that will not fit into what is left, and a run in progress ends at its next checkpoint. Nothing is lost: asked again,
the command goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from omegaconf import DictConfig

BEGAN = "RETABLE_BEGAN"  # environment variable: when the command began, in seconds since 1970; the processes that it starts inherit it
imported = time.time()
terminated = False  # whether SIGTERM has arrived
children: list[BaseProcess | subprocess.Popen[str]] = []  # processes that SIGTERM is handed on to


class TimeUp(RuntimeError):
    """A run that was not started, or that ended at a checkpoint, for lack of time."""


def left(runtime: DictConfig) -> float:
    """Seconds until the box ends: infinite without a limit, 0 after SIGTERM."""
    if terminated:
        return 0.0
    if runtime.time_limit is None:
        return math.inf
    return float(os.environ.get(BEGAN, imported)) + float(runtime.time_limit) - time.time()


def given(runtime: DictConfig) -> bool:
    """Whether there is a box: a limit, or a SIGTERM that has arrived."""
    return terminated or runtime.time_limit is not None


@contextlib.contextmanager
def began_now() -> Iterator[None]:
    """The command begins here, unless the process that started it has begun one already."""
    if BEGAN in os.environ:
        yield
        return
    os.environ[BEGAN] = repr(time.time())
    try:
        yield
    finally:
        del os.environ[BEGAN]


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[None]:
    """In here SIGTERM ends the box in place of the process, and those of `children` too."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(*_: Any) -> None:
    global terminated
    if not terminated:
        os.write(2, b"retable: SIGTERM; what runs ends at its next checkpoint\n")  # print is not safe in a signal handler
    terminated = True
    for child in [*children]:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            child.terminate()


@contextlib.contextmanager
def child(process: BaseProcess | subprocess.Popen[str]) -> Iterator[None]:
    """While this process, which has just been started, runs, SIGTERM is handed on to it."""
    children.append(process)
    if terminated:
        process.terminate()
    try:
        yield
    finally:
        children.remove(process)
