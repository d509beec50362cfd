"""How fast data sets are read, and how much memory that takes.

python benchmarks/data.py speed      (a) one sample at a time with PyAV, (b) --data.cache none, (c) disk, (d) the limit
python benchmarks/data.py memory     resident size of a loader worker over 10,000 batches
python benchmarks/data.py index      a data set of 10⁸ frames: time and memory to open it, cost of random positions

Each prints a table and writes it to --out. All ratios are of one run, the sides taking turns.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import av
import launched  # noqa: F401 - which finds vla
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vla.config import ModelConfig
from vla.data.lerobot import LeRobotDataset
from vla.data.loader import loader
from vla.data.mixture import Mixture
from vla.data.stream import Samples, training_positions
from vla.data.write import LeRobotWriter
from vla.model.backbone import LanguageModel

SIZE, CAMERAS, EPISODES, LENGTH, FPS = 256, ("front", "wrist"), 50, 200, 30
CHUNK, BATCH, TURNS = 50, 64, 3


def write(root: Path, codec: str) -> None:
    """Episodes of a smooth, noisy background over which coloured squares move."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    with LeRobotWriter(
        root,
        fps=FPS,
        cameras=dict.fromkeys(CAMERAS, (SIZE, SIZE)),
        state_names=[f"joint_{i}" for i in range(7)],
        action_names=[f"joint_{i}" for i in range(7)],
        robot_type="synthetic",
        codec=codec,
    ) as writer:
        for episode in tqdm(range(EPISODES), desc=f"writing {codec}"):
            images = {camera: np.empty((LENGTH, 3, SIZE, SIZE), np.uint8) for camera in CAMERAS}
            for pictures in images.values():
                phase, tilt = rng.uniform(0, 6, (3, 1, 1)), rng.uniform(0.01, 0.05, (3, 2, 1, 1))
                scene = 110 + 60 * np.sin(phase + tilt[:, 0] * x + tilt[:, 1] * y)
                colours, places = rng.uniform(0, 255, (6, 3)), rng.uniform(20, SIZE - 60, (6, 2))
                ways = rng.normal(0, 1.5, (6, 2))
                for t in range(LENGTH):
                    picture = scene + rng.normal(0, 3, scene.shape)
                    for colour, place, way in zip(colours, places, ways, strict=True):
                        top, left = np.clip(place + way * t, 0, SIZE - 40).astype(int)
                        picture[:, top : top + 40, left : left + 40] = colour[:, None, None]
                    pictures[t] = picture.clip(0, 255)
            walk = rng.normal(0, 0.1, (LENGTH, 7)).cumsum(0).astype(np.float32)
            writer.add_episode(images=images, state=walk, actions=walk, instruction=f"task {episode % 5}")


class OneAtATime(Dataset):
    """What most loaders do: for each sample, open each camera's video, seek, decode up to the frame, close."""

    def __init__(self, data: LeRobotDataset, root: Path):
        self.data, self.actions, self.state = data, np.array(data.actions), np.array(data.state)
        table = pa.concat_tables(pq.read_table(file) for file in sorted(root.glob("meta/episodes/*/*.parquet")))
        self.episodes, self.root = table.to_pylist(), root

    def __getitem__(self, frame: int) -> dict[str, torch.Tensor]:
        row = int(np.searchsorted(self.data.episode_to, frame, side="right"))
        images = []
        for camera in CAMERAS:
            key = f"videos/observation.images.{camera}"
            chunk, file, start = (
                self.episodes[row][f"{key}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp")
            )
            due = start + (frame - self.data.episode_from[row]) / FPS
            with av.open(str(self.root / f"{key}/chunk-{chunk:03d}/file-{file:03d}.mp4")) as container:
                stream = container.streams.video[0]
                container.seek(int(due / stream.time_base), stream=stream)
                picture = next(p for p in container.decode(stream) if p.time > due - 0.5 / FPS)
                images.append(torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1))
        wanted = frame + np.arange(CHUNK)
        clamped = np.minimum(wanted, self.data.episode_to[row] - 1)
        return {
            "images": torch.stack(images),
            "state": torch.from_numpy(self.state[frame]),
            "actions": torch.from_numpy(self.actions[clamped]),
            "action_is_pad": torch.from_numpy(wanted > clamped),
        }


def samples(data: LeRobotDataset) -> Samples:
    tokens = LanguageModel(ModelConfig(max_tokens=32)).tokenize(data.instructions)
    return Samples(Mixture([data]), [data.episodes], tokens, CHUNK, seed=0, shuffle=True)


def ours(data: LeRobotDataset, batches: int, workers: int, skip: int = 8):
    positions = training_positions(0, batches + skip, BATCH, BATCH, 0, 1)
    return loader(samples(data), positions, BATCH, workers, torch.device("cpu"))


def rate(batches, count: int, skip: int = 8) -> float:
    """Samples per second, after `skip` batches; one number of each batch is read, as a copy to a device would."""
    iterator = iter(batches)
    for _ in range(skip):
        next(iterator)
    begun = time.perf_counter()
    for _ in range(count):
        next(iterator)["images"][-1, -1, -1, -1, -1].item()
    seconds = time.perf_counter() - begun
    del iterator
    return count * BATCH / seconds


def _read(files: list[Path], batches: int, seed: int, begin, done) -> None:
    """Copy random frames out of the maps with numpy: as many bytes as `batches` batches have."""
    maps, rng = [np.load(file, mmap_mode="r") for file in files], np.random.default_rng(seed)
    out = np.empty((BATCH, 3, SIZE, SIZE), np.uint8)
    begin.wait()
    for _ in range(batches):
        for pictures in maps:
            np.take(pictures, rng.integers(0, len(pictures), BATCH), axis=0, out=out)
    done.wait()


def limit(files: list[Path], batches: int, workers: int) -> float:
    """Samples per second when as many processes do nothing but copy random frames from the maps."""
    begin, done = (multiprocessing.Barrier(workers + 1) for _ in range(2))
    share = batches // workers
    readers = [multiprocessing.Process(target=_read, args=(files, share, seed, begin, done)) for seed in range(workers)]
    for reader in readers:
        reader.start()
    begin.wait()
    begun = time.perf_counter()
    done.wait()
    seconds = time.perf_counter() - begun
    for reader in readers:
        reader.join()
    return share * workers * BATCH / seconds


def speed(options: argparse.Namespace) -> dict:
    rows = {}
    for codec in ("av1", "h264"):
        root = options.data / codec
        if not root.exists():
            write(root, codec)
        disk, live = LeRobotDataset(root), LeRobotDataset(root, cache="none")
        files = [pictures.source for pictures in disk._pictures]
        shuffled = torch.randperm(disk.num_frames, generator=torch.Generator().manual_seed(0))[: 24 * BATCH].tolist()
        turns = []
        for _ in range(TURNS):
            naive = DataLoader(OneAtATime(disk, root), BATCH, sampler=shuffled, num_workers=options.workers)
            turn = {"a": rate(naive, 16), "b": rate(ours(live, 64, options.workers), 64)}
            turn |= {"c": rate(ours(disk, 1000, options.workers), 1000), "d": limit(files, 1000, options.workers)}
            turns.append(turn)
            print(codec, {name: round(value) for name, value in turn.items()}, file=sys.stderr)
        ratios = {"b/a": ("b", "a"), "c/a": ("c", "a"), "c/d": ("c", "d")}
        row = {name: statistics.median(turn[name] for turn in turns) for name in "abcd"}
        row |= {name: statistics.median(turn[i] / turn[j] for turn in turns) for name, (i, j) in ratios.items()}
        rows[codec] = row | {"turns": turns}
        print(f"{codec:5} samples/s: " + ", ".join(f"({n}) {row[n]:,.0f}" for n in "abcd"), end="; ")
        print(", ".join(f"{name} {row[name]:.2f}" for name in ratios))
    return rows


def memory(options: argparse.Namespace) -> dict:
    """Resident size of the one worker, which includes the pages of files that it has mapped, as batches go by."""
    rows = {}
    for cache in ("disk", "none"):
        data, size = LeRobotDataset(options.data / "av1", cache=cache), BATCH if cache == "disk" else 8
        positions = training_positions(0, options.batches, size, size, 0, 1)
        iterator = loader(samples(data), positions, size, 1, torch.device("cpu"))
        next(iterator)
        (worker,) = multiprocessing.active_children()
        sizes = {}
        for batch in tqdm(range(options.batches - 1), desc=cache):
            next(iterator)
            if (batch + 2) % (options.batches // 10) == 0 or batch == options.batches // 100:
                sizes[batch + 2] = _resident(worker.pid)
        del iterator
        first, last = next(iter(sizes.values())), list(sizes.values())[-1]
        rows[cache] = {"batch": size, "resident_mb": sizes, "growth": last / first - 1}
        print(
            f"--data.cache {cache}, batch {size}: worker of {first:.0f} MB grew by {100 * (last / first - 1):.1f} % "
            f"over {options.batches} batches"
        )
    return rows


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_index(root: Path, episodes: int, length: int) -> None:
    """A data set of numbers alone, of episodes of the same length; its images are null, as they are not looked at."""
    frames, rows = episodes * length, 1_000_000
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    scalars = dict.fromkeys(("timestamp", "frame_index", "episode_index", "index", "task_index"), "int64")
    features = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()}
    features |= {key: {"dtype": "float32", "shape": [4], "names": None} for key in ("observation.state", "action")}
    features["observation.image"] = {"dtype": "image", "shape": [64, 64, 3], "names": ["height", "width", "channel"]}
    info = {"codebase_version": "v3.0", "robot_type": "synthetic", "fps": FPS, "chunks_size": 1000}
    info |= {"total_frames": frames, "total_episodes": episodes, "features": features, "video_path": None}
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    (root / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.table({"task_index": [0], "task": ["move"]}), root / "meta/tasks.parquet")
    first = np.arange(episodes) * length
    table = {"episode_index": np.arange(episodes), "length": np.full(episodes, length), "dataset_from_index": first}
    table |= {"dataset_to_index": first + length, "data/chunk_index": np.zeros(episodes, int)}
    table["data/file_index"] = first // rows
    pq.write_table(pa.table(table), root / "meta/episodes/chunk-000/file-000.parquet")
    rng = np.random.default_rng(0)
    images = pa.StructArray.from_arrays([pa.nulls(rows, pa.binary()), pa.nulls(rows, pa.string())], ["bytes", "path"])
    for file in tqdm(range(frames // rows), desc="writing numbers"):
        index = np.arange(file * rows, (file + 1) * rows)
        within = index % length
        vectors = [pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=4 * rows).astype(np.float32)), 4)] * 2
        columns = {"observation.state": vectors[0], "action": vectors[1], "observation.image": images}
        columns |= {"timestamp": (within / FPS).astype(np.float32), "frame_index": within, "index": index}
        columns |= {"episode_index": index // length, "task_index": np.zeros(rows, int)}
        pq.write_table(pa.table(columns), root / f"data/chunk-000/file-{file:03d}.parquet")


def index(options: argparse.Namespace) -> dict:
    root = options.data / "index"
    if not root.exists():
        write_index(root, options.episodes, 100)
    row = {}
    for turn in ("first", "again"):  # each in a process of its own, whose peak memory tells what it took
        command = [sys.executable, __file__, "open", "--data", str(options.data)]
        row[turn] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(
            f"opened ({turn}): {row[turn]['seconds']:.1f} s, peak {row[turn]['peak_mb']:.0f} MB, of which the "
            f"libraries {row[turn]['libraries_mb']:.0f} MB"
        )
    print("; ".join(f"{where}: {ms:.3f} ms" for where, ms in row["again"]["positions_ms"].items()))
    again = row["again"]
    print(f"statistics: {again['statistics_seconds']:.0f} s, peak {again['statistics_peak_mb']:.0f} MB")
    return row


def open_index(options: argparse.Namespace) -> dict:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # noqa: E731
    libraries, begun = peak(), time.perf_counter()
    data = LeRobotDataset(options.data / "index", cache="none")
    stream = samples(data)
    row = {"seconds": time.perf_counter() - begun, "peak_mb": peak(), "libraries_mb": libraries}
    row["frames"], row["episodes"] = data.num_frames, len(data.episode_to)
    end, rng = data.num_frames - BATCH, np.random.default_rng(0)
    cost = {}
    for where, starts in {
        "frames of 64 positions from 0 on": [0] * 200,
        "at the end of the first epoch": [end] * 200,
        "at random": rng.integers(0, end, 200).tolist(),
        "in epoch 1,000": (1000 * data.num_frames + rng.integers(0, end, 200)).tolist(),
    }.items():
        times = []
        for start in starts:
            begun = time.perf_counter()
            stream.frames(torch.arange(start, start + BATCH))
            times.append(time.perf_counter() - begun)
        cost[where] = 1e3 * statistics.median(times)
    begun = time.perf_counter()
    stream.statistics()
    row |= {"positions_ms": cost, "statistics_seconds": time.perf_counter() - begun, "statistics_peak_mb": peak()}
    print(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "index", "open"])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, which are made if missing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="file for all numbers, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"speed": speed, "memory": memory, "index": index, "open": open_index}[options.what](options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
