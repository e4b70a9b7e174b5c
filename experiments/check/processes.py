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
from typing import NamedTuple

from experiments.config import first_line

PRELOADED = ["experiments.board", "experiments.provenance", "experiments.check.training", "experiments.check.rates"]


class Result(NamedTuple):
    """ok: None where nothing is judged. figures: numbers by name, for check.json."""

    ok: bool | None
    text: str
    figures: dict[str, float]


Check = Callable[[str, str], Result]  # (case, device) -> result


def context() -> ForkServerContext:
    """The fork-server context. The first call starts the server, which imports PRELOADED in the background."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process alone, which ends the others
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return found


def time_left(until: float) -> bool:
    return time.monotonic() < until


def results(check: Check, cases: Sequence[str], device: str, until: float) -> Iterator[tuple[str, Result | None]]:
    """Yield (case, result) in order; the result is None for a case that had not ended at `until` (of time.monotonic()).

    The cases run in one child process. After a crash, and on a GPU after any failure (the CUDA context may be unusable), the next case
    gets a new process.
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
            if code := process.exitcode:  # the process ended before it sent a result
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                yield left.pop(0), Result(False, how, {})
        finally:
            process.terminate()
            process.join()
            here.close()
    for case in left:
        yield case, None


def tried(check: Check, case: str, device: str) -> Result:
    """The check's result; an exception becomes a failed result."""
    try:
        return check(case, device)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Result(False, f"{type(error).__name__}: {first_line(error)} ({place.filename}:{place.lineno})", {})


def _work(check: Check, cases: Sequence[str], device: str, there: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing of what the small runs print
    for case in cases:
        result = tried(check, case, device)
        there.send(result)
        if result.ok is False and device != "cpu":
            return
