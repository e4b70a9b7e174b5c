#!/usr/bin/env bash
# For a GPU that is there for a few minutes: the check, the bench and the most wanted tables, and their results as a few small files.
#   tests/on_gpu.sh OUT [SECONDS] [OVERRIDE...]     SECONDS of wall clock in all, 840 if not given; OVERRIDEs go to every run
#   tests/on_gpu.sh list [OVERRIDE...]              only print the commands of the list
#   tests/on_gpu.sh OUT 300 profile=smoke step=eager precision=fp32      to try it without a GPU
# In OUT: check.json and check.txt, bench.txt, tables.txt (what tables and figures printed), log.txt (everything else), and kept.tar: the
# finished runs as published/*.zip, the files of tables, figures and the bench. Asked again with the same OUT and runs, it goes on.
# LIST names another list than tests/on_gpu.yaml, DATA_DIR the data sets; the commands run in the repository's root.
# Exit code: 0; 1 when an entry of the list failed; 2 for bad input.
set -u -o pipefail # not -e: what fails takes nothing from the rest

fail() { printf 'on_gpu.sh: %s\n' "$*" >&2; exit 2; }
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/log.txt"; }
least() { echo $(($1 < $2 ? $1 : $2)); }

case ${1:-} in '' | -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"; exit 0 ;; esac
case $1 in *=*) fail "$1 is an override; the first word is the folder OUT, or list" ;; esac
out=$(absolute "$1") limit=840 only_list=no
[ "$1" != list ] || only_list=yes
shift
case ${1:-x} in *[!0-9]*) ;; *) limit=$((10#$1)) && shift ;; esac
[ "$limit" -ge 30 ] || fail "SECONDS: $limit is not allowed; it must be a whole number of at least 30"
for word; do case $word in [!-]*=* | [+~]*) ;; *) fail "$word is no override, KEY=VALUE" ;; esac; done
more=("$@")
list=${LIST:-} root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || fail "finds no folder of its own"
[ -z "$list" ] || list=$(absolute "$list")
[ -z "${DATA_DIR:-}" ] || { DATA_DIR=$(absolute "$DATA_DIR") && export DATA_DIR; }
cd -- "$root" || exit 2
py=python3
[ ! -x .venv/bin/python ] || py=.venv/bin/python
list=${list:-tests/on_gpu.yaml}

# The list: for each entry a line with its kind, name and seconds and the number of its words, then a line for each word.
entries=$("$py" - "$list" <<'PY'
import json
import sys

import yaml

for entry in yaml.safe_load(open(sys.argv[1])):
    (kind,) = {"table", "figure"} & entry.keys()
    if unknown := entry.keys() - {kind, "only", "seeds", "overrides", "seconds"}:
        sys.exit(f"{entry[kind]}: there is no key {', '.join(sorted(unknown))}")
    words = [f"{kind}={entry[kind]}"]
    if "only" in entry:  # quoted, as names have parentheses and slashes
        words.append("only=" + json.dumps(entry["only"], ensure_ascii=False))
    if "seeds" in entry:
        words.append(("table" if kind == "table" else "figure.runs") + f".seeds={json.dumps(entry['seeds'])}")
    words += entry.get("overrides", [])
    print(kind, entry[kind], int(entry["seconds"]), len(words), *words, sep="\n")
PY
) || fail "cannot read $list"
kinds=() names=() caps=() words=() states=()
while read -r kind && read -r name && read -r cap && read -r count; do
  some=''
  for ((; count > 0; count--)); do IFS= read -r word && some+=${some:+$'\n'}$word; done
  kinds+=("$kind") names+=("$name") caps+=("$cap") words+=("$some") states+=('not reached')
done <<<"$entries"
[ ${#kinds[@]} -gt 0 ] || fail "$list has no entries"

gpu=yes left_over='[0-9]+ of [0-9]+ runs are left|^- MISSING ' # what a table, a figure says of runs that are not there
command_of() { # entry number, module, words of its own: sets `command`
  local i=$1 module=$2 word
  shift 2
  command=("$py" -m "experiments.$module")
  while IFS= read -r word; do
    case $gpu,$word in no,step=graph | no,runtime.runs_per_device=*) ;; *) command+=("$word") ;; esac
  done <<<"${words[i]}"
  command+=("$@" ${more[@]+"${more[@]}"}) # of two values of a key the last one holds, the groups' (profile=...) too
}
if [ "$only_list" = yes ]; then
  for i in "${!kinds[@]}"; do
    [ "${kinds[i]}" = table ] && own="runtime.time_limit=${caps[i]}" || own=launch=false
    command_of "$i" "${kinds[i]}" published=true "$own"
    printf '%q ' "${command[@]}" && echo
  done
  exit 0
fi

mkdir -p "$out" && [ -w "$out" ] || fail "cannot write to $out"
work=$(mktemp -d "${TMPDIR:-/tmp}/on_gpu.XXXXXX") || fail "cannot make a folder in ${TMPDIR:-/tmp}"
trap 'rm -rf "$work"' EXIT
[ ! -f "$out/kept.tar" ] || tar -C "$work" -xf "$out/kept.tar" || say "kept.tar cannot be read, and is made anew"
mkdir -p "$work"/{published,tables,figures,bench,printed}
reserve=$((limit * 8 / 100 > 15 ? limit * 8 / 100 : 15))
until=$((limit - reserve)) # of the list
say "$limit s, $reserve s of them for what is kept; ${#kinds[@]} entries of $list"

# Commands run in the background, so that a signal does not wait for their end; what there is by then is kept all the same.
child='' stopped=no
stop() {
  stopped=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null # timeout hands it on to all processes of the command
}
trap stop INT TERM HUP
within() { # seconds, more seconds until it is killed, command: 124 or 137 when its time was up
  local code
  timeout -k "$2" "$1" "${@:3}" </dev/null &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the command has ended
    wait "$child"
    code=$?
  done
  child=''
  return "$code"
}
ended() { case $1 in 0) echo 'done' ;; 124 | 137 | 143) echo 'cut, its time was up' ;; *) echo "exit code $1" ;; esac; }

case " ${more[*]+${more[*]}} " in
  *' runtime.device=cpu '*) gpu=no ;;
  *) [ "$("$py" -c 'import torch; print(torch.cuda.is_available())' 2>>"$out/log.txt")" = True ] || gpu=no ;;
esac
[ "$gpu" = yes ] || say 'no GPU: what needs one is left out'

if [ -e "$out/check.json" ]; then
  say 'check: check.json is there'
elif [ "$stopped" = no ]; then
  budget=$((limit / 5 - 5)) # and the seconds that it takes to start and to end
  say "check: $budget s"
  within $((limit / 5 + limit / 50)) 5 "$py" -m experiments.check budget="$budget" out="$out/check.json" >"$out/check.txt" 2>&1
  say "check: $(ended $?)"
fi

if [ -s "$out/bench.txt" ]; then
  say 'bench: bench.txt is there'
else
  # Few steps a round, as a part writes its table at its end only, and half a second for each side of a round is more than there is.
  last=$((SECONDS + limit / 7)) parts=('counts model=net2c method=[vanilla]') # which takes no times
  [ "$gpu" = no ] || parts=('gpu steps=20' 'end steps=1' 'methods steps=20')
  : >"$out/bench.txt"
  for part in "${parts[@]}"; do
    left=$(($(least "$last" "$until") - SECONDS))
    if [ "$stopped" = yes ] || [ "$left" -lt 5 ]; then say "bench $part: not reached" && continue; fi
    say "bench $part: at most $left s; its rows as they come are in log.txt"
    # shellcheck disable=SC2086 # a part and its overrides
    within "$left" 5 "$py" -m experiments.bench $part csv="$work/bench/${part%% *}.csv" >>"$out/bench.txt" 2>>"$out/log.txt"
    say "bench $part: $(ended $?)"
  done
fi

printed() { printf '%s/printed/%02d-%s-%s.txt' "$work" "$1" "${kinds[$1]}" "${names[$1]}"; }
judge() { # entry number, exit code: sets its state
  local i=$1 state='failed'
  case $2 in
    0) state='complete' && ! grep -qE "$left_over" "$(printed "$i")" "$work/err-$i" || state='cut' ;;
    124 | 137 | 143) state='cut' ;;
    *) ! grep -q 'nothing to draw' "$work/err-$i" || state='cut' ;; # its runs are not there yet
  esac
  states[i]=$state
  [ ! -s "$(printed "$i")" ] || sed -i "s|$work/||g" "$(printed "$i")" # its files are where kept.tar has them
  { echo "== ${kinds[i]} ${names[i]}: ${command[*]}" && cat "$work/err-$i"; } >>"$out/log.txt"
}
together() { # what the entries printed, in their order, earlier calls' included
  local i
  for i in "${!kinds[@]}"; do [ ! -s "$(printed "$i")" ] || { cat "$(printed "$i")" && echo; }; done >"$out/tables.txt"
}

for i in "${!kinds[@]}"; do
  left=$((until - SECONDS))
  if [ "$stopped" = yes ] || [ "$left" -lt 10 ]; then break; fi # less than it takes to start
  seconds=$(least "${caps[i]}" "$left")
  say "${kinds[i]} ${names[i]}: at most $seconds s"
  if [ "${kinds[i]}" = table ]; then
    command_of "$i" table published=true runtime.time_limit="$seconds" out="$work/tables"
    seconds=$((seconds + 30)) # it ends by itself, at a checkpoint
  else
    command_of "$i" figure published=true launch=false out="$work/figures"
  fi
  within "$(least "$seconds" $((left + reserve / 3)))" "$(least 10 $((reserve / 3)))" "${command[@]}" >"$(printed "$i")" 2>"$work/err-$i"
  judge "$i" $?
  together
  say "${kinds[i]} ${names[i]}: ${states[i]}"
done

# What is kept, as many commands at a time as there are cores: each takes the seconds that Python needs to start.
deadline=$((limit - 2))
[ "$stopped" = no ] || deadline=$(least "$deadline" $((SECONDS + reserve)))
say "what is kept: at most $((deadline - SECONDS)) s"
in_time() { # command: 124, as timeout has it, when there is no time for it
  local left=$((deadline - SECONDS))
  [ "$left" -ge 1 ] || return 124
  timeout -k 1 "$left" "$@" </dev/null
}
publish() { # table: one entry after the other, as they share a file; it is bad input where no run is finished
  local i
  for i in "${!kinds[@]}"; do
    [ "${kinds[i]} ${names[i]}" = "table $1" ] || continue
    command_of "$i" publish out="$work/published"
    in_time "${command[@]}" >>"$out/log.txt" 2>&1
  done
}
show() { # entry number: its table or figure from the runs that there are
  command_of "$1" "${kinds[$1]}" published=true launch=false out="$work/${kinds[$1]}s"
  in_time "${command[@]}" >"$work/shown-$1" 2>"$work/err-$1"
  echo $? >"$work/code-$1"
}
later=() seen=' '
for i in "${!kinds[@]}"; do
  [ "${kinds[i]}" = table ] || continue
  case $seen in *" ${names[i]} "*) ;; *) later+=("publish ${names[i]}") && seen+="${names[i]} " ;; esac
done
for i in "${!kinds[@]}"; do # tables that were ended before they could print, and figures that were not reached
  case ${kinds[i]},${states[i]} in
    table,cut) grep -q '^## ' "$(printed "$i")" || later+=("show $i") ;;
    figure,'not reached') later+=("show $i") ;;
  esac
done
cores=$(nproc 2>/dev/null) || cores=2
number=0
for job in ${later[@]+"${later[@]}"}; do
  # shellcheck disable=SC2086 # a function and its argument
  $job &
  ((++number % cores)) || wait
done
wait
for i in "${!kinds[@]}"; do
  [ -s "$work/code-$i" ] || continue
  code=$(<"$work/code-$i")
  [ ! -s "$work/shown-$i" ] || mv "$work/shown-$i" "$(printed "$i")"
  if [ "${kinds[i]}" = figure ] && [ "$code" -ne 124 ] && [ "$code" -ne 137 ]; then command_of "$i" figure && judge "$i" "$code"; fi
done
together
tar -C "$work" -cf "$out/kept.tar.new" published tables figures bench printed && mv -f "$out/kept.tar.new" "$out/kept.tar"

declare -A count=()
for i in "${!kinds[@]}"; do count[${states[i]}]=$((${count[${states[i]}]:-0} + 1)); done
for i in "${!kinds[@]}"; do printf '%s %s: %s\n' "${kinds[i]}" "${names[i]}" "${states[i]}"; done >>"$out/log.txt"
said=''
for state in complete cut failed 'not reached'; do said+="${said:+, }${count[$state]:-0} $state"; done
say "$said; $SECONDS of $limit s"
[ "${count[failed]:-0}" -eq 0 ]
