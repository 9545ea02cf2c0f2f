"""The one helper that the trainers share: everything about many videos in one sample that has one right answer.

Sections, in the order data flows: arguments, records, sampling and decoding, encoding, packing and attention, loading
the model, processes, order and prefetch, checkpoints. It knows nothing of objectives: losses, metrics and loops stay
in the trainers.

Shapes in the comments: B samples in a row, T tokens, N clips (videos and images), F frames, P patches, S supervised
tokens, H attention heads, D head dimension.
"""

import argparse
import ast
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import huggingface_hub
    import jinja2.meta
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import safetensors.numpy
    import torch
    import torch.nn.functional as F
    import transformers
    import xxhash
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        DistributedType,
        InitProcessGroupKwargs,
        LoggerType,
        fsdp2_prepare_model,
        gather_object,
    )
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from PIL import Image
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm
    from transformers import HfArgumentParser
except ModuleNotFoundError as error:  # most likely the wrong Python
    raise SystemExit(
        f"{Path(sys.argv[0]).name}: no module {error.name!r} in this Python, {sys.executable}. Activate the "
        "environment: source .venv/bin/activate (make setup creates it; elsewhere: pip install -r requirements.txt)"
    ) from None

# Slow to import, therefore reached where it is used (transformers loads its modules when a name is first asked for):
# models and processors, datasets, torch.distributed, peft, scikit-learn. --help then takes 2.9 CPU-seconds instead of
# 6.2; the floor is torch's own import, 1.9.
if TYPE_CHECKING:
    from datasets import Dataset

# Qwen's reference numbers (qwen_vl_utils 0.0.14): frames per second, frames, tokens.
FRAME_FACTOR = 2  # frames merged into one temporal patch: frame counts are multiples of it
MAX_FRAMES = 768
MAX_ASPECT_RATIO = 200
IMAGE_MIN_TOKENS, IMAGE_MAX_TOKENS = 4, 16384  # bounds of smart_resize when nothing else is asked
VIDEO_MIN_TOKENS_PER_FRAME, VIDEO_MAX_TOKENS_PER_FRAME = 128, 768
VIDEO_TOTAL_TOKENS = 128000 * 0.9  # one video never exceeds this many pixels / factor² (28² or 32² pixels per token)

# Model families, and the one thing about each that neither its config nor its processor says: how the model learns
# when the frames of a video are. Not at all (None), from temporal positions that follow the video's rate, or from text
# before each pair of frames: "<0.3 seconds>".
FAMILIES = {"qwen2_vl": None, "qwen2_5_vl": "positions", "qwen3_vl": "text", "qwen3_5": "text"}
NEEDED_TRANSFORMERS = {"qwen3_5": "5.24"}  # whose recurrent layers take the states that they start from
UNSUPPORTED_FAMILIES = {
    "_moe": "mixture-of-experts models are not supported: take a dense model of the same family",
    "_omni": "models that hear and speak are not supported: take Qwen3-VL or Qwen3.5",
    "qwen4_exp": "its layers are not supported: take Qwen3.5 or Qwen3-VL",
}


# Tokens that each family's authors added to the vocabulary: an added token that is not among them is the user's.
QWEN2_VL_TOKENS = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
}  # fmt: skip
FAMILY_TOKENS = {
    "qwen2_vl": QWEN2_VL_TOKENS,
    "qwen2_5_vl": QWEN2_VL_TOKENS | {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
                                     "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"},
}  # fmt: skip
THINKING_TOKENS = {"<tool_response>", "</tool_response>", "<think>", "</think>"}
FAMILY_TOKENS["qwen3_vl"] = FAMILY_TOKENS["qwen2_5_vl"] | THINKING_TOKENS
FAMILY_TOKENS["qwen3_5"] = FAMILY_TOKENS["qwen3_vl"] | {
    "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
    "<tts_text_bos_single>",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ 1. arguments


def arg(default, help_text, **metadata):
    """A dataclass field that HfArgumentParser shows with `help_text`; `aliases` and `choices` go to argparse."""
    return field(default=default, metadata={"help": help_text, **metadata})


LR_SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup"]
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit",
              "paged_adamw_32bit", "adafactor", "sgd"]  # fmt: skip
STRATEGIES = ["no", "steps", "epoch"]
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass
class TrainingArguments:
    """Flags that every trainer takes. Lengths in tokens, sizes in pixels, times in seconds, steps of the optimizer."""

    # model
    model_id: str = arg("Qwen/Qwen2.5-VL-3B-Instruct", "Hub name or folder of a Qwen2-VL or Qwen2.5-VL model.")
    cache_dir: str | None = arg(None, "Where hub downloads are kept (default: the hub's own cache).")
    attn_implementation: str = arg(
        "auto",
        "Attention kernel for packed rows. auto: varlen in half precision on CUDA (A100 or newer), else sdpa.",
        choices=["auto", "varlen", "flash_attn", "sdpa"],
    )
    freeze_vision_tower: bool = arg(False, "Do not train the vision tower (its merger has its own flag).")
    freeze_merger: bool = arg(False, "Do not train the merger between the vision tower and the language model.")
    freeze_llm: bool = arg(False, "Do not train the language model, its embeddings and its head.")
    unfreeze_topk_llm: int = arg(0, "With --freeze_llm: train the last K decoder layers all the same.")
    unfreeze_topk_vision: int = arg(0, "With --freeze_vision_tower: train the last K tower blocks all the same.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass: less memory, slower.")

    # adapters: LoRA beside frozen weights, which may be quantised
    lora_enable: bool = arg(
        False,
        "Train LoRA adapters on the frozen language model (needs --freeze_llm True). Tower and merger are trained in "
        "full beside them, and peft keeps a frozen copy, unless --freeze_vision_tower and --freeze_merger.",
    )
    vision_lora: bool = arg(False, "Put adapters on the frozen vision tower and merger too.")
    use_dora: bool = arg(False, "DoRA: adapters that train the direction and the length of weights apart.")
    lora_rank: int = arg(64, "Rank of the adapters.")
    lora_alpha: int = arg(16, "Adapters are scaled by alpha / rank.")
    lora_dropout: float = arg(0.05, "Share of an adapter's inputs that is dropped in training.")
    lora_bias: str = arg(
        "none", "Biases to train besides: none, all (the tower's too), or the adapted layers'.",
        choices=["none", "all", "lora_only"],
    )  # fmt: skip
    lora_namespan_exclude: str | None = arg(
        None, "List such as \"['lm_head', 'embed_tokens']\": modules with one of these in their name get no adapter."
    )
    num_lora_modules: int = arg(-1, "Adapters on the last N of the chosen modules only; -1: on all.")
    lora_weight_path: str | None = arg(
        None, "Folder of an adapter to go on from: its rank, alpha, DoRA, biases and modules stand for the flags."
    )
    bits: int = arg(
        16, "Hold the frozen language model in 8 or 4 bits (QLoRA): one process or DDP.", choices=[16, 8, 4]
    )
    quant_type: str = arg("nf4", "Number format of --bits 4.", choices=["nf4", "fp4"])
    double_quant: bool = arg(True, "Quantise the scales of --bits 4 as well.")

    # data
    data_path: str | None = arg(
        None, "Training records: .json, .jsonl or .parquet files, or datasets names/folders (:split).", nargs="+"
    )
    eval_path: str | None = arg(None, "Held-out records, same formats; without it there is no evaluation.", nargs="+")
    image_folder: str | None = arg(
        None,
        "Folder that relative video and image paths start from (default: the data file's).",
        aliases=["--media_root", "--media-root"],
    )
    eval_image_folder: str | None = arg(None, "The same for --eval_path (default: --image_folder).")
    system_prompt: str | None = arg(None, "System message of records without one (default: the chat template's).")
    chat_template_kwargs: str | None = arg(
        None,
        "Options of the chat template, a JSON object such as '{\"enable_thinking\": false}'; a record's field of this "
        "name overrides it.",
    )
    max_seq_length: int = arg(32768, "Longest sample in tokens, visual tokens included; nothing is ever cut.")
    on_long_sample: str = arg(
        "error",
        "A sample over --max_seq_length: stop the run, or skip it and count it (a step that has no other updates "
        "nothing).",
        choices=["error", "skip"],
    )
    dataloader_num_workers: int = arg(
        4, "Decoding processes beside each training process; 0 decodes in the trainer, which a bad file may then hang."
    )
    on_bad_video: str = arg(
        "error",
        "A video or image that cannot be read: stop, leave it and its place in the text out, or leave the sample out. "
        "Either way it is listed in bad_videos.jsonl.",
        choices=["error", "drop_video", "drop_sample"],
    )
    max_bad_ratio: float = arg(0.01, "Stop when more than this share of the videos so far (at least 1,000) was bad.")
    decode_timeout: float = arg(60.0, "Seconds after which a file that is still being decoded counts as bad.")
    video_reader: str = arg(
        "pyav",
        "What decodes videos. decord: to match earlier runs; it conceals damage, and PyAV reads what it cannot.",
        choices=["pyav", "decord"],
    )
    video_cache: str | None = arg(
        None,
        "Folder that keeps decoded frames, or none (default: $MULTIVIDEO_CACHE, $HF_HOME/multivideo or "
        "~/.cache/multivideo).",
    )
    video_cache_limit_gb: float = arg(50.0, "Size at which the cache stops growing (or a fifth of the free disk).")

    # sampling and sizes (Qwen's reference arithmetic; a record's own options win)
    fps: float = arg(2.0, "Frames taken per second of video.")
    nframes: int | None = arg(None, "Frames taken per video, instead of --fps; shorter videos give all they have.")
    min_frames: int = arg(4, "Fewest frames per video under --fps (a multiple of 2); 4 is the reference.")
    max_frames: int = arg(MAX_FRAMES, "Most frames per video under --fps.")
    image_min_pixels: int | None = arg(None, "Images with fewer pixels are scaled up to it (default: 4 tokens).")
    image_max_pixels: int | None = arg(None, "Images with more pixels are scaled down to it (default: 16,384 tokens).")
    video_min_pixels: int | None = arg(
        None, "Video frames with fewer pixels are scaled up to it (default: 128 tokens)."
    )
    video_max_pixels: int | None = arg(
        None, "Video frames with more pixels are scaled down to it (default: 768 tokens)."
    )
    image_resized_width: int | None = arg(None, "Width of every image, rounded to a multiple of 28 (Qwen3: 32).")
    image_resized_height: int | None = arg(None, "Height of every image, rounded to a multiple of 28 (Qwen3: 32).")
    video_resized_width: int | None = arg(None, "Width of every video frame, rounded to a multiple of 28 (Qwen3: 32).")
    video_resized_height: int | None = arg(
        None, "Height of every video frame, rounded to a multiple of 28 (Qwen3: 32)."
    )
    max_video_tokens: int | None = arg(
        None,
        "Most visual tokens per sample, text of time stamps included: resolution shrinks first, then frames; whole "
        "videos are always kept.",
    )

    # optimisation
    num_train_epochs: float = arg(3.0, "Passes over the data; a fraction is allowed.")
    max_steps: int = arg(-1, "Optimizer steps, instead of --num_train_epochs.")
    per_device_train_batch_size: int = arg(8, "Samples packed into one row, per process.")
    per_device_eval_batch_size: int = arg(8, "The same in evaluation.")
    gradient_accumulation_steps: int = arg(1, "Rows per optimizer step, per process.")
    learning_rate: float = arg(5e-5, "Peak learning rate.")
    vision_lr: float | None = arg(None, "Peak learning rate of the vision tower (default: --learning_rate).")
    merger_lr: float | None = arg(None, "Peak learning rate of the merger (default: --learning_rate).")
    weight_decay: float = arg(0.0, "Decoupled weight decay; biases and norms have none.")
    adam_beta1: float = arg(0.9, "Decay of Adam's first moment.")
    adam_beta2: float = arg(0.999, "Decay of Adam's second moment.")
    adam_epsilon: float = arg(1e-8, "Adam's epsilon.")
    optim: str = arg("adamw_torch", "Optimizer; *_8bit and paged_* come from bitsandbytes.", choices=OPTIMIZERS)
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this global norm; 0 switches clipping off.")
    lr_scheduler_type: str = arg("linear", "Course of the learning rate after warm-up.", choices=LR_SCHEDULES)
    warmup_ratio: float = arg(0.0, "Share of all steps in which the learning rate rises from 0.")
    warmup_steps: int = arg(0, "The same in steps; wins over --warmup_ratio.")
    max_bad_steps: int = arg(5, "Stop after this many steps in a row whose loss or gradient is not finite.")

    # precision
    bf16: bool = arg(False, "bf16 autocast: trained weights stay fp32, frozen ones are bf16.")
    fp16: bool = arg(False, "fp16 autocast with a loss scaler: trained weights stay fp32, frozen ones are fp16.")
    pure_bf16: bool = arg(False, "Everything in bf16, trained weights too: small learning rates then change nothing.")
    tf32: bool = arg(True, "TF32 matrix products in fp32 on CUDA.")
    torch_compile: bool = arg(
        False, "Compile decoder layers and tower blocks one by one: one process or DDP; what it gains is not measured."
    )
    seed: int = arg(42, "Seed of the record order and of all random numbers.")

    # evaluation, checkpoints, logs
    output_dir: str = arg("output", "Everything a run writes goes here.")
    eval_strategy: str | None = arg(
        None, "When to evaluate (default: each epoch if --eval_path is given).", choices=STRATEGIES,
        aliases=["--evaluation_strategy", "--evaluation-strategy"],
    )  # fmt: skip
    eval_steps: int | None = arg(None, "Steps between evaluations (default: --logging_steps).")
    save_strategy: str = arg("steps", "When to write checkpoint-N.", choices=STRATEGIES)
    save_steps: int = arg(500, "Steps between checkpoints.")
    save_total_limit: int | None = arg(None, "Keep only this many checkpoints, the best one always among them.")
    load_best_model_at_end: bool = arg(False, "The final model is the best checkpoint's, not the last step's.")
    metric_for_best_model: str = arg("eval_loss", "Metric of an evaluation that decides which one is best.")
    greater_is_better: bool = arg(False, "A higher --metric_for_best_model is better (default: unless it is a loss).")
    early_stopping_patience: int = arg(
        0, "Stop after this many evaluations without improvement, such as one that is not finite; 0: never."
    )
    early_stopping_threshold: float = arg(0.0, "An improvement must exceed this to count for early stopping.")
    resume_from_checkpoint: str | None = arg(None, "auto (or True): the newest complete checkpoint; or its path.")
    resume_force: bool = arg(False, "Resume although the model, data, seed, batch or precision is another one.")
    logging_steps: int = arg(10, "Steps between lines sent to --report_to (metrics.jsonl has every step).")
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers: tensorboard, wandb, …, all or none."}
    )
    run_name: str | None = arg(None, "Name of the run in the trackers.")

    def check(self, given: set[str]) -> list[str]:
        """What is wrong with a trainer's own flags, as check_arguments says it of the shared ones."""
        return []

    def objective(self) -> str:
        """What the trainer minimises, in a few words for the model card."""
        return "fine-tuning"


def flags_between(first: str, last: str) -> set[str]:
    """Names of the shared flags from `first` to `last`, in the order of TrainingArguments."""
    names = [flag.name for flag in dataclasses.fields(TrainingArguments)]
    return set(names[names.index(first) : names.index(last) + 1])


# What a record becomes: the flags that tools share with training.
SAMPLE_FLAGS = {
    "model_id", "cache_dir", "data_path", "image_folder", "system_prompt", "chat_template_kwargs", "max_seq_length",
    *flags_between("decode_timeout", "video_cache"), *flags_between("fps", "max_video_tokens"),
}  # fmt: skip
# Flags that mean nothing without --lora_enable, and those that an adapter's own config answers.
ADAPTER_FLAGS = ["use_dora", "lora_rank", "lora_alpha", "lora_dropout", "lora_bias", "lora_namespan_exclude",
                 "num_lora_modules", "lora_weight_path"]  # fmt: skip
ADAPTER_SHAPE = {"lora_rank": "r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "lora_bias": "bias"}

# Flags that people bring along from 2U1/Qwen2-VL-Finetune or the HF Trainer, and what takes their place here.
REPLACED_FLAGS = {
    **dict.fromkeys(["deepspeed", "fsdp", "fsdp_config"], "say it to the launcher: accelerate launch --config_file "
                    "accelerate_configs/… train_sft.py"),
    **dict.fromkeys(["local_rank", "local-rank"], "start with accelerate launch, which needs no rank flag"),
    **dict.fromkeys(["use_liger", "use_liger_kernel", "use_liger_loss", "liger_kernel_config"],
                    "drop it: only supervised positions reach the output head"),
    **dict.fromkeys(["disable_flash_attn2", "disable_flash_attention"], "use --attn_implementation sdpa"),
    "image_max_pixles": "spelled --image_max_pixels", "video_max_pixles": "spelled --video_max_pixels",
    **dict.fromkeys(["lazy_preprocess", "remove_unused_columns", "do_train", "group_by_length",
                     "dataloader_pin_memory", "ddp_find_unused_parameters", "average_tokens_across_devices",
                     "torch_empty_cache_steps", "use_cache"], "drop it: nothing here needs it"),
    "do_eval": "drop it: --eval_path switches evaluation on",
    "eval_accumulation_steps": "drop it: evaluation keeps sums, not logits",
    "eval_delay": "drop it: use --eval_strategy steps with --eval_steps",
    "eval_on_start": "drop it: use --eval_strategy steps with --eval_steps",
    "logging_strategy": "drop it: metrics.jsonl has every step, --logging_steps is for trackers",
    "logging_dir": "drop it: everything goes to --output_dir",
    "overwrite_output_dir": "choose another --output_dir, or --resume_from_checkpoint auto",
    "lr_scheduler_kwargs": "drop it: the schedules of --lr_scheduler_type take no options",
    **dict.fromkeys(["activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"],
                    "use --gradient_checkpointing True, which is not reentrant and has no options"),
    **dict.fromkeys(["bf16_full_eval", "fp16_full_eval"], "drop it: evaluation has the precision of the training"),
    **dict.fromkeys(["optim_args", "optim_target_modules"], "drop it: --optim has no options but Adam's own flags"),
    "label_smoothing_factor": "drop it: the loss is the plain negative log-likelihood (for another, change sft_loss)",
    "neftune_noise_alpha": "drop it: there is no noise on embeddings; against overfitting there is --lora_dropout",
    **dict.fromkeys(["torch_compile_backend", "torch_compile_mode"], "use --torch_compile True: inductor's defaults"),
    **dict.fromkeys(["push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
                     "hub_revision"], "drop it, and upload after the training: hf upload NAME OUTPUT_DIR"),
    **dict.fromkeys(["save_only_model", "save_on_each_node", "enable_jit_checkpoint"],
                    "drop it: a checkpoint is always one that can be resumed; --save_total_limit keeps few"),
    **dict.fromkeys(["prediction_loss_only", "do_predict", "eval_do_concat_batches", "eval_use_gather_object",
                     "include_for_metrics", "batch_eval_metrics", "label_names", "generation_max_new_tokens"],
                    "drop it: evaluation gives the trainer's own metrics; tools/predict.py generates answers to "
                    "held-out records (--max_new_tokens) and their metrics"),
    **dict.fromkeys(["dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_in_order",
                     "dataloader_multiprocessing_context"], "drop it: --dataloader_num_workers processes decode "
                    "ahead, in order, as far as memory allows"),
    "dataloader_drop_last": "drop it: every record is used once in an epoch, whose last step is smaller",
    **dict.fromkeys(["data_seed", "full_determinism"], "use --seed: it decides on the order and all random numbers"),
    **dict.fromkeys(["ignore_data_skip", "restore_callback_states_from_checkpoint"],
                    "drop it: --resume_from_checkpoint continues at once and exactly"),
    "use_cpu": "say it to the launcher: accelerate launch --config_file accelerate_configs/cpu.yaml",
    **dict.fromkeys(["accelerator_config", "parallelism_config", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
                     "ddp_static_graph", "ddp_backend", "ddp_timeout"],
                    "drop it: how processes work together is the launcher's: --config_file accelerate_configs/…"),
    "auto_find_batch_size": "ask tools/check_data.py --gpu_memory_gb which batch fits",
    **dict.fromkeys(["logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level", "debug",
                     "log_level_replica", "include_num_input_tokens_seen", "disable_tqdm", "skip_memory_metrics"],
                    "drop it: metrics.jsonl has every step, with its tokens, times and memory"),
    **dict.fromkeys(["project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"],
                    "set it in the tracker's own environment variables; --run_name names the run"),
    **dict.fromkeys(["train_sampling_strategy", "length_column_name"], "drop it: nothing is padded, so that grouping "
                    "records by length would win nothing"),
    "enable_reasoning": "drop it: the chat templates of these models have no place for reasoning; write it into the "
    "answer's text, as in <think>…</think>",
}  # fmt: skip


# What other projects (LLaMA-Factory, ms-swift, TRL, Qwen's own script, older Trainers) call flags that are here too.
RENAMED_FLAGS = {
    **dict.fromkeys(["model", "model_name", "model_path", "model_name_or_path", "pretrained_model_name_or_path",
                     "base_model"], "--model_id"),
    **dict.fromkeys(["dataset", "dataset_name", "dataset_use", "dataset_path", "data", "data_file", "train_data",
                     "train_file", "train_path"], "--data_path"),
    **dict.fromkeys(["eval_data", "eval_data_path", "eval_dataset", "eval_file", "val_dataset", "val_file", "val_path",
                     "validation_file"], "--eval_path"),
    **dict.fromkeys(["video_folder", "video_dir", "video_root", "image_dir", "image_root", "media_dir", "media_folder",
                     "data_dir"], "--image_folder"),
    **dict.fromkeys(["output", "out_dir", "save_dir"], "--output_dir"),
    **dict.fromkeys(["epochs", "num_epochs", "max_epochs", "train_epochs"], "--num_train_epochs"),
    **dict.fromkeys(["steps", "num_steps", "total_steps", "train_steps", "max_train_steps", "num_train_steps"],
                    "--max_steps"),
    **dict.fromkeys(["batch_size", "train_batch_size", "micro_batch_size", "per_gpu_batch", "per_gpu_batch_size",
                     "per_gpu_train_batch_size", "per_device_batch_size"], "--per_device_train_batch_size"),
    **dict.fromkeys(["eval_batch_size", "per_gpu_eval_batch_size"], "--per_device_eval_batch_size"),
    **dict.fromkeys(["grad_accum", "grad_accum_steps", "accumulation_steps", "gradient_accumulation"],
                    "--gradient_accumulation_steps"),
    **dict.fromkeys(["lr", "base_lr", "peak_lr"], "--learning_rate"),
    **dict.fromkeys(["vit_lr", "vision_tower_lr", "vision_learning_rate"], "--vision_lr"),
    **dict.fromkeys(["mm_projector_lr", "projector_lr", "aligner_lr"], "--merger_lr"),
    **dict.fromkeys(["lr_scheduler", "lr_schedule", "scheduler"], "--lr_scheduler_type"),
    "optimizer": "--optim", "wd": "--weight_decay",
    **dict.fromkeys(["grad_clip", "clip_grad", "max_norm", "gradient_clipping"], "--max_grad_norm"),
    **dict.fromkeys(["max_length", "max_len", "max_seq_len", "model_max_length", "cutoff_len", "max_tokens"],
                    "--max_seq_length"),
    "load_in_4bit": "--bits 4", "load_in_8bit": "--bits 8",
    **dict.fromkeys(["quantization_bit", "quant_bits"], "--bits"),
    **dict.fromkeys(["lora", "use_lora", "use_peft"], "--lora_enable True"),
    "lora_r": "--lora_rank",
    **dict.fromkeys(["adapters", "adapter_path", "adapter_name_or_path", "lora_path"], "--lora_weight_path"),
    **dict.fromkeys(["freeze_vit", "freeze_vision", "freeze_visual"], "--freeze_vision_tower"),
    **dict.fromkeys(["freeze_aligner", "freeze_projector", "freeze_multi_modal_projector"], "--freeze_merger"),
    "tune_mm_vision": "--freeze_vision_tower False", "tune_mm_mlp": "--freeze_merger False",
    "tune_mm_llm": "--freeze_llm False",
    **dict.fromkeys(["video_fps", "sample_fps", "frame_rate"], "--fps"),
    **dict.fromkeys(["num_frames", "n_frames", "video_num_frames"], "--nframes"),
    **dict.fromkeys(["video_maxlen", "video_max_frames", "fps_max_frames"], "--max_frames"),
    **dict.fromkeys(["video_min_frames", "fps_min_frames"], "--min_frames"),
    **dict.fromkeys(["video_decoder", "video_backend", "video_load_backend", "video_reader_backend"],
                    "--video_reader"),
    "max_pixels": "--video_max_pixels (or --image_max_pixels)",
    "min_pixels": "--video_min_pixels (or --image_min_pixels)",
    **dict.fromkeys(["flash_attn", "use_flash_attn", "attn_impl"], "--attn_implementation"),
    **dict.fromkeys(["workers", "num_workers", "preprocessing_num_workers"], "--dataloader_num_workers"),
    **dict.fromkeys(["resume", "resume_from"], "--resume_from_checkpoint"),
    **dict.fromkeys(["system", "default_system"], "--system_prompt"),
    **dict.fromkeys(["dpo_beta", "pref_beta", "kl_coef"], "--beta"),
    **dict.fromkeys(["ref_model", "ref_model_path"], "--ref_model_id"),
    **dict.fromkeys(["group_size", "num_return_sequences"], "--num_generations"),
    **dict.fromkeys(["max_new_tokens", "max_response_length"], "--max_completion_length"),
    "reward_functions": "--reward_funcs",
}  # fmt: skip


class _CollectingParser(HfArgumentParser):
    """HfArgumentParser whose errors are raised, so that all of them can be gathered before anything is reported."""

    def error(self, message):
        raise argparse.ArgumentError(None, message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and "default:" not in action.help
        return action.help + " [%(default)s]" if shown else action.help


def parse_arguments(
    arguments_class, argv: list[str] | None = None, unchecked: tuple[str, ...] = (), used: set[str] | None = None
):
    """Read the command line into `arguments_class` (a TrainingArguments), reporting every problem at once.

    For tools: `unchecked` flags may have any value; --help shows the `used` ones alone (default: all) and says that
    the others of a training command change nothing.

    Raises:
        SystemExit: 0 with a hint when nothing was typed, 2 with all problems when anything is wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(sys.argv[0]).name
    if not argv:
        say(f"{script} needs at least --data_path FILE and --output_dir FOLDER (and --model_id for anything but "
            f"{TrainingArguments.model_id}).\n"
            f"All flags: python {script} --help. To see it work first: make demo")  # fmt: skip
        raise SystemExit(0)
    parser = _CollectingParser(
        arguments_class, allow_abbrev=False, exit_on_error=False, description=inspect.getdoc(sys.modules["__main__"]),
        formatter_class=_HelpFormatter,
    )  # fmt: skip
    if used is not None:
        parser.epilog = "The other flags of a training command may be given too; they change nothing here."
        for action in parser._actions:
            if action.dest not in {"help", *used}:
                action.help = argparse.SUPPRESS
    groups = []  # a flag and the words after it
    for word in argv:
        if not groups or re.match(r"--?[A-Za-z][\w-]*(=|$)", word):
            groups.append([])
        groups[-1].append(word)
    problems, good = [], []
    for flag, *values in groups:  # one flag at a time: argparse stops at its first error
        # -1e-5 and "- be brief" are values, which argparse believes of short negative numbers only
        words = [f"{flag}={values[0]}"] if values and values[0].startswith("-") else [flag, *values[:1]]
        words += values[1:]
        try:
            extra = parser.parse_known_args(words)[1]
        except argparse.ArgumentError as error:
            problems.append(f"{' '.join([flag, *values])}: {error.message}")
            continue
        if extra and extra[0] == words[0]:
            problems.append(_answer_unknown(flag, parser))
        else:
            if extra:
                problems.append(f"{flag}: {' '.join(extra)!r} is one too many (a value with spaces needs quotes)")
            good += words[: len(words) - len(extra)]
    (args,) = parser.parse_args_into_dataclasses(args=good, look_for_args_file=False)
    given = {group[0].split("=")[0].lstrip("-").replace("-", "_") for group in groups}
    args.given = frozenset(given)
    for flag in ("data_path", "eval_path"):
        if isinstance(several := getattr(args, flag), list):
            setattr(args, flag, BETWEEN_SOURCES.join(several))
    idle = tuple(f"--{flag} " for flag in unchecked)
    found = check_arguments(args, given) + args.check(given)
    problems += [problem for problem in found if not problem.startswith(idle)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        say(f"{script}: {count} with the arguments\n" + "\n".join(f"  • {problem}" for problem in problems))
        raise SystemExit(2)
    return args


def _answer_unknown(word, parser):
    typed = word.split("=")[0]
    if not typed.startswith("-"):
        return f"{word!r} belongs to no flag: every value follows its --flag"
    name = typed.lstrip("-")
    answer = REPLACED_FLAGS.get(name) or REPLACED_FLAGS.get(name.replace("-", "_"))
    if answer is None:
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        renamed = RENAMED_FLAGS.get(name.replace("-", "_").lower(), "")
        here = renamed.split(" ")[0] in known  # a flag of this trainer
        close = [renamed] if here else difflib.get_close_matches(f"--{name}", known, n=1)
        answer = f"no such flag; did you mean {close[0]}?" if close else "no such flag; --help lists all"
    return f"{typed}: {answer}"


def check_arguments(args: TrainingArguments, given: set[str]) -> list[str]:
    """Every conflict among the arguments, as sentences that name the mend; `given` are the flags that were typed."""
    problems = []

    def complain(condition, sentence):
        if condition:
            problems.append(sentence)

    for option in dataclasses.fields(args):
        value = getattr(args, option.name)
        complain(value in ("", [""]) and option.name not in ("system_prompt", "resume_from_checkpoint"),
                 f"--{option.name} is empty (an unset shell variable?): give a value or drop the flag")  # fmt: skip
        complain(
            isinstance(value, float) and not math.isfinite(value), f"--{option.name} {value}: must be a finite number"
        )
    complain(args.data_path is None and "data_path" not in given,
             "--data_path is missing: the file with the training records")  # fmt: skip
    for flag, folder_flag in (("data_path", "image_folder"), ("eval_path", "eval_image_folder")):
        sources = data_sources(getattr(args, flag) or ".")
        for path in map(Path, sources):
            if not path.exists() and (folder := Path(str(path).rsplit(":", 1)[0])).is_dir():
                path = folder  # :split follows
            complain(looks_local(path) and not path.exists(), f"--{flag} {path}: no such file")
            complain(path.is_file() and path.suffix.lower() not in ("", *DATA_SUFFIXES),
                     f"--{flag} {path}: expected a file whose name ends in {', '.join(DATA_SUFFIXES)}")  # fmt: skip
        complain(len(set(sources)) < len(sources),
                 f"--{flag} names {max(sources, key=sources.count)} twice: name it once")  # fmt: skip
        folders = sorted({str(Path(source).parent) for source in sources if Path(source).is_file()})
        complain(len(folders) > 1 and not args.image_folder and not getattr(args, folder_flag),
                 f"--{flag} has files of the folders {', '.join(folders)}: say with --{folder_flag} where relative "
                 "paths start from")  # fmt: skip
    for flag in ("image_folder", "eval_image_folder"):
        path = getattr(args, flag)
        complain(path and not Path(path).is_dir(), f"--{flag} {path}: no such folder")
    complain(args.system_prompt and CONTROL_TOKENS.search(args.system_prompt),
             "--system_prompt has a control token such as <|im_end|>: take it out")  # fmt: skip
    kwargs = None
    with contextlib.suppress(ValueError):
        kwargs = json.loads(args.chat_template_kwargs or "{}")
    complain(not isinstance(kwargs, dict), f"--chat_template_kwargs {args.chat_template_kwargs}: expected a JSON "
             "object such as '{\"enable_thinking\": false}'")  # fmt: skip
    folder = args.video_cache or default_cache()
    args.video_cache = None if folder.lower() == "none" else os.path.abspath(os.path.expanduser(folder))
    if args.video_cache:
        try:
            os.makedirs(args.video_cache, mode=0o700, exist_ok=True)
            reason = None if os.access(args.video_cache, os.W_OK) else "cannot be written to"
        except OSError as error:
            reason = error.strerror
        complain(reason, f"--video_cache {args.video_cache}: {reason}: name another folder, or none")
    complain(Path(args.output_dir).is_file(), f"--output_dir {args.output_dir} is a file: name a folder")
    complain(
        looks_local(args.model_id) and not Path(args.model_id).is_dir(), f"--model_id {args.model_id}: no such folder"
    )

    complain(args.video_reader == "decord" and not _has_decord2(), "--video_reader decord needs the package decord2: "
             "pip uninstall decord, pip install 'decord2>=3.4'")  # fmt: skip
    complain({"fps", "nframes"} <= given, "--fps and --nframes contradict each other: give one")
    for kind in ("image", "video"):
        width, height = getattr(args, f"{kind}_resized_width"), getattr(args, f"{kind}_resized_height")
        complain((width is None) != (height is None),
                 f"--{kind}_resized_width {width}, --{kind}_resized_height {height}: give both or none")  # fmt: skip
        low, high = getattr(args, f"{kind}_min_pixels"), getattr(args, f"{kind}_max_pixels")
        complain(width is None and low and high and low > high,
                 f"--{kind}_min_pixels {low} is above --{kind}_max_pixels {high}: bring them in order")  # fmt: skip
    for flag in ("fps", "nframes", "image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels",
                 "image_resized_width", "image_resized_height", "video_resized_width", "video_resized_height",
                 "max_video_tokens", "max_seq_length", "min_frames", "max_frames", "num_train_epochs", "save_steps",
                 "eval_steps", "logging_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                 "gradient_accumulation_steps", "save_total_limit", "max_bad_steps", "adam_epsilon",
                 "decode_timeout"):  # fmt: skip
        value = getattr(args, flag)
        complain(value is not None and value <= 0, f"--{flag} {value}: must be above 0")
    for flag in ("learning_rate", "vision_lr", "merger_lr", "weight_decay", "max_grad_norm", "warmup_steps",
                 "dataloader_num_workers", "early_stopping_patience", "unfreeze_topk_llm",
                 "unfreeze_topk_vision", "video_cache_limit_gb"):  # fmt: skip
        value = getattr(args, flag)
        complain(value is not None and value < 0, f"--{flag} {value}: must be 0 or more")
    for flag in ("adam_beta1", "adam_beta2"):
        complain(not 0 <= getattr(args, flag) < 1, f"--{flag} {getattr(args, flag)}: must be 0 or more and below 1")
    complain(not 0 <= args.seed < 2**32, f"--seed {args.seed}: must be 0 or more and below 2³²")
    complain(
        args.max_steps == 0 or args.max_steps < -1, f"--max_steps {args.max_steps}: must be above 0 (or -1: by epochs)"
    )
    complain(not 0 <= args.max_bad_ratio <= 1, f"--max_bad_ratio {args.max_bad_ratio}: must lie between 0 and 1")
    complain(not 0 <= args.warmup_ratio <= 1, f"--warmup_ratio {args.warmup_ratio}: must lie between 0 and 1")
    complain(args.nframes == 1, "--nframes 1: two frames make one temporal patch, the fewest is 2")
    complain(args.min_frames % FRAME_FACTOR, f"--min_frames {args.min_frames}: must be a multiple of {FRAME_FACTOR}")
    complain(
        args.max_frames < args.min_frames, f"--max_frames {args.max_frames} is below --min_frames {args.min_frames}"
    )

    complain(args.bf16 + args.fp16 + args.pure_bf16 > 1, "--bf16, --fp16 and --pure_bf16 exclude each other: give one")
    complain(args.freeze_llm and args.freeze_merger and args.freeze_vision_tower
             and not (args.unfreeze_topk_llm or args.unfreeze_topk_vision or args.lora_enable
                      or hasattr(args, "head_lr")),
             "--freeze_llm, --freeze_merger and --freeze_vision_tower leave nothing to train: drop one")  # fmt: skip
    complain(args.unfreeze_topk_llm and not args.freeze_llm, "--unfreeze_topk_llm needs --freeze_llm True")
    complain(args.unfreeze_topk_vision and not args.freeze_vision_tower,
             "--unfreeze_topk_vision needs --freeze_vision_tower True")  # fmt: skip

    complain(args.lora_enable and not args.freeze_llm,
             "--lora_enable needs --freeze_llm True: adapters stand beside frozen weights")  # fmt: skip
    complain(args.vision_lora and not (args.lora_enable and args.freeze_vision_tower),
             "--vision_lora needs --lora_enable True and --freeze_vision_tower True")  # fmt: skip
    idle = [f"--{flag}" for flag in ADAPTER_FLAGS if flag in given]
    complain(idle and "lora_enable" not in given, f"{', '.join(idle)}: for adapters, which need --lora_enable True")
    complain(args.bits < 16 and not args.lora_enable, f"--bits {args.bits} needs --lora_enable True (and --freeze_llm "
             "True): quantised weights cannot be trained themselves")  # fmt: skip
    complain(args.bits < 16 and args.unfreeze_topk_llm,
             f"--unfreeze_topk_llm with --bits {args.bits}: quantised layers cannot be trained: drop one")  # fmt: skip
    complain(args.torch_compile and (launched_with("deepspeed") or launched_with("fsdp")), "--torch_compile True runs "
             "in one process or under DDP: drop it, or choose another file of accelerate_configs/")  # fmt: skip
    complain(args.bits < 16 and (launched_with("deepspeed") or launched_with("fsdp")), f"--bits {args.bits} runs in "
             "one process or under DDP: choose another file of accelerate_configs/")  # fmt: skip
    complain(args.lora_rank <= 0, f"--lora_rank {args.lora_rank}: must be above 0")
    complain(not 0 <= args.lora_dropout < 1, f"--lora_dropout {args.lora_dropout}: must be 0 or more and below 1")
    complain(args.num_lora_modules == 0 or args.num_lora_modules < -1,
             f"--num_lora_modules {args.num_lora_modules}: must be above 0 (or -1: all)")  # fmt: skip
    complain(_listed(args.lora_namespan_exclude) is None, f"--lora_namespan_exclude {args.lora_namespan_exclude}: "
             "expected a list of names in quotes, as in \"['lm_head', 'embed_tokens']\"")  # fmt: skip
    if folder := args.lora_weight_path:
        files = [Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        missing = [file.name for file in files if not file.is_file()]
        held = {} if missing else json.loads(files[0].read_text())
        complain(missing, f"--lora_weight_path {folder}: no {' and no '.join(missing)} there")
        complain(held and held.get("peft_type") != "LORA", f"--lora_weight_path {folder}: not a LoRA adapter")
        for flag, key in ADAPTER_SHAPE.items():
            value = held.get(key, getattr(args, flag))
            complain(flag in given and getattr(args, flag) != value,
                     f"--{flag} {getattr(args, flag)}: the adapter of --lora_weight_path has {value}")  # fmt: skip
            setattr(args, flag, value)
        targets = held.get("target_modules") or []
        targets = [targets] if isinstance(targets, str) else targets
        excluded = _listed(args.lora_namespan_exclude) or []
        adapted = [name for name in targets if any(word in name for word in excluded)]
        complain(adapted, f"--lora_namespan_exclude {args.lora_namespan_exclude}: the adapter of --lora_weight_path "
                 f"is on {len(adapted)} such modules: drop the flag")  # fmt: skip
        run, modules = run_arguments(folder) or {}, args.num_lora_modules
        then = run.get("num_lora_modules", modules)
        complain(modules not in (-1, then), f"--num_lora_modules {modules}: the run of --lora_weight_path had {then}: "
                 "give the same, or drop the flag")  # fmt: skip
        # What was trained in full beside the adapter is in its file, and needs a place here.
        for flag in ("freeze_vision_tower", "freeze_merger", "unfreeze_topk_llm", "unfreeze_topk_vision"):
            now = getattr(args, flag)
            then = run.get(flag, now)
            complain(now > then if flag.startswith("freeze") else now < then,
                     f"--{flag} {now}: the run of --lora_weight_path had {then}, and what it trained is in the "
                     f"adapter's file: give --{flag} {then}")  # fmt: skip

    if args.eval_strategy is None:
        args.eval_strategy = "epoch" if args.eval_path else "no"
    complain(
        args.eval_strategy != "no" and not args.eval_path, f"--eval_strategy {args.eval_strategy} needs --eval_path"
    )
    wants_eval = [name for name in ("load_best_model_at_end", "early_stopping_patience") if getattr(args, name)]
    complain(wants_eval and args.eval_strategy == "no",
             f"--{' and --'.join(wants_eval)}: needs --eval_path, and no --eval_strategy no")  # fmt: skip
    if "greater_is_better" not in given:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    complain(args.greater_is_better and args.metric_for_best_model.endswith("loss"),
             f"--greater_is_better with --metric_for_best_model {args.metric_for_best_model} keeps the worst "
             "checkpoint: drop the first")  # fmt: skip
    complain(args.load_best_model_at_end and args.save_strategy == "no",
             "--load_best_model_at_end needs checkpoints: drop --save_strategy no")  # fmt: skip
    if str(args.resume_from_checkpoint).lower() in ("true", "auto"):
        args.resume_from_checkpoint = "auto"
    elif str(args.resume_from_checkpoint).lower() in ("none", "false", ""):
        args.resume_from_checkpoint = None
    resume = args.resume_from_checkpoint
    complain(
        resume not in (None, "auto") and not Path(resume).is_dir(),
        f"--resume_from_checkpoint {resume}: no such folder",
    )
    complain(args.resume_force and resume is None, "--resume_force needs --resume_from_checkpoint auto")
    complain(resume is None and list_checkpoints(args.output_dir),
             f"--output_dir {args.output_dir} holds checkpoints of an earlier run: continue it with "
             "--resume_from_checkpoint auto, or name another folder")  # fmt: skip

    complain(len(args.report_to) > 1 and "none" in args.report_to, "--report_to none excludes all other trackers")
    available = {tracker.value for tracker in get_available_trackers()}
    for name in args.report_to:
        complain(name not in ("", "none", *LoggerType.list()),
                 f"--report_to {name}: no such tracker; known: none, {', '.join(LoggerType.list())}")  # fmt: skip
        complain(name in LoggerType.list()[1:] and name not in available,
                 f"--report_to {name} needs its package: pip install {name}")  # fmt: skip
    uses_bitsandbytes = {
        f"--optim {args.optim}": "8bit" in args.optim or args.optim.startswith("paged"),
        f"--bits {args.bits}": args.bits < 16,
    }
    for flag, uses in uses_bitsandbytes.items():
        complain(uses and importlib.util.find_spec("bitsandbytes") is None,
                 f"{flag} needs bitsandbytes: pip install bitsandbytes")  # fmt: skip
    complain(args.attn_implementation == "flash_attn" and importlib.util.find_spec("flash_attn") is None,
             "--attn_implementation flash_attn needs the flash-attn package; varlen comes with torch")  # fmt: skip
    flash = args.attn_implementation in ("varlen", "flash_attn")
    complain(flash and not (args.bf16 or args.fp16 or args.pure_bf16),
             f"--attn_implementation {args.attn_implementation} takes half precision only: add --bf16 True, or use "
             "sdpa or auto")  # fmt: skip
    complain(flash and not torch.cuda.is_available(),
             f"--attn_implementation {args.attn_implementation} needs a CUDA device: use sdpa or auto")  # fmt: skip
    if flash and torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < FLASH_CAPABILITY:
        problems.append(f"--attn_implementation {args.attn_implementation} needs a GPU of compute capability 8.0 or "
                        f"newer, this one has {found[0]}.{found[1]}: use sdpa or auto")  # fmt: skip
    return problems


def _has_decord2():
    """The maintained build; the package decord has the same module, with an FFmpeg of 2018."""
    try:
        return tuple(map(int, importlib.metadata.version("decord2").split(".")[:2])) >= (3, 4)
    except importlib.metadata.PackageNotFoundError:
        return False


def _listed(text):
    """The strings of a Python or JSON list, None if it is anything else."""
    try:
        names = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError):
        return None
    good = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
    return list(names) if good else None


def looks_local(name) -> bool:
    """Whether the name of a model or data set can only be meant as a path, and not as a hub name."""
    name = str(name)
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.lower().endswith(DATA_SUFFIXES)


INTACT = "what was saved before is intact: make room or mend the disk, then --resume_from_checkpoint auto"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class InputError(ValueError):
    """A wrong argument, record, file or checkpoint, whose message says all: `run` shows it without a traceback."""


class BadVideo(InputError):
    """A record whose video or image cannot be read."""

    def __init__(self, record: str, path: str, reason: str):
        super().__init__(record, path, reason)
        self.record, self.path, self.reason = record, path, reason

    def __str__(self):
        return (f"{record_name(self.record)}: {self.path}: {self.reason}. Mend the file, take it out of the record, "
                "or give --on_bad_video drop_video or drop_sample")  # fmt: skip


def record_name(name: str) -> str:
    """How a message calls a record by its id, which is "record 3" or "line 3" where it has none of its own."""
    return name if name.lower().startswith(("record", "line ")) else f"record {name}"


def run(main):
    """Run a trainer's main(); what is wrong with its input or its disk ends it with one message and exit code 1.

    One of several processes leaves at once, without the clean-up in which it might wait for the others, or be aborted
    because a communication thread still runs.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        main()
    except (InputError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if not full and not isinstance(error, InputError):
            traceback.print_exc()
        else:
            mend = f"; {INTACT}" if full else ""
            print(f"\n{Path(sys.argv[0]).name}: {error}{mend}", file=sys.stderr, flush=True)
        code = 1
    except Exception as error:
        if several and lost_another(error):
            print(f"\nprocess {os.environ['RANK']} ends because another one has ended: that one says why",
                  file=sys.stderr, flush=True)  # fmt: skip
        else:
            traceback.print_exc()
        code = 1
    except KeyboardInterrupt:  # before the loop, where nothing is to be saved
        code = 130
    except SystemExit as end:
        code = end.code
    else:
        code = 0
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


LOST = re.compile(  # what gloo, NCCL and torch's store report of it
    "gloo.*(by peer|Broken pipe)|remote process exit|communicator was aborted|remote server shutdown", re.S
)


def lost_another(error: Exception) -> bool:
    """Whether an error only says that a process on the other end of a connection is gone."""
    return bool(LOST.search(str(error)))


def say(message: str):
    """Print once, from the first process of all (launchers set RANK before torch.distributed exists)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- 2. records

# The one schema. A part's `files` holds one path (video, image) or several (frames: images that make one video).
PART = {"type": pa.string(), "text": pa.string(), "files": pa.list_(pa.string()),
        "fps": pa.float64(), "nframes": pa.int64(), "min_frames": pa.int64(), "max_frames": pa.int64(),
        "start": pa.float64(), "end": pa.float64(),
        "min_pixels": pa.int64(), "max_pixels": pa.int64(), "total_pixels": pa.int64(),
        "resized_width": pa.int64(), "resized_height": pa.int64()}  # fmt: skip
OPTIONS = tuple(PART)[3:]  # of a video or image, or at the record's top level of all its videos
# A turn's `train` is false where the answer is not learned, else null; `tool_calls` and the record's
# `chat_template_kwargs`, tools among them, are JSON.
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(pa.struct(PART)), "train": pa.bool_(),
                               "reasoning": pa.string(), "tool_calls": pa.string()}))  # fmt: skip
CONVERSATION = pa.schema({"id": pa.string(), "messages": MESSAGES, "chat_template_kwargs": pa.string()})

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
         "tool": "tool"}  # fmt: skip
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")  # of an assistant turn
OPTION_ALIASES = {"video_start": "start", "video_end": "end"}
OTHER_NAMES = {"prompt": ("question", "input", "problem_text", "user"),
               "completion": ("answer", "output", "response", "caption", "target", "assistant")}  # fmt: skip
TRAIN_FIELDS = ("loss", "weight", "train", "training")  # of a turn: whether its answer is learned
# Fields that would change what is learned, are not read, and are therefore refused: what to do instead.
REFUSED_FIELDS = {
    "history": "write the earlier turns as turns of the conversation",
    "mask_history": "give the earlier answers 'loss': false, or use --train_on last",
    "audio": "these models do not hear: remove it",
    "audios": "these models do not hear: remove it",
    "objects": "write the boxes or points into the text, in the model's notation",
    "reward_model": "write its ground_truth as a field of the record: 'solution'",
    "system_prompt": "rename it to 'system'",
    "system_message": "rename it to 'system'",
    "rejected_messages": "write both answers as 'chosen' and 'rejected'",
    "weight": "records have no weights: repeat the record instead",
    "margin": "there is no margin per pair: remove it",
    "rejected_videos": "both answers are to the same videos: make two records, or remove it",
    "rejected_images": "both answers are to the same images: make two records, or remove it",
    "timestamps": "times come from the files; for a part of a video give 'start' and 'end'",
}
REFUSED_TURN_FIELDS = {
    "loss_scale": "answers are learned or not: give 'loss': true or false",
    "function_call": "give it as 'tool_calls', a list of {'name', 'arguments'}, or write it into the text",
}
# What a record may have and only some chat templates render: see Encoder.template_reads.
UNRENDERED = {
    "reasoning": "write it into the answer's text, such as <think>…</think> before the answer, or remove the field",
    "tool_calls": "write the calls into the text, or remove the field",
    "tools": "write the definitions into the system text, or remove the field",
    "tool": "make it a user turn",
}
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
CLIP = re.compile(r"(?:<[\d.]+ seconds>)?<\|vision_start\|>")  # with the time stamp before it
# Of an answer; <think> is not in it where it was sampled after a prompt that ends with it.
THOUGHT = re.compile(r"\s*(?:<think>)?\n?((?:(?!<think>).)*?)\n?</think>\s*", re.DOTALL)
PROBE = "probe_of_the_chat_template"
SWITCHES = ("enable_thinking", "preserve_thinking", "add_vision_id")  # templates ask whether they "are true"
CONTROL_TOKENS = re.compile(r"<\|(?:(?:video|image|vision)_pad|vision_start|vision_end|im_start|im_end|endoftext)\|>")
# A tag takes one newline on each side with it. Behind a backslash it is text: \<video> becomes <video>.
TAG = re.compile(r"((?:\r?\n)?(?<!\\)<(video|image)>(?:\r?\n)?)")
ESCAPED_TAG = re.compile(r"\\(<(?:video|image|audio)>)")
ODD_TAG = re.compile(r"(?<!\\)<\s*/?(?:video|image)s?[\s_-]*\d*\s*/?>", re.IGNORECASE)  # meant as a tag
ODD_FIELD = re.compile(r"(?:vid[eo]{2}s?|images?|imgs?)(?:[_-]?(?:paths?|files?|list|urls?|\d+))?", re.IGNORECASE)
CLIP_SUFFIXES, STILL_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm"), (".jpg", ".jpeg", ".png", ".bmp")
MAX_COMPLAINTS = 20


def normalize_conversation(record: dict, where: str) -> dict:
    """Turn one record of any accepted format into `{"id", "messages"}` of the schema CONVERSATION.

    Accepted: `conversations` (`from`/`value`) or `messages` (`role`/`content`, content a text or a list of parts),
    with `<video>`/`<image>` tags filled in order from `video`/`videos`/`image`/`images`, or parts that carry paths.
    `system` is the system turn's text. OPTIONS beside the turns go to every video of the record. `tools` and
    `chat_template_kwargs` go to the chat template.

    Raises:
        ValueError: names the record, the field, what was found, what was expected and the mend.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record must be an object with named fields, got {_short(record)}")
    try:
        refuse_fields(record, REFUSED_FIELDS)
        names = (*OPTIONS, *OPTION_ALIASES, "sample_fps")
        options = {key: record[key] for key in names if record.get(key) is not None}
        media = {kind: [_media_part(kind, item, options) for item in _media_list(record, kind)]
                 for kind in ("video", "image")}  # fmt: skip
        check_fields(record, ("conversations", "messages"))
        messages = [normalize_turn(turn, i, options) for i, turn in enumerate(_turns(record))]
        _add_system(messages, record.get("system"))
        kwargs = template_kwargs(record)
        placed = {part["type"] for message in messages for part in message["content"] if part["files"]}
        for kind in media:
            if not placed & {kind, "frames" if kind == "video" else kind}:
                check_fields(record, (kind, f"{kind}s"))
        _fill_tags(messages, media)
        kinds = {part["type"] for message in messages for part in message["content"]}
        if options and not kinds & {"video", "frames"}:
            raise ValueError(f"field {next(iter(options))!r} is an option of the record's videos, but it has none: "
                             "remove or rename the field")  # fmt: skip
        odd = [key for key, value in record.items() if ODD_FIELD.fullmatch(str(key))
               and not absent(value) and not isinstance(value, (int, float))]  # fmt: skip
        for key in odd:  # a second name of the videos that are there is harmless
            if not kinds & ({"image"} if key.lower().startswith("im") else {"video", "frames"}):
                raise ValueError(f"field {key!r} is not one that is read: name it 'video' or 'image', or drop it")
        first = messages[messages[0]["role"] == "system"]["role"] if len(messages) > 1 else messages[0]["role"]
        if first != "user":
            raise ValueError(f"the first turn after any system turn must be the user's, got {first!r}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {"id": str(record.get("id") if record.get("id") is not None else where), "messages": messages,
            "chat_template_kwargs": kwargs}  # fmt: skip


def template_kwargs(record: dict) -> str | None:
    """A record's `chat_template_kwargs` and `tools` (OpenAI's form: a list of JSON schemas) as one JSON object.

    Raises:
        ValueError: names the field, what was found and what was expected.
    """
    kwargs = _from_json(record, "chat_template_kwargs", dict, "an object")
    tools = _from_json(record, "tools", list, "a list of function definitions")
    if tools and kwargs.get("tools"):
        raise ValueError("fields 'tools' and 'chat_template_kwargs' both have tools: keep one of them")
    tools = kwargs.pop("tools", None) or tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"field 'tools' must be a list of function definitions, got {_short(tools)}")
    kwargs |= {"tools": tools} if tools else {}
    return _json(kwargs) if kwargs else None


def _from_json(fields, key, kind, expected):
    """A field that may be JSON text, whose nulls stay, or of Arrow; an empty one where it is absent."""
    value = fields.get(key)
    value = value if isinstance(value, str) else _without_nulls(value)
    with contextlib.suppress(ValueError):  # of another kind than expected
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    if absent(value) or value == "":
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"field {key!r} must be {expected} (or its JSON text), got {_short(value)}")
    return value


def _without_nulls(value):
    """Arrow gives every object of a list the fields of all of them: those that are null are not of this one."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _json(value):
    """JSON text that goes to the chat template, without control tokens."""
    text = json.dumps(value, ensure_ascii=False)
    if found := CONTROL_TOKENS.search(text):
        raise ValueError(f"the control token {found[0]} is in {_short(text)}: remove it")
    return text


@functools.cache
def template_options(template: str) -> set[str]:
    """Names of the variables that a chat template is given from outside and that are the user's to set."""
    environment = transformers.utils.chat_template_utils._compile_jinja_template(template).environment
    given = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return given - {"messages", "add_generation_prompt", *environment.globals}


def check_options(options: dict, template: str):
    """Refuse options that the chat template does not read, and switches that it would take for the other value.

    Raises:
        ValueError: names the option.
    """
    for name, value in options.items():
        if name not in template_options(template):
            raise ValueError(f"the model's chat template does not read {name!r}: remove it")
        if name in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name!r} must be true or false, got {_short(value)}")


def check_rendered(row: dict, reads: dict[str, bool], template: str):
    """Refuse what a chat template would leave out; `reads`: see Encoder.template_reads.

    Raises:
        ValueError: names the turn and the field.
    """
    kwargs = json.loads(row.get("chat_template_kwargs") or "{}")
    if "tools" in kwargs and not reads["tools"]:
        raise ValueError(f"field 'tools': the model's chat template has no place for it: {UNRENDERED['tools']}")
    try:
        check_options({name: value for name, value in kwargs.items() if name != "tools"}, template)
    except ValueError as error:
        raise ValueError(f"field 'chat_template_kwargs': {error}") from None
    turns = row["messages"] + [turn for answer in row.get("completions") or [] for turn in answer]
    for i, turn in enumerate(turns):
        for name in ("reasoning", "tool_calls"):
            if turn.get(name) and not reads[name]:
                raise ValueError(f"turn {i}: field {name!r} of the assistant's turn, got {_short(turn[name])}: the "
                                 f"model's chat template has no place for it: {UNRENDERED[name]}")  # fmt: skip
        if turn["role"] == "tool" and not reads["tool"]:
            raise ValueError(f"turn {i}: role 'tool' is not known to the model's chat template: {UNRENDERED['tool']}")


def left_out(messages: list[dict]) -> str:
    """The message where a chat template wrote fewer videos and images than these turns have."""
    roles = {turn["role"] for turn in messages if any(part["type"] != "text" for part in turn["content"])} - {"user"}
    turns = " or ".join(sorted(roles)) or "some"
    return f"the chat template leaves out videos or images in {turns} turns: put them into user turns"


def refuse_fields(fields: dict, refused: dict[str, str]):
    """Refuse what is not read although it would change what is learned; `refused` says what to do instead.

    Raises:
        ValueError: names the field.
    """
    for key, fix in refused.items():
        if not absent(fields.get(key)):
            raise ValueError(f"field {key!r} is not read, got {_short(fields[key])}: {fix}")


def rename_fields(record, where: str):
    """A record in the fields of ms-swift, alpaca or Video-R1, with `prompt`, `completion` and `video` or `image`.

    ms-swift has `query` and `response`; alpaca `instruction`, `input` and `output`; Video-R1 `problem`, `options`,
    `path`, `data_type`, `process` and `solution`. Other records, and those with turns, are returned as they are.

    Raises:
        ValueError: names the record; a field is no text, or two of these forms are mixed.
    """
    if not isinstance(record, dict):
        return record
    asked = [key for key in ("query", "instruction", "problem") if not absent(record.get(key))]
    if not asked or any(not absent(record.get(key)) for key in ("prompt", "conversations", "messages")):
        return record
    if len(asked) > 1:
        raise ValueError(
            f"{where}: fields {asked[0]!r} and {asked[1]!r} are both there: keep the one with the question"
        )

    def take(key):
        value = rest.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: field {key!r} must be a text, got {_short(value)}")
        return value or ""

    rest = dict(record)
    prompt = take(asked[0])
    if asked[0] == "query":
        completion = take("response")
    elif asked[0] == "instruction":
        prompt, completion = "\n".join(filter(None, [prompt, take("input")])), take("output")
    else:
        options, solution, kind = rest.pop("options", None) or [], rest.get("solution"), rest.get("data_type")
        if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
            raise ValueError(f"{where}: field 'options' must be a list of texts, got {_short(options)}")
        prompt = "\n".join([prompt, "Options:", *options]) if options else prompt
        process, completion = take("process"), "" if absent(solution) else str(solution)
        completion = f"{process}\n{completion}" if process and completion else completion
        if path := take("path"):
            kind = ("image" if path.lower().endswith(STILL_SUFFIXES) else "video") if absent(kind) else kind
            if kind not in ("video", "image"):
                raise ValueError(f"{where}: field 'data_type' must be video or image, got {_short(kind)}")
            if beside := [key for key in (kind, f"{kind}s") if not absent(rest.get(key))]:
                raise ValueError(f"{where}: fields 'path' and {beside[0]!r} are both there: keep one of them")
            rest[kind] = path
    return {**rest, "prompt": prompt, **({"completion": completion} if completion else {})}


def prompt_turns(prompt) -> list:
    """The turns of a field `prompt`, which is a text or a list of turns."""
    return list(prompt) if isinstance(prompt, (list, tuple)) else [{"role": "user", "content": prompt}]


def completion_turns(completion) -> list:
    """The turns of a field `completion`: a text, a turn or a list of turns."""
    turns = [completion] if isinstance(completion, dict) else completion
    return list(turns) if isinstance(turns, (list, tuple)) else [{"role": "assistant", "content": turns}]


def _add_system(messages, system):
    """Put the text of the record's field `system` before the turns."""
    if system is None or system == "":
        return
    if not isinstance(system, str):
        raise ValueError(f"field 'system' must be a text, got {_short(system)}")
    turn = normalize_turn({"role": "system", "content": system}, 0)
    if messages[0]["role"] != "system":
        messages.insert(0, turn)
    elif messages[0] != turn:
        raise ValueError("there is a field 'system' and a system turn, which differ: keep one of them")


def _short(value):
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '…'}"


def absent(value):
    """Null, an empty list, or a struct of nulls, as which Arrow may hand out what a record does not have."""
    fields = value.values() if isinstance(value, dict) else [value]
    return all(item is None or (isinstance(item, (list, tuple)) and not item) for item in fields)


def check_fields(record: dict, *needed: tuple[str, ...], where: str | None = None):
    """Look for misspelled fields: unknown ones that are nearly one of the `needed` names that the record lacks.

    Each of `needed` has the names of which one is enough.

    Raises:
        ValueError: names the field and what was probably meant.
    """
    read = {name for names in needed for name in names}
    for names in needed:
        if any(not absent(record.get(name)) for name in names):
            continue
        for key, value in record.items():
            counted = names[0] in ("video", "image") and isinstance(value, (int, float))  # no path: how many, which
            if key in read or absent(value) or counted:
                continue
            if meant := next((name for name in names if _nearly(str(key), name)), None):
                place = f"{where}: " if where else ""
                raise ValueError(f"{place}field {key!r} is not one that is read: did you mean {meant!r}? Rename it, "
                                 "or drop it if it is something else")  # fmt: skip


@functools.lru_cache(4096)
def _nearly(key, name):
    """Whether `key` can only be a misspelt `name`: other case, the same letters, or one other (of long names two)."""
    key = key.lower()
    numbered = key != name and key.rstrip("0123456789") in (name, "")
    if numbered or key.startswith(f"{name}_") or key[0] not in name:
        return False  # video_id, answer2
    if re.sub(r"[\W_]", "", key) == name.replace("_", "") or sorted(key) == sorted(name):
        return True
    row = range(len(name) + 1)  # Levenshtein distances
    for i, letter in enumerate(key, 1):
        last, row = row, [i]
        for j, other in enumerate(name, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other)))
    return key[0] == name[0] and row[-1] <= (2 if len(name) >= 8 else 1)


def _turns(record):
    present = [key for key in ("conversations", "messages") if record.get(key) is not None]
    if not present:
        found = ", ".join(map(str, record)) or "(none)"
        names = {ours: next((key for key in others if record.get(key) is not None), None)
                 for ours, others in OTHER_NAMES.items()}  # fmt: skip
        rewrite = ", ".join(f"rename {key!r} to {ours!r}" for ours, key in names.items() if key)
        raise ValueError(f"no 'conversations' or 'messages' (its fields: {found}): "
                         + (rewrite or "add one of them, with the turns"))  # fmt: skip
    if len(present) > 1:
        raise ValueError("fields 'conversations' and 'messages' are both there: keep exactly one of them")
    turns = record[present[0]]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"field {present[0]!r}: expected a list of turns, got {_short(turns)}")
    return turns


def _media_list(record, kind):
    present = [key for key in (kind, f"{kind}s") if not absent(record.get(key))]
    if len(present) > 1:
        raise ValueError(f"fields {present[0]!r} and {present[1]!r} are both there: keep one of them")
    value = record[present[0]] if present else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _media_part(kind, item, shared=None):
    """One video or image as a PART: a path, a dict with options, or (video) a list of frame images.

    `shared`: options that the record gives to all its videos.
    """
    shared, options = shared if shared and kind == "video" else {}, {}
    if shared and not isinstance(item, dict):
        item = {"video": item}
    if isinstance(item, dict):
        names = dict(OPTION_ALIASES)
        if isinstance(item.get(kind), (list, tuple)):
            names["sample_fps"] = "fps"  # Qwen's name of the rate at which the frames of a list were taken
        given = {}
        for fields, where in ((item, "twice"), (shared, "for all the record's videos and for this one")):
            for key in (key for key, value in fields.items() if value is not None and key != "type"):
                if (name := names.get(key, key)) in given:
                    raise ValueError(f"{kind}: option {key!r} is given {where}: keep one of them")
                given[name] = fields[key]
        if isinstance(embedded := given.pop("bytes", None), bytes):
            given["path"] = store_embedded(embedded, given.get("path"), kind)
        elif embedded is not None:
            raise ValueError(f"{kind}: field 'bytes' must be the bytes of the file, as in Parquet, got "
                             f"{_short(embedded)}: give the file's path")  # fmt: skip
        source = [key for key in (kind, "path", "url", f"{kind}_url") if key in given]
        if len(source) != 1:
            raise ValueError(
                f"{kind}: expected one path under {kind!r}, got the fields {', '.join(given) or '(none)'}"
            )
        item = given.pop(source[0])
        for key, value in given.items():
            if key == "sample_fps":
                raise ValueError(f"{kind} {_short(item)}: option 'sample_fps' is the rate of a list of frame images; "
                                 "for a video file give 'fps'")  # fmt: skip
            if key not in OPTIONS:
                raise ValueError(f"{kind} {_short(item)}: unknown option {key!r}; known: {', '.join(OPTIONS)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{kind} {_short(item)}: option {key!r} must be a number, got {_short(value)}")
            if not 0 <= value < 2**53 or (value == 0 and key not in ("start", "end")):
                raise ValueError(f"{kind} {_short(item)}: option {key!r} must be above 0 (and finite), got {value!r}")
            if PART[key] == pa.int64() and value != int(value):
                raise ValueError(f"{kind} {_short(item)}: option {key!r} must be a whole number, got {value}")
            options[key] = int(value) if PART[key] == pa.int64() else float(value)
        for key in ("nframes", "max_frames"):
            if options.get(key) == 1:
                raise ValueError(f"{kind} {_short(item)}: option {key!r} 1: the fewest is 2, one temporal patch")
        if options.get("min_frames", 0) > options.get("max_frames", math.inf):
            raise ValueError(f"{kind} {_short(item)}: options: 'min_frames' is above 'max_frames': swap them")
        if options.get("start", 0) >= options.get("end", math.inf):
            raise ValueError(f"{kind} {_short(item)}: options: 'end' {options['end']} s is not after 'start'")
        if options.get("min_pixels", 0) > options.get("max_pixels", math.inf):
            raise ValueError(f"{kind} {_short(item)}: options: 'min_pixels' is above 'max_pixels': swap them")
        if rate := [key for key in ("fps", "min_frames", "max_frames") if key in options and "nframes" in options]:
            raise ValueError(f"{kind} {_short(item)}: options {rate[0]!r} and 'nframes' contradict each other: keep "
                             "one")  # fmt: skip
        if ("resized_width" in options) != ("resized_height" in options):
            raise ValueError(f"{kind} {_short(item)}: 'resized_width' and 'resized_height' go together: give both")
    frames = isinstance(item, (list, tuple)) and kind == "video"
    files = list(item) if frames else [item]
    if not files:
        raise ValueError("video: an empty list of frame images; give at least one")
    for i, path in enumerate(files):
        if not isinstance(path, str) or not path:
            raise ValueError(f"{kind}: expected a file path, got {_short(path)}; where there is none, leave it out")
        if local := re.fullmatch(r"file://(?:localhost)?(/.*)", path, re.IGNORECASE | re.DOTALL):
            path = files[i] = urllib.parse.unquote(local[1])
        if path.lower().endswith(STILL_SUFFIXES if kind == "video" and not frames else CLIP_SUFFIXES):
            raise ValueError(
                f"{kind} {path!r}: a video file where an image is expected: put it under 'video', in one flat list"
                if path.lower().endswith(CLIP_SUFFIXES) else
                f"{kind} {path!r}: a still image; frames of one video are a list within the list, [[…]], and an image "
                "goes under 'image'"
            )  # fmt: skip
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:", path):
            raise ValueError(f"{kind} {path[:80]!r}: addresses are not read: download first and give the file's path")
        if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == "..":
            raise ValueError(
                f"{kind} {path!r}: a relative path may not climb out of --image_folder: give an absolute one"
            )
    sizes = {"min_pixels", "max_pixels", "resized_width", "resized_height"}
    meaning = sizes if kind == "image" else {*sizes, "total_pixels", "fps"} if frames else set(options)
    if unused := set(options) - meaning:
        what = "an image" if kind == "image" else "a list of frame images"
        raise ValueError(f"{kind} {_short(item)}: option {sorted(unused)[0]!r} means nothing for {what}: drop it")
    return _part("frames" if frames else kind, files=files, **options)


def default_cache() -> str:
    """Folder for what is kept between runs: $MULTIVIDEO_CACHE, $HF_HOME/multivideo or ~/.cache/multivideo."""
    home = os.environ.get("HF_HOME", "")
    return os.environ.get("MULTIVIDEO_CACHE") or (os.path.join(home, "multivideo") if home else "~/.cache/multivideo")


def store_embedded(content: bytes, name, kind: str) -> str:
    """Path of a file with this content, written once: `media/` of $MULTIVIDEO_CACHE or what stands for it."""
    suffix = Path(name).suffix.lower() if isinstance(name, str) else ""
    suffix = suffix or (".mp4" if kind == "video" else ".png")  # readers look at the content
    path = Path(default_cache()).expanduser().absolute() / "media" / f"{xxhash.xxh3_128_hexdigest(content)}{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    return str(path)


def _part(kind, **values):
    return {**dict.fromkeys(PART), "type": kind, "files": [], **values}


def normalize_turn(turn: dict, i: int, options: dict | None = None) -> dict:
    """Turn number `i` as `{"role", "content", "train"}` of the schema; tags become parts without files, to be filled.

    `options` go to each video in it. `train` is False for an answer that is not learned, else None.

    Raises:
        ValueError: names the turn, what was found, what was expected and the mend.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"turn {i}: expected an object, got {_short(turn)}")
    role_key = next((key for key in ("from", "role") if turn.get(key) is not None), "from")
    text_key = next((key for key in ("value", "content") if turn.get(key) is not None), "value")
    role, content = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"turn {i}: {role_key!r} must be one of {', '.join(ROLES)}, got {_short(role)}")
    if ROLES[role] == "system" and i > 0:
        raise ValueError(f"turn {i}: the system turn must come first: move it there")
    for key, fix in REFUSED_TURN_FIELDS.items():
        if not absent(turn.get(key)):
            raise ValueError(f"turn {i}: field {key!r} is not read, got {_short(turn[key])}: {fix}")
    train = _train_flag(turn, i, ROLES[role])
    reasoning = calls = None
    if ROLES[role] == "assistant":
        reasoning, calls = _reasoning(turn, i), _tool_calls(turn, i)
        content = "" if content is None and (reasoning or calls) else content
    elif not absent(turn.get("tool_calls")):
        raise ValueError(f"turn {i}: field 'tool_calls' on a {role} turn: only the assistant calls tools; remove it")
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, dict):
            given = {key for key, value in part.items() if not absent(value)} - {"type"}
            kind = part.get("type") or next((key for key in ("video", "image") if key in given), "text")
            if kind not in ("text", "video", "image"):
                raise ValueError(f"turn {i}: the type of a part must be text, video or image, got {_short(kind)}")
            if kind != "text":
                parts.append(_media_part(kind, part, options) if given else _part(kind))
                continue
            if more := sorted(given & {"video", "image", "videos", "images", "path", "url"}):
                raise ValueError(f"turn {i}: a text part with the field {more[0]!r}: make that a part of its own")
            if more := sorted(given & {*REASONING_FIELDS}) if ROLES[role] == "assistant" else []:
                raise ValueError(f"turn {i}: field {more[0]!r} of a part: make it a field of the turn")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            mend = "put numbers in quotes" if isinstance(text, (int, float)) else "write the text or drop the turn"
            if isinstance(part, dict) and "text" not in part:
                text, mend = part, "give an object as its JSON text"
            raise ValueError(f"turn {i}: {text_key!r} must be text, got {_short(text)}: {mend}")
        _check_text(text, i)
        if ROLES[role] != "assistant" and re.search(r"(?<!\\)<audio>", text):
            raise ValueError(f"turn {i}: the tag <audio> in the text: these models do not hear; remove it, or write "
                             "\\<audio> for the word itself")  # fmt: skip
        pieces = TAG.split(text)  # text, tag with its newlines, kind, text, …, text
        parts += [_part(pieces[k], text=pieces[k - 1]) if k % 3 == 2 else _part("text", text=pieces[k])
                  for k in range(len(pieces)) if k % 3 != 1 and pieces[k]]  # fmt: skip
    if reasoning and any((part["text"] or "").lstrip().startswith("<think>") for part in parts[:1]):
        raise ValueError(f"turn {i}: thoughts both in a field and, as <think>, in the text: keep one of them")
    return {"role": ROLES[role], "content": parts, "train": train, "reasoning": reasoning, "tool_calls": calls}


def says_something(turn: dict) -> bool:
    """Whether a turn of the schema has text or calls a tool."""
    return bool(turn["tool_calls"]) or any((part["text"] or "").strip() for part in turn["content"])


def _check_text(text, i):
    """Refuse what no text of a turn may have."""
    if found := CONTROL_TOKENS.search(text):
        raise ValueError(f"turn {i}: the control token {found[0]} stands in the text: take it out (the place of a "
                         "video is written <video>, that of an image <image>)")  # fmt: skip
    if found := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"turn {i}: the text has half a character, {found[0]!r}: write the text as UTF-8 again")


def _train_flag(turn, i, role):
    """False if a turn's TRAIN_FIELDS say that it is not learned, else None."""
    given = {key: turn[key] for key in TRAIN_FIELDS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # true and false are 1 and 0
            raise ValueError(f"turn {i}: field {key!r} must be true or false (or 1 or 0), got {_short(value)}: an "
                             "answer is learned or not, there are no other weights")  # fmt: skip
        if value and role != "assistant":
            raise ValueError(f"turn {i}: field {key!r} is true on a {role} turn: only the assistant's are learned; "
                             "remove it")  # fmt: skip
    if len(set(map(bool, given.values()))) > 1:
        raise ValueError(f"turn {i}: fields {' and '.join(map(repr, given))} contradict each other: keep one of them")
    return False if role == "assistant" and given and not any(given.values()) else None


def _reasoning(turn, i):
    """The assistant's thoughts from one of REASONING_FIELDS, None where there are none."""
    given = {key: turn[key] for key in REASONING_FIELDS if not absent(turn.get(key)) and str(turn[key]).strip()}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"turn {i}: fields {' and '.join(map(repr, given))} are both there: keep one of them")
    ((key, text),) = given.items()
    if not isinstance(text, str):
        raise ValueError(f"turn {i}: field {key!r} must be a text, got {_short(text)}")
    _check_text(text, i)
    return text


def _tool_calls(turn, i):
    """The assistant's calls as JSON: [{"type": "function", "function": {"name", "arguments": an object}}]."""
    try:
        calls = []
        for call in _from_json(turn, "tool_calls", list, "a list of calls"):
            call = call.get("function", call) if isinstance(call, dict) else call
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                raise ValueError(f"field 'tool_calls': a call must have a name and arguments, got {_short(call)}")
            arguments = call.get("arguments")
            if not isinstance(arguments, dict):  # else its nulls are those of the list
                arguments = _from_json(call, "arguments", dict, "an object")
            calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
        return _json(calls) if calls else None
    except ValueError as error:
        raise ValueError(f"turn {i}: {error}") from None


def _fill_tags(messages, media):
    """Put the record's videos and images into its tags, in order; without any tag they all go first, in order.

    Tags in answers are text unless the other turns have some of the clips, but too few tags for all of them.
    """
    parts = [(message, part) for message in messages for part in message["content"]]
    slots = {kind: [pair for pair in parts if pair[1]["type"] == kind and not pair[1]["files"]] for kind in media}
    asked = {kind: [pair for pair in slots[kind] if pair[0]["role"] != "assistant"] for kind in media}
    for kind, items in media.items():
        if len(asked[kind]) == len(items) or not any(asked.values()):
            for message, part in slots[kind]:
                if message["role"] == "assistant" and part["text"] is not None:
                    part["type"] = "text"
            slots[kind] = [pair for pair in slots[kind] if pair[1]["type"] == kind]
    odd = next((found[0] for message, part in parts if part["type"] == "text" and message["role"] != "assistant"
                and (found := ODD_TAG.search(part["text"]))), None)  # fmt: skip
    if not slots["video"] and not slots["image"] and (media["video"] or media["image"]):
        if odd:
            raise ValueError(f"the text has {odd}, which is no tag: write <video> or <image>, or take it out (as a "
                             f"word: \\{odd})")  # fmt: skip
        placed = {part["type"] for _, part in parts}
        for kind in media:
            if media[kind] and placed & {kind, "frames" if kind == "video" else kind}:
                raise ValueError(f"there are {kind}s in the turns and under {kind!r} of the record: keep one of them")
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("there are videos or images but no user turn to put them in: add one")
        first["content"][:0] = media["video"] + media["image"]
    else:
        for kind, items in media.items():
            if len(slots[kind]) != len(items):
                mend = (f"write one tag per {kind}, or no tag at all to put everything first" if items else
                        f"name the {kind}s under {kind!r}, or take the tag out of the text (as a word: "
                        f"\\<{kind}>)")  # fmt: skip
                raise ValueError(f"{len(slots[kind])} <{kind}> tags for {len(items)} {kind}s: {mend}"
                                 + (f" ({odd} is no tag)" if odd else ""))  # fmt: skip
            for (_, slot), item in zip(slots[kind], items):
                slot.update(item)
    for message in messages:
        message["content"] = plain_text(message["content"])


def plain_text(parts: list[dict], tags: bool = False) -> list[dict]:
    """The parts with escaped tags without their backslash; with `tags`, tags that are not filled as text too."""
    if tags:
        parts = [{**part, "type": "text"} if part["text"] is not None else part for part in parts]
    return [{**part, "text": ESCAPED_TAG.sub(r"\1", part["text"])} if part["type"] == "text" else part
            for part in parts]  # fmt: skip


BETWEEN_SOURCES = " + "  # of several files or data sets in one data_path or eval_path


def data_sources(source: str) -> list[str]:
    """The files, folders and hub names in a data_path or eval_path."""
    return [source] if Path(source).exists() else source.split(BETWEEN_SOURCES)


def data_folder(source: str) -> str:
    """Where relative paths start from by default: the folder of the data file; a hub name has none."""
    first = Path(data_sources(source)[0])
    return str(first.parent) if first.exists() else "."


def read_records(source: str):
    """Yield `(where, record)` one at a time from JSON, JSONL, Parquet, a dataset folder or a hub dataset, or several.

    A record that cannot be parsed is yielded as a ValueError in its place.
    """
    if len(sources := data_sources(source)) > 1:
        for one in sources:
            yield from ((f"{Path(one).name} {where}", record) for where, record in read_records(one))
        return
    path = Path(source)
    if path.suffix.lower() in (".json", ".jsonl") or (path.suffix == "" and path.is_file()):
        with open(path, "rb") as file:
            start = file.read(4096)
            head = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
            file.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
            if b"\0" in start:  # UTF-16 has one in every Latin letter
                wide = start.startswith((b"\xff\xfe", b"\xfe\xff")) or start[:4].count(b"\0") == 2
                mend = "save the file as UTF-8 (iconv -f utf-16 -t utf-8)" if wide else "is this a JSON file?"
                yield "line 1", ValueError(f"not UTF-8 text ({'UTF-16' if wide else 'it has the byte 0x00'}): {mend}")
                return
            if head.startswith((b"//", b"/*", b"#")):
                number = 1 + start[: len(start) - len(head)].count(b"\n")
                yield f"line {number}", _parse_line(head.decode(errors="replace"))
                return
            if head.startswith(b"["):
                import ijson

                records = ijson.items(file, "item", use_float=True)
                for i in range(sys.maxsize):
                    try:
                        yield f"record {i}", next(records)
                    except StopIteration:
                        return
                    except (ijson.JSONError, UnicodeDecodeError) as error:
                        what = " at ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())
                        line, what = _find_in_list(path) or ("?", f"not valid JSON: {what}")
                        yield f"record {i}, line {line}", ValueError(f"{what} (nothing after it was read)")
                        return
            opening, *more = head.split(b"\n", 1)
            problem = _parse_line(opening.decode(errors="replace")) if more else None
            if opening.startswith(b"{") and isinstance(problem, ValueError) and "ends too early" in str(problem):
                yield "line 1", ValueError("one object over several lines: expected a list [{…}, …] of records, or "
                                           "one object per line")  # fmt: skip
                return
            for number, line in enumerate(file, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield f"line {number}", _parse_line(line.decode("utf-8-sig", "surrogateescape"))
        return
    for i, record in enumerate(_open_table(source)):
        yield f"record {i}", record


def _refuse_constant(name):
    raise ValueError(f"not valid JSON: {name}, which is no JSON value: write null or a number")


JSON_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that Python's surrogateescape has let through
CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')  # the group is empty in texts


def _parse_line(text):
    """The JSON value of one line, or a ValueError that names what is invalid in it."""
    try:
        if byte := NOT_UTF8.search(text):
            return _not_utf8(byte)
        return JSON_DECODER.decode(text)
    except json.JSONDecodeError as error:
        return _json_problem(text, error)
    except ValueError as error:
        return error


def _not_utf8(byte):
    return ValueError(f"not UTF-8 (byte 0x{ord(byte[0]) - 0xDC00:02x}): save the file as UTF-8 (from Latin-1: iconv "
                      "-f latin1 -t utf-8)")  # fmt: skip


def _json_problem(text, error):
    """A ValueError that says in one sentence what json's decoder found, and what to do."""
    message, before, rest = error.msg, text[: error.pos].rstrip(), text[error.pos :].lstrip()
    shown = f"{rest.splitlines()[0]:.30}" if rest else ""
    comma = re.match(r"(,?)\s*([\]}])", rest)
    constant = re.match(r"(?:None|True|False|undefined)\b", rest)
    if not rest or message.startswith("Unterminated"):
        what = "it ends too early: is the file cut off? Copy or write it again"
    elif comma and (comma[1] or before.endswith(",")):
        what = f"a comma before {comma[2]}: remove it"
    elif comma and message.startswith("Expecting"):
        what = f"{comma[2]} where it does not fit: a value is missing, or there is one bracket too many"
    elif rest.startswith(("//", "/*", "#")):
        what = f"a comment ({shown}), which JSON does not have: remove it"
    elif rest[0] in "'‘’“”`":
        what = f'the quote {rest[0]} where JSON needs ": put names and texts in double quotes'
    elif message.startswith("Invalid control character"):
        what = "a line break or tab in a text: write \\n or \\t, or the closing quote that is missing"
    elif message.startswith("Invalid \\"):
        what = f"a single backslash in a text ({shown:.12}): write it twice"
    elif constant:
        what = f"{constant[0]}, which is no JSON value: write null, true or false"
    elif re.match(r"\w+\s*:", rest):
        what = f"a name without quotes ({shown}): put it in double quotes"
    elif message.startswith("Extra data") and rest[0] == ",":
        what = "a comma after the object: remove it"
    elif message.startswith("Extra data"):
        what = f"more after its end ({shown}): a file is one list [{{…}}, …], or one object per line"
    elif message.startswith("Expecting ',' delimiter"):
        what = f"no comma before {shown}: add it, or the bracket or quote that is missing"
    else:
        what = f"{message} at {shown}"
    return ValueError(f"not valid JSON: {what}")


def _find_in_list(path):
    """The (line, ValueError) at which a JSON list becomes invalid; None if Python's decoder finds nothing.

    ijson needs little memory, but does not tell the line: only when it has failed, the file is read once more.
    """
    space = re.compile(r"\s*")
    text, start, line, separator = "", 0, 1, "["  # `text` from the end of the last good record, on `line`
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        while True:
            chunk = file.read(1 << 20)
            line += text.count("\n", 0, start)
            text, start, problem = text[start:] + chunk, 0, None
            while problem is None:
                before = space.match(text, start).end()
                found, at = text[before : before + 1], space.match(text, before + 1).end()
                try:
                    if separator == "," and found == "]":
                        raise json.JSONDecodeError("Extra data", text, at)  # or the end
                    if found != separator:
                        raise json.JSONDecodeError("Expecting ',' delimiter", text, before)
                    start, separator = JSON_DECODER.raw_decode(text, at)[1], ","
                except json.JSONDecodeError as error:
                    cut = len(text) - error.pos < 100 or error.msg.startswith("Unterminated")  # by the end of `text`
                    at, problem = error.pos, _json_problem(text, error)
                except ValueError as error:  # a constant
                    at = next(match.start() for match in CONSTANT.finditer(text, at) if match[1])
                    cut, problem = False, error
            more = chunk and cut
            if (byte := NOT_UTF8.search(text)) and byte.start() < (start if more else at):
                at, problem = byte.start(), _not_utf8(byte)
            elif more:
                continue
            elif at == len(text) and found == "]":
                return None
            return line + text.count("\n", 0, at), problem


def _open_table(source):
    """A Parquet file, a dataset folder or a hub dataset, which `:split` may follow (default: train).

    Media columns give paths or the bytes of files; nothing is decoded.
    """
    import datasets

    path, split = Path(source), "train"
    if not path.exists() and ":" in source:
        source, split = source.rsplit(":", 1)
        path = Path(source)
    try:
        if path.suffix.lower() == ".parquet":
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif (path / "dataset_info.json").is_file():
            table = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(str(path))
            if split not in tables:
                known = ", ".join(tables)
                raise ValueError(f"no split {split!r} in it, but {known}: name one, {path}:{next(iter(tables))}")
            table = tables[split]
        elif found := sorted({*path.glob("*.json"), *path.glob("*.jsonl")} - {path / "dataset_dict.json"}):
            names = ", ".join(file.name for file in found[:5])
            raise ValueError(f"a folder with JSON files ({names}): name the file itself")
        else:
            table = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: cannot be read as a dataset: {error.__cause__ or error}") from None
    table = table.with_format(None)
    for name, feature in table.features.items():  # give paths, decode nothing
        if isinstance(getattr(feature, "feature", feature), (datasets.Image, datasets.Video)):
            inner = type(getattr(feature, "feature", feature))(decode=False)
            table = table.cast_column(name, datasets.List(inner) if hasattr(feature, "feature") else inner)
    return table


def load_records(
    source: str, normalize=normalize_conversation, schema: pa.Schema = CONVERSATION, name: str = "",
    encoder: "Encoder | None" = None,
) -> "Dataset":  # fmt: skip
    """All records in one fixed schema, memory-mapped: converted once, found again by the file's identity.

    Of several sources, `info.description` has the number of records of each; `name` is then before each place. Records
    are refused that have something which the chat template of the `encoder` would leave out.

    Raises:
        ValueError: counts all bad records and lists the first different problems, each with its first places; says
            so when there is no record at all.
    """
    import datasets

    if len(sources := data_sources(source)) > 1:
        tables = [load_records(one, normalize, schema, f"{Path(one).name} ", encoder) for one in sources]
        table = datasets.concatenate_datasets(tables)
        table.info.description = ", ".join(f"{len(t):,} of {Path(one).name}" for t, one in zip(tables, sources))
        return table

    def rows(source, identity, normalize):
        count, bad, problems = 0, 0, {}  # problem: [its records, the first places]
        for where, record in read_records(source):
            where = name + where
            if isinstance(record, dict) and record.get("id") is not None:
                where = f"{where} (id {record['id']!r})"
            try:
                if isinstance(record, ValueError):
                    raise ValueError(f"{where}: {record}")
                row = normalize(record, where)
                if encoder:
                    check_rendered(row, encoder.template_reads(), encoder.chat_template)
                    if encoder.may_be_refused(row):
                        encoder.tokenize_record(row)
            except ValueError as error:
                bad += 1
                problem = str(error).removeprefix(f"{where}: ")
                if problem in problems or len(problems) < MAX_COMPLAINTS:
                    found = problems.setdefault(problem, [0, []])
                    found[0] += 1
                    found[1] += [where] if len(found[1]) < 3 else []
            else:
                count += 1
                if not bad:  # else the rows are not used
                    yield row
        if bad:
            lines = [_complaint(problem, *found) for problem, found in problems.items()]
            if others := bad - sum(number for number, _ in problems.values()):
                lines.append(f"… and {others:,} more with other problems")
            many = "1 bad record" if bad == 1 else f"{bad:,} bad records"
            raise InputError(f"{source}: {many}\n  • " + "\n  • ".join(lines))
        if not count:
            raise InputError(f"{source}: no records in it; expected at least one")

    path = Path(source)
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    identity = [
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
    ]
    if not identity:  # a hub dataset: its fingerprint changes with its commit
        identity = [_open_table(source)._fingerprint]
    # The code is part of the key: people edit normalizers and what they call, and rows must not be an older version's.
    function = getattr(normalize, "func", normalize)
    sources = project_sources(__file__, inspect.getsourcefile(function) or "")
    code = [sources, inspect.getsource(function), str(getattr(normalize, "keywords", ""))]
    template = None
    if encoder:
        template = [
            encoder.template_reads(),
            encoder.chat_template,
            encoder.template_kwargs,
            encoder.args.system_prompt,
        ]
    key = hashlib.sha256(json.dumps([source, identity, code, str(schema), name, template]).encode()).hexdigest()[:32]
    try:
        return datasets.Dataset.from_generator(
            rows, features=datasets.Features.from_arrow_schema(schema), fingerprint=key,
            gen_kwargs={"source": source, "identity": key, "normalize": normalize},
        )  # fmt: skip
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _complaint(problem, number, places):
    """One line for all records with this problem."""
    if number == 1:
        return f"{places[0]}: {problem}"
    return f"{problem}: {number:,} records, {'first ' if number > len(places) else ''}{', '.join(places)}"


def project_sources(*files: str) -> list[tuple[str, str]]:
    """`(name, SHA-256)` of these Python files and of all that they import from their own folders, in turn."""
    waiting = [Path(file).resolve() for file in files if Path(file).is_file()]
    folders, digests = {path.parent for path in waiting}, {}
    while waiting:
        path = waiting.pop()
        content = path.read_bytes()
        digests[path] = path.name, hashlib.sha256(content).hexdigest()
        for level, name in _imported_names(content):
            for folder in [path.parents[level - 1]] if level else folders | {path.parent}:
                module = folder.joinpath(*name.split("."))
                found = (module.with_name(f"{module.name}.py"), module / "__init__.py")
                waiting += [file for file in found if file.is_file() and file not in digests]
    return sorted(digests.values())


@functools.lru_cache(256)
def _imported_names(source: bytes) -> set[tuple[int, str]]:
    """What Python code imports, in functions too: (level of a relative import, dotted name that may be a module)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names]
        else:
            continue
        for level, name in names:
            parts = name.split(".")
            found |= {(level, ".".join(parts[:i])) for i in range(1, len(parts) + 1)}
    return found


def record_files(row: dict) -> list[str]:
    """The video and image files of a normal record, as they are written in it."""
    return [path for turn in row["messages"] for part in turn["content"] for path in part["files"]]


def resolve_path(path: str, folder: str) -> str:
    """Join a record's path to its folder and make sure that it is a regular file.

    Raises:
        BadFile: no such file, or something else than a file (folder, pipe, device).
    """
    path = os.path.join(folder, path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadFile(path, f"{reason}; paths start from --image_folder {folder}") from None
    if not stat.S_ISREG(mode):
        raise BadFile(path, "not a regular file (a folder, pipe or device): give a video or image file")
    return path


# ----------------------------------------------------------------------------------------- 3. sampling and decoding


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Multiples of `factor` near (height, width) with an area between the bounds and nearly the same aspect ratio.

    Source: smart_resize of qwen_vl_utils.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width}×{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


def pixel_bounds(args, kind: str, factor: int) -> tuple[int, int]:
    """Fewest and most pixels of an image or video frame: as the flags say, else the reference's tokens × factor².

    One flag moves the other's default: a maximum below the default minimum means "at most this many".
    """
    fewest, most = {"image": (IMAGE_MIN_TOKENS, IMAGE_MAX_TOKENS),
                    "video": (VIDEO_MIN_TOKENS_PER_FRAME, VIDEO_MAX_TOKENS_PER_FRAME)}[kind]  # fmt: skip
    low, high = getattr(args, f"{kind}_min_pixels"), getattr(args, f"{kind}_max_pixels")
    high = high or max(most * factor**2, low or 0)
    return low or min(fewest * factor**2, high), high


def target_size(part: dict, height: int, width: int, num_frames: int, args, factor: int) -> tuple[int, int]:
    """(height, width) in pixels at which a clip of this native size is trained; the part's own options win.

    Source: fetch_image and fetch_video of qwen_vl_utils, which bound a whole video's pixels too.
    """
    kind = "image" if part["type"] == "image" else "video"

    def option(name):
        return part[name] if part[name] is not None else getattr(args, f"{kind}_{name}")

    own_pixels = any(part[name] is not None for name in ("min_pixels", "max_pixels", "total_pixels"))
    if part["resized_width"] is not None or (not own_pixels and option("resized_width") is not None):
        return smart_resize(option("resized_height"), option("resized_width"), factor,
                            IMAGE_MIN_TOKENS * factor**2, IMAGE_MAX_TOKENS * factor**2)  # fmt: skip
    low, high = pixel_bounds(args, kind, factor)
    min_pixels, max_pixels = part["min_pixels"] or low, part["max_pixels"] or high
    if kind == "video":
        share = (part["total_pixels"] or VIDEO_TOTAL_TOKENS * factor**2) / math.ceil(num_frames / FRAME_FACTOR)
        limit = max(min(VIDEO_MAX_TOKENS_PER_FRAME * factor**2, share), int(min_pixels * 1.05))
        max_pixels = min(max_pixels, limit)
    return smart_resize(height, width, factor, min(min_pixels, max_pixels), max_pixels)


def sample_frames(
    part: dict, total_frames: int, video_fps: float, args, at_most: int | None = None,
    times: list[float] | None = None,
):  # fmt: skip
    """Which frames of a video are taken: `(indices, sampled_fps)`, frames per second of the frames that were taken.

    Source: smart_nframes and calculate_video_frame_range of qwen_vl_utils. Where the reference refuses (a clip with
    fewer frames than asked), the clip gives all it has, an even number, or its single frame.

    `times` (seconds from the first frame, ascending) are given where the rate varies: of as many evenly spaced moments
    the frame is taken that is shown then, the last moment being one mean frame (1 / `video_fps`) before the end. Their
    `sampled_fps` is their number / the seconds from the first moment to that end. With even times the two rules agree.

    Raises:
        ValueError: `start` and `end` (seconds) leave no frames.
    """
    first, last, duration = 0, total_frames - 1, total_frames / video_fps
    if times:
        begin, stop = min(part["start"] or 0, duration), duration - 1 / video_fps
        stop = stop if part["end"] is None else min(part["end"], stop)
        first, last = _shown_at(times, [begin, stop])
        seconds = round(stop - begin + 1 / video_fps, 6)
        empty = last <= first and seconds < 2 / video_fps
    else:
        if part["start"] is not None:
            first = math.ceil(min(part["start"], duration) * video_fps)
        if part["end"] is not None:
            last = min(math.floor(min(part["end"], duration) * video_fps), total_frames - 1)
        seconds = (last - first + 1) / video_fps
        empty = first > last or (first == last and total_frames > 1)
    if empty:
        raise ValueError(
            f"'start' {part['start']} and 'end' {part['end']} s leave no two frames of a {duration:.2f}-s video"
        )
    available = last - first + 1
    wanted = part["nframes"] or (None if part["fps"] else args.nframes)
    if wanted is not None:
        fewest, most = part["min_frames"] or 0, part["max_frames"] or available
        wanted = round(wanted / FRAME_FACTOR) * FRAME_FACTOR
    else:
        fewest, most = part["min_frames"] or args.min_frames, part["max_frames"] or args.max_frames
        wanted = seconds * (part["fps"] or args.fps)
        most = math.floor(min(most, available) / FRAME_FACTOR) * FRAME_FACTOR
    count = min(max(wanted, math.ceil(fewest / FRAME_FACTOR) * FRAME_FACTOR), most)
    count = math.floor(min(count, available, at_most or available) / FRAME_FACTOR) * FRAME_FACTOR or 1
    if times:
        return _shown_at(times, np.linspace(begin, stop, count)), count / seconds
    return spread_evenly(first, last, count), count / available * video_fps


def _shown_at(times, moments):
    """Numbers of the frames shown at these moments (seconds); times are rounded to a microsecond."""
    return (np.searchsorted(times, np.asarray(moments) + 1e-6, "right") - 1).clip(0).tolist()


@functools.lru_cache(65536)
def spread_evenly(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from `first` to `last`, as the reference rounds them (in float32)."""
    return torch.linspace(first, last, count).round().long().tolist()


class BadFile(ValueError):
    """A video or image that cannot be read: its path, and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclass
class VideoInfo:
    """What is known of a video: its frames, frames per second, native size as shown, and uneven times in seconds."""

    num_frames: int
    fps: float  # frames / duration
    height: int
    width: int
    times: list[float] | None = None  # from the first frame; None: frame i is shown from i / fps on
    reader: str = "pyav"  # what decoded its frames

    def shown_at(self, indices: list[int]) -> list[float]:
        """Seconds from the first frame at which frames of these numbers are shown."""
        return [self.times[i] if self.times else i / self.fps for i in indices]


FFMPEG_OPTIONS = {"protocol_whitelist": "file"}  # no file leads to a network
NO_VIDEO = {"tty", "hls", "concat", "dash", "sdp"}  # FFmpeg draws text as pictures, and follows lists to other files
INDEXED_FORMATS = ("mov", "matroska")  # MP4 and WebM too: key frames are marked, and every frame has its time
KEPT_BYTES = 64e6  # packets of a larger file are not kept from demuxing to decoding, but read twice
LONGEST_PAUSE = 3600  # seconds between two frames: more is a clock that was set in between
TIME_ROUNDING = 1e-3  # seconds: Matroska, WebM and FLV round times to it, and copies of these have them so


def read_video(path: str, pick, reader: str = "pyav") -> tuple[torch.Tensor, VideoInfo]:
    """Decode the frames that `pick(num_frames, fps, times)` returns: uint8 [F, 3, height, width], channels last.

    Demuxing tells what frames there are. Of a container with an index, only what the picked ones need is then decoded;
    they equal those of decoding the whole file in sequence. `reader`: see --video_reader.

    Raises:
        BadFile: not a video, without frames, cut short, or damaged where frames were picked.
    """
    import av

    try:
        with av.open(path, options=FFMPEG_OPTIONS) as container:
            packets, kept, seekable, (count, fps, times) = _demux(container)
            indices, taken = pick(count, fps, times), {}
            if seekable and reader == "decord":
                taken = _read_decord(path, packets, indices)
            reader = "decord" if taken else "pyav"
            if seekable and not taken:
                again = contextlib.nullcontext() if kept else av.open(path, options=FFMPEG_OPTIONS)
                with again as source, contextlib.suppress(av.FFmpegError, ValueError):  # decoding all will tell
                    taken = _decode_needed(container, packets, kept or _with_data(source), indices)
        if len(taken) < len(set(indices)):
            taken, (found, *rate) = _decode_all(path, indices)
            if found != count and seekable:
                raise ValueError(f"only {found} of its {count} frames can be decoded")
            if found != count:  # without an index, what can be decoded is what there is
                count, (fps, times) = found, rate
                indices = pick(count, fps, times)
                taken, _ = _decode_all(path, indices)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(path, f"cannot be decoded: {error}") from None
    if len({frame.shape for frame in taken.values()}) > 1:
        raise BadFile(path, "cannot be decoded: the size of its frames changes on the way")
    frames = torch.from_numpy(np.stack([taken[i] for i in indices])).permute(0, 3, 1, 2)
    return frames, VideoInfo(count, fps, *frames.shape[-2:], times, reader)


def video_info(path: str, reader: str = "pyav") -> VideoInfo:
    """What training will find in a video; its first frame is decoded, for the size as shown.

    Raises:
        BadFile: as read_video.
    """
    return read_video(path, lambda *_: [0], reader)[1]


def _stream(container):
    """The video stream that players show: not a cover picture beside it."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None or container.format.name in NO_VIDEO:
        raise ValueError("no video stream that FFmpeg can decode")
    stream.codec_context.thread_count = 1  # the workers are many
    return stream


def _with_data(container):
    return (packet for packet in container.demux(_stream(container)) if packet.size)


def _demux(container):
    """`([(time, is it a key frame, is it shown) of each packet], packets, can decoding start at key frames, rate)`.

    The list of packets is empty where they are too large to keep; the rate is `measure_rate`'s.

    Raises:
        ValueError: no video stream, without frames, or cut short.
    """
    stream, format_name = _stream(container), container.format.name.split(",")[0]
    packets, kept, num_packets, stamps = [], [], 0, []
    for packet in container.demux(stream):
        num_packets += packet.dts is not None
        if packet.size:
            packets.append((packet.pts, packet.is_keyframe, not packet.is_discard))
            if not packet.is_discard:
                stamps.append((packet.pts, packet.dts, packet.duration))
            if container.size <= KEPT_BYTES:
                kept.append(packet)
    if format_name == "mov" and num_packets < stream.frames:
        raise ValueError(f"cut short: {num_packets} of its {stream.frames} frames are there")
    times = {packet[0] for packet in packets}
    one_clock = all(a <= b for a, b in itertools.pairwise(dts for _, dts, _ in stamps if dts is not None))
    seekable = format_name in INDEXED_FORMATS and one_clock and None not in times and len(times) == len(packets)
    return packets, kept, seekable, measure_rate(stamps, stream)


def measure_rate(stamps: list[tuple], stream) -> tuple[int, float, list[float] | None]:
    """`(frames, frames per second, times)` from the `(pts, dts, duration)` of the frames shown, in decoding order.

    The duration is that from the first frame to the last one and the last one's own; where that is not given, or below
    half the median gap (as muxers write it that do not know it), the median gap. The rate is constant, and `times`
    None, where no frame is shown more than half a frame from where a constant rate has it (a container's rounding
    apart): choosing frames by number is then choosing by time. The container's own rate is taken where it agrees.
    Where the clock was set (concatenated or paused recordings), the median gap comes between the parts.

    Raises:
        ValueError: no frames, or several without times and rate.
    """
    count, claimed, tick = len(stamps), float(stream.average_rate or 0), float(stream.time_base)
    pts, dts, durations = (np.array(column, float) for column in zip(*stamps)) if stamps else ((), (), ())  # None: nan
    pts = dts if np.isnan(pts).any() else pts
    if count > 1 and not np.isnan(pts).any():
        steps = np.diff(dts) * tick
        jumps = (steps < 0) | (steps > LONGEST_PAUSE)
        if jumps.any():
            pts[1:] += np.cumsum(np.where(jumps, np.nanmedian(steps) - steps, 0)) / tick
        times = (np.sort(pts) - pts.min()) * tick
        last, gap = durations[pts.argmax()] * tick, np.sort(np.diff(times))[(count - 1) // 2]
        last = last if last >= gap / 2 else gap
        if (duration := times[-1] + last) > 0:
            fps, even = float(count / duration), np.arange(count) * duration / count
            if abs(times - even).max() > duration / count / 2 + TIME_ROUNDING:
                return count, fps, times.round(6).tolist()
            agree = claimed and abs(count / claimed - duration) <= 2 * TIME_ROUNDING
            return count, claimed if agree else fps, None
    if count != 1 and not (count and claimed):
        raise ValueError(f"{count} frames, without times or a rate" if count else "it has no frames")
    return count, claimed or 1.0, None


def _decode_needed(container, packets, with_data, indices):
    """{index: [height, width, 3]}, decoding from the last key frame at or before each, in file order and in time.

    So a frame that is shown before the key frame it follows (an open group of pictures) starts from an earlier one.
    H.264 says which frames no other refers to: those are decoded only if they are wanted themselves.

    Raises:
        ValueError: a frame is damaged, or a key frame is none.
    """
    import av

    context = _stream(container).codec_context
    times = sorted(time for time, _, shown in packets if shown)
    wanted = {times[i]: i for i in indices}
    needed, keys = np.zeros(len(packets), bool), []
    for p, (shown_at, is_key, _) in enumerate(packets):
        if is_key:
            keys.append(p)
        if shown_at in wanted:
            start = next((k for k in reversed(keys) if packets[k][0] <= shown_at), 0)
            needed[start : p + 1] = True
    taken, reformatter, matrices = {}, av.video.reformatter.VideoReformatter(), {}
    first = None  # time of the key frame that decoding started from, if not at the first packet
    started = True  # has it come out

    def take(frames):
        nonlocal started
        for frame in _sound(frames):
            if not started and (frame.pts != first or frame.pict_type != av.video.frame.PictureType.I):
                raise ValueError("a key frame that needs others before it (intra refresh)")
            started = True
            if (i := wanted.get(frame.pts)) is not None:
                taken[i] = _rgb(frame, reformatter, matrices)

    for p, packet in enumerate(with_data):
        if not needed[p]:
            continue
        shown_at = packet.pts
        if p and not needed[p - 1]:
            take(context.decode(None))
            context.flush_buffers()
            started, first = False, shown_at
        if first is not None and shown_at < first:
            continue  # shown before that key frame, and refers to what was left out
        if context.name == "h264":
            context.skip_frame = "DEFAULT" if shown_at in wanted else "NONREF"
        take(context.decode(packet))
    take(context.decode(None))
    return taken


DECORD_CODECS = {"h264", "hevc", "vp8", "vp9", "av1"}


def _read_decord(path, packets, indices):
    """{index: [height, width, 3]} by decord; {} where it is known to give other frames, or says that it would.

    Those are interlaced, 10-bit and mirrored videos, edit lists and open groups of pictures.
    """
    import av
    import decord

    last_key, plain = -math.inf, all(shown for _, _, shown in packets)  # no edit list, no open group of pictures
    for shown_at, is_key, _ in packets:
        plain = plain and shown_at >= last_key
        last_key = shown_at if is_key else last_key
    try:
        with av.open(path, options=FFMPEG_OPTIONS) as container:
            stream = _stream(container)
            container.seek(last_key, stream=stream)
            codec, frame = stream.codec_context, next(container.decode(stream))
        plain = plain and frame.pts == last_key and frame.key_frame  # no intra refresh
        plain = plain and codec.codec.canonical_name in DECORD_CODECS and np.linalg.det(display_matrix(frame)) > 0
        plain = plain and codec.field_order <= 1 and not frame.interlaced_frame  # 0: unknown, 1: progressive
        if not plain or max(component.bits for component in frame.format.components) > 8:
            return {}
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)  # without: errors repeat the frame before
        return dict(zip(indices, reader.get_batch(indices).asnumpy())) if len(reader) == len(packets) else {}
    except Exception:  # its errors have no class of their own
        return {}


def _decode_all(path, indices):
    """`({index: [height, width, 3]}, measure_rate of all its frames)` of a file."""
    import av

    wanted, taken, stamps, matrices = set(indices), {}, [], {}
    reformatter = av.video.reformatter.VideoReformatter()
    with av.open(path, options=FFMPEG_OPTIONS) as container:
        stream = _stream(container)
        for frame in _sound(container.decode(stream)):
            if len(stamps) in wanted:
                taken[len(stamps)] = _rgb(frame, reformatter, matrices)
            stamps.append((frame.pts, frame.pts, frame.duration))
        return taken, measure_rate(stamps, stream)


def _sound(frames):
    for frame in frames:
        if frame.is_corrupt:  # FFmpeg has painted over what it could not decode
            raise ValueError(f"its frame at {frame.time or 0:.2f} s is damaged")
        yield frame


def _rgb(frame, reformatter, matrices):
    """[height, width, 3] as shown; `matrices`: a file's display matrices by rotation, which is faster to read."""
    if frame.rotation not in matrices:
        matrices[frame.rotation] = display_matrix(frame)
    pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return as_shown(pixels, matrices[frame.rotation])


def display_matrix(frame) -> np.ndarray:
    """[2, 2]: where a frame's columns (first row) and rows (second) run on the screen, as (to the right, down)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return np.eye(2) if data is None else np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2]


def as_shown(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror [height, width, 3] by quarter turns as a display matrix says."""
    if abs(matrix).trace() < abs(matrix).sum() / 2:
        pixels, matrix = pixels.swapaxes(0, 1), matrix[::-1]
    return pixels[:: -1 if matrix[1, 1] < 0 else 1, :: -1 if matrix[0, 0] < 0 else 1]


# Raise it whenever another decoder, or a change of decoding, resizing or the cache's files, may give other frames:
# those kept under another number are not read.
CACHE_VERSION = 3
MAX_INDICES = 50_000  # of a VideoCache in memory: some 30 MB


class VideoCache:
    """Decoded frames on disk: for each video a small index (JSON), and a safetensors file per frames and size.

    Names are hashes of the file's identity (real path, size, modification time), so a changed file is another one.
    Files are written aside and renamed: several processes and machines may share the folder. What cannot be read, or
    has another checksum than when it was written, is made again. A full cache or disk only stops it growing. Each
    CACHE_VERSION has a folder of its own within the cache's.
    """

    def __init__(self, folder: str, room=None, reader: str = "pyav"):
        """`room`: a ctypes double, the bytes that may still be added by all who share it; without it, nothing is."""
        self.reader = reader  # that is asked for; what it leaves to PyAV is kept with PyAV's
        self.folder, self.room = os.path.join(folder, f"frames-v{CACHE_VERSION}"), room or ctypes.c_double(0)
        self.indices = {}  # those read of late, at most MAX_INDICES
        self.real_folder = functools.lru_cache(4096)(os.path.realpath)

    @staticmethod
    def free_room(folder: str, limit_gb: float) -> float:
        """Bytes that may be added: to the limit in all, or to a fifth of what the disk could give the cache."""
        used = 0
        for file in Path(folder, f"frames-v{CACHE_VERSION}").glob("*/*"):
            with contextlib.suppress(OSError):  # another process has renamed it
                status = file.stat()
                if file.suffix == ".aside" and status.st_mtime < time.time() - 3600:  # of a killed process
                    file.unlink()
                else:
                    used += status.st_size
        return max(0.0, min(limit_gb * 1e9, (used + shutil.disk_usage(folder).free) / 5) - used)

    @staticmethod
    def describe_other_versions(folder: str) -> str | None:
        """Frames in the cache's folder that other versions kept: their size and the commands that delete them."""
        size, commands, here = 0, set(), shlex.quote(folder)
        ours = ".*/[0-9a-f]{2}/[0-9a-f]{40}[.](json|safetensors)"
        for file in itertools.chain(Path(folder).glob("frames-v*/*/*"), Path(folder).glob("[0-9a-f][0-9a-f]/*")):
            top = file.relative_to(folder).parts[0]
            if re.match(r"[0-9a-f]{40}\.(json|safetensors)", file.name) and top != f"frames-v{CACHE_VERSION}":
                with contextlib.suppress(OSError):
                    size += file.stat().st_size
                    # Before there were versions their files stood among whatever else the folder has.
                    commands.add(
                        f"rm -r {here}/{top}"
                        if top.startswith("frames-v")
                        else f"find {here} -regextype egrep -regex '{ours}' -not -path '*/frames-v*' -delete"
                    )
        many = f"{size / 1e6:,.1f} MB of another version's frames, which are not read; to delete them: "
        return many + "; ".join(sorted(commands)) if commands else None

    def identity(self, path: str) -> str:
        """What stands for a file: the same as long as it is unchanged."""
        path = os.path.abspath(path)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(
            self.real_folder(os.path.dirname(path)), os.path.basename(path))  # fmt: skip
        status = os.stat(path)
        return f"{real}\0{status.st_size}\0{status.st_mtime_ns}"

    def _place(self, *key, reader):
        key = key if reader == "pyav" else (*key, reader)
        name = hashlib.sha256(os.fsencode("\0".join(map(str, key)))).hexdigest()[:40]
        return os.path.join(self.folder, name[:2], name)

    def info(self, identity: str) -> VideoInfo | None:
        """The index of a video, if it has been decoded before."""
        if info := self.indices.get(identity):
            return info
        try:
            with open(self._place(identity, reader=self.reader) + ".json", "rb") as file:
                content, checksum = file.read().rsplit(b"\n", 1)
            if xxhash.xxh3_64_hexdigest(content).encode() == checksum:
                info = VideoInfo(**json.loads(content))
                if not info.times:  # those are many
                    if len(self.indices) >= MAX_INDICES:
                        self.indices.clear()
                    self.indices[identity] = info
                return info
        except (OSError, ValueError, TypeError):
            pass
        return None

    def frames(self, identity: str, indices: list[int], height: int, width: int, reader: str = "pyav"):
        """uint8 [F, 3, height, width] that `reader` decoded if they are kept and undamaged, else None."""
        try:
            place = self._place(identity, *indices, height, width, reader=reader)
            with open(place + ".safetensors", "rb") as file:
                kept = safetensors.numpy.load(file.read())  # read, not mapped: a bad disk then raises instead of kills
            frames, checksum = kept["frames"], kept["xxh3_64"]
            if frames.shape == (len(indices), 3, height, width) and xxhash.xxh3_64_intdigest(frames) == checksum[0]:
                return torch.from_numpy(frames)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, MemoryError):
            pass
        return None

    def add(self, identity: str, info: VideoInfo, indices: list[int], frames: torch.Tensor):
        """Keep frames [F, 3, height, width] and the index of their video."""
        frames = frames.contiguous().numpy()
        index = json.dumps(dataclasses.asdict(info)).encode()
        self.room.value -= frames.nbytes + max(500, len(index))
        if self.room.value < 0:
            return
        checksum = np.array([xxhash.xxh3_64_intdigest(frames)], np.uint64)
        place = self._place(identity, *indices, *frames.shape[-2:], reader=info.reader)
        about = self._place(identity, reader=self.reader)
        contents = {
            f"{place}.safetensors": safetensors.numpy.save({"frames": frames, "xxh3_64": checksum}),
            f"{about}.json": index + b"\n" + xxhash.xxh3_64_hexdigest(index).encode(),
        }
        for name, content in contents.items():
            aside = f"{name}.{os.urandom(8).hex()}.aside"
            try:
                os.makedirs(self.folder, mode=0o700, exist_ok=True)
                os.makedirs(os.path.dirname(name), mode=0o700, exist_ok=True)
                with open(aside, "wb") as file:
                    file.write(content)
                os.rename(aside, name)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.remove(aside)
                self.room.value = 0
                tqdm.write(f"the video cache takes nothing more: {error}", sys.stderr)
                return


EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_image(path: str) -> Image.Image:
    """An image in RGB, upright by its EXIF data, transparent parts on white, 16-bit grey scaled from its full range.

    RGB, RGBA and 8-bit grey as qwen_vl_utils reads them, but for EXIF, which transformers' load_image applies too. Of
    several pictures in a file (GIF, APNG, TIFF) the first.

    Raises:
        BadFile: not an image that Pillow can read, or one whose values have no defined range.
    """
    try:
        with Image.open(path) as image:
            image.load()  # turns a TIFF, which then has no orientation left
            turn = EXIF_TURNS.get(exif_orientation(image))
            if is_16_bit(image):
                pixels = _scale_grey(image)
            elif image.has_transparency_data:
                layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
                pixels = Image.new("RGB", image.size, (255, 255, 255))
                pixels.paste(layer, mask=layer.getchannel("A"))
            else:
                pixels = image.convert("RGB")
            return pixels if turn is None else pixels.transpose(turn)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadFile(path, f"cannot be read as an image: {error}") from None


def exif_orientation(image: Image.Image) -> int:
    """1 to 8; 1 (as stored) without EXIF data, and where these are damaged."""
    with contextlib.suppress(Exception):  # Pillow raises many things, and the pixels are another matter
        return image.getexif().get(0x0112, 1)
    return 1


def is_16_bit(image: Image.Image) -> bool:
    """Whether an image is 16-bit grey: of 32-bit modes that of PGM files, whose values Pillow brings to 0 … 65535.

    Raises:
        ValueError: values of any size, of which nothing says what is black and white.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not sixteen and image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise ValueError(
            f"{kind} values (mode {image.mode}) have no defined black and white: scale them, and save 8 or 16 bits"
        )
    return sixteen


def _scale_grey(image):
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    highest = 2 ** tags.get(258, (16,))[0] - 1  # 12 bits are possible too
    values = np.array(image).astype(np.float64)
    grey = (values * 255 / highest).round()
    if tags.get(262) == 0:
        grey = 255 - grey  # 0 is white
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def resize_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic with antialiasing on uint8 [F, 3, h, w] → [F, 3, height, width].

    Rounded and clipped after each of its two passes, as Pillow does it. Float arithmetic, clipped once, is 0.06 to
    0.16 grey levels away on average on real clips, and more than 2 (up to 10) only beside black and white edges.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True)


def load_clip(
    part: dict, folder: str, args, factor: int, limit=None, cache: VideoCache | None = None,
    watched=contextlib.nullcontext, readers: Counter | None = None,
):  # fmt: skip
    """One video, frame list or image at its training size: `(frames uint8 [F, 3, height, width], sampled_fps, times)`.

    `times` are the seconds at which each frame is shown, counted from the start of the file, whatever part is taken.
    `limit` is (frames, height, width) from fit_video_tokens; None: as the arguments and the part ask. `watched(path)`
    is entered around each image's reading; `readers` counts the videos by what decoded them.

    Raises:
        BadFile: names the file and what is wrong with it.
    """
    at_most = limit and limit[0]
    paths = [resolve_path(path, folder) for path in part["files"]]
    if part["type"] == "video":
        path = paths[0]

        def pick(num_frames, fps, times):
            nonlocal indices, sampled_fps
            try:
                indices, sampled_fps = sample_frames(part, num_frames, fps, args, at_most, times)
            except ValueError as error:
                raise BadFile(path, str(error)) from None
            return indices

        def size(info):
            return limit[1:] if limit else target_size(part, info.height, info.width, len(indices), args, factor)

        indices = sampled_fps = None
        readers = Counter() if readers is None else readers
        identity = cache and cache.identity(path)
        if cache and (info := cache.info(identity)):
            pick(info.num_frames, info.fps, info.times)
            frames = cache.frames(identity, indices, *size(info), info.reader)
            if frames is not None:
                readers[info.reader] += 1
                return frames, sampled_fps, info.shown_at(indices)
        frames, info = read_video(path, pick, args.video_reader)  # [F, 3, h, w]
        readers[info.reader] += 1
        frames = resize_frames(frames, *size(info))
        if cache and cache.room.value > 0 and cache.identity(path) == identity:  # not replaced meanwhile
            cache.add(identity, info, indices, frames)
        return frames, sampled_fps, info.shown_at(indices)
    fps = part["fps"] or args.fps  # of a frame list: the rate at which its images were taken
    times = frame_list_times(len(paths), fps)
    if at_most and at_most < len(paths):
        fps *= at_most / len(paths)
        taken = spread_evenly(0, len(paths) - 1, at_most)
        paths, times = [paths[i] for i in taken], [times[i] for i in taken]
    images, shape = [], limit and limit[1:]
    for path in paths:
        with watched(path):
            image = read_image(path)
            shape = shape or target_size(part, image.height, image.width, len(paths), args, factor)
            images.append(torch.from_numpy(np.array(image.resize(shape[::-1], Image.Resampling.BICUBIC))))
    return torch.stack(images).permute(0, 3, 1, 2), fps, times


def frame_list_times(count: int, fps: float) -> list[float]:
    """Seconds of the images of a frame list, and of the copy of the last one where their number is odd.

    Source: fetch_video of qwen_vl_utils.
    """
    return [i / fps for i in range(math.ceil(count / FRAME_FACTOR) * FRAME_FACTOR)]


def clip_shape(part: dict, folder: str, args, factor: int, cache: VideoCache | None = None):
    """`((frames, height, width), sampled_fps, times)` as of load_clip without a limit, decoding one frame at most."""
    paths = [resolve_path(path, folder) for path in part["files"]]
    if part["type"] != "video":
        width, height = read_image(paths[0]).size
        fps = part["fps"] or args.fps
        shape = len(paths), *target_size(part, height, width, len(paths), args, factor)
        return shape, fps, frame_list_times(len(paths), fps)
    info = cache and cache.info(cache.identity(paths[0]))
    if not info:
        info = video_info(paths[0])
    try:
        indices, sampled_fps = sample_frames(part, info.num_frames, info.fps, args, times=info.times)
    except ValueError as error:
        raise BadFile(paths[0], str(error)) from None
    size = target_size(part, info.height, info.width, len(indices), args, factor)
    return (len(indices), *size), sampled_fps, info.shown_at(indices)


def visual_tokens(frames: int, height: int, width: int, factor: int) -> int:
    """Tokens of one clip: temporal patches × merged patches per frame."""
    return math.ceil(frames / FRAME_FACTOR) * (height // factor) * (width // factor)


def budgeted_tokens(shapes: list[tuple[int, int, int]], factor: int, time_tokens: list[int]) -> int:
    """What --max_video_tokens bounds: visual tokens of (frames, height, width), `time_tokens` per temporal patch."""
    return sum(visual_tokens(*shape, factor) + math.ceil(shape[0] / FRAME_FACTOR) * beside
               for shape, beside in zip(shapes, time_tokens))  # fmt: skip


def fit_video_tokens(
    shapes: list[tuple[int, int, int]], budget: int, factor: int, time_tokens: list[int] | None = None
) -> list[tuple[int, int, int]]:
    """Shrink (frames, height, width) of a sample's clips until their visual tokens fit the budget.

    `time_tokens`: of each clip, the tokens before and after each of its temporal patches; see Encoder.time_tokens.
    First all sides shrink by one common scale, each rounded down to a multiple of `factor` and never below it; if the
    smallest size is still too much, all frame counts shrink by one common share, never below one temporal patch.

    Raises:
        ValueError: one token per clip is already more than the budget.
    """

    def at_size(scale):
        return [(f, max(factor, int(h * scale) // factor * factor), max(factor, int(w * scale) // factor * factor))
                for f, h, w in shapes]  # fmt: skip

    def at_frames(share):
        return [(max(1, min(f, max(FRAME_FACTOR, int(f * share) // FRAME_FACTOR * FRAME_FACTOR))), h, w)
                for f, h, w in at_size(0)]  # fmt: skip

    def total(shapes):
        return budgeted_tokens(shapes, factor, time_tokens or [0] * len(shapes))

    for shrink in (at_size, at_frames):
        if total(shrink(1)) <= budget:
            return shrink(1)
        if total(shrink(0)) <= budget:
            low, high = 0.0, 1.0
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (middle, high) if total(shrink(middle)) <= budget else (low, middle)
            return shrink(low)
    least = total(at_frames(0))
    raise ValueError(f"{len(shapes)} videos and images need at least {least} visual tokens, "
                     f"--max_video_tokens is {budget}: raise it or split the sample")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- 4. encoding


def patchify(frames: torch.Tensor, patch_size: int, merge_size: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut uint8 frames [F, 3, height, width] into the tower's patches: uint8 [P, 3·2·patch²] and their grid (t, h, w).

    An odd number of frames repeats the last one. Patches of one merged token are neighbours.
    Source: Qwen2VLVideoProcessor.patchify of transformers.
    """
    if len(frames) % FRAME_FACTOR:
        frames = torch.cat([frames, frames[-1:]])
    f, c, height, width = frames.shape
    t, h, w = f // FRAME_FACTOR, height // patch_size, width // patch_size
    rows = frames.contiguous().numpy().view(f"V{patch_size}")  # a patch's row of pixels moves as one item
    rows = rows.reshape(t, FRAME_FACTOR, c, h // merge_size, merge_size, patch_size, w // merge_size, merge_size)
    rows = np.ascontiguousarray(rows.transpose(0, 3, 6, 4, 7, 2, 1, 5))  # t, h', w', merge, merge, c, frame, patch
    return torch.from_numpy(rows.view(np.uint8).reshape(t * h * w, -1)), (t, h, w)


class Encoder:
    """Turns a normal record into the arrays that a packed row is made of; lives in the decoding processes.

    Calling it with a record gives a dict of numpy arrays (T tokens, N clips, P patches):
      `input_ids`, `labels` int64 [T] (-100: not supervised), `position_ids` int64 [4, T] (text row first),
      `patches` uint8 [P, 1176], `video_grid_thw` int64 [N, 3], `lengths` [1], and `id`, `num_tokens`, `num_videos`,
      `num_images`, `shrunk`, `bad` [(file, reason)], and what else a record has.
    An image rides as a video of one temporal patch: one tower call serves both. A record with a list `completions`
    (each the turns of one answer) is a prompt, ends where the assistant begins, and gets them by add_suffixes.
    """

    def __init__(self, model_path: str, args: TrainingArguments, room=None, watch: int | None = None):
        """`room`: see VideoCache; `watch`: see `watched`."""
        processor = load_processor(model_path, args.cache_dir)
        self.processor, self.tokenizer, self.args = processor, processor.tokenizer, args
        self.image_mean, self.image_std = processor.video_processor.image_mean, processor.video_processor.image_std
        template = processor.chat_template or processor.tokenizer.chat_template
        self.chat_template = template.get("default") if isinstance(template, dict) else template
        if not self.chat_template:
            raise InputError(f"--model_id {model_path} has no chat template: copy chat_template.jinja from the model "
                             "that it was made from")  # fmt: skip
        self.config = load_config(model_path, args)
        vision = self.config.vision_config
        self.patch_size, self.merge_size = vision.patch_size, vision.spatial_merge_size
        self.factor = self.patch_size * self.merge_size
        self.timing = FAMILIES[self.config.model_type]
        self.template_kwargs = json.loads(args.chat_template_kwargs or "{}")
        self._of_template = {}  # what is known of the chat template
        if self.template_kwargs:
            try:
                check_options(self.template_kwargs, self.chat_template)
                self.generation_prefix()
            except ValueError as error:
                raise InputError(f"--chat_template_kwargs: {error}") from None
        self.max_positions = self.config.get_text_config().max_position_embeddings
        self.cache = VideoCache(args.video_cache, room, args.video_reader) if args.video_cache else None
        self.watch = watch
        self.end_of_turn = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        names = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
        self.vision_ids = self.tokenizer.convert_tokens_to_ids(names)

    def render(self, turns: list[dict], options: str | None = None, **kwargs) -> str:
        """Turns of the schema as the chat template writes them, one pad token per clip or, with times, per 2 frames.

        `options`: a record's `chat_template_kwargs`.

        Raises:
            ValueError: the chat template refuses something, or would leave out text.
        """
        # The template's view: frame lists are videos, and a part has only the fields of its type.
        plain = [{"role": m["role"], "content": [
            {"type": "text", "text": p["text"]} if p["type"] == "text" else
            {"type": "image" if p["type"] == "image" else "video"}
            for p in m["content"]]} for m in turns]  # fmt: skip
        for message, turn in zip(plain, turns):
            if turn.get("reasoning"):
                message["reasoning_content"] = turn["reasoning"]
            elif turn["role"] == "assistant" and "reasoning_content" in self.chat_template:
                # Thoughts within the text have this field too: the template of Qwen3.8 looks for them nowhere else.
                text = next((part for part in message["content"] if part["type"] == "text"), {"text": ""})
                if thought := THOUGHT.match(text["text"]):
                    message["reasoning_content"], text["text"] = thought[1], text["text"][thought.end() :]
                elif "</think>" in text["text"]:
                    raise ValueError("text before the <think> of an answer, which the chat template leaves out: begin "
                                     "the answer with <think>")  # fmt: skip
            if turn.get("tool_calls"):
                message["tool_calls"] = json.loads(turn["tool_calls"])
        kwargs = {**self.template_kwargs, **json.loads(options or "{}"), **kwargs}
        try:
            text = self.tokenizer.apply_chat_template(
                plain, chat_template=self.chat_template, tokenize=False, **kwargs
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from None
        videos = [p for m in turns for p in m["content"] if p["type"] in ("video", "frames")]
        if self.timing != "text" or not videos or "times" not in videos[0]:
            return text
        texts = [self.time_stamps(part["times"]) for part in videos]
        return self.processor.get_text_with_replacements([text], videos_replacements=texts)[0][0]

    def time_stamps(self, times: list[float]) -> str:
        """The processor's text for a video whose frames are shown at these seconds: one pad token per 2 frames."""
        one = torch.tensor([[math.ceil(len(times) / FRAME_FACTOR), self.merge_size, self.merge_size]])
        metadata = transformers.video_utils.VideoMetadata(len(times), fps=1.0, frames_indices=list(times))
        return self.processor.replace_video_token({"video_grid_thw": one, "video_metadata": [metadata]}, 0)

    def stamp_tokens(self, times: list[float]) -> int:
        """Tokens of a video of these times beside its visual ones: a time stamp and two borders per temporal patch."""
        if self.timing != "text" or not times:
            return 0
        input_ids = self.tokenizer(self.time_stamps(times), add_special_tokens=False)["input_ids"]
        return len(input_ids) - math.ceil(len(times) / FRAME_FACTOR)

    def time_tokens(self, times: list[float]) -> int:
        """The most of stamp_tokens that one temporal patch has: later times have more digits."""
        return self.stamp_tokens(times[-1:])

    def stamps_in(self, input_ids) -> int:
        """How many tokens of a sample stamp_tokens counts."""
        stamps = [found[0] for found in CLIP.finditer(self.tokenizer.decode(input_ids)) if found[0][1].isdigit()]
        return sum(len(self.tokenizer(stamp, add_special_tokens=False)["input_ids"]) + 1 for stamp in stamps)

    def video_layout(self) -> str:
        """How the installed processor writes a video of a family that has time stamps: one frame at 0 seconds."""
        if self.timing != "text":
            return "one run of tokens"
        template = ["<|vision_start|><|video_pad|><|vision_end|>"]
        return self.processor.get_text_with_replacements(template, videos_replacements=[self.time_stamps([0.0])])[0][0]

    def template_reads(self) -> dict[str, bool]:
        """Which of UNRENDERED the chat template has a place for."""
        key = self.chat_template, json.dumps(self.template_kwargs)
        if key not in self._of_template:
            self._of_template[key] = self._probe_template()
        return self._of_template[key]

    def _probe_template(self):
        user = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        call = {"type": "function", "function": {"name": PROBE, "arguments": {}}}

        def rendered(*turns, **kwargs):
            kwargs = {**self.template_kwargs, **kwargs}
            try:
                return self.tokenizer.apply_chat_template(
                    [user, *turns], chat_template=self.chat_template, tokenize=False, **kwargs
                )
            except Exception:  # a template may raise anything
                return ""

        result = {"role": "tool", "content": [{"type": "text", "text": PROBE}]}
        result = rendered({**answer, "tool_calls": [call]}, result).rpartition("<|im_start|>")[2]
        return {
            "reasoning": PROBE in rendered({**answer, "reasoning_content": PROBE}),
            "tool_calls": PROBE in rendered({**answer, "tool_calls": [call]}),
            "tools": PROBE in rendered(answer, tools=[call]),
            "tool": PROBE in result and not result.startswith("tool"),  # ChatML has no such role
        }

    def generation_prefix(self, options: str | None = None) -> str:
        """What the chat template writes after `<|im_start|>assistant` for the model to go on from, such as <think>."""
        key = self.chat_template, json.dumps(self.template_kwargs), options
        if key not in self._of_template:
            question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
            text = self.render(question, options, add_generation_prompt=True)
            if len(self._of_template) >= 1000:  # records may have tools of their own, long ones
                self._of_template.clear()
            self._of_template[key] = text.rpartition("<|im_start|>assistant\n")[2]
        return self._of_template[key]

    def tokenize(self, messages: list[dict], completions: list[list[dict]] | None = None, options: str | None = None):
        """Chat template → `[(input_ids, labels)]` of a conversation, or of a prompt and of each completion after it.

        One pad token per clip, or per temporal patch where parts have `times`; labelled are the assistant turns, their
        ends too, but none of a prompt's. `options`: a record's `chat_template_kwargs`.

        Raises:
            ValueError: the chat template does not write what is needed.
        """
        if self.args.system_prompt is not None and messages[0]["role"] != "system":
            text = {**dict.fromkeys(PART), "type": "text", "text": self.args.system_prompt}
            messages = [{"role": "system", "content": [text]}, *messages]
        if completions is None:
            return [self._labelled(messages, "", 0, options)]
        prompt = self.render(messages, options, add_generation_prompt=True)
        input_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [(input_ids, [-100] * len(input_ids))] + [
            self._labelled([*messages, *completion], prompt, len(messages), options) for completion in completions
        ]

    def may_be_refused(self, record: dict) -> bool:
        """Whether a normal record has what a chat template may refuse or leave out, so that rendering it can fail."""
        options = record.get("chat_template_kwargs")
        parts = [(turn["role"], part) for turn in record["messages"] for part in turn["content"]]
        return bool(
            options
            or (record.get("completions") and self.generation_prefix(options))
            or any(part["type"] != "text" and role != "user" for role, part in parts)
            or any("</think>" in (part["text"] or "") for _, part in parts)
        )

    def tokenize_record(self, record: dict, places: int | None = None) -> list:
        """What tokenize gives for a normal record. `places`: its pad tokens; without its files, one per clip.

        Raises:
            ValueError: the chat template refuses something or leaves out a video or image.
        """
        messages = record["messages"]
        tokenized = self.tokenize(messages, record.get("completions"), record.get("chat_template_kwargs"))
        if places is None:
            places = sum(part["type"] != "text" for turn in messages for part in turn["content"])
        if sum(token in self.vision_ids[2:] for token in tokenized[0][0]) != places:
            raise ValueError(left_out(messages))
        return tokenized

    def _labelled(self, turns, before, first, options):
        """Tokens of the rendered turns after the text `before`; turns from number `first` on are supervised."""
        text, prefix = self.render(turns, options), self.generation_prefix(options)
        if not text.startswith(before):
            if not prefix:
                raise ValueError("the chat template writes a prompt otherwise when an answer follows it")
            fix = "give answers with thoughts if it thinks, else without (--chat_template_kwargs, enable_thinking)"
            if any(turn["role"] == "user" for turn in turns[first:]):
                fix = "it leaves out the thoughts of answers before the last question: give answers of one turn"
                if "preserve_thinking" in template_options(self.chat_template):
                    fix += ", or --chat_template_kwargs '{\"preserve_thinking\": true}'"
            raise ValueError(f"the chat template opens the answer with {prefix!r}, and writes something else where it "
                             f"is given: {fix}")  # fmt: skip
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = [match.span(1) for match in ANSWER.finditer(text)]  # no text of a record has control tokens
        if len(spans) != len(answers):
            raise ValueError(f"the chat template writes {len(spans)} turns between <|im_start|>assistant and "
                             f"<|im_end|> for {len(answers)} assistant turns")  # fmt: skip
        learned = []  # spans, without what generation is given
        for i, (start, end) in zip(answers, spans):
            if i >= first and turns[i].get("train") is not False:
                learned.append((start + len(prefix) if text.startswith(prefix, start) else start, end))
        # Answers are encoded apart from what is before them, as generation continues it: newlines of "<think>\n" and
        # of an empty thought are not one token.
        cuts = [len(before), *(start for start, _ in learned if start > len(before)), len(text)]
        input_ids, labels = [], []
        clips = [clip.span() for clip in CLIP.finditer(text)] if self.timing == "text" else []
        for cut, end in itertools.pairwise(cuts):
            encoded = self.tokenizer(text[cut:end], return_offsets_mapping=True, add_special_tokens=False)
            input_ids += encoded["input_ids"]
            for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"]):
                a, b = a + cut, b + cut
                on = token not in self.vision_ids and any(start <= a and b <= stop for start, stop in learned)
                labels.append(token if on and not any(start <= a < stop for start, stop in clips) else -100)
        return input_ids, labels

    def clips(self, parts: list[dict], folder: str, known_bad: dict[str, str]) -> list:
        """Decode a sample's clips: for each part (patches, grid, seconds per temporal patch, times) or a BadFile.

        `known_bad` has the files that are not tried (again), and why. Second value: did the budget bite.
        """

        def attempt(function, part, *args, **kwargs):
            files = [os.path.join(folder, path) for path in part["files"]]
            try:
                for path in files:
                    if path in known_bad:
                        raise BadFile(path, known_bad[path])
                with self.watched(files[0]):
                    return function(part, folder, self.args, self.factor, *args, cache=self.cache, **kwargs)
            except BadFile as error:
                return error
            except Exception as error:  # whatever a decoder may throw costs its file, not the run
                return BadFile(files[0], f"{type(error).__name__}: {error}")

        limits, shrunk = None, False
        self.readers = Counter()
        if self.args.max_video_tokens and parts:
            limits = [attempt(clip_shape, part) for part in parts]
            good = [i for i, limit in enumerate(limits) if not isinstance(limit, BadFile)]
            shapes, _, times = zip(*[limits[i] for i in good]) if good else ((), (), ())
            time_tokens = [0 if parts[i]["type"] == "image" else self.time_tokens(t) for i, t in zip(good, times)]
            fitted = fit_video_tokens(list(shapes), self.args.max_video_tokens, self.factor, time_tokens)
            shrunk = fitted != list(shapes)
            for i, shape in zip(good, fitted):
                limits[i] = shape
        clips = []
        for i, part in enumerate(parts):
            bad = limits and isinstance(limits[i], BadFile)
            limit = limits[i] if limits else None
            clip = limit if bad else attempt(load_clip, part, limit, watched=self.watched, readers=self.readers)
            if not isinstance(clip, BadFile):
                frames, sampled_fps, times = clip
                clip = *patchify(frames, self.patch_size, self.merge_size), FRAME_FACTOR / sampled_fps, times
            clips.append(clip)
        return clips, shrunk

    @contextlib.contextmanager
    def watched(self, path: str):
        """Around the decoding of one file in a process of its own: which file it is, and an end to it if it hangs."""
        if self.watch is None:
            yield
            return
        os.pwrite(self.watch, os.fsencode(path) + b"\0", 0)
        signal.setitimer(signal.ITIMER_REAL, self.args.decode_timeout)  # the signal ends the process, whatever it does
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.pwrite(self.watch, b"\0", 0)

    def __call__(self, record: dict, folder: str, known_bad: dict[str, str] | None = None) -> dict:
        """Encode one record whose relative paths start from `folder`; `known_bad` {path: reason} is not tried.

        Raises:
            BadVideo: a video or image cannot be read, unless --on_bad_video leaves it or the sample out.
            InputError: names the record and how far the sample exceeds --max_seq_length (if that is an error).
        """
        messages = record["messages"]
        parts = [part for message in messages for part in message["content"] if part["type"] != "text"]
        try:
            clips, shrunk = self.clips(parts, folder, known_bad or {})
        except ValueError as error:
            raise InputError(f"{record_name(record['id'])}: {error}") from None
        bad = [(clip.path, clip.reason) for clip in clips if isinstance(clip, BadFile)]
        sample = {"id": record["id"], "shrunk": shrunk, "bad": bad, "num_tokens": 0, "num_videos": 0, "num_images": 0}
        sample["readers"] = self.readers
        sample |= {key: value for key, value in record.items() if key not in ("id", "messages", "completions")}
        if bad:
            if self.args.on_bad_video == "error":
                raise BadVideo(record["id"], *bad[0])
            if self.args.on_bad_video == "drop_sample" or len(bad) == len(parts):
                return sample  # no input_ids: left out and counted
            gone = {id(part) for part, clip in zip(parts, clips) if isinstance(clip, BadFile)}
            messages = [{**m, "content": [part for part in m["content"] if id(part) not in gone]} for m in messages]
            parts, clips = zip(*[(p, clip) for p, clip in zip(parts, clips) if not isinstance(clip, BadFile)])
        patches, grids, seconds, times = zip(*clips) if clips else ((), (), (), ())
        shown = {id(part): moments for part, moments in zip(parts, times)}
        messages = [{**m, "content": [{**part, "times": shown.get(id(part))} for part in m["content"]]}
                    for m in messages]  # fmt: skip
        runs = self.runs(grids, seconds)
        try:
            (input_ids, labels), *suffixes = self.tokenize_record({**record, "messages": messages}, len(runs))
        except ValueError as error:
            raise InputError(f"{record_name(record['id'])}: {error}") from None
        pads = [t * h * w // self.merge_size**2 for (t, h, w), _ in runs]
        ids, targets, clip = [], [], iter(pads)
        for token, target in zip(input_ids, labels):  # widen one pad per clip to one per visual token
            count = next(clip) if token in self.vision_ids[2:] else 1
            ids += [self.config.video_token_id if token in self.vision_ids[2:] else token] * count
            targets += [target] * count
        num_images = sum(part["type"] == "image" for part in parts)
        num_tokens = len(ids) + sum(len(suffix) for suffix, _ in suffixes)
        sample |= {"num_tokens": num_tokens, "num_videos": len(parts) - num_images, "num_images": num_images}
        longest = len(ids) + max((len(suffix) for suffix, _ in suffixes), default=0)
        flag = "max_prompt_length" if record.get("completions") == [] else "max_seq_length"
        most = getattr(self.args, flag, None) or self.args.max_seq_length
        if longest > most:
            if self.args.on_long_sample == "error":
                raise InputError(
                    f"{record_name(record['id'])}: {longest} tokens ({sum(pads)} visual), --{flag} is "
                    f"{most}: raise it, set --max_video_tokens, lower --fps or the sizes, or "
                    "--on_long_sample skip"
                )
            return sample  # no input_ids: skipped and counted
        ids, grids = np.array(ids), np.array(grids, np.int64).reshape(-1, 3)
        sample |= {
            "input_ids": ids, "labels": np.array(targets), "video_grid_thw": grids,
            "position_ids": qwen_positions(ids, {self.config.video_token_id: iter(runs)}, self.config),
            "lengths": np.array([len(ids)]),
            "patches": torch.cat(patches).numpy() if patches else np.zeros((0, self.patch_dim), np.uint8),
        }  # fmt: skip
        return add_suffixes(sample, suffixes)

    def last_position(self, record: dict, folder: str) -> int | None:
        """The largest position of a record's sample, without decoding: None if the cache does not know all its videos.

        Raises:
            ValueError: a file cannot be used, or the sample does not fit --max_video_tokens.
        """
        parts = [part for message in record["messages"] for part in message["content"] if part["type"] != "text"]
        shapes, seconds, times = [], [], []  # seconds: of whole clips
        for part in parts:
            path = part["type"] == "video" and resolve_path(part["files"][0], folder)
            if path and not (self.cache and self.cache.info(self.cache.identity(path))):
                return None
            shape, rate, shown = clip_shape(part, folder, self.args, self.factor, self.cache)
            shapes.append(shape)
            times.append([] if part["type"] == "image" else shown)
            seconds.append(shape[0] / rate)
        time_tokens = [self.time_tokens(shown) for shown in times]
        if budget := self.args.max_video_tokens:
            shapes = fit_video_tokens(shapes, budget, self.factor, time_tokens)
        taken = sum(self.positions_taken(shape, FRAME_FACTOR * whole / shape[0], beside)
                    for shape, whole, beside in zip(shapes, seconds, time_tokens))  # fmt: skip
        (input_ids, _), *suffixes = self.tokenize_record(record)
        text = len(input_ids) - len(parts) + max((len(suffix) for suffix, _ in suffixes), default=0)
        return taken + text - 1

    def runs(self, grids, seconds) -> list[tuple]:
        """The runs of consecutive tokens of some clips, as (grid, seconds): whole clips, or their temporal patches."""
        if self.timing != "text":
            return list(zip(grids, seconds))
        return [((1, h, w), 0.0) for t, h, w in grids for _ in range(t)]

    def positions_taken(self, shape: tuple[int, int, int], seconds: float, time_tokens: int = 0) -> int:
        """How many positions a clip takes: its (frames, height, width), and the seconds of one temporal patch.

        `time_tokens`: see there; 0 for an image.
        """
        frames, height, width = shape
        grid = math.ceil(frames / FRAME_FACTOR), height // self.patch_size, width // self.patch_size
        return sum(int(clip_positions(run, per_patch, self.config).max()) + 1 + time_tokens
                   for run, per_patch in self.runs([grid], [seconds]))  # fmt: skip

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels × frames × height × width."""
        return 3 * FRAME_FACTOR * self.patch_size**2


# What the models were trained with; and transformers 5.3's, of runs that recorded no rule.
POSITION_RULE = "text goes on one past the largest of a clip's t, h and w positions"
OLD_POSITION_RULE = "text goes on at a clip's start + max(h, w)"


def conventions(encoder: Encoder) -> dict:
    """What a run's arguments.json keeps beside its flags: by which rules its sequences were made."""
    return {"position_rule": POSITION_RULE, "video_layout": encoder.video_layout()}


def warn_of_other_layout(flag: str, folder: str | None, encoder: Encoder):
    """Print a warning if a run of ours trained this model on videos that were written otherwise than they are now."""
    run = run_arguments(folder) if folder and Path(folder).is_dir() else None
    trained, layout = (run or {}).get("video_layout"), encoder.video_layout()
    if trained and trained != layout:
        say(f"warning: --{flag} {folder} was trained on videos as {trained!r} (one frame), and transformers "
            f"{transformers.__version__} writes {layout!r}: install the version of its training, or train it "
            "again")  # fmt: skip


def qwen_positions(input_ids, clips: dict, config) -> np.ndarray:
    """Text, temporal, height and width positions of one sequence by the rule of the models' training: int64 [4, T].

    `clips`: for each placeholder token an iterator over `(grid, seconds)` of its clips in order: (t, h, w) in patches,
    and the seconds of one temporal patch. What follows a clip goes on one past the largest of its positions.
    Source: get_rope_index of transformers 4.49 to 4.51; later ones round seconds, or go on at start + max(h, w).
    """
    input_ids = np.asarray(input_ids)
    positions = np.empty((4, len(input_ids)), np.int64)
    positions[0] = np.arange(len(input_ids))
    placeholders = np.flatnonzero(np.isin(input_ids, list(clips)))
    done = following = visited = 0  # tokens that have positions, the next position, placeholders that have positions
    while visited < len(placeholders):
        start = placeholders[visited]
        grid, seconds = next(clips[int(input_ids[start])])
        positions[1:, done:start] = following + np.arange(start - done)
        following += start - done
        clip = clip_positions(grid, seconds, config)
        done = start + clip.shape[1]
        positions[1:, start:done] = following + clip
        following += clip.max() + 1
        visited += clip.shape[1]
    positions[1:, done:] = following + np.arange(len(input_ids) - done)
    return positions


def clip_positions(grid, seconds: float, config) -> np.ndarray:
    """Temporal, height and width positions of one clip's tokens, from 0 on: int64 [3, tokens]; see qwen_positions."""
    (t, h, w), merge = grid, config.vision_config.spatial_merge_size
    positions = np.indices((t, h // merge, w // merge))
    if config.model_type == "qwen2_5_vl":  # by time, in float32 as the processor hands seconds over, rounded down
        interval = np.float32(config.vision_config.tokens_per_second * seconds)
        positions[0] = positions[0].astype(np.float32) * interval
    return positions.reshape(3, -1)


def qwen_position_ids(inputs, config) -> torch.Tensor:
    """`position_ids` [4, B, T] for a plain transformers model, from what its processor gives (padded or not)."""
    input_ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(input_ids)).bool()
    images = [(grid.tolist(), 1.0) for grid in inputs.get("image_grid_thw", [])]
    videos = [grid.tolist() for grid in inputs.get("video_grid_thw", [])]
    if not config.model_type.startswith("qwen2"):  # from Qwen3-VL on, a time stamp is before each temporal patch
        videos = [[1, h, w] for t, h, w in videos for _ in range(t)]
    seconds = [float(value) for value in inputs.get("second_per_grid_ts", [1.0] * len(videos))]
    clips = {config.image_token_id: iter(images), config.video_token_id: iter(zip(videos, seconds))}
    position_ids = torch.zeros(4, *input_ids.shape, dtype=torch.long, device=input_ids.device)
    for b in range(len(input_ids)):
        positions = qwen_positions(input_ids[b][real[b]].cpu(), clips, config)
        position_ids[:, b, real[b]] = torch.from_numpy(positions).to(input_ids.device)
    return position_ids


def add_suffixes(sample: dict, suffixes: list[tuple]) -> dict:
    """An encoded prompt with answers behind it that share it: `suffixes` are (input_ids, labels) of each.

    Their positions all go on from the prompt's end; `lengths` [1 + suffixes] has the tokens of prompt and answers.
    """
    text, vision = sample["position_ids"][0, -1] + 1, sample["position_ids"][1:].max() + 1
    start = np.array([[text], [vision], [vision], [vision]])
    ids, labels, positions = [sample["input_ids"]], [sample["labels"]], [sample["position_ids"]]
    for suffix, targets in suffixes:
        ids.append(np.array(suffix, np.int64))
        labels.append(np.array(targets, np.int64))
        positions.append(start + np.arange(len(suffix)))
    return sample | {
        "input_ids": np.concatenate(ids), "labels": np.concatenate(labels),
        "position_ids": np.concatenate(positions, 1), "lengths": np.array([len(part) for part in ids]),
    }  # fmt: skip


def run_arguments(folder: str | Path) -> dict | None:
    """The arguments.json of the run that wrote the model in `folder` or, for checkpoint-N, in the folder above."""
    for path in (Path(folder) / "arguments.json", Path(folder).parent / "arguments.json"):
        if path.is_file():
            return json.loads(path.read_text())
    return None


def weights_identity(source: str, cache_dir: str | None = None) -> list[str]:
    """Size and time of change of a model's or adapter's weight files, or the commit of a hub model."""
    if not Path(source).is_dir():
        return [f"{source} at commit {Path(hub_snapshot(source, cache_dir)).name}"]
    files = [file for file in sorted(Path(source).iterdir()) if file.suffix in (".safetensors", ".bin")
             and file.name.startswith(("model", "adapter_model", "pytorch_model"))]  # fmt: skip
    return [f"{file.name}: {file.stat().st_size} bytes of {np.datetime64(file.stat().st_mtime_ns, 'ns')}"
            for file in files]  # fmt: skip


@functools.cache
def warn_of_old_positions(flag: str, folder: str | None):
    """Print a warning if a run of ours trained this model with another position rule than POSITION_RULE."""
    run = run_arguments(folder) if folder and Path(folder).is_dir() else None
    if run is not None and run.get("position_rule") != POSITION_RULE:
        say(f"warning: --{flag} {folder} was trained with other positions ({OLD_POSITION_RULE}, as in transformers "
            f"5.3) than it gets now ({POSITION_RULE}, as Qwen trained its models): its answers may be worse; train it "
            "again")  # fmt: skip


@functools.cache
def find_model(source: str, cache_dir: str | None = None):
    """Make sure within seconds that a model can be read: a folder, on the hub, or, without a network, in the cache.

    Raises:
        InputError: none of these.
    """
    if os.path.isdir(source):
        return
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().model_info(source, timeout=10)
            return
        reason = "HF_HUB_OFFLINE is set"
    except (HFValidationError, GatedRepoError, RepositoryNotFoundError) as error:
        fix = "run hf auth login with an account that may read it" if isinstance(error, GatedRepoError) else (
            "check its spelling, run hf auth login if it is private, or name a folder")  # fmt: skip
        what = "is gated" if isinstance(error, GatedRepoError) else "is neither a folder nor a model on the hub"
        raise InputError(f"model {source}: {what}: {fix}") from None
    except Exception as error:  # whatever the network may raise
        reason = f"the hub cannot be reached ({error or type(error).__name__})"
    if not isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json", cache_dir=cache_dir), str):
        raise InputError(f"model {source}: {reason}, and it is not in the cache: download it where there is a network "
                         f"(hf download {source}), or name a folder")  # fmt: skip
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # else every file is asked for again and again
    say(f"model {source}: {reason}: the copy in the cache is used")


def load_processor(source: str, cache_dir: str | None = None):
    """The processor of a model, folder or hub name; its tokenizer's `name_or_path` is the folder of its files."""
    find_model(source, cache_dir)
    processor = transformers.AutoProcessor.from_pretrained(source, cache_dir=cache_dir)
    if not os.path.isdir(source):  # save_processor copies from there
        processor.tokenizer.name_or_path = hub_snapshot(source, cache_dir)
    return processor


def hub_snapshot(name: str, cache_dir: str | None) -> str:
    """Folder of a hub model in the cache that holds the revision which was loaded; it is called like the commit."""
    config = transformers.utils.cached_file(name, "config.json", cache_dir=cache_dir, local_files_only=True)
    return os.path.dirname(config)


def load_config(source: str, args: TrainingArguments):
    """The configuration of a model, folder or hub name.

    Raises:
        InputError: it is of a family that is not supported.
    """
    find_model(source, args.cache_dir)
    config = transformers.AutoConfig.from_pretrained(source, cache_dir=args.cache_dir)
    if config.model_type not in FAMILIES:
        why = [f"; {reason}" for word, reason in UNSUPPORTED_FAMILIES.items() if word in config.model_type]
        raise InputError(f"--model_id {source} is a {config.model_type!r} model{''.join(why[:1])}; supported: "
                         f"{', '.join(FAMILIES)}")  # fmt: skip
    needed, found = NEEDED_TRANSFORMERS.get(config.model_type, "0"), transformers.__version__
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, needed.split("."))):
        raise InputError(f"--model_id {source}: {config.model_type!r} models need transformers {needed} or later, "
                         f"installed is {found}: pip install --upgrade 'transformers<6'")  # fmt: skip
    return config


# ----------------------------------------------------------------------------------------- 5. packing and attention


def to_device(array: np.ndarray, device) -> torch.Tensor:
    """The array as a tensor on the device; to CUDA through pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor


@dataclass
class AttentionPlan:
    """Which token of a packed row may see which: consecutive segments, each causal in itself.

    A segment may also see all tokens of one earlier segment, its shared prefix. `lengths` has the tokens of each
    segment, `prefixes` the index of the prefix segment or None. On CUDA the same is held as cumulative lengths [S + 1]
    and, with prefixes, as the rows of keys and values that the segments read one after the other.
    """

    lengths: list[int]
    prefixes: list[int | None]
    max_q: int
    max_k: int
    cu_q: torch.Tensor  # int32 [S + 1]
    cu_k: torch.Tensor  # int32 [S + 1]
    key_rows: torch.Tensor | None  # int64 [sum of key lengths]; None: the row itself

    @classmethod
    def make(cls, lengths: list[int], prefixes: list[int | None] | None = None, device="cpu") -> "AttentionPlan":
        """Build the plan of a row from its segment lengths, on `device`."""
        prefixes = prefixes or [None] * len(lengths)
        starts = [0, *np.cumsum(lengths).tolist()]
        assert all(p is None or (prefixes[p] is None and p < s) for s, p in enumerate(prefixes)), (
            "prefixes come before"
        )
        spans = [([] if p is None else [(starts[p], starts[p + 1])]) + [(starts[s], starts[s + 1])]
                 for s, p in enumerate(prefixes)]  # fmt: skip
        key_lengths = [sum(b - a for a, b in span) for span in spans]
        shared = any(p is not None for p in prefixes)
        rows = np.concatenate([np.arange(a, b) for span in spans for a, b in span]) if shared else None

        def cumulative(values):
            return to_device(np.cumsum([0, *values], dtype=np.int32), device)

        return cls(list(lengths), prefixes, max(lengths), max(key_lengths), cumulative(lengths),
                   cumulative(key_lengths), None if rows is None else to_device(rows, device))  # fmt: skip

    @functools.cached_property
    def stages(self):
        """How recurrent layers go through the row: `([(tokens [N, L], prefix)], places [T])`.

        First all segments without a prefix, padded on the left, so that they end together; then those that go on from
        the state of one, number `prefix` [N] of the first stage's, padded on the right. `tokens` are numbers of the
        row's tokens (T: padding); `places` says where in both stages, one after the other, each token of the row is.
        """
        device, total, before = self.cu_q.device, sum(self.lengths), 0
        starts = [0, *np.cumsum(self.lengths).tolist()]
        first = [s for s, prefix in enumerate(self.prefixes) if prefix is None]
        second = [s for s, prefix in enumerate(self.prefixes) if prefix is not None]
        stages, places = [], np.empty(total, np.int64)
        for segments in (first, second) if second else (first,):
            longest = max(2, *(self.lengths[s] for s in segments))  # fla has no gradient for one step
            tokens = np.full((len(segments), longest), total)
            for row, s in zip(tokens, segments):
                here = slice(longest - self.lengths[s], None) if segments is first else slice(self.lengths[s])
                row[here] = np.arange(starts[s], starts[s + 1])
            real = np.flatnonzero(tokens < total)
            places[tokens.flat[real]] = real + before
            before += tokens.size
            prefix = None if segments is first else np.array([first.index(self.prefixes[s]) for s in segments])
            stages.append((to_device(tokens, device), None if prefix is None else to_device(prefix, device)))
        return stages, to_device(places, device)


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, plan=None, kernel="sdpa", **kwargs
):
    """The one attention of packed rows, for the language model (causal, by `plan`) and the tower (full, by chunk).

    query [1, H, T, D], key and value [1, H or fewer, T, D] → ([1, T, H, D], None). The interface is transformers'
    AttentionInterface; kernels: "varlen" (torch.nn.attention.varlen) and "flash_attn" on CUDA, "sdpa" anywhere.
    """
    assert dropout == 0.0, "attention dropout is not supported; Qwen-VL has none"
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave fp32 under autocast
    if not module.is_causal:
        cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        if kernel != "sdpa":
            return _varlen(kernel, query, key, value, cu, cu, longest, longest, False, scaling), None
        return _chunks_sdpa(query, key, value, (cu[1:] - cu[:-1]).tolist(), scaling), None
    if attention_mask is not None:  # completions being decoded: [B, 1, T, K], which key each of their tokens sees
        q = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # heads that share keys side by side: none is copied
        mask = attention_mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)
        output = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scaling)
        return output.reshape(*query.shape).transpose(1, 2), None
    if plan is None:
        raise ValueError("packed attention needs plan=…; to generate or to use padded batches, first call "
                         "model.set_attn_implementation('sdpa')")  # fmt: skip
    if kernel != "sdpa":
        if plan.key_rows is not None:
            key, value = key[:, :, plan.key_rows], value[:, :, plan.key_rows]
        return _varlen(kernel, query, key, value, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, True, scaling), None
    starts, outputs = [0, *np.cumsum(plan.lengths).tolist()], []
    for s, prefix in enumerate(plan.prefixes):
        rows = slice(starts[s], starts[s + 1])
        q, k, v, mask = query[:, :, rows], key[:, :, rows], value[:, :, rows], None
        if prefix is not None:
            before = slice(starts[prefix], starts[prefix + 1])
            k, v = torch.cat([key[:, :, before], k], 2), torch.cat([value[:, :, before], v], 2)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


def _chunks_sdpa(query, key, value, lengths, scaling):
    """Full attention inside consecutive chunks: one batched call for each distinct length, not one per chunk."""
    lengths = torch.tensor(lengths)
    starts = lengths.cumsum(0) - lengths
    output = torch.empty_like(query.transpose(1, 2))  # [1, T, H, D]
    for length in lengths.unique().tolist():
        rows = (starts[lengths == length][:, None] + torch.arange(length)).to(query.device)  # [chunks, length]
        if rows.numel() == query.shape[2]:  # all chunks alike: a view, no gathering
            q, k, v = (x[0].unflatten(1, rows.shape).transpose(0, 1) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1)[None]
        q, k, v = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))  # [chunks, H, length, D]
        output[0, rows] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return output


def _varlen(kernel, query, key, value, cu_q, cu_k, max_q, max_k, causal, scaling):
    """One variable-length kernel call on CUDA: [1, H, T, D] → [1, T, H, D]; causal means aligned to the last key."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    if kernel == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scaling, causal=causal)[None]
    from torch.nn.attention.varlen import varlen_attn

    # A window as long as the longest segment is full attention; (-1, -1) would let torch take cuDNN on Hopper.
    options = {"scale": scaling, "window_size": (-1, 0) if causal else (max_k, max_k)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 does not have it yet
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)[None]


class PatchProjection(torch.nn.Module):
    """The tower's Conv3d, whose kernel is one whole patch, as the matrix product that it is: [P, 3, 2, p, p] → [P, D].

    The weight keeps its name and its shape [D, 3, 2, p, p].
    """

    def __init__(self, convolution: torch.nn.Conv3d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches):
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class RecurrentStates:
    """The state of one recurrent layer, in the place of transformers' cache: gradients flow through it."""

    def __init__(self, conv=None, recurrent=None):
        self.conv, self.recurrent = conv, recurrent

    def get_conv_state(self, layer_idx, state_idx=0):
        return self.conv

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return self.recurrent

    def is_recording_past(self, layer_idx):
        return torch.is_grad_enabled()  # if so, the layer does not write into the state that it goes on from

    def update_conv_state(self, columns, layer_idx, conv_kernel_size):
        """The new inputs of the convolution [B, D, L], after the ones that it still sees."""
        seen = columns if self.conv is None else torch.cat([self.conv, columns], -1)
        self.conv = F.pad(seen, (max(0, conv_kernel_size - seen.shape[-1]), 0))[..., -conv_kernel_size:]
        return seen

    def update_recurrent_state(self, state, layer_idx):
        self.recurrent = state


class PackedRecurrence:
    """Mixed into Qwen3.5's gated delta nets: a packed row in two calls of the layer at most, see AttentionPlan.stages.

    Answers that share a prompt go on from the prompt's state, and their gradients flow back into it. Without a plan,
    completions are being decoded, [P, G, D], each with a state of its own, [P, G, …], in the cache.
    """

    def forward(self, hidden_states, cache=None, attention_mask=None, plan=None, **kwargs):
        held = cache.layers[self.layer_idx] if cache is not None else None
        if plan is None and (held is None or held.conv_states[0] is None or held.conv_states[0].ndim < 4):
            return super().forward(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        if plan is None:
            shape = hidden_states.shape[:2]
            states = RecurrentStates(*(x.flatten(0, 1) for x in (held.conv_states[0], held.recurrent_states[0])))
            output = super().forward(hidden_states.flatten(0, 1)[:, None], cache=states)
            set_recurrent_states(held, *(x.unflatten(0, shape) for x in (states.conv, states.recurrent)))
            return output.view_as(hidden_states)
        padded, outputs, shared = F.pad(hidden_states[0], (0, 0, 0, 1)), [], None  # token T is padding
        stages, places = plan.stages
        for tokens, prefix in stages:
            start = () if prefix is None else (shared.conv[prefix], shared.recurrent[prefix])
            states = RecurrentStates(*start)
            needed = len(stages) > 1 or held is not None
            outputs.append(super().forward(padded[tokens], cache=states if needed else None).flatten(0, 1))
            shared = shared or states
        if held is not None:
            set_recurrent_states(held, shared.conv, shared.recurrent)
        return torch.cat(outputs)[places][None]


def recurrent_layers(text_config) -> int:
    """How many of a language model's layers are recurrent."""
    return (getattr(text_config, "layer_types", None) or []).count("linear_attention")


def set_recurrent_states(layer, conv: torch.Tensor, recurrent: torch.Tensor):
    """Give a recurrent layer of a DynamicCache its states, of any shape."""
    layer.conv_states[0], layer.recurrent_states[0], layer.device = conv, recurrent, conv.device
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True


FLASH_CAPABILITY = (8, 0)  # of the oldest cards (A100) for which there are flash kernels


def attention_kernel(args: TrainingArguments, device) -> str:
    """The kernel that --attn_implementation means on a device; auto: varlen where flash kernels run, else sdpa."""
    if args.attn_implementation != "auto":
        return args.attn_implementation
    half = args.pure_bf16 or autocast_dtype(args) is not None
    on_cuda = torch.device(device).type == "cuda"
    return "varlen" if half and on_cuda and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY else "sdpa"


def use_packed_attention(model, kernel: str):
    """Let every part of a loaded model compute attention by packed_attention with this kernel; see PatchProjection.

    cuDNN's attention is switched off for the process: torch prefers it on Hopper where there is a mask, and it builds
    a plan for each new shape (one per decoded token) and gives NaN gradients for some lengths (docs/gpu.md).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    name = f"flash_packed_{kernel}"  # "flash" must be in it: transformers then hands over lengths and builds no mask
    transformers.AttentionInterface.register(name, functools.partial(packed_attention, kernel=kernel))
    for module in list(model.modules()):
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = name
        if isinstance(getattr(module, "proj", None), torch.nn.Conv3d):
            module.proj = PatchProjection(module.proj)
        if type(module).__name__.endswith("GatedDeltaNet") and not isinstance(module, PackedRecurrence):
            module.__class__ = packed_class(type(module))


@functools.cache
def packed_class(layer_class: type) -> type:
    """The class of a recurrent layer with PackedRecurrence mixed into it."""
    return type(f"Packed{layer_class.__name__}", (PackedRecurrence, layer_class), {})


def normalize_patches(patches: torch.Tensor, image_mean, image_std) -> torch.Tensor:
    """uint8 [P, 3·2·patch²] → float32, (x − 255·mean) / (255·std) per colour channel, as the HF processors fuse it."""
    mean, std = (to_device(np.array(values, np.float32), patches.device)[:, None] * 255
                 for values in (image_mean, image_std))  # fmt: skip
    return patches.unflatten(1, (3, -1)).float().sub_(mean).div_(std).flatten(1)  # in place: it is large


@functools.lru_cache(4096)
def _clip_in_tower(grid, merge_size, patch_size, window_size, side):
    """Of one clip: positions of its patches; their order by windows (of merged tokens) and the windows' ends; which
    learned positions, on a square of this side, they mix, and how much of each."""
    from transformers import vision_utils

    grid = torch.tensor([grid])
    parts = {"position_ids": vision_utils.get_vision_position_ids(grid, merge_size)}
    if window_size:
        order, ends = vision_utils.get_vision_window_index(grid, merge_size, window_size, patch_size)
        parts |= {"window_index": order, "window_ends": ends[1:]}
    if side:
        parts["interp_indices"], parts["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, side, align_corners=True, spatial_merge_size=merge_size
        )
    return {name: part.numpy() for name, part in parts.items()}


def tower_inputs(grids: np.ndarray, encoder: Encoder, device) -> dict:
    """What the tower computes from its grids [N, 3] in a loop over clips, on the device: here once for each grid.

    Keywords of the model's forward, which transformers hands on to the tower: see its vision_utils.
    """
    vision = encoder.config.vision_config
    window_size = getattr(vision, "window_size", None)  # Qwen2.5-VL's
    side = math.isqrt(getattr(vision, "num_position_embeddings", None) or 0)  # from Qwen3-VL on
    clips = [_clip_in_tower(tuple(grid), encoder.merge_size, encoder.patch_size, window_size, side)
             for grid in grids.tolist()]  # fmt: skip
    patches = grids.prod(1)
    starts = patches.cumsum() - patches

    def cumulative(name, ends):
        bounds = np.concatenate([[0], ends]).astype(np.int32)
        return {f"cu_{name}s": bounds, f"max_{name}": int(np.diff(bounds).max())}

    names = ["position_ids"] + (["interp_indices", "interp_weights"] if side else [])
    inputs = {name: np.concatenate([clip[name] for clip in clips]) for name in names}
    inputs |= cumulative("seqlen", np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0]).cumsum())  # attention by frame
    if window_size:
        merged = starts // encoder.merge_size**2
        inputs["window_index"] = np.concatenate([clip["window_index"] + start for clip, start in zip(clips, merged)])
        ends = np.concatenate([clip["window_ends"] + start for clip, start in zip(clips, starts)])
        inputs |= cumulative("window_seqlen", ends)
    return {f"video_{name}": to_device(value, device)
            if isinstance(value, np.ndarray) else value for name, value in inputs.items()}  # fmt: skip


def pack(samples: list[dict], encoder: Encoder, device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Pack encoded samples without padding into one row: `(model inputs, targets, sequences)`.

    Inputs: `input_ids` [1, T], `position_ids` [4, 1, T], `plan`, `pixel_values_videos` [P, 1176], `video_grid_thw`
    [N, 3] and what tower_inputs has of it, `logits_to_keep` [S], `use_cache` False. Targets: int64 [S], the token that
    each kept position predicts. Sequences: int64 [S], which sequence of the row a target belongs to: a sample is one,
    or has one per answer that shares its prompt. A row without vision gets one video token as its own segment (grid
    1×2×2, zero patches, no target), so that the tower takes part in every forward on every rank.
    """
    samples = [sample for sample in samples if "input_ids" in sample]
    if not any(len(sample["video_grid_thw"]) for sample in samples):
        merge = encoder.merge_size
        dummy = {
            "input_ids": np.array([encoder.config.video_token_id]),
            "labels": np.array([-100]),
            "position_ids": np.zeros((4, 1), np.int64),
            "lengths": np.array([1]),
            "video_grid_thw": np.array([[1, merge, merge]]),
            "patches": None,
        }
        samples = [*samples, dummy]

    def together(name, axis=0):
        return to_device(np.concatenate([sample[name] for sample in samples], axis), device)

    if samples[-1]["patches"] is None:
        pixels = torch.zeros(encoder.merge_size**2, encoder.patch_dim, device=device)
    else:
        pixels = normalize_patches(together("patches"), encoder.image_mean, encoder.image_std)
    lengths, prefixes, kept, targets, sequences = [], [], [], [], []
    tokens = count = 0  # of the row so far
    for sample in samples:
        parts, labels = sample["lengths"].tolist(), sample["labels"]
        prefixes += [None] + [len(lengths)] * (len(parts) - 1)
        lengths += parts
        supervised = np.flatnonzero(labels != -100)
        predictor = np.arange(len(labels)) - 1  # each token is predicted where the one before it stands
        predictor[np.cumsum(parts)[:-1]] = parts[0] - 1  # an answer's first where its prompt ends
        assert not len(supervised) or supervised[0] > 0, "a sequence's first token has nothing to be predicted from"
        kept.append(tokens + predictor[supervised])
        targets.append(labels[supervised])
        sequences.append(count + np.repeat(np.arange(len(parts)), parts)[supervised] - (len(parts) > 1))
        tokens, count = tokens + len(labels), count + max(1, len(parts) - 1)
    kept, targets, sequences = (to_device(np.concatenate(values), device) for values in (kept, targets, sequences))
    grids = np.concatenate([sample["video_grid_thw"] for sample in samples])
    row = {
        "input_ids": together("input_ids")[None],
        "position_ids": together("position_ids", 1)[:, None],
        "plan": AttentionPlan.make(lengths, prefixes, device),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.from_numpy(grids),  # on the CPU, where the model reads its numbers
        **tower_inputs(grids, encoder, device),
        "logits_to_keep": kept,
        "use_cache": False,
    }
    return row, targets, sequences


LOGPS_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of fp32 logits that token_logps works on at a time


class _TokenLogps(torch.autograd.Function):
    """token_logps with nothing of size S × V beside the logits and, in the backward pass, their gradient."""

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        most = LOGPS_BYTES["cpu" if logits.device.type == "cpu" else "cuda"]
        ctx.rows, ctx.temperature = max(1, most // (4 * logits.shape[1])), temperature
        logps, normalizers = torch.empty(2, len(targets), device=logits.device)
        for rows in _slices(len(targets), ctx.rows):
            scaled = logits[rows].float() / temperature
            normalizers[rows] = scaled.logsumexp(1)
            logps[rows] = scaled.gather(1, targets[rows, None])[:, 0] - normalizers[rows]
        ctx.save_for_backward(logits, targets, normalizers)
        return logps

    @staticmethod
    def backward(ctx, gradient):
        logits, targets, normalizers = ctx.saved_tensors
        output, gradient = torch.empty_like(logits), gradient / ctx.temperature
        for rows in _slices(len(targets), ctx.rows):  # gradient × (1 at the target − probabilities)
            part, g = output[rows], gradient[rows, None]
            values = part if part.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
            values.copy_(logits[rows]).div_(ctx.temperature)
            values.sub_(normalizers[rows, None]).exp_().mul_(-g).scatter_add_(1, targets[rows, None], g)
            if values is not part:
                part.copy_(values)
        return output, None, None


def _slices(length, size):
    return [slice(start, start + size) for start in range(0, length, size)]


def token_logps(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each target, logits divided by `temperature`: logits [1, S, V], targets [S] → float32 [S]."""
    return _TokenLogps.apply(logits[0], targets, temperature)


# ----------------------------------------------------------------------------------------------- 6. loading the model


def launched_with(name: str) -> bool:
    """Whether accelerate launch runs this process under "deepspeed" or "fsdp"."""
    return os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """Type of the products under autocast, None without it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def load_model(args: TrainingArguments, device, path: str | None = None, model_class=None, config=None):
    """Load the model to train, freeze what the flags say, and set types and attention.

    Trainable parameters are fp32 (under autocast too: at a learning rate of 2e-6 a bf16 weight of 0.02 does not move),
    frozen ones have the autocast type; --pure_bf16 makes all bf16. Under DeepSpeed and FSDP2 all have
    one type. `path`: a checkpoint that replaces --model_id, or with --lora_enable an adapter that goes on top of it.
    `model_class`: AutoModelForImageTextToText, or a class with a head of its own (`score`, and `init_head` for its
    first weights), which brings its `config` along.

    Raises:
        ValueError: unsupported family, or weights that the checkpoint lacks.
    """
    if path and (Path(path) / "adapter_config.json").is_file() != args.lora_enable:
        raise InputError(f"{path} was written {'without' if args.lora_enable else 'with'} --lora_enable True: "
                         "go on as it began, or start in another --output_dir")  # fmt: skip
    source = path if path and not args.lora_enable else args.model_id
    for flag in ("model_id", "lora_weight_path"):
        warn_of_old_positions(flag, getattr(args, flag))
    config = config or load_config(source, args)
    if getattr(config.get_text_config(), "use_sliding_window", False):
        raise InputError(f"--model_id {args.model_id}: sliding-window attention is not supported; set "
                         "use_sliding_window to false in its config.json")  # fmt: skip
    # DeepSpeed and FSDP2 split parameters of one type; DeepSpeed keeps the fp32 masters of low ones.
    low = torch.bfloat16 if args.pure_bf16 else autocast_dtype(args)
    split = launched_with("deepspeed") or launched_with("fsdp")
    dtype = torch.float32 if split or source == path else "auto"
    if low is not None and (launched_with("deepspeed") or (split and args.pure_bf16)):
        dtype = low
    model, info = (model_class or transformers.AutoModelForImageTextToText).from_pretrained(
        source, config=config, cache_dir=args.cache_dir, dtype=dtype, attn_implementation="sdpa",
        output_loading_info=True, **quantization(args, low, device),
    )  # fmt: skip
    head = {name for name, _ in model.named_parameters() if part_of(name) == "head"}
    fresh_head = bool(head) and source == args.model_id and set(info["missing_keys"]) == head
    if missing := set() if fresh_head else info["missing_keys"]:
        raise InputError(f"{source} lacks {len(missing)} weights, first {sorted(missing)[0]!r}: "
                         "the files are not of this model")  # fmt: skip
    if launched_with("deepspeed"):  # ZeRO-3 loading keeps renaming rules that matched nothing: saving would apply them
        model._weight_conversions = [rule for rule in model._weight_conversions or [] if rule.was_used()]
    quantized = {part_of(name) for name, weight in model.named_parameters() if not weight.is_floating_point()}
    assert quantized == ({"llm"} if args.bits < 16 else set()), f"quantised parts: {quantized}"
    for module in model.modules():  # in eval() bitsandbytes repacks 4-bit weights for a CPU kernel without gradients
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

    # Mapped from a file, weights lie unaligned, which changes products in the last bit: a resumed run would differ.
    copied = torch.device(device).type == "cpu"

    def set_types(trained):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            full = low is None or (name in trained and not args.pure_bf16)
            if split:
                parameter.data = parameter.data.to(dtype)
            elif parameter.is_floating_point():  # quantised weights are integers, and on the device
                parameter.data = parameter.data.to(device, torch.float32 if full else low, copy=copied)

    set_types(trained := choose_trained(model, args))
    if fresh_head:
        model.init_head(args)
    if args.lora_enable:
        tokenizer = load_processor(args.model_id, args.cache_dir).tokenizer
        model = add_adapter(model, trained, args, new_tokens(tokenizer, model.config.model_type))
        set_types({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        if path or args.lora_weight_path:
            load_adapter(model, args, path)
    if not split:
        model.to(device)
    use_packed_attention(model, attention_kernel(args, device))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # which it switched on: frozen parts would get gradients for nothing
    if args.torch_compile:
        compile_blocks(model)
    return model


COMPILE = {"dynamic": True, "backend": "inductor"}  # dynamic: rows differ in length


def compile_blocks(model):
    """Compile the forward of each decoder layer and tower block in place: modules and names stay as they are."""
    import torch._dynamo
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch._dynamo.config.recompile_limit = 64  # all blocks of a kind share one cache
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(**COMPILE)
        if isinstance(module, PackedRecurrence):  # transformers' own gated delta rule is not one that compiles
            module.forward = torch.compiler.disable(module.forward)


def quantization(args: TrainingArguments, low: torch.dtype | None, device) -> dict:
    """What from_pretrained needs for --bits 8 and 4: language layers are quantised, tower, merger and head are not."""
    if args.bits == 16:
        return {}
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning per 8-bit product
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=args.bits == 8, load_in_4bit=args.bits == 4,
        llm_int8_skip_modules=["model.visual", "lm_head", "score"],
        bnb_4bit_compute_dtype=low or torch.float32, bnb_4bit_quant_type=args.quant_type,
        bnb_4bit_use_double_quant=args.double_quant,
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def add_adapter(model, trained: set[str], args: TrainingArguments, tokens: dict[str, int] | None = None):
    """Put LoRA on a model, as a PeftModel: only the adapters and the parameters named in `trained` can be trained.

    The latter go into peft's modules_to_save, whole modules at a time: peft keeps their frozen originals beside them,
    so that the model without its adapter stays at hand. Rows of new `tokens` are trained too, see new_token_rows.

    Raises:
        ValueError: no module is left to adapt, or the choice cannot be merged.
    """
    import peft

    whole = []  # the fewest modules that hold the trained parameters and nothing else; a list has no forward()
    for name, module in model.named_modules():
        inside = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        listed = isinstance(module, torch.nn.ModuleList)
        if inside and inside <= trained and not listed and not f"{name}.".startswith(tuple(f"{w}." for w in whole)):
            whole.append(name)
    if args.lora_weight_path:
        config, targets = read_adapter(args.lora_weight_path)[0], None
        config.base_model_name_or_path, config.inference_mode = None, False
        config.lora_dropout, config.modules_to_save = args.lora_dropout, whole
    else:
        excluded = _listed(args.lora_namespan_exclude) + ([] if args.vision_lora else ["visual"])
        targets = [name for name, module in model.named_modules()  # by class: the tower's Conv3d breaks ZeRO-3
                   if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
                   and not any(word in name for word in excluded)
                   and not f"{name}.".startswith(tuple(f"{w}." for w in whole))]  # fmt: skip
        targets = targets[-args.num_lora_modules :] if args.num_lora_modules > 0 else targets
        if not targets:
            raise InputError(f"--lora_namespan_exclude {args.lora_namespan_exclude} leaves no module to adapt")
        config = peft.LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias=args.lora_bias,
            use_dora=args.use_dora, target_modules=targets, modules_to_save=whole,
        )  # fmt: skip
    config.trainable_token_indices = new_token_rows(model, config, args, tokens or {})
    output = model.get_output_embeddings()  # a classifier has none
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    model = peft.get_peft_model(model, config)
    for wrapper in model.modules():
        if isinstance(wrapper, peft.utils.ModulesToSaveWrapper):  # peft copied the configs as well: keep one for all
            for original, copy in zip(wrapper.original_module.modules(), wrapper.modules_to_save["default"].modules()):
                if hasattr(original, "config"):
                    copy.config = original.config
        elif hasattr(wrapper, "cast_input_dtype_enabled") and not config.use_dora:
            wrapper.cast_input_dtype_enabled = False  # to fp32, for autocast to cast it back; DoRA's norms need it
    assert targets is None or sorted(model.targeted_module_names) == sorted(targets), "peft matched other modules"
    if tied and any(name.endswith(("lm_head", "embed_tokens")) for name in model.targeted_module_names):
        raise InputError(f"{args.model_id} has one matrix as embeddings and head; adapters on it could not be merged: "
                         "give --lora_namespan_exclude \"['lm_head', 'embed_tokens']\"")  # fmt: skip
    local = Path(args.model_id)
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else args.model_id
    return model


def new_tokens(tokenizer, model_type: str) -> dict[str, int]:
    """The tokens, with their ids, that the user has added to those of a family."""
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    return {token: i for token, i in added if token not in FAMILY_TOKENS[model_type]}


def new_token_rows(model, config, args: TrainingArguments, tokens: dict[str, int]) -> dict[str, list[int]] | None:
    """peft's `trainable_token_indices` of a LoRA run: rows of embeddings and head, where these have no adapter.

    ZeRO-3 and FSDP2 split the matrices, so that no row can be trained alone: see describe_new_tokens.

    Raises:
        InputError: a token without a row, or an adapter to go on from that has other rows.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if missing := {token: i for token, i in tokens.items() if i >= embeddings.num_embeddings}:
        raise InputError(f"--model_id {args.model_id}: {len(missing)} new tokens of its tokenizer, first "
                         f"{next(iter(missing))!r}, have no row in its {embeddings.num_embeddings} embeddings: call "
                         "model.resize_token_embeddings and save it again")  # fmt: skip
    tied = output is not None and output.weight is embeddings.weight  # peft then trains one row for both
    modules = {"embed_tokens": embeddings} | ({} if output is None or tied else {"lm_head": output})
    names = {id(module): name for name, module in model.named_modules()}
    alone = [key for key, module in modules.items() if not check_target_module_exists(config, names[id(module)])]
    split = launched_with("fsdp") or transformers.integrations.is_deepspeed_zero3_enabled()
    rows = {key: list(tokens.values()) for key in alone} if tokens and not split else {}
    held = config.trainable_token_indices or {}
    held = held if isinstance(held, dict) else {"embed_tokens": list(held)}
    if held and held != rows:
        raise InputError(f"--lora_weight_path {args.lora_weight_path} has rows of new tokens, {held}; this run would "
                         f"train {rows or 'none'}: merge it (tools/merge_lora.py) and go on from that")  # fmt: skip
    return rows or None


def describe_new_tokens(model, encoder) -> str:
    """For the banner, where a tokenizer has new tokens: how their rows are trained, seen from the model itself."""
    tokens = new_tokens(encoder.tokenizer, encoder.config.model_type)
    if not tokens:
        return ""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    ways = {}
    for key, module in (("embeddings", plain.get_input_embeddings()), ("head", plain.get_output_embeddings())):
        trained = {name for name, p in module.named_parameters() if p.requires_grad} if module is not None else None
        if trained is None:  # a classifier has no head for tokens
            continue
        if any("trainable_tokens" in name for name in trained):
            ways[key] = "their rows are trained beside the adapter"
        elif any("lora_" in name for name in trained):
            ways[key] = "covered by the module's adapter"
        else:
            ways[key] = "trained like all rows" if trained else "NOT trained"
    first = ", ".join(list(tokens)[:3]) + (", …" if len(tokens) > 3 else "")
    line = f"\n  new tokens {len(tokens)} ({first}): " + "; ".join(f"{key}: {way}" for key, way in ways.items())
    if "NOT trained" in ways.values() and hasattr(model, "peft_config"):
        line += " (ZeRO-3 and FSDP2 split them): launch with ddp.yaml or zero2.yaml"
    elif "NOT trained" in ways.values():
        line += ": drop --freeze_llm, or train an adapter (--lora_enable True)"
    return line


def current_name(name: str) -> str:
    """A module's name, or a pattern of names, since transformers 4.52: tower and language model moved into `model`."""
    name = re.sub(r"^(\^?)visual(?=\W|$)", r"\1model.visual", name)
    return re.sub(r"^(\^?)model(?=\W|$)(?!\\?\.(language_model|visual)\b)", r"\1model.language_model", name)


def read_adapter(folder: str | Path):
    """`(config, weights)` of an adapter, its modules named as they are since transformers 4.52.

    peft 0.21 does not rename them: it would leave such weights out with a warning, or find no module to adapt.
    """
    import peft

    config, found = peft.PeftConfig.from_pretrained(folder), peft.load_peft_weights(folder, device="cpu")
    prefix = "base_model.model."
    weights = {prefix + current_name(name.removeprefix(prefix)): value for name, value in found.items()}
    if weights.keys() != found.keys():
        # a regex cannot be renamed: the modules are those that have weights
        config.target_modules = {name.removeprefix(prefix).split(".lora_")[0] for name in weights if ".lora_" in name}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.modules_to_save = [current_name(name) for name in config.modules_to_save or []]
        for field_name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(config, field_name) or {}
            setattr(config, field_name, {current_name(name): value for name, value in pattern.items()})
        if isinstance(config.trainable_token_indices, dict):
            tokens = {current_name(name): value for name, value in config.trainable_token_indices.items()}
            config.trainable_token_indices = tokens
    return config, weights


def put_adapter(model, folder: str | Path):
    """Put a stored adapter on its base model, to be used, not trained: `(PeftModel, weights of the file)`.

    Raises:
        InputError: a tensor of the file has no place in the model, another shape there, or is missing.
    """
    import peft

    config, weights = read_adapter(folder)
    config.inference_mode = True
    model = peft.get_peft_model(model, config).eval()
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    again = (".original_module.", ".modules_to_save.")  # stored a second time where biases are trained
    wanted = {name: value for name, value in wanted.items() if not any(word in name for word in again)}
    wrong = [f"{name} has shape {list(weights[name].shape)} there, {list(wanted[name].shape)} here"
             for name in weights.keys() & wanted.keys() if weights[name].shape != wanted[name].shape]  # fmt: skip
    wrong += [f"{name} is not there" for name in wanted.keys() - weights.keys()]
    if not wrong:  # what plain peft stores besides, such as whole embeddings, only loading can tell
        found = peft.set_peft_model_state_dict(model, weights)
        wrong = [f"{name} has no place here" for name in found.unexpected_keys]
    if wrong:
        raise InputError(f"{folder} is not an adapter of this model, {len(wrong)} tensors do not fit: "
                         + "; ".join(sorted(wrong)[:5]) + ". Give the base model that it was trained on")  # fmt: skip
    return model, weights


def load_adapter(model, args: TrainingArguments, path: str | None):
    """Read the weights of checkpoint `path` or else of --lora_weight_path into add_adapter's model, unrounded.

    What --lora_weight_path lacks of tower and merger starts from the base model's.

    Raises:
        ValueError: its rank, alpha, kind or modules are not those of this run.
    """
    import peft

    folder = path or args.lora_weight_path
    held, weights = read_adapter(folder)
    ours = model.peft_config["default"]
    differ = [f"{key} {getattr(held, key)} there, {getattr(ours, key)} here" for key in ADAPTER_SHAPE.values()
              if getattr(held, key) != getattr(ours, key)]  # fmt: skip
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    lacking = sorted(name for name in wanted.keys() - weights.keys() if path or ".lora_" in name)
    unused = sorted(weights.keys() - wanted.keys())
    differ += [f"{len(lacking)} tensors are not there, first {lacking[0]}"] if lacking else []
    differ += [f"{len(unused)} tensors have no place here, first {unused[0]}"] if unused else []
    if differ:
        raise InputError(f"{folder} is not an adapter of this run: " + "; ".join(differ)
                         + ". Give the flags that it was trained with")  # fmt: skip
    peft.set_peft_model_state_dict(model, {**wanted, **weights})


def adapter_off_is_start(args: TrainingArguments) -> bool:
    """Whether the trained model without its adapter is the one before training.

    Switched off, an adapter leaves what it was put on: not another adapter, and not biases as they were.
    """
    return args.lora_enable and not args.lora_weight_path and args.lora_bias == "none"


def part_of(name: str) -> str:
    """The part of a model that a parameter is in: "vision", "merger", "llm" (with lm_head), a classifier's "head"."""
    if "score" in name.split("."):
        return "head"
    if "visual." not in name:
        return "llm"
    return "merger" if "merger" in name else "vision"  # Qwen3-VL's deepstack_merger_list, too


def choose_trained(model, args: TrainingArguments) -> set[str]:
    """Names of the parameters that the freezing flags leave trainable.

    Raises:
        ValueError: nothing is left, or fewer blocks or layers exist than --unfreeze_topk_* asks for.
    """
    frozen = {"vision": args.freeze_vision_tower, "merger": args.freeze_merger, "llm": args.freeze_llm, "head": False}
    trained = {name for name, _ in model.named_parameters() if not frozen[part_of(name)]}
    base = model.model
    for flag, blocks in (
        ("unfreeze_topk_llm", base.language_model.layers),
        ("unfreeze_topk_vision", base.visual.blocks),
    ):
        count = getattr(args, flag)
        if count > len(blocks):
            raise InputError(f"--{flag} {count}: the model has only {len(blocks)}")
        chosen = {id(p) for block in list(blocks)[len(blocks) - count :] for p in block.parameters()}
        trained |= {name for name, p in model.named_parameters() if id(p) in chosen}
    if not trained and not args.lora_enable:
        raise InputError("the freezing flags leave nothing to train: drop one of them")
    return trained


def make_optimizer(model, args: TrainingArguments, device="cpu"):
    """The --optim optimizer: one group per part of the model and decay, each with its peak rate as `peak_lr`.

    Biases and norm weights do not decay. `device` is where the steps are made; on CUDA AdamW is fused: one kernel and
    no temporary copies of the weights.
    """
    rates = {"llm": args.learning_rate, "vision": args.vision_lr, "merger": args.merger_lr,
             "head": getattr(args, "head_lr", None)}  # fmt: skip
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and args.weight_decay > 0
            groups.setdefault((part_of(name), decays), []).append(parameter)
    groups = [
        {"params": params, "weight_decay": args.weight_decay if decays else 0.0, "lr": rate, "peak_lr": rate}
        for (part, decays), params in groups.items()
        for rate in [rates[part] if rates[part] is not None else args.learning_rate]
    ]
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim in ("adamw_torch", "adamw_torch_fused"):
        fused = args.optim == "adamw_torch_fused" or torch.device(device).type == "cuda"
        return torch.optim.AdamW(groups, **adam, fused=fused)
    if args.optim == "sgd":
        return torch.optim.SGD(groups)
    if args.optim == "adafactor":
        return transformers.Adafactor(groups, scale_parameter=False, relative_step=False)
    import bitsandbytes

    if args.optim == "paged_adamw_32bit":
        return bitsandbytes.optim.PagedAdamW32bit(groups, **adam)
    return (bitsandbytes.optim.PagedAdamW8bit if "paged" in args.optim else bitsandbytes.optim.AdamW8bit)(
        groups, **adam
    )


def lr_factor(step: int, total_steps: int, args: TrainingArguments) -> float:
    """Share of the peak learning rate in optimizer step `step` (from 0): a closed form of transformers' schedules."""
    warmup = args.warmup_steps or math.ceil(total_steps * args.warmup_ratio)
    if step < warmup and args.lr_scheduler_type != "constant":
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if args.lr_scheduler_type == "linear":
        return max(0.0, 1 - progress)
    if args.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


# ------------------------------------------------------------------------------------------------------ 7. processes


# NCCL's default of 10 minutes is less than a slow save, the first conversion of records or a reward function may take.
# When a process dies, the launcher ends the others at once.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
PROBE_SECONDS = 10  # in which a network file system shows a new file to all nodes
BUILD_SECONDS = 900  # more than it takes to compile one of DeepSpeed's extensions


def remove_dead_locks(root: str | None = None):
    """Remove what a process that was killed while it compiled left behind: later ones would wait for it forever.

    torch's lock for DeepSpeed's extensions was a file without an owner; one as old as BUILD_SECONDS is a dead one's.
    Where it is the system's lock, as in torch 2.14, it ends with its process, and the file means nothing.
    """
    from torch.utils import cpp_extension  # here: it warns where there is no GPU

    if hasattr(cpp_extension, "FileLock"):
        return
    root = root or os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in [*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")]:
        with contextlib.suppress(FileNotFoundError):  # just released, or removed by another process
            if lock.stat().st_mtime < time.time() - BUILD_SECONDS:
                lock.unlink()
                say(f"removed {lock}: it was left behind when a compilation was killed")


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """The Accelerator of a run: one process, DDP, DeepSpeed or FSDP2, on CUDA, or with gloo on CPUs.

    Precision and accumulation are the script's, not the launcher's; what DeepSpeed must know of them it is told here.
    """
    no_cuda, use_deepspeed = not torch.cuda.is_available(), launched_with("deepspeed")
    if no_cuda:  # more threads than cores that the decoding processes leave wait for each other
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - args.dataloader_num_workers)))
    elif not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):  # rows differ in length: fixed segments leave gaps unused
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if use_deepspeed:
        remove_dead_locks()
    backend = "gloo" if no_cuda and use_deepspeed else None  # None: accelerate's choice
    accelerator = Accelerator(
        cpu=no_cuda and not use_deepspeed,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else DDP holds every gradient twice
        ],
        log_with=[name for name in args.report_to if name != "none"] or None,
        project_dir=args.output_dir,
    )
    if launched_with("fsdp") and not accelerator.is_fsdp2:
        raise InputError("FSDP needs GPUs and fsdp_version 2: take accelerate_configs/fsdp2.yaml, or ddp.yaml on CPUs")
    if accelerator.is_fsdp2 and (low := autocast_dtype(args)):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Gathered in the low type: autocast would cast gathered fp32 weights, and the graph keep all of these copies.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if use_deepspeed:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config.update(
            train_micro_batch_size_per_gpu=1,  # no DataLoader tells it; the loss carries the true weights
            gradient_accumulation_steps=1,
            gradient_clipping=args.max_grad_norm,
            zero_force_ds_cpu_optimizer=not no_cuda and args.optim == "adamw_torch",
            bf16={"enabled": args.bf16 or args.pure_bf16},
            fp16={"enabled": args.fp16},
            # In bf16 a row's gradient that is small beside the sum of the rows before it would be lost.
            data_types={"grad_accum_dtype": "fp32" if args.bf16 or args.pure_bf16 else None},
        )
        accelerator.state.deepspeed_plugin.set_deepspeed_weakref()  # else ZeRO-3 loads fp32 shards under --bf16
    return accelerator


def make_output_dir(accelerator: Accelerator, args: TrainingArguments) -> Path:
    """The --output_dir, made if need be: one folder for all processes; every process must call it.

    Raises:
        InputError: a node has a folder of its own, whose part of a checkpoint would be lost.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.num_processes == 1:
        return folder
    probe = folder / f".probe-{gather_object([uuid.uuid4().hex])[0]}"
    with all_or_none(accelerator, f"--output_dir {folder} cannot be written to"):
        if accelerator.is_main_process:
            probe.touch()
    deadline = time.monotonic() + PROBE_SECONDS
    while not (found := probe.name in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.5)
    places = gather_object([(found, socket.gethostname())])
    if accelerator.is_main_process:
        probe.unlink()
    if lost := [f"process {i} on {host}" for i, (found, host) in enumerate(places) if not found]:
        listed = ", ".join(lost[:8]) + (", …" if lost[8:] else "")
        stop_all(accelerator, f"--output_dir {folder} is not one folder for all processes: a file that process 0 on "
                 f"{places[0][1]} wrote there is not seen by {listed}, whose parts of checkpoints would be lost. "
                 "Name a folder on a file system that all nodes share")  # fmt: skip
    return folder


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 2


def catch_signals() -> list[int]:
    """From now on the first stop signal only joins the returned list; a second one ends the process at once.

    Launchers pass on a signal that the process may have had already: what comes within ECHO_SECONDS is no second one.
    A thread sees to the second: Python runs no handler while the main thread waits for other processes.
    """
    caught, (reader, writer) = [], os.pipe()
    os.set_blocking(writer, False)

    def watch():
        first = None
        while True:
            (number,) = os.read(reader, 1)
            if number in STOP_SIGNALS:
                if first and time.monotonic() > first + ECHO_SECONDS:
                    os._exit(128 + number)
                first = first or time.monotonic()

    threading.Thread(target=watch, daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    signal.set_wakeup_fd(writer)
    return caught


def stop_asked(accelerator: Accelerator, caught: list[int]) -> bool:
    """Whether any process has caught a stop signal; every process must ask."""
    return bool(accelerator.gather(torch.tensor([len(caught)], device=accelerator.device)).any())


def exchange(accelerator: Accelerator, state: dict, window: list[int], counts: dict, caught: list[int]):
    """The one small exchange of a step: `(counts summed over all processes, was any asked to stop)`.

    Raises:
        InputError: the processes are not at the same step, records or number of bad steps.
    """
    own = [state["step"], zlib.crc32(json.dumps(window).encode()), state["bad_steps"], len(caught), *counts.values()]
    rows = accelerator.gather(to_device(np.array([own], np.float64), accelerator.device)).cpu().long()
    if (rows[:, :3] != rows[0, :3]).any():
        places = [f"process {i}: after step {step}, records {crc:08x}, {bad} bad steps in a row"
                  for i, (step, crc, bad) in enumerate(rows[:, :3].tolist())]  # fmt: skip
        stop_all(accelerator, "the processes disagree on where they are:\n  • " + "\n  • ".join(places)
                 + "\nResume from the newest checkpoint")  # fmt: skip
    return dict(zip(counts, rows[:, 4:].sum(0).tolist())), bool(rows[:, 3].any())


def stop_all(accelerator: Accelerator, message: str):
    """End every process (each must call it) with one message, the main one's."""
    if accelerator.is_main_process:
        raise InputError(message)
    raise SystemExit(1)


@contextlib.contextmanager
def all_or_none(accelerator: Accelerator, doing: str):
    """Around writing: if it fails on one process, all of them stop, with that process's one message.

    Raises:
        InputError: on the first process that failed; SystemExit on the others.
    """
    problem = None
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have their own for a full disk
        problem = error
    failed = accelerator.gather(torch.tensor([problem is not None], device=accelerator.device)).tolist()
    if any(failed):
        if accelerator.process_index != failed.index(True):
            raise SystemExit(1)
        if isinstance(problem, AssertionError):
            raise problem
        raise InputError(f"{doing}: {problem}; {INTACT}") from None


def prepare_frozen(accelerator: Accelerator, model):
    """A model that is not trained, on the device: split by ZeRO-3 and FSDP2, otherwise whole on every process."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3:
        import deepspeed

        config = copy.deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
        for name in ("train_batch_size", "optimizer", "scheduler"):
            config.pop(name, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        return deepspeed.initialize(model=model, config=config)[0]
    return model.to(accelerator.device)


class Engine:
    """The model with its optimizer, prepared: the same few calls for one process, DDP, DeepSpeed and FSDP2.

    A step is: for each row `with engine.row(last)`: forward under `engine.autocast()`, `engine.backward(loss)`; then
    `engine.step()`. Gradients are averaged over processes, so losses are scaled by `world_size / window_tokens`.
    A `frozen` model is only asked (model, raw_model, autocast): a reference, split under ZeRO-3 and FSDP2 as well.
    """

    def __init__(self, accelerator: Accelerator, model, args: TrainingArguments, frozen: bool = False):
        self.accelerator, self.raw_model, self.args, self.frozen = accelerator, model, args, frozen
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.zero_stage = accelerator.state.deepspeed_plugin.zero_stage if self.deepspeed else None
        if frozen:
            self.model = prepare_frozen(accelerator, model.requires_grad_(False).eval())
            return
        optimizer = make_optimizer(model, args, accelerator.device)
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self.model, prepared = accelerator.prepare(model, optimizer)
        self.optimizer = self.model.optimizer if self.deepspeed else prepared.optimizer
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=args.fp16 and not self.deepspeed)
        if self.deepspeed:
            self.optimizer.check_grad_overflow = True  # else ZeRO-1 and -2 in fp32 step on a NaN gradient

    def autocast(self):
        """Context of the forward pass; DeepSpeed holds the weights in the low type itself and keeps fp32 masters."""
        dtype = None if self.deepspeed else autocast_dtype(self.args)
        return torch.autocast(self.accelerator.device.type, dtype) if dtype else contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self):
        """While it lasts, every process has all weights in `raw_model`, whose forward waits for no other process."""
        if self.deepspeed and self.model.zero_optimization_partition_weights():
            import deepspeed

            offload = self.model.optimizer.parameter_offload
            with deepspeed.zero.unwrap_model_for_generation(self.model):
                offload.fwd_pre_hook.remove()  # which it leaves in place: now and then it waits for all processes
                yield
            reset = lambda *_: offload.get_param_coordinator().reset_step()
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(reset, prepend=True)
        elif self.accelerator.is_fsdp2:
            from torch.distributed.fsdp import FSDPModule

            blocks = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
            groups, meshes = [], []  # of parameters, and what set_reshard_after_forward sets of each
            for block in blocks:
                state = block._get_fsdp_state()
                root_keeps = block is self.model and state._auto_reshard_after_forward  # set in the first forward
                groups += state._fsdp_param_groups
                meshes += [None if root_keeps else group.post_forward_mesh_info for group in state._fsdp_param_groups]
            for block in blocks:
                block.set_reshard_after_forward(False, recurse=False)
                block.unshard()
            yield
            for block in blocks:
                block.reshard()
            for group, mesh in zip(groups, meshes):
                group.post_forward_mesh_info = mesh
        else:
            yield

    @contextlib.contextmanager
    def row(self, last: bool):
        """Around forward and backward of one row: processes exchange gradients in the last one of a step only."""
        if self.deepspeed:
            self.model.set_gradient_accumulation_boundary(last)
        with contextlib.nullcontext() if last or self.deepspeed else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor):
        """Add this row's gradient."""
        if self.deepspeed:
            self.model.backward(loss, scale_wrt_gas=False)
        else:
            self.scaler.scale(loss).backward()

    def set_learning_rate(self, factor: float):
        """Every group's learning rate becomes this share of its peak."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates):
            group["lr"] = peak * factor

    def step(self) -> tuple[float, bool]:
        """Clip and update: `(gradient norm before clipping, did fp16 overflow)`.

        With a norm that is not finite nothing is updated, on any process.
        """
        if self.deepspeed:
            self.model.step()
            norm = float(self.model.get_global_grad_norm())
            return norm, self.args.fp16 and not math.isfinite(norm)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
        if self.args.fp16:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, self.args.fp16 and not math.isfinite(norm)

    def optimizer_state(self) -> dict[str, dict]:
        """The optimizer's state by parameter name, whole, on the main process; {} on others, which must call it, too.

        Not for DeepSpeed's shards.
        """
        if self.accelerator.is_fsdp2:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_optimizer_state_dict(self.model, self.optimizer, options=options).get("state", {})
        if not self.accelerator.is_main_process:  # under DDP it has the same, which need not be copied to the host
            return {}
        return {self.names[i]: values for i, values in self.optimizer.state_dict()["state"].items()}

    def load_optimizer_state(self, state: dict[str, dict]):
        """Take back what optimizer_state gave."""
        if self.accelerator.is_fsdp2:
            from torch.distributed.checkpoint import state_dict as sharded

            options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
            whole = sharded.get_optimizer_state_dict(self.model, self.optimizer, options=options)
            if whole:  # on the main process, which hands the others their shares
                whole["state"] = state
            sharded.set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=whole, options=options)
            return
        by_number = {i: state[name] for i, name in enumerate(self.names) if name in state}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": by_number, "param_groups": groups})

    def full_state(self) -> dict | None:
        """All weights on the main process, gathered from all (every process must call it); None: not split."""
        if self.accelerator.num_processes == 1 and not self.deepspeed:
            return None
        return self.accelerator.get_state_dict(self.model)


# --------------------------------------------------------------------------------------------- 8. order and prefetch


def count_steps(num_records: int, samples_per_step: int, args: TrainingArguments) -> int:
    """Optimizer steps of a run: each epoch ends with a smaller step when the records do not divide evenly."""
    if args.max_steps > 0:
        return args.max_steps
    whole, rest = divmod(args.num_train_epochs, 1)
    return int(whole) * math.ceil(num_records / samples_per_step) + math.ceil(
        round(rest * num_records) / samples_per_step
    )


def step_windows(num_records: int, samples_per_step: int, seed: int, position: int, order=None):
    """Yield for ever `(record indices of one optimizer step, samples consumed after it)`.

    The order of an epoch is a function of (seed, epoch), a shuffle unless `order` is given, and `position`, the number
    of samples consumed, is the whole state: a resumed run goes on without decoding what came before.
    """
    while True:
        epoch, offset = divmod(position, num_records)
        indices = order(seed, epoch) if order else np.random.default_rng([seed, epoch]).permutation(num_records)
        for start in range(offset, num_records, samples_per_step):
            window = indices[start : start + samples_per_step].tolist()
            position += len(window)
            yield window, position


def micro_batches(window: list[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's share of a step: rows of `batch_size` samples, dealt in turn; the last may be empty on a rank."""
    rows = math.ceil(len(window) / (batch_size * world_size))
    starts = [(row * world_size + rank) * batch_size for row in range(rows)]
    return [window[start : start + batch_size] for start in starts]


PREFETCH_BYTES = 2 << 30  # decoded samples that wait for the trainer, per process


class SampleStream:
    """Decodes records in worker processes, ahead of the trainer and in the order asked.

    Workers are started by a fork server: 0.2 s each, without the trainer's CUDA context, and killable. Each has a
    thread of the trainer and a pipe to itself: its death, even in the middle of a message, is no matter for the
    others (a pool with one queue for all stops for good then). A file that hangs, crashes its worker or eats its
    memory costs that file only. Every bad file goes into bad_videos.jsonl; those found there are not tried again
    (unless --on_bad_video is error, or they have changed since).
    """

    def __init__(self, encoder: Encoder, args: TrainingArguments):
        self.encoder, self.args, self.num_workers = encoder, args, args.dataloader_num_workers
        self.sample_bytes = 0  # of the largest sample so far
        self.bad_path = Path(args.output_dir) / "bad_videos.jsonl"
        self.warned = False  # of a sample with too large positions
        self.readers = Counter()  # videos by what decoded them
        self.bad, self.told = {}, set()  # bad files and why; (record, file) pairs and files that were told of
        self.killed, self.bytes_learned, self.lock = set(), 0, threading.Lock()  # files whose process was killed once
        self._learn()
        room = VideoCache.free_room(args.video_cache, args.video_cache_limit_gb) if args.video_cache else 0
        self.context = multiprocessing.get_context("forkserver")
        self.room = self.context.RawValue("d", room / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if encoder.cache:
            encoder.cache.room = self.room
        if self.num_workers:
            self.context.set_forkserver_preload(["__main__", __name__])
            self.watch_folder = tempfile.TemporaryDirectory(prefix="multivideo-")
            handlers = [(number, signal.signal(number, signal.SIG_IGN)) for number in STOP_SIGNALS]
            forkserver.ensure_running()  # a signal to all processes must not end it
            for number, handler in handlers:
                signal.signal(number, handler)
            self.jobs, self.processes, self.closed = queue.SimpleQueue(), {}, False
            self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.num_workers)]
            for thread in self.threads:
                thread.start()
            atexit.register(self.close)

    def _serve(self):
        """The thread beside a worker: hands it one record after another, and replaces it when it dies."""
        worker = None  # process, pipe
        while (job := self.jobs.get()) is not None:
            future, row, folder = job
            if self.closed or not future.set_running_or_notify_cancel():
                continue
            try:
                deaths = []  # at none of the record's files
                while not future.done():
                    worker = worker or self._start_worker()
                    try:
                        worker[1].send((row, folder, self._known_bad(row, folder)))
                        answer = worker[1].recv()
                    except (EOFError, OSError):
                        deaths += self._bury(*worker)
                        worker = None
                        if self.closed or len(deaths) == 3:
                            name = record_name(row["id"])
                            raise InputError(f"{name}: the process that encodes it ends again and again ({deaths}), "
                                             "but at none of its files: memory?") from None  # fmt: skip
                    else:
                        (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)
            except Exception as error:  # the trainer waits for an answer
                future.set_exception(error)

    def _learn(self):
        """Take in what bad_videos.jsonl has gained: an earlier run's bad files, and those of this run's processes."""
        with self.lock:
            if self.bad_path.is_file() and self.bad_path.stat().st_size > self.bytes_learned:
                with open(self.bad_path, "rb") as file:
                    file.seek(self.bytes_learned)
                    gained = file.read()
                self.bytes_learned += gained.rfind(b"\n") + 1
                for row in parse_jsonl(gained.decode(errors="replace")):
                    file = row.get("file")
                    if row.keys() >= {"file", "reason", "record", "state"} and row["state"] == _file_state(file):
                        self.told.add((row["record"], file))
                        if self.args.on_bad_video != "error":
                            self.bad.setdefault(file, row["reason"])

    def _known_bad(self, row, folder):
        self._learn()
        files = [os.path.join(folder, path) for path in record_files(row)] if self.bad else []
        return {path: self.bad[path] for path in files if path in self.bad}

    def _start_worker(self):
        ours, theirs = self.context.Pipe()
        initial = theirs, self.args, self.room, self.watch_folder.name
        process = self.context.Process(target=_worker, args=initial, daemon=True)
        with self.lock:  # starting asks after all children, which has one answer only
            process.start()
            self.processes[process.pid] = process
        theirs.close()
        if self.closed:
            process.kill()
        return process, ours

    def _bury(self, process, pipe) -> list[str]:
        """Note which file a dead worker was at; if it was at none, return what became of it."""
        pipe.close()
        with self.lock:
            process.join(5)
            del self.processes[process.pid]
        process.kill()  # if it hangs on its way out
        died = DEATHS.get(process.exitcode, f"ended its decoding process (exit code {process.exitcode})")
        watch = Path(self.watch_folder.name) / str(process.pid)
        file = os.fsdecode(watch.read_bytes().split(b"\0")[0]) if watch.is_file() else ""
        watch.unlink(missing_ok=True)
        if not file or file in self.bad:
            return [died]
        if process.exitcode == -signal.SIGKILL and file not in self.killed:
            self.killed.add(file)  # tried once more: memory may have been short for another's sake
        else:
            self.bad[file] = died.format(timeout=f"{self.args.decode_timeout:g}")
        return []

    def batches(self, records: "Dataset", index_lists, folder: str):
        """Yield the encoded samples of each list of record indices, decoding further lists meanwhile."""
        folder = os.path.abspath(folder)  # workers may stand elsewhere, and so may the next run
        if not self.num_workers:
            for indices in index_lists:
                yield [self._tell(lambda row=records[i]: self.encoder(row, folder, self._known_bad(row, folder)))
                       for i in indices]  # fmt: skip
            return
        waiting, in_flight, index_lists = deque(), 0, iter(index_lists)
        try:
            while True:
                most = 4 * self.num_workers if self.sample_bytes == 0 else PREFETCH_BYTES // self.sample_bytes
                while not waiting or in_flight < min(most, 4 * self.num_workers + 2 * len(waiting[0])):
                    indices = next(index_lists, None)
                    if indices is None:
                        break
                    rows = [records[i] for i in indices]
                    futures = [Future() for _ in rows]
                    for future, row in zip(futures, rows):
                        self.jobs.put((future, row, folder))
                    waiting.append(futures)
                    in_flight += len(rows)
                if not waiting:
                    return
                samples = [self._tell(future.result) for future in waiting.popleft()]
                sizes = [sum(value.nbytes for value in sample.values() if isinstance(value, np.ndarray))
                         for sample in samples]  # fmt: skip
                self.sample_bytes = max(self.sample_bytes, *sizes, 0)
                in_flight -= len(samples)
                yield samples
        finally:
            for future in itertools.chain.from_iterable(waiting):
                future.cancel()

    def steps(self, records: "Dataset", windows, batch_size: int, rank: int, world_size: int, folder: str):
        """Yield `(window, samples seen, this rank's encoded rows)` for each step that step_windows gives."""
        waiting = deque()

        def rows():
            for window, seen in windows:
                mine = micro_batches(window, batch_size, rank, world_size)
                waiting.append((window, seen, len(mine)))
                yield from mine

        batches = self.batches(records, rows(), folder)
        for first in batches:
            window, seen, count = waiting.popleft()
            yield window, seen, [first, *itertools.islice(batches, count - 1)]

    def _tell(self, result):
        """Pass a sample on, and say of which files it came without."""
        bad, record, sample = [], None, {}
        try:
            sample = result()
            bad, record = sample["bad"], sample["id"]
            self.readers += sample["readers"]
            return sample
        except BadVideo as error:
            bad, record = [(error.path, error.reason)], error.record
            raise
        finally:
            self._warn_of_positions(sample)
            if bad:
                self._learn()  # another process may have told of it
            for file, reason in bad:
                self.bad.setdefault(file, reason)
                if (record, file) not in self.told:
                    self.told.add((record, file))
                    action = self.args.on_bad_video
                    row = {"file": file, "reason": reason, "record": record, "action": action}
                    append_jsonl(self.bad_path, row | {"state": _file_state(file)})
                    if action != "error":
                        tqdm.write(f"bad file, {action}: {record_name(record)}: {file}: {reason}", sys.stderr)

    def _warn_of_positions(self, sample):
        """Print a warning, once, of a sample whose positions exceed those that the model was made for."""
        last = int(sample["position_ids"].max()) if "position_ids" in sample else 0
        if last >= self.encoder.max_positions and not self.warned:
            self.warned = True
            tqdm.write(f"warning: {record_name(sample['id'])} ends at position {last:,}, and the model was made for "
                       f"{self.encoder.max_positions:,} (max_position_embeddings in its config.json): give shorter "
                       "parts of its videos ('start' and 'end'), or split it. tools/check_data.py lists all such "
                       "records", sys.stderr)  # fmt: skip

    def close(self):
        """Stop the workers, whatever they are at."""
        if self.args.video_reader == "decord" and self.readers["pyav"]:
            say(f"--video_reader decord: {self.readers.pop('pyav'):,} videos were read by PyAV, since decord does not "
                "read them right; tools/check_data.py --video_reader decord lists them")  # fmt: skip
        if not self.num_workers or self.closed:
            return
        self.closed = True
        for _ in self.threads:
            self.jobs.put(None)
        for process in list(self.processes.values()):
            process.kill()
        for thread in self.threads:
            thread.join()
        self.watch_folder.cleanup()
        atexit.unregister(self.close)


DEATHS = {
    -signal.SIGALRM: "took longer than {timeout} s to decode: if it is a long film, raise --decode_timeout",
    -signal.SIGKILL: "its decoding process was killed (out of memory?)",
    -signal.SIGSEGV: "crashed its decoding process (segmentation fault)",
}
WATCH_BYTES = 8192  # more than the longest path
MIN_VIDEOS = 1000  # --max_bad_ratio counts from here: a single early one is no share yet


def check_files(accelerator: Accelerator, flag: str, records: "Dataset | None", folder: str, encoder: Encoder):
    """Look for every file of a data set before any weight is loaded; every process must call it.

    One process of each machine does it: a million files take 8 s on a local disk. Reported are missing files,
    what is none, and `start` and `end` outside of videos whose length the cache knows. Others come with their sample.

    Raises:
        InputError: --on_bad_video error, or more bad files than --max_bad_ratio allows.
    """
    args, problem, note = encoder.args, None, None
    if records is not None and accelerator.is_local_main_process:
        uses, spans = _count_files(records)
        paths, bad = list(uses), {}  # (path, start and end, if these are what is wrong): reason
        with ThreadPoolExecutor(16) as pool:  # a network disk answers slowly, but many at a time
            for found in pool.map(lambda k: _bad_paths(paths[k : k + 1000], folder), range(0, len(paths), 1000)):
                bad |= {(path, None): reason for path, reason in found.items()}
        bad_uses = sum(uses[path] for path, _ in bad)
        for (path, span), (part, count) in spans.items():
            known = encoder.cache and (path, None) not in bad
            info = known and encoder.cache.info(encoder.cache.identity(os.path.join(folder, path)))
            try:
                if info:
                    part = {**dict.fromkeys(PART), **part}
                    sample_frames(part, info.num_frames, info.fps, args, times=info.times)
            except ValueError as error:
                bad[path, span] = str(error)
                bad_uses += count
        if bad:
            total, epochs = sum(uses.values()), 1 if args.max_steps > 0 else max(1, args.num_train_epochs)
            lines = [f"{record_name(_record_of(records, *key))}: {os.path.join(folder, key[0])}: {reason}"
                     for key, reason in itertools.islice(bad.items(), 5)]  # fmt: skip
            files = len({path for path, _ in bad})
            found = f"--{flag}: {files:,} of {len(uses):,} files cannot be used ({bad_uses:,} of {total:,} places)"
            found = "\n  • ".join([found, *lines, *(["…"] if len(bad) > 5 else [])])
            if args.on_bad_video == "error":
                problem = (f"{found}\nFix the paths or --image_folder {folder}, or give --on_bad_video drop_video or "
                           "drop_sample; tools/check_data.py lists all")  # fmt: skip
            elif bad_uses * epochs > args.max_bad_ratio * max(total * epochs, MIN_VIDEOS):
                problem = f"{found}\nThese are more than --max_bad_ratio {args.max_bad_ratio:g} allows"
            else:
                note = f"{found}\n  --on_bad_video {args.on_bad_video}: left out"
    found = gather_object([(problem, note)])
    if problem := next((problem for problem, _ in found if problem), None):
        stop_all(accelerator, problem)
    for note in {note for _, note in found if note}:
        say(note)


def _count_files(records: "Dataset") -> tuple[Counter, dict]:
    """How often each file stands in the records, and {(path, (start, end)): (clip, how often)} where one is given."""
    uses, spans = Counter(), {}
    for chunk in records.data.column("messages").chunks:  # by columns: a million records in seconds
        parts = pc.list_flatten(pc.struct_field(pc.list_flatten(chunk), "content"))
        for pair in pc.list_flatten(pc.struct_field(parts, "files")).value_counts().to_pylist():
            uses[pair["values"]] += pair["counts"]
        limited = pc.or_(pc.is_valid(pc.struct_field(parts, "start")), pc.is_valid(pc.struct_field(parts, "end")))
        for part in parts.filter(limited).to_pylist():
            key = part["files"][0], (part["start"], part["end"])
            spans[key] = part, spans.get(key, (None, 0))[1] + 1
    return uses, spans


def _bad_paths(paths, folder):
    """{path: reason} of those that resolve_path refuses."""
    bad = {}
    for path in paths:
        try:
            resolve_path(path, folder)
        except BadFile as error:
            bad[path] = error.reason
    return bad


def _record_of(records, path, span):
    """The id of the first record that has this file, with this `start` and `end` if they are given."""
    return next(row["id"] for row in records for turn in row["messages"] for part in turn["content"]
                if path in part["files"] and span in (None, (part["start"], part["end"])))  # fmt: skip


def check_bad_ratio(accelerator: Accelerator, args: TrainingArguments, state: dict, counts: dict):
    """Add a step's videos to the state and end the run when too many of them were bad; every process must call it."""
    state["bad_videos"] += counts["bad_videos"]
    state["all_videos"] += counts["videos"] + counts["images"] + counts["bad_videos"]
    if state["bad_videos"] > args.max_bad_ratio * max(state["all_videos"], MIN_VIDEOS):
        path = Path(args.output_dir) / "bad_videos.jsonl"
        rows = parse_jsonl(path.read_text(encoding="utf-8") if path.is_file() else "")  # else another node's
        shown = [f"\n  • {row['file']}: {row['reason']}" for row in itertools.islice(rows, 5)]
        stop_all(accelerator, f"{state['bad_videos']} of {state['all_videos']} videos and images so far could not be "
                 f"read: more than --max_bad_ratio {args.max_bad_ratio:g} allows. The first:{''.join(shown)}\n"
                 f"All are in {path}. Mend them, or raise --max_bad_ratio; if they are fine again (a disk that was "
                 "away), delete that file. Then --resume_from_checkpoint auto")  # fmt: skip


def _file_state(path):
    """Size and time of change, None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _worker(pipe, args, room, watch_folder):
    """A decoding process: encodes one record after another until the trainer is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # sent to all, they are the trainer's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)
    watch = os.open(os.path.join(watch_folder, str(os.getpid())), os.O_CREAT | os.O_RDWR, 0o600)
    os.write(watch, bytes(WATCH_BYTES))  # now, so that a full disk later is no matter
    encoder = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            try:
                encoder = encoder or Encoder(args.model_id, args, room, watch)
                answer = encoder(*job)
            except InputError as error:
                answer = error
            except Exception:
                answer = RuntimeError(f"in a decoding process:\n{traceback.format_exc()}")
            pipe.send(answer)


# ---------------------------------------------------------------------------------------------------- 9. checkpoints


# What a model's folder has besides weights and configuration: outputs get the base's own files, as they are.
PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def save_model(model, processor, folder: str | Path, state: dict | None = None, args: TrainingArguments | None = None):
    """Write weights (safetensors), config and processor so that plain from_pretrained loads them, in one float type.

    fp32 as soon as one parameter is fp32: a mix would be rounded down to the first one's type on loading. `state`
    holds the gathered weights where the model has only its share of them. With `args` there is a model card, too.
    """
    folder = Path(folder)
    adapter = hasattr(model, "peft_config")
    if adapter:  # the adapter and what is trained beside it
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        if model.config.problem_type:  # a classifier's labels are in its config
            config = copy.deepcopy(model.config)
            config.__dict__.pop("quantization_config", None)
            config.save_pretrained(folder)
            finish_config(folder)
        with safe_open(folder / "adapter_model.safetensors", "pt") as saved:
            empty = [name for name in saved.keys() if 0 in saved.get_slice(name).get_shape()]  # noqa: SIM118
        assert not empty, f"{len(empty)} empty tensors, first {empty[0]}: split weights were not gathered"
    else:
        weights = model.state_dict() if state is None else state
        types = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        if len(types) > 1:
            state = {name: tensor.to("cpu", torch.float32) if tensor.is_floating_point() else tensor
                     for name, tensor in weights.items()}  # fmt: skip
        model.save_pretrained(folder, state_dict=state)
        finish_config(folder, "float32" if len(types) > 1 else str(types.pop()).removeprefix("torch."))
        if args:
            copy_unused_weights(model, args.model_id, folder, args.cache_dir)
    save_processor(processor, folder)
    if args:
        kind = "adapter" if adapter else "model"
        write_card(folder, kind, model.config, card_facts(args))
    for file in folder.iterdir():
        follow_umask(file)


def weight_files(source: str, cache_dir: str | None = None) -> dict[str, str]:
    """The safetensors file that each weight of a model is in, by its name there; {} where it has no such files."""
    where = {"cache_dir": cache_dir, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    cached_file = transformers.utils.cached_file
    if index := cached_file(source, "model.safetensors.index.json", **where):
        return json.loads(Path(index).read_text())["weight_map"]
    if not (path := cached_file(source, "model.safetensors", **where)):
        return {}
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def copy_unused_weights(model, source: str, folder: str | Path, cache_dir: str | None = None):
    """Copy weights that transformers neither loads nor saves, of multi-token prediction, beside a saved model's.

    They are the base model's: engines that guess tokens with them (speculative decoding) guess a bit worse.
    """
    folder, ignored = Path(folder), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if model.config.problem_type or not any("mtp" in pattern for pattern in ignored):
        return
    files = {name: file for name, file in weight_files(source, cache_dir).items() if name.startswith("mtp.")}
    if not files:
        return
    tensors = {}
    for file in sorted(set(files.values())):
        path = transformers.utils.cached_file(source, file, cache_dir=cache_dir, local_files_only=True)
        with safe_open(path, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in files if files[name] == file}
    places = weight_files(str(folder))
    if set(places.values()) == {"model.safetensors"}:  # plain loading would look no further
        os.rename(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
        places = dict.fromkeys(places, "model-00001-of-00002.safetensors")
    save_tensors(tensors, folder / "model-mtp.safetensors", {"format": "pt"})
    places |= dict.fromkeys(tensors, "model-mtp.safetensors")
    total = sum((folder / file).stat().st_size for file in set(places.values()))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def finish_config(folder: Path, dtype: str | None = None):
    """Write `dtype` into config.json, and rotary and tied embeddings where transformers 4 looks for them, too."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    rope = dict(text["rope_parameters"])
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    text["tie_word_embeddings"] = config["tie_word_embeddings"]  # 5.x reads the outer one, 4.57 the inner one
    write_json(folder / "config.json", config | ({"dtype": dtype} if dtype else {}))


def processor_files(folder: str | Path) -> tuple[list[str], bool]:
    """Which of PROCESSOR_FILES a folder has, and whether a processor can be loaded from them."""
    names = [name for name in PROCESSOR_FILES if (Path(folder) / name).is_file()]
    needed = [("tokenizer_config.json",), ("tokenizer.json", "vocab.json"),
              ("preprocessor_config.json", "processor_config.json")]  # fmt: skip
    return names, all(any(name in names for name in either) for either in needed)


def save_processor(processor, folder: str | Path):
    """Copy the base's tokenizer, processor and template files as they are; see add_older_files for what is added."""
    base = processor.tokenizer.name_or_path
    if not (base and processor_files(base)[1]):  # it is gone, or has only some of them
        processor.save_pretrained(folder)
    if base:
        copy_processor(base, folder)
    add_older_files(folder)


def copy_processor(source: str | Path, folder: str | Path):
    """Copy the processor files that `source` has."""
    for name in processor_files(source)[0]:
        shutil.copyfile(Path(source) / name, Path(folder) / name)


def add_older_files(folder: str | Path):
    """Write what transformers 4.57 needs and a processor that 5.x wrote lacks; 5.x reads the result as before."""
    folder = Path(folder)
    nested_path, tokenizer_path = folder / "processor_config.json", folder / "tokenizer_config.json"
    nested = json.loads(nested_path.read_text()) if nested_path.is_file() else {}
    for part, name in (("image_processor", "preprocessor_config.json"),
                       ("video_processor", "video_preprocessor_config.json")):  # fmt: skip
        if part in nested and not (folder / name).is_file():
            write_json(folder / name, {**nested[part], "processor_class": nested.get("processor_class")})
    written = json.loads(tokenizer_path.read_text())
    tokenizer = dict(written)
    if isinstance(tokenizer.get("extra_special_tokens"), list):  # 4.57 expects a dict there, 5.x reads both names
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # a class of 5.x for any tokenizer.json
        tokenizer["tokenizer_class"] = "Qwen2Tokenizer"
    if tokenizer != written:
        write_json(tokenizer_path, tokenizer)


def follow_umask(path: str | Path):
    """Give a file the mode that open() gives: safetensors makes its files readable for the owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def save_tensors(tensors: dict, path: str | Path, metadata: dict | None = None):
    """safetensors' save_file, with the mode that open() gives."""
    save_file(tensors, path, metadata)
    follow_umask(path)


CARD_MARK = "<!-- multivideo "  # a model card that has it is ours; what follows is what it says, as JSON


def card_facts(args: TrainingArguments) -> dict:
    """What a model card says of a run: the base model (None: it has no hub name), the trainer and its objective."""
    hub = not (looks_local(args.model_id) or os.path.isdir(args.model_id))
    return {"base_model": args.model_id if hub else None, "bits": args.bits, "objective": args.objective(),
            "trainer": os.path.basename(inspect.getfile(type(args)))}  # fmt: skip


def own_card(path: Path) -> dict | None:
    """The facts of a model card that write_card wrote; None: there is none, or it is the user's own."""
    try:
        marked = path.read_text(encoding="utf-8").split(CARD_MARK, 1)[1]
        return json.JSONDecoder().raw_decode(marked)[0]
    except (FileNotFoundError, IndexError, ValueError):
        return None


def write_card(folder: Path, kind: str, config, facts: dict):
    """Write README.md: see model_card."""
    (folder / "README.md").write_text(model_card(kind, config, facts), encoding="utf-8")


POSITION_LINES = """## Positions

Training used the position rule of Qwen's authors: the text after a clip (a video or an image) goes on one past the
largest of the clip's temporal, height and width positions, as in transformers 4.49 to 4.51 and vLLM. Plain
transformers 5.3 and later counts otherwise: """
PLAIN_POSITION_LINES = """hand over the positions, and `generate` goes on from them.

```python
inputs["position_ids"] = qwen_position_ids(inputs, model.config)  # [4, B, T] from the processor's output
output = model.generate(**inputs, max_new_tokens=64)
```

<details><summary>qwen_position_ids</summary>

```python
import numpy as np
import torch


{}```

</details>
"""
TIME_STAMP_LINES = """## Time stamps

Before each pair of frames the text says when it is shown, in seconds: hand the processor the `video_metadata` of
`qwen_vl_utils.process_vision_info(messages, image_patch_size=16, return_video_metadata=True)` and
`do_sample_frames=False`; without it transformers takes 24 frames per second for granted. Training wrote videos as
transformers 5.10 and later does; older ones (and vLLM beside them) write two tokens fewer per video.
"""


def model_card(kind: str, config, facts: dict) -> str:
    """The model card of an "adapter", a whole "model" or an adapter "merged" into its base.

    `config` is the model's, `facts` are card_facts of the run. The last section is on what plain transformers needs.
    """
    base = facts["base_model"] or "path/to/the/base/model"
    auto = f'classifier_class("{config.model_type}")' if config.problem_type else "AutoModelForImageTextToText"
    names = "AutoProcessor" if config.problem_type else f"{auto}, AutoProcessor"
    lines = ["from train_cls import classifier_class"] if config.problem_type else []
    folder, given = '"path/to/this/folder"', ""
    if kind == "adapter" and config.problem_type:  # the labels are beside the adapter
        names, given = f"AutoConfig, {names}", f", config=AutoConfig.from_pretrained({folder})"
    lines += [f"from transformers import {names}", ""]
    if kind == "adapter":
        lines = ["from peft import PeftModel", *lines,
                 f'model = {auto}.from_pretrained("{base}"{given}, dtype="auto")',
                 f"model = PeftModel.from_pretrained(model, {folder})"]  # fmt: skip
    else:
        lines.append(f'model = {auto}.from_pretrained({folder}, dtype="auto")')
    lines.append(f"processor = AutoProcessor.from_pretrained({folder})")
    header = [f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"]
    header += [f"base_model: {facts['base_model']}"] if facts["base_model"] else []
    header += [] if config.problem_type else ["pipeline_tag: image-text-to-text"]
    what = {"adapter": "An adapter", "model": "All weights of a model", "merged": "A model with its adapter merged"}
    said = f"Trained by `{facts['trainer']}`: {facts['objective']}."
    named = f"`{facts['base_model']}`" if facts["base_model"] else "a local folder without a name on the hub"
    bits = f" It was held in {facts['bits']} bits in training." if facts["bits"] < 16 else ""
    code = "\n".join(lines)
    if FAMILIES[config.model_type] == "text":
        own = TIME_STAMP_LINES
    elif config.problem_type:
        own = POSITION_LINES + "the class above counts as in training by itself.\n"
    else:
        functions = map(inspect.getsource, (qwen_position_ids, qwen_positions, clip_positions))
        own = POSITION_LINES + PLAIN_POSITION_LINES.format("\n\n".join(functions))
    return f"""---
{chr(10).join(header)}
---
{CARD_MARK}{json.dumps(facts)}: without this line the next run leaves this file alone -->
# {what[kind]}

{said} Base model: {named}.{bits}

```python
{code}
```

{own}"""


def write_json(path: Path, value):
    """Write JSON aside, then rename: the file is never half there."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def publish_model(output_dir: str, engine: Engine, processor, best: str | None):
    """The final model into `output_dir` itself: the best checkpoint's, if named, else the weights as they are.

    Every process must call it. Written aside, then moved file by file; without its config, which comes last, nothing
    loads a half of it, or one mixed with an earlier model's files.
    """
    state = None if best else engine.full_state()
    with all_or_none(engine.accelerator, f"the final model cannot be written to {output_dir}"):
        if engine.accelerator.is_main_process:
            aside = Path(output_dir) / ".model.aside"
            shutil.rmtree(aside, ignore_errors=True)
            if best:
                own = (
                    "optimizer.*",
                    "random_states*",
                    "trainer_state.json",
                    "manifest.json",
                    "deepspeed",
                    "zero_to_*",
                )
                shutil.copytree(Path(output_dir) / best, aside, ignore=shutil.ignore_patterns(*own))
            else:
                save_model(engine.raw_model, processor, aside, state, engine.args)
            if (Path(output_dir) / "README.md").is_file() and not own_card(Path(output_dir) / "README.md"):
                (aside / "README.md").unlink(missing_ok=True)  # the user's stays
            for file in aside.iterdir():
                _fsync(file)
            adapter = (aside / "adapter_config.json").is_file()
            config = Path(output_dir) / ("adapter_config.json" if adapter else "config.json")
            for file in [config, *([] if adapter else Path(output_dir).glob("model*.safetensors*"))]:
                file.unlink(missing_ok=True)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == config.name):
                os.replace(file, Path(output_dir) / file.name)
            _fsync(output_dir)
            aside.rmdir()


def save_checkpoint(output_dir: str, engine: Engine, processor, state: dict):
    """Write `checkpoint-N`: model, optimizer, loss scale, random states and `state`; every process must call it.

    Written aside, checked, fsynced, then published by one rename: a checkpoint that has its name is complete. Then
    those beyond --save_total_limit are deleted. DeepSpeed's shards are written by DeepSpeed, one file per process.
    """
    final = Path(output_dir) / f"checkpoint-{state['step']}"
    aside = final.with_name(f".{final.name}.aside")
    try:
        _write_checkpoint(final, aside, engine, processor, state)
    except BaseException:
        if engine.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_checkpoint(final, aside, engine, processor, state):
    accelerator = engine.accelerator
    writing = functools.partial(all_or_none, accelerator, f"{final} cannot be written")
    weights = engine.full_state()
    with writing():
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            save_model(engine.raw_model, processor, aside, weights, engine.args)
    tensors, numbers = {}, {}
    if not engine.deepspeed:
        for name, values in engine.optimizer_state().items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
                else:
                    numbers[f"{name}/{key}"] = value
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    if engine.deepspeed:
        try:
            engine.model.save_checkpoint(str(aside), tag="deepspeed", save_latest=False)
        except (OSError, RuntimeError) as error:  # others wait inside it: no all_or_none, this process just ends
            if lost_another(error):
                raise
            raise InputError(f"{final} cannot be written: {str(error).splitlines()[0]}; {INTACT}") from None
    with writing():
        save_tensors(random_states, aside / f"random_states_{accelerator.process_index}.safetensors")
    with writing():
        if accelerator.is_main_process:
            save_tensors(tensors, aside / "optimizer.safetensors")
            saved = {**state, "num_processes": accelerator.num_processes, "zero_stage": engine.zero_stage,
                     "optimizer": numbers, "scaler": engine.scaler.state_dict()}  # fmt: skip
            write_json(aside / "trainer_state.json", saved)
            files = [file for file in aside.rglob("*") if file.is_file()]
            write_json(aside / "manifest.json", {str(file.relative_to(aside)): file.stat().st_size for file in files})
            if problem := checkpoint_problem(aside):
                raise OSError(f"{problem} after writing")
            for path in [*aside.rglob("*"), aside]:
                _fsync(path)
            replaced = final.with_name(f".{final.name}.replaced")  # still found if a kill comes between the renames
            if final.exists():  # the same step of an earlier attempt
                os.rename(final, replaced)
            os.rename(aside, final)
            _fsync(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            prune_checkpoints(final, engine.args.save_total_limit, state["best_checkpoint"])


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_folder(folder):
    """Delete a checkpoint so that an interruption never leaves half of one under its name."""
    dying = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(dying, ignore_errors=True)
    os.rename(folder, dying)
    shutil.rmtree(dying)


def checkpoint_problem(folder: Path) -> str | None:
    """What keeps a checkpoint from being complete (missing file, wrong size, torn safetensors header), or None."""
    name = "manifest.json"
    try:
        sizes = json.loads((Path(folder) / name).read_text())
        for name in sizes:
            file = Path(folder) / name
            if file.stat().st_size != sizes[name]:
                return f"{name} has {file.stat().st_size} bytes instead of {sizes[name]}"
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    opened.keys()
            elif file.suffix == ".json":
                json.loads(file.read_text())
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{name} is damaged: {error}"
    return None


def list_checkpoints(output_dir: str) -> list[Path]:
    """The folders `checkpoint-N` in `output_dir`, oldest first, and one that was just being replaced by its like."""
    found = {}
    for path in Path(output_dir).glob("*checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.replaced", path.name):
            found[path] = int(match[1] or match[2]), bool(match[1])
    return sorted(found, key=found.get)


def clear_leftovers(output_dir: str):
    """Delete what a killed run left half written or half deleted; a checkpoint being replaced gets its name back."""
    for path in Path(output_dir).glob(".*"):
        if path.name == ".model.aside" or re.fullmatch(r"\.checkpoint-\d+\.(aside|removed)", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.checkpoint-\d+\.replaced", path.name):
            final = path.with_name(path.stem[1:])
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, final)


def find_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: a path, or with auto the newest complete one, if any.

    Raises:
        ValueError: the named checkpoint is not complete, or not the newest of its run.
    """
    if os.environ.get("RANK", "0") == "0":
        clear_leftovers(args.output_dir)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if args.resume_from_checkpoint is None:
        return None
    folders = list_checkpoints(args.output_dir)
    if args.resume_from_checkpoint != "auto":
        folder = Path(args.resume_from_checkpoint)
        if problem := checkpoint_problem(folder):
            raise InputError(f"--resume_from_checkpoint {folder}: {problem}; auto takes the newest complete one")
        here = [path.resolve() for path in folders]
        later = folders[here.index(folder.resolve()) + 1 :] if folder.resolve() in here else []
        if later := [path for path in later if not checkpoint_problem(path)]:
            raise InputError(f"--resume_from_checkpoint {folder}: {later[-1]} is later and would be mixed up with "
                             "what comes now; move it away, or name another --output_dir")  # fmt: skip
        return folder
    for folder in reversed(folders):
        if problem := checkpoint_problem(folder):
            say(f"{folder} is skipped: {problem}")
            continue
        return folder
    say(f"no complete checkpoint in {args.output_dir}: starting from the beginning")
    return None


def run_identity(args: TrainingArguments, encoder: Encoder, records: "Dataset", samples_per_step: int) -> dict:
    """What must be the same when a run is resumed: model, data, seed, batch arithmetic, optimizer and precision."""
    config = {key: value for key, value in encoder.config.to_dict().items() if key != "transformers_version"}
    local = Path(args.model_id).is_dir()
    digests = []
    for source in data_sources(args.data_path):
        if Path(source).is_file():
            digest = hashlib.sha256()
            with open(source, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digests.append(digest.hexdigest())
        else:
            digests.append(_open_table(source)._fingerprint)
    return {
        "model": str(Path(args.model_id).resolve()) if local else args.model_id,
        "model config (SHA-256)": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "data file (SHA-256)": " ".join(digests),
        "records": len(records),
        "samples per step": samples_per_step,
        "position rule": POSITION_RULE,
        "video layout": encoder.video_layout(),
        "seed": args.seed,
        "optimizer": args.optim,
        "precision": next((name for name in ("bf16", "fp16", "pure_bf16") if getattr(args, name)), "fp32"),
    }


def restore_checkpoint(folder: Path, engine: Engine, state: dict) -> dict:
    """Load optimizer, loss scale and random states (the weights are load_model's) and return the trainer's state.

    `state` is the fresh run's; its `run` (see run_identity) must be that of the checkpoint, unless --resume_force.
    Another number of processes goes on with the same sample order, except on DeepSpeed's shards.

    Raises:
        InputError: the run is not the one that wrote the checkpoint, or a piece of it is missing.
    """
    saved = json.loads((folder / "trainer_state.json").read_text())
    if lacking := sorted(state.keys() - saved.keys()):
        raise InputError(f"{folder}: trainer_state.json has no {', '.join(lacking)}: another version wrote it")
    saved["run"].setdefault("position rule", OLD_POSITION_RULE)
    saved["run"].setdefault("video layout", state["run"].get("video layout"))
    if not math.isfinite(saved.get("best") or 0.0):  # an earlier version's
        saved["best"] = saved["best_checkpoint"] = None
    changed = {key: f"{key}: {saved['run'].get(key)} then, {value} now" for key, value in state["run"].items()
               if saved["run"].get(key) != value}  # fmt: skip
    if "position rule" in changed:
        changed["position rule"] += (
            " (Qwen's own): its weights were trained on other positions than the model now gets"
        )
    shards = [changed.pop("optimizer")] if "optimizer" in changed else []  # what no force can bring together
    stages = ["none" if stage is None else f"ZeRO-{stage}" for stage in (saved["zero_stage"], engine.zero_stage)]
    processes = engine.accelerator.num_processes
    if stages[0] != stages[1]:
        shards.append(f"DeepSpeed: {stages[0]} then, {stages[1]} now")
    elif engine.deepspeed and saved["num_processes"] != processes:
        shards.append(f"processes: {saved['num_processes']} then, {processes} now (DeepSpeed's shards are one each)")
    changed = list(changed.values())
    if changed and engine.args.resume_force and not shards:
        say(f"{folder} belongs to another run; --resume_force goes on although these differ:\n  • "
            + "\n  • ".join(changed))  # fmt: skip
    elif changed or shards:
        mend = "" if shards else ", or add --resume_force True"
        stop_all(engine.accelerator, f"{folder} belongs to another run; these differ:\n  • "
                 + "\n  • ".join(changed + shards)
                 + f"\nGive the same values, or start in another --output_dir{mend}")  # fmt: skip
    best = Path(engine.args.output_dir) / (saved["best_checkpoint"] or "")
    if engine.args.load_best_model_at_end and saved["best_checkpoint"] and (problem := checkpoint_problem(best)):
        raise InputError(f"{best}, the best checkpoint so far, would become the final model: {problem}; put it back "
                         "or drop --load_best_model_at_end")  # fmt: skip
    own = folder.resolve().parent == Path(engine.args.output_dir).resolve()
    if own and engine.accelerator.is_main_process:  # what a kill kept from being deleted
        prune_checkpoints(folder, engine.args.save_total_limit, saved["best_checkpoint"])
    if engine.deepspeed:
        if engine.model.load_checkpoint(str(folder), tag="deepspeed")[0] is None:
            raise InputError(f"{folder}: DeepSpeed cannot load its shards")
    else:
        optimizer_state = {}
        for values in (load_file(folder / "optimizer.safetensors"), saved["optimizer"]):
            for entry, value in values.items():
                name, key = entry.rsplit("/", 1)
                optimizer_state.setdefault(name, {})[key] = value
        if optimizer_state and (wrong := set(optimizer_state) ^ set(engine.names)):
            raise InputError(f"{folder}: its optimizer state and this run's parameters differ in {len(wrong)}, first "
                             f"{sorted(wrong)[0]}: give the same freezing flags")  # fmt: skip
        engine.load_optimizer_state(optimizer_state)
    say(f"resumed from {folder.name}: step {saved['step']}, {saved['samples_seen']} samples seen")
    own = folder / f"random_states_{engine.accelerator.process_index}.safetensors"
    if not own.is_file() and engine.accelerator.process_index < saved["num_processes"]:
        raise InputError(f"{folder}: {own.name} is missing: the run cannot go on as it would have")
    if own.is_file():  # absent for the added processes of a larger run
        random_states = load_file(own)
        torch.set_rng_state(random_states["cpu"])
        if "cuda" in random_states and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_states["cuda"])
    if saved["scaler"]:  # else written in another precision, and forced
        engine.scaler.load_state_dict(saved["scaler"])
    return {key: saved[key] for key in state} | {"run": state["run"]}


def prune_checkpoints(newest: Path, keep: int | None, best: str | None):
    """Delete checkpoints beyond `keep`: damaged ones that were skipped, then the oldest; newest and best one stay."""
    folders = list_checkpoints(newest.parent)
    place = folders.index(newest)
    spare = [folder for folder in folders[place + 1 :] + folders[:place] if folder.name != best]
    for folder in spare[: max(0, len(folders) - keep) if keep else 0]:
        _remove_folder(folder)


def doubtful_settings(args: TrainingArguments, total_steps: int) -> list[str]:
    """What a run's settings mean that may not be meant, as sentences for the banner; the defaults are upstream's."""
    given, notes = getattr(args, "given", ()), []
    if args.save_strategy == "steps" and total_steps < args.save_steps:
        notes.append(f"the run's {total_steps} steps are fewer than --save_steps {args.save_steps}: no checkpoint "
                     "before its end")  # fmt: skip
    if args.lora_enable and args.lora_alpha < args.lora_rank:
        notes.append(f"--lora_alpha {args.lora_alpha} is below --lora_rank {args.lora_rank}: the adapter is scaled by "
                     f"{args.lora_alpha / args.lora_rank:g}; usual are 1 and 2")  # fmt: skip
    for part, rate in (("vision_tower", "vision_lr"), ("merger", "merger_lr")):
        if args.lora_enable and not getattr(args, f"freeze_{part}") and not {f"freeze_{part}", rate} & set(given):
            notes.append(f"the {part.replace('_', ' ')} is trained in full beside the adapter, at "
                         f"--learning_rate {args.learning_rate:g}: give --freeze_{part} True or --{rate}")  # fmt: skip
    warmed = args.warmup_steps or args.warmup_ratio
    if not (args.lora_enable or args.freeze_llm or warmed) and args.optim != "sgd":
        notes.append("all weights are trained without warm-up: Adam's first steps are large; give --warmup_ratio 0.03")
    return notes


FAST_RECURRENCE = {"flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d"}  # on CUDA: package, module
ROW_TOKENS = 2000  # of a row on CUDA: with fewer the GPU waits for its next operation most of the time
BANNER_RECORDS = 200  # that the banner looks at


def describe_run(
    args: TrainingArguments, model, stream: SampleStream, records: "Dataset", total_steps: int, world_size: int
):
    """Print what was asked and what was got: batch arithmetic, trainable parameters, sizes, frames and tokens."""
    encoder, rows = stream.encoder, args.gradient_accumulation_steps
    per_step = args.per_device_train_batch_size * rows * world_size
    counts = dict.fromkeys(("vision", "merger", "llm"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts.setdefault(part_of(name), 0)
            counts[part_of(name)] += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves 0 in numel
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    tokens = describe_new_tokens(model, encoder)
    if args.lora_enable:
        parts += f"; LoRA of rank {args.lora_rank} on {len(model.targeted_module_names)} modules"
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    quantized = [name.replace(".base_layer", "").split(".")[-2]
                 for name, p in model.named_parameters() if not p.is_floating_point()]  # fmt: skip
    in_bits = f"\n  {args.bits} bits     {len(quantized)} matrices of the decoder: " if quantized else ""
    in_bits += ", ".join(sorted(set(quantized)))
    if args.video_resized_width:
        height, width = smart_resize(args.video_resized_height, args.video_resized_width, encoder.factor,
                                     IMAGE_MIN_TOKENS * encoder.factor**2,
                                     IMAGE_MAX_TOKENS * encoder.factor**2)  # fmt: skip
        size = f"{args.video_resized_width}×{args.video_resized_height} asked → {width}×{height} pixels"
        size += f", {visual_tokens(2, height, width, encoder.factor)} tokens per 2 frames"
    else:
        size = "{:,} to {:,} pixels per frame, aspect kept".format(*pixel_bounds(args, "video", encoder.factor))
    if beside := encoder.time_tokens([10.0]):
        size += f"; beside each 2 frames {beside} tokens of their time stamp (at 10 to 99 s)"
    if args.nframes:
        frames = f"{round(args.nframes / FRAME_FACTOR) * FRAME_FACTOR} per video (--nframes {args.nframes})"
    else:
        floor = f"{args.min_frames} below {(args.min_frames + FRAME_FACTOR) / args.fps:g} s (--min_frames)"
        frames = f"{args.fps:g} per second of video, {floor}, at most {args.max_frames}"
    ((first,),) = stream.batches(records, [[0]], args.image_folder)
    visual = (
        sum(t * h * w for t, h, w in first["video_grid_thw"]) // encoder.merge_size**2 if "input_ids" in first else "?"
    )
    beside = encoder.stamps_in(first["input_ids"]) if "input_ids" in first else 0
    visual = f"{visual} visual" + (f", {beside} of time stamps" if beside else "")
    known = []
    for i in spread_evenly(0, len(records) - 1, min(len(records), BANNER_RECORDS)):
        with contextlib.suppress(ValueError, OSError):  # of files that are reported elsewhere
            last = encoder.last_position(records[i], args.image_folder)
            known += [] if last is None else [last]
    positions = f"0 to {max(known):,}, the largest of {len(known):,} of {len(records):,} records" if known else "?"
    positions += f" (those in the video cache); made for 0 to {encoder.max_positions - 1:,}"
    if known and max(known) >= encoder.max_positions:
        positions += ": TOO LARGE, give shorter parts of the videos ('start' and 'end'), or split the samples"
    cache = f"{args.video_cache}, at most {args.video_cache_limit_gb:g} GB" if args.video_cache else "none"
    if args.video_cache and (others := VideoCache.describe_other_versions(args.video_cache)):
        cache += f"; {others}"
    kernels = [part._attn_implementation.removeprefix("flash_packed_")
               for part in (model.config.vision_config, model.config.get_text_config())]  # fmt: skip
    arithmetic = f"{args.per_device_train_batch_size} samples × {rows} rows × {world_size} processes"
    files = f" ({records.info.description})" if records.info.description else ""  # of several
    say(f"""  records    {len(records)}{files}, {per_step} per step = {arithmetic}
  steps      {total_steps}, learning rate {args.learning_rate:g} ({args.lr_scheduler_type})
  trained    {sum(counts.values()):,} parameters: {parts}; types: {", ".join(kinds)}{tokens}{in_bits}
  attention  {kernels[0]} in the tower, {kernels[1]} in the decoder
  video      {size}
  frames     {frames}
  sample 0   {first["num_videos"]} videos, {first["num_images"]} images: {first["num_tokens"]} tokens, {visual}
  positions  {positions}
  cache      {cache}
  output     {args.output_dir}""")  # fmt: skip
    notes = doubtful_settings(args, total_steps)
    row_tokens = first.get("num_tokens", 0) * args.per_device_train_batch_size  # GRPO's have the completions, too
    if torch.cuda.is_available() and 0 < row_tokens < ROW_TOKENS and not hasattr(args, "num_generations"):
        enough = math.ceil(ROW_TOKENS / first["num_tokens"])
        notes.append(f"rows of about {row_tokens:,} tokens keep a GPU waiting: give --per_device_train_batch_size "
                     f"{enough} and fewer --gradient_accumulation_steps")  # fmt: skip
    missing = [package for package, module in FAST_RECURRENCE.items() if importlib.util.find_spec(module) is None]
    if torch.cuda.is_available() and missing and recurrent_layers(model.config.get_text_config()):
        notes.append(f"{' and '.join(missing)} not installed: recurrent layers are loops in plain torch, some 42 "
                     "launches per layer for every 64 tokens (counted): expect a second or more per row of 16,000 "
                     f"tokens; pip install {' '.join(missing)}")  # fmt: skip
    for note in notes:
        say(f"  note       {note}")
    for flag in ("model_id", "lora_weight_path"):
        warn_of_other_layout(flag, getattr(args, flag), encoder)


def peak_memory() -> dict:
    """GiB at most so far, for a row of metrics.jsonl: of tensors and of the allocator on CUDA, else of the process."""
    if not torch.cuda.is_available():
        return {"max_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"max_memory_gb": round(allocated / 2**30, 3), "max_memory_reserved_gb": round(reserved / 2**30, 3)}


def append_jsonl(path: Path, row: dict):
    """Append one JSON object as a line and hand it to the operating system at once."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def bad_step(row: dict, records: list[dict]) -> dict:
    """A line of bad_steps.jsonl: what was not finite in a step, and the records and files that were in it."""
    told = {key: row[key] for key in ("step", "not_finite", "loss", "grad_norm", "learning_rate")}
    return told | {"records": [{"id": record["id"], "files": record_files(record)} for record in records]}


def parse_jsonl(text: str):
    """Yield the objects of a file that several processes append to; torn lines are left out."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def cut_jsonl(path: Path, state: dict):
    """Drop the rows that the run, resumed at `state`, writes again, and a torn last line."""
    if not path.exists():
        return
    rows, last = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            step = json.loads(line)["step"]
            due = step == last == state["step"] and state["eval_due"]  # a step's second row is its evaluation
            rows += [line] if step <= state["step"] and not due else []
            last = step
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")
    os.replace(aside, path)


def stop_unevaluated(accelerator: Accelerator, args: TrainingArguments, records: "Dataset"):
    """End the run because an evaluation skipped every record: it has no result; every process must call it."""
    bad = Path(args.output_dir) / "bad_videos.jsonl"
    stop_all(accelerator, f"--eval_path {args.eval_path}: no record was evaluated, all {len(records)} were skipped: "
             "those that are too long need a higher --max_seq_length (GRPO: --max_prompt_length), --max_video_tokens, "
             f"a lower --fps or smaller sizes; files that cannot be read are listed in {bad}: fix them or remove "
             "their records. What was trained is saved: --resume_from_checkpoint auto continues it")  # fmt: skip


def finite_values(row: dict) -> dict:
    """A row of metrics.jsonl with null for each value that is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def finite_result(result: dict) -> dict:
    """The finite_values of an evaluation, with `not_finite` if one of them is not."""
    row = finite_values(result)
    return row | {"not_finite": True} if None in row.values() else row


def numbers(row: dict) -> dict:
    """What trackers can draw of a row: its numbers, without null, flags and matrices."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def result_text(result: dict) -> str:
    """The numbers of finite_result in one line."""
    missing = {key: "not finite" for key, value in result.items() if value is None}
    shown = {key: f"{value:.6g}" for key, value in numbers(result).items()}
    return ", ".join(f"{key} {(missing | shown)[key]}" for key in result if key in missing or key in shown)


def judge(state: dict, result: dict, args: TrainingArguments) -> bool:
    """Whether a finite_result is the best so far; keeps `best` and `evals_without_gain` of the state.

    One with a value that is not finite never is, whatever --metric_for_best_model: it counts as no improvement.

    Raises:
        InputError: --metric_for_best_model is not among its results.
    """
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if name not in result:
        raise InputError(f"--metric_for_best_model {args.metric_for_best_model}: evaluation gives {', '.join(result)}")
    sign = 1 if args.greater_is_better else -1
    if "not_finite" in result:
        gain = -math.inf
    else:
        gain = math.inf if state["best"] is None else (result[name] - state["best"]) * sign
    state["evals_without_gain"] = 0 if gain > args.early_stopping_threshold else state["evals_without_gain"] + 1
    if gain > 0:
        state["best"] = result[name]
    return gain > 0
