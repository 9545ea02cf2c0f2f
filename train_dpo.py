"""Preference tuning of Qwen-VL (DPO and its kin) on pairs of answers that share their many videos.

    loss = − log σ(β · (log p(chosen)/p_ref(chosen) − log p(rejected)/p_ref(rejected)))     averaged over all pairs

of the accumulation window on all processes; p_ref is the model as it was before training; --dpo_loss has nine more. A
pair is one row [prompt, chosen, rejected]: its videos are decoded once and go through the vision tower once, and the
answers do not see each other. Left out on purpose: padding, truncation, a Trainer class, logits of the prompt.

One record (JSON or JSONL; README.md has the other formats):
    {"id": "1", "video": ["a.mp4", "b.mp4"], "prompt": "<video>\\n<video>\\nWhat changed?",
     "chosen": "The colour.", "rejected": "Nothing."}

Launch, on a CPU or one GPU:
    accelerate launch --config_file accelerate_configs/cpu.yaml train_dpo.py \\
        --model_id demo/model --data_path demo/dpo_train.json --output_dir out
    accelerate launch --config_file accelerate_configs/one_gpu.yaml train_dpo.py \\
        --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path pairs.json --image_folder videos/ --bf16 True \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --output_dir out
"""

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import multivideo as mv

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

FEATURES = pa.schema([*mv.CONVERSATION, ("completions", pa.list_(mv.MESSAGES))])  # a pair: chosen, rejected
DPO_LOSSES = ["sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "sft"]
METRICS = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected"]  # fmt: skip
REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class DPOArguments(mv.TrainingArguments):
    """The shared flags, and those of preference tuning. Names and defaults are TRL's."""

    beta: float = mv.arg(0.1, "How closely the model is held to the reference: higher is closer (of ipo: τ).")
    dpo_loss: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One loss or several, which are added up.", "choices": DPO_LOSSES,
                  "aliases": ["--loss_type", "--loss-type"]},
    )  # fmt: skip
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of --dpo_loss (default: 1 for each)."}
    )
    label_smoothing: float = mv.arg(
        0.0, "Share of pairs whose answers may be swapped: for sigmoid, robust (both without it alike) and exo_pair."
    )
    ref_model_id: str | None = mv.arg(
        None,
        "Another model as the reference (default: the model as it is before training: with a new adapter and "
        "--lora_bias none the same weights, adapter off; else a frozen copy: 4 bytes per parameter, 2 under DeepSpeed "
        "in bf16, split under ZeRO-3 and FSDP2).",
    )
    precompute_ref_log_probs: bool = mv.arg(
        False,
        "Compute the reference's log-probabilities once, before training, which then needs no reference model. They "
        "are kept as ref_log_probs-*.safetensors; a break costs half a minute of them at most.",
    )
    ref_log_probs_dir: str | None = mv.arg(
        None, "Folder where they are kept and found again by later runs (default: --output_dir)."
    )
    learning_rate: float = mv.arg(1e-6, "Peak learning rate.")
    lora_dropout: float = mv.arg(
        0.0, "Share of an adapter's inputs that is dropped in training: noise in the margins."
    )

    def objective(self) -> str:
        """For the model card."""
        return f"preference tuning (DPO), loss {' + '.join(self.dpo_loss)}, beta {self.beta:g}"

    def check(self, given: set[str]) -> list[str]:
        """What is wrong with these flags, as sentences that name the mend."""
        problems = []

        def complain(condition, sentence):
            if condition:
                problems.append(sentence)

        names, weights = self.dpo_loss, self.loss_weights
        smoothed = {"sigmoid", "robust", "exo_pair"} & set(names)
        complain(not self.beta > 0, f"--beta {self.beta}: must be above 0")
        complain(len(set(names)) < len(names), f"--dpo_loss {' '.join(names)}: name each loss once")
        complain(weights is not None and len(weights) != len(names),
                 f"--loss_weights has {len(weights or [])} numbers for {len(names)} of --dpo_loss: "
                 "give one for each")  # fmt: skip
        complain(weights is not None and not (all(map(math.isfinite, weights)) and any(weights)),
                 f"--loss_weights {weights}: must be finite numbers, not all 0")  # fmt: skip
        complain(not 0 <= self.label_smoothing < 0.5,
                 f"--label_smoothing {self.label_smoothing}: must be 0 or more and below 0.5")  # fmt: skip
        complain(self.label_smoothing and not smoothed,
                 "--label_smoothing means something for sigmoid, robust and exo_pair only: drop it")  # fmt: skip
        complain("exo_pair" in names and self.label_smoothing == 0,
                 "--dpo_loss exo_pair takes the log of --label_smoothing: give 1e-3 (the paper's) or so")  # fmt: skip
        complain(self.ref_log_probs_dir and not self.precompute_ref_log_probs,
                 "--ref_log_probs_dir needs --precompute_ref_log_probs True")  # fmt: skip
        complain(Path(self.ref_log_probs_dir or ".").is_file(),
                 f"--ref_log_probs_dir {self.ref_log_probs_dir} is a file: name a folder")  # fmt: skip
        folder = Path(self.ref_model_id or ".")
        complain(self.ref_model_id and mv.looks_local(self.ref_model_id) and not folder.is_dir(),
                 f"--ref_model_id {self.ref_model_id}: no such folder")  # fmt: skip
        if self.ref_model_id and folder.is_dir() and not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            problems.append(
                f"--ref_model_id {folder} is no model: "
                + ("merge that adapter into its base first" if adapter else "no config.json there")
            )
        return problems


def dpo_loss(
    name: str, logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """The loss `name` of each pair; all are to be averaged over pairs, but sft over the tokens of the chosen answers.

    Log-probabilities of whole answers in nats under the model and the reference, and their lengths in tokens, each
    [N, 2] (chosen, rejected) → [N]. Adding a loss is two lines here (its condition, its formula) and its name in
    DPO_LOSSES. All but the smoothing of sigmoid are those of TRL 1.16.
    """
    chosen, rejected = (logps - ref_logps).unbind(1)  # log-ratios; times β: the implicit rewards
    margin = beta * (chosen - rejected)
    if name == "sigmoid":  # DPO, arXiv:2305.18290 eq. 7; smoothed: cDPO, ericmitchell.ai/cdpo.pdf eq. 3
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if name == "ipo":  # IPO, arXiv:2310.12036 eq. 17, with log-ratios per token as its authors computed them; β is τ
        return (chosen / lengths[:, 0] - rejected / lengths[:, 1] - 1 / (2 * beta)) ** 2
    if name == "hinge":  # SLiC's hinge on log-ratios, arXiv:2309.06657
        return F.relu(1 - margin)
    if name == "robust":  # Robust DPO, arXiv:2403.00409: unbiased if this share of the pairs is swapped
        clean, swapped = F.logsigmoid(margin), F.logsigmoid(-margin)
        return (label_smoothing * swapped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)
    if name == "exo_pair":  # EXO, arXiv:2402.00856 eq. 16: KL(softmax of the rewards ‖ (1 − ε, ε))
        return (torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
                + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing)))  # fmt: skip
    if name == "nca_pair":  # NCA, arXiv:2402.05369 with two answers and a hard preference
        return -F.logsigmoid(beta * chosen) - (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)) / 2
    if name == "sppo_hard":  # SPPO, arXiv:2405.00675 eq. 4.7 with P = 1 for chosen and 0 for rejected
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    if name == "apo_zero":  # APO, arXiv:2408.06266 eq. 7: chosen up, rejected down
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    if name == "apo_down":  # APO, arXiv:2408.06266 eq. 8: both down, rejected more (the model is better than both)
        return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(margin)
    if name == "sft":  # negative log-likelihood of the chosen answer
        return -logps[:, 0]
    raise ValueError(f"no loss {name!r}; known: {', '.join(DPO_LOSSES)}")


def answer_logps(logits: torch.Tensor, targets: torch.Tensor, sequences: torch.Tensor, pairs: int):
    """Log-probability and length of each answer: logits [1, S, V], targets and sequences [S] → two of [pairs, 2]."""
    zeros = torch.zeros(2 * pairs, device=logits.device)
    token_logps = mv.token_logps(logits, targets)
    logps = zeros.index_add(0, sequences, token_logps)
    lengths = zeros.index_add(0, sequences, torch.ones_like(token_logps))
    return logps.view(pairs, 2), lengths.view(pairs, 2)


def chosen_tokens(sample: dict) -> int:
    """Supervised tokens of an encoded pair's chosen answer."""
    return int((sample["labels"][: sample["lengths"][:2].sum()] != -100).sum())


def loss_sums(logps, ref_logps, lengths, args: DPOArguments) -> torch.Tensor:
    """Each loss of --dpo_loss, summed over the pairs of a row: three of [N, 2] → [losses]."""
    losses = [dpo_loss(name, logps, ref_logps, lengths, args.beta, args.label_smoothing) for name in args.dpo_loss]
    return torch.stack(losses).sum(1)


def loss_scales(args: DPOArguments, pairs: int, chosen_tokens: int) -> list[float]:
    """What each sum of loss_sums is multiplied by: its weight / number of pairs, of sft: of chosen tokens."""
    weights = args.loss_weights or [1.0] * len(args.dpo_loss)
    counts = [chosen_tokens if name == "sft" else pairs for name in args.dpo_loss]
    return [weight / max(count, 1) for weight, count in zip(weights, counts)]


def metric_sums(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """METRICS summed over the pairs of a row: two of [N, 2] → [6]. Rewards are β times log-ratios."""
    chosen, rejected = (beta * (logps - ref_logps)).unbind(1)
    margins = chosen - rejected
    right = (margins > 0).float().where(~margins.isnan(), math.nan)
    return torch.stack([chosen, rejected, right, margins, *logps.unbind(1)]).sum(1)


def normalize_record(record: dict, where: str) -> dict:
    """Two answers to one prompt, as `{"id", "messages", "completions": [chosen, rejected]}` of the schema FEATURES.

    Read as well: ms-swift's `rejected_response`, and the prompts of mv.rename_fields.

    `chosen` and `rejected` are texts, or turns that follow the `prompt` (a text or turns, which `messages` or
    `conversations` may hold as well), or without it whole conversations, whose common leading turns are the prompt.

    Raises:
        ValueError: names the record, the field, what was found, what was expected and the mend.
    """
    if not isinstance(record, dict):
        return mv.normalize_conversation(record, where)  # which refuses it
    record = mv.rename_fields(record, where)
    try:
        record = _with_rejected_response(record)
        mv.check_fields(record, ("chosen",), ("rejected",))
        answers = [_answer(record, name) for name in ("chosen", "rejected")]
        prompts = [name for name in ("prompt", "messages", "conversations") if record.get(name) is not None]
        if len(prompts) > 1:
            raise ValueError(f"fields {' and '.join(map(repr, prompts))} are both there: keep the one with the prompt")
        prompt = record[prompts[0]] if prompts else None
        if all(_role(answer[0]) != "assistant" for answer in answers):
            answers, prompt = _split(answers, prompt)
        elif prompt is None:
            mv.check_fields(record, ("prompt", "messages", "conversations"))
            raise ValueError("field 'prompt' is missing: give it, or begin 'chosen' and 'rejected' with its turns")
        prompt = mv.prompt_turns(prompt)
        completions = [_completion(answer, name) for answer, name in zip(answers, ("chosen", "rejected"))]
        if completions[0] == completions[1]:
            raise ValueError("'chosen' and 'rejected' are the same, so there is nothing to learn: drop the record")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected", *prompts)}
    row = mv.normalize_conversation({**rest, "messages": prompt}, where)
    if row["messages"][-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}: the prompt must end with a user turn, got {row['messages'][-1]['role']!r}")
    return {**row, "completions": completions}


def _with_rejected_response(record):
    """ms-swift's pairs: `rejected_response` beside `response` or turns that end with the chosen answer."""
    if record.get("rejected_response") is None:
        return record
    if both := [key for key in ("chosen", "rejected") if record.get(key) is not None]:
        raise ValueError(f"fields 'rejected_response' and {both[0]!r} are both there: keep one form of the pair")
    rest = {key: value for key, value in record.items() if key not in ("completion", "rejected_response")}
    chosen = record.get("completion")
    for key in ("messages", "conversations"):
        turns = record.get(key)
        if chosen is None and isinstance(turns, (list, tuple)) and len(turns) > 1 and isinstance(turns[-1], dict):
            rest[key], chosen = list(turns[:-1]), [turns[-1]]
    if chosen is None:
        raise ValueError("field 'rejected_response' without the chosen answer: expected 'response', or turns that end "
                         "with it")  # fmt: skip
    return {**rest, "chosen": chosen, "rejected": record["rejected_response"]}


def _role(turn):
    role = next((turn[key] for key in ("from", "role") if turn.get(key) is not None), None)
    return mv.ROLES.get(role) if isinstance(role, str) else role


def _answer(record, name):
    """The field `chosen` or `rejected` as a list of turns, not yet looked into."""
    value = record.get(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name!r}: expected the answer, a text or a list of turns, got {value!r:.80}")
    return list(turns)


def _split(answers, prompt):
    """Whole conversations → (what follows their common leading turns, these turns)."""
    chosen, rejected = answers
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if not shared:
        raise ValueError("'chosen' and 'rejected' do not begin with the same turn: give what both answer as 'prompt'")
    if isinstance(prompt, str) and prompt not in (chosen[shared - 1].get("content"), chosen[shared - 1].get("value")):
        raise ValueError("'prompt' is not the turn that 'chosen' and 'rejected' share last: drop one of them")
    if isinstance(prompt, (list, tuple)):
        raise ValueError("'prompt' is there, so 'chosen' and 'rejected' must begin with an assistant ('gpt') turn, "
                         f"got {_role(chosen[0])!r} and {_role(rejected[0])!r}")  # fmt: skip
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if len(answer) == shared:
            raise ValueError(f"{name!r} has no turn of its own: all {shared} are in the other answer too")
    return [chosen[shared:], rejected[shared:]], chosen[:shared]


def _completion(turns, name):
    """The turns of one answer in the schema: text only, from an assistant turn to an assistant turn."""
    try:
        turns = [mv.normalize_turn(turn, i) for i, turn in enumerate(turns)]
        turns = [{**turn, "content": mv.plain_text(turn["content"], tags=True)} for turn in turns]
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    for i, turn in enumerate(turns):
        if any(part["type"] != "text" for part in turn["content"]):
            raise ValueError(f"{name!r}: turn {i} holds a video or image: they belong in the prompt, which both "
                             "answers share")  # fmt: skip
        before = turns[i - 1]["role"] if i else "user"
        may_follow = {"assistant": ("user", "tool"), "tool": ("assistant", "tool"), "user": ("assistant",)}
        if before not in may_follow.get(turn["role"], ()):
            raise ValueError(f"{name!r}: turn {i} is of {turn['role']!r}; assistant and user turns must alternate, "
                             "the assistant's first")  # fmt: skip
        if turn["role"] == "assistant" and not mv.says_something(turn):
            raise ValueError(f"{name!r}: an assistant ('gpt') turn without text: write the answer or drop the record")
    if all(turn.get("train") is False for turn in turns if turn["role"] == "assistant"):
        raise ValueError(f"{name!r}: no answer in it is learned, all have 'loss': false: drop the record")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{name!r}: the last turn must be the assistant's, got {turns[-1]['role']!r}")
    return turns


# -------------------------------------------------------------------------------------------------------- reference


def check_reference(args: DPOArguments, encoder: mv.Encoder):
    """Make sure that the model of --ref_model_id reads the same tokens, patches and positions as the trained one.

    Raises:
        InputError: says what differs.
    """
    mv.find_model(args.ref_model_id, args.cache_dir)
    config = transformers.AutoConfig.from_pretrained(args.ref_model_id, cache_dir=args.cache_dir)
    differ = ["model_type"] if config.model_type != encoder.config.model_type else []
    names = ["patch_size", "temporal_patch_size", "spatial_merge_size", "tokens_per_second"]
    differ += [name for name in names if getattr(config.vision_config, name, None)
               != getattr(encoder.config.vision_config, name, None)]  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.ref_model_id, cache_dir=args.cache_dir)
    differ += ["the tokenizer's vocabulary"] if tokenizer.get_vocab() != encoder.tokenizer.get_vocab() else []
    if differ:
        raise mv.InputError(f"--ref_model_id {args.ref_model_id} cannot judge --model_id {args.model_id}, it differs "
                            f"in {', '.join(differ)}: take a model of the same family")  # fmt: skip


def frozen_copy_of(args: DPOArguments) -> str | None:
    """The model that a run loads a frozen copy of, beside the trained one, as its reference; None: no copy."""
    if args.precompute_ref_log_probs or (mv.adapter_off_is_start(args) and not args.ref_model_id):
        return None
    return args.ref_model_id or args.model_id


def load_reference(args: DPOArguments, device):
    """The model as it is before training, or --ref_model_id, in the types of the trained one: the same numbers."""
    own = replace(args, model_id=args.ref_model_id or args.model_id, gradient_checkpointing=False,
                  lora_weight_path=None if args.ref_model_id else args.lora_weight_path)  # fmt: skip
    if not own.lora_weight_path:  # an adapter that decides the types, and is taken off again
        own = replace(own, lora_namespan_exclude="['lm_head', 'embed_tokens']", num_lora_modules=1, use_dora=False)
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):  # adapters begin at random
        model = mv.load_model(own, device)
    return model.unload() if args.lora_enable and not own.lora_weight_path else model


def checksum(sample: dict) -> int:
    """CRC-32 of an encoded sample: its tokens, positions and pixels; 0 for one that was too long."""
    names = ("input_ids", "labels", "lengths", "position_ids", "video_grid_thw", "patches")
    crc = 0
    for name in names if "input_ids" in sample else ():
        crc = zlib.crc32(np.ascontiguousarray(sample[name]), crc)
    return crc


def comparable(reference, indices: list[int], samples: list[dict]) -> list[dict]:
    """The samples of a row, less those of which a file has gone bad since the reference's table was computed.

    Raises:
        InputError: a sample is another one than the table was computed for, and not for that reason.
    """
    samples = list(samples)
    for k, (i, sample) in enumerate(zip(indices, samples)):
        if isinstance(reference, dict) and "input_ids" in sample and int(reference["crc32"][i]) != checksum(sample):
            if not sample["bad"]:
                raise mv.InputError(f"{mv.record_name(sample['id'])}: its tokens, positions or frames differ from "
                                    "those that the reference log-probabilities were computed from: a video or "
                                    "image file has changed since, or the code that encodes it; delete the "
                                    "ref_log_probs-* file to compute them again")  # fmt: skip
            samples[k] = {key: value for key, value in sample.items() if key != "input_ids"}  # left out and counted
    return samples


@torch.no_grad()
def reference_logps(reference, row: tuple, indices: list[int], samples: list[dict]) -> torch.Tensor:
    """Log-probabilities of the answers of a packed row under the reference: [pairs, 2].

    The reference is a table of reference_tables, a frozen engine, or the trained one, whose adapter (and what is
    trained beside it) is then put aside. `indices` are the row's records, `samples` what they became.
    """
    inputs, targets, sequences = row
    kept = [i for i, sample in zip(indices, samples) if "input_ids" in sample]
    if isinstance(reference, dict):
        return torch.stack([reference[name][kept] for name in REF_LOGPS], 1).to(targets.device)
    model, training = reference.raw_model, reference.raw_model.training
    model.eval()  # no dropout, no checkpointing
    with contextlib.nullcontext() if reference.frozen else model.disable_adapter(), reference.autocast():
        logps, _ = answer_logps(reference.model(**inputs).logits, targets, sequences, len(kept))
    model.train(training)
    return logps


# Flags that change what a sample is made of, and so its log-probabilities.
SAMPLE_FLAGS = ["system_prompt", "max_seq_length", "fps", "nframes", "min_frames", "max_frames", "max_video_tokens",
                "bits", "quant_type", "double_quant",
                *(f"{kind}_{name}" for kind in ("image", "video")
                  for name in ("min_pixels", "max_pixels", "resized_width", "resized_height"))]  # fmt: skip
TYPE_FLAGS = ["freeze_llm", "freeze_merger", "freeze_vision_tower", "unfreeze_topk_llm", "unfreeze_topk_vision"]
SHARD_SECONDS = 30  # at most this much of the reference's work is lost in a break


def reference_settings(args: DPOArguments, data_path: str, folder: str, encoder: mv.Encoder, records) -> dict:
    """All that the reference's log-probabilities of a data set depend on: model, data and settings."""
    source = args.ref_model_id or args.model_id
    run = mv.run_identity(replace(args, model_id=source, data_path=data_path), encoder, records, 0)
    folders = [source] if args.ref_model_id or not args.lora_weight_path else [source, args.lora_weight_path]
    weights = {str(Path(folder).resolve()) if Path(folder).is_dir() else folder:
               mv.weights_identity(folder, args.cache_dir) for folder in folders}  # fmt: skip
    kept = {key: run[key] for key in ("model", "data file (SHA-256)", "records", "precision", "position rule")}
    # Under autocast frozen parts have another type than trained ones.
    flags = {flag: getattr(args, flag) for flag in SAMPLE_FLAGS + TYPE_FLAGS * bool(mv.autocast_dtype(args))}
    return {**kept, "weights": weights, "videos": str(Path(folder).resolve()), "launched with DeepSpeed":
            mv.launched_with("deepspeed"), **flags}  # fmt: skip


def find_table(path: Path, settings: dict) -> dict | None:
    """The table in a file that precompute wrote, if it is there and whole; else says why there is none."""
    try:
        table = load_file(path)
        mv.say(f"reference log-probabilities: {len(table['crc32'])} pairs reused from {path}, 0 to compute")
        return table
    except FileNotFoundError:
        others = [file for file in sorted(path.parent.iterdir()) if file.suffix == path.suffix
                  and file.name.startswith(path.name.rsplit("-", 1)[0] + "-")]  # fmt: skip
        for file in others:
            with contextlib.suppress(SafetensorError), safe_open(file, "pt") as opened:
                other = json.loads((opened.metadata() or {}).get("settings", "{}"))
                differ = [f"{key}: {other.get(key)} there, {value} here" for key, value in settings.items()
                          if other.get(key) != value]  # fmt: skip
                mv.say(f"{file} is not for this run; these differ:\n  • " + "\n  • ".join(differ))
    except SafetensorError as error:
        mv.say(f"{path} is damaged ({error}): it is computed again")
    return None


def write_tensors(path: Path, tensors: dict, settings: dict):
    """Write a safetensors file aside, then rename: the file is never half there."""
    aside = path.with_name(f".{path.name}.aside")
    mv.save_tensors(tensors, aside, {"settings": json.dumps(settings)})
    os.replace(aside, path)


def read_parts(folder: Path, table: dict):
    """Fill a table with the parts in a folder, which a computation has left there."""
    for file in sorted(folder.glob("[0-9]*.safetensors")):
        part = load_file(file)
        index = part.pop("index")
        for name, values in part.items():
            table[name][index] = values


def precompute(reference: mv.Engine, stream, records, folder: str, encoder, path: Path, settings: dict) -> dict | None:
    """Compute and write the table of a data set, which the main process returns: REF_LOGPS and `crc32` of [records].

    Each process writes what it has every SHARD_SECONDS; a computation that was broken off goes on from there, with any
    number of processes. Too many bad videos end it, as they end the training. Every process must call it.
    """
    accelerator, parts = reference.accelerator, path.with_suffix(".parts")
    rank, world_size, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    table = {"crc32": torch.full([len(records)], -1), **{name: torch.zeros(len(records)) for name in REF_LOGPS}}
    if is_main:
        read_parts(parts, table)
    (todo,) = broadcast_object_list([(table["crc32"] < 0).nonzero()[:, 0].tolist()])
    mv.say(f"reference log-probabilities: {len(records) - len(todo)} pairs reused, {len(todo)} to compute for {path}")
    rows = mv.micro_batches(todo, reference.args.per_device_eval_batch_size, rank, world_size)
    bar = tqdm(total=len(rows), desc="reference", disable=not is_main)
    done, written, state = [], time.monotonic(), {"bad_videos": 0, "all_videos": 0}
    for k, (indices, samples) in enumerate(zip(rows, stream.batches(records, rows, folder))):
        row = mv.pack(samples, encoder, accelerator.device)
        logps = iter(reference_logps(reference, row, indices, samples).tolist())
        done += [(i, checksum(sample), *(next(logps) if "input_ids" in sample else (0.0, 0.0)))
                 for i, sample in zip(indices, samples)]  # fmt: skip
        if done and (k == len(rows) - 1 or time.monotonic() > written + SHARD_SECONDS):
            columns = [torch.tensor(column) for column in zip(*done)]
            part = dict(zip(("index", "crc32", *REF_LOGPS), columns))
            parts.mkdir(exist_ok=True)
            write_tensors(parts / f"{done[0][0]}.safetensors", part, settings)
            done, written = [], time.monotonic()
        kept = [sample for sample in samples if "input_ids" in sample]
        counts = [sum(sample["num_videos"] for sample in kept), sum(sample["num_images"] for sample in kept),
                  sum(len(sample["bad"]) for sample in samples)]  # fmt: skip
        # The sum waits for all: none runs so far ahead that it would give up waiting at the end.
        counts = accelerator.reduce(torch.tensor(counts, device=accelerator.device)).tolist()
        counts = dict(zip(("videos", "images", "bad_videos"), counts))
        mv.check_bad_ratio(accelerator, reference.args, state, counts)
        bar.update()
    bar.close()
    if not is_main:
        return None
    read_parts(parts, table)
    if (table["crc32"] >= 0).all():
        write_tensors(path, table, settings)
    else:  # another run on the same data was faster, and took the parts away
        table = load_file(path)
    shutil.rmtree(parts, ignore_errors=True)
    return table


def reference_tables(accelerator, stream, data_sets, encoder, args: DPOArguments) -> list[dict | None]:
    """The reference's log-probabilities of each data set (records or None, path, folder), found or else computed."""
    reference, tables = None, []
    directory = Path(args.ref_log_probs_dir or args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for records, data_path, folder in data_sets:
        table = None
        if records is not None:
            settings = reference_settings(args, data_path, folder, encoder, records)
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            path = directory / f"ref_log_probs-{Path(data_path).stem}-{key}.safetensors"
            (table,) = broadcast_object_list([find_table(path, settings) if accelerator.is_main_process else None])
            if table is None:
                reference = reference or mv.Engine(accelerator, load_reference(args, accelerator.device), args, True)
                table = precompute(reference, stream, records, folder, encoder, path, settings)
            (table,) = broadcast_object_list([table])
        tables.append(table)
    del reference  # its memory is the trained model's now
    gc.collect()
    torch.cuda.empty_cache()
    return tables


@torch.no_grad()
def evaluate(engine, reference, stream, records, encoder, args, caught) -> dict | None:
    """Loss and METRICS over all of `records`: `{"eval_loss", "eval_rewards/chosen", …, "eval_tokens"}`.

    None if a process was asked to stop meanwhile.
    """
    model, accelerator = engine.model, engine.accelerator
    model.eval()
    rows = mv.micro_batches(list(range(len(records))), args.per_device_eval_batch_size,
                            accelerator.process_index, accelerator.num_processes)  # fmt: skip
    # pairs, tokens, tokens of the chosen answers, losses, metrics
    sums = torch.zeros(3 + len(args.dpo_loss) + len(METRICS), dtype=torch.float64, device=accelerator.device)
    bar = tqdm(total=len(rows), desc="eval", leave=False, disable=not accelerator.is_main_process)
    for indices, samples in zip(rows, stream.batches(records, rows, args.eval_image_folder)):
        if mv.stop_asked(accelerator, caught):
            return None
        samples = comparable(reference, indices, samples)
        inputs, targets, sequences = row = mv.pack(samples, encoder, accelerator.device)
        ref_logps = reference_logps(reference, row, indices, samples)
        with engine.autocast():
            logps, lengths = answer_logps(model(**inputs).logits, targets, sequences, len(ref_logps))
        counts = torch.tensor([len(ref_logps), len(targets), 0], device=sums.device)
        counts[2] = lengths[:, 0].sum()
        losses, metrics = loss_sums(logps, ref_logps, lengths, args), metric_sums(logps, ref_logps, args.beta)
        sums += torch.cat([counts, losses, metrics])
        bar.update()
    bar.close()
    model.train()
    pairs, tokens, chosen_tokens, *sums = accelerator.reduce(sums).tolist()
    if not pairs:
        return {"eval_samples": 0}
    scales = loss_scales(args, pairs, chosen_tokens)
    metrics = {f"eval_{name}": total / pairs for name, total in zip(METRICS, sums[len(scales) :])}
    loss = sum(total * scale for total, scale in zip(sums, scales))
    return {"eval_loss": loss, **metrics, "eval_samples": int(pairs), "eval_tokens": int(tokens)}


def main():
    args = mv.parse_arguments(DPOArguments)
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = mv.make_accelerator(args)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    output_dir, is_main = mv.make_output_dir(accelerator, args), accelerator.is_main_process
    metrics_path = output_dir / "metrics.jsonl"

    # ---- data: everything that can be wrong with it is said before any weight is loaded
    args.image_folder = args.image_folder or mv.data_folder(args.data_path)
    args.eval_image_folder = args.eval_image_folder or args.image_folder
    encoder = mv.Encoder(args.model_id, args)
    with accelerator.main_process_first():
        records = mv.load_records(args.data_path, normalize_record, FEATURES, encoder=encoder)
        eval_records = None
        if args.eval_path:
            eval_records = mv.load_records(args.eval_path, normalize_record, FEATURES, encoder=encoder)
    mv.check_files(accelerator, "data_path", records, args.image_folder, encoder)
    mv.check_files(accelerator, "eval_path", eval_records, args.eval_image_folder, encoder)
    stream = mv.SampleStream(encoder, args)
    batch_size, world_size = args.per_device_train_batch_size, accelerator.num_processes
    samples_per_step = batch_size * args.gradient_accumulation_steps * world_size
    total_steps = mv.count_steps(len(records), samples_per_step, args)

    # ---- reference: numbers from a file, a frozen model, or the trained one without its adapter
    if args.ref_model_id:
        check_reference(args, encoder)
    adapter_off = mv.adapter_off_is_start(args) and not args.ref_model_id
    reference = eval_reference = None
    if args.precompute_ref_log_probs:
        data_sets = [
            (records, args.data_path, args.image_folder),
            (eval_records, args.eval_path, args.eval_image_folder),
        ]
        reference, eval_reference = reference_tables(accelerator, stream, data_sets, encoder, args)
    elif frozen_copy_of(args):
        frozen = load_reference(args, accelerator.device)
        reference = eval_reference = mv.Engine(accelerator, frozen, args, frozen=True)

    # ---- model and optimizer
    resumed = mv.find_checkpoint(args)
    engine = mv.Engine(accelerator, mv.load_model(args, accelerator.device, resumed), args)
    model, raw_model = engine.model, engine.raw_model
    if reference is None:
        reference = eval_reference = engine

    # ---- resume: `state` is everything that is not a tensor
    state = {
        "step": 0, "samples_seen": 0, "bad_steps": 0, "bad_videos": 0, "all_videos": 0, "eval_due": False,
        "save_due": False, "best": None, "best_checkpoint": None, "evals_without_gain": 0,
        "run": mv.run_identity(args, encoder, records, samples_per_step),
    }  # fmt: skip
    state["run"]["reference"] = args.ref_model_id or args.lora_weight_path or args.model_id
    if resumed:
        state = mv.restore_checkpoint(resumed, engine, state)
    if is_main:
        for name in ("metrics.jsonl", "bad_steps.jsonl"):
            mv.cut_jsonl(output_dir / name, state)
        mv.write_json(output_dir / "arguments.json", {**asdict(args), **mv.conventions(encoder)})
    if trackers:
        config = {key: value for key, value in asdict(args).items() if isinstance(value, (int, float, str))}
        names = {"wandb": {"name": args.run_name}} if args.run_name else {}
        accelerator.init_trackers(output_dir.name, config, names)
    if is_main:
        mv.describe_run(args, raw_model, stream, records, total_steps, world_size)
    kind = "numbers of " if args.precompute_ref_log_probs else "the adapter off, " if adapter_off else "a frozen "
    mv.say(f"  reference  {kind}{state['run']['reference']}")

    # ---- the loop: evaluation and saving come first, so that a run stopped in one begins with it again
    windows = mv.step_windows(len(records), samples_per_step, args.seed, state["samples_seen"])
    windows = itertools.islice(windows, max(0, total_steps - state["step"]))
    rank = accelerator.process_index
    steps = stream.steps(records, windows, batch_size, rank, world_size, args.image_folder)
    bar = tqdm(total=total_steps, initial=state["step"], desc="train", disable=not is_main)
    model.train()
    caught, saved_step, stop = mv.catch_signals(), None, False
    while True:
        epoch = state["samples_seen"] / len(records)
        if state["eval_due"]:
            result = evaluate(engine, eval_reference, stream, eval_records, encoder, args, caught)
            if stop := result is None:
                break
            if not result["eval_samples"]:
                mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
                mv.stop_unevaluated(accelerator, args, eval_records)
            result = mv.finite_result(result)
            improved = mv.judge(state, result, args)
            state["eval_due"] = False
            state["save_due"] = state["save_due"] or (improved and args.load_best_model_at_end)
            if improved and state["save_due"]:
                state["best_checkpoint"] = f"checkpoint-{state['step']}"
            if is_main:
                mv.append_jsonl(metrics_path, {"step": state["step"], "epoch": round(epoch, 6), **result})
                bar.write(f"step {state['step']}: {mv.result_text(result)}")
            if trackers:
                accelerator.log(mv.numbers(result), state["step"])
        if state["save_due"]:
            state["save_due"], saved_step = False, state["step"]
            mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
        early = 0 < args.early_stopping_patience <= state["evals_without_gain"]
        if early or state["step"] >= total_steps:
            break

        # ---- data, and the exchange that keeps the processes together
        started = time.perf_counter()
        window, samples_seen, rows = next(steps)
        data_wait = time.perf_counter() - started
        mine = mv.micro_batches(window, batch_size, rank, world_size)
        rows = [comparable(reference, indices, samples) for indices, samples in zip(mine, rows)]
        encoded = [sample for samples in rows for sample in samples]
        kept = [sample for sample in encoded if "input_ids" in sample]
        counts = {
            "samples": len(kept),
            "skipped_samples": len(encoded) - len(kept),
            "shrunk_samples": sum(sample["shrunk"] for sample in kept),
            "videos": sum(sample["num_videos"] for sample in kept),
            "images": sum(sample["num_images"] for sample in kept),
            "bad_videos": sum(len(sample["bad"]) for sample in encoded),
            "tokens": sum(sample["num_tokens"] for sample in kept),
            "supervised_tokens": sum(int((sample["labels"] != -100).sum()) for sample in kept),
            "chosen_tokens": sum(map(chosen_tokens, kept)),
        }
        counts, stop = mv.exchange(accelerator, state, window, counts, caught)
        if stop:
            break
        mv.check_bad_ratio(accelerator, args, state, counts)
        scales = torch.tensor(loss_scales(args, counts["samples"], counts["chosen_tokens"]), device=accelerator.device)

        # ---- forward, backward, step
        factor = mv.lr_factor(state["step"], total_steps, args)
        engine.set_learning_rate(factor)
        learning = counts["supervised_tokens"] > 0  # if not, no process computes or updates anything
        # loss, metrics
        step_sums = torch.full((1 + len(METRICS),), 0.0 if learning else math.nan, device=accelerator.device)
        for k, (samples, indices) in enumerate(zip(rows, mine) if learning else []):
            last = k == len(rows) - 1
            inputs, targets, sequences = packed = mv.pack(samples, encoder, accelerator.device)
            ref_logps = reference_logps(reference, packed, indices, samples)  # [pairs, 2]
            with engine.row(last):
                with engine.autocast():
                    logps, lengths = answer_logps(model(**inputs).logits, targets, sequences, len(ref_logps))
                    # Gradients are averaged over processes: times world_size makes it the sum over the window.
                    loss = (loss_sums(logps, ref_logps, lengths, args) * scales).sum() * world_size
                metrics = metric_sums(logps.detach(), ref_logps, args.beta)
                step_sums += torch.cat([loss.detach()[None] / world_size, metrics / counts["samples"]])
                if last:
                    step_sums = accelerator.reduce(step_sums)
                    loss_finite = bool(torch.isfinite(step_sums[0]))
                    loss = loss if loss_finite else loss * math.nan  # then no process updates anything
                engine.backward(loss)
        grad_norm, overflow = engine.step() if learning else (math.nan, False)
        bad = learning and (not loss_finite or not (math.isfinite(grad_norm) or overflow))
        state["step"], state["samples_seen"] = state["step"] + 1, samples_seen
        if learning:
            state["bad_steps"] = state["bad_steps"] + 1 if bad else 0

        # ---- log
        seconds = time.perf_counter() - started
        row = {
            "step": state["step"],
            "epoch": round(samples_seen / len(records), 6),
            "loss": float(step_sums[0]),
            **dict(zip(METRICS, step_sums[1:].tolist())),
            "learning_rate": args.learning_rate * factor,
            "grad_norm": grad_norm,
            **counts,
            "records_crc32": zlib.crc32(json.dumps(window).encode()),
            "step_seconds": round(seconds, 4),
            "data_wait_seconds": round(data_wait, 4),
            **mv.peak_memory(),
        }
        if bad or overflow:
            row["not_finite"] = "loss" if not loss_finite else "gradient"
        row = mv.finite_values(row)
        if is_main:
            mv.append_jsonl(metrics_path, row)
            if bad:
                mv.append_jsonl(output_dir / "bad_steps.jsonl", mv.bad_step(row, [records[i] for i in window]))
        if trackers and state["step"] % args.logging_steps == 0:
            accelerator.log(mv.numbers(row), state["step"])
        progress = f"loss {float(step_sums[0]):.4f}" if learning else "nothing to learn"
        bar.set_postfix_str(
            f"{progress}, {counts['samples'] / seconds:.1f} samples/s, "
            f"{counts['videos'] / seconds:.0f} videos/s, data wait {data_wait / seconds:.0%}"
        )
        bar.update()
        if state["bad_steps"] >= args.max_bad_steps:
            mv.stop_all(accelerator, f"{args.max_bad_steps} steps in a row had a loss or gradient that is not finite; "
                        f"the newest checkpoint has the last good weights. Their records and files are in "
                        f"{output_dir / 'bad_steps.jsonl'}")  # fmt: skip

        # ---- what is due now
        ends_epoch, ends = samples_seen % len(records) == 0, state["step"] >= total_steps
        due = {"no": False, "steps": state["step"] % (args.eval_steps or args.logging_steps) == 0, "epoch": ends_epoch}
        state["eval_due"] = args.eval_strategy != "no" and (due[args.eval_strategy] or ends)
        due = {"no": False, "steps": state["step"] % args.save_steps == 0, "epoch": ends_epoch}
        state["save_due"] = due[args.save_strategy]

    # ---- the end: asked to stop, or done
    bar.close()
    steps.close()
    stream.close()
    if stop:
        if state["step"] != saved_step:
            mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
        mv.say(f"stopped by a signal after step {state['step']}: go on with --resume_from_checkpoint auto")
        accelerator.end_training()
        raise SystemExit(143)
    if early:
        mv.say(f"stopped early: {state['evals_without_gain']} evaluations without improvement")
    best = state["best_checkpoint"] if args.load_best_model_at_end else None
    mv.publish_model(args.output_dir, engine, encoder.processor, best)
    mv.say(f"saved {best or 'the last step'} to {output_dir}; every step is in {metrics_path}")
    accelerator.end_training()


if __name__ == "__main__":
    mv.run(main)
