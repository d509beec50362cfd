"""Images brought to the size that a policy sees, one definition for its data and for its robot."""

import torch.nn.functional as F
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
