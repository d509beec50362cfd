import json

import pytest
from lerobot_sets import EPISODES, copy, edit_columns, edit_info, features, read_lines
from planting import (
    TABLE,
    TASKS,
    WRIST,
    content,
    damaged_names,
    feature,
    info,
    line,
    removed,
    rows,
    shorter,
    sound_sets,
    value,
    values,
)

from vla import InputError
from vla.data import __main__ as command
from vla.data.lerobot import LeRobotDataset


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return sound_sets(tmp_path_factory.mktemp("sets"))


def without(*keys):
    def plant(root):
        edit_info(root, lambda info: [info.pop(key) for key in keys])

    return plant


def feature_as(key, new):
    return lambda root: edit_info(root, lambda info: info["features"].update({key: new}))


def no_cameras(root):
    def change(info):
        info["features"] = {key: value for key, value in info["features"].items() if "images" not in key}

    edit_info(root, change)


REPAIR = "copy or write the data set again"
# Metadata that cannot be understood, and what is told.
REFUSED = {
    "no info": ("png", removed("meta/info.json"), ["meta/info.json cannot be read", "check --data.path"]),
    "info cut short": ("png", shorter("meta/info.json"), ["meta/info.json cannot be read", "expected JSON"]),
    "info of a list": ("png", content("meta/info.json", b"[]"), ["meta/info.json lacks ['codebase_version', 'data_"]),
    "old version": ("png", info(codebase_version="v1.6"), ["'v1.6', expected 'v2.1' or 'v3.0'", "LeRobot's converter"]),
    "no fps": ("png", without("fps"), ["meta/info.json lacks ['fps']", REPAIR]),
    "fps of zero": ("png", info(fps=0), ["fps is 0, expected a number above 0"]),
    "fps of words": ("png", info(fps="ten"), ["fps is 'ten', expected a number above 0"]),
    "no features": ("png", info(features=None), ["features are None, expected"]),
    "feature of no shape": ("png", feature_as("action", {"dtype": "float32"}), ["feature 'action' is {'dtype'"]),
    "feature of words": ("png", feature_as("action", "float32"), ["feature 'action' is 'float32', expected its dtype"]),
    "paths of other parts": (
        "png",
        info(data_path="data/{episode}.parquet"),
        ["data_path is 'data/{episode}.parquet'"],
    ),
    "no video_path": ("h264", without("video_path"), ["video_path is None, expected a path that names chunk_index, "]),
    "no state": (
        "png",
        lambda root: edit_info(root, lambda info: info["features"].pop("observation.state")),
        ["'observation.state' is not among ['action', 'episode_index'", "expected numbers of shape [D]"],
    ),
    "state of a matrix": (
        "png",
        feature("observation.state", shape=[3, 1]),
        ["float32 of shape [3, 1], expected numbers"],
    ),
    "action of words": ("png", feature("action", dtype="string", shape=[1]), ["string of shape [1], expected numbers"]),
    "action of too much": ("png", feature("action", shape=[10**11]), ["shape [100000000000], expected numbers of"]),
    "action of nothing": ("png", feature("action", shape=[0]), ["float32 of shape [0], expected numbers of shape [D]"]),
    "no camera": ("png", no_cameras, ["has cameras []", "expected at least one", "--data.cameras"]),
    "image of two numbers": ("png", feature(TABLE, shape=[16, 32]), ["shape [16, 32], expected three numbers above 0"]),
    "image of no height": (
        "png",
        feature(TABLE, shape=[3, 0, 32]),
        ["shape [3, 0, 32], expected three numbers above 0"],
    ),
    "shape of words": ("png", feature(TABLE, shape=[3, True, 32]), ["expected its dtype and shape"]),
    "words of no alphabet": ("png", damaged_names(TASKS), [f"{TASKS} is missing or unreadable"]),
    "episodes missing": ("png", removed(EPISODES), ["meta/episodes has no parquet file, expected at least 1", REPAIR]),
    "episodes cut short": ("png", shorter(EPISODES), [f"{EPISODES} is missing or unreadable", REPAIR]),
    "episodes of none": ("png", rows([], EPISODES), ["meta/episodes has no episode, expected at least 1"]),
    "episodes without a column": (
        "h264",
        lambda root: edit_columns(root / EPISODES, {"length": None, f"videos/{WRIST}/to_timestamp": None}),
        [f"{EPISODES} lacks the columns ['length', 'videos/{WRIST}/to_timestamp']"],
    ),
    "episodes of words": ("png", values("length", lambda old: "four", EPISODES), ["meta/episodes: ", "whole numbers"]),
    "episodes of nulls": ("png", value("length", 1, None, EPISODES), ["meta/episodes has rows without ['length']"]),
    "tasks missing": ("png", removed(TASKS), [f"{TASKS} is missing or unreadable", REPAIR]),
    "tasks cut short": ("png", shorter(TASKS), [f"{TASKS} is missing or unreadable", REPAIR]),
    "tasks of none": ("png", rows([], TASKS), [f"{TASKS} has no instruction, expected one for each task", REPAIR]),
    "tasks without words": (
        "png",
        lambda root: edit_columns(root / TASKS, {"task": None}),
        [f"{TASKS} has no instruction"],
    ),
    "episodes missing, v2.1": ("v2.1", removed("meta/episodes.jsonl"), ["episodes.jsonl is missing or unreadable"]),
    "episodes cut short, v2.1": ("v2.1", shorter("meta/episodes.jsonl", 0.7), ["episodes.jsonl, line 3 is no JSON"]),
    "episodes of none, v2.1": ("v2.1", content("meta/episodes.jsonl", b"\n"), ["episodes.jsonl has no episode"]),
    "episodes of words, v2.1": (
        "v2.1",
        line("meta/episodes.jsonl", 1, length="three"),
        ["episodes.jsonl, line 2 is {", '"three"', "expected episode_index (int) and length (int)", REPAIR],
    ),
    "episodes of numbers, v2.1": (
        "v2.1",
        content("meta/episodes.jsonl", b"1\n"),
        ["episodes.jsonl, line 1 is 1, expected"],
    ),
    "chunks of nothing, v2.1": (
        "v2.1",
        lambda root: edit_info(root, lambda info: info.update(chunks_size=0)),
        ["meta/info.json: chunks_size is 0, expected a whole number above 0", REPAIR],
    ),
    "tasks of no text, v2.1": (
        "v2.1",
        content("meta/tasks.jsonl", b"\xff\xfe"),
        ["tasks.jsonl is missing or unreadable"],
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_metadata_that_cannot_be_understood_are_refused_with_found_expected_and_cure(wrong, bases, tmp_path):
    base, plant, told = REFUSED[wrong]
    root = copy(bases[base], tmp_path / "set")
    plant(root)
    for opened in (lambda: LeRobotDataset(root), lambda: command.main(command.Options("check", str(root)))):
        with pytest.raises(InputError) as refusal:
            opened()
        for text in (str(root), *told):
            assert text in str(refusal.value)
    assert not list(root.glob("**/frames.npy"))


def test_instruction_may_hold_what_python_takes_for_the_end_of_a_line(bases, tmp_path):
    root, text = copy(bases["v2.1"], tmp_path / "set"), "pick\u2028the\x85cup ☕"
    rows = [row | {"task": text} if row["task_index"] else row for row in read_lines(root / "meta/tasks.jsonl")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]  # as the package jsonlines writes them
    (root / "meta/tasks.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    assert LeRobotDataset(root).instructions == ["task 0", text]


def test_camera_of_which_only_a_text_is_said_is_no_depth_map(bases, tmp_path):
    root = copy(bases["png"], tmp_path / "set")
    features(table={"info": "of the ceiling"})(root)
    assert LeRobotDataset(root).cameras == ("table", "wrist")
