"""Environments behind one contract. Knows nothing of models or data sets.

An environment has

    instruction: str              what to do, in words
    cameras: tuple[str, ...]      names, in the order of the images
    image_size: (h, w)            of every camera, in pixels
    state_names, action_names     one name per dimension
    tasks: tuple[str, ...]        kinds of scene by name: seed s has tasks[s % len(tasks)], after a reset also `task`
    tiers: dict[str, tuple]       those names by difficulty; empty where none was published
    tasks_per_scene: int          tasks that demonstrations are given in one scene: what differs is then the words alone
    fps, max_steps                control rate in Hz; steps until an episode ends unsolved
    noise, noise_scale            what disturbs a demonstration, unless said otherwise, and its unit: float [A]
    own_process: bool             whether it is so slow that processes of its own pay
    reset(seed, task=0) -> observation      the scene of this seed, and one of its tasks
    step(action, look=True) -> observation, success, done      the observation is None if not to look
    expert() -> action            what solves it from here
    render() -> uint8 [h, w, 3]   for people

and an observation is {"images": uint8 [N, 3, h, w], "state": float32 [P], "instruction": str}: the batch's keys
without B.
"""

from vla import InputError

ENVIRONMENTS = ("tabletop", "metaworld", "metaworld/TASK")

# First seeds of the scenes for demonstrations, for evaluations during training, and for tests of what was trained:
# no scene serves two purposes.
DEMONSTRATION_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = 0, 500_000, 1_000_000


def make(name: str, image_size: int = 0):
    """A new environment by its name; its package is imported only now. image_size: height and width (0: its own).

    Raises InputError for an unknown name, and where what the environment needs is not installed.
    """
    options = {"image_size": image_size} if image_size else {}
    if name == "tabletop":
        from vla.sim.tabletop import Tabletop

        return Tabletop(**options)
    if name.split("/")[0] == "metaworld":
        from vla.sim.metaworld import Metaworld

        return Metaworld(name.removeprefix("metaworld").removeprefix("/"), **options)
    raise InputError(f"environment '{name}' is unknown; known: {', '.join(ENVIRONMENTS)}")
