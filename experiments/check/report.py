"""What a check prints: the machine, and a table of what was found."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from experiments.provenance import commit, device_name

LATE = "no time was left"


class Line(NamedTuple):
    """The result of one case of a part. ok: None where nothing is judged."""

    part: str
    case: str
    ok: bool | None
    text: str
    figures: Mapping[str, float] = {}


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    about: dict[str, Any] = {"device": device_name(torch.device(device))}
    if device == "cpu":
        about["bf16 units"] = units()
    else:
        about |= {"memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB", "CUDA": torch.version.cuda}
        about |= {"cuDNN": torch.backends.cudnn.version(), "driver": driver()}
    about |= {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return about | {"torch": torch.__version__, "python": platform.python_version(), **commit()}


def units() -> str:
    """What the CPU has for bfloat16: on one without, bf16 is slower than fp32."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", info.read_text(), re.M) if info.exists() else None
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16"}
    found = [name for flag, name in names.items() if flags and flag in flags[1].split()]
    return "+".join(found) or ("none" if flags else "unknown")


def driver() -> str:
    """The NVIDIA driver's version as nvidia-smi reports it, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


def table(lines: Sequence[Line], papers: Sequence[Mapping[str, Any]], meaning: Mapping[str, str]) -> str:
    """A row for each part, with how many of its cases passed and its meaning; for each case that failed; each rate; and each paper."""
    rows = []
    for title in dict.fromkeys(each.part for each in lines):
        mine = [each for each in lines if each.part == title]
        judged = [each.ok for each in mine if each.ok is not None]
        if judged:
            rows.append([title, f"{sum(judged)} of {len(judged)}", meaning[title] if len(mine) > 1 else mine[0].text])
        rows += [[f"{title}, {each.case}", "FAILED", each.text] for each in mine if each.ok is False]
        rows += [[each.case or title, "", each.text] for each in mine if each.ok is None and each.text != LATE]
        if late := [each.case for each in mine if each.text == LATE]:
            rows.append([title, "", f"{LATE} for {len(late)} of {len(mine)}: {', '.join(late)}"])
    rows += [[f"tables of {each['paper']}", "", estimate(each)] for each in papers]
    return tabulate(rows, ["check", "passed", "what"], maxcolwidths=[None, None, 100])


def estimate(paper: Mapping[str, Any]) -> str:
    """The time that a paper's tables take, in words."""
    if not paper["runs"]:
        return "no time was left to count them"
    text = (
        f"{paper['tables']} tables, {paper['runs']:,} runs, {paper['steps']:,} steps, one after another: more than {span(paper['hours'])}"
    )
    if "hours bf16 graph" in paper:
        text += f"; with precision=bf16 step=graph more than {span(paper['hours bf16 graph'])}"
    return text + (f"; not counted: {paper['left out']}" if paper["left out"] else "")


def span(hours: float) -> str:
    """Two digits, in hours, days or years."""
    for size, unit in ((24 * 365, "years"), (24, "days")):
        if hours >= 2 * size:
            return f"{float(f'{hours / size:.2g}'):,.4g} {unit}"
    return f"{hours:.2g} hours"
