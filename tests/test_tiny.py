import numpy as np
import pytest
import torch
from tiny import VISIONS, VLMS, language, vision, vlm
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 256, (2, 3, 32, 32), np.uint8)
WORDS = ("put the red cube in the blue zone", "put the red cube in the green zone", "put the blue cube in the red zone")


def load(kind, folder):
    """The model of a folder, in which exactly its weights must be."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def pixels(folder, picture):
    processor = AutoImageProcessor.from_pretrained(folder)
    whole = {"do_image_splitting": False} if hasattr(processor, "do_image_splitting") else {}
    return processor([picture], return_tensors="pt", **whole)


def tokens(features):
    """Image tokens from either form in which the families return them. [tokens, D]."""
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


@pytest.mark.parametrize("family", VLMS)
def test_images_of_a_vlm_become_different_tokens_for_its_decoder(family, tmp_path):
    model = load(AutoModelForImageTextToText, vlm(family, tmp_path))
    with torch.no_grad():
        made = [tokens(model.get_image_features(**pixels(tmp_path, picture)).pooler_output) for picture in PICTURES]
    count = 16 if family == "paligemma" else 4
    assert made[0].numel() == count * model.get_decoder().config.hidden_size
    assert (made[0] - made[1]).abs().mean() > 0.1


@pytest.mark.parametrize("family", VISIONS)
def test_images_become_different_patches(family, tmp_path):
    model = load(AutoModel, vision(family, tmp_path))
    model = getattr(model, "vision_model", model)
    if family == "dinov3":  # its image processor needs torchvision
        inputs = [{"pixel_values": torch.from_numpy(picture[None]) / 255} for picture in PICTURES]
    else:
        inputs = [pixels(tmp_path, picture) for picture in PICTURES]
    with torch.no_grad():
        made = [model(**values).last_hidden_state for values in inputs]
    assert made[0].shape == (1, 16 + {"dinov2": 1, "dinov3": 3}.get(family, 0), 32)
    assert (made[0] - made[1]).abs().mean() > 0.1


@pytest.mark.parametrize("family", [*VLMS, "language"])
def test_outputs_depend_on_the_words_and_on_their_order(family, tmp_path):
    if family == "language":
        model = load(AutoModelForCausalLM, language(tmp_path))
    else:
        model = load(AutoModelForImageTextToText, vlm(family, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokenizer(words, return_tensors="pt").input_ids for words in WORDS]
    assert sorted(ids[0][0].tolist()) == sorted(ids[2][0].tolist()) != sorted(ids[1][0].tolist())
    with torch.no_grad():
        last = [model(input_ids=words).logits[0, -1] for words in ids]
    assert min((last[0] - last[1]).abs().mean(), (last[0] - last[2]).abs().mean()) > 0.1


@pytest.mark.parametrize("family", VLMS)
def test_special_tokens_are_one_id_each_and_those_of_the_config(family, tmp_path):
    config = load(AutoModelForImageTextToText, vlm(family, tmp_path)).config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    image = "<|image_pad|>" if "qwen" in family else "<image>"
    bos = [tokenizer.bos_token_id] if family in ("idefics3", "paligemma") else []
    assert tokenizer(image).input_ids == [*bos, config.image_token_id]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config.get_text_config(), name) == getattr(tokenizer, name)


def test_a_seed_makes_the_same_files_and_leaves_the_global_numbers_alone(tmp_path):
    def weights(name, seed):
        return (vlm("smolvlm", tmp_path / name, seed) / "model.safetensors").read_bytes()

    before = torch.get_rng_state()
    first = weights("first", 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert weights("again", 0) == first != weights("other", 1)
