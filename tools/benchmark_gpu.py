"""Training steps on one GPU, ours against the usual way: seconds, samples/s, FLOP utilisation, peak memory.

    python tools/benchmark.py --device cuda --model 3b --random_weights    # or 7b; eight minutes, no network
    python tools/benchmark.py --device cpu --model tiny --random_weights   # the same code on tiny shapes

Qwen2.5-VL-3B or -7B with random weights is built on the GPU; its samples of 30 videos × 4 frames are random pixels
that go through the project's own encoder. Checks come first: causal alignment of variable-length attention where
prefixes are shared, head dimensions, masks (and what cuDNN makes of them), bf16 against fp32, gradients. Then training
steps as the trainers take them, packing included, with and without gradient checkpointing: SFT (LoRA; all weights),
DPO, classification, and GRPO: an update (its peak memory too) and its rollout, which is made once per size. The usual
way beside it, with the same weights, types and optimizer: padded rows, HF forward, all logits (of completions in
GRPO), attention sdpa (and flash-attn, if installed), the prompt and its pixels repeated for every answer. Then parts:
rows of 1 to 16 samples, eager and compiled, what the host has enqueued beside what is done; rollouts per token; the
optimizer alone; the tower's loop over chunks against one call, variable-length attention against a mask, decoding.

What is most telling comes first; what --minutes leaves no time for is listed as not reached, what does not fit as out
of memory. gpu.json is written after each result, and has one entry per model; gpu.md is the table of all of them.

Model FLOPs of a step, the same for both ways, so that neither padding, repetition nor recomputation counts as useful:
    matrix products   2·N per token forward, 2·N more where the gradient goes on to what is before, 2·N more where the
                      matrix is trained: 6·N·T for what is trained, 4·N·T for frozen matrices under an adapter, 2·N·T
                      for a frozen tower; N counts the matrices that a token meets: the tower's per patch, the output
                      layer per supervised token, embeddings not at all
    attention         4·H·D per pair of query and visible key in each layer, 8·H·D more in the backward pass
Utilisation is these FLOPs per second over the device's dense bf16 peak (PEAKS).
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

STARTED = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import multivideo as mv

import accelerate
import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from gpu_memory import MemoryModel, read_launcher
from make_demo import build_processor
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_cls
import train_dpo
import train_grpo
import train_sft

PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by device name
OPTIONAL = {  # what is done without each
    "bitsandbytes": "no 8-bit Adam: all weights are trained with Adam in 32 bits, or in pure bf16",
    "flash_attn": "flash-attn is not beside the usual way",
    "av": "no file is decoded here", "pebble": "no file is decoded here",
    "deepspeed": "one process",
}  # fmt: skip
QUESTION = "Which of these clips shows the fastest movement, and what are the colours of the others?"
ANSWER = "The eleventh clip moves fastest; the first ten are grey, and the ones after it change from red to blue."
REJECTED = "None of them moves at all: they are photographs, each of them grey, and I would not call them clips."
UTILISATION = (
    "FLOP utilisation = model FLOPs / (seconds × dense bf16 peak). Model FLOPs: per matrix of N weights that T tokens "
    "meet 2·N·T forward, 2·N·T where the gradient goes on, 2·N·T where it is trained; attention 4·H·D per pair of "
    "query and visible key, 8·H·D more backward. Padding, repeated prompts and recomputation do not count."
)
FRAMES, SECONDS_PER_GRID = 4, 1.5  # of each video: 4 frames of 3 s

TOWER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])
MODELS = {  # the published config.json files, and a tiny one
    "3b": (dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                num_key_value_heads=2, vocab_size=151936), TOWER, [16, 24, 24], True),
    "7b": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152064), TOWER, [16, 24, 24], False),
    "tiny": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=512),
             dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, fullatt_block_indexes=[1]),
             [2, 3, 3], True),
}  # fmt: skip


@dataclass
class Scale:
    """How much is measured: videos per sample, {pixels: samples per row}, completions, their tokens, repetitions."""

    videos: int
    rows: dict[int, int]
    generations: int
    new_tokens: int
    repetitions: int


REAL = Scale(30, {56: 8, 112: 4, 224: 2}, 8, 256, 3)
TINY = Scale(2, {56: 2, 84: 1}, 2, 4, 1)


class OutOfTime(BaseException):
    """The clock has run out in the middle of a cell; not an Exception, so that no library catches it."""


# ------------------------------------------------------------------------------------------------ model and samples


def make_config(name: str, tokenizer):
    """The config of MODELS[name]; its special tokens are the tokenizer's."""
    text, vision, sections, tied = MODELS[name]
    token_ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for kind, token in
                 {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start",
                  "vision_end": "vision_end"}.items()}  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    return transformers.Qwen2_5_VLConfig(
        text_config=dict(**text, rms_norm_eps=1e-6, max_position_embeddings=128000, rope_parameters=rope,
                         bos_token_id=None, eos_token_id=None, pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(**vision, out_hidden_size=text["hidden_size"], patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2, window_size=112, tokens_per_second=2),
        tie_word_embeddings=tied, **token_ids,
    )  # fmt: skip


class RandomWeights:
    """Stands for a model class in mv.load_model: builds the model on the device, in bf16, instead of reading files."""

    def __init__(self, model_class, device):
        self.model_class, self.device = model_class, device

    def from_pretrained(self, source, config, **kwargs):
        """A model and what load_model asks for: only a classifier's head is missing in a base model's files."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = self.model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return model, {"missing_keys": {name for name, _ in model.named_parameters() if mv.part_of(name) == "head"}}


class RandomPixels(mv.Encoder):
    """The encoder of the trainers, on random pixels in the place of decoded files."""

    def clips(self, parts, folder, known_bad):
        """What mv.Encoder.clips gives, for the size that the arguments name."""
        self.readers = collections.Counter()  # no file is read
        random, size = np.random.default_rng(0), self.args.video_resized_width
        shape = (self.args.nframes, 3, size, size)
        frames = [torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8)) for _ in parts]
        clips = [mv.patchify(clip, self.patch_size, self.merge_size) for clip in frames]
        times = mv.frame_list_times(self.args.nframes, mv.FRAME_FACTOR / SECONDS_PER_GRID)
        return [(*clip, SECONDS_PER_GRID, times) for clip in clips], False


def raw_record(objective: str, videos: int, i: int) -> dict:
    """Record `i` of an objective as a data file has it."""
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    return {"video": [f"{v}.mp4" for v in range(videos)]} | {
        "sft": {"conversations": turns},
        "dpo": {"prompt": QUESTION, "chosen": ANSWER, "rejected": REJECTED},
        "cls": {"prompt": QUESTION, "label": "ab"[i % 2]},
        "grpo": {"conversations": turns},
    }[objective]


def make_record(objective: str, videos: int, i: int) -> dict:
    """Record `i` in the schema of an objective's trainer."""
    trainer = {"sft": train_sft, "dpo": train_dpo, "cls": train_cls, "grpo": train_grpo}[objective]
    return trainer.normalize_record(raw_record(objective, videos, i), f"record {i}")


def padded(samples: list[dict], encoder: mv.Encoder) -> dict:
    """The CPU batch of the HF processor and a padding collator: one row per conversation, a prompt once per answer."""
    rows, patches, grids = [], [], []
    for sample in samples:
        ends = np.cumsum(sample["lengths"]).tolist()
        answers = list(itertools.pairwise(ends)) or [(ends[0], ends[0])]
        for a, b in answers:
            rows.append([np.concatenate([sample[name][: ends[0]], sample[name][a:b]])
                         for name in ("input_ids", "labels")])  # fmt: skip
            patches.append(torch.from_numpy(sample["patches"]))
            grids.append(torch.from_numpy(sample["video_grid_thw"]))
    longest = max(len(ids) for ids, _ in rows)

    def right(k, value):
        return torch.stack([F.pad(torch.from_numpy(row[k]), (0, longest - len(row[k])), value=value) for row in rows])

    ids, labels = right(0, encoder.tokenizer.pad_token_id), right(1, -100)
    grid = torch.cat(grids)
    batch = {
        "input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == encoder.config.video_token_id).int() * 2,
        "attention_mask": torch.stack([(torch.arange(longest) < len(row)).long() for row, _ in rows]),
        "pixel_values_videos": mv.normalize_patches(torch.cat(patches), encoder.image_mean, encoder.image_std),
        "video_grid_thw": grid, "second_per_grid_ts": torch.full((len(grid),), SECONDS_PER_GRID),
    }  # fmt: skip
    return batch | {"position_ids": mv.qwen_position_ids(batch, encoder.config)}


# ------------------------------------------------------------------------------------------------------ model FLOPs


@dataclass
class Work:
    """What goes through a model once: tokens, patches, positions that reach the head, and visible pairs in attention.

    `pairs` of the language model, and of the tower in its windows and where it sees whole frames.
    """

    tokens: int
    patches: int
    kept: int
    pairs: int
    window_pairs: int
    frame_pairs: int


def row_work(inputs: dict, config) -> Work:
    """The work of a packed row."""
    plan, vision, window_pairs, frame_pairs = inputs["plan"], config.vision_config, 0, 0
    prefixes = [0 if p is None else plan.lengths[p] for p in plan.prefixes]
    pairs = sum(n * before + n * (n + 1) // 2 for n, before in zip(plan.lengths, prefixes))
    side = vision.window_size // vision.patch_size

    def squares(length):  # of the windows along one axis
        return length // side * side**2 + (length % side) ** 2

    for t, h, w in inputs["video_grid_thw"].tolist():
        window_pairs += t * squares(h) * squares(w)
        frame_pairs += t * (h * w) ** 2
    kept = inputs["logits_to_keep"] if "logits_to_keep" in inputs else inputs["pool_positions"]
    return Work(inputs["input_ids"].shape[1], len(inputs["pixel_values_videos"]), len(kept), pairs, window_pairs,
                frame_pairs)  # fmt: skip


SECTION = re.compile(r"\b(patch_embed|blocks\.\d+|merger|layers\.\d+|lm_head|score)\b")


MATRICES = (torch.nn.Linear, torch.nn.Conv3d, mv.PatchProjection)


def model_flops(model, config, work: Work, backward: bool = True, adapter: bool = True) -> int:
    """Useful FLOPs of a forward (and backward) pass by the formula at the top of this file."""
    vision, text = config.vision_config, config.get_text_config()
    merged = work.patches // vision.spatial_merge_size**2
    rows = {"patch_embed": work.patches, "blocks": work.patches, "merger": merged, "layers": work.tokens,
            "lm_head": work.kept, "score": work.kept}  # fmt: skip
    sections, trained, norms = {}, set(), set()  # in the order in which data meets them
    for name, parameter in model.named_parameters():
        if (found := SECTION.search(name)) and parameter.requires_grad:
            trained.add(found[1])
            norms |= {found[1]} if parameter.ndim == 1 and ("norm" in name or "ln_q" in name) else set()
    for name, module in model.named_modules():
        found = SECTION.search(name)
        left_out = "original_module" in name or ("lora_" in name and not adapter)
        if found and isinstance(module, MATRICES) and not left_out:
            sections.setdefault(found[1], []).append((name, module.weight))
    total, behind = 0, False  # behind: is anything trained before this section?
    for section, matrices in sections.items():
        kind = section.split(".")[0]
        if section == "layers.0":
            behind |= model.get_input_embeddings().weight.requires_grad
        inside = section in trained
        for name, weight in matrices:
            first = re.search(r"patch_embed|q_proj|k_proj|v_proj|qkv|merger\.mlp\.0", name) and "lora_B" not in name
            into = behind or (section in norms if first else inside)
            total += 2 * weight.numel() * rows[kind] * (1 + (into + weight.requires_grad if backward else 0))
        if kind in ("blocks", "layers"):
            whole = kind == "blocks" and int(section.split(".")[1]) in vision.fullatt_block_indexes
            pairs = work.pairs if kind == "layers" else work.frame_pairs if whole else work.window_pairs
            width = text.hidden_size if kind == "layers" else vision.hidden_size
            total += 4 * width * pairs * (3 if backward and (behind or inside) else 1)
        behind |= inside
    return total


# -------------------------------------------------------------------------------------------------------- the checks


def relative_error(value, reference) -> float:
    """‖value − reference‖ / ‖reference‖, in fp64; of lists of tensors taken as one vector."""
    pairs = [(a.double(), b.double()) for a, b in zip(value, reference)]
    return math.sqrt(
        sum((a - b).square().sum().item() for a, b in pairs) / sum(b.square().sum().item() for _, b in pairs)
    )


def attend(function, tensors, dtype):
    """Output [1, T, H, D] of an attention function and its gradients, from the same numbers in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    output = function(*leaves)
    torch.manual_seed(1)
    weight = torch.randn(output.shape, device=output.device).bfloat16().to(dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight)]


def masked_attention(query, key, value, mask):
    """Attention by one mask [T, T] of visible keys: query, key, value [1, H, T, D] → [1, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def plan_mask(lengths: list[int], prefixes: list[int | None], device) -> torch.Tensor:
    """Which token sees which, [T, T], token by token: its own segment up to itself, and all of its shared prefix."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    prefix = torch.tensor([-1 if p is None else p for p in prefixes])[segment]
    own = (segment[:, None] == segment) & torch.ones(len(segment), len(segment)).tril().bool()
    return (own | (prefix[:, None] == segment)).to(device)


def check_alignment(config, device, kernel: str, dtype) -> dict:
    """Segments that see a shared prefix, at the model's heads: the kernel against one mask in fp32, gradients too."""
    text = config.get_text_config()
    lengths, prefixes = [300, 17, 64, 1, 129, 40, 9], [None, 0, 0, 0, None, 4, 4]
    heads, dim = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    torch.manual_seed(0)
    tensors = [torch.randn(1, h, sum(lengths), dim, device=device).to(dtype)
               for h in (heads, text.num_key_value_heads, text.num_key_value_heads)]  # fmt: skip
    module = SimpleNamespace(is_causal=True)
    plan = mv.AttentionPlan.make(lengths, prefixes, device)
    mask = plan_mask(lengths, prefixes, device)
    ours = attend(lambda *qkv: mv.packed_attention(module, *qkv, None, plan=plan, kernel=kernel)[0], tensors, dtype)
    with sdpa_kernel(SDPBackend.MATH):  # no TF32 inside
        reference = attend(lambda *qkv: masked_attention(*qkv, mask), tensors, torch.float32)
    return {"relative error": max(relative_error([a], [b]) for a, b in zip(ours, reference)), "at most": 0.02}


def check_heads(device, kernel: str, dtype) -> dict:
    """The tower's check, at heads of 72, 128 and 256: the largest error."""
    return max((check_tower_heads(device, kernel, dtype, dim) for dim in (72, 128, 256)),
               key=lambda figures: figures["relative error"])  # fmt: skip


def check_masks(device, dtype) -> dict:
    """Attention by sdpa with a mask, against fp32: completions being decoded, and a prefix at 192 = 64 mod 128 keys.

    `cudnn_nan_gradients` is what cuDNN, which is switched off, gives with such a mask at large negative scores.
    """
    errors, module = [], SimpleNamespace(is_causal=True)
    for prefix, suffix in ((150, 42), (128, 64)):  # 192 keys
        lengths, prefixes = [prefix, suffix], [None, 0]
        torch.manual_seed(0)
        tensors = [torch.randn(1, h, sum(lengths), 128, device=device).to(dtype) for h in (8, 2, 2)]
        plan, mask = mv.AttentionPlan.make(lengths, prefixes, device), plan_mask(lengths, prefixes, device)
        decoded = mask[-suffix:][None, None]

        def packed(*qkv, plan=plan):
            return mv.packed_attention(module, *qkv, None, plan=plan, kernel="sdpa")[0]

        def decoding(q, k, v, decoded=decoded, suffix=suffix):
            return mv.packed_attention(module, q[:, :, -suffix:], k, v, decoded)[0]

        with sdpa_kernel(SDPBackend.MATH):  # no TF32 inside
            reference = attend(lambda *qkv, mask=mask: masked_attention(*qkv, mask), tensors, torch.float32)
        errors += [relative_error([a], [b]) for a, b in zip(attend(packed, tensors, dtype), reference)]
        ours = attend(decoding, tensors, dtype)[0]
        errors.append(relative_error([ours], [reference[0][:, -suffix:]]))
    figures = {"relative error": max(errors), "at most": 0.02}
    if torch.device(device).type == "cuda":
        q, k, v = (0.1 * torch.randn(1, 1, 704, 64, device=device, dtype=dtype) for _ in range(3))
        q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
        mask = torch.ones(704, 704, dtype=torch.bool, device=device).tril()[None, None]
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                output = F.scaled_dot_product_attention(q.requires_grad_(), k, v, mask)
            figures["cudnn_nan_gradients"] = int(torch.autograd.grad(output.sum(), q)[0].isnan().sum())
        except RuntimeError as error:
            figures["cudnn_nan_gradients"] = told(error)
    return figures


def check_tower_heads(device, kernel: str, dtype, dim: int = 80) -> dict:
    """Full attention inside chunks with the tower's 16 heads of 80, against a mask in fp32, gradients too."""
    lengths = [64] * 6 + [16] * 5 + [256] * 2 + [32]
    torch.manual_seed(0)
    tensors = [torch.randn(1, 16, sum(lengths), dim, device=device).to(dtype) for _ in range(3)]
    module = SimpleNamespace(is_causal=False)
    cu = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32)
    chunk = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    mask = chunk[:, None] == chunk

    def packed(*qkv):
        return mv.packed_attention(module, *qkv, None, kernel=kernel, cu_seq_lens_q=cu, max_length_q=max(lengths))[0]

    ours = attend(packed, tensors, dtype)
    with sdpa_kernel(SDPBackend.MATH):  # no TF32 inside
        reference = attend(lambda *qkv: masked_attention(*qkv, mask), tensors, torch.float32)
    return {"relative error": max(relative_error([a], [b]) for a, b in zip(ours, reference)), "at most": 0.02}


def check_recurrence(device, dtype, heads: int = 16) -> dict:
    """A gated delta net at Qwen3.5's head sizes: answers that go on from their prompt's state, gradients through it.

    Two of the answers are also decoded one token at a time, as in rollouts.
    The error against prompt + answer one by one in fp32 in plain torch, over that of the same layer one by one in low
    precision with the kernels that are installed.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
    kernels = "flash-linear-attention" if importlib.util.find_spec("fla") else "plain torch"
    config = qwen.Qwen3_5TextConfig(
        hidden_size=64 * heads, linear_num_key_heads=heads, linear_num_value_heads=heads * 2,
        layer_types=["linear_attention"], num_hidden_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = qwen.Qwen3_5GatedDeltaNet(config, 0).to(device)
    lengths, prefixes = [300, 17, 64, 1, 129, 40], [None, 0, 0, 0, None, 4]
    plan = mv.AttentionPlan.make(lengths, prefixes, device)
    row = torch.randn(1, sum(lengths), config.hidden_size, device=device)
    weight = torch.randn_like(row)  # of the sum whose gradients are compared

    def one_by_one(x):
        parts = x.split(lengths, 1)
        return torch.cat([layer(part) if prefix is None else layer(torch.cat([parts[prefix], part], 1))
                          [:, lengths[prefix] :] for part, prefix in zip(parts, prefixes)], 1)  # fmt: skip

    @contextlib.contextmanager
    def as_packed():
        layer.__class__ = mv.packed_class(qwen.Qwen3_5GatedDeltaNet)
        try:
            yield layer
        finally:
            layer.__class__ = qwen.Qwen3_5GatedDeltaNet

    def packed(x):
        with as_packed() as ours:
            return ours(x, plan=plan)

    def decoded():  # of the first two answers: [tokens, 2, D]
        prompt, *answers = row.split(lengths, 1)[:3]
        cache = transformers.DynamicCache(config=config)
        with as_packed() as ours, torch.no_grad(), torch.autocast(torch.device(device).type, dtype):
            ours(prompt, cache=cache, plan=mv.AttentionPlan.make(lengths[:1], device=device))
            cache = train_grpo.decoding_cache(
                config, [train_grpo.prompt_states(cache, 0, 0, lengths[0], lengths[0])], 2
            )
            tokens = [torch.stack([answer[0, t] for answer in answers])[None] for t in range(lengths[1])]
            return torch.cat([ours(token, cache=cache) for token in tokens]).float()

    def run(function, low):
        x = row.clone().requires_grad_()
        with torch.autocast(torch.device(device).type, dtype, enabled=low):
            output = function(x)
        gradients = torch.autograd.grad((output.float() * weight).sum(), [x, *layer.parameters()])
        return [output.detach().float(), *gradients]

    plain = {name: getattr(getattr(qwen, name), "__wrapped__", getattr(qwen, name)) for name in names}
    with mock.patch.multiple(qwen, **plain):
        reference = run(one_by_one, False)
    ours, theirs = (max(relative_error([a], [b]) for a, b in zip(run(function, True), reference))
                    for function in (packed, one_by_one))  # fmt: skip
    answers = [answer[0, : lengths[1]] for answer in reference[0].split(lengths, 1)[1:3]]
    ours = max(ours, relative_error([decoded()], [torch.stack(answers, 1)]))
    return {"ours": ours, "one by one": theirs, "ratio": ours / theirs, "at most": 1.5, "kernels": kernels}


def check_precision(bench) -> tuple[dict, dict]:
    """One sample through the same fp32 weights three times: HF in fp32, HF under bf16 autocast, ours under it.

    The error of the logits, ours over HF's own; the cosine of the gradients of the first, middle and last blocks, the
    merger and the last norm to those in fp32.
    """
    args = train_sft.SFTArguments(**bench.settings)
    args = dataclasses.replace(args, bf16=False)
    model = mv.load_model(args, bench.device, None, bench.language_model, copy.deepcopy(bench.config))
    depth, layers = bench.config.vision_config.depth, bench.config.get_text_config().num_hidden_layers
    chosen = {f"blocks.{i}" for i in (0, depth // 2, depth - 1)} | {
        f"layers.{i}" for i in (0, layers // 2, layers - 1)
    }
    for name, parameter in model.named_parameters():
        found = SECTION.search(name)
        section = found[1] if found else "language_model.norm" if "language_model.norm" in name else None
        parameter.requires_grad_(section in chosen | {"merger", "language_model.norm"})
    data = bench.data("sft", min(bench.scale.rows))
    sample, batch = (
        data.samples[:1],
        {k: v.to(bench.device) for k, v in padded(data.samples[:1], data.encoder).items()},
    )
    inputs, targets, _ = mv.pack(sample, data.encoder, bench.device)
    del batch["labels"]
    results = {}
    for name, low, ours in (("fp32", False, False), ("usual", True, False), ("ours", True, True)):
        mv.use_packed_attention(model, bench.kernel) if ours else model.set_attn_implementation("sdpa")
        exact = contextlib.nullcontext() if low else sdpa_kernel(SDPBackend.MATH)
        with exact, torch.autocast(bench.device.type, torch.bfloat16, enabled=low):
            if ours:
                logits = model(**inputs).logits
            else:
                logits = model(**batch, use_cache=False).logits[:, inputs["logits_to_keep"]]
            loss = train_sft.sft_loss(logits, targets)
        loss.backward()
        results[name] = [logits.detach().float()], [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)

    def cosine(a, b):
        dot, aa, bb = (sum((x.double() * y.double()).sum().item() for x, y in zip(*pair))
                       for pair in ((a, b), (a, a), (b, b)))  # fmt: skip
        return dot / math.sqrt(aa * bb)

    (reference, gradients), usual, ours = results["fp32"], results["usual"], results["ours"]
    errors = [relative_error(way[0], reference) for way in (ours, usual)]
    cosines = [cosine(way[1], gradients) for way in (ours, usual)]
    return ({"ours": errors[0], "HF in bf16": errors[1], "ratio": errors[0] / errors[1], "at most": 1.2},
            {"ours": cosines[0], "HF in bf16": cosines[1], "at least": 0.999})  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what is measured


def list_cells(scale: Scale, ways: list[str]) -> list[dict]:
    """Everything that is to be measured, what tells most first."""

    def steps(objective, parameters, checkpointing, sizes):
        return [{"part": "training", "objective": objective, "parameters": parameters, "checkpointing": checkpointing,
                 "pixels": size, "way": way} for size in sizes for way in ways]  # fmt: skip

    sizes = list(scale.rows)
    middle, others = sizes[1:2], sizes[:1] + sizes[2:]
    parts = [{"part": part, "pixels": size} for part in ("tower", "attention") for size in sizes]
    more = [{"part": part, "pixels": sizes[0]} for part in ("packing", "rollouts", "optimizer")]
    decoding = [{"part": "decoding", "pixels": sizes[0], "way": way} for way in ("ours", "usual", "static, compiled")]
    return [
        *steps("sft", "lora", True, sizes), *more, *steps("dpo", "lora", True, sizes),
        *steps("grpo", "lora", True, middle),
        *steps("sft", "all", True, sizes), *steps("cls", "lora and head", True, sizes), *parts,
        *steps("sft", "lora", False, sizes), *steps("dpo", "lora", False, sizes), *decoding,
        *steps("sft", "all", False, sizes), *steps("cls", "lora and head", False, sizes),
        *steps("grpo", "lora", True, others), *steps("grpo", "lora", False, sizes),
    ]  # fmt: skip


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.300}"


class Skipped(Exception):
    """A cell that is not measured, and why."""


@dataclass
class Data:
    """Samples of an objective at one size: encoded, and as the usual way's batch."""

    records: list
    encoder: RandomPixels
    samples: list[dict]
    batch: dict
    rollouts: dict  # of each way: the completions and the seconds they took


class Bench:
    """One run: the model that is loaded at the moment, the samples, the clock, and the results so far."""

    def __init__(self, options, folder: Path):
        self.options, self.device = options, torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.kernel = "varlen" if self.cuda else "sdpa"
        self.scale = TINY if options.model == "tiny" else REAL
        processor = build_processor("qwen2_5_vl")
        self.config = make_config(options.model, processor.tokenizer)
        self.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        self.settings = dict(
            model_id=str(folder), nframes=FRAMES, learning_rate=1e-6, bf16=True, output_dir=str(folder)
        )
        self.accelerator = accelerate.Accelerator(cpu=not self.cuda)
        self.language_model = RandomWeights(transformers.Qwen2_5_VLForConditionalGeneration, self.device)
        flash = self.cuda and importlib.util.find_spec("flash_attn")
        ways = ["ours", "usual"] + (["usual, flash-attn"] if flash else [])
        self.cells = [{**cell, "status": "not reached"} for cell in list_cells(self.scale, ways)]
        self.loaded = self.engine = self.model = self.args = self.memory = None
        self.unloadable, self.made, self.measuring = {}, {}, False

    # ---- time and memory

    def left(self) -> float:
        """Seconds until nothing new is begun."""
        return self.options.minutes * 60 - (time.monotonic() - STARTED)

    def wait(self):
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, function, repetitions: int, most_seconds: float = 20.0) -> list[float]:
        """Seconds of each repetition, as many as fit; the caller has warmed up."""
        times = []
        while len(times) < repetitions and (not times or sum(times) + times[-1] < most_seconds):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - started)
        return times

    def clean(self):
        """Give back what a cell has left."""
        if self.model is not None:
            self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    # ---- models and samples

    def drop(self):
        """Free the loaded model."""
        self.loaded = self.engine = self.model = self.args = self.memory = None
        self.accelerator.free_memory()
        if self.cuda:
            torch.compiler.reset()  # compiled graphs hold on to weights
        self.clean()

    def recipe(self, checkpointing: bool) -> dict:
        """How all weights are trained: with 8-bit Adam, else in 32 bits, else in pure bf16, the first that fits.

        Raises:
            Skipped: none of them fits into the device's memory.
        """
        room = torch.cuda.get_device_properties(self.device).total_memory / 2**30 if self.cuda else math.inf
        recipes = [dict(bf16=True, optim="adamw_torch_fused"), dict(pure_bf16=True, optim="adamw_torch_fused")]
        if self.cuda and importlib.util.find_spec("bitsandbytes"):
            recipes.insert(0, dict(bf16=True, optim="adamw_bnb_8bit"))
        needs = []
        for recipe in recipes:
            args = train_sft.SFTArguments(**{**self.settings, "bf16": False, **recipe,
                                             "gradient_checkpointing": checkpointing})  # fmt: skip
            needs.append(self.predicted(MemoryModel(args, read_launcher(None, None)), min(self.scale.rows)))
            if needs[-1] < room:
                return recipe
        raise Skipped(
            f"training all weights needs {min(needs):.0f} GiB by tools/gpu_memory.py, the device has {room:.0f}"
        )

    def predicted(self, memory: MemoryModel, pixels: int) -> float:
        """Peak memory in GiB of an SFT step, as check_data.py predicts it."""
        samples = self.data("sft", pixels).samples
        tokens, patches = (sum(len(sample[name]) for sample in samples) for name in ("input_ids", "patches"))
        return memory.peak(tokens, patches, sum(int((sample["labels"] != -100).sum()) for sample in samples))["gib"]

    def load(self, parameters: str, checkpointing: bool = False):
        """Make the model that a cell needs, as its trainer would, unless it is there already."""
        key = (parameters, checkpointing)
        if key == self.loaded:
            return
        self.drop()
        if key in self.unloadable:
            raise Skipped(self.unloadable[key])
        settings, model_class, config = {**self.settings, "gradient_checkpointing": checkpointing}, None, self.config
        try:
            if parameters == "all":
                settings |= {"bf16": False, **self.recipe(checkpointing)}
            elif parameters == "plain":
                settings |= {"bf16": False, "pure_bf16": True}
            else:
                frozen = dict.fromkeys(["freeze_llm", "freeze_vision_tower", "freeze_merger"], True)
                settings |= {**frozen, "lora_enable": True, "lora_namespan_exclude": "['lm_head', 'embed_tokens']"}
            if parameters == "lora and head":
                model_class = RandomWeights(train_cls.classifier_class("qwen2_5_vl"), self.device)
                config = self.classes()
                self.args = train_cls.ClassificationArguments(**settings, loss_type="cross_entropy")
            else:
                self.args = train_sft.SFTArguments(**settings)
            model = mv.load_model(
                self.args, self.device, None, model_class or self.language_model, copy.deepcopy(config)
            )
            if parameters == "plain":
                self.model = model.eval()
            else:
                self.engine = mv.Engine(self.accelerator, model.train(), self.args)
                self.model = self.engine.raw_model
        except Exception as error:  # other cells need the same model: it is not tried again
            self.unloadable[key] = str(error) if isinstance(error, Skipped) else f"no model: {type(error).__name__}"
            raise
        if hasattr(self.base(), "generation_config") and self.base().generation_config is not None:
            self.base().generation_config.eos_token_id = None  # no completion ends early, in either way
        self.loaded = key

    def base(self):
        """The HF model, inside its adapter if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def classes(self):
        """The config of a classifier of two classes."""
        features = datasets.Features.from_arrow_schema(train_cls.FEATURES)
        records = datasets.Dataset.from_list([make_record("cls", 1, i) for i in range(2)], features=features)
        args = train_cls.ClassificationArguments(**self.settings, loss_type="cross_entropy")
        return train_cls.make_config(records, args, self.data("cls", min(self.scale.rows)).encoder)

    def data(self, objective: str, pixels: int) -> Data:
        """Samples of one row, made once."""
        if (objective, pixels) not in self.made:
            args = train_sft.SFTArguments(**self.settings, video_resized_width=pixels, video_resized_height=pixels)
            encoder = RandomPixels(args.model_id, args)
            encoder.end_of_turn = -1 if objective == "grpo" else encoder.end_of_turn
            count = {"dpo": max(1, self.scale.rows[pixels] // 2), "grpo": 1}.get(objective, self.scale.rows[pixels])
            records = [make_record(objective, self.scale.videos, i) for i in range(count)]
            samples = [encoder(record, "") for record in records]
            batch = padded(samples, encoder)
            batch = {name: value.pin_memory() for name, value in batch.items()} if self.cuda else batch
            self.made[objective, pixels] = Data(records, encoder, samples, batch, {})
        return self.made[objective, pixels]

    def attention_of(self, way: str):
        """Switch the loaded model to the attention of a way."""
        if way == "ours":
            mv.use_packed_attention(self.model, self.kernel)
        else:
            self.base().set_attn_implementation("flash_attention_2" if "flash" in way else "sdpa")

    # ---- training steps: each gives its loss

    def update(self, loss_of):
        """Forward, backward and the optimizer's step, as in the trainers."""
        with self.engine.row(True):
            with self.engine.autocast():
                loss = loss_of(self.engine.model)
            self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def usual_batch(self, data: Data) -> dict:
        return {name: value.to(self.device, non_blocking=True) for name, value in data.batch.items()}

    def sft(self, way, data):
        if way == "ours":
            inputs, targets, _ = mv.pack(data.samples, data.encoder, self.device)
            return self.update(lambda model: train_sft.sft_loss(model(**inputs).logits, targets) / len(targets))
        batch = self.usual_batch(data)
        return self.update(lambda model: model(**batch, use_cache=False).loss)

    def dpo(self, way, data):
        pairs = len(data.samples)
        args = train_dpo.DPOArguments()
        if way == "ours":
            row = mv.pack(data.samples, data.encoder, self.device)
            ref_logps = train_dpo.reference_logps(self.engine, row, range(pairs), data.samples)

            def ask(model):
                return train_dpo.answer_logps(model(**row[0]).logits, *row[1:], pairs)

        else:
            batch = self.usual_batch(data)
            labels = batch.pop("labels")[:, 1:]

            def ask(model):
                logits = model(**batch, use_cache=False).logits[:, :-1]  # [2 · pairs, T − 1, V]
                chosen = logits.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0].float()
                normalizer = torch.stack([row.float().logsumexp(-1) for row in logits])  # row by row, to save memory
                kept = labels != -100
                return ((chosen - normalizer) * kept).sum(1).view(-1, 2), kept.sum(1).view(-1, 2)

            self.model.eval()
            with torch.no_grad(), self.model.disable_adapter(), self.engine.autocast():
                ref_logps, _ = ask(self.engine.model)
            self.model.train()

        def loss_of(model):
            logps, lengths = ask(model)
            return train_dpo.loss_sums(logps, ref_logps, lengths, args).sum() / pairs

        return self.update(loss_of)

    def cls(self, way, data):
        config, count = self.base().config, len(data.samples)
        if way == "ours":
            inputs, targets = train_cls.pack(data.samples, data.encoder, config, self.device)
            return self.update(
                lambda model: train_cls.objective(model(**inputs).logits, targets, self.args, None) / count
            )
        batch = self.usual_batch(data)
        batch["labels"] = train_cls.encode_targets(data.samples, config).to(self.device)
        return self.update(lambda model: model(**batch, use_cache=False).loss)

    def grpo_arguments(self, new_tokens: int):
        return train_grpo.GRPOArguments(num_generations=self.scale.generations, beta=0.0, epsilon_high=0.2,
                                        max_completion_length=new_tokens)  # fmt: skip

    def rollout(self, way, data, new_tokens):
        """G completions of one prompt: ours as groups, the usual way's as tokens [G, new_tokens]."""
        args = self.grpo_arguments(new_tokens)
        if way == "ours":
            with self.engine.gathered():
                groups = train_grpo.make_groups(
                    self.engine, data.samples, [0], data.records, data.encoder, args, 0, ()
                )
            groups[0]["advantages"] = torch.linspace(-1, 1, args.num_generations)
            return groups
        prompt = self.repeated_prompt(data)
        self.model.eval()
        with self.engine.autocast():
            output = self.base().generate(
                **prompt, max_new_tokens=new_tokens, do_sample=True, top_k=args.top_k, temperature=args.temperature,
                suppress_tokens=data.encoder.vision_ids,
            )  # fmt: skip
        self.model.train()
        return output[:, prompt["input_ids"].shape[1] :]

    def repeated_prompt(self, data) -> dict:
        """The usual way's prompt and its pixels, once for each completion."""
        return {name: torch.cat([value] * self.scale.generations, dim=int(name == "position_ids"))
                for name, value in self.usual_batch(data).items() if name != "labels"}  # fmt: skip

    def grpo(self, way, data):
        """An update on the completions that rollout gave; rewards are left out."""
        args, completions = self.grpo_arguments(self.scale.new_tokens), data.rollouts[way][0]
        G = args.num_generations
        if way == "ours":
            stops = train_grpo.end_tokens(self.model, data.encoder)
            batch = train_grpo.pack_groups(completions, data.encoder, stops, args, self.device)
            inputs, targets, sequences = batch["inputs"], batch["targets"], batch["sequences"]
            totals = {"completions": G, "supervised_tokens": len(targets)}
            weights = train_grpo.token_weights(batch["lengths"], batch["learned"], totals, args)

            def logps_of(model):
                return mv.token_logps(model(**inputs).logits, targets, args.temperature)

        else:
            longer = {"input_ids": completions, "attention_mask": torch.ones_like(completions),
                      "mm_token_type_ids": torch.zeros_like(completions, dtype=torch.int32)}  # fmt: skip
            prompt = self.repeated_prompt(data)
            inputs = {k: torch.cat([v, longer[k]], 1) if k in longer else v for k, v in prompt.items()}
            inputs["position_ids"] = mv.qwen_position_ids(inputs, data.encoder.config)
            sequences = torch.arange(G, device=self.device).repeat_interleave(completions.shape[1])
            weights = torch.full((G,), 1 / len(sequences), device=self.device)

            def logps_of(model):
                logits = model(**inputs, use_cache=False, logits_to_keep=completions.shape[1] + 1).logits[:, :-1]
                logits = logits / args.temperature
                chosen = logits.gather(2, completions[..., None])[..., 0].float()
                return (chosen - torch.stack([row.float().logsumexp(-1) for row in logits])).flatten()

        advantages = torch.linspace(-1, 1, G, device=self.device)

        def loss_of(model):
            logps = logps_of(model)
            return train_grpo.grpo_loss(logps, logps.detach(), None, advantages, sequences, weights, args)[0]

        return self.update(loss_of)

    def flops(self, objective: str, data: Data) -> int:
        """Useful FLOPs of a step of ours."""
        G, L, samples = self.scale.generations, self.scale.new_tokens, data.samples
        if objective == "grpo":
            ids = [0] * L
            samples = [mv.add_suffixes(samples[0], [(ids, ids)] * G)]
        inputs, _, _ = mv.pack(samples, data.encoder, "cpu")
        if objective == "cls":
            inputs["logits_to_keep"] = inputs["logits_to_keep"].new_zeros(len(samples))
        work = row_work(inputs, self.config)
        total = model_flops(self.model, self.config, work)
        if objective == "dpo":  # the reference is the model without its adapter
            total += model_flops(self.model, self.config, work, backward=False, adapter=False)
        if objective == "grpo":
            prompt = int(samples[0]["lengths"][0])
            prefill = dataclasses.replace(work, tokens=prompt, kept=1, pairs=prompt * (prompt + 1) // 2)
            steps = G * (L - 1)  # the last token is not read
            seen = G * sum(prompt + t for t in range(1, L))
            decode = Work(steps, 0, steps, seen, 0, 0)
            total += sum(model_flops(self.model, self.config, part, backward=False) for part in (prefill, decode))
        return total

    def training(self, cell: dict) -> dict:
        """Seconds, throughput, utilisation and peak memory of one objective's step."""
        objective, pixels, way = cell["objective"], cell["pixels"], cell["way"]
        data = self.data(objective, pixels)
        self.load(cell["parameters"], cell["checkpointing"])
        self.attention_of(way)
        step, rollout = getattr(self, objective), 0.0
        if objective == "grpo":
            if way not in data.rollouts:  # once: with and without checkpointing it is the same
                self.rollout(way, data, min(8, self.scale.new_tokens))
                kept = []
                rollout = self.clock(lambda: kept.append(self.rollout(way, data, self.scale.new_tokens)), 1)
                data.rollouts[way] = kept[0], rollout[0]
            rollout = data.rollouts[way][1]
        loss = float(step(way, data))
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [rollout + seconds for seconds in self.clock(lambda: step(way, data), self.scale.repetitions)]
        seconds, flops = statistics.median(times), self.flops(objective, data)
        result = {
            "seconds": times, "samples_per_second": len(data.samples) / seconds, "samples": len(data.samples),
            "model_tflop": flops / 1e12, "mfu": flops / seconds / self.peak_flops if self.peak_flops else None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None, "first_loss": loss,
            "tokens": int(data.batch["attention_mask"].sum()) if way != "ours" else
            sum(len(sample["input_ids"]) for sample in data.samples),
        }  # fmt: skip
        if objective == "sft" and way == "ours":
            self.memory = self.memory or MemoryModel(self.args, read_launcher(None, None))
            result["predicted_gib"] = self.predicted(self.memory, pixels)
        if objective == "grpo":
            result["rollout_seconds"] = rollout
        if cell["parameters"] == "all":
            result["recipe"] = f"{'pure bf16' if self.args.pure_bf16 else 'bf16 autocast'}, {self.args.optim}"
        return result

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of the device; None: not known."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else ""
        return next((peak for key, peak in PEAKS.items() if all(word in name for word in key.split())), None)

    # ---- parts

    def tower(self, cell: dict) -> dict:
        """The tower's forward pass on one row: HF's loop over chunks, one batched sdpa call, one varlen call."""
        self.load("plain")
        visual, data = self.model.model.visual, self.data("sft", cell["pixels"])
        pixels, grid = (data.batch[name].to(self.device) for name in ("pixel_values_videos", "video_grid_thw"))
        pixels, result = pixels.to(torch.bfloat16), {}
        for name in ("sdpa", "flash_packed_sdpa", *(["flash_packed_varlen"] if self.cuda else [])):
            if name != "sdpa":
                mv.use_packed_attention(visual, name.removeprefix("flash_packed_"))
            visual.config._attn_implementation = name
            with torch.no_grad():
                visual(pixels, grid_thw=grid)
                times = self.clock(lambda: visual(pixels, grid_thw=grid), self.scale.repetitions, 5)
            result[{"sdpa": "loop", "flash_packed_sdpa": "one sdpa call"}.get(name, "one varlen call")] = times
        return {"seconds": result, "patches": len(pixels), "chunks": int(grid[:, 0].sum())}

    def attention(self, cell: dict) -> dict:
        """One layer's attention on [prompt, c1 … cG], forward and backward: varlen, sdpa per segment, one mask."""
        text, (sample,) = self.config.get_text_config(), self.data("grpo", cell["pixels"]).samples
        lengths = [len(sample["input_ids"])] + [self.scale.new_tokens] * self.scale.generations
        prefixes = [None] + [0] * self.scale.generations
        heads, dim = text.num_attention_heads, text.hidden_size // text.num_attention_heads
        torch.manual_seed(0)
        tensors = [torch.randn(1, h, sum(lengths), dim, device=self.device, dtype=torch.bfloat16, requires_grad=True)
                   for h in (heads, text.num_key_value_heads, text.num_key_value_heads)]  # fmt: skip
        plan, module = mv.AttentionPlan.make(lengths, prefixes, self.device), SimpleNamespace(is_causal=True)
        mask = plan_mask(lengths, prefixes, self.device)
        ways = {"varlen": lambda: mv.packed_attention(module, *tensors, None, plan=plan, kernel="varlen")[0],
                "sdpa per segment": lambda: mv.packed_attention(module, *tensors, None, plan=plan, kernel="sdpa")[0],
                "sdpa with a mask": lambda: masked_attention(*tensors, mask)}  # fmt: skip
        if not self.cuda:
            del ways["varlen"]
        result = {}
        for name, way in ways.items():

            def both(way=way):
                output = way()
                torch.autograd.grad(output, tensors, torch.ones_like(output))

            both()
            result[name] = self.clock(both, 3 * self.scale.repetitions, 3)
        return {"seconds": result, "tokens": sum(lengths)}

    def packing(self, cell: dict) -> dict:
        """Forward and backward (SFT, LoRA) of rows of 1 to 16 samples, and of 16k tokens at the largest size.

        Eager, then with compiled blocks; `enqueued` is when the host has launched all and waits.
        """
        self.load("lora", True)
        self.attention_of("ours")
        small, large = (self.data("sft", size) for size in (cell["pixels"], max(self.scale.rows)))
        rows = {
            f"{n} samples": (small, (small.samples * 16)[:n]) for n in ((1, 4, 8, 16) if self.scale is REAL else (2,))
        }
        longest = len(large.samples[0]["input_ids"])
        count = max(1, round(16_000 / longest)) if self.scale is REAL else 2
        rows[f"{count * longest:,} tokens"] = large, (large.samples * count)[:count]
        result, utilisation = {}, {}

        def step(inputs, targets):
            with self.engine.row(True):
                with self.engine.autocast():
                    loss = train_sft.sft_loss(self.engine.model(**inputs).logits, targets) / len(targets)
                self.engine.backward(loss)

        for way in ("eager", "compiled") if self.cuda else ("eager",):
            if way == "compiled":
                mv.compile_blocks(self.model)
            for name, (data, samples) in rows.items():
                inputs, targets, _ = mv.pack(samples, data.encoder, self.device)
                step(inputs, targets)
                enqueued = []

                def timed(inputs=inputs, targets=targets, enqueued=enqueued):
                    started = time.perf_counter()
                    step(inputs, targets)
                    enqueued.append(time.perf_counter() - started)

                times = self.clock(timed, self.scale.repetitions, 5)
                result |= {f"{way}, {name}": times, f"{way}, {name}, enqueued": enqueued}
                if self.peak_flops:
                    flops = model_flops(self.model, self.config, row_work(inputs, self.config))
                    utilisation[f"{way}, {name}"] = flops / statistics.median(times) / self.peak_flops
        self.drop()  # with its compiled blocks
        return {"seconds": result, "mfu": utilisation}

    def rollouts(self, cell: dict) -> dict:
        """Seconds per decoded token of a rollout of 1 and of 8 prompts."""
        self.load("plain")
        self.attention_of("ours")
        data, length, G = self.data("grpo", cell["pixels"]), self.scale.new_tokens // 2, self.scale.generations
        args = train_grpo.GRPOArguments(max_completion_length=length, temperature=1.0, num_generations=G, top_k=0)
        engine = SimpleNamespace(raw_model=self.model, autocast=contextlib.nullcontext,
                                 accelerator=SimpleNamespace(device=self.device))  # fmt: skip
        result = {}
        for prompts in (1, 8) if self.scale is REAL else (2,):
            draws = [np.random.default_rng(i).random((G, length)) for i in range(prompts)]

            def complete(prompts=prompts, draws=draws):
                train_grpo.generate(engine, (data.samples * 8)[:prompts], data.encoder, args, draws)

            complete()
            times = self.clock(complete, self.scale.repetitions, 10)
            result[f"{prompts} prompts, per token"] = [seconds / length for seconds in times]
        return {"seconds": result}

    def optimizer(self, cell: dict) -> dict:
        """One step of AdamW alone, on 1,000 million weights in fp32: foreach, fused, 8-bit."""
        self.drop()
        count, size = (100, 10**7) if self.scale is REAL else (4, 1000)
        ways = {name: functools.partial(torch.optim.AdamW, **{name: True}) for name in ("foreach", "fused")}
        if self.cuda and importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes

            ways["8-bit"] = bitsandbytes.optim.AdamW8bit
        result = {}
        for name, kind in ways.items():
            weights = [torch.nn.Parameter(torch.zeros(size, device=self.device)) for _ in range(count)]
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer = kind(weights)
            optimizer.step()
            result[name] = self.clock(optimizer.step, self.scale.repetitions, 3)
            del optimizer, weights, weight
            self.clean()
        return {"seconds": result}

    def decoding(self, cell: dict) -> dict:
        """Tokens per second of one greedy completion, prompt included: ours, HF generate, HF generate compiled."""
        self.load("plain")
        data, length = self.data("grpo", cell["pixels"]), self.scale.new_tokens // 2
        self.attention_of(cell["way"])
        result = {"tokens": length}
        if cell["way"] == "ours":
            args = train_grpo.GRPOArguments(max_completion_length=length, temperature=1.0)
            engine = SimpleNamespace(raw_model=self.model, autocast=contextlib.nullcontext,
                                     accelerator=SimpleNamespace(device=self.device))  # fmt: skip

            def complete(most=length):
                args.max_completion_length = most
                train_grpo.generate(engine, data.samples, data.encoder, args)

            complete(4)
        else:
            prompt = self.usual_batch(data)
            del prompt["labels"]
            static = {}
            if cell["way"] == "static, compiled":
                compiled = transformers.CompileConfig(mode="reduce-overhead")
                static = {"cache_implementation": "static", "compile_config": compiled}

            def complete(most=length):
                self.base().generate(**prompt, max_new_tokens=most, do_sample=False, **static,
                                     suppress_tokens=data.encoder.vision_ids)  # fmt: skip

            started = time.perf_counter()
            complete(length if static else 4)
            self.wait()
            if static:
                result |= {"first_call_seconds": time.perf_counter() - started, "compiled": self.cuda}
        times = self.clock(complete, 2 if cell["way"] == "static, compiled" else 1)
        return result | {"seconds": times, "tokens_per_second": length / min(times)}

    # ---- the run

    def check(self) -> dict:
        """The checks: their figures, whether they hold, or why they are skipped."""
        skipped, half = {"skipped": "variable-length attention needs CUDA"}, torch.bfloat16
        todo = {
            ("causal alignment",): lambda: [check_alignment(self.config, self.device, self.kernel, half)],
            ("head dimension 80",): lambda: [check_tower_heads(self.device, self.kernel, half)],
            ("other head dimensions",): lambda: [check_heads(self.device, self.kernel, half)],
            ("masks",): lambda: [check_masks(self.device, half)],
            ("states that answers go on from",): lambda: [check_recurrence(self.device, half, 16 if self.cuda else 2)],
            ("bf16 error", "gradients"): lambda: check_precision(self),
        }
        checks = {}
        for names, check in todo.items():
            try:
                self.measuring = True
                on_cpu = {"bf16 error", "states that answers go on from"} & {*names}
                figures = check() if self.cuda or on_cpu else [skipped]
            except OutOfTime:
                figures = [{"skipped": "not reached"} for _ in names]
            except Exception as error:  # does not hold; what can be measured all the same is measured
                figures = [{"failed": told(error)} for _ in names]
            finally:
                self.measuring = False
            checks |= zip(names, figures)
        for figures in checks.values():
            value = figures.get("relative error", figures.get("ratio", figures.get("ours")))
            if "at most" in figures:
                figures["holds"] = bool(value <= figures["at most"])
            elif "at least" in figures:
                figures["holds"] = bool(value >= figures["at least"])
            elif "failed" in figures:
                figures["holds"] = False
        self.clean()
        return checks

    def run(self, cell: dict):
        """Measure a cell and put into it what came out."""
        needed = {"decoding": 120 if cell.get("way") == "static, compiled" else 30, "training": 10}.get(
            cell["part"], 5
        )
        needed = 45 if cell.get("objective") == "grpo" else needed
        if self.left() < (needed if self.scale is REAL else 0):
            return
        try:
            self.measuring = True
            cell |= {**getattr(self, cell["part"])(cell), "status": "measured"}
        except Skipped as error:
            cell["status"] = f"skipped: {error}"
        except torch.OutOfMemoryError:
            cell["status"] = "out of memory"
        except OutOfTime:
            cell["status"] = "not reached (begun, stopped)"
        except (
            Exception
        ) as error:  # one cell is lost, named in the table and in the exit code; the others are measured
            cell["status"] = f"failed: {told(error)}"
        finally:
            self.measuring = False
        self.clean()


# ------------------------------------------------------------------------------------------------------------ output


def where_and_when(options) -> dict:
    """Device, driver, versions, date."""
    device, driver = "CPU", None
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0] or None
    import peft

    return {"device": device, "driver": driver, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if device != "CPU" else None,
            "sdpa": ", ".join(name for name in ("flash", "mem_efficient", "cudnn", "math")
                              if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()),
            "transformers": transformers.__version__, "accelerate": accelerate.__version__,
            "peft": peft.__version__}  # fmt: skip


def table(name: str, run: dict) -> list[str]:
    """The results of one model as Markdown."""
    where = run["where"]
    lines = [f"## {name}, random weights: {where['device']}", ""]
    for check, figures in run["checks"].items():
        listed = ", ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in figures.items() if key != "holds")  # fmt: skip
        lines.append(f"- {check}: {listed}" + ("" if figures.get("holds", True) else " — DOES NOT HOLD"))
    training = [cell for cell in run["cells"] if cell["part"] == "training"]
    ways = list(dict.fromkeys(cell["way"] for cell in training))
    heads = [f"{way}: s | samples/s | FLOP utilisation | peak GiB" for way in ways]
    lines += ["", f"| step | checkpointing | samples | {' | '.join(heads)} | usual / ours |",
              "|---|---|---" + "|---" * (4 * len(ways) + 1) + "|"]  # fmt: skip

    def number(value, form):
        return "–" if value is None else format(value, form)

    def median(values):
        return f"{statistics.median(values):.4f}"

    def measured(cell):
        if cell["status"] != "measured":
            return f"{cell['status']} | | |"
        rollout = f" (rollout {cell['rollout_seconds']:.2f})" if "rollout_seconds" in cell else ""
        memory = number(cell["peak_gib"], ".2f")
        memory += f" (predicted {cell['predicted_gib']:.2f})" if "predicted_gib" in cell and cell["peak_gib"] else ""
        return (f"{median(cell['seconds'])}{rollout} | {cell['samples_per_second']:.3f} | "
                f"{number(cell['mfu'], '.1%')} | {memory}")  # fmt: skip

    steps = {}
    for cell in training:
        step = (cell["objective"], cell["parameters"], not cell["checkpointing"], cell["pixels"])
        steps.setdefault(step, {})[cell["way"]] = cell
    for (objective, parameters, kept, pixels), cells in sorted(steps.items()):
        samples = next((str(cell["samples"]) for cell in cells.values() if "samples" in cell), "")
        rates = [cells[way].get("samples_per_second") for way in ("ours", "usual")]
        ratio = f"{rates[0] / rates[1]:.2f}×" if all(rates) else ""
        recipe = next((f": {cell['recipe']}" for cell in cells.values() if "recipe" in cell), "")
        lines.append(f"| {objective}, {pixels} px, {parameters}{recipe} | {'no' if kept else 'yes'} | {samples} | "
                     f"{' | '.join(measured(cells[way]) for way in ways)} | {ratio} |")  # fmt: skip
    lines += ["", "| part | | s | FLOP utilisation |", "|---|---|---|---|"]
    for cell in run["cells"]:
        if cell["part"] == "training":
            continue
        title = f"{cell['part']}, {cell['pixels']} px"
        if cell["status"] != "measured":
            lines.append(f"| {title} | {cell.get('way', '')} | {cell['status']} | |")
        elif cell["part"] == "decoding":
            first = f", first call {cell['first_call_seconds']:.1f} s" if "first_call_seconds" in cell else ""
            lines.append(f"| {title} | {cell['way']} | {median(cell['seconds'])} for {cell['tokens']} tokens: "
                         f"{cell['tokens_per_second']:.1f} tokens/s{first} | |")  # fmt: skip
        else:
            used = {way: format(value, ".1%") for way, value in cell.get("mfu", {}).items()}
            lines += [f"| {title} | {way} | {median(times)} | {used.get(way, '')} |"
                      for way, times in cell["seconds"].items()]  # fmt: skip
    versions = ", ".join(f"{key} {value}" for key, value in where.items() if key != "device" and value)
    lines += ["", f"Medians; {run['seconds']:.0f} s in all; {versions}.", "", UTILISATION, ""]
    missing = [cell for cell in run["cells"] if cell["status"].startswith("not reached")]
    if missing:
        names = dict.fromkeys(" ".join(str(cell[key]) for key in ("part", "objective", "parameters") if key in cell)
                              for cell in missing)  # fmt: skip
        lines.append(f"- no time was left for {len(missing)} of {len(run['cells'])}: {', '.join(names)}")
    lines += [f"- {note}" for note in run["skipped"]]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, choices=["cuda", "cpu"], help="what to measure on")
    parser.add_argument("--model", default="3b", choices=list(MODELS), help="shapes; tiny is for tests on a CPU")
    parser.add_argument("--random_weights", action="store_true", help="there is no other way: nothing is downloaded")
    parser.add_argument("--minutes", type=float, default=6.5, help="nothing new is begun after so many")
    parser.add_argument("--output_dir", default="benchmarks", help="folder for the table and the JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device; --device cpu --model tiny runs the same code")
    gc.freeze()  # what the imports made is not looked through after every cell
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is the reference
    output, name = Path(options.output_dir), "gpu" if options.device == "cuda" else "gpu-on-cpu"
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, Path(temporary))
        run = {"where": where_and_when(options), "checks": {}, "cells": bench.cells, "seconds": 0.0, "skipped": [
            f"{module} is not installed: {without}" for module, without in OPTIONAL.items()
            if importlib.util.find_spec(module) is None]}  # fmt: skip
        if not bench.peak_flops:
            run["skipped"].append(f"FLOP utilisation: the peak of {run['where']['device']} is not known here")
        results[options.model] = run

        def save():
            run["seconds"] = time.monotonic() - STARTED
            mv.write_json(file, results)
            lines = ["# Training steps on one GPU", ""]
            for model, held in results.items():
                lines += [*table(model, held), ""]
            (output / f"{name}.md").write_text("\n".join(lines))

        def out_of_time(*_):
            if bench.measuring:
                raise OutOfTime

        def give_up():  # where no signal ends what is being measured: a kernel that hangs
            run["skipped"].append("ended by force: what was being measured did not return")
            save()
            os._exit(1)

        watchdog = threading.Timer(max(1.0, bench.left() + 75), give_up)
        watchdog.daemon = True
        watchdog.start()
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, bench.left() + 25), 5)  # again, should a library have caught it
        run["checks"] = bench.check()
        print(
            "\n".join(f"check {check}: {json.dumps(figures)}" for check, figures in run["checks"].items()), flush=True
        )
        save()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the trainers' --tf32
        for cell in bench.cells:
            bench.run(cell)
            save()
            figures = {key: value for key, value in cell.items() if key in ("seconds", "peak_gib", "mfu")}
            names = [str(cell[key]) for key in ("part", "objective", "parameters", "checkpointing", "pixels", "way")
                     if key in cell]  # fmt: skip
            print(f"{time.monotonic() - STARTED:6.1f} s  {' '.join(names)}: {cell['status']} {figures}", flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
        watchdog.cancel()
        save()
    print("\n".join(table(options.model, run)))
    wrong = [check for check, figures in run["checks"].items() if not figures.get("holds", True)]
    wrong += [f"{cell['part']} {cell.get('objective', '')}: {cell['status']}" for cell in bench.cells
              if cell["status"].startswith("failed")]  # fmt: skip
    if wrong:
        raise SystemExit("does not hold, or failed:\n  • " + "\n  • ".join(wrong))


if __name__ == "__main__":
    main()
