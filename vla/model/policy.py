"""VLAPolicy: images, an instruction and the robot's state in, a chunk of actions in the robot's own units out.

Dimension key: B batch, N cameras, H action horizon, A action dimension, P state dimension, T text tokens, S prefix
tokens, D width.
"""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vla import InputError, hub, in_one_line, keyed
from vla.config import LoraConfig
from vla.model import backbone, encoders, observation, pretrained
from vla.model.graph import Graph
from vla.model.heads import HEADS
from vla.model.load import load
from vla.model.lora import add_adapters, merge_adapters, submodule
from vla.model.normalize import Normalizer
from vla.model.spec import DatasetSpec, PolicyConfig, check
from vla.options import check_policy


class VLAPolicy(nn.Module, PyTorchModelHubMixin):
    """A vision-language-action policy with three parts: vision_encoder, language_model, action_head; and between the
    first two a projector, if they are of two pretrained models.

    The prefix (images, instruction) is embedded once; state, noise and flow time enter in the action head alone, so
    sampling runs the head alone again, and frozen parts run without autograd with exactly the same result.

    batch: dataset int64 [B] (its place in config.datasets), images uint8 [B, N, 3, h, w], image_mask bool [B, N] (false
    for cameras that the data set lacks), state float32 [B, P], tokens int64 [B, T], token_mask bool [B, T], key int64
    [B] (whatever is random about a sample is drawn from it), and for training actions float32 [B, H, A], action_is_pad
    bool [B, H]. P and A are the largest of all data sets; what others lack is 0, and nothing is learned from it.
    Raises InputError for a configuration that cannot be built, naming the flag.
    """

    # PolicyConfig, Path | None, bool; without annotations the mixin leaves reading config.json to us.
    def __init__(self, config, saved=None, weights=True):
        """saved: a folder of `Originals.save`, read in place of the pretrained originals. weights: load theirs; else
        they are left as the memory was."""
        super().__init__()
        check(config)
        model, cameras = config.model, len(config.cameras)
        self.backbone = None
        if model.backbone or model.vision_backbone:
            self.backbone = pretrained.build(config, saved, weights)
            self.vision_encoder = self.backbone.vision_encoder
            if self.backbone.projector:
                self.projector = self.backbone.projector
            self.language_model = self.backbone.language_model
        else:
            self.vision_encoder = backbone.VisionEncoder(model, cameras, config.image_size)
            self.language_model = backbone.LanguageModel(model)
        self.action_head = HEADS[model.head](model, self.language_model.width, config.state_dim, config.action_dim)
        self.state_norm = Normalizer({s.name: len(s.state_names) for s in config.datasets}, model.normalization)
        dims = {s.name: len(s.action_names) for s in config.datasets}
        self.action_norm = Normalizer(dims, model.normalization, clipped=model.head == "token")
        if model.gradient_checkpointing:
            for layer in self.layers():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self._settle_trained(config)
        base = self.backbone.originals.digest if self.backbone and weights else config.base
        self.config = dataclasses.replace(config, base=base)
        self.freeze_at(0)
        self._driven = 0 if len(config.datasets) == 1 else None
        self._graph: Graph | None = None
        self._rounded = False
        self.reset()

    def _settle_trained(self, config: PolicyConfig) -> None:
        """Put in adapters; note the names of what can never be trained (_never), and of the pretrained parameters that
        stay as they are for the whole run (_base)."""
        model, parts, base, never = config.model, dict(self.named_children()), set(), set()
        self._freeze, self._unfreeze = model.freeze, dict(model.unfreeze)
        if self.backbone:
            base = {*parts["vision_encoder"].parameters(), *parts["language_model"].parameters()}
        if config.lora.rank:
            for name in config.lora.modules:
                never |= set(submodule(self, name, "lora.modules").parameters())
            add_adapters(self, config.lora)
        for name in model.freeze:
            submodule(self, name, "model.freeze")
        self._never = {name for name, p in self.named_parameters() if p in never}
        frozen = tuple(f"{name}." for name in model.freeze if name not in self._unfreeze)
        fixed = {name for name, _ in self.named_parameters() if name in self._never or name.startswith(frozen)}
        self._base = {name for name, p in self.named_parameters() if p in base} & fixed
        if model.frozen_dtype == "bfloat16":
            for name in {*model.freeze, *config.lora.modules * bool(config.lora.rank)} & parts.keys():
                for p in base & set(parts[name].parameters()):
                    p.data = p.data.bfloat16()
        if model.random_backbone:
            self._base = set()  # these are loaded from nowhere

    def freeze_unused(self) -> None:
        """Freeze for good what image tokens do not depend on, which would get no gradient; before a training."""
        self.freeze_at(math.inf)
        trained = any(p.requires_grad for p in self.vision_encoder.parameters())
        if self.backbone and (trained or self.backbone.projector):
            unused = set(encoders.unused(self.vision_encoder, self.config.image_size))
            self._never |= {name for name, p in self.named_parameters() if p in unused}
        self.freeze_at(0)

    def layers(self) -> list[nn.Module]:
        """The repeated blocks of all parts, which are computed again, or sharded, one by one."""
        kinds = (backbone.Block,)
        if self.backbone:
            from transformers.modeling_layers import GradientCheckpointingLayer

            kinds += (GradientCheckpointingLayer,)
        return [part for part in self.modules() if isinstance(part, kinds)]

    def compile(self, **options) -> None:
        """Compile the layers and what comes before those of the image encoder, by torch.compile with these options.

        One by one, as layers of a kind share one program, which starts sooner; and what draws random numbers stays
        outside: torch.compile fails on its whole numbers of 64 bits. Names of weights stay as they are.
        """
        if self.backbone:
            self.vision_encoder.prepare = torch.compile(self.vision_encoder.prepare, **options)
        for part in self.layers() if self.backbone else [self.vision_encoder, *self.layers()]:
            again = isinstance(part.forward, partial)  # checkpoint is not looked through: what it calls is compiled
            forward = torch.compile(part.forward.args[0] if again else part.forward, **options)
            part.forward = partial(checkpoint, forward, use_reentrant=False) if again else forward

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the classes of layers, which are sharded one by one; accelerate looks them up here."""
        return sorted({type(layer).__name__ for layer in self.layers()})

    def freeze_at(self, step: float) -> bool:
        """Freeze what is not trained at this step of a run, and nothing else. Returns whether anything changed."""
        frozen = tuple(f"{n}." for n in self._freeze if n not in self._unfreeze or step < self._unfreeze[n])
        before = [p.requires_grad for p in self.parameters()]
        for name, p in self.named_parameters():
            p.requires_grad_(name not in self._never and not name.startswith(frozen))
        reached, self._reached = False, {}  # by training: below the lowest trained part nothing needs autograd
        for name, part in self.named_children():  # in the order of the forward pass
            reached = self._reached[name] = reached or any(p.requires_grad for p in part.parameters())
        self.train(self.training)
        return before != [p.requires_grad for p in self.parameters()]

    def train(self, mode: bool = True) -> "VLAPolicy":
        """As of every module; but what training does not reach drops nothing, so that it always gives the same."""
        super().train(mode)
        for name, reached in self._reached.items():
            if not reached:
                getattr(self, name).eval()
        return self

    def _autograd(self, part: str):
        return torch.set_grad_enabled(self._reached[part] and torch.is_grad_enabled())

    def own_state(self) -> dict[str, Tensor]:
        """The state_dict without pretrained weights that are never trained, which are loaded from elsewhere."""
        return {name: value for name, value in self.state_dict().items() if name not in self._base}

    def own_config(self) -> PolicyConfig:
        """The configuration that goes with own_state."""
        return self.config if self._base else dataclasses.replace(self.config, base="")

    def keep(self, names: Iterable[str]) -> None:
        """These are not what the pretrained model has: from now on they belong to own_state."""
        self._base -= set(names)

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt: the same policy, to rounding, without any."""
        merge_adapters(self)
        self._base, self._never = set(), set()
        model = dataclasses.replace(self.config.model, frozen_dtype="float32")
        self.config = dataclasses.replace(self.config, model=model, lora=LoraConfig(), base="")

    def untrained(self) -> "VLAPolicy":
        """The same network with random weights, and the same statistics."""
        model, saved = self.config.model, None
        if self.backbone:
            saved = self.backbone.originals.saved
            model = dataclasses.replace(model, random_backbone=True, frozen_dtype="float32")
        other = VLAPolicy(dataclasses.replace(self.config, model=model, lora=LoraConfig(), base=""), saved)
        other.state_norm.load_state_dict(self.state_norm.state_dict())
        other.action_norm.load_state_dict(self.action_norm.state_dict())
        return other

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options) -> "VLAPolicy":
        """The policy in a folder (export, checkpoint), or of a name on the hub. options: below, hub.OPTIONS."""
        check_policy(pretrained_model_name_or_path)
        download = {name: options.pop(name) for name in hub.OPTIONS if name in options}
        return super().from_pretrained(hub.policy(pretrained_model_name_or_path, download), **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict,
        map_location: str = "cpu",
        backbone: str = "",
        vision_backbone: str = "",
        language_backbone: str = "",
        **mixin,
    ):
        """What from_pretrained calls. Strict, where the mixin would leave unmatched weights random without a word.

        backbone, vision_backbone, language_backbone: where the weights under adapters lie now, if not where they were.
        """
        if unknown := sorted(mixin.keys() - set(hub.OPTIONS)):  # the mixin gives its own always
            raise TypeError(f"from_pretrained has no option {', '.join(unknown)}")
        moved = {"backbone": backbone, "vision_backbone": vision_backbone, "language_backbone": language_backbone}
        return load(cls, Path(model_id), config, moved).to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """What save_pretrained calls: all weights, or with adapters them and what else was trained, and a reference."""
        if self._rounded:
            raise InputError("a captured policy is not saved, as its weights may be rounded; copy the folder it was in")
        state, config = self.state_dict(), dataclasses.replace(self.config, base="")
        if self.config.lora.rank:
            state, config = self.own_state(), self.own_config()
        save_file({name: value.contiguous() for name, value in state.items()}, save_directory / "model.safetensors")
        (save_directory / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        if self.backbone:
            self.backbone.originals.save(save_directory / "backbone")

    def check_base(self, base: str, where: Path) -> None:
        """Raises InputError unless the frozen pretrained weights are those of this digest, which `where` belongs to."""
        if base and self.config.base != base:
            raise InputError(
                f"{where} was trained on other weights than {self.backbone.originals} has now; bring those back"
            )

    def set_statistics(self, statistics: Sequence[tuple[dict, dict]]) -> None:
        """Take the statistics of the states and of the actions of each data set (see Normalizer.set_statistics)."""
        self.state_norm.set_statistics([state for state, _ in statistics])
        self.action_norm.set_statistics([action for _, action in statistics])

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, N, 3, h, w] -> image tokens [B, I, the language model's width]."""
        with self._autograd("vision_encoder"):
            tokens = self.vision_encoder(images)
        if hasattr(self, "projector"):
            with self._autograd("projector"):
                tokens = self.projector(tokens)
        return tokens

    def _understand(self, batch: dict[str, Tensor], lm: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states of images and instruction [B, S, D], their mask [B, S], and the loss of the instruction."""
        image_tokens = self.encode_images(batch["images"])
        with self._autograd("language_model"):
            return self.language_model(image_tokens, batch["image_mask"], batch["tokens"], batch["token_mask"], lm)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, a weighted sum of terms, and each term, all means over the samples (scalars); sample_loss [B]."""
        observation.check_batch(self.config, batch, training=True)
        weights, scale = self.config.model.loss, self.action_norm.of(batch["dataset"])
        hidden, mask, error = self._understand(batch, lm=weights.lm > 0)
        state = self.state_norm.of(batch["dataset"]).normalize(batch["state"][:, None])[:, 0]  # [B, P]
        actions = scale.normalize(batch["actions"])
        valid = ~batch["action_is_pad"][:, :, None] & scale.present  # [B, H, A]
        terms = self.action_head.loss(hidden, mask, state, actions, valid, batch["key"], scale)
        if error is not None:
            terms["lm"] = error
        sample_loss = sum(getattr(weights, name) * term.detach() for name, term in terms.items())
        terms = {name: term.mean() for name, term in terms.items()}
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        return {"loss": loss, "sample_loss": sample_loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def predict_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        """The next H actions in each robot's own units, float32 [B, H, A], 0 in dimensions that it lacks.

        Raises InputError without statistics, and for a batch of other shapes or dtypes than VLAPolicy's.
        """
        observation.check_batch(self.config, batch, training=False)
        if not self._has_statistics:
            self.state_norm.require()
            self.action_norm.require()
            self._has_statistics = True
        return (self._graph or self._predict)(batch)

    def _predict(self, batch: dict[str, Tensor]) -> Tensor:
        hidden, mask, _ = self._understand(batch)
        state = self.state_norm.of(batch["dataset"]).normalize(batch["state"][:, None])[:, 0]  # [B, P]
        return self.action_head.sample(hidden, mask, state, batch["key"], self.action_norm.of(batch["dataset"]))

    @torch.no_grad()
    def capture(self, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
        """From now on predict in this precision, with compiled layers, and batches of this size as one CUDA graph.

        In bfloat16 the fastest measured (docs/RESULTS.md). The weights are rounded, so the policy is for nothing else
        from then on: it may be neither moved nor trained, and is not saved. Raises InputError for a policy that is not
        on a GPU, or whose prediction is not the same launches every time: with the image encoder of Qwen or SigLIP 2
        NaFlex it is not.
        """
        device = self.state_norm.offset.device
        if device.type != "cuda":
            raise InputError(f"the policy is on the device {device}; policy.to('cuda') before policy.capture()")
        example = observation.nothing(self.config, self.tokenize, batch_size)

        def predict(batch: dict[str, Tensor]) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self._predict(batch)

        self._rounded = True
        self.eval()
        launches = {"options": {"combo_kernels": True}}  # a single one for what can be worked out side by side
        self.compile(**launches)
        self.action_head.decoder.compile(**launches)  # as a whole: what is between its layers is launched for each
        for part in self.modules():  # what autocast would round again in each call
            if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                part.to(dtype)
            elif isinstance(part, backbone.Block):
                part.attention.join(dtype)
        try:
            self._graph = Graph(predict, {name: value.to(device) for name, value in example.items()})
        except RuntimeError as failure:
            why = in_one_line(failure)
            raise InputError(f"the policy cannot be captured ({why}); load it again, act without capture") from failure

    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """int64 [B, T] and mask bool [B, T], T fixed so that shapes never change (see the language model)."""
        return self.language_model.tokenize(instructions)

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
        """A batch of what the driven robot observes, on the policy's device (if captured: on the CPU). key: int64 [B].

        An observation has images (of the robot's cameras, of any size: an array uint8 [cameras, 3, H, W] in their
        order, or by name uint8 [3, H, W] each), state (float32, of the robot's own dimensions) and instruction (str).
        Raises InputError for images and states that are not those of the robot, or not finite.
        """
        place, device = self.config.place(self.driven.name), self.state_norm.offset.device
        batch = observation.collate(self.config, place, self.tokenize, observations, key, device.type == "cuda")
        return batch if self._graph else {name: value.to(device, non_blocking=True) for name, value in batch.items()}

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
