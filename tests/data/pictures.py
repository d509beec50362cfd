"""Data sets of random pictures, and what is in them."""

import io

import av
import numpy as np
import pyarrow.parquet as pq
from numbered import edit
from PIL import Image

from vla.data.write import LeRobotWriter

CAMERAS, LENGTHS, COUNT = ("table", "gripper"), (5, 1, 9, 4), 19
GRIPPER = "observation.images.gripper"
EVERY = np.arange(COUNT)


def write(root, lengths=LENGTHS, size=(16, 24), **options):
    """Pictures of random blocks, for videos too."""
    rng = np.random.default_rng(0)
    names = {"state_names": ["x", "y"], "action_names": ["dx", "dy"], "robot_type": "tabletop"}
    with LeRobotWriter(root, fps=10, cameras=dict.fromkeys(CAMERAS, size), **names | options) as writer:
        for length in lengths:
            blocks = rng.integers(0, 256, (2, length, 3, 4, 4), dtype=np.uint8)
            images = blocks.repeat(size[0] // 4, axis=3).repeat(size[1] // 4, axis=4)
            numbers = rng.normal(size=(2, length, 2)).astype(np.float32)
            writer.add_episode(
                images=dict(zip(CAMERAS, images, strict=True)),
                state=numbers[0],
                actions=numbers[1],
                instruction="put the cube on the plate",
            )
    return root


def stored(root):
    """The pictures, read from one end to the other: uint8 [F, N, 3, h, w]."""
    cameras = []
    for key in (f"observation.images.{name}" for name in CAMERAS):
        pictures = []
        for path in sorted(root.glob(f"videos/{key}/*/*.mp4")):
            with av.open(str(path)) as container:
                pictures += [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
        for path in sorted(root.glob("data/*/*.parquet")) if not pictures else []:
            rows = pq.ParquetFile(path).read().column(key).to_pylist()
            pictures += [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows]
        cameras.append(np.stack(pictures).transpose(0, 3, 1, 2))
    return np.stack(cameras, axis=1)


def png_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def caches(folder):
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def damage_video(root):
    """Blank frame 7 of the gripper's video."""
    (path,) = root.glob(f"videos/{GRIPPER}/*/*.mp4")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][7]
        place = slice(packet.pos, packet.pos + packet.size)
    data = bytearray(path.read_bytes())
    data[place] = bytes(place.stop - place.start)
    path.write_bytes(data)


def as_row_7(png):
    return lambda root: edit(root, GRIPPER, 7, {"bytes": png, "path": None})
