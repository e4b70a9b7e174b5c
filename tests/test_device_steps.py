"""A step on a GPU, as far as a CPU can tell: nothing makes the host wait or is left on it, and all of it has a deterministic form."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_steps import CASES, Check, Forbidden, branches, elsewhere, made_on, take_steps, waits
from test_trainer import data_home
from torch import Tensor, nn

from regularizers.base import Pass, Regularizer

__all__ = ["data_home"]  # a fixture

# What torch.use_deterministic_algorithms(True) refuses on a GPU: the page
# https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html of torch 2.15 (the function's docstring), item
# by item, as the ATen operations that refuse. Without the items for MPS alone; with more from earlier releases' pages.
REFUSED = {
    "nn.AvgPool3d": ["avg_pool3d_backward"],
    "nn.MaxPool3d": ["max_pool3d_with_indices_backward"],
    "nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "nn.MaxUnpool1d": ["max_unpool2d"],
    "nn.MaxUnpool2d": ["max_unpool2d"],
    "nn.MaxUnpool3d": ["max_unpool3d"],
    "nn.functional.interpolate": [
        *["upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward"],
        *["_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"],
    ],
    "nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "nn.NLLLoss": ["nll_loss2d_forward", "nll_loss2d_backward"],  # of maps; of [N, K] it is as deterministic as cross_entropy
    "nn.CTCLoss": ["_ctc_loss_backward", "_cudnn_ctc_loss"],
    "nn.EmbeddingBag": ["_embedding_bag_backward", "_embedding_bag_dense_backward"],
    "Tensor.put_": ["put", "put_"],
    "histc": ["histc"],
    "bincount": ["bincount"],
    "median": ["median", "nanmedian"],
    "nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "Tensor.scatter_reduce": ["scatter_reduce", "scatter_reduce_"],
    "Tensor.resize_": ["resize_"],
    "kthvalue": ["kthvalue"],
    "cumsum": ["cumsum", "cumsum_"],
    "nn.ReplicationPad1d and 3d": ["replication_pad1d_backward", "replication_pad3d_backward"],
}
ONLY_IF: dict[str, Callable[[str, dict[str, Any]], bool]] = {  # items that are refused only then, by overload and arguments
    "nn.EmbeddingBag": lambda overload, given: given["mode"] == 2,  # the largest
    "bincount": lambda overload, given: given.get("weights") is not None,
    "median": lambda overload, given: overload == "dim",
    # The page of torch 2.11 has the product alone, that of 2.15 all that it does not say to be deterministic.
    "Tensor.scatter_reduce": lambda overload, given: given["reduce"] not in ("sum", "mean"),
    "Tensor.resize_": lambda overload, given: given["self"].is_quantized,
    "cumsum": lambda overload, given: given["self"].is_floating_point(),
}
# How many kinds of steps there are: LaMix's clean and mixed ones, PuzzleMix's grids (two of them, on digits), and those that it skips.
BRANCHES = {"lamix": 2, "three": 2, "puzzlemix": 2, "puzzlemix, clean": 2, "puzzlemix, bce": 3, "lamix_puzzle": 3, "lamix_puzzle, mask": 3}


def refused(func: Any, given: dict[str, Any]) -> str | None:
    """What has no deterministic form on a GPU."""
    for item, operations in REFUSED.items():
        if func.overloadpacket.__name__ in operations and (item not in ONLY_IF or ONLY_IF[item](func._overloadname, given)):
            return f"{item} has no deterministic form"
    return None


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_the_device(case: str, device: str) -> None:
    """Of each kind: up to the loss on fake CUDA tensors, whole on meta ones; as it is by default, and as `deterministic` has it."""
    with elsewhere(device) as mode:
        made = made_on(mode, CASES[case])
        assert len(branches(made)) == BRANCHES.get(case, 1)
        take_steps(mode, made, waits)
        torch.use_deterministic_algorithms(True)
        take_steps(mode, made, waits, refused)


# What a check is for, it sees: on x [4, 3], and with places, two of its rows

Step = Callable[[Tensor, Tensor], object]
HOST: dict[str, Step] = {
    "item": lambda x, places: x.sum().item(),
    "float": lambda x, places: float(x.sum()),
    "a branch": lambda x, places: x.relu() if x.any() else x,
    "nonzero": lambda x, places: x.nonzero(),
    "masked_select": lambda x, places: x.masked_select(x > 0),
    "a mask": lambda x, places: x[x > 0],
    "a mask that is written to": lambda x, places: x.index_put_((x > 0,), x.new_ones(())),
    "unique": lambda x, places: places.unique(),
    "unique_consecutive": lambda x, places: places.unique_consecutive(),
    "bincount": lambda x, places: places.bincount(minlength=4),
    "equal": lambda x, places: torch.equal(x, x),
    "repeat_interleave": lambda x, places: x[:2].repeat_interleave(places, 0),
    "a copy to the host": lambda x, places: x.cpu(),
    "a copy to the host, not waited for": lambda x, places: x.to("cpu", non_blocking=True),
    "a number": lambda x, places: x + torch.tensor(1.0, device=x.device),
    "numbers": lambda x, places: x + x.new_tensor([1.0, 2.0, 3.0]),
    "a number that stays there": lambda x, places: x * torch.tensor(2.0),
    "scalar_tensor": lambda x, places: x * torch.scalar_tensor(2.0),
    "an index": lambda x, places: x[torch.arange(2)],
    "a copy from it": lambda x, places: torch.ones(3).to(x.device),
    "written over": lambda x, places: x.copy_(torch.ones(3)),
    "made and left": lambda x, places: torch.zeros(3),
}
ALLOWED: dict[str, Step] = {
    "numbers of Python's": lambda x, places: torch.where(x > 0, (2 * x + 1).clamp(max=3), 0.5).pow_(2),
    "made there": lambda x, places: x + torch.full((), 0.5, device=x.device) + x.new_zeros(3),
    "an index": lambda x, places: x[places].sum() + x.index_select(0, places).sum(),
    "a mask of the same size": lambda x, places: x.masked_fill(x > 0, 1.0),
    "repeat_interleave": lambda x, places: x[:2].repeat_interleave(places, 0, output_size=3),
    "draws": lambda x, places: x + torch.rand(4, 3, generator=torch.Generator(), device=x.device),
    "written over": lambda x, places: x[1].fill_(2.0),
}
NOT_DETERMINISTIC: dict[str, Step] = {
    "median": lambda x, places: x.median(0),
    "nanmedian": lambda x, places: x.nanmedian(1).values,
    "kthvalue": lambda x, places: x.kthvalue(2, 0),
    "cumsum": lambda x, places: x.cumsum(0),
    "put_": lambda x, places: x.put_(places, x[0, :2]),
    "histc": lambda x, places: x.histc(4, 0, 1),
    "bincount": lambda x, places: places.bincount(x[0, :2], 4),
    "scatter_reduce": lambda x, places: x[0].scatter_reduce(0, places, x[1, :2], "prod"),
    "nll_loss": lambda x, places: nn.functional.nll_loss(x.view(1, 3, 2, 2), x.new_zeros((1, 2, 2), dtype=torch.long)),
    "max_unpool1d": lambda x, places: nn.functional.max_unpool1d(x[None, :, :2], places.expand(1, 4, 2), 2),
}
GRADIENT_NOT_DETERMINISTIC: dict[str, Callable[[Tensor], Tensor]] = {  # of images [1, 2, 8, 8]
    "adaptive_avg_pool2d": lambda x: nn.functional.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda x: nn.functional.adaptive_max_pool2d(x, 3),
    "avg_pool3d": lambda x: nn.functional.avg_pool3d(x, 2),
    "bilinear": lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear", antialias=True),
    "bicubic": lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bicubic", antialias=True),
    "reflection_pad2d": lambda x: nn.functional.pad(x, (1, 1, 1, 1), "reflect"),
    "grid_sample": lambda x: nn.functional.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False),
    "embedding_bag": lambda x: nn.functional.embedding_bag(x.new_zeros((2, 2), dtype=torch.long), x[0, 0], mode="max"),
}
DETERMINISTIC: dict[str, Step] = {
    "median": lambda x, places: x.median(),
    "cumsum": lambda x, places: places.cumsum(0),
    "scatter_reduce": lambda x, places: x[0].scatter_reduce(0, places, x[1, :2], "sum"),
    "scatter_add": lambda x, places: x[0].scatter_add(0, places, x[1, :2]),
    "index_put": lambda x, places: x.index_put((places,), x[:2], accumulate=True),
    "cross_entropy": lambda x, places: nn.functional.cross_entropy(x[:2], places),
}


def run(device: str, step: Step, *checks: Check) -> None:
    with elsewhere(device) as mode:
        x = torch.zeros(4, 3, device=mode.place)
        places = torch.zeros(2, device=mode.place, dtype=torch.long)
        with mode.checked(*checks):
            step(x, places)


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)  # there torch makes tensors of numbers on meta without an operation


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("name", HOST)
def test_what_the_host_must_not_do_is_seen(name: str, device: str) -> None:
    if OLD and device == "meta" and name in ("a number", "numbers"):
        pytest.skip("this release of torch shows it on cuda alone")
    with pytest.raises(Forbidden, match="host"):
        run(device, HOST[name], waits)


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("name", NOT_DETERMINISTIC)
def test_what_is_not_deterministic_is_seen(name: str, device: str) -> None:
    with pytest.raises(Forbidden, match="no deterministic form"):
        run(device, NOT_DETERMINISTIC[name], refused)


@pytest.mark.parametrize("name", GRADIENT_NOT_DETERMINISTIC)
def test_a_gradient_that_is_not_deterministic_is_seen(name: str) -> None:
    with elsewhere("meta") as mode, mode.checked(refused):
        out = GRADIENT_NOT_DETERMINISTIC[name](torch.zeros(1, 2, 8, 8, device="meta", requires_grad=True))
        with pytest.raises(Forbidden, match="no deterministic form"):
            out.sum().backward()


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_what_is_allowed_goes_on(device: str) -> None:
    for step in ALLOWED.values():
        run(device, step, waits)
    for step in DETERMINISTIC.values():
        run(device, step, refused)


def test_the_list_is_torchs_own() -> None:
    throwing = (torch.use_deterministic_algorithms.__doc__ or "").split("operations will throw a")[1].split("In addition")[0]
    items = [item for item in throwing.split("* :")[1:] if "CUDA" in item or "MPS" not in item]
    named = {item.split("`")[1].removeprefix("torch.") for item in items}
    assert len(named) > 15 and named <= {*REFUSED}
    assert all(hasattr(torch.ops.aten, name) for name in itertools.chain(*REFUSED.values())) and REFUSED.keys() >= ONLY_IF.keys()


class Toy(Regularizer):
    """A method that does what it must not, in the forward or the backward pass."""

    def __init__(self, step: Callable[[Tensor], Tensor], backward: bool) -> None:
        super().__init__()
        self.step, self.backward = step, backward

    def penalty(self, out: Pass, other: Pass | None) -> Tensor | None:
        if not self.backward:
            return self.step(out.logits)
        out.logits.register_hook(self.step)
        return None


@pytest.mark.parametrize(("device", "backward"), [("cuda", False), ("meta", False), ("meta", True)])
def test_a_method_that_waits_is_seen(device: str, backward: bool) -> None:
    toys: dict[str, Callable[[Tensor], Tensor]] = {
        "the host waits for values": lambda x: x.sum() * float(x.sum() > 0),
        "places in a mask": lambda x: x * x[x > 0].sum(),
        **({} if OLD and device == "meta" else {"from the host|of the host's": lambda x: x.sum() * torch.tensor(0.5, device=x.device)}),
        "tensor of the host's": lambda x: x * left,
        "no deterministic form": lambda x: x.nanmedian(1).values.sum(),
    }
    left = torch.ones(())  # a buffer that was forgotten
    with elsewhere(device) as mode:
        made = made_on(mode, CASES["vanilla"])
        take_steps(mode, made, waits, refused)
        for said, step in toys.items():
            made.regularizers = {"toy": Toy(step, backward)}
            with pytest.raises(Forbidden, match=said):
                take_steps(mode, made, waits, refused)


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_bf16_is_bf16_here_too(device: str) -> None:
    for case in ("per, bf16", "lstm, bf16", "lstm, fused"):
        with elsewhere(device) as mode:
            made = made_on(mode, CASES[case])
            batch, _ = made.take(*next(iter(made.samples())))
            assert made.run(batch).logits.dtype == torch.bfloat16
