"""Images as the processor of a pretrained model makes them, on the device, all of one size.

What processors do to photographs is left out: tiling (SmolVLM, Idefics3), and cropping (DINO), which would cut away
what a camera of a robot sees at its edges.

Dimension key: h, w as the cameras give them, H, W as the model takes them, p pixels of a patch, m patches merged.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vla import InputError

# Filters, by Pillow's numbers, of processors whose files do not name theirs; 3, bicubic, for all others.
FILTERS = {"smolvlm": 1, "idefics3": 1, "siglip2_vision_model": 2, "dinov3_vit": 2}


class Pixels(nn.Module):
    """Resize, rescale and normalize, by the numbers in a processor's preprocessor_config.json.

    Resizing is Pillow's, to the bit but for ties: filters are linear, so its weights are two matrices, and like Pillow
    it rounds after each of them. Raises InputError for a processor that does not say its size, or mean and deviation.
    """

    def __init__(self, processor: dict, kind: str, image_size: tuple[int, int], patch: int):
        """kind: model_type of what takes the pixels. image_size: (h, w). patch: H and W have to be multiples of it."""
        super().__init__()
        self.size = tuple(image_size)
        cure = "give --data.image_size in multiples of that"
        if processor.get("do_resize", True):
            self.size, cure = target_size(processor, self.size, patch), "correct the size in preprocessor_config.json"
        if any(size % patch for size in self.size):
            raise InputError(
                f"images of {self.size[0]}x{self.size[1]} cannot be cut into the backbone's patches of {patch}x{patch} "
                f"pixels; {cure}"
            )
        self.resizing, self.rounding = self.size != tuple(image_size), kind != "dinov3_vit"
        resample = processor.get("resample", FILTERS.get(kind, 3))
        for name, before, after in zip(("rows", "columns"), image_size, self.size, strict=True):
            self.register_buffer(name, resampling(before, after, resample), persistent=False)
        factor, mean, std = torch.ones(3, 1, 1), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        if processor.get("do_rescale", True):
            factor *= processor.get("rescale_factor", 1 / 255)
        if processor.get("do_normalize", True):
            if not {"image_mean", "image_std"} <= processor.keys():
                raise InputError("preprocessor_config.json of the backbone lacks image_mean or image_std; add them")
            mean, std = (torch.tensor(processor[name])[:, None, None] for name in ("image_mean", "image_std"))
        self.register_buffer("scale", factor / std, persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, h, w] -> float32 [..., 3, H, W]."""
        with torch.autocast(images.device.type, enabled=False):  # eight bits of precision are too few for pixels
            pixels = images.float()
            if self.resizing:
                pixels = self._rounded(pixels @ self.columns)
                pixels = self._rounded((pixels.mT @ self.rows).mT)
            return pixels * self.scale - self.shift

    def _rounded(self, pixels: Tensor) -> Tensor:
        return (pixels + 0.5).floor().clamp(0, 255) if self.rounding else pixels


def resampling(before: int, after: int, resample: int) -> Tensor:
    """The weights of one of Pillow's filters, float32 [before, after]: what it makes of single bright pixels."""
    pixels = Image.fromarray(np.eye(before, dtype=np.float32))
    return torch.from_numpy(np.array(pixels.resize((after, before), resample)))


def target_size(processor: dict, image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """The size (H, W) that whole images of a size (h, w) are brought to."""
    size = processor.get("size") or {}
    if "merge_size" in processor:  # Qwen, which keeps the aspect, and whose edges are numbers of pixels
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        low = processor.get("min_pixels") or size.get("min_pixels") or size["shortest_edge"]
        high = processor.get("max_pixels") or size.get("max_pixels") or size["longest_edge"]
        try:
            return smart_resize(*image_size, patch, low, high)
        except ValueError as failure:
            raise InputError(f"images of {image_size}: {failure}; give --data.image_size") from None
    if "max_num_patches" in processor:  # SigLIP 2, which keeps the aspect
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        return get_image_size_for_max_num_patches(*image_size, patch, processor["max_num_patches"])
    for given in (processor.get("max_image_size"), processor.get("crop_size"), size):
        given = {"shortest_edge": given} if isinstance(given, int) else given  # of old files
        if given and given.get("height") and given.get("width"):
            return given["height"], given["width"]
        if edge := given and (given.get("longest_edge") or given.get("shortest_edge")):
            return edge, edge
    raise InputError(f"preprocessor_config.json of the backbone has the size {size}; expected height and width")


def patches(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Flat patches in the order of Qwen's processor, in which those that are merged are neighbours.

    [B, 3, H, W] -> [B · H/p · W/p, 3 · frames · p · p]; a still picture is all of the frames.
    """
    B, C, H, W = pixels.shape
    grid = pixels.view(B, C, H // patch // merge, merge, patch, W // patch // merge, merge, patch)
    grid = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]  # [B, H/pm, W/pm, m, m, C, 1, p, p]
    grid = grid.expand(*grid.shape[:6], frames, patch, patch)
    return grid.reshape(-1, C * frames * patch * patch)
