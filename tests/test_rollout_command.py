"""python -m vla.rollout."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from policies import ARM, TABLETOP, tiny
from training import command

from vla import InputError, rollout, sim
from vla.model import VLAPolicy
from vla.rollout import RolloutConfig, interval
from vla.sim.tabletop import Tabletop


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout") / "export"
    tiny().save_pretrained(folder)
    return folder


def test_command_writes_results_and_a_moving_picture(exported, tmp_path, capsys):
    out, gif = tmp_path / "result.json", tmp_path / "episodes.gif"
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=3, out=str(out), gif=str(gif), device="cpu"))
    result = json.loads(out.read_text())
    seeds = [1_000_000, 1_000_001, 1_000_002]
    assert (result["episodes"], result["seeds"], result["env"]) == (3, seeds, "tabletop")
    assert (result["policy"], result["n_action_steps"]) == (str(exported), 8)
    assert result["success_rate"] == sum(result["successes"]) / 3
    assert result["interval"] == list(interval(sum(result["successes"]), 3))
    worlds = [Tabletop() for _ in seeds]
    instructions = [world.reset(seed)["instruction"] for world, seed in zip(worlds, seeds, strict=True)]
    assert result["instructions"].keys() == set(instructions)
    assert sum(each["episodes"] for each in result["instructions"].values()) == 3
    assert f"success rate in tabletop: {100 * result['success_rate']:.1f} %" in capsys.readouterr().out
    with Image.open(gif) as picture:
        assert picture.format == "GIF"
        assert picture.n_frames > 1
        assert picture.width >= 2 * 192  # three episodes, two of them side by side


def test_command_takes_other_steps_of_a_chunk(exported, tmp_path):
    out = tmp_path / "result.json"
    options = {"seed": 7, "n_action_steps": 3, "out": str(out), "device": "cpu"}
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=2, **options))
    result = json.loads(out.read_text())
    assert (result["seeds"], result["n_action_steps"]) == ([7, 8], 3)


def test_command_acts_in_as_many_episodes_at_once_as_it_is_told(exported, monkeypatch):
    sizes, collate = set(), VLAPolicy.collate
    monkeypatch.setattr(VLAPolicy, "collate", lambda p, seen, key: (sizes.add(len(seen)), collate(p, seen, key))[1])
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=3, batch_size=2, device="cpu"))
    assert max(sizes) == 2


def test_command_with_an_ensemble_predicts_at_every_step(exported, tmp_path, monkeypatch):
    predicted, predict = [], VLAPolicy.predict_chunk
    monkeypatch.setattr(VLAPolicy, "predict_chunk", lambda p, batch: (predicted.append(1), predict(p, batch))[1])
    options = {"ensemble": 0.01, "out": str(tmp_path / "result.json"), "device": "cpu"}
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=1, **options))
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(predicted) == result["mean_steps"]
    assert (result["ensemble"], result["n_action_steps"]) == (0.01, 1)


@pytest.mark.parametrize(("asked", "drawn"), [(0, 64), (32, 32)])
def test_command_draws_as_the_policy_sees_or_as_its_data_were(exported, tmp_path, monkeypatch, asked, drawn):
    sizes, collate = set(), VLAPolicy.collate
    monkeypatch.setattr(
        VLAPolicy, "collate", lambda p, seen, key: (sizes.add(seen[0]["images"].shape), collate(p, seen, key))[1]
    )
    options = {"image_size": asked, "out": str(tmp_path / "result.json"), "device": "cpu"}
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=1, **options))
    assert sizes == {(2, 3, drawn, drawn)}
    assert json.loads((tmp_path / "result.json").read_text())["image_size"] == drawn


@pytest.mark.parametrize("chosen", ["", "tabletop", "more", "arm"])
def test_command_drives_the_robot_that_is_in_the_environment(tmp_path, chosen):
    others = (ARM, replace(TABLETOP, name="more")) if chosen == "more" else (ARM,)
    tiny(datasets=(*others, TABLETOP)).save_pretrained(tmp_path / "export")
    options = {"dataset": chosen, "baselines": True, "out": str(tmp_path / "result.json"), "device": "cpu"}
    config = RolloutConfig(str(tmp_path / "export"), "tabletop", episodes=1, **options)
    if chosen == "arm":
        with pytest.raises(InputError, match="the cameras of arm"):
            rollout.main(config)
    else:
        rollout.main(config)
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["dataset"], len(result["baselines"])) == (chosen or "tabletop", 4)


def test_baselines_are_the_expert_an_untrained_policy_and_this_one_blinded_or_misled(exported, tmp_path, monkeypatch):
    seen, collate = set(), VLAPolicy.collate

    def recorded(policy, observations, key):
        for each in observations:
            weights = "exported" if torch.equal(policy.vision_encoder.camera, tiny().vision_encoder.camera) else "new"
            seen.add((weights, tuple(each["state"]), each["instruction"], bool(each["images"].any())))
        return collate(policy, observations, key)

    monkeypatch.setattr(VLAPolicy, "collate", recorded)
    out = tmp_path / "result.json"
    rollout.main(RolloutConfig(str(exported), "tabletop", 2, baselines=True, out=str(out), device="cpu"))
    scenes = [Tabletop().reset(sim.TEST_SEEDS + i) for i in range(2)]
    starts, words = [tuple(scene["state"]) for scene in scenes], [scene["instruction"] for scene in scenes]
    for start, own, other in zip(starts, words, reversed(words), strict=True):
        assert {(weights, text, sighted) for weights, state, text, sighted in seen if state == start} == {
            ("exported", own, True),
            ("exported", own, False),
            ("exported", other, True),
            ("new", own, True),
        }
    baselines = json.loads(out.read_text())["baselines"]
    assert len(baselines) == 4
    assert baselines["expert"] == {"success_rate": 1.0, "interval": list(interval(2, 2)), "episodes": 2}
    assert baselines["untrained"]["success_rate"] < 1


def test_summary_counts_by_instruction():
    episodes = [rollout.Episode(s, text, s > 1, steps=s) for s, text in enumerate(["b", "a", "b", "b"])]
    summary = rollout.summary(episodes, {})
    assert summary["success_rate"] == 0.5
    assert summary["mean_steps"] == 1.5
    assert (summary["seeds"], summary["successes"]) == ([0, 1, 2, 3], [False, False, True, True])
    assert summary["instructions"] == {
        "a": {"success_rate": 0.0, "episodes": 1},
        "b": {"success_rate": 2 / 3, "episodes": 3},
    }


@pytest.mark.parametrize("policy", ["nothing/at/all", "file", "empty"])
def test_what_is_no_policy_is_refused(tmp_path, monkeypatch, policy):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("empty").mkdir()
    with pytest.raises(InputError, match=f"{policy} is no folder with a config.json"):
        rollout.main(RolloutConfig(policy, "tabletop"))


@pytest.mark.parametrize("options", [{"out": "missing/result.json"}, {"gif": "missing/it.gif"}], ids=str)
def test_folders_of_results_are_made(exported, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=1, device="cpu", **options))
    assert list((tmp_path / "missing").iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"episodes": 0}, "--episodes is 0; expected at least 1"),
        ({"batch_size": 0}, "--batch_size is 0; expected at least 1"),
        ({"workers": -1}, "--workers is -1; expected at least 0"),
        ({"seed": -5}, "--seed is -5; expected at least 0"),
        ({"seed": 10**17}, "--seed is 100000000000000000; expected at least 0 and at most 4294967295"),
        ({"ensemble": float("nan")}, "--ensemble is nan; expected at least -1"),
        ({"ensemble": float("inf")}, "--ensemble is inf; expected at least -1"),
        ({"image_size": -1}, "--image_size is -1; expected at least 0"),
        ({"image_size": 7}, "images of 7 pixels are too small .* an --image_size of at least 17"),
        ({"device": "meta"}, r"--device meta cannot be used \(.{,200}\); give cpu, or leave it out"),
        ({"device": "mps"}, r"--device mps cannot be used \(.{,200}\); give cpu, or leave it out"),
        ({"device": "hpu"}, r"--device hpu cannot be used \(.{,200}\); give cpu, or leave it out"),
        ({"n_action_steps": 99}, r"^--n_action_steps is 99; expected at least 0 and at most 8"),
        ({"gif": "it.gif", "gif_episodes": (-1, 2)}, "--gif_episodes -1 2 is none of the 2 episodes"),
        ({"gif_episodes": (1,)}, "--gif_episodes 1 has no effect without --gif; give a file, or leave it out"),
        ({"ensemble": 0.01, "n_action_steps": 3}, "--ensemble executes one action .* leave out --n_action_steps"),
        ({"out": "it", "gif": "./it"}, "--out and --gif are both ./it; give each a file of its own"),
        ({"out": "."}, "[.] is a folder, expected the name of a file"),
        ({"out": f"{__file__}/it.json"}, r"it.json cannot be written \(.* make room, or choose another file"),
        ({"gif": "/proc/it.gif"}, r"/proc/it.gif cannot be written \("),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_anything_is_done(exported, monkeypatch, options, told):
    monkeypatch.setattr(rollout, "rollout", None)
    with pytest.raises(InputError, match=told):
        rollout.main(RolloutConfig(str(exported), "tabletop", **{"episodes": 2, "device": "cpu", **options}))


def test_result_is_written_where_a_link_leads_to(exported, tmp_path):
    (tmp_path / "it.json").symlink_to("store/there.json")
    rollout.main(RolloutConfig(str(exported), "tabletop", episodes=1, device="cpu", out=str(tmp_path / "it.json")))
    assert (tmp_path / "it.json").is_symlink()
    assert json.loads((tmp_path / "store/there.json").read_text())["episodes"] == 1


@pytest.mark.parametrize("full", ["out", "gif"])
def test_result_is_told_where_the_disk_is_full_by_then(exported, tmp_path, capsys, full):
    files = {"out": str(tmp_path / "it.json"), "gif": str(tmp_path / "it.gif")} | {full: "/dev/full"}
    with pytest.raises(InputError, match=r"/dev/full cannot be written \(.*No space left"):
        rollout.main(RolloutConfig(str(exported), "tabletop", episodes=1, device="cpu", **files))
    assert "success rate in tabletop: " in capsys.readouterr().out
    if full == "gif":
        assert json.loads((tmp_path / "it.json").read_text())["episodes"] == 1


def test_rollout_itself_exits_with_one_line(tmp_path):
    done = command(sys.executable, "-m", "vla.rollout", "--policy", tmp_path, "--env", "tabletop")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith(f"error: {tmp_path}")
