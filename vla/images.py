"""Images brought to the size that a policy sees, one definition for its data and for its robot; and moving ones."""

import io

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def resize_with_padding(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale images to fit into `size`, their aspect kept, and centre them on black; of that size they stay as they are.

    images: uint8 [B, 3, H, W] on the CPU, size: (h, w) -> uint8 [B, 3, h, w]. Bilinear, with antialiasing.
    """
    (height, width), (h, w) = images.shape[-2:], size
    if (height, width) == (h, w):
        return images
    scale = min(h / height, w / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    images = F.interpolate(images, inner, mode="bilinear", antialias=True, align_corners=False)
    top, left = (h - inner[0]) // 2, (w - inner[1]) // 2
    return F.pad(images, (left, w - inner[1] - left, top, h - inner[0] - top))


def gif(frames: np.ndarray, fps: int) -> bytes:
    """An endless GIF in 256 colours, the same for all frames, so that what does not move takes no bytes.

    frames: uint8 [L, h, w, 3].
    """
    some = Image.fromarray(np.concatenate(frames[np.linspace(0, len(frames) - 1, num=5, dtype=int)]))
    colours = some.quantize(256, method=Image.Quantize.FASTOCTREE)  # small things keep theirs
    pictures = [Image.fromarray(frame).quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()
