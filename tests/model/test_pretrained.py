from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from backbones import KINDS, SIDE, TEXTS, batch_of, edited, hidden, learned, moved, policy_on
from robots import ACTIONS, ARM, CRANE, WHICH, assert_same, mixed_batch, rows
from tiny import PATCH, VIT, VLMS, language
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vla.config import LossConfig
from vla.model.pixels import Pixels, patches

QWEN = (
    "<|im_start|>user\n",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "{}<|im_end|>\n<|im_start|>assistant\n",
)
IDEFICS = ("<fake_token_around_image><global-img>", "<image>", "<fake_token_around_image>")
# What stands before all, before, for and after each image, and for the instruction.
PROMPTS = {
    "smolvlm": ("<|im_start|>User:", *IDEFICS, "{}<end_of_utterance>\nAssistant:"),
    "idefics3": ("<|begin_of_text|>User:", *IDEFICS, "{}<end_of_utterance>\nAssistant:"),
    "paligemma": ("", "", "<image>", "", "<bos>{}\n"),
    "qwen2_5_vl": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", *QWEN[1:]),
    "qwen3_vl": QWEN,
}
PROCESSORS = {
    "smolvlm": SmolVLMImageProcessorPil,
    "idefics3": Idefics3ImageProcessorPil,
    "paligemma": transformers.SiglipImageProcessorPil,
    "qwen2_5_vl": transformers.Qwen2VLImageProcessorPil,
    "qwen3_vl": transformers.Qwen2VLImageProcessorPil,
    "siglip": transformers.SiglipImageProcessorPil,
    "siglip2": transformers.Siglip2ImageProcessorPil,
    "dinov2": transformers.BitImageProcessorPil,
}
# Of pictures: what the model takes as they are, and what it has to bring to another size.
FITTING = dict.fromkeys(KINDS, (SIDE, SIDE)) | {"qwen2_5_vl": (32, 64), "qwen3_vl": (32, 64), "siglip2": (16, 64)}
ODD = dict.fromkeys(KINDS, (47, 65)) | {"qwen2_5_vl": (41, 73), "qwen3_vl": (41, 73)}
SQUARE = ("smolvlm", "idefics3", "dinov2")  # what else they do to others is left out: see below
WHOLE = {  # no tiles, no larger picture before the small one; nothing cut away
    "smolvlm": {"do_image_splitting": False, "size": {"longest_edge": SIDE}},
    "idefics3": {"do_image_splitting": False, "size": {"longest_edge": SIDE}},
    "dinov2": {"do_center_crop": False, "size": {"shortest_edge": SIDE}},
}


def processed(kind, folder, images):
    """What the model's own image processor makes of uint8 [B, N, 3, h, w], as its forward takes it."""
    if kind == "dinov3":  # whose processor needs torchvision: it scales, and then resizes
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        small = F.interpolate(images.flatten(0, 1) / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
        return {"pixel_values": (small - mean[:, None, None]) / std[:, None, None]}
    samples = kind in ("smolvlm", "idefics3")  # which take a list for each
    pictures = [list(views.numpy()) for views in images] if samples else list(images.flatten(0, 1).numpy())
    processor = PROCESSORS[kind].from_pretrained(folder)
    return dict(processor(pictures, return_tensors="pt", input_data_format="channels_first", **WHOLE.get(kind, {})))


def by_the_family(kind, flags, policy, batch, layers=None):
    """What the models of a folder, with their first so many layers, make of a batch by their own forward: its output,
    and the mask of what is no padding [B, S]."""
    images, (B, T) = batch["images"], batch["tokens"].shape
    start, before, image, after, instruction = PROMPTS.get(kind, ("", "", "", "", "{}\n"))
    inputs = processed(kind, next(iter(flags.values())), images)
    if kind in VLMS:
        folder, auto = flags["backbone"], AutoModelForImageTextToText
        count = images.shape[-1] * images.shape[-2] // PATCH**2 // (1 if kind == "paligemma" else 4)
        head = start + (before + image * count + after) * images.shape[1]
    else:
        folder, auto, head = flags["language_backbone"], AutoModelForCausalLM, ""
        seen = AutoModel.from_pretrained(flags["vision_backbone"], dtype=torch.float32).eval()
        features = getattr(seen, "vision_model", seen)(**inputs).last_hidden_state
        features = features[:, {"dinov2": 1, "dinov3": 3}.get(kind, 0) :]
        features = policy.projector(features).view(B, -1, policy.language_model.width)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(head + instruction.format(text), add_special_tokens=False).input_ids for text in TEXTS[:B]]
    fixed = len(tokenizer(head, add_special_tokens=False).input_ids) if head else 0
    mask = torch.tensor([[1] * len(row) + [0] * (fixed + T - len(row)) for row in ids])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (fixed + T - len(row)) for row in ids])
    labels = ids.where(mask.bool() & (torch.arange(fixed + T) > fixed), -100)  # the instruction but for its first

    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = len(decoder.layers)
    if kind not in VLMS:
        mask, labels = (F.pad(each, (features.shape[1], 0), value=fill) for each, fill in ((mask, 1), (labels, -100)))
        inputs = {"inputs_embeds": torch.cat([features, model.get_input_embeddings()(ids)], dim=1)}
    else:
        inputs |= {"input_ids": ids}
        if kind == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(ids)  # all is prefix
        elif kind.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return model(attention_mask=mask, labels=labels, output_hidden_states=True, **inputs), mask.bool()


def assert_equal_where(mask, found, expected):
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states_are_those_of_the_familys_own_forward(kind, originals):
    flags = originals(kind)
    policy = policy_on(flags, image_size=FITTING[kind])
    batch = batch_of(policy)
    found, valid = hidden(policy, batch)
    expected, mask = by_the_family(kind, flags, policy, batch)
    assert torch.equal(valid, mask)
    assert 0 < (~valid).sum() < valid.sum()
    assert_equal_where(valid, found, expected.hidden_states[-1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_first_layers_are_those_of_the_whole_model(kind, originals):
    flags = originals(kind)
    policy = policy_on(flags, image_size=FITTING[kind], language_layers=2)
    batch = batch_of(policy)
    found, valid = hidden(policy, batch)
    assert_equal_where(valid, found, by_the_family(kind, flags, policy, batch, layers=2)[0].hidden_states[-1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_head_can_attend_to_a_layer_below_the_last(kind, originals):
    flags = originals(kind)
    policy = policy_on(flags, image_size=FITTING[kind], hidden_layer=2, loss=LossConfig(lm=1))
    batch = batch_of(policy)
    found, valid = hidden(policy, batch)
    assert_equal_where(valid, found, by_the_family(kind, flags, policy, batch)[0].hidden_states[2])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "paligemma"])
@torch.no_grad()
def test_language_loss_is_the_familys_own(kind, originals):
    flags = originals(kind)
    policy = policy_on(flags, image_size=FITTING[kind], loss=LossConfig(lm=1))
    batch = batch_of(policy, TEXTS[:1])
    expected = by_the_family(kind, flags, policy, batch)[0].loss
    torch.testing.assert_close(policy(batch)["lm"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_language_loss_predicts_a_token_from_nothing_but_those_before_it(kind, originals):
    policy, last = policy_on(originals(kind), loss=LossConfig(lm=1)), []
    policy.language_model.model.register_forward_hook(lambda *call: last.append(call[-1].last_hidden_state))
    batch, place, length = batch_of(policy), 4, policy.config.model.max_tokens
    changed = batch["tokens"].clone()
    changed[:, place] += 1
    losses = [policy(batch | {"tokens": tokens})["lm"] for tokens in (batch["tokens"], changed)]
    assert losses[0] != losses[1]
    first, second = last[len(last) // 2 - 1][:, -length:], last[-1][:, -length:]  # of the pass for the loss, if another
    torch.testing.assert_close(first[:, :place], second[:, :place], rtol=0, atol=1e-5)
    assert ((first - second)[:, place:][batch["token_mask"][:, place:]].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_language_loss_reaches_the_embeddings_and_a_map_of_its_own_if_there_is_one(kind, originals):
    policy = policy_on(originals(kind), loss=LossConfig(lm=1), freeze=("action_head",))
    out, embed = policy.language_model.next_token, policy.language_model.model.get_input_embeddings()
    assert (out is not None) == (kind in ("smolvlm", "idefics3"))  # the others tie it to the embeddings
    policy(batch_of(policy))["loss"].backward()
    words = out or embed
    assert (words.weight.grad.abs().sum(1) > 0).all()  # of every word, as each might have been predicted
    assert embed.weight.grad.any()
    assert policy_on(originals(kind)).language_model.next_token is None  # which nothing would train


# ---- What predictions depend on


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_the_instruction_changes_no_prediction(kind, originals):
    short, long = (policy_on(originals(kind), max_tokens=length) for length in (24, 40))
    (first, mask), (second, longer) = (hidden(policy, batch_of(policy)) for policy in (short, long))
    assert second.shape[1] == first.shape[1] + 16 == mask.shape[1] + 16
    torch.testing.assert_close(first[mask], second[longer], rtol=1e-5, atol=1e-5)
    change = short.predict_chunk(batch_of(short)) - long.predict_chunk(batch_of(long))
    assert (change / torch.from_numpy(np.ptp(ACTIONS, axis=0))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_depend_on_the_instruction_and_on_each_camera(kind, originals):
    policy = policy_on(originals(kind))
    batch = batch_of(policy)
    chunk, span = policy.predict_chunk(batch), torch.from_numpy(np.ptp(ACTIONS, axis=0))
    tokens, mask = policy.tokenize(["put the blue cube in the red zone", "push the green cube"])
    for change in (
        {"tokens": tokens, "token_mask": mask},
        {"images": batch["images"].flip(1)},
        {"images": torch.cat([255 - batch["images"][:, :1], batch["images"][:, 1:]], dim=1)},
        {"images": torch.cat([batch["images"][:, :1], 255 - batch["images"][:, 1:]], dim=1)},
    ):
        changed = policy.predict_chunk(batch | change)
        assert ((changed - chunk) / span).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("camera", [0, 1])
def test_pixels_of_a_camera_that_is_not_there_change_no_bit(kind, camera, originals):
    policy = policy_on(originals(kind), loss=LossConfig(lm=0.1))
    batch = batch_of(policy)
    batch["image_mask"][0, camera] = False
    black = batch["images"].clone()
    black[0, camera] = 0
    found = learned(policy, batch)
    assert_same(found, learned(policy, batch | {"images": black}))
    assert all(value.isfinite().all() for value in found.values())
    black[1, camera] = 0  # of one that is there
    assert not torch.equal(learned(policy, batch | {"images": black})["loss"], found["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_a_batch_of_several_robots_are_those_of_each_sample_alone(kind, originals):
    policy = policy_on(originals(kind), datasets=(ARM, CRANE), image_size=(16, 24), max_tokens=40)
    batch = mixed_batch(policy)
    together = policy.predict_chunk(batch)
    alone = torch.cat([policy.predict_chunk(rows(batch, slice(b, b + 1))) for b in range(len(WHICH))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert policy(batch)["loss"].isfinite()


DROPPING = {  # at other places each, among them between layers and of whole ones
    "siglip and gpt2": ("language_backbone", "gpt2", {"n_positions": 64}),
    "siglip and opt": ("language_backbone", "opt", {"word_embed_proj_dim": 32, "layerdrop": 0.5}),
    "siglip and biogpt": ("language_backbone", "biogpt", {}),
    "beit and qwen3": ("vision_backbone", "beit", {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.5}),
}


@pytest.mark.parametrize("freeze", [(), ("vision_encoder",)], ids=str)
@pytest.mark.parametrize("pair", DROPPING)
def test_a_batch_is_trained_on_as_its_samples_alone_as_pretrained_models_drop_nothing(
    pair, freeze, originals, tmp_path
):
    flag, kind, sizes = DROPPING[pair]
    flags = originals("siglip") | moved({flag: originals("siglip")[flag]}, tmp_path)
    if flag == "vision_backbone":
        config = AutoConfig.for_model(kind, **VIT, image_size=SIDE, **sizes)
        AutoModel.from_config(config).save_pretrained(flags[flag])
    else:
        language(flags[flag], kind=kind, **sizes)
    policy = policy_on(flags, freeze=freeze).train()
    batch = batch_of(policy)
    together = policy(batch)["loss"]
    alone = [policy(rows(batch, slice(b, b + 1)))["loss"] for b in range(len(TEXTS))]
    torch.testing.assert_close(together, sum(alone) / len(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(policy(batch)["loss"], together)


# ---- How it is computed


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_computed_again_give_the_same_loss_and_gradients(kind, originals):
    plain, again = (
        policy_on(originals(kind), gradient_checkpointing=on, loss=LossConfig(lm=0.1)) for on in (False, True)
    )
    counts = {}
    for policy in (plain, again):
        for name, part in policy.named_modules():
            if name.endswith("layers.1.mlp"):
                part.register_forward_pre_hook(
                    lambda *call, key=(policy, name): counts.update({key: counts.get(key, 0) + 1})
                )
    plain.train(), again.train()
    torch.testing.assert_close(learned(again, batch_of(again)), learned(plain, batch_of(plain)))
    assert all(counts[again, name] > counts[plain, name] for _, name in counts)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_is_the_same_in_either_way_of_computing_it(kind, originals):
    eager, sdpa = (policy_on(originals(kind), attention=way, loss=LossConfig(lm=1)) for way in ("eager", "sdpa"))
    batch = batch_of(sdpa)
    batch["image_mask"][0, 0] = False
    (found, _), (expected, mask) = hidden(eager, batch), hidden(sdpa, batch)
    assert_equal_where(mask, found, expected)
    torch.testing.assert_close(eager(batch)["lm"], sdpa(batch)["lm"], rtol=0, atol=1e-5)


class Waits(TorchFunctionMode):
    """Notes calls whose result depends on values: on a GPU each stops the queue of kernels until all are done."""

    NAMES = ("tolist", "item", "cpu", "numpy", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        name = getattr(function, "__name__", "")
        indexes = arguments[1] if name in ("__getitem__", "__setitem__") else ()
        indexes = indexes if isinstance(indexes, tuple) else (indexes,)
        if name in self.NAMES or any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indexes):
            self.found.append(name)
        return function(*arguments, **(named or {}))


# Qwen and SigLIP 2 cut their images apart by sizes that lie on the device.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("qwen2_5_vl", "qwen3_vl", "siglip2")])
def test_neither_loss_nor_prediction_waits_for_the_device(kind, originals):
    policy = policy_on(originals(kind), head="flow", loss=LossConfig(lm=0.1))
    batch = batch_of(policy)
    policy.predict_chunk(batch)  # looks once whether there are statistics
    with Waits() as waits:
        policy(batch)["loss"].backward()
        policy.predict_chunk(batch)
    assert waits.found == []


# ---- Pictures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["odd", "large", "of a filter without name"])
def test_pixels_are_those_of_the_models_own_processor(kind, case, originals, tmp_path):
    flags, size = originals(kind), (151, 211) if case == "large" else ODD[kind]
    if "filter" in case:
        flags = moved(flags, tmp_path)
        edited("preprocessor_config.json", resample=None)(Path(next(iter(flags.values()))))
    size = (size[0], size[0]) if kind in SQUARE else size
    encoder = policy_on(flags, image_size=size).vision_encoder
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 2, 3, *size), np.uint8))
    images[0] = F.avg_pool2d(images[0].float(), 5, 1, 2).byte()  # and smooth ones
    expected = processed(kind, next(iter(flags.values())), images)["pixel_values"]
    found = encoder.pixels(images.flatten(0, 1))
    assert found.dtype == torch.float32
    assert found.shape[-2:] != size  # it was resized
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.pixels(images.flatten(0, 1)), found)
    if kind.startswith("qwen"):
        found = patches(found, PATCH, 2, 2)
    elif kind == "siglip2":  # flat patches, colours last
        found = F.unfold(found, PATCH, stride=PATCH).unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)
        expected = expected[:, : found.shape[1]]
    else:
        expected = expected.flatten(0, -4)
    level = 1 / 255 / min(getattr(PROCESSORS.get(kind), "image_std", None) or [0.224])  # the smallest deviation
    apart = (found - expected).abs()
    assert found.shape == expected.shape
    assert (apart > 1e-5).float().mean() < 0.01  # ties, of which small whole ratios make many
    assert apart.max() <= 1.01 * level


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({"size": {"height": 32, "width": 48}}, (32, 48)),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}}, (48, 48)),
        ({"size": 64, "crop_size": 48}, (48, 48)),
        ({"size": 64}, (64, 64)),
        ({"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}, (64, 64)),
        ({"merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 4096}}, (48, 64)),
        (
            {"merge_size": 2, "size": {"shortest_edge": 1, "longest_edge": 9999}, "max_pixels": 1024, "min_pixels": 1},
            (16, 32),
        ),
        ({"do_resize": False, "size": {"height": 32, "width": 48}}, (64, 80)),
    ],
)
def test_size_of_images_is_what_the_processor_says(processor, size):
    pixels = Pixels(processor | {"do_normalize": False}, "", (64, 80), 16)
    assert pixels.size == size
    assert pixels(torch.zeros(2, 3, 64, 80, dtype=torch.uint8)).shape == (2, 3, *size)
