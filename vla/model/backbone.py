"""The built-in backbone, small enough to train from scratch on a CPU: an image encoder and a prefix language model
on bytes.

Dimension key: B batch, N cameras, S prefix tokens, I image tokens, T text tokens, D width, h and w pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla import InputError
from vla.config import ModelConfig

BYTES = 258  # 256 bytes, padding, beginning of sequence
PAD, BOS = 256, 257
PATCH, REACH = 4, 6  # bytes of one text token; bytes that its convolution looks back over
FOLD = 4  # pixels either way that the image encoder takes as channels of one
LAYERS = 4  # if --model.language_layers does not say


class Attention(nn.Module):
    """Multi-head attention of queries over a context, with the query and key normalized (Henry et al., 2020)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.query_norm = nn.LayerNorm(width // heads)
        self.key_norm = nn.LayerNorm(width // heads, bias=False)  # the softmax would cancel a bias: it could not learn
        self.out = nn.Linear(width, width)
        self.joined: Tensor | None = None

    def join(self, dtype: torch.dtype) -> None:
        """From now on x attends to itself by one matrix of this dtype, a launch less; later weights are not seen."""
        self.joined = torch.cat([self.query.weight, self.key_value.weight]).detach().to(dtype)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, its width] -> both [B, heads, S, D / heads]."""
        k, v = self.key_value(context).unflatten(-1, (2, self.heads, -1)).unbind(2)  # [B, S, heads, D / heads]
        return self.key_norm(k).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x: [B, Q, D], context: [B, S, its width] or its keys and values, mask: bool, broadcast to [B, heads, Q, S],
        true where to look."""
        if self.joined is None:
            q = self.query(x).unflatten(-1, (self.heads, -1))  # [B, Q, heads, D / heads]
            k, v = context if isinstance(context, tuple) else self.keys_values(context)
        else:
            q, k, v = F.linear(x, self.joined).unflatten(-1, (3, self.heads, -1)).unbind(2)
            k, v = self.key_norm(k).transpose(1, 2), v.transpose(1, 2)
        q = self.query_norm(q).transpose(1, 2)  # [B, heads, Q, D / heads]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))  # [B, Q, D]


class Block(nn.Module):
    """A pre-norm transformer block; with a context_width it first attends to a context of that width."""

    def __init__(self, config: ModelConfig, context_width: int = 0):
        super().__init__()
        width, heads, wide = config.width, config.attention_heads, config.mlp_ratio * config.width
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, width)
        if context_width:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, heads, context_width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` takes in place of this context, worked out once for several passes."""
        return self.cross_attention.keys_values(context)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        if context is not None:
            x = x + self.cross_attention(self.cross_norm(x), context, context_mask)
        h = self.norm(x)
        x = x + self.attention(h, h, mask)
        return x + self.mlp(x)


class Residual(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def fourier_grid(rows: int, columns: int) -> Tensor:
    """Coordinates of a grid's cells in [-1, 1], their sines and cosines in four octaves. -> [rows · columns, 18]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    place = torch.stack([x.flatten(), y.flatten()], dim=-1)
    angles = (place[:, :, None] * torch.pi / 2 * 2 ** torch.arange(4)).flatten(1)
    return torch.cat([place, angles.sin(), angles.cos()], dim=-1)


class VisionEncoder(nn.Module):
    """Strided convolutions, which learn faster from few images than a linear patch embedding (Xiao et al., 2021).

    Each token carries an embedding of its place and of its camera.
    """

    def __init__(self, config: ModelConfig, cameras: int, image_size: tuple[int, int]):
        super().__init__()
        width, stride = config.width, config.vision_stride
        rows, columns = image_size[0] // stride, image_size[1] // stride
        fold = min(FOLD, stride)
        layers: list[nn.Module] = [nn.PixelUnshuffle(fold)]
        before, scale = 3 * fold**2, fold
        while scale <= stride:
            after = max(16, width * scale // stride // 8 * 8)
            layers += [
                nn.Conv2d(before, after, 3, stride=2 if scale > fold else 1, padding=1),
                *(Residual(after) for _ in range(config.vision_blocks)),
                *(nn.GroupNorm(8, after), nn.GELU()),
            ]
            before, scale = after, 2 * scale
        last = nn.Conv2d(before, width, 1).to(memory_format=torch.channels_last)  # has its gradient's strides, for DDP
        self.convolutions = nn.Sequential(*layers, last)
        self.register_buffer("places", fourier_grid(rows, columns), persistent=False)
        self.place = nn.Linear(self.places.shape[-1], width)
        self.camera = nn.Parameter(torch.randn(cameras, 1, width) * 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 [B, N, 3, h, w] -> [B, I, D] with I = N · (h / stride) · (w / stride)."""
        pixels = images.flatten(0, 1).float() / 127.5 - 1
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # as convolutions on a GPU want them
        features = self.convolutions(pixels).flatten(2).transpose(1, 2)  # [B·N, I / N, D]
        features = features.unflatten(0, images.shape[:2]) + self.place(self.places) + self.camera  # [B, N, I / N, D]
        return features.flatten(1, 2)


class LanguageModel(nn.Module):
    """A transformer over [image tokens | instruction tokens], all of which see each other: where to look depends on
    what was said.

    One text token stands for PATCH bytes: a causal convolution finds letter groups wherever a word begins, and a
    maximum over each patch keeps what it found (Kim et al., 2016: character-aware language models; Yu et al., 2023:
    byte patches).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(BYTES, 32)
        self.letters = nn.Conv1d(32, width, kernel_size=REACH)
        self.position = nn.Parameter(torch.randn(config.max_tokens // PATCH, width) * 0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.language_layers or LAYERS))
        self.norm = nn.LayerNorm(width)
        # It exists only if the loss asks for it.
        self.next_bytes = nn.Linear(width, PATCH * BYTES) if config.loss.lm else None
        self.width, self.hidden_layer, self.max_tokens = width, config.hidden_layer, config.max_tokens
        if self.hidden_layer >= len(self.blocks):
            raise InputError(
                f"--model.hidden_layer is {self.hidden_layer}; expected less than the {len(self.blocks)} layers"
            )

    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """UTF-8 bytes after a beginning mark: int64 [B, T] and mask bool [B, T], true where there is text.

        Raises InputError for an instruction that does not fit.
        """
        length = self.max_tokens
        tokens = torch.full((len(instructions), length), PAD)
        for row, text in zip(tokens, instructions, strict=True):
            ids = [BOS, *text.encode()]
            if len(ids) > length:
                raise InputError(
                    f"the instruction '{text}' has {len(ids) - 1} bytes; --model.max_tokens {length} holds "
                    f"{length - 1}: raise it to {-(-len(ids) // PATCH) * PATCH} or more"
                )
            row[: len(ids)] = torch.tensor(ids)
        return tokens, tokens != PAD

    def forward(
        self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, lm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, I, D], bool [B, N], int64 [B, T], bool [B, T] -> hidden states [B, S, D] and their mask bool [B, S], S =
        I + T / PATCH; and with `lm` the loss of the instruction [B].

        Nobody sees the image tokens of a camera whose image_mask is false.
        """
        letters = self.letters(F.pad(self.embedding(tokens).transpose(1, 2), (REACH - 1, 0)))  # [B, D, T]
        text = F.max_pool1d(F.gelu(letters), PATCH).transpose(1, 2) + self.position  # [B, T / PATCH, D]
        x = torch.cat([image_tokens, text], dim=1)  # [B, S, D]
        images = image_tokens.shape[1]
        text_mask = token_mask[:, ::PATCH]  # a patch counts if its first byte is text
        image_mask = image_mask[:, :, None].expand(-1, -1, images // image_mask.shape[1]).flatten(1)  # [B, I]
        mask = torch.cat([image_mask, text_mask], dim=1)  # [B, S]
        hidden = self._transform(x, mask[:, None, None, :], self.hidden_layer or len(self.blocks))
        return hidden, mask, self._loss(x, mask, images, tokens, token_mask) if lm else None

    def _transform(self, x: Tensor, attend: Tensor, layers: int) -> Tensor:
        for block in self.blocks[:layers]:
            x = block(x, attend)
        return self.norm(x)

    def _loss(self, x: Tensor, mask: Tensor, images: int, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Cross-entropy of the instruction given the images, byte by byte, averaged over each sample's own bytes.
        -> [B].

        It needs a pass of its own, in which no token sees what it predicts: images see images, and text sees images
        and the text before it.
        """
        visible = mask.new_ones(mask.shape[1], mask.shape[1]).tril()
        visible[:images, :images] = True
        hidden = self._transform(x, mask[:, None, None, :] & visible, len(self.blocks))[:, images:-1]
        logits = self.next_bytes(hidden).unflatten(-1, (PATCH, BYTES)).flatten(1, 2)  # [B, T - PATCH, BYTES]
        error = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, PATCH:], reduction="none")  # [B, T - PATCH]
        valid = token_mask[:, PATCH:].float()
        return (error * valid).sum(1) / valid.sum(1).clamp(min=1)
