"""Weights on their way in and out: load them alone, and make the one folder that drives a robot.

python -m vla.export runs/demo                          the best checkpoint again to runs/demo/export
python -m vla.export runs/demo/checkpoints/step_00001000 --out somewhere
python -m vla.export runs/lora --merge                  adapters added to the weights under them, to runs/lora/merged
"""

import json
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vla import InputError, NotSaved, checkpoint, in_one_line, told
from vla.config import MovedConfig, TrainConfig
from vla.model.policy import VLAPolicy
from vla.options import at_home, run_folder
from vla.shards import Rows, files

# What wrappers put before the names of weights: DDP, torch.compile, and trainers that keep the policy as an
# attribute.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.|policy\.)+")


def export(source: Path, out: Path, summary: str, merge: bool = False, **moved: str) -> None:
    """Write config.json, model.safetensors (the averaged weights, if the checkpoint has any), a model card and, with a
    pretrained backbone, its tokenizer and configuration to `out`.

    source: a verified checkpoint. summary: a sentence for the card. The folder is replaced whole. It needs nothing else
    but for adapters: these need the weights under them where --model.backbone found them, or `merge`. moved: where they
    lie now (see VLAPolicy.from_pretrained). Raises NotSaved, having changed nothing, if it cannot be written.
    """
    out = out.resolve()  # a link to a folder stays, and the folder is replaced
    policy = VLAPolicy.from_pretrained(source, **moved)
    if files(source, "ema"):
        average, own = Rows.of(source, "ema"), policy.state_dict()
        average.fill({name: own[name] for name in average.parts}, f"the average in {source}")
    if merge:
        policy.merge()
    temporary = out.with_name(f".exporting_{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policy.save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(policy, summary))
        mode = checkpoint.file_mode(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors leaves 0600
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except (OSError, SafetensorError) as failure:
        shutil.rmtree(temporary, ignore_errors=True)
        why = in_one_line(failure)
        cure = f"make room, or choose another --out, then python -m vla.export {source}"
        raise NotSaved(f"{out} cannot be written ({why}); {cure}") from None


def deliver(config: TrainConfig, state: dict, checkpoints: Path, datasets: list[str]) -> str:
    """Export the best checkpoint of a run that is done, or its last if nothing was evaluated.

    Which one it was is put into the state, and returned as a line.
    """
    later = [path for step, path in checkpoint.all_steps(checkpoints).items() if step > state["step"]]  # left behind
    best = checkpoint.find(str(Path(config.run_dir, "best")), checkpoints, later)
    out = Path(config.run_dir, "export")
    found, metric, lost, judged = checkpoint.read_state(best), state["metric"], "", ""
    if metric and found["step"] != state["best_step"]:  # its save has failed, or it was damaged since
        lost = f"warning: the best, of step {state['best_step']} with eval/{metric} {state['best']:.4g}, was lost\n"
    state["best_step"] = found["step"]
    if metric:
        state["best"] = -found["score"] if metric == "success" else found["score"]
        judged = f", eval/{metric} {state['best']:.4g}"
    samples = f"{state['step']} steps of {config.global_batch_size} samples"
    which = f"the {'best' if metric else 'last'} of {samples} was step {found['step']}"
    card = f"Trained on {', '.join(datasets)}; {which}."
    flags = ("backbone", "vision_backbone", "language_backbone")
    export(best, out, card, **{name: getattr(config.model, name) for name in flags})
    return f"{lost}done: {which}{judged}; it is exported to {out}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state_dict from an export or a checkpoint, a .safetensors file, or a .pt file (weights_only, so nothing runs).

    Prefixes of wrappers are removed. Raises InputError for anything else.
    """
    in_folder = files(path, "model")
    if not in_folder and not path.is_file():
        cure = f": give {path / 'export'} or a checkpoint of it" if (path / "checkpoints").is_dir() else ""
        raise InputError(f"--init_from {path} is neither an export folder nor a file of weights{cure}")
    try:
        if in_folder or path.suffix == ".safetensors":
            rows = Rows.of(path, "model") if in_folder else Rows.of(path.parent, path.stem)
            weights = {name: rows.tensor(name) for name in rows.parts}
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # both libraries raise many kinds; all mean the same to who gave the file
        raise InputError(f"--init_from {path} cannot be read as weights alone: {in_one_line(failure)}") from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"--init_from {path} holds no state_dict (a mapping of names to tensors)")
    return {WRAPPERS.sub("", name): value for name, value in weights.items()}


def init_from(policy: VLAPolicy, path: Path) -> str:
    """Load what fits by name and shape; normalization statistics stay the new data's. Returns what matched, was
    missing, was left over.

    Raises InputError if nothing fits.
    """
    own, weights = policy.state_dict(), read_weights(path)
    if path.is_dir():
        _check_adapters(policy, path)
    # Weights that lie under adapters here did not where they come from.
    weights = {_under_adapter(n) if _under_adapter(n) in own else n: value for n, value in weights.items()}
    statistics = {name for name in own if name.startswith(("state_norm.", "action_norm."))}
    wanted, given = own.keys() - statistics, weights.keys() - statistics
    matched = {name for name in wanted & given if own[name].shape == weights[name].shape}
    if not matched:
        raise InputError(
            f"--init_from {path}: none of its {len(given)} tensors fits the policy by name and shape "
            f"(it has {', '.join(sorted(given)[:3])} …; expected {', '.join(sorted(wanted)[:3])} …): check --model"
        )
    policy.load_state_dict({name: weights[name] for name in matched}, strict=False)
    policy.keep(matched)
    parts = [f"{len(matched)} tensors matched"]
    for title, names in (("missing", wanted - matched), ("left over", given - matched)):
        parts.append(
            f"{len(names)} {title}"
            + (f" ({', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''})" if names else "")
        )
    return f"--init_from {path}: " + ", ".join(parts)


def _under_adapter(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer.{parameter}"


def _check_adapters(policy: VLAPolicy, folder: Path) -> None:
    """Raises InputError if an export has adapters that are not those of the policy."""
    theirs = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    adapters, base = theirs.get("lora", {}), theirs.get("base")
    if not adapters.get("rank"):
        return
    own = json.loads(json.dumps(asdict(policy.config.lora)))
    if adapters != own or (base and base != policy.config.base):
        raise InputError(
            f"--init_from {folder} has adapters of other settings (--lora) or on other weights (--model.backbone) than "
            "this policy; give those that it has, or make it whole by python -m vla.export RUN --merge"
        )


def _card(policy: VLAPolicy, summary: str) -> str:
    config, model, several = policy.config, policy.config.model, len(policy.config.datasets) > 1
    count = sum(p.numel() for p in policy.parameters())
    chunks = f"chunks of {model.chunk_size}, {model.n_action_steps} executed"
    robots = "\n".join(
        f"| cameras{of} | {', '.join(spec.cameras)} at {config.image_size[0]}x{config.image_size[1]} |\n"
        f"| state{of} | {', '.join(spec.state_names)} |\n"
        f"| actions{of} | {', '.join(spec.action_names)} at {spec.fps} Hz, {chunks} |"
        for spec in config.datasets
        for of in [f" of {spec.name}" if several else ""]
    )
    backbone = f"| backbone | {policy.backbone.originals} |\n" if policy.backbone else ""
    if config.lora.rank:
        backbone += f"| adapters | of rank {config.lora.rank}, on these weights, which have to be there |\n"
    first, *others = [spec.name for spec in config.datasets]
    drive = f'policy.drive("{first}")  # or {", ".join(others)}\n' if several else ""
    return f"""---
library_name: vla
pipeline_tag: robotics
tags: [vision-language-action, robotics]
---
# A vision-language-action policy

{summary}

| | |
| --- | --- |
| parameters | {count:,} |
{robots}
| action head | {model.head} |
{backbone}
```python
from vla.model import VLAPolicy

policy = VLAPolicy.from_pretrained("this folder")
{drive}policy.reset()
# images: uint8 [cameras, 3, height, width], state: float32 [{len(config.datasets[0].state_names)}]
action = policy.select_action({{"images": images, "state": state, "instruction": "..."}})
```
"""


@dataclass(frozen=True)
class ExportConfig(MovedConfig):
    """Make the folder that drives a robot from a run or a checkpoint."""

    # A run folder (its best checkpoint), RUN/best, or one checkpoint.
    source: str
    # Where to (default: RUN/export, or RUN/merged).
    out: str = ""
    # Add adapters (--lora.rank) to the weights that they adapt, so that the folder needs nothing else.
    merge: bool = False


def main(config: ExportConfig) -> None:
    path = Path(config.source)
    run_dir = run_folder(path)
    if not (run_dir / "checkpoints").is_dir() and checkpoint.wanted(config.source) in ("", "best"):
        found = "is no run" if path.exists() else "is not there"
        found = "is an export already" if (path / "model.safetensors").is_file() else found
        raise InputError(f"{path} {found}; give the folder of a run, or a checkpoint of it")
    source = checkpoint.find(config.source if path != run_dir else str(path / "best"), run_dir / "checkpoints")
    out = Path(config.out or run_dir / ("merged" if config.merge else "export"))
    if out.resolve() == Path.cwd() or out.is_mount():
        raise InputError(f"{out} is the current folder or a mounted one, which cannot be replaced; choose one in it")
    own = {"config.json", "model.safetensors", "README.md", "backbone"}
    if out.is_file() or {path.name for path in out.glob("*")} - own:
        raise InputError(f"{out} holds other things than an export, which replaces it whole; choose another folder")
    if config.merge and not json.loads((source / "config.json").read_text())["lora"]["rank"]:
        raise InputError(f"{source} has no adapters to merge; leave out --merge")
    step = json.loads((source / "trainer_state.json").read_text())["step"]
    export(source, out, f"Trained for {step} steps.", config.merge, **config.moved())
    print(f"{source} exported to {out}")


if __name__ == "__main__":
    import tyro

    own = {"prog": "python -m vla.export", "config": (tyro.conf.PositionalRequiredArgs,)}
    with told():
        main(tyro.cli(ExportConfig, args=at_home(sys.argv[1:]), **own))
