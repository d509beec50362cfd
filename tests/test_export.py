"""Weights on their way into a policy and out of it."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from policies import ARM, TABLETOP, VALUES, tiny
from safetensors.torch import load_file, save_file
from saving import fill, mounted
from training import after, run_module, train

from vla import InputError, NotSaved
from vla.data.stats import statistics
from vla.export import ExportConfig, export, init_from, main
from vla.model import VLAPolicy
from vla.saver import Saver

# ---- Weights on their way in


def weights_of(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


def is_statistic(name):
    return name.startswith(("state_norm.", "action_norm."))


def assert_same_weights(policy, other):
    expected = other.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in policy.state_dict().items() if not is_statistic(name)
    )


WRAPPERS = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "policy."]


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("form", ["state_dict.pt", "nested.pt", "weights.safetensors", "folder"])
def test_weights_of_the_same_policy_are_taken_whole_whatever_wrapped_them(tmp_path, form, prefix):
    policy, other, path = tiny(seed=1), tiny(seed=2), tmp_path / form
    named = {prefix + name: value for name, value in weights_of(other).items()}
    if form == "state_dict.pt":
        torch.save(named, path)
    elif form == "nested.pt":
        torch.save({"state_dict": named, "epoch": 3}, path)
    elif form == "weights.safetensors":
        save_file(named, path)
    else:
        path.mkdir()
        save_file(named, path / "model.safetensors")
    count = sum(not is_statistic(name) for name in policy.state_dict())
    assert init_from(policy, path) == f"--init_from {path}: {count} tensors matched, 0 missing, 0 left over"
    assert_same_weights(policy, other)


def test_statistics_stay_those_of_the_new_data(tmp_path):
    policy, other = tiny(seed=1), tiny(seed=2)
    other.set_statistics([(statistics(VALUES * 9), statistics(VALUES * 9))])
    other.save_pretrained(tmp_path / "export")
    before = weights_of(policy)
    init_from(policy, tmp_path / "export")
    after = policy.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if is_statistic(name))
    assert sum(map(is_statistic, before)) == 8
    assert_same_weights(policy, other)


def test_what_matched_was_missing_and_left_over_is_counted(tmp_path):
    policy, other = tiny(seed=1, chunk_size=16), tiny(seed=2)  # another horizon: the action slots differ in shape
    given = weights_of(other)
    del given["vision_encoder.camera"]
    given |= {f"old.{i}": torch.zeros(1) for i in range(6)}
    torch.save(given, tmp_path / "weights.pt")
    before, count = weights_of(policy), sum(not is_statistic(name) for name in policy.state_dict())
    told = init_from(policy, tmp_path / "weights.pt")
    assert f"{count - 2} tensors matched" in told
    assert "2 missing (action_head.decoder.slot, vision_encoder.camera)" in told
    assert "7 left over (action_head.decoder.slot, old.0, old.1, old.2, old.3 …)" in told
    for name, value in policy.state_dict().items():
        kept = name in ("action_head.decoder.slot", "vision_encoder.camera") or is_statistic(name)
        assert torch.equal(value, before[name] if kept else given[name]), name


def test_backbone_is_taken_from_a_policy_with_another_head(tmp_path):
    policy, other = tiny(seed=1, head="token", bins=8), tiny(seed=2)
    other.save_pretrained(tmp_path / "export")
    init_from(policy, tmp_path / "export")
    assert_same_weights(policy.vision_encoder, other.vision_encoder)
    assert_same_weights(policy.language_model, other.language_model)


def test_weights_that_fit_nowhere_are_refused_and_change_nothing(tmp_path):
    policy = tiny()
    before = weights_of(policy)
    statistic = {name: value for name, value in before.items() if is_statistic(name)}
    for number, given in enumerate([{"encoder.weight": torch.zeros(3)}, statistic, {}]):
        torch.save(given, tmp_path / f"{number}.pt")
        with pytest.raises(InputError, match=rf"{number}.pt: none of its \d tensors fits the policy by name and shape"):
            init_from(policy, tmp_path / f"{number}.pt")
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@dataclass
class Payload:
    """Makes a folder if it is unpickled."""

    folder: str

    def __reduce__(self):
        return Path.mkdir, (Path(self.folder),)


@pytest.mark.parametrize("place", ["beside the weights", "alone"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, place):
    payload, policy = Payload(str(tmp_path / "it ran")), tiny()
    torch.save({**weights_of(policy), "code": payload} if place == "beside the weights" else payload, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w.pt cannot be read as weights alone"):
        init_from(policy, tmp_path / "w.pt")
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "it ran").exists()  # it would have run


def test_what_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "text.pt").write_text("mine")
    (tmp_path / "text.safetensors").write_text("mine")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "numbers.pt")
    for name, told in {
        "nothing": "is neither an export folder nor a file of weights",
        "empty": "is neither an export folder nor a file of weights",
        "run": "is neither .* weights: give .*/run/export or a checkpoint of it",
        "text.pt": "cannot be read as weights alone",
        "text.safetensors": "cannot be read as weights alone",
        "list.pt": "holds no state_dict",
        "numbers.pt": "holds no state_dict",
    }.items():
        with pytest.raises(InputError, match=f"--init_from .*{name} {told}"):
            init_from(tiny(), tmp_path / name)


def test_error_without_words_is_told_by_its_kind(tmp_path, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    (tmp_path / "w.pt").touch()
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(InputError, match=r"w\.pt cannot be read as weights alone: MemoryError$"):
        init_from(tiny(), tmp_path / "w.pt")


# ---- and on their way out


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as a checkpoint is: a policy, and averaged weights of what was trained."""
    policy, average = tiny(seed=1), tiny(seed=2)
    policy.save_pretrained(tmp_path / "step")
    trained = {n: value for n, value in weights_of(average).items() if n.startswith("action_head")}
    save_file(trained, tmp_path / "step/ema.safetensors")
    return tmp_path / "step"


def test_export_holds_the_averaged_weights_and_replaces_the_folder_whole(checkpoint, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    (out / "old.txt").write_text("of an earlier export")
    export(checkpoint, out, "Trained for 7 steps.")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    policy = VLAPolicy.from_pretrained(out)
    assert policy.config == tiny().config
    for part, seed in (("action_head", 2), ("vision_encoder", 1), ("language_model", 1)):
        assert_same_weights(getattr(policy, part), getattr(tiny(seed=seed), part))
    assert torch.equal(policy.action_norm.low, tiny().action_norm.low)
    assert "Trained for 7 steps." in (out / "README.md").read_text()
    assert load_file(checkpoint / "model.safetensors").keys() == load_file(out / "model.safetensors").keys()


@pytest.mark.parametrize("datasets", [(TABLETOP,), (TABLETOP, ARM)], ids=len)
def test_model_card_is_sound_markdown_and_describes_every_robot(tmp_path, datasets):
    tiny(datasets=datasets).save_pretrained(tmp_path / "step")
    export(tmp_path / "step", tmp_path / "export", "Trained for 7 steps.")
    lines = (tmp_path / "export/README.md").read_text().splitlines()
    table = [number for number, line in enumerate(lines) if line.startswith("|")]
    assert table == list(range(table[0], table[-1] + 1))
    assert all(line.endswith("|") for line in lines if line.startswith("|"))
    assert [line for line in lines if "```" in line] == ["```python", "```"]
    code = "\n".join(lines[lines.index("```python") + 1 : lines.index("```")])
    compile(code, "README.md", "exec")
    rows = dict(line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and len(line) > 8)
    if len(datasets) == 1:
        assert rows["cameras"] == "table, gripper at 64x64"
        assert rows["state"] == "tip_x, tip_y, gripper"
        assert rows["actions"] == "dx, dy, gripper at 10 Hz, chunks of 8, 8 executed"
        assert "drive" not in code
    else:
        assert (rows["cameras of tabletop"], rows["cameras of arm"]) == ("table, gripper at 64x64", "gripper at 64x64")
        assert (rows["state of tabletop"], rows["state of arm"]) == ("tip_x, tip_y, gripper", "x, y")
        assert rows["actions of tabletop"] == "dx, dy, gripper at 10 Hz, chunks of 8, 8 executed"
        assert rows["actions of arm"] == "joint_0, joint_1, joint_2, claw at 50 Hz, chunks of 8, 8 executed"
        assert 'policy.drive("tabletop")  # or arm' in code


def test_export_that_finds_no_room_is_told_in_one_line_and_leaves_nothing_half_written(flags, tmp_path):
    run = tmp_path / "disk/run"
    run.parent.mkdir()
    with mounted(run.parent, "size=20m"):
        own = ("--steps", 4, "--log.trackers", "--run_dir", run)
        children = train(*flags, *own, processes=2, before=lambda _: after(Saver, "finish", lambda *_: fill(run)))
        assert [child.code for child in children] == [1, 1]
        (error,) = [line for child in children for line in child.stderr.splitlines() if "rror" in line]
        assert error.startswith(f"error: {run}/export cannot be written (")
        assert sorted(path.name for path in run.iterdir()) == [
            ".lock",
            "checkpoints",
            "config.json",
            "filler",
            "metrics.jsonl",
        ]
        (run / "filler").unlink()
        (child,) = run_module("vla.export", run)
        child.ok()
        assert (run / "export/model.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nothere", "nothere is not there; give the folder of a run, or a checkpoint of it"),
        ("nothere/best", "nothere/best is not there; give"),
        ("run/export", "run/export is an export already; give"),
        ("run/config.json", "run/config.json is no run; give"),
    ],
)
def test_what_is_neither_a_run_nor_a_checkpoint_is_not_exported(trained, source, told):
    run, _ = trained
    with pytest.raises(InputError, match=f"/{told}"):
        main(ExportConfig(str(run.parent / source)))


def test_folder_that_cannot_be_replaced_is_refused(trained, tmp_path, monkeypatch):
    run, _ = trained
    (tmp_path / "here").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with mounted(tmp_path / "disk", "size=20m"):
        for out in (".", "../here", "../disk"):
            with pytest.raises(InputError, match=f"^{re.escape(out)} is the current folder or a mounted one, which"):
                main(ExportConfig(str(run), out))
    assert not list((tmp_path / "here").iterdir())
    main(ExportConfig(str(run), "export"))
    assert VLAPolicy.from_pretrained("export")


def test_export_that_cannot_be_written_names_the_flag_that_helps(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    told = rf"file/out cannot be written \(NotADir.*; make room, or choose another --out, then .* {checkpoint}$"
    with pytest.raises(NotSaved, match=told):
        export(checkpoint, tmp_path / "file/out", "Trained for 7 steps.")


def test_folder_that_a_link_leads_to_is_replaced_and_the_link_stays(checkpoint, tmp_path):
    (tmp_path / "elsewhere/policy").mkdir(parents=True)
    (tmp_path / "elsewhere/policy/old.txt").write_text("of an earlier export")
    (tmp_path / "export").symlink_to(tmp_path / "elsewhere/policy")
    export(checkpoint, tmp_path / "export", "Trained for 7 steps.")
    assert (tmp_path / "export").is_symlink()
    files = {"config.json", "model.safetensors", "README.md"}
    assert {file.name for file in (tmp_path / "elsewhere/policy").iterdir()} == files
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["policy"]
