#!/usr/bin/env bash
# Sets up .venv if needed, then runs the demonstration, tables, figures or tests: see usage. Works from bash 3.2 on.
set -euo pipefail
trap 'exit 130' INT # Ctrl-C ends everything, not just the table in progress

usage() {
  cat <<TEXT
./reproduce.sh                         the demonstration: a small table and its figure, minutes on a CPU, nothing to download
./reproduce.sh TABLE... [KEY=VALUE]    one or more tables of the papers (or figures, by name)
./reproduce.sh figure NAME...          figures, where tables have the same names
./reproduce.sh PAPER [KEY=VALUE]       a whole paper: its plan, all its tables and figures, its verdicts; all: every paper
./reproduce.sh KEY=VALUE...            the demonstration with other settings, such as profile=smoke
./reproduce.sh check [PART...]         checks that this machine trains correctly, and measures its speed: two minutes
./reproduce.sh test                    the quick tests, under four minutes; other arguments are passed to pytest
./reproduce.sh test all                all tests, with coverage; adds kills, full disks, SLURM, every table and figure
./reproduce.sh setup                   only install the locked packages into .venv; the others do so if needed

Tables:  $(names table)
Figures: $(names figure)
Papers:  $(papers)

Words with = and words starting with - + ~ are Hydra overrides and go to every table and figure. If one of
these fails, the others still run, and the exit code is the worst. runtime.time_limit=SECONDS, from the end
of set-up, ends them all in time: what is done is printed, and the same command goes on later. Set-up needs about $need GB and the network,
once; its output is in $log. Environment variables:
  PYTHON    the Python (3.11 to 3.13) that makes .venv; by default the first fitting one on the PATH
  DATA_DIR  where data sets are, or go
TEXT
}
fail() { printf 'reproduce.sh: %s\n' "$*" >&2; exit 1; }
unknown() {
  printf "reproduce.sh: there is no table '%s'; tables: %s; figures: %s; papers: %s\n" \
    "$1" "$(names table)" "$(names figure)" "$(papers)" >&2
  exit 2
}
names() {
  local file list=''
  for file in "conf/$1"/[!_]*.yaml; do [ ! -f "$file" ] || { file=${file##*/} && list="$list${list:+, }${file%.yaml}"; }; done
  printf '%s' "${list:-none}"
}
papers() { # whose tables' names begin with theirs; a demonstration is of no paper
  local file list=''
  for file in conf/table/[!_]*_*.yaml; do
    file=${file##*/}
    case $file in *demo*) continue ;; esac
    case ", $list, " in *", ${file%%_*}, "*) ;; *) list=$list${list:+, }${file%%_*} ;; esac
  done
  printf '%s' "$list, all"
}
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }

# The stamp holds the checksum of the lock that was installed. While it says "unfinished", .venv is not to be trusted.
current() { [ -x .venv/bin/python ] && [ "$(cat .venv/.installed 2>/dev/null)" = "$(cksum <requirements.txt)" ]; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
fits() { case $1 in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac; }
choose_python() { # sets py
  local found='' v
  set -- python3 python3.13 python3.12 python3.11
  [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
  for py; do
    v=$(version "$py") || continue
    if fits "$v"; then return; fi
    found="$found${found:+, }$py is $v"
  done
  fail "needs Python 3.11, 3.12 or 3.13 (${found:-no $1 that runs}): install one, or name it: PYTHON=/path/to/python ./reproduce.sh"
}
with_uv() ( # in a shell of its own, for its exports
  # uv is not to fetch a Python of its own, and is to trust the certificates that the machine trusts.
  export UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=true
  uv=uv
  uv --version || uv=.tools/bin/uv
  "$uv" --version || "$py" -m pip install --quiet --upgrade --target .tools uv || return 1
  [ "$keep" = yes ] || "$uv" venv --clear --relocatable --python "$(command -v "$py")" .venv || return 1
  echo unfinished >.venv/.installed
  "$uv" pip install --python .venv/bin/python --require-hashes -r requirements.txt
)
with_pip() {
  echo "== without uv: venv and pip"
  "$py" -m venv --clear .venv || return 1
  echo unfinished >.venv/.installed
  .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.txt
}
logged() { grep -qiE "$1" "$log"; }
reason() { # what the installer's log means
  if logged 'no space left|quota exceeded|os error 28'; then echo "ran out of disk space: make room (about $need GB)"
  elif logged 'name resolution|dns error|connection|connect timeout|unreachable|timed out|failed to fetch|tunnel|proxyerror'; then
    echo "cannot reach the package index: check the network or proxy"
  elif logged 'no module named .?(pip|venv|ensurepip)|ensurepip is not'; then
    echo "finds no pip or no venv in $py: install them (Debian: apt install python3-pip python3-venv), or uv,"
  elif logged 'hash mismatch|do not match the hashes'; then echo "got a package other than the one in requirements.txt: check the index"
  else echo "failed: see the end of the log"; fi
}
setup() {
  current && return
  local py keep=no free old began=$SECONDS
  choose_python
  { mkdir -p .tools && [ -w .tools ] && [ -w . ]; } 2>/dev/null || fail "cannot write to $PWD: move the folder to a place that is yours"
  # One set-up at a time. The lock goes with the process, however that ends; Python has it where there is no flock command.
  exec 9>>.tools/setup.lock
  "$py" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null || true # some network folders know no locks
  if current; then exec 9>&-; return; fi
  free=$(df -Pk . 2>/dev/null | awk 'NR == 2 { sub(/ +[0-9]+% .*/, ""); print $NF }') || free=''
  old=$(du -sk .venv 2>/dev/null | cut -f1) || true
  if [ -n "$free" ] && [ $((free + ${old:-0})) -lt $((need << 20)) ]; then
    fail "set-up needs about $need GB in $PWD, and $((free >> 20)) GB are free: make room and start again"
  fi
  # A .venv of the user's own making is kept; one that an earlier set-up left half done is made anew.
  if [ "$(cat .venv/.installed 2>/dev/null)" != unfinished ] && fits "$(version .venv/bin/python)"; then keep=yes; fi
  echo "Setting up .venv with Python $(version "$py") (about $need GB, once) ..."
  with_uv >"$log" 2>&1 </dev/null || with_pip >>"$log" 2>&1 </dev/null || fail "set-up $(reason) and start again; log: $PWD/$log"
  cksum <requirements.txt >.venv/.installed
  exec 9>&-
  echo "... done in $((SECONDS - began)) s."
}
run() { # kind name [overrides]
  local kind=$1 name=$2 code=0
  shift 2
  .venv/bin/python -m "experiments.$kind" "$kind=$name" "$@" || code=$?
  [ "$code" -le "$worst" ] || worst=$code
  return "$code"
}

# Paths in the environment are relative to the caller's folder; everything else happens in this file's own.
[ -z "${DATA_DIR:-}" ] || { DATA_DIR=$(absolute "$DATA_DIR") && export DATA_DIR; }
case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") ;; esac
caller=$PWD self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do
  target=$(readlink "$self")
  case $target in /*) self=$target ;; *) self=$(dirname -- "$self")/$target ;; esac
done
CDPATH='' cd -- "$(dirname -- "$self")"
log=.tools/setup.log need=6
[ "$(uname -s)" = Linux ] || need=2 # elsewhere PyTorch comes without CUDA

case ${1:-} in
  help) usage; exit ;;
  setup) [ $# -eq 1 ] || unknown "$2"; setup; exit ;;
  check)
    shift
    setup
    exec .venv/bin/python -m experiments.check "$@" ;;
  test)
    shift
    setup
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the workers share the cores
    case ${1:-} in
      '') set -- -n 2 --dist worksteal -m 'not slow' ;;
      # three workers on two cores: many of these tests wait for processes that they start
      all)
        shift
        [ $# -gt 0 ] || set -- --cov --cov-report=term:skip-covered --cov-fail-under=95
        set -- -n 3 --dist worksteal "$@" ;;
    esac
    exec .venv/bin/python -m pytest "$@" ;;
esac
jobs=() overrides=() kinds='table figure'
for word; do
  case $word in
    -h | --help) usage; exit ;;
    [-+~]* | *=*) overrides+=("$word") ;;
    table | figure) kinds=$word ;;
    '' | *[!A-Za-z0-9_-]*) unknown "$word" ;;
    *) for kind in $kinds none; do [ ! -f "conf/$kind/$word.yaml" ] || break; done
      case "$kind/$kinds, $(papers), " in "none/table figure"*", $word, "*) kind=paper ;; none*) unknown "$word" ;; esac
      jobs+=("$kind $word") ;;
  esac
done
setup
worst=0
trap 'exit "$worst"' TERM # after the table in progress, which ends early if it has got the signal too; see runtime.time_limit
RETABLE_BEGAN=${RETABLE_BEGAN:-$(date +%s)} && export RETABLE_BEGAN # runtime.time_limit is for all of them together
set -- ${overrides[@]+"${overrides[@]}"}
if [ ${#jobs[@]} -eq 0 ]; then
  run table demo "$@" && run figure demo "$@" || true
else
  for job in "${jobs[@]}"; do run "${job% *}" "${job#* }" "$@" || true; done
fi
from=''
[ "$caller" = "$PWD" ] || printf -v from 'cd %q && ' "$PWD"
echo "Curves of all runs: $from.venv/bin/tensorboard --logdir runs --host 127.0.0.1"
exit "$worst"
