"""Variational dropout (PER's protocol sheet, P17): its masks, and what they are multiplied with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lstm import NONE, WORDS, ids, model
from torch import Tensor

from models.lstm import LanguageModel, Recurrent, lstm
from models.net import record


def probe(name: str, rate: float = 0.5, rows: int = 6, length: int = 9, **options: Any) -> tuple[LanguageModel, list[Tensor]]:
    """A model with this dropout alone, and what it multiplies by, in two windows."""
    rates = {"p_e": 0.0, "p_i": 0.0, "p_h": 0.0, "p_o": 0.0} | {name: rate}
    net = model(variational_dropout=True, width=20, **rates, **options)
    drawn: list[Tensor] = []
    mask = net.features.mask

    def seen(which: str, *more: Any) -> Tensor | None:
        found = mask(which, *more)
        if found is not None:
            assert which == name
            drawn.append(found)
        return found

    net.features.mask = seen  # type: ignore[method-assign]
    for _ in range(2):
        net(ids(rows, length))
    return net, drawn


SHAPES = {"p_e": (1, (6, WORDS)), "p_i": (2, (6, 1, 20)), "p_h": (2, (6, 20)), "p_o": (1, (6, 1, 20))}


@pytest.mark.parametrize("name", SHAPES)
def test_masks_are_of_rows_and_windows_and_not_of_steps(name: str) -> None:
    drawn = probe(name, rate=0.25)[1]
    times, shape = SHAPES[name]
    assert [tuple(mask.shape) for mask in drawn] == [shape] * 2 * times  # no dimension of steps: one value for all of them
    assert {*torch.cat([mask.flatten() for mask in drawn]).tolist()} == {0.0, 1 / 0.75}
    for mask in drawn:
        assert not all(torch.equal(mask[0], row) for row in mask)
        assert not any(torch.equal(mask, other) for other in drawn if other is not mask)


def test_a_dropped_word_is_dropped_wherever_it_stands() -> None:
    net, _ = probe("p_e")
    seen: list[Tensor] = []
    net.features.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach()))
    words = torch.randint(8, (6, 30), generator=torch.Generator().manual_seed(1))
    net(words)
    embedded = net.features.embedding.weight.detach()[words]
    fate = (seen[0] / embedded).mean(-1).round(decimals=6)  # [rows, steps]
    assert {*fate.flatten().tolist()} == {0.0, 2.0}
    for row in range(6):
        for word in range(8):
            assert len({*fate[row][words[row] == word].tolist()}) <= 1
    assert len({tuple(fate[row][words[row] == 0].tolist()[:1]) for row in range(6)}) == 2  # each row drops words of its own


def test_what_is_dropped_is_dropped_at_every_step() -> None:
    net, _ = probe("p_o")
    taps = record(net)
    out = net.features(ids(6, 9)).detach()
    raw = taps[-1].detach().view(6, 9, 20)
    ratio = (out / raw).round(decimals=9)
    assert torch.equal(ratio, ratio[:, :1].expand_as(ratio)) and {*ratio.flatten().tolist()} == {0.0, 2.0}


def test_a_shared_recurrent_mask_is_one_for_all_rows_and_needs_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recurrent, "stepped", lambda *_: pytest.fail("it stepped"))
    drawn = probe("p_h", recurrent_mask="shared")[1]
    assert [tuple(mask.shape) for mask in drawn] == [(1, 20)] * 4


def test_rows_of_one_mask_are_the_shared_mask() -> None:
    """The exact loop, given the same mask in every row, gives what the fused layer gives with the shared one."""
    shared, rows = (model(variational_dropout=True, p_e=0, p_i=0, p_o=0, recurrent_mask=kind) for kind in ("shared", "rows"))
    mask = rows.features.mask

    def repeated(name: str, like: Tensor, *shape: int) -> Tensor | None:
        found = mask(name, like, *((1, *shape[1:]) if name == "p_h" else shape))
        return found.expand(shape) if name == "p_h" and found is not None else found

    rows.features.mask = repeated  # type: ignore[method-assign]
    found = []
    for net in (shared, rows):
        torch.manual_seed(4)
        found.append(net(ids(3, 9)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "shared"])
def test_nothing_is_dropped_in_evaluation(kind: str) -> None:
    dropped, plain = model(variational_dropout=True, recurrent_mask=kind).eval(), model().eval()
    assert torch.equal(dropped(ids(3, 9)), plain(ids(3, 9)))
    zero = model(variational_dropout=True, p_e=0, p_i=0, p_h=0, p_o=0)
    assert torch.equal(zero(ids(3, 9)), model()(ids(3, 9)))  # nor with a probability of 0 in training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_e": 1.0}, "p_e: 1.0 is not allowed; it must be a number from 0 to below 1"),
        ({"p_h": -0.1}, "p_h: -0.1 is not allowed"),
        ({"recurrent_mask": "each"}, "recurrent_mask: 'each' is not known; allowed: rows, shared"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        lstm(10, NONE, **options)
