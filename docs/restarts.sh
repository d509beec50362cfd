#!/usr/bin/env bash
# Train on one machine, and start again from the last checkpoint when a process dies.
#
#     docs/restarts.sh --data.path data/mine --run_dir runs/mine --steps 20000
#
# The launcher ends all processes when one of them fails or is killed (SIGTERM, and SIGKILL 30 s later), and starts them
# all again with the same command, up to --max_restarts times. A run that a signal ended (SIGTERM to one process) or
# that is done is not started again. The launcher itself is not watched: for a machine that may die see slurm.sh.
# With one process (1gpu.yaml) accelerate ignores --max_restarts.
set -euo pipefail
cd "$(dirname "$0")/.."

# By default the processes of every start meet in one store (torch 2.13, pytorch issue 135712), where they find the
# addresses of those that died: they cannot connect, which costs a restart, or hang. These two make a new store each
# time. They are torchrun's; accelerate launch has no flags for them.
export PET_STANDALONE=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec accelerate launch --config_file "${CONFIG:-accelerate_configs/4gpu.yaml}" --max_restarts "${RESTARTS:-3}" \
    train.py --resume_from auto "$@"
