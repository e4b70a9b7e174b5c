"""What a cluster's queue is known to hold: by notes, and by a stand-in for squeue. The real SLURM is in test_slurm.py."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import cluster, complete
from experiments.cluster import Job

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


def test_where_nothing_was_submitted_nobody_is_asked(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    squeue("exit 1")
    assert cluster.live(tmp_path) == {} and not (tmp_path / "asked").exists()


def test_jobs_are_those_of_the_notes(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    with cluster.turn(tmp_path):
        many, single, over = cluster.note(tmp_path, IDS[:2]), cluster.note(tmp_path, IDS[2:]), cluster.note(tmp_path, ["ffffffffff"])
    squeue(f"echo '{many}|1|7_1|PENDING|Resources'; echo '{many}|0|7_0|RUNNING|None'; echo '{single}|N/A|8|PENDING|BeginTime'")
    expected = {IDS[1]: Job("7_1", "PENDING", "Resources"), IDS[0]: Job("7_0", "RUNNING", "None"), IDS[2]: Job("8", "PENDING", "BeginTime")}
    assert cluster.live(tmp_path) == expected
    asked = (tmp_path / "asked").read_text().split()
    assert {*asked[2].removeprefix("--name=").split(",")} == {many, single, over}
    assert (tmp_path / ".queue" / f"{over}.json").exists()  # who only looks may look before it is submitted
    assert cluster.live(tmp_path, tidy=True) == expected
    assert {path.stem for path in (tmp_path / ".queue").glob("*.json")} == {many, single}
    assert json.loads((tmp_path / ".queue" / f"{many}.json").read_text()) == IDS[:2]


def test_a_silent_cluster(tmp_path: Path, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has is not known then, and not forgotten."""
    with cluster.turn(tmp_path):
        cluster.note(tmp_path, IDS)
    squeue("echo some; echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(cluster.Silent, match=r"^slurm_load_jobs error: Unable to contact slurm controller$"):
        cluster.live(tmp_path, tidy=True)
    squeue("exit 4")
    with pytest.raises(cluster.Silent, match=r"^squeue ended with code 4$"):
        cluster.live(tmp_path)
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.1)
    squeue("exec /bin/sleep 10")
    with pytest.raises(cluster.Silent, match=r"^squeue has not answered for 0.1 s$"):
        cluster.live(tmp_path)
    assert len(list((tmp_path / ".queue").glob("*.json"))) == 1


def test_the_asker_waits_for_a_silent_cluster(
    tmp_path: Path, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.turn(tmp_path):
        name = cluster.note(tmp_path, IDS)
    squeue("echo 'no controller' >&2; exit 1")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if looks.count(complete.QUEUE_SECONDS) == 3:
            squeue(f"echo '{name}|2|9_2|RUNNING|None'")

    monkeypatch.setattr(time, "sleep", sleep)
    assert complete._queue(tmp_path, tidy=True) == {IDS[2]: Job("9_2", "RUNNING", "None")}
    assert looks.count(complete.QUEUE_SECONDS) == 3 and capsys.readouterr().err.startswith("retable: no controller; waiting for it (")


def test_without_slurm_nothing_is_queued(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    """A store that was copied from a cluster, or is shared with one."""
    with cluster.turn(tmp_path):
        cluster.note(tmp_path, IDS)
    assert not (tmp_path / "bin" / "squeue").exists() and cluster.live(tmp_path) == {}


def test_one_asker_at_a_time(tmp_path: Path) -> None:
    order = []

    def other() -> None:
        with cluster.turn(tmp_path):
            order.append("other")

    with cluster.turn(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(20)
    assert order == ["first", "other"]


def test_progress_in_words() -> None:
    ids = [*IDS, "1111111111", "2222222222"]
    states = {ids[0]: "done", ids[1]: "running", ids[2]: "resumable", ids[3]: "failed"}
    queue = {ids[2]: Job("1_0", "PENDING", ""), ids[1]: Job("1_1", "RUNNING", "")}
    text = complete._progress(ids, states, queue)  # type: ignore[arg-type]
    assert text == "1 done, 1 running, 1 queued, 1 failed, 1 missing of 5 runs"
