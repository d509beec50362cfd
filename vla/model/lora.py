"""Low-rank adapters (LoRA, Hu et al., 2021) through peft: put in, and merged into the weights that they adapt."""

import re

import torch
from torch import nn

from vla import InputError
from vla.config import LoraConfig


def add_adapters(policy: nn.Module, config: LoraConfig) -> None:
    """Give the linear maps of --lora.modules adapters, in place: `.base_layer` is then in the names of their weights.

    Raises InputError for a module or target that matches nothing, and for a module within another.
    """
    import peft

    if nested := [name for name in config.modules if name.startswith(tuple(f"{other}." for other in config.modules))]:
        raise InputError(f"--lora.modules names {', '.join(nested)}, which is a part of another one there; drop either")
    for module in config.modules:
        part = submodule(policy, module, "lora.modules")
        linear = [name for name, child in part.named_modules() if isinstance(child, nn.Linear) and child is not part]
        if config.targets:
            targets = [name for name in linear if any(f".{name}".endswith(f".{end}") for end in config.targets)]
            lost = [end for end in config.targets if not any(f".{name}".endswith(f".{end}") for name in linear)]
        else:  # all linear maps of the layers (Dettmers et al., 2023)
            targets, lost = [name for name in linear if re.search(r"\.\d+\.", f"{module}.{name}")], []
        if lost or not targets:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            found = (
                f"--lora.targets {' '.join(lost)} matches no linear map"
                if lost
                else "--lora.modules: no repeated block"
            )
            raise InputError(
                f"{found} in {module}, whose linear maps end in {', '.join(ends) or 'nothing'}; name others"
            )
        adapters = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
        )
        peft.inject_adapter_in_model(adapters, part)


def submodule(policy: nn.Module, name: str, flag: str) -> nn.Module:
    """A part of the policy by its name. Raises InputError, naming the flag and what there is, if it has none."""
    parent, found = policy, ""
    for step in name.split("."):
        children = dict(parent.named_children())
        if step not in children:
            there = ", ".join(child for child, part in children.items() if any(True for _ in part.parameters()))
            raise InputError(
                f"--{flag} names {name}, but {found.rstrip('.') or 'the policy'} has no part {step}; "
                f"it has {there or 'none'}"
            )
        parent, found = children[step], f"{found}{step}."
    return parent


@torch.no_grad()
def merge_adapters(policy: nn.Module) -> None:
    """Add each adapter to the weight that it adapts, in place; the names are then those without adapters.

    All parameters are float32 from then on: in bfloat16 much of what was learned would be rounded away.
    """
    from peft.tuners.lora import LoraLayer

    policy.float()
    for name, layer in [*policy.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(policy.get_submodule(parent), child, layer.get_base_layer())
