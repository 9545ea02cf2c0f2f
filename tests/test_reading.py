"""Times from time stamps, display matrices, images of every mode, and decord: against how the files were written.

Frames are known by decoding in sequence, which frame is shown when by the times that were written, pixels by hand.
"""

import itertools
import json
import random
import struct
from fractions import Fraction
from types import SimpleNamespace

import multivideo as mv

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import HARD_FILES, PIXELS, REAL_CLIPS, TALK, in_order, part_of, remux, write_clip, write_gif

ARGS = mv.TrainingArguments(**PIXELS)

# ------------------------------------------------------------------------------------------------------------ 1. times

TIMES = {  # milliseconds at which frames are shown
    "dropped": [40 * i for i in [*range(50), *range(350, 400)]],  # 25 per second, but for 12 seconds: 16 in all
    "bursts": [2000 * k + 20 * i for k in range(5) for i in range(10)] + [10_000],  # a screen that moves at times
    "constant": [round(1000 / 30 * i) for i in range(60)],  # as Matroska, WebM and FLV round 30 per second
}
FILES = [  # suffix, codec, B-frames
    ("mp4", "libx264", 0), ("mp4", "libx264", 2), ("mov", "libx264", 2), ("mkv", "libx264", 0), ("mkv", "libx264", 2),
    ("webm", "libvpx", 0), ("no-durations.webm", "libvpx", 0), ("no-durations.mkv", "libx264", 2),
    ("flv", "libx264", 0), ("flv", "libx264", 2), ("ts", "libx264", 0), ("ts", "libx264", 2), ("avi", "mpeg4", 0),
    ("asf", "msmpeg4", 0),
]  # fmt: skip


def write_timed(path, times, codec="libx264", b_frames=0):
    """A clip whose frames are shown at these milliseconds, each another picture; its header's rate is 30."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"preset": "veryfast"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.gop_size, stream.codec_context.max_b_frames = 12, b_frames
        for when in times:
            image = rng.integers(90, 166, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if "no-durations" in str(path):  # as browsers record: the element DefaultDuration becomes a void one
        data = path.read_bytes()
        at = data.index(b"\x23\xe3\x83\x84")
        path.write_bytes(data[:at] + b"\xec\x86" + bytes(6) + data[at + 8 :])


@pytest.fixture(scope="session")
def timed(tmp_path_factory):
    """{(times, suffix, B-frames): path} of all kinds of times in all containers."""
    folder, paths = tmp_path_factory.mktemp("timed"), {}
    for kind, (suffix, codec, b_frames) in itertools.product(TIMES, FILES):
        path = paths[kind, suffix, b_frames] = folder / f"{kind}-{b_frames}.{suffix}"
        write_timed(path, TIMES[kind], codec, b_frames)
    return paths


def shown_at(times, moment):
    """The number of the last frame whose time (milliseconds) has come at a moment (seconds)."""
    return max(i for i, when in enumerate(times) if when <= 1000 * moment + 1e-3)


@pytest.mark.parametrize("suffix, b_frames", [(suffix, b_frames) for suffix, _, b_frames in FILES])
@pytest.mark.parametrize("kind", ["dropped", "bursts"])
def test_varying_rates(timed, kind, suffix, b_frames):
    """The duration is the written one; frames are those shown at even moments; `start` and `end` are seconds."""
    path, times = timed[kind, suffix, b_frames], TIMES[kind]
    every, info = in_order(path), mv.video_info(str(path))
    assert info.num_frames == len(times) == len(every)
    assert np.allclose(info.times, np.array(times) / 1000, atol=1e-3)
    # The last frame's own duration is in the file, or that of most frames; at most the header's 33 to 40 ms.
    seconds = info.num_frames / info.fps
    assert times[-1] / 1000 < seconds <= times[-1] / 1000 + 0.0401
    for options, begin, end in [({}, 0, seconds), ({"nframes": 6}, 0, seconds), ({"start": 5.01}, 5.01, seconds),
                                ({"end": 1.99}, 0, 1.99 + 1 / info.fps), ({"start": 1, "end": 8.5}, 1, None),
                                ({"fps": 0.5}, 0, seconds)]:  # fmt: skip
        end = 8.5 + 1 / info.fps if end is None else end
        part = part_of({"video": str(path), **options})
        indices, fps = mv.sample_frames(part, info.num_frames, info.fps, ARGS, times=info.times)
        available = shown_at(times, end - 1 / info.fps) - shown_at(times, begin) + 1
        wanted = options.get("nframes") or max(4, (end - begin) * options.get("fps", 2))
        assert len(indices) == int(min(wanted, available) // 2 * 2)
        moments = np.linspace(begin, end - 1 / info.fps, len(indices))
        off = [abs(times[i] - times[shown_at(times, moment)]) for i, moment in zip(indices, moments)]
        assert max(off) <= 40 and sum(gap > 0 for gap in off) <= 1  # containers round by a millisecond
        assert fps == pytest.approx(len(indices) / (end - begin))
        frames, sampled, _ = mv.load_clip(part, "", mv.TrainingArguments(**PIXELS | {"video_max_pixels": 10**6}), 2)
        assert sampled == fps and torch.equal(frames.permute(0, 2, 3, 1), every[indices])


def test_a_frame_that_stands_still(timed):
    """Between two frames there is one to be seen, for as long as was asked; after the last one there is none."""
    for suffix in ("mp4", "mkv", "webm"):
        path = timed["dropped", suffix, 0]
        frames, fps, _ = mv.load_clip(part_of({"video": str(path), "start": 4, "end": 9}), "", ARGS, 2)
        assert len(frames) == 1 and fps == pytest.approx(1 / (5 + 0.16), rel=1e-3)  # 16 s / 100 frames
        assert torch.equal(frames[0].permute(1, 2, 0), in_order(path)[49])
        with pytest.raises(
            mv.BadFile, match="'start' 15.9 and 'end' None s leave no two frames of a 1[56].[90].-s video"
        ):
            mv.load_clip(part_of({"video": str(path), "start": 15.9}), "", ARGS, 2)


@pytest.mark.parametrize("suffix, b_frames", [(suffix, b_frames) for suffix, _, b_frames in FILES])
def test_rounded_times_are_a_constant_rate(timed, suffix, b_frames):
    """30 per second in milliseconds, and a copy of it in 1/90000 s: frames by number, as of any file of 30 fps."""
    path = timed["constant", suffix, b_frames]
    copy = path.with_name(f"{b_frames}-{suffix}-copy.mp4")
    remux(path, copy) if suffix in ("mkv", "flv") and not b_frames else None
    for file in [path, *([copy] if copy.exists() else [])]:
        info = mv.video_info(str(file))
        assert info.times is None and info.num_frames == 60 and info.fps == pytest.approx(30, rel=5e-4)
        if not file.name.endswith(("mp4", "mov")):  # there the last frame's duration is 33 ms and a third, rounded up
            assert info.fps == 30.0


def rate_of(times, last=0.0, claimed=None, tick=Fraction(1, 90000), **dts):
    """measure_rate of frames shown at these seconds."""
    ticks = [None if when is None else round(when / tick) for when in times]
    stamps = list(zip(ticks, [round(when / tick) for when in dts["dts"]] if dts else ticks, [0] * len(ticks)))
    stamps[-1] = (*stamps[-1][:2], round(last / tick))
    return mv.measure_rate(stamps, SimpleNamespace(average_rate=claimed, time_base=tick))


def test_half_a_frame_is_the_limit():
    """Jitter below half a frame: by number. One frame further off: by time. Both have the same duration."""
    rng, period = random.Random(0), 1 / 25
    for _ in range(200):
        n, i = rng.randint(10, 400), rng.randint(1, 8)
        times = [period * k + (rng.uniform(-0.48, 0.48) * period if 0 < k < n - 1 else 0) for k in range(n)]
        assert rate_of(times, period) == (n, pytest.approx(25, rel=1e-4), None)
        times = [period * k for k in range(n)]
        times[i] += rng.choice([-1, 1]) * (0.5 * period + 2e-3)  # half a frame, a millisecond of rounding, and more
        assert rate_of(times, period)[2] == pytest.approx(sorted(times), abs=2e-5)
    # a rate that two dropped frames shift by a frame
    times = [period * k for k in range(302) if k not in (150, 151)]
    assert rate_of(times, period)[2] and not rate_of([period * k for k in range(301) if k != 150], period)[2]


def test_what_a_header_says():
    """Its rate is taken to the last bit where the times agree, and not where they do not, or it has none."""
    ntsc = Fraction(30000, 1001)
    times = [float(i / ntsc) for i in range(5000)]
    assert rate_of(times, float(1 / ntsc), ntsc) == (5000, float(ntsc), None)
    rounded = [round(when, 3) for when in times]
    assert rate_of(rounded, 0.033, ntsc, Fraction(1, 1000)) == (5000, float(ntsc), None)
    for claimed in (None, 1000, 24, 30):
        assert rate_of(times, float(1 / ntsc), claimed) == (5000, pytest.approx(float(ntsc), rel=1e-7), None)
    # no durations: the median gap; no time stamps at all: only the header
    assert rate_of([0, 1, 2, 3]) == (4, 1.0, None)
    assert rate_of([None] * 4, 0, 12.5, dts=[0, 1, 2, 3]) == (4, 1.0, None)
    assert mv.measure_rate([(None, None, 0)] * 4, SimpleNamespace(average_rate=12.5, time_base=1)) == (4, 12.5, None)
    with pytest.raises(ValueError, match="4 frames, without times or a rate"):
        mv.measure_rate([(None, None, 0)] * 4, SimpleNamespace(average_rate=None, time_base=1))
    with pytest.raises(ValueError, match="no frames"):
        mv.measure_rate([], SimpleNamespace(average_rate=25, time_base=1))
    # one frame: of one second, if nothing is known of it
    assert rate_of([7]) == (1, 1.0, None) and rate_of([7], 0.04, 25) == (1, 25.0, None)
    # times before 0, and not in order: B-frames
    assert rate_of([-0.5, 0.5, 0, 1], 0.5, dts=[-1.5, -1, -0.5, 0]) == (4, 2.0, None)


def test_clocks_that_are_set(timed, tmp_path):
    """Two recordings in one file, or hours of pause: the parts follow each other; minutes of pause are kept."""
    period = 1 / 25
    part = [period * i for i in range(100)]
    for jump in (-4, -3.5, 9 * 3600, 26.5 * 3600):
        times = part + [4 + jump + when for when in part]
        assert rate_of(times, period) == (200, pytest.approx(25), None)
    paused = part + [600 + when for when in part]
    assert rate_of(paused, period)[2] == pytest.approx(paused, abs=2e-5)
    hourly = [7200 * i for i in range(24)]  # a picture every two hours
    assert rate_of(hourly) == (24, 1 / 7200, None)
    one = timed["constant", "ts", 2].read_bytes()
    (tmp_path / "two.ts").write_bytes(one + one)
    info = mv.video_info(str(tmp_path / "two.ts"))
    assert (info.num_frames, info.fps, info.times) == (120, 30.0, None)


def test_even_times_are_taken_as_by_number():
    """The rule for varying rates, given even times: the frames of the rule for constant ones, to a rounding."""
    rng, equal, total = random.Random(0), 0, 0
    for _ in range(300):
        n, fps = rng.randint(4, 3000), rng.choice([24, 25, 30, 60])
        part = part_of({"video": "x.mp4", **rng.choice([{}, {"nframes": 8}, {"fps": 0.3}])})
        if rng.random() < 0.5 and n > 2 * fps:
            part |= {"start": rng.randrange(n // fps), "end": float(n)}
        try:
            by_number = mv.sample_frames(part, n, fps, ARGS)
        except ValueError:
            continue
        by_time = mv.sample_frames(part, n, fps, ARGS, times=[round(i / fps, 6) for i in range(n)])
        assert len(by_number[0]) == len(by_time[0]) and by_time[1] == pytest.approx(by_number[1])
        gaps = np.subtract(by_number[0], by_time[0])
        assert set(gaps) <= {0, 1}  # the nearest frame, or the one shown
        equal, total = equal + (gaps == 0).sum(), total + len(gaps)
    assert equal / total > 0.5


def test_times_in_the_cache(timed, tiny_model, tmp_path, monkeypatch):
    """From the cache as from the file: the same frames, rate and positions, without opening it."""
    path = timed["bursts", "mkv", 2]
    args = mv.TrainingArguments(model_id=tiny_model, video_cache=str(tmp_path), **PIXELS)
    encoder = mv.Encoder(tiny_model, args)
    encoder.cache.room.value = 1e8
    record = mv.normalize_conversation({"video": {"video": str(path), "start": 3}, "messages": TALK}, "x")
    first = encoder(record, "")
    (index,), info = tmp_path.rglob("*.json"), mv.video_info(str(path))
    assert json.loads(index.read_bytes().rsplit(b"\n", 1)[0])["times"][-1] == 10.0
    monkeypatch.setattr(mv, "read_video", lambda *_: pytest.fail("decoded again"))
    for other in (encoder, mv.Encoder(tiny_model, args)):
        again = other(record, "")
        assert all(np.array_equal(first[name], again[name]) for name in ("patches", "position_ids", "video_grid_thw"))
        assert not other.cache.indices  # times are too many for memory
    # two positions per second, floored; the clip goes from second 3 to 40 ms after 10, when the last frame comes
    times = sorted(set(first["position_ids"][1, first["input_ids"] == encoder.config.video_token_id].tolist()))
    count, seconds = 2 * len(times), info.num_frames / info.fps - 3
    assert seconds == pytest.approx(7.03, abs=0.011) and count == 14
    assert [t - times[0] for t in times] == [int(2 * k * 2 * seconds / count) for k in range(len(times))]


# ------------------------------------------------------------------------------------------------ 2. display matrices

MATRICES = list(itertools.product([True, False], [1, -1], [1, -1]))  # upright or lying; signs


@pytest.mark.parametrize("upright, a, b", MATRICES)
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_display_matrices(tmp_path, upright, a, b, suffix):
    """Each pixel (x, y) is shown at (x, y) · matrix, as ISO 14496-12 defines it; none of the eight is another one."""
    path = tmp_path / f"turned.{suffix}"
    write_clip(path, 64, 80, 9)
    stored = in_order(path)[4]  # [80, 64, 3]
    matrix = np.array([[a, 0], [0, b]] if upright else [[0, a], [b, 0]])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    fixed = (matrix << 16).tolist()
    data[at : at + 36] = struct.pack(">9i", *fixed[0], 0, *fixed[1], 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    y, x = np.mgrid[:80, :64]
    places = np.stack([x, y], -1).reshape(-1, 2) @ matrix
    places -= places.min(0)
    expected = np.zeros((*places.max(0)[::-1] + 1, 3), np.uint8)
    expected[places[:, 1], places[:, 0]] = stored.reshape(-1, 3)
    frames, info = mv.read_video(str(path), lambda *_: [4])
    assert (info.height, info.width) == expected.shape[:2] == ((80, 64) if upright else (64, 80))
    assert np.array_equal(frames[0].permute(1, 2, 0).numpy(), expected)


# ----------------------------------------------------------------------------------------------------------- 3. images


def values_of(path):
    """[height, width, 3] of an image, as frame and in a list of frames too."""
    pixels = np.array(mv.read_image(str(path)))
    height, width = pixels.shape[:2]
    size = {"resized_height": height, "resized_width": width}
    for part in (part_of({"image": str(path), **size}, "image"), part_of({"video": [str(path)] * 2, **size})):
        frames, *_ = mv.load_clip(part, "", ARGS, 1)
        assert np.array_equal(frames[0].permute(1, 2, 0).numpy(), pixels)
    return pixels


SIXTEEN = np.array([[0, 1, 128, 129, 257, 4095], [32767, 32768, 65278, 65406, 65407, 65535]])
EIGHT = np.array([[0, 0, 0, 1, 1, 16], [127, 128, 254, 254, 255, 255]], np.uint8)  # / 257, rounded


@pytest.mark.parametrize("name", ["png", "tiff", "big-endian.tiff", "jp2", "pgm", "pgm of 12 bits", "transparent.png",
                                  "white is 0.tiff", "12 bits.tiff"])  # fmt: skip
def test_16_bit_images(tmp_path, name):
    """The full range becomes 0 to 255; so it does of 12 bits where the file says that there are 12."""
    path, expected = tmp_path / f"image.{name}", EIGHT.copy()
    image = Image.fromarray(SIXTEEN.astype(np.uint16))
    if name.startswith("pgm"):
        values = SIXTEEN if name == "pgm" else SIXTEEN >> 4
        expected = expected if name == "pgm" else (values / 4095 * 255).round()
        header = b"P5 6 2 %d\n" % values.max()
        path.write_bytes(header + values.astype(">u2").tobytes())
    elif name == "big-endian.tiff":
        tags = [(256, 6), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 24)]
        path.write_bytes(b"MM" + struct.pack(">HI", 42, 32) + SIXTEEN.astype(">u2").tobytes() + struct.pack(
            ">H", len(tags)) + b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
            + bytes(4))  # fmt: skip
    elif name == "12 bits.tiff":
        values = (SIXTEEN >> 4).ravel().tolist()
        packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(values[::2], values[1::2]))
        tags = [(256, 6), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 18)]
        path.write_bytes(b"II" + struct.pack("<HI", 42, 26) + packed + struct.pack("<H", len(tags)) + b"".join(
            struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags) + bytes(4))  # fmt: skip
        expected = ((SIXTEEN >> 4) / 4095 * 255).round()
    elif name == "white is 0.tiff":
        image.save(path, tiffinfo={262: 0})
        expected = 255 - expected
    else:
        image.save(path, "JPEG2000" if name == "jp2" else None, **({"irreversible": False} if name == "jp2" else {}),
                   **({"transparency": 4095} if "transparent" in name else {}))  # fmt: skip
        expected[SIXTEEN == 4095] = 255 if "transparent" in name else 16
    assert np.array_equal(values_of(path), expected[..., None].repeat(3, -1))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_refused(tiny_model, tmp_path, mode):
    """Depth maps in metres, signed X-rays: nothing says which value is white."""
    path = tmp_path / "depth.tiff"
    Image.fromarray(SIXTEEN.astype({"F": np.float32, "I": np.int32}[mode])).save(path)
    record = mv.normalize_conversation({"id": "r", "image": str(path), "messages": TALK}, "x")
    message = rf"^record r: {path}: .*\(mode {mode}\) have no defined black and white: scale them, and save 8 or 16"
    with pytest.raises(mv.BadVideo, match=message):
        mv.Encoder(tiny_model, ARGS)(record, "")


def from_memory(image):
    """[height, width, 3] that read_image makes of what Pillow has opened."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mv.Image, "open", lambda _: image)
        return np.array(mv.read_image("memory"))


def on_white(colour, alpha):
    """One layer over white, as Porter and Duff have it."""
    return (np.asarray(colour) * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]).round()


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P bytes", "P int", "PA", "L", "RGB", "1", "gif", "webp", "La", "RGBa"]
)
def test_transparent_parts_are_white(tmp_path, mode):
    """Alpha of every kind: a channel, a palette's, or one value of the file."""
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 250, (20, 30), dtype=np.uint8), rng.integers(0, 250, (20, 30, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    numbers = rng.integers(0, 4, (20, 30), dtype=np.uint8)
    palette = np.array([[0, 0, 0], [250, 10, 10], [20, 200, 30], [40, 40, 220]], np.uint8)
    path, options = tmp_path / "image.png", {}
    if mode in ("RGBA", "webp", "RGBa"):
        image = Image.fromarray(np.dstack([colour, alpha]))
        expected = on_white(colour, alpha)
        path = path.with_suffix(".webp" if mode == "webp" else ".png")
        options = {"lossless": True, "exact": True} if mode == "webp" else {}
        if mode == "RGBa":  # alpha is multiplied in: the colours of nearly transparent pixels are lost
            alpha |= 192
            image = Image.fromarray(np.dstack([colour, alpha])).convert("RGBa")
            expected = on_white(colour, alpha)
    elif mode in ("LA", "La"):
        alpha |= 192 if mode == "La" else 0
        image, expected = (
            Image.fromarray(np.dstack([grey, alpha]), "LA"),
            on_white(grey[..., None].repeat(3, -1), alpha),
        )
    elif mode in ("L", "RGB", "1"):
        values = {"L": grey, "RGB": colour, "1": grey > 99}[mode]
        image = Image.fromarray(values)
        options = {"transparency": {"L": int(grey[3, 4]), "RGB": tuple(map(int, colour[3, 4])), "1": 0}[mode]}
        clear = {"L": grey == grey[3, 4], "RGB": (colour == colour[3, 4]).all(-1), "1": ~(grey > 99)}[mode]
        values = values * np.uint8(255) if mode == "1" else values
        expected = on_white(values if mode == "RGB" else values[..., None].repeat(3, -1), np.where(clear, 0, 255))
    else:
        image = Image.fromarray(numbers, "P")
        image.putpalette(palette.tobytes())
        steps = np.array([0, 255, 255, 255] if mode in ("P int", "gif") else [0, 100, 200, 255])
        options = {"transparency": 0 if mode in ("P int", "gif") else bytes(steps.tolist())}
        path = path.with_suffix(".gif" if mode == "gif" else ".png")
        expected = on_white(palette[numbers], steps[numbers])
    if mode in ("PA", "La", "RGBa"):  # Pillow writes no file of these
        image = image.convert("La") if mode == "La" else image
        if mode == "PA":
            image = Image.merge("PA", [image.copy(), Image.fromarray(steps[numbers].astype(np.uint8))])
            image.putpalette(palette.tobytes())
        pixels = from_memory(image)
    else:
        image.save(path, **options)
        pixels = values_of(path)
    assert abs(pixels - expected).max() <= (3 if mode in ("La", "RGBa") else 1)
    assert (expected == 255).all(-1).any() or mode in ("RGBA", "LA", "webp", "La", "RGBa")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LAB", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_pillows(tmp_path, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(
        "RGB" if mode == "LAB" else mode
    )
    image = Image.merge("LAB", image.split()) if mode == "LAB" else image
    path = tmp_path / "image.tiff"
    if mode in ("YCbCr", "HSV", "RGBX"):
        assert np.array_equal(from_memory(image.copy()), np.array(image.convert("RGB")))
        return
    image.save(path)
    with Image.open(path) as read:
        assert read.mode == mode
        assert np.array_equal(values_of(path), np.array(read.convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    """The corners and sides as the standard names them: where the stored row 0 and column 0 are when shown."""
    from transformers.image_utils import load_image

    stored = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)[..., None].repeat(3, -1)
    row_0, column_0 = [("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"), ("left", "top"),
                       ("right", "top"), ("right", "bottom"), ("left", "bottom")][orientation - 1]  # fmt: skip
    expected = stored if row_0 in ("top", "bottom") else stored.swapaxes(0, 1)
    expected = expected[::-1] if "bottom" in (row_0, column_0) else expected
    expected = expected[:, ::-1] if "right" in (row_0, column_0) else expected
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(stored).save(path, exif=exif, **options)
    pixels = values_of(path)
    assert pixels.shape == expected.shape and abs(pixels.astype(int) - expected).max() <= 1
    assert np.array_equal(pixels, np.array(load_image(str(path))))
    part = part_of({"image": str(path)}, "image")
    assert mv.clip_shape(part, "", ARGS, 28)[0][1:] == mv.target_size(part, *expected.shape[:2], 1, ARGS, 28)


def test_damaged_exif_turns_nothing(tmp_path):
    """An orientation that is none, and a block that cannot be read."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    for exif in (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\xff",
        b"Exif\0\0no",
    ):
        Image.fromarray(pixels).save(tmp_path / "image.jpg", exif=exif)
        assert values_of(tmp_path / "image.jpg").shape == (8, 16, 3)


def test_first_picture_of_several(tmp_path):
    for suffix in ("gif", "png", "tiff", "webp"):
        pictures = [Image.new("RGB", (30, 20), (90 * i, 0, 0)) for i in range(3)]
        pictures[0].save(tmp_path / f"image.{suffix}", save_all=True, append_images=pictures[1:])
        assert (values_of(tmp_path / f"image.{suffix}") == 0).all()


def test_file_addresses(tmp_path):
    """file:///x and file://localhost/x are /x, with %20 for a space; addresses elsewhere are refused."""
    path = tmp_path / "a b%20c é.png"
    Image.new("RGB", (30, 20)).save(path)
    from urllib.parse import quote

    for start in ("file://", "FILE://localhost"):
        address = start + quote(str(path))
        assert "%20b%2520c%20%C3%A9" in address
        for kind, item in (("image", address), ("video", [address, str(path)]), ("image", {"image_url": address})):
            assert set(part_of(item, kind)["files"]) == {str(path)}
        assert part_of(address.replace(".png", ".mp4"))["files"] == [str(path.with_suffix(".mp4"))]
    assert part_of("file:///50%.mp4")["files"] == ["/50%.mp4"]
    for other in ("file://server/a.mp4", "https://localhost/a.mp4", "s3://b/a.mp4", "data:video/mp4;base64,AA"):
        with pytest.raises(ValueError, match="addresses are not read: download first"):
            part_of(other)
    with pytest.raises(ValueError, match="a still image"):
        part_of("file:///a.png")


# ------------------------------------------------------------------------------------------------------- 4. readers


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, timed):
    """All kinds of files of these tests and of test_data.py."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, options in HARD_FILES.items():
        options = {"width": 64, "height": 48, "num_frames": 30, **options}
        write_gif(folder / name) if name.endswith("gif") else write_clip(folder / name, **options)
    for number, (upright, a, b) in enumerate(MATRICES):
        path = folder / f"turned-{number}.mp4"
        write_clip(path, 64, 80, 9)
        data = bytearray(path.read_bytes())
        at = data.index(b"tkhd") + 44
        matrix = (a << 16, 0, 0, b << 16) if upright else (0, a << 16, b << 16, 0)
        data[at : at + 36] = struct.pack(">9i", *matrix[:2], 0, *matrix[2:], 0, 0, 0, 1 << 30)
        path.write_bytes(data)
    write_clip(folder / "whole.mp4", 64, 48, 50, b_frames=3, preset="medium")
    remux(folder / "whole.mp4", folder / "cut.mp4", cut_seconds=Fraction(7, 25))
    with av.open(str(folder / "ten-bits.mp4"), "w") as container:
        stream = container.add_stream("libx265", rate=25, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        for i in range(20):
            image = np.full((48, 64, 3), 90 + i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return [*sorted(folder.iterdir()), *timed.values(), *REAL_CLIPS]


READ_BY_DECORD = {"closed-b-frames.mp4", "no-b-pyramid.mp4", "x265-default.mp4", "av1.mp4", "vp8.webm", "vp9.webm",
                  "whole.mp4", "bikes.mp4", "dropped-0.mp4", "bursts-2.mkv", "turned-0.mp4"}  # fmt: skip
LEFT_TO_PYAV = {"open-gop.mp4", "open-gop.mkv", "interlaced.mp4", "intra-refresh.mp4", "cut.mp4", "ten-bits.mp4",
                "transport.ts", "mpeg4.mp4", "h264.avi", "palette.gif", "narrow-16.mp4", "turned-1.mp4"}  # fmt: skip


def test_decord_gives_the_same_frames(corpus):
    """Every frame of every file, each alone, some and all together; and times are ours whichever reads it."""
    read = {}
    for path in corpus:
        every, info = None, mv.video_info(str(path))
        n = info.num_frames
        for indices in (
            range(n),
            [0],
            [n - 1],
            [n // 2, n // 2],
            np.linspace(0, n - 1, 7).round().astype(int).tolist(),
        ):
            frames, found = mv.read_video(str(path), lambda *_, taken=[*indices]: taken, "decord")
            every = frames if every is None else every
            assert torch.equal(frames, mv.read_video(str(path), lambda *_, taken=[*indices]: taken)[0]), path
            assert (found.num_frames, found.fps, found.times) == (n, info.fps, info.times)
        read.setdefault(found.reader, set()).add(path.name)
    assert read["decord"] >= READ_BY_DECORD and read["pyav"] >= LEFT_TO_PYAV, read


def test_decord_in_a_run(corpus, tiny_model, tmp_path, monkeypatch, capsys):
    """In workers and through the cache: the same samples; what PyAV read is counted once, and its frames shared."""
    by_name = {path.name: str(path) for path in corpus}
    videos = [by_name[name] for name in ("bikes.mp4", "cut.mp4", "whole.mp4", "interlaced.mp4")]
    record = mv.normalize_conversation({"id": "r", "video": videos, "messages": TALK}, "x")
    sizes = {"nframes": 4, "video_resized_width": 56, "video_resized_height": 56, "dataloader_num_workers": 1}
    samples, told = {}, {}
    (tmp_path / "cache").mkdir()
    for reader in ("pyav", "decord", "decord again"):
        args = mv.TrainingArguments(model_id=tiny_model, output_dir=str(tmp_path), video_reader=reader.split()[0],
                                    video_cache=str(tmp_path / "cache"), **sizes)  # fmt: skip
        stream = mv.SampleStream(mv.Encoder(tiny_model, args), args)
        ((samples[reader],),) = stream.batches([record], [[0]], "")
        stream.close()
        told[reader] = capsys.readouterr().err
    for sample in samples.values():
        assert np.array_equal(sample["patches"], samples["pyav"]["patches"])
    assert "--video_reader" not in told["pyav"]
    assert all("decord: 2 videos were read by PyAV" in told[reader] for reader in ("decord", "decord again"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4 + 2 and len(list(tmp_path.rglob("*.json"))) == 8


def test_decord_needs_its_package(monkeypatch, capsys, tmp_path):
    """One sentence at the start; another project's name of the flag is answered with ours."""
    flags = ["--data_path", str(tmp_path / "x.json"), "--video_reader", "decord"]
    (tmp_path / "x.json").write_text("[]")
    for version in (None, "0.6.0", "3.3.9"):

        def installed(name, version=version):
            if version is None:
                raise mv.importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(mv.importlib.metadata, "version", installed)
        with pytest.raises(SystemExit):
            mv.parse_arguments(mv.TrainingArguments, flags)
        assert "--video_reader decord needs the package decord2: pip uninstall decord, pip" in capsys.readouterr().err
    monkeypatch.setattr(mv.importlib.metadata, "version", lambda _: "3.4.0")
    assert mv.parse_arguments(mv.TrainingArguments, flags).video_reader == "decord"
    with pytest.raises(SystemExit):
        mv.parse_arguments(mv.TrainingArguments, [*flags[:2], "--video_decoder", "decord"])
    assert "did you mean --video_reader?" in capsys.readouterr().err
