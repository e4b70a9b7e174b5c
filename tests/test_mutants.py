"""The mutants of the mutation check fit the product as it is; `python -m tests.mutants` runs them."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml
from mutants import COUNTS, MUTANTS, ROOT, Mutant


def test_counts_by_part() -> None:
    assert Counter(mutant.part for mutant in MUTANTS) == COUNTS and sum(COUNTS.values()) == 60
    assert len({mutant.name for mutant in MUTANTS}) == 60


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_mutants_fit_their_file(file: str) -> None:
    for mutant in (mutant for mutant in MUTANTS if mutant.file == file):
        text = mutant.text()  # raises if the old text does not occur exactly once
        assert text != (ROOT / file).read_text()
        compile(text, file, "exec") if file.endswith(".py") else yaml.safe_load(text)
        assert all((ROOT / test).is_file() for test in mutant.tests), mutant


def test_a_text_that_is_gone_is_said() -> None:
    gone = Mutant("store", "experiments/store.py", (), "nothing", "no such text", "")
    with pytest.raises(
        ValueError, match=r"^experiments/store\.py: 'no such text' \(mutant 'nothing'\) must occur once and occurs 0 times$"
    ):
        gone.text()
