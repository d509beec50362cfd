import io
import multiprocessing
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla import InputError
from vla.data import frames
from vla.data.lerobot import LeRobotDataset
from vla.data.write import LeRobotWriter

FIRST_FILE = "data/chunk-000/file-000.parquet"
CAMERAS = ("table", "gripper")

# Opens the data set in argv[1] and prints how many row groups it decoded and the sum of all pixels. Decoding waits
# until argv[2] processes have asked for the lock. If argv[3] is "dies", the process kills itself half-way.
OPEN_IN_ANOTHER_PROCESS = """
import fcntl, os, pathlib, signal, sys, time
from vla.data import frames, lerobot

root, openers, dies = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "dies"
decode, flock, groups, deadline = frames._decode, fcntl.flock, set(), time.monotonic() + 30

def announced(*args):
    (root.parent / f"opener-{os.getpid()}").touch()
    flock(*args)

def watched(pngs, pixels, where, rows):
    groups.add(where)
    while len(list(root.parent.glob("opener-*"))) < openers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if dies and len(groups) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    decode(pngs, pixels, where, rows)

frames._decode, fcntl.flock = watched, announced
dataset = lerobot.LeRobotDataset(root)
print(len(groups), int(dataset.images(range(dataset.num_frames)).sum()))
"""


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    names = {"state_names": ["x", "y"], "action_names": ["dx", "dy"], "robot_type": "tabletop"}
    sizes = dict.fromkeys(CAMERAS, (6, 8))
    with LeRobotWriter(tmp_path / "set", fps=10, cameras=sizes, **names, data_files_size_in_mb=0.008) as writer:
        for length in (5, 1, 9, 4):
            writer.add_episode(
                images={name: rng.integers(0, 256, (length, 3, 6, 8), dtype=np.uint8) for name in CAMERAS},
                state=np.zeros((length, 2), np.float32),
                actions=np.zeros((length, 2), np.float32),
                instruction="put the cube on the plate",
            )
    return tmp_path / "set"


def pixels_of_pngs(root):
    cameras = []
    for name in CAMERAS:
        rows = [
            row["bytes"]
            for path in sorted(root.glob("data/*/*.parquet"))
            for row in pq.ParquetFile(path).read().column(f"observation.images.{name}").to_pylist()
        ]
        cameras.append([np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1) for png in rows])
    return np.stack(cameras, axis=1)  # [F, N, 3, h, w]


def replace_image(root, row, png):
    table = pq.ParquetFile(root / FIRST_FILE).read()
    images = table.column("observation.images.gripper").to_pylist()
    images[row]["bytes"] = png
    index = table.column_names.index("observation.images.gripper")
    column = pa.array(images, table.column(index).type)
    pq.write_table(table.set_column(index, "observation.images.gripper", column), root / FIRST_FILE)


def png_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def open_in_another_process(root, openers, dies=""):
    command = [sys.executable, "-c", OPEN_IN_ANOTHER_PROCESS, root, str(openers), dies]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_cached_frames_equal_the_pixels_of_the_pngs(root):
    expected, asked = pixels_of_pngs(root), np.array([18, 0, 5, 5, 14])
    images = LeRobotDataset(root).images(asked)
    assert (images.dtype, images.shape) == (np.uint8, (5, 2, 3, 6, 8))
    np.testing.assert_array_equal(images, expected[asked])


def test_second_opening_decodes_nothing(root, monkeypatch):
    LeRobotDataset(root, cameras=("table",))
    decoded = []
    decode = frames._decode
    monkeypatch.setattr(frames, "_decode", lambda *args: (decoded.append(args[2]), decode(*args)))
    LeRobotDataset(root)
    assert decoded
    assert all("observation.images.gripper" in where for where in decoded)
    decoded.clear()
    LeRobotDataset(root)
    assert not decoded


def test_changed_image_is_decoded_anew(root):
    before = LeRobotDataset(root).images(np.arange(19))
    changed = np.full((6, 8, 3), 7, np.uint8)
    replace_image(root, 2, png_of(changed))
    after = LeRobotDataset(root).images(np.arange(19))
    assert (after[2, 1] == 7).all()
    np.testing.assert_array_equal(np.delete(after[:, 1], 2, axis=0), np.delete(before[:, 1], 2, axis=0))


def test_cache_lies_in_the_folder_asked_for(root, tmp_path):
    data = LeRobotDataset(root, image_cache=tmp_path / "fast/disk")
    np.testing.assert_array_equal(data.images(np.arange(19)), pixels_of_pngs(root))
    assert len(list((tmp_path / "fast/disk").glob(".frames-*/frames.npy"))) == 2
    assert not list(root.glob(".frames*"))


def test_two_processes_that_open_at_once_build_one_cache(root):
    processes = [open_in_another_process(root, openers=2) for _ in range(2)]
    output = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(int(groups) for groups, _ in output) == [0, 8]  # four episodes of two cameras, decoded by one
    assert {int(pixels) for _, pixels in output} == {int(pixels_of_pngs(root).sum())}
    assert len(list(root.glob(".frames-*"))) == 2


def test_build_killed_half_way_is_built_again(root):
    process = open_in_another_process(root, openers=1, dies="dies")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [folder.suffix for folder in root.glob(".frames-*")] == [".partial"]
    np.testing.assert_array_equal(LeRobotDataset(root).images(np.arange(19)), pixels_of_pngs(root))
    assert not list(root.glob(".frames-*.partial"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same_frames(root, method):
    data, asked = LeRobotDataset(root), np.array([3, 18])
    expected = data.images(asked)
    assert len(pickle.dumps(data)) < sum(file.stat().st_size for file in root.glob(".frames-*/frames.npy"))
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(data.images, (asked,)), expected)


def test_too_small_a_disk_is_refused_before_decoding(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10_000, 9_000, 1_000))
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    needed = 2 * 19 * 3 * 6 * 8
    for text in (f"need {needed} bytes", f"{root} has 1000 free", "image_cache"):
        assert text in str(refusal.value)
    assert not list(root.glob(".frames-*"))


def test_folder_that_cannot_be_written_is_refused(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write decoded images to .*/file .*: set --data.image_cache"):
        LeRobotDataset(root, image_cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("png", "told"),
    [
        (b"no image", ["not a readable image", "write the data set again"]),
        (png_of(np.zeros((64, 64, 3), np.uint8))[:-40], ["not a readable image"]),
        (None, ["not a readable image"]),
        (png_of(np.zeros((8, 6, 3), np.uint8)), ["the image is 8 x 6, expected 6 x 8 from meta/info.json"]),
    ],
    ids=["no image", "cut short", "null", "of another size"],
)
def test_broken_image_is_refused_by_file_and_row_and_leaves_no_cache(root, png, told):
    replace_image(root, 2, png)
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, cameras=("gripper",))
    for text in [FIRST_FILE, "row group 0, observation.images.gripper, row 2", *told]:
        assert text in str(refusal.value)
    assert not list(root.glob(".frames-*"))


def test_grey_images_are_read_as_three_equal_channels(root):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    replace_image(root, 0, png_of(grey))
    images = LeRobotDataset(root, cameras=("gripper",)).images(np.array([0]))
    np.testing.assert_array_equal(images[0, 0], np.broadcast_to(grey, (3, 6, 8)))
