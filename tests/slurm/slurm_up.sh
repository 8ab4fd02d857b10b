#!/bin/bash
# slurm_up.sh DIR - a real Slurm of several nodes on this machine, without systemd, all of it in the new folder DIR.
# Needs root, and Debian's or Ubuntu's packages slurm-wlm, munge and libpmix2, which it installs where they are missing.
# Exit status 77: Slurm cannot be installed here. slurm_down.sh DIR ends it. Keep DIR short: it holds sockets.
#
#   SLURM_LAB_NODES (4)      nodes n1, n2, ...: each a slurmd in UTS, IPC and mount namespaces of its own, so that MPI takes
#                            them for different hosts: own name, own /etc/hosts, own /dev/shm, own DIR/local (a node's disk)
#   SLURM_LAB_CPUS (4)       CPUs that each node claims to have
#   SLURM_LAB_GPUS (2)       GPUs that each node pretends to have: --gpus-per-node and CUDA_VISIBLE_DEVICES work, that is all
#   SLURM_LAB_PORT (16817)   the controller's port; the nodes have the next ones
#   SLURM_LAB_OWNER ()       a process: when it is gone, slurm_down.sh is run
set -u
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
S=${1:?usage: slurm_up.sh DIR}
N=${SLURM_LAB_NODES:-4}; CPUS=${SLURM_LAB_CPUS:-4}; GPUS=${SLURM_LAB_GPUS:-2}; PORT=${SLURM_LAB_PORT:-16817}
die() { local status=$1; shift; echo "slurm_up: $*" >&2; exit "$status"; }
[ "$(id -u)" = 0 ] || die 77 "needs root"
unshare --uts --ipc --mount true 2>/dev/null || die 77 "needs the right to make namespaces (unshare --uts --ipc --mount)"
mkdir "$S" || die 1 "$S is there already, or cannot be made"
mkdir "$S"/{state,spool,log,pid,munge,conf,tmp,local}

# ---- packages, only when missing
missing() {
    local program
    for program in slurmctld slurmd munged sbatch srun; do command -v $program >/dev/null || return 0; done
    ! compgen -G '/usr/lib/*/libpmix.so.2' >/dev/null
}
if missing; then
    command -v apt-get >/dev/null || die 77 "Slurm is not installed, and there is no apt-get to install it"
    export DEBIAN_FRONTEND=noninteractive
    get() { timeout 200 apt-get -qq -y -o Acquire::Retries=2 "$@" >>"$S/log/apt" 2>&1; }
    compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || get update
    if [ ! -e /usr/sbin/policy-rc.d ]; then # no daemon is to start by itself
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d && ours=1
    fi
    install() { get install --no-install-recommends slurm-wlm munge libpmix2; }
    install || { get update && install; }
    [ -n "${ours:-}" ] && rm -f /usr/sbin/policy-rc.d
    missing && { tail -n 3 "$S/log/apt" >&2; die 77 "apt-get cannot install slurm-wlm, munge and libpmix2"; }
fi
# The plugin for --mpi=pmix looks for a name that only libpmix-dev brings.
for lib in /usr/lib/*/pmix2/lib; do
    [ -e "$lib/libpmix.so.2" ] && [ ! -e "$lib/libpmix.so" ] && ln -s libpmix.so.2 "$lib/libpmix.so"
done

# ---- configuration
H=$(hostname -s)
nodes=(); for ((i = 1; i <= N; i++)); do nodes+=("n$i"); done
range() { if [ "$N" = 1 ]; then echo "$1$2"; else echo "$1[$2-$(($2 + N - 1))]"; fi; }
{ cat /etc/hosts; for n in "${nodes[@]}"; do echo "127.0.0.1 $n"; done; } >"$S/hosts"
for n in "${nodes[@]}"; do
    mkdir "$S/conf/$n" "$S/spool/$n" "$S/tmp/$n"; chmod 1777 "$S/tmp/$n"
    for file in slurm gres cgroup; do ln -s "$S/$file.conf" "$S/conf/$n/$file.conf"; done
    # The plugin makes /tmp/spmix_appdir_UID_JOB.STEP on every node: in one /tmp they would collide.
    echo "PMIxCliTmpDirBase=$S/tmp/$n" >"$S/conf/$n/mpi.conf"
done
head -c 1024 /dev/urandom >"$S/munge/key"; chmod 600 "$S/munge/key"; chmod 755 "$S" "$S/munge"
# slurmd loads a cgroup plugin even when none is used; this one needs nothing mounted.
echo "CgroupPlugin=cgroup/v1" >"$S/cgroup.conf"
gres=""; : >"$S/gres.conf"
if [ "$GPUS" -gt 0 ]; then # each wants a device file: twins of /dev/null will do
    mkdir "$S/dev"; for ((i = 0; i < GPUS; i++)); do mknod "$S/dev/gpu$i" c 1 3 || die 1 "mknod failed"; done
    if [ "$GPUS" = 1 ]; then files=gpu0; else files="gpu[0-$((GPUS - 1))]"; fi
    gres="Gres=gpu:$GPUS"; echo "NodeName=$(range n 1) Name=gpu Count=$GPUS File=$S/dev/$files" >"$S/gres.conf"
fi
cat >"$S/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=$PORT
AuthType=auth/munge
# cred_expire is also how long a requeued job waits until it may start again (120 s otherwise).
AuthInfo=socket=$S/munge/sock,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/log/slurmctld.pid
SlurmdPidFile=$S/log/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
KillWait=20
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
NodeName=$(range n 1) NodeHostname=$H NodeAddr=127.0.0.1 Port=$(range "" $((PORT + 1))) CPUs=$CPUS \
Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=64000 $gres State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=0 State=UP
PartitionName=gentle Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP
CONF

# ---- the daemons, in the foreground of sessions of their own; DIR/pid/NAME holds each one's process id
cat >"$S/start" <<START
#!/bin/bash
# start NAME COMMAND...: start a daemon.        start NODE: start the slurmd of a node, also one that was killed.
S=$S
START
cat >>"$S/start" <<'START'
name=$1; shift
if [ $# = 0 ]; then
    set -- unshare --uts --ipc --mount bash -c 'hostname "$0"; mount --bind "$1/hosts" /etc/hosts
        mount -t tmpfs -o size=4g,mode=1777 shm /dev/shm; mount --bind "$1/tmp/$0" "$1/local"
        export SLURM_CONF=$1/conf/$0/slurm.conf; exec slurmd -D -N "$0" -f "$SLURM_CONF"' "$name" "$S"
fi
(cd "$S" || exit; exec setsid "$@") >>"$S/log/$name.out" 2>&1 </dev/null &
echo $! >"$S/pid/$name"
START
chmod +x "$S/start"
export SLURM_CONF=$S/slurm.conf
"$S/start" munged munged -F --key-file="$S/munge/key" --socket="$S/munge/sock" --pid-file="$S/log/munged.pid" \
    --seed-file="$S/munge/seed" --num-threads=2
for ((i = 0; i < 200; i++)); do [ -S "$S/munge/sock" ] && break; sleep 0.05; done
[ -S "$S/munge/sock" ] || { cat "$S/log/munged.out" >&2; die 1 "munged did not start"; }
"$S/start" slurmctld slurmctld -D -f "$S/slurm.conf"
for n in "${nodes[@]}"; do "$S/start" "$n"; done
if [ -n "${SLURM_LAB_OWNER:-}" ]; then
    "$S/start" watch bash -c 'while [ -d "/proc/$0" ]; do sleep 1; done; SLURM_CONF= exec "$1" "$2"' \
        "$SLURM_LAB_OWNER" "$HERE/slurm_down.sh" "$S"
fi
idle() { [ "$(timeout 10 sinfo -h -p debug -t idle -o %D 2>/dev/null)" = "$N" ]; }
for ((i = 0; i < 300; i++)); do idle && break; sleep 0.1; done
idle || { tail -n 5 "$S"/log/*.out >&2; die 1 "the nodes did not come up"; }
echo "slurm_up: $N nodes; export SLURM_CONF=$S/slurm.conf; end it with $HERE/slurm_down.sh $S"
