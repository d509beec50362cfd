"""Faults of what is said of episodes and tasks: how each is planted, and what is told of it."""

from lerobot_sets import DATA, EPISODES, edit_columns
from planting import (
    OLDER_FILE,
    OLDER_VIDEO,
    TASKS,
    F,
    both,
    info,
    line,
    rows,
    rows_of_lines,
    value,
    values,
)

# Which data set, what is planted, what is told (* stands for anything, and at the end for more that follows from it),
# and the episodes that --data.skip_bad leaves out (None: it does not help).
EPISODE_FAULTS = {
    # Episodes.
    "length of none": (
        "png",
        value("length", 1, 0, EPISODES),
        [
            "meta/episodes: episode 1: length is 0, expected at least 1 frame",
            "meta/info.json: total_frames is 14, expected 11 as in its episodes",
            f"{DATA}: episode 1: has 3 rows, expected 0",
            "*",
        ],
        {1},
    ),
    "length and rows of none": (
        "png",
        both(
            value("length", 1, 0, EPISODES),
            value("dataset_to_index", 1, 4, EPISODES),
            *(values(f"dataset_{end}_index", lambda old: old - 3 * (old > 6), EPISODES) for end in ("from", "to")),
            rows([*range(4), *range(7, F)]),
            values("index", lambda old: old - 3 * (old > 3)),
            info(total_frames=11),
        ),
        ["meta/episodes: episode 1: length is 0, expected at least 1 frame"],
        {1},
    ),
    "length of none, v2.1": (
        "v2.1",
        line("meta/episodes.jsonl", 1, length=0),
        [
            "meta/episodes.jsonl: episode 1: length is 0, expected at least 1 frame",
            "meta/info.json: total_frames is 14, expected 11 as in its episodes",
            f"{OLDER_FILE}: episode 1: has 3 rows, expected 0",
        ],
        {1},
    ),
    "length below none": (
        "png",
        value("length", 1, -3, EPISODES),
        ["meta/episodes: episode 1: length is -3, expected at least 1 frame", "*"],
        {1},
    ),
    "length below none, v2.1": (
        "v2.1",
        line("meta/episodes.jsonl", 1, length=-3),
        ["meta/episodes.jsonl: episode 1: length is -3, expected at least 1 frame", "*"],
        {1},
    ),
    "length too large": (
        "png",
        value("length", 3, 3, EPISODES),
        [
            "meta/episodes: episode 3: length is 3, but its indices go from 12 to 14, expected as many",
            "meta/info.json: total_frames is 14, expected 15 as in its episodes",
            f"{DATA}: episode 3: has 2 rows, expected 3",
        ],
        {3},
    ),
    "length too large, v2.1": (
        "v2.1 h264",
        line("meta/episodes.jsonl", 1, length=4),
        [
            "meta/info.json: total_frames is 14, expected 15 as in its episodes",
            f"{OLDER_FILE}: episode 1: has 3 rows, expected 4",
            f"{OLDER_VIDEO}: episode 1: the video ends at 0.2000 s and has 3 of its 4 frames",
            f"{OLDER_VIDEO.replace('wrist', 'table')}: episode 1: the video ends at 0.2000 s and has 3 of its 4 frames",
        ],
        {1},
    ),
    "episode left out": (
        "png",
        rows([0, 1, 3], EPISODES),
        [
            "meta/episodes: episode 3 comes after episode 1, expected numbers 0, 1, 2, … without gaps",
            "meta/episodes: episode 3 begins at index 12, expected 7, where the one before ends",
            "meta/info.json: total_frames is 14, expected 9 as in its episodes",
            "meta/info.json: total_episodes is 4, expected 3 as in its episodes",
            f"{DATA}: has rows of episode 2, expected none here",
        ],
        {2},
    ),
    "first episode left out": (
        "h264",
        rows([1, 2, 3], EPISODES),
        ["meta/episodes: episode 1 comes first, expected numbers 0, 1, 2, … without gaps", "*"],
        {0},
    ),
    "episode left out, h264": (
        "h264",
        rows([0, 2, 3], EPISODES),
        ["meta/episodes: episode 2 comes after episode 0, expected numbers 0, 1, 2, … without gaps", "*"],
        {1},
    ),
    "episode left out, v2.1": (
        "v2.1",
        rows_of_lines("meta/episodes.jsonl", [0, 2, 3]),
        ["meta/episodes.jsonl: episode 2 comes after episode 0, expected numbers 0, 1, 2, … without gaps", "*"],
        {1},
    ),
    "episode twice": (
        "png",
        rows([0, 1, 1, 2, 3], EPISODES),
        ["meta/episodes: episode 1 comes after episode 1, expected numbers 0, 1, 2, … without gaps", "*"],
        None,
    ),
    "episode of another's number": (
        "png",
        value("episode_index", 2, 1, EPISODES),
        ["meta/episodes: episode 1 comes after episode 1, expected numbers 0, 1, 2, … without gaps", "*"],
        None,
    ),
    "episodes overlap": (
        "png",
        value("dataset_from_index", 2, 6, EPISODES),
        [
            "meta/episodes: episode 2 begins at index 6, expected 7, where the one before ends",
            "meta/episodes: episode 2: length is 5, but its indices go from 6 to 12, expected as many",
            f"{DATA}: episode 2: frame 0: index is 7, expected 6",
        ],
        {2},
    ),
    "episode of another file": (
        "files",
        value("data/file_index", 1, 2, EPISODES),
        ["data/chunk-000/file-002.parquet: episode 1: has 0 rows, expected 3"],
        {1},
    ),
    "episode of a missing file": (
        "files",
        value("data/file_index", 1, 7, EPISODES),
        ["data/chunk-000/file-007.parquet: episode 1: is missing"],
        {1},
    ),
    "totals": (
        "png",
        info(total_frames=15, total_episodes=5),
        [
            "meta/info.json: total_frames is 15, expected 14 as in its episodes",
            "meta/info.json: total_episodes is 5, expected 4 as in its episodes",
        ],
        set(),
    ),
    "episodes of another split": (
        "v2.1",
        info(splits={"train": "0:2", "val": "2:3", "test": "3:4", "none": "9:9", "words": "all"}),
        [
            "meta/info.json: episode 2: of split 'val' (2:3), expected 'train', as training takes no notice of splits",
            "meta/info.json: episode 3: of split 'test' (3:4), expected 'train', as training takes no notice of splits",
        ],
        {2, 3},
    ),
    # Tasks.
    "task_index unknown": (
        "png",
        both(value("task_index", 9, 2), value("task_index", 13, -1)),
        [
            f"{DATA}: episode 2: frame 2: task_index is 2, expected 0 to 1 as in meta/tasks.parquet",
            f"{DATA}: episode 3: frame 1: task_index is -1, expected 0 to 1 as in meta/tasks.parquet",
        ],
        {2, 3},
    ),
    "task_index without a value": (
        "png",
        value("task_index", 9, None),
        [f"{DATA}: episode 2: frame 2: task_index is *, expected 0 to 1 as in meta/tasks.parquet"],
        {2},
    ),
    "instruction empty": (
        "png",
        value("task", 0, "  ", TASKS),
        ["meta/tasks.parquet: episodes 0, 2: the instruction of task_index 0 is empty, expected words"],
        {0, 2},
    ),
    "instruction empty, v2.1": (
        "v2.1",
        line("meta/tasks.jsonl", 0, task=""),
        ["meta/tasks.jsonl: episodes 0, 2: the instruction of task_index 0 is empty, expected words"],
        {0, 2},
    ),
    "instruction without a value": (
        "png",
        value("task", 0, None, TASKS),
        ["meta/tasks.parquet: episodes 0, 2: the instruction of task_index 0 is empty, expected words"],
        {0, 2},
    ),
    "task left out": (
        "png",
        rows([0], TASKS),
        [f"{DATA}: episodes 1, 3: frame 0: task_index is 1, expected 0 to 0 as in meta/tasks.parquet"],
        {1, 3},
    ),
    "task_index twice": (
        "png",
        value("task_index", 1, 0, TASKS),
        ["meta/tasks.parquet: task_index 0 has 2 instructions, expected one", "*"],
        None,
    ),
    "task_index twice, v2.1": (
        "v2.1",
        line("meta/tasks.jsonl", 1, task_index=0),
        ["meta/tasks.jsonl: task_index 0 has 2 instructions, expected one", "*"],
        None,
    ),
    "tasks share an instruction": (
        "png",
        value("task", 1, " Task   0", TASKS),
        ["meta/tasks.parquet: task_index 0, 1 share the instruction 'task 0', expected one instruction for each task"],
        None,
    ),
    "numbered kinds of a task share its instruction": (
        "png",
        lambda root: edit_columns(root / DATA, {"task_id": [3] * 4 + [4] * 3 + [5] * 5 + [4] * 2}),
        [
            "meta/tasks.parquet: task_id 3, 5 share the instruction 'task 0', expected one instruction for each task",
        ],
        None,
    ),
    "named kinds of a task share its instruction": (
        "png",
        lambda root: edit_columns(root / DATA, {"task_id": ["push"] * 7 + ["push back"] * 5 + ["push"] * 2}),
        ["meta/tasks.parquet: task_id push, push back share the instruction 'task 0', expected one *"],
        None,
    ),
}
