#!/usr/bin/env bash
# For a GPU that is there for a few minutes: the check, the bench and the most wanted tables, and their results as a few small files.
#   tests/on_gpu.sh OUT [SECONDS] [OVERRIDE...]     SECONDS of wall clock in all, 840 if not given; OVERRIDEs go to every run
#   tests/on_gpu.sh list [OVERRIDE...]              only print the commands of the list
#   tests/on_gpu.sh OUT 300 profile=smoke step=eager precision=fp32      to try it without a GPU
# In OUT: check.json and check.txt, bench.txt, tables.txt (what tables and figures printed), log.txt (everything else), and kept.tar: the
# finished runs as published/*.zip, the files of tables, figures and the bench. Asked again with the same OUT and runs, it goes on.
# LIST names another list than tests/on_gpu.yaml, DATA_DIR the data sets; the commands run in the repository's root.
# Exit code: 0; 1 when an entry of the list failed; 2 for bad input. Needs bash 4 and GNU timeout.
set -u -o pipefail # not -e: what fails takes nothing from the rest

fail() { printf 'on_gpu.sh: %s\n' "$*" >&2; exit 2; }
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/log.txt"; }
least() { echo $(($1 < $2 ? $1 : $2)); }

case ${1:-} in
  '' | -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0" && exit ;;
  *=*) fail "$1 is an override; the first word is the folder OUT, or list" ;;
  list) out='' ;; # prints the list, as for a GPU
  *) out=$(absolute "$1") ;;
esac
shift
limit=840
case ${1:-x} in *[!0-9]*) ;; *) limit=$((10#$1)) && shift ;; esac
[ "$limit" -ge 60 ] || fail "SECONDS: $limit is not allowed; it must be a whole number of at least 60"
for word; do case $word in [!-]*=* | [+~]*) ;; *) fail "$word is no override, KEY=VALUE" ;; esac; done
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || fail "finds no folder of its own"
list=$(absolute "${LIST:-$root/tests/on_gpu.yaml}")
[ -z "${DATA_DIR:-}" ] || { DATA_DIR=$(absolute "$DATA_DIR") && export DATA_DIR; }
cd -- "$root" || exit 2
py=python3 gpu=True
[ ! -x .venv/bin/python ] || py=.venv/bin/python
[ -z "$out" ] || gpu=$("$py" -c 'import sys; print("runtime.device=cpu" not in sys.argv and __import__("torch").cuda.is_available())' "$@")

# For each entry a line: its kind, name, seconds, and its words quoted for the shell, the caller's last, as a key's last value holds.
lines=$("$py" - "$list" "$gpu" "$@" <<'PY'
import json, shlex, sys
import yaml
path, gpu, *more = sys.argv[1:]
for entry in yaml.safe_load(open(path)):
    (kind,) = {"table", "figure"} & entry.keys()
    if unknown := entry.keys() - {kind, "only", "seeds", "overrides", "seconds"}:
        sys.exit(f"{entry[kind]}: there is no key {', '.join(sorted(unknown))}")
    words = [f"{kind}={entry[kind]}", *(["launch=false"] if kind == "figure" else [])]
    if "only" in entry:  # quoted, as names have parentheses and slashes
        words.append("only=" + json.dumps(entry["only"], ensure_ascii=False))
    if "seeds" in entry:
        words.append(("table" if kind == "table" else "figure.runs") + f".seeds={json.dumps(entry['seeds'])}")
    needs_gpu = ("step=graph", "runtime.runs_per_device=")
    words += [word for word in entry.get("overrides", []) if gpu == "True" or not word.startswith(needs_gpu)]
    print(kind, entry[kind], int(entry["seconds"]), shlex.join(words + more))
PY
) && [ -n "$lines" ] || fail "cannot read $list"
if [ -z "$out" ]; then
  while read -r kind _ seconds quoted; do
    echo "$py -m experiments.$kind published=true runtime.time_limit=$seconds $quoted"
  done <<<"$lines"
  exit
fi

mkdir -p "$out" && [ -w "$out" ] || fail "cannot write to $out"
work=$(mktemp -d "${TMPDIR:-/tmp}/on_gpu.XXXXXX") || fail "cannot make a folder in ${TMPDIR:-/tmp}"
trap 'rm -rf "$work"' EXIT
[ ! -f "$out/kept.tar" ] || tar -C "$work" -xf "$out/kept.tar" || say "kept.tar cannot be read, and is made anew"
mkdir -p "$work"/{published,tables,figures,bench,printed}
keep() { # after each step, so that whatever ends this script takes no more than the step in progress
  cat "$work"/printed/* >"$out/tables.txt" 2>/dev/null
  tar -C "$work" -cf "$out/kept.tar.new" published tables figures bench printed && mv -f "$out/kept.tar.new" "$out/kept.tar"
}

end=$limit child=''
trap 'end=$(least "$end" $((SECONDS + 20))); [ -z "$child" ] || kill "$child"' INT TERM HUP # time to publish, and for nothing else
left() { echo $((end - $1 - SECONDS)); } # seconds until that many before the end
within() { # seconds, command: SIGTERM, ten seconds later SIGKILL; in the background, as the trap would wait for a command's end
  [ "$1" -ge 1 ] || return 143
  timeout --preserve-status -k 10 "$@" </dev/null &
  child=$!
  while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait` too
  child=''
  return "$code"
}

say "$limit s; $(wc -l <<<"$lines") entries of $list"
[ "$gpu" = True ] || say 'no GPU: what needs one is left out'
if [ ! -e "$out/check.json" ]; then
  within $((limit / 5 + 5)) "$py" -m experiments.check budget=$((limit / 5 - 5)) out="$out/check.json" >"$out/check.txt" 2>&1
  say "check: exit code $?"
fi
if [ ! -s "$out/bench.txt" ]; then
  # Few steps a round, as a part writes its table at its end only, and half a second for each side of a round is more than there is.
  last=$((SECONDS + limit / 7)) parts=('gpu steps=20' 'end steps=1' 'methods steps=20')
  [ "$gpu" = True ] || parts=('step model=net2c steps=1') # a few seconds
  for part in "${parts[@]}"; do
    seconds=$(least $((last - SECONDS)) "$(left 25)")
    # shellcheck disable=SC2086 # a part and its overrides
    within "$seconds" "$py" -m experiments.bench $part csv="$work/bench/${part%% *}.csv" >>"$out/bench.txt" 2>>"$out/log.txt"
    say "bench $part: exit code $?; its rows as they came are in log.txt"
  done
fi
keep

number=0 && declare -A count=([complete]=0 [cut]=0 [failed]=0 [missed]=0)
while read -r kind name seconds quoted; do
  printf -v printed '%s/printed/%02d-%s-%s.txt' "$work" $((++number)) "$kind" "$name"
  most=$(left 12) over=0
  [ "$kind" = figure ] || most=$(left $((25 + limit / 15))) over=10 # tables leave time for figures, and end by themselves, at a checkpoint
  if [ "$most" -lt 10 ]; then say "$kind $name: not reached" && ((++count[missed])) && continue; fi # less than it takes to start
  seconds=$(least "$seconds" "$most")
  say "$kind $name: at most $seconds s"
  words=() && eval "words=($quoted)"
  command=("$py" -m "experiments.$kind" published=true runtime.time_limit="$seconds" "${words[@]}" out="$work/${kind}s")
  within $((seconds + over)) "${command[@]}" >"$work/stdout" 2>"$work/stderr"
  code=$?
  case $code in
    0) state='complete' && ! grep -qE '[0-9]+ of [0-9]+ runs are left|^- MISSING ' "$work/stdout" || state='cut' ;;
    137 | 143) state='cut' ;; # killed
    *) state='failed' && ! grep -q 'nothing to draw' "$work/stderr" || state='cut' ;; # its runs are not there yet
  esac
  ((++count[$state]))
  { echo "== $kind $name: exit code $code of ${command[*]}" && cat "$work/stderr"; } >>"$out/log.txt"
  [ ! -s "$work/stdout" ] || { sed "s|$work/||g" "$work/stdout" && echo; } >"$printed" # its files are where kept.tar has them
  if [ "$kind" = table ] && [ "$(left 4)" -ge 1 ]; then # in the foreground: a signal waits for it
    timeout "$(left 4)" "$py" -m experiments.publish "${words[@]}" out="$work/published" >>"$out/log.txt" 2>&1 </dev/null
  fi
  keep
  say "$kind $name: $state"
done <<<"$lines"
say "${count[complete]} complete, ${count[cut]} cut, ${count[failed]} failed, ${count[missed]} not reached; $SECONDS of $limit s"
[ "${count[failed]}" -eq 0 ]
