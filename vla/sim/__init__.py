"""Environments behind one contract. Knows nothing of models or data sets.

An environment has

    instruction: str              what to do, in words
    cameras: tuple[str, ...]      names, in the order of the images
    image_size: (h, w)            of every camera, in pixels
    state_names, action_names     one name per dimension
    tasks_per_scene: int          tasks that demonstrations are given in one scene: what differs is then the words alone
    fps, max_steps                control rate in Hz; steps until an episode ends unsolved
    noise_scale: float [A]        unit of the noise that a demonstration may be disturbed by, per action dimension
    reset(seed, task=0) -> observation      the scene of this seed, and one of its tasks
    step(action) -> observation, success, done
    expert() -> action            what solves it from here
    render() -> uint8 [h, w, 3]   for people

and an observation is {"images": uint8 [N, 3, h, w], "state": float32 [P], "instruction": str}: the batch's keys
without B.
"""

from vla import InputError

ENVIRONMENTS = ("tabletop",)

# First seeds of the scenes for demonstrations, for evaluations during training, and for tests of what was trained:
# no scene serves two purposes.
DEMONSTRATION_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = 0, 500_000, 1_000_000


def make(name: str):
    """A new environment by its name; its package is imported only now. Raises InputError for an unknown name."""
    if name == "tabletop":
        from vla.sim.tabletop import Tabletop

        return Tabletop()
    raise InputError(f"environment '{name}' is unknown; known: {', '.join(ENVIRONMENTS)}")
