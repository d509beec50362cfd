"""Faults of frames, in files of numbers, pictures and videos: how each is planted, and what is told of it."""

import numpy as np
from lerobot_sets import DATA, EPISODES, column, edit_columns
from planting import (
    ALL,
    OLDER_FILE,
    OLDER_VIDEO,
    TABLE,
    VIDEO,
    WRIST,
    F,
    begins,
    both,
    content,
    cut_short,
    damaged_packet,
    damaged_page,
    feature,
    filmed_anew,
    info,
    png,
    removed,
    rows,
    shorter,
    start,
    value,
    values,
)

OWN_FILE = "data/chunk-000/file-001.parquet"  # of episode 1, where each has one
noise = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
LFS = b"version https://git-lfs.github.com/spec/v1\n"
UNREADABLE = "is unreadable (*)"
NO_VIDEO = "is missing or no whole video (*): copy or write the data set again"


def no_video_of_the_last(root):
    names = (f"videos/{WRIST}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"))
    edit_columns(root / EPISODES, {name: [*column(root / EPISODES, name)[:3], None] for name in names})


# Which data set, what is planted, what is told (* stands for anything, and at the end for more that follows from it),
# and the episodes that --data.skip_bad leaves out (None: it does not help).
FRAME_FAULTS = {
    # The parquet files.
    "parquet cut short": ("files", shorter(OWN_FILE), [f"{OWN_FILE}: episode 1: {UNREADABLE}"], {1}),
    "parquet missing": ("files", removed(OWN_FILE), [f"{OWN_FILE}: episode 1: is missing"], {1}),
    "parquet empty": ("files", content(OWN_FILE, b""), [f"{OWN_FILE}: episode 1: {UNREADABLE}"], {1}),
    "parquet left in git LFS": ("files", content(OWN_FILE, LFS), [f"{OWN_FILE}: episode 1: {UNREADABLE}"], {1}),
    "parquet of all missing": ("png", removed(DATA), [f"{DATA}: episodes 0 to 3: is missing"], ALL),
    "parquet missing, v2.1": ("v2.1", removed(OLDER_FILE), [f"{OLDER_FILE}: episode 1: is missing"], {1}),
    "numbers damaged": ("files", damaged_page("action", OWN_FILE, 0), [f"{OWN_FILE}: episode 1: {UNREADABLE}"], {1}),
    "columns missing": (
        "files",
        lambda root: edit_columns(root / OWN_FILE, {"task_index": None, WRIST: None}),
        [f"{OWN_FILE}: episode 1: lacks the columns ['{WRIST}', 'task_index'], expected them as in meta/info.json"],
        {1},
    ),
    "words for numbers": (
        "files",
        values("action", lambda old: ["left", "right"], OWN_FILE),
        [f"{OWN_FILE}: episode 1: {UNREADABLE}"],
        {1},
    ),
    "words for times": (
        "files",
        values("timestamp", lambda old: "soon", OWN_FILE),
        [f"{OWN_FILE}: episode 1: {UNREADABLE}"],
        {1},
    ),
    "lists of lists": (
        "files",
        values("action", lambda old: [old, old], OWN_FILE),
        [f"{OWN_FILE}: episode 1: {UNREADABLE}"],
        {1},
    ),
    "a record for numbers": (
        "files",
        values("action", lambda old: {"x": 1.0}, OWN_FILE),
        [f"{OWN_FILE}: episode 1: {UNREADABLE}"],
        {1},
    ),
    "index of fractions": (
        "files",
        values("index", lambda old: old + 0.5, OWN_FILE),
        [f"{OWN_FILE}: episode 1: {UNREADABLE}"],
        {1},
    ),
    # States and actions.
    "state of other dimensions": (
        "png",
        feature("observation.state", shape=[4]),
        [f"{DATA}: episodes 0 to 3: frame 0: observation.state is 3 numbers, expected 4 as in meta/info.json"],
        ALL,
    ),
    "state of one number": (
        "png",
        values("observation.state", lambda old: old[0]),
        [f"{DATA}: episodes 0 to 3: frame 0: observation.state is 1 numbers, expected 3 as in meta/info.json"],
        ALL,
    ),
    "action of other dimensions in two rows": (
        "png",
        both(value("action", 5, [1.0]), value("action", 6, [1.0, 2.0, 3.0])),
        [f"{DATA}: episode 1: frame 1: action is 1 numbers, expected 2 as in meta/info.json"],
        {1},
    ),
    "NaN": (
        "png",
        value("observation.state", 9, [0.0, float("nan"), 0.0]),
        [f"{DATA}: episode 2: frame 2: observation.state is nan in y, expected a finite number"],
        {2},
    ),
    "NaN, v2.1": (
        "v2.1",
        value("observation.state", 1, [0.0, float("nan"), 0.0], OLDER_FILE),
        [f"{OLDER_FILE}: episode 1: frame 1: observation.state is nan in y, expected a finite number"],
        {1},
    ),
    "Inf": (
        "png",
        value("action", 13, [float("-inf"), 0.0]),
        [f"{DATA}: episode 3: frame 1: action is -inf in dx, expected a finite number"],
        {3},
    ),
    "too large for float32": (
        "png",
        values("action", lambda old: [old[0], 1e300 * abs(old[1])]),
        [f"{DATA}: episodes 0 to 3: frame 0: action is inf in dy, expected a finite number"],
        ALL,
    ),
    "null": ("png", value("action", 5, None), [f"{DATA}: episode 1: frame 1: action is 0 numbers, expected 2 *"], {1}),
    "null in a list": (
        "png",
        value("action", 5, [None, 1.0]),
        [f"{DATA}: episode 1: frame 1: action is nan in dx, *"],
        {1},
    ),
    "action constant": (
        "png",
        values("action", lambda old: [old[0], 0.5]),
        ["data: action dy is 0.5 in all frames, expected values that vary"],
        None,
    ),
    "action constant but for NaN": (
        "png",
        both(values("action", lambda old: [old[0], 0.5]), value("action", 5, [0.0, float("nan")])),
        [
            f"{DATA}: episode 1: frame 1: action is nan in dy, expected a finite number",
            "data: action dy is 0.5 in all frames, expected values that vary",
        ],
        None,
    ),
    # Times and indices.
    "time of one frame": (
        "png",
        value("timestamp", 6, 0.202),
        [f"{DATA}: episode 1: frame 2: timestamp is 0.202 s, expected 0.2 within 0.0001"],
        {1},
    ),
    "times without a value": (
        "png",
        both(value("timestamp", 6, None), value("timestamp", 9, float("nan"))),
        [f"{DATA}: episodes 1 to 2: frame 2: timestamp is nan s, expected 0.2 within 0.0001"],
        {1, 2},
    ),
    "times of the day": (
        "files",
        values("timestamp", lambda old: 1.7e9 + old, OWN_FILE),
        [f"{OWN_FILE}: episode 1: frame 0: timestamp is 1.7e+09 s, expected 0 within 0.0001"],
        {1},
    ),
    "times of another fps": (
        "png",
        info(fps=20),
        [f"{DATA}: episodes 0 to 3: frame 1: timestamp is 0.1 s, expected 0.05 within 0.0001"],
        ALL,
    ),
    "frame_index repeats": (
        "png",
        value("frame_index", 9, 1),
        [f"{DATA}: episode 2: frame 2: frame_index is 1, expected 2"],
        {2},
    ),
    "index leaves one out": (
        "png",
        value("index", 13, 14),
        [f"{DATA}: episode 3: frame 1: index is 14, expected 13"],
        {3},
    ),
    "index leaves one out, v2.1": (
        "v2.1",
        value("index", 2, 7, OLDER_FILE),
        [f"{OLDER_FILE}: episode 1: frame 2: index is 7, expected 6"],
        {1},
    ),
    "index without a value": ("png", value("index", 13, None), [f"{DATA}: episode 3: frame 1: index is *"], {3}),
    "row of another episode": (
        "png",
        value("episode_index", 4, 0),
        [f"{DATA}: episode 0: has 5 rows, expected 4", f"{DATA}: episode 1: has 2 rows, expected 3", "*"],
        {0, 1},
    ),
    "row of an unknown episode": (
        "png",
        value("episode_index", 4, 9),
        [f"{DATA}: has rows of episode 9, expected none here", f"{DATA}: episode 1: has 2 rows, expected 3", "*"],
        {1},
    ),
    "row of no episode": (
        "png",
        value("episode_index", 4, None),
        [f"{DATA}: episode 1: has 2 rows, expected 3", "*"],
        {1},
    ),
    "last row missing": ("png", rows(range(F - 1)), [f"{DATA}: episode 3: has 1 rows, expected 2"], {3}),
    "middle row missing": (
        "png",
        rows([row for row in range(F) if row != 8]),
        [
            f"{DATA}: episode 2: frame 1: frame_index is 2, expected 1",
            f"{DATA}: episode 2: has 4 rows, expected 5",
            "*",
        ],
        {2},
    ),
    "row missing, v2.1": (
        "v2.1",
        rows([0, 2], OLDER_FILE),
        [f"{OLDER_FILE}: episode 1: has 2 rows, expected 3", "*"],
        {1},
    ),
    "row twice": (
        "png",
        rows([0, 1, 2, 3, 4, 5, 5, *range(6, F)]),
        [
            f"{DATA}: episode 1: frame 2: frame_index is 1, expected 2",
            f"{DATA}: episode 1: has 4 rows, expected 3",
            "*",
        ],
        {1},
    ),
    "row twice, the second time behind all others": (
        "png",
        rows([*range(F), 5]),
        [f"{DATA}: episode 1: has 4 rows, expected 3", "*"],
        {1},
    ),
    "all rows of an episode missing": (
        "png",
        rows([*range(4), *range(7, F)]),
        [f"{DATA}: episode 1: has 0 rows, expected 3"],
        {1},
    ),
    "all rows of the last episode missing": (
        "png",
        rows(range(12)),
        [f"{DATA}: episode 3: has 0 rows, expected 2"],
        {3},
    ),
    "rows of two episodes mixed": (
        "png",
        rows([0, 1, 4, 2, 5, 3, 6, *range(7, F)]),
        [f"{DATA}: episodes 0 to 1: its rows lie apart, expected one after the other"],
        {0, 1},
    ),
    "rows in another order": (
        "png",
        rows([0, 1, 2, 3, 6, 5, 4, *range(7, F)]),
        [f"{DATA}: episode 1: frame 0: frame_index is 2, expected 0", "*"],
        {1},
    ),
    # Images.
    "PNG cut short": (
        "png",
        value(WRIST, 5, {"bytes": png(noise)["bytes"][:500], "path": None}),
        [f"{DATA}: episode 1: row 5: no readable image of {WRIST} (*)"],
        {1},
    ),
    "no PNG": (
        "png",
        value(WRIST, 5, {"bytes": b"no image", "path": None}),
        [f"{DATA}: episode 1: row 5: no readable image of {WRIST} (*)"],
        {1},
    ),
    "image missing": (
        "png",
        value(WRIST, 5, None),
        [f"{DATA}: episode 1: row 5: no readable image of {WRIST} (*)"],
        {1},
    ),
    "images damaged": ("png", damaged_page(WRIST), [f"{DATA}: episode 1: row group 1 is unreadable (*)"], {1}),
    "image of another size": (
        "png",
        value(TABLE, 9, png(np.zeros((32, 16, 3), np.uint8))),
        [f"{DATA}: episode 2: row 9: the image of {TABLE} is 32 x 16, expected 16 x 32 as in meta/info.json"],
        {2},
    ),
    "images of another size": (
        "png",
        both(feature(TABLE, shape=[3, 32, 16]), feature(WRIST, shape=[3, 32, 16])),
        [f"{DATA}: episode 2: row 7: the image of {TABLE} is 16 x 32, expected 32 x 16 as in meta/info.json", "*"],
        ALL,
    ),
    "paths for images": (
        "files",
        values(WRIST, lambda old: "images/1.png", OWN_FILE),
        [f"{OWN_FILE}: episode 1: has {WRIST} as string, expected each image's bytes in a struct"],
        {1},
    ),
    # Videos.
    "video missing": ("v2.1 h264", removed(OLDER_VIDEO), [f"{OLDER_VIDEO}: episode 1: {NO_VIDEO}"], {1}),
    "video of all missing": ("h264", removed(VIDEO), [f"{VIDEO}: episodes 0 to 3: {NO_VIDEO}"], ALL),
    "video of one not named": (
        "h264",
        no_video_of_the_last,
        [f"meta/episodes: episode 3: no video of {WRIST} is named, expected one for each episode"],
        {3},
    ),
    "video cut short": ("v2.1 h264", shorter(OLDER_VIDEO), [f"{OLDER_VIDEO}: episode 1: *"], {1}),
    "video empty": ("v2.1 h264", content(OLDER_VIDEO, b""), [f"{OLDER_VIDEO}: episode 1: {NO_VIDEO}"], {1}),
    "video left in git LFS": ("v2.1 h264", content(OLDER_VIDEO, LFS), [f"{OLDER_VIDEO}: episode 1: {NO_VIDEO}"], {1}),
    "packet damaged": ("h264", damaged_packet(5), [f"{VIDEO}: episode 1: frame 5, shown at 0.500 s, *"], {1}),
    "key packet damaged": ("h264", damaged_packet(9), [f"{VIDEO}: episode 2: frame 9, shown at 0.900 s, *"], {2}),
    "video of fewer frames": (
        "h264",
        cut_short(VIDEO, 1.2),
        [f"{VIDEO}: episode 3: the video ends at 1.1000 s and has 0 of its 2 frames"],
        {3},
    ),
    "video of fewer frames, v2.1": (
        "v2.1 h264",
        cut_short(OLDER_VIDEO, 0.2),
        [f"{OLDER_VIDEO}: episode 1: the video ends at 0.1000 s and has 2 of its 3 frames"],
        {1},
    ),
    "video of another fps": (
        "v2.1 h264",
        filmed_anew(OLDER_VIDEO, range(9), fps=25),
        [f"{OLDER_VIDEO}: episode 1: frame 1 *"],
        {1},
    ),
    "video of another size": (
        "v2.1 h264",
        filmed_anew(OLDER_VIDEO, range(3), size=(32, 32)),
        [f"{OLDER_VIDEO}: episode 1: pictures are 32 x 32, expected 16 x 32 as in meta/info.json"],
        {1},
    ),
    # Where the episodes lie in their video.
    "start a frame late": ("h264", start(1, 0.5), [f"{begins(1)} 0.5000 s, expected 0.4000, *"], {1}),
    "start a frame early": ("h264", start(2, 0.6), [f"{begins(2)} 0.6000 s, expected 0.7000, *"], {2}),
    "start of the first a frame late": ("h264", start(0, 0.1), [f"{begins(0)} 0.1000 s, expected 0.0000, *"], {0}),
    "start of the last a frame late": ("h264", start(3, 1.3), [f"{begins(3)} 1.3000 s, expected 1.2000, *"], {3}),
    "start seconds late": ("h264", start(2, 5.7), [f"{begins(2)} 5.7000 s, expected 0.7000, *"], {2}),
    "start without a number": ("h264", start(2, float("nan")), [f"{begins(2)} nan s, expected 0.7000, *"], {2}),
    "start 2 ms late": (
        "h264",
        start(2, 0.702),
        [f"{VIDEO}: episode 2: frame 0 should be shown at 0.7020 s, the nearest one is at 0.7000 s"],
        {2},
    ),
    "start and end a frame late": (
        "h264",
        both(start(1, 0.5), value(f"videos/{WRIST}/to_timestamp", 1, 0.8, EPISODES)),
        [f"{begins(1)} 0.5000 s, expected 0.4000, where the one before ends"],
        {1},
    ),
    "end a frame early": (
        "h264",
        value(f"videos/{WRIST}/to_timestamp", 1, 0.6, EPISODES),
        [f"meta/episodes: episode 1: {WRIST} lasts from 0.4000 to 0.6000 s, expected 0.3000 s for its 3 frames"],
        {1},
    ),
    "all starts and ends a frame late": (
        "h264",
        both(*(values(f"videos/{WRIST}/{end}_timestamp", lambda old: old + 0.1, EPISODES) for end in ("from", "to"))),
        [f"{begins(0)} 0.1000 s, expected 0.0000, the beginning of its file", f"{begins(3)} 1.3000 s, *", "*"],
        ALL,
    ),
}
