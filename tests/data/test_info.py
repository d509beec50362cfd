"""What `python -m vla.data info` tells of a data set."""

import numpy as np
import pytest
from lerobot_sets import DATA, LENGTHS, edit_columns, made_up, noise, write

from vla.data import __main__ as command


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set")


def page(root, capsys, **options):
    """What `info` prints, line by line."""
    capsys.readouterr()
    command.main(command.Options("info", str(root), **options))
    return capsys.readouterr().out.splitlines()


def test_info_tells_episodes_frames_hours_tasks_and_cameras(tmp_path, capsys):
    episodes = made_up((900, 100, 500, 2100), size=(2, 4), draw=noise)
    for episode, instruction in zip(episodes, ["close", "open", "never", "open"], strict=True):
        episode["instruction"] = instruction
    root = write(tmp_path / "set", episodes, fps=20)
    # An episode's task is that of its first frame, here the second task in all but the first episode.
    edit_columns(root / DATA, {"task_index": [0] * 900 + [1] + [0] * 99 + [1] + [2] * 499 + [1] * 2100})
    assert page(root, capsys)[:9] == [
        f"{root}: LeRobot v3.0, robot arm",
        "episodes   4 of 100 to 2,100 frames, median 700",
        "frames     3,600 at 20 Hz, 0.05 hours",
        "tasks      3, and the episodes of each",
        "                3  open",
        "                1  close",
        "                0  never",
        "camera     table: 2 x 4, images (observation.images.table)",
        "camera     wrist: 2 x 4, images (observation.images.wrist)",
    ]


def test_info_names_the_most_frequent_tasks_only(tmp_path, capsys):
    episodes = made_up((1,) * 50, cameras=("top",))
    for number, episode in enumerate(episodes):
        episode["instruction"] = f"task {number % 30}"
    lines = page(write(tmp_path / "set", episodes), capsys)
    tasks = next(number for number, line in enumerate(lines) if line.startswith("tasks"))
    assert lines[tasks] == "tasks      30, and the episodes of the most frequent"
    assert lines[tasks + 1 : tasks + 21] == [f"                2  task {number}" for number in range(20)]
    assert lines[tasks + 21].startswith("camera")


def test_info_tells_the_range_of_each_dimension(tmp_path, capsys):
    episodes = made_up((300, 400), cameras=("top",), size=(2, 4), draw=noise)
    lines = page(write(tmp_path / "set", episodes), capsys)
    for title, key, names in (("state", "state", "xyz"), ("action", "actions", ("dx", "dy"))):
        head = next(number for number, line in enumerate(lines) if line.startswith(title))
        assert lines[head].split() == [title, "min", "1", "%", "mean", "99", "%", "max", "std"]
        values = np.concatenate([episode[key] for episode in episodes]).astype(float)
        for line, name, series in zip(lines[head + 1 :], names, values.T, strict=False):
            low, high = np.quantile(series, [0.01, 0.99])
            expected = [series.min(), low, series.mean(), high, series.max(), series.std()]
            assert line.split()[0] == name
            np.testing.assert_allclose([float(number) for number in line.split()[1:]], expected, rtol=1e-3, atol=1e-6)


# Lengths of episodes, and for each bar the frames from and to, and the episodes.
HISTOGRAMS = {
    (7, 7, 7): [(7, 7, 3)],
    (3, 4, 4, 6): [(3, 3, 1), (4, 4, 2), (5, 5, 0), (6, 6, 1)],
    (1, 10, 10): [(length, length, {1: 1, 10: 2}.get(length, 0)) for length in range(1, 11)],
    (1, 10, 11, 20, 20): [(low, low + 1, {1: 1, 9: 1, 11: 1, 19: 2}.get(low, 0)) for low in range(1, 20, 2)],
    (4, 25): [(4, 6, 1), (7, 9, 0), (10, 12, 0), (13, 15, 0), (16, 18, 0), (19, 21, 0), (22, 24, 0), (25, 25, 1)],
}


@pytest.mark.parametrize("lengths", HISTOGRAMS, ids=str)
def test_info_counts_the_episodes_of_each_length(tmp_path, capsys, lengths):
    lines = page(write(tmp_path / "set", made_up(lengths, cameras=("top",), size=(2, 4), draw=noise)), capsys)
    head = lines.index("lengths    frames            episodes")
    most = max(count for _, _, count in HISTOGRAMS[lengths])
    for line, (low, high, count) in zip(lines[head + 1 :], HISTOGRAMS[lengths], strict=True):
        frames, bar = f"{low:6} to {high:6}" if high > low else f"{low:6}", "█" * round(40 * count / most)
        assert line == f"           {frames:16}  {count:8}  {bar}".rstrip()


def test_info_reads_what_it_is_told_and_counts_faults(root, capsys):
    edit_columns(root / DATA, {"timestamp": np.arange(sum(LENGTHS))})
    lines = page(root, capsys, cameras=("wrist",), state=("action",))
    assert [line for line in lines if line.startswith("camera")] == [
        "camera     wrist: 16 x 32, images (observation.images.wrist)"
    ]
    assert [line.split()[0] for line in lines if " to " not in line].count("dx") == 2
    assert lines[-1] == f"faults     4 or more: python -m vla.data check {root} lists them"
