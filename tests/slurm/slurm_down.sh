#!/bin/bash
# slurm_down.sh DIR - cancels the jobs of the Slurm that slurm_up.sh has started in DIR, stops its daemons and whatever its
# jobs have left, each by its process id, and removes DIR. Status 0 when nothing is left, also when there was nothing.
S=${1:?usage: slurm_down.sh DIR}
[ -d "$S/pid" ] && [ -d "$S/munge" ] || exit 0
S=$(readlink -f "$S")
pid_of() { cat "$S/pid/$1" 2>/dev/null; }
# Process ids are used again: believe one only while the process has one of our configurations or our folder in its words.
ours() {
    [ -n "$1" ] && [ "$1" != $$ ] && { grep -qzs "SLURM_CONF=$S/" "/proc/$1/environ" || grep -qs "$S" "/proc/$1/cmdline"; }
}
alive() { ours "$1" && ! grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }

if ours "$(pid_of watch)" && [ "$PPID" != "$(pid_of watch)" ]; then kill "$(pid_of watch)"; fi
if ours "$(pid_of slurmctld)"; then
    export SLURM_CONF=$S/slurm.conf
    timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null
    for ((i = 0; i < 80; i++)); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
fi
stop() { # names of daemons: TERM to all, a few seconds, then KILL
    local name p
    for name; do p=$(pid_of "$name"); ours "$p" && kill "$p"; done
    for name; do
        p=$(pid_of "$name"); for ((i = 0; i < 160; i++)); do alive "$p" || break; sleep 0.05; done
        alive "$p" && kill -9 "$p"
    done
}
mapfile -t nodes < <(cd "$S/pid" && ls | grep -x 'n[0-9]*')
stop "${nodes[@]}"
stop slurmctld munged
# Steps of cancelled jobs, what they had started, and what the tests had.
for _ in 1 2 3 4 5 6; do
    left=()
    for d in /proc/[0-9]*; do
        p=${d##*/}
        [ "$p" = $$ ] && continue
        grep -qzs "SLURM_CONF=$S/" "$d/environ" || continue
        { grep -qzsE "^(SLURM_JOB_ID|MPI_EF_TEST_LAB)=" "$d/environ" || grep -qs "^slurm" "$d/comm"; } && left+=("$p")
    done
    [ ${#left[@]} = 0 ] && break
    kill -9 "${left[@]}" 2>/dev/null; sleep 0.3
done
rm -rf "$S"
[ ${#left[@]} = 0 ] || { echo "slurm_down: these do not die: ${left[*]}" >&2; exit 1; }
