#!/usr/bin/env bash
# Trains over several nodes that may come and go. On every node, the same line:
#
#     launch/torchrun.sh HOST NODES key=value ...
#     launch/torchrun.sh node1 4 recipe=... run_dir=/shared/runs/mine
#     launch/torchrun.sh node1:29500 2:4 recipe=... run_dir=/shared/runs/mine
#
# HOST is one of the nodes, which stays: the others meet there, on port 29400 unless it says another. NODES is how many there are, or the fewest
# and the most. What follows goes to `softmoe train` as it is. The folder of the run must be the same on every node: a shared disk, or a path on one.
# softmoe and torchrun are taken from PATH: activate the environment first.
#
# What the environment may say otherwise:
#     RANKS       ranks of this node (its GPUs; without any, its cores)
#     JOB         a name that only the nodes of this job know (of the words after it, so that the same line meets the same line)
#     RESTARTS    lost workers and nodes that the job bears; 0: the first loss ends it (100)
#     RENDEZVOUS  more of torchrun's --rdzv-conf, as keep_alive_interval=5,keep_alive_max_attempt=3,last_call_timeout=30
#     ADDRESS     of this node, where the others do not reach it by its host name
#     GRACE       seconds to save after a signal, before workers are killed (130: more than checkpoint.grace=120 and 5)
#
# A lost worker or node costs the steps since the last checkpoint, and no hand: the others start again from there. Ctrl-C, SIGTERM or SIGUSR1 to
# this process saves and ends the job on this node; where all nodes get it, the same line on all of them goes on later.
set -euo pipefail

say() { echo "torchrun.sh: $*" >&2; }

if [[ $# -lt 2 || $1 == *=* || ! $2 =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    say "write launch/torchrun.sh HOST NODES key=value ..., with NODES a number or fewest:most; got: $*"
    exit 2
fi
for program in torchrun softmoe; do
    if ! type -P "$program" >/dev/null; then
        say "there is no $program on the PATH of $(hostname); activate its environment first"
        exit 2
    fi
done

[[ $1 =~ :[0-9]+$ ]] && endpoint=$1 || endpoint=$1:29400
nodes=$2
job=${JOB:-$(printf '%s\n' "$@" | cksum | cut -d' ' -f1)}
shift 2

# torchrun's own default of one store for all has a node that joins later wait in vain (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

exec torchrun --nnodes="$nodes" --nproc-per-node="${RANKS:-auto}" --max-restarts="${RESTARTS:-100}" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$job" ${RENDEZVOUS:+--rdzv-conf="$RENDEZVOUS"} \
    ${ADDRESS:+--local-addr="$ADDRESS"} --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout="${GRACE:-130}" --no-python softmoe train "$@"
