#!/bin/sh
# Runs a small study on a real Slurm: slurmctld and slurmd of this machine, from Debian's packages.
#
#   HYDRALORA=target/debug/hydralora sh tests/interop/slurm.sh
#
# Needs root, and `apt-get install slurmctld slurmd munge`. Where they are missing it says that it was skipped and
# ends with 77, which test drivers count as skipped; with HYDRALORA_REQUIRE=all or =slurm that is a failure.
set -eu

skip() {
    echo "skipped: slurm.sh: slurm: $1"
    [ -z "${HYDRALORA_SKIPS:-}" ] || echo "skipped: slurm.sh: slurm: $1" >>"$HYDRALORA_SKIPS"
    case "${HYDRALORA_REQUIRE:-}" in *all*|*slurm*) exit 1 ;; esac
    exit 77
}

root=$(cd "$(dirname "$0")/../.." && pwd)
program=$(realpath -m "${HYDRALORA:-$root/target/debug/hydralora}")
[ -x "$program" ] || skip "there is no $program"
[ "$(id -u)" = 0 ] || skip "slurmd needs root"
for needed in slurmctld slurmd sbatch munged mungekey; do
    command -v $needed >/dev/null 2>&1 || PATH=$PATH:/usr/sbin
    command -v $needed >/dev/null 2>&1 || skip "$needed is not installed"
done

work=$(mktemp -d)
chmod 755 "$work"
stop() {
    code=$?
    for pid in ${controller:-} ${daemon:-} ${munge:-}; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    [ $code = 0 ] || tail -n 40 "$work"/*.log "$work"/study/slurm-* 2>/dev/null || true
    rm -rf "$work"
}
trap stop EXIT

# A munge and a Slurm of their own, beside whatever else runs here.
mkdir -p "$work/munge" "$work/state" "$work/spool"
chown -R munge: "$work/munge"
su munge -s /bin/sh -c "$(command -v mungekey) --create --keyfile=$work/munge/key"
su munge -s /bin/sh -c "exec $(command -v munged) --foreground --key-file=$work/munge/key --socket=$work/munge/socket \
    --pid-file=$work/munge/pid --log-file=$work/munge/log --seed-file=$work/munge/seed --force" &
munge=$!
node=$(hostname -s)
cat >"$work/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$work/slurm.conf"
sleep 1
slurmctld -D >"$work/slurmctld.log" 2>&1 &
controller=$!
slurmd -D -N "$node" >"$work/slurmd.log" 2>&1 &
daemon=$!
up() { sinfo -h -o %t 2>/dev/null | grep -q '^idle'; }
tries=0
until up; do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || { echo "slurm does not come up"; exit 1; }
    sleep 1
done

model=$root/crates/model/tests/fixtures/stories260K
awk 'BEGIN { for (i = 0; i < 60; i++) printf "{\"instruction\": \"Question %d\", \"output\": \"Answer %d.\"}\n", i, i }' >"$work/a.jsonl"
cat >"$work/study.yaml" <<STUDY
base:
  model: {path: $model}
  data: {train: [{path: a.jsonl, domain: a}], template: plain, max_seq_len: 128}
  method: {name: lora, rank: 2, targets: ffn}
  train: {batch_size: 4, epochs: 5, max_steps: 10, save_every: 5, eval_every: 0}
split: {valid: 0.2, test: 0.2}
grid: {train.learning_rate: [1.0e-3, 1.0e-2]}
tune: train.learning_rate
seeds: 2
STUDY
"$program" study plan "$work/study.yaml" --out "$work/study"
"$program" study export "$work/study" --format slurm --workers 2 --cores 1 --memory-gb 1 |
    sed 's/--mem=1G/--mem=200M/' >"$work/run.sh"
sh "$work/run.sh"
tries=0
until [ -f "$work/study/report/report.html" ]; do
    tries=$((tries + 1))
    [ $tries -lt 180 ] || { squeue; echo "no report after three minutes"; exit 1; }
    sleep 1
done
"$program" study status "$work/study" | tee "$work/status.txt"
grep -q "4 cells: 4 trained, 2 scored" "$work/status.txt"
echo "ok: slurm.sh"
