"""Pictures, decoded once into a cache that all later runs share, or as they are asked for."""

import fcntl
import io
import os
import pickle
import shutil
import signal
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numbered import edit
from PIL import Image
from training import in_children

from vla import InputError
from vla.data import frames
from vla.data.lerobot import LeRobotDataset
from vla.data.write import LeRobotWriter
from vla.images import resize_with_padding

FIRST_FILE = "data/chunk-000/file-000.parquet"
CAMERAS, LENGTHS, COUNT = ("table", "gripper"), (5, 1, 9, 4), 19
GRIPPER = "observation.images.gripper"
HUGE = (10**6, 10**6)  # 57 TB
EVERY = np.arange(COUNT)


def write(root, lengths=LENGTHS, size=(16, 24), **options):
    """Pictures of random blocks, for videos too."""
    rng = np.random.default_rng(0)
    names = {"state_names": ["x", "y"], "action_names": ["dx", "dy"], "robot_type": "tabletop"}
    with LeRobotWriter(root, fps=10, cameras=dict.fromkeys(CAMERAS, size), **names | options) as writer:
        for length in lengths:
            blocks = rng.integers(0, 256, (2, length, 3, 4, 4), dtype=np.uint8)
            images = blocks.repeat(size[0] // 4, axis=3).repeat(size[1] // 4, axis=4)
            numbers = rng.normal(size=(2, length, 2)).astype(np.float32)
            writer.add_episode(
                images=dict(zip(CAMERAS, images, strict=True)),
                state=numbers[0],
                actions=numbers[1],
                instruction="put the cube on the plate",
            )
    return root


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


def stored(root):
    """The pictures, read from one end to the other: uint8 [F, N, 3, h, w]."""
    cameras = []
    for key in (f"observation.images.{name}" for name in CAMERAS):
        pictures = []
        for path in sorted(root.glob(f"videos/{key}/*/*.mp4")):
            with av.open(str(path)) as container:
                pictures += [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
        for path in sorted(root.glob("data/*/*.parquet")) if not pictures else []:
            rows = pq.ParquetFile(path).read().column(key).to_pylist()
            pictures += [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows]
        cameras.append(np.stack(pictures).transpose(0, 3, 1, 2))
    return np.stack(cameras, axis=1)


def png_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def replace_image(root, row, png):
    edit(root, GRIPPER, row, {"bytes": png, "path": None})


@pytest.fixture
def decoded(monkeypatch):
    """The frames that are decoded from now on."""
    numbers, read = [], frames.Decoder.read

    def watched(self, wanted, *arguments):
        numbers.extend(wanted.tolist())
        return read(self, wanted, *arguments)

    monkeypatch.setattr(frames.Decoder, "read", watched)
    return numbers


def caches(folder):
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


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
    assert caches(root / ".vla_cache") == ["frames", "frames", "index", "lock"]


def test_cache_lies_in_the_folder_asked_for_and_serves_copies_of_the_data(root, tmp_path, decoded):
    cache = tmp_path / "fast/disk"
    images = LeRobotDataset(root, cache_dir=cache).images(EVERY)
    assert caches(cache) == ["frames", "frames", "index", "lock"]
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
    assert caches(tmp_path / "cache") == ["frames"] * 4 + ["index"] * 2 + ["lock"]


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
    assert caches(root / ".vla_cache") == ["frames", "frames", "index", "lock"]


def test_cache_that_was_killed_half_way_is_built_again(root, tmp_path):
    def dies(found):
        watch_locks(tmp_path, lambda number: number == 3 and os.kill(os.getpid(), signal.SIGKILL))
        LeRobotDataset(root)

    (child,) = in_children(dies)
    assert child.code == -signal.SIGKILL
    assert len(list((root / ".vla_cache").glob("frames-*.partial"))) == 1
    assert not [path for path in (root / ".vla_cache").glob("frames-*") if path.suffix != ".partial"]
    np.testing.assert_array_equal(LeRobotDataset(root).images(EVERY), stored(root))
    assert caches(root / ".vla_cache") == ["frames", "frames", "index", "lock"]
    assert not list((root / ".vla_cache").glob("*.partial"))


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
def test_error_while_decoding_leaves_nothing(error, root, monkeypatch):
    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(frames.Decoder, "read", fails)
        with pytest.raises(type(error)):
            LeRobotDataset(root)
    assert caches(root / ".vla_cache") == ["index", "lock"]
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


# ---- Where there is no room.


def test_too_small_a_disk_is_refused_before_decoding(root, decoded):
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, image_size=HUGE)
    for text in ("need 114000.0 GB", f"{root}/.vla_cache has ", "GB free", "--data.cache_dir", "--data.cache none"):
        assert text in str(refusal.value)
    assert not decoded
    assert caches(root / ".vla_cache") == ["index", "lock"]


def test_too_small_a_memory_is_refused_before_decoding(root, decoded):
    with pytest.raises(InputError) as refusal:
        LeRobotDataset(root, image_size=HUGE, cache="memory")
    for text in ("need 114000.0 GB of memory", "GB are free", "--data.cache disk or none", "--data.image_size"):
        assert text in str(refusal.value)
    assert not decoded


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
    for one in (data, LeRobotDataset(root, cameras=("table",))):
        with pytest.raises(InputError, match=rf"{file} is damaged \(.*\): delete its folder, it is made again"):
            one.images(np.array([18]))


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


def damage_video(root):
    """Blank frame 7 of the gripper's video."""
    (path,) = root.glob(f"videos/{GRIPPER}/*/*.mp4")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][7]
        place = slice(packet.pos, packet.pos + packet.size)
    data = bytearray(path.read_bytes())
    data[place] = bytes(place.stop - place.start)
    path.write_bytes(data)


def as_row_7(png):
    return lambda root: edit(root, GRIPPER, 7, {"bytes": png, "path": None})


NO_IMAGE = f"row 7: no readable image of {GRIPPER} ("
OTHER_SIZE = f"row 7: the image of {GRIPPER} is 8 x 6, expected 16 x 24 as in meta/info.json"
BROKEN = {
    "no image": ("png", as_row_7(b"no image"), f"{FIRST_FILE}: episode 2: {NO_IMAGE}"),
    "cut short": ("png", as_row_7(png_of(np.zeros((64, 64, 3), np.uint8))[:-40]), NO_IMAGE),
    "null": ("png", as_row_7(None), NO_IMAGE),
    "of another size": ("png", as_row_7(png_of(np.zeros((8, 6, 3), np.uint8))), OTHER_SIZE),
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
