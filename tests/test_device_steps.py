"""A step on a GPU, as far as a CPU can tell: nothing makes the host wait or is left on it, and all of it has a deterministic form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_steps import CASES, Forbidden, branches, elsewhere, on_meta, take_steps, waits
from torch import Tensor, nn
from trainers import data_home

__all__ = ["data_home"]  # a fixture

# The ATen operations that torch.use_deterministic_algorithms(True) refuses on a GPU. Source: its docstring, up to torch 2.15.
REFUSED = re.compile(
    "put|histc|nanmedian|kthvalue|max_unpool[23]d|nll_loss2d_(for|back)ward|_ctc_loss_backward|_cudnn_ctc_loss"
    "|(grid_sampler_[23]d|avg_pool3d|max_pool3d_with_indices|_adaptive_avg_pool[23]d|adaptive_max_pool2d|fractional_max_pool[23]d"
    "|upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)|_upsample_bi(linear|cubic)2d_aa|replication_pad[123]d|reflection_pad[123]d)_backward"
)
REFUSED_IF: dict[str, Callable[[str, dict[str, Any]], bool]] = {  # by overload and arguments
    "_embedding_bag_backward": lambda overload, given: given["mode"] == 2,  # the largest
    "bincount": lambda overload, given: given.get("weights") is not None,
    "median": lambda overload, given: overload == "dim",
    # The page of torch 2.11 has the product alone, that of 2.15 all that it does not say to be deterministic.
    "scatter_reduce": lambda overload, given: given["reduce"] not in ("sum", "mean"),
    "cumsum": lambda overload, given: given["self"].is_floating_point(),
}
# How many kinds of steps there are: LaMix's clean and mixed ones, PuzzleMix's grids (two of them, on digits), and those that it skips.
BRANCHES = {"lamix": 2, "three": 2, "puzzlemix": 2, "puzzlemix, bce": 3, "lamix_puzzle": 3, "lamix_puzzle, mask": 3}
QUICK = ["vanilla", "itdm_c, bf16", "per", "vcl", "lamix_puzzle", "mixup, bce", "lstm, fused"]


def refused(func: Any, given: dict[str, Any]) -> str | None:
    """What has no deterministic form on a GPU."""
    name = func.overloadpacket.__name__.removesuffix("_")
    if REFUSED.fullmatch(name) or (name in REFUSED_IF and REFUSED_IF[name](func._overloadname, given)):
        return f"{name} has no deterministic form"
    return None


@pytest.mark.parametrize("case", [*QUICK, *[pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in QUICK]])
def test_a_step_stays_on_the_device(case: str) -> None:
    """Of each kind; as it is by default, and as `deterministic` has it."""
    with elsewhere() as mode:
        made = on_meta(CASES[case])
        assert len(branches(made)) == BRANCHES.get(case, 1)
        take_steps(mode, made, waits)
        torch.use_deterministic_algorithms(True)
        take_steps(mode, made, waits, refused)


# What the checks are for, they see: on x [4, 3], and with places, two of its rows

Step = Callable[[Tensor, Tensor], object]
HOST: list[Step] = [
    lambda x, places: x.relu() if x.any() else x,
    lambda x, places: x[x > 0],
    lambda x, places: x[:2].repeat_interleave(places, 0),
    lambda x, places: x * torch.tensor(2.0),
    lambda x, places: x[torch.arange(2)],
    lambda x, places: torch.zeros(3),
    lambda x, places: (x.register_hook(lambda gradient: gradient * float(gradient.sum() > 0)), x.sum().backward()),
]
NOT_DETERMINISTIC: list[Step] = [
    lambda x, places: x.median(0),
    lambda x, places: x.put(places, x[0, :2]),
    lambda x, places: nn.functional.adaptive_avg_pool2d(x.view(1, 2, 2, 3), 3).sum().backward(),
]
ALLOWED: list[Step] = [
    lambda x, places: x[places].sum() + torch.where(x > 0, 1.0, x) + x[:2].repeat_interleave(places, 0, output_size=4),
    lambda x, places: x + torch.rand(4, 3, generator=torch.Generator(), device=x.device),
    lambda x, places: x.median() + places.cumsum(0).sum() + x[0].scatter_reduce(0, places, x[1, :2], "sum"),
]


def test_what_the_checks_see_and_what_they_let_pass() -> None:
    with elsewhere() as mode:
        x = torch.zeros(4, 3, device="meta").requires_grad_() * 1
        places = torch.zeros(2, device="meta", dtype=torch.long)
        for said, check, steps in (("host", waits, HOST), ("no deterministic form", refused, NOT_DETERMINISTIC)):
            for number, step in enumerate(steps):
                with pytest.raises(Forbidden, match=said), mode.checked(check):
                    step(x, places)
                    pytest.fail(f"{said}: {number}")
        for step in ALLOWED:
            with mode.checked(waits, refused):
                step(x, places)
