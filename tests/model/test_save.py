"""A policy that is saved comes back whole, or is refused."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError
from robots import HEADS, actions, edit_config, random_batch, saved, tiny
from safetensors.torch import load_file, save_file

import vla
from vla import InputError
from vla.config import LossConfig
from vla.model import VLAPolicy

PREDICT = """
import sys, torch
from safetensors.torch import load_file, save_file
from vla.model import VLAPolicy
torch.set_num_threads(int(sys.argv[1]))
for head in sys.argv[2:]:
    policy = VLAPolicy.from_pretrained(head)
    save_file({"chunk": policy.predict_chunk(load_file("batch.safetensors"))}, f"{head}.chunk")
"""


def test_saved_policy_predicts_the_same_to_the_bit_in_a_new_process(tmp_path):
    policies = {head: tiny(**model) for head, model in HEADS.items()}
    batch = random_batch(policies["flow"])
    save_file(batch, tmp_path / "batch.safetensors")
    for head, policy in policies.items():
        policy.save_pretrained(tmp_path / head)
    subprocess.run(
        [sys.executable, "-c", PREDICT, str(torch.get_num_threads()), *HEADS],
        env=os.environ | {"PYTHONPATH": str(Path(vla.__file__).parents[1])},
        cwd=tmp_path,
        check=True,
    )
    for head, policy in policies.items():
        assert torch.equal(load_file(tmp_path / f"{head}.chunk")["chunk"], policy.predict_chunk(batch))


def test_loaded_policy_is_whole_and_ready_to_act(tmp_path):
    model = {"head": "regression", "gripper_dims": (2,), "freeze": ("vision_encoder",), "loss": LossConfig(lm=0.3)}
    policy = VLAPolicy.from_pretrained(saved(tmp_path, **model))
    original = tiny(**model)
    assert policy.config == original.config
    assert not policy.training
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == {
        n: p.requires_grad for n, p in original.named_parameters()
    }
    expected = original.state_dict()
    assert policy.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())
    np.testing.assert_array_equal(actions(policy), actions(original))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["action_head.decoder.slot", "action_norm.high", "vision_encoder.camera"])
def test_missing_weights_are_refused(tmp_path, name):
    folder = saved(tmp_path)
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=f"export are not those of this policy: missing {name}, left over nothing"):
        VLAPolicy.from_pretrained(folder)


def test_weights_that_are_left_over_are_refused(tmp_path):
    folder = saved(tmp_path)
    edit_weights(folder, lambda weights: weights.update({"language_model.extra": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"missing nothing, left over language_model.extra, of another"):
        VLAPolicy.from_pretrained(folder)


@pytest.mark.parametrize("name", ["state_norm.offset", "action_norm.scale", "action_norm.low"])
def test_weights_without_statistics_are_refused(tmp_path, name):
    folder = saved(tmp_path)
    edit_weights(folder, lambda weights: weights[name].__setitem__(0, torch.nan))
    with pytest.raises(InputError, match="no normalization statistics"):
        VLAPolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run", "run is a run, expected a policy; give .*run/export, or a checkpoint of it"),
        ("empty", "empty is no folder with a config.json; give an export"),
        ("nowhere/export", "nowhere/export is no folder with a config.json"),
        ("./nowhere", "nowhere is no folder with a config.json"),
        ("empty/export", "empty/export is no folder with a config.json"),
    ],
)
def test_what_is_no_policy_is_refused_without_asking_the_hub(name, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(PyTorchModelHubMixin, "from_pretrained", None)
    with pytest.raises(InputError, match=told):
        VLAPolicy.from_pretrained(tmp_path / name if name.startswith("nowhere") else name)


NO_REPOSITORY = HfHubHTTPError("404 Client Error", response=Mock())


@pytest.mark.parametrize(
    ("name", "failure"), [("mistyped/export", None), ("mistyped/export", NO_REPOSITORY), ("~/export", None)], ids=str
)
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(name, failure, monkeypatch):
    if failure:
        monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", Mock(side_effect=failure))
        monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=failure))
    with pytest.raises(
        InputError, match=rf"{name} is no folder here, and could not be downloaded .*: check the path or"
    ):
        VLAPolicy.from_pretrained(name)


def test_options_of_a_download_reach_it(tmp_path, monkeypatch):
    download = Mock(return_value=str(saved(tmp_path)))
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(tmp_path / "export/config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"revision": "v2", "force_download": True, "cache_dir": tmp_path, "token": "mine"}
    VLAPolicy.from_pretrained("some/policy", **options)
    download.assert_called_once_with("some/policy", **options)


@pytest.mark.parametrize("option", [{"devcie": "cuda"}, {"torch_dtype": torch.bfloat16}, {"strict": True}], ids=str)
def test_unknown_options_are_refused(option, tmp_path):
    with pytest.raises(TypeError, match=f"from_pretrained has no option {next(iter(option))}"):
        VLAPolicy.from_pretrained(saved(tmp_path), **option)


@pytest.mark.parametrize("part", ["model", "loss"])
def test_configuration_of_another_version_is_refused(tmp_path, part):
    folder = saved(tmp_path)
    edit_config(
        folder, lambda config: (config["model"] if part == "model" else config["model"]["loss"]).update(dropout=0.1)
    )
    with pytest.raises(InputError, match=r"config.json has unknown entries dropout"):
        VLAPolicy.from_pretrained(folder)


def test_configuration_with_an_unknown_entry_at_its_top_is_refused(tmp_path):
    folder = saved(tmp_path)
    edit_config(folder, lambda config: config.update(action_units="mm"))
    with pytest.raises(InputError, match=r"config.json has unknown entries action_units"):
        VLAPolicy.from_pretrained(folder)


@pytest.mark.parametrize("entry", ["image_size", "model", "datasets"])
def test_configuration_that_lacks_an_entry_is_refused(tmp_path, entry):
    folder = saved(tmp_path)
    edit_config(folder, lambda config: config.pop(entry))
    with pytest.raises(InputError, match=f"lacks {entry}"):
        VLAPolicy.from_pretrained(folder)
