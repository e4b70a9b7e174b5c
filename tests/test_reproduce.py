"""Tests of reproduce.sh: what it runs, and what it says when it cannot. Nothing here reaches the network or the real .venv.

Every test has a copy of the script in a folder with a space in its name, and a PATH that holds the few tools that the script needs and
stand-ins for Python, uv and df that write down how they were called.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["awk", "bash", "cat", "cksum", "cut", "df", "dirname", "du", "env", "grep", "mkdir", "readlink", "rm", "sh", "sleep", "uname"]
# The Python inside .venv: fails where the arguments say so.
VENV_PYTHON = """#!/bin/sh
case "$*" in *version_info*) echo 3.12; exit ;; esac
echo "python|$PWD|${DATA_DIR-}|$*" >>"$CALLS"
case "$*" in
  *table=broken*) exit 3 ;;
  *table=odd*) exit 1 ;;
  *table=demo*) exit "${DEMO_CODE-0}" ;;
  "-m pip"*) echo "${PIP_SAYS-}"; [ -z "${PIP_SAYS-}" ] || exit 1 ;;
esac
"""
# A Python on the PATH that can make a .venv as `python -m venv`; it has no pip.
PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo "${FAKE_VERSION-3.12}" ;;
  *fcntl*) exec "$REAL_PYTHON" "$@" ;;
  "-m venv"*) echo "$*" >>"$CALLS"; [ -z "${NO_VENV-}" ] || { echo "No module named venv"; exit 1; }
    mkdir -p .venv/bin; cat "$VENV_PYTHON" >.venv/bin/python; chmod +x .venv/bin/python ;;
  "-m pip"*) echo "$*" >>"$CALLS"; echo "${PIP_SAYS-No module named pip}"; exit 1 ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >>"$CALLS"
case "$*" in
  venv*) mkdir -p .venv/bin; cat "$VENV_PYTHON" >.venv/bin/python; chmod +x .venv/bin/python ;;
  pip*) sleep "${UV_SLEEPS-0}"; echo "${UV_SAYS-}"; exit "${UV_CODE-0}" ;;
esac
"""


class Copy:
    """A copy of the script, its surroundings, and what was called in them."""

    def __init__(self, tmp: Path) -> None:
        self.root, self.bin, self.log = tmp / "a clone", tmp / "bin", tmp / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("reproduce.sh", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("table/demo", "table/odd", "table/broken", "table/_base", "figure/demo", "figure/curves"):
            self.script(self.root / "conf" / f"{name}.yaml", "")
        for tool in [*TOOLS, "chmod", "date"]:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/no/{tool}")
        self.script(tmp / "venv-python", VENV_PYTHON)
        self.env = {"PATH": str(self.bin), "HOME": str(tmp), "LANG": "C.UTF-8", "CALLS": str(self.log)}
        self.env |= {"REAL_PYTHON": sys.executable, "VENV_PYTHON": str(tmp / "venv-python")}

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *args: str, script: str = "", cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / "bash"), script or str(self.root / "reproduce.sh"), *args]
        settings = {"cwd": cwd or self.root, "env": self.env | env, "stdin": subprocess.DEVNULL}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)  # type: ignore[call-overload]

    def refused(self, code: int, *args: str, **env: str) -> str:
        """The one line on stderr with which the script gives up; nothing counts as installed."""
        done = self.run(*args, **env)
        assert done.returncode == code and done.stderr.count("\n") == 1 and done.stderr.startswith("reproduce.sh: "), done.stderr
        assert not self.installed()
        return done.stderr

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def modules(self) -> list[str]:
        """The arguments of every call of the Python inside .venv."""
        return [call.split("|", 3)[3] for call in self.calls if call.startswith("python|")]

    def checksum(self) -> bytes:
        return subprocess.run(["cksum"], input=(self.root / "requirements.txt").read_bytes(), capture_output=True, check=True).stdout

    def installed(self) -> bool:
        stamp = self.root / ".venv" / ".installed"
        return stamp.exists() and stamp.read_bytes() == self.checksum()


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Without a .venv; Python and uv are on the PATH."""
    made = Copy(tmp_path)
    made.script(made.bin / "python3", PYTHON)
    made.script(made.bin / "uv", UV)
    return made


@pytest.fixture
def ready(tmp_path: Path) -> Copy:
    """With a current .venv, and nothing on the PATH that could make one."""
    made = Copy(tmp_path)
    made.script(made.root / ".venv" / "bin" / "python", VENV_PYTHON)
    (made.root / ".venv" / ".installed").write_bytes(made.checksum())
    return made


# What it runs


def test_demonstration(ready: Copy) -> None:
    """Overrides alone are for the demonstration; the figure is not drawn when the table fails."""
    done = ready.run("profile=smoke", "~x", "+y=a b")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith(" .venv/bin/tensorboard --logdir runs --host 127.0.0.1")
    asked = "demo profile=smoke ~x +y=a b"
    assert ready.modules == [f"-m experiments.table table={asked}", f"-m experiments.figure figure={asked}"]
    assert ready.run(DEMO_CODE="4").returncode == 4 and ready.modules[2:] == ["-m experiments.table table=demo"]


def test_every_table_runs_and_the_worst_code_counts(ready: Copy) -> None:
    done = ready.run("broken", "seeds=2", "odd", "curves", "-m", "figure", "demo", "table", "demo")
    assert done.returncode == 3
    wanted = [("table", "broken"), ("table", "odd"), ("figure", "curves"), ("figure", "demo"), ("table", "demo")]
    assert ready.modules == [f"-m experiments.{kind} {kind}={name} seeds=2 -m" for kind, name in wanted]
    done = ready.run("figure", "odd")
    assert done.returncode == 2 and "there is no table 'odd'" in done.stderr


def test_tests(ready: Copy) -> None:
    for words in ([], ["all"], ["tests/test_x.py", "-k", "a or b"]):
        assert ready.run("test", *words).returncode == 0
    quick, everything, own = ready.modules
    assert quick.startswith("-m pytest -n 2 ") and "-m not slow" in quick and "--cov" not in quick
    assert everything.startswith("-m pytest -n 3 ") and "slow" not in everything and "--cov-fail-under=95" in everything
    assert own == "-m pytest tests/test_x.py -k a or b"


def test_from_another_folder_and_through_a_link(ready: Copy, tmp_path: Path) -> None:
    """It runs in the clone's own folder, with the caller's relative DATA_DIR made absolute."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.sh").symlink_to(Path("..") / "a clone" / "reproduce.sh")
    for script, data in (("../a clone/reproduce.sh", "/data sets"), ("link.sh", "my data")):
        done = ready.run("demo", script=script, cwd=tmp_path / "elsewhere", DATA_DIR=data, CDPATH=str(tmp_path))
        assert done.returncode == 0 and "a\\ clone && .venv/bin/tensorboard" in done.stdout, done.stderr
        assert ready.calls[-1] == f"python|{ready.root}|{tmp_path / 'elsewhere' / data}|-m experiments.table table=demo"


# What it says


def test_help_needs_no_set_up(copy: Copy) -> None:
    done = copy.run("--help")
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) < 25
    assert "broken, demo, odd" in done.stdout and "curves, demo" in done.stdout and "_base" not in done.stdout
    assert not (copy.root / ".venv").exists() and not (copy.root / ".tools").exists()


def test_unknown_table(copy: Copy) -> None:
    for args in (["demo", "x=1", "nope"], ["../table/demo"], [""], ["setup", "nope"]):
        line = copy.refused(2, *args)
        assert f"'{args[-1]}'" in line and "broken, demo, odd" in line and not (copy.root / ".tools").exists()


def test_no_python_that_fits(copy: Copy) -> None:
    line = copy.refused(1, FAKE_VERSION="3.9")
    assert "python3 is 3.9" in line and "3.11" in line
    assert "python3 is 3.14" in copy.refused(1, FAKE_VERSION="3.14") and "no /missing/python" in copy.refused(1, PYTHON="/missing/python")
    (copy.bin / "python3").unlink()
    assert "no python3" in copy.refused(1) and copy.calls == [] and not (copy.root / ".venv").exists()


def test_set_up_that_fails(copy: Copy) -> None:
    """Each cause has its line. A set-up that failed starts over, from an empty .venv."""
    full = {"UV_CODE": "2", "UV_SAYS": "No space left on device (os error 28)", "PIP_SAYS": "[Errno 28]"}
    assert "disk space" in copy.refused(1, **full)
    line = copy.refused(1, UV_CODE="2", UV_SAYS="error: failed to fetch: dns error", PIP_SAYS="Temporary failure in name resolution")
    assert "network" in line and ".tools/setup.log" in line and "dns error" in (copy.root / ".tools" / "setup.log").read_text()
    assert copy.run("setup").returncode == 0 and copy.installed()
    assert any(call.startswith("uv venv --clear") for call in copy.calls[-3:])
    shutil.rmtree(copy.root / ".venv")
    (copy.bin / "uv").unlink()
    assert "network" in copy.refused(1, PIP_SAYS="Temporary failure in name resolution")
    shutil.rmtree(copy.root / ".venv")
    line = copy.refused(1, NO_VENV="1")
    assert "pip" in line and "install" in line
    copy.script(copy.bin / "df", "#!/bin/sh\necho Filesystem\necho '/dev/x y 9 8 1048576 99% /a b'\n")
    assert "GB" in (line := copy.refused(1)) and "1 GB are free" in line


# Set-up


def test_set_up_with_uv_once(copy: Copy) -> None:
    copy.script(copy.root.parent / "my python", PYTHON)  # a path relative to the caller's folder
    assert copy.run("demo", cwd=copy.bin, PYTHON="../my python").returncode == 0 and copy.installed()
    assert [call for call in copy.calls if call.startswith("uv ") and call != "uv --version"] == [
        f"uv venv --clear --relocatable --python {copy.bin}/../my python .venv",
        "uv pip install --python .venv/bin/python --require-hashes -r requirements.txt",
    ]
    assert copy.modules == ["-m experiments.table table=demo"]
    # The second call runs no installer; a new lock does, in the .venv that is there.
    copy.log.unlink()
    assert copy.run("setup").returncode == 0 and copy.calls == []
    (copy.root / "requirements.txt").write_text("# another lock\n")
    assert copy.run("setup").returncode == 0 and {call.split()[1] for call in copy.calls} == {"--version", "pip"}


def test_set_up_with_pip_where_uv_fails(copy: Copy) -> None:
    copy.script(copy.bin / "uv", "#!/bin/sh\nexit 1\n")
    assert copy.run("setup").returncode == 0 and copy.installed()
    assert copy.calls[:2] == ["-m pip install --quiet --upgrade --target .tools uv", "-m venv --clear .venv"]
    assert copy.modules[0].startswith("-m pip install ") and copy.modules[0].endswith("--require-hashes -r requirements.txt")


def test_two_at_once(copy: Copy) -> None:
    command, env = [str(copy.bin / "bash"), str(copy.root / "reproduce.sh"), "setup"], copy.env | {"UV_SLEEPS": "0.5"}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sum(call.startswith("uv pip") for call in copy.calls) == 1 and copy.installed()


def test_lock_is_hashed_and_names_no_address() -> None:
    lock = (ROOT / "requirements.txt").read_text()
    assert not any(word in lock for word in ("://", "--index", "--find-links", " @ "))
    pins = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert pins and all("==" in line and line.endswith("\\") for line in pins)
