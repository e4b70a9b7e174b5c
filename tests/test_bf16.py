"""precision=bf16: gradients that methods edit keep their expected value, and all LSTM variants use the same dtype."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from test_trainer import data_home, trainer
from torch import Generator, Tensor

from models.lstm import Recurrent
from regularizers.activation import ActivationPenalty
from regularizers.base import Regularizer
from regularizers.per import PER
from regularizers.vcl import VCL

__all__ = ["data_home"]  # a fixture
DRAWN = 3e7  # elements that are rounded to see what survives of a layer: more draws where the layer is small
CNN11 = ["dataset=cifar10", "dataset.source=embedded", "model=cnn11", "norm=none", "profile.train=20", "batch_size=20", "balanced=false"]
LSTM = ["dataset=docs", "model=lstm", "model.width=100", "norm=none", "balanced=false", "batch_size=20", "profile.train=2000"]
LSTM_ROWS = {
    "plain": [],
    "tied": ["model.tie_embeddings=true"],
    "loop": ["model.loop=true"],
    "masks for rows": ["model.variational_dropout=true"],
    "one mask": ["model.variational_dropout=true", "model.recurrent_mask=shared"],
    "rbn": ["norm=rbn"],
}


def method(made: Regularizer, seed: int = 0) -> Regularizer:
    made.rng = Generator().manual_seed(seed)
    return made


# The rounding


def test_rounding_is_unbiased_and_to_the_two_neighbours() -> None:
    x = torch.randn(4, 50, generator=Generator().manual_seed(1))
    rounding, draws = method(Regularizer()), 4000
    found = torch.stack([rounding.rounded(x, torch.bfloat16).float() for _ in range(draws)])
    gap = found.amax(0) - found.amin(0)  # one step of a bfloat16, at most 2^-7 of the number
    assert ((found == found.amax(0)) | (found == found.amin(0))).all() and (gap > 0).all() and (gap <= x.abs() / 128).all()
    assert ((found.mean(0) - x).abs() < 5 * 0.5 * gap / math.sqrt(draws)).all()
    nearest = x.bfloat16().float()
    assert ((nearest - x).abs() > 5 * 0.5 * gap / math.sqrt(draws)).any()  # which the rounding to nearest would not pass


def test_rounding_of_any_two_elements_is_uncorrelated() -> None:
    """So the mean over a batch is as exact as with draws of their own. A standard error is 1/64."""
    x = torch.full((3, 4), 1 + 2**-8)  # half way between two bfloat16 numbers
    rounding = method(Regularizer())
    found = torch.stack([rounding.rounded(x, torch.bfloat16).flatten() for _ in range(4096)])
    correlation = torch.corrcoef(found.float().T) - torch.eye(12)
    assert correlation.abs().max() < 0.08


def test_rounding_leaves_what_needs_none() -> None:
    numbers = torch.tensor([[0.0, -0.0, 1.5, -3.0, 2.0**-126, torch.finfo(torch.float32).max]])
    others = torch.tensor([[2**31 - 1, -1, 0x7FC00000, -(2**22), 0x7F800000, -(2**23)]], dtype=torch.int32).view(torch.float32)
    assert others[0, :4].isnan().all() and others[0, 4:].isinf().all()  # the first ones with all bits set, as a GPU makes them
    found = method(Regularizer()).rounded(torch.cat([numbers, others]), torch.bfloat16)
    assert torch.equal(found[0, :5].float(), numbers[0, :5]) and found[0, 5] in (math.inf, torch.finfo(torch.bfloat16).max)
    assert found[1].isnan().all()
    x = torch.randn(3, 5)
    assert Regularizer().rounded(x, torch.float32) is x  # without a generator


def test_rounding_keeps_shapes() -> None:
    x = torch.randn(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = method(Regularizer()).rounded(x.contiguous(memory_format=layout), torch.bfloat16)
        assert found.shape == x.shape and (found.float() - x).abs().max() < x.abs().max() / 128


# What survives of a pull


def surviving(*words: str) -> dict[int, float]:
    """For each tap in one step: the mean addition to the gradient, projected on the exact addition; 1 means nothing is lost."""
    made = trainer(*words)
    (penalty,) = made.regularizers.values()
    assert isinstance(penalty, ActivationPenalty)
    found: dict[int, float] = {}
    edit, rounded = penalty.edit, penalty.rounded

    def seen(place: int, incoming: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        before = penalty.rows(incoming, incoming).float()
        pull = (gradient - before).double()
        kept = torch.zeros_like(pull)
        draws = math.ceil(DRAWN / pull.numel()) if dtype == torch.bfloat16 else 1
        for _ in range(draws):
            kept += rounded(gradient, dtype).float().sub_(before)
        found[place] = float((kept / draws * pull).sum() / pull.square().sum())
        return rounded(gradient, dtype)

    def watched(h: Tensor, place: int, gradient: Tensor) -> Tensor:
        penalty.rounded = partial(seen, place, gradient)  # type: ignore[method-assign]
        return edit(h, place, gradient)

    penalty.edit = watched  # type: ignore[method-assign]
    made.take_step(*next(iter(made.samples())))
    return found


PULLS = [
    *[
        (CNN11, f"method=per method.per.mode={mode} method.per.weight={weight}")
        for mode in ("analytic", "slices")
        for weight in (3e-4, 1e-5)
    ],
    *[(CNN11, f"method={name} method.{name}.weight=1e-6") for name in ("l1", "l2")],
    *[(LSTM + words, "method=per method.per.weight=3e-5") for words in LSTM_ROWS.values()],
    *[(LSTM, f"method={name} method.{name}.weight=3e-5") for name in ("l1", "l2")],
]


@pytest.mark.parametrize(("words", "pull"), PULLS, ids=lambda words: " ".join(words) if isinstance(words, list) else words)
def test_a_pull_survives_in_bf16_as_in_fp32(words: list[str], pull: str) -> None:
    """Rounded to nearest, hundredths of PER's were left in most layers."""
    half, full = (surviving(*words, *pull.split(), f"precision={precision}") for precision in ("bf16", "fp32"))
    assert half.keys() == full.keys() and len(half) == (2 if words[1] == "model=lstm" else 10)
    assert all(0.9 < share < 1.1 for share in half.values()), half
    assert all(0.99 < share < 1.01 for share in full.values()), full


def test_nearest_rounding_loses_the_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above must see."""
    monkeypatch.setattr(Regularizer, "rounded", lambda self, gradient, dtype: gradient.to(dtype))
    found = surviving(*CNN11, "method=per", "method.per.mode=analytic", "method.per.weight=1e-5", "precision=bf16")
    assert found[7] < 0.1 and found[5] < 0.1


def test_vcl_s_gradient_survives_in_bf16() -> None:
    penalty = method(VCL(0.01))
    part, gradient = torch.zeros(10, 64), torch.randn(20, 64, generator=Generator().manual_seed(1)).bfloat16()
    part.grad = 1e-4 * torch.randn(10, 64, generator=Generator().manual_seed(2))
    kept = torch.stack([penalty.joined(part, gradient).float() - gradient.float() for _ in range(3000)]).mean(0)
    assert not kept[10:].any()
    assert float((kept[:10] * part.grad).sum() / part.grad.square().sum()) == pytest.approx(1, abs=0.1)


# The language models


@pytest.mark.parametrize("row", LSTM_ROWS)
def test_all_language_models_have_taps_in_what_was_asked(row: str) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        made = trainer(*LSTM, *LSTM_ROWS[row], "method=per", f"precision={precision}")
        out = made.run(made.take(*next(iter(made.samples())))[0])
        assert [h.dtype for h in out.activations] == [dtype, dtype] and out.logits.dtype == dtype


def test_the_fused_layer_is_run_in_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by autocast, which on a GPU runs it in float16 whatever it is set to."""
    seen: list[tuple[bool, set[torch.dtype]]] = []
    plain = torch.lstm

    def lstm(x: Tensor, state: Any, weights: Any, *options: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), {one.dtype for one in (x, *state, *weights)}))
        return plain(x, state, weights, *options)

    monkeypatch.setattr(torch, "lstm", lstm)
    for precision in ("bf16", "fp32"):
        trainer(*LSTM, f"precision={precision}").train_epoch()
    half, full = (False, {torch.bfloat16}), (False, {torch.float32})
    assert {dtype for _, dtypes in seen for dtype in dtypes} == {torch.bfloat16, torch.float32} and all(one in (half, full) for one in seen)


def test_fused_and_stepped_layers_agree_in_bf16() -> None:
    """Within what bfloat16 resolves, forward and backward; each is as near to float32."""
    torch.manual_seed(0)
    x, incoming = torch.randn(4, 20, 32), torch.randn(4, 20, 32)
    found = {}
    for loop in (False, True):
        for bf16 in (False, True):
            torch.manual_seed(1)
            layer = Recurrent(32, 32, lambda units: torch.nn.Identity(), loop)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out, (_, c) = layer(x, (torch.zeros(4, 32), torch.zeros(4, 32)))
            out.backward(incoming.to(out.dtype))
            gradients = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
            found[loop, bf16] = torch.cat([out.detach().float().flatten(), c.detach().float().flatten()]), gradients
    for loop in (False, True):
        for half, full in zip(found[loop, True], found[False, False], strict=True):
            assert 1e-5 < (half - full).norm() / full.norm() < 2e-2


def test_per_draws_for_its_directions_alone_in_float32() -> None:
    """So runs in float32 keep their numbers."""
    penalty = method(PER(1, slices=4))
    assert isinstance(penalty, PER)
    h = torch.randn(3, 20)
    penalty.measured = [torch.zeros(4)]
    penalty.edit(h, 0, torch.zeros(3, 20))
    after = torch.rand(1, generator=penalty.rng)
    rng = Generator().manual_seed(0)
    torch.empty(4, 20).normal_(generator=rng)
    assert torch.equal(after, torch.rand(1, generator=rng))
