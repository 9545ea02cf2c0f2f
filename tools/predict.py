"""Answer many-video records with a trained model, or see which videos an answer rests on.

    python tools/predict.py --model_id out --data_path test.json --image_folder videos/
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 tools/predict.py …

--model_id is a run's folder (a full model or an adapter), a merged model or a hub name. Sizes, frame rate, system
prompt and precision are those of the run's arguments.json, unless given here. What comes before a record's last
assistant turn is the prompt, and that turn the reference, unless `solution`, `answer`, `ground_truth` or `reference`
is beside it.

A classifier of train_cls.py gives classes with their probabilities, or numbers; its metrics where there are labels.

Answers go to --output_path as they come, one JSON object per line; the same command continues after a kill. What
cannot be answered has `error` instead of `prediction`. Beside it …_metrics.json. With --blank_each nothing is
generated: each line has the log-probability of the reference, and how much it falls when each video is blanked;
beside it a picture.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multivideo as mv

import matplotlib
import numpy as np
import torch
import transformers
from tqdm import tqdm

import train_cls
import train_grpo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Flags of the run that trained the model, which stand for what is not given here.
INHERITED = [
    "system_prompt", "chat_template_kwargs", "max_seq_length", "fps", "nframes", "min_frames", "max_frames",
    "image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels", "image_resized_width",
    "image_resized_height", "video_resized_width", "video_resized_height", "max_video_tokens", "bf16", "fp16",
    "pure_bf16", "bits", "quant_type", "double_quant", "video_reader",
]  # fmt: skip
USED = {
    "model_id",
    "cache_dir",
    "attn_implementation",
    "data_path",
    "image_folder",
    "on_long_sample",
    "on_bad_video",
    "decode_timeout",
    "dataloader_num_workers",
    "video_cache",
    "video_cache_limit_gb",
    "seed",
    "tf32",
    *INHERITED,
}
UNCHECKED = ("output_dir", "resume_from_checkpoint", "bits", "lora_enable")  # of training only


@dataclass
class AnswerArguments(mv.TrainingArguments):
    """The flags of training (sizes, precision, decoding count), and how answers are made."""

    base_model_id: str | None = mv.arg(None, "Base model of an adapter (default: the one that the adapter names).")
    max_new_tokens: int = mv.arg(256, "Most tokens of an answer.")
    temperature: float = mv.arg(0.0, "0: the likeliest token each time; above: sampled at this temperature.")
    top_k: int = mv.arg(0, "Sample among the K likeliest tokens only; 0: among all.")
    top_p: float = mv.arg(1.0, "Sample among the likeliest tokens that together have this probability.")
    min_p: float | None = mv.arg(None, "Sample among tokens at least this share as likely as the likeliest one.")
    repetition_penalty: float = mv.arg(1.0, "Above 1: tokens that prompt or answer already have are less likely.")

    def check(self, given):
        """What is wrong with the flags of answering."""
        wrong = [f"--{flag} {getattr(self, flag)}: must be above 0"
                 for flag in ("max_new_tokens", "repetition_penalty") if getattr(self, flag) <= 0]  # fmt: skip
        wrong += [f"--{flag} {getattr(self, flag)}: must be 0 or more" for flag in ("temperature", "top_k")
                  if getattr(self, flag) < 0]  # fmt: skip
        if not 0 < self.top_p <= 1:
            wrong.append(f"--top_p {self.top_p}: must be above 0, 1 at most")
        if not 0 <= (self.min_p or 0) <= 1:
            wrong.append(f"--min_p {self.min_p}: must lie between 0 and 1")
        if mv.launched_with("deepspeed") or mv.launched_with("fsdp"):
            wrong.append("answers need the whole model in each process: launch with accelerate_configs/ddp.yaml")
        return wrong


@dataclass
class PredictArguments(AnswerArguments):
    """Those, and which records are answered, and where."""

    output_path: str | None = mv.arg(None, "Answers, one JSON per line (default: in --model_id, predictions.jsonl).")
    batch_size: int = mv.arg(8, "Records answered together, per process.")
    limit: int | None = mv.arg(None, "Answer the first so many records only.")
    overwrite: bool = mv.arg(False, "Delete the answers that --output_path has already, whatever made them.")
    default_prompt: str | None = mv.arg(None, "Classifiers: prompt of records without one.")
    blank_each: bool = mv.arg(False, "Blank one video after the other and see how the reference's probability falls.")

    def check(self, given):
        """What is wrong with these flags."""
        wrong = [f"--{flag} {getattr(self, flag)}: must be above 0" for flag in ("batch_size", "limit")
                 if getattr(self, flag) is not None and getattr(self, flag) <= 0]  # fmt: skip
        return wrong + super().check(given)


def own_flags(arguments_class) -> set[str]:
    """Names of the flags that a tool adds to those of training."""
    return {flag.name for flag in dataclasses.fields(arguments_class)} - set(mv.TrainingArguments.__dataclass_fields__)


def inherited_flags(argv: list[str]) -> list[str]:
    """The words of the INHERITED flags that the run of --model_id was given and `argv` does not give itself."""
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    words = [word.split("=", 1)[-1] if "=" in word else following for word, following in zip(argv, [*argv[1:], ""])
             if re.match(r"--model[_-]id(=|$)", word)]  # fmt: skip
    folder = Path(words[-1]) if words else None
    run, flags = mv.run_arguments(folder) if folder and folder.is_dir() else None, []
    if run is None:
        return []
    if {"fps", "nframes"} & given:  # either of them replaces both
        given |= {"fps", "nframes"}
    for name in INHERITED:
        default = mv.TrainingArguments.__dataclass_fields__[name].default
        if name not in given and name in run and run[name] not in (None, default):
            flags += [f"--{name}={run[name]}"]
    print(f"settings of the run that trained {folder}: {' '.join(flags) or 'the defaults'}", file=sys.stderr)
    return flags


def normalize_record(record: dict, where: str) -> dict:
    """A prompt and, if the record has one, its reference answer, in the schema of train_grpo.FEATURES.

    The prompt is all before an assistant turn at the end, and that turn the reference, unless the record has one of
    train_grpo.REFERENCES; of a record with `prompt`, and of other projects' forms, they are those of
    train_grpo.normalize_record.
    """
    record = mv.rename_fields(record, where)
    if isinstance(record, dict) and record.get("prompt") is not None:
        return train_grpo.normalize_record(record, where)
    row = mv.normalize_conversation(record, where)
    *before, last = row["messages"]
    reference = train_grpo.reference_beside(record, where)
    if last["role"] == "assistant":
        answer = "".join(part["text"] or "" for part in last["content"])
        reference = answer if reference is None else reference
        if any(part["type"] != "text" for part in last["content"]):
            raise ValueError(f"{where}: a video or image in the last answer: put it into the turn before")
    else:
        before.append(last)
    return {**row, "messages": before, "completions": [], "prompt": None, "reference": reference, "columns": "{}",
            "column_names": [], "left_out": 0}  # fmt: skip


def normalize_with_answer(record: dict, where: str) -> dict:
    """The same with the reference behind the prompt, for its log-probability."""
    row = normalize_record(record, where)
    if row["reference"] is None:
        raise ValueError(
            f"{where}: --blank_each needs a reference answer: end with an assistant ('gpt') turn, or add "
            f"one of the fields {', '.join(train_grpo.REFERENCES)}"
        )
    part = {**dict.fromkeys(mv.PART), "type": "text", "files": [], "text": row["reference"]}
    return {**row, "completions": [[{"role": "assistant", "content": [part]}]]}


def normalize_for_classes(record: dict, where: str, problem_type: str, default_prompt: str | None) -> dict:
    """A prompt of train_cls.py with its label, which may be missing: `label` and `target` are empty then."""
    if not isinstance(record, dict) or any(record.get(key) is not None for key in ("label", "labels")):
        return train_cls.normalize_record(record, where, problem_type, default_prompt)
    stand_in = {train_cls.SINGLE: "none", train_cls.MULTI: ["none"], train_cls.REGRESSION: 0.0}[problem_type]
    row = train_cls.normalize_record({**record, "label": stand_in}, where, problem_type, default_prompt)
    return {**row, "label": [], "target": []}


def classifier_config(args: AnswerArguments):
    """The config of --model_id if it is a classifier of train_cls.py, or an adapter of one, else None."""
    folder = Path(args.model_id)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None  # an adapter of a language model
    mv.find_model(args.model_id, args.cache_dir)
    config = transformers.AutoConfig.from_pretrained(args.model_id, cache_dir=args.cache_dir)
    adapter = (folder / "adapter_config.json").is_file()
    named = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    return config if (adapter or named) and config.model_type in mv.FAMILIES else None


def base_model(args: AnswerArguments) -> str | None:
    """The base model of the adapter in --model_id; None if that is a model itself.

    Raises:
        InputError: it is a folder that does not exist any more.
    """
    adapter = Path(args.model_id) / "adapter_config.json"
    if not adapter.is_file():
        return None
    base = args.base_model_id or json.loads(adapter.read_text())["base_model_name_or_path"]
    if os.path.isabs(base) and not Path(base).is_dir():
        raise mv.InputError(f"the adapter's base model {base} is gone: say where with --base_model_id")
    mv.find_model(base, args.cache_dir)
    return base


def weights_of(args: AnswerArguments) -> dict[str, list[str]]:
    """What the weights of --model_id are now, and those of an adapter's base: see mv.weights_identity."""
    folders = [folder for folder in (args.model_id, base_model(args)) if folder]
    return {folder: mv.weights_identity(folder, args.cache_dir) for folder in folders}


def load_model(args: AnswerArguments, device, config=None):
    """The model of --model_id, with its adapter if it is one; sets --model_id to the base model then.

    `config` is that of a classifier, None for a language model.
    """
    mv.warn_of_old_positions("model_id", args.model_id)
    base = base_model(args)
    folder = args.model_id if base else None
    args.model_id = base or args.model_id
    low = torch.bfloat16 if args.pure_bf16 else mv.autocast_dtype(args)
    quantization = mv.quantization(args, low, device) if folder else {}
    model_class = train_cls.classifier_class(config.model_type) if config else transformers.AutoModelForImageTextToText
    model = model_class.from_pretrained(
        args.model_id, cache_dir=args.cache_dir, dtype=low or "auto", attn_implementation="sdpa", **quantization,
        **({"config": config} if config else {}),
    )  # fmt: skip
    if folder:
        model, _ = mv.put_adapter(model, folder)
    mv.use_packed_attention(model, mv.attention_kernel(args, device))
    return model.to(device).eval() if not quantization else model.eval()


# ---------------------------------------------------------------------------------------------------------- answers


def answers(engine, samples: list[dict], indices: list[int], encoder, args) -> list[dict]:
    """What is told of each encoded prompt: prediction and its number of tokens, or an error."""
    options = SimpleNamespace(
        max_completion_length=args.max_new_tokens, per_device_train_batch_size=len(samples), top_k=args.top_k,
        top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty,
        temperature=args.temperature or 1.0, rollout_cache_gb=math.inf,
    )  # fmt: skip
    draws = [np.random.default_rng([args.seed, i]).random((1, args.max_new_tokens)) for i in indices]
    try:
        ids, _ = train_grpo.generate(engine, samples, encoder, options, draws if args.temperature else None)
    except torch.OutOfMemoryError:
        if len(samples) > 1:  # one after the other
            return [
                row for sample, i in zip(samples, indices) for row in answers(engine, [sample], [i], encoder, args)
            ]
        return [{"error": f"out of GPU memory at {samples[0]['num_tokens']} tokens: lower the sizes or --fps"}]
    stops = train_grpo.end_tokens(engine.raw_model, encoder)
    return [{"prediction": encoder.tokenizer.decode(tokens, skip_special_tokens=True), "new_tokens": len(tokens),
             "ended": tokens[-1] in stops} for (tokens,) in ids]  # fmt: skip


@torch.no_grad()
def blanked(engine, samples: list[dict], indices: list[int], encoder, args) -> list[dict]:
    """The reference's summed log-probability in nats, and how much it falls with each clip replaced by mean grey."""
    rows = []
    grey = np.repeat(np.array(encoder.image_mean) * 255, encoder.patch_dim // 3).round().astype(np.uint8)  # [1176]
    for sample in samples:
        ends = np.cumsum(sample["video_grid_thw"].prod(1)).tolist()
        variants = [sample]
        for start, end in zip([0, *ends], ends):
            patches = sample["patches"].copy()
            patches[start:end] = grey
            variants.append({**sample, "patches": patches})
        logps = []
        for k in range(0, len(variants), args.batch_size):
            part = variants[k : k + args.batch_size]
            inputs, targets, sequences = mv.pack(part, encoder, engine.accelerator.device)
            with engine.autocast():
                values = mv.token_logps(engine.raw_model(**inputs).logits, targets)
            logps += torch.zeros(len(part), device=values.device).index_add(0, sequences, values).tolist()
        prompt = int(sample["lengths"][0])  # the sample has the reference behind it
        falls = [logps[0] - logp for logp in logps[1:]]
        rows.append({"logp": logps[0], "falls": falls, "prompt_tokens": prompt})
    return rows


@torch.no_grad()
def classified(engine, samples: list[dict], indices: list[int], encoder, args) -> list[dict]:
    """What a classifier says of each encoded prompt, and its logits."""
    inputs, _, _ = mv.pack(samples, encoder, engine.accelerator.device)
    del inputs["logits_to_keep"]
    ends = np.cumsum([len(sample["input_ids"]) for sample in samples]) - 1
    inputs["pool_positions"] = torch.from_numpy(ends).to(engine.accelerator.device)
    with engine.autocast():
        logits = engine.raw_model(**inputs).logits.double().cpu().numpy()
    rows = train_cls.answers_of(logits, engine.raw_model.config)
    return [{**row, "logits": values} for row, values in zip(rows, logits.tolist())]


# ---------------------------------------------------------------------------------------------------------- metrics

NUMBER_AND_UNIT = re.compile(rf"\W*?{train_grpo.NUMBER.pattern}\s*[^\W\d]*\W*")


def metrics_of(rows: list[dict]) -> dict:
    """Means over the answers that have a reference; a metric that no reference fits is left out.

    exact_match: the same text; normalized_match: but for case, spaces and outer punctuation (train_grpo's accuracy);
    choice_accuracy: references that name a letter; numeric_mae: references that are a number, with or without a unit,
    against the answer's last number (answers without one are counted in numeric_missing); rouge_l: F1 of words.
    Thoughts (<think>…</think>) are not compared.
    """
    answered = [row for row in rows if "prediction" in row]
    told = {"records": len(rows), "errors": len(rows) - len(answered)}
    pairs = [(train_grpo.without_thoughts(row["prediction"]), train_grpo.without_thoughts(row["reference"]))
             for row in answered if row["reference"] is not None]  # fmt: skip
    if not pairs:
        return told
    texts, references = zip(*pairs)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    found = {
        "exact_match": [float(text == reference) for text, reference in pairs],
        "normalized_match": train_grpo.accuracy_reward(texts, references),
        "choice_accuracy": train_grpo.choice_reward(texts, references),
        "rouge_l": [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs],
    }
    errors, missing = [], 0
    for text, reference in pairs:
        if NUMBER_AND_UNIT.fullmatch(train_grpo.final_answer(reference)):
            target, *_ = train_grpo.NUMBER.findall(reference)[-1]
            numbers = train_grpo.NUMBER.findall(train_grpo.final_answer(text))
            missing += not numbers
            errors += [abs(to_float(numbers[-1][0]) - to_float(target))] if numbers else []
    told["references"] = len(pairs)
    for name, values in found.items():
        values = [value for value in values if value is not None]
        if values:
            told[name] = sum(values) / len(values)
    if errors or missing:
        told |= {"numeric_mae": sum(errors) / len(errors) if errors else None, "numeric_missing": missing}
    return told


def to_float(text: str) -> float:
    """A number as NUMBER finds it."""
    return float(text.replace(",", "").replace("−", "-"))


def class_metrics(rows: list[dict], records, config, source: str) -> dict:
    """The metrics of train_cls.py over the rows whose records have a label."""
    told = {"records": len(rows), "errors": sum("error" in row for row in rows)}
    labelled = [row for row in rows if "logits" in row and row["label"] is not None]
    if not labelled:
        return told
    records = records.select([row["index"] for row in labelled])
    train_cls.check_records(records, config, source)
    result, _ = train_cls.judge_logits(records, np.array([row["logits"] for row in labelled]), config)
    return told | {"labelled": len(labelled)} | {key.removeprefix("eval_"): value for key, value in result.items()}


def fall_shares(rows: list[dict]) -> list[list[float]]:
    """Each record's falls against its own mean: 1 is what its videos would lose if all mattered alike.

    A long record's answer rests less on each of its videos than a short one's, and only long ones have late places: a
    mean in nats falls with the place for that reason alone. The divisor is the mean size of a fall, which keeps signs
    and cannot be near 0 unless all are.
    """
    return [(falls / max(np.abs(falls).mean(), 1e-9)).tolist() for falls in (np.array(row["falls"]) for row in rows)]


def draw_falls(rows: list[dict], picture: Path) -> list[dict]:
    """The table of --blank_each, one row per place in the sample (per file for one record), and its bars as a PNG."""
    table, shares = [], fall_shares(rows)
    for k in range(max(len(row["falls"]) for row in rows)):
        falls = [row["falls"][k] for row in rows if len(row["falls"]) > k]
        share = np.mean([values[k] for values in shares if len(values) > k])
        first = sum(int(np.argmax(row["falls"])) == k for row in rows if len(row["falls"]) > k)
        name = Path(rows[0]["files"][k]).name if len(rows) == 1 else str(k + 1)
        table.append({"video": name, "mean_fall": float(np.mean(falls)), "mean_share": float(share),
                      "records": len(falls), "largest_in": first})  # fmt: skip
    mixed = len({len(row["falls"]) for row in rows}) > 1  # nats of other places are of other records
    figure, axes = plt.subplots(figsize=(max(5, 0.32 * len(table) + 2), 4), layout="constrained")
    axes.bar(range(len(table)), [row["mean_share" if mixed else "mean_fall"] for row in table], color="#2a78d6")
    names, rotation = [row["video"] for row in table], 90 if len(rows) == 1 else 0
    if mixed:
        names = [f"{row['video']}\nn={row['records']}" for row in table]
        axes.axhline(1, color="#888", linewidth=0.8, linestyle="dotted")
    axes.set_xticks(range(len(table)), names, rotation=rotation, fontsize=8)
    axes.axhline(0, color="#888", linewidth=0.8)
    axes.set_xlabel("video" if len(rows) == 1 else "place of the video in the sample")
    axes.set_ylabel("fall / mean |fall| of its record" if mixed else "fall of log p(reference), nats")
    whose = mv.record_name(rows[0]["id"]) if len(rows) == 1 else f"mean of {len(rows)} records"
    axes.set_title(f"What the answer loses when one video is blanked ({whose})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return table


# ------------------------------------------------------------------------------------------------------------- main


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of ours; one torn by a kill is cut off."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        aside = path.with_name(f".{path.name}.aside")
        aside.write_bytes(b"".join(lines))
        os.replace(aside, path)
    return [json.loads(line) for line in lines]


def files_crc32(record: dict, args) -> int:
    """Checksum of what a record's videos and images are now: paths, sizes and times of change."""
    paths = [os.path.join(args.image_folder, path) for path in mv.record_files(record)]
    return zlib.crc32(json.dumps([(path, mv._file_state(path)) for path in paths]).encode())


def main():
    argv = sys.argv[1:]
    args = mv.parse_arguments(
        PredictArguments, inherited_flags(argv) + argv, UNCHECKED, own_flags(PredictArguments) | USED
    )
    config = classifier_config(args)
    folder = Path(args.model_id) if Path(args.model_id).is_dir() else Path()
    name = (
        f"predictions_{Path(args.data_path).stem}.jsonl" if config else "predictions.jsonl"
    )  # training wrote that one
    output = Path(args.output_path or folder / name)
    output.parent.mkdir(parents=True, exist_ok=True)
    args.output_dir = str(output.parent)  # of bad_videos.jsonl
    args.on_long_sample = "skip"  # each becomes an error of its record
    args.on_bad_video = "drop_sample" if args.on_bad_video == "error" else args.on_bad_video
    args.image_folder = args.image_folder or mv.data_folder(args.data_path)
    accelerator = mv.make_accelerator(args)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if config and args.blank_each:
        raise mv.InputError("--blank_each is for answers in words: a classifier has none")
    encoder = mv.Encoder(base_model(args) or args.model_id, args)
    mv.warn_of_other_layout("model_id", args.model_id, encoder)
    normalize, schema = normalize_with_answer if args.blank_each else normalize_record, train_grpo.FEATURES
    if config:
        rules = {"problem_type": config.problem_type, "default_prompt": args.default_prompt}
        normalize, schema = functools.partial(normalize_for_classes, **rules), train_cls.FEATURES
    with accelerator.main_process_first():
        records = mv.load_records(args.data_path, normalize, schema, encoder=encoder)
    names = [*INHERITED, "model_id", "base_model_id", "image_folder", "max_new_tokens", "seed", "temperature", "top_k",
             "top_p", "min_p", "repetition_penalty", "blank_each"]  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    settings |= {"records and the code that reads them": records._fingerprint, "position_rule": mv.POSITION_RULE,
                 "weights": weights_of(args)}  # fmt: skip

    # ---- what has been answered already
    settings_path = output.with_name(f"{output.stem}_settings.json")
    parts = sorted(output.parent.glob(f"{output.name}.part-*"))  # of several processes
    if args.overwrite:
        if accelerator.is_main_process:
            for path in (settings_path, output, *parts):
                path.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        parts = []
    if settings_path.is_file() and (output.is_file() or parts):
        before = json.loads(settings_path.read_text())
        if changed := [f"{key}: {before.get(key)} then, {value} now" for key, value in settings.items()
                       if before.get(key) != value]:  # fmt: skip
            raise mv.InputError(f"{output} has answers of other settings:\n  • " + "\n  • ".join(changed)
                                + "\nName another --output_path, or give --overwrite True")  # fmt: skip
    elif output.is_file():
        raise mv.InputError(f"{output} exists and is not of this tool: name another --output_path")
    with accelerator.main_process_first():  # it cuts off what a kill has torn
        rows = [row for path in (output, *parts) for row in read_lines(path)]
        done = {row["index"] for row in rows if row["files_crc32"] == files_crc32(records[row["index"]], args)}
        if accelerator.is_main_process:
            mv.write_json(settings_path, settings)
    accelerator.wait_for_everyone()  # all know the same answers before any writes another
    total = min(len(records), args.limit or len(records))
    todo = [i for i in range(total) if i not in done]
    changed = len({row["index"] for row in rows} & set(todo))
    again = f", {changed} of them again: their videos or images have changed" if changed else ""
    mv.say(f"{total - len(todo)} reused, {len(todo)} new{again}: {output}")
    mine = todo[rank::world_size]
    own_path = output if world_size == 1 else output.with_name(f"{output.name}.part-{rank}")
    own_path.touch()

    # ---- answer
    model = load_model(args, accelerator.device, config)
    engine = mv.Engine(accelerator, model, args, frozen=True)
    stream = mv.SampleStream(encoder, args)
    batches = [mine[k : k + args.batch_size] for k in range(0, len(mine), args.batch_size)]
    tell = classified if config else blanked if args.blank_each else answers
    bar = tqdm(total=total, initial=total - len(todo), desc="answers", disable=not accelerator.is_main_process)
    started, tokens = time.perf_counter(), 0
    for indices, samples in zip(batches, stream.batches(records, batches, args.image_folder)):
        kept = [(sample, i) for sample, i in zip(samples, indices) if "input_ids" in sample]
        told = dict(zip((i for _, i in kept), tell(engine, *map(list, zip(*kept)), encoder, args))) if kept else {}
        for sample, i in zip(samples, indices):
            row = {"index": i, "id": sample["id"], "files_crc32": files_crc32(records[i], args)}
            if config:
                truth = records[i]["label"] or records[i]["target"]
                row["label"] = (
                    truth[0] if len(truth) == 1 and config.problem_type != train_cls.MULTI else truth
                ) or None
            else:
                row["reference"] = records[i]["reference"]
            reason = "; ".join(f"{file}: {why}" for file, why in sample["bad"])
            if i not in told:
                too_long = f"{sample['num_tokens']} tokens, --max_seq_length is {args.max_seq_length}"
                row["error"] = reason or too_long
            else:
                row |= {"prompt_tokens": sample["num_tokens"], "videos": sample["num_videos"], **told[i]}
                row |= {"left_out": reason} if reason else {}
                tokens += told[i].get("new_tokens", sample["num_tokens"])
                if args.blank_each:
                    bad = {file for file, _ in sample["bad"]}
                    clips = [p for turn in records[i]["messages"] for p in turn["content"] if p["type"] != "text"]
                    files = [p["files"][0] for p in clips]
                    row["files"] = [f for f in files if os.path.join(args.image_folder, f) not in bad]
            mv.append_jsonl(own_path, row)
        bar.update(min(len(indices) * world_size, total - bar.n))
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s per process")
    bar.close()
    stream.close()

    # ---- one file in the records' order, and what it says
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        parts = sorted(output.parent.glob(f"{output.name}.part-*"))
        rows = {row["index"]: row for path in (output, *parts) for row in read_lines(path)}
        rows = [rows[i] for i in sorted(rows)]
        aside = output.with_name(f".{output.name}.aside")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, output)
        for path in parts:
            path.unlink()
        for reason, count in Counter(row["error"] for row in rows if "error" in row).most_common(5):
            print(f"not answered, {count} records: {reason}", file=sys.stderr)
        if args.blank_each:
            picture = output.with_suffix(".png")
            good = [row for row in rows if row.get("falls")]
            if not good:
                raise mv.InputError(f"{output}: no record has a video that could be blanked")
            table = draw_falls(good, picture)
            print(f"{'video':>24} {'mean fall, nats':>16} {'/ own mean':>11} {'largest in':>11} {'records':>8}")
            for row in table:
                name, fall, share = row["video"][-24:], row["mean_fall"], row["mean_share"]
                print(f"{name:>24} {fall:>16.4f} {share:>11.3f} {row['largest_in']:>11} {row['records']:>8}")
            print(f"picture: {picture}")
        else:
            metrics = class_metrics(rows, records, config, args.data_path) if config else metrics_of(rows)
            mv.write_json(output.with_name(f"{output.stem}_metrics.json"), metrics)
            print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in metrics.items() if isinstance(value, (int, float))))  # fmt: skip
        print(f"answers: {output}")
    accelerator.end_training()


if __name__ == "__main__":
    mv.run(main)
