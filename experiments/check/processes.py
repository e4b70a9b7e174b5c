"""Checks in a process of their own: what ends it (a failed GPU, a kill, the end of the time) ends one case, not the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from experiments.check.training import Result

PRELOADED = ["experiments.trainer", "experiments.check.training", "experiments.check.rates"]
Check = Callable[[str, str], Result]


def results(check: Check, cases: Sequence[str], device: str, until: float) -> Iterator[tuple[str, Result | None]]:
    """Each case with its result, in order; None for those that were not reached at `until`, a time of time.monotonic().

    A case that fails on a GPU may have spoiled it for the process, so the next has a new one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    left = list(cases)
    while left and time.monotonic() < until:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(check, left, device, there))
        process.start()
        there.close()
        try:
            while left and here.poll(max(0.0, until - time.monotonic())):
                result = here.recv()
                yield left.pop(0), result
        except EOFError:
            process.join()
            if process.exitcode:  # without a word
                code = process.exitcode
                yield left.pop(0), Result(False, f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}", {})
        finally:
            process.terminate()
            process.join()
            here.close()
    for case in left:
        yield case, None


def _work(check: Check, cases: Sequence[str], device: str, there: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # of what the small runs say
    for case in cases:
        try:
            there.send(check(case, device))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''} ({place.filename}:{place.lineno})"
            there.send(Result(False, text, {}))
            if device != "cpu":
                return
