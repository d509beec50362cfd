"""The folder of a run's checkpoints: what a crash leaves, and what rotation keeps."""

import contextlib
import errno
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saving import broken, checkpoints_of, commit, small_training, state_of
from training import flip, in_children, steps, train

import vla.saver
from vla import InputError, NotSaved, checkpoint, checkpoints
from vla.config import CheckpointConfig

# ---- Crashes.


def copy_at_every_line(run, copies):
    """Copy the folder to `copies` before each line of vla/checkpoint.py and vla/saver.py and each call that changes the
    file system, in whichever thread, and with half of a large file written; unless it is as it was at the copy before.

    A copy is what kill -9 leaves at that moment. For a child: what it sets stays.
    """
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}
    alone, seen = threading.Lock(), [None]

    def tick(*_):
        if not alone.acquire(blocking=False):  # called by the copying itself
            return
        now = [(str(path), path.stat().st_ino, path.stat().st_size) for path in sorted(run.rglob("*"))]
        if now != seen[-1]:
            shutil.copytree(run, copies / str(len(seen)))
            seen.append(now)
        alone.release()

    def trace(frame, event, _):
        if frame.f_code.co_filename in (checkpoint.__file__, vla.saver.__file__):
            tick()
            return trace
        return None

    def halfway(save):
        def half(content, path):
            Path(path).write_bytes(b"half of it")
            tick()
            save(content, path)

        return half

    vla.saver.save_file, torch.save, os.fsync = halfway(vla.saver.save_file), halfway(torch.save), tick
    sys.addaudithook(lambda event, _: tick() if event in changes else None)
    threading.settrace(trace)
    sys.settrace(trace)


def damage(path):
    """Zeros in place of the weights, as after a power cut."""
    file = path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def after_a_crash(folder):
    (folder / "step_00000001").rename(folder / ".replaced_step_00000001")
    shutil.copytree(folder / "step_00000002", folder / ".saving_step_00000003")
    (folder / "step_00000002").rename(folder / ".deleting_step_00000002")


# Steps that are there, what then happens to them, the step that is saved, and which the run may go on from if a crash
# comes in between.
CRASHES = {
    "new": ([1, 2], lambda folder: None, 3, {2, 3}),
    "replaces_a_damaged_one": ([1, 2], lambda folder: damage(folder / "step_00000002"), 2, {1, 2}),
    "replaces_a_good_one": ([1, 2], lambda folder: None, 2, {2}),
    "replaces_the_only_one": ([1], lambda folder: None, 1, {1}),
    "leaves_a_future": ([1, 2, 3], lambda folder: damage(folder / "step_00000003"), 2, {2}),
    "starts_after_a_crash": ([1, 2], after_a_crash, 3, {1, 3}),
}


@pytest.mark.parametrize("case", CRASHES)
def test_crash_at_any_line_of_a_save_leaves_a_good_checkpoint(case, tmp_path):
    there, happens, step, allowed = CRASHES[case]
    run, crashes = tmp_path / "run", tmp_path / "crashes"

    def save(_):
        training, folder = small_training(), run / "checkpoints"
        folder.mkdir(parents=True)
        for earlier in there:
            commit(training, folder, earlier, keep=9)
        happens(folder)
        copy_at_every_line(run, crashes)
        checkpoint.prepare(run, True, 0)
        sys.settrace(None)  # from here on it is the other thread that works
        commit(training, folder, step)

    def go_on(found):
        training, saved = small_training(), f"step_{step:08d}"
        checkpoint.lock = lambda _: None  # of so many runs in one process
        for crashed in crashes.iterdir():
            folder = checkpoint.prepare(crashed, True, 0)
            assert not list(folder.glob(".*"))
            for path in checkpoint.all_steps(folder).values():
                if any((path / "model.safetensors").read_bytes()):  # not damaged before
                    checkpoint.verify(path)
            found[crashed.name] = checkpoint.find(str(crashed), folder).name
            commit(training, folder, step)
            assert [path.name for path in folder.iterdir()] == [saved]
            checkpoint.verify(folder / saved)

    in_children(save)[0].ok()
    (child,) = in_children(go_on)
    assert len(child.ok().found) > 20
    assert set(child.found.values()) == {f"step_{step:08d}" for step in allowed}


def test_everything_is_on_the_disk_before_the_rename_commits(tmp_path):
    def watch(found):
        training, events, opened = small_training(), [], {}
        open_, fsync, rename = os.open, os.fsync, Path.rename

        def watched_open(path, *arguments, **named):
            handle = open_(path, *arguments, **named)
            opened[handle] = Path(path).name
            return handle

        def watched_fsync(handle):
            fsync(handle)
            events.append((opened[handle], os.fstat(handle).st_size))

        def watched_rename(self, target):
            events.append((f"rename to {target.name}", 0))
            return rename(self, target)

        os.open, os.fsync, Path.rename = watched_open, watched_fsync, watched_rename
        commit(training, tmp_path, 1)
        found["events"] = events

    (child,) = in_children(watch)
    names, sizes = zip(*child.ok().found["events"], strict=True)
    files = {path.name: path.stat().st_size for path in (tmp_path / "step_00000001").iterdir()}
    assert len(files) == 7
    assert sorted(names) == sorted([*files, ".saving_step_00000001", "rename to step_00000001", tmp_path.name])
    assert set(names[:6]) == files.keys() - {"MANIFEST.json"}
    assert names[6:] == ("MANIFEST.json", ".saving_step_00000001", "rename to step_00000001", tmp_path.name)
    assert all(files.get(name, size) == size for name, size in zip(names, sizes, strict=True))


# ---- Rotation.


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "damaged", "kept"),
    [
        (1, 0, None, [], [12]),
        (2, 0, 3, [], [3, 10, 12]),
        (2, 5, 3, [], [3, 5, 10, 12]),
        (1, 6, 12, [], [6, 12]),
        (9, 0, None, [], [3, 5, 6, 10, 12]),
        (2, 0, None, [10], [6, 12]),
        (1, 0, None, [10, 12], [6]),
        (1, 0, None, [3, 5, 6, 10, 12], [3, 5, 6, 10, 12, 15]),
    ],
)
def test_rotation_keeps_the_newest_good_the_best_and_every_kth(keep, keep_every, best, damaged, kept, tmp_path):
    checkpoints_of(tmp_path, {step: {} for step in (3, 5, 6, 10, 12, 15)})  # 15: of a future that was left
    (tmp_path / "notes").touch()

    def is_good(path):
        return int(path.name[5:]) not in damaged

    checkpoint.rotate(tmp_path, state_of(12, best_step=best), CheckpointConfig(1, keep, keep_every), is_good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *(f"step_{step:08d}" for step in kept)]


JUDGED = {step: {"evaluated": step, "score": score} for step, score in ((1, 0.3), (2, 0.1), (3, 0.2))}


@pytest.mark.parametrize(
    ("found", "state", "best"),
    [
        (JUDGED, {"best_step": 3}, 3),
        (JUDGED, {"best_step": 4}, 2),  # its save failed, or it is damaged
        (JUDGED, {"best_step": None, "metric": "success"}, None),  # it was changed when the run was resumed
        (JUDGED | {4: {"evaluated": 3, "score": 0.0}}, {"best_step": 9}, 2),  # the score of another step's weights
        (JUDGED | {4: {"evaluated": 4, "score": None}}, {"best_step": 9}, 2),  # was not finite
        ({1: {}, 2: {}}, {"best_step": None}, None),
    ],
)
def test_best_is_the_one_named_or_else_the_best_on_the_disk(found, state, best, tmp_path):
    checkpoints_of(tmp_path, found)
    paths = checkpoint.all_steps(tmp_path)
    assert checkpoint.best(state_of(9, **state), list(paths.values())) == paths.get(best)


def test_damaged_checkpoints_do_not_count_as_good_ones_when_a_save_rotates(tmp_path):
    def save(_):
        training = small_training()
        for step in (1, 2, 3):
            commit(training, tmp_path, step, keep=9)
        damage(tmp_path / "step_00000003")
        commit(training, tmp_path, 4, keep=2)

    (child,) = in_children(save)
    assert f"{tmp_path / 'step_00000003/model.safetensors'} is damaged" in child.ok().stderr
    assert list(checkpoint.all_steps(tmp_path)) == [2, 4]


@contextlib.contextmanager
def unreadable(path, file):
    """As of a network's disk for a moment."""

    def read(asked, original=checkpoint._sha256):
        if asked == path / file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", read)
        yield


def test_checkpoint_that_cannot_be_read_now_is_kept_by_rotation_and_prune(tmp_path, capsys):
    def save(_):
        training = small_training()
        for step in (1, 2, 3):
            commit(training, tmp_path, step, keep=9)
        with unreadable(tmp_path / "step_00000002", "model.safetensors"):
            commit(training, tmp_path, 4, keep=2)

    (child,) = in_children(save)
    assert re.search("step_00000002/model.safetensors cannot be read: .*; it is kept", child.ok().stderr)
    assert list(checkpoint.all_steps(tmp_path)) == [2, 3, 4]
    with unreadable(tmp_path / "step_00000003", "optimizer.bin"):
        good, damaged, unread, _ = found = checkpoints.look(tmp_path, hashes=True)
    assert [[path.name[-1] for path in kind] for kind in (good, damaged, unread)] == [["2", "4"], [], ["3"]]
    checkpoints.show(tmp_path, *found)
    checkpoints.prune(tmp_path, CheckpointConfig(keep=1), good, damaged)
    assert re.search("unreadable now\n.*\nstep 3: optimizer.bin cannot be read", capsys.readouterr().out)
    assert list(checkpoint.all_steps(tmp_path)) == [3, 4]


def test_checkpoint_that_holds_a_file_of_others_is_kept_by_rotation_and_prune(tmp_path, caplog):
    def save(_):
        training = small_training()
        for step in (1, 2, 3):
            commit(training, tmp_path, step, keep=9)
            (tmp_path / f"step_{step:08d}/.DS_Store").touch()
        damage(tmp_path / "step_00000002")
        commit(training, tmp_path, 4)

    in_children(save)[0].ok()
    assert list(checkpoint.all_steps(tmp_path)) == [1, 3, 4]
    good, damaged, *_ = checkpoints.look(tmp_path, hashes=True)
    checkpoints.prune(tmp_path, CheckpointConfig(keep=1), good, damaged)
    assert list(checkpoint.all_steps(tmp_path)) == [1, 3, 4]
    with pytest.raises(InputError, match=r"step_00000003 holds \.DS_Store, .*: remove it"):
        checkpoint.find(str(tmp_path / "step_00000003"), tmp_path)
    flip(tmp_path / "step_00000004/model.safetensors")
    (tmp_path / "step_00000001/.DS_Store").unlink()
    assert checkpoint.find(str(tmp_path), tmp_path) == tmp_path / "step_00000001"
    assert re.search(r"step_00000003 holds \.DS_Store, .*: remove it", caplog.text)


def test_old_checkpoint_that_cannot_be_deleted_costs_a_warning_and_nothing_else(flags, tmp_path):
    def held(found):
        def rename(self, target, original=Path.rename):
            if self.name == "step_00000005":
                raise PermissionError("it is held")
            return original(self, target)

        def rmtree(path, ignore_errors=False, original=shutil.rmtree):
            if Path(path).name == ".deleting_step_00000010":
                if ignore_errors:
                    return
                raise PermissionError("a file of it is held")
            original(path, ignore_errors)

        Path.rename = rename
        checkpoint.shutil = SimpleNamespace(**vars(shutil) | {"rmtree": rmtree})

    run, own = tmp_path / "run", ["--eval.every", 0, "--checkpoint.keep", 1]
    (child,) = train(*flags, *own, "--run_dir", run, before=held)
    assert "could not be saved" not in child.ok().stderr
    assert re.search("step_00000005 cannot be deleted .*it is held", child.stderr)
    assert (run / "export").exists()
    left = [".deleting_step_00000010", "step_00000005", "step_00000016"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == left
    (resumed,) = train("--resume_from", run, "--steps", 18, before=held)
    assert re.search(r"\.deleting_step_00000010 cannot be deleted .*a file of it is held", resumed.ok().stderr)
    assert steps(run)[-1] == 18


def test_listing_that_fails_once_a_save_is_committed_does_not_fail_it(tmp_path):
    def save(_):
        checkpoint.rotate = broken
        commit(small_training(), tmp_path, 1)

    (child,) = in_children(save)
    assert "old checkpoints are kept (OSError: first line)" in child.ok().stderr
    checkpoint.verify(tmp_path / "step_00000001")


@pytest.mark.parametrize("case", ["older", "replaced"])
def test_nothing_is_deleted_if_the_new_checkpoint_does_not_verify(case, tmp_path):
    def save(_):
        training = small_training()
        commit(training, tmp_path, 1)

        def flush(path, original=checkpoint.flush):
            original(path)
            if path.name == "MANIFEST.json":  # all is written
                damage(path.parent)

        checkpoint.flush = flush
        with pytest.raises(NotSaved, match="damaged"):
            commit(training, tmp_path, {"older": 2, "replaced": 1}[case])

    in_children(save)[0].ok()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


def test_checkpoint_that_was_to_be_replaced_is_put_back_when_the_commit_fails(tmp_path):
    def save(_):
        training = small_training()
        commit(training, tmp_path, 1)

        def rename(self, target, original=Path.rename):
            if self.name.startswith(".saving_"):
                raise OSError("broken")
            return original(self, target)

        Path.rename = rename
        with pytest.raises(NotSaved, match="broken"):
            commit(training, tmp_path, 1)

    in_children(save)[0].ok()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")
