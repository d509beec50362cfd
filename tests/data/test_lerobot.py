import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_sets import (
    DATA,
    EPISODES,
    LENGTHS,
    as_v21,
    column,
    copy,
    edit_columns,
    edit_info,
    features,
    images_of,
    made_up,
    noise,
    numbers,
    picture,
    read_lines,
    write,
    write_lines,
)

from vla import InputError
from vla.data.lerobot import LeRobotDataset

F = sum(LENGTHS)
ALL = np.arange(F)
SMALL_FILES = {"chunks_size": 2, "data_files_size_in_mb": 0, "video_files_size_in_mb": 0}  # an episode each
SHOWN = np.stack([ALL, 100 + ALL], axis=1)  # by the two cameras
CODEC_ERROR = {"h264": 3.0, "av1": 3.0}  # mean over all pixels, of 255 levels


@pytest.fixture
def root(png, tmp_path):
    return copy(png, tmp_path / "set")


def numbers_equal(data, episodes):
    np.testing.assert_array_equal(data.state, np.concatenate([episode["state"] for episode in episodes]))
    np.testing.assert_array_equal(data.actions, np.concatenate([episode["actions"] for episode in episodes]))
    assert data.task_index.tolist() == [e % 2 for e, episode in enumerate(episodes) for _ in episode["state"]]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("files", ["few", "many"])
def test_numbers_and_png_images_come_back_to_the_bit(tmp_path, version, files):
    episodes = made_up(draw=noise)
    root = write(tmp_path / "set", episodes, **(SMALL_FILES if files == "many" else {}))
    if version == "v2.1":
        root = as_v21(root, tmp_path / "older", chunks_size=2 if files == "many" else 1000)
    assert len(list(root.glob("data/*"))) == (2 if files == "many" else 1)
    data = LeRobotDataset(root)
    numbers_equal(data, episodes)
    np.testing.assert_array_equal(data.images(ALL), images_of(episodes))
    assert (data.name, data.fps, data.cameras, data.image_size) == (root.name, 10, ("table", "wrist"), (16, 32))
    assert (data.state_names, data.action_names, data.state_dim, data.action_dim) == (tuple("xyz"), ("dx", "dy"), 3, 2)
    assert (data.num_frames, data.num_episodes, data.instructions) == (F, 4, ["task 0", "task 1"])
    assert (data.episode_from.tolist(), data.episode_to.tolist()) == ([0, 4, 7, 12], [4, 7, 12, 14])
    assert data.episode_numbers.tolist() == data.episodes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("codec", ["h264", "av1"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("files", ["few", "many"])
def test_video_comes_back_within_the_codec_s_error(tmp_path, codec, version, files):
    episodes = made_up()
    root = write(tmp_path / "set", episodes, codec=codec, **(SMALL_FILES if files == "many" else {}))
    if version == "v2.1":
        root = as_v21(root, tmp_path / "older", chunks_size=2 if files == "many" else 1000)
    expected_files = 8 if files == "many" or version == "v2.1" else 2
    assert len(list(root.glob("videos/**/*.mp4"))) == expected_files
    data = LeRobotDataset(root)
    numbers_equal(data, episodes)
    assert np.abs(data.images(ALL) - images_of(episodes).astype(float)).mean() < CODEC_ERROR[codec]


@pytest.mark.parametrize("codec", ["h264", "av1"])
@pytest.mark.parametrize("fps", [10, 30, 80, 15])
def test_every_frame_of_a_video_is_the_one_that_carries_its_number_however_it_is_cached(tmp_path, fps, codec):
    lengths = (1, 17, 2, 33, 30)
    frames = np.arange(sum(lengths))
    root = write(tmp_path / "set", made_up(lengths), fps=fps, codec=codec)
    expected = np.stack([frames, 100 + frames], axis=1)
    images = {cache: LeRobotDataset(root, cache=cache).images(frames) for cache in ("disk", "memory", "none")}
    np.testing.assert_array_equal(numbers(images["none"]), expected)
    np.testing.assert_array_equal(images["disk"], images["none"])
    np.testing.assert_array_equal(images["memory"], images["none"])
    some = np.random.default_rng(0).permutation(frames)[:20]
    np.testing.assert_array_equal(LeRobotDataset(root, cache="none").images(some), images["none"][some])


@pytest.mark.parametrize("codec", ["h264", "av1"])
@pytest.mark.parametrize("size", [(64, 64), (224, 224), (240, 320)])
def test_video_shows_what_comes_and_goes_from_one_frame_to_the_next(tmp_path, size, codec):
    shown = np.random.default_rng(0).integers(0, 256, 60)
    episodes = made_up((60,), cameras=("table",), size=size, draw=lambda number, size: picture(shown[number], size))
    data = LeRobotDataset(write(tmp_path / "set", episodes, codec=codec))
    np.testing.assert_array_equal(numbers(data.images(np.arange(60)))[:, 0], shown)


def test_windows_at_both_ends_of_an_episode_equal_a_table_made_by_hand(png):
    data = LeRobotDataset(png)  # episodes are frames 0-3, 4-6, 7-11, 12-13
    rows = {
        0: ([0, 1, 2], [False, False, False]),
        2: ([2, 3, 3], [False, False, True]),
        3: ([3, 3, 3], [False, True, True]),
        4: ([4, 5, 6], [False, False, False]),
        6: ([6, 6, 6], [False, True, True]),
        7: ([7, 8, 9], [False, False, False]),
        12: ([12, 13, 13], [False, False, True]),
        13: ([13, 13, 13], [False, True, True]),
    }
    actions, action_is_pad = data.windows(np.array(list(rows)), chunk_size=3)
    assert (actions.dtype, actions.shape) == (np.float32, (8, 3, 2))
    for window, pad, (frames, expected_pad) in zip(actions, action_is_pad, rows.values(), strict=True):
        np.testing.assert_array_equal(window, data.actions[frames])
        assert pad.tolist() == expected_pad


@pytest.mark.parametrize(
    ("options", "names", "order"),
    [
        ({"cameras": ("wrist", "table")}, ("wrist", "table"), [1, 0]),
        ({"cameras": ("wrist",)}, ("wrist",), [1]),
        ({"cameras": ("observation.images.wrist",)}, ("observation.images.wrist",), [1]),
        ({"rename": {"wrist": "hand"}}, ("table", "hand"), [0, 1]),
        ({"rename": {"wrist": "table", "table": "wrist"}, "cameras": ("table",)}, ("table",), [1]),
        ({"cameras": ("front", "wrist"), "some_cameras": True}, ("wrist",), [1]),
    ],
)
def test_cameras_are_chosen_ordered_and_renamed(png, options, names, order):
    data = LeRobotDataset(png, **options)
    assert data.cameras == names
    np.testing.assert_array_equal(numbers(data.images(ALL)), SHOWN[:, order])


def retyped(name, kind):
    def change(root):
        table = pq.ParquetFile(root / DATA).read()
        values = pa.array(table.column(name).to_pylist(), kind)
        pq.write_table(table.set_column(table.column_names.index(name), name, values), root / DATA)

    return change


def tasks_unnamed_and_in_another_order(root):
    tasks = pa.table({"task_index": [1, 0], "__index_level_0__": ["task 1", "task 0"]})
    pq.write_table(tasks, root / "meta/tasks.parquet")


def more_keys_and_columns(root):
    def change(info):
        info["unknown"] = {"key": 1}
        info["features"]["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
        info["features"]["note"] = {"dtype": "string", "shape": [1], "names": None}

    edit_info(root, change)
    edit_columns(root / DATA, {"next.done": [False] * F, "note": ["a word"] * F, "unknown": [[1.5]] * F})
    edit_columns(root / EPISODES, {"unknown": ["another"] * 4})


def row_groups_of_five(root):
    pq.write_table(pq.ParquetFile(root / DATA).read(), root / DATA, row_group_size=5)


def episodes_in_two_files(root):
    table = pq.ParquetFile(root / EPISODES).read()  # the later episodes first, one column of another type
    pq.write_table(table.slice(2), root / EPISODES)
    index = table.column_names.index("length")
    table = table.set_column(index, "length", table.column("length").cast(pa.int32()))
    (root / "meta/episodes/chunk-001").mkdir()
    pq.write_table(table.slice(0, 2), root / "meta/episodes/chunk-001/file-000.parquet")


def numbers_in_lists_of_one(root):
    names = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    edit_columns(root / DATA, {name: [[value] for value in column(root / DATA, name)] for name in names})


def without_video_path(root):
    edit_info(root, lambda info: info.pop("video_path"))


CHANNELS_LAST = {"shape": [16, 32, 3]}
ODD_SETS = {
    "(H, W, C) named": features(table={**CHANNELS_LAST, "names": ["height", "width", "channel"]}),
    "(H, W, C) named otherwise": features(table={**CHANNELS_LAST, "names": ["height", "width", "rgb"]}),
    "(H, W, C) unnamed": features(table={**CHANNELS_LAST, "names": None}, wrist={**CHANNELS_LAST, "names": None}),
    "(C, H, W) unnamed": features(table={"names": None}, wrist={"names": None}),
    "(C, H, W) named channel": features(table={"names": ["channel", "height", "width"]}),
    "names in a dictionary": features(
        state={"names": {"motors": list("xyz")}}, action={"names": {"axes": ["dx", "dy"]}}
    ),
    "names in a list of a list": features(state={"names": [list("xyz")]}, action={"names": {"axes": [["dx", "dy"]]}}),
    "tasks unnamed": tasks_unnamed_and_in_another_order,
    "unknown keys": more_keys_and_columns,
    "row groups of five": row_groups_of_five,
    "episodes in two files": episodes_in_two_files,
    "no video_path": without_video_path,
    "float64 lists of any length": retyped("observation.state", pa.list_(pa.float64())),
    "large lists": retyped("action", pa.large_list(pa.float32())),
    "int32 indices": retyped("episode_index", pa.int32()),
    "float64 timestamps": retyped("timestamp", pa.float64()),
    "numbers in lists of one": numbers_in_lists_of_one,
    "no frame_index": lambda root: edit_columns(root / DATA, {"frame_index": None}),
    "no index": lambda root: edit_columns(root / DATA, {"index": None}),
    "a file of macOS's": lambda root: (root / EPISODES).with_name("._file-000.parquet").write_bytes(b"\0\5\x16\7"),
    "fps as a float": lambda root: edit_info(root, lambda info: info.update(fps=10.0)),
}


@pytest.mark.parametrize("odd", ODD_SETS)
def test_sets_of_other_writers_are_read_alike(root, odd):
    ODD_SETS[odd](root)
    data = LeRobotDataset(root)
    numbers_equal(data, made_up())
    np.testing.assert_array_equal(data.images(ALL), images_of(made_up()))
    assert (data.image_size, data.instructions) == ((16, 32), ["task 0", "task 1"])
    assert (data.state_names, data.action_names) == (("x", "y", "z"), ("dx", "dy"))


def test_lines_of_v21_metadata_may_come_in_any_order(png, tmp_path):
    root = as_v21(png, tmp_path / "older")
    for name in ("episodes", "tasks"):
        write_lines(root / f"meta/{name}.jsonl", read_lines(root / f"meta/{name}.jsonl")[::-1])
    data = LeRobotDataset(root)
    numbers_equal(data, made_up())
    np.testing.assert_array_equal(numbers(data.images(ALL)), SHOWN)
    assert (data.episode_numbers.tolist(), data.instructions) == ([0, 1, 2, 3], ["task 0", "task 1"])


def test_index_of_v21_may_count_anew_in_each_episode(png, tmp_path):
    root = as_v21(png, tmp_path / "older")
    for path in root.glob("data/*/*.parquet"):
        edit_columns(path, {"index": column(path, "frame_index")})
    numbers_equal(LeRobotDataset(root), made_up())


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.float16])
def test_numbers_of_any_type_become_float32(root, dtype):
    whole = np.arange(2 * F).reshape(F, 2) * 1234567 if dtype == np.int64 else np.arange(2 * F).reshape(F, 2) % 3
    whole = whole.astype(dtype)
    features(state={"shape": [1], "names": None})(root)
    edit_columns(root / DATA, {"action": list(whole), "observation.state": whole[:, 1]})
    data = LeRobotDataset(root)
    np.testing.assert_array_equal(data.actions, whole.astype(np.float32))
    np.testing.assert_array_equal(data.state, whole[:, 1:].astype(np.float32))


@pytest.mark.parametrize("names", [None, [], ["x", "y"], {"x": 0, "y": 1, "z": 2}])
def test_numbers_without_a_name_for_each_are_named_by_their_feature(root, names):
    features(state={"names": names})(root)
    expected = tuple(f"observation.state_{i}" for i in range(3))
    assert LeRobotDataset(root).state_names == expected


@pytest.mark.parametrize("stored", ["numbers", "lists of one"])
def test_single_number_state_and_action_are_read(tmp_path, stored):
    episodes = made_up(cameras=("top",), state_dim=1, action_dim=1)
    root = write(tmp_path / "set", episodes)
    if stored == "lists of one":
        edit_columns(root / DATA, {"action": [[value] for value in column(root / DATA, "action")]})
    data = LeRobotDataset(root)
    assert (data.state.shape, data.actions.shape, data.state_names) == ((F, 1), (F, 1), ("x",))
    numbers_equal(data, episodes)


def renamed(root, names):
    """Give features of a set whose images lie in parquet other names."""

    def change(info):
        info["features"] = {names.get(key, key): value for key, value in info["features"].items()}

    edit_info(root, change)
    table = pq.ParquetFile(root / DATA).read()
    pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), root / DATA)


def test_features_are_found_by_other_conventions_too(root):
    names = {"observation.state": "state", "action": "actions"}
    renamed(root, names | {"observation.images.table": "image", "observation.images.wrist": "observation.image.wrist"})
    data = LeRobotDataset(root)
    numbers_equal(data, made_up())
    assert data.cameras == ("image", "wrist")
    np.testing.assert_array_equal(numbers(data.images(ALL)), SHOWN)


def test_features_of_any_name_are_joined_as_they_are_named(root):
    gripper, (state, actions) = (
        np.arange(F, dtype=np.float32) / 8,
        (np.concatenate([episode[name] for episode in made_up()]) for name in ("state", "actions")),
    )
    renamed(root, {"observation.state": "arm", "action": "command"})
    edit_info(root, lambda info: info["features"].update(gripper={"dtype": "float32", "shape": [1], "names": None}))
    edit_columns(root / DATA, {"gripper": gripper})
    with pytest.raises(InputError, match=r"'observation.state' is not among \['arm', .*expected numbers .*data.state"):
        LeRobotDataset(root)
    data = LeRobotDataset(root, state=("gripper", "arm"), action=("command", "gripper"))
    assert (data.state_names, data.action_names) == (("gripper_0", "x", "y", "z"), ("dx", "dy", "gripper_0"))
    np.testing.assert_array_equal(data.state, np.column_stack([gripper, state]))
    np.testing.assert_array_equal(data.actions, np.column_stack([actions, gripper]))
    one = LeRobotDataset(root, state=("arm",), action=("arm",))
    np.testing.assert_array_equal(one.state, one.actions)


@pytest.mark.parametrize("info", ["info", "video_info"])
@pytest.mark.parametrize("key", ["video.is_depth_map", "is_depth_map"])
def test_depth_maps_are_left_out(h264, tmp_path, info, key):
    root = copy(h264, tmp_path / "set")
    features(wrist={"info": None, info: {key: True}})(root)
    next((root / "videos").glob("*wrist*/*/*.mp4")).unlink()
    data = LeRobotDataset(root)
    assert data.cameras == ("table",)
    np.testing.assert_array_equal(numbers(data.images(ALL)), SHOWN[:, :1])


def test_cameras_of_different_size_are_refused_unless_one_is_chosen_or_all_are_brought_to_one(tmp_path):
    root = write(tmp_path / "set", made_up(size={"table": (16, 32), "wrist": (24, 24)}))
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    for text in ("'table': (16, 32)", "'wrist': (24, 24)", "expected one size", "--data.image_size", "--data.cameras"):
        assert text in str(refusal.value)
    assert LeRobotDataset(root, cameras=("wrist",)).image_size == (24, 24)
    data = LeRobotDataset(root, image_size=(16, 32))
    images = data.images(ALL)
    np.testing.assert_array_equal(images[:, 0], images_of(made_up(cameras=("table",)))[:, 0])  # of that size already
    assert numbers(images[:, 1, :, :, 8:24]).tolist() == SHOWN[:, 1].tolist()  # 16 x 16, in the middle


@pytest.mark.parametrize(
    ("size", "inside"),
    [
        ((16, 32), (slice(0, 16), slice(8, 24))),  # pillars left and right
        ((48, 24), (slice(12, 36), slice(0, 24))),  # bars above and below
        ((12, 12), (slice(0, 12), slice(0, 12))),  # smaller
        ((7, 9), (slice(0, 7), slice(1, 8))),
    ],
)
@pytest.mark.parametrize("cache", ["disk", "none"])
def test_resized_pictures_keep_their_aspect_and_are_black_around(tmp_path, size, inside, cache):
    def plain(number, size):
        return np.full((3, *size), np.reshape([250, 120, 10 + number], (3, 1, 1)), np.uint8)

    root = write(tmp_path / "set", made_up(cameras=("table",), size=(24, 24), draw=plain))
    images = LeRobotDataset(root, image_size=size, cache=cache).images(ALL)[:, 0]
    expected = np.zeros((F, 3, *size), np.uint8)
    rows, columns = inside
    for number, image in enumerate(expected):
        image[:, rows, columns] = plain(number, (1, 1))
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize(
    ("cameras", "told"),
    [
        (("table", "front"), ["['table', 'wrist']", "expected ['table', 'front']", "--data.cameras"]),
        (("front",), ["['table', 'wrist']", "expected ['front']"]),
    ],
)
def test_unknown_camera_is_refused_with_those_there_are(root, cameras, told):
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, cameras=cameras)
    for text in (str(root), *told):
        assert text in str(refusal.value)


def test_two_cameras_of_one_name_are_refused(root):
    renamed(root, {"observation.images.wrist": "table"})
    cure = "rename one, such as --data.camera_map observation.images.table=other"
    with pytest.raises(InputError, match=rf"have names in common, \['table'\]: {cure}"):
        LeRobotDataset(root)
    data = LeRobotDataset(root, rename={"observation.images.table": "other"})
    assert data.cameras == ("other", "table")
    np.testing.assert_array_equal(numbers(data.images(ALL)), SHOWN)


@pytest.mark.parametrize("cache", ["disk", "none"])
@pytest.mark.parametrize(
    ("rename", "shown"),
    [
        ({"image": "wrist_image", "wrist_image": "image"}, {"wrist_image": 0, "image": 1}),
        ({"image": "front", "wrist_image": "image"}, {"front": 0, "image": 1}),
    ],
)
def test_new_name_of_a_camera_goes_before_another_s_feature(root, rename, shown, cache):
    renamed(root, {"observation.images.table": "image", "observation.images.wrist": "wrist_image"})
    for names in (tuple(shown), ("image",)):
        data = LeRobotDataset(root, rename=rename, cache=cache, **({"cameras": names} if len(names) == 1 else {}))
        assert data.cameras == names
        np.testing.assert_array_equal(numbers(data.images(ALL)), SHOWN[:, [shown[name] for name in names]])


@pytest.mark.parametrize("cameras", [("wrist", "table", "wrist"), ("table", "observation.images.table")])
def test_camera_that_is_named_twice_is_refused(root, cameras):
    with pytest.raises(InputError, match=f"--data.cameras {' '.join(cameras)} names a camera twice: drop one"):
        LeRobotDataset(root, cameras=cameras)
