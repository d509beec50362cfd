"""Backbones from pretrained models, through transformers' Auto classes and their public methods.

An image-text model is taken apart into the two modules that people freeze: its decoder becomes `language_model`, what
is left of it, which makes image features, `vision_encoder`. Or the two are different models, with a projector between.

Dimension key: B batch, N cameras, I image tokens of one camera, T text tokens, S prefix tokens, D width of the decoder,
K layers of the decoder that get image features of their own (Qwen3-VL), V vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla import InputError
from vla.config import ModelConfig
from vla.model.encoders import PatchEncoder, Projector, VisionEncoder
from vla.model.originals import Originals
from vla.model.pixels import Pixels
from vla.model.spec import PolicyConfig


@dataclass(frozen=True)
class Family:
    """How an image-text model was taught to read: what stands before all, around each image, and as instruction."""

    marks: tuple[str, ...] = ()  # that have to be tokens
    start: str = "{bos}"
    before: str = ""
    after: str = ""
    instruction: str = "{}\n"
    causal: bool = True  # else images and instruction all see each other


_SMOLVLM = Family(
    marks=("<fake_token_around_image>", "<end_of_utterance>"),
    start="{bos}User:",
    before="<fake_token_around_image><global-img>",
    after="<fake_token_around_image>",
    instruction="{}<end_of_utterance>\nAssistant:",
)
_QWEN = Family(
    marks=("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    start="<|im_start|>user\n",
    before="<|vision_start|>",
    after="<|vision_end|>",
    instruction="{}<|im_end|>\n<|im_start|>assistant\n",
)
FAMILIES = {
    "smolvlm": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "paligemma": Family(marks=("<bos>",), start="", instruction="<bos>{}\n", causal=False),
    "qwen2_5_vl": replace(
        _QWEN, start="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    ),
    "qwen3_vl": _QWEN,
}


class Layout(NamedTuple):
    """What comes before the instruction, the same for all samples, and the positions of all."""

    ids: Tensor  # int64 [S - T], of any token where image tokens will stand
    camera: Tensor  # int64 [S - T], 1 + n for what belongs to camera n, else 0
    places: Tensor  # int64 [N · I], of the image tokens
    positions: Tensor  # int64 [1, S] or [3, 1, S]


class LanguageModel(nn.Module):
    """A pretrained decoder over [start | images with their marks | instruction], always of the same length.

    positions: int64 [1, S], or [3, 1, S] where the decoder has places in time, height and width (Qwen).
    """

    def __init__(
        self, decoder: nn.Module, out: nn.Module | None, tokenizer, family: Family, layout: Layout, config: ModelConfig
    ):
        super().__init__()
        self.model, self.next_token, self.width = decoder, out, decoder.config.hidden_size
        self.tokenizer, self.family, self.config = tokenizer, family, config
        for name, value in layout._asdict().items():
            self.register_buffer(name, value, persistent=False)

    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """int64 [B, T] and mask bool [B, T], T fixed. Raises InputError for an instruction that does not fit."""
        length, pad = self.config.max_tokens, self.tokenizer.pad_token_id or 0
        tokens = torch.full((len(instructions), length), pad)
        mask = torch.zeros(len(instructions), length, dtype=torch.bool)
        for row, valid, text in zip(tokens, mask, instructions, strict=True):
            ids = _ids(self.tokenizer, self.family.instruction.format(text))
            if len(ids) > length:
                raise InputError(
                    f"the instruction '{text}' has {len(ids)} tokens; --model.max_tokens {length} holds fewer: "
                    f"raise it to {len(ids)} or more"
                )
            row[: len(ids)], valid[: len(ids)] = torch.tensor(ids), True
        return tokens, mask

    def forward(
        self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, lm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, N · I, D · (1 + K)], bool [B, N], int64 [B, T], bool [B, T] -> hidden states [B, S, D] and their mask
        bool [B, S]; and with `lm` the loss of the instruction [B].

        Nobody sees the image tokens of a camera whose image_mask is false.
        """
        embed = self.model.get_input_embeddings()
        image_tokens, *deepstack = image_tokens.split(self.width, dim=-1)
        # Repeated, as torch.compile would write the images of all samples to the memory of one that is expanded.
        fixed = embed(self.ids).repeat(len(tokens), 1, 1)  # [B, S - T, D]
        x = torch.cat([fixed.index_copy(1, self.places, image_tokens.to(fixed.dtype)), embed(tokens)], dim=1)
        seen = F.pad(image_mask, (1, 0), value=True)[:, self.camera]  # [B, S - T]; what belongs to no camera always
        mask = torch.cat([seen, token_mask], dim=1)  # [B, S]
        deep = {}
        if deepstack:
            visual = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device).index_fill(0, self.places, True)
            deep["visual_pos_masks"] = visual.expand(len(x), -1)
            deep["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in deepstack]
        hidden, last = self._decode(x, mask, self.family.causal, deep)
        if not lm:
            return hidden, mask, None
        if not self.family.causal:  # each word saw what it is to predict: a pass of its own, in which none does
            _, last = self._decode(x, mask, True, deep)
        return hidden, mask, self._loss(last[:, -tokens.shape[1] : -1], tokens, token_mask)

    def _decode(self, x: Tensor, mask: Tensor, causal: bool, deep: dict) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, D] -> the hidden states that the head attends to, and the last ones, [B, S, D] each."""
        layer = self.config.hidden_layer
        out = self.model(
            inputs_embeds=x,
            attention_mask=self._attend(mask, causal, x.dtype),
            position_ids=self.positions[..., : x.shape[1]].expand(*self.positions.shape[:-2], len(x), -1),
            use_cache=False,
            output_hidden_states=layer > 0,
            **deep,
        )
        return out.hidden_states[layer] if layer else out.last_hidden_state, out.last_hidden_state

    def _attend(self, mask: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
        """What may look where, as transformers takes it. mask: bool [B, S]."""
        if self.config.attention == "flash_attention_2":
            return mask  # it adds the order by itself
        S = mask.shape[1]
        attend = mask[:, None, None, :].expand(-1, 1, S, -1)
        if causal:
            order = mask.new_ones(S, S).tril()
            if not self.family.causal:  # images see each other
                order[: len(self.ids), : len(self.ids)] = True
            attend = attend & order | torch.eye(S, dtype=torch.bool, device=mask.device)  # a row of nothing gives NaN
        if self.config.attention == "sdpa":
            return attend
        return torch.zeros_like(attend, dtype=dtype).masked_fill(~attend, torch.finfo(dtype).min)

    @torch.no_grad()
    def check_mask(self) -> None:
        """Raises InputError for a decoder that does not keep to the mask, tried on a few tokens of which two change."""
        hidden, mask = [], torch.tensor([[True, True, False, False, True, True]])
        for ids in ([0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 4, 5]):
            x = self.model.get_input_embeddings()(torch.tensor([ids]))
            hidden.append(self._decode(x, mask, True, {})[1][mask])
        if (hidden[1] - hidden[0]).abs().max() > 1e-3 * hidden[0].abs().max():  # experts round by who else they get
            name, family = self.config.backbone or self.config.language_backbone, self.model.config.model_type
            raise InputError(
                f"a data set lacks a camera, and layers of {name}, of the family {family}, see what is hidden from "
                "attention (convolutional, linear, recurrent ones); give a language model of attention alone, or data "
                "sets with the same cameras"
            )

    def _loss(self, hidden: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Cross-entropy of each next token, averaged over each sample's own. hidden: [B, T - 1, D] -> [B]."""
        if self.next_token:
            logits = self.next_token(hidden)  # [B, T - 1, V]
        else:  # tied
            logits = F.linear(hidden, self.model.get_input_embeddings().weight.to(hidden.dtype))
        error = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
        valid = token_mask[:, 1:].float()
        return (error * valid).sum(1) / valid.sum(1).clamp(min=1)


def _layout(tokenizer, family: Family, image_tokens: int, cameras: int, first: int, max_tokens: int) -> Layout:
    """image_tokens: I. first: the position of the first token."""
    before, after = _ids(tokenizer, family.before), _ids(tokenizer, family.after)
    ids, camera, places = _ids(tokenizer, family.start.format(bos=tokenizer.bos_token or "")), [], []
    camera += [0] * len(ids)
    for n in range(cameras):
        places += range(len(ids) + len(before), len(ids) + len(before) + image_tokens)
        ids += [*before, *[0] * image_tokens, *after]
        camera += [n + 1] * (len(ids) - len(camera))
    positions = torch.arange(first, first + len(ids) + max_tokens)[None]
    return Layout(*(torch.tensor(values, dtype=torch.int64) for values in (ids, camera, places)), positions)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@dataclass(frozen=True)
class Backbone:
    """The parts of a policy that were trained elsewhere, and the files beside their weights that it needs for ever."""

    vision_encoder: nn.Module
    projector: nn.Module | None
    language_model: LanguageModel
    originals: Originals


def build(policy: PolicyConfig, saved: Path | None, weights: bool) -> Backbone:
    """The backbone that --model.backbone names, or --model.vision_backbone and --model.language_backbone.

    saved, weights: see Originals. Raises InputError for what is not found or does not fit.
    """
    import transformers

    model, cameras, image_size = policy.model, len(policy.cameras), policy.image_size
    originals = Originals(model, saved, weights)
    if model.backbone:
        config = originals.config("backbone")
        family, kind = FAMILIES.get(config.model_type), config.model_type
        if family is None:
            raise InputError(
                f"--model.backbone {model.backbone} is of the family {kind}; expected one of {', '.join(FAMILIES)}, or "
                "two models by --model.vision_backbone and --model.language_backbone"
            )
        if model.attention == "flash_attention_2" and not family.causal:
            raise InputError(
                f"--model.attention flash_attention_2 is causal, and in {kind} images and instruction see each other; "
                "leave it out"
            )
        vision, text = config.vision_config, _first_layers("backbone", config, model)
        if len(getattr(vision, "deepstack_visual_indexes", [])) > text.num_hidden_layers:
            raise InputError(
                f"--model.language_layers {model.language_layers}: images enter the first "
                f"{len(vision.deepstack_visual_indexes)} layers of {model.backbone}; keep at least these"
            )
        whole = originals.model("backbone", transformers.AutoModelForImageTextToText, config)
        out, base = _next_token(whole, model), whole.base_model
        decoder = base.get_decoder()
        setattr(base, next(name for name, part in base.named_children() if part is decoder), None)
        merge = getattr(config, "scale_factor", None) or getattr(vision, "spatial_merge_size", 1)
        patch = vision.patch_size * merge
        encoder, projector = VisionEncoder(base, _pixels(originals, "backbone", kind, image_size, patch)), None
        tokenizer = originals.tokenizer("backbone", family.marks)
    else:
        family = Family()
        vision, text = originals.config("vision_backbone"), originals.config("language_backbone")
        _first_layers("language_backbone", text, model)
        kind = getattr(vision, "vision_config", vision).model_type
        seen = originals.model("vision_backbone", transformers.AutoModel, vision)
        seen = getattr(seen, "vision_model", seen)
        patch = getattr(seen.config, "patch_size", None)
        if not isinstance(patch, int):
            raise InputError(
                f"--model.vision_backbone {model.vision_backbone} is of the family {kind}, which has no patches; "
                "expected one such as SigLIP or DINO"
            )
        if getattr(seen.config, "num_detection_tokens", 0):  # YOLOS
            raise InputError(
                f"--model.vision_backbone {model.vision_backbone} is of the family {kind}, which detects objects by "
                "tokens behind those of the patches; expected one of patches alone, such as SigLIP or DINO"
            )
        encoder = PatchEncoder(seen, _pixels(originals, "vision_backbone", kind, image_size, patch))
        whole = originals.model("language_backbone", transformers.AutoModelForCausalLM, text)
        out, decoder, tokenizer = (
            _next_token(whole, model),
            whole.get_decoder(),
            originals.tokenizer("language_backbone", family.marks),
        )
        words = whole.get_input_embeddings().weight.shape[1]
        if decoder is whole or not hasattr(decoder, "config") or words != decoder.config.hidden_size:
            raise InputError(
                f"--model.language_backbone {model.language_backbone} is of the family {text.model_type}, whose "
                "decoder does not take embeddings of its own width; expected one such as Qwen3 or Llama"
            )
        projector = Projector(seen.config.hidden_size, decoder.config.hidden_size)
    if model.hidden_layer >= text.num_hidden_layers:
        raise InputError(
            f"--model.hidden_layer is {model.hidden_layer}; expected less than the {text.num_hidden_layers} layers"
        )
    grid = tuple(size // patch for size in encoder.pixels.size)
    layout = _layout(tokenizer, family, grid[0] * grid[1], cameras, int(kind == "paligemma"), model.max_tokens)
    _check_length(text, len(layout.ids) + model.max_tokens, model, new=saved is None)
    if kind.startswith("qwen"):
        layout = _in_space(base, layout, [1, grid[0] * merge, grid[1] * merge])
    language_model = LanguageModel(decoder, out, tokenizer, family, layout, model)
    lacking = any(len(spec.cameras) < cameras for spec in policy.datasets)
    if lacking and weights and model.attention != "flash_attention_2":  # it needs a GPU; and what was loaded has passed
        language_model.check_mask()
    return Backbone(encoder, projector, language_model, originals)


def _check_length(text, length: int, model: ModelConfig, new: bool) -> None:
    """Raises InputError for a new decoder made for less than a prefix of this length, or one that sees less of it."""
    name, kinds = model.backbone or model.language_backbone, getattr(text, "layer_types", None)
    found = f"images and instruction are {length} tokens, and"
    cure = "lower --model.max_tokens, give fewer or smaller images, or another language model"
    most = getattr(text, "max_position_embeddings", None)
    if new and most and length > most:
        raise InputError(f"{found} {name} is made for {most} (max_position_embeddings); {cure}")
    window = getattr(text, "sliding_window", None)
    if model.attention == "flash_attention_2" or (kinds and "sliding_attention" not in kinds):  # the first obeys it
        return
    if window and length > window:
        raise InputError(
            f"{found} layers of {name} are made to see the last {window} alone (sliding_window), which is not done "
            f"here; {cure}"
        )


def _next_token(whole: nn.Module, model: ModelConfig) -> nn.Module | None:
    """The map to the next token, if the loss asks for it and it is not tied to the embedding.

    Raises InputError for a model that does more to its logits, which is not done here.
    """
    out, text = whole.get_output_embeddings(), whole.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    more = [name for name in names if getattr(text, name, None) not in (None, 1)]
    more += ["a bias"] if getattr(out, "bias", None) is not None else []
    if model.loss.lm and more:
        raise InputError(f"--model.loss.lm is not for language models whose logits have {' and '.join(more)}; drop it")
    return out if model.loss.lm and out.weight is not whole.get_input_embeddings().weight else None


def _pixels(originals: Originals, flag: str, *sizes) -> Pixels:
    """The preprocessing of a model. Raises InputError for a preprocessor_config.json that cannot be used."""
    try:
        return Pixels(originals.processor(flag), *sizes)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as failure:
        raise InputError(
            f"preprocessor_config.json of --model.{flag} cannot be used ({type(failure).__name__}: {failure}); "
            "correct it"
        ) from None


def _first_layers(flag: str, config, model: ModelConfig):
    """The configuration of the decoder, of its first --model.language_layers if so many are wanted."""
    text, wanted = config.get_text_config(), model.language_layers
    if wanted > text.num_hidden_layers:
        raise InputError(
            f"--model.language_layers is {wanted}, but {getattr(model, flag)} has {text.num_hidden_layers}; give at "
            "most these, or 0 for all"
        )
    if wanted:
        text.num_hidden_layers = wanted
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:wanted]
    return text


def _in_space(base: nn.Module, layout: Layout, grid: list[int]) -> Layout:
    """The layout with positions in time, height and width (Qwen). grid: frames, rows and columns of patches."""
    kinds = torch.zeros_like(layout.positions)
    kinds[:, layout.places] = 1  # images; the rest is text
    grids = torch.tensor([grid]).expand(int(layout.camera.max()), -1)
    positions, _ = base.get_rope_index(torch.zeros_like(kinds), mm_token_type_ids=kinds, image_grid_thw=grids)
    return layout._replace(positions=positions)
