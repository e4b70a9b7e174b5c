"""The check's command line, and the table that it ends with.   python -m experiments.check --help"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import store
from experiments.cli import BAD_INPUT, one_line, stop
from experiments.config import ConfigError

USAGE = """python -m experiments.check [PART...] [budget=120] [device=auto] [out=runs/check.json]

Is this machine fit to train on, and what can it do? Small runs of every method are tried in every way that a run can be asked for,
then the device's rates are measured, and from these follows what the papers' tables would take here. Nothing is downloaded.

fp32     updates as on the CPU                  side     two runs side by side: the numbers that each has alone
bf16     it learns in bf16                      memory   a run beside one that runs out of memory (GPU)
graph    step=graph is the eager step (GPU)     rates    launches, convolutions, recurrent layers, ResNet-18
last     an epoch's smaller last batch          papers   the hours of each paper's tables (needs rates)
resume   a run resumes to the same bits

Without a PART: all, in this order, as far as the budget (seconds) reaches; each case is a line while it runs, and one that fails stops
no other. Exit code: 0 when nothing failed, 1 when a check failed. The figures of each case go to `out`."""


class Part(NamedTuple):
    title: str
    check: Callable[[str, str], Any]
    cases: Callable[[str], list[str]]
    gpu: bool = False  # needs one


def parts() -> dict[str, Part]:
    """Most important first. Imports torch."""
    from experiments.check import rates, training

    def alone(device: str) -> list[str]:
        return [""]

    return {
        "fp32": Part("fp32 as on the CPU", training.fp32_as_on_the_cpu, training.cases),
        "bf16": Part("bf16 learns", training.learns_in_bf16, training.cases),
        "graph": Part("step=graph is eager", training.graph_is_eager, training.cases, gpu=True),
        "last": Part("smaller last batch", training.last_batch, training.cases),
        "resume": Part("resumes to the same bits", training.resumes, training.cases),
        "side": Part("two runs side by side", training.side_by_side, alone),
        "memory": Part("out of memory in another", training.out_of_memory, alone, gpu=True),
        "rates": Part("rates", rates.rate, rates.cases),
    }


def check(arguments: Sequence[str]) -> bool:
    """Run the parts and print the table. Returns whether nothing failed. Raises ConfigError for bad input."""
    options = {"budget": "120", "device": "auto", "out": "runs/check.json"}
    for word in (word for word in arguments if "=" in word):
        name, _, value = word.partition("=")
        if name not in options:
            raise ConfigError(f"{name}: there is no such key; allowed: {', '.join(options)}")
        options[name] = value
    if not options["budget"].isdecimal() or not int(options["budget"]):
        raise ConfigError(f"budget: {options['budget']} is not allowed; it must be a whole number of seconds, at least 1")
    names = ("fp32", "bf16", "graph", "last", "resume", "side", "memory", "rates", "papers")
    asked = [word for word in arguments if "=" not in word]
    if unknown := [word for word in asked if word not in names]:
        raise ConfigError(f"check: {unknown[0]} is not allowed; parts: {', '.join(names)} (--help explains)")
    out = Path(options["out"])
    out.parent.mkdir(parents=True, exist_ok=True)

    until = time.monotonic() + int(options["budget"])
    device = place(options["device"])
    about = machine(device)
    print(f"{about['device']}: {', '.join(f'{name} {value}' for name, value in about.items() if name != 'device')}", file=sys.stderr)
    lines: list[dict[str, Any]] = []
    for name, part in parts().items():
        wanted = name in asked or not asked or (name == "rates" and "papers" in asked)
        if wanted and part.gpu and device == "cpu":
            lines.append(line(part.title, "", None, "needs a GPU"))
        elif wanted:
            lines += run(part, device, until)
    papers = hours(lines, until) if "papers" in asked or not asked else []
    print(table(lines, papers))
    with store.written(out) as file:
        file.write(json.dumps({"machine": about, "checks": lines, "papers": papers}, indent=1).encode())
    failed = sum(each["ok"] is False for each in lines)
    tried = sum(each["ok"] is not None for each in lines)
    print(f"{f'{failed} of {tried} checks FAILED' if failed else f'all {tried} checks passed'}; their figures: {out}")
    return not failed


def place(asked: str) -> str:
    """The torch device. Raises ConfigError where there is none of that name."""
    from experiments.bench.configs import composed
    from experiments.devices import device

    return device(composed([f"runtime.device={asked}"]).runtime)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from experiments.provenance import commit, device_name

    about: dict[str, Any] = {"device": device_name(torch.device(device))}
    if device != "cpu":
        about |= {"memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB", "CUDA": torch.version.cuda}
        about |= {"cuDNN": torch.backends.cudnn.version(), "driver": driver()}
    return about | {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(), **commit()}


def driver() -> str:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


def run(part: Part, device: str, until: float) -> list[dict[str, Any]]:
    """The lines of a part's cases, each printed when it is there."""
    from experiments.check.processes import results

    lines = []
    for case, result in results(part.check, part.cases(device), device, until):
        found = line(part.title, case, None, "no time was left") if result is None else line(part.title, case, *result)
        word = {True: "ok", False: "FAILED", None: "-"}[found["ok"]]
        print(
            f"{part.title}{case and ', '}{case}: {'' if found['ok'] is None else f'{word}, '}{found['text']}", file=sys.stderr, flush=True
        )
        lines.append(found)
    return lines


def line(part: str, case: str, ok: bool | None, text: str, figures: dict[str, float] | None = None) -> dict[str, Any]:
    return {"part": part, "case": case, "ok": ok, "text": text, "figures": figures or {}}


def hours(lines: list[dict[str, Any]], until: float) -> list[dict[str, Any]]:
    """What each paper's tables would take, from the measured rates; nothing where they were not measured."""
    from experiments.check import papers

    figures = {each["case"]: each["figures"] for each in lines if each["part"] == "rates"}
    flops = {case.split()[1]: found["flops"] for case, found in figures.items() if case.startswith("convolution") and found}
    if "fp32" not in flops or not figures.get("launches"):
        return []
    replay = figures["replays"]["seconds"] if figures.get("replays") else None
    found = papers.hours(papers.Rates(flops, figures["launches"]["seconds"], replay), lambda: time.monotonic() < until)
    return found.to_dict("records")


def table(lines: list[dict[str, Any]], papers: list[dict[str, Any]]) -> str:
    """A row for each part with how many of its cases passed, for each case that failed, each rate and each paper."""
    from tabulate import tabulate

    known = {part.title: (part.check.__doc__ or "").split("\n")[0] for part in parts().values()}
    rows = []
    for title in dict.fromkeys(each["part"] for each in lines):
        mine = [each for each in lines if each["part"] == title]
        judged = [each["ok"] for each in mine if each["ok"] is not None]
        if judged:
            rows.append([title, f"{sum(judged)} of {len(judged)}", known[title] if len(mine) > 1 else mine[0]["text"]])
        rows += [[f"{title}, {each['case']}", "FAILED", each["text"]] for each in mine if each["ok"] is False and each["case"]]
        rows += [[each["case"] or title, "", each["text"]] for each in mine if each["ok"] is None and each["text"] != "no time was left"]
        if skipped := [each["case"] for each in mine if each["text"] == "no time was left"]:
            rows.append([title, "", f"no time was left for {', '.join(skipped)}"])
    rows += [[f"tables of {each['paper']}", "", estimate(each)] for each in papers]
    return tabulate(rows, ["check", "passed", "what"], tablefmt="simple", maxcolwidths=[None, None, 100])


def estimate(paper: dict[str, Any]) -> str:
    """What a paper's tables take, in words."""
    if not paper["runs"]:
        return "no time was left to estimate them"
    text = f"about {paper['hours']:,.1f} hours, one run after another: {paper['runs']:,} runs, {paper['steps']:,} steps"
    if "hours bf16 graph" in paper:
        text += f"; {paper['hours bf16 graph']:,.1f} with precision=bf16 step=graph"
    return text + (f"; not counted: {paper['left out']}" if paper["left out"] else "")


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
