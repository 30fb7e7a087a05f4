#!/usr/bin/env bash
# Tries launch/slurm.sbatch on this machine, without GPUs: brings up a SLURM of one node, trains a tiny
# policy in two processes of two simulated devices each, ends a second run by SIGTERM and lets it be
# queued again, and takes everything down. As root, with jaxreset installed, after
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || { echo "error: munged and slurmd are started as root" >&2; exit 2; }
for program in munged slurmctld slurmd sbatch jaxreset; do
  command -v "$program" >/dev/null || { echo "error: $program is not installed" >&2; exit 2; }
done

tmp=$(mktemp -d)
chmod 755 "$tmp"
started=()
end() {
  code=$?
  [ "$code" = 0 ] || tail -n 20 "$tmp"/*.log "$tmp"/*.out >&2 || true
  scancel --user=root >/dev/null 2>&1 || true
  for _ in $(seq 40); do # the daemons go after the jobs, which end by SIGTERM too
    [ -n "$(squeue --noheader 2>/dev/null)" ] || break
    sleep 1
  done
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2>/dev/null || true; done
  wait
  rm -rf "$tmp"
}
trap end EXIT
trap 'echo "error: line $LINENO: $BASH_COMMAND" >&2' ERR

# ---- up: everything in $tmp, nothing tracked by cgroups or systemd
mkdir "$tmp/state" "$tmp/spool"
head -c 1024 /dev/urandom >"$tmp/munge.key"
chmod 400 "$tmp/munge.key"
munged --foreground --force --key-file="$tmp/munge.key" --socket="$tmp/munge.socket" \
  --pid-file="$tmp/munge.pid" --seed-file="$tmp/munge.seed" >"$tmp/munged.log" 2>&1 &
started+=($!)
export SLURM_CONF="$tmp/slurm.conf"
cat >"$SLURM_CONF" <<END
ClusterName=here
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$tmp/munge.socket,cred_expire=30
StateSaveLocation=$tmp/state
SlurmdSpoolDir=$tmp/spool
SlurmctldPidFile=$tmp/slurmctld.pid
SlurmdPidFile=$tmp/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE
END
touch "$tmp/cgroup.conf"
slurmctld -D -f "$SLURM_CONF" >"$tmp/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D -f "$SLURM_CONF" >"$tmp/slurmd.log" 2>&1 &
started+=($!)
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
  sleep 1
done
sinfo

# ---- what the processes find, without a flag
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 JAX_DISABLE_MOST_OPTIMIZATIONS=1
srun --ntasks=2 python -c '
import jax
from jaxreset.parallel.processes import start
start()
print(f"process {jax.process_index()} of {jax.process_count()}:",
      f"{jax.local_device_count()} devices of {jax.device_count()}", flush=True)
assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
'

# ---- two runs
tiny=(
  configs/quickstart.yaml mesh.data=4 data.eval_size=16 eval.batch=16 eval.every_steps=null
  model.fresh.layers=2 model.fresh.width=32 model.fresh.heads=2 model.fresh.kv_heads=2
  model.fresh.mlp=64 task.min_terms=3 task.max_terms=5 sampling.max_prompt_tokens=18
  sampling.max_response_tokens=32 sampling.max_step_tokens=8 reset.localizer.max_tokens=5
  reset.localizer.max_question_tokens=80 warm_start.steps=5 warm_start.batch=8
  train.prompts_per_step=4 train.microbatch_tokens=1500 train.min_signal_groups=1
  run.compile_cache="$tmp/programs"
)
submit() {
  sbatch --parsable --nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=0 \
    --output="$tmp/%j.out" "$@"
}
state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p'; }
steps() { # run folder: the last step that it has
  local step=""
  [ ! -e "$1/metrics.jsonl" ] || step=$(sed -n '$s/.*"step": \([0-9]*\).*/\1/p' "$1/metrics.jsonl")
  echo "${step:-0}"
}
finished() { # job: until it has ended
  while :; do
    case $(state "$1") in
      COMPLETED) return ;;
      PENDING | CONFIGURING | RUNNING | COMPLETING | REQUEUED) sleep 2 ;;
      *) scontrol show job "$1" >&2; return 1 ;;
    esac
  done
}

job=$(submit launch/slurm.sbatch "${tiny[@]}" train.steps=2 run.dir="$tmp/first")
finished "$job"
cat "$tmp/$job.out"
[ "$(steps "$tmp/first")" = 2 ]
echo "== finished: two steps in two processes"

job=$(submit launch/slurm.sbatch "${tiny[@]}" train.steps=20 run.dir="$tmp/second")
until [ "$(steps "$tmp/second")" -ge 2 ]; do
  [ "$(state "$job")" != FAILED ]
  sleep 1
done
scancel --signal=TERM "$job"
echo "== SIGTERM after $(steps "$tmp/second") steps"
finished "$job"
cat "$tmp/$job.out"
scontrol show job "$job" | grep -o "Restarts=1"
grep -q "queued again" "$tmp/$job.out"
[ "$(steps "$tmp/second")" = 20 ]
echo "== finished: ended with 75, queued again, twenty steps in all"
