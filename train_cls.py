"""Classification and regression with Qwen-VL over many videos: one answer per sample, from a head on its last token.

    logits = W · (hidden state where the assistant's turn begins)          loss = Σ objective(logits, label) / samples

over the whole accumulation window on all processes. The objective is cross-entropy (or focal, class-balanced), binary
cross-entropy for several labels at a time, squared or Huber error for standardised targets. Left out on purpose:
padding (samples are packed into one row and cannot see each other), a Trainer class, the output layer over words.

One record (JSON or JSONL; README.md has the other formats):
    {"id": "1", "video": ["a.mp4", "b.mp4"], "prompt": "<video>\\n<video>\\nIs the valve open?", "label": "open"}

Launch, on a CPU or one GPU:
    accelerate launch --config_file accelerate_configs/cpu.yaml train_cls.py \\
        --model_id demo/model --data_path demo/cls_train.json --output_dir out
    accelerate launch --config_file accelerate_configs/one_gpu.yaml train_cls.py \\
        --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ --bf16 True \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --output_dir out
"""

import contextlib
import copy
import itertools
import json
import math
import os
import re
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import multivideo as mv

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import set_seed
from safetensors import safe_open
from tqdm import tqdm

if TYPE_CHECKING:
    from datasets import Dataset

# A record is a prompt without answers; `label` holds the names of its classes, `target` its numbers.
FEATURES = pa.schema([*mv.CONVERSATION, ("completions", pa.list_(mv.MESSAGES)), ("label", pa.list_(pa.string())),
                      ("target", pa.list_(pa.float64()))])  # fmt: skip
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
LOSS_TYPES = {  # of each problem type; the first is its default
    SINGLE: ["cross_entropy", "focal_loss", "class_balanced_cross_entropy", "class_balanced_focal_loss"],
    MULTI: ["bce"],
    REGRESSION: ["mse", "huber"],
}
METRICS = {  # that decide which checkpoint is best
    SINGLE: ["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "average_precision"],
    MULTI: ["loss", "accuracy", "f1", "auroc", "average_precision"],
    REGRESSION: ["loss", "mae", "rmse", "r2", "pearson"],
}
HEAD = ("problem_type", "id2label", "mlp_head_dim", "target_mean", "target_std")  # of a config: what its outputs mean


@dataclass
class ClassificationArguments(mv.TrainingArguments):
    """The shared flags, and those of classification and regression."""

    problem_type: str = mv.arg(
        SINGLE, "One class per record, any number of them, or one or several numbers.", choices=list(LOSS_TYPES)
    )
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the classes (or of the regression's targets) in the order of their indices "
                  "(default: those found in --data_path, sorted)."},
    )  # fmt: skip
    num_labels: int | None = mv.arg(None, "How many classes or targets there must be (default: as many as found).")
    default_prompt: str | None = mv.arg(None, "Prompt of records without one.")
    loss_type: str | None = mv.arg(
        None, "Objective (default: cross_entropy, bce or mse, by --problem_type).",
        choices=[name for names in LOSS_TYPES.values() for name in names],
    )  # fmt: skip
    focal_gamma: float = mv.arg(2.0, "Focal losses: exponent γ; 0 is cross-entropy.")
    focal_alpha: str | None = mv.arg(None, "focal_loss: a weight for each class in their order, such as 1.0,7.5.")
    class_balanced_beta: float = mv.arg(0.999, "class_balanced_*: β; 0: no weights, towards 1: inverse frequencies.")
    huber_delta: float = mv.arg(1.0, "huber: errors beyond it count linearly; in standard deviations of the target.")
    class_balanced_order: bool = mv.arg(False, "Draw all classes equally often: rare ones again and again.")
    head_lr: float | None = mv.arg(None, "Peak learning rate of the head (default: --learning_rate).")
    head_init: str = mv.arg(
        "random", "First weights of the head: random, or those that lm_head has for the labels' words.",
        choices=["random", "label_words"],
    )  # fmt: skip
    mlp_head_dim: int = mv.arg(0, "Width of a hidden layer in the head; 0: none, the head is linear.")
    mlp_head_dropout: float = mv.arg(0.0, "Dropout after that hidden layer.")

    def objective(self) -> str:
        """For the model card."""
        return f"{self.problem_type.replace('_', ' ')}, loss {self.loss_type}"

    def check(self, given: set[str]) -> list[str]:
        """What is wrong with these flags, as sentences that name the mend."""
        problems = []

        def complain(condition, sentence):
            if condition:
                problems.append(sentence)

        try:
            held = held_classifier(self)
        except mv.InputError as error:
            held = problems.append(str(error))
        if held:
            names = [held.id2label[i] for i in range(held.num_labels)]
            own = {"problem_type": held.problem_type, "labels": names, "num_labels": len(names),
                   "mlp_head_dim": held.mlp_head_dim, "head_init": "random"}  # fmt: skip
            for flag, value in own.items():
                complain(flag in given and getattr(self, flag) != value, f"--{flag} {getattr(self, flag)}: the run "
                         f"goes on from {held.name_or_path}, a classifier with {value}: drop it")  # fmt: skip
                setattr(self, flag, value)
        metric = self.metric_for_best_model.removeprefix("eval_").split("/")[0]
        complain(metric not in METRICS[self.problem_type],
                 f"--metric_for_best_model {self.metric_for_best_model}: evaluation gives "
                 f"{', '.join(METRICS[self.problem_type])}")  # fmt: skip
        if metric in ("mae", "rmse"):
            complain(self.greater_is_better and "greater_is_better" in given,
                     "--greater_is_better: with that --metric_for_best_model it keeps the worst: drop it")  # fmt: skip
            self.greater_is_better = False
        fitting = LOSS_TYPES[self.problem_type]
        self.loss_type = self.loss_type or fitting[0]
        complain(self.loss_type not in fitting,
                 f"--loss_type {self.loss_type} is not for --problem_type {self.problem_type}: "
                 f"choose {' or '.join(fitting)}")  # fmt: skip
        names = self.labels or []
        complain(len(set(names)) < len(names), f"--labels {' '.join(names)}: name each one once")
        complain(
            self.num_labels is not None and self.num_labels < 1, f"--num_labels {self.num_labels}: must be above 0"
        )
        complain(names and self.num_labels not in (None, len(names)),
                 f"--num_labels {self.num_labels}, but --labels names {len(names)}: drop the first")  # fmt: skip
        complain(self.default_prompt and mv.CONTROL_TOKENS.search(self.default_prompt),
                 "--default_prompt has a control token such as <|im_end|>: take it out")  # fmt: skip
        complain(self.focal_gamma < 0, f"--focal_gamma {self.focal_gamma}: must be 0 or more")
        for flag in ("focal_gamma", "focal_alpha"):
            complain(flag in given and "focal" not in self.loss_type, f"--{flag} needs --loss_type focal_loss")
        complain("focal_alpha" in given and self.loss_type == "class_balanced_focal_loss",
                 "--focal_alpha: class_balanced_focal_loss has its own; take --loss_type focal_loss")  # fmt: skip
        complain(self.focal_alpha is not None and parse_weights(self.focal_alpha) is None,
                 f"--focal_alpha {self.focal_alpha}: expected numbers of 0 or more, as in 1.0,7.5")  # fmt: skip
        complain(not 0 <= self.class_balanced_beta < 1,
                 f"--class_balanced_beta {self.class_balanced_beta}: must be 0 or more and below 1")  # fmt: skip
        complain("class_balanced_beta" in given and not self.loss_type.startswith("class_balanced"),
                 "--class_balanced_beta needs --loss_type class_balanced_cross_entropy (or …_focal_loss)")  # fmt: skip
        complain(self.huber_delta <= 0, f"--huber_delta {self.huber_delta}: must be above 0")
        complain("huber_delta" in given and self.loss_type != "huber", "--huber_delta needs --loss_type huber")
        complain(self.class_balanced_order and self.problem_type != SINGLE,
                 f"--class_balanced_order needs --problem_type {SINGLE}")  # fmt: skip
        complain(self.head_lr is not None and self.head_lr < 0, f"--head_lr {self.head_lr}: must be 0 or more")
        complain(self.mlp_head_dim < 0, f"--mlp_head_dim {self.mlp_head_dim}: must be 0 or more")
        complain(not 0 <= self.mlp_head_dropout < 1,
                 f"--mlp_head_dropout {self.mlp_head_dropout}: must be 0 or more and below 1")  # fmt: skip
        complain(self.mlp_head_dropout and not self.mlp_head_dim, "--mlp_head_dropout needs --mlp_head_dim")
        complain(self.head_init == "label_words" and (self.mlp_head_dim or self.problem_type == REGRESSION),
                 "--head_init label_words is for a linear head over classes: drop it")  # fmt: skip
        return problems


# ---- objectives: logits [B, C] and targets → the sum over the samples


def parse_weights(text: str) -> list[float] | None:
    """The numbers of a list such as 1.0,7.5; None if it is anything else."""
    try:
        weights = [float(word) for word in text.strip("[]() ").split(",")]
    except ValueError:
        return None
    return weights if all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights) else None


def class_balanced_weights(counts: list[int], beta: float) -> list[float]:
    """A weight for each class from its number of training samples: (1 − β) / (1 − βⁿ), scaled to add up to C.

    Source: Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples, eq. 4 and section 4.
    """
    weights = [(1 - beta) / (1 - beta**count) for count in counts]
    return [weight * len(counts) / sum(weights) for weight in weights]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """−w log p of the right class, summed; targets int64 [B], weights [C]."""
    return F.cross_entropy(logits.float(), targets, weights, reduction="sum")


def focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, gamma: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """−w (1 − p)^γ log p of the right class, summed; targets int64 [B], weights [C].

    Source: Lin et al. 2017, Focal Loss for Dense Object Detection, eq. 5; class-balanced: Cui et al. 2019.
    """
    logp = torch.log_softmax(logits.float(), 1).gather(1, targets[:, None])[:, 0]  # [B]
    # −expm1(log p) is 1 − p without cancellation; the floor keeps the gradient of the power finite where p is 1.
    focus = (-torch.expm1(logp)).clamp_min(1e-12) ** gamma
    return -(focus * logp * (1.0 if weights is None else weights[targets])).sum()


def objective(logits: torch.Tensor, targets: torch.Tensor, args, weights: torch.Tensor | None) -> torch.Tensor:
    """The loss that --loss_type names, summed over the samples; several labels or targets are averaged in each."""
    if "cross_entropy" in args.loss_type:
        return cross_entropy(logits, targets, weights)
    if "focal" in args.loss_type:
        return focal_loss(logits, targets, args.focal_gamma, weights)
    if args.loss_type == "bce":
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
    elif args.loss_type == "mse":
        loss = F.mse_loss(logits.float(), targets, reduction="sum")
    else:
        loss = F.huber_loss(logits.float(), targets, reduction="sum", delta=args.huber_delta)
    return loss / targets.shape[1]


# ---- the model


class ScoreLinear(torch.nn.Linear):
    """A linear layer that always computes in fp32: bf16 logits would come in steps of 0.4 %.

    The few rows of a packed one go through fp64 products, which --tf32 leaves alone in both directions.
    """

    def forward(self, hidden):
        dtype = torch.float64 if hidden.ndim == 2 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype)).float()


class VideoSequenceClassifier:
    """The library's classifier on a family's base model, for packed rows too; `score` is its head.

        model = classifier_class("qwen2_5_vl").from_pretrained("out")    # names: model.config.id2label
        logits = model(**processor(text=[prompt], videos=videos, return_tensors="pt")).logits

    `prompt` comes from apply_chat_template(…, add_generation_prompt=True); a regression's numbers are
    `logits * config.target_std + config.target_mean`. An adapter goes on top, with PeftModel.from_pretrained, of
    `….from_pretrained(base, config=AutoConfig.from_pretrained("out"))`.

    Without `pool_positions` it is used as any other (padded batches, `labels=`): the last token that is not padding
    gives the logits. With them, a packed row [1, T] gives logits [B, C] at these positions.
    """

    _keys_to_ignore_on_load_unexpected = (r"^lm_head",)

    def __init__(self, config):
        super().__init__(config)
        hidden, width = config.get_text_config().hidden_size, getattr(config, "mlp_head_dim", 0)
        self.score = ScoreLinear(width or hidden, config.num_labels, bias=False)
        if width:
            dropout = torch.nn.Dropout(config.mlp_head_dropout)
            self.score = torch.nn.Sequential(torch.nn.Linear(hidden, width), torch.nn.GELU(), dropout, self.score)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, pool_positions=None, **kwargs):
        """Logits of a packed row at `pool_positions` int64 [B], or of padded sequences as in the library."""
        if pool_positions is None:
            if input_ids is not None and kwargs.get("position_ids") is None:  # the library's rule is another one
                inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
                inputs = {name: value for name, value in inputs.items() if value is not None}
                kwargs["position_ids"] = mv.qwen_position_ids(inputs, self.config)
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state  # [1, T, hidden]
        logits = self.score(hidden[0, pool_positions])
        return transformers.modeling_outputs.SequenceClassifierOutputWithPast(logits=logits)

    @torch.no_grad()
    def init_head(self, args):
        """Give a head that no checkpoint has its first weights: a function of --seed alone, or the label words'."""
        generator = torch.Generator().manual_seed(args.seed)
        parameters = dict(self.score.named_parameters())
        gathered = contextlib.nullcontext()
        if transformers.integrations.is_deepspeed_zero3_enabled():
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0)
        with gathered:
            for name, weight in parameters.items():
                # The last layer begins near 0, so that the first probabilities are even (as in 2U1's).
                last, spread = name in ("weight", "3.weight"), self.config.get_text_config().initializer_range
                values = torch.randn(weight.shape, generator=generator) * (1e-3 if last else spread)
                if name.endswith("bias"):
                    values.zero_()
                if args.head_init == "label_words":
                    values = label_word_rows(args, [self.config.id2label[i] for i in range(self.config.num_labels)])
                weight.copy_(values)


def classifier_class(model_type: str, mlp_head: bool = False) -> type:
    """The class of a family with a head, such as Qwen2_5_VLForSequenceClassification; `model_type`: config.json's.

    Made when asked for, because the library's model classes take seconds to import. Where the library has a class of
    the name, a linear head is saved for it, and the class of an `mlp_head` has another name; both load either.
    """
    return _classifier_class(model_type, mlp_head)


@cache
def _classifier_class(model_type, mlp_head):
    from transformers import conversion_mapping
    from transformers.modeling_layers import GenericForSequenceClassification

    bases = {"qwen2_vl": "Qwen2VLPreTrainedModel", "qwen2_5_vl": "Qwen2_5_VLPreTrainedModel",
             "qwen3_vl": "Qwen3VLPreTrainedModel", "qwen3_5": "Qwen3_5PreTrainedModel"}  # fmt: skip
    base = getattr(transformers, bases[model_type])
    name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    if mlp_head and hasattr(transformers, name):
        name = name.replace("For", "MLPHeadFor")
    # Weights have other names on the hub than in the model: without its sibling's rules, the class would load a random
    # language model. (Saving goes by the same rules.)
    sibling = base.__name__.replace("PreTrainedModel", "ForConditionalGeneration")
    rules = conversion_mapping.get_checkpoint_conversion_mapping(sibling)
    conversion_mapping.register_checkpoint_conversion_mapping(name, rules, overwrite=True)
    return type(name, (VideoSequenceClassifier, GenericForSequenceClassification, base), {})


def label_word_rows(args, names: list[str]) -> torch.Tensor:
    """What `lm_head` has for the labels' words, averaged over the tokens of each: float32 [C, hidden].

    For labels of one token each the first logits are thus the language model's own. Read from the files: of a
    quantised or split model they could not be had otherwise.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_id, cache_dir=args.cache_dir)
    where = {"path_or_repo_id": args.model_id, "cache_dir": args.cache_dir}
    files = mv.weight_files(args.model_id, args.cache_dir)
    tied = next(name for name in files if name.endswith("embed_tokens.weight"))
    name = "lm_head.weight" if "lm_head.weight" in files else tied
    with safe_open(transformers.utils.cached_file(filename=files[name], **where), "pt") as file:
        table = file.get_slice(name)
        tokens = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in names]
        return torch.stack([torch.cat([table[i : i + 1].float() for i in ids]).mean(0) for ids in tokens])


def held_classifier(args):
    """The config of the classifier that a run goes on from, None if it begins one: its HEAD stands for the flags.

    It is --lora_weight_path, or --model_id itself. (An adapter of a language model has no head and gets a new one.)

    Raises:
        InputError: a head without the config that says what its outputs mean.
    """
    held, folder = None, args.lora_weight_path
    if folder and (Path(folder) / "adapter_model.safetensors").is_file():
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            head = any(mv.part_of(name) == "head" for name in file.keys())  # noqa: SIM118
        if head and not (Path(folder) / "config.json").is_file():
            raise mv.InputError(f"--lora_weight_path {folder}: a classifier's adapter without its config.json, which "
                                "has the labels: copy it from the --output_dir of its run")  # fmt: skip
        held = transformers.AutoConfig.from_pretrained(folder) if head else None
    if held is None:
        with contextlib.suppress(OSError, ValueError):  # who needs it says so
            config = transformers.AutoConfig.from_pretrained(args.model_id, cache_dir=args.cache_dir)
            if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
                held = config
    if held and (missing := [key for key in HEAD if not hasattr(held, key)]):
        raise mv.InputError(f"{held.name_or_path} is a classifier that train_cls.py did not write: its config.json "
                            f"has no {', '.join(missing)}; start from its base model")  # fmt: skip
    return held


# ---- data


def normalize_record(
    record: dict, where: str, problem_type: str = SINGLE, default_prompt: str | None = None, labels=None
) -> dict:
    """A prompt with its `label` (class names) or `target` (numbers), of the schema FEATURES.

    The prompt stands in `prompt` (a text), or in `conversations` or `messages` that end with the user's turn. `labels`
    are the names of all classes or targets, if they are known beforehand.

    Raises:
        ValueError: names the record, what was found, what was expected and the mend.
    """
    record = mv.rename_fields(record, where)
    if isinstance(record, dict):
        mv.check_fields(record, ("prompt", "conversations", "messages"), ("label", "labels"), where=where)
        turns = [record.get(key) for key in ("prompt", "conversations", "messages")]
        if sum(bool(value) for value in turns) > 1:
            raise ValueError(f"{where}: more than one of 'prompt', 'conversations' and 'messages': keep one of them")
        prompt = turns[0] or (None if any(turns) else default_prompt)
        if not any(turns) and not default_prompt:
            raise ValueError(f"{where}: no 'prompt': add the question, or give --default_prompt for all such records")
        if prompt:
            given = {key: value for key, value in record.items() if key not in ("prompt", "conversations", "messages")}
            record = {
                **given,
                "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            }
    row = mv.normalize_conversation(record, where)
    if row["messages"][-1]["role"] != "user":
        raise ValueError(f"{where}: the last turn must be the user's: take the answer out, the label says it")
    present = [key for key in ("label", "labels") if record.get(key) is not None]
    if len(present) != 1:
        found = "both 'label' and 'labels'" if present else "no 'label'"
        raise ValueError(f"{where}: {found}: expected one of them, with the class or the number")
    value = record[present[0]]
    several = list(value) if isinstance(value, (list, tuple, np.ndarray)) else None
    try:
        if problem_type == REGRESSION:
            if several == []:
                raise ValueError("an empty list: expected a number or several")
            numbers = [target_number(item) for item in ([value] if several is None else several)]
            if labels and len(numbers) != len(labels):
                raise ValueError(f"{len(numbers)} where {len(labels)} are expected: {some(labels)}")
            return {**row, "completions": [], "label": [], "target": numbers}
        if isinstance(value, dict):
            named = [str(key) for key, on in value.items() if on == 1]  # True, too
            raise ValueError(f"a dict of classes: write the names of those that apply, {named}, with --problem_type "
                             f"{MULTI}, or the one name without")  # fmt: skip
        if several and len(several) > 2 and all(isinstance(item, (int, float)) and item in (0, 1) for item in several):
            raise ValueError(f"a 0 or 1 for each class (multi-hot): write the names of those that apply, such as "
                             f"{[name for name, on in zip(labels or 'abcdefghijklmnopqrstuvwxyz', several) if on]}, "
                             f"with --problem_type {MULTI}")  # fmt: skip
        if (several is not None) != (problem_type == MULTI):
            raise ValueError("several classes: for them give --problem_type multi_label_classification" if several
                             is not None else "one class where a list of them is expected: put it in […]")  # fmt: skip
        names = [class_name(item) for item in ([value] if several is None else several)]
        if len(set(names)) < len(names):
            raise ValueError("a class stands there twice: name it once")
        if unknown := [name for name in names if labels and name not in labels]:
            raise ValueError(f"{some(unknown, repr)} is unknown; known are {some(labels, repr)}: mend it, or name it "
                             "in --labels (a classifier that a run goes on from keeps its own: start from its base "
                             "model)")  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: field {present[0]!r} is {value!r}: {error}") from None
    return {**row, "completions": [], "label": names, "target": []}


def class_name(value) -> str:
    """The name of a class that a record gives as a text, a whole number, true or false."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (int, np.integer)):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, float):
        raise ValueError(f"a class is a text or a whole number; for amounts give --problem_type {REGRESSION}")
    raise ValueError("a class is a text or a whole number")


def target_number(value) -> float:
    """A regression target that a record gives."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError("a target is a number, without quotes")
    if not -1e300 < value < 1e300:
        raise ValueError("a target must be finite: mend it or take the record out")
    return float(value)


def some(items, name=str) -> str:
    """The first few of them, as text."""
    items = list(items)
    return ", ".join(map(name, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def make_config(records: "Dataset", args, encoder: mv.Encoder):
    """The model's config with labels, problem type, head and standardisation, found in the records or given.

    A classifier that the run goes on from brings its own: they stand.

    Raises:
        InputError: names the flag or the records and what does not fit.
    """
    config, held, standard = copy.deepcopy(encoder.config), held_classifier(args), dict.fromkeys(HEAD[-2:])
    if args.problem_type == REGRESSION:
        names, standard = regression_targets(records, args)
    else:
        names = class_names(records, args, held)
    if args.num_labels not in (None, len(names)):
        raise mv.InputError(f"--num_labels {args.num_labels}, but {args.data_path} has {len(names)}: {some(names)}; "
                            "correct the flag, or name them all with --labels")  # fmt: skip
    config.update({key: getattr(held, key) for key in standard} if held else standard)
    config.update({
        "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": args.problem_type, "mlp_head_dim": args.mlp_head_dim,
        "mlp_head_dropout": args.mlp_head_dropout,
    })  # fmt: skip
    text = config.get_text_config()  # by the padding token the library finds where padded sequences end
    text.pad_token_id = encoder.tokenizer.pad_token_id if text.pad_token_id is None else text.pad_token_id
    return config


def class_names(records: "Dataset", args, held) -> list[str]:
    """The classes in the order of their indices; every one that is not `held` must occur in the training records."""
    counts = Counter(name for names in records["label"] for name in names)
    found = sorted(counts, key=lambda name: (0, int(name), name) if re.fullmatch(r"-?\d+", name) else (1, 0, name))
    names = args.labels
    if names is None and args.num_labels and set(found) <= {str(i) for i in range(args.num_labels)}:
        names = [str(i) for i in range(args.num_labels)]
    names = names or found
    if len(names) < 2 and args.problem_type == SINGLE:
        raise mv.InputError(f"{args.data_path}: all {len(records)} records have the label {names[0]!r}: "
                            "there is nothing to tell apart")  # fmt: skip
    if not names:
        raise mv.InputError(f"{args.data_path}: no record has any label: there is nothing to learn")
    balanced = args.class_balanced_order or args.loss_type.startswith("class_balanced")
    if absent := [name for name in names if not counts[name]]:
        said = f"{args.data_path}: no record has the label {some(absent, repr)}"
        if not held:
            raise mv.InputError(f"{said}: add records of it, or take it out of --labels (or --num_labels)")
        if balanced:
            raise mv.InputError(f"{said}: add records of it, or balance no classes")
        mv.say(f"{said}, which {held.name_or_path} knows: it stays")
    if always := [name for name in names if args.problem_type == MULTI and counts[name] == len(records)]:
        raise mv.InputError(f"{args.data_path}: every record has the label {some(always, repr)}: there is "
                            "nothing to tell apart; take it out, or add records without it")  # fmt: skip
    return names


SHOWN_CLASSES = 20
COMPARED_CLASSES = 500  # names of more are not compared with each other


def describe_labels(counts: Counter) -> list[str]:
    """The classes with their numbers of records, the most frequent first, and likely typing errors: lines to print."""
    ranked = [(name, count) for name, count in counts.most_common()]
    shown = ", ".join(f"{name!r} {count:,}" for name, count in ranked[:SHOWN_CLASSES])
    more = f", and {len(ranked) - SHOWN_CLASSES} more" if len(ranked) > SHOWN_CLASSES else ""
    lines, most = [f"{len(ranked)} classes: {shown}{more}"], ranked[0][1] if ranked else 0

    def each(items):
        return some(items, lambda item: f"{item[0]!r} ({item[1]:,})")

    if rare := [item for item in reversed(ranked) if most >= 10 and (item[1] == 1 or item[1] * 50 < most)]:
        lines.append(f"rare: {each(rare)}")
    numbers = [item for item in ranked if re.fullmatch(r"-?\d+|true|false", item[0])]
    if numbers and len(numbers) < len(ranked):
        lines.append(f"mixed types: {each(numbers)} among {each([item for item in ranked if item not in numbers])}")
    plain = {}
    for item in ranked:
        plain.setdefault(" ".join(unicodedata.normalize("NFKC", item[0]).casefold().split()), []).append(item)
    lines += [f"differ in spaces or case only: {each(items)}" for items in plain.values() if len(items) > 1]
    names = [name for name in plain if len(name) > 3] if len(plain) <= COMPARED_CLASSES else []
    lines += [f"nearly the same: {each([*plain[a], *plain[b]])}" for a, b in itertools.combinations(names, 2)
              if one_typing_error_apart(a, b)]  # fmt: skip
    return lines


def one_typing_error_apart(a: str, b: str) -> bool:
    """Whether they differ by one letter more, one other letter or two swapped ones; digits are meant to differ."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return not (a + b).isdigit() and (max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1]))


def check_labels(records: "Dataset", names: list[str], source: str):
    """Every label of the records must be one of `names`."""
    unknown = {}
    for i, labels in enumerate(records["label"]):
        for name in set(labels) - set(names):
            unknown.setdefault(name, []).append(i)
    if unknown:
        lines = [f"{name!r} in {mv.record_name(some(places, lambda i: records[i]['id']))}"
                 for name, places in list(unknown.items())[: mv.MAX_COMPLAINTS]]  # fmt: skip
        raise mv.InputError(f"{source}: unknown labels; known are {some(names, repr)}\n  • " + "\n  • ".join(lines))


def regression_targets(records: "Dataset", args) -> tuple[list[str], dict]:
    """Names of the targets, and mean and standard deviation of each over the training records."""
    count = len(args.labels or records[0]["target"])
    names = args.labels or (["target"] if count == 1 else [f"target_{i}" for i in range(count)])
    check_targets(records, names, args.data_path)
    targets = np.array(records["target"])  # [N, C]
    mean, std = targets.mean(0), targets.std(0)
    for name, value, spread in zip(names, mean, std):
        if not spread > 1e-9 * max(1.0, abs(value)):
            raise mv.InputError(f"{args.data_path}: {name} is {value:g} in all {len(records)} records: "
                                "there is nothing to learn")  # fmt: skip
    return names, {"target_mean": mean.tolist(), "target_std": std.tolist()}


def check_targets(records: "Dataset", names: list[str], source: str):
    """Every record must have a number for each of `names`."""
    wrong = [i for i, target in enumerate(records["target"]) if len(target) != len(names)]
    if wrong:
        lines = [f"{mv.record_name(records[i]['id'])}: {len(records[i]['target'])}" for i in wrong[:5]]
        raise mv.InputError(f"{source}: expected {len(names)} targets ({some(names)}) in every record, {len(wrong)} "
                            "have another number:\n  • " + "\n  • ".join(lines))  # fmt: skip


def check_records(records: "Dataset", config, source: str):
    """Held-out records must have the training records' classes or targets; a class may be missing there."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    if config.problem_type == REGRESSION:
        check_targets(records, names, source)
        return
    check_labels(records, names, source)
    if absent := set(names) - {name for labels in records["label"] for name in labels}:
        mv.say(f"{source}: no record has the label {some(sorted(absent), repr)}: metrics are over the others")


def check_sets(args, records: "Dataset", eval_records: "Dataset | None", encoder: mv.Encoder):
    """What no single record shows: the classes or targets of a data set; returns the model's config with them.

    Raises:
        InputError: as make_config, or the held-out records do not fit.
    """
    config = make_config(records, args, encoder)
    if eval_records:
        check_records(eval_records, config, args.eval_path)
    return config


def check_same_head(folder: Path, config):
    """A checkpoint must have this run's labels, standardisation and kind of head."""
    held = transformers.AutoConfig.from_pretrained(folder)
    differ = [f"{key}: {getattr(held, key, None)} then, {getattr(config, key, None)} now" for key in HEAD
              if getattr(held, key, None) != getattr(config, key, None)]  # fmt: skip
    if differ:
        raise mv.InputError(f"{folder} was trained for something else; these differ:\n  • " + "\n  • ".join(differ)
                            + "\nGive the same flags and records, or start in another --output_dir")  # fmt: skip


def make_weights(records: "Dataset", config, args, device) -> torch.Tensor | None:
    """The loss's weight of each class: class-balanced, from --focal_alpha, or none."""
    names, weights = [config.id2label[i] for i in range(config.num_labels)], None
    if args.loss_type.startswith("class_balanced"):
        counts = Counter(name for labels in records["label"] for name in labels)
        weights = class_balanced_weights([counts[name] for name in names], args.class_balanced_beta)
    elif args.focal_alpha:
        weights = parse_weights(args.focal_alpha)
        if len(weights) != len(names):
            raise mv.InputError(f"--focal_alpha has {len(weights)} weights, but there are {len(names)} classes: "
                                f"{some(names)}; give one for each, in this order")  # fmt: skip
    return None if weights is None else torch.tensor(weights, device=device)


def class_balanced_order(classes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch in which all classes come equally often: int64 [N] record indices, a function of (seed, epoch).

    Any C consecutive ones (from a multiple of C) have one of each class, in random order; a class begins again, in a
    new order, when all of its records were drawn.
    """
    rng = np.random.default_rng([seed, epoch])
    rounds, draws = -(-len(classes) // (classes.max() + 1)), []
    for name in range(classes.max() + 1):
        members = np.flatnonzero(classes == name)
        turns = [rng.permutation(members) for _ in range(-(-rounds // len(members)))]
        draws.append(np.concatenate(turns)[:rounds])
    return rng.permuted(np.stack(draws, 1), axis=1).reshape(-1)[: len(classes)]


def pack(samples: list[dict], encoder: mv.Encoder, config, device) -> tuple[dict, torch.Tensor]:
    """mv.pack for prompts: `(model inputs with pool_positions [B], targets)`, the last token of each sample.

    Targets: class indices int64 [B], several labels as 0 and 1 float32 [B, C], or standardised numbers [B, C].
    """
    inputs, _, _ = mv.pack(samples, encoder, device)
    kept = [sample for sample in samples if "input_ids" in sample]
    ends = np.cumsum([len(sample["input_ids"]) for sample in kept], dtype=np.int64) - 1
    del inputs["logits_to_keep"]
    inputs["pool_positions"] = torch.from_numpy(ends).to(device)
    return inputs, encode_targets(kept, config).to(device)


def encode_targets(rows: "list[dict] | Dataset", config) -> torch.Tensor:
    """Targets of samples or records, as pack returns them."""
    if not isinstance(rows, list):
        rows = rows.select_columns(["label", "target"]).to_list()
    if config.problem_type == REGRESSION:
        numbers = np.array([row["target"] for row in rows]).reshape(len(rows), -1 if rows else config.num_labels)
        return torch.from_numpy((numbers - config.target_mean) / config.target_std).float()
    indices = [[config.label2id[name] for name in row["label"]] for row in rows]
    if config.problem_type == SINGLE:
        return torch.tensor([index for (index,) in indices], dtype=torch.long)
    targets = torch.zeros(len(rows), config.num_labels)
    for target, several in zip(targets, indices):
        target[several] = 1
    return targets


# ---- evaluation


def count_hits(logits: torch.Tensor, targets: torch.Tensor, config) -> torch.Tensor:
    """Samples whose classes are all right, or for regression the summed absolute error in the targets' own units."""
    if config.problem_type == SINGLE:
        return (logits.argmax(1) == targets).sum()
    if config.problem_type == MULTI:
        return ((logits > 0) == (targets > 0)).all(1).sum()
    return ((logits - targets).abs() * torch.tensor(config.target_std, device=logits.device)).mean(1).sum()


def ranking_metrics(truth: np.ndarray, scores: np.ndarray) -> dict:
    """Area under the ROC curve and average precision: means over the classes that have both kinds of samples.

    truth 0 and 1 [N, C], scores [N, C]; without any such class there are none.
    """
    from sklearn import metrics

    mixed = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
    if not mixed:
        return {}
    return {
        "eval_auroc": float(np.mean([metrics.roc_auc_score(truth[:, c], scores[:, c]) for c in mixed])),
        "eval_average_precision": float(
            np.mean([metrics.average_precision_score(truth[:, c], scores[:, c]) for c in mixed])
        ),
    }


def classification_metrics(classes: np.ndarray, probabilities: np.ndarray) -> dict:
    """Metrics of one class per sample: classes int64 [N], probabilities [N, C].

    f1 is the mean over the classes that occur in the truth or the predictions, balanced accuracy over those in the
    truth; with two classes AUROC and average precision are those of the second.
    """
    from sklearn import metrics

    predicted, count = probabilities.argmax(1), probabilities.shape[1]
    truth = np.eye(count, dtype=int)[classes]
    of = slice(1, 2) if count == 2 else slice(None)
    return {
        "eval_accuracy": float(metrics.accuracy_score(classes, predicted)),
        "eval_balanced_accuracy": float(
            metrics.recall_score(classes, predicted, labels=np.unique(classes), average="macro")
        ),
        "eval_f1": float(metrics.f1_score(classes, predicted, average="macro")),
        **ranking_metrics(truth[:, of], probabilities[:, of]),
        "eval_confusion_matrix": metrics.confusion_matrix(classes, predicted, labels=range(count)).tolist(),
    }


def multi_label_metrics(truth: np.ndarray, probabilities: np.ndarray) -> dict:
    """Metrics of any number of classes per sample: truth 0 and 1 [N, C], probabilities [N, C], threshold 0.5.

    Accuracy counts samples whose classes are all right.
    """
    from sklearn import metrics

    predicted = (probabilities > 0.5).astype(int)
    pairs = list(zip(truth.T, predicted.T))  # class by class: a single one would be taken for two
    return {
        "eval_accuracy": float((truth == predicted).all(1).mean()),
        "eval_f1": float(np.mean([metrics.f1_score(*pair, zero_division=0) for pair in pairs])),
        **ranking_metrics(truth, probabilities),
        "eval_confusion_matrix": [metrics.confusion_matrix(*pair, labels=[0, 1]).tolist() for pair in pairs],
    }


def regression_metrics(targets: np.ndarray, predictions: np.ndarray, names: list[str]) -> dict:
    """Mean absolute error, root mean squared error, R² and Pearson's r, in the targets' own units: both [N, C].

    Of several targets the means, and each one's own under its name. R² and r need samples that differ.
    """
    from sklearn import metrics

    rows = {}
    for c, name in enumerate(names):
        true, said = targets[:, c], predictions[:, c]
        row = {"mae": metrics.mean_absolute_error(true, said), "rmse": metrics.root_mean_squared_error(true, said)}
        if np.ptp(true) > 0:
            row["r2"] = metrics.r2_score(true, said)
            row["pearson"] = np.corrcoef(true, said)[0, 1] if np.ptp(said) > 0 else 0.0
        rows[name] = {key: float(value) for key, value in row.items()}
    shared = [key for key in ("mae", "rmse", "r2", "pearson") if all(key in row for row in rows.values())]
    result = {f"eval_{key}": float(np.mean([row[key] for row in rows.values()])) for key in shared}
    if len(names) > 1:
        result |= {f"eval_{key}/{name}": value for name, row in rows.items() for key, value in row.items()}
    return result


def answers_of(logits: np.ndarray, config) -> list[dict]:
    """What logits [N, C] say: `prediction` and `probabilities` by class; predicted numbers are in their own units."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    if config.problem_type == REGRESSION:
        numbers = logits * config.target_std + config.target_mean
        return [{"prediction": dict(zip(names, row))} for row in numbers.tolist()]
    single = config.problem_type == SINGLE
    shares = torch.from_numpy(logits).softmax(1) if single else torch.from_numpy(logits).sigmoid()
    told = [names[row.argmax()] if single else [name for name, share in zip(names, row) if share > 0.5]
            for row in shares]  # fmt: skip
    return [{"prediction": said, "probabilities": dict(zip(names, row))} for said, row in zip(told, shares.tolist())]


def judge_logits(records: "Dataset", logits: np.ndarray, config) -> tuple[dict, list[dict]]:
    """Metrics of the records and their rows for predictions.jsonl: logits [N, C], numbers in their own units."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    truth, answers = encode_targets(records, config).numpy(), answers_of(logits, config)
    records = records.select_columns(["id", "label", "target"])
    if config.problem_type == REGRESSION:
        truth = np.array([record["target"] for record in records])
        result = regression_metrics(truth, logits * config.target_std + config.target_mean, names)
        labels = [dict(zip(names, true)) for true in truth.tolist()]
    else:
        single = config.problem_type == SINGLE
        probabilities = np.array([list(row["probabilities"].values()) for row in answers])
        result = (classification_metrics if single else multi_label_metrics)(truth, probabilities)
        labels = [record["label"][0] if single else record["label"] for record in records]
    rows = [{"id": record["id"], "label": label, **row} for record, label, row in zip(records, labels, answers)]
    return result, rows


@torch.no_grad()
def evaluate(engine, stream, records, encoder, args, weights, caught) -> tuple[dict, list[dict] | None] | None:
    """Loss and metrics over all of `records`, and a row of predictions.jsonl for each (no rows: logits not finite).

    None if a process was asked to stop meanwhile.
    """
    model, accelerator, config = engine.model, engine.accelerator, engine.raw_model.config
    model.eval()
    rows = mv.micro_batches(list(range(len(records))), args.per_device_eval_batch_size,
                            accelerator.process_index, accelerator.num_processes)  # fmt: skip
    # logits, and 1 where there are some: every record is computed by one process
    table = torch.zeros(len(records), config.num_labels + 1, dtype=torch.float64, device=accelerator.device)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    bar = tqdm(total=len(rows), desc="eval", leave=False, disable=not accelerator.is_main_process)
    for indices, samples in zip(rows, stream.batches(records, rows, args.eval_image_folder)):
        if mv.stop_asked(accelerator, caught):
            return None
        inputs, targets = pack(samples, encoder, config, accelerator.device)
        with engine.autocast():
            logits = model(**inputs).logits
            loss += objective(logits, targets, args, weights)
        places = [i for i, sample in zip(indices, samples) if "input_ids" in sample]
        table[places] = F.pad(logits.double(), (0, 1), value=1.0)
        bar.update()
    bar.close()
    model.train()
    table, loss = accelerator.reduce(table).cpu(), accelerator.reduce(loss).item()
    kept = table[:, -1].nonzero()[:, 0].tolist()
    if not kept:
        return {"eval_samples": 0}, None
    records, logits = records.select(kept), table[kept, :-1].numpy()
    if not np.isfinite(logits).all():  # the same names as ever, without a value, and nothing is predicted
        result, _ = judge_logits(records, np.zeros_like(logits), config)
        result, predictions, loss = dict.fromkeys(result, math.nan), None, math.nan
    else:
        result, predictions = judge_logits(records, logits, config)
    return {"eval_loss": loss / len(kept), "eval_samples": len(kept), **result}, predictions


def write_predictions(path: Path, rows: list[dict]):
    """Write predictions.jsonl aside, then rename: the file is never half there."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


def main():
    args = mv.parse_arguments(ClassificationArguments)
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
        normalize = partial(normalize_record, problem_type=args.problem_type, default_prompt=args.default_prompt,
                            labels=args.labels)  # fmt: skip
        records = mv.load_records(args.data_path, normalize, FEATURES, encoder=encoder)
        eval_records = None
        if args.eval_path:
            eval_records = mv.load_records(args.eval_path, normalize, FEATURES, encoder=encoder)
    model_config = check_sets(args, records, eval_records, encoder)
    weights = make_weights(records, model_config, args, accelerator.device)
    mv.check_files(accelerator, "data_path", records, args.image_folder, encoder)
    mv.check_files(accelerator, "eval_path", eval_records, args.eval_image_folder, encoder)
    stream = mv.SampleStream(encoder, args)
    batch_size, world_size = args.per_device_train_batch_size, accelerator.num_processes
    samples_per_step = batch_size * args.gradient_accumulation_steps * world_size
    total_steps = mv.count_steps(len(records), samples_per_step, args)

    # ---- model and optimizer
    resumed = mv.find_checkpoint(args)
    if resumed:
        check_same_head(resumed, model_config)
    model_class = classifier_class(model_config.model_type, bool(getattr(model_config, "mlp_head_dim", 0)))
    raw_model = mv.load_model(args, accelerator.device, resumed, model_class, model_config)
    engine = mv.Engine(accelerator, raw_model, args)
    model, raw_model = engine.model, engine.raw_model

    # ---- resume: `state` is everything that is not a tensor
    state = {
        "step": 0, "samples_seen": 0, "bad_steps": 0, "bad_videos": 0, "all_videos": 0, "eval_due": False,
        "save_due": False, "best": None, "best_checkpoint": None, "evals_without_gain": 0,
        "run": mv.run_identity(args, encoder, records, samples_per_step),
    }  # fmt: skip
    state["run"]["class-balanced order"] = args.class_balanced_order
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
        if args.problem_type != REGRESSION:
            first, *notes = describe_labels(Counter(name for names in records["label"] for name in names))
            mv.say(f"  labels     {first}" + "".join(f"\n  note       {note}" for note in notes))

    # ---- the loop: evaluation and saving come first, so that a run stopped in one begins with it again
    order = None
    if args.class_balanced_order:
        order = partial(class_balanced_order, encode_targets(records, model_config).numpy())
    windows = mv.step_windows(len(records), samples_per_step, args.seed, state["samples_seen"], order)
    windows = itertools.islice(windows, max(0, total_steps - state["step"]))
    rank = accelerator.process_index
    steps = stream.steps(records, windows, batch_size, rank, world_size, args.image_folder)
    bar = tqdm(total=total_steps, initial=state["step"], desc="train", disable=not is_main)
    model.train()
    caught, saved_step, stop = mv.catch_signals(), None, False
    while True:
        epoch = state["samples_seen"] / len(records)
        if state["eval_due"]:
            evaluation = evaluate(engine, stream, eval_records, encoder, args, weights, caught)
            if stop := evaluation is None:
                break
            result, predictions = evaluation
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
                if predictions and (improved or not args.load_best_model_at_end):  # of the model that is published
                    write_predictions(output_dir / "predictions.jsonl", predictions)
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
            "supervised_tokens": len(kept),
        }
        counts, stop = mv.exchange(accelerator, state, window, counts, caught)
        if stop:
            break
        mv.check_bad_ratio(accelerator, args, state, counts)
        window_tokens = counts["supervised_tokens"]

        # ---- forward, backward, step
        factor = mv.lr_factor(state["step"], total_steps, args)
        engine.set_learning_rate(factor)
        learning = counts["supervised_tokens"] > 0  # if not, no process computes or updates anything
        step_loss = torch.full((), 0.0 if learning else math.nan, device=accelerator.device)
        hits = torch.full((), 0.0 if learning else math.nan, device=accelerator.device)
        for k, samples in enumerate(rows if learning else []):
            last = k == len(rows) - 1
            inputs, targets = pack(samples, encoder, model_config, accelerator.device)
            with engine.row(last):
                with engine.autocast():
                    # Gradients are averaged over processes: times world_size makes it the sum over the window.
                    logits = model(**inputs).logits
                    loss = objective(logits, targets, args, weights) * world_size / window_tokens
                step_loss += loss.detach() / world_size
                hits += count_hits(logits.detach(), targets, model_config) / window_tokens
                if last:
                    step_loss, hits = accelerator.reduce(torch.stack([step_loss, hits]))
                    loss_finite = bool(torch.isfinite(step_loss))
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
            "loss": float(step_loss),
            "mae" if args.problem_type == REGRESSION else "accuracy": float(hits),
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
        progress = f"loss {float(step_loss):.4f}" if learning else "nothing to learn"
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
