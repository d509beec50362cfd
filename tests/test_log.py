"""What a run shows."""

import io

import numpy as np
from PIL import Image

from vla import log


def test_moving_pictures_keep_the_colours_of_small_things():
    """A goal of 2 x 2 pixels, before a background of more colours than a GIF has."""
    frames = np.random.default_rng(0).integers(60, 180, size=(1, 96, 96, 3), dtype=np.uint8).repeat(4, axis=0)
    places = [(slice(40, 42), slice(20 * i, 20 * i + 2)) for i in range(4)]
    for frame, place in zip(frames, places, strict=True):
        frame[place] = 0, 0, 250
    with Image.open(io.BytesIO(log.gif(frames, fps=20))) as picture:
        for i, place in enumerate(places):
            picture.seek(i)
            shown = np.asarray(picture.convert("RGB"))[place]
            assert np.abs(shown - np.array([0, 0, 250])).max() <= 16
        assert (picture.n_frames, picture.info["duration"]) == (4, 50)
