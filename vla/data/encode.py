"""Pictures of an episode as they are stored: as PNGs, or as one video.

Dimensions: L frames of one episode, h and w of an image.
"""

import io
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

IMAGE_STATISTICS_STRIDE = 10  # every tenth frame tells the colours of an episode: neighbours look alike
PIX_FMT = "yuv420p"
# Key frames at most two apart, so that any frame is found by decoding two. B-frames would only delay timestamps.
# Between key frames SVT-AV1 leaves out changes of flat areas (docs/RESULTS.md), so that there all are key frames.
ENCODERS = {
    "av1": ("libsvtav1", {"crf": "30", "preset": "12", "g": "1"}),
    "h264": ("libx264", {"g": "2", "bf": "0"}),
}
os.environ.setdefault("SVT_LOG", "1")  # errors alone: the AV1 encoder else prints its settings for every episode


@dataclass(frozen=True)
class Pictures:
    """What `encode` makes of one camera's pictures of an episode: their bytes as they are stored.

    shape: (L, 3, h, w). data: uint8, PNGs one after the other, or one video. ends: int64, where each ends in data.
    histogram: int64 [3, 256], how often each colour has each value in every tenth picture.
    """

    codec: str
    shape: tuple[int, ...]
    data: np.ndarray
    ends: np.ndarray
    histogram: np.ndarray
    dtype = "uint8"  # of the pictures


def encode(images: np.ndarray, codec: Literal["png", "av1", "h264"], fps: float) -> Pictures:
    """One camera's pictures of an episode, uint8 [L, 3, h, w], as add_episode takes them in place of the array.

    It is what takes time in writing; where several processes make episodes, each can do it for its own.
    """
    files = _pngs(images) if codec == "png" else [_video(images, codec, fps)]
    data, ends = np.frombuffer(b"".join(files), np.uint8), np.cumsum([len(file) for file in files])
    return Pictures(codec, images.shape, data, ends, _histogram(images[::IMAGE_STATISTICS_STRIDE]))


def image_feature(codec: str, fps: float, h: int, w: int) -> dict:
    """What meta/info.json says of pictures that are stored so."""
    feature = {"dtype": "image", "names": ["channels", "height", "width"], "shape": [3, h, w]}
    if codec in ENCODERS:
        info = {"height": h, "width": w, "codec": codec, "pix_fmt": PIX_FMT, "fps": fps, "channels": 3}
        info = {f"video.{name}": value for name, value in info.items()}
        feature |= {"dtype": "video", "info": info | {"has_audio": False, "is_depth_map": False}}
    return feature


def _video(images: np.ndarray, codec: str, fps: float) -> bytes:
    """A video of one episode, uint8 [L, 3, h, w], with an encoder of its own, so that it begins with a key frame."""
    file = io.BytesIO()
    name, options = ENCODERS[codec]
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            name, rate=Fraction(fps).limit_denominator(10_000), options=options, pix_fmt=PIX_FMT
        )
        stream.height, stream.width = images.shape[2:]
        # The colours that frames are converted to; unsaid, a player takes others for large images.
        stream.codec_context.colorspace = Colorspace.ITU601
        for image in images:
            frame = np.ascontiguousarray(image.transpose(1, 2, 0))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # what the encoder still holds
    return file.getvalue()


def _pngs(images: np.ndarray) -> list[bytes]:
    pngs = []
    for image in images:
        png = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(png, "png", compress_level=1)  # of 9: for speed
        pngs.append(png.getvalue())
    return pngs


def _histogram(images: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(3)])  # int64 [3, 256]
