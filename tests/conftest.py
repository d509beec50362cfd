"""The tests run on the CPU, offline, with one thread; set before torch is imported anywhere."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
if os.environ.get("TEST_GPU"):  # make test-gpu
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask whether there is one, and fork processes afterwards
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest

from vla import saver
from vla.data.lerobot import LeRobotDataset
from vla.data.write import LeRobotWriter
from vla.sim.tabletop import Tabletop

EPISODES, LENGTH = 12, 12


@pytest.fixture(autouse=True)
def writer_does_not_wait(monkeypatch):
    """For other tests, which take the processor; as it does for training."""
    monkeypatch.setattr(saver, "_let_training_go_first", lambda: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A tabletop data set, the first 12 frames of 12 episodes: with one held out, an epoch is 132 samples, 11 steps
    of 12. Its images are decoded already.
    """
    root, world = tmp_path_factory.mktemp("data") / "tabletop", Tabletop()
    names = {"state_names": world.state_names, "action_names": world.action_names, "robot_type": "tabletop"}
    with LeRobotWriter(root, fps=world.fps, cameras=dict.fromkeys(world.cameras, (64, 64)), **names) as writer:
        for seed in range(EPISODES):
            observations, actions = [world.reset(seed)], []
            for _ in range(LENGTH):
                actions.append(world.expert())
                observations.append(world.step(actions[-1])[0])
            images = np.stack([observation["images"] for observation in observations[:-1]], axis=1)  # [N, L, 3, h, w]
            writer.add_episode(
                images=dict(zip(world.cameras, images, strict=True)),
                state=np.stack([observation["state"] for observation in observations[:-1]]),
                actions=np.stack(actions),
                instruction=world.instruction,
            )
    LeRobotDataset(root)
    return root


@pytest.fixture(scope="session")
def flags(data):
    """Flags of a training small enough for a test: 16 steps of 12 samples take half a second."""
    return [
        *("--data.path", str(data), "--data.workers", "0", "--steps", "16", "--global_batch_size", "12"),
        *("--model.width", "32", "--model.attention_heads", "2", "--model.vision_blocks", "0"),
        *("--model.language_layers", "1", "--model.head_layers", "1"),
        *("--model.chunk_size", "4", "--model.n_action_steps", "2", "--model.flow_steps", "2"),
        *("--optim.warmup_steps", "4", "--optim.lr", "1e-3"),
        *("--eval.every", "7", "--eval.samples", "5", "--checkpoint.every", "5", "--log.every", "1"),
    ]


@pytest.fixture(scope="session")
def uninterrupted(flags, tmp_path_factory):
    """run(flag, value, …, processes, before, env) -> the folder of a run that nobody stopped, made once."""
    from training import train

    made = {}

    def run(*own, processes=1, before=None, env=None):
        case = (*own, processes, before, *(env or ()))
        if case not in made:
            made[case] = tmp_path_factory.mktemp("uninterrupted") / "run"
            for child in train(*flags, *own, "--run_dir", made[case], processes=processes, before=before, env=env):
                child.ok()
        return made[case]

    return run


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    """A finished run whose checkpoints are all kept, the child that made it, and what its policy predicted from a
    batch with the averaged weights at each checkpoint, by step.
    """

    from training import after, train

    from vla.model import VLAPolicy

    def predict_at_each_save(found):
        found["predictions"], found["buffers"], policies, batches, buffers = {}, [], [], [], []

        def begin(_, made, *rest):
            buffers.append(made.buffer.result())

        def predict(_, made, state):
            found["buffers"].append(made.buffer.result() is buffers[0])
            batch = {name: value[:3] for name, value in batches[0].items()}
            with made.ema.applied():
                policies[0].eval()
                found["predictions"][state["step"]] = policies[0].predict_chunk(batch).numpy()
                policies[0].train()
            found["batch"] = {name: value.numpy() for name, value in batch.items()}

        def forward(self, batch, original=VLAPolicy.forward):
            batches.append(batch)
            return original(self, batch)

        VLAPolicy.forward = forward
        after(VLAPolicy, "__init__", lambda _, policy, *rest: policies.append(policy))
        after(saver.Saver, "__init__", begin)
        after(saver.Saver, "save", predict)

    run = tmp_path_factory.mktemp("trained") / "run"
    (child,) = train(*flags, "--checkpoint.keep", 9, "--run_dir", run, before=predict_at_each_save)
    return run, child.ok()
