"""Files, decoders, processes and disks that fail, through the whole loader: named, counted, and the run goes on."""

import ctypes
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import multivideo as mv

import av
import numpy as np
import pytest
import torch
from test_data import every_third, in_order, write_clip
from test_train import in_process, launch, metrics

SIZES = {"nframes": 4, "video_resized_width": 56, "video_resized_height": 56}
GOOD = [f"good-{i}.mp4" for i in range(12)]

# A PyAV that misbehaves on files of certain names, put before the real one on the path of the workers.
FAKE_AV = """
import ctypes, os, signal, sys, time
here = os.path.dirname(os.path.abspath(__file__))
sys.path = [path for path in sys.path if os.path.abspath(path or ".") != here]
del sys.modules["av"]
import av
really_open = av.open
def misbehave(path, **options):
    with open(os.path.join(here, "opened"), "a") as file:
        file.write(os.path.basename(path) + "\\n")
    if "sleeps" in path: time.sleep(10**6)
    if "kills" in path: os.kill(os.getpid(), signal.SIGKILL)
    if "segfaults" in path: ctypes.string_at(0)
    if "exits" in path: os._exit(3)
    if "raises" in path: raise KeyError("of all things")
    return really_open(path, **options)
av.open = misbehave
sys.modules["av"] = av
"""
INJECTED = {  # file: what is told of it
    "sleeps.mp4": "took longer than 1.5 s to decode: if it is a long film, raise --decode_timeout",
    "kills.mp4": "its decoding process was killed (out of memory?)",
    "segfaults.mp4": "crashed its decoding process (segmentation fault)",
    "exits.mp4": "ended its decoding process (exit code 3)",
    "raises.mp4": "KeyError: 'of all things'",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve good clips, and five on which the injected decoder fails."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(GOOD):
        write_clip(folder / name, 64, 48, 20 + i, seed=i)
    for name in INJECTED:
        shutil.copy(folder / GOOD[0], folder / name)
    return folder


@pytest.fixture
def injected(clips, tmp_path, monkeypatch):
    """The misbehaving PyAV is the one that workers import; gives the file with the names that it opened."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "av.py").write_text(FAKE_AV)
    monkeypatch.syspath_prepend(fake)
    return fake / "opened"


def record(name, videos):
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Blocks."}]
    return mv.normalize_conversation({"id": name, "video": [str(video) for video in videos], "messages": turns}, "x")


def arguments(model, output_dir, **flags):
    options = {**SIZES, "dataloader_num_workers": 2, "decode_timeout": 1.5, **flags}
    return mv.TrainingArguments(model_id=str(model), output_dir=str(output_dir), **options)


def stream_of(args):
    Path(args.output_dir).mkdir(exist_ok=True)
    return mv.SampleStream(mv.Encoder(args.model_id, args), args)


def told(output_dir):
    """{file name: (reason, records)} of bad_videos.jsonl, each pair told once."""
    rows = [json.loads(line) for line in Path(output_dir, "bad_videos.jsonl").read_text().splitlines()]
    assert len({(row["file"], row["record"]) for row in rows}) == len(rows)
    assert all(os.path.isabs(row["file"]) for row in rows)
    return {name: ({row["reason"] for row in rows if row["file"].endswith(f"/{name}")}.pop(),
                   sorted(row["record"] for row in rows if row["file"].endswith(f"/{name}")))
            for name in {os.path.basename(row["file"]) for row in rows}}  # fmt: skip


def same(ours, theirs):
    names = ("input_ids", "labels", "position_ids", "patches", "video_grid_thw")
    return all(np.array_equal(ours[name], theirs[name]) for name in names)


# --------------------------------------------------------------------------------------------- 1. formats and damage


def turn_header(path, degrees):
    """Write a rotation into an MP4's display matrix (nine numbers of its track header)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: flags, times, track, duration, layer and volume come before it
    one = 1 << 16
    cos, sin = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    data[at : at + 36] = struct.pack(">9i", cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_vfr(path):
    """Frames at uneven times: 40, 120 and 33 ms apart in turn."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        when = 0
        for i in range(45):
            image = rng.integers(90, 166, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 1000)
            when += (40, 120, 33)[i % 3]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_honoured(tmp_path, degrees):
    """Frames as they are shown: the stored ones, turned clockwise by as much as the header says."""
    path = tmp_path / "turned.mp4"
    write_clip(path, 64, 80, 20)
    stored = in_order(path)
    turn_header(path, degrees)
    frames, info = mv.read_video(str(path), every_third)
    expected = torch.rot90(stored, -degrees // 90, (1, 2))[every_third(20, 0)]
    assert (info.height, info.width) == tuple(expected.shape[1:3])
    assert torch.equal(frames.permute(0, 2, 3, 1), expected)


def test_uneven_times(tmp_path):
    write_vfr(tmp_path / "vfr.mp4")
    every = in_order(tmp_path / "vfr.mp4")
    frames, info = mv.read_video(str(tmp_path / "vfr.mp4"), every_third)
    assert info.num_frames == len(every) == 45 and info.fps == pytest.approx(45 / (15 * 0.193), rel=0.03)
    assert torch.equal(frames.permute(0, 2, 3, 1), every[every_third(45, 0)])


def patch_durations(path, factor):
    """Let every header of an MP4 that has a duration tell another one."""
    data = bytearray(path.read_bytes())
    for name, offset in ((b"mvhd", 16), (b"tkhd", 20), (b"mdhd", 16)):
        at = data.index(name) + 4 + offset
        (ticks,) = struct.unpack_from(">I", data, at)
        struct.pack_into(">I", data, at, int(ticks * factor))
    path.write_bytes(data)


DAMAGE = {  # name of the file: how it is made from a good clip of 21 frames, and the frames that it gives or None
    "odd sizes.mp4": (lambda path, good: write_clip(path, 51, 37, 21), 4),
    "one frame.mp4": (lambda path, good: write_clip(path, 64, 48, 1), 1),
    "doubled duration.mp4": (lambda path, good: (shutil.copy(good, path), patch_durations(path, 2)), 4),
    "no duration.mp4": (lambda path, good: (shutil.copy(good, path), patch_durations(path, 0)), 4),
    "видео 一 é🎬.mp4": (lambda path, good: shutil.copy(good, path), 4),
    "quote\"s and 'more' %d #?.mp4": (lambda path, good: shutil.copy(good, path), 4),
    "x" * 251 + ".mp4": (lambda path, good: shutil.copy(good, path), 4),
    "linked.mp4": (lambda path, good: path.symlink_to(good), 4),
    "clip.avi": (lambda path, good: write_clip(path, 64, 48, 21, codec="mpeg4"), 4),
    "clip.mkv": (lambda path, good: write_clip(path, 64, 48, 21), 4),
    "clip.webm": (lambda path, good: write_clip(path, 64, 48, 21, codec="libvpx", cpu_used="8"), 4),
    "clip.mov": (lambda path, good: write_clip(path, 64, 48, 21), 4),
    "no moov.mp4": (lambda path, good: path.write_bytes(good.read_bytes().replace(b"moov", b"lost")), None),
    "playlist.mp4": (lambda path, good: path.write_text(f"#EXTM3U\n#EXTINF:1,\n{good}\n"), None),
    "concat.mp4": (lambda path, good: path.write_text(f"ffconcat version 1.0\nfile {good.name}\n"), None),
    "nul\0byte.mp4": (lambda path, good: None, None),
    "too long " + "y" * 5000: (lambda path, good: None, None),
    "loop.mp4": (lambda path, good: path.symlink_to(path), None),
}  # fmt: skip


def test_each_damage_has_its_outcome(clips, tiny_model, tmp_path, capsys):
    """One sample with all of them: what can be read is there, what cannot is named and left out with its tag."""
    folder = tmp_path / "in a folder – 動画"
    folder.mkdir()
    shutil.copy(clips / GOOD[1], folder / "good.mp4")
    for name, (make, _) in DAMAGE.items():
        make(folder / name, folder / "good.mp4")
    args = arguments(tiny_model, tmp_path / "out", on_bad_video="drop_video", dataloader_num_workers=0)
    stream = stream_of(args)
    ((sample,),) = stream.batches([record("all", DAMAGE)], [[0]], str(folder))
    expected = [frames for _, frames in DAMAGE.values() if frames]
    assert [t for t, _, _ in sample["video_grid_thw"].tolist()] == [-(-frames // 2) for frames in expected]
    assert sample["num_videos"] == len(expected)
    bad = {os.path.basename(file): reason for file, reason in sample["bad"]}
    assert list(bad) == [name for name, (_, frames) in DAMAGE.items() if not frames]
    assert "null byte" in bad["nul\0byte.mp4"] and "too long" in bad["too long " + "y" * 5000]
    assert "symbolic links" in bad["loop.mp4"]
    assert set(told(tmp_path / "out")) == set(bad)
    assert "no moov" in capsys.readouterr().err
    with pytest.raises(ValueError, match="addresses are not read: download first"):
        record("r", ["https://example.com/a.mp4"])


def test_bit_flips(clips, tiny_model, tmp_path):
    """200 seeded mutations through workers and cache: no crash, no hang, every sample there, and hardly a repeat.

    The frames of the clip all differ. Where a mutation is decoded all the same, two sampled frames that are equal are
    a repeat: the count below is for damage that the decoder conceals and does not report.
    """
    rng, good = random.Random(4), (clips / GOOD[11]).read_bytes()
    for i in range(200):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / f"{i}.mp4").write_bytes(data[: rng.randrange(len(data))] if i % 10 == 9 else data)
    args = arguments(
        tiny_model, tmp_path / "out", on_bad_video="drop_video", decode_timeout=10, nframes=6,
        video_cache=str(tmp_path / "cache"), video_cache_limit_gb=1,
    )  # fmt: skip
    (tmp_path / "cache").mkdir()
    records = [record(str(r), [f"{i}.mp4" for i in range(8 * r, 8 * r + 8)]) for r in range(25)]
    stream = stream_of(args)
    samples = [
        sample for batch in stream.batches(records, ([i] for i in range(25)), str(tmp_path)) for sample in batch
    ]
    again = [sample for batch in stream.batches(records, ([i] for i in range(25)), str(tmp_path)) for sample in batch]
    stream.close()
    assert [sample["id"] for sample in samples] == [str(r) for r in range(25)]
    assert all(sample["num_videos"] + len(sample["bad"]) == 8 for sample in samples)
    assert all(same(*pair) for pair in zip(samples, again) if "input_ids" in pair[0])
    kept = sum(sample["num_videos"] for sample in samples)
    reasons = [reason for reason, _ in told(tmp_path / "out").values()]
    assert 50 <= kept <= 110 and len(reasons) == 200 - kept
    assert sum("is damaged" in reason for reason in reasons) >= 30  # FFmpeg reports them and goes on
    cache, repeats = mv.VideoCache(args.video_cache), 0
    for i in range(200):
        identity = cache.identity(str(tmp_path / f"{i}.mp4"))
        if info := cache.info(identity):
            indices, _ = mv.sample_frames(mv._media_part("video", "x"), info.num_frames, info.fps, args)
            frames = cache.frames(identity, indices, 56, 56)
            repeats += any(torch.equal(a, b) for a, b in itertools.pairwise(frames))
    print(f"{kept} of 200 mutations decoded, {repeats} with a repeated frame")
    assert repeats <= 2


# ------------------------------------------------------------------------------------------ 2. decoders that misbehave


@pytest.mark.timeout(120)
@pytest.mark.parametrize("policy", ["drop_video", "drop_sample"])
def test_injected_faults(clips, injected, tiny_model, tmp_path, policy):
    """Files that hang, kill, crash, exit or raise cost themselves (or their sample); all else is as without them."""
    args = arguments(tiny_model, tmp_path / "out", on_bad_video=policy)
    bad_at = {2: "sleeps.mp4", 4: "kills.mp4", 5: "segfaults.mp4", 7: "exits.mp4", 8: "raises.mp4", 9: "sleeps.mp4"}
    records = [record(f"r{i}", [GOOD[i], *([bad_at[i]] if i in bad_at else []), GOOD[i + 1]]) for i in range(11)]
    clean = mv.Encoder(args.model_id, args)
    expected = [clean(record(f"r{i}", [GOOD[i], GOOD[i + 1]]), str(clips)) for i in range(11)]
    stream, started = stream_of(args), time.monotonic()
    threads = threading.active_count()
    for attempt in range(2):  # the second as a resumed run: the same decisions, nothing tried again
        batches = list(stream.batches(records, [list(range(5)), [], list(range(5, 11))], os.path.relpath(clips)))
        assert [len(batch) for batch in batches] == [5, 0, 6]
        samples = [sample for batch in batches for sample in batch]
        assert [sample["id"] for sample in samples] == [f"r{i}" for i in range(11)]
        for i, sample in enumerate(samples):
            assert [(os.path.basename(file), reason) for file, reason in sample["bad"]] == (
                [(bad_at[i], INJECTED[bad_at[i]])] if i in bad_at else [])  # fmt: skip
            if policy == "drop_sample" and i in bad_at:
                assert "input_ids" not in sample
            else:
                assert same(sample, expected[i]) and sample["num_videos"] == 2
        found = {name: (INJECTED[name], sorted(f"r{i}" for i in bad_at if bad_at[i] == name)) for name in INJECTED}
        assert told(tmp_path / "out") == found
        opened = Counter(injected.read_text().split()) if injected.exists() else Counter()
        assert threading.active_count() == threads and len(stream.processes) == 2
        stream.close()
        if attempt == 0:
            # once each; after a first kill once more; the other record with the sleeping file may run beside it
            assert opened["segfaults.mp4"] == opened["exits.mp4"] == opened["raises.mp4"] == 1
            assert opened["kills.mp4"] == 2 and opened["sleeps.mp4"] in (1, 2)
            assert time.monotonic() - started < 60
            injected.unlink()
            stream = stream_of(args)
        else:
            assert not set(INJECTED) & set(opened)
    assert not list(Path(stream.watch_folder.name).parent.glob(Path(stream.watch_folder.name).name))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["sleeps.mp4", "kills.mp4"])
def test_error_policy_names_file_and_record(clips, injected, tiny_model, tmp_path, name):
    args = arguments(tiny_model, tmp_path / "out")
    records = [record("fine", GOOD[:2]), record("r1", [GOOD[0], name]), record("later", GOOD[:3])]
    for _ in range(2):  # and a second run tries it again: it may have been mended
        stream = stream_of(args)
        batches = stream.batches(records, [[0], [1], [2]], str(clips))
        assert next(batches)[0]["id"] == "fine"
        with pytest.raises(mv.BadVideo) as caught:
            next(batches)
        assert str(caught.value).startswith(f"record r1: {clips / name}: {INJECTED[name]}. Mend the file")
        stream.close()
    assert told(tmp_path / "out") == {name: (INJECTED[name], ["r1"])}


def _dies_while_sending(pipe, args, room, watch_folder):
    """A worker that is killed in the middle of its first answer."""
    marker = Path(watch_folder) / "died"
    if marker.exists():
        return mv._worker(pipe, args, room, watch_folder)
    marker.touch()
    pipe.recv()
    os.write(pipe.fileno(), struct.pack("!i", 10**6) + b"half a message")
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_at_once(pipe, args, room, watch_folder):
    os._exit(9)


@pytest.mark.timeout(120)
def test_workers_that_die_of_nothing(clips, tiny_model, tmp_path, monkeypatch):
    """Killed while idle, in the middle of a message, by signals meant for the trainer: no file is blamed for it."""
    args = arguments(tiny_model, tmp_path / "out", on_bad_video="drop_video")
    records = [record(f"r{i}", GOOD[i : i + 2]) for i in range(8)]
    stream = stream_of(args)
    with monkeypatch.context() as patched:
        patched.setattr(mv, "_worker", _dies_while_sending)
        first = list(stream.batches(records, [[i] for i in range(8)], str(clips)))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before = set(stream.processes)
        for pid in before:
            os.kill(pid, number)
        time.sleep(0.2)
        again = list(stream.batches(records, [[i] for i in range(8)], str(clips)))
        assert all(same(a[0], b[0]) and not b[0]["bad"] for a, b in zip(first, again, strict=True))
        assert (set(stream.processes) == before) is (number != signal.SIGKILL)
    stream.close()
    assert not (tmp_path / "out" / "bad_videos.jsonl").exists()
    monkeypatch.setattr(mv, "_worker", _dies_at_once)  # for ever: said, not tried for ever
    stream = stream_of(args)
    with pytest.raises(mv.InputError, match=r"record r0: .* ends again and again .*exit code 9.* none of its files"):
        next(stream.batches(records, [[0]], str(clips)))
    stream.close()


@pytest.mark.timeout(120)
def test_a_frame_list_names_its_bad_image(clips, tiny_model, tmp_path):
    """The image that is at fault is named, not the first of its list."""
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (60, 60), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    options = {"on_bad_video": "drop_video", "dataloader_num_workers": 0, "decode_timeout": 100}
    args = arguments(tiny_model, tmp_path / "out", **options)
    row = record("r", [GOOD[0]])
    part = mv._media_part("video", [str(tmp_path / f"{i}.png") for i in range(4)])
    row["messages"][0]["content"].append(part)
    ((sample,),) = stream_of(args).batches([row], [[0]], str(clips))
    assert sample["num_videos"] == 1 and sample["bad"][0][0] == str(tmp_path / "2.png")
    seen = []
    encoder = mv.Encoder(args.model_id, args, watch=os.open(tmp_path / "watch", os.O_CREAT | os.O_RDWR))
    read_image = mv.read_image

    def spy(path):
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        seen.append((path, os.pread(encoder.watch, 4096, 0).split(b"\0")[0].decode()))
        return read_image(path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mv, "read_image", spy)
        encoder(row, str(clips))
    assert len(seen) == 3 and all(path == watched for path, watched in seen)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and os.pread(encoder.watch, 1, 0) == b"\0"


def test_torn_lists_of_bad_files(clips, tiny_model, tmp_path):
    """bad_videos.jsonl as several killed processes may leave it; a file that has changed since is tried again."""
    args = arguments(tiny_model, tmp_path, on_bad_video="drop_video", dataloader_num_workers=0)
    state = mv._file_state(clips / GOOD[1])
    lines = [{"file": str(clips / GOOD[1]), "reason": "old", "record": "r", "action": "drop_video", "state": state},
             {"file": str(clips / GOOD[2]), "reason": "gone", "record": "r", "action": "drop_video", "state": [1, 2]},
             {"file": str(clips / "never.mp4"), "reason": "gone", "record": "r", "state": None}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "bad_videos.jsonl").write_bytes(text.encode() + b'3\n[]\n{"file": "x"}\n{"fi\xff')
    stream = stream_of(args)
    ((sample,),) = stream.batches([record("r", [*GOOD[:3], "never.mp4"])], [[0]], str(clips))
    assert {os.path.basename(file): reason for file, reason in sample["bad"]} == {GOOD[1]: "old", "never.mp4": "gone"}
    assert sample["num_videos"] == 2


# --------------------------------------------------------------------------------------------------- 3. whole runs


@pytest.fixture(scope="module")
def run_flags(clips, tiny_model, tmp_path_factory):
    """Flags of a run over 10 records of 3 clips, three of them with a file that hangs, crashes or is missing."""
    folder = tmp_path_factory.mktemp("run")
    bad_at = {1: "sleeps.mp4", 4: "segfaults.mp4", 8: "missing.mp4"}
    records = []
    for i in range(10):
        videos = [GOOD[i], bad_at.get(i, GOOD[i + 1]), GOOD[i + 2]]
        turns = [{"from": "human", "value": f"What is number {i}?"}, {"from": "gpt", "value": "A clip" + "!" * i}]
        records.append({"id": f"r{i}", "video": videos, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return [
        "--model_id", tiny_model, "--data_path", folder / "data.json", "--image_folder", clips, "--nframes", 4,
        "--video_resized_width", 56, "--video_resized_height", 56, "--max_steps", 5, "--learning_rate", 1e-3,
        "--per_device_train_batch_size", 1, "--decode_timeout", 1.5, "--save_steps", 2,
    ]  # fmt: skip


def run_with_workers(monkeypatch, *flags):
    """train_sft.main() in this process, decoding in two others."""
    import train_sft

    main = train_sft.main

    def with_workers():
        sys.argv += ["--dataloader_num_workers", "2"]
        main()

    with monkeypatch.context() as patched:
        patched.setattr(train_sft, "main", with_workers)
        in_process(patched, *flags)


@pytest.mark.parametrize("flag", ["data_path", "eval_path"])
def test_files_are_looked_at_before_weights_are_loaded(clips, tiny_model, tmp_path, monkeypatch, capsys, flag):
    """Missing files, what is none, and spans beyond a video's known length: at once, by each policy."""

    def records(name, *lists):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Blocks."}]
        rows = [{"id": f"r{i}", "video": videos, "conversations": turns} for i, videos in enumerate(lists)]
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path / name

    good = records("good.json", *([[name] for name in GOOD[:6]]))
    flags = ["--model_id", tiny_model, "--image_folder", clips, "--video_cache", tmp_path / "cache", "--nframes", 4,
             "--video_resized_width", 56, "--video_resized_height", 56, "--max_steps", 1]  # fmt: skip
    in_process(monkeypatch, *flags, "--data_path", good, "--output_dir", tmp_path / "fills_the_cache")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    late = {"video": GOOD[0], "start": 100}  # of some 2.5 seconds
    lists = [GOOD[:2], [GOOD[0], "gone.mp4"], [late, GOOD[3]], ["gone.mp4", tmp_path / "folder.mp4"],
             [tmp_path / "pipe.mp4"], [{"video": GOOD[1], "start": 0.5, "end": 1.5}]]  # fmt: skip
    lists = [[str(item) if isinstance(item, Path) else item for item in videos] for videos in lists]
    bad = records("bad.json", *lists)
    sources = ["--data_path", bad] if flag == "data_path" else ["--data_path", good, "--eval_path", bad]

    def refuse(*args, **kwargs):
        raise AssertionError("weights are loaded")

    with monkeypatch.context() as patch:
        patch.setattr(mv, "load_model", refuse)
        with pytest.raises(mv.InputError) as caught:
            in_process(patch, *flags, *sources, "--output_dir", tmp_path / "error")
        said = str(caught.value)
        assert said.startswith(f"--{flag}: 4 of 6 files cannot be used (5 of 10 places)\n  • record r1: ")
        assert f"gone.mp4: No such file or directory; paths start from --image_folder {clips}" in said
        assert said.count("not a regular file") == 2 and "record r2: " in said and said.count("\n  • ") == 4
        assert "'start' 100.0 and 'end' None s leave no two frames" in said and "--on_bad_video drop_video" in said
        drop = ["--on_bad_video", "drop_video", "--output_dir", tmp_path / "drop"]
        with pytest.raises(mv.InputError, match="These are more than --max_bad_ratio 0.001 allows"):
            in_process(patch, *flags, *sources, *drop, "--max_bad_ratio", 0.001)
        with pytest.raises(AssertionError, match="weights are loaded"):
            in_process(patch, *flags, *sources, *drop)
        assert "4 of 6 files cannot be used" in capsys.readouterr().err


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", ["drop_video", "drop_sample"])
def test_runs_finish_without_the_bad_files(run_flags, injected, tmp_path, monkeypatch, policy):
    """Every step is taken with the right number of samples and videos; resumed with or without the list, the same."""
    flags = [*run_flags, "--on_bad_video", policy, "--gradient_accumulation_steps", 4]
    run_with_workers(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    rows = metrics(tmp_path / "out")
    epochs = [rows[:3], rows[3:]]  # steps of 4, 4 and 2 samples
    kept = 10 if policy == "drop_video" else 7
    assert sum(row["samples"] for row in epochs[0]) == kept and sum(row["bad_videos"] for row in epochs[0]) == 3
    assert sum(row["videos"] for row in epochs[0]) == (27 if policy == "drop_video" else 21)
    assert sum(row["skipped_samples"] for row in epochs[0]) == 10 - kept
    found = told(tmp_path / "out")
    assert {name: records for name, (_, records) in found.items()} == {
        "sleeps.mp4": ["r1"], "segfaults.mp4": ["r4"], "missing.mp4": ["r8"]}  # fmt: skip
    for with_list in (True, False):
        again = tmp_path / f"again-{with_list}"
        shutil.copytree(tmp_path / "out" / "checkpoint-2", again / "checkpoint-2")
        shutil.copy(tmp_path / "out" / "metrics.jsonl", again)
        if with_list:
            shutil.copy(tmp_path / "out" / "bad_videos.jsonl", again)
        injected.unlink(missing_ok=True)
        run_with_workers(monkeypatch, *flags, "--output_dir", again, "--resume_from_checkpoint", "auto")
        assert metrics(again) == rows
        opened = injected.read_text().split() if injected.exists() else []
        assert ("sleeps.mp4" in opened) is (not with_list)


@pytest.mark.timeout(300)
def test_two_processes_take_the_same_decisions(run_flags, injected, tmp_path, monkeypatch):
    """Two processes, each with a worker: the numbers of one; both add their own files to one list."""
    flags = [*run_flags, "--on_bad_video", "drop_sample"]
    run_with_workers(monkeypatch, *flags, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "one")
    monkeypatch.setenv("PYTHONPATH", str(injected.parent))
    launch(
        Path(sys.executable).parent / "accelerate", "launch", "--config_file", "accelerate_configs/ddp.yaml",
        "--num_processes", 2, "train_sft.py", *flags, "--gradient_accumulation_steps", 2, "--output_dir",
        tmp_path / "two", "--dataloader_num_workers", 1,
    )  # fmt: skip
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        learned = theirs["samples"] > 0  # in one of the steps every sample is dropped
        assert ours["loss"] == (pytest.approx(theirs["loss"], rel=1e-4) if learned else None)
        for key in ("step", "samples", "skipped_samples", "bad_videos", "videos", "tokens", "records_crc32"):
            assert ours[key] == theirs[key], key
    assert told(tmp_path / "two") == told(tmp_path / "one")


def test_too_many_bad_videos_end_the_run(run_flags, tmp_path, monkeypatch):
    """Over --max_bad_ratio (of 1,000 videos at least) all stop with the first files and what to do."""
    data = json.loads(Path(run_flags[3]).read_text())
    for i, row in enumerate(data):
        (tmp_path / f"broken-{i}.mp4").write_bytes(b"no video")
        row["video"][1] = str(tmp_path / f"broken-{i}.mp4")
    (tmp_path / "data.json").write_text(json.dumps(data))
    flags = [*run_flags, "--data_path", tmp_path / "data.json", "--on_bad_video", "drop_video", "--output_dir"]
    with pytest.raises(mv.InputError) as caught:
        in_process(monkeypatch, *flags, tmp_path / "out", "--max_bad_ratio", 0.003, "--max_steps", 20)
    message = str(caught.value)
    assert message.startswith("4 of 12 videos and images so far could not be read: more than --max_bad_ratio 0.003")
    assert message.count("broken-") >= 4 and "cannot be decoded" in message and str(tmp_path / "out") in message
    assert [row["bad_videos"] for row in metrics(tmp_path / "out")] == [1, 1, 1]
    in_process(monkeypatch, *flags, tmp_path / "more", "--max_bad_ratio", 0.02, "--max_steps", 20)
    assert len(metrics(tmp_path / "more")) == 20


# -------------------------------------------------------------------------------------------------------- 4. the cache


def cached(tmp_path, model, limit=1.0):
    """An encoder with a fresh cache that may grow."""
    args = arguments(model, tmp_path / "out", video_cache=str(tmp_path / "cache"), dataloader_num_workers=0)
    Path(args.video_cache).mkdir(exist_ok=True)
    encoder = mv.Encoder(args.model_id, args)
    args.video_cache_limit_gb = limit
    return encoder, mv.SampleStream(encoder, args)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def no_decoding(*_):
    raise AssertionError("decoded again")


def test_damaged_cache_files_are_made_again(clips, tiny_model, tmp_path, monkeypatch):
    """Bit flips anywhere, cuts, emptiness, garbage, folders in its place: the same sample, and the file made again."""
    encoder, _ = cached(tmp_path, tiny_model)
    row = record("r", [GOOD[0]])
    first = encoder(row, str(clips))
    whole = contents(tmp_path / "cache")
    frames, index = sorted((tmp_path / "cache").rglob("*.*"), key=lambda path: -path.stat().st_size)
    with monkeypatch.context() as patched:
        patched.setattr(mv, "read_video", no_decoding)
        assert same(encoder(row, str(clips)), first)
        with pytest.raises(mv.BadVideo, match="decoded again"):
            encoder(record("r", [{"video": GOOD[0], "nframes": 6}["video"], GOOD[1]]), str(clips))
    rng, read_video, decoded = random.Random(0), mv.read_video, []
    monkeypatch.setattr(mv, "read_video", lambda *args: (decoded.append(1), read_video(*args))[1])
    for path in (frames, index):
        data, trials = path.read_bytes(), []
        for _ in range(60):
            flipped = bytearray(data)
            flipped[rng.randrange(min(len(data), 400) if rng.random() < 0.6 else len(data))] ^= 1 << rng.randrange(8)
            trials.append(bytes(flipped))
        trials += [
            b"",
            data[:-1],
            data + b"x",
            data[:7],
            bytes(len(data)),
            b"\xff" * 50,
            data[: len(data) // 2],
            b"{}\n",
        ]
        trials += [data.replace(b"25.0", b"15.0"), data.replace(b"[4,3,56,56]", b"[3,4,56,56]")]  # another fps, shape
        for content in trials:
            decoded.clear()
            path.write_bytes(content)
            assert same(encoder(row, str(clips)), first)
            if decoded:  # a flip in the header's padding or name of a tensor may leave all as it was
                assert contents(tmp_path / "cache") == whole
            path.write_bytes(data)
    for path in (frames, index):
        path.unlink()
        path.mkdir()
        assert same(encoder(row, str(clips)), first)
        path.rmdir()
        encoder.cache.room.value = 1e9


def test_changed_files_are_other_files(clips, tiny_model, tmp_path, monkeypatch):
    """Other content, another time or file behind a link, a file replaced while it is decoded: never the old frames."""
    encoder, _ = cached(tmp_path, tiny_model)
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        shutil.copy(clips / GOOD[i], folder / "clip.mp4")
    samples = [encoder(record("r", ["clip.mp4"]), str(folder)) for folder in folders]
    assert not np.array_equal(samples[0]["patches"], samples[1]["patches"])
    link = tmp_path / "link"
    for i in (0, 1, 0):
        link.unlink(missing_ok=True)
        link.symlink_to(folders[i])
        os.utime(folders[i] / "clip.mp4", ns=(0, 10**18 + i))
        assert same(encoder(record("r", ["clip.mp4"]), str(link)), samples[i])
    # replaced while it is decoded: what was read is not kept under the name of what is there now, nor of the old one
    path, read_video = folders[0] / "clip.mp4", mv.read_video
    os.utime(path, ns=(5, 5))
    before = contents(tmp_path / "cache")

    def replaced(*args):
        shutil.copy(clips / GOOD[2], path)
        return read_video(*args)

    with monkeypatch.context() as patched:
        patched.setattr(mv, "read_video", replaced)
        encoder(record("r", ["clip.mp4"]), str(folders[0]))
    assert contents(tmp_path / "cache") == before
    # other content of the same size, one nanosecond later
    both = [(clips / name).read_bytes() for name in GOOD[:2]]
    size = max(map(len, both)) + 8
    for i, data in enumerate(both):
        path.write_bytes(data + struct.pack(">I4s", size - len(data), b"free").ljust(size - len(data), b"\0"))
        os.utime(path, ns=(7, 7 + i))
        assert path.stat().st_size == size and same(encoder(record("r", ["clip.mp4"]), str(folders[0])), samples[i])
    # the same file by another path is the same file
    shutil.copy(path, tmp_path / "one.mp4")
    encoder(record("r", [str(tmp_path / "one.mp4")]), "")
    monkeypatch.setattr(mv, "read_video", no_decoding)
    monkeypatch.chdir(tmp_path)
    os.symlink("one.mp4", "other.mp4")
    for name in ("one.mp4", "./a/../one.mp4", "other.mp4"):
        encoder(record("r", [str(name) if ".." not in name else os.path.abspath(name)]), "")


def test_full_caches_and_disks_stop_caching_only(clips, tiny_model, tmp_path, monkeypatch, capsys):
    records = [record(f"r{i}", GOOD[i : i + 3]) for i in range(8)]
    plain = mv.Encoder(tiny_model, arguments(tiny_model, tmp_path / "out"))
    expected = [plain(row, str(clips)) for row in records]
    # the limit: three clips' worth
    encoder, stream = cached(tmp_path, tiny_model, limit=3.9 * (4 * 3 * 56 * 56 + 500) / 1e9)
    assert all(same(encoder(row, str(clips)), sample) for row, sample in zip(records, expected))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert size <= stream.args.video_cache_limit_gb * 1e9 * 1.01
    shutil.rmtree(tmp_path / "cache")
    # the disk: a real error of the system, at the first, a later and no write
    for limit in (100, 37000, 10**6):
        encoder, _ = cached(tmp_path, tiny_model)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            samples = [encoder(row, str(clips)) for row in records]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert all(map(same, samples, expected))
        said = capsys.readouterr().err
        assert said.count("the video cache takes nothing more: ") == (limit < 10**6)
        assert (encoder.cache.room.value == 0) is (limit < 10**6)
        assert not list((tmp_path / "cache").rglob("*.aside"))
    # no room left on the device for the new name
    encoder, _ = cached(tmp_path / "..", tiny_model)
    shutil.rmtree(tmp_path / "cache")
    encoder, _ = cached(tmp_path, tiny_model)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(mv.os, "rename", lambda *_: (_ for _ in ()).throw(full))
    assert all(same(encoder(row, str(clips)), sample) for row, sample in zip(records, expected))
    assert not contents(tmp_path / "cache") and "No space left on device" in capsys.readouterr().err


def test_room(tmp_path, monkeypatch):
    """The limit counts what is there; leftovers of killed processes go; a fifth of the disk is the most."""
    assert mv.VideoCache.free_room(str(tmp_path), 1e-5) == pytest.approx(10000)
    place = Path(mv.VideoCache(str(tmp_path)).folder) / "ab"
    place.mkdir(parents=True)
    (place / "x.safetensors").write_bytes(bytes(1000))
    for name, age in (("old.aside", 7200), ("young.aside", 0)):
        (place / name).write_bytes(bytes(500))
        os.utime(place / name, (time.time() - age,) * 2)
    (tmp_path / "README").write_text("not ours")
    assert mv.VideoCache.free_room(str(tmp_path), 1e-5) == pytest.approx(10000 - 1500)
    assert not (place / "old.aside").exists() and (place / "young.aside").exists()
    monkeypatch.setattr(mv.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 8500, 8500))
    assert mv.VideoCache.free_room(str(tmp_path), 50) == (1500 + 8500) / 5 - 1500
    assert mv.VideoCache.free_room(str(tmp_path), 0) == 0


def test_frames_of_another_version_are_not_read(clips, tiny_model, tmp_path, monkeypatch):
    """They do not fill the cache either; their size and the command that deletes them are printed, and it works."""
    row, folder = record("r", GOOD[:3]), tmp_path / "the cache"
    args = arguments(tiny_model, tmp_path / "out", video_cache=str(folder), dataloader_num_workers=0)
    for version in (1, 2):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(mv, "CACHE_VERSION", version)
        encoder = mv.Encoder(args.model_id, args)
        mv.SampleStream(encoder, args)
        encoder(row, str(clips))
    first, second = ({file.name for file in (folder / v).rglob("*.safetensors")} for v in ("frames-v1", "frames-v2"))
    assert first == second and len(second) == 3
    shutil.copytree(folder / "frames-v1", folder, dirs_exist_ok=True)  # as before there were versions
    (folder / "README").write_text("not ours")
    size = sum(file.stat().st_size for file in (folder / "frames-v1").rglob("*") if file.is_file())
    told = mv.VideoCache.describe_other_versions(str(folder))
    assert told.startswith(f"{2 * size / 1e6:,.1f} MB of another version's frames") and size > 30000
    subprocess.run(told.split(": ", 1)[1], shell=True, check=True)
    assert {file.parts[len(folder.parts)] for file in folder.rglob("*") if file.is_file()} == {"README", "frames-v2"}
    assert mv.VideoCache.describe_other_versions(str(folder)) is None


def test_cached_runs_are_bit_equal(clips, run_flags, tmp_path, monkeypatch):
    """No cache, a cold one, a warm one, one that two workers fill: the same losses and norms to the last bit."""
    flags = [*run_flags, "--on_bad_video", "drop_video", "--gradient_accumulation_steps", 2, "--max_bad_ratio", 1]
    flags += ["--save_strategy", "no"]
    in_process(monkeypatch, *flags, "--video_cache", "none", "--output_dir", tmp_path / "none")
    for name, folder in (("cold", "a"), ("warm", "a"), ("limited", "c")):
        more = ["--video_cache_limit_gb", 0.0001] if name == "limited" else []
        in_process(monkeypatch, *flags, *more, "--video_cache", tmp_path / folder, "--output_dir", tmp_path / name)
    run_with_workers(monkeypatch, *flags, "--video_cache", tmp_path / "b", "--output_dir", tmp_path / "workers")
    for name in ("cold", "warm", "limited", "workers"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "none"), name
    assert contents(tmp_path / "a").keys() >= contents(tmp_path / "b").keys() and len(contents(tmp_path / "b")) > 10
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


# ------------------------------------------------------------------------------------------------------- 5. for long


def test_thousands_of_opens_leave_nothing_behind(clips, tmp_path):
    """5,000 opens in one process: memory, descriptors and threads have no slope."""
    for i in range(4):
        write_clip(tmp_path / f"{i}.mp4", 32, 32, 4 + i)
    write_clip(tmp_path / "x.avi", 32, 32, 4, codec="mpeg4")
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:-200])
    (tmp_path / "cache").mkdir()
    args = mv.TrainingArguments(nframes=4, video_resized_width=28, video_resized_height=28)
    cache = mv.VideoCache(str(tmp_path / "cache"), ctypes.c_double(1e9))
    names = ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "x.avi", "bad.mp4"]
    parts = [mv._media_part("video", name) for name in names]

    def state():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count(), len(
            os.listdir("/proc/self/task"))  # fmt: skip

    states = []
    for i in range(5000):
        try:
            mv.load_clip(parts[i % 6], str(tmp_path), args, 28, None, cache if i % 2 else None)
        except mv.BadFile as error:
            assert names[i % 6] == "bad.mp4", error
        if i % 250 == 249:
            states.append(state())
    memory = np.array([s[0] for s in states[4:]])  # MiB, after 1,000 opens
    slope = np.polyfit(np.arange(len(memory)) * 250, memory, 1)[0] * 1000
    print(f"{slope:.3f} MiB per 1,000 opens, {memory[0]:.0f} → {memory[-1]:.0f} MiB")
    assert slope < 0.5
    for k in (1, 2, 3):
        assert len({s[k] for s in states}) == 1, [s[k] for s in states]


def cache_videos(monkeypatch, *flags):
    """tools/cache_videos.py in this process; its exit code."""
    import cache_videos as tool

    monkeypatch.setattr(sys, "argv", ["cache_videos.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return int(ended.value.code)


@pytest.mark.timeout(120)
def test_cache_videos(clips, run_flags, injected, tmp_path, monkeypatch, capsys):
    """Fills what a run would ask, in shards, goes on after a stop, lists bad files; a run then decodes nothing."""
    flags = [*run_flags, "--video_cache", tmp_path / "cache", "--output_dir", tmp_path / "out", "--num_workers", 1]
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)  # of the run for which it is: no matter here
    codes = [cache_videos(monkeypatch, *flags, "--shard", f"{n}/2", "--num_workers", n) for n in (1, 2)]
    assert codes == [1, 1]  # both have a bad file
    opened = Counter(injected.read_text().split())
    assert set(opened) == {*GOOD, "sleeps.mp4", "segfaults.mp4"} and max(opened.values()) <= 3
    found = told(tmp_path / "out")
    assert set(found) == {"sleeps.mp4", "segfaults.mp4", "missing.mp4"}
    printed = capsys.readouterr().out
    assert "part 2 of 2 done" in printed and "files that cannot be read: see" in printed
    injected.unlink()
    before = contents(tmp_path / "cache")
    assert cache_videos(monkeypatch, *flags) == 1 and not injected.exists()  # nothing is opened again
    assert contents(tmp_path / "cache") == before and sum(".safetensors" in name for name in before) == 12
    damaged = next((tmp_path / "cache").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert cache_videos(monkeypatch, *flags) == 1 and len(set(injected.read_text().split())) == 1
    assert contents(tmp_path / "cache") == before
    monkeypatch.setattr(mv, "read_video", no_decoding)
    in_process(monkeypatch, *flags[:-4], "--on_bad_video", "drop_video", "--output_dir", tmp_path / "run")
    assert sum(row["videos"] for row in metrics(tmp_path / "run")) > 10
    good = json.loads(Path(run_flags[3]).read_text())[2:3]
    (tmp_path / "good.json").write_text(json.dumps(good))
    small = [*flags, "--data_path", tmp_path / "good.json", "--output_dir", tmp_path / "other"]
    assert cache_videos(monkeypatch, *small) == 0
    assert cache_videos(monkeypatch, *small, "--nframes", 8, "--video_cache_limit_gb", 0.00005) == 1
    assert "the cache is full" in capsys.readouterr().out
    (tmp_path / "good.json").write_text(json.dumps([*good, {"id": 1}]))
    assert cache_videos(monkeypatch, *small) == 1 and "1 bad records, first: record 1" in capsys.readouterr().out
    (tmp_path / "good.json").write_text(json.dumps([{"video": good[0]["video"], "label": 2.5}]))
    numbers = ["--objective", "cls", "--problem_type", "regression", "--default_prompt", "How much?"]
    assert cache_videos(monkeypatch, *small, *numbers) == 0  # read as the trainer's own flags say
    assert cache_videos(monkeypatch, *flags, "--shard", "3/2") == 2
    assert cache_videos(monkeypatch, *flags, "--objective", "nothing") == 2
