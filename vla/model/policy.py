"""VLAPolicy: images, an instruction and the robot's state in, a chunk of actions in the robot's own units out.

Dimension key: B batch, N cameras, H action horizon, A action dimension, P state dimension, T text tokens, S prefix
tokens, D width.
"""

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from vla import InputError, keyed
from vla.config import MODULES, LossConfig, ModelConfig, from_dict, within
from vla.model.backbone import PATCH, LanguageModel, VisionEncoder, tokenize
from vla.model.heads import HEADS
from vla.model.normalize import Normalizer


@dataclass(frozen=True)
class PolicyConfig:
    """All that rebuilds a policy: its architecture, and what the robot gives and takes. Stored as config.json."""

    model: ModelConfig
    cameras: tuple[str, ...]
    image_size: tuple[int, int]  # height, width in pixels
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: int  # actions per second


class VLAPolicy(nn.Module, PyTorchModelHubMixin):
    """A vision-language-action policy with three parts: vision_encoder, language_model, action_head.

    The prefix (images, instruction) is embedded once; state, noise and flow time enter in the action head alone, so
    sampling runs the head alone again, and frozen parts run without autograd with exactly the same result.

    batch: images uint8 [B, N, 3, h, w], state float32 [B, P], tokens int64 [B, T], token_mask bool [B, T], and for
    training actions float32 [B, H, A], action_is_pad bool [B, H], key int64 [B] (whatever is random about a sample
    is drawn from it). Raises InputError for a configuration that cannot be built, naming the flag.
    """

    def __init__(self, config):  # a PolicyConfig; without the annotation the mixin leaves reading config.json to us
        super().__init__()
        self.config, model = config, config.model
        state_dim, action_dim = len(config.state_names), len(config.action_names)
        check(config)
        self.vision_encoder = VisionEncoder(model, len(config.cameras), config.image_size)
        self.language_model = LanguageModel(model)
        self.action_head = HEADS[model.head](model, state_dim, action_dim)
        self.state_norm = Normalizer(state_dim, model.normalization)
        self.action_norm = Normalizer(action_dim, model.normalization)
        for name in model.freeze:
            getattr(self, name).requires_grad_(False)
        self.reset()

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict, map_location: str = "cpu", **download):
        """What from_pretrained calls. Strict, where the mixin would leave unmatched weights random without a word."""
        folder = Path(model_id)
        if not folder.is_dir():
            download = {name: download.get(name) for name in ("revision", "cache_dir", "token", "local_files_only")}
            folder = Path(hf_hub_download(model_id, "model.safetensors", **download)).parent
        policy = cls(from_dict(PolicyConfig, config, str(folder / "config.json")))
        weights = load_file(folder / "model.safetensors", device=map_location)
        own = policy.state_dict()
        missing, left_over = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or left_over:
            raise InputError(
                f"{folder / 'model.safetensors'} does not fit its config.json: missing {missing or 'nothing'}, "
                f"left over {left_over or 'nothing'}; export the policy again"
            )
        policy.load_state_dict(weights)
        policy.state_norm.require()
        policy.action_norm.require()
        return policy.to(map_location).eval()

    def set_statistics(self, state: dict, action: dict) -> None:
        """Take the training data's statistics (see Normalizer.set_statistics)."""
        self.state_norm.set_statistics(state)
        self.action_norm.set_statistics(action)

    def _autograd(self, *parts: str):
        """Autograd only if one of these parts is trained: below the lowest trained part nothing needs it."""
        trained = any(part not in self.config.model.freeze for part in parts)
        return torch.set_grad_enabled(trained and torch.is_grad_enabled())

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, N, 3, h, w] -> image tokens [B, I, D]."""
        with self._autograd("vision_encoder"):
            return self.vision_encoder(images.float() / 127.5 - 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, a weighted sum of terms, and each term, all means over the samples (scalars); sample_loss [B]."""
        tokens, token_mask, weights = batch["tokens"], batch["token_mask"], self.config.model.loss
        image_tokens = self.encode_images(batch["images"])
        with self._autograd("vision_encoder", "language_model"):
            hidden, mask = self.language_model(image_tokens, tokens, token_mask)
        state, actions = self.state_norm(batch["state"]), self.action_norm(batch["actions"])
        terms = self.action_head.loss(
            hidden, mask, state, actions, ~batch["action_is_pad"], batch["key"], self.action_norm
        )
        if weights.lm:
            terms["lm"] = self.language_model.loss(image_tokens, tokens, token_mask)
        sample_loss = sum(getattr(weights, name) * term.detach() for name, term in terms.items())
        terms = {name: term.mean() for name, term in terms.items()}
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        return {"loss": loss, "sample_loss": sample_loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def predict_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        """The next H actions in the robot's own units, float32 [B, H, A]. Raises InputError without statistics."""
        if not self._has_statistics:
            self.state_norm.require()
            self.action_norm.require()
            self._has_statistics = True
        image_tokens = self.encode_images(batch["images"])
        hidden, mask = self.language_model(image_tokens, batch["tokens"], batch["token_mask"])
        return self.action_head.sample(hidden, mask, self.state_norm(batch["state"]), batch["key"], self.action_norm)

    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """int64 [B, T] and mask bool [B, T], T fixed so that shapes never change (see backbone.tokenize)."""
        return tokenize(instructions, self.config.model.max_tokens)

    def collate(self, observations: list[dict], key: Tensor) -> dict[str, Tensor]:
        """A batch on the policy's device, of observations (images, state, instruction). key: int64 [B]."""
        tokens, token_mask = self.tokenize([observation["instruction"] for observation in observations])
        batch = {
            "images": torch.from_numpy(np.stack([observation["images"] for observation in observations])),
            "state": torch.from_numpy(np.stack([observation["state"] for observation in observations])),
            "tokens": tokens,
            "token_mask": token_mask,
            "key": key,
        }
        return {name: value.to(self.state_norm.offset.device) for name, value in batch.items()}

    def reset(self, seed: int = 0) -> None:
        """Forget the queue of actions, at the start of an episode; `seed` fixes the noise of a flow head."""
        self._queue, self._seed, self._chunks, self._has_statistics = deque(), seed, 0, False

    def select_action(self, observation: dict) -> np.ndarray:
        """The next action, float32 [A]: of a new chunk once the first n_action_steps of the last were given out."""
        if not self._queue:
            batch = self.collate([observation], keyed.derive(self._seed, torch.tensor([self._chunks])))
            self._queue.extend(self.predict_chunk(batch)[0, : self.config.model.n_action_steps].cpu().numpy())
            self._chunks += 1
        return self._queue.popleft()


def check(config: PolicyConfig) -> None:
    """Raises InputError, naming the flag and what would fit, for a policy that cannot be built."""
    model, loss, actions = config.model, config.model.loss, len(config.action_names)
    height, width = config.image_size
    stride = model.vision_stride
    if stride < 2 or stride & (stride - 1) or height % stride or width % stride:
        raise InputError(
            f"--model.vision_stride {stride} does not fit images of {height}x{width}; give a power of two "
            "that divides both"
        )
    bounds = {
        "attention_heads": (1, None),
        "vision_blocks": (0, None),
        "language_layers": (1, None),
        "head_layers": (1, None),
        "mlp_ratio": (1, None),
        "chunk_size": (1, None),
        "flow_steps": (1, None),
        "bins": (2, None),
        "label_smoothing": (0, 0.99),
        "max_tokens": (2 * PATCH, None),
    }
    for name, bound in bounds.items():
        within(f"model.{name}", getattr(model, name), *bound)
    if model.width % (8 * model.attention_heads) or model.width < 16:
        raise InputError(
            f"--model.width {model.width} is no multiple of 8 x --model.attention_heads {model.attention_heads}, "
            "of at least 16; change one"
        )
    if not 1 <= model.n_action_steps <= model.chunk_size:
        raise InputError(
            f"--model.n_action_steps is {model.n_action_steps}; expected 1 to --model.chunk_size {model.chunk_size}"
        )
    if model.max_tokens % PATCH:
        raise InputError(f"--model.max_tokens is {model.max_tokens}; expected a multiple of {PATCH}")
    if unknown := sorted(set(model.freeze) - set(MODULES)):
        raise InputError(f"--model.freeze names {', '.join(unknown)}; the modules are {', '.join(MODULES)}")
    if model.label_smoothing and model.head != "token":
        raise InputError(f"--model.label_smoothing has no effect with --model.head {model.head}; leave it out")
    if wrong := [d for d in model.gripper_dims if not 0 <= d < actions]:
        raise InputError(f"--model.gripper_dims names {wrong}, but actions have the dimensions 0 to {actions - 1}")
    if model.gripper_dims and model.head != "regression":
        raise InputError(
            f"--model.gripper_dims has no effect with --model.head {model.head}; leave it out, or use regression"
        )
    used = {"flow": {"flow"}, "token": {"ce"}, "regression": set()}[model.head]
    if model.head == "regression":
        used |= {"bce"} if model.gripper_dims else set()
        used |= {"l1", "mse"} if len(set(model.gripper_dims)) < actions else set()
    for name, default in dataclasses.asdict(LossConfig()).items():
        weight = getattr(loss, name)
        if not 0 <= weight < math.inf:
            raise InputError(f"--model.loss.{name} is {weight}; expected 0 or more")
        if weight != default and name not in used | {"lm"}:
            raise InputError(f"--model.loss.{name} has no effect with --model.head {model.head} here; leave it out")
    if not sum(getattr(loss, name) for name in used):
        raise InputError(f"the loss weights {', '.join(sorted(used))} are all 0, so nothing is learned; raise one")
    if loss.lm and "language_model" in model.freeze:
        raise InputError("--model.loss.lm trains the language_model, which --model.freeze freezes; drop one")
