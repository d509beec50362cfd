"""The scripts in docs/ start training again when it was stopped, and only then. Slurm's commands are stand-ins."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from training import ON_CPU, ROOT, TIMEOUT, assert_equal, metrics, steps, wait_for_step

OWN = ["--data.workers", "2", "--micro_batch_size", "3", "--steps", "24"]

# Slurm's commands, on a machine of one node: what srun would start takes its place, and so its signals.
SRUN = 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=0 exec "$@"'
SCONTROL = 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$REQUEUED"; fi'


@pytest.fixture
def script(tmp_path):
    """start(name, arguments, commands) -> a script of docs/, running, with these commands in place of others."""
    running = []

    def start(name, *arguments, **commands):
        stand_ins = tmp_path / "bin"
        stand_ins.mkdir(exist_ok=True)
        for command, body in ({"srun": SRUN, "scontrol": SCONTROL} | commands).items():
            (stand_ins / command).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (stand_ins / command).chmod(0o755)
        (tmp_path / "two.yaml").write_text(
            (ROOT / "accelerate_configs/4gpu.yaml").read_text().replace(": 4\n", ": 2\n").replace("bf16", "'no'")
        )
        env = ON_CPU | {"PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        env |= {"CONFIG": tmp_path / "two.yaml", "RESTARTS": "1", "REQUEUED": tmp_path / "requeued"}
        env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
        env |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2"}
        process = subprocess.Popen(
            [str(word) for word in (ROOT / "docs" / name, *arguments)],
            cwd=ROOT,
            env=os.environ | {key: str(value) for key, value in env.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.communicate()


def requeued(tmp_path):
    file = tmp_path / "requeued"
    return file.read_text().splitlines() if file.exists() else []


def time_limit_signal():
    """What the script asks Slurm to send, and to whom."""
    (name,) = re.findall(r"^#SBATCH --signal=B:(\w+)@", (ROOT / "docs/slurm.sh").read_text(), re.MULTILINE)
    return signal.Signals[f"SIG{name}"]


def test_slurm_job_out_of_time_saves_and_is_requeued(flags, script, tmp_path):
    run = tmp_path / "run"
    job = script("slurm.sh", run, *flags, *OWN, "--steps", 100_000)
    wait_for_step(run, 8, job)
    job.send_signal(time_limit_signal())
    output, _ = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 0, output
    assert steps(run)[-1] == metrics(run)[-1]["step"]
    assert (run / "REQUEUE").exists()
    assert requeued(tmp_path) == ["requeue 77"]


@pytest.mark.parametrize(
    ("what_happens", "code", "back"),
    [
        ("exit 0", 0, False),  # is done
        ("exit 1", 1, False),  # fails
        ('touch "$RUN/REQUEUE"; exit 1', 1, False),  # fails; a process saved when it was told to end
        ('trap "exit 1" TERM; kill -USR1 $PPID; while :; do sleep 0.01; done', 0, True),  # could not save in time
        ('trap "exit 0" TERM; kill -USR1 $PPID; while :; do sleep 0.01; done', 0, False),  # was just done
    ],
)
def test_slurm_job_is_requeued_only_if_its_time_ran_out_before_it_was_done(what_happens, code, back, script, tmp_path):
    (tmp_path / "run").mkdir()
    job = script("slurm.sh", tmp_path / "run", srun=what_happens)
    output, _ = job.communicate(timeout=TIMEOUT)
    assert job.returncode == code, output
    assert requeued(tmp_path) == ["requeue 77"] * back


def test_processes_start_again_after_one_was_killed_and_end_as_uninterrupted_ones(
    flags, uninterrupted, script, tmp_path
):
    run = tmp_path / "run"
    job = script("restarts.sh", *flags, *OWN, "--run_dir", run)
    wait_for_step(run, 12, job)
    (victim,) = (child for child in psutil.Process(job.pid).children() if child.environ().get("RANK") == "1")
    victim.kill()
    output, _ = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 0, output
    assert output.count("resumed from") == 1
    assert_equal(run, uninterrupted(*OWN, processes=2))
