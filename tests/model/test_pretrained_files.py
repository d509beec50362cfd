"""Pretrained models on the disk: what is exported from them loads anywhere, and what cannot be built is refused."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from backbones import KINDS, SIDE, TEXTS, batch_of, edited, hidden, moved, policy_on, settings
from robots import ARM, CRANE, assert_same
from safetensors.torch import load_file, save_file
from tiny import VIT, language, vlm
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from vla import InputError
from vla.config import LoraConfig, LossConfig
from vla.model import VLAPolicy, pretrained

# ---- Exports

PREDICT = """
import socket, sys, torch

def refuse(*address):
    raise AssertionError("a connection was tried")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from safetensors.torch import load_file, save_file
from vla.model import VLAPolicy
first, second, *names = sys.argv[1:]
for name in names:
    policy, batch = VLAPolicy.from_pretrained(name), load_file(f"{name}.batch")
    batch["tokens"], batch["token_mask"] = policy.tokenize([first, second])
    save_file({"chunk": policy.predict_chunk(batch)}, f"{name}.chunk")
"""
BOTH = ("vision_encoder", "language_model")
ADAPTERS = {"lora": LoraConfig(rank=2, modules=BOTH)}
EXPORTS = {f"whole {kind}": (kind, {}) for kind in KINDS}
EXPORTS |= {f"frozen {kind}": (kind, {"freeze": BOTH}) for kind in ("paligemma", "qwen3_vl", "dinov2")}
EXPORTS |= {f"half {kind}": (kind, {"freeze": BOTH, "frozen_dtype": "bfloat16"}) for kind in ("smolvlm", "dinov3")}
EXPORTS |= {f"merged {kind}": (kind, ADAPTERS) for kind in ("qwen2_5_vl", "siglip2")}
EXPORTS |= {"merged half": ("paligemma", ADAPTERS | {"frozen_dtype": "bfloat16"})}
EXPORTS |= {f"adapters {kind}": (kind, ADAPTERS | {"language_layers": 2}) for kind in ("idefics3", "siglip")}


def put(policy, folder):
    """Save a policy, and beside it a batch without its tokens. Returns what it predicts from the whole batch."""
    batch = batch_of(policy)
    save_file({key: value for key, value in batch.items() if "token" not in key}, f"{folder}.batch")
    chunk = policy.eval().predict_chunk(batch)
    policy.save_pretrained(folder)
    return chunk


def in_a_new_process(names, folder):
    """What the policies of these names in a folder predict there, each from its batch."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", PREDICT, *TEXTS, *names], env=environment, cwd=folder, check=True)
    return {name: load_file(folder / f"{name}.chunk")["chunk"] for name in names}


def test_exports_predict_the_same_to_the_bit_in_a_new_process_without_network_or_what_they_do_not_need(
    originals, tmp_path
):
    expected = {}
    for name, (kind, options) in EXPORTS.items():
        policy = policy_on(moved(originals(kind), tmp_path / f"{name} base"), **options)
        for key, p in policy.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.1)
        if name.startswith("merged"):
            policy.merge()
        if not name.startswith("adapters"):
            shutil.rmtree(tmp_path / f"{name} base")
        expected[name] = put(policy, tmp_path / name)
    assert_same(in_a_new_process(EXPORTS, tmp_path), expected)


CODE = {
    "configuration_mine.py": """
from transformers import Qwen3Config

class MyConfig(Qwen3Config):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import Qwen3ForCausalLM
from .configuration_mine import MyConfig
from .names_mine import NAME

class MyModel(Qwen3ForCausalLM):
    config_class = MyConfig
""",
    "names_mine.py": "NAME = 'mine'",
}


def test_export_of_a_model_with_code_of_its_own_holds_that_code(originals, tmp_path):
    flags = originals("siglip") | moved({"language_backbone": originals("siglip")["language_backbone"]}, tmp_path)
    folder = tmp_path / "language_backbone"
    for name, text in CODE.items():
        (folder / name).write_text(text)
    places = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    edited("config.json", model_type="mine", auto_map=places)(folder)
    policy = policy_on(flags, trust_remote_code=True)
    shutil.rmtree(folder)
    expected = {"export": put(policy, tmp_path / "export")}
    assert_same(in_a_new_process(["export"], tmp_path), expected)
    put(VLAPolicy.from_pretrained(tmp_path / "export"), tmp_path / "again")
    shutil.rmtree(tmp_path / "export")
    assert_same(in_a_new_process(["again"], tmp_path), {"again": expected["export"]})


def test_adapters_without_their_base_or_with_another_one_are_refused(originals, tmp_path):
    flags = moved(originals("smolvlm"), tmp_path)
    policy_on(flags, **ADAPTERS).save_pretrained(tmp_path / "export")
    assert VLAPolicy.from_pretrained(tmp_path / "export").config.base
    shutil.rmtree(flags["backbone"])
    with pytest.raises(InputError, match=f"--model.backbone {flags['backbone']}: there is no such folder"):
        VLAPolicy.from_pretrained(tmp_path / "export")
    vlm("smolvlm", flags["backbone"], seed=1)
    with pytest.raises(InputError, match=f"export was trained on other weights than {flags['backbone']} has now"):
        VLAPolicy.from_pretrained(tmp_path / "export")


def test_export_over_an_older_one_has_its_own_image_processor(originals, tmp_path):
    policy_on(originals("smolvlm")).save_pretrained(tmp_path / "export")
    flags = moved(originals("smolvlm"), tmp_path)
    edited("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])(tmp_path / "backbone")
    policy = policy_on(flags).eval()
    policy.save_pretrained(tmp_path / "export")
    batch = batch_of(policy)
    again = VLAPolicy.from_pretrained(tmp_path / "export")
    assert torch.equal(again.predict_chunk(batch), policy.predict_chunk(batch))


def test_export_without_the_folder_of_its_tokenizer_is_refused(originals, tmp_path):
    policy_on(originals("smolvlm")).save_pretrained(tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "backbone")
    with pytest.raises(InputError, match="export has no folder backbone"):
        VLAPolicy.from_pretrained(tmp_path / "export")


# ---- What cannot be built


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freeze": ("language_model.nonsense",)}, "--model.freeze names .* language_model has no part nonsense"),
        ({"freeze": ("projector",)}, "--model.freeze names projector, but the policy has no part projector"),
        (
            {"unfreeze": (("vision_encoder", 3),)},
            "--model.unfreeze names vision_encoder, which --model.freeze does not",
        ),
        ({"freeze": ("language_model",), "lora": LoraConfig(rank=2)}, "--model.freeze freezes language_model"),
        ({"language_layers": 4}, "--model.language_layers is 4, but .*smolvlm has 3"),
        ({"hidden_layer": 1}, "--model.hidden_layer 1: .* give --model.language_layers 1, or that loss"),
        ({"hidden_layer": 3, "loss": LossConfig(lm=1)}, "--model.hidden_layer is 3; expected less than the 3 layers"),
        ({"vision_backbone": "."}, "give the first, or the other two"),
        ({"backbone": "", "vision_backbone": "."}, "give the first, or the other two"),
        ({"backbone": "", "language_backbone": "."}, "give the first, or the other two"),
        ({"backbone": "nowhere/at/all"}, "--model.backbone nowhere/at/all: config.json cannot be read"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options, told, originals):
    with pytest.raises(InputError, match=told):
        policy_on(originals("smolvlm"), **options)


def test_too_few_layers_for_the_images_are_refused(originals):
    with pytest.raises(InputError, match=r"--model.language_layers 1: images enter the first 2 layers"):
        policy_on(originals("qwen3_vl"), language_layers=1)


def test_language_model_whose_window_is_shorter_than_the_prefix_is_refused(originals, tmp_path):
    flags = originals("siglip") | moved({"language_backbone": originals("siglip")["language_backbone"]}, tmp_path)
    for window, kind in ((56, "sliding_attention"), (55, "full_attention"), (55, "sliding_attention")):
        kinds = ["full_attention", "full_attention", kind]
        options = {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
        edited("config.json", **options)(tmp_path / "language_backbone")
        if (window, kind) != (55, "sliding_attention"):
            policy_on(flags)  # 2 images of 16 tokens, 24 of the instruction
    with pytest.raises(
        InputError, match=r"are 56 tokens, and layers of .* are made to see the last 55 alone \(sliding_window\)"
    ):
        policy_on(flags)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_model_made_for_less_than_the_prefix_is_refused(kind, originals, tmp_path):
    told = r"are 56 tokens, and .*short is made for 55 \(max_position_embeddings\); lower --model.max_tokens"
    for most, name in ((56, "long"), (55, "short")):  # 2 images of 16 tokens, 24 of the instruction
        made = language(tmp_path / name, kind=kind, max_position_embeddings=most)
        flags = originals("siglip") | {"language_backbone": str(made)}
        with pytest.raises(InputError, match=told) if name == "short" else contextlib.nullcontext():
            policy = policy_on(flags)
            assert policy(batch_of(policy))["loss"].isfinite()
    if kind == "llama":  # which computes its positions: what was trained beyond them before still acts
        policy.save_pretrained(tmp_path / "export")
        edited("config.json", max_position_embeddings=55)(tmp_path / "export/backbone/language_backbone")
        VLAPolicy.from_pretrained(tmp_path / "export")


LINEAR = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
LINEAR |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
LINEAR["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
MIXED = {  # decoders of which some layers take no mask
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": LINEAR,
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 72},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8},
}


@pytest.mark.parametrize("kind", MIXED)
def test_decoder_that_sees_what_the_mask_hides_is_refused_where_a_data_set_lacks_a_camera(kind, originals, tmp_path):
    flags = originals("siglip") | {"language_backbone": str(language(tmp_path / kind, kind=kind, **MIXED[kind]))}
    with pytest.raises(
        InputError, match=rf"layers of .*{kind}, of the family {kind}, see what is hidden from attention"
    ):
        policy_on(flags, datasets=(ARM, CRANE))
    short, long = (policy_on(flags, max_tokens=length) for length in (24, 40))  # padding comes last: nobody sees it
    (first, mask), (second, longer) = (hidden(policy, batch_of(policy)) for policy in (short, long))
    torch.testing.assert_close(first[mask], second[longer], rtol=1e-5, atol=1e-5)


def test_causal_attention_is_refused_where_images_and_instruction_see_each_other(originals):
    config = settings(originals("paligemma"), attention="flash_attention_2")
    with pytest.raises(InputError, match="flash_attention_2 is causal, and in paligemma images and instruction see"):
        pretrained.build(config, None, True)


def without(name):
    return lambda folder: (folder / name).unlink()


def reshaped(shape):
    """The weights of a folder with one of another shape, or none if there is no shape."""

    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        weights.pop("model.text_model.norm.weight")
        weights |= {"model.text_model.norm.weight": torch.zeros(shape)} if shape else {}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return edit


LACKING = "lacks weights or has them in another shape, model.text_model.norm.weight, which would stay random"
DAMAGED = {
    "without weights": (without("model.safetensors"), "weights cannot be read"),
    "with damaged weights": (lambda folder: (folder / "model.safetensors").write_text("{"), "weights cannot be read"),
    "without one of the weights": (reshaped(None), LACKING),
    "with a weight of another shape": (reshaped((3,)), LACKING),
    "without an image processor": (without("preprocessor_config.json"), "preprocessor_config.json cannot be read"),
    "without the size of images": (
        edited("preprocessor_config.json", size=None, max_image_size=None),
        "^preprocessor_config.json of the backbone has the size",
    ),
    "without colours": (
        edited("preprocessor_config.json", image_mean=None),
        "^preprocessor_config.json of the backbone lacks image_mean or image_std",
    ),
    "with images that patches do not divide": (
        edited("preprocessor_config.json", max_image_size={"longest_edge": 40}),
        "^images of 40x40 cannot be cut into the backbone's patches of 16x16 pixels; correct the size in prep",
    ),
    "with images that it takes as they are and patches do not divide": (
        edited("preprocessor_config.json", do_resize=False),
        "^images of 40x40 cannot be cut into the backbone's patches of 16x16 pixels; give --data.image_size",
    ),
    "without a tokenizer": (without("tokenizer.json"), "tokenizer cannot be read"),
    "with the tokenizer of another model": (
        lambda folder: AutoTokenizer.from_pretrained(vlm("qwen3_vl", folder / "other")).save_pretrained(folder),
        "has no token .*<fake_token_around_image>",
    ),
    "without a configuration": (without("config.json"), "config.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_model_is_refused(damage, originals, tmp_path):
    edit, told = DAMAGED[damage]
    flags = moved(originals("smolvlm"), tmp_path)
    edit(tmp_path / "backbone")
    with pytest.raises(InputError, match=told) as refusal:
        policy_on(flags, image_size=(40, 40))
    assert "\n" not in str(refusal.value)


def test_models_of_another_kind_are_refused_where_they_stand(originals, tmp_path):
    words, pictures = (originals("siglip")[flag] for flag in ("language_backbone", "vision_backbone"))
    for flags, told in (
        ({"backbone": words}, "is of the family qwen3; expected one of smolvlm, idefics3"),
        ({"vision_backbone": words, "language_backbone": words}, "is of the family qwen3, which has no patches"),
        ({"vision_backbone": pictures, "language_backbone": pictures}, f"--model.language_backbone {pictures}"),
    ):
        with pytest.raises(InputError, match=told):
            policy_on(flags)


MISFITS = {
    "features of some patches": (
        "vision_backbone",
        AutoModel,
        ("vit_mae", VIT | {"image_size": SIDE}),
        r"family vit_mae, makes \[10, 32\] of two images of 4x4 patches, expected \[32, 32\]",
    ),
    "features of objects behind those of patches": (
        "vision_backbone",
        AutoModel,
        ("yolos", VIT | {"image_size": (SIDE, SIDE), "num_detection_tokens": 10}),
        "is of the family yolos, which detects objects by tokens behind those of the patches; expected",
    ),
    "features of all images in a row": (
        "vision_backbone",
        AutoModel,
        ("pixtral", VIT | {"image_size": SIDE, "head_dim": 16}),
        "does not take images of 32x32, .*; correct that file, or give one such as SigLIP",
    ),
    "narrower embeddings": (
        "language_backbone",
        AutoModelForCausalLM,
        ("opt", {"hidden_size": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}),
        "is of the family opt, whose decoder does not take embeddings of its own width",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_models_that_do_not_fit_together_are_refused(misfit, originals, tmp_path):
    flag, auto, (kind, sizes), told = MISFITS[misfit]
    flags = originals("siglip") | moved({flag: originals("siglip")[flag]}, tmp_path)
    auto.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(flags[flag])
    with pytest.raises(InputError, match=told):
        policy_on(flags, freeze=("vision_encoder",))


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_that_does_not_fit_is_refused_with_a_cure_that_works(kind, originals):
    text = TEXTS[0] * 3
    with pytest.raises(InputError, match=r"tokens; --model.max_tokens 24 holds fewer") as refusal:
        policy_on(originals(kind)).tokenize([TEXTS[0], text])
    cure = int(str(refusal.value).split("raise it to ")[1].split()[0])
    assert policy_on(originals(kind), max_tokens=cure).tokenize([text])[1].all()
