#!/usr/bin/env bash
#SBATCH --job-name=vla
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one launcher for each node; it starts one process for each GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180        # 180 s before the time is up, to this shell alone (B:)
#SBATCH --requeue                  # Slurm itself puts the job back after the loss of a node and after preemption
#SBATCH --open-mode=append         # and the same log goes on
#SBATCH --output=slurm-%j.log
#
# Train under Slurm, through as many time limits, preemptions and lost nodes as it takes. From the repository, with the
# environment active and RUN_DIR on a disk that all nodes share:
#
#     sbatch docs/slurm.sh RUN_DIR --data.path data/mine --steps 20000
#
# Who gets which signal:
# - The time limit sends SIGUSR1 to this shell, which sends SIGTERM to srun, which forwards it to its tasks. It must not
#   be SIGUSR1 from there on: torchrun, inside of accelerate launch, dies of it, and its processes only save because
#   they notice that they are alone.
# - torchrun forwards SIGTERM to its processes and kills them 30 s later, with torch 2.13 and newer after
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds. The processes finish the step, save, leave RUN_DIR/REQUEUE, and exit.
# - Preemption and scancel send SIGTERM to all processes of all tasks, loader workers too, which ignore it. The run
#   saves just the same; whether the job comes back is for Slurm to say, so this script then does nothing.
set -euo pipefail
export RUN=$1 CONFIG=${CONFIG:-accelerate_configs/4gpu.yaml} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # else srun would give each task one core
shift

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD PORT=$((20000 + SLURM_JOB_ID % 10000))

# The single quotes leave the variables to each node's own shell. A node that fails ends the others (-K).
srun -K bash -c 'exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
    --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --main_process_ip "$HEAD" --main_process_port "$PORT" \
    train.py --run_dir "$RUN" --resume_from auto "$@"' launch "$@" &
step=$!

out_of_time=false
trap 'out_of_time=true; kill -TERM $step' USR1
code=0
wait $step || code=$? # ends early when the signal comes
if $out_of_time; then
    code=0
    wait $step || code=$?
fi

# torchrun's exit code after a signal is 1, whatever its processes made of it: so it is the marker that tells. Without
# one the run is done, or, with an error after the signal, was killed before it had saved and has its last checkpoint.
if $out_of_time && { [[ -e $RUN/REQUEUE ]] || ((code)); }; then
    echo "out of time: back into the queue, to go on from the last checkpoint of $RUN"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $code
