"""`python -m vla.checkpoints`: what it says of a run is true, and what it deletes is not missed."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from training import flip, of, run_module, steps, train

from vla import InputError, checkpoint, checkpoints, export
from vla.checkpoints import CheckpointsConfig
from vla.options import load

ROW = re.compile(r" *(\d+)  +(\d+ \w+)  +(\d\S+B)  (.+)")


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run with checkpoints of steps 5 (the best), 10, 15 and 16."""
    run = tmp_path_factory.mktemp("finished") / "run"
    every = ["--eval.every", 5, "--eval.min_delta", 100, "--checkpoint.keep", 9]
    (child,) = train(*flags, *every, "--run_dir", run)
    child.ok()
    assert steps(run) == [5, 10, 15, 16]
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def say(run, capsys):
    """What the command prints about the run."""

    def said(**options) -> str:
        checkpoints.main(CheckpointsConfig(str(run), **options))
        return capsys.readouterr().out

    return said


def rows(text: str) -> dict[int, str]:
    """What the table says of each step."""
    return {int(match[1]): match[4] for match in map(ROW.fullmatch, text.splitlines()) if match}


def size(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def everything(folder: Path) -> dict[Path, tuple]:
    """All that is in a folder, with what would tell of a change."""
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def keep(run: Path, **settings) -> None:
    """Change the run's settings of rotation."""
    content = json.loads((run / "config.json").read_text())
    content["checkpoint"] |= settings
    (run / "config.json").write_text(json.dumps(content))


def rewrite(path: Path, **counters) -> None:
    """Change counters of a checkpoint as if they had been committed so; None takes one away."""
    file, manifest = path / "trainer_state.json", path / "MANIFEST.json"
    state = {name: value for name, value in (json.loads(file.read_text()) | counters).items() if value is not None}
    file.write_text(json.dumps(state))
    content = json.loads(manifest.read_text())
    content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint._sha256(file)}
    manifest.write_text(json.dumps(content))


@contextlib.contextmanager
def in_use(run: Path):
    """Another process holds the run, as a training does. Yields its id."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold() -> None:
        checkpoint.lock(run)
        there.send(os.getpid())
        there.recv()

    holder = context.Process(target=hold, daemon=True)
    holder.start()
    yield here.recv()
    here.send("enough")
    holder.join()


# ---- List.


def test_list_shows_each_step_the_best_the_newest_and_the_sizes(run, say, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(99e9, 87e9, 12e9))
    os.utime(of(run, 10), (0, time.time() - 2.5 * 86400))
    said = say()
    score = checkpoint.read_state(of(run, 5))["score"]
    assert rows(said) == {5: f"good, best (loss {score:.4g})", 10: "good", 15: "good", 16: "good, newest"}
    matches = {int(match[1]): match for match in map(ROW.fullmatch, said.splitlines()) if match}
    assert matches[10][2] == "2 days"
    assert matches[10][3] == f"{size(of(run, 10)) / 1e6:.3g}MB"
    assert f"{size(run / 'checkpoints') / 1e6:.3g}MB in all, 12.0GB free" in said


def test_list_names_what_crashes_left_and_counts_its_size(run, say):
    names = (".saving_step_00000020", ".deleting_step_00000004", ".replaced_step_00000005")
    for name in names:
        shutil.copytree(of(run, 5), run / "checkpoints" / name)
    said = say()
    assert [name for name in names if f"{name}: left over" not in said] == []
    assert f"{size(run / 'checkpoints') / 1e6:.3g}MB in all, " in said


def test_list_and_verify_leave_a_running_job_alone(run, say):
    shutil.copytree(of(run, 5), run / "checkpoints/.saving_step_00000020")
    (of(run, 10) / "model.safetensors").write_bytes(b"damaged")
    with in_use(run):
        before = everything(run)
        say()
        with pytest.raises(InputError, match="damaged"):
            say(verify=True)
        assert everything(run) == before


def test_list_needs_no_lock_file(run, say):
    (run / ".lock").unlink()
    say()
    assert not (run / ".lock").exists()


def test_truncated_file_is_found_by_the_list_and_named(run, say):
    file = of(run, 16) / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-1])
    said = say()
    assert rows(said)[16] == "damaged"
    assert rows(said)[15] == "good, newest"
    assert "step 16: optimizer.bin is damaged" in said


def test_flipped_byte_is_found_by_verify_alone(run):
    flip(of(run, 10) / "model.safetensors")
    (listed,) = run_module("vla.checkpoints", run)
    assert rows(listed.ok().stderr)[10] == "good"
    assert "--verify" in listed.stderr
    (verified,) = run_module("vla.checkpoints", run, "--verify")
    assert verified.code == 1
    assert rows(verified.stderr)[10] == "damaged"
    assert "step 10: model.safetensors is damaged" in verified.stderr
    assert verified.stderr.splitlines()[-1].startswith("error: 1 of 4 checkpoints")


def test_verify_of_a_good_run_exits_with_0_and_shows_its_progress(run):
    (child,) = run_module("vla.checkpoints", run, "--verify")
    assert rows(child.ok().stderr).keys() == {5, 10, 15, 16}
    assert "verifying" in child.stderr
    assert "--verify" not in child.stderr


def test_counters_that_are_no_json_are_damage_even_if_their_size_is_right(run, say):
    file = of(run, 16) / "trainer_state.json"
    file.write_bytes(b"?" * len(file.read_bytes()))
    said = say()
    assert rows(said)[16] == "damaged"
    assert "step 16: trainer_state.json" in said


def test_best_is_the_one_of_the_lowest_score_if_the_best_was_lost(run, say):
    shutil.rmtree(of(run, 5))
    scores = {step: checkpoint.read_state(of(run, step))["score"] for step in (10, 15, 16)}
    step = min(scores, key=scores.get)
    assert f"best (loss {scores[step]:.4g})" in rows(say())[step]


def test_best_of_equals_is_the_one_that_the_run_itself_would_take(run, say):
    for step in (10, 15, 16):
        rewrite(of(run, step), best_step=99, score=-1.0)
    assert checkpoint.find(str(run / "best"), run / "checkpoints") == of(run, 16)
    assert rows(say()) == {5: "good", 10: "good", 15: "good", 16: "good, best (loss -1), newest"}


def test_checkpoint_of_another_version_is_told_from_a_good_one(run, say):
    rewrite(of(run, 10), score=None)
    said = say()
    assert rows(said)[10] == "damaged"
    assert "step 10: trainer_state.json has no 'score'" in said


def test_success_is_shown_as_a_share_though_its_score_is_negative(run, capsys):
    state = {"step": 5, "metric": "success", "score": -0.75}
    checkpoints.show(run / "checkpoints", {of(run, 5): state}, {}, {}, of(run, 5))
    assert rows(capsys.readouterr().out) == {5: "good, best (success 0.75), newest"}


@pytest.mark.parametrize("moment", ["before it is looked at", "once it was verified", "before the best is sought"])
def test_checkpoint_that_rotation_deletes_meanwhile_is_left_out(moment, run, say, monkeypatch):
    function = "best" if moment == "before the best is sought" else "verify"
    original = getattr(checkpoint, function)

    def rotating(*arguments, **named):
        if moment == "once it was verified":
            original(*arguments, **named)
        if of(run, 10).exists() and (function == "best" or arguments[0] == of(run, 10)):
            shutil.rmtree(of(run, 10))
            if function == "best":
                shutil.rmtree(of(run, 5))  # else the best is found before the one that is missing
        return original(*arguments, **named) if moment != "once it was verified" else None

    monkeypatch.setattr(checkpoint, function, rotating)
    said = say()
    assert rows(said).keys() == ({15, 16} if function == "best" else {5, 15, 16})
    assert "best" in said
    assert "step 10:" not in said


def test_row_that_vanishes_while_the_table_is_printed_is_left_out(run, capsys):
    found = checkpoints.look(run / "checkpoints", hashes=False)
    shutil.rmtree(of(run, 10))
    checkpoints.show(run / "checkpoints", *found)
    assert rows(capsys.readouterr().out).keys() == {5, 15, 16}


def test_run_without_a_checkpoint_is_an_empty_table(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    checkpoints.main(CheckpointsConfig(str(tmp_path)))
    said = capsys.readouterr().out
    assert rows(said) == {}
    assert "0.00B in all" in said


@pytest.mark.parametrize("path", ["", "best", "checkpoints", "checkpoints/step_00000010"])
def test_every_way_to_name_a_run_lists_it(path, finished, capsys):
    checkpoints.main(CheckpointsConfig(str(finished / path)))
    assert rows(capsys.readouterr().out).keys() == {5, 10, 15, 16}


@pytest.mark.parametrize("flag", [[], ["--verify"], ["--prune"], ["--export", "best", "out"]])
@pytest.mark.parametrize("path", ["nowhere", "empty", "file", "nowhere/checkpoints/step_00000010"])
def test_folder_that_is_no_run_is_refused_in_one_line(path, flag, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = everything(tmp_path)
    (child,) = run_module("vla.checkpoints", tmp_path / path, *flag)
    assert child.code == 1
    assert child.stderr.splitlines() == [child.stderr.strip()]
    assert child.stderr.startswith(f"error: {tmp_path / path} is no run")
    assert everything(tmp_path) == before


# ---- Export.


def test_export_of_a_step_has_its_averaged_weights(run, say, tmp_path):
    assert "exported to" in say(export=("10", str(tmp_path / "policies/out")))
    exported = load_file(tmp_path / "policies/out/model.safetensors")
    weights = load_file(of(run, 10) / "model.safetensors") | load_file(of(run, 10) / "ema.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in exported.items())


def test_export_of_the_best_is_what_the_run_exported(run, say, tmp_path):
    say(export=("best", str(tmp_path / "out")))
    export.main(export.ExportConfig(str(run), str(tmp_path / "other")))
    for folder in (tmp_path / "other", run / "export"):
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_export_refuses_a_damaged_checkpoint_and_writes_nothing(run, tmp_path):
    flip(of(run, 10) / "model.safetensors")
    (child,) = run_module("vla.checkpoints", run, "--export", 10, tmp_path / "out")
    assert child.code == 1
    assert child.stderr.splitlines()[-1].startswith(f"error: {of(run, 10)}/model.safetensors is damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wanted", ["11", "newest", "-5"])
def test_export_of_a_step_that_is_not_there_is_refused_with_those_that_are(wanted, say, tmp_path):
    with pytest.raises(InputError, match=f"--export {wanted}: expected one of best, 5, 10, 15, 16"):
        say(export=(wanted, str(tmp_path / "out")))


def test_export_does_not_replace_a_folder_that_is_no_export(run, say):
    before = everything(run)
    for folder in (run, of(run, 5), run / "config.json"):
        with pytest.raises(InputError, match="other things than an export"):
            say(export=("best", str(folder)))
    assert everything(run) == before
    say(export=("10", str(run / "export")))
    assert everything(run) != before


# ---- Prune.


def test_prune_deletes_what_is_damaged_left_over_or_superseded_and_says_what_it_frees(run, say):
    keep(run, keep=1)
    flip(of(run, 16) / "model.safetensors")
    left = [run / "checkpoints" / name for name in (".saving_step_00000020", ".deleting_step_00000010")]
    left.append(run / "checkpoints/.replaced_step_00000005")
    for path in left:
        shutil.copytree(of(run, 5), path)
    freed = size(*left, of(run, 10), of(run, 16))
    said = say(prune=True)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000005", "step_00000015"]
    deleted = said.split("deleting ")[1]
    assert [path.name for path in (*left, of(run, 10), of(run, 16)) if path.name not in deleted] == []
    assert "step_00000005," not in deleted.replace(".replaced_step_00000005,", "")
    assert "step_00000015" not in deleted
    assert f"frees {tqdm.format_sizeof(freed, 'B')}" in deleted


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"keep": 9}, [5, 10, 15, 16]),
        ({"keep": 2}, [5, 15, 16]),
        ({"keep": 1}, [5, 16]),
        ({"keep": 1, "keep_every": 10}, [5, 10, 16]),
    ],
)
def test_prune_keeps_what_the_run_itself_would_keep(settings, left, run, say, tmp_path):
    keep(run, **settings)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    state = checkpoint.read_state(of(run, 16))
    checkpoint.rotate(other / "checkpoints", state, load(run / "config.json").checkpoint, is_good=Path.is_dir)
    assert steps(other) == left
    say(prune=True)
    assert steps(run) == left
    before = everything(run / "checkpoints")
    assert "deleting nothing" in say(prune=True)
    assert everything(run / "checkpoints") == before


def test_prune_keeps_what_a_run_in_a_bad_streak_may_go_back_to(run, say):
    keep(run, keep=1)
    rewrite(of(run, 16), bad_in_a_row=4)
    say(prune=True)
    assert steps(run) == [5, 10, 16]  # the best, the newest from before step 12, the newest


def test_prune_keeps_the_last_good_checkpoint_however_old(run, say):
    keep(run, keep=1)
    for step in (10, 15, 16):
        flip(of(run, step) / "optimizer.bin")
    say(prune=True)
    assert steps(run) == [5]
    checkpoint.verify(of(run, 5))


def test_prune_deletes_nothing_if_no_checkpoint_is_good(run, say):
    for step in steps(run):
        flip(of(run, step) / "optimizer.bin")
    shutil.copytree(of(run, 5), run / "checkpoints/.saving_step_00000020")
    before = everything(run / "checkpoints")
    with pytest.raises(InputError, match="no good checkpoint, so nothing is deleted"):
        say(prune=True)
    assert everything(run / "checkpoints") == before


def test_prune_of_a_damaged_best_keeps_the_best_that_is_left(run, say):
    keep(run, keep=1)
    flip(of(run, 5) / "model.safetensors")
    scores = {step: checkpoint.read_state(of(run, step))["score"] for step in (10, 15, 16)}
    say(prune=True)
    assert steps(run) == sorted({min(scores, key=scores.get), 16})


def test_prune_takes_back_a_checkpoint_that_a_crash_left_replaced_by_nothing(run, say):
    of(run, 16).rename(run / "checkpoints/.replaced_step_00000016")
    assert rows(say(prune=True))[16] == "good, newest"
    assert steps(run) == [5, 10, 15, 16]


def test_prune_is_refused_at_once_while_the_run_is_in_use(run):
    keep(run, keep=1)
    shutil.copytree(of(run, 5), run / "checkpoints/.saving_step_00000020")
    with in_use(run) as holder:
        before = everything(run)
        (child,) = run_module("vla.checkpoints", run, "--prune")
        assert child.code == 1
        assert child.stderr.splitlines() == [child.stderr.strip()]
        assert child.stderr.startswith(f"error: {run} is in use by process {holder} on ")
        assert everything(run) == before
    (child,) = run_module("vla.checkpoints", run, "--prune")
    child.ok()
    assert steps(run) == [5, 16]
