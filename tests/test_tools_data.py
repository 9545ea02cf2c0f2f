"""check_data.py, preview.py and the memory formula, against mv.Encoder, hand-made damage and real allocations."""

import ctypes
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import struct
import sys
import weakref

import multivideo as mv

import av
import check_data
import gpu_memory
import numpy as np
import pebble
import preview
import pytest
import torch
import yaml
from harmful import harmful
from PIL import Image
from reference import write_clip
from test_reading import write_timed
from test_train import ROOT, demo, in_process  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, Qwen2_5_VLConfig

import train_sft

WIDE = "é “quotes” 中文 العربية 😀\ttab \x07"


def run(tool, monkeypatch, capsys, *flags) -> tuple[int, str]:
    """A tool's main() in this process: its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *map(str, flags)])
    try:
        mv.run(tool.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out + said.err


def record(name, question="What?", answer="That.", **media):
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": talk, **media}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips and images of many kinds, sound and damaged."""
    path = tmp_path_factory.mktemp("odd")
    write_clip(path / "good.mp4", 96, 64, 40)
    write_clip(path / "wide ü.mp4", 140, 56, 33, rate=10, seed=1)
    write_clip(path / "tall.mp4", 56, 112, 61, rate=30, seed=2)
    write_clip(path / "long.mp4", 32, 32, 700, rate=1)
    for frames in (1, 3):
        write_clip(path / f"{frames}.mp4", 64, 64, frames)
    write_clip(path / "thin.mp4", 2, 420, 8)
    (path / "cut.mp4").write_bytes((path / "good.mp4").read_bytes()[:1500])
    (path / "empty.mp4").touch()
    (path / "folder.mp4").mkdir()
    os.mkfifo(path / "pipe.mp4")
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    for name, codec, options in (
        (
            "open.ts",
            "libx265",
            {"preset": "ultrafast", "x265-params": "keyint=10:open-gop=1:bframes=3:log-level=none"},
        ),
        ("turned.mp4", "libx264", {"preset": "ultrafast"}),
    ):
        with av.open(str(path / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            if name == "turned.mp4":
                stream.set_display_rotation(90)
            for i in range(45):
                frame = picture if name == "open.ts" else np.full_like(picture, 99)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(frame, i, 1).copy(), format="rgb24")))
            container.mux(stream.encode())
    for i in range(5):
        Image.fromarray(np.roll(picture, i, 0)).resize((90 + 10 * (i == 2), 60)).save(path / f"{i}.png")
    write_timed(path / "uneven.mkv", [40 * i for i in [*range(20), *range(60, 80)]])
    write_clip(path / "mirrored.mp4", 96, 64, 20)
    data = bytearray((path / "mirrored.mp4").read_bytes())
    at = data.index(b"tkhd") + 44  # the first number of its display matrix: columns run to the left
    data[at : at + 4] = struct.pack(">i", -(1 << 16))
    (path / "mirrored.mp4").write_bytes(data)
    Image.fromarray(picture[..., 0].astype(np.uint16) << 8).save(path / "x-ray.png")
    Image.fromarray(picture).convert("P").save(path / "icon.png", transparency=0)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture).save(path / "exif.jpg", exif=exif)
    (path / "bad.png").write_bytes((path / "0.png").read_bytes()[:40])
    return path


@pytest.fixture(scope="module")
def records():
    """Sound records of every kind: many videos, options, frames, images, text only, several turns."""
    return [
        record("many", "<video>\n<video> and <video>\n?", video=["good.mp4", "wide ü.mp4", "tall.mp4"]),
        record("options", video=[{"video": "good.mp4", "fps": 4, "start": 1, "end": 4.5},
                                 {"video": "tall.mp4", "nframes": 6}, "1.mp4", "3.mp4", "long.mp4",
                                 {"video": "good.mp4", "resized_width": 112, "resized_height": 28}]),
        record("stills", WIDE * 3, WIDE, video=[[f"{i}.png" for i in range(5)]], image=["exif.jpg", "1.png"]),
        record("text", "word " * 50, "A longer answer. " * 20),
        record("odd files", "<image><image>" + "<video>" * 4, image=["x-ray.png", "icon.png"],
               video=["open.ts", "turned.mp4", "uneven.mkv", "mirrored.mp4"]),
    ]  # fmt: skip


def worker(args, decode=False, objective="sft"):
    """The tool's worker functions, in this process."""
    normalize = check_data.normalizer(objective, args)
    check_data._worker.update(encoder=mv.Encoder(args.model_id, args), normalize=normalize, args=args, decode=decode)
    return check_data._worker["encoder"]


def look(args, raw, folder, decode=False, objective="sft"):
    """What the tool finds about raw records, and the encoder."""
    encoder = worker(args, decode, objective)
    found = check_data.Findings(encoder)
    for number, item in enumerate(raw):
        found.add_record("train", number, check_data.read_record((f"record {number}", item, str(folder))))
    for item in found.distinct():
        found.add_clip(item[0], check_data.read_clip(item), encoder.factor)
    found.add_samples(args, encoder.factor)
    return found, encoder


# --------------------------------------------------------------------------------------------------------- check_data


SETTINGS = {
    "fps": {},
    "nframes": {"nframes": 6, "video_resized_width": 64, "video_resized_height": 64},
    "few": {"fps": 0.25, "min_frames": 2, "max_frames": 20, "image_resized_width": 90, "image_resized_height": 60},
    "budget": {"max_video_tokens": 60, "system_prompt": "Be brief."},
    "tight": {"max_video_tokens": 9, "fps": 5.0},
}


@pytest.mark.parametrize(("name", "decode"), [*((name, False) for name in SETTINGS), ("fps", True), ("budget", True)])
def test_tokens_are_those_of_the_encoder(tiny_model, folder, records, tmp_path, name, decode):
    """Counted from containers or decoded, each sample's tokens are what mv.Encoder makes, sample by sample."""
    small = {"video_min_pixels": 784, "video_max_pixels": 20000, "image_min_pixels": 784}
    args = train_sft.SFTArguments(model_id=tiny_model, **{**small, **SETTINGS[name]})
    found, encoder = look(args, records, folder, decode)
    encoder.cache = mv.VideoCache(str(tmp_path), ctypes.c_double(1e9))
    for number, raw in enumerate(records):
        row = check_data._worker["normalize"](raw, "x")
        assert number > 0 or encoder.last_position(row, str(folder)) is None  # its videos are not in the cache yet
        sample = encoder(row, str(folder))
        assert encoder.last_position(row, str(folder)) == sample["position_ids"][1:].max()
        grid = sample["video_grid_thw"]
        columns = "id, total, visual, learned, videos, images, whole > fitted, last"
        ours = found(f"SELECT {columns} FROM good WHERE number = ?", number).fetchone()
        learned = int((sample["labels"] != -100).sum())
        visual = int(grid.prod(1).sum()) // 4
        assert ours == (raw["id"], len(sample["input_ids"]), visual, learned, sample["num_videos"],
                        sample["num_images"], sample["shrunk"], sample["position_ids"][1:].max())  # fmt: skip
        frames = found("SELECT (frames + 1) / 2, height / 14, width / 14 FROM trained_clips WHERE number = ?", number)
        assert sorted(frames.fetchall()) == sorted(map(tuple, grid.tolist()))


OTHERS = {  # objective: fields of a record
    "dpo": {"chosen": "Yes.", "rejected": "No, it is a longer one."},
    "grpo": {"answer": "red"},
    "cls": {"label": "red"},
}


@pytest.mark.parametrize("tool", ["check_data", "preview", "cache_videos", "predict", "app"])
def test_help_shows_the_flags_that_a_tool_uses(tool, monkeypatch, capsys):
    """Of a training command it takes all; the loop's are not among those it shows, with or without an objective."""
    main = importlib.import_module(tool).main
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for more in [[]] if tool in ("predict", "app") else [[], ["--objective", "cls"]]:
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *more, "--help"])
        with pytest.raises(SystemExit) as exit:
            main()
        shown = capsys.readouterr().out
        flags = set(re.findall(r"^  --(\w+)", shown, re.M))
        assert exit.value.code == 0 and {"model_id", "fps", "video_resized_width", "system_prompt"} <= flags
        assert "video_reader" in flags
        assert not {"learning_rate", "warmup_ratio", "save_steps", "resume_from_checkpoint", "loss_type"} & flags
        assert ("labels" in flags) == bool(more) and "they change nothing here" in shown


@pytest.mark.parametrize("objective", OTHERS)
def test_records_of_the_other_trainers(tiny_model, folder, objective):
    """Their own normalize_record and arguments; with several answers the prompt and the longest are one sequence."""
    argv = ["--model_id", tiny_model, "--data_path", str(ROOT / "examples" / "llava.json"), "--nframes", "4"]
    argv += ["--video_resized_width", "56", "--video_resized_height", "56", "--objective", objective]
    args, own = check_data.read_flags(check_data.CheckFlags, argv)
    assert own.objective == objective and type(args).__module__ == f"train_{objective}"
    raw = {"id": "it", "video": ["good.mp4"] * 2, "prompt": "<video> or <video>?", **OTHERS[objective]}
    found, encoder = look(args, [raw, {"id": "bad"}], folder, objective=objective)
    sample = encoder(check_data._worker["normalize"](raw, "x"), str(folder))
    prompt, *answers = sample["lengths"].tolist()
    assert len(answers) == (2 if objective == "dpo" else 0)
    learned = int((sample["labels"] != -100).sum())
    counts = found("SELECT total, longest, visual, learned, last FROM good").fetchall()
    last = sample["position_ids"][1:].max()
    assert counts == [(sample["num_tokens"], prompt + max(answers, default=0), 16, learned, last)]
    assert check_data.report_split(found, "train", "", args, encoder.factor)["over_positions"]["count"] == 0
    found.encoder.max_positions = int(last)
    over = check_data.report_split(found, "train", "", args, encoder.factor)["over_positions"]
    assert over == {"count": 1, "items": [{"id": "it", "position": last}], "limit": last}
    report = check_data.report_split(found, "train", "data.json", args, encoder.factor)
    assert report["bad_records"]["count"] == 1
    assert report["labels"] == (["1 classes: 'red' 1"] if objective == "cls" else [])
    assert report["too_long"]["flag"] == ("max_prompt_length" if objective == "grpo" else "max_seq_length")


def test_demo_is_sound(demo, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A training command's flags, others among them: exit code 0, the numbers known of the demo, memory over sizes."""
    code, said = run(
        check_data, monkeypatch, capsys, "--model_id", demo / "model", "--data_path", demo / "sft_train.json",
        "--eval_path", demo / "sft_eval.json", "--image_folder", demo / "videos", "--video_resized_width", 64,
        "--video_resized_height", 64, "--fps", 0.25, "--per_device_train_batch_size", 2, "--bf16", "True",
        "--learning_rate", 3e-3, "--gradient_accumulation_steps", 2, "--num_train_epochs", 1.5,
        "--report_to", "mlflow", "--output_dir", ROOT, "--attn_implementation", "varlen",
        "--resume_from_checkpoint", tmp_path / "none", "--gpu_memory_gb", 80, "--num_processes", 3, "--num_workers", 1,
        "--report", tmp_path / "report.json",
    )  # fmt: skip
    assert code == 0 and "Nothing was found that would stop a run." in said, said
    report = json.loads((tmp_path / "report.json").read_text())
    train, evaluation = report["splits"]["train"], report["splits"]["eval"]
    assert (train["records"], evaluation["records"]) == (24, 12) and report["would_fail"] == []
    assert train["steps"] == {"per_epoch": 2, "total": 3, "samples": 12, "batch_size": 2, "rows": 2, "processes": 3}
    assert train["per_sample"]["videos"]["least"] == train["per_sample"]["videos"]["most"] == 30
    assert train["per_sample"]["visual tokens"]["sum"] == 24 * 240
    assert train["shapes"]["items"] == [{"frames": 4, "height": 56, "width": 56, "kind": "video", "clips": 720}]
    files = {video for split in ("train", "eval") for item in json.loads((demo / f"sft_{split}.json").read_text())
             for video in item["video"]}  # fmt: skip
    assert report["files"]["distinct"] == len(files) and report["files"]["trained_and_evaluated"] == 0
    assert report["cache"]["gb"] == pytest.approx(len(files) * 4 * 3 * 56 * 56 / 1e9)
    table = report["memory"]["table"]
    assert table["videos"] == 30 and np.all(np.diff(table["gib"], axis=0) > 0) and np.all(np.diff(table["gib"]) > 0)
    assert "24" in said and "720" in said and "56×56" in said


BAD = {  # of records that normalize_record refuses: what is said
    "p": "2 <video> tags for 1 videos", "q": "an assistant ('gpt') turn without text", "r": "addresses are not read",
    "w": "the control token <|video_pad|>",
}  # fmt: skip
UNUSABLE = {
    "cut.mp4": "cannot be decoded", "empty.mp4": "cannot be decoded", "folder.mp4": "not a regular file",
    "pipe.mp4": "not a regular file", "thin.mp4": "more than 200 times the other", "/dev/zero": "not a regular file",
    "good.mp4": "'start' 100.0", "bad.png": "cannot be read as an image",
}  # fmt: skip
ODD = {
    "decoded whole": {"open.ts"}, "rotation": {"turned.mp4"}, "one frame": {"1.mp4"}, "few frames": {"3.mp4"},
    "thinned": {"long.mp4"}, "long": {"long.mp4"}, "enlarged": {"long.mp4"}, "orientation": {"exif.jpg"},
    "mixed sizes": {"0.png"}, "one colour": {"turned.mp4"}, "varying rate": {"uneven.mkv"},
    "mirrored": {"mirrored.mp4"}, "16-bit": {"x-ray.png"}, "transparency": {"icon.png"},
}  # fmt: skip


def test_everything_wrong_is_found(demo, folder, records, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Bad records, all of them; files with their records; odd ones, with --decode flat ones too; exit code 1."""
    bad = [
        record("p", "<video><video>", video="good.mp4"), record("q", answer=" "), record("r", video="http://x/y.mp4"),
        record("w", "<|video_pad|>", video="good.mp4"), *[record(f"p{i}", "<image>") for i in range(30)], "nothing",
    ]  # fmt: skip
    videos = ["cut.mp4", "empty.mp4", "folder.mp4", "pipe.mp4", "thin.mp4", "/dev/zero", "gone.mp4",
              {"video": "good.mp4", "start": 100}]  # fmt: skip
    broken = [record(f"broken {i}", video=["good.mp4", video]) for i, video in enumerate(videos)]
    broken += [record("again", video="gone.mp4"), record("picture", image="bad.png"), record("\ud800", video="\ud800")]
    with open(tmp_path / "data.jsonl", "w") as file:
        for item in [*records, *bad, *broken, record("many"), record("long", "word " * 400)]:
            file.write(json.dumps(item) + "\n")
        file.write("{not JSON}\n")
    code, said = run(
        check_data, monkeypatch, capsys, "--model_id", demo / "model", "--data_path", tmp_path / "data.jsonl",
        "--image_folder", folder, "--max_frames", 64, "--video_min_pixels", 3136, "--max_seq_length", 1900, "--decode",
        "--num_workers", 1, "--report", tmp_path / "report.json", "--listed", 4, "--image_min_pixels", 784,
    )  # fmt: skip
    assert code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    train, files = report["splits"]["train"], report["files"]
    found = [item["problem"] for item in train["bad_records"]["items"]]
    assert train["bad_records"]["count"] == len(found) == 36 and train["bad_records"]["tag_mismatches"] == 31
    for name, reason in BAD.items():
        assert any(f"(id '{name}')" in problem and reason in problem for problem in found), name
    assert any("record must be an object" in p for p in found) and any("not valid JSON" in p for p in found)
    assert "… and 32 more" in said  # of the bad records
    assert train["duplicate_ids"]["items"] == [
        {"id": "many", "times": 2, "places": ["line 1 (id 'many')", "line 52 (id 'many')"]}
    ]
    gone = {"file": str(folder / "gone.mp4"), "records": ["broken 6", "again"], "more_records": False}
    assert gone.items() <= files["missing"]["items"][0].items() and files["missing"]["count"] == 1
    half = {"file": str(folder / "\\ud800"), "records": ["\\ud800"]}  # half a character, as JSON may hold it
    assert half.items() <= files["unusable"]["items"][-1].items()
    unusable = {os.path.relpath(item["file"], folder): item for item in files["unusable"]["items"]}
    unusable["/dev/zero"] = unusable.pop(os.path.relpath("/dev/zero", folder))
    assert unusable.pop("\\ud800")
    assert unusable.keys() == UNUSABLE.keys()
    for i, name in enumerate(["cut.mp4", "empty.mp4", "folder.mp4", "pipe.mp4", "thin.mp4", "/dev/zero"]):
        assert UNUSABLE[name] in unusable[name]["said"] and unusable[name]["records"] == [f"broken {i}"], name
    odd = {code: {os.path.basename(item["file"]) for item in found["items"]} for code, found in files["odd"].items()}
    assert odd.keys() == ODD.keys() and all(names <= odd[code] for code, names in ODD.items()), odd
    assert [item["id"] for item in train["too_long"]["items"]] == ["long"]
    assert len(report["would_fail"]) == 3 and all(problem in said for problem in report["would_fail"])
    assert report["files"]["uses"] == {"all": 37, "unreadable": 11}


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({}, ["files missing: 1, unusable: 0; 1 of 3"]),
        ({"on_bad_video": "drop_video"}, []),  # one of 1,000 may be bad
        ({"on_bad_video": "drop_sample", "max_bad_ratio": 0.0}, ["--max_bad_ratio 0"]),
        ({"on_bad_video": "drop_sample", "max_seq_length": 20}, ["samples over --max_seq_length 20: 1"]),
        ({"on_bad_video": "drop_video", "max_seq_length": 20, "on_long_sample": "skip"}, []),
        ({"on_bad_video": "drop_video", "max_video_tokens": 1}, ["that --max_video_tokens 1 cannot hold: 1"]),
    ],
)  # fmt: skip
def test_what_would_fail_follows_the_policies(tiny_model, folder, changed, problems):
    """The same faults end a run or not, as --on_bad_video, --max_bad_ratio, --on_long_sample and the budget say."""
    args = train_sft.SFTArguments(model_id=tiny_model, data_path="data.json", nframes=2, video_resized_width=28,
                                video_resized_height=28, **changed)  # fmt: skip
    raw = [record("a", video=["good.mp4"] * 2), record("b", video="gone.mp4")]
    found, encoder = look(args, raw, folder)
    split = check_data.report_split(found, "train", "data.json", args, encoder.factor)
    report = {"splits": {"train": split}, "files": check_data.report_files(found)}
    said = check_data.would_fail(report, args)
    assert len(said) == len(problems) and all(part in sentence for part, sentence in zip(problems, said)), said


def test_budgets_and_cache(tiny_model, folder):
    """What budgets would do; the cache holds each (file, frames, size) once, whatever the name of the file."""
    (folder / "link.mp4").unlink(missing_ok=True)
    (folder / "link.mp4").symlink_to(folder / "good.mp4")
    args = train_sft.SFTArguments(model_id=tiny_model, nframes=4, video_resized_width=112, video_resized_height=56)
    raw = [
        record("a", video=["good.mp4", "link.mp4", {"video": "good.mp4", "nframes": 2}]),
        record("b", video="good.mp4"),
        record("c", image="1.png", video=[{"video": "good.mp4", "end": 2}]),
    ]
    found, encoder = look(args, raw, folder)
    frame = 3 * 112 * 56
    assert check_data.report_cache(found, args)["gb"] * 1e9 == pytest.approx((4 + 2 + 4) * frame)
    budget = check_data.report_budget(found, "train", args, encoder.factor)
    assert budget["tokens_before"] == 40 + 16 + (16 + 6) and budget["shrunk"] == 0
    assert [(would["limit"], would["shrunk"]) for would in budget["would"]] == [(30, 1), (20, 2), (10, 3)]
    found, encoder = look(dataclasses.replace(args, max_video_tokens=16), raw, folder)
    budget = check_data.report_budget(found, "train", args, encoder.factor)
    assert budget["shrunk"] == 2 and budget["tokens_after"] <= 3 * 16 < budget["tokens_before"]


def endless():
    """Pieces of work that are counted as they are taken."""
    for i in itertools.count():
        endless.taken = i + 1
        yield i


def test_hanging_and_dying_files_are_findings():
    """Each costs itself alone, is named in its place, and no more is read ahead than the workers need."""
    context = check_data.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["multivideo"])
    pool = pebble.ProcessPool(1, context=context)
    try:
        results = check_data.in_workers(pool, harmful, endless(), 4, 1.5, 1)
        got = dict(itertools.islice(results, 14))
    finally:
        pool.stop()
        pool.join()
    assert endless.taken <= 14 + 5 * 4
    assert "not read within 1.5 s (--decode_timeout)" in got.pop(5) and "died (exit code 7)" in got.pop(9)
    assert got == {i: i * i for i in range(14) if i not in (5, 9)}


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 0, "takes the flags of a training command"),
        (["--objective", "ppo", "--data_path", "x"], 2, "there is no train_ppo.py"),
        (["--objective"], 2, "there is no train_None.py"),
        (["--data_path", "none.json", "--fsp", "2", "--deepspeed", "x"], 2, "3 problems"),
        (["--num_workers", "0"], 1, "--num_workers 0: must be above 0"),
        (["--report", "no/such/folder/x.json"], 1, "no such folder"),
        (["--config_file", "README.md"], 1, "--config_file README.md: not a YAML file of accelerate"),
    ],
)
def test_wrong_flags(demo, monkeypatch, capsys, flags, code, message):  # noqa: F811
    monkeypatch.chdir(ROOT)
    if code == 1:
        flags = ["--data_path", demo / "sft_train.json", "--model_id", demo / "model", *flags]
    got, said = run(check_data, monkeypatch, capsys, *flags)
    assert got == code and message in said, said


# ------------------------------------------------------------------------------------------------------------- memory


class Allocated(TorchDispatchMode):
    """Bytes of all tensors alive, and the most there were, counted as they are made and freed."""

    def __init__(self, *tensors):
        super().__init__()
        self.live = self.most = 0
        self.known = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.finalize(storage, self.drop, key, size)
            self.live += size
            self.most = max(self.most, self.live)

    def drop(self, key, size):
        self.live -= size
        del self.known[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """Of each family one that is deep enough that blocks outweigh what is around them."""
    from make_demo import save_tiny_model

    folder = tmp_path_factory.mktemp("small")
    return {family: save_tiny_model(
        str(folder / family), family, hidden_size=128, intermediate_size=352, num_layers=4, depth=4,
        vision_hidden_size=96, vision_intermediate_size=192, vocab_size=2048,
    ) for family in mv.FAMILIES}  # fmt: skip


@pytest.fixture(scope="module")
def small_model(small_models):
    return small_models["qwen2_5_vl"]


LORA = {"bf16": True, "lora_enable": True, "freeze_llm": True, "lora_dropout": 0.0, "lora_rank": 16,
        "lora_namespan_exclude": "['lm_head', 'embed_tokens']"}  # fmt: skip
FROZEN = {"freeze_vision_tower": True, "freeze_merger": True}
STEPS = {  # flags, and rows of a step
    "fp32": ({}, 1),
    "bf16": ({"bf16": True}, 1),
    "bf16, checkpointing, two rows": ({"bf16": True, "gradient_checkpointing": True}, 2),
    "pure bf16": ({"pure_bf16": True}, 1),
    "frozen tower, checkpointing": ({"bf16": True, "gradient_checkpointing": True, **FROZEN}, 1),
    "adapters, tower trained": (LORA, 1),
    "adapters, checkpointing": ({**LORA, **FROZEN, "gradient_checkpointing": True}, 1),
}


IN_ALL_FAMILIES = ("bf16", "bf16, checkpointing, two rows", "adapters, checkpointing")


@pytest.mark.parametrize("family, name", [(family, name) for family in mv.FAMILIES for name in STEPS
                                          if family == "qwen2_5_vl" or name in IN_ALL_FAMILIES])  # fmt: skip
def test_predicted_memory_is_what_a_step_allocates(small_models, family, name):
    """The most bytes of tensors alive in a real second step (Adam's state is there) are predicted within 5 %."""
    changed, rows = STEPS[name]
    args = train_sft.SFTArguments(model_id=small_models[family], gradient_accumulation_steps=rows, **changed)
    model = mv.load_model(args, "cpu").train()
    encoder, optimizer = mv.Encoder(args.model_id, args), mv.make_optimizer(model, args, "cuda")  # its steps: here
    grid = np.array([[2, 8, 8]] * 6)
    runs = encoder.runs(grid.tolist(), [1.0] * len(grid))  # each with a few tokens of text before it
    video_id = encoder.config.video_token_id
    ids = [token for (t, h, w), _ in runs for token in [1] * 6 + [video_id] * (t * h * w // 4)] + [2] * 20
    ids = np.array(ids)
    labels = np.full(len(ids), -100)
    labels[-20:] = 2
    size = int(grid.prod(1).sum()), encoder.patch_dim
    patches = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    positions = mv.qwen_positions(ids, {video_id: iter(runs)}, encoder.config)
    sample = {"input_ids": ids, "labels": labels, "video_grid_thw": grid, "patches": patches,
              "lengths": np.array([len(ids)]), "position_ids": positions}  # fmt: skip
    autocast = torch.autocast(
        "cpu", mv.autocast_dtype(args) or torch.bfloat16, enabled=mv.autocast_dtype(args) is not None
    )
    with Allocated(*model.parameters()) as allocated:
        for _ in range(2):
            allocated.most = 0
            for _ in range(rows):
                inputs, targets, _ = mv.pack([sample], encoder, "cpu")
                with autocast:
                    loss = train_sft.sft_loss(model(**inputs).logits, targets)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del inputs, targets, loss
    predicted = gpu_memory.MemoryModel(args, gpu_memory.read_launcher(None, None)).peak(len(ids), len(patches), 20)
    assert (predicted["gib"] - gpu_memory.RUNTIME_GIB) * 2**30 == pytest.approx(allocated.most, rel=0.05)


COPIES = {  # objective, flags → is there a frozen copy?
    "dpo": ("dpo", {"bf16": True}, True),
    "dpo, tower frozen": ("dpo", {"bf16": True, **FROZEN}, True),
    "dpo, new adapter": ("dpo", LORA, False),
    "dpo, biases": ("dpo", {**LORA, "lora_bias": "all"}, True),
    "dpo, precomputed": ("dpo", {"precompute_ref_log_probs": True}, False),
    "grpo": ("grpo", {"bf16": True}, True),
    "grpo, fp32": ("grpo", {}, True),
    "grpo, beta 0": ("grpo", {"beta": 0.0}, False),
    "grpo, new adapter": ("grpo", LORA, False),
    "grpo, biases": ("grpo", {**LORA, "lora_bias": "lora_only", **FROZEN}, True),
}


@pytest.mark.parametrize("name", COPIES)
def test_the_reference_s_copy_is_counted(small_model, name):
    """The bytes of the frozen copy that a run loads; split over processes as the trained weights are."""
    objective, changed, exists = COPIES[name]
    trainer = importlib.import_module(f"train_{objective}")
    kind = {"dpo": "DPOArguments", "grpo": "GRPOArguments"}[objective]
    args = getattr(trainer, kind)(model_id=small_model, **changed)
    copied = trainer.frozen_copy_of(args)
    assert copied == (small_model if exists else None)
    alone = gpu_memory.read_launcher(None, None)
    model = gpu_memory.MemoryModel(args, alone, copied)
    size = 0
    if exists:
        size = sum(p.numel() * p.element_size() for p in trainer.load_reference(args, "cpu").parameters())
    assert model.states()["reference"] == pytest.approx(size, rel=0.02)
    peak = model.peak(1000, 500, 20)
    model.copy = 0
    more = (peak["gib"] - model.peak(1000, 500, 20)["gib"]) * 2**30
    assert more == pytest.approx(size, rel=0.02) and ("reference" in peak["parts"]) is exists
    for config, part in (("zero2", 1), ("zero3", 8), ("zero3_offload", math.inf), ("fsdp2", 8)):
        launch = gpu_memory.read_launcher(ROOT / "accelerate_configs" / f"{config}.yaml", None)
        split = gpu_memory.MemoryModel(args, launch, copied)
        assert split.states()["reference"] == split.copy / part


SEVEN_B = Qwen2_5_VLConfig(
    text_config={"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                 "num_attention_heads": 28, "num_key_value_heads": 4,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
    vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                   "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112},
)  # fmt: skip


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory):
    """Folder with the config of Qwen2.5-VL-7B, without weights."""
    folder = tmp_path_factory.mktemp("7b")
    SEVEN_B.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2_5_vl"
    return str(folder)


def test_weights_of_7b(seven_b):
    """8,292,166,656 parameters, as the hub says (16,584,333,312 bytes in bf16); 16 bytes each when all are trained."""
    alone = gpu_memory.read_launcher(None, None)
    model = gpu_memory.MemoryModel(train_sft.SFTArguments(model_id=seven_b, bf16=True), alone)
    assert (model.trained, model.frozen) == (8292166656, 0)
    states = model.states()
    assert states["weights"] + states["gradients"] + states["optimizer"] == 16 * 8292166656
    pure = gpu_memory.MemoryModel(train_sft.SFTArguments(model_id=seven_b, pure_bf16=True), alone).states()
    assert pure["weights"] + pure["gradients"] + pure["optimizer"] == 8 * 8292166656
    qlora = train_sft.SFTArguments(model_id=seven_b, **LORA, **FROZEN, bits=4)
    model = gpu_memory.MemoryModel(qlora, alone)
    layers = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18944)
    adapters = 28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert (model.quantized, model.trained, model.frozen) == (layers, adapters, 8292166656 - layers)
    assert 4.5 < (model.states()["weights"] - 4 * adapters) / 2**30 < 7.5


def test_launchers(seven_b):
    """Each of accelerate_configs/ is understood; what it splits is held in shares, what it offloads is not held."""
    args = train_sft.SFTArguments(model_id=seven_b, bf16=True)
    weights, totals = 8292166656, {}
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        launch = gpu_memory.read_launcher(path, None)
        assert launch["processes"] == yaml.safe_load(path.read_text())["num_processes"]
        states = gpu_memory.MemoryModel(args, launch).states()
        totals[path.stem] = {key: value / weights for key, value in states.items()}
    assert totals["zero2"]["optimizer"] == totals["zero3"]["optimizer"] == 12 / 8
    assert totals["zero3"]["gradients"] == 4 / 8 and totals["zero2_offload"]["optimizer"] == 0
    order = [sum(totals[name].values()) for name in ("ddp", "zero2", "zero3", "zero3_offload")]
    assert order == sorted(order, reverse=True)
    assert sum(totals["fsdp2"].values()) < sum(totals["one_gpu"].values())
    assert totals["ddp"] == totals["one_gpu"]  # DDP's buckets are the gradients themselves
    assert gpu_memory.read_launcher(None, 4)["kind"] == "MULTI_GPU"


# ------------------------------------------------------------------------------------------------------------ preview


@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 4, 6), (3, 10, 4)])
def test_unpatchify_undoes_patchify(grid):
    frames = torch.randint(256, (2 * grid[0], 3, 14 * grid[1], 14 * grid[2]), dtype=torch.uint8)
    patches, made = mv.patchify(frames, 14, 2)
    assert made == grid and torch.equal(preview.unpatchify(patches, grid, 14, 2), frames)


def test_clips_are_those_of_the_sample(tiny_model, folder, records):
    """Frames out of the patches are load_clip's, bit for bit; times by hand; positions are the model's."""
    args = train_sft.SFTArguments(model_id=tiny_model, fps=2, video_min_pixels=3136, image_min_pixels=784)
    encoder = mv.Encoder(tiny_model, args)
    for raw in records:
        row = train_sft.normalize_record(raw, "x")
        sample = encoder(row, str(folder))
        clips = preview.read_clips(row, sample, encoder, str(folder), args)
        parts = [part for turn in row["messages"] for part in turn["content"] if part["type"] != "text"]
        assert len(clips) == len(parts)
        for clip, part in zip(clips, parts):
            frames = mv.load_clip(part, str(folder), args, 28)[0]
            assert torch.equal(clip["frames"][: len(frames)], frames)
            assert clip["tokens"] == -(-len(frames) // 2) * frames.shape[2] * frames.shape[3] // 784
    clip = preview.read_clips(row := train_sft.normalize_record(records[1], "x"), encoder(row, str(folder)), encoder,
                              str(folder), args)[0]  # fmt: skip
    # good.mp4: 40 frames at 8 per second; from frame 8 (1 s) to 36 (4.5 s), 4 per second: 14 frames
    expected = np.linspace(8, 36, 14).round() / 8
    assert clip["times"] == pytest.approx(expected.tolist()) and clip["source"] == "40 frames, 8 fps, 5 s"


def test_marked_text_is_what_is_learned(tiny_model, folder, records):
    """The pieces are the decoded input_ids in order; those that are marked are the answers with their ends."""
    args = train_sft.SFTArguments(model_id=tiny_model, nframes=4, video_resized_width=28, video_resized_height=56)
    encoder = mv.Encoder(tiny_model, args)
    for raw in records:
        row = train_sft.normalize_record(raw, "x")
        sample = encoder(row, str(folder))
        clips = preview.read_clips(row, sample, encoder, str(folder), args)
        pieces = preview.read_text(sample, clips, encoder)
        text = "".join("<|video_pad|>" if kind == "clip" else piece for piece, kind, _ in pieces)
        rendered = encoder.render(row["messages"]).replace("<|image_pad|>", "<|video_pad|>")
        assert text == rendered
        assert (
            "".join(piece for piece, _, learned in pieces if learned)
            == raw["conversations"][1]["value"] + "<|im_end|>"
        )
        assert sum(kind == "clip" for _, kind, _ in pieces) == len(clips)


def green(picture):
    """Pixels of the colour that marks learned text, below the legend."""
    colour = np.array([int(preview.GREEN[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(picture) == colour).all(-1).sum())


def sheet_of(raw, folder, args, encoder, shown=24, change=None):
    row = train_sft.normalize_record(raw, "x")
    sample = encoder(row, str(folder))
    if change:
        change(sample)
    clips = preview.read_clips(row, sample, encoder, str(folder), args)
    return preview.draw_sheet(row, sample, clips, preview.read_text(sample, clips, encoder), args, shown)


def test_sheet(tiny_model, folder, records):
    """The pixels drawn are those of the arrays; learned text is green; long clips, long texts and odd letters fit."""
    args = train_sft.SFTArguments(model_id=tiny_model, data_path="data.json", nframes=4, video_resized_width=112,
                                video_resized_height=112)  # fmt: skip
    encoder = mv.Encoder(tiny_model, args)
    raw = record("six", video=["good.mp4", "tall.mp4"] * 3)
    sheet = np.asarray(sheet_of(raw, folder, args, encoder))
    sample = encoder(train_sft.normalize_record(raw, "x"), str(folder))
    frames = preview.unpatchify(torch.from_numpy(sample["patches"][:128]), (2, 8, 8), 14, 2)
    top, left = 150 + preview.TITLE, preview.MARGIN  # of the first clip's first frame, drawn ×1
    assert (sheet[top : top + 112, left : left + 112] == frames[0].permute(1, 2, 0).numpy()).all()

    def blacken(sample):
        sample["patches"] = sample["patches"] * 0

    assert (sheet != np.asarray(sheet_of(raw, folder, args, encoder, change=blacken))).any()
    short = green(sheet_of(record("a", answer="Yes."), folder, args, encoder))
    assert green(sheet_of(record("a", answer="Yes, it is."), folder, args, encoder)) > short > 1000
    many = sheet_of(record("30", video=["good.mp4"] * 30), folder, args, encoder)
    assert many.width == 1600 and many.height < 4000
    args.max_seq_length = 100000
    long = sheet_of(record("long", "word " * 4000, "x" * 14000), folder, args, encoder)
    assert 160 * preview.LINE < long.height < 170 * preview.LINE + 600
    odd = record(WIDE, WIDE * 9, WIDE, video=[records[2]["video"][0], "1.mp4", "long.mp4"], image="1.png")
    assert sheet_of(odd, folder, args, encoder, shown=2).width == 1600


@pytest.mark.parametrize(
    ("objective", "raw", "names"),
    [
        ("sft", record("a"), []),
        ("dpo", {"prompt": "Which?", "chosen": "The first.", "rejected": "None."}, ["chosen", "rejected"]),
        ("cls", {"prompt": "Which?", "label": "left"}, ["label (the model does not read it): left"]),
        ("cls", {"prompt": "Which?", "label": [0.5, 2]}, ["target (the model does not read it): 0.5, 2.0"]),
        ("grpo", {"prompt": "Which?", "solution": 62}, ["reference (the model does not read it): 62"]),
    ],
)
def test_sheet_names_answers_and_what_is_expected(tiny_model, folder, monkeypatch, objective, raw, names):
    """The two answers of DPO by their names; a label, target or reference below what the model reads."""
    args = train_sft.SFTArguments(model_id=tiny_model, data_path="data.json", nframes=2)
    args.problem_type = "regression" if isinstance(raw.get("label"), list) else "single_label_classification"
    args.default_prompt = args.labels = None
    encoder = mv.Encoder(tiny_model, args)
    row = preview.normalizer(objective, args)({"video": "good.mp4", **raw}, "record 0")
    sample = encoder(row, str(folder))
    clips = preview.read_clips(row, sample, encoder, str(folder), args)
    drawn = []
    monkeypatch.setattr(preview, "draw_text", lambda canvas, lines, y: drawn.extend(lines))
    preview.draw_sheet(row, sample, clips, preview.read_text(sample, clips, encoder), args, 24)
    shown = ["".join(atom[0] for atom in line) for line in drawn]
    heads = [i for i, line in enumerate(drawn) if line and line[0][1] == "answer"]
    assert [shown[i] + (f": {shown[i + 1]}" if "(" in shown[i] else "") for i in heads] == names


def test_preview_runs(demo, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """By index and by id, with a training command's flags; and what it says of records that are not there or bad."""
    flags = ["--model_id", demo / "model", "--data_path", demo / "sft_train.json", "--image_folder", demo / "videos",
             "--video_resized_width", 64, "--video_resized_height", 64, "--nframes", 4, "--learning_rate", 1,
             "-o", tmp_path / "a.png"]  # fmt: skip
    code, said = run(preview, monkeypatch, capsys, *flags, "--index", 3)
    assert code == 0 and "record train-3, 339 tokens, 8 learned" in said
    with Image.open(tmp_path / "a.png") as picture:
        by_index = np.asarray(picture)
    assert run(preview, monkeypatch, capsys, *flags, "--id", "train-3")[0] == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert (np.asarray(picture) == by_index).all()
    for output, message in (("none/a.png", "no such folder"), ("a", "ends in .png")):
        code, said = run(preview, monkeypatch, capsys, *flags[:-1], tmp_path / output)
        assert code == 1 and message in said
    code, said = run(preview, monkeypatch, capsys, *flags, "--index", 24)
    assert code == 1 and "--index 24: not one of the 24 records" in said
    code, said = run(preview, monkeypatch, capsys, *flags, "--id", "train-99")
    assert code == 1 and "--id train-99: not one of the 24 records" in said
    bad = [record("a", "<video>"), record("b", video=["good.mp4", "gone.mp4"]), record("c", video="gone.mp4")]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    flags[3], flags[5] = tmp_path / "bad.json", folder
    code, said = run(preview, monkeypatch, capsys, *flags)
    assert code == 1 and "1 <video> tags for 0 videos" in said
    code, said = run(preview, monkeypatch, capsys, *flags, "--id", "b")
    assert code == 1 and "gone.mp4: No such file" in said
    assert run(preview, monkeypatch, capsys, *flags, "--id", "b", "--on_bad_video", "drop_video")[0] == 0
    code, said = run(preview, monkeypatch, capsys, *flags, "--id", "c", "--on_bad_video", "drop_video")
    assert code == 1 and "record c is left out of training" in said and "gone.mp4" in said


def talk(question, answer):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def pair(chosen, rejected):
    return {"prompt": "<video>\nWhy?", "chosen": chosen, "rejected": rejected}


def label(value):
    return {"prompt": "<video>\nWhich?", "label": value}


SETS = {  # of the trainers: good and bad data sets, and flags
    "sft": [([talk("<video>\nWhy?", "So.")], None, []), ([talk("<video>\nWhy?", " ")], None, [])],
    "dpo": [([pair("So.", "No.")], None, []), ([pair("So.", "So.")], None, []), ([pair("So.", "No.")], [{}], [])],
    "grpo": [
        ([talk("<video>\nWhy?", "So.")], None, ["--reward_funcs", "accuracy"]),
        ([{"prompt": "<video>\nWhy?"}], None, ["--reward_funcs", "accuracy"]),
        ([{"prompt": "<video>\nWhy?"}], None, ["--reward_funcs", "format"]),
        ([talk("<video>\nWhy?", "So.")], [{"prompt": "<video>\nWhy?"}], ["--reward_funcs", "accuracy"]),
    ],
    "cls": [
        ([label("a"), label("b")], [label("a")], []),
        ([label("a"), label("a")], None, []),
        ([label("a"), label("b")], [label("c")], []),
        ([label("a"), label("b")], None, ["--labels", "a", "b", "c"]),
        ([label(["a"]), label(["a", "b"])], None, ["--problem_type", "multi_label_classification"]),
        ([label(1.5), label(1.5)], None, ["--problem_type", "regression"]),
        ([label(1.5), label(2.5)], [label([1.0, 2.0])], ["--problem_type", "regression"]),
    ],
}


@pytest.mark.parametrize("objective, i", [(name, i) for name, cases in SETS.items() for i in range(len(cases))])
def test_check_data_judges_as_the_trainer(tiny_model, demo, tmp_path, monkeypatch, objective, i):  # noqa: F811
    """Exit code 0 exactly where the trainer gets as far as loading weights."""
    (train, held_out, flags), clip = SETS[objective][i], sorted((demo / "videos").rglob("*.mp4"))[0]
    argv = ["--model_id", tiny_model, "--nframes", 2, "--video_resized_width", 56, "--video_resized_height", 56]
    argv += [*flags, "--output_dir", tmp_path / "out"]
    for name, records in (("data", train), ("eval", held_out)):
        if records is not None:
            rows = [{**record, "video": str(clip)} for record in records]
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
            argv += [f"--{name}_path", tmp_path / f"{name}.json"]

    class Loaded(BaseException):
        pass

    def load_model(*args, **kwargs):
        raise Loaded

    class Here:
        """The pool's work in this process."""

        def __init__(self, workers, context, initializer, initargs):
            initializer(*initargs)

        def stop(self):
            pass

        join = stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mv, "load_model", load_model)
    monkeypatch.setattr(pebble, "ProcessPool", Here)
    monkeypatch.setattr(check_data, "in_workers", lambda pool, work, items, *_: ((x, work(x)) for x in items))
    try:
        in_process(monkeypatch, *argv, trainer=f"train_{objective}")
    except Loaded:
        refused = False
    except (SystemExit, ValueError):
        refused = True
    monkeypatch.setattr(
        sys, "argv", ["check_data.py", *map(str, argv), "--objective", objective, "--num_workers", "1"]
    )
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    with pytest.raises(SystemExit) as exit:
        check_data.main()
    bad = {"sft": {1}, "dpo": {1, 2}, "grpo": {1, 3}, "cls": set(range(1, 7))}[objective]
    assert exit.value.code == int(refused) == int(i in bad)
