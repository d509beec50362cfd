"""Training on pretrained backbones, from the first step to the export: tiny models of each family, in train.py."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_guard import spoil
from training import SHARDED, after, assert_equal, die_at, metrics, of, result, run_module, series, train

from vla import guard
from vla.model import VLAPolicy

ADAPTERS = ("--lora.rank", "4", "--lora.modules", "language_model", "vision_encoder")
FROZEN = ("--model.freeze", "vision_encoder", "language_model")
THAWED = (*FROZEN, "--model.unfreeze", "language_model", "6", "vision_encoder", "9")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """models(family) -> the flags of a backbone of this family, made once; composed ones by their vision part."""
    root = tmp_path_factory.mktemp("models")
    whole = ("--model.language_layers", "0", "--model.vision_blocks", "1")  # in place of what small trainings have

    def made(write, folder, *family):
        return str(folder if folder.exists() else write(*family, folder))

    def flags(family):
        if family in tiny.VLMS:
            return ("--model.backbone", made(tiny.vlm, root / family, family), *whole)
        vision = made(tiny.vision, root / family, family)
        language = made(tiny.language, root / "language")
        return ("--model.vision_backbone", vision, "--model.language_backbone", language, *whole)

    return flags


@pytest.mark.parametrize("family", [*tiny.VLMS, *tiny.VISIONS])
def test_each_family_learns_the_table(family, models, flags, tmp_path):
    own = ("--model.head", "regression", "--model.width", 64, "--steps", 60, "--optim.schedule", "constant")
    (child,) = train(*flags, *models(family), *own, "--run_dir", tmp_path / "run")
    child.ok()
    loss = list(series(tmp_path / "run", "train/loss").values())
    assert sum(loss[-10:]) < 0.95 * sum(loss[:10])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "own",
    [(*ADAPTERS, "--lora.dropout", "0.2"), (*ADAPTERS, "--model.gradient_checkpointing"), FROZEN, THAWED],
    ids=["dropout", "recomputed", "frozen", "thawed"],
)
def test_killed_and_resumed_run_equals_uninterrupted_run(own, processes, models, uninterrupted, flags, tmp_path):
    own = (*models("qwen3_vl"), *own)
    killed = train(*flags, *own, "--run_dir", tmp_path / "run", processes=processes, before=die_at(12))
    assert {child.code for child in killed} == {-signal.SIGKILL}
    for child in train("--resume_from", tmp_path / "run", processes=processes):
        child.ok()
    assert_equal(tmp_path / "run", uninterrupted(*own, processes=processes))


def test_each_process_drops_others_of_its_inputs_also_when_it_is_new_to_the_run(models, flags, tmp_path):
    def hook(found):
        def dropped(input, p, training, inplace, original=torch.nn.functional.dropout):
            output = original(input, p, training, inplace)
            if training and p > 0:
                found["masks"].append((output == 0).flatten()[:64].tolist())
            return output

        torch.nn.functional.dropout, found["masks"] = dropped, []
        after(guard.Guard, "__init__", lambda *_: found.update(masks=[]))  # what came before was not learned

    own = (*models("qwen3_vl"), *ADAPTERS, "--lora.dropout", 0.5, "--steps", 1, "--run_dir", tmp_path / "run")
    begun = train(*flags, *own, processes=2, before=hook)
    resumed = train("--resume_from", tmp_path / "run", "--steps", 2, processes=3, before=hook)
    for children in (begun, resumed):
        masks = [str(mask) for child in children for mask in child.ok().found["masks"]]
        assert len(set(masks)) == len(masks) > 0
    assert resumed[2].found["masks"][0] not in begun[0].found["masks"]


def test_sharded_run_with_adapters_resumes_exactly(models, uninterrupted, flags, tmp_path):
    own = (*models("paligemma"), *ADAPTERS)
    train(*flags, *own, "--run_dir", tmp_path / "run", processes=2, env=SHARDED, before=die_at(12))
    for child in train("--resume_from", tmp_path / "run", processes=2, env=SHARDED):
        child.ok()
    whole = uninterrupted(*own, processes=2)
    assert series(tmp_path / "run", "train/loss") == pytest.approx(series(whole, "train/loss"), rel=1e-4)


def test_checkpoint_holds_what_is_trained_alone_and_the_export_drives_without_network(models, flags, tmp_path):
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(models("smolvlm")[1], base)
    (child,) = train(*flags, *models("smolvlm"), "--model.backbone", base, *ADAPTERS, "--run_dir", run)
    assert f"pretrained {base}" in child.ok().stderr
    kept = load_file(run / "checkpoints/step_00000016/model.safetensors")
    assert all("lora_" in name or name.startswith(("action_head.", "state_norm.", "action_norm.")) for name in kept)
    (child,) = run_module("vla.export", run, "--merge")
    child.ok()

    code = "import sys; from vla.model import VLAPolicy; print(VLAPolicy.from_pretrained(sys.argv[1]).config.lora.rank)"
    command, offline = [sys.executable, "-c", code], os.environ | {"HF_HUB_OFFLINE": "1"}
    adapters = subprocess.run([*command, run / "export"], capture_output=True, text=True, env=offline)
    assert adapters.stdout == "4\n"
    shutil.rmtree(base)  # what is merged does not need it
    merged = subprocess.run([*command, run / "merged"], capture_output=True, text=True, env=offline)
    assert merged.stdout == "0\n", merged.stderr


def test_merging_twice_gives_the_same_folder(models, flags, tmp_path):
    run = tmp_path / "run"
    train(*flags, *models("smolvlm"), *ADAPTERS, "--run_dir", run)[0].ok()
    merged = []
    for _ in range(2):
        run_module("vla.export", run, "--merge")[0].ok()
        merged.append({path.name: path.read_bytes() for path in (run / "merged").rglob("*") if path.is_file()})
    assert merged[0] == merged[1]
    assert VLAPolicy.from_pretrained(run / "export").config.lora.rank == 4  # which it left alone


def test_run_does_not_go_on_with_other_weights_under_its_adapters(models, flags, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models("smolvlm")[1], base)
    train(*flags, *models("smolvlm"), "--model.backbone", base, *ADAPTERS, "--run_dir", tmp_path / "run")[0].ok()
    tiny.vlm("smolvlm", base, seed=1)
    (child,) = train("--resume_from", tmp_path / "run", "--steps", "20")
    assert child.code == 1
    assert "--model.backbone" in child.stderr
    assert "Traceback" not in child.stderr


def test_trained_backbone_goes_on_without_the_weights_that_it_began_with(models, flags, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models("smolvlm")[1], base)
    train(*flags, *models("smolvlm"), "--model.backbone", base, "--run_dir", tmp_path / "run")[0].ok()
    shutil.rmtree(base)
    train("--resume_from", tmp_path / "run", "--steps", "20")[0].ok()
    VLAPolicy.from_pretrained(tmp_path / "run/export")


def test_run_that_died_before_its_first_checkpoint_begins_again_on_another_backbone(models, flags, tmp_path):
    own = ("--steps", "4", "--run_dir", tmp_path / "run")
    train(*flags, *models("smolvlm"), *own, before=die_at(2))
    train(*flags, *models("qwen3_vl"), *own)[0].ok()
    policy = VLAPolicy.from_pretrained(tmp_path / "run/export")
    assert policy.vision_encoder.kind == "qwen3_vl"


def test_unfrozen_parts_learn_from_their_step_on_and_not_before(models, flags, tmp_path):
    run = tmp_path / "run"
    keep = ("--checkpoint.every", "2", "--checkpoint.keep", "9", "--optim.ema", "0")
    train(*flags, *models("smolvlm"), *THAWED, *keep, "--run_dir", run)[0].ok()
    files = {step: load_file(of(run, step) / "model.safetensors") for step in (2, 4, 6, 8, 10, 16)}
    parts = {step: {name.partition(".")[0] for name in kept} for step, kept in files.items()}
    everything = {"action_head", "state_norm", "action_norm", "language_model", "vision_encoder"}
    assert all(found == everything for found in parts.values())  # as soon as a part will ever be trained
    base = load_file(f"{models('smolvlm')[1]}/model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    before = base["model.text_model.layers.0.mlp.up_proj.weight"]
    assert files[6][name].equal(before)
    assert not files[8][name].equal(before)
    assert {"lr/language_model", "lr/vision_encoder"} <= {name for line in metrics(run) for name in line}


def test_policy_of_its_own_imports_no_library_of_pretrained_models():
    code = "import sys, vla.learner, vla.export; print({'transformers', 'peft', 'bitsandbytes'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_weights_from_elsewhere_stay_under_frozen_parts_and_adapters(models, flags, tmp_path):
    own = (*models("smolvlm"), "--steps", "4")
    train(*flags, *own, "--optim.lr", "1e-2", "--run_dir", tmp_path / "first")[0].ok()
    learned = load_file(tmp_path / "first/export/model.safetensors")
    for run, parts in (("frozen", FROZEN), ("adapted", ADAPTERS)):
        run = tmp_path / run
        train(*flags, *own, *parts, "--init_from", tmp_path / "first/export", "--run_dir", run)[0].ok()
        train("--resume_from", run, "--steps", "6")[0].ok()
        exported = VLAPolicy.from_pretrained(run / "export").state_dict()
        same = [
            exported[name].equal(learned[name.replace(".base_layer", "")])
            for name in exported
            if "up_proj" in name and "lora" not in name
        ]
        assert same
        assert all(same)


def test_adapters_of_other_weights_or_settings_are_refused(models, flags, tmp_path):
    other = tiny.vlm("smolvlm", tmp_path / "other", seed=1)
    train(*flags, *models("smolvlm"), *ADAPTERS, "--run_dir", tmp_path / "first")[0].ok()
    begin = (*flags, "--init_from", tmp_path / "first/export", "--run_dir", tmp_path / "second")
    for own in ((), ("--lora.rank", "8"), (*ADAPTERS, "--model.backbone", other)):
        (child,) = train(*begin, *models("smolvlm"), *own)
        assert child.code == 1
        assert "has adapters of other settings (--lora) or on other weights (--model.backbone)" in child.stderr


def test_run_whose_base_has_moved_goes_on_and_exports(models, flags, tmp_path):
    shutil.copytree(models("smolvlm")[1], tmp_path / "base")
    train(*flags, *models("smolvlm"), "--model.backbone", tmp_path / "base", *ADAPTERS, "--run_dir", tmp_path / "run")[
        0
    ].ok()
    (tmp_path / "base").rename(tmp_path / "moved")
    acting = ("--policy", tmp_path / "run/export", "--env", "tabletop", "--episodes", 1, "--out", tmp_path / "out.json")
    for module, *arguments in (
        ("vla.export", tmp_path / "run", "--merge"),
        ("vla.checkpoints", tmp_path / "run", "--export", "best", tmp_path / "again"),
        ("vla.rollout", *acting),
    ):
        (child,) = run_module(module, *arguments)
        assert "base: there is no such folder; give the one where it lies now (of an export: --backbone" in child.stderr
        run_module(module, *arguments, "--backbone", tmp_path / "moved")[0].ok()
    merged = VLAPolicy.from_pretrained(tmp_path / "run/merged")
    assert not merged.config.lora.rank
    train("--resume_from", tmp_path / "run", "--steps", "18", "--model.backbone", tmp_path / "moved")[0].ok()
    assert VLAPolicy.from_pretrained(tmp_path / "run/export").config.model.backbone == str(tmp_path / "moved")


def test_run_that_has_its_whole_backbone_keeps_its_kind(models, flags, tmp_path):
    train(*flags, *models("smolvlm"), "--run_dir", tmp_path / "run")[0].ok()
    (child,) = train("--resume_from", tmp_path / "run", "--steps", "18", "--model.backbone", models("paligemma")[1])
    assert child.code == 1
    assert "these flags disagree: --model.backbone" in child.stderr


def test_run_that_goes_back_to_before_parts_were_trained_has_them_as_they_were(models, flags, tmp_path):
    back = ("--guard.bad_steps", "2", "--checkpoint.every", "5", "--checkpoint.keep", "9", "--optim.ema", "0")
    own = (*models("smolvlm"), *FROZEN, "--model.unfreeze", "language_model", "6", *back)
    train(*flags, *own, "--run_dir", tmp_path / "run", before=spoil([8 * 12, 9 * 12]))[0].ok()
    assert result(tmp_path / "run")["rollbacks"] == 1
    kept = load_file(tmp_path / "run/checkpoints/step_00000005/model.safetensors")
    whole = VLAPolicy.from_pretrained(tmp_path / "run/checkpoints/step_00000005").state_dict()
    assert whole.keys() - kept.keys() == {name for name in whole if name.startswith("vision_encoder.model.")}
