#!/usr/bin/env bash
# Starts and stops a real SLURM of one node on this machine, on loopback only, for tests.
#   tests/slurm.sh start DIR              in DIR, absent or empty; afterwards: export SLURM_CONF=DIR/slurm.conf
#   tests/slurm.sh stop DIR               ends its jobs and daemons, if any; DIR stays, with the logs
#   tests/slurm.sh slurmd DIR stop|start  slurmd alone; running jobs survive that
# Exit code 77: not possible here; it needs root and the Debian packages slurm-wlm and munge.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

fail() { # fail MESSAGE [CODE]
  printf 'slurm.sh: %s\n' "$1" >&2
  tail -n 15 "${dir:-/dev/null}"/*.log >&2 2>/dev/null || true
  exit "${2-1}"
}
# Daemons must not hold on to this script's output, or a caller that reads it to its end would wait for them.
quietly() { "$@" >>"$dir/start.log" 2>&1 </dev/null; }
await() { # await SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}
enter() {
  dir=$(cd "$1" && pwd -P)
  export SLURM_CONF=$dir/slurm.conf
}

pid() { cat "$dir/$1.pid" 2>/dev/null; }
# With the name, as another process may have the number by now; one in state Z has ended and was not yet reaped.
alive() { [[ $(ps -o stat= -o comm= -p "$(pid "$1")" 2>/dev/null) == [!Z]*" $1" ]]; }
gone() { ! alive "$1"; }
end() {
  if alive "$1"; then
    kill "$(pid "$1")" || true
    await 15 gone "$1" || kill -KILL "$(pid "$1")" || true
    await 5 gone "$1" || fail "$1 does not end"
  fi
  rm -f "$dir/$1.pid"
}
# The parents of jobs' processes: without pid files, but in slurmd's working directory, which is its log's.
steps() {
  local step
  for step in $(pgrep -x slurmstepd); do
    [[ $(readlink "/proc/$step/cwd") != "$dir" ]] || echo "$step"
  done
}
no_steps() { [[ -z $(steps) ]]; }
idle() { [[ $(timeout 5 sinfo -h -o %T 2>/dev/null) == idle ]]; }
free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

configure() {
  local cpus host memory
  host=$(hostname)
  host=${host%%.*}
  ((${#dir} + ${#host} <= 80)) || fail "too long for the names of sockets: $dir"
  cpus=$(nproc)
  ((cpus > 1)) || cpus=2 # config_overrides allows more than there are
  memory=$(awk '$1 == "MemTotal:" { print int($2 / 1024 * 0.9) }' /proc/meminfo)
  mkdir "$dir/state" "$dir/spool"
  # Requeued jobs wait for cred_expire, by default 120 s; less than 5 would mean the default.
  cat >"$SLURM_CONF" <<CONF
ClusterName=retable
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
KillWait=3
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}
start_munged() {
  ! munge -n >/dev/null 2>&1 </dev/null || return 0 # one is running
  mkdir -p /run/munge
  chown munge:munge /run/munge
  quietly runuser -u munge -- "$(command -v munged)" || fail 'munged does not start'
  cp /run/munge/munged.pid "$dir"
}
start_slurmd() {
  alive slurmd || quietly slurmd -f "$SLURM_CONF" || fail 'slurmd does not start'
  await 10 alive slurmd || fail 'slurmd has ended'
}
start() {
  local tool
  [[ $(id -u) == 0 ]] || fail 'only root can start SLURM' 77
  for tool in slurmctld slurmd munged sbatch; do
    command -v "$tool" >/dev/null || fail "$tool is not installed" 77
  done
  mkdir -p "$1"
  [[ -z $(ls -A "$1") ]] || fail "not empty: $1"
  enter "$1"
  trap stop EXIT # unless it works
  configure
  start_munged
  quietly slurmctld -f "$SLURM_CONF" || fail 'slurmctld does not start'
  start_slurmd
  await 30 idle || fail 'the node does not become idle'
  trap - EXIT
  echo "export SLURM_CONF=$SLURM_CONF"
}
stop() {
  local step
  if alive slurmctld && alive slurmd; then
    timeout 15 scancel --partition=debug || true
    await 15 no_steps || true
  fi
  end slurmd # from here on, no new jobs
  for step in $(steps); do # each leads a session that holds its job's processes
    pkill -KILL -s "$(ps -o sid= -p "$step" | tr -d ' ')" || true
  done
  await 5 no_steps || fail 'jobs do not end'
  end slurmctld
  end munged
}

case "$# ${1-} ${3-}" in
  '2 start ') start "$2" ;;
  '2 stop ') [[ ! -d $2 ]] || { enter "$2"; stop; } ;;
  '3 slurmd start') enter "$2"; start_slurmd ;;
  '3 slurmd stop') enter "$2"; end slurmd ;;
  *) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac
