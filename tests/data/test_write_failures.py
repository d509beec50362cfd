"""What a writer leaves behind that fails, is killed or has little room."""

import errno
import resource
import shutil
import tracemalloc

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from written import FILMED, assert_holds, episode, filmed, write, writer

from vla import InputError
from vla.data import write as write_module


def test_exception_leaves_finished_episodes_readable_beside_the_root(tmp_path):
    def failing_collection():
        with writer(tmp_path / "set", data_files_size_in_mb=0.008) as out:
            for seed in range(4):
                out.add_episode(**episode(seed))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing_collection()
    assert not (tmp_path / "set").exists()
    assert_holds(tmp_path / ".set.partial", [episode(seed) for seed in range(4)])

    write(tmp_path / "set", [episode(7)])
    assert not (tmp_path / ".set.partial").exists()
    assert_holds(tmp_path / "set", [episode(7)])


# Of the fourth episode: which call to what fails, whether it has done its work, and the episodes that are then whole.
FAILURES = {
    "its last PNG": ("png", Image.Image, "save", 10, False, 3),
    "the encoding of its second video": ("av1", av, "open", 2, False, 3),
    "the copy of its second video": ("h264", av, "open", 4, False, 3),
    "its row group": ("h264", pq.ParquetWriter, "write_table", 1, False, 3),
    "its row group of PNGs": ("png", pq.ParquetWriter, "write_table", 1, False, 3),
    "an interrupt after its row group": ("h264", pq.ParquetWriter, "write_table", 1, True, 4),
    "an interrupt after a file is closed": ("png", pq.ParquetWriter, "close", 1, True, 4),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_episode_that_fails_half_way_is_not_in_the_data_set(tmp_path, monkeypatch, failure, error):
    codec, owner, name, number, done, whole = FAILURES[failure]
    original, calls = getattr(owner, name), []
    episodes = [filmed(seed, 5, f"task {seed}") for seed in range(4)]

    def fails(*args, **options):
        calls.append(name)
        result = original(*args, **options) if done or len(calls) != number else None
        if len(calls) == number:
            raise error
        return result

    def failing_collection():
        with writer(tmp_path / "set", FILMED, codec=codec, data_files_size_in_mb=0.004) as out:
            for one in episodes[:3]:
                out.add_episode(**one)
            monkeypatch.setattr(owner, name, fails)
            out.add_episode(**episodes[3])

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        failing_collection()
    assert not (tmp_path / "set").exists()
    assert_holds(tmp_path / ".set.partial", episodes[:whole], codec)


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_exception_in_the_first_episode_leaves_nothing(tmp_path, monkeypatch, codec):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    with pytest.raises(MemoryError):
        write(tmp_path / "set", [filmed(0)], cameras=FILMED, codec=codec)
    assert list(tmp_path.iterdir()) == []


def test_row_group_that_was_cut_off_costs_the_episodes_of_its_file_and_no_others(tmp_path):
    sizes = {"table": (64, 64)}
    episodes = [episode(seed, 5, cameras=sizes) for seed in range(4)]

    def failing_collection():
        with writer(tmp_path / "set", sizes, data_files_size_in_mb=0.1) as out:
            for one in episodes[:3]:
                out.add_episode(**one)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            size = (tmp_path / ".set.partial/data/chunk-000/file-001.parquet").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, limits[1]))
            try:
                out.add_episode(**episodes[3])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(OSError, match="File too large"):
        failing_collection()
    assert_holds(tmp_path / ".set.partial", episodes[:2])


def test_no_episode_follows_one_that_was_written_in_part(tmp_path, monkeypatch):
    original = pq.ParquetWriter.write_table

    def fails(*_, **__):
        monkeypatch.setattr(pq.ParquetWriter, "write_table", original)
        raise OSError

    with writer(tmp_path / "set") as out:
        out.add_episode(**episode(0))
        monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
        with pytest.raises(OSError):
            out.add_episode(**episode(1))
        with pytest.raises(InputError, match=r"episode 1 was written in part .* write .*set again"):
            out.add_episode(**episode(2))
    assert_holds(tmp_path / "set", [episode(0)])


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=80_000_000)
    with writer(tmp_path / "set") as out:
        out.add_episode(**episode(0, instruction="open"))
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda _: free)
            with pytest.raises(
                InputError, match=r"episode 1: the disk of .* has 80 MB left, expected 105 MB: free some"
            ):
                out.add_episode(**episode(1, instruction="close"))
        out.add_episode(**episode(2, instruction="push"))
    assert_holds(tmp_path / "set", [episode(0, instruction="open"), episode(2, instruction="push")])


def test_episodes_table_has_more_rows_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "ROWS_IN_MEMORY", 2)
    episodes = [episode(seed, 1 + seed, f"task {seed}") for seed in range(5)]
    write(tmp_path / "set", episodes)
    assert_holds(tmp_path / "set", episodes)
    assert pq.read_metadata(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").num_row_groups == 3


@pytest.mark.parametrize("codec", ["png", "h264"])
def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path, codec):
    used = []
    tracemalloc.start()
    with writer(tmp_path / "set", {"table": (16, 16)}, codec=codec, data_files_size_in_mb=0.1) as out:
        for seed in range(120):
            out.add_episode(**episode(seed, 10, cameras={"table": (16, 16)}))
            used.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
    tracemalloc.stop()
    assert max(used[90:]) - max(used[:30]) < 200_000  # of 60 episodes of 8,000 bytes each


def test_root_that_cannot_be_written_is_refused_before_an_episode_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/set cannot be written \(.*Not a directory.*: choose another folder"):
        write(tmp_path / "file/set", [episode(0)])
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(InputError, match=r"disk is where a disk is mounted, .* can be replaced: choose a folder in it"):
        writer(tmp_path / "disk")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"here is where a disk is mounted, or the current folder"):
        writer(".")
