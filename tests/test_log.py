"""What a run shows, and writes down."""

import io

import numpy as np
import pytest
from PIL import Image
from saving import fill, mounted
from training import at_step, both, die, metrics, train

from vla.images import gif


def test_log_survives_a_full_disk_and_is_whole_when_there_is_room_again(flags, uninterrupted, tmp_path):
    own, disk = ("--steps", 40, "--eval.every", 0, "--checkpoint.every", 40), tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=20m"):
        full = both(at_step(3, lambda: fill(disk)), at_step(35, (disk / "filler").unlink))
        (child,) = train(*flags, *own, "--run_dir", disk / "run", before=full)
        for warning in ("warning: metrics wait until ", "warning: tensorboard logs no more "):
            assert child.ok().stderr.count(warning) == 1
        assert metrics(disk / "run") == metrics(uninterrupted(*own))


def test_damaged_lines_of_the_log_are_left_out_when_a_run_goes_on(flags, uninterrupted, tmp_path):
    run = tmp_path / "run"
    train(*flags, "--run_dir", run, before=at_step(8, die))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = [lines[0], bytes(9) + b"\n", *lines[1:], b'{"step": 3, "train/loss"\n', b"\xff\n", b'{"step": 3, "tr']
    (run / "metrics.jsonl").write_bytes(b"".join(damaged))
    (child,) = train("--resume_from", run)
    assert child.ok().stderr.count(f"warning: a damaged line of {run}/metrics.jsonl is left out") == 3
    assert metrics(run) == metrics(uninterrupted())


def test_moving_pictures_keep_the_colours_of_small_things():
    """A goal of 2 x 2 pixels, before a background of more colours than a GIF has."""
    frames = np.random.default_rng(0).integers(60, 180, size=(1, 96, 96, 3), dtype=np.uint8).repeat(4, axis=0)
    places = [(slice(40, 42), slice(20 * i, 20 * i + 2)) for i in range(4)]
    for frame, place in zip(frames, places, strict=True):
        frame[place] = 0, 0, 250
    with Image.open(io.BytesIO(gif(frames, fps=20))) as picture:
        for i, place in enumerate(places):
            picture.seek(i)
            shown = np.asarray(picture.convert("RGB"))[place]
            assert np.abs(shown - np.array([0, 0, 250])).max() <= 16
        assert (picture.n_frames, picture.info["duration"]) == (4, 50)


@pytest.mark.parametrize(("warmup_steps", "warnings"), [(15, 0), (16, 1)])
def test_warm_up_that_is_not_over_when_the_run_ends_is_warned_of(warmup_steps, warnings, flags, tmp_path):
    (child,) = train(*flags, "--optim.warmup_steps", warmup_steps, "--run_dir", tmp_path / "run")
    assert child.ok().stderr.count(f"warning: the warm-up (--optim.warmup_steps {warmup_steps}) takes") == warnings
