"""The frame cache: each image of a data set decoded once, into one memory-mapped file for each camera.

Training reads every image once an epoch, and decoding a PNG takes over ten times as long as reading its pixels.
Dimensions: F frames of the data set, h and w of an image.
"""

import fcntl
import hashlib
import io
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from vla import InputError


def cache_frames(
    folder: Path, fingerprint: str, cameras: list[str], parquet_files: list[Path], shape: tuple[int, int, int, int]
) -> list[Path]:
    """Decode each camera's images into `folder/.frames-KEY/frames.npy`, uint8 [F, 3, h, w], unless that is there.

    folder: is made if missing. fingerprint: identifies the data set's content and is part of KEY.
    cameras: image columns of the parquet files, whose rows are the F frames in order. shape: (F, 3, h, w).
    Returns the file of each camera. Of several processes that call this at once, one decodes and the others wait.
    Raises InputError if the folder is not writable or too small, or an image is broken or of another size.
    """
    keys = [hashlib.sha256(f"{fingerprint} {camera} {shape}".encode()).hexdigest()[:16] for camera in cameras]
    done = [folder / f".frames-{key}" for key in keys]
    if not all(cache.exists() for cache in done):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".frames.lock", "w")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write decoded images to {folder} ({error}): set --data.image_cache") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however this process ends
            _remove_unfinished(folder)  # what a killed build has left
            missing = {cache: camera for cache, camera in zip(done, cameras, strict=True) if not cache.exists()}
            needed, free = len(missing) * math.prod(shape), shutil.disk_usage(folder).free
            if needed > free:
                raise InputError(
                    f"decoded images need {needed} bytes, {folder} has {free} free: set --data.image_cache"
                )
            try:
                for cache, camera in missing.items():
                    _build(cache, camera, parquet_files, shape)
            finally:
                _remove_unfinished(folder)
    return [cache / "frames.npy" for cache in done]


def _build(cache: Path, camera: str, parquet_files: list[Path], shape: tuple[int, int, int, int]) -> None:
    unfinished = cache.with_name(f"{cache.name}.partial")
    unfinished.mkdir()
    file = unfinished / "frames.npy"
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    with open(file, "r+b") as reserved:
        # A write through the map to a block that the disk cannot give would kill the process with SIGBUS.
        os.posix_fallocate(reserved.fileno(), 0, file.stat().st_size)
    first, workers = 0, os.cpu_count()
    with (
        ThreadPoolExecutor(workers) as pool,  # threads suffice: Pillow lets go of the interpreter's lock to decode
        tqdm(total=shape[0], desc=f"decoding {camera}", unit="frame", mininterval=1) as progress,
    ):
        for path in parquet_files:
            with pq.ParquetFile(path) as parquet:
                for group in range(parquet.num_row_groups):  # one in memory at a time
                    pngs = pc.struct_field(parquet.read_row_group(group, [camera]).column(camera), "bytes")
                    where = f"{path}, row group {group}, {camera}"
                    decode = partial(_decode, pngs, pixels[first : first + len(pngs)], where)
                    list(pool.map(decode, np.array_split(np.arange(len(pngs)), workers)))
                    first += len(pngs)
                    progress.update(len(pngs))
    pixels.flush()
    _fsync(file)
    unfinished.rename(cache)
    _fsync(cache.parent)


def _decode(pngs: pa.ChunkedArray, pixels: np.ndarray, where: str, rows: np.ndarray) -> None:
    h, w = pixels.shape[2:]
    for row in rows:
        try:
            image = Image.open(io.BytesIO(pngs[row].as_py())).convert("RGB")
        except Exception as error:  # Pillow raises half a dozen types for a broken image
            raise InputError(f"{where}, row {row}: not a readable image ({error}): write the data set again") from error
        if image.size != (w, h):
            found = f"{image.height} x {image.width}"
            raise InputError(f"{where}, row {row}: the image is {found}, expected {h} x {w} from meta/info.json")
        pixels[row] = np.asarray(image).transpose(2, 0, 1)  # [3, h, w]


def _remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob(".frames-*.partial"):
        shutil.rmtree(unfinished)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
