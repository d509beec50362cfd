"""A checkpoint is whole or it is not there, and one is always left."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saving import seal
from training import after, assert_equal, die_at, flip, last, of, result, steps, train

from vla import InputError, checkpoint, evaluate, restore

FILES = (
    "MANIFEST.json",
    "config.json",
    "ema.safetensors",
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "trainer_state.json",
)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


# ---- Damage.


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


def replace_by_link(file):
    outside = file.parents[2] / file.name
    file.rename(outside)
    file.symlink_to(outside)


DAMAGES = {
    "flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "folder": replace_by_folder,
    "link": replace_by_link,
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"x"),
}


def test_checkpoint_has_its_files_and_verifies(trained):
    assert sorted(path.name for path in last(trained[0]).iterdir()) == sorted(FILES)
    checkpoint.verify(last(trained[0]))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_file_is_found_and_named_and_the_next_older_checkpoint_taken(file, damage, run, caplog):
    newest, second = list(checkpoint.all_steps(run / "checkpoints").values())[:-3:-1]
    DAMAGES[damage](newest / file)
    with pytest.raises(InputError, match=rf"{newest.name}.*{file}"):
        checkpoint.verify(newest)
    assert checkpoint.find(str(run), run / "checkpoints") == second
    (message,) = caplog.messages
    assert newest.name in message
    assert file in message


@pytest.mark.parametrize("file", [*FILES, ""], ids=[*FILES, "the folder"])
def test_file_that_cannot_be_read_is_found_and_named(file, run, monkeypatch):
    broken = last(run) / file

    def failing(original):
        def method(self, *arguments, **named):
            if self == broken:
                raise OSError(errno.EIO, "Input/output error", str(self))
            return original(self, *arguments, **named)

        return method

    for name in ("open", "iterdir"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    with pytest.raises(InputError, match=rf"{last(run).name}.*{file}.*Input/output error"):
        checkpoint.verify(last(run))


def test_file_that_does_not_belong_to_a_checkpoint_is_found_and_named(run):
    (last(run) / "extra").touch()
    with pytest.raises(InputError, match="extra"):
        checkpoint.verify(last(run))


NO_MANIFESTS = ["{", "[]", "{}", '{"files": 3}', '{"files": {"model.safetensors": {}}}', "[" * 9999]


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_broken_manifest_is_found(content, run):
    (last(run) / "MANIFEST.json").write_text(content)
    with pytest.raises(InputError, match=r"MANIFEST\.json"):
        checkpoint.verify(last(run))


def test_flipped_bit_anywhere_in_the_manifest_is_found(run):
    manifest = last(run) / "MANIFEST.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        manifest.write_bytes(content)
        with pytest.raises(InputError):
            checkpoint.verify(last(run))


def test_find_falls_back_to_the_next_older_checkpoint_with_a_warning(run, caplog):
    newest, second, third = list(checkpoint.all_steps(run / "checkpoints").values())[:-4:-1]
    flip(newest / "optimizer.bin")
    (second / "MANIFEST.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find(str(run), run / "checkpoints") == third
    assert str(newest / "optimizer.bin") in caplog.messages[0]
    assert str(second) in caplog.messages[1]


def test_run_goes_on_from_the_next_older_checkpoint_and_says_so(run):
    newest = last(run)
    flip(newest / "model.safetensors")
    (child,) = train("--resume_from", run)
    assert f"{newest / 'model.safetensors'} is damaged" in child.ok().stderr
    assert f"resumed from {run}/checkpoints/step_00000015" in child.stderr
    checkpoint.verify(newest)  # written anew
    assert result(run)["step"] == 16


def test_data_are_compared_with_those_that_an_undamaged_checkpoint_names(run):
    newest, folder = last(run), run / "checkpoints"
    (data,) = checkpoint.read_state(newest)["data"]
    flipped, file = data[:-1] + chr(ord(data[-1]) ^ 1), newest / "trainer_state.json"
    file.write_text(file.read_text().replace(data, flipped))
    assert checkpoint.read_state(newest)["data"] == [flipped]
    checkpoint.check_origin(folder, "data", [data])
    with pytest.raises(InputError, match=r"those that .*step_00000015 was trained on"):
        checkpoint.check_origin(folder, "data", [flipped])


@pytest.mark.parametrize("processes", [1, 2])
def test_run_whose_checkpoints_are_all_damaged_is_refused_and_not_begun_anew(processes, run):
    for path in checkpoint.all_steps(run / "checkpoints").values():
        flip(path / "model.safetensors")
    with pytest.raises(InputError, match="no good checkpoint"):
        checkpoint.find(str(run), run / "checkpoints")
    before = sorted(run.rglob("*"))
    children = train("--resume_from", run, processes=processes)
    assert [child.code for child in children] == [1] * processes
    errors = [line for child in children for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no good checkpoint" in errors[0]
    assert sorted(run.rglob("*")) == before


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """A run of two processes that was killed at step 12, with checkpoints of steps 7 and 10."""
    run = tmp_path_factory.mktemp("killed") / "run"
    train(*flags, "--run_dir", run, before=die_at(12), processes=2)
    assert steps(run) == [7, 10]
    return run


def tell_what_is_loaded(found):
    """A hook: the checkpoints that are loaded, in `found`."""
    found["loaded"] = []
    after(restore, "load", lambda _, *arguments: found["loaded"].append(arguments[-1].name))


def fail_at_the_moments(rank):
    """A hook: this process cannot load the moments of step 10."""

    def hook(found):
        tell_what_is_loaded(found)

        def load(file, original=restore.load_tensors, **named):
            if file.parts[-2:] == ("step_00000010", "optimizer.bin") and int(os.environ["RANK"]) == rank:
                raise MemoryError
            return original(file, **named)

        restore.load_tensors = load

    return hook


@pytest.mark.parametrize("fault", ["damaged", "fails on the first", "fails on the second"])
def test_all_processes_go_on_from_the_next_older_checkpoint_and_equal_the_uninterrupted_run(
    fault, killed, uninterrupted, tmp_path
):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    hook, loaded = tell_what_is_loaded, [["step_00000007"], ["step_00000007"]]
    if fault == "damaged":
        flip(run / "checkpoints/step_00000010/optimizer.bin")
    else:
        failing = int("second" in fault)
        hook = fail_at_the_moments(failing)
        loaded[1 - failing].insert(0, "step_00000010")
    children = train("--resume_from", run, before=hook, processes=2)
    assert [child.ok().found["loaded"] for child in children] == loaded
    warning = "optimizer.bin is damaged" if fault == "damaged" else "step_00000010 cannot be loaded: MemoryError"
    assert warning in children[0].stderr
    assert f"resumed from {run}/checkpoints/step_00000007" in children[0].stderr
    assert_equal(run, uninterrupted(processes=2))


def test_checkpoint_named_that_one_process_cannot_load_is_refused_on_all(killed, tmp_path):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    children = train("--resume_from", last(run), before=fail_at_the_moments(rank=1), processes=2)
    assert [child.code for child in children] == [1, 1]
    assert f"error: {last(run)} cannot be loaded: MemoryError" in children[0].stderr


def test_checkpoint_asked_for_by_name_is_found_or_refused_but_never_replaced(run):
    for path in checkpoint.all_steps(run / "checkpoints").values():
        assert checkpoint.find(str(path), run / "checkpoints") == path
    flip(last(run) / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        checkpoint.find(str(last(run)), run / "checkpoints")


def test_best_is_found_where_the_newest_checkpoint_says_or_else_by_the_scores(run):
    best = of(run, result(run)["best_step"])
    assert checkpoint.find(f"{run}/best", run / "checkpoints") == best
    flip(best / "model.safetensors")
    states = {path: checkpoint.read_state(path) for path in checkpoint.all_steps(run / "checkpoints").values()}
    scores = {path: state["score"] for path, state in states.items() if state["evaluated"] == state["step"]}
    del scores[best]
    assert len(scores) > 0
    assert checkpoint.find(f"{run}/best", run / "checkpoints") == min(scores, key=scores.get)


def test_best_is_found_without_reading_the_weights_of_others(run, monkeypatch):
    read, original = [], checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: read.append(path) or original(path))
    best = checkpoint.find(f"{run}/best", run / "checkpoints")
    assert len(steps(run)) > 1
    assert {path.parent for path in read if path.name != "trainer_state.json"} == {best}


def test_run_goes_on_from_its_best_or_from_a_checkpoint_by_path(run, tmp_path):
    for name, step in (("best", result(run)["best_step"]), ("checkpoints/step_00000010", 10)):
        copy = shutil.copytree(run, tmp_path / name.replace("/", "-"))
        state = json.loads((of(copy, step) / "trainer_state.json").read_text())
        (child,) = train("--resume_from", f"{copy}/{name}")
        assert f"resumed from {of(copy, step)}" in child.ok().stderr
        assert f"steps      {state['step']} to 16" in child.stderr


def test_run_keeps_the_newest_the_best_and_every_kth(flags, tmp_path):
    # Nothing is learned at a rate of 0, so the first evaluation, at step 7, stays the best.
    own = ["--checkpoint.every", 2, "--checkpoint.keep", 2, "--checkpoint.keep_every", 6, "--optim.lr", 0]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    child.ok()
    kept = [6, 7, 12, 14, 16]
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in kept]


def test_best_whose_save_failed_is_replaced_by_the_best_on_the_disk(flags, tmp_path):
    def fail_at_7(found):
        losses = iter((1.0, 3.0, 2.0))  # of steps 7, 14 and 16
        after(evaluate, "held_out", lambda result, *_: result.update({"eval/loss": next(losses)}))

        def commit(temporary, final, others, original=checkpoint.commit):
            if final.name == "step_00000007":
                raise OSError("broken")
            return original(temporary, final, others)

        checkpoint.commit = commit

    run = tmp_path / "run"
    (child,) = train(*flags, "--run_dir", run, before=fail_at_7)
    assert "warning: a checkpoint could not be saved" in child.ok().stderr
    assert (result(run)["best_step"], result(run)["best"]) == (16, 2)
    assert re.search(r"^warning: the best, of step 7 with eval/loss 1, was lost$", child.stderr, re.M)
    assert re.search(rf"^done: .* was step 16, eval/loss 2; it is exported to {run}/export$", child.stderr, re.M)
    assert checkpoint.find(f"{run}/best", run / "checkpoints") == run / "checkpoints/step_00000016"
    assert "was step 16" in (run / "export/README.md").read_text()


# ---- Security.


class Payload:
    """What does something when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(("file", "what"), [("model", "weights"), ("ema", "average")])
def test_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(file, what, run):
    path = last(run) / f"{file}.safetensors"
    tensors = load_file(path)
    save_file({name: tensors[name] for name in tensors if name != "action_head.decoder.slot"}, path)
    seal(last(run))
    (child,) = train("--resume_from", last(run))
    assert child.code == 1
    assert f"the {what} are not those of this policy: missing action_head.decoder.slot, left over" in child.stderr


PLANTED = {
    "model.safetensors": "cannot be loaded",
    "pytorch_model.bin": "MANIFEST.json does not list model.safetensors",
    "optimizer.bin": "cannot be loaded",
    "random_states_0.pkl": "cannot be loaded",
    "ema.safetensors": "cannot be loaded",
    "trainer_state.json": "cannot be loaded",
    "MANIFEST.json": "is no whole checkpoint",
}


@pytest.mark.parametrize("kind", ["zip", "pickle"])
@pytest.mark.parametrize("file", PLANTED)
def test_planted_pickle_is_refused_and_never_runs(file, kind, run):
    newest, mark, planted = last(run), run / "mark", run / "planted"
    torch.save(Payload(mark), planted, _use_new_zipfile_serialization=kind == "zip")
    torch.load(planted, weights_only=False)
    mark.unlink()  # so it would run
    if file == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    shutil.copy(planted, newest / file)
    if file != "MANIFEST.json":
        seal(newest)
    (child,) = train("--resume_from", newest)
    assert child.code == 1
    (error,) = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert str(newest) in error
    assert PLANTED[file] in error
    assert not mark.exists()


def test_run_with_a_planted_pickle_goes_on_from_the_checkpoint_before(run):
    newest, mark = last(run), run / "mark"
    torch.save(Payload(mark), newest / "optimizer.bin")
    seal(newest)
    (child,) = train("--resume_from", run)
    assert f"{newest} cannot be loaded" in child.ok().stderr
    assert f"resumed from {run}/checkpoints/step_00000015" in child.stderr
    assert not mark.exists()


def test_pickle_that_no_checkpoint_has_is_not_read(run):
    torch.save(Payload(run / "mark"), last(run) / "custom_checkpoint_0.pkl")  # where accelerate looks for more
    seal(last(run))
    (child,) = train("--resume_from", last(run))
    assert f"resumed from {last(run)}" in child.ok().stderr
    assert not (run / "mark").exists()


@pytest.mark.parametrize("way", ["../model.safetensors", "absolute", "sub/model.safetensors", "link"])
def test_path_in_a_manifest_cannot_leave_the_folder(way, run):
    newest, outside = last(run), run / "checkpoints/model.safetensors"
    if way == "link":
        (newest / "model.safetensors").rename(outside)
        (newest / "model.safetensors").symlink_to(outside)
        seal(newest)
        name = "model.safetensors"
    else:
        name = str(outside) if way == "absolute" else way
        (newest / "sub").mkdir()
        for copy in (outside, newest / "sub/model.safetensors"):
            shutil.copy(newest / "model.safetensors", copy)
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        manifest["files"][name] = manifest["files"]["model.safetensors"]
        (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"{newest} does not hold .*{name}"):
        checkpoint.verify(newest)
