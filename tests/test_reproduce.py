"""reproduce.sh: what it runs and what it says when it cannot. Nothing here reaches the network or the real .venv.

Every test has a copy of the script in a folder of its own, with a space in its name, and a PATH that holds the few tools the
script needs and, where the test is about them, stand-ins for Python, uv and df that write down how they were called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["awk", "bash", "cat", "cksum", "cut", "df", "dirname", "du", "env", "grep", "mkdir", "readlink", "rm", "sh", "sleep", "uname"]

# The Python inside .venv: fails where the arguments say so, to see what comes of it.
VENV_PYTHON = """
case "$*" in *version_info*) echo 3.12; exit ;; esac
echo "python|$PWD|${DATA_DIR-}|$*" >>"$CALLS"
case "$*" in
  *table=broken*) exit 3 ;;
  *table=odd*) exit 1 ;;
  "-m pip"*) echo "${PIP_SAYS-}"; [ -z "${PIP_SAYS-}" ] || exit 1 ;;
esac
"""
# A Python on the PATH that can make a .venv, by itself or as `python -m venv`; its pip is up to the test.
PYTHON = """
case "$*" in
  *version_info*) echo "${FAKE_VERSION-3.12}" ;;
  *fcntl*) exec "$REAL_PYTHON" "$@" ;;
  "-m venv"*) echo "$*" >>"$CALLS"; [ -z "${NO_VENV-}" ] || { echo "No module named venv"; exit 1; }
    mkdir -p .venv/bin; cat "$VENV_PYTHON" >.venv/bin/python; chmod +x .venv/bin/python ;;
  "-m pip"*) echo "$*" >>"$CALLS"; echo "${PIP_SAYS-No module named pip}"; exit 1 ;;
esac
"""
UV = """
echo "uv $*" >>"$CALLS"
case "$*" in
  venv*) mkdir -p .venv/bin; cat "$VENV_PYTHON" >.venv/bin/python; chmod +x .venv/bin/python ;;
  pip*) sleep "${UV_SLEEPS-0}"; echo "${UV_SAYS-}"; exit "${UV_CODE-0}" ;;
esac
"""


class Copy:
    """A copy of the script, its surroundings, and what was called in them."""

    def __init__(self, tmp: Path) -> None:
        self.root = tmp / "a clone"
        self.bin = tmp / "bin"
        self.calls_file = tmp / "calls"
        self.elsewhere = tmp / "elsewhere"
        for folder in (self.root, self.bin, self.elsewhere):
            folder.mkdir()
        for name in ("reproduce.sh", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for kind, names in {"table": ["demo", "odd", "broken", "_base"], "figure": ["demo", "curves"]}.items():
            (self.root / "conf" / kind).mkdir(parents=True)
            for name in names:
                (self.root / "conf" / kind / f"{name}.yaml").touch()
        for tool in [*TOOLS, "chmod"]:
            path = shutil.which(tool)
            assert path is not None, f"these tests need {tool}"
            (self.bin / tool).symlink_to(path)
        self.venv_python = self.script(tmp / "venv-python", VENV_PYTHON)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(tmp),
            "LANG": "C.UTF-8",
            "CALLS": str(self.calls_file),
            "REAL_PYTHON": sys.executable,
            "VENV_PYTHON": str(self.venv_python),
        }

    @staticmethod
    def script(path: Path, body: str) -> Path:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def tool(self, name: str, body: str) -> None:
        self.script(self.bin / name, body)

    def command(self, *args: str) -> list[str]:
        return [str(self.bin / "bash"), str(self.root / "reproduce.sh"), *args]

    def run(self, *args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            cwd=cwd or self.root,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / ".installed"

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def modules(self) -> list[str]:
        """The arguments of every call of the Python inside .venv."""
        return [call.split("|", 3)[3] for call in self.calls if call.startswith("python|")]

    def installed(self) -> bool:
        lock = (self.root / "requirements.txt").read_bytes()
        checksum = subprocess.run(["cksum"], input=lock, capture_output=True, check=True).stdout.decode()
        return self.stamp.exists() and self.stamp.read_text() == checksum


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def ready(copy: Copy) -> Copy:
    """With a current .venv, and nothing on the PATH that could make one."""
    copy.script(copy.root / ".venv" / "bin" / "python", VENV_PYTHON)
    with (copy.root / "requirements.txt").open("rb") as lock, copy.stamp.open("wb") as stamp:
        subprocess.run(["cksum"], stdin=lock, stdout=stamp, check=True)
    return copy


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr with which the script gave up."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("reproduce.sh: "), done.stderr
    return done.stderr


# What it runs


def test_demonstration(ready: Copy) -> None:
    done = ready.run()
    assert done.returncode == 0, done.stderr
    assert ready.modules == ["-m experiments.table table=demo", "-m experiments.figure figure=demo"]
    assert done.stdout.splitlines()[-1].endswith(" .venv/bin/tensorboard --logdir runs --host 127.0.0.1")


def test_overrides_alone_are_for_the_demonstration(ready: Copy) -> None:
    assert ready.run("profile=smoke", "~x", "+y=a b").returncode == 0
    assert ready.modules == [
        "-m experiments.table table=demo profile=smoke ~x +y=a b",
        "-m experiments.figure figure=demo profile=smoke ~x +y=a b",
    ]


def test_every_table_runs_and_the_worst_code_counts(ready: Copy) -> None:
    done = ready.run("broken", "seeds=2", "odd", "curves", "-m", "demo")
    assert done.returncode == 3
    assert ready.modules == [
        "-m experiments.table table=broken seeds=2 -m",
        "-m experiments.table table=odd seeds=2 -m",
        "-m experiments.figure figure=curves seeds=2 -m",
        "-m experiments.table table=demo seeds=2 -m",
    ]


def test_the_word_figure_names_figures(ready: Copy) -> None:
    ready.run("demo", "figure", "demo", "curves", "seeds=2", "table", "demo")
    wanted = [("table", "demo"), ("figure", "demo"), ("figure", "curves"), ("table", "demo")]
    assert ready.modules == [f"-m experiments.{kind} {kind}={name} seeds=2" for kind, name in wanted]
    done = ready.run("figure", "odd")
    assert done.returncode == 2 and "there is no table 'odd'" in done.stderr


def test_figure_of_a_failed_demonstration_is_not_drawn(ready: Copy) -> None:
    ready.script(ready.root / ".venv" / "bin" / "python", VENV_PYTHON + "exit 4")
    assert ready.run().returncode == 4
    assert ready.modules == ["-m experiments.table table=demo"]


def test_tests(ready: Copy) -> None:
    assert ready.run("test").returncode == 0
    assert ready.run("test", "tests/test_x.py", "-k", "a or b").returncode == 0
    everything, some = ready.modules
    assert everything.startswith("-m pytest -n 3 --dist worksteal --cov ") and "--cov-fail-under=90" in everything
    assert some == "-m pytest tests/test_x.py -k a or b"


def test_from_another_folder_and_through_a_link(ready: Copy) -> None:
    link = ready.elsewhere / "link.sh"
    link.symlink_to(Path("..") / "a clone" / "reproduce.sh")
    for script in ("../a clone/reproduce.sh", "link.sh"):
        ready.calls_file.unlink(missing_ok=True)
        done = subprocess.run(
            [str(ready.bin / "bash"), script, "demo"],
            cwd=ready.elsewhere,
            env=ready.env | {"DATA_DIR": "some data", "CDPATH": str(ready.root.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # Runs in the clone's own folder, with the caller's relative DATA_DIR made absolute.
        assert ready.calls == [f"python|{ready.root}|{ready.elsewhere}/some data|-m experiments.table table=demo"]
        assert "a\\ clone && .venv/bin/tensorboard" in done.stdout


def test_absolute_data_dir_stays(ready: Copy) -> None:
    ready.run("demo", DATA_DIR="/data sets")
    assert ready.calls[0].split("|")[2] == "/data sets"


# What it says


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_needs_no_set_up(copy: Copy, word: str) -> None:
    done = copy.run(word)
    assert done.returncode == 0 and not done.stderr
    assert len(done.stdout.splitlines()) < 25
    assert "broken, demo, odd" in done.stdout and "curves, demo" in done.stdout and "_base" not in done.stdout
    assert not (copy.root / ".venv").exists() and not (copy.root / ".tools").exists()


@pytest.mark.parametrize("args", [["nope"], ["demo", "x=1", "nope"], ["../table/demo"], [""], ["setup", "nope"]])
def test_unknown_table(copy: Copy, args: list[str]) -> None:
    line = refused(copy.run(*args), 2)
    assert f"'{args[-1]}'" in line and "broken, demo, odd" in line
    assert not (copy.root / ".venv").exists() and not (copy.root / ".tools").exists()


def test_python_too_old_or_too_new(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    line = refused(copy.run(FAKE_VERSION="3.9"), 1)
    assert "python3 is 3.9" in line and "3.11" in line
    assert "python3 is 3.14" in refused(copy.run(FAKE_VERSION="3.14"), 1)
    assert copy.calls == [] and not (copy.root / ".venv").exists()


def test_no_python(copy: Copy) -> None:
    assert "no python3" in refused(copy.run(), 1)
    assert "no /missing/python" in refused(copy.run(PYTHON="/missing/python"), 1)


def test_neither_pip_nor_uv(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    line = refused(copy.run(NO_VENV="1"), 1)
    assert "pip" in line and "install" in line and ".tools/setup.log" in line
    assert not copy.installed()


def test_no_network(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.tool("uv", UV)
    done = copy.run(UV_CODE="2", UV_SAYS="error: failed to fetch: dns error", PIP_SAYS="Temporary failure in name resolution")
    assert "network" in refused(done, 1) and ".tools/setup.log" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr and len(done.stdout.splitlines()) == 1
    assert not copy.installed()
    assert "dns error" in (copy.root / ".tools" / "setup.log").read_text()
    # Not done means not done: with the network back, set-up starts over, from an empty .venv.
    assert copy.run("setup").returncode == 0
    assert copy.installed()
    assert any(call.startswith("uv venv --clear") for call in copy.calls[-3:])


def test_no_network_without_uv(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    assert "network" in refused(copy.run(PIP_SAYS="Temporary failure in name resolution"), 1)
    assert not copy.installed()


def test_disk_full(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.tool("uv", UV)
    copy.tool("df", 'echo "Filesystem 1024-blocks Used Available Capacity Mounted on"; echo "/dev/x y 9 8 1048576 99% /a b"')
    line = refused(copy.run(), 1)
    assert "GB" in line and "1 GB are free" in line
    assert not (copy.root / ".venv").exists() and not copy.calls


def test_disk_full_underway(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.tool("uv", UV)
    assert "disk space" in refused(copy.run(UV_CODE="2", UV_SAYS="No space left on device (os error 28)", PIP_SAYS="[Errno 28]"), 1)
    assert not copy.installed()


# Set-up


def test_set_up_with_uv_once(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.tool("uv", UV)
    done = copy.run("demo")
    assert done.returncode == 0, done.stderr
    assert copy.installed()
    uv = [call for call in copy.calls if call.startswith("uv ") and call != "uv --version"]
    assert uv == [
        f"uv venv --clear --relocatable --python {copy.bin}/python3 .venv",
        "uv pip install --python .venv/bin/python --require-hashes -r requirements.txt",
    ]
    assert copy.modules == ["-m experiments.table table=demo"]
    # The second call runs no installer; a new lock does, in the .venv that is there.
    copy.calls_file.unlink()
    assert copy.run("setup").returncode == 0
    assert copy.calls == []
    (copy.root / "requirements.txt").write_text("# another lock\n")
    assert copy.run("setup").returncode == 0
    assert {call.split()[1] for call in copy.calls} == {"--version", "pip"}


def test_set_up_with_pip_where_uv_fails(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.tool("uv", "exit 1")
    assert copy.run("setup").returncode == 0
    assert copy.installed()
    assert copy.calls[:2] == ["-m pip install --quiet --upgrade --target .tools uv", "-m venv --clear .venv"]
    assert copy.modules[0].startswith("-m pip install ") and copy.modules[0].endswith("--require-hashes -r requirements.txt")


def test_chosen_python(copy: Copy) -> None:
    copy.tool("uv", UV)
    copy.script(copy.elsewhere / "my python", PYTHON)
    assert copy.run("setup", cwd=copy.elsewhere, PYTHON="./my python").returncode == 0
    assert f"--python {copy.elsewhere}/./my python .venv" in "\n".join(copy.calls)


def test_two_at_once(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.tool("uv", UV)
    both = [subprocess.Popen(copy.command("setup"), env=copy.env | {"UV_SLEEPS": "0.5"}, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sum(call.startswith("uv pip") for call in copy.calls) == 1
    assert copy.installed()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(copy: Copy) -> None:
    copy.tool("python3", PYTHON)
    copy.root.chmod(0o555)
    try:
        assert "cannot write" in refused(copy.run("setup"), 1)
    finally:
        copy.root.chmod(0o755)


# The lock


def test_lock_is_hashed_and_names_no_address() -> None:
    lock = (ROOT / "requirements.txt").read_text()
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock and " @ " not in lock
    pins = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert pins and all("==" in line and line.endswith("\\") for line in pins)
