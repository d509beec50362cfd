"""What the command line answers: to bad input one line that names the cure, before anything is trained."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from training import NEW_RUN, ROOT, after, command, last, run_module, train

from vla import InputError, config, options
from vla.data import lerobot
from vla.data.lerobot import LeRobotDataset
from vla.data.write import LeRobotWriter


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run of 4 steps, with its checkpoint and export."""
    run = tmp_path_factory.mktemp("finished") / "run"
    (child,) = train(*flags, "--steps", 4, "--run_dir", run)
    child.ok()
    return run


def assert_refused(child, *words):
    """It ended with one line that begins with "error:" and has these words, and with exit code 1."""
    assert child.code == 1, child.stderr
    assert len(child.stderr.splitlines()) == 1, child.stderr
    assert child.stderr.startswith("error: ")
    assert [word for word in words if str(word) not in child.stderr] == [], child.stderr


def assert_nothing_trained(run):
    assert not list(run.glob("checkpoints/*"))
    assert not (run / "metrics.jsonl").exists()


# ---- Flags that are wrong by themselves.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.path data --steps 1", ["--run_dir is missing"]),
        ("--run_dir run --steps 1", ["--data.path is missing"]),
        ("--epochs 2", ["--steps 10", "--epochs 2"]),
        ("--model.freeze vision language_model", ["--model.freeze", "vision;", "vision_encoder"]),
        ("--model.freeze vision_encoder language_model action_head", ["--model.freeze", "nothing to train"]),
        ("--optim.module_lrs head 1e-4", ["--optim.module_lrs", "head;", "action_head"]),
        ("--optim.module_lrs action_head 1e-4 --model.freeze action_head", ["--optim.module_lrs", "--model.freeze"]),
        ("--optim.module_lrs action_head -1e-4", ["--optim.module_lrs", "-0.0001"]),
        ("--optim.module_lrs action_head nan", ["--optim.module_lrs", "nan"]),
        ("--global_batch_size 0", ["--global_batch_size", "0"]),
        ("--micro_batch_size -1", ["--micro_batch_size", "-1"]),
        ("--steps -5", ["--steps", "-5"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--seed 4294967296", ["--seed", "4294967296"]),
        ("--data.workers -1", ["--data.workers", "-1"]),
        ("--data.val_fraction 1", ["--data.val_fraction", "1.0"]),
        ("--data.val_fraction nan", ["--data.val_fraction", "nan"]),
        ("--data.val_fraction 0 --eval.env tabletop", ["--data.val_fraction 0", "--eval.metric success"]),
        ("--data.val_fraction 0 --eval.patience 2", ["--data.val_fraction 0", "--eval.patience 2"]),
        ("--eval.metric success", ["--eval.metric success", "--eval.env"]),
        ("--optim.lr -1", ["--optim.lr", "-1.0"]),
        ("--optim.lr nan", ["--optim.lr", "nan"]),
        ("--optim.lr inf", ["--optim.lr", "inf"]),
        ("--optim.muon_lr 0.01 --optim.eight_bit", ["--optim.muon_lr 0.01", "--optim.eight_bit"]),
        ("--optim.muon_lr 0.01 --optim.lr 0", ["--optim.muon_lr 0.01", "--optim.lr 0.0"]),
        ("--cuda_graphs --model.gradient_checkpointing", ["--cuda_graphs", "--model.gradient_checkpointing"]),
        (
            "--cuda_graphs --model.freeze language_model --model.unfreeze language_model 1",
            ["--cuda_graphs", "--model.unfreeze"],
        ),
        ("--optim.betas 0.9 1.0", ["--optim.betas", "1.0"]),
        ("--optim.betas -0.1 0.9", ["--optim.betas", "-0.1"]),
        ("--optim.warmup_steps -1", ["--optim.warmup_steps", "-1"]),
        ("--optim.clip nan", ["--optim.clip", "nan"]),
        ("--optim.ema 1", ["--optim.ema", "1.0"]),
        ("--optim.schedule step --optim.milestones 60 85", ["--optim.milestones is 60.0"]),
        ("--optim.schedule step --optim.milestones 0", ["--optim.milestones is 0.0"]),
        ("--optim.milestones 0.5", ["--optim.milestones", "schedule step", "cosine"]),
        ("--optim.decay_share 0.5", ["--optim.decay_share", "schedule wsd", "cosine"]),
        ("--optim.schedule constant --optim.final_ratio 0.5", ["--optim.final_ratio", "linear and cosine and wsd"]),
        ("--eval.dataset arm", ["--eval.dataset arm has no effect", "--eval.env"]),
        ("--eval.episodes 5", ["--eval.episodes 5 has no effect", "--eval.env"]),
        ("--data.pad_dims", ["--data.pad_dims has no effect on a single data set"]),
        ("--eval.min_delta nan", ["--eval.min_delta is nan"]),
        ("--eval.min_delta -5", ["--eval.min_delta is -5.0"]),
        ("--eval.patience 1 --eval.every 0", ["--eval.patience 1", "--eval.every 0"]),
        ("--guard.spike_factor 0.5", ["--guard.spike_factor is 0.5", "at least 1"]),
        ("--eval.samples 0", ["--eval.samples", "0"]),
        ("--checkpoint.every 0", ["--checkpoint.every", "0"]),
        ("--checkpoint.keep 0", ["--checkpoint.keep", "0"]),
        (
            "--checkpoint.every 5 --checkpoint.keep_every 7",
            ["--checkpoint.keep_every is 7", "multiple of --checkpoint.every 5"],
        ),
        ("--log.every 0", ["--log.every", "0"]),
        ("--log.profile -1", ["--log.profile", "-1"]),
    ],
)
def test_wrong_flag_is_refused_with_its_value(arguments, words):
    whole = arguments.startswith(("--run_dir", "--data.path"))
    with pytest.raises(InputError) as refused:
        options.parse([*(() if whole else NEW_RUN), *arguments.split()])
    assert [word for word in words if word not in str(refused.value)] == [], refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("epochs", ["nan", "inf", "-1"])
def test_number_of_epochs_must_be_a_number(epochs):
    with pytest.raises(InputError, match=f"--epochs.*{epochs}"):
        options.parse(["--run_dir", "run", "--data.path", "data", "--epochs", epochs])


@pytest.mark.parametrize(
    ("micro", "world_size", "expected"),
    [
        (0, 1, (12, 1)),
        (4, 1, (4, 3)),
        (0, 3, (4, 1)),
        (2, 3, (2, 2)),
        (5, 1, "--micro_batch_size 5 does not divide 12.* one of 1, 2, 3, 4, 6, 12 does"),
        (4, 2, "--micro_batch_size 4 does not divide 6.* one of 1, 2, 3, 6 does"),
        (0, 5, "--global_batch_size 12 cannot be split over 5 processes; 10 or 15 can"),
        (0, 24, "--global_batch_size 12 cannot be split over 24 processes; 24"),
    ],
)
def test_accumulation_follows_from_the_batch_sizes_or_is_refused_with_sizes_that_fit(micro, world_size, expected):
    settings = config.TrainConfig(global_batch_size=12, micro_batch_size=micro)
    if isinstance(expected, tuple):
        assert options.accumulation(settings, world_size) == expected
    else:
        with pytest.raises(InputError, match=expected):
            options.accumulation(settings, world_size)


def test_unknown_flag_is_refused():
    done = command(sys.executable, "train.py", *NEW_RUN, "--model.widht", "32")
    assert done.returncode != 0
    assert "--model.widht" in done.stderr
    assert "Traceback" not in done.stderr


# ---- Flags that do not fit the data, the files or the machine.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.path {tmp}/nowhere", ["{tmp}/nowhere", "--data.path"]),
        ("--data.cameras wrist", ["wrist", "table", "--data.cameras"]),
        ("--data.val_fraction 0.9 --eval.env nowhere", ["nowhere", "tabletop"]),
        ("--micro_batch_size 5", ["--micro_batch_size 5", "12"]),
        ("--model.head regression --model.gripper_dims 3", ["--model.gripper_dims", "[3]", "0 to 2"]),
        ("--model.gripper_dims 2", ["--model.gripper_dims", "--model.head flow"]),
        ("--model.n_action_steps 5", ["--model.n_action_steps", "5", "4"]),
        ("--model.vision_stride 24", ["--model.vision_stride 24", "64x64"]),
        ("--model.width 36", ["--model.width 36", "--model.attention_heads 2"]),
        ("--model.max_tokens 8", ["--model.max_tokens 8"]),
        ("--model.loss.ce 2", ["--model.loss.ce", "--model.head flow"]),
        ("--model.loss.flow 0", ["flow", "0"]),
        ("--init_from {tmp}/nowhere", ["--init_from {tmp}/nowhere"]),
        ("--init_from {tmp}/other.safetensors", ["--init_from {tmp}/other.safetensors", "some.weight", "--model"]),
        ("--init_from {tmp}/objects.pt", ["--init_from {tmp}/objects.pt", "weights alone"]),
        ("--model.freeze vision_encoder --model.unfreeze vision_encoder 16", ["vision_encoder 16", "16 steps"]),
        ("--steps 0 --epochs 1 --model.freeze vision_encoder --model.unfreeze vision_encoder 11", ["the last of 11"]),
        ("--data.augment.shift 0.01", ["--data.augment.shift 0.01 of images of 64x64 ", "at least 0.0157"]),
        ("--log.trackers nonsense", ["--log.trackers nonsense", "tensorboard"]),
        ("--cuda_graphs", ["--cuda_graphs needs a GPU, and this trains on the CPU"]),
        ("--run_dir {tmp}/file/run", ["{tmp}/file/run", "--run_dir"]),
        ("--resume_from {tmp}/empty", ["{tmp}/empty/config.json"]),
        ("--resume_from {tmp}/nowhere", ["{tmp}/nowhere/config.json"]),
        ("--resume_from {tmp}/nowhere/checkpoints/step_00000005", ["{tmp}/nowhere/config.json"]),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_nothing_is_trained(arguments, words, flags, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"weights": object}, tmp_path / "objects.pt")
    arguments = [*flags, "--run_dir", tmp_path / "run", *arguments.format(tmp=tmp_path).split()]
    if "--resume_from" in arguments:
        arguments = arguments[arguments.index("--resume_from") :]
    (child,) = train(*arguments, before=tell_of_pictures)
    assert_refused(child, *(word.format(tmp=tmp_path) for word in words))
    assert_nothing_trained(tmp_path / "run")
    assert not child.found or "--epochs" in arguments  # of which the data set has to say how many steps they are


def tell_of_pictures(found):
    after(lerobot, "open_frames", lambda *_: found.update(opened=True))


def test_script_itself_exits_with_one_line(flags, tmp_path):
    done = command(sys.executable, "train.py", *flags, "--run_dir", tmp_path / "run", "--data.path", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path}/meta/info.json")
    assert_nothing_trained(tmp_path / "run")


def test_run_folder_with_checkpoints_is_not_overwritten(flags, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    (child,) = train(*flags, "--run_dir", finished)
    assert_refused(child, finished, f"--resume_from {finished}", "--run_dir")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_run_without_checkpoints_cannot_be_resumed(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    (child,) = train("--resume_from", tmp_path)
    assert_refused(child, f"{tmp_path}/checkpoints", "--resume_from")
    assert_nothing_trained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 0, "unheard_of": 1}'])
def test_run_with_a_broken_configuration_cannot_be_resumed(content, finished, tmp_path):
    (tmp_path / "config.json").write_text(content)
    (child,) = train("--resume_from", tmp_path)
    assert_refused(child, f"{tmp_path}/config.json")


def rewrite(table_file, edit):
    table = edit(pq.read_table(table_file))
    pq.write_table(table, table_file)


def no_episodes(root):
    for file in root.glob("meta/episodes/*/*.parquet"):
        rewrite(file, lambda table: table.slice(0, 0))


def another_action_dimension(root):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"] |= {"shape": [4], "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))


def not_a_number(root):
    def edit(table):
        values = np.array(table.column("action").to_pylist(), np.float32)
        values[17, 1] = np.nan
        column = pa.array(list(values), table.schema.field("action").type)
        return table.set_column(table.column_names.index("action"), "action", column)

    rewrite(next(root.glob("data/*/*.parquet")), edit)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_episodes, ["meta/episodes", "no episode"]),
        (another_action_dimension, ["action", "3", "4", "info.json"]),
        (not_a_number, ["episode 1: frame 5", "action", "nan"]),
    ],
)
def test_damaged_data_set_is_refused_in_one_line(damage, words, data, flags, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    damage(root)
    (child,) = train(*flags, "--data.path", root, "--run_dir", tmp_path / "run")
    assert_refused(child, root, *words)
    assert_nothing_trained(tmp_path / "run")


@pytest.fixture(scope="module")
def other_robot(tmp_path_factory):
    """A data set of a robot with two joints and one camera."""
    root = tmp_path_factory.mktemp("other") / "data"
    names = {"state_names": ["a", "b"], "action_names": ["a", "b"], "robot_type": "arm"}
    with LeRobotWriter(root, fps=5, cameras={"front": (32, 32)}, **names) as writer:
        for _ in range(3):
            numbers = np.random.default_rng(0).random((6, 2), np.float32)
            images = {"front": np.zeros((6, 3, 32, 32), np.uint8)}
            writer.add_episode(images=images, state=numbers, actions=numbers, instruction="wave")
    LeRobotDataset(root)
    return root


def test_environment_of_another_robot_is_refused(other_robot, flags, tmp_path):
    own = ["--data.path", other_robot, "--eval.env", "tabletop", "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own)
    assert_refused(child, "front", "table, gripper", "tabletop")
    assert_nothing_trained(tmp_path / "run")


def test_resumed_run_refuses_in_one_line(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    (child,) = train("--resume_from", finished, "--optim.lr", "0.5", "--seed", 3)
    assert_refused(child, "--optim.lr 0.5 (the run has 0.001)", "--seed 3 (the run has 0)")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


# ---- The configuration as JSON, and the help.


def test_run_folder_holds_the_whole_configuration(finished):
    settings = options.load(finished / "config.json")
    stored = json.loads((finished / "config.json").read_text())
    assert stored.keys() == {field.name for field in dataclasses.fields(config.TrainConfig)}
    assert settings.steps == 4
    assert settings.model.width == 32


def test_help_names_every_flag_and_imports_no_torch():
    program = f"""
import runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
finally:
    heavy = {{"torch", "accelerate", "pyarrow", "numpy"}} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""
    done = command(sys.executable, "-c", program, env={"COLUMNS": "200"})
    assert done.returncode == 0
    assert done.stderr == "heavy: []\n"
    for name in options.flatten(config.TrainConfig()):
        assert f"--{name}" in done.stdout.replace("-", "_").replace("__", "--"), name


@pytest.mark.parametrize(("before", "after"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5")])
def test_threads_spin_shortly_unless_told_otherwise(before, after, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    program = "import sys, vla, os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    assert command(sys.executable, "-c", program, env=before).stdout == f"{after} False\n"


# ---- The other commands.


@pytest.mark.parametrize("damage", ["statistics are not set", "statistics are missing", "no config.json"])
def test_rollout_refuses_an_export_without_statistics(damage, finished, tmp_path):
    export = shutil.copytree(finished / "export", tmp_path / "export")
    weights = load_file(export / "model.safetensors")
    names = [name for name in weights if name.startswith(("state_norm.", "action_norm."))]
    for name in names:
        if damage == "statistics are not set":
            weights[name].fill_(torch.nan)
        else:
            del weights[name]
    save_file(weights, export / "model.safetensors")
    if damage == "no config.json":
        (export / "config.json").unlink()
    (child,) = run_module("vla.rollout", "--policy", export, "--env", "tabletop")
    words = {"statistics are not set": "statistics", "statistics are missing": "action_norm", "no config.json": export}
    assert_refused(child, words[damage])


def test_rollout_refuses_a_device_that_is_not_there(finished):
    (child,) = run_module("vla.rollout", "--policy", finished / "export", "--env", "tabletop", "--device", "cuda:99")
    assert_refused(child, "--device cuda:99 cannot be used (", "give cpu, or leave it out")


def test_export_refuses_what_is_no_run_in_one_line(finished, tmp_path):
    (child,) = run_module("vla.export", tmp_path)
    assert_refused(child, tmp_path)
    run = shutil.copytree(finished, tmp_path / "run")
    (last(run) / "model.safetensors").write_bytes(b"damaged")
    (child,) = run_module("vla.export", last(run))
    assert_refused(child, last(run) / "model.safetensors")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("vla.checkpoints {run} --language_backbone x", "--language_backbone has no effect without --export"),
        (
            "vla.collect tabletop --out {run}/data --episodes 5 --episodes_per_task 3",
            "found --episodes 5 and --episodes_per_task 3; give one of them",
        ),
        ("vla.rollout --policy {run}/export --env tabletop --backbone x", "has no pretrained backbone; leave out --b"),
        ("vla.export {run} --out {run}/other --backbone x", "has no pretrained backbone; leave out --backbone"),
    ],
)
def test_option_that_would_have_no_effect_is_refused(command, told, finished):
    (child,) = run_module(*command.format(run=finished).split())
    assert_refused(child, told)


def test_collected_data_trains_a_policy_that_acts(flags, tmp_path):
    (collected,) = run_module("vla.collect", "tabletop", "--out", tmp_path / "data", "--episodes", 4, "--workers", 1)
    collected.ok()
    own = ["--data.path", tmp_path / "data", "--steps", 2, "--data.val_fraction", 0.25, "--run_dir", tmp_path / "run"]
    (trained,) = train(*flags, *own)
    trained.ok()
    out = tmp_path / "result.json"
    (acted,) = run_module(
        "vla.rollout", "--policy", tmp_path / "run/export", "--env", "tabletop", "--episodes", 2, "--out", out
    )
    acted.ok()
    assert json.loads(out.read_text())["episodes"] == 2
