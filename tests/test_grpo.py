"""train_grpo.py: rollouts, objective and rewards held against the plain HF model, TRL 1.16 and hand-made values."""

import copy
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import types
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import multivideo as mv

import numpy as np
import pytest
import torch
import upstream_commands
from reference import hf_inputs
from safetensors.torch import load_file
from test_packing import clips, close_gradients  # noqa: F401
from test_train import ROOT, demo, metrics  # noqa: F401
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import train_grpo as grpo

LENGTHS = [30, 1, 2, 0]  # videos of the prompts below


@pytest.fixture(scope="module")
def prompts():
    """Prompts with thirty videos, one video, an image and a video, and text alone; each with an answer."""
    raw = [
        {"video": [f"{i}.mp4" for i in range(30)], "conversations": [
            {"from": "human", "value": "What do these show?"}, {"from": "gpt", "value": "Noise."}]},
        {"video": "large.mp4", "conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Describe <video> now."},
            {"from": "gpt", "value": "One clip."}]},
        {"image": "0.png", "video": "middle.mp4", "prompt": "<image>\nwith\n<video>\nwhat?", "solution": "A clip."},
        {"prompt": [{"role": "user", "content": "No pictures. Who are you?"}], "answer": 7},
    ]  # fmt: skip
    return [grpo.normalize_record({"id": i, **record}, f"record {i}") for i, record in enumerate(raw)]


def arguments(model, **kwargs):
    kwargs = {"num_generations": 3, "max_completion_length": 9, "top_k": 0, "beta": 0.1, "max_seq_length": 4096,
              "video_min_pixels": 784, "image_min_pixels": 784, **kwargs}  # fmt: skip
    args = grpo.GRPOArguments(model_id=model, per_device_train_batch_size=2, **kwargs)
    assert args.check(set()) == []
    return args


class OneProcess:
    """What generate asks of an Engine."""

    def __init__(self, model):
        self.raw_model, self.autocast = model, nullcontext
        self.accelerator = types.SimpleNamespace(device=torch.device("cpu"))


def uniform(samples, args, seed=0):
    shape = (args.num_generations, args.max_completion_length)
    return [np.random.default_rng([seed, i]).random(shape) for i in range(len(samples))]


@pytest.fixture(scope="module")
def rollout(tiny_model, prompts, clips):  # noqa: F811
    """Model, encoder, encoded prompts and three sampled completions of each; a third of all tokens ends one."""
    args = arguments(tiny_model)
    encoder, model = mv.Encoder(tiny_model, args), mv.load_model(args, "cpu").train()
    model.generation_config.eos_token_id = list(range(0, 400, 3))
    samples = [encoder(record, clips) for record in prompts]
    assert [sample["num_videos"] + sample["num_images"] for sample in samples] == LENGTHS
    ids, logps = grpo.generate(OneProcess(model), samples, encoder, args, uniform(samples, args))
    lengths = {len(tokens) for group in ids for tokens in group}
    assert len(lengths) > 3 and all(
        tokens[-1] in grpo.end_tokens(model, encoder) or len(tokens) == 9 for group in ids for tokens in group
    )
    assert all(
        token not in grpo.end_tokens(model, encoder) for group in ids for tokens in group for token in tokens[:-1]
    )
    return model, encoder, samples, ids, logps


def reference_inputs(model_path, record, folder, completion):
    """The HF processor's tensors of a prompt, cut out of its rendering with an answer, and of a completion."""
    part = mv._part("text", text="x")
    full = {**record, "messages": [*record["messages"], {"role": "assistant", "content": [part]}]}
    args = arguments(model_path)
    inputs, labels = hf_inputs(full, folder, args, AutoProcessor.from_pretrained(model_path))
    length = int((labels != -100).nonzero()[0])
    completion = torch.tensor([completion], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :length], completion], 1)
    types_ = inputs["mm_token_type_ids"][:, :length]
    inputs["mm_token_type_ids"] = torch.cat([types_, torch.zeros_like(completion).to(types_.dtype)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["position_ids"] = mv.qwen_position_ids(inputs, AutoConfig.from_pretrained(model_path))
    return inputs, length


def plain_logps(model, model_path, record, folder, completion, temperature):
    """Log-probabilities of one completion through the plain HF model, alone and unpacked."""
    inputs, length = reference_inputs(model_path, record, folder, completion)
    logits = model(**inputs, use_cache=False).logits[0, length - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


# --------------------------------------------------------------------------------------------------------- rollouts


def test_rollout_logps_are_those_of_training(rollout, tiny_model, prompts, clips):  # noqa: F811
    """Sampled tokens, teacher-forced: through the packed row of the update, and through the plain HF model."""
    model, encoder, samples, ids, logps = rollout
    args = arguments(tiny_model)
    full = [mv.add_suffixes(sample, [(c, c) for c in group]) for sample, group in zip(samples, ids)]
    inputs, targets, _ = mv.pack(full, encoder, "cpu")
    flat = torch.tensor([x for group in logps for own in group for x in own])
    with torch.no_grad():
        ours = mv.token_logps(model(**inputs).logits, targets, args.temperature)
        assert (ours - flat).abs().max() < 1e-5
        plain = AutoModelForImageTextToText.from_pretrained(tiny_model)
        theirs = [plain_logps(plain, tiny_model, record, clips, tokens, 0.9)
                  for record, group in zip(prompts, ids) for tokens in group]  # fmt: skip
    assert (torch.cat(theirs) - flat).abs().max() < 1e-5
    assert model.training, "generate must leave the model as it was"


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_generate(rollout, tiny_model, prompts, clips, penalty):  # noqa: F811
    """Prompts of different lengths, decoded together, give what HF's generate gives for each alone."""
    model, encoder, samples, _, _ = rollout
    args = arguments(tiny_model, repetition_penalty=penalty, max_completion_length=6)
    ours, _ = grpo.generate(OneProcess(model), samples, encoder, args)
    plain = AutoModelForImageTextToText.from_pretrained(tiny_model)
    for record, group in zip(prompts, ours):
        inputs, length = reference_inputs(tiny_model, record, clips, [])
        output = plain.generate(
            **inputs, max_new_tokens=6, do_sample=False, repetition_penalty=penalty,
            eos_token_id=grpo.end_tokens(model, encoder),
            suppress_tokens=[*encoder.vision_ids, *range(len(encoder.tokenizer), plain.config.text_config.vocab_size)],
        )  # fmt: skip
        assert group == [output[0, length:].tolist()]


def test_completions_depend_on_their_own_draws_only(rollout, tiny_model, monkeypatch):
    """The same bit for bit when repeated, in chunks of one prompt, in another order and company; others by draws."""
    model, encoder, samples, ids, logps = rollout
    args, engine = arguments(tiny_model), OneProcess(model)
    draws, modes = uniform(samples, args), set()
    spy = model.model.register_forward_pre_hook(lambda module, inputs: modes.add(module.training))
    assert model.training and grpo.generate(engine, samples, encoder, args, draws) == (ids, logps)
    assert modes == {False}, "dropout is on"
    spy.remove()
    alone = arguments(tiny_model, rollout_cache_gb=1e-6)
    assert grpo.generate(engine, samples, encoder, alone, draws)[0] == ids
    with monkeypatch.context() as patch:  # as on CUDA: ended prompts are decoded for a while
        patch.setitem(grpo.END_CHECK_TOKENS, "cpu", 4)
        assert grpo.generate(engine, samples, encoder, args, draws)[0] == ids
    order = [2, 0]
    assert grpo.generate(engine, [samples[i] for i in order], encoder, args, [draws[i] for i in order])[0] == [
        ids[i] for i in order
    ]
    assert grpo.generate(engine, samples, encoder, args, uniform(samples, args, seed=1))[0] != ids
    swapped = [draw[[1, 0, 2]] for draw in draws]
    assert grpo.generate(engine, samples, encoder, args, swapped)[0] == [[g[1], g[0], g[2]] for g in ids]


def test_rollout_memory_is_bounded(rollout, tiny_model, monkeypatch):
    """Prompts take turns when their keys and values are over the bound, like lengths together."""
    model, encoder, samples, _, _ = rollout
    seen = []
    decode = grpo._decode

    def spy(model, prompts, *rest):
        seen.append([len(prompt["input_ids"]) for prompt in prompts])
        return decode(model, prompts, *rest)

    monkeypatch.setattr(grpo, "_decode", spy)
    lengths = [len(sample["input_ids"]) for sample in samples]
    config = model.config.text_config
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * 16
    group = 3 * (9 * token + 32 * config.vocab_size)
    bound = 2 * (sorted(lengths)[0] * token + group) + 1
    samples = [*samples, samples[-1]]
    lengths.append(lengths[-1])
    args = arguments(tiny_model, rollout_cache_gb=bound / 2**30)
    grpo.generate(OneProcess(model), samples, encoder, args, uniform(samples, args))
    assert sorted(length for chunk in seen for length in chunk) == sorted(lengths)
    assert [len(chunk) for chunk in seen] == [1, 1, 1, 2]
    for chunk in seen[-1:]:
        assert len(chunk) * (max(chunk) * token + group) <= bound


def test_sampling_follows_the_distribution():
    """Evenly spread draws give every token its share to within one; tokens of probability 0 are never taken."""
    torch.manual_seed(0)
    scores = torch.randn(50) * 2
    scores[[0, 7, 49]] = -math.inf
    draws = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens = grpo.sample_tokens(scores.expand(20000, -1), draws)
    counts, expected = tokens.bincount(minlength=50), scores.double().softmax(-1) * 20000
    assert (counts - expected).abs().max() <= 1.01 and counts[[0, 7, 49]].sum() == 0
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert grpo.sample_tokens(scores.expand(2, -1), edges).tolist() == [1, 48]


@pytest.mark.parametrize("flags", [{"top_k": 3}, {"top_p": 0.05}, {"min_p": 0.9}, {"temperature": 0.002}])
def test_sampling_flags(rollout, tiny_model, flags):
    """Every sampled token is among those that the flag leaves, which are counted from the plain probabilities."""
    model, encoder, samples, _, _ = rollout
    args = arguments(tiny_model, **flags)
    ids, _ = grpo.generate(OneProcess(model), samples[1:], encoder, args, uniform(samples[1:], args))
    full = [mv.add_suffixes(sample, [(c, c) for c in group]) for sample, group in zip(samples[1:], ids)]
    inputs, targets, _ = mv.pack(full, encoder, "cpu")
    silent = [*encoder.vision_ids, *range(len(encoder.tokenizer), model.config.text_config.vocab_size)]
    with torch.no_grad():
        logits = model(**inputs).logits[0] / args.temperature
    logits[:, silent] = -math.inf
    probabilities = logits.softmax(-1)
    own = probabilities.gather(1, targets[:, None])
    rank, before = (probabilities > own).sum(1), (probabilities * (probabilities > own)).sum(1)
    if "top_k" in flags:
        assert rank.max() == 2
    if "top_p" in flags:
        assert before.max() < 0.05 and rank.max() > 2
    if "min_p" in flags:
        assert (own[:, 0] / probabilities.max(1)[0]).min() >= 0.9 - 1e-4 and rank.max() > 0
    if "temperature" in flags:
        assert (rank == 0).float().mean() > 0.9


def test_vision_tokens_are_never_sampled(rollout, tiny_model):
    """A head that wants nothing but vision tokens, and ids that no tokenizer knows, gets none of them."""
    model, encoder, samples, _, _ = rollout
    model = copy.deepcopy(model)
    model.lm_head.weight.data.zero_()
    wanted = [*encoder.vision_ids, *range(len(encoder.tokenizer), model.config.text_config.vocab_size)]
    hidden = model.lm_head.register_forward_hook(lambda m, i, out: out.index_fill_(-1, torch.tensor(wanted), 50.0))
    args = arguments(tiny_model)
    for draws in (uniform(samples, args), None):
        ids, _ = grpo.generate(OneProcess(model), samples, encoder, args, draws)
        assert not {token for group in ids for tokens in group for token in tokens} & set(wanted)
    hidden.remove()


def test_every_video_is_seen(rollout, tiny_model):
    """Blanking one video of thirty moves the log-probabilities of rollout and update; swapping two does as well."""
    model, encoder, samples, ids, _ = rollout
    args = arguments(tiny_model)
    starts = [0, *np.cumsum(samples[0]["video_grid_thw"].prod(1)).tolist()]
    grids = [tuple(grid) for grid in samples[0]["video_grid_thw"].tolist()]
    j = next(j for j in range(5, 30) if grids[j] == grids[4])
    variants = []
    for k in (0, 13, 29):
        blank = copy.deepcopy(samples[0])
        blank["patches"][starts[k] : starts[k + 1]] = 0
        variants.append(blank)
    swapped = copy.deepcopy(samples[0])
    a, b = slice(starts[4], starts[5]), slice(starts[j], starts[j + 1])
    swapped["patches"][a], swapped["patches"][b] = samples[0]["patches"][b], samples[0]["patches"][a]
    groups = [samples[0], *variants, swapped]
    draws = uniform(samples, args)[:1] * len(groups)
    _, rolled = grpo.generate(OneProcess(model), groups, encoder, args, draws)
    updates = []
    for sample in groups:
        inputs, targets, _ = mv.pack([mv.add_suffixes(sample, [(c, c) for c in ids[0]])], encoder, "cpu")
        with torch.no_grad():
            updates.append(mv.token_logps(model(**inputs).logits, targets, 0.9).tolist())
    for g in range(1, len(groups)):
        assert all(rolled[g][c][0] != rolled[0][c][0] for c in range(3)), f"rollout {g}"
        assert all(ours != theirs for ours, theirs in zip(updates[g], updates[0])), f"update {g}"


# -------------------------------------------------------------------------------------------------------- objective


OBJECTIVES = [{"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "epsilon_high": 0.28}
              for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo") for level in ("token", "sequence")
              for beta in (0.0, 0.3)]  # fmt: skip


def separate_loss(logps, old, ref, advantages, learned, args):
    """The loss of completions one by one, written as the papers do: lists of [tokens] per completion."""
    losses = []
    for own, o, r, advantage, counted in zip(logps, old, ref, advantages, learned):
        log_ratio = own - o if args.importance_sampling_level == "token" else (own - o).mean().expand(len(own))
        ratio = torch.exp(log_ratio)
        bounded = torch.clamp(ratio, 1 - args.epsilon, 1 + args.epsilon_high)
        loss = -torch.minimum(ratio * advantage, bounded * advantage)
        if args.beta:
            loss = loss + args.beta * ratio * (torch.exp(r - own) - (r - own) - 1)
        losses.append(loss * counted)
    tokens = sum(len(loss) for loss, counted in zip(losses, learned) if counted)
    if args.loss_type == "grpo":
        return sum(loss.mean() for loss in losses) / len(losses)
    if args.loss_type == "dr_grpo":
        return sum(loss.sum() for loss in losses) / (len(losses) * args.max_completion_length)
    return sum(loss.sum() for loss in losses) / tokens


def packed_loss(model, encoder, groups, args, off=True):
    """Our loss over groups in one row, with off-policy old and reference log-probabilities by completion."""
    stops = grpo.end_tokens(model, encoder)
    batch = grpo.pack_groups(groups, encoder, stops, args, "cpu")
    logps = mv.token_logps(model(**batch["inputs"]).logits, batch["targets"], args.temperature)
    ids = [tokens for group in groups for tokens in group["ids"]]
    learned = [grpo.is_learned(tokens, stops, args) for tokens in ids]
    totals = {"completions": len(ids), "supervised_tokens": sum(len(c) for c, kept in zip(ids, learned) if kept)}
    old = ref = logps.detach()
    if off:
        shifts = torch.tensor([x for group in groups for own in group["shifts"] for x in own])
        old, ref = logps.detach() + shifts, logps.detach() - 0.7 * shifts
    weights = grpo.token_weights(batch["lengths"], batch["learned"], totals, args)
    loss, kl, clipped = grpo.grpo_loss(
        logps, old, ref if args.beta else None, batch["advantages"], batch["sequences"], weights, args
    )
    return loss, kl, clipped, learned


def make_group(sample, ids, seed):
    generator = torch.Generator().manual_seed(seed)
    offsets = [-0.4, 0.4, 0.0] if seed % 2 else [0.4, -0.4, 0.0]  # so that whole completions are clipped too
    shifts = [
        (0.3 * torch.randn(len(tokens), generator=generator) + offset).tolist() for tokens, offset in zip(ids, offsets)
    ]
    advantages = torch.tensor([1.2, -0.9, 0.4] if seed % 2 else [-0.7, 1.1, -0.2], dtype=torch.float64)
    return {"sample": sample, "ids": ids, "logps": [[0.0] * len(tokens) for tokens in ids], "shifts": shifts,
            "advantages": advantages}  # fmt: skip


@pytest.fixture(scope="module")
def plain_graph(rollout, tiny_model, prompts, clips):  # noqa: F811
    """The plain HF model and its log-probabilities of each completion of two groups, with their graph."""
    _, _, _, ids, _ = rollout
    plain = AutoModelForImageTextToText.from_pretrained(tiny_model)
    return plain, [plain_logps(plain, tiny_model, prompts[i], clips, tokens, 0.9) for i in (0, 3) for tokens in ids[i]]


@pytest.mark.parametrize("flags", OBJECTIVES, ids=lambda flags: "-".join(map(str, flags.values())))
def test_group_loss_equals_separate_sequences(rollout, tiny_model, plain_graph, flags):
    """Loss and all gradients of two groups in one row, against each completion alone through the plain HF model."""
    model, encoder, samples, ids, _ = rollout
    plain, logps = plain_graph
    args = arguments(tiny_model, mask_truncated_completions=flags["loss_type"] in ("grpo", "dapo"), **flags)
    groups = [make_group(samples[i], ids[i], seed=i) for i in (0, 3)]
    loss, kl, clipped, learned = packed_loss(model, encoder, groups, args)
    assert 0 < clipped.sum() < len(clipped) and (kl is None) == (args.beta == 0)
    shifts = [torch.tensor(own) for group in groups for own in group["shifts"]]
    expected = separate_loss(
        logps, [own.detach() + s for own, s in zip(logps, shifts)],
        [own.detach() - 0.7 * s for own, s in zip(logps, shifts)],
        torch.cat([group["advantages"] for group in groups]).float(), learned, args,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    model.zero_grad()
    plain.zero_grad()
    loss.backward()
    expected.backward(retain_graph=True)
    close_gradients(model, plain)


def test_order_in_a_group_means_nothing(rollout, tiny_model):
    model, encoder, samples, ids, _ = rollout
    args, gradients = arguments(tiny_model, loss_type="grpo"), []
    for order in ([0, 1, 2], [2, 0, 1]):
        group = make_group(samples[1], ids[1], seed=0)
        group |= {key: [group[key][i] for i in order] for key in ("ids", "logps", "shifts")}
        group["advantages"] = group["advantages"][order]
        loss, *_ = packed_loss(model, encoder, [group], args)
        model.zero_grad()
        loss.backward()
        gradients.append([loss.item(), *(p.grad.norm().item() for p in model.parameters() if p.grad is not None)])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4, abs=1e-8)


def test_ratio_is_one_at_first(rollout, tiny_model):
    """At the first iteration the loss is −Σ advantage × weight exactly, and its gradient is not zero."""
    model, encoder, samples, ids, _ = rollout
    args = arguments(tiny_model, beta=0.0)
    group = make_group(samples[1], ids[1], seed=0)
    loss, _, clipped, _ = packed_loss(model, encoder, [group], args, off=False)
    lengths = torch.tensor([len(tokens) for tokens in ids[1]])
    assert loss.item() == pytest.approx(-(group["advantages"] * lengths).sum().item() / lengths.sum().item(), rel=1e-6)
    assert not clipped.any()
    model.zero_grad()
    loss.backward()
    assert model.lm_head.weight.grad.norm() > 1e-3


def test_groups_without_advantage_leave_the_pack(rollout, tiny_model):
    """Without KL a group of equal rewards is not packed; loss and gradients of the others stay what they were."""
    model, encoder, samples, ids, _ = rollout
    groups = [make_group(samples[i], ids[i], seed=i) for i in (1, 3)]
    groups[1]["advantages"] = grpo.group_advantages(torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64), "group")[0]
    results, stops = [], grpo.end_tokens(model, encoder)
    for beta in (0.0, 1e-30):
        args = arguments(tiny_model, beta=beta, loss_type="dapo")
        learned = grpo.groups_with_gradient(groups, stops, args)
        batch = grpo.pack_groups(learned, encoder, stops, args, "cpu")
        assert len(batch["lengths"]) == (6 if beta else 3)
        totals = {"completions": 6, "supervised_tokens": sum(len(c) for group in groups for c in group["ids"])}
        logps = mv.token_logps(model(**batch["inputs"]).logits, batch["targets"], 0.9)
        weights = grpo.token_weights(batch["lengths"], batch["learned"], totals, args)
        ref = logps.detach() if beta else None
        loss, *_ = grpo.grpo_loss(logps, logps.detach(), ref, batch["advantages"], batch["sequences"], weights, args)
        model.zero_grad()
        loss.backward()
        results.append([loss.item(), *(p.grad.norm().item() for p in model.parameters())])
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-8)
    args = arguments(tiny_model, beta=0.0)
    empty = grpo.pack_groups(grpo.groups_with_gradient(groups[1:], stops, args), encoder, [], args, "cpu")
    assert len(empty["targets"]) == len(empty["lengths"]) == 0
    model(**empty["inputs"]).logits.sum().backward()  # the dummy goes through tower and language model


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.2, 0.2, 0.2], [1.0, math.nan, 0.0, math.nan],
                            [math.nan, 3.0, math.nan, math.nan]], dtype=torch.float64)  # fmt: skip
    std = math.sqrt(1 / 3)
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = [[0.5 / (std + 1e-4) * sign for sign in (1, -1, -1, 1)], [0.0] * 4, [half, 0.0, -half, 0.0], [0.0] * 4]
    torch.testing.assert_close(grpo.group_advantages(rewards, "group"), torch.tensor(expected, dtype=torch.float64))
    plain = grpo.group_advantages(rewards, "none")
    assert plain[0].tolist() == [0.5, -0.5, -0.5, 0.5] and plain[3].tolist() == [0.0] * 4
    assert grpo.group_advantages(rewards, "batch", 2.0)[0].tolist() == pytest.approx(
        [0.5 / 2.0001, *[-0.5 / 2.0001] * 2, 0.5 / 2.0001]
    )
    from trl.trainer.utils import nanstd

    theirs = nanstd(rewards[:3], dim=1)
    assert grpo.group_std(rewards)[:3].tolist() == pytest.approx(theirs.tolist())
    groups = [{"reward": row, "rewards": row[:, None], "ids": [[1, 2], [3], [3], [2]]} for row in rewards]
    told, deviation = grpo.statistics(grpo.group_sums(groups, [2], types.SimpleNamespace(reward_weights=[1.0])), ["f"])
    assert deviation == pytest.approx(nanstd(rewards).item())
    values = rewards[~rewards.isnan()]
    mean, stds = values.mean().item(), theirs.sum().item()
    assert told == {"reward": pytest.approx(mean), "reward_std": pytest.approx(stds / 4), "frac_reward_zero_std": 0.5,
                    "completions/mean_length": 1.25, "completions/clipped_ratio": 0.5, "completions/unscored": 5,
                    "rewards/f": pytest.approx(mean)}  # fmt: skip


def test_losses_equal_trl(tiny_model):
    """TRL 1.16's own _compute_loss on a text-only batch of two groups: loss, gradients, KL and clipped shares."""
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    args = arguments(tiny_model, temperature=0.7, mask_truncated_completions=True)
    encoder, model = mv.Encoder(tiny_model, args), mv.load_model(args, "cpu").train()
    theirs = AutoModelForImageTextToText.from_pretrained(tiny_model).train()
    add_fused_lm_head(theirs, temperature=0.7, outputs=("log_probs", "entropy"))
    texts = ["Who are you?", "What is it that you can see here, then?"]
    samples = [encoder(grpo.normalize_record({"prompt": text, "answer": "x"}, "r"), ".") for text in texts]
    ids = [[[5, 9, 2], [7] * 8 + [3], [3, 1]], [[8, 4], [6, 2, 9, 9], [1] * 9]]
    groups = [make_group(sample, own, seed=i) for i, (sample, own) in enumerate(zip(samples, ids))]
    model.generation_config.eos_token_id = [2, 3, 1, 4]  # the fifth one is cut short
    flat = [tokens for own in ids for tokens in own]
    stops, pad = grpo.end_tokens(model, encoder), 0
    kept = torch.tensor([tokens[-1] in stops for tokens in flat])
    assert kept.sum() == 5

    def padded(rows, side):
        longest = max(map(len, rows))
        fill = [[pad] * (longest - len(row)) for row in rows]
        ones = [[1.0] * len(row) for row in rows]
        rows = [f + list(r) if side == "left" else list(r) + f for r, f in zip(rows, fill)]
        mask = [[0.0] * len(f) + o if side == "left" else o + [0.0] * len(f) for o, f in zip(ones, fill)]
        return torch.tensor(rows), torch.tensor(mask)

    prompt_ids, prompt_mask = padded([sample["input_ids"].tolist() for sample in samples for _ in range(3)], "left")
    completion_ids, completion_mask = padded(flat, "right")
    shifts, _ = padded([own for group in groups for own in group["shifts"]], "right")
    loss_mask = completion_mask * kept[:, None]
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask.long(), "completion_ids": completion_ids,
              "completion_mask": loss_mask.long(), "num_items_in_batch": loss_mask.sum(),
              "advantages": torch.cat([group["advantages"] for group in groups]).float()}  # fmt: skip
    accelerator = types.SimpleNamespace(
        autocast=nullcontext, num_processes=1, is_main_process=False, reduce=lambda x, reduction: x, gather=lambda x: x
    )
    for flags in OBJECTIVES:
        args = arguments(tiny_model, temperature=0.7, mask_truncated_completions=True, **flags)
        told = {"train": defaultdict(list)}
        trainer = types.SimpleNamespace(
            model=theirs, accelerator=accelerator, aux_loss_enabled=False, top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, importance_sampling_level=args.importance_sampling_level, beta=args.beta,
            loss_type=args.loss_type, epsilon_low=args.epsilon, epsilon_high=args.epsilon_high, use_vllm=False,
            max_completion_length=args.max_completion_length, current_gradient_accumulation_steps=1, _metrics=told,
            _entropy_bonus_enabled=False,
            args=types.SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        )  # fmt: skip
        trainer._get_per_token_logps_and_entropies = types.MethodType(
            GRPOTrainer._get_per_token_logps_and_entropies, trainer
        )
        with torch.no_grad():
            mask = torch.cat([prompt_mask, completion_mask], 1).long()
            base, _, _ = trainer._get_per_token_logps_and_entropies(
                theirs, torch.cat([prompt_ids, completion_ids], 1), mask, completion_ids.shape[1]
            )
        expected = GRPOTrainer._compute_loss(trainer, theirs, inputs | {
            "old_per_token_logps": base + shifts, "ref_per_token_logps": base - 0.7 * shifts})  # fmt: skip
        loss, kl, clipped, _ = packed_loss(model, encoder, groups, args)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7), flags
        learned = torch.cat([torch.full((len(tokens),), bool(own)) for tokens, own in zip(flat, kept)])
        if args.beta:
            assert kl[learned].mean().item() == pytest.approx(told["train"]["kl"][0], rel=1e-4)
        if args.importance_sampling_level == "token":
            theirs_clipped = told["train"]["clip_ratio/region_mean"][0]
            assert clipped[learned].float().mean().item() == pytest.approx(theirs_clipped) and theirs_clipped > 0
        model.zero_grad()
        theirs.zero_grad()
        loss.backward()
        expected.backward()
        close_gradients(model, theirs, 2e-5)


# ---------------------------------------------------------------------------------------------------------- rewards


def reward_of(name, completion, reference):
    return grpo.BUILT_IN[name](completions=[[{"role": "assistant", "content": completion}]], reference=[reference])[0]


@pytest.mark.parametrize("name, completion, reference, expected", [
    ("accuracy", "The second.", "the  second", 1.0),
    ("accuracy", "<think>The first?</think> <answer> The second </answer>", "The second.", 1.0),
    ("accuracy", "<think>The second</think>The first", "The second", 0.0),
    ("accuracy", "<answer>no</answer> <answer>yes</answer>", "<think>x</think><answer>Yes</answer>", 1.0),
    ("accuracy", "The second one", "The second", 0.0),
    ("accuracy", "", "The second", 0.0),
    ("accuracy", "yes", None, None),
    ("format", "<think>a\nb</think>\n<answer>c</answer>", None, 1.0),
    ("format", "<think></think><answer></answer>", None, 1.0),
    ("format", "So: <think>a</think><answer>c</answer>", None, 0.0),
    ("format", "<think>a</think><answer>c</answer> or so", None, 0.0),
    ("format", "<think>a<think>b</think></think><answer>c</answer>", None, 0.0),
    ("format", "<answer>c</answer>", None, 0.0),
    ("numeric", "The ejection fraction is about 45%.", "The ejection fraction is approximately 50%", 0.9),
    ("numeric", "0.45", "50%", 0.9),
    ("numeric", "45", "50%", 0.9),
    ("numeric", "45%", "50", 0.9),
    ("numeric", "45%", "0.5", 0.9),
    ("numeric", "200", "50", 0.0),
    ("numeric", "from 3 to 50", "50", 1.0),
    ("numeric", "1,250.5 mm", "1250.5", 1.0),
    ("numeric", "-3", "3", 0.0),
    ("numeric", "−2.5e1 %", "-25%", 1.0),
    ("numeric", "0", "0.0", 1.0),
    ("numeric", "0.1", "0", 0.0),
    ("numeric", "none", "5", 0.0),
    ("numeric", "5", "good quality", None),
    ("choice", "B", "B", 1.0),
    ("choice", "(b)", "B. The aorta", 1.0),
    ("choice", "<think>A or B</think><answer>B) aorta</answer>", "(B)", 1.0),
    ("choice", "The answer is C.", "C", 1.0),
    ("choice", "I think it must be (D) here", "D", 1.0),
    ("choice", "A door opens", "A", 0.0),
    ("choice", "C", "B", 0.0),
    ("choice", "B", "The aorta", None),
])  # fmt: skip
def test_built_in_rewards(name, completion, reference, expected):
    assert reward_of(name, completion, reference) == (None if expected is None else pytest.approx(expected))


def test_math_verify_decides_on_formulas_only(monkeypatch):
    """Stand-in with its two functions: asked for numbers and formulas, not for sentences in which numbers occur."""
    asked = []
    stand_in = types.ModuleType("math_verify")
    stand_in.parse = lambda text: text
    stand_in.verify = lambda gold, answer: asked.append((gold, answer)) or {gold, answer} == {"1/2", "0.5"}
    stand_in.__spec__ = types.SimpleNamespace(name="math_verify")
    monkeypatch.setitem(sys.modules, "math_verify", stand_in)
    assert reward_of("accuracy", "<answer>0.5</answer>", "1/2") == 1.0
    assert reward_of("accuracy", "0.6", "1/2") == 0.0
    assert reward_of("accuracy", "Views 12 and 17", "Views 4, 9 and 17.") == 0.0
    assert asked == [("1/2", "0.5"), ("1/2", "0.6")]


REWARDS = '''
def numerical_video_reward(completions, assistant, **kwargs):
    """The signature and accesses of the seed's function of this name."""
    contents, solutions = [c[0]["content"] for c in completions], [a["content"] for a in assistant]
    return [0.5 if a == b else 0.25 for a, b in zip(contents, solutions)]

def columns(prompts, completions, completion_ids, view, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(view) and set(kwargs) >= {"id", "reference"}
    return [None if v is None else v * len(i) for v, i in zip(view, completion_ids)]

def plain(prompts, completions, **kwargs):
    return [float(p == "Plain?" and c == "text") if isinstance(p, str) else float(p[0]["content"][0]["video"] == "a.mp4")
            for p, c in zip(prompts, completions)]

def fails(completions, **kwargs):
    return [1.0 / ((c if isinstance(c, str) else c[0]["content"]) != "bad") for c in completions]

def short(completions, **kwargs): return [1.0]
def nan(completions, **kwargs): return [float("nan")] * len(completions)
def words(completions, **kwargs): return ["good"] * len(completions)
def nothing(completions, **kwargs): return None
def tensor(completions, **kwargs):
    import torch
    return torch.ones(len(completions))
def bare(completions): return [1.0]
def first(completions, /, **kwargs): return [1.0]
async def later(completions, **kwargs): return [1.0]
'''  # noqa: E501


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(REWARDS)
    return file


COLUMNS = ["id", "view", "assistant", "answer"]  # of the records of these groups


def scored_groups(*texts):
    """A conversational prompt with a column, and a plain-text one; two completions each."""
    rows = [
        {"id": "one", "view": 3, "video": "a.mp4", "conversations": [
            {"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It moves."}]},
        {"id": "two", "prompt": "Plain?", "answer": 5},
    ]  # fmt: skip
    rows = [grpo.normalize_record(row, "record") for row in rows]
    return [{"record": row, "texts": list(own), "ids": [[1, 2], [3]]} for row, own in zip(rows, texts)]


def test_own_reward_functions(reward_file):
    """Columns, references, both kinds of prompts; None is no reward, a tensor is as good as a list."""
    names = ["numerical_video_reward", "columns", "plain", "tensor"]
    functions = grpo.load_rewards([f"{reward_file}:{name}" for name in names] + ["accuracy"])
    assert list(functions) == [*names, "accuracy"]
    groups = scored_groups(["It moves.", "no"])
    rewards = grpo.score(functions, groups, COLUMNS)
    assert rewards.tolist() == [[[0.5, 6.0, 1.0, 1.0, 1.0], [0.25, 3.0, 1.0, 1.0, 0.0]]]
    both = grpo.score(
        {name: functions[name] for name in ("columns", "plain")}, scored_groups("ab", ["text", "x"]), COLUMNS
    )
    assert both[1, :, 0].isnan().all() and both[1, :, 1].tolist() == [1.0, 0.0]
    args = types.SimpleNamespace(reward_weights=[1.0, 0.5])
    groups = scored_groups("ab", ["text", "x"])
    grpo.reward_groups({name: functions[name] for name in ("columns", "plain")}, groups, COLUMNS, args)
    assert [group["reward"].tolist() for group in groups] == [[6.5, 3.5], [0.5, 0.0]]


@pytest.mark.parametrize("name, message", [
    ("fails", r"reward function fails failed on record two: ZeroDivisionError: .* \(my_rewards\.py, line 16\)"),
    ("short", r"reward function short gave 1 rewards for 4 completions of record one, two: expected"),
    ("nan", r"reward function nan gave nan for record one, its completion 'good': expected a finite number"),
    ("words", r"reward function words gave 'good' for record one"),
    ("nothing", r"reward function nothing gave None for 4 completions"),
    ("numerical_video_reward", r"failed on record two: TypeError"),
])  # fmt: skip
def test_reward_errors_name_function_and_record(reward_file, name, message):
    functions = grpo.load_rewards([f"{reward_file}:{name}"])
    with pytest.raises(mv.InputError, match=message):
        grpo.score(functions, scored_groups(["good", "good"], ["good", "bad"]), COLUMNS)


@pytest.mark.parametrize("names, message", [
    (["acuracy"], "expected one of accuracy, format, numeric, choice, or file.py:function"),
    (["FILE:bare"], r"bare must take \*\*kwargs"),
    (["FILE:later"], "has no plain function 'later'"),
    (["FILE:missing"], "has no plain function 'missing'"),
    (["FILE:first"], "first is given everything by name: remove the '/' from its parameters"),
    (["nowhere.py:f"], "no such file: nowhere.py"),
    (["BROKEN:f"], r"cannot be imported: ModuleNotFoundError: No module .* \(broken\.py, line 1\)"),
    (["accuracy", "accuracy"], "two functions of the name accuracy"),
])  # fmt: skip
def test_reward_names(reward_file, names, message):
    broken = reward_file.with_name("broken.py")
    broken.write_text("import does_not_exist\n")
    names = [name.replace("FILE", str(reward_file)).replace("BROKEN", str(broken)) for name in names]
    with pytest.raises(mv.InputError, match=message):
        grpo.load_rewards(names)
    assert any(names[0] in problem for problem in grpo.GRPOArguments(reward_funcs=names).check(set()))


COUNTED = """
from __future__ import annotations
import dataclasses, pathlib, pickle, typing
with open(pathlib.Path(__file__).with_name("runs"), "a") as file:
    print(__name__, file=file)
seen = []

@dataclasses.dataclass
class Answer:
    text: str
    parts: typing.ClassVar[list[str]] = []

def one(completions, **kwargs):
    assert typing.get_type_hints(Answer)["text"] is str
    seen.append(pickle.loads(pickle.dumps(Answer("NAME"))) == Answer("NAME"))
    return [float(len(seen))] * len(completions)

def two(completions, **kwargs):
    return [VALUE + len(seen)] * len(completions)
"""


def test_reward_files_run_once(tmp_path, monkeypatch):
    """By any path, for all of their functions; names of others, of packages and of the library stay theirs."""
    import random

    import datasets as library

    files = {}
    for value, name in enumerate(["a/rewards.py", "b/rewards.py", "a/random.py", "b/datasets.py", "b/with.dot-1.py"]):
        files[name] = tmp_path / name
        files[name].parent.mkdir(exist_ok=True)
        files[name].write_text(COUNTED.replace("NAME", name).replace("VALUE", str(value)))
    groups = scored_groups("ab")
    for value, (name, file) in enumerate(files.items()):
        (tmp_path / "link.py").unlink(missing_ok=True)
        (tmp_path / "link.py").symlink_to(file)
        monkeypatch.chdir(tmp_path)
        for path in (file, name, f"./{name}", f"a/../{name}", "link.py"):
            functions = grpo.load_rewards([f"{path}:one", f"{path}:two"])
        assert grpo.GRPOArguments(reward_funcs=[f"{file}:one"]).check(set()) == []
        assert grpo.score(functions, groups, COLUMNS)[0, 0].tolist() == [1, value + 1]
        module = sys.modules[functions["one"].function.__module__]
        assert Path(module.__file__) == file and module.seen == [True]
        assert file.with_name("runs").read_text().splitlines().count(module.__name__) == 1
    names = [name for folder in "ab" for name in (tmp_path / folder / "runs").read_text().splitlines()]
    assert len(names) == len(set(names)) == len(files) and not {"rewards", "random", "datasets"} & set(names)
    assert sys.modules["random"] is random and sys.modules["datasets"] is library
    assert importlib.import_module("random") is random and random.Random(0).random() < 1
    before = set(sys.modules)
    for text in ("import does_not_exist", "def f(:", "raise SystemExit(3)"):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(SystemExit if "Exit" in text else mv.InputError):
            grpo.load_rewards([f"{tmp_path / 'broken.py'}:f"])
    assert set(sys.modules) == before
    (tmp_path / "broken.py").write_text("def f(completions, **kwargs): return [1.0] * len(completions)\n")
    assert list(grpo.load_rewards([f"{tmp_path / 'broken.py'}:f"])) == ["f"]  # corrected meanwhile


SOME_COLUMNS = """
def view(completions, view, **kwargs):
    return [0.0 if v is None else v for v in view]

def late(completions, *, late, kind="any", **kwargs):
    assert len(late) == len(completions)
    return [float(v is not None) for v in late]

def wrapped(function):
    import functools
    @functools.wraps(function)
    def inner(completions, **kwargs):
        return function(completions, view=[1.0] * len(completions), **kwargs)
    return inner

filled = wrapped(view)
"""


def test_columns_belong_to_the_data_set(tmp_path, monkeypatch):
    """Every name that any record has is given, None where absent, even where none of the groups has it."""
    (tmp_path / "some.py").write_text(SOME_COLUMNS)
    rows = [{"id": i, "prompt": "a"} for i in range(2500)]
    rows[3]["view"], rows[2400]["late"], rows[7]["reference"], rows[8]["prompts"] = 1.5, None, "x", "y"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    records = mv.load_records(str(tmp_path / "data.json"), grpo.normalize_record, grpo.FEATURES)
    columns = grpo.column_names(records)
    assert columns == ["id", "view", "reference", "prompts", "late", "assistant"]  # record 7 has a reference
    functions = grpo.load_rewards([f"{tmp_path / 'some.py'}:{name}" for name in ("view", "late", "filled")])
    groups = [{"record": records[i], "texts": ["a", "b"], "ids": [[1], [2]]} for i in (0, 1)]
    assert grpo.score({name: functions[name] for name in ("view", "late")}, groups, columns).sum() == 0
    inputs = grpo.reward_inputs(groups, columns)
    assert inputs.keys() == {"prompts", "completions", "completion_ids", "generation_prefix", *columns}
    assert {"reference", "assistant"} < inputs.keys()
    assert inputs["prompts"] == ["a"] * 4
    assert inputs["view"] == inputs["late"] == inputs["assistant"] == [None] * 4
    grpo.check_parameters("--data_path", "x.json", columns, functions)
    for missing, function in (("view", "view"), ("late", "late")):
        there = [name for name in columns if name != missing]
        with pytest.raises(mv.InputError) as caught:
            grpo.check_parameters("--eval_path", "held.json", there, functions)
        assert str(caught.value).startswith(f"--reward_funcs {function}: no column of --eval_path held.json for its "
                                            f"parameter '{missing}': there are {', '.join(there)} (and ")  # fmt: skip


def test_missing_columns_end_a_run_before_the_weights(flags, tmp_path, monkeypatch):
    """In the training or the held-out records; where some have the column, it runs."""
    (tmp_path / "some.py").write_text(SOME_COLUMNS)
    data = json.loads(Path(flags[flags.index("--data_path") + 1]).read_text())
    for name, own in (("without", {}), ("with", {"view": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps([*data[:7], {**data[7], **own}]))
    flags = [*flags, "--reward_funcs", f"{tmp_path / 'some.py'}:view", "--max_steps", 8]
    both = {name: ["--data_path", tmp_path / f"{name}.json"] for name in ("without", "with")}
    with monkeypatch.context() as patched:
        patched.setattr(mv, "load_model", lambda *args: pytest.fail("loaded a model"))
        with pytest.raises(mv.InputError, match=r"view: no column of --data_path \S+/without\.json for its parameter"):
            train(patched, *flags, *both["without"], "--output_dir", tmp_path / "out")
        with pytest.raises(mv.InputError, match=r"view: no column of --eval_path \S+/without\.json for its parameter"):
            train(patched, *flags, *both["with"], "--eval_path", tmp_path / "without.json", "--output_dir",
                  tmp_path / "out")  # fmt: skip
    train(monkeypatch, *flags, *both["with"], "--eval_path", tmp_path / "with.json", "--output_dir", tmp_path / "out")
    rewards = [row["reward"] for row in metrics(tmp_path / "out") if "reward" in row]
    assert sorted(set(rewards)) == [0, 1] and rewards.count(1) == 2  # in one step (of two iterations) of four
    assert [row["eval_reward"] for row in metrics(tmp_path / "out") if "eval_reward" in row] == [2 / 8]


UPSTREAM_TEXTS = """
import re

def helper(text): return text

def format_reward(completions, **kwargs):
    return [1.0 if re.fullmatch("<answer>.*</answer>", text) else 0.0 for text in completions]

def accuracy_reward(completions, assistant, **kwargs):
    return [float(helper(text).lower() == answer.strip().lower()) for text, answer in zip(completions, assistant)]

def length_reward(completions, **kwargs):
    return [len(text) for text in completions]
"""
UPSTREAM_MESSAGES = """
import re

def format_reward(completions, **kwargs):
    return [1.0 if re.fullmatch("<answer>.*</answer>", c[0]["content"]) else 0.0 for c in completions]

def accuracy_reward(completions, assistant, **kwargs):
    return [float(c[0]["content"].lower() == a["content"].strip().lower()) for c, a in zip(completions, assistant)]

def length_reward(completions, **kwargs):
    return [len(c[0]["content"]) for c in completions]
"""
UPSTREAM_NAMES = ["format_reward", "accuracy_reward", "length_reward"]


def upstream_groups():
    """References of every kind: an answer, a column beside turns or beside an empty answer, and `assistant` itself."""
    ask = {"from": "human", "value": "Who?"}
    rows = [{"conversations": [ask, {"from": "gpt", "value": "It moves."}]},
            {"conversations": [ask], "solution": 7},
            {"conversations": [ask, {"from": "gpt", "value": ""}], "answer": "Two"},
            {"prompt": [{"role": "user", "content": "Who?"}], "assistant": "Own", "answer": "Other"}]  # fmt: skip
    rows = [grpo.normalize_record({"id": i, **row}, "record") for i, row in enumerate(rows)]
    texts = [["it moves.", "<answer>no</answer>"], ["7", ""], ["two", "2"], ["own", "other"]]
    return [{"record": row, "texts": own, "ids": [[1], [2]]} for row, own in zip(rows, texts)]


UPSTREAM_COLUMNS = ["id", "solution", "answer", "assistant"]
UPSTREAM_REWARDS = [[[0, 1, 9], [1, 0, 19]], [[0, 1, 1], [0, 0, 0]], [[0, 1, 3], [0, 0, 1]], [[0, 1, 3], [0, 0, 5]]]


def test_a_file_of_rewards_takes_texts(tmp_path):
    """All functions named *_reward in the file's order; completions and `assistant` are texts for every record."""
    (tmp_path / "reward_funcs.py").write_text(UPSTREAM_TEXTS)
    args = grpo.GRPOArguments(reward_funcs=[str(tmp_path / "reward_funcs.py"), "accuracy"])
    assert args.check(set()) == [] and args.reward_weights == [1.0] * 4
    rewards = grpo.load_rewards([str(tmp_path / "reward_funcs.py")])
    assert list(rewards) == UPSTREAM_NAMES
    assert grpo.score(rewards, upstream_groups(), UPSTREAM_COLUMNS).tolist() == UPSTREAM_REWARDS
    plain = scored_groups(["It moves.", "no"], ["5", "no"])
    assert grpo.score(rewards, plain, COLUMNS)[..., 1].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("annotated", [False, True])
def test_rewards_that_read_messages(tmp_path, annotated):
    """Functions named one by one, or annotated in a whole file: lists of messages, `assistant` is a message."""
    file = tmp_path / "reward_funcs.py"
    hint = "(completions: list[list[dict[str, str]]], " if annotated else "(completions, "
    file.write_text(re.sub(r"(?<=reward)\(completions, ", hint, UPSTREAM_MESSAGES))
    rewards = grpo.load_rewards([str(file)] if annotated else [f"{file}:{name}" for name in UPSTREAM_NAMES])
    groups = upstream_groups()[:3]
    assert grpo.score(rewards, groups, UPSTREAM_COLUMNS).tolist() == UPSTREAM_REWARDS[:3]
    given = grpo.reward_inputs(groups, UPSTREAM_COLUMNS, rewards["accuracy_reward"].texts)
    answers = ["It moves.", "7", "Two"]
    assert given["assistant"][::2] == [{"role": "assistant", "content": answer} for answer in answers]
    if not annotated:
        message = (
            r"functions of a whole file are given completions and `assistant` as texts, but format_reward reads a "
            r"'content': give the functions one by one, as \S+/reward_funcs\.py:format_reward, which get lists of"
        )
        with pytest.raises(mv.InputError, match=message):
            grpo.load_rewards([str(file)])


def test_forms_are_those_of_trl():
    """Completions and prompts are lists of messages exactly where TRL finds the prompt conversational."""
    from trl.data_utils import is_conversational

    given = grpo.reward_inputs(upstream_groups() + scored_groups("ab", "cd"), [*COLUMNS, *UPSTREAM_COLUMNS])
    assert [is_conversational({"prompt": prompt}) for prompt in given["prompts"]] == [True] * 10 + [False] * 2
    for prompt, completion, ids in zip(given["prompts"], given["completions"], given["completion_ids"]):
        assert is_conversational({"prompt": prompt}) == is_conversational({"prompt": completion}), ids
        assert isinstance(completion, str) or completion[0]["role"] == "assistant"
    assert given["assistant"][6] == "Own"  # a column of the record is given as it is, as by TRL
    assert given["assistant"][-1] == "5" and given["reference"][-1] == "5"
    message = {"role": "assistant", "content": "Own"}
    row = grpo.normalize_record({"id": 1, "prompt": "Who?", "assistant": message}, "record")
    own = [{"record": row, "texts": ["a"], "ids": [[1]]}, {**upstream_groups()[3], "texts": ["a"], "ids": [[1]]}]
    expected = {None: [message, "Own"], True: ["Own", "Own"], False: [message, message]}
    for texts, columns in expected.items():
        assert grpo.reward_inputs(own, ["assistant"], texts)["assistant"] == columns


@pytest.mark.parametrize("annotation, texts", [
    ("list[str]", True), (list[str], True), ("List[ str ]", True), ("typing.Sequence[str]", True),
    ("list[list[dict]]", False), (list[list[dict[str, str]]], False), ("t.List[t.List[t.Dict[str, str]]]", False),
    ("list[list]", False), ("list", None), (list, None), ("list[str] | list[list[dict]]", None), ("list[dict]", None),
    ("list[list[dict]] | list[str]", None), ("list[str | list[dict]]", None),
])  # fmt: skip
def test_annotations_of_completions(annotation, texts):
    assert grpo.annotated_texts(annotation) is texts


def test_a_text_reward_is_not_given_messages_silently(tmp_path):
    """len() of a list of one message is 1 for every completion: refused before the model; annotated, it gets texts."""
    file = tmp_path / "mine.py"
    annotated = "def annotated(completions: list[str], **kwargs): return [len(text) for text in completions]\n"
    others = """
def counts(completions, **kwargs): return [1.0] * len(completions)
def counts_too(**kwargs): return [1.0] * len(kwargs["completions"])
def by_kwargs(**kwargs): return [len(text) for text in kwargs["completions"]]
class Length:
    def __call__(self, completions, **kwargs): return [len(text) for text in completions]
instance = Length()
def wrapped(function):
    import functools
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))
decorated = wrapped(length_reward)
short = lambda completions, **kwargs: [len(text) for text in completions]
"""
    file.write_text(UPSTREAM_TEXTS + annotated + others)
    turns, plain = {"prompt": [{"role": "user", "content": "Who?"}], "answer": "a"}, {"prompt": "Who?", "answer": "a"}
    tables = {}
    for name, rows in (("mixed", [plain, turns]), ("plain", [plain])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        tables[name] = mv.load_records(str(tmp_path / f"{name}.json"), grpo.normalize_record, grpo.FEATURES)
    for name in (*UPSTREAM_NAMES, "by_kwargs", "instance", "decorated", "short"):
        rewards = grpo.load_rewards([f"{file}:{name}"])
        grpo.check_forms("--data_path", "x.json", tables["plain"], rewards)
        as_one = r" \(and `assistant` as one\)" if name == "accuracy_reward" else ""
        message = (
            rf"--reward_funcs {name}: for records of --eval_path x\.json completions are lists of messages "
            r"\[{'role': 'assistant', 'content': text}\], as in TRL for prompts of turns, but its file never reads "
            rf"'content': write `completions: list\[str\]` in its signature to get texts{as_one}, or "
            r"`completions: list\[list\[dict\]\]` if it does read them"
        )
        with pytest.raises(mv.InputError, match=message):
            grpo.check_forms("--eval_path", "x.json", tables["mixed"], rewards)
    fine = grpo.load_rewards([f"{file}:annotated", f"{file}:counts", f"{file}:counts_too", str(file), "accuracy"])
    grpo.check_forms("--data_path", "x.json", tables["mixed"], fine)
    assert grpo.score(fine, upstream_groups()[:1], UPSTREAM_COLUMNS)[0, :, :2].tolist() == [[9, 1], [19, 1]]


@pytest.mark.parametrize("name, given, other, annotation", [
    ("lower", r"lists of messages \[{'role': 'assistant', 'content': text}\]", "texts", "list[str]"),
    ("first: list[str]", "texts", "lists of messages", "list[list[dict]]"),
])  # fmt: skip
def test_errors_name_the_form_of_completions(tmp_path, name, given, other, annotation):
    name, _, hint = name.partition(": ")
    bodies = {"lower": "c.lower() and 1.0", "first": "float(c[0]['content'] == 'x')"}
    file = tmp_path / "mine.py"
    file.write_text(f"def {name}(completions{': ' if hint else ''}{hint}, **kwargs):\n"
                    f"    'content'\n    return [{bodies[name]} for c in completions]\n")  # fmt: skip
    rewards = grpo.load_rewards([f"{file}:{name}"])
    message = rf"failed on record 0: (Attribute|Type)Error: .*\. Its completions.* are {given}: to get {other}, write "
    with pytest.raises(mv.InputError, match=message + re.escape(f"`completions: {annotation}` in its signature")):
        grpo.score(rewards, upstream_groups(), UPSTREAM_COLUMNS)


@pytest.mark.parametrize("text, message", [
    ("def f(completions, **kwargs): return [1.0]", r"no function of the file is named \*_reward: rename them"),
    ("def _own_reward(a, b): return 1.0", r"_own_reward must take \*\*kwargs: .*, or rename it if it is"),
    ("async def a_reward(completions, **kwargs): return 1", "has no plain function 'a_reward', it is async"),
])  # fmt: skip
def test_files_without_usable_rewards(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    (problem,) = grpo.GRPOArguments(reward_funcs=[str(tmp_path / "mine.py")]).check(set())
    assert re.search(message, problem)


@pytest.mark.parametrize("flags, message", [
    ({"num_generations": 1}, "--num_generations 1"), ({"temperature": 0.0}, "--temperature 0.0"),
    ({"top_p": 0.0}, "--top_p 0.0"), ({"top_p": 1.1}, "--top_p 1.1"), ({"min_p": 2.0}, "--min_p 2.0"),
    ({"top_k": -1}, "--top_k -1"), ({"beta": -0.1}, "--beta -0.1"), ({"epsilon": 1.5}, "--epsilon 1.5"),
    ({"max_completion_length": 40000}, "leaves no room for a prompt"), ({"num_iterations": 0}, "--num_iterations 0"),
    ({"max_prompt_length": 32768}, "are more than --max_seq_length 32768"),
    ({"rollout_cache_gb": 0.0}, "--rollout_cache_gb"),
    ({"reward_weights": [1.0]}, "--reward_weights has 1 numbers for 2 --reward_funcs"),
])  # fmt: skip
def test_wrong_flags(flags, message):
    (problem,) = grpo.GRPOArguments(**flags).check(set())
    assert message in problem


def test_upstream_command(tmp_path, monkeypatch, capsys):
    """Every flag of upstream's script and arguments is kept, or answered by what replaces it."""
    names = {option.name for option in fields(grpo.GRPOArguments)}
    for flag in upstream_commands.ACCEPTED_FIELDS["grpo"]:
        assert (flag in names) != (flag in mv.REPLACED_FLAGS), flag
    (tmp_path / "data.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    command = upstream_commands.GRPO_COMMANDS["finetune_grpo.sh"]
    pairs = {**dict(zip(command[::2], command[1::2])), "--data_path": "data.json", "--image_folder": "."}
    kept = [word for flag, value in pairs.items() if flag[2:] in names for word in (flag, value)]
    args = mv.parse_arguments(grpo.GRPOArguments, kept)
    assert (args.num_generations, args.max_prompt_length, args.max_completion_length) == (2, 512, 256)
    defaults = {"beta": 0.04, "temperature": 0.9, "top_k": 50, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    assert {name: getattr(args, name) for name in defaults} == defaults and args.reward_weights == [1.0, 1.0]
    with pytest.raises(SystemExit):
        mv.parse_arguments(grpo.GRPOArguments, [*kept, "--epsilon", "-1", "--deepspeed", "x", "--top_p", "2"])
    told = capsys.readouterr().err
    assert "3 problems" in told and "--epsilon -1.0: must be above 0" in told and "--top_p 2.0" in told


# ---------------------------------------------------------------------------------------------------------- records


def turn(role, *parts):
    content = [mv._part("text", text=p) if isinstance(p, str) else p for p in parts]
    return {"role": role, "content": content, "train": None, "reasoning": None, "tool_calls": None}


def test_records():
    """The seed's records with and without tags, several turns, prompts as texts and as turns, and their columns."""
    a, b = (mv._part("video", files=[name]) for name in ("a.mp4", "b.mp4"))
    talk = [{"from": "human", "value": "<video>\n<video>\nWhat?"}, {"from": "gpt", "value": "This."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]  # fmt: skip
    seed = grpo.normalize_record({"id": 4, "video": ["a.mp4", "b.mp4"], "conversations": talk, "view": "left"}, "r")
    assert seed["messages"] == [turn("user", a, b, "What?")] and seed["completions"] == []
    assert (seed["id"], seed["reference"], seed["left_out"], seed["prompt"]) == ("4", "This.", 2, None)
    assert json.loads(seed["columns"]) == {
        "id": 4, "view": "left", "assistant": {"role": "assistant", "content": "This."}
    }  # fmt: skip
    untagged = [{"from": "human", "value": "What?"}, talk[1]]
    assert grpo.normalize_record({"id": 4, "video": ["a.mp4", "b.mp4"], "conversations": untagged}, "r")[
        "messages"] == seed["messages"]  # fmt: skip
    text = grpo.normalize_record({"prompt": "<video>\nWhat?", "videos": ["a.mp4"], "solution": 0.5, "extra": [1]}, "r")
    assert text["messages"] == [turn("user", a, "What?")] and text["prompt"] == "<video>\nWhat?"
    assert text["reference"] == "0.5" and json.loads(text["columns"]) == {"solution": 0.5, "extra": [1]}
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": [
        {"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Hm?"}]},
        {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "What?"}]  # fmt: skip
    row = grpo.normalize_record({"prompt": turns}, "r")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user"]
    assert (row["prompt"], row["reference"]) == (None, None)


ORDER = ["b.mp4", "a.mp4", {"video": "c.mp4", "fps": 1}, ["1.png", "2.png"], "a.mp4"]


@pytest.mark.parametrize("form", ["conversations", "messages", "prompt of turns", "prompt", "prompt of parts"])
@pytest.mark.parametrize("media", ["video", "videos"])
@pytest.mark.parametrize("newline", ["\n", ""])
def test_prompts_with_and_without_tags_are_one(form, media, newline, tmp_path):
    """The same videos in the same order, media first; through the data file, and in what reward functions get."""

    def record(question):
        if form == "prompt of parts":
            question = [*[{"type": "video"}] * question.count("<video>"), {"type": "text", "text": "What changed?"}]
        ask, answer = {"role": "user", "content": question}, {"role": "assistant", "content": "It moved."}
        if form == "conversations":
            turns = {form: [{"from": "human", "value": question}, {"from": "gpt", "value": "It moved."}]}
        elif form == "messages":
            turns = {form: [ask, answer]}
        else:
            turns = {"prompt": question if form == "prompt" else [ask], "solution": "It moved."}
        return {"id": 1, media: [*ORDER], **turns}

    questions = ["What changed?", f"<video>{newline}" * 5 + "What changed?"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record(question)) + "\n" for question in questions))
    rows = list(mv.load_records(str(tmp_path / "data.jsonl"), grpo.normalize_record, grpo.FEATURES))
    expected = [["b.mp4"], ["a.mp4"], ["c.mp4"], ["1.png", "2.png"], ["a.mp4"], []]
    for row, question in zip(rows, questions):
        ((role, content),) = [(message["role"], message["content"]) for message in row["messages"]]
        assert (role, [part["files"] for part in content]) == ("user", expected)
        assert content[-1]["text"] == "What changed?" and content[2]["fps"] == 1 and row["reference"] == "It moved."
        assert row["prompt"] == (question if form == "prompt" else None)
    assert rows[0]["messages"] == rows[1]["messages"]
    given = grpo.reward_inputs([{"record": row, "texts": ["a"], "ids": [[1]]} for row in rows], [])
    assert given["prompts"] == (questions if form == "prompt" else [given["prompts"][0]] * 2)


@pytest.mark.parametrize("key, value, expected", [
    ("solution", "Left.", "Left."), ("answer", 3, "3"), ("ground_truth", 0.5, "0.5"), ("reference", True, "True"),
])  # fmt: skip
@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_references_beside_a_conversation(field, key, value, expected):
    """They win over the answer, which then marks where the prompt ends, empty or not; without one all is prompt."""
    talk = [turn("system", "Brief."), turn("user", "First?"), turn("assistant", "One."), turn("user", "Then?")]
    said = [{"role": message["role"], "content": message["content"][0]["text"]} for message in talk]

    def normalized(turns, **own):
        if field == "conversations":
            turns = [{"from": message["role"], "value": message["content"]} for message in turns]
        return grpo.normalize_record({"id": 1, field: turns, **own}, "r")

    assert normalized(said, **{key: None})["reference"] == "One."
    assert normalized(said, **{key: []})["reference"] == "One."
    whole = normalized(said, **{key: value})
    assert (whole["messages"], whole["reference"], whole["left_out"]) == (talk, expected, 0)
    assert json.loads(whole["columns"]) == {"id": 1, key: value} and whole["column_names"] == ["id", key]
    for answer in ("", "Two."):
        row = normalized([*said[:2], {"role": "assistant", "content": answer}], **{key: value})
        assert (row["messages"], row["reference"], row["left_out"]) == (talk[:2], expected, 0)
        assert row["column_names"] == ["id", key, "assistant"]
    row = normalized([*said, {"role": "assistant", "content": "Two."}], **{key: value})
    assert (row["messages"], row["reference"], row["left_out"]) == (talk[:2], expected, 2)
    both = normalized(said[:2], **{key: value, "reference": "last"})
    assert (both["messages"], both["reference"]) == (talk[:2], "last" if key == "reference" else expected)


@pytest.mark.parametrize("record, message", [
    ({"conversations": [{"from": "human", "value": "a"}], "answer": ["b"]}, "'answer': the reference answer must"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "solution": " "},
     "'solution': the reference answer is empty"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "reference answer is empty"),
    ({"prompt": "a", "answer": math.nan}, "'answer': the reference answer must be a text or a number, got nan"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "'prompt' and 'messages' are both there"),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "must end with a user"),
    ({"prompt": "a", "answer": ["b"]}, "reference answer must be a text or a number"),
    ({"prompt": "a", "answer": "  "}, "reference answer is empty"),
    ({"prompt": "a", "when": {1, 2}}, "a column is neither text, number, list nor object"),
    ({"prompt": "<video> a"}, "1 <video> tags for 0 videos"),
    ({"video": "a.mp4", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                          {"from": "human", "value": "<video>"}]},
     "in the first answer or a turn after it, which is not read"),
    ({"answer": "c", "messages": [{"role": "user", "content": "a"},
                                  {"role": "assistant", "content": [{"type": "video", "video": "a.mp4"}]}]},
     "in the first answer or a turn after it, which is not read"),
    ({"conversations": [{"from": "gpt", "value": "b"}]}, "first turn after any system turn must be the user's"),
    ("text", "a record must be an object"),
])  # fmt: skip
def test_wrong_records(record, message):
    with pytest.raises(ValueError, match=message):
        grpo.normalize_record(record, "record 3")


def test_examples(tmp_path):
    """Every record of the example file is read, with its reference."""
    rows = mv.load_records(str(ROOT / "examples" / "grpo.jsonl"), grpo.normalize_record, grpo.FEATURES)
    assert len(rows) >= 3 and all(row["reference"] for row in rows)
    assert {row["prompt"] is None for row in rows} == {True, False}


def test_missing_references_are_an_error(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}, {"id": "q", "prompt": "c"}]))
    rows = mv.load_records(str(tmp_path / "a.json"), grpo.normalize_record, grpo.FEATURES)
    grpo.check_references("--data_path", rows, ["format", "mine.py:f"])
    with pytest.raises(mv.InputError, match="--data_path: 1 records have no reference answer, first q, but"):
        grpo.check_references("--data_path", rows, ["format", "choice"])


# ------------------------------------------------------------------------------------------------------------- runs


def train(monkeypatch, *flags):
    """train_grpo.main() in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *map(str, flags), "--dataloader_num_workers", "0"])
    handlers = {number: signal.getsignal(number) for number in mv.STOP_SIGNALS}
    try:
        grpo.main()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


LENGTH_REWARD = """
def few_spaces(completions, **kwargs):
    return [1 - c[0]["content"].count(" ") / 10 for c in completions]

def same(completions, **kwargs):
    return [0.5] * len(completions)
"""
TIMES = {"step_seconds", "data_wait_seconds", "rollout_seconds", "reward_seconds", "rollout_tokens_per_second",
         "update_tokens_per_second", "max_memory_gb"}  # fmt: skip


def steady(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(folder, volatile=True)]


@pytest.fixture(scope="module")
def flags(demo, tmp_path_factory):  # noqa: F811
    """Six steps of 2 rows of 1 prompt of 6 videos, 4 completions each, two steps on each batch of completions."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "lengths.py").write_text(LENGTH_REWARD)
    for split in ("train", "eval"):
        records = json.loads((demo / f"sft_{split}.json").read_text())[:8]
        for record in records:
            record["video"] = record["video"][:6]
            record["conversations"][0]["value"] = "Which colour?"
        (folder / f"{split}.json").write_text(json.dumps(records))
    return [
        "--model_id", demo / "model", "--data_path", folder / "train.json", "--image_folder", demo / "videos",
        "--video_resized_width", 64, "--video_resized_height", 64, "--nframes", 4, "--max_steps", 6,
        "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--num_generations", 4,
        "--num_iterations", 2, "--max_completion_length", 6, "--top_k", 0, "--learning_rate", 1e-3, "--optim", "sgd",
        "--reward_funcs", folder / "lengths.py:few_spaces", "accuracy", "--logging_steps", 2,
    ]  # fmt: skip


def evaluation(flags):
    data = Path(flags[flags.index("--data_path") + 1]).with_name("eval.json")
    return ["--eval_path", data, "--eval_strategy", "steps", "--eval_steps", 4]


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """A run without a break, evaluated and saved on the way."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(monkeypatch, *flags, *evaluation(flags), "--save_steps", 2, "--output_dir", folder)
    return folder


def test_metrics(straight):
    rows = metrics(straight, volatile=True)
    steps, evals = [row for row in rows if "loss" in row], [row for row in rows if "eval_reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and [row["step"] for row in evals] == [4, 6]
    for first, second in zip(steps[::2], steps[1::2]):
        assert first["kl"] == pytest.approx(0.0, abs=1e-7) or first["step"] > 1
        assert first["clip_ratio"] == 0 and second["rollout_seconds"] == 0 < first["rollout_seconds"]
        assert first["records_crc32"] == second["records_crc32"] and first["reward"] == second["reward"]
        assert first["sampling_logp_difference"] < 1e-5
    assert all(row["samples"] == 2 and row["videos"] == 12 and row["completions"] == 8 for row in steps)
    assert steps[1]["kl"] > 0 and all(row["rewards/accuracy"] == 0 < row["rewards/few_spaces"] for row in steps)
    assert {"reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"} <= set(
        steps[0]
    )
    assert evals[0]["eval_samples"] == 8 and {"eval_accuracy", "eval_rewards/few_spaces"} <= set(evals[0])
    shown = [json.loads(line) for line in (straight / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in shown] == [1, 3, 5]
    assert shown[0]["prompt"] == "<video>×6 Which colour?" and shown[0]["reference"].startswith("The one coloured")
    one = shown[0]["completions"][0]
    assert len(shown[0]["completions"]) == 4 and one["few_spaces"] == pytest.approx(1 - one["text"].count(" ") / 10)
    assert [path.name for path in mv.list_checkpoints(straight)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_resume_is_bit_equal(straight, flags, tmp_path, monkeypatch):
    """From a checkpoint: the same completions, rewards, losses and weights as without the break, bit for bit."""
    shutil.copytree(straight / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in ("metrics.jsonl", "completions.jsonl"):
        shutil.copy(straight / name, tmp_path)
    flags = [*flags, *evaluation(flags), "--save_strategy", "no", "--output_dir", tmp_path]
    train(monkeypatch, *flags, "--resume_from_checkpoint", "auto")
    assert steady(tmp_path) == steady(straight)
    assert (tmp_path / "completions.jsonl").read_text() == (straight / "completions.jsonl").read_text()
    expected = load_file(straight / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_a_run_with_a_file_of_rewards(flags, tmp_path, monkeypatch, capsys):
    """The rewards of the first step's completions, worked out from their texts; the banner says what was given.

    One of its functions by name, which TRL would give messages, ends the run before the weights, as for --eval_path.
    """
    (tmp_path / "reward_funcs.py").write_text(UPSTREAM_TEXTS)
    plain = [{"prompt": "Which colour?", "solution": "red"}] * 8
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    one = ["--reward_funcs", f"{tmp_path / 'reward_funcs.py'}:length_reward", "--output_dir", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(mv, "load_model", lambda *args: pytest.fail("loaded a model"))
        with pytest.raises(mv.InputError, match=r"length_reward: for records of --data_path \S+ completions are"):
            train(patched, *flags, *one)
        with pytest.raises(mv.InputError, match=r"length_reward: for records of --eval_path \S+ completions are"):
            train(patched, *flags, *one, *evaluation(flags), "--data_path", tmp_path / "plain.json")
    train(monkeypatch, *flags, "--max_steps", 2, "--reward_funcs", tmp_path / "reward_funcs.py",
          "--reward_weights", 1, 1, 0.5, "--output_dir", tmp_path / "out")  # fmt: skip
    assert "0.5 × length_reward (given texts)" in "".join(capsys.readouterr())
    row = json.loads((tmp_path / "out" / "completions.jsonl").read_text().splitlines()[0])
    lengths = [one["length_reward"] for one in row["completions"]]
    assert lengths == [len(one["text"]) for one in row["completions"]] and len(set(lengths)) > 1
    for one in row["completions"]:
        assert (one["format_reward"], one["accuracy_reward"], one["reward"]) == (0, 0, one["length_reward"] / 2)
    assert {f"rewards/{name}" for name in UPSTREAM_NAMES} <= set(metrics(tmp_path / "out")[0])


@pytest.mark.parametrize("moment", ["rollout", "update", "eval"])
def test_stopped_by_a_signal(straight, flags, tmp_path, monkeypatch, moment):
    """SIGTERM amid sampling, amid the first of two updates, amid an evaluation: exit 143, then the run of no break."""
    counts, sample, step = {"tokens": 0, "steps": 0}, grpo.sample_tokens, mv.Engine.step
    decode = grpo._decode

    def sample_tokens(scores, draws):
        counts["tokens"] += 1
        if moment == "rollout" and counts["tokens"] == 6 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        assert moment != "rollout" or counts["tokens"] <= 9, "the rollout went on"
        return sample(scores, draws)

    def stepped(engine):
        counts["steps"] += 1
        if moment == "update" and counts["steps"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(engine)

    def decoded(model, prompts, encoder, args, draws, *rest):
        if moment == "eval" and draws is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(model, prompts, encoder, args, draws, *rest)

    flags = [*flags, *evaluation(flags), "--save_steps", 4, "--output_dir", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(grpo, "sample_tokens", sample_tokens)
        patched.setattr(mv.Engine, "step", stepped)
        patched.setattr(grpo, "_decode", decoded)
        with pytest.raises(SystemExit) as stopped:
            train(patched, *flags)
    assert stopped.value.code == 143
    at = {"rollout": 2, "update": 4, "eval": 4}[moment]
    assert [path.name for path in mv.list_checkpoints(tmp_path)][-1] == f"checkpoint-{at}"
    train(monkeypatch, *flags, "--resume_from_checkpoint", "auto")
    assert steady(tmp_path) == steady(straight)
    assert (tmp_path / "completions.jsonl").read_text() == (straight / "completions.jsonl").read_text()


def test_equal_rewards_teach_nothing(flags, demo, tmp_path, monkeypatch):  # noqa: F811
    """Without KL: no group is packed, loss and gradient are 0, no weight moves; the rows run the dummy."""
    file = Path(str(flags[flags.index("--reward_funcs") + 1]).split(":")[0])
    train(
        monkeypatch, *flags, "--max_steps", 2, "--reward_funcs", f"{file}:same", "--beta", 0, "--output_dir", tmp_path
    )
    for row in metrics(tmp_path):
        assert (row["loss"], row["grad_norm"], row["update_tokens"], row["frac_reward_zero_std"]) == (0, 0, 0, 1)
        assert row["supervised_tokens"] > 0 and row["kl"] == 0
    before, after = load_file(demo / "model" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_adapters(flags, tmp_path, monkeypatch):
    """LoRA with KL: the reference is what the adapter stands beside, no second model; dropout is off in rollouts."""
    loads = []
    load = mv.load_model
    monkeypatch.setattr(mv, "load_model", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    train(monkeypatch, *flags, "--lora_enable", "True", "--freeze_llm", "True", "--beta", 0.1, "--lora_dropout", 0.5,
          "--learning_rate", 0.05, "--lora_namespan_exclude", "['lm_head', 'embed_tokens']", "--max_steps", 4,
          "--bf16", "True", "--gradient_checkpointing", "True", "--output_dir", tmp_path)  # fmt: skip
    rows = metrics(tmp_path)
    assert len(loads) == 1 and (tmp_path / "adapter_model.safetensors").is_file()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["kl"] > 1e-4


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_not_the_reference_s(flags, demo, tmp_path, monkeypatch, bias):  # noqa: F811
    """peft does not restore the biases of --lora_bias when it switches the adapter off: the reference is a copy."""
    asked, inner = [], grpo.reference_logps

    def noted(reference, inputs, targets, args):
        logps = inner(reference, inputs, targets, args)
        asked.append((inputs, targets, logps))
        return logps

    monkeypatch.setattr(grpo, "reference_logps", noted)
    train(monkeypatch, *flags, "--lora_enable", "True", "--freeze_llm", "True", "--lora_bias", bias, "--beta", 0.1,
          "--lora_namespan_exclude", "['lm_head', 'embed_tokens']", "--learning_rate", 0.5, "--optim", "adamw_torch",
          "--output_dir", tmp_path)  # fmt: skip
    assert len(asked) == 6  # two rows of three batches of completions
    args = arguments(str(demo / "model"))
    start = mv.load_model(args, "cpu").eval()
    before = {name: value for name, value in start.named_parameters() if name.endswith("q_proj.bias")}
    trained = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name.removeprefix("base_model.model.").replace("base_layer.", ""): v for name, v in trained.items()}
    assert before and all(not torch.equal(value, trained[name]) for name, value in before.items())
    with torch.no_grad():
        for inputs, targets, logps in asked:
            expected = mv.token_logps(start(**inputs).logits, targets, args.temperature)
            torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def test_two_processes_under_zero3_equal_one(runner, straight, flags, tmp_path):
    """Weights and reference split over two processes, gathered for the rollouts: completions, losses and rewards."""
    one_row = [1 if flags[i - 1] == "--gradient_accumulation_steps" else flag for i, flag in enumerate(flags)]
    runner.launch(
        "--config_file", "accelerate_configs/zero3.yaml", "--num_processes", 2, "train_grpo.py", *one_row,
        *evaluation(flags), "--save_strategy", "no", "--dataloader_num_workers", 0, "--output_dir", tmp_path,
        log=tmp_path / "rank",
    )  # fmt: skip
    for ours, expected in itertools.zip_longest(steady(tmp_path), steady(straight)):
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (expected["step"], key)
    shown = [(folder / "completions.jsonl").read_text().splitlines() for folder in (tmp_path, straight)]
    texts = [[[one["text"] for one in json.loads(line)["completions"]] for line in lines] for lines in shown]
    assert len(texts[0]) == 3 and texts[0] == texts[1]


def test_fsdp2_rollouts(runner, flags, demo, tmp_path):  # noqa: F811
    """Weights split by torch's fully_shard over two processes: rollouts before and after an update, and the update."""
    data = flags[flags.index("--data_path") + 1]
    worker = [demo / "model", data, demo / "videos", tmp_path]
    done = runner.fork("tests/fsdp2_rollout.py", worker, tmp_path / "rank", world=2).wait(kill_others=5)
    assert done.codes == [0, 0], "\n".join(done.said)[-6000:]
    told = json.loads((tmp_path / "rollout.json").read_text())
    args = grpo.GRPOArguments(
        model_id=str(demo / "model"), nframes=4, video_resized_width=56, video_resized_height=56, num_generations=3,
        max_completion_length=5, top_k=0, learning_rate=1e-3, output_dir=str(tmp_path),
    )  # fmt: skip
    args.check(set())
    encoder, model = mv.Encoder(args.model_id, args), mv.load_model(args, "cpu").train()
    records = mv.load_records(str(data), grpo.normalize_record, grpo.FEATURES)
    samples = [encoder(records[i], str(demo / "videos")) for i in range(3)]
    draws = [np.random.default_rng(i).random((3, 5)) for i in range(3)]
    optimizer = mv.make_optimizer(model, args)
    for k in range(2):
        ids, logps = grpo.generate(OneProcess(model), samples, encoder, args, draws)
        flat = [[x for group in part for own in group for x in own] for part in (told["logps"][k], logps)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4)
        full = [mv.add_suffixes(sample, [(c, c) for c in group]) for sample, group in zip(samples, ids)]
        inputs, targets, _ = mv.pack(full, encoder, "cpu")
        (-mv.token_logps(model(**inputs).logits, targets, args.temperature).sum() / 100).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert told["ids"] == ids and told["norm"] == pytest.approx(norm.item(), rel=1e-4)
