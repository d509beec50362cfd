import multiprocessing
import os
import pickle
import struct
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from vla import InputError
from vla.data.video import OpenVideos, Video

H264, AV1 = "libx264", "libsvtav1"
LENGTH = 40
COLOURS = ((220, 40, 40), (40, 200, 60), (40, 60, 210), (200, 200, 40))
OPTIONS = {H264: {"bf": "3"}, AV1: {"preset": "12", "svtav1-params": "lp=1"}}


def picture(number, size):
    """uint8 [3, h, w]: the number's 8 bits in two rows of black and white blocks, above a row of colours."""
    h, w = size
    image = np.zeros((3, h, w), dtype=np.uint8)
    for block in range(12):
        row, column = divmod(block, 4)
        colour = COLOURS[column] if row == 2 else 3 * (255 * (number >> block & 1),)
        rows, columns = slice(row * h // 3, (row + 1) * h // 3), slice(column * w // 4, (column + 1) * w // 4)
        image[:, rows, columns] = np.reshape(colour, (3, 1, 1))
    return image


def numbers(images):
    h, w = images.shape[-2:]
    bits = [
        images[:, 1, (2 * row + 1) * h // 6, (2 * column + 1) * w // 8] > 128 for row in (0, 1) for column in range(4)
    ]
    return sum(bit.astype(int) << place for place, bit in enumerate(bits)).tolist()


def write(
    path, codec=H264, *, gop=12, fps=30, start=0, size=(48, 64), options=(), muxer=(), colours=(), noise=0, sound=0
):
    """A video of frames that show their numbers, the first at `start` frames. colours: their matrix and range. sound:
    samples of a sound track before it.
    """
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=dict(muxer)) as container:
        track = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        stream = container.add_stream(codec, rate=Fraction(fps), options=OPTIONS[codec] | dict(options))
        (stream.height, stream.width), stream.pix_fmt, stream.gop_size = size, "yuv420p", gop
        if colours:
            stream.codec_context.colorspace, stream.codec_context.color_range = colours
        for number in range(LENGTH):
            image = picture(number, size) + rng.integers(-noise, noise + 1, (3, *size))
            image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if colours:
                frame = frame.reformat(format="yuv420p", dst_colorspace=colours[0], dst_color_range=colours[1])
            frame.pts, frame.time_base = start + number, 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            container.mux([*track.encode(silence(sound)), *track.encode()])
    return path


def silence(length):
    frame = av.AudioFrame("s16", "mono", length)
    frame.sample_rate = 8000
    return frame


def read(video, frames):
    out = np.zeros((len(frames), 3, video.height, video.width), dtype=np.uint8)
    for places, picture in video.read(np.asarray(frames)):
        out[places] = picture
    return out


def samples(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def played(path):
    """Times and images [F, 3, h, w] of a video played from its beginning to its end."""
    with av.open(str(path)) as container:
        frames = [(float(f.time), f.to_ndarray(format="rgb24").transpose(2, 0, 1)) for f in container.decode(video=0)]
    return np.array([time for time, _ in frames]), np.stack([image for _, image in frames])


def damage(path, sample, change):
    """Change the bytes of one sample (a frame as compressed, in decoding order)."""
    packet, data = samples(path)[sample], bytearray(path.read_bytes())
    where = slice(packet.pos, packet.pos + packet.size)
    data[where] = change(data[where])
    path.write_bytes(data)


def blank(data):
    return bytes(len(data))


def blank_end(data):
    return data[: len(data) // 4] + bytes(len(data) - len(data) // 4)


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def open_files(folder):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sorted(os.path.basename(file) for file in map(os.path.realpath, links) if file.startswith(str(folder)))


BEGUN_EARLY = {"start": -17, "muxer": {"avoid_negative_ts": "disabled"}}
VIDEOS = {
    "h264, all key": (H264, {"gop": 1}),
    "h264, GOP 2": (H264, {"gop": 2, "fps": 80}),
    "h264, B-frames": (H264, {"fps": Fraction(30000, 1001), "start": 7}),
    "h264, no B-frames": (H264, {"options": {"bf": "0"}, "size": (50, 66)}),
    "h264, open GOP": (H264, {"options": {"x264-params": "open-gop=1:scenecut=0"}}),
    "h264, one GOP": (H264, {"gop": 1000, "start": 300}),
    "h264, one tick a frame": (H264, {"muxer": {"video_track_timescale": "30", "use_editlist": "0"}}),
    "h264, negative offsets": (H264, {"muxer": {"movflags": "negative_cts_offsets+faststart"}}),
    "h264, fragments": (H264, {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264, begun before it is shown": (H264, BEGUN_EARLY),
    "h264, after a sound track": (H264, {"sound": 1024}),
    "h264, BT.709": (H264, {"colours": (Colorspace.ITU709, ColorRange.MPEG)}),
    "av1, GOP 2": (AV1, {"gop": 2, "size": (90, 134)}),
    "av1, GOP 12": (AV1, {"fps": Fraction(30000, 1001), "start": 7}),
    "av1, one GOP": (AV1, {"gop": 1000, "fps": 80}),
    "av1, full range": (AV1, {"colours": (Colorspace.ITU601, ColorRange.JPEG)}),
}


@pytest.mark.parametrize(("codec", "options"), VIDEOS.values(), ids=VIDEOS)
def test_every_frame_and_its_time_are_those_of_playing_the_video(tmp_path, codec, options):
    path = write(tmp_path / "video.mp4", codec, **options)
    times, images = played(path)
    video, rng, hidden = Video(path), np.random.default_rng(0), max(0, -options.get("start", 0))
    np.testing.assert_allclose(video.times, times, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.diff(video.times), float(1 / options.get("fps", 30)), rtol=0, atol=1e-9)
    assert (video.path, video.codec) == (path, {H264: "h264", AV1: "av1"}[codec])

    everything = read(video, np.arange(len(times)))
    np.testing.assert_array_equal(everything, images)
    assert numbers(everything) == list(range(hidden, LENGTH))
    written = np.stack([picture(number, images.shape[2:]) for number in range(hidden, LENGTH)])
    assert np.abs(everything.astype(int) - written).mean() < 4  # levels of 255

    for frames in (rng.integers(0, len(times), 30), *rng.permutation(len(times))[:, None]):
        np.testing.assert_array_equal(read(video, frames), images[frames])
    assert read(video, np.arange(0)).shape == (0, *images.shape[1:])


def in_64_bits(path):
    """Give the boxes of frames and index sizes in 64 bits, as a file of over 4 GB has."""
    data = path.read_bytes()
    frames, index = data.index(b"mdat") - 4, data.rindex(b"moov") - 4  # 8 bytes lie free before the frames
    boxes = [data[: frames - 8]]
    for box, stop in ((frames, index), (index, len(data))):
        boxes += [struct.pack(">I4sQ", 1, data[box + 4 : box + 8], stop - box + 8), data[box + 8 : stop]]
    path.write_bytes(b"".join(boxes))


@pytest.mark.parametrize(
    ("options", "change"),
    [({}, None), ({"gop": 2}, None), ({"options": {"bf": "0"}}, None), ({}, in_64_bits)],
    ids=["B-frames", "GOP 2", "no B-frames", "64 bits"],
)
def test_opening_reads_the_index_and_not_the_frames(tmp_path, options, change):
    path = write(tmp_path / "video.mp4", size=(240, 320), noise=100, **options)
    if change:
        change(path)
    times, _ = played(path)
    before = bytes_read()
    video = Video(path)
    assert bytes_read() - before < path.stat().st_size / 4
    np.testing.assert_allclose(video.times, times, rtol=0, atol=1e-9)


def test_times_are_right_where_the_table_of_delays_lacks_a_sample(tmp_path):
    path = write(tmp_path / "video.mp4")
    data = bytearray(path.read_bytes())
    rows = data.index(b"ctts") + 12  # each with its number of samples first
    data[rows + 3] -= 1
    path.write_bytes(data)
    np.testing.assert_allclose(Video(path).times, np.unique(played(path)[0]), rtol=0, atol=1e-9)


def text(path):
    path.write_text("no video")


def sound(path):
    with av.open(str(path), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=8000, layout="mono")
        container.mux([*track.encode(silence(1024)), *track.encode()])


def hidden(path):
    write(path, start=-LENGTH, muxer={"avoid_negative_ts": "disabled"})


def avi(path):
    write(path.with_suffix(".avi")).rename(path)


def cut(muxer, share):
    def make(path):
        write(path, muxer=muxer)
        os.truncate(path, int(path.stat().st_size * share))

    return make


BROKEN = {
    "missing": (lambda path: None, "missing"),
    "text": (text, "no whole video"),
    "sound": (sound, "no video"),
    "no frame is shown": (hidden, "no frame"),
    "avi": (avi, "is AVI .*, expected mp4"),
    "index lost": (cut({}, 0.9), "no whole video"),
    "frames lost": (cut({"movflags": "faststart"}, 0.9), "cut off"),
}


@pytest.mark.parametrize(("make", "fault"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_whole_video_is_named_with_its_fault(tmp_path, make, fault):
    make(tmp_path / "video.mp4")
    with pytest.raises(InputError, match=f"video.mp4 .*{fault}.*: .* (again|as mp4)"):
        Video(tmp_path / "video.mp4")
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("sample", [12, 15], ids=["key frame", "inner frame"])
@pytest.mark.parametrize(
    ("codec", "options", "change"),
    [
        (H264, {}, blank),
        (H264, {}, blank_end),
        (H264, {"bf": "0"}, blank),
        (H264, {"bf": "0"}, blank_end),
        (AV1, {}, blank),
    ],
)
def test_what_needs_a_damaged_frame_is_named_and_all_else_is_read(tmp_path, codec, options, change, sample):
    path = write(tmp_path / "video.mp4", codec, size=(96, 128), noise=20, options=options)
    _, images = played(path)
    order = [round(packet.pts * packet.time_base * 30) for packet in samples(path)]
    damage(path, sample, change)
    video, lost = Video(path), order[sample:24]  # up to the next key frame
    for frame in lost:
        with pytest.raises(InputError, match=rf"video.mp4: frame {frame}, shown at 0.\d+ s, cannot be decoded .*again"):
            read(video, [frame, 30])
        frames = [*range(12), *order[12:sample], *range(24, LENGTH)]
        np.testing.assert_array_equal(read(video, frames), images[frames])
    if order == sorted(order):
        with pytest.raises(InputError, match=f"frame {sample}, "):
            read(video, np.arange(LENGTH)[::-1])


def test_frames_that_are_not_shown_are_decoded_only_where_another_needs_them(tmp_path):
    path = write(tmp_path / "video.mp4", **BEGUN_EARLY)
    key = next(i for i, packet in enumerate(samples(path)) if packet.is_keyframe and packet.pts >= 0)
    damage(path, key - 1, blank)  # in the one GOP that has frames to hide
    video = Video(path)
    assert numbers(read(video, np.arange(7, LENGTH - 17))) == list(range(24, LENGTH))
    with pytest.raises(InputError, match="cannot be decoded"):
        read(video, np.arange(7))


def test_a_file_cut_off_after_it_was_opened_is_named(tmp_path):
    path = write(tmp_path / "video.mp4", AV1, size=(240, 320), noise=100)
    video = Video(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"video.mp4: frame 39, .*again"):
        read(video, [39])


def test_a_frame_of_another_size_is_named(tmp_path):
    parts = [write(tmp_path / f"{w}.mp4", AV1, size=(64, w)) for w in (64, 96)]
    with av.open(str(tmp_path / "video.mp4"), "w") as container, av.open(str(parts[0])) as template:
        stream = container.add_stream_from_template(template.streams.video[0], opaque=True)
        for part, packets in enumerate(map(samples, parts)):
            for packet in packets:
                packet.pts = packet.dts = packet.pts + part * LENGTH * 512
                packet.stream = stream
                container.mux(packet)
    video = Video(tmp_path / "video.mp4")
    assert numbers(read(video, [0, LENGTH - 1])) == [0, LENGTH - 1]
    with pytest.raises(InputError, match=f"frame {LENGTH + 2}, .*size is 96 x 64, expected 64 x 64"):
        read(video, [LENGTH + 2])


def test_the_videos_used_last_stay_open_and_no_more_than_the_limit(tmp_path):
    paths = [write(tmp_path / f"{name}.mp4") for name in "abcd"]
    videos = OpenVideos(limit=2)
    first = videos(paths[0])
    assert videos(paths[1]) is not first
    assert videos(str(paths[0])) is first
    videos(paths[2])  # in place of b, as a was used since
    assert open_files(tmp_path) == ["a.mp4", "c.mp4"]
    videos(paths[3])
    assert open_files(tmp_path) == ["a.mp4", "c.mp4", "d.mp4"]  # a is still held here
    assert numbers(read(first, [5])) == [5]
    del first
    assert open_files(tmp_path) == ["c.mp4", "d.mp4"]
    video = videos(paths[0])
    video.close()
    assert open_files(tmp_path) == ["d.mp4"]


def test_a_forked_process_opens_the_videos_again(tmp_path):
    path, videos = write(tmp_path / "video.mp4"), OpenVideos(limit=2)
    video = videos(path)

    def child():
        assert videos(path) is not video
        assert videos(path) is videos(path)
        assert numbers(read(videos(path), np.arange(LENGTH))) == list(range(LENGTH))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    for frame in range(LENGTH):
        assert numbers(read(videos(path), [frame])) == [frame]
    process.join()
    assert process.exitcode == 0
    assert videos(path) is video


def test_a_spawned_process_opens_the_videos_again(tmp_path):
    path, videos = write(tmp_path / "video.mp4"), OpenVideos(limit=1)
    videos(path)
    again = pickle.loads(pickle.dumps(videos))
    assert again(path) is not videos(path)
    assert again(path) is again(path)


def test_threads_read_each_its_own_video_at_the_same_time(tmp_path):
    paths = [write(tmp_path / f"{codec}.mp4", codec) for codec in (H264, AV1)]

    def work(path):
        video, frames = Video(path), np.random.default_rng(0).integers(0, LENGTH, 200)
        return [numbers(read(video, frames[i : i + 8])) == frames[i : i + 8].tolist() for i in range(0, 200, 8)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(work, paths * 2))


def growth(path):
    """Bytes of memory, and threads, that a process has more after thousands of reads."""
    threads, video = len(os.listdir("/proc/self/task")), Video(path)

    def memory_after(reads):
        for n in range(reads):
            read(video, [n % LENGTH])
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = memory_after(2000)
    return memory_after(8000) - before, len(os.listdir("/proc/self/task")) - threads


def test_memory_and_threads_do_not_grow_with_the_reads(tmp_path):
    paths = [
        write(tmp_path / f"{codec}.mp4", codec, gop=1, size=size) for codec, size in ((H264, (16, 16)), (AV1, (64, 64)))
    ]
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as fresh:  # whose heap has no gaps to fill
        for memory, threads in fresh.map(growth, paths):
            assert memory < 500_000
            assert threads == 0
