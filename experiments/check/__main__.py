"""The check's command line: its parts, one after the other.   python -m experiments.check --help"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import store
from experiments.check.processes import Check, context, results
from experiments.cli import BAD_INPUT, one_line, stop
from experiments.config import ConfigError, first_line

if TYPE_CHECKING:
    from experiments.check.papers import Counted
    from experiments.check.report import Line

USAGE = """python -m experiments.check [PART...] [budget=120] [device=auto] [out=runs/check.json]

Checks that this machine trains correctly, measures its speed, and estimates the hours of the papers' tables on it. Every method is
trained for a few steps on data that comes with the suite; nothing is downloaded.

fp32     updates as a reference has them        side     two runs side by side: the numbers that each has alone
bf16     it learns in bf16                      memory   a run beside one that runs out of memory (GPU)
graph    step=graph is the eager step (GPU)     rates    launches, convolutions, recurrent layers, ResNet-18
last     an epoch's smaller last batch          papers   the hours of each paper's tables (measures rates too)
resume   a run resumes to the same bits

Without a PART: all, in this order, until `budget` seconds have passed; what comes before the rates has three quarters of them. A check
that fails stops no other. Each result is a line on stderr; the table at the end has a line for each part, failed check, rate and paper.
All figures are written to `out`.
device: as runtime.device, auto, cpu, cuda or cuda:N.
Exit code: 0 when no check failed, 1 when one failed or none was reached, 2 for bad input, 130 after Ctrl-C."""
CHECKS_SHARE = 0.75  # of the budget, for what comes before the rates
LONGEST = 24 * 3600
PARTS = ("fp32", "bf16", "graph", "last", "resume", "side", "memory", "rates", "papers")


class Part(NamedTuple):
    """A check, and its cases on a device. gpu: it needs a GPU."""

    title: str
    check: Check
    cases: Callable[[str], list[str]]
    gpu: bool = False


def parts() -> dict[str, Part]:
    """Those of PARTS that have cases. Imports torch."""
    from experiments.check import rates, training

    def alone(device: str) -> list[str]:
        return ["vanilla"]

    return {
        "fp32": Part("fp32 as the reference", training.fp32_as_on_the_cpu, training.cases),
        "bf16": Part("bf16 learns", training.learns_in_bf16, training.cases),
        "graph": Part("step=graph is eager", training.graph_is_eager, training.cases, gpu=True),
        "last": Part("smaller last batch", training.last_batch, training.cases),
        "resume": Part("resumes to the same bits", training.resumes, training.cases),
        "side": Part("two runs side by side", training.side_by_side, alone),
        "memory": Part("out of memory in another", training.out_of_memory, alone, gpu=True),
        "rates": Part("rates", rates.rate, rates.cases),
    }


def check(arguments: Sequence[str]) -> bool:
    """Run the parts, print the table and write the file, after Ctrl-C with what there is. Returns whether nothing failed.

    Raises ConfigError for bad input.
    """
    asked, budget, wanted, out = split(arguments)
    began = time.monotonic()
    until = began + budget
    context()  # imports what the checks need, while this process does
    device = place(wanted)

    from experiments.check import papers, report

    about = report.machine(device) | {"budget": budget}
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
    lines: list[Line] = []
    hours: list[dict[str, Any]] = []
    try:
        with context().Pool(1) as pool:
            counting = pool.apply_async(papers.counted, (until,)) if "papers" in asked else None
            for name, part in parts().items():
                if name not in asked and not (name == "rates" and counting):
                    continue
                if part.gpu and device == "cpu":
                    lines.append(report.Line(part.title, "", None, "needs a GPU"))
                    continue
                if name == "rates" and counting:
                    counting.wait(until - time.monotonic())  # nothing else may run while a rate is measured
                run(part, device, until if name == "rates" else began + CHECKS_SHARE * budget, lines)
            if counting:
                hours = estimates(lines, counting)
    finally:
        print(report.table(lines, hours, {part.title: (part.check.__doc__ or "").split("\n")[0] for part in parts().values()}))
        with store.written(out) as file:
            content = {"machine": about, "checks": [each._asdict() for each in lines], "papers": hours}
            file.write(json.dumps(content, indent=1).encode())
        judged = [each.ok for each in lines if each.ok is not None]
        failed, late = judged.count(False), sum(each.text == report.LATE for each in lines)
        said = f"{failed} of {len(judged)} checks FAILED" if failed else f"{len(judged)} checks passed"
        print(said + (f", {late} not reached in {budget} s (budget=...)" if late else ""), f"all figures: {out}", sep="; ")
    return not failed and not (late and not judged)


def split(arguments: Sequence[str]) -> tuple[list[str], int, str, Path]:
    """The parts that are asked for, the budget, the device and the file. Raises ConfigError for bad ones."""
    options = {"budget": "120", "device": "auto", "out": "runs/check.json"}
    for name, _, value in (word.partition("=") for word in arguments if "=" in word):
        if name not in options:
            raise ConfigError(f"{name}: there is no such key; allowed: {', '.join(options)}")
        options[name] = value
    if not options["budget"].isdecimal() or not 1 <= int(options["budget"]) <= LONGEST:
        raise ConfigError(f"budget: {options['budget']} is not allowed; it must be a whole number of seconds from 1 to {LONGEST}")
    asked, out = [word for word in arguments if "=" not in word], Path(options["out"])
    if unknown := [word for word in asked if word not in PARTS]:
        raise ConfigError(f"check: {unknown[0]} is not allowed; parts: {', '.join(PARTS)} (--help explains)")
    if not out.name or (out.exists() and not out.is_file()):
        raise ConfigError(f"out: {options['out'] or 'nothing'} is not allowed; it must name a file, new or old")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"out: {out.parent} cannot be written to")
    return asked or [*PARTS], int(options["budget"]), options["device"], out


def place(asked: str) -> str:
    """The torch device of this name. Raises ConfigError if there is none."""
    from experiments.compose import composed
    from experiments.launching.devices import device

    return device(composed([f"runtime.device={asked}"]).runtime)


def run(part: Part, device: str, until: float, lines: list[Line]) -> None:
    """Run a part's cases, print each result, and add a line for it."""
    from experiments.check.report import LATE, Line

    for case, result in results(part.check, part.cases(device), device, until):
        lines.append(Line(part.title, case, None, LATE) if result is None else Line(part.title, case, *result))
        word = {True: "ok, ", False: "FAILED, ", None: ""}[lines[-1].ok]
        print(f"{part.title}, {case}: {word}{lines[-1].text}", file=sys.stderr, flush=True)


def estimates(lines: list[Line], counting: AsyncResult[Counted]) -> list[dict[str, Any]]:
    """The hours of each paper's tables; nothing, and a line that says why, if a rate or the count of the runs is missing."""
    from experiments.check import papers

    figures = {each.case: each.figures for each in lines if each.part == "rates" and each.figures}
    flops = {case.split()[1]: found["flops"] for case, found in figures.items() if case.startswith("convolution")}
    try:
        if "fp32" not in flops or "launches" not in figures:
            raise TimeoutError("rates are missing")
        replay = figures["replays"]["seconds"] if "replays" in figures else None
        return papers.hours(papers.Rates(flops, figures["launches"]["seconds"], replay), counting.get(timeout=1))
    except Exception as error:
        print(f"the tables' hours are not estimated: {type(error).__name__}, {first_line(error)}")
        return []


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return
    try:
        if not check(arguments):
            sys.exit(1)
    except BAD_INPUT as error:
        stop(one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
