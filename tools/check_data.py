"""Check data before any GPU is paid for: what is wrong, what is odd, and what the settings make of it.

    python tools/check_data.py --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --gpu_memory_gb 80

takes the flags of a training command (those that do not concern data are read and ignored) and looks at every record
and every file of --data_path and --eval_path in parallel: at its container and first frame, or with --decode at every
frame that training would take. A file that hangs or kills its process is a finding like any other. All is printed, and
written as JSON to --report. Exit code 0: nothing would stop a run; 1: something would; 2: wrong flags.

Sizes, frames and tokens come from the arithmetic of the trainers. Records and findings are kept in a temporary
database on disk ($TMPDIR), not in memory: a million records are fine.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import sys
from collections import Counter, deque
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import multivideo as mv

import av
import numpy as np
import pebble
import torch
from gpu_memory import RUNTIME_GIB, MemoryModel, read_launcher
from PIL import Image
from tqdm import tqdm

LONG_SECONDS = 600  # a longer video is worth a remark
MAX_LISTED = 10_000  # findings of one kind that the JSON lists; counts are always of all
NOTES = {  # code → what it means
    "decoded whole": "no index of its frames, so all are decoded (ffmpeg -i FILE -c copy FILE.mp4 makes one)",
    "rotation": "turned by its metadata, which is honoured",
    "one frame": "a single frame, which fills both frames of its patch",
    "few frames": "fewer frames than the sampling asks for: all are taken",
    "thinned": "--max_frames lowers the frame rate",
    "long": f"longer than {LONG_SECONDS // 60} minutes: where decoding takes long, raise --decode_timeout or give "
    "'start' and 'end'",
    "enlarged": "smaller than the size it is trained at: scaled up, tokens without information",
    "mirrored": "mirrored by its metadata, which is honoured",
    "varying rate": "frames at uneven times: they are chosen by time",
    "orientation": "turned or mirrored by its EXIF data, which is applied",
    "read by PyAV": "decord does not read it right, so that PyAV does (--video_reader decord)",
    "16-bit": "16-bit grey: its full range is scaled to 8 bits",
    "transparency": "transparent parts become white",
    "animation": "several pictures in one file: only the first is read",
    "mixed sizes": "frame images of several sizes: all are scaled to the shape of the first",
    "one colour": "every frame that is taken is one flat colour",
    "container differs": "decoding gives another size or number of frames, by which tokens are counted here",
}


@dataclass
class CheckFlags:
    """Flags of this tool; the trainer's come beside them."""

    objective: str = mv.arg("sft", "Whose records these are: train_OBJECTIVE.py says what a good record is.")
    decode: bool = mv.arg(False, "Decode every frame that training would take, not only the first.")
    report: str = mv.arg("check_data.json", "Where the report is written as JSON.")
    num_workers: int | None = mv.arg(None, "Processes that read records and files (default: one per core).")
    listed: int = mv.arg(10, "Findings of one kind that are printed; all are counted.")
    gpu_memory_gb: float | None = mv.arg(
        None, "Predict the peak memory of a training step, for GPUs of this size (GiB)."
    )
    num_processes: int | None = mv.arg(None, "Training processes, as told to the launcher (default: --config_file's).")
    config_file: str | None = mv.arg(None, "The launcher's YAML: how weights and optimizer are split over processes.")


# Flags that may have any value here: they concern the machine and the folder of the run itself.
UNCHECKED = (
    "output_dir",
    "resume_from_checkpoint",
    "resume_force",
    "attn_implementation",
    "optim",
    "report_to",
    "video_cache",
)


# Flags of training that the check goes by, those of the memory of a step included.
USED = mv.SAMPLE_FLAGS | mv.flags_between("freeze_vision_tower", "double_quant") | {
    "eval_path", "eval_image_folder", "on_long_sample", "on_bad_video", "max_bad_ratio", "video_cache_limit_gb",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
    "bf16", "fp16", "pure_bf16",
}  # fmt: skip


def read_flags(own: type, argv: list[str] | None = None, used: set[str] = USED):
    """Read a trainer's flags and a tool's `own` (a dataclass with `objective`): (its arguments, own).

    --help shows the tool's own flags and the `used` ones.

    Raises:
        SystemExit: as mv.parse_arguments, or there is no trainer of that name.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(sys.argv[0]).name
    if not argv:
        mv.say(f"{script} takes the flags of a training command, at least --data_path FILE.\n"
               f"All flags: python tools/{script} --help")  # fmt: skip
        raise SystemExit(0)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", default="sft", nargs="?")
    objective = first.parse_known_args(argv)[0].objective
    known = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
    if objective not in known:
        mv.say(
            f"{script}: --objective {objective}: there is no train_{objective}.py in {ROOT}; known: {', '.join(known)}"
        )
        raise SystemExit(2)
    trainer = importlib.import_module(f"train_{objective}")
    base = next(value for value in vars(trainer).values() if isinstance(value, type)
                and issubclass(value, mv.TrainingArguments) and value is not mv.TrainingArguments)  # fmt: skip
    asked = inspect.signature(trainer.normalize_record).parameters
    used = {*used, *asked, "max_prompt_length", *(flag.name for flag in dataclasses.fields(own))}
    both = mv.parse_arguments(dataclasses.make_dataclass("Flags", [], bases=(base, own)), argv, UNCHECKED, used)
    args, own = (kind(**{option.name: getattr(both, option.name) for option in dataclasses.fields(kind)})
                 for kind in (base, own))  # fmt: skip
    for name in ("num_workers", "num_processes", "gpu_memory_gb", "shown_frames"):
        if (value := getattr(own, name, None)) is not None and value <= 0:
            raise mv.InputError(f"--{name} {value}: must be above 0")
    args.image_folder = args.image_folder or mv.data_folder(args.data_path)
    args.eval_image_folder = args.eval_image_folder or args.image_folder
    return args, own


def normalizer(objective: str, args):
    """normalize_record of train_OBJECTIVE.py, given those of the trainer's arguments that it asks for."""
    normalize = importlib.import_module(f"train_{objective}").normalize_record
    asked = list(inspect.signature(normalize).parameters)[2:]
    return functools.partial(normalize, **{name: getattr(args, name) for name in asked})


# --------------------------------------------------------------------------------- in the workers: records and files

_worker = {}  # encoder, normalize, args, decode: of a worker process


def start_worker(objective: str, args, decode: bool):
    """What every task of a worker needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    torch.set_num_threads(1)
    encoder = mv.Encoder(args.model_id, args)
    _worker.update(encoder=encoder, normalize=normalizer(objective, args), args=args, decode=decode)


def work(task, items: list) -> list:
    """`task` on each item: one message to the worker for many small pieces of work."""
    return [task(item) for item in items]


def read_record(item) -> dict:
    """Normalise and tokenize a raw `(where, record, folder)` as training does: its token counts and its clips."""
    where, record, folder = item
    if isinstance(record, dict) and record.get("id") is not None:
        where = f"{where} (id {record['id']!r})"
    try:
        if isinstance(record, ValueError):
            raise ValueError(f"{where}: {record}")
        encoder, row = _worker["encoder"], _worker["normalize"](record, where)
        try:
            mv.check_rendered(row, encoder.template_reads(), encoder.chat_template)
            (ids, labels), *answers = encoder.tokenize_record(row)
            parts = [part for turn in row["messages"] for part in turn["content"] if part["type"] != "text"]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    except Exception as error:  # whatever it is, it would end a run
        message = str(error) if isinstance(error, ValueError) else f"{where}: {type(error).__name__}: {error}"
        return {"place": where, "problem": message}
    clips = [{key: part[key] for key in mv.PART if part[key] is not None and key != "text"} for part in parts]
    lengths = [len(answer) for answer, _ in answers]
    return {
        "place": where, "id": row["id"], "problem": None,
        "text": len(ids) - len(parts) + sum(lengths), "beside": sum(lengths) - max(lengths, default=0),
        "learned": sum(label != -100 for _, part in [(ids, labels), *answers] for label in part),
        "clips": [json.dumps(clip | {"folder": folder}, sort_keys=True) for clip in clips],
        "labels": row.get("label", []), "skips_thinking": skips_thinking(row, encoder),
        "begins_otherwise": begins_otherwise(row, encoder),
    }  # fmt: skip


def skips_thinking(row: dict, encoder) -> bool:
    """Whether answers are learned that have no thoughts although the chat template has the model begin with them."""
    opened = encoder.generation_prefix(row["chat_template_kwargs"])
    if "<think>" not in opened or "</think>" in opened:
        return False
    turns = [turn for answer in row.get("completions", [row["messages"]]) for turn in answer]
    answers = [turn for turn in turns if turn["role"] == "assistant" and turn["train"] is not False]
    return any(not turn["reasoning"] and not any("</think>" in (part["text"] or "") for part in turn["content"])
               for turn in answers)  # fmt: skip


def begins_otherwise(row: dict, encoder) -> bool:
    """Whether answers are learned that the chat template does not begin as it has the model begin its own."""
    options = row["chat_template_kwargs"]
    opened = encoder.generation_prefix(options)
    for completion in row.get("completions", [[]]) if opened and "label" not in row else []:
        turns, first = [*row["messages"], *completion], len(row["messages"]) if completion else 0
        text = encoder.render(turns, options)
        answers = [(i, turn) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        for (i, turn), answer in zip(answers, mv.ANSWER.finditer(text)):
            if i >= first and turn["train"] is not False and not answer[1].startswith(opened):
                return True
    return False


def read_clip(item) -> dict:
    """One distinct clip `(number, files and options)`: the shape it is trained at, what is wrong, what is odd."""
    part = {**dict.fromkeys(mv.PART), **json.loads(item[1])}
    folder, args, factor = part.pop("folder"), _worker["args"], _worker["encoder"].factor
    found = {"path": os.path.join(folder, part["files"][0]), "problem": None, "notes": {}}
    notes = found["notes"]
    try:
        if part["type"] == "video":
            path = mv.resolve_path(part["files"][0], folder)
            info = mv.video_info(path, args.video_reader)
            try:
                indices, rate = mv.sample_frames(part, info.num_frames, info.fps, args, times=info.times)
            except ValueError as error:
                raise mv.BadFile(path, str(error)) from None
            width, height, count = info.width, info.height, len(indices)
            seconds, asked = info.num_frames / info.fps, part["fps"] or args.fps
            wanted = part["nframes"] or (None if part["fps"] else args.nframes)
            with av.open(path) as opened:
                stream = opened.streams.best("video")
                stored = stream.width, stream.height
                matrix = mv.display_matrix(next(opened.decode(stream)))
                format_name = opened.format.name.split(",")[0]
            if format_name not in mv.INDEXED_FORMATS:
                notes["decoded whole"] = f"format {format_name}"
            if stored == (height, width) and height != width:
                notes["rotation"] = f"{width}×{height} as shown"
            if np.linalg.det(matrix) < 0:
                notes["mirrored"] = ""
            if info.reader != args.video_reader:
                notes["read by PyAV"] = f"format {format_name}, {stream.codec_context.name}"
            if info.times:
                gaps = np.diff(info.times)
                notes["varying rate"] = f"{info.fps:.3g} per second, {gaps.min():.3g} to {gaps.max():.3g} s apart"
            if info.num_frames == 1:
                notes["one frame"] = ""
            elif count < (round(wanted / 2) * 2 if wanted else args.min_frames):
                notes["few frames"] = f"{count}"
            elif not wanted and count < seconds * asked - mv.FRAME_FACTOR and count + 1 >= args.max_frames:
                notes["thinned"] = f"{rate:.3g} instead of {asked:g} frames per second"
            if seconds > LONG_SECONDS:
                notes["long"] = f"{seconds:,.0f} s, a frame every {1 / rate:.3g} s"
            found |= {"real_path": os.path.realpath(path), "span": f"{indices[0]}-{indices[-1]}",
                      "seconds": mv.FRAME_FACTOR / rate}  # fmt: skip
            times = info.shown_at(indices)
        else:
            sizes = []
            for file in part["files"]:
                found["path"] = os.path.join(folder, file)
                sizes.append(picture_size(mv.resolve_path(file, folder), notes))
            if len(set(sizes)) > 1:
                notes["mixed sizes"] = ", ".join(f"{w}×{h}" for w, h in sorted(set(sizes))[:3])
            found["path"] = os.path.join(folder, part["files"][0])
            count, (width, height) = len(sizes), sizes[0]
            rate = part["fps"] or args.fps
            found["seconds"] = mv.FRAME_FACTOR / rate
            times = mv.frame_list_times(count, rate) if part["type"] == "frames" else []
        shape = (count, *mv.target_size(part, height, width, count, args, factor))
        if shape[1] * shape[2] > 1.5 * height * width:
            notes["enlarged"] = f"{width}×{height} → {shape[2]}×{shape[1]}"
        if _worker["decode"]:
            frames, _, decoded = mv.load_clip(part, folder, args, factor)
            times = decoded if times else []
            if tuple(frames.shape[i] for i in (0, 2, 3)) != shape:
                notes["container differs"] = f"{shape} there, {tuple(frames.shape)} decoded"
                shape = tuple(frames.shape[i] for i in (0, 2, 3))
            if (frames == frames[:, :, :1, :1]).all():
                notes["one colour"] = ""
    except mv.BadFile as error:
        return found | {"path": error.path, "problem": error.reason}
    except Exception as error:  # a decoder may raise anything: it is a finding about this file
        return found | {"problem": str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"}
    return found | {"shape": shape, "stamps": _worker["encoder"].stamp_tokens(times), "patch_stamps":
                    _worker["encoder"].time_tokens(times)}  # fmt: skip


def picture_size(path: str, notes: dict) -> tuple[int, int]:
    """(width, height) of an image file by its header; adds to `notes`.

    Raises:
        BadFile: not an image that Pillow can read.
    """
    try:
        with Image.open(path) as image:
            if (orientation := mv.exif_orientation(image)) != 1:
                notes["orientation"] = f"EXIF orientation {orientation}"
            if getattr(image, "n_frames", 1) > 1:
                notes["animation"] = f"{image.n_frames} pictures"
            if mv.is_16_bit(image):
                notes["16-bit"] = f"mode {image.mode}"
            elif image.has_transparency_data:
                notes["transparency"] = f"mode {image.mode}"
            turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size is the turned one already
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise mv.BadFile(path, f"cannot be read as an image: {error}") from None


def in_workers(pool, task, items, at_once: int, timeout: float, workers: int):
    """Yield `(item, result)` in order, `at_once` items per task; the result is a message where the process died.

    A task that hangs or dies is done again item by item, so that one file is to blame.
    """
    items, waiting = iter(items), deque()
    while True:
        while len(waiting) < 4 * workers:
            batch = list(itertools.islice(items, at_once))
            if not batch:
                break
            waiting.append((batch, pool.schedule(work, args=(task, batch), timeout=timeout)))
        if not waiting:
            return
        batch, future = waiting.popleft()
        try:
            yield from zip(batch, future.result())
            continue
        except (OutOfTime, pebble.ProcessExpired):
            pass
        for item in batch:
            try:
                yield item, pool.schedule(work, args=(task, [item]), timeout=timeout).result()[0]
            except OutOfTime:
                yield item, f"not read within {timeout:g} s (--decode_timeout): the process was killed"
            except pebble.ProcessExpired as error:
                yield item, f"the process that read it died (exit code {error.exitcode})"


# ----------------------------------------------------------------------------------------------------- the database

SCHEMA = """
    CREATE TABLE records (split TEXT, number INTEGER, id TEXT, place TEXT, problem TEXT, text INTEGER, beside INTEGER,
                          learned INTEGER, skips_thinking INTEGER, begins_otherwise INTEGER,
                          PRIMARY KEY (split, number)) WITHOUT ROWID;
    CREATE TABLE clips (split TEXT, number INTEGER, k INTEGER, clip INTEGER,
                        PRIMARY KEY (split, number, k)) WITHOUT ROWID;
    CREATE TABLE distinct_clips (clip INTEGER PRIMARY KEY, spec TEXT UNIQUE, kind TEXT, path TEXT, real_path TEXT,
                                 span TEXT, frames INTEGER, height INTEGER, width INTEGER, tokens INTEGER,
                                 stamps INTEGER, patch_stamps INTEGER, seconds REAL, positions INTEGER, problem TEXT);
    CREATE TABLE notes (code TEXT, path TEXT, detail TEXT, clip INTEGER);
    CREATE TABLE samples (split TEXT, number INTEGER, videos INTEGER, images INTEGER, whole INTEGER, fitted INTEGER,
                          visual INTEGER, stamps INTEGER, unreadable INTEGER, positions INTEGER, problem TEXT,
                          PRIMARY KEY (split, number)) WITHOUT ROWID;
    CREATE TABLE shrunk (split TEXT, number INTEGER, k INTEGER, frames INTEGER, height INTEGER, width INTEGER,
                         PRIMARY KEY (split, number, k)) WITHOUT ROWID;
    CREATE VIEW good AS SELECT split, number, id, videos, images, whole, fitted, visual, stamps, text, learned,
        text + visual + stamps total, text + visual + stamps - beside longest, text - beside + positions - 1 last
        FROM samples JOIN records USING (split, number) WHERE samples.problem IS NULL AND unreadable = 0;
    CREATE VIEW trained_clips AS SELECT split, number, kind, real_path, span, COALESCE(s.frames, d.frames) frames,
        COALESCE(s.height, d.height) height, COALESCE(s.width, d.width) width FROM clips
        JOIN distinct_clips d USING (clip) LEFT JOIN shrunk s USING (split, number, k) WHERE d.frames NOT NULL;
"""
# records.beside: tokens that are not in the longest sequence of a record with several answers to one prompt.
# samples.whole and fitted: what --max_video_tokens bounds, without and with it; visual and stamps: visual tokens and
# those of time stamps as trained (of shrunk clips at most); positions: what the clips take of them.
# distinct_clips.seconds: of one temporal patch; patch_stamps: tokens of its time stamp, at most.
# good.last: the largest position.


class Findings:
    """Everything that is found, in a temporary SQLite database that spills to disk ($TMPDIR) and leaves nothing."""

    def __init__(self, encoder):
        self.encoder, self.db, self.labels = encoder, sqlite3.connect(""), {}  # counts of the classes of each split
        self.db.executescript("PRAGMA cache_size = -100000;" + SCHEMA)

    def __call__(self, query: str, *values):
        # JSON may hold halves of characters, which neither SQLite nor a terminal takes.
        whole = [v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for v in values]
        return self.db.execute(query, whole)

    def one(self, query: str, *values):
        """The first column of the first row."""
        return self(query, *values).fetchone()[0]

    def column(self, query: str, *values) -> np.ndarray:
        """A column of whole numbers."""
        return np.fromiter((row[0] for row in self(query, *values)), np.int64)

    def listed(self, names: str, query: str, *values) -> dict:
        """How many rows a query has, and the first MAX_LISTED as dicts with these names: {"count", "items"}."""
        rows = self(f"{query} LIMIT {MAX_LISTED}", *values)
        return {"count": self.one(f"SELECT COUNT(*) FROM ({query})", *values),
                "items": [dict(zip(names.split(), row)) for row in rows]}  # fmt: skip

    def files(self, table: str, condition: str, *values) -> dict:
        """The files of a condition, what is said of each, and its records: {"count", "items"}."""
        said = "problem" if table == "distinct_clips" else "detail"
        chosen = f"FROM {table} WHERE {condition}"
        found = self.listed("file said", f"SELECT path, {said} {chosen} GROUP BY 1, 2 ORDER BY MIN(clip)", *values)
        for item in found["items"]:
            its_clips = f"SELECT clip {chosen} AND path = ? AND {said} = ?"
            ids = self("SELECT DISTINCT id FROM clips JOIN records USING (split, number) WHERE clip IN "
                       f"({its_clips}) LIMIT 6", *values, item["file"], item["said"]).fetchall()  # fmt: skip
            item |= {"records": [id for (id,) in ids[:5]], "more_records": len(ids) > 5}
        return found

    def add_record(self, split: str, number: int, result: dict):
        """The result of read_record."""
        names = ("id", "place", "problem", "text", "beside", "learned", "skips_thinking", "begins_otherwise")
        self("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", split, number, *map(result.get, names))
        self.labels.setdefault(split, Counter()).update(result.get("labels", []))
        for k, spec in enumerate(result.get("clips", [])):
            self("INSERT OR IGNORE INTO distinct_clips (spec, kind) VALUES (?, ?)", spec, json.loads(spec)["type"])
            self("INSERT INTO clips SELECT ?, ?, ?, clip FROM distinct_clips WHERE spec = ?", split, number, k, spec)

    def add_clip(self, clip: int, result: dict, factor: int):
        """The result of read_clip."""
        shape = result.get("shape")
        self("UPDATE distinct_clips SET path = ?, real_path = ?, span = ?, problem = ? WHERE clip = ?",
             *map(result.get, ("path", "real_path", "span", "problem")), clip)  # fmt: skip
        if shape:
            own = [*map(result.get, ("stamps", "patch_stamps", "seconds"))]
            positions = self.encoder.positions_taken(shape, result["seconds"]) + result["stamps"]
            self("UPDATE distinct_clips SET frames = ?, height = ?, width = ?, tokens = ?, stamps = ?, "
                 "patch_stamps = ?, seconds = ?, positions = ? WHERE clip = ?", *shape,
                 mv.visual_tokens(*shape, factor), *own, positions, clip)  # fmt: skip
        for code, detail in result["notes"].items():
            self("INSERT INTO notes VALUES (?, ?, ?, ?)", code, result["path"], detail, clip)

    def distinct(self):
        """Yield (clip, spec) of all distinct clips, a page at a time."""
        page = "SELECT clip, spec FROM distinct_clips WHERE clip > ? ORDER BY clip LIMIT 4096"
        last = 0
        while rows := self(page, last).fetchall():
            yield from rows
            last = rows[-1][0]

    def shapes(self, split: str, number: int) -> tuple[list[tuple[int, int, int]], list[int]]:
        """(frames, height, width) of a record's clips, without --max_video_tokens, and their `patch_stamps`."""
        clips = self("SELECT frames, height, width, patch_stamps FROM clips JOIN distinct_clips USING (clip) WHERE "
                     "split = ? AND number = ? ORDER BY k", split, number).fetchall()  # fmt: skip
        return [clip[:3] for clip in clips], [clip[3] for clip in clips]

    def add_samples(self, args, factor: int):
        """Sum up the clips of each good record, and shrink them where --max_video_tokens says so."""
        self("""INSERT INTO samples SELECT split, number, COUNT(clip) - COUNT(CASE kind WHEN 'image' THEN 1 END),
                COUNT(CASE kind WHEN 'image' THEN 1 END), COALESCE(SUM(tokens + patch_stamps * ((frames + 1) / 2)), 0),
                COALESCE(SUM(tokens + patch_stamps * ((frames + 1) / 2)), 0), COALESCE(SUM(tokens), 0),
                COALESCE(SUM(stamps), 0), COUNT(clip) - COUNT(tokens), COALESCE(SUM(positions), 0), NULL
                FROM records LEFT JOIN clips USING (split, number) LEFT JOIN distinct_clips USING (clip)
                WHERE records.problem IS NULL GROUP BY split, number""")
        budget = args.max_video_tokens
        over = self("SELECT split, number FROM samples WHERE whole > ? AND unreadable = 0", budget) if budget else []
        for split, number in list(over):
            clips = self("SELECT frames, height, width, stamps, patch_stamps, seconds FROM clips JOIN distinct_clips "
                         "USING (clip) WHERE split = ? AND number = ? ORDER BY k", split,
                         number).fetchall()  # fmt: skip
            try:
                beside = [clip[4] for clip in clips]
                fitted = mv.fit_video_tokens([clip[:3] for clip in clips], budget, factor, beside)
            except ValueError as error:
                self("UPDATE samples SET problem = ? WHERE split = ? AND number = ?", str(error), split, number)
                continue
            visual = sum(mv.visual_tokens(*shape, factor) for shape in fitted)
            bound = mv.budgeted_tokens(fitted, factor, beside)
            stamps = sum(clip[3] if clip[0] == shape[0] else math.ceil(shape[0] / mv.FRAME_FACTOR) * clip[4]
                         for clip, shape in zip(clips, fitted))  # fmt: skip
            positions = sum(self.encoder.positions_taken(shape, seconds * frames / shape[0])
                            for shape, (frames, *_, seconds) in zip(fitted, clips))  # fmt: skip
            self("UPDATE samples SET fitted = ?, visual = ?, stamps = ?, positions = ? WHERE split = ? AND number = ?",
                 bound, visual, stamps, positions + stamps, split, number)  # fmt: skip
            rows = [(split, number, k, *shape) for k, shape in enumerate(fitted)]
            self.db.executemany("INSERT INTO shrunk VALUES (?, ?, ?, ?, ?, ?)", rows)


# --------------------------------------------------------------------------------------------------------- the report


def spread(values: np.ndarray) -> dict:
    """Least, quantiles, mean, most and sum of whole numbers; every quantile is one of the values."""
    if not len(values):
        return {}
    shares = {"least": 0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1}
    quantiles = np.quantile(values, list(shares.values()), method="inverted_cdf").tolist()
    return {**dict(zip(shares, quantiles)), "mean": float(values.mean()), "sum": int(values.sum())}


def report_split(found: Findings, split: str, source: str, args, factor: int) -> dict:
    """Everything about the records of one file."""
    of_split = "FROM records WHERE split = ? AND problem"
    doubles = found.listed("id times", f"SELECT id, COUNT(*) {of_split} IS NULL GROUP BY id HAVING COUNT(*) > 1 "
                           "ORDER BY COUNT(*) DESC, MIN(number)", split)  # fmt: skip
    for item in doubles["items"]:
        places = found("SELECT place FROM records WHERE split = ? AND id = ? LIMIT 5", split, item["id"])
        item["places"] = [place for (place,) in places]
    columns = {"videos": "videos", "images": "images", "visual tokens": "visual", "time stamps": "stamps",
               "text tokens": "text", "learned tokens": "learned", "all tokens": "total",
               "last position": "last"}  # fmt: skip
    prompts = getattr(args, "max_prompt_length", None)  # of a trainer that adds the answers itself
    flag, limit = ("max_prompt_length", prompts) if prompts else ("max_seq_length", args.max_seq_length)
    most, labels = found.encoder.max_positions, found.labels.get(split)
    names, facts = "id tokens visual stamps videos images", "visual, stamps, videos, images FROM good WHERE split = ?"
    return {
        "source": source,
        "records": found.one("SELECT COUNT(*) FROM records WHERE split = ?", split),
        "bad_records": found.listed("problem", f"SELECT problem {of_split} NOT NULL ORDER BY number", split) | {
            "tag_mismatches": found.one(f"SELECT COUNT(*) {of_split} LIKE '%> tags for %'", split)},
        "duplicate_ids": doubles,
        "labels": importlib.import_module("train_cls").describe_labels(labels) if labels else [],
        "skips_thinking": found.one("SELECT COUNT(*) FROM records WHERE split = ? AND skips_thinking", split),
        "begins_otherwise": found.one("SELECT COUNT(*) FROM records WHERE split = ? AND begins_otherwise", split),
        "unreadable_samples": found.one("SELECT COUNT(*) FROM samples WHERE split = ? AND unreadable", split),
        "distinct_clips": found.one("SELECT COUNT(DISTINCT clip) FROM clips WHERE split = ?", split),
        "shapes": found.listed("frames height width kind clips", "SELECT frames, height, width, kind, COUNT(*) FROM "
                               "trained_clips WHERE split = ? GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC", split),
        "per_sample": {name: spread(found.column(f"SELECT {column} FROM good WHERE split = ?", split))
                       for name, column in columns.items()},
        "largest": found.listed(names, f"SELECT id, total, {facts} ORDER BY total DESC, number", split)["items"][:100],
        "too_long": found.listed(names, f"SELECT id, longest, {facts} AND longest > ? ORDER BY longest DESC", split,
                                 limit) | {"flag": flag, "limit": limit, "policy": args.on_long_sample},
        "over_positions": found.listed("id position", "SELECT id, last FROM good WHERE split = ? AND last >= ? "
                                       "ORDER BY last DESC, number", split, most) | {"limit": most},
        "video_tokens": report_budget(found, split, args, factor),
    }  # fmt: skip


def report_budget(found: Findings, split: str, args, factor: int) -> dict:
    """What --max_video_tokens does to the samples, or would do at three budgets to all and to the largest one."""
    whole = found.column("SELECT whole FROM good WHERE split = ?", split)
    after = found.column("SELECT fitted FROM good WHERE split = ?", split)
    result = {"limit": args.max_video_tokens, "tokens_before": int(whole.sum()), "tokens_after": int(after.sum()),
              "shrunk": found.one("SELECT COUNT(*) FROM good WHERE split = ? AND whole > fitted", split),
              "impossible": found.listed("id problem", "SELECT id, samples.problem FROM samples JOIN records USING "
              "(split, number) WHERE split = ? AND samples.problem NOT NULL ORDER BY number", split),
              "would": []}  # fmt: skip
    if not args.max_video_tokens and len(whole):
        most = int(whole.max())
        largest = found.one("SELECT number FROM good WHERE split = ? ORDER BY whole DESC, number", split)
        shapes, beside = found.shapes(split, largest)
        for budget in sorted({most * 3 // 4, most // 2, most // 4}, reverse=True):
            with contextlib.suppress(ValueError):  # less than a token for each
                fitted = mv.fit_video_tokens(shapes, budget, factor, beside)
                after = mv.budgeted_tokens(fitted, factor, beside)
                result["would"].append({"limit": budget, "shrunk": int((whole > budget).sum()),
                                        "largest_before": most, "largest_after": after,
                                        "first_clip_of_largest": [shapes[0], fitted[0]]})  # fmt: skip
    return result


def report_files(found: Findings) -> dict:
    """Missing, unusable and odd files, each with its records."""
    gone = "problem LIKE 'No such file or directory;%'"
    uses = found("SELECT COUNT(*), COUNT(problem) FROM clips JOIN distinct_clips USING (clip)").fetchone()
    odd = {code: {"meaning": meaning, **found.files("notes", "code = ?", code)} for code, meaning in NOTES.items()}
    of_split = "SELECT path FROM clips JOIN distinct_clips USING (clip) WHERE split ="
    return {
        "distinct": found.one("SELECT COUNT(DISTINCT path) FROM distinct_clips"),
        "uses": {"all": uses[0], "unreadable": uses[1]},
        "missing": found.files("distinct_clips", gone),
        "unusable": found.files("distinct_clips", f"problem NOT NULL AND NOT {gone}"),
        "odd": {code: files for code, files in odd.items() if files["count"]},
        "trained_and_evaluated": found.one(f"SELECT COUNT(*) FROM ({of_split} 'train' INTERSECT {of_split} 'eval')"),
    }


def report_cache(found: Findings, args) -> dict:
    """GB (10⁹ bytes) of all videos' uint8 frames, once for each (file, frames, size), and the room there is."""
    needed = found.one("SELECT COALESCE(SUM(frames * 3 * height * width), 0) FROM (SELECT DISTINCT real_path, span, "
                       "frames, height, width FROM trained_clips WHERE kind = 'video')")  # fmt: skip
    there = args.video_cache and os.path.isdir(args.video_cache)
    room = mv.VideoCache.free_room(args.video_cache, args.video_cache_limit_gb) / 1e9 if there else None
    others = mv.VideoCache.describe_other_versions(args.video_cache) if there else None
    return {"gb": needed / 1e9, "folder": args.video_cache, "room_gb": room, "other_versions": others}


SIZES, FRAMES = (56, 112, 168, 224, 336, 448), (2, 4, 8, 16, 32)


def report_memory(found: Findings, args, own: CheckFlags, launch: dict, factor: int) -> dict:
    """Predicted peak memory (GiB) with the largest row at these settings, and over sizes × frames."""
    copied = getattr(importlib.import_module(f"train_{own.objective}"), "frozen_copy_of", lambda args: None)(args)
    model, size = MemoryModel(args, launch, copied), args.per_device_train_batch_size
    patches = model.config.vision_config.spatial_merge_size**2  # of a visual token
    # The worst row there can be: the largest samples, side by side.
    worst = found("SELECT COUNT(*), SUM(total), SUM(visual), SUM(learned) FROM (SELECT * FROM good WHERE split = "
                  "'train' ORDER BY total DESC LIMIT ?)", size).fetchone()  # fmt: skip
    samples, tokens, visual, learned = (value or 0 for value in worst)
    most = found("SELECT MAX(videos), MAX(text + stamps) FROM good WHERE split = 'train'").fetchone()
    videos, text = (value or 0 for value in most)

    def peak(side, frames):
        seen = size * videos * mv.visual_tokens(frames, side, side, factor)
        return model.peak(seen + size * text, seen * patches, learned)["gib"]

    return {
        **model.peak(tokens, visual * patches, learned), "gpu_gib": own.gpu_memory_gb, "launch": launch,
        "trained": model.trained, "frozen": model.frozen + model.quantized, "recurrent": model.recurrent,
        "largest_row": {"samples": samples, "tokens": tokens, "visual": visual},
        "table": {"videos": videos, "text": text, "sides": SIZES, "frames": FRAMES,
                  "gib": [[peak(side, frames) for side in SIZES] for frames in FRAMES]},
    }  # fmt: skip


def would_fail(report: dict, args) -> list[str]:
    """What would end a training run with these records, files and flags, as sentences."""
    problems = []
    for name, split in report["splits"].items():
        if not split["records"]:
            problems.append(f"{name}: no records")
        if count := split["bad_records"]["count"]:
            problems.append(f"{name}: bad records: {count:,}")
        if (long := split["too_long"])["count"] and args.on_long_sample == "error":
            problems.append(f"{name}: samples over --{long['flag']} {long['limit']}: {long['count']:,}")
        if count := split["video_tokens"]["impossible"]["count"]:
            problems.append(f"{name}: samples that --max_video_tokens {args.max_video_tokens} cannot hold: {count:,}")
    files, epochs = report["files"], max(1, args.num_train_epochs)
    uses, bad = files["uses"]["all"], files["uses"]["unreadable"]
    too_many = bad * epochs > args.max_bad_ratio * max(uses * epochs, mv.MIN_VIDEOS)
    if bad and (args.on_bad_video == "error" or too_many):
        policy = "on_bad_video error" if args.on_bad_video == "error" else f"max_bad_ratio {args.max_bad_ratio:g}"
        missing, unusable = files["missing"]["count"], files["unusable"]["count"]
        problems.append(f"files missing: {missing:,}, unusable: {unusable:,}; {bad:,} of {uses:,} places (--{policy})")
    memory = report.get("memory")
    if memory and memory["gib"] > memory["gpu_gib"]:
        problems.append(f"the largest row needs about {memory['gib']:.1f} GiB, the GPU has {memory['gpu_gib']:g}")
    return problems


def whole_sets(objective: str, args, encoder: mv.Encoder) -> list[str]:
    """What the trainer's own check of whole data sets refuses: labels, references and the like."""
    trainer = importlib.import_module(f"train_{objective}")
    if not hasattr(trainer, "check_sets"):
        return []
    normalize = normalizer(objective, args)
    try:
        records, eval_records = (mv.load_records(source, normalize, trainer.FEATURES) if source else None
                                 for source in (args.data_path, args.eval_path))  # fmt: skip
        trainer.check_sets(args, records, eval_records, encoder)
    except mv.InputError as error:
        return [str(error)]
    return []


def show(report: dict, first: int):
    """Print the report, the `first` findings of each kind."""

    def listing(found, line):
        for item in found["items"][:first]:
            print(f"    • {line(item)}")
        if found["count"] > first:
            print(f"    … and {found['count'] - min(first, len(found['items'])):,} more")

    def file_line(item):
        records = ", ".join(item["records"]) + (", …" if item["more_records"] else "")
        return f"{item['file']}{': ' if item['said'] else ''}{item['said']} (records: {records})"

    def sample_line(item):
        clips = f"{item['videos']} videos, {item['images']} images"
        stamps = f", {item['stamps']:,} of time stamps" if item["stamps"] else ""
        return f"{item['id']}: {item['tokens']:,} tokens, {item['visual']:,} of them visual{stamps}; {clips}"

    def line(name, text):
        print(f"  {name:<17}{text}")

    for name, split in report["splits"].items():
        print(f"\n{name}: {split['source']}")
        line("records", f"{split['records']:,}")
        if steps := split.get("steps"):
            product = f"{steps['batch_size']} samples × {steps['rows']} rows × {steps['processes']} processes"
            line(
                "steps",
                f"{steps['per_epoch']:,} per epoch, {steps['total']:,} in all, of {steps['samples']} = {product}",
            )
        if (bad := split["bad_records"])["count"]:
            line("bad records", f"{bad['count']:,}; in {bad['tag_mismatches']:,} the tags do not match the files")
            listing(bad, lambda item: item["problem"])
        if (doubles := split["duplicate_ids"])["count"]:
            line("ids used twice", f"{doubles['count']:,}")
            listing(doubles, lambda item: f"{item['id']}: {item['times']} times, {'; '.join(item['places'])}")
        for note in split["labels"]:
            line("labels", note)
        if split["skips_thinking"]:
            line("thinking", f"{split['skips_thinking']:,} records have answers without thoughts, and the chat "
                 "template has the model think: it would learn not to. Give the turns 'reasoning', or give "
                 "--chat_template_kwargs '{\"enable_thinking\": false}'")  # fmt: skip
        if split["begins_otherwise"]:
            line("thinking", f"{split['begins_otherwise']:,} records have answers to learn that do not begin as the "
                 "model is made to begin: with thoughts where it is given an empty one, or before the last question, "
                 "where the chat template leaves thoughts out. Give --train_on last, or other --chat_template_kwargs "
                 "(enable_thinking, preserve_thinking)")  # fmt: skip
        if split["unreadable_samples"]:
            line(
                "incomplete",
                f"{split['unreadable_samples']:,} samples have missing or unusable files (not in what follows)",
            )
        if split["shapes"]["count"]:
            line("clips", f"{split['distinct_clips']:,} distinct; as trained, frames × width × height:")
            for shape in split["shapes"]["items"][:first]:
                shown = f"{shape['frames']} × {shape['width']} × {shape['height']}"
                print(f"    {shape['clips']:>13,}  {shape['kind']} {shown}")
            if split["shapes"]["count"] > first:
                print(f"    … and {split['shapes']['count'] - first:,} more shapes")
        quantiles = ("least", "median", "mean", "90 %", "99 %", "most", "sum")
        if split["per_sample"]["all tokens"]:
            print("  in a sample      " + "".join(f"{name:>11}" for name in quantiles))
            for what, values in split["per_sample"].items():
                if values["most"] or what not in ("images", "time stamps"):
                    cells = [f"{values[name]:,.1f}" if name == "mean" else f"{values[name]:,}" for name in quantiles]
                    print(f"    {what:<15}" + "".join(f"{cell:>11}" for cell in cells))
            print("  the largest samples")
            listing({"items": split["largest"][: min(3, first)], "count": 0}, sample_line)
        long = split["too_long"]
        line("too long", f"{long['count']:,} over --{long['flag']} {long['limit']:,}"
             + (f" (--on_long_sample {long['policy']})" if long["count"] else ""))  # fmt: skip
        listing(long, sample_line)
        if long["count"]:
            text = split["per_sample"]["text tokens"]["most"]
            print(f"    --max_video_tokens {long['limit'] - text:,} lets all fit" if long["limit"] > text else
                  f"    --max_video_tokens cannot help: there are texts of {text:,} tokens")  # fmt: skip
        if (over := split["over_positions"])["count"]:
            line(
                "positions",
                f"{over['count']:,} samples end above {over['limit'] - 1:,}, the last position that the "
                "model was made for (max_position_embeddings): take shorter parts of their videos, or split them",
            )
            listing(over, lambda item: f"{item['id']}: {item['position']:,}")
        budget = split["video_tokens"]
        if budget["limit"]:
            line("budget", f"--max_video_tokens {budget['limit']:,} shrinks {budget['shrunk']:,} samples: "
                 f"{budget['tokens_before']:,} → {budget['tokens_after']:,} of their tokens in all")  # fmt: skip
            listing(budget["impossible"], lambda item: f"{item['id']}: {item['problem']}")
        for would in budget["would"]:
            before, after = (f"{f} × {w} × {h}" for f, h, w in would["first_clip_of_largest"])
            line("budget", f"--max_video_tokens {would['limit']:,} would shrink {would['shrunk']:,} samples, the "
                 f"largest to {would['largest_after']:,}, its first clip {before} → {after}")  # fmt: skip

    files = report["files"]
    print(f"\nfiles: {files['distinct']:,} distinct; {report['checked']}")
    for kind in ("missing", "unusable"):
        if files[kind]["count"]:
            line(kind, f"{files[kind]['count']:,}")
            listing(files[kind], file_line)
    for code, odd in files["odd"].items():
        line(code, f"{odd['count']:,}: {odd['meaning']}")
        listing(odd, file_line)
    if files["trained_and_evaluated"]:
        line("in both", f"{files['trained_and_evaluated']:,} files are trained on and evaluated on")
    cache = report["cache"]
    room = "" if cache["room_gb"] is None else f"; there is room for {cache['room_gb']:.1f} GB in {cache['folder']}"
    line("cache", f"{cache['gb']:.3f} GB for all decoded frames at these settings{room}")
    if cache["other_versions"]:
        line("", cache["other_versions"])

    if memory := report.get("memory"):
        launch, row, table = memory["launch"], memory["largest_row"], memory["table"]
        print(f"\nmemory: {memory['gib']:.1f} GiB predicted for a GPU of {memory['gpu_gib']:g}, highest at the "
              f"{memory['moment']}")  # fmt: skip
        kind = launch["kind"] + (f" stage {launch['stage']}" if launch["stage"] else "")
        line("parameters", f"{memory['trained']:,} trained, {memory['frozen']:,} frozen")
        line("processes", f"{launch['processes']} ({kind})")
        line("largest row", f"{row['samples']} samples, {row['tokens']:,} tokens, {row['visual']:,} of them visual")
        parts = [f"{name} {value:.1f}" for name, value in memory["parts"].items()]
        line("GiB", ", ".join([*parts, f"CUDA and unusable {RUNTIME_GIB:g}"]))
        if memory["recurrent"]:
            line("", "with recurrent layers computed by plain torch: flash-linear-attention on CUDA needs less")
        if report["objective"] == "grpo":
            line("", "of the update: rollouts and their completions come on top")
        print(f"  GiB with {table['videos']} videos and {table['text']:,} text tokens per sample; *: over the GPU's")
        print("    frames     " + "".join(f"{f'{side}×{side}':>10}" for side in table["sides"]))
        for frames, row in zip(table["frames"], table["gib"]):
            cells = (f"{value:.1f}{'*' if value > memory['gpu_gib'] else ' '}" for value in row)
            print(f"    {frames:<11}" + "".join(f"{cell:>10}" for cell in cells))

    print("\nA run would fail:" if report["would_fail"] else "\nNothing was found that would stop a run.")
    for problem in report["would_fail"]:
        print(f"  • {problem}")


def main():
    args, own = read_flags(CheckFlags)
    if not Path(own.report).absolute().parent.is_dir():
        raise mv.InputError(f"--report {own.report}: no such folder")
    launch = read_launcher(own.config_file, own.num_processes)
    encoder = mv.Encoder(args.model_id, args)  # says what is wrong with --model_id before workers start
    factor = encoder.factor
    workers = own.num_workers or len(os.sched_getaffinity(0))
    found, timeout = Findings(encoder), args.decode_timeout
    sources = {"train": (args.data_path, args.image_folder)}
    if args.eval_path:
        sources["eval"] = (args.eval_path, args.eval_image_folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["multivideo"])
    pool = pebble.ProcessPool(
        workers, context=context, initializer=start_worker, initargs=(own.objective, args, own.decode)
    )
    try:
        for split, (source, folder) in sources.items():
            raw = ((where, record, folder) for where, record in mv.read_records(source))
            results = in_workers(pool, read_record, raw, 32, timeout, workers)
            for number, (item, result) in enumerate(tqdm(results, desc=f"{split} records", unit=" records")):
                dead = {"place": item[0], "problem": f"{item[0]}: {result}"}
                found.add_record(split, number, dead if isinstance(result, str) else result)
        found("CREATE INDEX clip_in ON clips (clip)")
        total = found.one("SELECT COUNT(*) FROM distinct_clips")
        results = in_workers(pool, read_clip, found.distinct(), 1 if own.decode else 16, timeout, workers)
        for (clip, spec), result in tqdm(results, total=total, desc="videos and images", unit=" clips"):
            if isinstance(result, str):
                part = json.loads(spec)
                path = os.path.join(part["folder"], part["files"][0])
                result = {"path": path, "problem": result, "notes": {}}
            found.add_clip(clip, result, factor)
    finally:
        pool.stop()
        pool.join()
    found("CREATE INDEX clip_path ON distinct_clips (path)")
    found("CREATE INDEX note_path ON notes (code, path)")
    found.add_samples(args, factor)
    read = (
        "every frame that training takes was decoded" if own.decode else "containers and first frames (more: --decode)"
    )
    report = {
        "arguments": dataclasses.asdict(args), "objective": own.objective, "checked": read,
        "splits": {split: report_split(found, split, source, args, factor) for split, (source, _) in sources.items()},
        "files": report_files(found), "cache": report_cache(found, args),
    }  # fmt: skip
    size, rows, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, launch["processes"]
    records, samples = report["splits"]["train"]["records"], size * rows * processes
    report["splits"]["train"]["steps"] = {
        "per_epoch": math.ceil(records / samples), "total": mv.count_steps(records, samples, args), "samples": samples,
        "batch_size": size, "rows": rows, "processes": processes,
    }  # fmt: skip
    if own.gpu_memory_gb:
        report["memory"] = report_memory(found, args, own, launch, factor)
    report["would_fail"] = would_fail(report, args)
    if not any(split["bad_records"]["count"] or not split["records"] for split in report["splits"].values()):
        report["would_fail"] += whole_sets(own.objective, args, encoder)
    show(report, own.listed)
    mv.write_json(Path(own.report), report)
    print(f"\nAll of it, up to {MAX_LISTED:,} findings of a kind: {own.report}")
    raise SystemExit(int(bool(report["would_fail"])))


if __name__ == "__main__":
    mv.run(main)
