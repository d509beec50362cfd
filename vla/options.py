"""From the command line to a TrainConfig that can work, to JSON and back; what may change when a run goes on.

Nothing here imports torch, so that `--help` and a wrong flag answer at once.
"""

import dataclasses
import inspect
import json
import math
import os
import typing
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from vla import InputError, hub
from vla.config import MODULES, CheckpointConfig, EvalConfig, OptimConfig, TrainConfig

BACKBONES = ("model.backbone", "model.vision_backbone", "model.language_backbone")
# What may change when a run goes on. The rest makes the training what it is.
MAY_CHANGE = (
    "resume_from",
    "deterministic",
    "compile",
    "cuda_graphs",
    "steps",
    "epochs",
    "micro_batch_size",
    "data.workers",
    "data.path",  # to where the same data lie now: see the digest in trainer_state.json
    "data.cache",
    "model.gradient_checkpointing",
    *BACKBONES,  # to where the same weights lie now: see the digest in trainer_state.json
    "eval.",
    "checkpoint.",
    "guard.",
    "log.",
)


def parse(arguments: list[str]) -> TrainConfig:
    """The validated configuration of a new run, or of the run to resume with what may change taken from the flags.

    Raises InputError for a wrong value, and for a flag that disagrees with the run it resumes.
    """
    import tyro

    read = partial(tyro.cli, TrainConfig, args=at_home(arguments), prog="train.py")
    config = read()
    if config.steps and config.epochs:
        raise InputError(f"found --steps {config.steps} and --epochs {config.epochs}; give one of them")
    run_dir = resume_folder(config)
    if run_dir is not None:
        saved = load(run_dir / "config.json")
        config = read(default=saved)
        if config.steps != saved.steps:  # whichever of the two is given now replaces the other
            config = dataclasses.replace(config, epochs=0.0)
        elif config.epochs != saved.epochs:
            config = dataclasses.replace(config, steps=0)
        before, after = flatten(saved), flatten(config)
        changed = [name for name in after if after[name] != before[name] and not name.startswith(MAY_CHANGE)]
        if not (config.model.freeze or config.lora.rank):  # the run has its whole backbone itself
            changed += [name for name in BACKBONES if after[name] != before[name]]
        if "run_dir" in changed and Path(config.run_dir).resolve() == run_dir.resolve():
            changed.remove("run_dir")
        if changed:
            has = {name: "none" if before[name] in ("", ()) else before[name] for name in changed}
            raise InputError(
                f"--resume_from {config.resume_from} goes on with the run's own settings; these flags disagree: "
                + "; ".join(f"--{name} {after[name]} (the run has {has[name]})" for name in changed)
                + ". Leave them out, or start a new run with --init_from"
            )
        config = dataclasses.replace(config, run_dir=str(run_dir))
    if not config.steps and not config.epochs:
        config = dataclasses.replace(config, epochs=20.0)
    named = {field.partition(".")[2]: flatten(config)[field] for field in BACKBONES}
    folders = {name: str(Path(place).resolve()) for name, place in named.items() if place and Path(place).is_dir()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **folders))  # found from anywhere
    paths = tuple(str(Path(path).resolve()) if Path(path).is_dir() else path for path in config.data.path)
    names = config.data.names or tuple(map(hub.dataset_name, paths))  # kept, wherever a resumed run finds its data
    cache = config.data.cache_dir and str(Path(config.data.cache_dir).resolve())
    data = dataclasses.replace(config.data, path=paths, names=names, cache_dir=cache)
    config = dataclasses.replace(config, data=data)
    validate(config)
    if run_dir is None:
        _check_heeded(config)
        if config.steps:  # else train.py knows them when it has read the data
            check_steps(config, config.steps)
    kept = config.checkpoint.every, config.checkpoint.keep_every
    if run_dir is None or kept != (saved.checkpoint.every, saved.checkpoint.keep_every):  # what a run has had stays
        _check_kept(config.checkpoint)
    return config


def at_home(arguments: Iterable[str]) -> list[str]:
    """With the home folder in place of ~, which shells leave alone behind `--flag=`."""
    parts = [each.partition("=") if each.startswith("--") else ("", "", each) for each in arguments]
    return [f"{flag}{equals}{os.path.expanduser(value)}" for flag, equals, value in parts]


def from_dict(cls, data: dict, where: str, prefix: str = ""):
    """The dataclass `cls` from what JSON made of it, with those inside it and in its tuples.

    Raises InputError for a key that it does not have, and for a value of another type or that is no choice.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where} has {data!r} in place of the entries of a {cls.__name__}; restore it")
    kinds = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(kinds)):
        raise InputError(
            f"{where} has unknown entries {', '.join(unknown)}; it was written by another version of this project"
        )
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise InputError(f"{where} lacks {', '.join(missing)}; write it again with this version of the project")
    values = {}
    for name, value in data.items():
        (item, *_) = typing.get_args(kinds[name]) or (None,)
        if dataclasses.is_dataclass(kinds[name]):
            value = from_dict(kinds[name], value, where, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(item):
            if not isinstance(value, list):
                raise InputError(f"{where} has {name} {value!r}, expected a list; restore it")
            value = [from_dict(item, each, where, f"{prefix}{name}.") for each in value]
        values[name] = _tuples(value)
        if not _is_a(kinds[name], values[name]):
            expected = inspect.formatannotation(kinds[name]).replace("tuple", "list")
            raise InputError(f"{where} has {prefix}{name} {value!r}, expected {expected}; correct it")
    return cls(**values)


def _is_a(kind, value) -> bool:
    """Whether a value from JSON is of the kind that a field of a dataclass has."""
    items = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in items
    if typing.get_origin(kind) is tuple:
        items = items[:1] * len(value) if isinstance(value, tuple) and ... in items else items
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_is_a, items, value))
    return type(value) in ((int, float) if kind is float else (kind,))


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def flatten(config, prefix: str = "") -> dict[str, object]:
    """Every field by its flag's name, such as {"data.path": …}."""
    flat: dict[str, object] = {}
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        flat.update(flatten(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: value})
    return flat


def load(path: Path) -> TrainConfig:
    """The TrainConfig that `save` wrote. Raises InputError where there is none or it is not of this version."""
    if not path.is_file():
        raise InputError(f"{path} is missing, so {path.parent} is no run folder; expected one that train.py made")
    try:
        content = json.loads(path.read_text())
    except ValueError as failure:
        raise InputError(f"{path} is not JSON ({failure}); restore it, or start a new run") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, expected a run's settings; restore it")
    return from_dict(TrainConfig, content, str(path))


def save(config: TrainConfig, path: Path) -> None:
    """Write the configuration as JSON. What belongs to one start only (resume_from, log.profile) is left out.

    Raises InputError, the file as it was, if it cannot be written.
    """
    lasting = dataclasses.replace(config, resume_from="", log=dataclasses.replace(config.log, profile=0))
    content = dataclasses.asdict(lasting)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as failure:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({failure}); make room, or choose another --run_dir") from None


def resume_folder(config: TrainConfig) -> Path | None:
    """The run folder that --resume_from means; None for a new run."""
    if not config.resume_from:
        return None
    if config.resume_from == "auto":
        if not config.run_dir:
            raise InputError("--resume_from auto needs --run_dir, the run to go on with or to begin")
        folder = Path(config.run_dir, "checkpoints")
        started = any(folder.glob("step_*")) or any(folder.glob(".replaced_*"))  # see vla/checkpoint.py
        return Path(config.run_dir) if started else None
    folder = run_folder(Path(config.resume_from))
    if (folder / "model.safetensors").is_file():
        raise InputError(
            f"--resume_from {config.resume_from} is an export; give the run that it comes from, or begin one with "
            "--init_from"
        )
    return folder


def run_folder(path: Path) -> Path:
    """The run to which a path belongs: itself, RUN/best, RUN/checkpoints or one checkpoint of it; or a link to one."""
    for run in (path, _above(path), _above(path.resolve())):  # a name typed within the run has no parents of its own
        if (run / "config.json").is_file() and (run / "checkpoints").is_dir():
            return run
    return path if run == path.resolve() else run


def _above(path: Path) -> Path:
    """What a path says of its run: what lies above a checkpoint and the folder of checkpoints."""
    if path.name == "best" or path.name.startswith("step_"):
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


def check_policy(name: str | Path) -> None:
    """Raises InputError for what is neither a folder with a policy nor may be one's name on the Hugging Face hub."""
    path = Path(name)
    if (path / "checkpoints").is_dir():
        raise InputError(f"{path} is a run, expected a policy; give {path / 'export'}, or a checkpoint of it")
    here = path.exists() or path.parent.is_dir() or str(path).count("/") != 1
    if here and not (path / "config.json").is_file():
        raise InputError(f"{path} is no folder with a config.json; give an export, such as runs/NAME/export")


def accumulation(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """Micro-batch size and micro-batches per step of each process.

    Raises InputError, with sizes that fit, unless global_batch_size = micro_batch_size × processes × a whole number.
    """
    total, micro = config.global_batch_size, config.micro_batch_size
    if total % world_size:
        fitting = max(total // world_size, 1) * world_size
        processes = [size for size in range(1, 2 * world_size + 1) if total % size == 0]
        raise InputError(
            f"--global_batch_size {total} cannot be split over {world_size} processes; "
            f"{fitting} or {fitting + world_size} can; or launch {' or '.join(map(str, processes))} of them"
        )
    share = total // world_size
    if micro and share % micro:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        raise InputError(
            f"--micro_batch_size {micro} does not divide {share}, each of {world_size} processes' share of "
            f"--global_batch_size {total}; one of {', '.join(map(str, fitting))} does"
        )
    return micro or share, share // (micro or share)


def within(name: str, value: float, low: float, high: float | None) -> None:
    """Raises InputError, naming the flag, for a value out of bounds or not finite. high: None for no bound."""
    if not (math.isfinite(value) and low <= value and (high is None or value <= high)):
        limit = f"at least {low}" + (f" and at most {high}" if high is not None else "")
        raise InputError(f"--{name} is {value}; expected {limit}")


def validate(config: TrainConfig) -> None:
    """Raises InputError for the first value that cannot work, naming flag and cure."""
    model, optim = config.model, config.optim
    for name, path in (("run_dir", config.run_dir), ("data.path", config.data.path)):
        if not path:
            raise InputError(f"--{name} is missing; give a folder")
    for path in config.data.path if resume_folder(config) is None else ():
        inside = Path(config.run_dir).resolve().is_relative_to(Path(path).resolve())
        if inside and Path(path, "meta/info.json").exists():
            raise InputError(f"--run_dir {config.run_dir} lies in the data set {path}; give a folder elsewhere")
    if len(config.data.image_size) not in (0, 2) or any(size < 1 for size in config.data.image_size):
        found = " ".join(map(str, config.data.image_size))
        raise InputError(f"--data.image_size is {found}; expected height and width in pixels, such as 224 224")
    parts = (*MODULES, "projector")
    for flag, names in (
        ("model.freeze", list(model.freeze)),
        ("model.unfreeze", [name for name, _ in model.unfreeze]),
        ("lora.modules", list(config.lora.modules)),
        ("optim.module_lrs", [name for name, _ in optim.module_lrs]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"--{flag} names {', '.join(twice)} twice; leave one out")
        if unknown := sorted(name for name in names if name.partition(".")[0] not in parts):
            raise InputError(
                f"--{flag} names {', '.join(unknown)}; the modules are {', '.join(parts)} (of a composed backbone), "
                "and parts of them such as language_model.model"
            )
    if not set(parts) - set(model.freeze) - {"projector"} and not model.vision_backbone:
        raise InputError("--model.freeze names every module, so there is nothing to train; leave one out")
    if frozen := sorted(set(dict(optim.module_lrs)) & set(model.freeze) - set(dict(model.unfreeze))):
        raise InputError(
            f"--optim.module_lrs gives a rate to {', '.join(frozen)}, which --model.freeze freezes; drop one"
        )
    if optim.muon_lr and (optim.eight_bit or not optim.lr):
        found = "--optim.eight_bit" if optim.eight_bit else f"--optim.lr {optim.lr}, which AdamW needs beside it"
        raise InputError(f"--optim.muon_lr {optim.muon_lr} does not go with {found}; drop one")
    if config.cuda_graphs and (model.gradient_checkpointing or model.unfreeze):
        found = "--model.gradient_checkpointing" if model.gradient_checkpointing else "--model.unfreeze"
        raise InputError(f"--cuda_graphs repeats the same launches in every step, which {found} rules out; drop one")
    bounds = {
        "seed": (0, 2**32 - 1),
        "global_batch_size": (1, None),
        "micro_batch_size": (0, None),
        "steps": (0, None),
        "epochs": (0, None),
        "data.workers": (0, None),
        "data.val_fraction": (0, 0.9),
        "data.tolerance_s": (0, None),
        "data.augment.shift": (0, 0.5),
        "data.augment.crop": (0, 0.5),
        "data.augment.rotate": (0, 180),
        "data.augment.brightness": (0, 1),
        "data.augment.contrast": (0, 1),
        "data.augment.saturation": (0, 1),
        "data.augment.hue": (0, 0.5),
        "optim.lr": (0, None),
        "optim.muon_lr": (0, None),
        "optim.warmup_steps": (0, None),
        "optim.decay_share": (0, 1),
        "optim.final_ratio": (0, 1),
        "optim.weight_decay": (0, None),
        "optim.clip": (0, None),
        "optim.ema": (0, 0.999999),
        "eval.every": (0, None),
        "eval.samples": (1, None),
        "eval.patience": (0, None),
        "eval.min_delta": (0, None),
        "eval.episodes": (1, None),
        "checkpoint.every": (1, None),
        "checkpoint.keep": (1, None),
        "checkpoint.keep_every": (0, None),
        "guard.bad_steps": (1, None),
        "guard.rollbacks": (0, None),
        "guard.spike_factor": (1 if config.guard.spike_factor else 0, None),
        "guard.hang_seconds": (0, None),
        "log.every": (1, None),
        "log.profile": (0, None),
    }
    values = flatten(config)
    checks = [(name, values[name], bounds[name]) for name in bounds]
    checks += [("optim.module_lrs", rate, (0, None)) for _, rate in optim.module_lrs]
    checks += [("optim.betas", beta, (0, 0.999999)) for beta in optim.betas]
    checks += [("optim.milestones", share, (1e-6, 0.999999)) for share in optim.milestones]
    for name, value, bound in checks:
        within(name, value, *bound)
    if config.eval.metric == "success" and not config.eval.env:
        raise InputError("--eval.metric success needs an environment to act in; give --eval.env, such as tabletop")
    if config.eval.patience and not config.eval.every:
        raise InputError(
            f"--eval.patience {config.eval.patience} counts evaluations, of which --eval.every 0 makes none before the "
            "end; give the steps between them, or leave it out"
        )
    if config.data.val_fraction == 0 and config.eval.env and config.eval.metric != "success":
        raise InputError(
            f"--data.val_fraction 0 leaves no episodes for --eval.metric {config.eval.metric}; "
            "give a fraction, or --eval.metric success"
        )
    if config.data.val_fraction == 0 and not config.eval.env and config.eval.patience:
        raise InputError(
            f"--eval.patience {config.eval.patience} needs evaluations, for which --data.val_fraction 0 leaves no "
            "episodes; give a fraction, or leave it out"
        )


def _check_heeded(config: TrainConfig) -> None:
    """Raises InputError for what is given to a new run, and heeded by others alone."""
    optim, act = config.optim, config.eval
    heeding = {"final_ratio": ("linear", "cosine", "wsd"), "milestones": ("step",), "decay_share": ("wsd",)}
    for name, schedules in heeding.items():
        if getattr(optim, name) != getattr(OptimConfig(), name) and optim.schedule not in schedules:
            raise InputError(
                f"--optim.{name} is heeded by --optim.schedule {' and '.join(schedules)}, and not by {optim.schedule}; "
                "drop it, or take another schedule"
            )
    for name in ("dataset", "episodes"):
        if (value := getattr(act, name)) != getattr(EvalConfig(), name) and not act.env:
            raise InputError(
                f"--eval.{name} {value} has no effect without an environment to act in; give --eval.env, such as "
                "tabletop, or leave it out"
            )
    if config.data.pad_dims and len(config.data.path) == 1:
        raise InputError("--data.pad_dims has no effect on a single data set; leave it out")


def _check_kept(config: CheckpointConfig) -> None:
    """Raises InputError if not all checkpoints that are to be kept would be made."""
    if config.keep_every % config.every:
        raise InputError(
            f"--checkpoint.keep_every is {config.keep_every}; expected a multiple of "
            f"--checkpoint.every {config.every}, or 0 for none"
        )


def check_steps(config: TrainConfig, steps: int) -> None:
    """Raises InputError for what a new run of so many steps would never come to."""
    if late := [f"{name} {step}" for name, step in config.model.unfreeze if step >= steps]:
        raise InputError(f"--model.unfreeze {' '.join(late)} lies beyond the last of {steps} steps; leave it out")
