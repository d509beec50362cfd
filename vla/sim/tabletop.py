"""A small table drawn in two dimensions: carry the object that the instruction names to the zone that it names.

The state holds the arm's tip and gripper and never the objects, so a policy has to look; every scene has several
objects and zones that differ in colour, so it has to read.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vla import InputError

COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 255),
    "yellow": (245, 200, 30),
    "purple": (155, 60, 200),
}
SHAPES = ("cube", "ball")
PHRASINGS = (
    "put the {object} in the {zone} zone",
    "move the {object} to the {zone} zone",
    "place the {object} on the {zone} area",
    "take the {object} and drop it in the {zone} zone",
    "into the {zone} area goes the {object}",
)
TABLE = (236, 230, 220)
STEP = 0.08  # table widths that the tip moves at most in one step and direction
GRASP_RADIUS = 0.045  # an object is grasped if its centre lies within this distance of the tip
OBJECT_RADIUS, ZONE_RADIUS = 0.055, 0.11  # half the width of an object and of a zone, in table widths
SMALLEST = 17  # images in pixels: in smaller ones a finger has no width
VIEW = 0.5  # width of the gripper camera's view, in table widths


@dataclass
class Item:
    """An object or a zone: colour and shape by name, centre float64 [2] in table widths."""

    colour: str
    shape: str
    place: np.ndarray


class Tabletop:
    """The built-in environment (see vla.sim for the contract).

    Actions are float [3]: dx and dy in [-1, 1] (times STEP), and the gripper, closed if > 0.5. State is float32 [3]:
    the tip's x and y in [0, 1] and the gripper (1 closed). Success: the named object lies in the named zone and the
    gripper has let go.
    """

    cameras = ("table", "gripper")
    state_names = ("tip_x", "tip_y", "gripper")
    action_names = ("dx", "dy", "gripper")
    tasks, task, tiers = ("tabletop",), "tabletop", {}
    tasks_per_scene = 4
    fps = 10
    max_steps = 40
    noise = 0.3
    noise_scale = np.array([1.0, 1.0, 0.0])  # the gripper has two values: noise on it would be another action
    own_process = False

    def __init__(self, image_size: int = 64, objects: int = 3, zones: int = 3):
        if image_size < SMALLEST:
            raise InputError(
                f"images of {image_size} pixels are too small to draw the gripper in; expected an --image_size of at "
                f"least {SMALLEST}"
            )
        self.image_size, self.object_count, self.zone_count = (image_size, image_size), objects, zones

    def reset(self, seed: int, task: int = 0) -> dict:
        """Lay out the scene of this seed and ask for one of its tasks: the same numbers, the same everything."""
        random = np.random.default_rng(seed)
        colours, places = list(COLOURS), self._places(random)
        zone_colours = random.permutation(colours)[: self.zone_count]
        object_colours = random.permutation(colours)[: self.object_count]
        self.zones = [Item(colour, "zone", place) for colour, place in zip(zone_colours, places, strict=False)]
        self.objects = [
            Item(colour, str(random.choice(SHAPES)), place)
            for colour, place in zip(object_colours, places[self.zone_count :], strict=True)
        ]
        pairs = random.permutation(self.object_count * self.zone_count)
        target, zone = divmod(int(pairs[task]), self.zone_count)
        random = np.random.default_rng((seed, task))
        self.tip = random.uniform(0.05, 0.95, 2)
        self.closed, self.held, self.steps = False, None, 0
        self.set_task(target, zone, int(random.integers(len(PHRASINGS))))
        return self._observe()

    def set_task(self, target: int, zone: int, phrasing: int = 0) -> None:
        """Ask for object `target` in zone `zone` of this scene, in one of the PHRASINGS."""
        self.target, self.zone = self.objects[target], self.zones[zone]
        words = f"{self.target.colour} {self.target.shape}"
        self.instruction = PHRASINGS[phrasing].format(object=words, zone=self.zone.colour)

    def step(self, action: np.ndarray, look: bool = True) -> tuple[dict | None, bool, bool]:
        """Move, then open or close the gripper. Returns observation, success, done (solved or out of steps)."""
        self.tip = np.clip(self.tip + STEP * np.clip(np.asarray(action[:2], dtype=np.float64), -1, 1), 0, 1)
        close = float(action[2]) > 0.5
        if close and not self.closed:
            nearest = min(self.objects, key=lambda item: np.linalg.norm(item.place - self.tip))
            self.held = nearest if np.linalg.norm(nearest.place - self.tip) <= GRASP_RADIUS else None
        self.closed = close
        if not close:
            self.held = None
        if self.held is not None:
            self.held.place = self.tip.copy()
        self.steps += 1
        success = self._solved()
        return self._observe() if look else None, success, success or self.steps >= self.max_steps

    def expert(self) -> np.ndarray:
        """The action that solves the task from here: to the object, close, to the zone, open, rest. float32 [3]."""
        if self._solved():
            return np.zeros(3, np.float32)
        carrying = self.held is self.target
        if self.held is not None and not carrying:
            return np.array([0, 0, 0], np.float32)  # it holds the wrong object: let go
        goal = self.zone.place if carrying else self.target.place
        move = np.clip((goal - self.tip) / STEP, -1, 1)
        arrived = np.linalg.norm(self.tip + STEP * move - goal) < 0.01
        if not carrying and self.closed:
            return np.array([*move, 0], np.float32)  # it closed on nothing: open on the way
        return np.array([*move, carrying != arrived], np.float32)

    def _solved(self) -> bool:
        return self.held is not self.target and bool(np.all(np.abs(self.target.place - self.zone.place) < ZONE_RADIUS))

    def render(self, size: int = 192) -> np.ndarray:
        """The whole table for people. uint8 [size, size, 3]."""
        return self._draw(np.array([0.5, 0.5]), 1.0, size)

    def _places(self, random: np.random.Generator) -> list[np.ndarray]:
        """Places for zones, then objects, none touching another."""
        while True:
            places: list[np.ndarray] = []
            radii = [ZONE_RADIUS] * self.zone_count + [OBJECT_RADIUS] * self.object_count
            for _ in range(200):
                radius = radii[len(places)]
                place = random.uniform(radius + 0.02, 0.98 - radius, 2)
                if all(
                    np.max(np.abs(place - other)) > radius + r + 0.02 for other, r in zip(places, radii, strict=False)
                ):
                    places.append(place)
                if len(places) == len(radii):
                    return places

    def _observe(self) -> dict:
        images = [
            self._draw(np.array([0.5, 0.5]), 1.0, self.image_size[0]),
            self._draw(self.tip, VIEW, self.image_size[0]),
        ]
        return {
            "images": np.stack(images).transpose(0, 3, 1, 2),
            "state": np.array([*self.tip, self.closed], np.float32),
            "instruction": self.instruction,
        }

    def _draw(self, centre: np.ndarray, width: float, size: int) -> np.ndarray:
        """The square around `centre`, drawn twice as large and reduced, so that edges carry sub-pixel places."""
        scale = 2 * size / width
        image = Image.new("RGB", (2 * size, 2 * size), (60, 60, 66))
        draw = ImageDraw.Draw(image)

        def box(place: np.ndarray, radius: float) -> list[float]:
            x, y = (place - centre) * scale + size
            return [x - radius * scale, y - radius * scale, x + radius * scale - 1, y + radius * scale - 1]

        draw.rectangle(box(np.array([0.5, 0.5]), 0.5), fill=TABLE)
        for zone in self.zones:
            tint = tuple((c + 2 * t) // 3 for c, t in zip(COLOURS[zone.colour], TABLE, strict=True))
            draw.rectangle(
                box(zone.place, ZONE_RADIUS), fill=tint, outline=COLOURS[zone.colour], width=max(1, int(0.015 * scale))
            )
        for item in self.objects:
            shape = draw.rectangle if item.shape == "cube" else draw.ellipse
            shape(
                box(item.place, OBJECT_RADIUS),
                fill=COLOURS[item.colour],
                outline=(40, 40, 40),
                width=max(1, int(0.008 * scale)),
            )
        spread = 0.02 if self.closed else 0.045
        for side in (-1, 1):
            finger = self.tip + np.array([side * spread, 0])
            x0, y0, x1, y1 = box(finger, 0.015)
            draw.rectangle([x0, y0 - 0.02 * scale, x1, y1 + 0.02 * scale], fill=(20, 20, 20))
        return np.asarray(image.reduce(2))
