"""The README says what is so: its numbers are those of runs/reference, its commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("mark", "file"),
    [
        ("demo", "demo.md"),
        ("itdm_1", "itdm_1-only=FMNIST.md"),
        ("itdm_2", "figures/itdm_2-only=FMNIST.md"),
        ("itdm_collapse", "figures/itdm_collapse.md"),
        ("itdm_4", "itdm_4-1000-images.md"),
        ("itdm_lr", "itdm_lr-1000-images.md"),
        ("per_demo", "per_demo.md"),
        ("per_lstm_demo", "per_lstm_demo.md"),
        ("per_4", "per_4-464800-words.md"),
        ("bench-lstm", "bench-lstm.txt"),
        ("per_minimiser", "figures/per_minimiser.md"),
        ("per_timing", "figures/per_timing.md"),
        ("bench", "bench.txt"),
        ("bench-per", "bench-per.txt"),
        ("unitization_bounds", "figures/unitization_bounds.md"),
        ("unitization_demo", "unitization_demo.md"),
        ("unitization_short", "unitization_demo-profile=short.md"),
        ("covariate_shift", "figures/covariate_shift.md"),
        ("bench-norms", "bench-norms.txt"),
        ("lamix_demo", "lamix_demo.md"),
        ("lamix_demo_7", "figures/lamix_demo_7.md"),
        ("lamix_mnist", "lamix_mnist-20-epochs.md"),
        ("bench-lamix", "bench-lamix.txt"),
        ("lamix_puzzle", "figures/lamix_puzzle.md"),
        ("lamix_puzzle_demo", "lamix_puzzle_demo.md"),
        ("compare-gco", "puzzle_mask-gco.txt"),
        ("bench-puzzle", "bench-puzzle.txt"),
    ],
)
def test_tables_are_the_reference(mark: str, file: str) -> None:
    (block,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, re.S)
    assert dedent(block).strip() == (ROOT / "runs" / "reference" / file).read_text().strip()


def test_commands_name_what_exists() -> None:
    commands = re.findall(r"^ {4}(?:python -m|\./)(.*?)(?: {2,}#.*)?$", README, re.M)
    assert len(commands) > 10
    for group in ("table", "figure", "experiment", "dataset", "model", "norm", "profile"):
        for name in re.findall(rf"(?<![\w.]){group}=(\w+)", "\n".join(commands)):
            assert (ROOT / "conf" / group / f"{name}.yaml").is_file(), f"{group}={name}"
    for module in re.findall(r"^ {4}python -m (\S+)", README, re.M):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
