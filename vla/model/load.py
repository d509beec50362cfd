"""A policy from a folder: an export, or a checkpoint, also one of a sharded run."""

import dataclasses
from pathlib import Path

from safetensors import SafetensorError

from vla import InputError
from vla.model.spec import PolicyConfig
from vla.options import from_dict, run_folder
from vla.shards import Rows


def load(make, folder: Path, config: dict, moved: dict[str, str]):
    """The policy that `make` builds of these settings, with the folder's weights, all of which it must have.

    make: VLAPolicy. config: what config.json holds. moved: where pretrained weights lie now, by name of the setting; ""
    where they were. Raises InputError for settings and weights that do not go together or cannot be read.
    """
    settings = from_dict(PolicyConfig, config, str(folder / "config.json"))
    moved = {name: str(Path(p).resolve() if Path(p).is_dir() else p) for name, p in moved.items() if p}
    pretrained = bool(settings.model.backbone or settings.model.vision_backbone)
    if moved and not pretrained:
        raise InputError(f"{folder} has no pretrained backbone; leave out --{' and --'.join(moved)}")
    if settings.model.attention == "flash_attention_2":  # an export loads anywhere
        moved["attention"] = "sdpa"
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **moved))
    places = folder / "backbone", run_folder(folder) / "backbone"  # a checkpoint's is that of its run
    saved = next((place for place in places if place.is_dir()), None) if pretrained else None
    if pretrained and saved is None:
        raise InputError(f"{folder} has no folder backbone (tokenizer, configuration); copy that of its run to it")
    policy = make(settings, saved, weights=bool(settings.base))
    policy.check_base(settings.base, folder)
    try:
        weights = Rows.of(folder, "model")
    except (OSError, SafetensorError) as failure:
        raise InputError(f"the weights in {folder} cannot be read ({failure}); export the policy again") from None
    every = policy.state_dict()
    needed = policy.own_state().keys() | (every.keys() & weights.parts.keys()) if settings.base else every.keys()
    weights.fill({name: every[name] for name in needed}, f"the weights in {folder}")
    policy.keep(weights.parts)
    policy.state_norm.require()
    policy.action_norm.require()
    return policy
