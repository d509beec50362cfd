"""Random changes of training images, in whole batches and on the device that trains.

All that is random comes from the sample's key, for each of its cameras anew. Neither the rest of the batch nor any
other state takes part, so a sample looks the same, bit for bit, in any batch, process, worker and resumed run.

I = B·N images, of all cameras of all samples.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vla import InputError, keyed
from vla.config import AugmentConfig

LUMA = 0.299, 0.587, 0.114  # gray of red, green and blue (ITU-R BT.601)
U_TO_V = 0.492111 / 0.877283  # scales of blue - gray and of red - gray in YUV, whose plane of colour YIQ shares


def augment(images: Tensor, key: Tensor, config: AugmentConfig) -> Tensor:
    """Images with colours and geometry changed at random; the very `images` if every strength is 0.

    images: uint8 [B, N, 3, h, w], key: int64 [B], on one device -> uint8 [B, N, 3, h, w]. Never waits for the device.
    """
    coloring = any((config.brightness, config.contrast, config.saturation, config.hue))
    moving = any((config.shift, config.crop, config.rotate))
    if not (coloring or moving):
        return images
    # Always all of them, so that one strength does not change what another draws; in float64, so that what is made of
    # them is the same on every device once it is rounded to float32.
    draws = keyed.uniform(key, keyed.AUGMENT, (images.shape[1], 10)).double().flatten(0, 1)  # [I, 10]
    pixels = images.flatten(0, 1).float()  # [I, 3, h, w]
    if coloring:
        pixels = _colored(pixels, draws[:, :4], config)
    if moving:
        pixels = _moved(pixels, draws[:, 4:], config)
    return pixels.round_().to(torch.uint8).unflatten(0, images.shape[:2])


def check_shift(config: AugmentConfig, image_size: tuple[int, int]) -> None:
    """Raises InputError for a shift that moves no image of this height and width."""
    if config.shift and not any(_largest_shift(config, size) for size in image_size):
        (height, width), least = image_size, math.ceil(1e4 / max(image_size)) / 1e4
        raise InputError(
            f"--data.augment.shift {config.shift} of images of {height}x{width} is less than a pixel; give at least "
            f"{least}, or leave it out"
        )


def _largest_shift(config: AugmentConfig, size: int) -> int:
    return int(config.shift * size + 1e-6)  # in whole pixels, which blur nothing; 0.29 of 100 are 29


def _colored(pixels: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """All colour changes as one affine map of a pixel's three values, cut to [0, 255] at its end.

    Brightness scales values, contrast their distance from the image's mean gray, saturation that from the pixel's own
    gray; hue turns colours about the gray axis in YUV, which keeps the gray, unlike HSV. So they commute. float32
    [I, 3, h, w], float64 [I, 4] -> float32 [I, 3, h, w].
    """
    brightness, contrast, saturation, hue = (2 * draws - 1).unbind(-1)  # [I] each, in [-1, 1)
    brightness, contrast = 1 + config.brightness * brightness, 1 + config.contrast * contrast
    saturation, hue = 1 + config.saturation * saturation, 2 * math.pi * config.hue * hue
    cos, sin = saturation * hue.cos(), saturation * hue.sin()

    # Sums of whole numbers, exact in any order: float32 holds that of a row, float64 that of an image.
    red, green, blue = pixels.sum(-1).double().sum(-1).unbind(-1)
    gray = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) / pixels.shape[-2:].numel()
    result = (brightness * (1 - contrast) * gray).float()[:, None, None, None].repeat(1, *pixels.shape[1:])
    for channel, luma in enumerate(LUMA):  # what one unit of this channel adds to each
        v, u = (channel == 0) - luma, (channel == 2) - luma  # red and blue, less gray
        red, blue = cos * v + sin * u * U_TO_V, cos * u - sin * v / U_TO_V
        green = -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1]  # so that the three have no gray
        added = (brightness * contrast)[:, None] * (luma + torch.stack([red, green, blue], -1))  # [I, 3]
        # No matrix product, whose last bits change with the size of the batch, and which autocast would round.
        result.addcmul_(added.float()[..., None, None], pixels[:, channel : channel + 1])
    return result.clamp_(0, 255)


def _moved(pixels: Tensor, draws: Tensor, config: AugmentConfig) -> Tensor:
    """Crop, rotation about the centre and shift, in this order and as one bilinear resampling; edges are repeated.

    float32 [I, 3, h, w], float64 [I, 6] -> float32 [I, 3, h, w].
    """
    height, width = pixels.shape[-2:]
    right, down, cut, left, top, turn = draws.unbind(-1)  # [I] each
    zoom = 1 - config.crop * cut
    angle = math.radians(config.rotate) * (2 * turn - 1)  # counter-clockwise as one sees it; y points down
    cos, sin = zoom * angle.cos(), zoom * angle.sin()

    def before_shift(size: int, draw: Tensor) -> Tensor:
        """Where pixels were before the shift, from the centre. [I] -> [I, size]"""
        largest = _largest_shift(config, size)
        shift = (draw * (2 * largest + 1)).floor() - largest
        return torch.arange(size, device=draw.device) - (size - 1) / 2 - shift[:, None]

    def to_grid(x: Tensor, y: Tensor) -> Tensor:
        """Pixels from the centre as F.grid_sample counts: 1 is the image's edge."""
        return torch.stack([x * (2 / width), y * (2 / height)], -1).float()

    # In place of F.affine_grid, which is such a matrix product: what a column and what a row adds.
    x, y = before_shift(width, right), before_shift(height, down)
    cos, sin, spare = cos[:, None], sin[:, None], (1 - zoom)[:, None]
    crop_x, crop_y = spare * width * (left[:, None] - 0.5), spare * height * (top[:, None] - 0.5)  # its centre
    columns, rows = to_grid(crop_x + cos * x, crop_y + sin * x), to_grid(-sin * y, cos * y)  # [I, w, 2], [I, h, 2]
    grid = columns[:, None] + rows[:, :, None]  # [I, h, w, 2]
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
