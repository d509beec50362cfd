"""Small policies on tiny pretrained models (see the fixture `originals`), and their batches."""

import json
import shutil
from dataclasses import replace

import torch
from robots import ARM, VALUES, configuration, random_batch
from tiny import VISIONS, VLMS
from torch import nn

from vla.config import LoraConfig
from vla.data.stats import statistics
from vla.model import VLAPolicy

KINDS = (*VLMS, *VISIONS)
SIDE = 32
TEXTS = ("put the red cube in the blue zone", "push the green ball")


def settings(flags, lora=None, image_size=(SIDE, SIDE), datasets=(ARM,), **model):
    defaults = {"vision_stride": 16, "language_layers": 0, "max_tokens": 24, "head": "regression"}
    config = configuration(datasets, **defaults | flags | model)
    return replace(config, image_size=image_size, lora=lora or LoraConfig())


def policy_on(flags, **options):
    """A policy with statistics. Its last layer, which starts at 0 and hides all before it, is random."""
    torch.manual_seed(0)
    policy = VLAPolicy(settings(flags, **options))
    policy.freeze_unused()
    policy.set_statistics([tuple(map(statistics, VALUES[spec.name])) for spec in policy.config.datasets])
    torch.manual_seed(1)  # again, as adapters have taken random numbers too
    nn.init.normal_(policy.action_head.decoder.out[-1].weight, std=0.1)
    return policy


def batch_of(policy, texts=TEXTS):
    """A batch of the robot ARM with pictures of noise."""
    size, generator = (len(texts), 2, 3, *policy.config.image_size), torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return random_batch(policy, texts) | {"images": images}


def hidden(policy, batch):
    """The hidden states that the action head attends to [B, S, D], and their mask [B, S]."""
    tokens = policy.encode_images(batch["images"])
    return policy.language_model(tokens, batch["image_mask"], batch["tokens"], batch["token_mask"])[:2]


def learned(policy, batch):
    """What the policy makes of a batch, and the gradients of its loss, by name, of what is trained."""
    policy.zero_grad()
    output = policy(batch)
    output["loss"].backward()
    found = {name: value.detach() for name, value in output.items()} | {"chunk": policy.predict_chunk(batch)}
    return found | {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def moved(flags, folder):
    """The flags of copies of pretrained models."""
    return {name: shutil.copytree(place, folder / name).as_posix() for name, place in flags.items()}


def edited(name, **change):
    """What changes a JSON file of a pretrained model; what is None is taken out."""

    def edit(folder):
        values = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit
