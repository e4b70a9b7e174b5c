"""precision=bf16: gradients that methods edit keep their expected value, and all LSTM variants use the same dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from trainers import data_home, trainer

from regularizers.base import Regularizer
from regularizers.vcl import VCL

__all__ = ["data_home"]  # a fixture
DRAWN = 3e7  # elements that are rounded to see what survives of a layer: more draws where the layer is small
CNN11 = ["dataset=cifar10", "dataset.source=embedded", "model=cnn11", "norm=none", "profile.train=20", "batch_size=20", "balanced=false"]
LSTM = ["dataset=docs", "model=lstm", "model.width=100", "norm=none", "balanced=false", "batch_size=20", "profile.train=2000"]
LSTM_ROWS = {
    "plain": [],
    "loop": ["model.loop=true"],
    "one mask": ["model.variational_dropout=true", "model.recurrent_mask=shared"],
    "rbn": ["norm=rbn"],
}


def method(made: Regularizer, seed: int = 0) -> Regularizer:
    made.rng = Generator().manual_seed(seed)
    return made


def test_rounding_is_unbiased_and_to_the_two_neighbours() -> None:
    x = torch.randn(4, 50, generator=Generator().manual_seed(1))
    rounding, draws = method(Regularizer()), 4000
    results = torch.stack([rounding.rounded(x, torch.bfloat16).float() for _ in range(draws)])
    gap = results.amax(0) - results.amin(0)  # one step of a bfloat16, at most 2^-7 of the number
    assert ((results == results.amax(0)) | (results == results.amin(0))).all() and (gap > 0).all() and (gap <= x.abs() / 128).all()
    assert ((results.mean(0) - x).abs() < 5 * 0.5 * gap / math.sqrt(draws)).all()


def test_rounding_of_any_two_elements_is_uncorrelated() -> None:
    """So the mean over a batch is as exact as with draws of their own. A standard error is 1/64."""
    x = torch.full((3, 4), 1 + 2**-8)  # half way between two bfloat16 numbers
    rounding = method(Regularizer())
    results = torch.stack([rounding.rounded(x, torch.bfloat16).flatten() for _ in range(4096)])
    assert (torch.corrcoef(results.float().T) - torch.eye(12)).abs().max() < 0.08


def test_rounding_leaves_what_needs_none_and_keeps_shapes() -> None:
    numbers = torch.tensor([[0.0, -0.0, 1.5, -3.0, 2.0**-126, torch.finfo(torch.float32).max]])
    others = torch.tensor([[2**31 - 1, -1, 0x7FC00000, -(2**22), 0x7F800000, -(2**23)]], dtype=torch.int32).view(torch.float32)
    assert others[0, :4].isnan().all() and others[0, 4:].isinf().all()  # the first two with all bits set, as a GPU makes them
    result = method(Regularizer()).rounded(torch.cat([numbers, others]), torch.bfloat16)
    assert torch.equal(result[0, :5].float(), numbers[0, :5]) and result[0, 5] in (math.inf, torch.finfo(torch.bfloat16).max)
    assert result[1].isnan().all()
    x = torch.randn(2, 3, 4, 5)
    assert Regularizer().rounded(x, torch.float32) is x  # without a generator
    for layout in (torch.contiguous_format, torch.channels_last):
        result = method(Regularizer()).rounded(x.contiguous(memory_format=layout), torch.bfloat16)
        assert result.shape == x.shape and (result.float() - x).abs().max() < x.abs().max() / 128


def surviving(*words: str) -> dict[int, float]:
    """For each tap in one step: the mean addition to the gradient, projected on the exact addition; 1 means nothing is lost."""
    made = trainer(*words)
    (penalty,) = made.regularizers.values()
    shares: dict[int, float] = {}
    edit, rounded = penalty.edit, penalty.rounded

    def watched(h: Tensor, place: int, gradient: Tensor) -> Tensor:
        exact: list[Tensor] = []
        penalty.rounded = lambda edited, dtype: exact.append(edited.clone()) or rounded(edited, dtype)
        result, before = edit(h, place, gradient), penalty.rows(gradient, h).float()
        pull = (exact[0] - before).double()
        kept = torch.zeros_like(pull)
        draws = math.ceil(DRAWN / pull.numel()) if gradient.dtype == torch.bfloat16 else 1
        for _ in range(draws):
            kept += rounded(exact[0], gradient.dtype).float().sub_(before)
        shares[place] = float((kept / draws * pull).sum() / pull.square().sum())
        return result

    penalty.edit = watched
    made.take_step(*next(iter(made.samples())))
    return shares


SLOW = [
    (CNN11, "per", "1e-5", ["method.per.mode=analytic"]),
    (CNN11, "l2", "1e-6", []),
    (LSTM, "l1", "3e-5", []),
    *[([*LSTM, *LSTM_ROWS[row]], "per", "3e-5", []) for row in ("loop", "one mask", "rbn")],
]
PULLS = [(CNN11, "per", "3e-4", []), (LSTM, "per", "3e-5", []), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("words", "name", "weight", "more"), PULLS)
def test_a_pull_survives_in_bf16_as_in_fp32(words: list[str], name: str, weight: str, more: list[str]) -> None:
    """Rounded to nearest, hundredths of PER's were left in most layers."""
    pull = [f"method={name}", f"method.{name}.weight={weight}", *more]
    half, full = (surviving(*words, *pull, f"precision={precision}") for precision in ("bf16", "fp32"))
    assert half.keys() == full.keys() and len(half) == (2 if words[1] == "model=lstm" else 10)
    assert all(0.9 < share < 1.1 for share in half.values()), half
    assert all(0.99 < share < 1.01 for share in full.values()), full


def test_vcl_s_gradient_survives_in_bf16() -> None:
    penalty = method(VCL(0.01))
    part, gradient = torch.zeros(10, 64), torch.randn(20, 64, generator=Generator().manual_seed(1)).bfloat16()
    part.grad = 1e-4 * torch.randn(10, 64, generator=Generator().manual_seed(2))
    kept = torch.stack([penalty.joined(part, gradient).float() - gradient.float() for _ in range(3000)]).mean(0)
    assert not kept[10:].any()
    assert float((kept[:10] * part.grad).sum() / part.grad.square().sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("row", LSTM_ROWS)
def test_all_language_models_have_taps_in_what_was_asked(row: str) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        made = trainer(*LSTM, *LSTM_ROWS[row], "method=per", f"precision={precision}")
        out = made.run(made.take(*next(iter(made.samples())))[0])
        assert [h.dtype for h in out.activations] == [dtype, dtype] and out.logits.dtype == dtype


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_fused_layer_is_run_in_what_was_asked(precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by autocast, which on a GPU runs it in float16 whatever it is set to."""
    seen: list[tuple[bool, set[torch.dtype]]] = []
    plain = torch.lstm

    def lstm(x: Tensor, state: Any, weights: Any, *options: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), {tensor.dtype for tensor in (x, *state, *weights)}))
        return plain(x, state, weights, *options)

    monkeypatch.setattr(torch, "lstm", lstm)
    trainer(*LSTM, f"precision={precision}").train_epoch()
    assert (False, {dtype}) in seen and all(call in ((False, {dtype}), (False, {torch.float32})) for call in seen)
