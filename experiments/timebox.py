"""A command's time box: it ends `runtime.time_limit` seconds after the command began, or at SIGTERM.

Runs that are not expected to end in time are not started, and a run in progress ends at its next checkpoint. Nothing is lost: the same
command, run again, goes on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from omegaconf import DictConfig

BEGAN = "RETABLE_BEGAN"  # environment variable: when the command began, in seconds since 1970; the processes that it starts inherit it
terminated = False  # whether SIGTERM has arrived
children: list[BaseProcess | subprocess.Popen[str]] = []  # processes that SIGTERM is forwarded to


class TimeUp(RuntimeError):
    """A run that was not started, or that ended at a checkpoint, for lack of time."""


def left(runtime: DictConfig) -> float:
    """Seconds until the box ends: infinite without a limit, 0 after SIGTERM."""
    if terminated:
        return 0.0
    if runtime.time_limit is None:
        return math.inf
    return float(os.environ.get(BEGAN, time.time())) + float(runtime.time_limit) - time.time()


def check(runtime: DictConfig) -> None:
    """Raises TimeUp after the box's end."""
    if left(runtime) <= 0:
        raise TimeUp("not started")


def given(runtime: DictConfig) -> bool:
    """Whether there is a box: a limit, or a SIGTERM that has arrived."""
    return terminated or runtime.time_limit is not None


@contextlib.contextmanager
def began_now() -> Iterator[None]:
    """Set the command's start time, unless a parent process has set it."""
    if re.fullmatch(r"\d+(\.\d+)?", os.environ.get(BEGAN, "")):
        yield
        return
    os.environ[BEGAN] = repr(time.time())
    try:
        yield
    finally:
        del os.environ[BEGAN]


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Inside this context SIGTERM ends the time box, not the process, and is forwarded to `children`."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(*_: Any) -> None:
    global terminated
    first, terminated = not terminated, True
    for child in [*children]:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            child.terminate()
    if first and multiprocessing.parent_process() is None:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, b"retable: SIGTERM; runs in progress end at their next checkpoint\n")  # print is not safe in a signal handler


@contextlib.contextmanager
def child(process: BaseProcess | subprocess.Popen[str]) -> Iterator[None]:
    """Inside this context SIGTERM is forwarded to the process, which has just been started."""
    children.append(process)
    if terminated:
        process.terminate()
    try:
        yield
    finally:
        children.remove(process)
