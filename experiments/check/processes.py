"""Checks in a process of their own: what ends it (a failed GPU, a kill, the end of the time) ends one case, not the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING

from experiments.config import first_line

if TYPE_CHECKING:
    from experiments.check.training import Result

PRELOADED = ["experiments.board", "experiments.provenance", "experiments.check.training", "experiments.check.rates"]
Check = Callable[[str, str], "Result"]


def context() -> ForkServerContext:
    """Starts, at its first call, the process from which those of the checks are forked, and which imports what they need meanwhile."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return found


def time_left(until: float) -> bool:
    return time.monotonic() < until


def results(check: Check, cases: Sequence[str], device: str, until: float) -> Iterator[tuple[str, Result | None]]:
    """Each case with its result, in order; None for those that were not reached at `until`, a time of time.monotonic().

    A case that fails on a GPU may have spoiled it for the process, so the next has a new one.
    """
    left = list(cases)
    while left and time_left(until):
        here, there = context().Pipe(duplex=False)
        process = context().Process(target=_work, args=(check, left, device, there))
        process.start()
        there.close()
        try:
            while left and here.poll(max(0.0, until - time.monotonic())):
                result = here.recv()
                yield left.pop(0), result
        except EOFError:
            process.join()
            if code := process.exitcode:  # without a word
                yield left.pop(0), failed(f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")
        finally:
            process.terminate()
            process.join()
            here.close()
    for case in left:
        yield case, None


def tried(check: Check, case: str, device: str) -> Result:
    """The check's result, or what it raised as one."""
    try:
        return check(case, device)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return failed(f"{type(error).__name__}: {first_line(error)} ({place.filename}:{place.lineno})")


def failed(text: str) -> Result:
    from experiments.check.training import Result

    return Result(False, text, {})


def _work(check: Check, cases: Sequence[str], device: str, there: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing of what the small runs print
    for case in cases:
        result = tried(check, case, device)
        there.send(result)
        if result.ok is False and device != "cpu":
            return
