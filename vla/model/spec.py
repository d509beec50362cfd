"""What a policy is made of, and for which robots: its configuration, and what can be wrong with it."""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass, field

from vla import InputError
from vla.config import LoraConfig, LossConfig, ModelConfig
from vla.model.backbone import PATCH
from vla.options import within


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
    lora: LoraConfig = field(default_factory=LoraConfig)
    base: str = ""  # digest of the pretrained weights that are not stored beside this, but under model.backbone's name

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
    _check_backbone(config)
    bounds = {
        "attention_heads": (1, None),
        "vision_blocks": (0, None),
        "language_layers": (0, None),
        "hidden_layer": (0, None),
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
    if model.label_smoothing and model.head != "token":
        raise InputError(f"--model.label_smoothing has no effect with --model.head {model.head}; leave it out")
    if model.gripper_dims and model.head != "regression":
        raise InputError(
            f"--model.gripper_dims has no effect with --model.head {model.head}; leave it out, or use regression"
        )
    used = [name for names in _terms(config).values() for name in names]
    for name, default in dataclasses.asdict(LossConfig()).items():
        weight = getattr(loss, name)
        if not 0 <= weight < math.inf:
            raise InputError(f"--model.loss.{name} is {weight}; expected 0 or more")
        if weight != default and name not in [*used, "lm"]:
            raise InputError(f"--model.loss.{name} has no effect with --model.head {model.head} here; leave it out")
    if not sum(getattr(loss, name) for name in used):
        raise InputError(f"the loss weights {', '.join(used)} are all 0, so nothing is learned; raise one")
    if loss.lm and {"language_model", "language_model.model"} & set(model.freeze):
        raise InputError("--model.loss.lm trains the language_model, which --model.freeze freezes; drop one")
    if model.hidden_layer and not loss.lm:
        raise InputError(
            f"--model.hidden_layer {model.hidden_layer}: layers above it learn from --model.loss.lm alone, which is 0; "
            f"give --model.language_layers {model.hidden_layer}, or that loss"
        )
    _check_parts(config)


def check_losses(config: PolicyConfig) -> None:
    """Raises InputError if a new run would leave some of the actions' dimensions untrained."""
    for what, names in _terms(config).items():
        if not sum(getattr(config.model.loss, name) for name in names):
            raise InputError(f"the loss weights {', '.join(names)} are all 0, so the {what} learn nothing; raise one")


def _terms(config: PolicyConfig) -> dict[str, list[str]]:
    """The terms of the loss that teach these dimensions."""
    head, grippers = config.model.head, set(config.model.gripper_dims)
    if head != "regression":
        return {"actions": ["flow" if head == "flow" else "ce"]}
    others = {"other dimensions": ["l1", "mse"]} if len(grippers) < config.action_dim else {}
    return ({"gripper dimensions": ["bce"]} if grippers else {}) | others


def _check_backbone(config: PolicyConfig) -> None:
    """Raises InputError for flags of a backbone that do not go together."""
    model, default = config.model, ModelConfig()
    composed = bool(model.vision_backbone), bool(model.language_backbone)
    if len({*composed}) > 1 or (model.backbone and any(composed)):
        raise InputError(
            f"found --model.backbone '{model.backbone}', --model.vision_backbone '{model.vision_backbone}' and "
            f"--model.language_backbone '{model.language_backbone}'; give the first, or the other two"
        )
    built_in = not model.backbone and not any(composed)
    other = ("random_backbone", "trust_remote_code", "attention", "frozen_dtype")
    other = other if built_in else ("vision_blocks", "vision_stride")
    for name in other:
        if getattr(model, name) != getattr(default, name):
            kind = "the built-in backbone" if built_in else "a pretrained backbone"
            raise InputError(f"--model.{name} has no effect on {kind}; leave it out")
    if built_in:
        (height, width), stride = config.image_size, model.vision_stride
        if stride < 2 or stride & (stride - 1) or height % stride or width % stride:
            raise InputError(
                f"--model.vision_stride {stride} does not fit images of {height}x{width}; give a power of two "
                "that divides both"
            )
        if model.max_tokens % PATCH:
            raise InputError(f"--model.max_tokens is {model.max_tokens}; expected a multiple of {PATCH}")
    if model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "--model.attention flash_attention_2 needs the package flash-attn; install it, or leave it out"
        )


def _check_parts(config: PolicyConfig) -> None:
    """Raises InputError for adapters, and frozen parts, that do not go together."""
    model, lora = config.model, config.lora
    if odd := sorted(set(dict(model.unfreeze)) - set(model.freeze)):
        raise InputError(f"--model.unfreeze names {', '.join(odd)}, which --model.freeze does not freeze; add it there")
    steps = dict(model.unfreeze)
    idle = [(a, b) for a in steps for b in model.freeze if a.startswith(f"{b}.") and steps[a] < steps.get(b, math.inf)]
    if idle:
        inner, outer = idle[0]
        raise InputError(
            f"--model.unfreeze {inner} {steps[inner]} has no effect under {outer}, which --model.freeze freezes for "
            "longer; name there the parts of it that stay frozen"
        )
    for flag, value, low, high in (
        *((f"model.unfreeze {name}", step, 1, None) for name, step in model.unfreeze),
        ("lora.rank", lora.rank, 0, None),
        ("lora.alpha", lora.alpha, 1e-6, None),
        ("lora.dropout", lora.dropout, 0, 0.99),
    ):
        within(flag, value, low, high)
    if lora.rank and not lora.modules:
        raise InputError("--lora.modules is empty, so there is nothing to adapt; name a module, or drop --lora.rank")
    if not lora.rank and lora != LoraConfig():
        raise InputError("the flags --lora have no effect without --lora.rank; give a rank, such as 16")
    adapted = lora.modules if lora.rank else ()
    under = [a for a, _ in model.unfreeze if f"{a}.".startswith(tuple(f"{b}." for b in adapted))]
    if under:
        raise InputError(
            f"--model.unfreeze names {', '.join(under)}, which lie under adapters (--lora.modules); drop it"
        )
    if twice := sorted({a for a in adapted for b in model.freeze if f"{a}.".startswith(f"{b}.")}):
        raise InputError(
            f"--model.freeze freezes {', '.join(twice)}, where --lora.modules puts adapters; these freeze the weights "
            "under them: drop it from --model.freeze"
        )
    built_in = not model.backbone and not model.vision_backbone
    if new := sorted(name for name in adapted if built_in or name.partition(".")[0] in ("action_head", "projector")):
        raise InputError(
            f"--lora.modules names {', '.join(new)}, whose weights are new and would stay random under adapters; name "
            "pretrained parts"
        )
    if model.frozen_dtype != "float32":
        if model.unfreeze:
            raise InputError("--model.unfreeze trains weights that --model.frozen_dtype keeps in bfloat16; drop one")
        if not {"vision_encoder", "language_model"} & {*model.freeze, *adapted}:
            raise InputError(
                f"--model.frozen_dtype {model.frozen_dtype} is for a vision_encoder or language_model that is frozen "
                "or has adapters; name one in --model.freeze or --lora.modules, or leave it out"
            )
