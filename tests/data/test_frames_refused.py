"""Pictures that cannot be decoded, or find no room where they are decoded to."""

import errno
import fcntl
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from numbered import edit
from pictures import EVERY, GRIPPER, as_row_7, caches, damage_video, png_of, stored, write
from training import in_children

from vla import InputError
from vla.data import frames
from vla.data.lerobot import LeRobotDataset

FIRST_FILE = "data/chunk-000/file-000.parquet"
HUGE = (10**6, 10**6)  # 57 TB


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set", data_files_size_in_mb=0.002)


# ---- Where there is no room.


def test_too_small_a_disk_is_refused_before_decoding(root, decoded):
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, image_size=HUGE)
    for text in ("need 114000.0 GB", f"{root}/.vla_cache has ", "GB free", "--data.cache_dir", "--data.cache none"):
        assert text in str(refusal.value)
    assert not decoded
    assert caches(root / ".vla_cache") == ["index", "locks"]


def test_too_small_a_memory_is_refused_before_decoding(root, decoded):
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, image_size=HUGE, cache="memory")
    for text in ("need 114000.0 GB of memory", "GB are free", "--data.cache disk or none", "--data.image_size"):
        assert text in str(refusal.value)
    assert not decoded


def test_memory_that_is_too_small_for_all_processes_of_a_machine_is_refused(root, decoded, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))
    with pytest.raises(InputError, match=r"need 0.0 MB of memory in each process, 0.0 MB are free: give --data"):
        LeRobotDataset(root, cache="memory")
    assert not decoded
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    np.testing.assert_array_equal(LeRobotDataset(root, cache="memory").images(EVERY), stored(root))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_meanwhile_is_told_and_what_was_built_is_removed(root, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    LeRobotDataset(root, cache="none")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    for text in ("no room for 0.0 MB", f" in {root}/.vla_cache ([Errno {number}]", "--data.cache_dir", "cache none"):
        assert text in str(refusal.value)
    assert caches(root / ".vla_cache") == ["index", "locks"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_disk_without_locks_is_refused(root, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    told = rf"{root}/.vla_cache has no locks \(\[Errno {number}\].*: set --data.cache_dir to a disk that has them"
    with pytest.raises(InputError, match=told):
        LeRobotDataset(root)


def as_nobody(function):
    """Call `function()` in a child that may not write everywhere."""

    def child(found):
        if os.geteuid() == 0:
            os.seteuid(65534)
        function()

    return in_children(child)[0]


def test_folder_that_cannot_be_written_is_refused_unless_the_cache_is_there():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # for everybody to read
        root = write(Path(folder, "set"))
        root.chmod(0o555)
        child = as_nobody(lambda: LeRobotDataset(root))
        root.chmod(0o755)
        assert f"cannot write numbers of {root} to {root}/.vla_cache ([Errno 13]" in child.stderr
        assert child.stderr.endswith(": set --data.cache_dir\n")
        LeRobotDataset(root)
        (root / ".vla_cache").chmod(0)  # another user's own
        child = as_nobody(lambda: LeRobotDataset(root))
        assert f"cannot write numbers of {root} to {root}/.vla_cache ([Errno 13]" in child.stderr
        for path in (root, root / ".vla_cache"):
            path.chmod(0o555)
        as_nobody(lambda: LeRobotDataset(root).images(EVERY)).ok()
        child = as_nobody(lambda: LeRobotDataset(root, image_size=(8, 8)))
        assert "cannot write decoded pictures of observation.images.table" in child.stderr
        assert f" to {root}/.vla_cache (" in child.stderr


@pytest.mark.parametrize("left", [0, 50, 128, 9000, None])
def test_cache_that_was_cut_short_or_deleted_is_told_with_its_file(left, root):
    data = LeRobotDataset(root, cameras=("table",))
    (file,) = (root / ".vla_cache").glob("frames-*/frames.npy")
    file.unlink() if left is None else os.truncate(file, left)
    for use in (lambda: data.images(np.array([18])), lambda: LeRobotDataset(root, cameras=("table",))):
        with pytest.raises(InputError, match=rf"{file} is damaged \(.*\): delete its folder, it is made again"):
            use()


@pytest.mark.parametrize("name", ["state.npy", "task_index.npy", "first_row.npy", "index.json"])
@pytest.mark.parametrize("left", [0, 50, 130, None])
def test_index_that_was_cut_short_or_deleted_is_told_with_its_file(name, left, root):
    data = LeRobotDataset(root, cameras=("table",))
    (file,) = (root / ".vla_cache").glob(f"index-*/{name}")
    file.unlink() if left is None else os.truncate(file, left)
    uses = [lambda: LeRobotDataset(root, cameras=("table",))]
    uses += [lambda: data.state[18]] if name == "state.npy" else []
    for use in uses:
        with pytest.raises(InputError, match=rf"{file} is damaged \(.*\): delete its folder, it is made again"):
            use()


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_files_that_are_open_at_once_are_bounded(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "OPEN_FILES", 4)
    root = write(tmp_path / "set", [2] * 12, codec=codec, data_files_size_in_mb=0, video_files_size_in_mb=0)
    expected, data, most = stored(root), LeRobotDataset(root, cache="none"), 0
    wait_until_closed(root)
    for asked in np.random.default_rng(0).integers(0, 24, (40, 3)):
        np.testing.assert_array_equal(data.images(asked), expected[asked])
        most = max(most, open_files(root))
    assert most == 8  # of two cameras
    del data
    wait_until_closed(root)


def open_files(root):
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(str(root)) for link in links)


def wait_until_closed(root):
    """A thread of pyarrow's may let go of a file that was read to its end a moment later."""
    deadline = time.monotonic() + 5
    while open_files(root):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- Pictures that cannot be decoded.


NO_IMAGE = f"row 7: no readable image of {GRIPPER} ("
OTHER_SIZE = f"row 7: the image of {GRIPPER} is 8 x 6, expected 16 x 24 as in meta/info.json"
DEPTH = f"row 7: the image of {GRIPPER} has pixels of mode I;16, expected 8 bits for each colour: if it is a depth"
BROKEN = {
    "no image": ("png", as_row_7(b"no image"), f"{FIRST_FILE}: episode 2: {NO_IMAGE}"),
    "cut short": ("png", as_row_7(png_of(np.zeros((64, 64, 3), np.uint8))[:-40]), NO_IMAGE),
    "null": ("png", as_row_7(None), NO_IMAGE),
    "of another size": ("png", as_row_7(png_of(np.zeros((8, 6, 3), np.uint8))), OTHER_SIZE),
    "of 16 bits": ("png", as_row_7(png_of(np.zeros((16, 24), np.uint16))), DEPTH),
    "video": ("h264", damage_video, f"videos/{GRIPPER}/chunk-000/file-000.mp4: episode 2: frame 7, shown at 0.700 s"),
}


@pytest.mark.parametrize(("codec", "plant", "told"), BROKEN.values(), ids=BROKEN)
def test_broken_picture_is_told_and_remembered_so_that_nothing_is_decoded_again(codec, plant, told, tmp_path, decoded):
    root = write(tmp_path / "set", codec=codec)
    expected, whole = stored(root), np.delete(EVERY, np.s_[6:15])
    plant(root)
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root)
    for text in (str(root), told, "--data.skip_bad"):
        assert text in str(refusal.value)
    assert decoded
    decoded.clear()
    with pytest.raises(InputError) as later:
        LeRobotDataset(root)
    assert str(later.value) == str(refusal.value)
    data = LeRobotDataset(root, skip_bad=True)
    assert not decoded
    assert data.episodes.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(data.images(whole), expected[whole])


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_broken_picture_is_told_as_well_without_a_cache_on_the_disk(codec, tmp_path):
    root = write(tmp_path / "set", codec=codec)
    expected, whole = stored(root), np.delete(EVERY, np.s_[6:15])
    damage_video(root) if codec == "h264" else as_row_7(b"no image")(root)
    with pytest.raises(InputError, match=r"(?s)episode 2: .*--data.skip_bad to leave out"):
        LeRobotDataset(root, cache="memory")
    data = LeRobotDataset(root, cache="memory", skip_bad=True)
    np.testing.assert_array_equal(data.images(whole), expected[whole])
    data = LeRobotDataset(root, cache="none")
    np.testing.assert_array_equal(data.images(whole), expected[whole])
    with pytest.raises(InputError, match=r": episode 2: .*: mend it, or give --data.skip_bad with --data.cache disk"):
        data.images(np.array([0, 7, 18]))


def test_no_episode_without_a_broken_picture_is_refused(tmp_path):
    root = write(tmp_path / "set", [2])
    edit(root, GRIPPER, 0, {"bytes": b"", "path": None})
    with pytest.raises(InputError, match="every episode has a fault, expected some to train on: mend them"):
        LeRobotDataset(root, skip_bad=True)
