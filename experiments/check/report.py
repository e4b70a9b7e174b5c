"""What a check prints: the machine, and a table of what was found."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate

from experiments.bench.machine import units
from experiments.provenance import commit, device_name

Line = dict[str, Any]  # part, case, ok (None: nothing to judge), text, figures; or of a paper, see papers.hours


def line(part: str, case: str, ok: bool | None, text: str, figures: Mapping[str, float] | None = None) -> Line:
    return {"part": part, "case": case, "ok": ok, "text": text, "figures": figures or {}}


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    about: dict[str, Any] = {"device": device_name(torch.device(device))}
    if device == "cpu":
        about["bf16 units"] = units()
    else:
        about |= {"memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB", "CUDA": torch.version.cuda}
        about |= {"cuDNN": torch.backends.cudnn.version(), "driver": driver()}
    return about | {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(), **commit()}


def driver() -> str:
    """The version of NVIDIA's driver, as far as its own command tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


def table(lines: Sequence[Line], papers: Sequence[Line], meaning: Mapping[str, str]) -> str:
    """A row for each part, with how many of its cases passed and its meaning; for each case that failed; each rate; and each paper."""
    rows = []
    for title in dict.fromkeys(each["part"] for each in lines):
        mine = [each for each in lines if each["part"] == title]
        judged = [each["ok"] for each in mine if each["ok"] is not None]
        if judged:
            rows.append([title, f"{sum(judged)} of {len(judged)}", meaning[title] if len(mine) > 1 else mine[0]["text"]])
        rows += [[f"{title}, {each['case']}", "FAILED", each["text"]] for each in mine if each["ok"] is False and each["case"]]
        late = [each["case"] for each in mine if each["text"] == "no time was left"]
        rows += [[each["case"] or title, "", each["text"]] for each in mine if each["ok"] is None and each["case"] not in late]
        if late:
            rows.append([title, "", f"no time was left for {', '.join(late) or 'it'}"])
    rows += [[f"tables of {each['paper']}", "", estimate(each)] for each in papers]
    return tabulate(rows, ["check", "passed", "what"], maxcolwidths=[None, None, 100])


def estimate(paper: Line) -> str:
    """What a paper's tables take, in words."""
    if not paper["runs"]:
        return "no time was left to count them"
    text = f"at least {paper['hours']:,.1f} hours, one run after another: {paper['runs']:,} runs, {paper['steps']:,} steps"
    if "hours bf16 graph" in paper:
        text += f"; {paper['hours bf16 graph']:,.1f} with precision=bf16 step=graph"
    return text + (f"; not counted: {paper['left out']}" if paper["left out"] else "")
