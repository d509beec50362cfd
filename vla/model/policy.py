"""VLAPolicy: images, an instruction and the robot's state in, a chunk of actions in the robot's own units out.

Dimension key: B batch, N cameras, H action horizon, A action dimension, P state dimension, T text tokens, S prefix
tokens, D width.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from vla import InputError, keyed
from vla.config import MODULES, LossConfig, ModelConfig, from_dict, within
from vla.images import resize_with_padding
from vla.model.backbone import PATCH, LanguageModel, VisionEncoder, tokenize
from vla.model.heads import HEADS
from vla.model.normalize import Normalizer
from vla.shards import Rows


@dataclass(frozen=True)
class DatasetSpec:
    """What the robot of one data set gives and takes."""

    name: str
    cameras: tuple[str, ...]  # those of the policy's cameras that it has, in the policy's order
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: float  # actions per second


@dataclass(frozen=True)
class PolicyConfig:
    """All that rebuilds a policy: its architecture, and the robots that it learns from. Stored as config.json."""

    model: ModelConfig
    cameras: tuple[str, ...]  # of all data sets
    image_size: tuple[int, int]  # height, width in pixels
    datasets: tuple[DatasetSpec, ...]

    @property
    def state_dim(self) -> int:
        """P: the most that any data set has."""
        return max(len(spec.state_names) for spec in self.datasets)

    @property
    def action_dim(self) -> int:
        """A: the most that any data set has."""
        return max(len(spec.action_names) for spec in self.datasets)

    def place(self, name: str) -> int:
        """Of a data set among all. Raises InputError for one that the policy was not trained on."""
        names = [spec.name for spec in self.datasets]
        if name not in names:
            raise InputError(f"data set '{name}' is unknown to the policy, which was trained on {', '.join(names)}")
        return names.index(name)


class VLAPolicy(nn.Module, PyTorchModelHubMixin):
    """A vision-language-action policy with three parts: vision_encoder, language_model, action_head.

    The prefix (images, instruction) is embedded once; state, noise and flow time enter in the action head alone, so
    sampling runs the head alone again, and frozen parts run without autograd with exactly the same result.

    batch: dataset int64 [B] (its place in config.datasets), images uint8 [B, N, 3, h, w], image_mask bool [B, N] (false
    for cameras that the data set lacks), state float32 [B, P], tokens int64 [B, T], token_mask bool [B, T], key int64
    [B] (whatever is random about a sample is drawn from it), and for training actions float32 [B, H, A], action_is_pad
    bool [B, H]. P and A are the largest of all data sets; what others lack is 0, and nothing is learned from it.
    Raises InputError for a configuration that cannot be built, naming the flag.
    """

    def __init__(self, config):  # a PolicyConfig; without the annotation the mixin leaves reading config.json to us
        super().__init__()
        check(config)
        self.config, model = config, config.model
        self.vision_encoder = VisionEncoder(model, len(config.cameras), config.image_size)
        self.language_model = LanguageModel(model)
        self.action_head = HEADS[model.head](model, config.state_dim, config.action_dim)
        self.state_norm = Normalizer({s.name: len(s.state_names) for s in config.datasets}, model.normalization)
        self.action_norm = Normalizer({s.name: len(s.action_names) for s in config.datasets}, model.normalization)
        for name in model.freeze:
            getattr(self, name).requires_grad_(False)
        self._driven = 0 if len(config.datasets) == 1 else None
        self.reset()

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict, map_location: str = "cpu", **download):
        """What from_pretrained calls. Strict, where the mixin would leave unmatched weights random without a word."""
        folder = Path(model_id)
        if not folder.is_dir():
            download = {name: download.get(name) for name in ("revision", "cache_dir", "token", "local_files_only")}
            folder = Path(hf_hub_download(model_id, "model.safetensors", **download)).parent
        policy = cls(from_dict(PolicyConfig, config, str(folder / "config.json")))
        weights, own = Rows.of(folder, "model"), policy.own_state()
        missing, left_over = sorted(own.keys() - weights.parts.keys()), sorted(weights.parts.keys() - own.keys())
        if missing or left_over:
            raise InputError(
                f"{folder / 'model.safetensors'} does not fit its config.json: missing {missing or 'nothing'}, "
                f"left over {left_over or 'nothing'}; export the policy again"
            )
        for name, tensor in own.items():
            weights.read(name, tensor)
        policy.state_norm.require()
        policy.action_norm.require()
        return policy.to(map_location).eval()

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the classes of the blocks that are sharded one by one; accelerate looks them up here."""
        parts = [module for module in self.modules() if module is not self]
        named = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()} | {"Block"}
        return sorted(named & {type(part).__name__ for part in parts})

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that belong in a checkpoint, by name; where the policy is sharded, DTensors."""
        return self.state_dict()

    def set_statistics(self, statistics: Sequence[tuple[dict, dict]]) -> None:
        """Take the statistics of the states and of the actions of each data set (see Normalizer.set_statistics)."""
        self.state_norm.set_statistics([state for state, _ in statistics])
        self.action_norm.set_statistics([action for _, action in statistics])

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
        weights, scale = self.config.model.loss, self.action_norm.of(batch["dataset"])
        prefix = self.encode_images(batch["images"]), batch["image_mask"], batch["tokens"], batch["token_mask"]
        with self._autograd("vision_encoder", "language_model"):
            hidden, mask = self.language_model(*prefix)
        state = self.state_norm.of(batch["dataset"]).normalize(batch["state"][:, None])[:, 0]  # [B, P]
        actions = scale.normalize(batch["actions"])
        valid = ~batch["action_is_pad"][:, :, None] & scale.real  # [B, H, A]
        terms = self.action_head.loss(hidden, mask, state, actions, valid, batch["key"], scale)
        if weights.lm:
            terms["lm"] = self.language_model.loss(*prefix)
        sample_loss = sum(getattr(weights, name) * term.detach() for name, term in terms.items())
        terms = {name: term.mean() for name, term in terms.items()}
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        return {"loss": loss, "sample_loss": sample_loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def predict_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        """The next H actions in each robot's own units, float32 [B, H, A], 0 in dimensions that it lacks.

        Raises InputError without statistics.
        """
        if not self._has_statistics:
            self.state_norm.require()
            self.action_norm.require()
            self._has_statistics = True
        image_tokens = self.encode_images(batch["images"])
        hidden, mask = self.language_model(image_tokens, batch["image_mask"], batch["tokens"], batch["token_mask"])
        state = self.state_norm.of(batch["dataset"]).normalize(batch["state"][:, None])[:, 0]  # [B, P]
        return self.action_head.sample(hidden, mask, state, batch["key"], self.action_norm.of(batch["dataset"]))

    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """int64 [B, T] and mask bool [B, T], T fixed so that shapes never change (see backbone.tokenize)."""
        return tokenize(instructions, self.config.model.max_tokens)

    def drive(self, name: str) -> None:
        """Act from now on as the robot of this data set; a policy of a single one does so without being told.

        Raises InputError for a data set that the policy was not trained on.
        """
        self._driven = self.config.place(name)
        self._queue.clear()

    @property
    def driven(self) -> DatasetSpec:
        """The data set whose robot acts. Raises InputError while that is open."""
        if self._driven is None:
            names = ", ".join(spec.name for spec in self.config.datasets)
            raise InputError(f"the policy was trained on {names}: say with policy.drive(name) whose robot acts")
        return self.config.datasets[self._driven]

    def collate(self, observations: list[dict], key: Tensor) -> dict[str, Tensor]:
        """A batch on the policy's device, of what the driven robot observes. key: int64 [B].

        An observation has images (of the robot's cameras, of any size: an array uint8 [cameras, 3, H, W] in their
        order, or by name uint8 [3, H, W] each), state (float32, of the robot's own dimensions) and instruction (str).
        Raises InputError for images and states that are not those of the robot.
        """
        robot, size = self.driven, len(observations)
        tokens, token_mask = self.tokenize([observation["instruction"] for observation in observations])
        has = torch.tensor([camera in robot.cameras for camera in self.config.cameras])
        batch = {
            "dataset": torch.full((size,), self._driven),
            "images": torch.stack([self._images(observation["images"]) for observation in observations]),
            "image_mask": has.repeat(size, 1),
            "state": torch.stack([self._state(observation["state"]) for observation in observations]),
            "tokens": tokens,
            "token_mask": token_mask,
            "key": key,
        }
        return {name: value.to(self.state_norm.offset.device) for name, value in batch.items()}

    def _images(self, seen: np.ndarray | dict[str, np.ndarray]) -> Tensor:
        """What the driven robot sees, as all of the policy's cameras: uint8 [N, 3, h, w], 0 where it has none."""
        robot, images = self.driven, seen
        if not isinstance(seen, dict) and len(seen) == len(robot.cameras):
            images = dict(zip(robot.cameras, seen, strict=True))
        if not isinstance(images, dict) or images.keys() != set(robot.cameras):
            found = f"images of {', '.join(seen)}" if isinstance(seen, dict) else f"{len(seen)} images"
            expected = f"those of the cameras of {robot.name}: {', '.join(robot.cameras)}"
            raise InputError(f"the observation has {found}, expected {expected}")
        view = torch.zeros(len(self.config.cameras), 3, *self.config.image_size, dtype=torch.uint8)
        for camera, image in images.items():
            pixels = np.array(image)  # a copy: torch warns of memory that it may not write
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3:
                found = f"{pixels.dtype} {list(pixels.shape)}"
                raise InputError(f"the observation's image of {camera} is {found}, expected uint8 [3, height, width]")
            resized = resize_with_padding(torch.from_numpy(pixels)[None], self.config.image_size)
            view[self.config.cameras.index(camera)] = resized[0]
        return view

    def _state(self, state: np.ndarray) -> Tensor:
        """The driven robot's state with 0 in the dimensions that it lacks, float32 [P]."""
        names, own = self.driven.state_names, np.array(state, np.float32)
        if own.shape != (len(names),):
            expected = f"the {len(names)} numbers of {self.driven.name}: {', '.join(names)}"
            raise InputError(f"the observation's state has shape {list(own.shape)}, expected {expected}")
        return F.pad(torch.from_numpy(own), (0, self.config.state_dim - len(names)))

    def reset(self, seed: int = 0) -> None:
        """Forget the queue of actions, at the start of an episode; `seed` fixes the noise of a flow head."""
        self._queue, self._seed, self._chunks, self._has_statistics = deque(), seed, 0, False

    def select_action(self, observation: dict) -> np.ndarray:
        """The next action, float32 [the driven robot's dimensions], for an observation that `collate` takes.

        It is of a new chunk once the first n_action_steps of the last were given out.
        """
        if not self._queue:
            batch = self.collate([observation], keyed.derive(self._seed, torch.tensor([self._chunks])))
            steps, dims = self.config.model.n_action_steps, len(self.driven.action_names)
            self._queue.extend(self.predict_chunk(batch)[0, :steps, :dims].cpu().numpy())
            self._chunks += 1
        return self._queue.popleft()


def check(config: PolicyConfig) -> None:
    """Raises InputError, naming the flag and what would fit, for a policy that cannot be built."""
    model, loss, datasets = config.model, config.model.loss, config.datasets
    names = [spec.name for spec in datasets]
    if not names or len(set(names)) < len(names):
        raise InputError(f"the data sets are named {names}; expected at least one, and each another name")
    if len(names) > 1 and (taken := {action for spec in datasets for action in spec.action_names} & set(names)):
        raise InputError(f"data set {min(taken)} is named like an action, so that its metrics are too; rename it")
    for spec in datasets:
        known = tuple(camera for camera in config.cameras if camera in spec.cameras)
        if not known or known != tuple(spec.cameras):
            raise InputError(
                f"data set {spec.name} has the cameras {list(spec.cameras)}; expected one or more of "
                f"{list(config.cameras)}, in this order"
            )
        dims = len(spec.action_names)
        if wrong := [d for d in model.gripper_dims if not 0 <= d < dims]:
            raise InputError(
                f"--model.gripper_dims names {wrong}, but actions of {spec.name} have the dimensions 0 to {dims - 1}; "
                "name dimensions that are grippers in every data set"
            )
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
    if model.gripper_dims and model.head != "regression":
        raise InputError(
            f"--model.gripper_dims has no effect with --model.head {model.head}; leave it out, or use regression"
        )
    used = {"flow": {"flow"}, "token": {"ce"}, "regression": set()}[model.head]
    if model.head == "regression":
        used |= {"bce"} if model.gripper_dims else set()
        used |= {"l1", "mse"} if len(set(model.gripper_dims)) < config.action_dim else set()
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
