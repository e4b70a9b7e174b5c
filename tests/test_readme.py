"""Tests of the README: its numbers are those of runs/reference, its commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


# the files of runs/reference of those blocks whose marks are not their names
FILES = {
    "itdm_1": "itdm_1-only=FMNIST.md",
    "itdm_2": "figures/itdm_2-only=FMNIST.md",
    "itdm_4": "itdm_4-1000-images.md",
    "itdm_lr": "itdm_lr-1000-images.md",
    "per_4": "per_4-464800-words.md",
    "unitization_short": "unitization_demo-profile=short.md",
    "lamix_mnist": "lamix_mnist-20-epochs.md",
    "compare-gco": "puzzle_mask-gco.txt",
}


def test_tables_are_the_reference() -> None:
    blocks = re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", README, re.S)
    assert len(blocks) > 20 and {*FILES} <= {mark for mark, _ in blocks} and len(blocks) == README.count("<!-- /")
    for mark, text in blocks:
        names = [FILES[mark]] if mark in FILES else [f"{mark}.md", f"figures/{mark}.md", f"{mark}.txt"]
        files = [path for name in names if (path := ROOT / "runs" / "reference" / name).is_file()]
        assert dedent(text).strip() in [file.read_text().strip() for file in files], mark


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
