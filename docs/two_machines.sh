#!/usr/bin/env bash
# Two machines on one: two network namespaces joined by a cable (a veth pair), with two processes each, on the CPU.
# Machine 1 dies and comes back; then machine 0 does, whose cable is pulled before, so that nobody hears of its end.
# The run must end as one that lost nothing, bit for bit. As root, with the environment active and data to train on:
#
#     python -m vla.collect tabletop --out runs/two/data --episodes 24
#     docs/two_machines.sh runs/two --data.path runs/two/data --eval.every 25 [flags of train.py]
set -euo pipefail
cd "$(dirname "$0")/.."

# What a machine does: it starts the launcher until the run is done. When the other machine's processes are gone its own
# get an error, or if no packet comes any more, the watchdog ends them (--guard.hang_seconds). Then the launcher ends;
# the next one waits for the other machine's, and the run goes on from its last checkpoint.
if [[ $1 == machine ]]; then
    rank=$2 run=$3
    shift 3
    for _ in 1 2 3 4; do
        accelerate launch --config_file accelerate_configs/4gpu.yaml --num_machines 2 --num_processes 4 \
            --machine_rank "$rank" --main_process_ip 10.77.0.1 --main_process_port 29577 \
            train.py --run_dir "$run" --resume_from auto "$@" 2>>"$run.machine$rank.log" && exit 0
        echo "$(date +%T) machine $rank: its launcher has ended"
        sleep 1
    done
    exit 1
fi

folder=$1
shift
flags=("$@" --steps 60 --checkpoint.every 2 --global_batch_size 24 --micro_batch_size 3 --guard.hang_seconds 20)
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1

say() { echo "$(date +%T) $*"; }

start() { # machine, run
    # Without its name gloo would take the interface that the host's name leads to.
    GLOO_SOCKET_IFNAME=cable$1 ip netns exec "machine$1" "$0" machine "$1" "$2" "${flags[@]}" &
}

kill_all() { # machine
    ip netns pids "machine$1" | xargs --no-run-if-empty kill -9
}

wait_for() { # run, step: its checkpoint
    until [[ -e $1/checkpoints/step_$(printf %08d "$2") ]]; do sleep 0.1; done
}

clean_up() {
    for machine in 0 1; do
        kill_all $machine
        ip netns delete machine$machine
    done
}

for machine in 0 1; do ip netns add machine$machine; done
trap clean_up EXIT
ip link add cable0 netns machine0 type veth peer name cable1 netns machine1
for machine in 0 1; do
    ip -n machine$machine address add 10.77.0.$((machine + 1))/24 dev cable$machine
    ip -n machine$machine link set lo up
    ip -n machine$machine link set cable$machine up
done

echo "docs/two_machines.sh $folder $*"
say "a run that loses nothing"
start 0 "$folder/whole"
start 1 "$folder/whole"
wait

say "the same, with losses"
run=$folder/lossy
start 0 "$run"
start 1 "$run"
wait_for "$run" 20
say "machine 1 dies"
kill_all 1
sleep 10
say "machine 1 is back"
start 1 "$run"
wait_for "$run" 40
say "the cable of machine 0 is pulled, and machine 0 dies"
ip -n machine0 link set cable0 down
kill_all 0
sleep 40
say "machine 0 is back"
ip -n machine0 link set cable0 up
start 0 "$run"
wait

say "machine 0 was told, each time that it started:"
grep -h "trained; \|^steps" "$run.machine0.log"
python - "$folder" <<'END'
import sys

sys.path[:0] = [".", "tests"]
from pathlib import Path

from training import everything

whole, lossy = (everything(Path(sys.argv[1], name)) for name in ("whole", "lossy"))
differing = sorted(name for name in whole.keys() | lossy.keys() if whole.get(name) != lossy.get(name))
print(f"{len(differing)} of {len(whole)} values of the two runs differ", *differing[:9])
sys.exit(bool(differing))
END
