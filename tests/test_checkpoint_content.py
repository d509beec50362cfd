"""What a checkpoint and an export hold."""

import json
import shutil
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training import command, in_children, last, of, result, steps

from vla import checkpoint, export, options
from vla.model import VLAPolicy
from vla.optim import parameter_groups


def test_buffer_that_is_made_at_the_start_is_large_enough_for_every_save(trained):
    assert trained[1].found["buffers"] == [True] * len(steps(trained[0]))


def test_each_save_is_logged_with_its_times_and_size(trained):
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    saves = [line for line in lines if "save/bytes" in line]
    folders = checkpoint.all_steps(trained[0] / "checkpoints")
    sizes = {step: sum(path.stat().st_size for path in folder.iterdir()) for step, folder in folders.items()}
    manifests = {step: (folder / "MANIFEST.json").stat().st_size for step, folder in folders.items()}
    assert [line["save/bytes"] for line in saves] == [sizes[step] - manifests[step] for step in folders]
    for line, step in zip(saves, folders, strict=True):
        assert line.keys() == {"step", "save/blocked_seconds", "save/commit_seconds", "save/bytes"}
        assert line["step"] >= step
        assert line["save/blocked_seconds"] > 0 < line["save/commit_seconds"]


def test_checkpoint_loads_with_plain_load_state(trained):
    path = last(trained[0])

    def load(found):
        policy = VLAPolicy(VLAPolicy.from_pretrained(path).config)
        accelerator = Accelerator(cpu=True)
        settings = options.load(trained[0] / "config.json")
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
        assert sorted([*manifest["files"], "MANIFEST.json"]) == sorted(file.name for file in path.iterdir())


def test_checkpoint_folder_is_a_policy(trained):
    path = last(trained[0])
    policy = VLAPolicy.from_pretrained(path)
    saved = load_file(path / "model.safetensors")
    assert policy.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in policy.state_dict().items())
    assert not policy.training


def test_export_has_the_averaged_weights_of_the_best_checkpoint(trained):
    run, _ = trained
    best = of(run, result(run)["best_step"])
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


def test_export_command_writes_the_same_folder_again(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
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
