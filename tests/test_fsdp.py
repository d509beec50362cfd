"""One policy sharded over all processes is the same training, and its checkpoints are as good as any."""

import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from saving import broken
from test_guard import spoil
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from training import (
    SHARDED,
    after,
    assert_equal,
    assert_resumes_to,
    assert_stopped,
    both,
    die,
    die_at,
    last,
    rank,
    result,
    run_module,
    series,
    steps,
    the,
    train,
)

import vla.saver
from vla import InputError, checkpoint, evaluate, fsdp, guard
from vla.config import OptimConfig, TrainConfig
from vla.export import init_from
from vla.model import VLAPolicy

SECOND = "model-00002-of-00002.safetensors"


def gathered(folder, kind="model"):
    """The whole tensors of a checkpoint, of either layout."""
    parts = [load_file(file) for file in sorted(folder.glob(f"{kind}-*")) or [folder / f"{kind}.safetensors"]]
    names = {name for part in parts for name in part}
    rows = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: torch.cat(found) if found[0].ndim else found[0] for name, found in rows.items()}


def assert_same_training(run, other):
    """To rounding."""
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/action_error"):
        assert series(run, name) == pytest.approx(series(other, name), abs=5e-5), name
    assert result(run)["best_step"] == result(other)["best_step"]
    for kind in ("model", "ema"):
        expected = gathered(last(other), kind)
        torch.testing.assert_close(gathered(last(run), kind), expected, rtol=0, atol=5e-5)


# ---- The training.

ACCUMULATED = ("--micro_batch_size", 2)
FROZEN, UNFROZEN = ("--model.freeze", "vision_encoder"), ("--model.unfreeze", "vision_encoder", 8)
REGRESSION = ("--model.head", "regression", "--model.gripper_dims", 2, "--model.loss.lm", 0.1)


@pytest.mark.parametrize(
    "own",
    [(), (*ACCUMULATED, *FROZEN, "--model.gradient_checkpointing"), (*REGRESSION, *FROZEN, *UNFROZEN)],
    ids=["plain", "accumulated, a part frozen, activations computed again", "two passes, a part frozen for a time"],
)
def test_sharded_run_is_the_same_training_as_one_that_is_not(own, uninterrupted):
    run = uninterrupted(*own, "--checkpoint.keep", 9, processes=2, env=SHARDED)
    assert sorted(path.name for path in last(run).glob("*.safetensors")) == [
        f"{kind}-0000{k}-of-00002.safetensors" for kind in ("ema", "model", "optimizer") for k in (1, 2)
    ]
    assert_same_training(run, uninterrupted(*own, processes=2))
    if not own:
        assert_same_training(run, uninterrupted())
    first, *_, final = map(gathered, checkpoint.all_steps(run / "checkpoints").values())
    still = ("state_norm", "action_norm", *(["vision_encoder"] if own[2:4] == FROZEN else []))
    for name, value in first.items():
        assert torch.equal(value, final[name]) == name.startswith(still), name


def test_weights_that_stay_whole_between_passes_are_those_of_the_training_after_an_evaluation(uninterrupted):
    own = ("--optim.lr", 0.01, "--eval.every", 3)
    own += ("--checkpoint.every", 100, "--eval.min_delta", 9)  # a save, which a better evaluation asks for, hides it
    run = uninterrupted(*own, processes=2, env=SHARDED | {"FSDP_RESHARD_AFTER_FORWARD": "false"})
    assert_same_training(run, uninterrupted(*own, processes=2))


def test_compiled_sharded_run_is_the_same_training(flags, uninterrupted, tmp_path):
    def graphs_alone(found):
        VLAPolicy.compile = functools.partialmethod(VLAPolicy.compile, backend="aot_eager")

    run = tmp_path / "run"
    own = ["--compile", *ACCUMULATED, "--model.gradient_checkpointing", "--checkpoint.keep", 9, "--run_dir", run]
    for child in train(*flags, *own, before=graphs_alone, processes=2, env=SHARDED):
        child.ok()
    assert_same_training(run, uninterrupted(*ACCUMULATED, "--model.gradient_checkpointing", processes=2))


def test_sharded_run_in_bfloat16_keeps_data_and_losses_in_float32(flags, tmp_path):
    def watch(found):
        def forward(self, batch, original=VLAPolicy.forward):
            output = original(self, batch)
            found["seen"] |= {batch["actions"].dtype, batch["state"].dtype, self.action_head.decoder.slot.dtype}
            return output

        found["seen"], found["given"] = set(), set()
        VLAPolicy.forward = forward
        after(guard.Guard, "checked", lambda _, guarding, loss, *rest: found["given"].add(loss.dtype))

    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for name, env in (("plain", {}), ("sharded", SHARDED)):
        own = ["--model.freeze", "language_model", "--model.unfreeze", "language_model", 8]
        own += ["--run_dir", tmp_path / name]
        children = train(*flags, *own, before=watch, processes=2, env=bf16 | env)
        kept = [child.ok().found for child in children]
    assert kept == 2 * [{"seen": {torch.float32, torch.bfloat16}, "given": {torch.float32}}]
    for name in ("train/loss", "eval/loss", "eval/action_error"):
        expected = series(tmp_path / "plain", name)
        assert series(tmp_path / "sharded", name) == pytest.approx(expected, abs=1e-3), name
    assert {value.dtype for value in gathered(last(tmp_path / "sharded"), "optimizer").values()} == {torch.float32}


def test_each_process_holds_its_rows_and_gathers_one_block_at_a_time(flags, tmp_path):
    def count(found):
        built_for = torch._C._get_accelerator
        torch._C._get_accelerator = lambda *_: torch.device("cuda")  # as most are, also where there is none

        def prepared(objects, *_):
            torch._C._get_accelerator = built_for
            policy = objects[0]
            found["local"] = sum(p.to_local().numel() for p in policy.parameters())
            found["all"] = sum(p.numel() for p in policy.parameters())
            found["units"] = {name for name, part in policy.named_modules() if isinstance(part, FSDPModule)}

        def predict(accelerator, policy, samples, *rest, original=evaluate.held_out):
            values = original(accelerator, policy, samples, *rest)
            found["local again"] = sum(p.to_local().numel() for p in policy.parameters())
            found["chunk"] = policy.predict_chunk(samples.batch([0])).tolist()  # before any forward
            return values

        after(Accelerator, "prepare", prepared)
        evaluate.held_out = predict

    own = ["--steps", 1, "--run_dir", tmp_path / "run"]
    first, second = (child.ok().found for child in train(*flags, *own, before=count, processes=2, env=SHARDED))
    assert first["local"] + second["local"] == first["all"]
    assert second["local"] > 0.48 * first["all"]
    assert {"", "language_model.blocks.0", "action_head.decoder.blocks.0"} <= first["units"]
    assert first["local again"] == first["local"]
    assert first["chunk"] == second["chunk"]


def test_only_the_last_micro_batch_of_a_step_sends_gradients(flags, tmp_path):
    def watch(found):
        found["reduced"], policies = [], []

        def look(_, accelerator, loss):
            reduced = {p.grad is not None for p in policies[0].parameters()}
            found["reduced"].append((accelerator.sync_gradients, reduced))

        after(VLAPolicy, "__init__", lambda _, policy, *rest: policies.append(policy))
        after(Accelerator, "backward", look)

    own = [*ACCUMULATED, "--steps", 3, "--eval.every", 0, "--run_dir", tmp_path / "run"]
    for child in train(*flags, *own, before=watch, processes=2, env=SHARDED):
        assert child.ok().found["reduced"] == 3 * [(False, {False}), (False, {False}), (True, {True})]


@pytest.mark.parametrize("frozen", [(), (*FROZEN, *UNFROZEN)], ids=["all", "a part only after the checkpoint"])
def test_update_that_is_not_finite_is_skipped_and_gone_back_from_by_all(frozen, flags, tmp_path):
    # Step 4 and, one after the other, steps 10 and 11; of each a single sample, in process 1.
    hook, own = spoil([3 * 12 + 11, 9 * 12 + 11, 10 * 12 + 11], "gradient"), ["--guard.bad_steps", 2, *frozen]
    for name, env in (("plain", None), ("sharded", SHARDED)):
        children = train(*flags, *own, "--run_dir", tmp_path / name, before=hook, processes=2, env=env)
        assert f"going back to {tmp_path / name}/checkpoints/step_00000007" in children[0].ok().stderr
        children[1].ok()
    assert result(tmp_path / "sharded")["rollbacks"] == 1
    assert result(tmp_path / "sharded")["skipped_updates"] == result(tmp_path / "plain")["skipped_updates"] == 1
    assert_same_training(tmp_path / "sharded", tmp_path / "plain")


def test_signal_to_one_process_in_an_evaluation_is_heard_by_all(flags, tmp_path):
    def hook(found):
        def go_on(self, doing, original=guard.Guard.go_on):
            if doing == "evaluating at step 7" and rank() == 1:
                seen.append(doing)
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                    while not the(guard.Signals).received:
                        pass
            return original(self, doing)

        seen = []
        guard.Guard.go_on = go_on

    own = ["--eval.samples", 12, *ACCUMULATED]
    children = train(*flags, *own, "--run_dir", tmp_path / "run", before=hook, processes=2, env=SHARDED)
    assert_stopped(tmp_path / "run", children, 7)


REFUSED = {
    "mesh": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "parallelism_config does not go with"),
    "eval.env": ({}, ["--eval.env", "tabletop"], "--eval.env tabletop does not go with.*python -m vla.rollout"),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "mixed_precision: fp16 does not go with.*bf16"),
    "version 1": ({"FSDP_VERSION": "1"}, [], "FSDP version 1; set fsdp_version: 2"),
    "activations": (
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        [],
        "fsdp_activation_checkpointing does not go with.* give --model.gradient_checkpointing",
    ),
    "wrap by size": (
        {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "2000"},
        [],
        "fsdp_auto_wrap_policy: SIZE_BASED_WRAP does not go with.* set it to TRANSFORMER_BASED_WRAP",
    ),
    "meta": ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, [], "fsdp_cpu_ram_efficient_loading does not go with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_sharding_is_refused_in_one_line(case, flags, tmp_path):
    env, own, told = REFUSED[case]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", env=SHARDED | env)
    assert child.code == 1
    (error,) = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(told, error)
    assert not steps(tmp_path / "run")


# ---- The checkpoints of a run.


def test_what_does_not_go_with_shards_is_refused(monkeypatch):
    """Muon only where they are kept on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True))
    on_gpus = SimpleNamespace(distributed_type=DistributedType.FSDP, mixed_precision="no", state=state)
    on_gpus.parallelism_config = None
    fsdp.set_up(on_gpus, TrainConfig())
    with pytest.raises(InputError, match=r"fsdp_offload_params does not go with .* leave out --optim\.muon_lr"):
        fsdp.set_up(on_gpus, TrainConfig(optim=OptimConfig(muon_lr=0.01)))
    with pytest.raises(InputError, match=r"--cuda_graphs does not go with .* leave it out"):
        fsdp.set_up(on_gpus, TrainConfig(cuda_graphs=True))


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """By name, folders of runs that were killed at step 12, with checkpoints of steps 7 and 10."""
    runs = {}
    for name, processes, env in (("sharded", 2, SHARDED), ("plain", 2, None), ("alone", 1, None)):
        runs[name] = tmp_path_factory.mktemp("killed") / "run"
        train(*flags, "--run_dir", runs[name], before=die_at(12), processes=processes, env=env)
        assert steps(runs[name]) == [7, 10]
    return runs


def test_killed_run_that_goes_on_equals_the_uninterrupted_one(killed, uninterrupted, tmp_path):
    run = Path(shutil.copytree(killed["sharded"], tmp_path / "run"))
    assert_resumes_to(run, uninterrupted(processes=2, env=SHARDED), processes=2, env=SHARDED)


def test_run_with_its_shards_in_the_memory_of_the_machine_is_killed_and_goes_on_as_if_they_were_not(
    flags, uninterrupted, tmp_path
):
    def offload(found):
        def plugin(**own):  # on the CPU nothing is offloaded, and without a GPU no memory can be locked for one
            return FullyShardedDataParallelPlugin(**own | {"cpu_offload": CPUOffloadPolicy(pin_memory=False)})

        def look(objects, *_):
            found["offload"] = type(objects[0]._get_fsdp_state()._fsdp_param_group.offload_policy)

        fsdp.FullyShardedDataParallelPlugin = plugin
        after(Accelerator, "prepare", look)

    run = tmp_path / "run"
    env = SHARDED | {"FSDP_OFFLOAD_PARAMS": "true"}  # what the launcher makes of 4gpu_fsdp_offload.yaml
    train(*flags, "--run_dir", run, before=both(offload, die_at(12)), processes=2, env=env)
    assert steps(run) == [7, 10]
    for child in train("--resume_from", run, before=offload, processes=2, env=env):
        assert child.ok().found["offload"] is CPUOffloadPolicy
    assert_equal(run, uninterrupted(processes=2, env=SHARDED))


@pytest.mark.parametrize(
    ("begun", "processes", "env"),
    [("sharded", 1, None), ("sharded", 2, None), ("sharded", 3, SHARDED), ("plain", 2, SHARDED), ("alone", 1, SHARDED)],
)
def test_run_goes_on_in_another_mode_with_another_number_of_processes(
    begun, processes, env, killed, uninterrupted, tmp_path
):
    run = Path(shutil.copytree(killed[begun], tmp_path / "run"))
    children = train("--resume_from", run, processes=processes, env=env)
    assert f"resumed from {run}/checkpoints/step_00000010" in children[0].ok().stderr
    assert bool(list(last(run).glob("model-*"))) == bool(env)
    assert_same_training(run, uninterrupted(processes=2))


def test_run_goes_on_with_a_warning_when_another_process_cannot_write(flags, uninterrupted, tmp_path):
    def hook(found):
        def save(tensors, path, original=vla.saver.save_file):
            return (broken if path.parts[-2:] == (".saving_step_00000010", SECOND) else original)(tensors, path)

        vla.saver.save_file = save

    run = tmp_path / "run"
    children = train(*flags, "--run_dir", run, before=hook, processes=2, env=SHARDED)
    warnings = [line for child in children for line in child.ok().stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert (
        "could not be saved (OSError: process 1: OSError: first line): the newest is of step 7; 1 of 3" in warnings[0]
    )
    assert steps(run)[-1] == 16
    assert not list((run / "checkpoints").glob(".*"))
    assert_equal(run, uninterrupted(processes=2, env=SHARDED))


@pytest.mark.parametrize("dying", [0, 1])
def test_process_killed_as_it_writes_leaves_the_checkpoint_before(dying, flags, uninterrupted, tmp_path):
    def hook(found):
        def save(tensors, path, original=vla.saver.save_file):
            original(tensors, path)
            if path.parent.name == ".saving_step_00000010" and path.name.startswith("optimizer") and rank() == dying:
                die()

        vla.saver.save_file, vla.saver.PATIENCE = save, 0

    run = tmp_path / "run"
    children = train(*flags, "--run_dir", run, before=hook, processes=2, env=SHARDED)
    assert [child.code for child in children][dying] == -signal.SIGKILL
    assert steps(run)[-1] == 7
    assert_resumes_to(run, uninterrupted(processes=2, env=SHARDED), processes=2, env=SHARDED)
    assert not list((run / "checkpoints").glob(".*"))


def test_checkpoint_and_export_are_policies_with_all_rows(uninterrupted, tmp_path):
    run = uninterrupted(processes=2, env=SHARDED)
    weights, average = gathered(last(run)), gathered(last(run), "ema")
    assert {len(value) for value in weights.values() if value.ndim} >= {1, 3}  # fewer rows than, or uneven over, 2
    policy = VLAPolicy.from_pretrained(last(run))
    assert policy.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    for parameter in policy.parameters():
        nn.init.zeros_(parameter)
    assert ", 0 missing, 0 left over" in init_from(policy, last(run))
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    run_module("vla.export", last(run), "--out", tmp_path / "export")[0].ok()
    exported = load_file(tmp_path / "export/model.safetensors")
    assert exported.keys() == weights.keys() > average.keys() > set()
    assert all(torch.equal(value, average.get(name, weights[name])) for name, value in exported.items())


@pytest.mark.parametrize("file", [SECOND, "optimizer-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors"])
def test_missing_file_of_one_process_is_named(file, uninterrupted, tmp_path, capsys):
    run = Path(shutil.copytree(uninterrupted(processes=2, env=SHARDED), tmp_path / "run"))
    (child,) = run_module("vla.checkpoints", run, "--verify")
    assert "damaged" not in child.ok().stderr
    (last(run) / file).unlink()
    with pytest.raises(InputError, match=f"does not hold what its MANIFEST.json lists: look at {file}$"):
        checkpoint.verify(last(run))
    manifest = json.loads((last(run) / "MANIFEST.json").read_text())
    del manifest["files"][file]
    (last(run) / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"MANIFEST.json does not list {file}$"):
        checkpoint.verify(last(run))
    (child,) = run_module("vla.checkpoints", run)
    assert f"MANIFEST.json does not list {file}" in child.ok().stderr
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("model")}
    (last(run) / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"does not list .*model-00001-of-00002.safetensors, model-00002"):
        checkpoint.verify(last(run))
