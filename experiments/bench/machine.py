"""What a ratio depends on besides the code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.bench.configs import on_gpu


def machine(cfg: DictConfig) -> dict[str, Any]:
    """Of the computer, in words and numbers; and the commit, for the code."""
    import torch

    from experiments.provenance import commit, device_name
    from experiments.train import make_trainer

    make_trainer(cfg)  # sets the number of threads
    device = device_name(torch.device("cuda" if on_gpu(cfg) else "cpu"))
    threads = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    return {"device": device, **threads, "bf16 units": units(), "torch": torch.__version__, **commit()}


def units() -> str:
    """What the CPU has for bfloat16: on one without, bf16 is slower than fp32."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", info.read_text(), re.M) if info.exists() else None
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16"}
    found = [name for flag, name in names.items() if flags and flag in flags[1].split()]
    return "+".join(found) or ("none" if flags else "unknown")
