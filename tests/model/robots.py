"""Two made-up robots, an arm and a crane: small policies for one or both, their batches and observations."""

import json

import numpy as np
import torch
from torch import nn

from vla import keyed
from vla.config import LossConfig, ModelConfig
from vla.data.stats import statistics
from vla.model import DatasetSpec, PolicyConfig, VLAPolicy

B, H, A, P = 8, 4, 3, 2
HEADS = {
    "flow": {"head": "flow"},
    "regression": {"head": "regression", "gripper_dims": (2,), "loss": LossConfig(l1=1.0, mse=0.5)},
    "token": {"head": "token", "bins": 16},
}
RANDOM = np.random.default_rng(0)
STATES = RANDOM.normal([3.0, -200.0], [0.1, 50.0], (100, P)).astype(np.float32)
ACTIONS = RANDOM.normal([0.0, 1000.0, 0.0], [0.01, 30.0, 1.0], (100, A)).astype(np.float32)  # in three units
ACTIONS[:, 2] = ACTIONS[:, 2] > 0
ARM = DatasetSpec("arm", ("table", "wrist"), ("x", "y"), ("dx", "dy", "grip"), 10)
# The robot of another data set, which lacks the first camera and the last dimensions, and moves in other units.
CRANE = DatasetSpec("crane", ("wrist",), ("height",), ("lift", "turn"), 5)
CRANE_STATES = RANDOM.normal([7000.0], [90.0], (100, 1)).astype(np.float32)
CRANE_ACTIONS = RANDOM.normal([-20.0, 0.5], [4.0, 1e-3], (100, 2)).astype(np.float32)
VALUES = {"arm": (STATES, ACTIONS), "crane": (CRANE_STATES, CRANE_ACTIONS)}
WHICH = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])  # the data set of each sample of a mixed batch
TEXTS = ["pick", "place", "put the red cube in the", "push it", "turn left", "turn right", "open the drawer", "wait"]


def configuration(datasets=(ARM,), **model):
    sizes = {"chunk_size": H, "n_action_steps": 2, "width": 32, "attention_heads": 2, "language_layers": 2}
    sizes |= {"head_layers": 2, "mlp_ratio": 2, "max_tokens": 32, "vision_stride": 8, "flow_steps": 4}
    return PolicyConfig(ModelConfig(**sizes | model), ("table", "wrist"), (16, 24), datasets)


def tiny(datasets=(ARM,), **model):
    """A small policy with statistics. Its last layer, which starts at 0 and hides all before it, is random."""
    torch.manual_seed(0)
    policy = VLAPolicy(configuration(datasets, **model))
    policy.set_statistics([tuple(map(statistics, VALUES[spec.name])) for spec in datasets])
    nn.init.normal_(policy.action_head.decoder.out[-1].weight, std=0.1)
    return policy


def mixed_batch(policy, which=WHICH):
    """A batch of the robots ARM and CRANE. which: int64 [B], their places."""
    batch = random_batch(policy) | {"dataset": which}
    for b in torch.nonzero(which)[:, 0].tolist():
        batch["image_mask"][b, 0], batch["images"][b, 0] = False, 0
        batch["state"][b] = torch.tensor([CRANE_STATES[b, 0], 0])
        batch["actions"][b] = torch.from_numpy(np.pad(CRANE_ACTIONS[b * H : (b + 1) * H], [(0, 0), (0, 1)]))
    return batch


def learned(policy, batch):
    """What the policy makes of a batch, and the gradients of its loss, by name."""
    policy.zero_grad()
    output = policy(batch)
    output["loss"].backward()
    found = {name: value.detach() for name, value in output.items()} | {"chunk": policy.predict_chunk(batch)}
    return found | {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def random_batch(policy, texts=tuple(TEXTS)):
    generator, size = torch.Generator().manual_seed(1), len(texts)
    tokens, token_mask = policy.tokenize(list(texts))
    return {
        "dataset": torch.zeros(size, dtype=torch.int64),
        "image_mask": torch.ones(size, 2, dtype=torch.bool),
        "images": torch.randint(0, 256, (size, 2, 3, 16, 24), generator=generator, dtype=torch.uint8),
        "state": torch.from_numpy(STATES[:size]).clone(),
        "tokens": tokens,
        "token_mask": token_mask,
        "actions": torch.from_numpy(ACTIONS[: size * H]).view(size, H, A).clone(),
        "action_is_pad": torch.arange(H)[None] > torch.arange(size)[:, None],
        "key": keyed.derive(0, torch.arange(size)),
    }


def observation(seed=0, text="pick"):
    random = np.random.default_rng(seed)
    return {
        "images": random.integers(0, 256, (2, 3, 16, 24), dtype=np.uint8),
        "state": STATES[seed],
        "instruction": text,
    }


def rows(batch, which):
    return {name: value[which] for name, value in batch.items()}


def actions(policy, count=5):
    return np.stack([policy.select_action(observation(turn)) for turn in range(count)])


def saved(tmp_path, **model):
    tiny(**model).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
