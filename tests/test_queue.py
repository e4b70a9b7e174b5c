"""The runs that SLURM has: notes of what was submitted, and a stand-in for squeue. The real SLURM is in test_slurm.py."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.launching import missing, slurm
from experiments.launching.slurm import Job

IDS = ["0123456789", "abcdef0123", "00000000ff"]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The only squeue on the PATH is this shell script."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def made(body: str) -> None:
        path = tmp_path / "bin" / "squeue"
        path.write_text(f"#!/bin/sh\necho \"$*\" >'{tmp_path}/asked'\n{body}\n")
        path.chmod(0o755)

    return made


def test_squeue_is_asked_only_about_what_was_submitted(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    """And only where there is SLURM: the store may have been copied from a cluster."""
    with slurm.turn(tmp_path):
        slurm.note(tmp_path, IDS)
    assert slurm.listed(tmp_path) == {}
    squeue("exit 1")
    assert slurm.listed(tmp_path / "empty") == {} and not (tmp_path / "asked").exists()


def test_jobs_are_those_of_the_notes(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    with slurm.turn(tmp_path):
        many, single, over = slurm.note(tmp_path, IDS[:2]), slurm.note(tmp_path, IDS[2:]), slurm.note(tmp_path, ["ffffffffff"])
        squeue(f"echo '{many}|1|7_1|PENDING|Resources'; echo '{many}|0|7_0|RUNNING|None'; echo '{single}|N/A|8|PENDING|BeginTime'")
        expected = [("7_1", "PENDING", "Resources"), ("7_0", "RUNNING", "None"), ("8", "PENDING", "BeginTime")]
        assert slurm.listed(tmp_path) == dict(zip([IDS[1], IDS[0], IDS[2]], expected, strict=True))
        asked = (tmp_path / "asked").read_text().split()
        assert {*asked[2].removeprefix("--name=").split(",")} == {many, single, over}
        assert (tmp_path / ".queue" / f"{over}.json").exists()  # it may be the note of a command that is submitting
        assert len(slurm.listed(tmp_path, tidy=True)) == 3
    assert {path.stem for path in (tmp_path / ".queue").glob("*.json")} == {many, single}
    assert json.loads((tmp_path / ".queue" / f"{many}.json").read_text()) == IDS[:2]


def test_a_silent_cluster(
    tmp_path: Path, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has is not known, is not forgotten, and is waited for."""
    with slurm.turn(tmp_path):
        name = slurm.note(tmp_path, IDS)
    answers = {"exec /bin/sleep 60": "squeue has not answered for 0.1 s", "exit 4": "squeue ended with code 4"}
    for body, said in (answers | {"echo some; echo 'no contact' >&2; exit 1": "no contact"}).items():
        monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.1 if "sleep" in body else 60)
        squeue(body)
        with pytest.raises(slurm.Silent, match=f"^{said}$"):
            slurm.listed(tmp_path)
    assert [path.stem for path in (tmp_path / ".queue").glob("*.json")] == [name]

    squeue("echo 'no controller' >&2; exit 1")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if looks.count(slurm.RETRY_SECONDS) == 3:
            squeue(f"echo '{name}|2|9_2|RUNNING|None'")

    monkeypatch.setattr(time, "sleep", sleep)
    assert slurm.alive(tmp_path) == {IDS[2]: Job("9_2", "RUNNING", "None")}
    assert looks.count(slurm.RETRY_SECONDS) == 3
    assert re.fullmatch(r"retable: no controller; waiting for it \(.*\)\n", capsys.readouterr().err)


def test_one_command_submits_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = []
    with contextlib.ExitStack() as first:
        first.enter_context(slurm.turn(tmp_path))

        def sleep(seconds: float) -> None:
            sleeps.append(seconds)
            if sleeps.count(0.5) == 2:
                first.close()

        monkeypatch.setattr(time, "sleep", sleep)
        with slurm.turn(tmp_path):
            assert sleeps.count(0.5) == 2


def test_progress_in_words() -> None:
    ids = [*IDS, "1111111111", "2222222222"]
    states = {ids[0]: "done", ids[1]: "running", ids[2]: "resumable", ids[3]: "failed"}
    queue = {ids[2]: Job("1_0", "PENDING", ""), ids[1]: Job("1_1", "RUNNING", "")}
    assert missing._progress(ids, states, queue) == "1 done, 1 running, 1 queued, 1 failed, 1 missing of 5 runs"
