"""A job that is killed as a whole again and again ends as one that nobody stopped. tests/chaos.py does it longer."""

import random
import signal
import time

from chaos import flip_a_bit, record, recorded, repeated_and_lost
from training import after, assert_equal, die_at, train

from vla import checkpoint

STEPS, BATCH = 40, 12
OWN = ["--data.workers", 2, "--micro_batch_size", 3, "--steps", STEPS, "--checkpoint.every", 2]


def test_job_killed_at_random_instants_and_damaged_equals_uninterrupted_job(flags, uninterrupted, tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    run, history, chance = tmp_path / "run", tmp_path / "record.txt", random.Random(seed)

    def hooks(found):
        record(history)
        after(checkpoint, "flush", lambda *_: time.sleep(0.01))  # so that saves take long enough to be met

    def start(kill=None):
        same_command = [*flags, *OWN, "--run_dir", run, "--resume_from", "auto"]
        return train(*same_command, processes=2, before=hooks, kill=kill)

    def after_lines(count, seconds):
        """When so much more is recorded, and at some moment in the seconds after that."""
        due, moment = len(list(recorded(history))) + count, None

        def kill():
            nonlocal moment
            if moment is None and len(list(recorded(history))) >= due:
                moment = time.monotonic() + chance.uniform(0, seconds)
            return moment is not None and time.monotonic() >= moment

        return kill

    def kill(when):
        ended = start(when)
        assert [child.code for child in ended] == [-signal.SIGKILL] * 2, ended[0].stderr

    def in_a_save():
        return any((run / "checkpoints").glob(".saving_*"))

    kill(after_lines(24, 0.1))  # by then two checkpoints are committed
    kill(after_lines(0, 0.5))  # in the start-up
    kill(in_a_save)
    kill(after_lines(chance.randrange(20), 0.1))
    damaged, _ = flip_a_bit(run, chance)
    starts_before = sum(what == "from" for what, _ in recorded(history))
    kill(in_a_save)
    for child in start():
        child.ok()

    starts = [numbers[0] for what, numbers in recorded(history) if what == "from"]
    assert starts[0] == 0
    assert 0 < starts[starts_before] < damaged
    assert starts[-1] > 0
    assert repeated_and_lost(history, STEPS, BATCH) == (0, 0)
    assert_equal(run, uninterrupted(*OWN, processes=2))


def test_samples_of_the_surviving_history_are_those_of_the_last_time_a_step_was_made(tmp_path):
    history = tmp_path / "record.txt"
    lines = ["from 0", "step 1 0 0 1", "step 1 1 2 3", "step 2 0 4 5", "from 1", "step 2 0 4 5", "step 2 1 6 7"]
    history.write_text("\n".join(lines))
    assert repeated_and_lost(history, 2, 4) == (0, 0)
    history.write_text("\n".join([*lines, "from 1", "step 2 0 3 5", "step 2 1 6 7"]))
    assert repeated_and_lost(history, 2, 4) == (1, 1)
    assert repeated_and_lost(history, 3, 4) == (1, 5)


def test_four_processes_killed_and_resumed_equal_uninterrupted_ones(flags, uninterrupted, tmp_path):
    own = ["--micro_batch_size", 1, "--checkpoint.every", 5]
    train(*flags, *own, "--run_dir", tmp_path / "run", processes=4, before=die_at(7))
    for child in train("--resume_from", tmp_path / "run", processes=4):
        child.ok()
    assert_equal(tmp_path / "run", uninterrupted(*own, processes=4))
