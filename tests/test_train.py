"""What one run of train.py does, learns, skips and writes down."""

import io
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import (
    after,
    assert_equal,
    die_at,
    everything,
    in_children,
    last,
    metrics,
    of,
    result,
    run_module,
    series,
    steps,
    train,
    weights,
)

from vla import evaluate, learner
from vla.config import OptimConfig
from vla.data.lerobot import LeRobotDataset
from vla.data.mixture import Mixture
from vla.data.stream import Samples, split
from vla.model import VLAPolicy
from vla.optim import parameter_groups
from vla.options import load

TERMS = {
    "flow": (["--model.head", "flow"], {"flow"}),
    "regression": (["--model.head", "regression", "--model.gripper_dims", "2"], {"l1", "bce"}),
    "token": (["--model.head", "token", "--model.bins", "16"], {"ce"}),
    "instruction": (["--model.loss.lm", "0.1"], {"flow", "lm"}),
}


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run of 16 steps, and what was found at its start and end: the policy's first weights."""
    run = tmp_path_factory.mktemp("finished") / "run"
    (child,) = train(*flags, "--run_dir", run, before=keep_first_weights)
    return run, child.ok()


def keep_first_weights(found):
    def keep(_, policy, *rest):
        found["weights"] = {name: value.numpy().copy() for name, value in policy.state_dict().items()}

    after(learner, "parameter_groups", keep)


# ---- What learns.


@pytest.mark.parametrize("frozen", ["vision_encoder", "language_model", "action_head"])
def test_frozen_module_stays_as_it_was_and_the_others_learn(frozen, finished, flags, tmp_path):
    # From trained weights: the last layer of a new head is 0, and lets no gradient through to the others.
    own = ["--init_from", finished[0] / "export", "--model.freeze", frozen, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=keep_first_weights)
    first, ended = child.ok().found["weights"], weights(tmp_path / "run")
    exported = load_file(tmp_path / "run/export/model.safetensors")
    for module in ("vision_encoder", "language_model", "action_head"):
        names = [name for name in ended if name.startswith(module)]
        same = [ended[name].numpy().tobytes() == first[name].tobytes() for name in names]
        assert all(same) if module == frozen else not any(same), module
    for name in (name for name in exported if name.startswith(frozen)):
        assert exported[name].numpy().tobytes() == first[name].tobytes()
    assert not [name for name in series_names(tmp_path / "run") if name.startswith(f"lr/{frozen}")]


@pytest.mark.parametrize("head", TERMS)
def test_loss_falls_and_each_of_its_terms_is_logged(head, flags, tmp_path):
    arguments, terms = TERMS[head]
    own = ["--steps", 60, "--eval.every", 30, "--optim.lr", "3e-3"]
    (child,) = train(*flags, *own, *arguments, "--run_dir", tmp_path / "run")
    child.ok()
    names = series_names(tmp_path / "run")
    reserved = ("train/loss", "train/grad_norm", "train/skipped_updates")
    assert {name for name in names if name.startswith("train/")} == {*reserved, *(f"train/{term}" for term in terms)}
    loss = list(series(tmp_path / "run", "train/loss").values())
    assert sum(loss[-10:]) < 0.95 * sum(loss[:10])
    settings = load(tmp_path / "run/config.json").model.loss
    for line in (line for line in metrics(tmp_path / "run") if "train/loss" in line):
        total = sum(getattr(settings, term) * line[f"train/{term}"] for term in terms)
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("micro", "decay", "clip"), [(12, 0.9, 1.6), (4, 0.3, 0)])
def test_run_is_the_training_that_is_written_here(micro, decay, clip, data, flags, tmp_path):
    own = ["--micro_batch_size", micro, "--optim.clip", clip, "--optim.betas", 0.6, 0.8, "--optim.weight_decay", 0.5]
    own += ["--optim.ema", decay, "--optim.schedule", "constant", "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=keep_first_weights)
    first = {name: torch.tensor(value) for name, value in child.ok().found["weights"].items()}
    policy, dataset = VLAPolicy.from_pretrained(tmp_path / "run/export"), LeRobotDataset(data)
    policy.load_state_dict(first)
    mine, _ = split(dataset.episodes, 0.05, 0)
    samples = Samples(Mixture([dataset]), [mine], policy.tokenize(dataset.instructions), 4, 0, shuffle=True)
    groups = parameter_groups(policy, OptimConfig(weight_decay=0.5))
    optimizer, norms = torch.optim.AdamW(groups, betas=(0.6, 0.8)), {}
    average = {name: value.clone() for name, value in policy.state_dict().items()}
    for step in range(16):
        policy(samples.batch(range(12 * step, 12 * step + 12)))["loss"].backward()
        norms[step + 1] = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip or math.inf).item()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 4)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in policy.state_dict().items():
            average[name].lerp_(value, 1 - min(decay, (1 + step) / (10 + step)))
    assert min(norms.values()) < 1.6 < max(norms.values())  # of which some are cut, and not all
    assert series(tmp_path / "run", "train/grad_norm") == pytest.approx(norms, rel=1e-3)
    for file, expected in (("model", policy.state_dict()), ("ema", average)):
        for name, value in weights(tmp_path / "run", f"{file}.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=3e-5)


def test_modules_learn_at_their_own_rates(flags, tmp_path):
    own = ["--optim.module_lrs", "vision_encoder", "1e-4", "action_head", "5e-3", "--optim.schedule", "constant"]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    child.ok()
    peaks = {"vision_encoder": 1e-4, "language_model": 1e-3, "action_head": 5e-3}
    for module, peak in peaks.items():
        for suffix in ("", "/no_decay"):
            rates = series(tmp_path / "run", f"lr/{module}{suffix}")
            assert rates == pytest.approx({step: peak * min(1, step / 4) for step in range(1, 17)})


def test_bfloat16_trains_parameters_that_stay_float32(finished, flags, tmp_path):
    (child,) = train(*flags, "--run_dir", tmp_path / "run", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    child.ok()
    assert result(tmp_path / "run")["precision"] == "bf16"
    for name in ("train/loss", "eval/loss"):
        half, full = series(tmp_path / "run", name), series(finished[0], name)
        assert half == pytest.approx(full, rel=0.05)
        assert half != full
    saved = [weights(tmp_path / "run"), weights(tmp_path / "run", "ema.safetensors")]
    saved.append(load_file(tmp_path / "run/export/model.safetensors"))
    assert {value.dtype for tensors in saved for value in tensors.values()} == {torch.float32}


def test_init_from_starts_from_those_weights_with_the_new_statistics(finished, flags, tmp_path):
    run, _ = finished
    # Nothing is learned at a rate of 0; the other split has other statistics.
    own = ["--init_from", run / "export", "--optim.lr", 0, "--seed", 5, "--data.val_fraction", 0.5]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    given, ended = load_file(run / "export/model.safetensors"), weights(tmp_path / "run")
    learned = [name for name in given if not name.startswith(("state_norm.", "action_norm."))]
    assert f"{len(learned)} tensors matched, 0 missing, 0 left over" in child.ok().stderr
    assert "72 frames of 6 episodes to train on, 72 frames of 6 held out" in child.stderr
    assert all(torch.equal(ended[name], given[name]) for name in learned)
    assert not torch.equal(ended["state_norm.offset"], given["state_norm.offset"])


def test_init_from_takes_what_fits_and_tells_the_rest(finished, flags, tmp_path):
    run, _ = finished
    own = ["--init_from", run / "export", "--model.head_layers", 2, "--model.head", "regression", "--optim.lr", 0]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    report = next(line for line in child.ok().stderr.splitlines() if "tensors matched" in line)
    assert "action_head.action.weight" in report  # of the flow head, which regression does not have
    given, ended = load_file(run / "export/model.safetensors"), weights(tmp_path / "run")
    backbone = [name for name in given if name.startswith(("vision_encoder.", "language_model."))]
    assert backbone
    assert all(torch.equal(ended[name], given[name]) for name in backbone)


# ---- The same again.


def test_same_seed_is_the_same_run_and_another_seed_another(finished, flags, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        (child,) = train(*flags, "--seed", seed, "--run_dir", tmp_path / name)
        child.ok()
    assert_equal(finished[0], tmp_path / "again")
    here, there = everything(finished[0]), everything(tmp_path / "other")
    assert here["metrics/0/train/loss"] != there["metrics/0/train/loss"]
    assert here["weights/action_head.decoder.state.weight"] != there["weights/action_head.decoder.state.weight"]


def test_deterministic_algorithms_give_the_same_run_twice(flags, tmp_path):
    def note(found):
        after(VLAPolicy, "forward", lambda *_: found.update(on=torch.are_deterministic_algorithms_enabled()))

    for name in ("first", "second"):
        (child,) = train(*flags, "--deterministic", "--run_dir", tmp_path / name, before=note)
        assert child.ok().found["on"]
    assert_equal(tmp_path / "first", tmp_path / "second")


def test_evaluating_twice_gives_the_same_numbers_to_the_bit(finished, data, tmp_path):
    run, _ = finished

    def evaluate_twice(found):
        policy, dataset, settings = (
            VLAPolicy.from_pretrained(run / "export"),
            LeRobotDataset(data),
            load(run / "config.json"),
        )
        _, held_out = split(dataset.episodes, settings.data.val_fraction, settings.seed)
        samples = Samples(
            Mixture([dataset]), [held_out], policy.tokenize(dataset.instructions), 4, settings.seed, shuffle=False
        )
        arguments = Accelerator(cpu=True), policy, samples, settings.eval.samples
        found["values"] = [evaluate.held_out(*arguments, batch_size=size) for size in (12, 12, 1)]

    (child,) = in_children(evaluate_twice)
    first, second, one_by_one = child.ok().found["values"]
    assert first == second
    assert one_by_one == pytest.approx(first, abs=1e-6)
    best = series(run, "eval/loss")[result(run)["best_step"]]
    assert first["eval/loss"] == best == result(run)["best"]


def test_evaluations_in_a_run_differ_by_the_weights_alone(flags, tmp_path):
    # Nothing is learned at a rate of 0.
    own = ["--optim.lr", 0, "--eval.every", 2, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own)
    child.ok()
    losses = series(tmp_path / "run", "eval/loss")
    assert list(losses) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert len(set(losses.values())) == 1


def test_evaluating_and_saving_change_nothing_in_the_training(finished, flags, tmp_path):
    own = ["--eval.every", 2, "--eval.env", "tabletop", "--eval.episodes", 1, "--checkpoint.every", 1, "--log.every", 4]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run")
    child.ok()
    for name, value in weights(finished[0]).items():
        assert torch.equal(weights(tmp_path / "run")[name], value)
    whole, seldom = series(finished[0], "train/loss"), series(tmp_path / "run", "train/loss")
    assert seldom == {step: whole[step] for step in (4, 8, 12, 16)}


def test_evaluation_that_is_not_finite_is_never_the_best(flags, tmp_path):
    def broken_first(found):
        def spoil(values, *_):
            found["evaluations"] = found.get("evaluations", 0) + 1
            if found["evaluations"] == 1:
                values.update(dict.fromkeys(values, math.nan))

        after(evaluate, "held_out", spoil)

    (child,) = train(*flags, "--run_dir", tmp_path / "run", before=broken_first)
    child.ok()
    assert math.isfinite(result(tmp_path / "run")["best"])
    assert result(tmp_path / "run")["best_step"] > 7


def test_best_has_the_highest_success_and_patience_counts_from_it(flags, tmp_path):
    def succeed(found):
        rates = iter((0.2, 0.5, 0.55, 0.8, 0.1, 0.85))  # 0.55 and 0.85 are no improvement by 0.1
        after(evaluate, "closed_loop", lambda result, *_: result[0].update({"eval/success": next(rates)}))

    own = ["--eval.env", "tabletop", "--eval.episodes", 1, "--eval.metric", "success", "--eval.every", 2]
    own += ["--eval.patience", 2, "--eval.min_delta", 0.1, "--run_dir", tmp_path / "run"]
    (child,) = train(*flags, *own, before=succeed)
    assert "stopped at step 12: eval/success got no better in 2 evaluations" in child.ok().stderr
    told = result(tmp_path / "run")
    assert (told["best"], told["best_step"], told["evaluations_since_best"]) == (0.8, 8, 2)
    assert json.loads((of(tmp_path / "run", 8) / "trainer_state.json").read_text())["score"] == -0.8


# ---- How long.


@pytest.mark.parametrize(("epochs", "expected"), [("0.5", 6), ("1", 11), ("1.1", 13)])
def test_epochs_are_steps_over_the_training_frames(epochs, expected, flags, tmp_path):
    place = flags.index("--steps")
    arguments = [*flags[:place], *flags[place + 2 :], "--epochs", epochs]  # of 132 frames, 12 to a step
    (child,) = train(*arguments, "--run_dir", tmp_path / "run")
    child.ok()
    assert result(tmp_path / "run")["step"] == expected
    assert result(tmp_path / "run")["samples"] == 12 * expected


def test_run_on_all_episodes_evaluates_nothing_and_exports_its_last_checkpoint(flags, tmp_path):
    run, own = tmp_path / "run", ("--data.val_fraction", 0, "--checkpoint.keep", 9, "--optim.warmup_steps", 16)
    train(*flags, *own, "--run_dir", run, before=die_at(12))
    assert "resumed from" in (resumed := train("--resume_from", run)[0].ok().stderr)
    assert "warning: the warm-up (--optim.warmup_steps 16) takes the whole run" in resumed
    assert f"done: the last of 16 steps of 12 samples was step 16; it is exported to {run}/export" in resumed
    assert not any(name.startswith("eval/") for line in metrics(run) for name in line)
    assert (result(run)["best"], result(run)["best_step"], result(run)["metric"]) == (None, 16, None)
    train(*flags, *own, "--run_dir", tmp_path / "whole")[0].ok()
    assert_equal(run, tmp_path / "whole")
    assert steps(run) == [5, 10, 15, 16]  # none for an evaluation
    run_module("vla.export", run, "--out", tmp_path / "again")[0].ok()
    assert (tmp_path / "again/model.safetensors").read_bytes() == (run / "export/model.safetensors").read_bytes()


def test_finished_run_can_be_made_longer(flags, tmp_path):
    (child,) = train(*flags, "--steps", 8, "--run_dir", tmp_path / "run")
    child.ok()
    (longer,) = train("--resume_from", tmp_path / "run", "--steps", 12)
    assert "steps      8 to 12" in longer.ok().stderr
    assert list(series(tmp_path / "run", "train/loss")) == list(range(1, 13))
    assert load(tmp_path / "run/config.json").steps == 12


# ---- What is written down.


def series_names(run):
    return {name for line in metrics(run) for name in line} - {"step"}


def test_metrics_and_result_tell_the_whole_run(finished):
    run, _ = finished
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged, evaluations = [x for x in lines if "train/loss" in x], [x for x in lines if "eval/loss" in x]
    assert [line["step"] for line in logged] == list(range(1, 17))
    assert [line["step"] for line in evaluations] == [7, 14, 16]
    groups = [f"lr/{m}{s}" for m in ("vision_encoder", "language_model", "action_head") for s in ("", "/no_decay")]
    performance = ["perf/samples_per_second", "perf/data_wait_share", "perf/eta_seconds"]
    for line in logged:
        assert line.keys() >= {"train/flow", "train/grad_norm", "train/skipped_updates", *groups, *performance}
        assert line["perf/samples_per_second"] > 0
        assert 0 <= line["perf/data_wait_share"] <= 1
        assert line["train/grad_norm"] > 0
    assert logged[-1]["perf/eta_seconds"] == 0 < logged[0]["perf/eta_seconds"]
    for line in evaluations:
        errors = [line[f"eval/action_error/{name}"] for name in ("dx", "dy", "gripper")]
        assert line["eval/action_error"] == pytest.approx(sum(errors) / 3)

    told = json.loads((run / "result.json").read_text())
    best = min(evaluations, key=lambda line: line["eval/loss"])
    assert (told["step"], told["samples"]) == (16, 16 * 12)
    assert (told["best"], told["best_step"]) == (best["eval/loss"], best["step"])
    assert told["last"].items() >= (evaluations[-1] | logged[-1]).items() - {("step", 16)}
    assert told["versions"].keys() >= {"python", "torch", "accelerate", "device"}
    assert told["config"]["steps"] == 16
    assert told["seconds"] > 0
    assert told["peak_memory_gb"] > 0


def test_environment_draws_images_of_the_size_that_the_data_have_before_they_are_resized(flags, tmp_path):
    def note(found):
        after(evaluate, "closed_loop", lambda _, accelerator, policy, *given: found.update(given=given))

    own = ["--data.image_size", 32, 32, "--eval.env", "tabletop", "--eval.episodes", 1, "--steps", 1]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=note)
    assert child.ok().found["given"] == ("tabletop", 1, 64)


def test_tensorboard_has_every_number_the_first_images_the_settings_and_the_rollouts(flags, tmp_path):
    def keep_first_batch(found):
        after(VLAPolicy, "forward", lambda _, policy, batch: found.setdefault("images", batch["images"].numpy()))

    own = ["--eval.env", "tabletop", "--eval.episodes", 3, "--steps", 4, "--eval.every", 2]
    (child,) = train(*flags, *own, "--run_dir", tmp_path / "run", before=keep_first_batch)
    child.ok()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"images": 0}).Reload()
    assert series_names(tmp_path / "run") <= set(events.Tags()["scalars"])
    for name in ("train/loss", "eval/loss", "eval/success"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx(series(tmp_path / "run", name), rel=1e-6)
    (pictures,) = events.Images("first_batch")
    pixels = np.asarray(Image.open(io.BytesIO(pictures.encoded_image_string)))
    tiles = (
        pixels.reshape(pixels.shape[0] // 64, 64, pixels.shape[1] // 64, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)
    )
    images = child.found["images"][:8].transpose(0, 1, 3, 4, 2).reshape(-1, 64, 64, 3)  # of 8 samples and 2 cameras
    assert pictures.step == 0
    assert sorted(tile.tobytes() for tile in tiles) == sorted(image.tobytes() for image in images)
    videos = events.Images("rollout")
    assert [video.step for video in videos] == [2, 4]
    assert videos[0].encoded_image_string.startswith(b"GIF89a")
    assert "optim.lr" in str(events.Tensors("config/text_summary")[0])


def test_run_without_trackers_writes_its_metrics_all_the_same(flags, tmp_path):
    (child,) = train(*flags, "--log.trackers", "--run_dir", tmp_path / "run")
    child.ok()
    assert not (tmp_path / "run/tensorboard").exists()
    assert list(series(tmp_path / "run", "train/loss")) == list(range(1, 17))


def test_run_without_average_exports_the_weights_themselves(flags, tmp_path):
    (child,) = train(*flags, "--optim.ema", 0, "--eval.every", 0, "--run_dir", tmp_path / "run")
    child.ok()
    exported = load_file(tmp_path / "run/export/model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in weights(tmp_path / "run").items())
    assert not (last(tmp_path / "run") / "ema.safetensors").exists()
