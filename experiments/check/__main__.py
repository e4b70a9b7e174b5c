"""The check's command line: its parts, one after the other.   python -m experiments.check --help"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments import store
from experiments.check.processes import context, results, time_left, tried
from experiments.cli import BAD_INPUT, one_line, stop
from experiments.config import ConfigError, first_line

if TYPE_CHECKING:
    from experiments.check.papers import Counted
    from experiments.check.report import Line
    from experiments.check.training import Result

USAGE = """python -m experiments.check [PART...] [budget=120] [device=auto] [out=runs/check.json]

Is this machine fit to train on, and what can it do? Small runs of every method are tried in every way that a run can be asked for,
then the device's rates are measured, and from these follows what the papers' tables would take here. Nothing is downloaded.

fp32     updates as on the CPU                  side     two runs side by side: the numbers that each has alone
bf16     it learns in bf16                      memory   a run beside one that runs out of memory (GPU)
graph    step=graph is the eager step (GPU)     rates    launches, convolutions, recurrent layers, ResNet-18
last     an epoch's smaller last batch          papers   the hours of each paper's tables (measures rates too)
resume   a run resumes to the same bits

Without a PART: all, in this order, as far as the budget (seconds) reaches. A case that fails stops no other. Each is a line on stderr
while it runs; the table at the end has one for each part, and for each case that failed. The figures of all cases go to `out`.
Exit code: 0 when nothing failed, 1 when a check failed, 2 for a word that is not known."""
PARTS = ("fp32", "bf16", "graph", "last", "resume", "side", "memory", "rates", "papers")


class Part(NamedTuple):
    """check: of a case on a device. gpu: it needs one. forks: it starts processes of its own, so that it needs none around it."""

    title: str
    check: Callable[[str, str], Result]
    cases: Callable[[str], list[str]]
    gpu: bool = False
    forks: bool = False


def parts() -> dict[str, Part]:
    """Those of PARTS that have cases. Imports torch."""
    from experiments.check import rates, training

    def alone(device: str) -> list[str]:
        return [""]

    return {
        "fp32": Part("fp32 as on the CPU", training.fp32_as_on_the_cpu, training.cases),
        "bf16": Part("bf16 learns", training.learns_in_bf16, training.cases),
        "graph": Part("step=graph is eager", training.graph_is_eager, training.cases, gpu=True),
        "last": Part("smaller last batch", training.last_batch, training.cases),
        "resume": Part("resumes to the same bits", training.resumes, training.cases),
        "side": Part("two runs side by side", training.side_by_side, alone, forks=True),
        "memory": Part("out of memory in another", training.out_of_memory, alone, gpu=True, forks=True),
        "rates": Part("rates", rates.rate, rates.cases),
    }


def check(arguments: Sequence[str]) -> bool:
    """Run the parts and print the table. Returns whether nothing failed. Raises ConfigError for bad input."""
    asked, options = split(arguments)
    until, out = time.monotonic() + int(options["budget"]), Path(options["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    context()  # imports what the checks need, while this process does
    device = place(options["device"])

    from experiments.check import papers, report

    about = report.machine(device)
    print(f"{about['device']}: {', '.join(f'{name} {value}' for name, value in about.items() if name != 'device')}", file=sys.stderr)
    lines: list[Line] = []
    with ProcessPoolExecutor(1, context()) as pool:
        counting = pool.submit(papers.counted, partial(time_left, until)) if "papers" in asked else None
        for name, part in parts().items():
            if part.gpu and device == "cpu" and name in asked:
                lines.append(report.line(part.title, "", None, "needs a GPU"))
            elif name in asked or (name == "rates" and counting is not None):
                if name == "rates" and counting is not None:
                    wait([counting])  # nothing is timed beside it
                lines += run(part, device, until)
        hours = [] if counting is None else estimates(lines, counting)
    print(report.table(lines, hours, {part.title: (part.check.__doc__ or "").split("\n")[0] for part in parts().values()}))
    with store.written(out) as file:
        file.write(json.dumps({"machine": about, "checks": lines, "papers": hours}, indent=1).encode())
    failed, tried = (sum(each["ok"] in which for each in lines) for which in ([False], [True, False]))
    print(f"{f'{failed} of {tried} checks FAILED' if failed else f'all {tried} checks passed'}; their figures: {out}")
    return not failed


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The parts that are asked for, and the options."""
    options = {"budget": "120", "device": "auto", "out": "runs/check.json"}
    for name, _, value in (word.partition("=") for word in arguments if "=" in word):
        if name not in options:
            raise ConfigError(f"{name}: there is no such key; allowed: {', '.join(options)}")
        options[name] = value
    if not options["budget"].isdecimal() or not int(options["budget"]):
        raise ConfigError(f"budget: {options['budget']} is not allowed; it must be a whole number of seconds, at least 1")
    asked = [word for word in arguments if "=" not in word]
    if unknown := [word for word in asked if word not in PARTS]:
        raise ConfigError(f"check: {unknown[0]} is not allowed; parts: {', '.join(PARTS)} (--help explains)")
    return asked or [*PARTS], options


def place(asked: str) -> str:
    """The torch device. Raises ConfigError where there is none of that name."""
    from experiments.bench.configs import composed
    from experiments.devices import device

    return device(composed([f"runtime.device={asked}"]).runtime)


def run(part: Part, device: str, until: float) -> list[Line]:
    """The lines of a part's cases, each printed when it is there."""
    from experiments.check.report import line

    cases = part.cases(device)
    found = ((case, tried(part.check, case, device)) for case in cases if time_left(until))
    lines = []
    for case, result in found if part.forks else results(part.check, cases, device, until):
        made = line(part.title, case, None, "no time was left") if result is None else line(part.title, case, *result)
        word = {True: "ok, ", False: "FAILED, ", None: ""}[made["ok"]]
        print(f"{part.title}{case and ', '}{case}: {word}{made['text']}", file=sys.stderr, flush=True)
        lines.append(made)
    return lines or [line(part.title, "", None, "no time was left")]


def estimates(lines: list[Line], counting: Future[Counted]) -> list[Line]:
    """What each paper's tables would take, a line each; nothing where rates are missing or the runs could not be counted."""
    from experiments.check import papers

    figures = {each["case"]: each["figures"] for each in lines if each["part"] == "rates" and each["figures"]}
    flops = {case.split()[1]: found["flops"] for case, found in figures.items() if case.startswith("convolution")}
    if error := counting.exception():
        print(f"tables of the papers: not counted ({type(error).__name__}: {first_line(error)})", file=sys.stderr)
    if error or "fp32" not in flops or "launches" not in figures:
        return []
    replay = figures["replays"]["seconds"] if "replays" in figures else None
    return papers.hours(papers.Rates(flops, figures["launches"]["seconds"], replay), counting.result()).to_dict("records")


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
