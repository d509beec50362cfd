"""Meta-World's MT50 (Yu et al., 2019): a Sawyer arm, 50 tasks, one camera, under the protocol of the published tables.

Camera `corner2` moved to (0.75, 0.075, 0.7) and its image turned by 180 degrees; the state is the first 4 values of
the package's observation, so neither objects nor goals; objects and goals are placed at random; 500 steps at most, and
the first success ends an episode.
"""

import atexit
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from vla import InputError
from vla.workers import WORKER

# Difficulty of the tasks, as divided by Seo et al. ("Masked world models for visual control", 2023, appendix).
TIERS = {
    "easy": (
        *("button-press-v3", "button-press-topdown-v3", "button-press-topdown-wall-v3", "button-press-wall-v3"),
        *("coffee-button-v3", "dial-turn-v3", "door-close-v3", "door-lock-v3", "door-open-v3", "door-unlock-v3"),
        *("drawer-close-v3", "drawer-open-v3", "faucet-close-v3", "faucet-open-v3", "handle-press-v3"),
        *("handle-press-side-v3", "handle-pull-v3", "handle-pull-side-v3", "lever-pull-v3", "peg-unplug-side-v3"),
        *("plate-slide-v3", "plate-slide-back-v3", "plate-slide-back-side-v3", "plate-slide-side-v3", "reach-v3"),
        *("reach-wall-v3", "window-close-v3", "window-open-v3"),
    ),
    "medium": (
        *("basketball-v3", "bin-picking-v3", "box-close-v3", "coffee-pull-v3", "coffee-push-v3", "hammer-v3"),
        *("peg-insert-side-v3", "push-wall-v3", "soccer-v3", "sweep-v3", "sweep-into-v3"),
    ),
    "hard": ("assembly-v3", "hand-insert-v3", "pick-out-of-hole-v3", "pick-place-v3", "push-v3", "push-back-v3"),
    "very hard": ("disassemble-v3", "pick-place-wall-v3", "shelf-place-v3", "stick-pull-v3", "stick-push-v3"),
}
INSTRUCTIONS = {
    "assembly-v3": "lift the nut by its handle and drop it over the red peg",
    "basketball-v3": "carry the ball up and let it fall through the hoop",
    "bin-picking-v3": "move the block from the red bin to the blue one",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "push the red button down",
    "button-press-topdown-wall-v3": "push the red button behind the wall down",
    "button-press-v3": "push the red button in",
    "button-press-wall-v3": "push the red button behind the wall in",
    "coffee-button-v3": "switch the coffee machine on",
    "coffee-pull-v3": "drag the mug away from the coffee machine",
    "coffee-push-v3": "slide the mug under the coffee machine's spout",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "take the nut off the red peg",
    "door-close-v3": "swing the door shut",
    "door-lock-v3": "turn the latch to lock the door",
    "door-open-v3": "swing the door open by its handle",
    "door-unlock-v3": "turn the latch back to unlock the door",
    "drawer-close-v3": "shut the drawer",
    "drawer-open-v3": "draw the drawer out by its handle",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "hammer-v3": "take the hammer and drive the nail into the block",
    "hand-insert-v3": "take the block down into the hole",
    "handle-press-side-v3": "press the sideways handle down",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "raise the sideways handle",
    "handle-pull-v3": "raise the handle",
    "lever-pull-v3": "lift the lever until it stands upright",
    "peg-insert-side-v3": "push the green peg into the hole of the red block",
    "peg-unplug-side-v3": "pull the plug out of its socket",
    "pick-out-of-hole-v3": "fetch the puck out of the hole",
    "pick-place-v3": "lift the puck to the goal",
    "pick-place-wall-v3": "lift the puck over the wall to the goal",
    "plate-slide-back-side-v3": "slide the plate sideways out of the net",
    "plate-slide-back-v3": "slide the plate back out of the net",
    "plate-slide-side-v3": "slide the plate sideways into the net",
    "plate-slide-v3": "slide the plate forward into the net",
    "push-back-v3": "push the block back to the goal",
    "push-v3": "push the puck forward to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "move the hand to the goal",
    "reach-wall-v3": "move the hand past the wall to the goal",
    "shelf-place-v3": "put the block on the shelf",
    "soccer-v3": "push the football into the blue net",
    "stick-pull-v3": "hook the thermos with the stick and pull it",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
}
TASKS = tuple(INSTRUCTIONS)  # in the alphabet's order, so that any few in a row are of several tiers
CAMERA, CAMERA_PLACE = "corner2", (0.75, 0.075, 0.7)
GEOMS = 1000  # that a scene may hold; the fullest has a tenth of it
# Pixels of the map of shadows in each direction. MuJoCo's 4096 take a GPU 3/4 of the time of a picture, and change 1 in
# 200 of its pixels by more than 8 of 255.
SHADOWS = 1024
WORKS = "VLA_MUJOCO_GL"  # in the environment: the MUJOCO_GL that was tried, by this process or what started it
INSTALL = "install libegl1 beside the GPU's driver, or libosmesa6 on a machine without a GPU (apt-get install)"

_gl = None


class Metaworld:
    """Meta-World (see vla.sim for the contract): all 50 tasks, seed s having task s % 50, or the one that is given.

    Actions are float [4], clipped to [-1, 1]: the hand's motion in x, y and z (times 1 cm) and the gripper's effort,
    positive to close it. State is float32 [4]: the hand's x, y and z in metres and the gripper's opening in [0, 1].
    image_size: height and width of what is drawn. Raises InputError where the package, or a way to draw, is missing.
    """

    cameras = (CAMERA,)
    state_names = ("hand_x", "hand_y", "hand_z", "gripper")
    action_names = ("dx", "dy", "dz", "gripper")
    tasks_per_scene = 1
    fps = 80
    max_steps = 500
    noise, noise_scale = 0.0, np.array([1.0, 1.0, 1.0, 0.0])
    own_process = True

    def __init__(self, task: str = "", image_size: int = 224):
        if task and task not in INSTRUCTIONS:
            raise InputError(f"Meta-World has no task '{task}'; its tasks: {', '.join(TASKS)}")
        _choose_renderer()
        self.tasks = (task,) if task else TASKS
        self.tiers = {} if task else TIERS
        self.image_size = (image_size, image_size)
        self.task, self._camera = "", None

    def reset(self, seed: int, task: int = 0) -> dict:
        """Begin the episode of this seed, the same in every process and after whatever was before."""
        name = self.tasks[seed % len(self.tasks)]
        if name != self.task:
            self._load(name)
        self._env.seed(seed)
        self._seen, _ = self._env.reset()
        # The package places objects last, and leaves where they are drawn to the first step.
        _mujoco().mj_kinematics(self._env.model, self._env.data)
        self.steps = 0
        return self._observe()

    def step(self, action: np.ndarray, look: bool = True) -> tuple[dict | None, bool, bool]:
        """Act for 1/80 s. Returns observation (None if not to look), success, done (solved or out of steps)."""
        self._seen, _, _, _, info = self._env.step(np.clip(np.asarray(action, np.float32), -1, 1))
        self.steps += 1
        success = bool(info["success"])
        return self._observe() if look else None, success, success or self.steps >= self.max_steps

    def expert(self) -> np.ndarray:
        """The action of the package's scripted policy, which knows where everything is. float32 [4] in [-1, 1]."""
        return np.clip(self._policy.get_action(self._seen), -1, 1).astype(np.float32)

    def render(self) -> np.ndarray:
        """What the camera sees. uint8 [image_size, image_size, 3]."""
        if self._camera is None:
            self._camera = _Camera(self._env.model, self.image_size[0])
        return self._camera.picture(self._env.data)

    def _load(self, name: str) -> None:
        mujoco = _mujoco()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        # Of actions that are clipped, as they are meant to be.
        warnings.filterwarnings("ignore", message="Constant", module="metaworld")

        self._env, self._policy, self._camera = ALL_V3_ENVIRONMENTS[name](), ENV_POLICY_MAP[name](), None
        self._env._set_task_called = True  # a task object would fix the places; they come from the seed instead
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        self._env._partially_observable = False  # the expert sees the goal
        del self._env.sawyer_observation_space  # worked out once, with the goal hidden
        self._env.model.cam_pos[self._env.model.camera(CAMERA).id] = CAMERA_PLACE
        mujoco.mj_forward(self._env.model, self._env.data)
        self.task, self.instruction = name, INSTRUCTIONS[name]

    def _observe(self) -> dict:
        return {
            "images": self.render().transpose(2, 0, 1)[None],
            "state": self._seen[:4].astype(np.float32),
            "instruction": self.instruction,
        }


class _Camera:
    """Pictures of one model, which is uploaded once. size: their height and width."""

    def __init__(self, model, size: int):
        mujoco = _mujoco()
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        model.vis.quality.shadowsize = SHADOWS
        self.model, self.rect = model, mujoco.MjrRect(0, 0, size, size)
        self.scene, self.option, self.camera = mujoco.MjvScene(model, GEOMS), mujoco.MjvOption(), mujoco.MjvCamera()
        self.camera.type, self.camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(CAMERA).id
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)

    def picture(self, data) -> np.ndarray:
        mujoco = _mujoco()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self.option, None, self.camera, everything, self.scene)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        mujoco.mjr_render(self.rect, self.scene, self.context)
        image = np.empty((self.rect.height, self.rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self.rect, self.context)
        return image[:, ::-1]  # its rows come from below: this is the picture turned by 180 degrees


def _choose_renderer() -> None:
    """Set MUJOCO_GL for this process and those that it starts, unless it is set: EGL if that works, else OSMesa."""
    if importlib.util.find_spec("metaworld") is None:
        raise InputError("Meta-World is not installed; pip install -r requirements-sim.txt")
    asked = os.environ.get("MUJOCO_GL")
    if asked and asked == os.environ.get(WORKS):
        return
    for found in [asked] if asked else ["egl", "osmesa"]:  # in another process: this one could not change its mind
        test = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if subprocess.run(test, env=os.environ | {"MUJOCO_GL": found}, capture_output=True).returncode == 0:
            os.environ |= {"MUJOCO_GL": found, WORKS: found}
            return
    what = f"MUJOCO_GL is {asked}, which does not work here" if asked else "neither EGL nor OSMesa works here"
    raise InputError(f"Meta-World cannot draw: {what}; {'unset it, or ' if asked else ''}{INSTALL}")


def _mujoco():
    """The package, with this process's OpenGL context, which all worlds share, current."""
    global _gl
    import mujoco

    if _gl is None:
        # Not mujoco.GLContext, which is of what MUJOCO_GL was when someone first imported the package. Of any size, as
        # what is drawn goes to buffers of its own.
        renderer = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL'].lower()}")
        if WORKER in os.environ and renderer.__name__ == "mujoco.egl":
            # Each GPU draws for some of the processes. EGL counts them first, then what draws in software.
            gpus = min(len(list(Path("/dev").glob("nvidia[0-9]*"))), len(renderer.EGL.eglQueryDevicesEXT()))
            os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(int(os.environ[WORKER]) % max(1, gpus)))
        _gl = renderer.GLContext(8, 8)
        _gl.make_current()
        atexit.register(globals().pop, "_gl")  # which frees it, while its library is still there
    return mujoco
