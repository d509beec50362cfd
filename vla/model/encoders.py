"""Image tokens from pretrained models, after the preprocessing of their own processors.

Dimension key: B batch, N cameras, I image tokens of one camera, H and W pixels, D width of the decoder, K layers of the
decoder that get image features of their own (Qwen3-VL).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla import InputError, in_one_line
from vla.model.pixels import Pixels, patches


class VisionEncoder(nn.Module):
    """The part of a pretrained model that makes image tokens, after the preprocessing of its own processor."""

    def __init__(self, model: nn.Module, pixels: Pixels):
        super().__init__()
        self.model, self.pixels, self.kind = model, pixels, model.config.model_type
        vision = model.config.vision_config
        grid = [1, *(size // vision.patch_size for size in pixels.size)]  # frames, rows, columns
        self.register_buffer("grid", torch.tensor([grid]), persistent=False)
        self.cut = ()  # how pictures are cut into patches, where that is not left to the model
        if self.kind.startswith("qwen"):
            self.cut = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        elif self.kind in ("smolvlm", "idefics3"):
            self.cut = vision.patch_size, 1, 1
            seen, embeddings = [], model.vision_model.embeddings
            hook = embeddings.position_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            with torch.no_grad():
                embeddings(torch.zeros(1, 3, *pixels.size), torch.ones(1, *grid[1:], dtype=torch.bool))
            hook.remove()
            self.register_buffer("places", seen[0], persistent=False)  # int64 [1, patches]

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [n, 3, h, w] -> what the model takes: pixels [n, 3, H, W], or flat patches of them."""
        pixels = self.pixels(images).to(dtype)
        return patches(pixels, *self.cut) if self.cut else pixels

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, N, 3, h, w] -> [B, N · I, D · (1 + K)]: the tokens, beside those for the decoder's first layers."""
        B, N = images.shape[:2]
        pixels = self.prepare(images.flatten(0, 1), next(self.model.parameters()).dtype)
        if self.kind in ("smolvlm", "idefics3"):
            return self._whole_pictures(pixels.unflatten(0, (B * N, -1))).unflatten(0, (B, N)).flatten(1, 2)
        if self.kind == "paligemma":
            features = self.model.get_image_features(pixels)
        else:
            features = self.model.get_image_features(pixels, self.grid.expand(B * N, -1))
        levels = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
        levels = [level if isinstance(level, Tensor) else torch.cat(level) for level in levels]
        return torch.cat([level.reshape(B, -1, level.shape[-1]) for level in levels], dim=-1)

    def _whole_pictures(self, flat: Tensor) -> Tensor:
        """What SmolVLM's get_image_features gives, which looks for empty pictures and parts of them: the device would
        be waited for three times, and attention needs no mask. [B · N, patches, 3 · p · p] -> [B · N, I, D].
        """
        vision = self.model.vision_model
        patch = vision.embeddings.patch_embedding  # a convolution of patches that do not overlap: a matrix product
        embedded = F.linear(flat, patch.weight.flatten(1), patch.bias)
        embedded = embedded + vision.embeddings.position_embedding(self.places)
        features = vision.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
        return self.model.connector(vision.post_layernorm(features))


class PatchEncoder(nn.Module):
    """Any image encoder that gives features of patches, after the preprocessing of its own processor."""

    def __init__(self, model: nn.Module, pixels: Pixels):
        super().__init__()
        self.model, self.pixels, self.patch = model, pixels, model.config.patch_size
        self.grid = tuple(size // self.patch for size in pixels.size)
        self.register_buffer("shape", torch.tensor([self.grid]), persistent=False)

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [n, 3, h, w] -> what the model takes: pixels [n, 3, H, W], or flat patches [n, I, p · p · 3]."""
        pixels = self.pixels(images).to(dtype)
        if not self.model.config.model_type.startswith("siglip2"):
            return pixels
        grid = pixels.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)  # [n, 3, rows, columns, p, p]
        return grid.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, N, 3, h, w] -> features of the patches [B, N · I, width]."""
        pixels = self.prepare(images.flatten(0, 1), next(self.model.parameters()).dtype)
        if pixels.dim() == 3:  # SigLIP 2, which takes images of any aspect: it is told their grid
            mask = torch.ones(pixels.shape[:2], dtype=torch.int64, device=pixels.device)
            features = self.model(pixels, mask, self.shape.expand(len(pixels), -1)).last_hidden_state
        else:
            features = self.model(pixels).last_hidden_state
        features = features[:, -self.grid[0] * self.grid[1] :]  # behind the tokens for the whole image, if any
        return features.unflatten(0, images.shape[:2]).flatten(1, 2)


class Projector(nn.Sequential):
    """Two linear maps that take image features to the width of a decoder (LLaVA-1.5, Liu et al., 2023)."""

    def __init__(self, features: int, width: int):
        super().__init__(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """[..., features], perhaps of a frozen encoder in bfloat16 -> [..., width]."""
        return super().forward(features.to(self[0].weight.dtype))


def unused(encoder: nn.Module, image_size: tuple[int, int]) -> list[nn.Parameter]:
    """The parameters that image tokens do not depend on, such as those of a token that hides patches.

    Raises InputError for an encoder that does not give one feature for each patch of each image.
    """
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    with torch.enable_grad():
        try:
            tokens = encoder(torch.zeros(1, 2, 3, *image_size, dtype=torch.uint8))
        except (RuntimeError, TypeError, ValueError) as failure:  # each model has its own words for it
            made = "x".join(map(str, encoder.pixels.size))
            raise InputError(
                f"the image encoder does not take images of {made}, as its preprocessor_config.json makes them "
                f"({in_one_line(failure)}); correct that file, or give one such as SigLIP or DINO"
            ) from None
    if isinstance(encoder, PatchEncoder):
        (rows, columns), width, kind = encoder.grid, encoder.model.config.hidden_size, encoder.model.config.model_type
        if tokens.shape != (1, 2 * rows * columns, width):
            raise InputError(
                f"--model.vision_backbone, of the family {kind}, makes {[*tokens.shape[1:]]} "
                f"of two images of {rows}x{columns} patches, expected {[2 * rows * columns, width]}; give one that has "
                "a feature for each patch, such as SigLIP or DINO"
            )
    nodes, seen, reached = [tokens.grad_fn], {None}, set()  # backwards, without computing anything
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            reached.add(getattr(node, "variable", None))
            nodes += [before for before, _ in node.next_functions]
    return [p for p in parameters if p not in reached]
