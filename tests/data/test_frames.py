"""Pictures, decoded once into a cache that all later runs share, or as they are asked for."""

import errno
import fcntl
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot_sets import EPISODES, column, edit_columns, edit_info, features
from numbered import edit
from pictures import COUNT, EVERY, GRIPPER, as_row_7, caches, damage_video, png_of, stored, write
from planting import TASKS
from training import in_children

from vla import InputError
from vla.data import frames
from vla.data.cache import built
from vla.data.lerobot import LeRobotDataset
from vla.images import resize_with_padding

FIRST_FILE = "data/chunk-000/file-000.parquet"


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set", data_files_size_in_mb=0.002)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One for each codec, its episodes in two or three files."""
    folder, size = tmp_path_factory.mktemp("sets"), 0.002
    for codec in ("png", "h264", "av1"):
        write(folder / codec, codec=codec, data_files_size_in_mb=size, video_files_size_in_mb=size)
    return folder


def replace_image(root, row, png):
    edit(root, GRIPPER, row, {"bytes": png, "path": None})


def test_all_of_a_cache_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda at: (events.append(os.readlink(f"/proc/self/fd/{at}")), fsync(at)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("rename"), rename(path, to)))
    built(tmp_path / "done", lambda folder: (folder / "file").touch(), 0, "a file")
    unfinished = f"{tmp_path}/done.partial"
    assert events == [f"{unfinished}/file", unfinished, "rename", str(tmp_path)]


def test_disk_that_fails_leaves_no_file_of_a_cache_open(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(os, "fsync", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no disk"):
        built(tmp_path / "done", lambda folder: (folder / "file").touch(), 0, "a file")
    assert os.listdir("/proc/self/fd") == before


# ---- The same pixels, wherever they lie.


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
@pytest.mark.parametrize("codec", ["png", "h264", "av1"])
def test_pictures_are_those_of_the_files_in_any_order(codec, cache, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "JOB", 3)  # so that a file takes several
    expected, asked = stored(sets / codec), np.array([18, 0, 5, 5, 14])
    assert len(list((sets / codec).glob("videos/*table/*/*")) or list((sets / codec).glob("data/*/*"))) in (2, 3)
    data = LeRobotDataset(sets / codec, cache=cache, cache_dir=tmp_path)
    images = data.images(asked)
    assert (images.dtype, images.shape) == (np.uint8, (5, 2, 3, 16, 24))
    np.testing.assert_array_equal(images, expected[asked])
    np.testing.assert_array_equal(data.images(EVERY), expected)
    out = np.full((7, 3, 3, 16, 24), 7, np.uint8)  # two cameras of three, five rows of seven
    data.read_images(asked, out, np.array([6, 0, 3, 4, 1]), (2, 0))
    np.testing.assert_array_equal(out[[6, 0, 3, 4, 1]][:, [2, 0]], expected[asked])
    assert (out[:, 1] == 7).all()
    assert (out[[2, 5]] == 7).all()


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_pictures_come_in_the_size_asked_for_with_their_aspect_kept(cache, root):
    size = (20, 12)
    data = LeRobotDataset(root, cache=cache, image_size=size)
    pictures = torch.from_numpy(stored(root))
    expected = resize_with_padding(pictures.flatten(0, 1), size).unflatten(0, pictures.shape[:2])
    np.testing.assert_array_equal(data.images(EVERY), expected.numpy())
    assert (data.images(EVERY)[:, :, :, :6] == 0).all()


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_data_set_that_was_pickled_reads_the_same_frames(cache, root):
    data = LeRobotDataset(root, cache=cache)
    sent = pickle.dumps(data)
    np.testing.assert_array_equal(pickle.loads(sent).images(EVERY), data.images(EVERY))
    if cache != "memory":
        assert len(sent) < data.images(EVERY).nbytes / 2


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_forked_process_decodes_beside_its_parent(codec, sets, tmp_path):
    data = LeRobotDataset(sets / codec, cache="none", cache_dir=tmp_path)
    expected = data.images(EVERY)  # its files are open from here on

    def read(found):
        for _ in range(5):
            found["same"] = all((data.images(EVERY[i : i + 1])[0] == expected[i]).all() for i in EVERY)

    assert [child.ok().found for child in in_children(read, processes=2)] == [{"same": True}] * 2


def test_episode_whose_pictures_are_read_in_pieces_has_each_at_its_place(root, monkeypatch):
    read, pieces = pq.ParquetFile.iter_batches, []

    def counted(*arguments, **options):
        for piece in read(*arguments, **options):
            pieces.append(len(piece))
            yield piece

    expected, data = stored(root), LeRobotDataset(root, cache="none", cameras=("table",))
    monkeypatch.setattr(frames, "PIECE", 2)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    for asked in ([9], [8, 9], [14, 6, 11, 7], [13, 13, 12], [3, 10, 18, 5, 9]):  # episode 2 has frames 6 to 14
        np.testing.assert_array_equal(data.images(np.array(asked)), expected[asked, :1])
    assert pieces[:5] == [2, 2, 2, 2, 1]


def test_grey_images_are_read_as_three_equal_channels(root):
    grey = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24)
    replace_image(root, 0, png_of(grey))
    images = LeRobotDataset(root, cameras=("gripper",)).images(np.array([0]))
    np.testing.assert_array_equal(images[0, 0], np.broadcast_to(grey, (3, 16, 24)))


# ---- One cache for all processes and later runs.


def test_later_opening_decodes_nothing(root, decoded):
    images = LeRobotDataset(root).images(EVERY)
    assert sorted(decoded) == sorted([*EVERY, *EVERY])
    decoded.clear()
    np.testing.assert_array_equal(LeRobotDataset(root).images(EVERY), images)
    assert not decoded
    assert caches(root / ".vla_cache") == ["frames", "frames", "index", "locks"]


def test_cache_lies_in_the_folder_asked_for_and_serves_copies_of_the_data(root, tmp_path, decoded):
    cache = tmp_path / "fast/disk"
    images = LeRobotDataset(root, cache_dir=cache).images(EVERY)
    assert caches(cache) == ["frames", "frames", "index", "locks"]
    assert not (root / ".vla_cache").exists()
    copy = shutil.copytree(root, tmp_path / "copy")  # with the times of its files
    decoded.clear()
    np.testing.assert_array_equal(LeRobotDataset(copy, cache_dir=cache).images(EVERY), images)
    assert not decoded


def test_data_sets_share_a_folder_and_nothing_else(root, tmp_path):
    other = write(tmp_path / "other", [5, 14], data_files_size_in_mb=0.002)
    for one in (root, other, root):
        data = LeRobotDataset(one, cache_dir=tmp_path / "cache")
        np.testing.assert_array_equal(data.images(EVERY), stored(one))
    assert caches(tmp_path / "cache") == ["frames"] * 4 + ["index"] * 2 + ["locks"]


def test_cache_is_of_one_camera_and_size(root, decoded):
    for options in ({}, {"image_size": (8, 8)}):
        LeRobotDataset(root, cameras=("table",), **options)
        assert sorted(decoded) == EVERY.tolist()
        decoded.clear()
        images = LeRobotDataset(root, **options).images(EVERY)
        assert sorted(decoded) == EVERY.tolist()  # the other camera alone
        assert (images[:, 0] != images[:, 1]).any(axis=(1, 2, 3)).all()
        decoded.clear()


def test_changed_picture_is_decoded_anew(root):
    before = LeRobotDataset(root).images(EVERY)
    replace_image(root, 2, png_of(np.full((16, 24, 3), 7, np.uint8)))
    after = LeRobotDataset(root).images(EVERY)
    assert (after[2, 1] == 7).all()
    np.testing.assert_array_equal(np.delete(after[:, 1], 2, axis=0), np.delete(before[:, 1], 2, axis=0))


def nudged_start(root):
    rows = column(root / EPISODES, f"videos/{GRIPPER}/from_timestamp")
    edit_columns(root / EPISODES, {f"videos/{GRIPPER}/from_timestamp": [*rows[:2], rows[2] + 5e-5, rows[3]]})


# Changes under meta/, and which cameras they are decoded anew.
CHANGES = {
    "a note": ("h264", lambda root: (root / "meta/notes.txt").write_text("mended"), 0),
    "a touch": ("png", lambda root: os.utime(root / "meta/stats.json"), 0),
    "an instruction": ("png", lambda root: edit_columns(root / TASKS, {"task": ["put it there"]}), 0),
    "names": ("h264", features(action={"names": ["left", "right"]}), 0),
    "a camera's feature": ("png", features(gripper={"names": None}), 1),
    "a place in a video": ("h264", nudged_start, 1),
    "frames per second": ("h264", lambda root: edit_info(root, lambda info: info.update(fps=10.00001)), 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_pictures_are_decoded_anew_where_the_metadata_place_them_otherwise(change, tmp_path, decoded):
    codec, plant, cameras = CHANGES[change]
    root = write(tmp_path / "set", codec=codec)
    LeRobotDataset(root)
    decoded.clear()
    plant(root)
    data = LeRobotDataset(root)
    assert sorted(decoded) == sorted([*EVERY] * cameras)
    np.testing.assert_array_equal(data.images(EVERY), stored(root))
    assert data.instructions == ["put it there" if change == "an instruction" else "put the cube on the plate"]


def test_episodes_left_out_are_not_decoded_until_they_are_mended(tmp_path, decoded):
    root = write(tmp_path / "set", codec="h264")  # whose videos stay as they are
    edit(root, "action", 5, [float("nan"), 0.0])  # of episode 1
    with pytest.raises(InputError, match="episode 1: frame 0: action"):
        LeRobotDataset(root)
    assert not decoded
    data = LeRobotDataset(root, skip_bad=True)
    assert data.episodes.tolist() == [0, 2, 3]
    assert set(decoded) == set(EVERY) - {5}
    decoded.clear()
    edit(root, "action", 5, [0.5, 0.0])
    np.testing.assert_array_equal(LeRobotDataset(root).images(EVERY), stored(root))
    assert sorted(decoded) == sorted([*EVERY, *EVERY])


def watch_locks(folder, then):
    """In a child: tell in the folder that it asks for the lock, and call `then(number)` at each decoding."""
    flock, read, calls = fcntl.flock, frames.Decoder.read, []

    def announced(*arguments):
        (folder / f"asks-{os.getpid()}").touch()
        flock(*arguments)

    def watched(self, *arguments):
        calls.append(arguments[0].tolist())
        then(len(calls))
        return read(self, *arguments)

    fcntl.flock, frames.Decoder.read = announced, watched
    return calls


def test_processes_that_open_at_once_build_one_cache(root, tmp_path):
    LeRobotDataset(root, cache="none")  # makes the index
    asked = tmp_path / "asked"
    asked.mkdir()

    def both_ask(_):
        deadline = time.monotonic() + 30
        while len(list(asked.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def opens(found):
        calls = watch_locks(asked, both_ask)
        images = LeRobotDataset(root).images(EVERY)
        found["decoded"], found["same"] = sum(map(len, calls)), bool((images == stored(root)).all())

    found = [child.ok().found for child in in_children(opens, processes=2)]
    assert sorted(one["decoded"] for one in found) in ([0, 2 * COUNT], [COUNT, COUNT])  # each camera by one of them
    assert all(one["same"] for one in found)
    assert caches(root / ".vla_cache") == ["frames", "frames", "index", "locks"]


def test_cache_that_was_killed_half_way_is_built_again(root, tmp_path):
    def dies(found):
        watch_locks(tmp_path, lambda number: number == 3 and os.kill(os.getpid(), signal.SIGKILL))
        LeRobotDataset(root)

    (child,) = in_children(dies)
    assert child.code == -signal.SIGKILL
    assert len(list((root / ".vla_cache").glob("frames-*.partial"))) == 1
    assert not [path for path in (root / ".vla_cache").glob("frames-*") if path.suffix != ".partial"]
    np.testing.assert_array_equal(LeRobotDataset(root).images(EVERY), stored(root))
    assert caches(root / ".vla_cache") == ["frames", "frames", "index", "locks"]
    assert not list((root / ".vla_cache").glob("*.partial"))


def test_what_another_process_builds_is_neither_waited_for_nor_removed_until_that_is_killed(root, tmp_path):
    cache = tmp_path / "cache"
    (cache / "frames-other.partial").mkdir(parents=True)
    (cache / "locks").mkdir()
    with open(cache / "locks/frames-other", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        np.testing.assert_array_equal(LeRobotDataset(root, cache_dir=cache).images(EVERY), stored(root))
        assert (cache / "frames-other.partial").exists()
    LeRobotDataset(root, cache_dir=cache, image_size=(8, 8))
    assert not (cache / "frames-other.partial").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_waiting_for_another_process_is_said_once_for_each_run(root, rank, monkeypatch, capfd):
    flock, taken = fcntl.flock, []

    def taken_at_first(file, flags):
        taken.append(flags)
        if len(taken) == 1:
            raise BlockingIOError
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", taken_at_first)
    monkeypatch.setenv("LOCAL_RANK", rank)
    LeRobotDataset(root, cache="none")
    (index,) = (root / ".vla_cache").glob("index-*")
    said = f"numbers of {root}: waiting for another process that makes {index}\n"
    assert capfd.readouterr().err == (said if rank == "0" else "")
    assert taken[:2] == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
def test_error_while_decoding_leaves_nothing(error, root, monkeypatch):
    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(frames.Decoder, "read", fails)
        with pytest.raises(type(error)):
            LeRobotDataset(root)
    assert caches(root / ".vla_cache") == ["index", "locks"]
    np.testing.assert_array_equal(LeRobotDataset(root).images(EVERY), stored(root))


def test_size_place_and_progress_are_told(root, capfd, monkeypatch):
    read, slow = frames.Decoder.read, iter([1.1])  # seconds; what is done in less needs no bar

    def slowly(*arguments):
        read(*arguments)
        time.sleep(next(slow, 0))

    monkeypatch.setattr(frames.Decoder, "read", slowly)
    LeRobotDataset(root, image_size=(1000, 1000), cameras=("gripper",))
    told = capfd.readouterr().err
    assert f"decoded pictures of {GRIPPER}: 57.0 MB to {root}/.vla_cache/frames-" in told
    assert f"decoding {GRIPPER}: 100%" in told
    assert "19/19" in told
    for size in ((1000, 1000), (16, 24)):  # what is there, and what is small
        LeRobotDataset(root, image_size=size, cameras=("gripper",))
        assert not capfd.readouterr().err


@pytest.mark.parametrize(("cache", "codec"), [("disk", "png"), ("memory", "h264")])
def test_processes_that_decode_find_the_same_pictures_and_faults(cache, codec, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(frames, "JOB", 1)  # so that these few pictures are worth processes
    root = write(tmp_path / "set", codec=codec)
    expected, whole = stored(root), np.delete(EVERY, np.s_[6:15])
    np.testing.assert_array_equal(LeRobotDataset(root, cache=cache, image_size=(16, 24)).images(EVERY), expected)
    damage_video(root) if codec == "h264" else as_row_7(b"no image")(root)
    with pytest.raises(InputError, match=r"episode 2: .*--data.skip_bad"):
        LeRobotDataset(root, cache=cache)
    data = LeRobotDataset(root, cache=cache, skip_bad=True)
    np.testing.assert_array_equal(data.images(whole), expected[whole])
    assert not decoded  # in this process
