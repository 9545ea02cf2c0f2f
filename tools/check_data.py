"""Check data before any GPU is paid for: what is wrong, what is odd, and what the settings make of it.

    python tools/check_data.py --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --gpu_memory_gb 80

takes the flags of a training command (those that do not concern data are read and ignored) and looks at every record
and every file of --data_path and --eval_path in parallel: at the containers' metadata, or with --decode at every frame
that training would take. A file that hangs or kills its process is a finding like any other. All is printed, and
written as JSON to --report. Exit code 0: nothing would stop a run; 1: something would; 2: wrong flags.

Sizes, frames and tokens come from the arithmetic of the trainers. Records and findings are kept in a temporary
database on disk ($TMPDIR), not in memory: a million records are fine.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
from collections import deque
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import pebble
import torch
import yaml
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

import multivideo as mv

LONG_SECONDS = 600  # a longer video is worth a remark
MAX_LISTED = 10_000  # findings of one kind that the JSON lists; counts are always of all
NOTES = {  # code → what it means
    "second decoder": "read in sequence by PyAV, which is slower: open groups of pictures, an edit list, or no index",
    "one frame": "a single frame, which fills both frames of its patch",
    "few frames": "fewer frames than the sampling asks for: all are taken",
    "thinned": "--max_frames lowers the frame rate",
    "long": f"longer than {LONG_SECONDS // 60} minutes",
    "enlarged": "smaller than the size it is trained at: scaled up, tokens without information",
    "orientation": "turned by its EXIF data, which is not applied",
    "animation": "several pictures in one file: only the first is read",
    "mixed sizes": "frame images of several sizes: all are scaled to the shape of the first",
    "one colour": "every frame that is taken is one flat colour",
    "container differs": "decoding gives other frames or sizes than the container says: tokens are of the decoded ones",
}


@dataclass
class CheckFlags:
    """Flags of this tool; the trainer's come beside them."""

    objective: str = mv.arg("sft", "Whose records these are: train_OBJECTIVE.py says what a good record is.")
    decode: bool = mv.arg(False, "Decode every frame that training would take, instead of reading containers only.")
    report: str = mv.arg("check_data.json", "Where the report is written as JSON.")
    num_workers: int | None = mv.arg(None, "Processes that read records and files (default: one per core).")
    listed: int = mv.arg(10, "Findings of one kind that are printed; all are counted.")
    gpu_memory_gb: float | None = mv.arg(
        None, "Predict the peak memory of a training step, for GPUs of this size (GiB)."
    )
    num_processes: int | None = mv.arg(None, "Training processes, as told to the launcher (default: --config_file's).")
    config_file: str | None = mv.arg(None, "The launcher's YAML: how weights and optimizer are split over processes.")


# Flags that may have any value here: they concern the machine and the folder of the run itself.
UNCHECKED = ("output_dir", "resume_from_checkpoint", "attn_implementation", "optim", "report_to")


def read_flags(own: type, argv: list[str] | None = None):
    """Read a trainer's flags and a tool's `own` (a dataclass with `objective`): (trainer module, its arguments, own).

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
    both = mv.parse_arguments(dataclasses.make_dataclass("Flags", [], bases=(base, own)), argv, UNCHECKED)
    args, own = (kind(**{option.name: getattr(both, option.name) for option in dataclasses.fields(kind)})
                 for kind in (base, own))  # fmt: skip
    here = Path(args.data_path).parent if Path(args.data_path).exists() else Path(".")
    args.image_folder = args.image_folder or str(here)
    args.eval_image_folder = args.eval_image_folder or args.image_folder
    return trainer, args, own


# --------------------------------------------------------------------------------- in the workers: records and files

_worker = {}  # encoder, normalize, args, decode: of a worker process


def start_worker(objective: str, args, decode: bool):
    """What every task of a worker needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    torch.set_num_threads(1)
    normalize = importlib.import_module(f"train_{objective}").normalize_record
    _worker.update(encoder=mv.Encoder(args.model_id, args), normalize=normalize, args=args, decode=decode)


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
        row = _worker["normalize"](record, where)
        (ids, labels), *answers = _worker["encoder"].tokenize(row["messages"], row.get("completions"))
    except Exception as error:  # whatever it is, it would end a run
        message = str(error) if isinstance(error, ValueError) else f"{where}: {type(error).__name__}: {error}"
        return {"place": where, "problem": message}
    parts = [part for message in row["messages"] for part in message["content"] if part["type"] != "text"]
    clips = [{key: part[key] for key in mv.PART if part[key] is not None and key != "text"} for part in parts]
    lengths = [len(answer) for answer, _ in answers]
    return {
        "place": where, "id": row["id"], "problem": None,
        "text": len(ids) - len(parts) + sum(lengths), "beside_longest": sum(lengths) - max(lengths, default=0),
        "supervised": sum(label != -100 for _, part in [(ids, labels), *answers] for label in part),
        "clips": [json.dumps(clip | {"folder": folder}, sort_keys=True) for clip in clips],
    }  # fmt: skip


def container(path: str) -> dict:
    """What a video's container says, nothing decoded: frames, fps, width, height (pixels), seekable by decord.

    Raises:
        ValueError: not a video, without frames or frame rate, or cut short.
    """
    import av

    frames, fps, seekable = mv.video_index(path)
    with av.open(path) as opened:
        stream = opened.streams.video[0]
        return {"frames": frames, "fps": fps, "seekable": seekable, "width": stream.width, "height": stream.height}


def read_clip_numbered(item) -> dict:
    """read_clip of a `(number, spec)`."""
    return read_clip(item[1])


def read_clip(spec: str) -> dict:
    """One distinct clip (files and options): the shape it is trained at, what is wrong with it, what is odd."""
    part = {**dict.fromkeys(mv.PART), **json.loads(spec)}
    folder, args, factor = part.pop("folder"), _worker["args"], _worker["encoder"].factor
    found = {"path": os.path.join(folder, part["files"][0]), "problem": None, "notes": {}}
    notes = found["notes"]
    try:
        if part["type"] == "video":
            path = mv.resolve_path(part["files"][0], folder)
            facts = container(path)
            indices, rate = mv.sample_frames(part, facts["frames"], facts["fps"], args)
            width, height, count = facts["width"], facts["height"], len(indices)
            seconds, asked = facts["frames"] / facts["fps"], part["fps"] or args.fps
            wanted = part["nframes"] or (None if part["fps"] else args.nframes)
            if not facts["seekable"]:
                notes["second decoder"] = ""
            if facts["frames"] == 1:
                notes["one frame"] = ""
            elif count < (round(wanted / 2) * 2 if wanted else args.min_frames):
                notes["few frames"] = f"{count}"
            elif not wanted and count < seconds * asked - mv.FRAME_FACTOR and count + 1 >= args.max_frames:
                notes["thinned"] = f"{rate:.3g} instead of {asked:g} frames per second"
            if seconds > LONG_SECONDS:
                notes["long"] = f"{seconds:,.0f} s, a frame every {1 / rate:.3g} s"
            found |= {"path": os.path.realpath(path), "span": f"{indices[0]}-{indices[-1]}"}
        else:
            sizes = []
            for file in part["files"]:
                found["path"] = os.path.join(folder, file)
                sizes.append(picture_size(mv.resolve_path(file, folder), notes))
            if len(set(sizes)) > 1:
                notes["mixed sizes"] = ", ".join(f"{w}×{h}" for w, h in sorted(set(sizes))[:3])
            found["path"] = os.path.join(folder, part["files"][0])
            count, (width, height) = len(sizes), sizes[0]
        shape = (count, *mv.target_size(part, height, width, count, args, factor))
        if shape[1] * shape[2] > 1.5 * height * width:
            notes["enlarged"] = f"{width}×{height} → {shape[2]}×{shape[1]}"
        if _worker["decode"]:
            frames, _ = mv.load_clip(part, folder, args, factor)
            if tuple(frames.shape[i] for i in (0, 2, 3)) != shape:
                notes["container differs"] = f"{shape} there, {tuple(frames.shape)} decoded"
                shape = tuple(frames.shape[i] for i in (0, 2, 3))
            if (frames == frames[:, :, :1, :1]).all():
                notes["one colour"] = ""
    except Exception as error:  # a decoder may raise anything; whatever it is, it is a finding about this file
        found["problem"] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return found
    return found | {"shape": shape}


def picture_size(path: str, notes: dict) -> tuple[int, int]:
    """(width, height) of an image file by its header; adds to `notes`.

    Raises:
        ValueError: not an image that Pillow can read.
    """
    try:
        with Image.open(path) as image:
            if image.getexif().get(274, 1) != 1:  # the orientation
                notes["orientation"] = ""
            if getattr(image, "n_frames", 1) > 1:
                notes["animation"] = f"{image.n_frames} pictures"
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}; replace it or take it out") from None


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
    CREATE TABLE records (split TEXT, number INTEGER, id TEXT, place TEXT, problem TEXT, text INTEGER,
                          beside_longest INTEGER, supervised INTEGER, PRIMARY KEY (split, number)) WITHOUT ROWID;
    CREATE TABLE clips (split TEXT, number INTEGER, k INTEGER, clip INTEGER, PRIMARY KEY (split, number, k)) WITHOUT ROWID;
    CREATE TABLE distinct_clips (clip INTEGER PRIMARY KEY, spec TEXT UNIQUE, kind TEXT, path TEXT, span TEXT,
                                 frames INTEGER, height INTEGER, width INTEGER, tokens INTEGER, problem TEXT);
    CREATE TABLE notes (code TEXT, path TEXT, detail TEXT, clip INTEGER);
    CREATE TABLE samples (split TEXT, number INTEGER, videos INTEGER, images INTEGER, unshrunk INTEGER, visual INTEGER, shrunk INTEGER,
                          unreadable INTEGER, problem TEXT, PRIMARY KEY (split, number)) WITHOUT ROWID;
    CREATE TABLE shrunk (split TEXT, number INTEGER, k INTEGER, frames INTEGER, height INTEGER, width INTEGER,
                         PRIMARY KEY (split, number, k)) WITHOUT ROWID;
"""


class Findings:
    """Everything that is found, in a temporary SQLite database that spills to disk ($TMPDIR) and leaves nothing."""

    def __init__(self):
        self.db = sqlite3.connect("")
        self.db.executescript("PRAGMA cache_size = -100000;" + SCHEMA)

    def __call__(self, query: str, *values):
        return self.db.execute(query, values)

    def one(self, query: str, *values):
        """The first column of the first row."""
        return self.db.execute(query, values).fetchone()[0]

    def add_record(self, split: str, number: int, result: dict):
        """The result of read_record."""
        clips = result.get("clips", [])
        self("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", split, number, result.get("id"), result["place"],
             result["problem"], result.get("text"), result.get("beside_longest"), result.get("supervised"))  # fmt: skip
        for k, spec in enumerate(clips):
            self("INSERT OR IGNORE INTO distinct_clips (spec, kind) VALUES (?, ?)", spec, json.loads(spec)["type"])
            self("INSERT INTO clips SELECT ?, ?, ?, clip FROM distinct_clips WHERE spec = ?", split, number, k, spec)

    def add_clip(self, clip: int, result: dict, factor: int):
        """The result of read_clip."""
        shape = result.get("shape")
        self("UPDATE distinct_clips SET path = ?, span = ?, problem = ?, frames = ?, height = ?, width = ?, tokens = ? "
             "WHERE clip = ?", result["path"], result.get("span"), result["problem"], *(shape or (None, None, None)),
             mv.visual_tokens(*shape, factor) if shape else None, clip)  # fmt: skip
        for code, detail in result["notes"].items():
            self("INSERT INTO notes VALUES (?, ?, ?, ?)", code, result["path"], detail, clip)

    def distinct(self):
        """Yield (clip, spec) of all distinct clips, a page at a time."""
        last = 0
        while page := self(
            "SELECT clip, spec FROM distinct_clips WHERE clip > ? ORDER BY clip LIMIT 4096", last
        ).fetchall():
            yield from page
            last = page[-1][0]

    def add_samples(self, args, factor: int):
        """Sum up the clips of each good record, and shrink them where --max_video_tokens says so."""
        self("""INSERT INTO samples SELECT split, number, COUNT(clip) - COUNT(CASE kind WHEN 'image' THEN 1 END),
                COUNT(CASE kind WHEN 'image' THEN 1 END), COALESCE(SUM(tokens), 0), COALESCE(SUM(tokens), 0), 0,
                COUNT(clip) - COUNT(tokens), NULL
                FROM records LEFT JOIN clips USING (split, number) LEFT JOIN distinct_clips USING (clip)
                WHERE records.problem IS NULL GROUP BY split, number""")
        if not args.max_video_tokens:
            return
        over = self("SELECT split, number FROM samples WHERE unshrunk > ? AND unreadable = 0", args.max_video_tokens)
        for split, number in over.fetchall():
            shapes = self("SELECT frames, height, width FROM clips JOIN distinct_clips USING (clip) "
                          "WHERE split = ? AND number = ? ORDER BY k", split, number).fetchall()  # fmt: skip
            try:
                fitted = mv.fit_video_tokens(shapes, args.max_video_tokens, factor)
            except ValueError as error:
                self("UPDATE samples SET problem = ? WHERE split = ? AND number = ?", str(error), split, number)
                continue
            visual = sum(mv.visual_tokens(*shape, factor) for shape in fitted)
            self("UPDATE samples SET visual = ?, shrunk = 1 WHERE split = ? AND number = ?", visual, split, number)
            self.db.executemany("INSERT INTO shrunk VALUES (?, ?, ?, ?, ?, ?)",
                                [(split, number, k, *shape) for k, shape in enumerate(fitted)])  # fmt: skip

    def files(self, table: str, condition: str, *values) -> dict:
        """The distinct files of a condition, with what is said of each and its records: {"count", "items"}."""
        chosen = f"FROM {table} WHERE {condition}"
        column = "problem" if table == "distinct_clips" else "detail"
        items = []
        for path, said in self(f"SELECT path, MIN({column}) {chosen} GROUP BY path ORDER BY MIN(clip) LIMIT ?",
                               *values, MAX_LISTED).fetchall():  # fmt: skip
            ids = [id for (id,) in self(
                f"SELECT DISTINCT id FROM records JOIN clips USING (split, number) WHERE clip IN (SELECT clip {chosen} "
                "AND path = ?) LIMIT 6", *values, path)]  # fmt: skip
            items.append({"file": path, "said": said, "records": ids[:5], "more_records": len(ids) > 5})
        return {"count": self.one(f"SELECT COUNT(DISTINCT path) {chosen}", *values), "items": items}


# ------------------------------------------------------------------------------------------------ memory of a GPU

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size and, halved, its stage3_max_live_parameters
BACKWARD = 1.3  # a block's backward pass needs this much of what its forward pass keeps
RUNTIME_GIB = 1.0  # CUDA context, workspaces of the libraries, and what the allocator cannot use
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 0,
                   "paged_adamw_32bit": 0, "adafactor": 0, "sgd": 0}  # per trained fp32 weight; paged: can leave  # fmt: skip


def read_launcher(own: CheckFlags) -> dict:
    """What the launcher's YAML and --num_processes say: processes, and how they split the model.

    Raises:
        InputError: the file is not one.
    """
    config = {}
    if own.config_file:
        try:
            config = yaml.safe_load(Path(own.config_file).read_text())
            kind = config["distributed_type"]
        except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
            raise mv.InputError(f"--config_file {own.config_file}: not a YAML file of accelerate: {error!r}") from None
    processes = own.num_processes or config.get("num_processes") or 1
    if not own.config_file:
        kind = "NO" if processes == 1 else "MULTI_GPU"
    deepspeed = config.get("deepspeed_config", {})
    return {"processes": processes, "kind": kind, "stage": deepspeed.get("zero_stage", 0),
            "offload_optimizer": deepspeed.get("offload_optimizer_device", "none") != "none",
            "offload_weights": deepspeed.get("offload_param_device", "none") != "none"}  # fmt: skip


class MemoryModel:
    """Predicts the peak memory of one training step on one GPU; weights are counted on the meta device.

    The moments at which it can be highest; W weights, G gradients, O optimizer state, A saved activations:
        end of the forward pass     W + O + A + logits + casts      (with several rows per step + G, here and below)
        start of the backward pass  W + O + A + logits and their gradient, or one block of the language model
        backward pass of the tower  W + O + the language model's G + the tower's A + one of its blocks
        end of the backward pass    W + O + G + one block
        optimizer step              W + O + G + its workspace
    Types as load_model sets them: trained weights w = 4 bytes under autocast (and casts of them to e = 2 bytes for the
    matrix products), frozen ones 2. A is summed over blocks by what each operation keeps (block_bytes); gradient
    checkpointing leaves the input of each block, and one block's A on top when it is computed again.
    """

    def __init__(self, args, launch: dict):
        self.args, self.launch = args, launch
        self.config = AutoConfig.from_pretrained(args.model_id, cache_dir=args.cache_dir)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.config)
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        trained = mv.choose_trained(model, args)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if args.lora_enable:
            model = mv.add_adapter(model, trained, args)
        self.trained = self.trained_llm = self.frozen = self.quantized = self.cast = 0
        self.largest = max(parameter.numel() for parameter in model.parameters())
        kinds = {}  # (part, block or None) → {"trained", "adapted"}
        for name, parameter in model.named_parameters():
            part, count = mv.part_of(name), parameter.numel()
            in_block = re.search(r"(?:layers|blocks)\.(\d+)\.", name)
            if parameter.requires_grad:
                self.trained += count
                self.trained_llm += count if part == "llm" else 0
                self.cast += count if parameter.ndim > 1 and (tied or "embed_tokens" not in name) else 0
                kind = "adapted" if "lora_" in name else "trained"
                kinds.setdefault((part, in_block and int(in_block[1])), set()).add(kind)
            elif args.bits < 16 and part == "llm" and in_block and parameter.ndim > 1:
                self.quantized += count
            else:
                self.frozen += count
        vision, text = self.config.vision_config, self.config.get_text_config()
        flows = False  # does the gradient reach this block?
        self.blocks = {"vision": [], "llm": []}
        for part, depth in (("vision", vision.depth), ("llm", text.num_hidden_layers)):
            flows = flows or (part, None) in kinds or (part == "llm" and any(key[0] != "llm" for key in kinds))
            for block in range(depth):
                kind = kinds.get((part, block), {"frozen"})
                flows = flows or kind != {"frozen"}
                self.blocks[part].append(("trained" if "trained" in kind else min(kind), flows))
        self.merger = ("merger", None) in kinds or flows and any(flow for _, flow in self.blocks["vision"])
        low = 2 if args.bf16 or args.fp16 or args.pure_bf16 else 4
        deepspeed = launch["kind"] == "DEEPSPEED"
        self.e = low  # bytes of the values that matrix products read
        self.w = low if deepspeed or args.pure_bf16 else 4  # of trained weights
        self.f = self.w if deepspeed or launch["kind"] == "FSDP" else low  # of frozen ones

    def states(self) -> dict:
        """Bytes that do not depend on the data: weights, gradients, optimizer (per GPU), workspaces."""
        args, launch, w = self.args, self.launch, self.w
        n, kind, stage = launch["processes"], launch["kind"], launch["stage"]
        weights = self.trained * w + self.frozen * self.f
        weights += self.quantized * (1.0 if args.bits == 8 else 0.516 if args.double_quant else 0.5625)
        gradients, optimizer = self.trained * w, self.trained * OPTIMIZER_BYTES[args.optim] * w / 4
        step = (
            self.trained * w
            if args.optim == "adamw_torch"
            else 3 * self.largest * 4
            if args.optim == "adafactor"
            else 0
        )
        other = self.cast * self.e if w > self.e else 0  # casts, which live as long as the forward pass
        if self.quantized:
            other += 2 * self.largest * self.e
        if kind == "DEEPSPEED":
            optimizer = self.trained * (12 if w == 2 else 8) / n  # with fp32 masters
            gradients, step = gradients / (n if stage > 1 else 1), self.trained * 4 / n
            buckets = min(BUCKET, self.trained) * w
            if launch["offload_optimizer"]:
                optimizer = step = gradients = 0
            if stage == 3:
                buckets += min(2 * BUCKET, self.trained + self.frozen) * w
                weights = 0 if launch["offload_weights"] else weights / n
            weights += buckets
        elif kind == "FSDP":
            whole = max(self.largest * 2, (self.trained + self.frozen) / 20) * w  # embeddings and head, and two layers
            weights, gradients, optimizer, step = weights / n + whole, gradients / n, optimizer / n, step / n
        elif n > 1:
            gradients *= 2  # DDP's buckets
        return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "step": step, "casts": other}

    def block_bytes(self, part: str, kind: str) -> float:
        """Bytes per token (language model) or patch (tower) that one block keeps for the backward pass.

        Norms keep their input in fp32 and, trained, its normalised form; attention keeps query, key, value, output and
        one number per head; the MLP keeps gate, activated gate, up and, before a trained matrix, their product. Linear
        layers keep their input: one cast each under autocast, one for all where the types agree already.
        """
        args, config, e = self.args, self.config.get_text_config(), self.e
        if part == "llm":
            h, inter, heads, residual = (
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                self.residual,
            )
            q, kv = h, h * config.num_key_value_heads // heads
            attention, readers = e * (2 * q + 2 * kv), 3
        else:
            config = self.config.vision_config
            h = getattr(config, "embed_dim", config.hidden_size)
            inter = getattr(config, "intermediate_size", None) or int(h * config.mlp_ratio)
            q, kv, heads, residual = h, h, config.num_heads, e
            attention, readers = e * 6 * h, 1  # query, key and value come as one tensor, which stays
        trained, adapted = kind == "trained", kind == "adapted"
        mask = 1 if args.lora_dropout else 0

        def linear(width, count, type_of_input, outputs):
            if adapted:
                return count * (width * (e + mask) + args.lora_rank * e) + (4 * outputs if args.use_dora else 0)
            return width * e * (1 if type_of_input == e else count) if trained else 0

        normed = max(residual, self.w if trained else self.f)
        norms = 2 * (4 * h + (residual * h if trained else 0) + 4)
        heard = linear(h, readers, normed, q + 2 * kv) + attention + 4 * heads + (linear(q, 1, e, h) if adapted else 0)
        mlp = linear(h, 2, normed, 2 * inter) + 3 * e * inter + linear(inter, 1, e, h)
        return norms + heard + mlp

    @property
    def residual(self) -> int:
        """Bytes of a value of the language model's hidden states: the type of its embeddings."""
        return self.w if any(kind == "trained" for kind, _ in self.blocks["llm"]) else self.f

    def peak(self, tokens: int, patches: int, supervised: int) -> dict:
        """Peak in GiB of a step whose largest row has so many tokens, patches and supervised tokens, and its parts."""
        args, text, e = self.args, self.config.get_text_config(), self.e
        patch_dim = 3 * mv.FRAME_FACTOR * self.config.vision_config.patch_size**2
        vision_width = getattr(self.config.vision_config, "embed_dim", self.config.vision_config.hidden_size) * e
        size, width = (
            {"llm": tokens, "vision": patches},
            {"llm": text.hidden_size * self.residual, "vision": vision_width},
        )
        saved = {"vision": patches * patch_dim * e if e < 4 else 0,  # a cast of the pixels, for the first projection
                 "llm": tokens * text.hidden_size * (8 + e),  # embeddings and last norm
                 "merger": patches * vision_width / e * (4 + 4 * e) if self.merger else 0}  # fmt: skip
        block = {"vision": 0, "llm": 0}
        for part, blocks in self.blocks.items():
            for kind, flows in blocks:
                own = self.block_bytes(part, kind) * size[part] if flows else 0
                saved[part] += (width[part] * size[part] if flows else 0) if args.gradient_checkpointing else own
                block[part] = max(block[part], own)
        again = {part: block[part] * BACKWARD if args.gradient_checkpointing else 0 for part in block}
        pixels = args.gradient_accumulation_steps * patches * patch_dim * 4  # all rows of a step are on the GPU
        logits, chunk = supervised * text.vocab_size, min(supervised, 1024) * text.vocab_size
        head = logits * e * (2 if supervised <= 1024 else 3) + chunk * 8
        states = self.states()
        base, gradients, casts = states["weights"] + states["optimizer"] + pixels, states["gradients"], states["casts"]
        if args.gradient_accumulation_steps > 1:  # those of earlier rows are there all the time
            base, gradients = base + gradients, 0
        kept = 0 if args.gradient_checkpointing else casts
        activations = sum(saved.values())
        moments = {
            "end of the forward pass": base + activations + casts + logits * e + chunk * 8,
            "start of the backward pass": base + activations + kept + max(head, again["llm"]),
            "backward pass of the tower": base + gradients * self.trained_llm / max(1, self.trained) + kept
            + saved["vision"] + again["vision"],
            "end of the backward pass": base + gradients + block["vision"],
            "optimizer step": base + gradients + states["step"],
        }  # fmt: skip
        moment = max(moments, key=moments.get)
        parts = {"weights": states["weights"], "gradients": states["gradients"], "optimizer": states["optimizer"],
                 "activations": activations + max(again.values()), "pixels": pixels, "logits": head}  # fmt: skip
        return {"gib": moments[moment] / 2**30 + RUNTIME_GIB, "moment": moment,
                "parts": {name: value / 2**30 for name, value in parts.items()}}  # fmt: skip


# --------------------------------------------------------------------------------------------------- the report


def spread(values: np.ndarray) -> dict:
    """Least, quantiles, mean, most and sum of whole numbers; every quantile is one of the values."""
    if not len(values):
        return {}
    quantiles = {name: int(np.quantile(values, q, method="inverted_cdf"))
                 for name, q in (("least", 0), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("most", 1))}  # fmt: skip
    return {**quantiles, "mean": float(values.mean()), "sum": int(values.sum())}


GOOD = "samples JOIN records USING (split, number) WHERE split = ? AND samples.problem IS NULL AND unreadable = 0"


def report_split(found: Findings, split: str, source: str, args, factor: int, processes: int) -> dict:
    """Everything about the records of one file."""
    count = found.one("SELECT COUNT(*) FROM records WHERE split = ?", split)
    bad = [row[0] for row in found("SELECT problem FROM records WHERE split = ? AND problem IS NOT NULL ORDER BY number "
                                   "LIMIT ?", split, MAX_LISTED)]  # fmt: skip
    doubles = found("SELECT id, COUNT(*) FROM records WHERE split = ? AND problem IS NULL GROUP BY id HAVING COUNT(*) > 1 "
                    "ORDER BY COUNT(*) DESC, MIN(number) LIMIT ?", split, MAX_LISTED).fetchall()  # fmt: skip

    def column(expression):
        return np.fromiter((row[0] for row in found(f"SELECT {expression} FROM {GOOD}", split)), np.int64)

    per_sample = {
        "videos": column("videos"), "images": column("images"), "visual tokens": column("visual"),
        "text tokens": column("text"), "learned tokens": column("supervised"), "all tokens": column("text + visual"),
    }  # fmt: skip
    longest = "text - beside_longest + visual"  # one sequence: with several answers the prompt and the longest
    columns = "id, text + visual, visual, videos, images"
    names = ("id", "tokens", "visual", "videos", "images")
    long = found(f"SELECT id, {longest}, visual, videos, images FROM {GOOD} AND {longest} > ? ORDER BY {longest} DESC "
                 "LIMIT ?", split, args.max_seq_length, MAX_LISTED).fetchall()  # fmt: skip
    largest = found(f"SELECT {columns} FROM {GOOD} ORDER BY text + visual DESC, number LIMIT 10", split).fetchall()
    shapes = found("""SELECT COALESCE(s.frames, d.frames) f, COALESCE(s.height, d.height) h,
                      COALESCE(s.width, d.width) w, kind, COUNT(*) FROM clips JOIN distinct_clips d USING (clip)
                      LEFT JOIN shrunk s USING (split, number, k) WHERE split = ? AND d.frames NOT NULL
                      GROUP BY f, h, w, kind ORDER BY COUNT(*) DESC LIMIT 20""", split).fetchall()  # fmt: skip
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    result = {
        "source": source, "records": count,
        "bad_records": {
            "count": found.one("SELECT COUNT(*) FROM records WHERE split = ? AND problem NOT NULL", split),
            "tag_mismatches": found.one("SELECT COUNT(*) FROM records WHERE split = ? AND problem LIKE '%> tags for %'",
                                        split), "items": bad,
        },
        "duplicate_ids": {
            "count": found.one("SELECT COUNT(*) FROM (SELECT id FROM records WHERE split = ? AND problem IS NULL "
                               "GROUP BY id HAVING COUNT(*) > 1)", split),
            "items": [{"id": id, "times": times, "places": [row[0] for row in found(
                "SELECT place FROM records WHERE split = ? AND id = ? ORDER BY number LIMIT 5", split, id)]}
                for id, times in doubles],
        },
        "unreadable_samples": found.one("SELECT COUNT(*) FROM samples WHERE split = ? AND unreadable > 0", split),
        "distinct_clips": found.one("SELECT COUNT(DISTINCT clip) FROM clips WHERE split = ?", split),
        "shapes": [dict(zip(("frames", "height", "width", "kind", "clips"), row)) for row in shapes],
        "per_sample": {name: spread(values) for name, values in per_sample.items()},
        "largest": [dict(zip(names, row)) for row in largest],
        "too_long": {"limit": args.max_seq_length, "on_long_sample": args.on_long_sample, "count": found.one(
            f"SELECT COUNT(*) FROM {GOOD} AND {longest} > ?", split, args.max_seq_length),
            "items": [dict(zip(names, row)) for row in long]},
        "video_tokens": report_budget(found, split, args, factor),
    }  # fmt: skip
    if split == "train":
        steps = mv.count_steps(count, per_step, args) if count else 0
        result["steps"] = {"per_epoch": math.ceil(count / per_step), "total": steps, "samples_per_step": per_step,
                           "batch_size": args.per_device_train_batch_size, "rows": args.gradient_accumulation_steps,
                           "processes": processes}  # fmt: skip
    return result


def report_budget(found: Findings, split: str, args, factor: int) -> dict:
    """What --max_video_tokens does to the samples, or would do at three budgets; the largest sample as the example."""
    before = np.fromiter((row[0] for row in found(f"SELECT unshrunk FROM {GOOD}", split)), np.int64)
    impossible = found("SELECT id, samples.problem FROM samples JOIN records USING (split, number) WHERE split = ? AND "
                       "samples.problem NOT NULL ORDER BY number LIMIT ?", split, MAX_LISTED).fetchall()  # fmt: skip
    result = {
        "limit": args.max_video_tokens, "impossible": {"count": found.one(
            "SELECT COUNT(*) FROM samples WHERE split = ? AND problem NOT NULL", split),
            "items": [{"id": id, "problem": problem} for id, problem in impossible]},
    }  # fmt: skip
    if args.max_video_tokens:
        result["shrunk"], after = found(f"SELECT COALESCE(SUM(shrunk), 0), COALESCE(SUM(visual), 0) FROM {GOOD}",
                                        split).fetchone()  # fmt: skip
        return result | {"tokens_before": int(before.sum()), "tokens_after": after}
    most = int(before.max()) if len(before) else 0
    number = found(f"SELECT number FROM {GOOD} ORDER BY unshrunk DESC, number LIMIT 1", split).fetchone()
    shapes = number and found("SELECT frames, height, width FROM clips JOIN distinct_clips USING (clip) WHERE split = ? "
                              "AND number = ? ORDER BY k", split, number[0]).fetchall()  # fmt: skip
    result["would"] = []
    for budget in sorted({most * 3 // 4, most // 2, most // 4} - {0}, reverse=True):
        try:
            fitted = mv.fit_video_tokens(shapes, budget, factor)
        except ValueError:
            continue
        result["would"].append({"limit": budget, "shrunk": int((before > budget).sum()), "largest_clip_before": shapes[0],
                                "largest_clip_after": fitted[0]})  # fmt: skip
    return result


def report_files(found: Findings) -> dict:
    """Missing, unreadable and odd files, and what of them the records cannot use, each with its records."""
    gone = "problem LIKE '%: No such file or directory;%'"
    return {
        "distinct": found.one("SELECT COUNT(DISTINCT path) FROM distinct_clips"),
        "missing": found.files("distinct_clips", gone),
        "broken": found.files("distinct_clips", f"problem NOT NULL AND NOT {gone}"),
        "odd": {code: {"meaning": meaning, **found.files("notes", "code = ?", code)} for code, meaning in NOTES.items()
                if found.one("SELECT COUNT(*) FROM notes WHERE code = ?", code)},
        "in_both": found.one("SELECT COUNT(*) FROM (SELECT path FROM clips JOIN distinct_clips USING (clip) WHERE split = "
                             "'train' INTERSECT SELECT path FROM clips JOIN distinct_clips USING (clip) WHERE split = 'eval')"),
    }  # fmt: skip


def cache_bytes(found: Findings) -> int:
    """uint8 frames at their training size, once for each distinct (file, frames, size) of readable videos."""
    return found.one("""SELECT COALESCE(SUM(f * 3 * h * w), 0) FROM (SELECT DISTINCT path, span,
                        COALESCE(s.frames, d.frames) f, COALESCE(s.height, d.height) h, COALESCE(s.width, d.width) w
                        FROM clips JOIN distinct_clips d USING (clip) LEFT JOIN shrunk s USING (split, number, k)
                        WHERE kind = 'video' AND d.frames NOT NULL)""")


SIZES, FRAMES = (56, 112, 168, 224, 336, 448), (2, 4, 8, 16, 32)


def report_memory(found: Findings, args, own: CheckFlags, launch: dict, factor: int) -> dict:
    """Predicted peak memory (GiB) of the largest row at these settings, and over sizes × frames."""
    model, size = MemoryModel(args, launch), args.per_device_train_batch_size
    # The worst row there can be: the largest samples, side by side.
    rows = found(f"SELECT text + visual, visual, supervised, videos, text FROM {GOOD} ORDER BY text + visual DESC LIMIT ?",
                 "train", size).fetchall()  # fmt: skip
    tokens, visual, supervised, _, _ = map(sum, zip(*rows)) if rows else [0] * 5
    merge = model.config.vision_config.spatial_merge_size
    videos, text = found(f"SELECT COALESCE(MAX(videos), 0), COALESCE(MAX(text), 0) FROM {GOOD}", "train").fetchone()
    table = {}
    for side in SIZES:
        for frames in FRAMES:
            seen = size * videos * mv.visual_tokens(frames, side, side, factor)
            table[f"{side}×{side} × {frames}"] = model.peak(seen + size * text, seen * merge**2, supervised)["gib"]
    return {"gpu_gib": own.gpu_memory_gb, "launch": launch, "trained": model.trained,
            "frozen": model.frozen + model.quantized, "row": {"samples": len(rows), "tokens": tokens, "visual": visual},
            **model.peak(tokens, visual * merge**2, supervised), "videos": videos, "text": text, "table": table}  # fmt: skip


def would_fail(report: dict, args) -> list[str]:
    """What would end a training run with these records, files and flags, as sentences."""
    problems = []
    for name, split in report["splits"].items():
        if not split["records"]:
            problems.append(f"{name}: no records")
        if count := split["bad_records"]["count"]:
            problems.append(f"{name}: {count:,} bad records")
        if (count := split["too_long"]["count"]) and args.on_long_sample == "error":
            problems.append(f"{name}: {count:,} samples over --max_seq_length {args.max_seq_length}")
        if count := split["video_tokens"]["impossible"]["count"]:
            problems.append(f"{name}: {count:,} samples that --max_video_tokens {args.max_video_tokens} cannot hold")
    files = report["files"]
    if count := files["missing"]["count"] + files["broken"]["count"]:
        problems.append(f"{count:,} files that cannot be used: {files['missing']['count']:,} missing, "
                        f"{files['broken']['count']:,} broken")  # fmt: skip
    memory = report.get("memory")
    if memory and memory["gib"] > memory["gpu_gib"]:
        problems.append(f"the largest row needs about {memory['gib']:.1f} GiB of the GPU's {memory['gpu_gib']:g}")
    return problems


def show(report: dict, listed: int):
    """Print the report, the first `listed` findings of each kind."""

    def listing(found, line):
        for item in found["items"][:listed]:
            print(f"    • {line(item)}")
        if found["count"] > listed:
            print(f"    … and {found['count'] - listed:,} more")

    def who(item):
        return "; record " + ", ".join(map(str, item["records"])) + (" and more" if item["more_records"] else "")

    for name, split in report["splits"].items():
        bad, doubles, long = split["bad_records"], split["duplicate_ids"], split["too_long"]
        print(f"\n{name}  {split['source']}")
        print(f"  records         {split['records']:,}")
        if "steps" in split:
            steps = split["steps"]
            print(
                f"  steps           {steps['per_epoch']:,} per epoch, {steps['total']:,} in all; {steps['samples_per_step']} "
                f"samples per step = {steps['batch_size']} samples × {steps['rows']} rows × {steps['processes']} processes"
            )
        if bad["count"]:
            print(f"  bad records     {bad['count']:,}, of them {bad['tag_mismatches']:,} with tags that do not match")
            listing(bad, str)
        if doubles["count"]:
            print(f"  duplicate ids   {doubles['count']:,}")
            listing(doubles, lambda item: f"{item['id']}: {item['times']} times, {', '.join(item['places'])}")
        if split["unreadable_samples"]:
            print(
                f"  cannot be made  {split['unreadable_samples']:,} samples with a file that cannot be used; not counted below"
            )
        if split["shapes"]:
            print(f"  clips           {split['distinct_clips']:,} distinct; frames × width × height as trained")
            for shape in split["shapes"][:listed]:
                print(
                    f"    {shape['clips']:>9,} × {shape['kind']} {shape['frames']} × {shape['width']} × {shape['height']}"
                )
        quantiles = ("least", "median", "mean", "90 %", "99 %", "most", "sum")
        if split["per_sample"]["all tokens"]:
            print("  per sample      " + "".join(f"{quantile:>11}" for quantile in quantiles))
            for what, values in split["per_sample"].items():
                if what != "images" or values["most"]:
                    print(f"    {what:<14}" + "".join(f"{values[q]:>11,.1f}" if q == "mean" else f"{values[q]:>11,}"
                                                       for q in quantiles))  # fmt: skip
            print("  largest samples")
            for item in split["largest"][: min(listed, 5)]:
                print(
                    f"    {item['id']}: {item['tokens']:,} tokens, {item['visual']:,} visual; {item['videos']} videos, "
                    f"{item['images']} images"
                )
        print(
            f"  over --max_seq_length {long['limit']:,}: {long['count']:,} samples"
            + (f" ({long['on_long_sample']})" if long["count"] else "")
        )
        listing(long, lambda item: f"{item['id']}: {item['tokens']:,} tokens, {item['visual']:,} visual")
        if long["count"]:
            most = split["per_sample"]["text tokens"]["most"]
            print(f"    --max_video_tokens {max(0, long['limit'] - most):,} would make all fit (the longest text has {most:,})"
                  if long["limit"] > most else f"    the text alone has up to {most:,} tokens")  # fmt: skip
        budget = split["video_tokens"]
        if budget["limit"]:
            print(
                f"  --max_video_tokens {budget['limit']:,}: {budget['shrunk']:,} samples shrink, "
                f"{budget['tokens_before']:,} → {budget['tokens_after']:,} visual tokens"
            )
            listing(budget["impossible"], lambda item: f"{item['id']}: {item['problem']}")
        for would in budget.get("would", []):
            (f0, h0, w0), (f, h, w) = would["largest_clip_before"], would["largest_clip_after"]
            print(f"  --max_video_tokens {would['limit']:,} would shrink {would['shrunk']:,} samples; clips of the largest: "
                  f"{f0} × {w0}×{h0} → {f} × {w}×{h}")  # fmt: skip

    files = report["files"]
    print(f"\nfiles  {files['distinct']:,} distinct; {report['checked']}")
    for kind in ("missing", "broken"):
        if files[kind]["count"]:
            print(f"  {kind:<15} {files[kind]['count']:,}")
            listing(files[kind], lambda item: item["said"] + who(item))
    for code, odd in files["odd"].items():
        print(f"  {code:<15} {odd['count']:,}: {odd['meaning']}")
        listing(odd, lambda item: item["file"] + (f" ({item['said']})" if item["said"] else "") + who(item))
    if files["in_both"]:
        print(f"  in both         {files['in_both']:,} files are trained on and evaluated on")
    print(f"  cache           {report['cache_gb']:.3f} GB for all decoded frames at these settings")

    if memory := report.get("memory"):
        launch, parts = memory["launch"], memory["parts"]
        print(
            f"\nmemory of one GPU  {memory['gib']:.1f} GiB predicted of {memory['gpu_gib']:g}, highest at the {memory['moment']}"
        )
        print(
            f"  largest row     {memory['row']['tokens']:,} tokens ({memory['row']['visual']:,} visual) of "
            f"{memory['row']['samples']} samples; {launch['processes']} processes ({launch['kind']})"
        )
        print(f"  parameters      {memory['trained']:,} trained, {memory['frozen']:,} frozen")
        print("  GiB             " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
              + f", CUDA {RUNTIME_GIB:g}")  # fmt: skip
        print(
            f"  if every sample had {memory['videos']} videos and {memory['text']:,} tokens of text (GiB, * over the GPU's)"
        )
        print("    frames    " + "".join(f"{side}×{side:<6}".rjust(11) for side in SIZES))
        for frames in FRAMES:
            cells = [memory["table"][f"{side}×{side} × {frames}"] for side in SIZES]
            print(f"    {frames:<10}" + "".join(f"{value:.1f}{'*' if value > memory['gpu_gib'] else ' '}".rjust(11)
                                                for value in cells))  # fmt: skip

    print("\nA run would fail:" if report["would_fail"] else "\nNothing was found that would stop a run.")
    for problem in report["would_fail"]:
        print(f"  • {problem}")


def main():
    _, args, own = read_flags(CheckFlags)
    launch = read_launcher(own)
    factor = mv.Encoder(args.model_id, args).factor  # says what is wrong with --model_id before workers start
    workers = own.num_workers or len(os.sched_getaffinity(0))
    found, timeout = Findings(), getattr(args, "decode_timeout", 60.0)
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
            for number, (item, result) in enumerate(tqdm(results, desc=f"{split}: records", unit=" records")):
                dead = {"place": item[0], "problem": f"{item[0]}: {result}"}
                found.add_record(split, number, dead if isinstance(result, str) else result)
        found("CREATE INDEX records_of ON clips (clip)")
        total = found.one("SELECT COUNT(*) FROM distinct_clips")
        results = in_workers(pool, read_clip_numbered, found.distinct(), 1 if own.decode else 16, timeout, workers)
        for (clip, spec), result in tqdm(results, total=total, desc="videos and images", unit=" files"):
            if isinstance(result, str):
                part = json.loads(spec)
                path = os.path.join(part["folder"], part["files"][0])
                result = {"path": path, "problem": f"{path}: {result}", "notes": {}}
            found.add_clip(clip, result, factor)
    finally:
        pool.stop()
        pool.join()
    found("CREATE INDEX by_path ON distinct_clips (path)")
    found("CREATE INDEX notes_by_path ON notes (code, path)")
    found.add_samples(args, factor)
    report = {
        "arguments": dataclasses.asdict(args),
        "objective": own.objective,
        "checked": "every frame decoded" if own.decode else "containers read, nothing decoded (--decode True does)",
        "splits": {split: report_split(found, split, source, args, factor, launch["processes"])
                   for split, (source, _) in sources.items()},
        "files": report_files(found),
        "cache_gb": cache_bytes(found) / 1e9,
    }  # fmt: skip
    if own.gpu_memory_gb:
        report["memory"] = report_memory(found, args, own, launch, factor)
    report["would_fail"] = would_fail(report, args)
    show(report, own.listed)
    mv.write_json(Path(own.report), report)
    print(f"\nThe whole report: {own.report}")
    raise SystemExit(bool(report["would_fail"]))


if __name__ == "__main__":
    mv.run(main)
