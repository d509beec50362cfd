"""Pretrained models of each family, tiny and random, in folders like those of the hub: for tests without a network."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

# From their own modules: some releases hide these two at the top if torchvision is missing, which they do not use.
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vla.sim.tabletop import COLOURS, PHRASINGS, SHAPES

VLMS = ("smolvlm", "idefics3", "paligemma", "qwen2_5_vl", "qwen3_vl")
VISIONS = ("siglip", "siglip2", "dinov2", "dinov3")
WIDTH, SIDE, PATCH = 32, 32, 8
PATCHES = (SIDE // PATCH) ** 2
SQUARE = {"height": SIDE, "width": SIDE}
BLOCK = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
VIT = BLOCK | {"num_hidden_layers": 2, "patch_size": PATCH}
DECODER = BLOCK | {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024}
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def vlm(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a vision-language model of a family of VLMS, with tokenizer and image processor. Returns the folder.

    An image of 32 x 32 pixels becomes 4 tokens, with paligemma 16; of a larger one, qwen makes up to 16.
    """
    if family == "smolvlm":
        special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>")
        special += ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
        tokenizer = _tokenizer(special, pad="<|im_end|>", bos="<|im_start|>", eos="<end_of_utterance>")
    elif family == "idefics3":  # <global-img> is plain text to it
        special = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")
        special += ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
        tokenizer = _tokenizer(special, pad=special[2], bos=special[0], eos=special[1], starts_with_bos=True)
    elif family == "paligemma":
        special = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
        tokenizer = _tokenizer(special, pad="<pad>", bos="<bos>", eos="<eos>", starts_with_bos=True)
    else:
        special = (*QWEN, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        tokenizer = _tokenizer(special, pad="<|endoftext|>", eos="<|im_end|>")
    ids, text = tokenizer.convert_tokens_to_ids, _decoder(tokenizer)

    if family in ("smolvlm", "idefics3"):
        parts = {"text_config": text | {"model_type": "llama"}, "vision_config": VIT | {"image_size": SIDE}}
        parts |= {"image_token_id": ids("<image>"), "scale_factor": 2, "tie_word_embeddings": False}
        kind = SmolVLMImageProcessorPil if family == "smolvlm" else Idefics3ImageProcessorPil
        processor = kind(size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE})
    elif family == "paligemma":
        siglip = VIT | {"model_type": "siglip_vision_model", "image_size": SIDE, "vision_use_head": False}
        parts = {"text_config": text | {"model_type": "gemma"}, "vision_config": siglip}
        parts |= {"image_token_index": ids("<image>"), "hidden_size": WIDTH, "projection_dim": WIDTH}
        parts |= {name: text[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        processor = transformers.SiglipImageProcessorPil(size=SQUARE, image_seq_length=PATCHES)
    else:
        tower = {"depth": 3, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2}
        tower |= {"patch_size": PATCH, "spatial_merge_size": 2, "out_hidden_size": WIDTH}
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        if family == "qwen2_5_vl":
            tower |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
            colours = {}
        else:
            tower |= {"num_position_embeddings": PATCHES, "deepstack_visual_indexes": [0, 1]}
            rope |= {"mrope_interleaved": True}
            colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        parts = {"text_config": text | {"rope_parameters": rope}, "vision_config": tower, "tie_word_embeddings": True}
        parts |= {"image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>")}
        parts |= {f"{name}_token_id": ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
        area = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
        processor = transformers.Qwen2VLImageProcessorPil(size=area, patch_size=PATCH, **colours)

    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return _write(AutoModelForImageTextToText, AutoConfig.for_model(family, **parts), folder, seed)


def vision(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a vision model of a family of VISIONS, with image processor. Returns the folder.

    An image becomes 16 patches of 8 x 8 pixels, after a CLS token (dinov2) or a CLS and 2 register tokens (dinov3);
    siglip2, the kind of any resolution (NaFlex), pads to 16. The siglips have their text tower, as on the hub.
    """
    if family in ("siglip", "siglip2"):
        tower = VIT | ({"image_size": SIDE} if family == "siglip" else {"num_patches": PATCHES})
        text = BLOCK | {
            "num_hidden_layers": 1,
            "vocab_size": 64,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 1,
        }
        config = AutoConfig.for_model(family, text_config=text, vision_config=tower)
        if family == "siglip":
            processor = transformers.SiglipImageProcessorPil(size=SQUARE)
        else:
            processor = transformers.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=PATCHES)
        processor.save_pretrained(folder)
    else:
        colours = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        sizes = {name: VIT[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size")}
        if family == "dinov2":  # its positions are of larger images than its processor makes: it interpolates them
            config = AutoConfig.for_model("dinov2", **sizes, mlp_ratio=2, image_size=SIDE + 2 * PATCH)
            processor = transformers.BitImageProcessorPil(size={"shortest_edge": SIDE + 4}, crop_size=SQUARE, **colours)
            processor.save_pretrained(folder)
        else:
            sizes |= {"intermediate_size": 2 * WIDTH, "image_size": SIDE, "num_register_tokens": 2}
            config = AutoConfig.for_model("dinov3_vit", **sizes)
            # Written by hand: its only class needs torchvision.
            steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": None}
            steps |= {"size": SQUARE, "resample": 2, "rescale_factor": 1 / 255, **colours}
            steps |= {"image_processor_type": "DINOv3ViTImageProcessorFast"}
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(steps, indent=2))
    return _write(AutoModel, config, folder, seed)


def language(folder: Path, seed: int = 0, kind: str = "qwen3", **own) -> Path:
    """Write a causal language model of a kind, of sizes of its own too, with tokenizer. Returns the folder."""
    tokenizer = _tokenizer(QWEN, pad="<|endoftext|>", eos="<|im_end|>")
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(kind, **_decoder(tokenizer) | {"tie_word_embeddings": True} | own)
    return _write(AutoModelForCausalLM, config, folder, seed)


def _tokenizer(special, pad, eos, bos=None, starts_with_bos=False):
    """Byte-level pairs learned from the table's instructions; `special` tokens have the first ids."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    sentences = [
        phrasing.format(object=f"{colour} {shape}", zone=zone)
        for phrasing in PHRASINGS
        for colour in COLOURS
        for shape in SHAPES
        for zone in COLOURS
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(alphabet) + 40
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    words.train_from_iterator(sentences, trainer)
    if starts_with_bos:
        words.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, words.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, extra_special_tokens=list(special)
    )


def _decoder(tokenizer):
    """The text model's sizes; as in real ones, there are more embeddings than tokens."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return DECODER | ids | {"vocab_size": -(-len(tokenizer) // 64) * 64}


def _write(kind, config, folder, seed):
    """Save a model with weights so large that its outputs depend visibly on each pixel, word and place."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind.from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return Path(folder)
