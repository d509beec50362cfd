import re
import subprocess
import sys

import numpy as np
import pytest
from episode_faults import EPISODE_FAULTS
from frame_faults import FRAME_FAULTS, no_video_of_the_last
from lerobot_sets import DATA, EPISODES, column, copy, edit_columns, edit_info, edit_value, made_up, numbers, write
from planting import ALL, TASKS, VIDEO, WRIST, F, begins, damaged_packet, filmed_anew, sound_sets, start

from vla import InputError
from vla.data import __main__ as command
from vla.data.lerobot import LeRobotDataset

FAULTS = FRAME_FAULTS | EPISODE_FAULTS


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return sound_sets(tmp_path_factory.mktemp("sets"))


def matches(line, told):
    return re.fullmatch(re.escape(told).replace(r"\*", ".*"), line)


def check(root, capsys):
    """What the command prints, line by line, and the error that it ends with."""
    capsys.readouterr()
    with pytest.raises(InputError) as failure:
        command.main(command.Options("check", str(root)))
    return capsys.readouterr().out.splitlines(), str(failure.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_told_by_the_check_and_at_opening_and_only_its_episodes_are_left_out(fault, bases, tmp_path, capsys):
    base, plant, told, bad = FAULTS[fault]
    root = copy(bases[base], tmp_path / "set")
    plant(root)

    lines, error = check(root, capsys)
    told, more = [text for text in told if text != "*"], "*" in told
    for text in told:
        assert any(matches(line, text) for line in lines), lines
    assert len(lines) == len(told) or (more and len(lines) > len(told)), lines
    assert error == f"{root} has {len(lines)} fault{'s' if len(lines) > 1 else ''}"

    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    for text in told:
        assert re.search(re.escape(text).replace(r"\*", ".*"), str(refusal.value))

    if bad is None or bad == ALL:
        with pytest.raises(InputError, match=r"has a fault|every episode has a fault, expected some to train on"):
            LeRobotDataset(root, skip_bad=True)
        return
    data, frame = LeRobotDataset(root, skip_bad=True), 0
    assert data.episode_numbers[data.episodes].tolist() == sorted(ALL - bad)
    for number, episode in enumerate(made_up()):
        length = len(episode["state"])
        if number not in bad:
            row = data.episode_numbers.tolist().index(number)
            frames = np.arange(data.episode_from[row], data.episode_to[row])
            np.testing.assert_array_equal(data.state[frames], episode["state"])
            np.testing.assert_array_equal(data.actions[frames], episode["actions"])
            shown = np.arange(frame, frame + length)
            np.testing.assert_array_equal(numbers(data.images(frames)), np.stack([shown, 100 + shown], axis=1))
        frame += length


def test_all_faults_are_told_at_once(bases, tmp_path, capsys):
    root = copy(bases["h264"], tmp_path / "set")
    edit_value(root / DATA, "action", 13, [float("nan"), 0.0])
    edit_value(root / DATA, "timestamp", 2, 7.0)
    edit_value(root / TASKS, "task", 1, "")
    edit_value(
        root / EPISODES,
        f"videos/{WRIST}/from_timestamp",
        1,
        0.5,
    )
    damaged_packet(9)(root)
    edit_info(root, lambda info: info.update(total_frames=13))
    in_numbers = [
        "meta/info.json: total_frames is 13, expected 14 as in its episodes",
        f"{DATA}: episode 0: frame 2: timestamp is 7 s, expected 0.2 within 0.0001",
        f"{DATA}: episode 3: frame 1: action is nan in dx, expected a finite number",
        f"{TASKS}: episodes 1, 3: the instruction of task_index 1 is empty, expected words",
        f"{begins(1)} 0.5000 s, expected 0.4000, where the one before ends",
    ]
    lines, error = check(root, capsys)
    assert lines[:-1] == in_numbers
    assert matches(lines[-1], f"{VIDEO}: episode 2: frame 9, shown at 0.900 s, cannot be decoded*")
    assert error.endswith("has 6 faults")
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    told = str(refusal.value)
    assert told.startswith(f"{root} has 5 faults:\n" + "".join(f"  {line}\n" for line in in_numbers))
    assert "--data.skip_bad to leave out 3 episodes (python -m vla.data check" in told


def test_many_faults_are_counted_and_the_first_ten_told(tmp_path):
    root = write(tmp_path / "set", made_up((1,) * 15, cameras=("top",)))
    edit_columns(root / DATA, {"timestamp": np.arange(15) + 5.0})
    with pytest.raises(InputError, match=r"has 15 faults:\n(  .*timestamp is .*\n){10}  … and 5 more\nmend") as refusal:
        LeRobotDataset(root)
    assert "leave out 15 episodes" in str(refusal.value)


def same_action(root):
    edit_columns(root / DATA, {"action": [[0.5 * i, 3.0] for i in range(F)]})


def held_out(root):
    edit_info(root, lambda info: info.update(splits={"train": "0:3", "val": "3:4"}))


def same_instruction(root):
    edit_value(root / TASKS, "task", 1, "TASK 0")


@pytest.mark.parametrize(
    ("plant", "kind", "other"),
    [
        (same_action, "constant_action", "shared_instruction"),
        (same_instruction, "shared_instruction", "constant_action"),
        (held_out, "other_split", "video_gap"),
    ],
)
def test_faults_to_live_with_can_be_accepted_by_name(bases, tmp_path, plant, kind, other):
    root = copy(bases["png"], tmp_path / "set")
    plant(root)
    for accept in ((), (other,)):
        with pytest.raises(InputError, match=rf"accept it with --data.accept {kind} \("):
            LeRobotDataset(root, accept=accept)
    data = LeRobotDataset(root, accept=(kind,))
    assert (data.num_episodes, data.num_frames) == (4, F)
    np.testing.assert_array_equal(data.actions, column(root / DATA, "action"))
    edit_value(root / DATA, "timestamp", 5, 9.0)
    with pytest.raises(InputError, match="episode 1: frame 1: timestamp"):
        LeRobotDataset(root, accept=(kind,))


def test_frames_of_no_episode_between_those_of_others_can_be_accepted_and_an_overlap_cannot(bases, tmp_path):
    root, times = copy(bases["h264"], tmp_path / "set"), {"from": [0.0, 0.5, 1.0, 1.5], "to": [0.4, 0.8, 1.5, 1.7]}
    shown = [*range(100, 104), 250, *range(104, 107), 250, 250, *range(107, 114)]
    filmed_anew(VIDEO, shown)(root)
    place = {f"videos/{WRIST}/{end}_timestamp": times[end] for end in times}
    edit_columns(root / EPISODES, place)
    told = r"(?s)has 3 faults:.* episode 1: .* begins at 0.5000 s, .*or accept it with --data.accept video_gap"
    with pytest.raises(InputError, match=told):
        LeRobotDataset(root)
    assert LeRobotDataset(root, skip_bad=True).episodes.tolist() == [0]
    data = LeRobotDataset(root, accept=("video_gap",))
    np.testing.assert_array_equal(numbers(data.images(np.arange(F)))[:, 1], 100 + np.arange(F))
    edit_value(root / EPISODES, f"videos/{WRIST}/to_timestamp", 1, 1.1)  # a frame of episode 2
    with pytest.raises(InputError, match=r"(?s)has 3 faults:.* episode 1: .* begins .* leave out 3 episodes \("):
        LeRobotDataset(root, accept=("video_gap",))
    edit_columns(root / EPISODES, place)
    filmed_anew(VIDEO, shown[:-1])(root)
    with pytest.raises(InputError, match=f"has a fault: {VIDEO}: episode 3: the video ends at 1.5000 s and has 1 of"):
        LeRobotDataset(root, accept=("video_gap",))


def test_faults_of_a_camera_that_is_not_asked_for_are_no_hindrance(bases, tmp_path):
    root = copy(bases["h264"], tmp_path / "set")
    no_video_of_the_last(root)
    (root / VIDEO).unlink()
    data = LeRobotDataset(root, cameras=("table",))
    np.testing.assert_array_equal(numbers(data.images(np.arange(F)))[:, 0], np.arange(F))
    command.main(command.Options("check", str(root), cameras=("table",)))
    root = copy(bases["png"], tmp_path / "other")
    edit_columns(root / DATA, {"observation.images.wrist": None})
    LeRobotDataset(root, cameras=("table",))
    with pytest.raises(InputError, match=r"lacks the columns \['observation.images.wrist'\]"):
        LeRobotDataset(root)


def test_tolerance_decides_which_times_are_faults(bases, tmp_path):
    root = copy(bases["h264"], tmp_path / "set")
    edit_value(root / DATA, "timestamp", 6, 0.202)
    start(2, 0.702)(root)
    for tolerance, told in ((0.001, 2), (0.003, 0)):
        try:
            assert len(LeRobotDataset(root, tolerance_s=tolerance).faults) == told == 0
        except InputError as refusal:
            assert f"has {told} faults" in str(refusal)  # noqa: PT017


@pytest.mark.parametrize("tolerance", [0.05, 1.0, float("nan")])
def test_tolerance_of_half_a_frame_is_refused(bases, tolerance):
    told = rf"h264 has 10 frames a second and tolerance_s is {tolerance:g}, expected less than 0.05, half a frame"
    with pytest.raises(InputError, match=told):
        LeRobotDataset(bases["h264"], tolerance_s=tolerance)
    assert not LeRobotDataset(bases["h264"], tolerance_s=0.0499).faults


def test_tolerance_below_zero_is_no_fault_of_the_data(bases):
    with pytest.raises(InputError, match=r"^--tolerance_s is -1; expected at least 0$"):
        command.main(command.Options("check", str(bases["h264"]), tolerance_s=-1))


def test_check_takes_a_tolerance_and_writes_where_it_is_told(bases, tmp_path):
    root = copy(bases["h264"], tmp_path / "set")
    edit_value(root / DATA, "timestamp", 6, 0.202)
    command.main(command.Options("check", str(root), tolerance_s=0.003, cache_dir=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").glob("index-*"))
    assert not (root / ".vla_cache").exists()


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_broken_picture_is_told_with_every_cache(bases, tmp_path, cache):
    root = copy(bases["h264"], tmp_path / "set")
    damaged_packet(9)(root)
    with pytest.raises(InputError, match=f"{VIDEO}: episode 2: frame 9, shown at 0.900 s, cannot be decoded"):
        LeRobotDataset(root, cache=cache).images(np.arange(F))  # without a cache nothing was decoded at opening


def test_mended_data_set_is_read_again(tmp_path):
    def noise(number, size):
        return np.random.default_rng(number).integers(0, 256, (3, *size), dtype=np.uint8)

    root = write(tmp_path / "set", made_up((20, 20), cameras=("wrist",), size=(64, 96), draw=noise), codec="h264")
    good = (root / VIDEO).read_bytes()
    damaged_packet(5)(root)
    assert len(good) == len((root / VIDEO).read_bytes()) > 100_000
    with pytest.raises(InputError, match="cannot be decoded"):
        LeRobotDataset(root)
    (root / VIDEO).write_bytes(good)
    assert LeRobotDataset(root).faults == []


@pytest.mark.parametrize("base", ["png", "files", "h264", "v2.1", "v2.1 h264"])
def test_check_of_a_good_data_set_finds_nothing(bases, capsys, base):
    command.main(command.Options("check", str(bases[base])))
    assert capsys.readouterr().out == f"{bases[base]}: no fault in 4 episodes, 14 frames\n"


def test_command_ends_with_1_if_there_is_a_fault_and_else_with_0(bases, tmp_path):
    def run(root, *options):
        arguments = [sys.executable, "-m", "vla.data", "check", root, *options]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    root = copy(bases["png"], tmp_path / "set")
    good = run(root)
    assert (good.returncode, good.stdout) == (0, f"{root}: no fault in 4 episodes, 14 frames\n")
    told = run(root, "--cameras", "front").stderr.splitlines()[-1]
    assert told.endswith("expected ['front']: correct --cameras")  # the flag that this command has
    assert run(tmp_path / "nothing").stderr.endswith("expected JSON: check the path\n")
    edit_value(root / DATA, "timestamp", 5, 9.0)
    bad = run(root)
    assert bad.returncode == 1
    assert bad.stdout == f"{DATA}: episode 1: frame 1: timestamp is 9 s, expected 0.1 within 0.0001\n"
    assert bad.stderr.splitlines()[-1] == f"error: {root} has 1 fault"
    assert "Traceback" not in bad.stderr
