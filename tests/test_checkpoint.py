"""A checkpoint is whole or it is not there, and one is always left."""

import itertools
import json
import logging
import os
import resource
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training import after, command, in_children, last, result, steps, train

from vla import InputError, checkpoint, config, export
from vla.model import VLAPolicy
from vla.optim import EMA, parameter_groups

FILES = (
    "MANIFEST.json",
    "config.json",
    "ema.safetensors",
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A finished run whose checkpoints are all kept, the child that made it, and what its policy predicted from a
    batch with the averaged weights at each checkpoint, by step.
    """

    def predict_at_each_save(found):
        found["predictions"], policies, batches = {}, [], []

        def predict(_, accelerator, folder, state, policy_config, ema):
            batch = {name: value[:3] for name, value in batches[0].items()}
            with ema.applied():
                policies[0].eval()
                found["predictions"][state["step"]] = policies[0].predict_chunk(batch).numpy()
                policies[0].train()
            found["batch"] = {name: value.numpy() for name, value in batch.items()}

        def forward(self, batch, original=VLAPolicy.forward):
            batches.append(batch)
            return original(self, batch)

        VLAPolicy.forward = forward
        after(VLAPolicy, "__init__", lambda _, policy, *rest: policies.append(policy))
        after(checkpoint, "save", predict)

    run = tmp_path_factory.mktemp("trained") / "run"
    (child,) = train(*flags, "--checkpoint.keep", 9, "--run_dir", run, before=predict_at_each_save)
    return run, child.ok()


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


# ---- Crashes.


def small_training():
    """What save takes: an accelerator with a prepared model and optimizer, and an average of the weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return accelerator, EMA(accelerator.unwrap_model(model), 0.9)


def commit(training, folder, step, best, keep=1):
    accelerator, ema = training
    checkpoint.save(accelerator, folder, {"step": step, "best_step": best}, {"policy": "config"}, ema)
    checkpoint.rotate(folder, step, keep, 0, best)


def crash_at(number):
    """End the process, as kill -9 does, before the `number`-th line of vla/checkpoint.py, or the `number`-th call
    that changes the file system, whichever the count of both reaches.
    """
    count = itertools.count()
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}

    def tick():
        if next(count) == number:
            os._exit(9)

    def trace(frame, event, _):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            tick()
        return trace

    sys.addaudithook(lambda event, _: tick() if event in changes else None)
    sys.settrace(trace)


def check_after_crash(folder, allowed):
    found = checkpoint.all_steps(folder)
    for path in found.values():
        checkpoint.verify(path)
    assert checkpoint.find(str(folder.parent), folder).name in [f"step_{step:08d}" for step in allowed], list(found)


@pytest.mark.parametrize("case", ["new", "replaces_a_damaged_one"])
def test_crash_at_any_line_of_a_save_leaves_a_good_checkpoint(case, tmp_path):
    def crash_at_every_line(found):
        training = small_training()
        before = tmp_path / "before/checkpoints"
        before.mkdir(parents=True)
        commit(training, before, 1, best=1)
        commit(training, before, 2, best=1)
        allowed, saved = {2, 3}, 3
        if case == "replaces_a_damaged_one":  # the run was resumed from step 1
            commit(training, before, 3, best=1, keep=2)
            (before / "step_00000002/model.safetensors").write_bytes(b"damaged")
            (before / "step_00000003/model.safetensors").write_bytes(b"damaged")
            allowed, saved = {1, 2}, 2
        for number in itertools.count():
            folder = Path(shutil.copytree(before, tmp_path / f"{number}/checkpoints"))
            damaged = {folder / f"step_{step:08d}" for step in (2, 3)} if case != "new" else set()
            if (child := os.fork()) == 0:
                crash_at(number)
                commit(training, folder, saved, best=1)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 9)
            for path in damaged & set(checkpoint.all_steps(folder).values()):
                if (path / "model.safetensors").read_bytes() == b"damaged":
                    shutil.rmtree(path)  # what was damaged before may be so still; all else must verify
            check_after_crash(folder, allowed)
            commit(training, folder, saved, best=1)  # the run goes on, and leaves no rest of the crash behind
            check_after_crash(folder, {saved})
            assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", f"step_{saved:08d}"]
            shutil.rmtree(tmp_path / f"{number}")
            if status == 0:
                found["lines"] = number
                return

    (child,) = in_children(crash_at_every_line)
    assert child.ok().found["lines"] > 100


def test_everything_is_on_the_disk_before_the_rename_commits(tmp_path):
    def watch(found):
        training, events, opened = small_training(), [], {}
        open_, fsync, rename = os.open, os.fsync, Path.rename

        def watched_open(path, *arguments, **named):
            handle = open_(path, *arguments, **named)
            opened[handle] = Path(path).name
            return handle

        def watched_rename(self, target):
            events.append(f"rename to {target.name}")
            return rename(self, target)

        os.open, Path.rename = watched_open, watched_rename
        os.fsync = lambda handle: (events.append(opened[handle]), fsync(handle))
        commit(training, tmp_path, 1, best=None)
        found["events"] = events

    (child,) = in_children(watch)
    events = child.ok().found["events"]
    renamed = events.index("rename to step_00000001")
    assert {*FILES, ".saving_step_00000001"} <= set(events[:renamed])
    assert events.index("MANIFEST.json") > max(events.index(name) for name in FILES if name != "MANIFEST.json")
    assert tmp_path.name in events[renamed:]


@pytest.mark.parametrize(
    ("place", "rank"), [("folder", 0), ("weights", 0), ("random_state", 1), ("commit", 0), ("full_disk", 0)]
)
def test_save_that_fails_on_one_process_fails_on_all_and_commits_nothing(place, rank, flags, tmp_path):
    def fail(found):
        def broken(*_, **__):
            raise OSError(28, "No space left on device")

        def mkdir(self, *arguments, original=Path.mkdir, **named):
            (broken if self.name == ".saving_step_00000010" else original)(self, *arguments, **named)

        def save_state(self, folder, original=Accelerator.save_state, **named):
            if "step_00000010" not in folder:
                return original(self, folder, **named)
            if place == "full_disk":  # what the libraries themselves then raise
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                return original(self, folder, **named)
            return broken()

        def rename(self, target, original=Path.rename):
            return (broken if target.name == "step_00000010" else original)(self, target)

        if int(os.environ["RANK"]) == rank:
            if place == "folder":
                Path.mkdir = mkdir
            elif place == "commit":
                Path.rename = rename
            else:
                Accelerator.save_state = save_state

    own = ["--eval.every", 0, "--run_dir", tmp_path / "run"]
    children = train(*flags, *own, before=fail, processes=2)
    assert [child.code for child in children] == [1, 1], children[rank].stderr
    assert ("No space left" if place != "full_disk" else "Error") in children[rank].stderr
    assert "another process" in children[1 - rank].stderr
    assert steps(tmp_path / "run") == [5]
    checkpoint.verify(last(tmp_path / "run"))


# ---- Verify, find, rotate.


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
}


def test_checkpoint_has_its_files_and_verifies(trained):
    assert sorted(path.name for path in last(trained[0]).iterdir()) == sorted(FILES)
    checkpoint.verify(last(trained[0]))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [name for name in FILES if name != "MANIFEST.json"])
def test_verify_finds_a_damaged_file_and_names_it(file, damage, run):
    DAMAGES[damage](last(run) / file)
    with pytest.raises(InputError, match=file):
        checkpoint.verify(last(run))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": 3}', '{"files": {"model.safetensors": {}}}'])
def test_verify_finds_a_missing_or_broken_manifest(content, run):
    manifest = last(run) / "MANIFEST.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(InputError, match=r"MANIFEST\.json"):
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


def test_find_refuses_when_every_checkpoint_is_damaged(run):
    for path in checkpoint.all_steps(run / "checkpoints").values():
        flip(path / "model.safetensors")
    with pytest.raises(InputError, match="no good checkpoint"):
        checkpoint.find(str(run), run / "checkpoints")
    before = sorted(run.rglob("*"))
    (child,) = train("--resume_from", run)
    assert child.code == 1
    assert "error: " in child.stderr
    assert sorted(run.rglob("*")) == before


def test_checkpoint_asked_for_by_name_is_found_or_refused_but_never_replaced(run):
    for path in checkpoint.all_steps(run / "checkpoints").values():
        assert checkpoint.find(str(path), run / "checkpoints") == path
    flip(last(run) / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        checkpoint.find(str(last(run)), run / "checkpoints")


def test_best_is_found_where_the_newest_checkpoint_says(run):
    best = run / "checkpoints" / f"step_{result(run)['best_step']:08d}"
    assert checkpoint.find(f"{run}/best", run / "checkpoints") == best
    flip(best / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        checkpoint.find(f"{run}/best", run / "checkpoints")


def test_run_goes_on_from_its_best_or_from_a_checkpoint_by_path(run, tmp_path):
    for name, step in (("best", result(run)["best_step"]), ("checkpoints/step_00000010", 10)):
        copy = shutil.copytree(run, tmp_path / name.replace("/", "-"))
        state = json.loads((copy / f"checkpoints/step_{step:08d}/trainer_state.json").read_text())
        (child,) = train("--resume_from", f"{copy}/{name}")
        assert f"resumed from {copy}/checkpoints/step_{step:08d}" in child.ok().stderr
        assert f"steps      {state['step']} to 16" in child.stderr


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "kept"),
    [
        (1, 0, None, [12]),
        (2, 0, 3, [3, 10, 12]),
        (2, 5, 3, [3, 5, 10, 12]),
        (1, 6, 12, [6, 12]),
        (9, 0, None, [3, 5, 6, 10, 12]),
    ],
)
def test_rotation_keeps_the_newest_the_best_and_every_kth(keep, keep_every, best, kept, tmp_path):
    for step in (3, 5, 6, 10, 12):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}/file").touch()
    (tmp_path / ".deleting_step_00000002").mkdir()  # left by a crash
    (tmp_path / ".deleting_step_00000002/file").touch()
    (tmp_path / "notes").touch()
    checkpoint.rotate(tmp_path, 12, keep, keep_every, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *(f"step_{step:08d}" for step in kept)]


def test_run_keeps_the_newest_the_best_and_every_kth(flags, tmp_path):
    # Nothing is learned at a rate of 0, so the first evaluation, at step 7, stays the best.
    own = ["--checkpoint.every", 2, "--checkpoint.keep", 2, "--checkpoint.keep_every", 6, "--optim.lr", 0]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    child.ok()
    kept = [6, 7, 12, 14, 16]
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in kept]


# ---- What is in it.


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_modes_that_the_umask_leaves(umask, tmp_path):
    def save(found):
        os.umask(umask)
        commit(small_training(), tmp_path, 1, best=None)

    (child,) = in_children(save)
    child.ok()
    for path in (tmp_path / "step_00000001").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
    assert stat.S_IMODE((tmp_path / "step_00000001").stat().st_mode) == 0o777 & ~umask


def test_checkpoint_loads_with_plain_load_state(trained):
    path = last(trained[0])

    def load(found):
        policy = VLAPolicy(VLAPolicy.from_pretrained(path).config)
        accelerator = Accelerator(cpu=True)
        settings = config.load(trained[0] / "config.json")
        groups = parameter_groups(policy, settings.optim)
        policy, optimizer = accelerator.prepare(policy, torch.optim.AdamW(groups, betas=settings.optim.betas))
        accelerator.load_state(str(path))
        found["weights"] = {name: value.numpy() for name, value in policy.state_dict().items()}
        found["moments"] = [s["exp_avg"].numpy() for s in optimizer.optimizer.state.values()]

    (child,) = in_children(load)
    saved = load_file(path / "model.safetensors")
    assert child.ok().found["weights"].keys() == saved.keys()
    assert all(value.numpy().tobytes() == child.found["weights"][name].tobytes() for name, value in saved.items())
    moments = [s["exp_avg"] for s in torch.load(path / "optimizer.bin", weights_only=True)["state"].values()]
    assert len(moments) == len(child.found["moments"]) > 0
    assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(moments, child.found["moments"], strict=True))


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_a_tensor_is_json(trained):
    for path in checkpoint.all_steps(trained[0] / "checkpoints").values():
        state = strict_json((path / "trainer_state.json").read_text())
        assert state["step"] == int(path.name.removeprefix("step_"))
        assert {"best", "best_step", "evaluations_since_best", "skipped_updates", "seconds"} <= state.keys()
        manifest = strict_json((path / "MANIFEST.json").read_text())
        assert sorted([*manifest["files"], "MANIFEST.json"]) == sorted(FILES)


def test_checkpoint_folder_is_a_policy(trained):
    path = last(trained[0])
    policy = VLAPolicy.from_pretrained(path)
    saved = load_file(path / "model.safetensors")
    assert policy.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in policy.state_dict().items())
    assert not policy.training


def test_export_has_the_averaged_weights_of_the_best_checkpoint(trained):
    run, _ = trained
    best = run / "checkpoints" / f"step_{result(run)['best_step']:08d}"
    average, weights = load_file(best / "ema.safetensors"), load_file(best / "model.safetensors")
    exported = load_file(run / "export/model.safetensors")
    assert exported.keys() == weights.keys() > average.keys()
    assert all(torch.equal(value, average.get(name, weights[name])) for name, value in exported.items())
    assert not all(torch.equal(value, weights[name]) for name, value in exported.items())


def test_export_predicts_in_a_new_process_what_the_trained_policy_predicted(trained, tmp_path):
    run, child = trained
    batch = {name: torch.from_numpy(value) for name, value in child.found["batch"].items()}
    torch.save(batch, tmp_path / "batch.pt")
    program = """
import sys, torch
from vla.model import VLAPolicy
policy = VLAPolicy.from_pretrained(sys.argv[1])
torch.save(policy.predict_chunk(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""
    paths = [run / "export", tmp_path / "batch.pt", tmp_path / "actions.pt"]
    done = command(sys.executable, "-c", program, *paths)
    assert done.returncode == 0, done.stderr
    expected = torch.from_numpy(child.found["predictions"][result(run)["best_step"]])
    torch.testing.assert_close(torch.load(paths[2], weights_only=True), expected, rtol=0, atol=1e-6)


def test_export_command_writes_the_same_folder_again(run):
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    shutil.rmtree(run / "export")
    export.main(export.ExportConfig(source=str(run)))
    after_ = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert after_.keys() == before.keys()
    assert all(after_[name] == before[name] for name in ("config.json", "model.safetensors"))
    other = run / "checkpoints/step_00000005"
    export.main(export.ExportConfig(source=str(other), out=str(run / "other")))
    exported, average = load_file(run / "other/model.safetensors"), load_file(other / "ema.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in average.items())
