"""The GPU benchmark on tiny shapes: every cell is there, its FLOPs are right, and its checks can fail."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import multivideo as mv

import benchmark_gpu
import pytest
import torch
import transformers
from make_demo import build_processor
from test_packing import fake_varlen
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ["decord", "av", "pebble", "deepspeed", "bitsandbytes", "flash_attn", "ijson", "trl", "qwen_vl_utils",
          "rouge_score"]  # fmt: skip
KINDS = [("sft", "lora"), ("sft", "all"), ("dpo", "lora"), ("cls", "lora and head"), ("grpo", "lora")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run as a process in which none of ABSENT can be imported: what it printed, and its JSON."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--device", "cpu", "--model", "tiny",
               "--random_weights", "--output_dir", str(folder)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout, json.loads((folder / "gpu-on-cpu.json").read_text())["tiny"], folder


def test_every_cell_is_measured(run):
    printed, results, folder = run
    training = [cell for cell in results["cells"] if cell["part"] == "training"]
    names = {tuple(cell[key] for key in ("objective", "parameters", "checkpointing", "pixels", "way"))
             for cell in training}  # fmt: skip
    expected = {(*kind, *rest) for kind, *rest in product(KINDS, (True, False), (56, 84), ("ours", "usual"))}
    assert names == expected and len(training) == len(expected)
    parts = sorted((c["part"], c["pixels"], c.get("way", "")) for c in results["cells"] if c["part"] != "training")
    assert parts == [("attention", 56, ""), ("attention", 84, ""), ("decoding", 56, "ours"),
                     ("decoding", 56, "static, compiled"), ("decoding", 56, "usual"), ("optimizer", 56, ""),
                     ("packing", 56, ""), ("rollouts", 56, ""), ("tower", 56, ""), ("tower", 84, "")]  # fmt: skip
    assert {cell["status"] for cell in results["cells"]} == {"measured"}
    table = (folder / "gpu-on-cpu.md").read_text()
    assert (
        table.count("\n| sft, 56 px, all: bf16 autocast, adamw_torch_fused |") == 2
        and table.split("\n", 2)[2].strip() in printed
    )
    for cell in training:
        assert min(cell["seconds"]) > 0 and cell["model_tflop"] > 0
        assert cell["mfu"] is None and cell["peak_gib"] is None  # not known of a CPU
    static = next(cell for cell in results["cells"] if cell.get("way") == "static, compiled")
    assert static["compiled"] is False


def test_both_ways_compute_the_same(run):
    """The same loss and useful FLOPs; the usual way repeats the prompt for every answer."""
    _, results, _ = run
    cells = {tuple(cell[key] for key in ("objective", "parameters", "checkpointing", "pixels", "way")): cell
             for cell in results["cells"] if cell["part"] == "training"}  # fmt: skip
    for kind, *rest in product(KINDS, (True, False), (56, 84)):
        ours, usual = cells[(*kind, *rest, "ours")], cells[(*kind, *rest, "usual")]
        assert ours["first_loss"] == pytest.approx(usual["first_loss"], rel=0.01, abs=1e-3), (kind, rest)
        assert ours["model_tflop"] == usual["model_tflop"] and ours["samples"] == usual["samples"]
        assert (usual["tokens"] > ours["tokens"]) is (kind[0] == "dpo")


def test_checks_and_what_is_skipped(run):
    _, results, _ = run
    checks = results["checks"]
    for name in ("causal alignment", "head dimension 80"):
        assert "CUDA" in checks[name]["skipped"]
    assert checks["bf16 error"]["holds"] and 0 < checks["bf16 error"]["ours"] < 0.05
    assert checks["gradients"]["holds"] and 0.999 <= checks["gradients"]["ours"] < 1
    for name in benchmark_gpu.OPTIONAL:
        assert any(note.startswith(f"{name} is not installed: ") for note in results["skipped"])
    assert any("FLOP utilisation" in note for note in results["skipped"])


@pytest.mark.parametrize("right", [True, False])
def test_alignment_check(monkeypatch, right):
    """The check holds for a stand-in that does what torch documents, and not for one aligned to the first key."""

    def first_key(*args, window_size=(-1, -1), **kwargs):
        tril = torch.Tensor.tril
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "tril", lambda mask, diagonal=0: tril(mask))
            return fake_varlen(*args, window_size=window_size, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen if right else first_key)
    config = benchmark_gpu.make_config("tiny", build_processor("qwen2_5_vl").tokenizer)
    figures = benchmark_gpu.check_alignment(config, torch.device("cpu"), "varlen", torch.float32)
    if right:
        assert figures["relative error"] < 1e-5
        tower = benchmark_gpu.check_tower_heads(torch.device("cpu"), "varlen", torch.float32)
        assert tower["relative error"] < 1e-5
        assert benchmark_gpu.check_heads(torch.device("cpu"), "varlen", torch.float32)["relative error"] < 1e-5
        assert benchmark_gpu.check_masks(torch.device("cpu"), torch.float32)["relative error"] < 1e-5
    else:
        assert figures["relative error"] > figures["at most"]


def test_recurrence_check(run, monkeypatch):
    """It holds, and does not where answers begin without their prompt's state."""
    figures = run[1]["checks"]["states that answers go on from"]
    assert figures["holds"] and 0 < figures["ours"] < 0.05 and figures["kernels"] == "plain torch"
    nothing = staticmethod(lambda self, conv=None, recurrent=None: vars(self).update(conv=None, recurrent=None))
    monkeypatch.setattr(mv.RecurrentStates, "__init__", nothing.__func__)
    figures = benchmark_gpu.check_recurrence("cpu", torch.bfloat16, 2)
    assert figures["ratio"] > 5 * figures["at most"]


@pytest.fixture
def bench(tmp_path):
    return benchmark_gpu.Bench(SimpleNamespace(device="cpu", model="tiny", minutes=1e6), tmp_path)


def test_precision_check(bench, monkeypatch):
    """Attention that is 5 % too strong is found, in the logits."""
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda *args, **kwargs: 1.05 * fake_varlen(*args, **kwargs)
    )
    bench.kernel = "varlen"
    error, gradients = benchmark_gpu.check_precision(bench)
    assert error["ratio"] > error["at most"] and gradients["ours"] < gradients["HF in bf16"]


def test_steps_call_varlen_as_it_demands(run, bench, monkeypatch):
    """On CUDA the kernel takes half precision, rows of heads, int32 lengths and plain numbers; the losses stay."""

    def demanding(query, key, value, cu_q, cu_k, max_q, max_k, **options):
        assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        assert all(x.stride(-1) == 1 for x in (query, key, value)) and {type(max_q), type(max_k)} == {int}
        assert all(cu.dtype == torch.int32 and cu.is_contiguous() for cu in (cu_q, cu_k))
        calls.append(len(query))
        return fake_varlen(query, key, value, cu_q, cu_k, max_q, max_k, **options)

    calls, bench.kernel = [], "varlen"
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", demanding)
    cells = [cell for cell in run[1]["cells"] if cell["part"] == "training" and cell["way"] == "ours"
             and cell["pixels"] == 56 and cell["checkpointing"]]  # fmt: skip
    assert len(cells) == len(KINDS)
    for cell in cells:
        bench.run(again := dict(cell))
        assert again["status"] == "measured" and calls
        assert again["first_loss"] == pytest.approx(cell["first_loss"], rel=0.01, abs=1e-3)
        calls.clear()


@pytest.mark.parametrize("parameters", ["all", "lora", "lora and head"])
def test_flops(bench, parameters):
    """Forward and backward by the formula against torch's own count, to 0.1 %."""
    bench.scale = dataclasses.replace(bench.scale, rows={140: 1})  # its windows are 8 and 2 patches wide
    bench.load(parameters)
    objective = "cls" if parameters == "lora and head" else "sft"
    data = bench.data(objective, 140)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        getattr(bench, objective)("ours", data)
    plan = mv.pack(data.samples, data.encoder, "cpu")[0]["plan"]
    (length,), text = plan.lengths, bench.config.get_text_config()
    masked = 12 * text.hidden_size * text.num_hidden_layers * length * (length - 1) // 2  # pairs that torch counts too
    assert counter.get_total_flops() - masked == pytest.approx(bench.flops(objective, data), rel=1e-3)


@pytest.mark.parametrize(("name", "parameters", "tied"), [("3b", 3754622976, True), ("7b", 8292166656, False)])
def test_shapes(name, parameters, tied):
    """The models have as many parameters as the published ones."""
    with torch.device("meta"):
        config = benchmark_gpu.make_config(name, build_processor("qwen2_5_vl").tokenizer)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_cells_that_are_not_measured(bench, monkeypatch):
    """Out of memory, an error and the end of the time cost the cell in which they come, which says so."""
    cells, sft = [dict(cell) for cell in bench.cells[:4]], bench.sft
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), ValueError("no\nmore"), benchmark_gpu.OutOfTime()])

    def failing(way, data):
        for error in errors:
            raise error
        return sft(way, data)

    monkeypatch.setattr(bench, "sft", failing)
    for cell in cells:
        bench.run(cell)
    assert [cell["status"] for cell in cells] == [
        "out of memory", "failed: ValueError: no", "not reached (begun, stopped)", "measured"
    ]  # fmt: skip
    bench.options.minutes = 0
    bench.run(late := dict(bench.cells[0]))
    assert late["status"] == "not reached"
    run = {"where": {"device": "CPU"}, "checks": {}, "cells": [*cells, late], "seconds": 1.0, "skipped": []}
    lines = benchmark_gpu.table("tiny", run)
    assert "- no time was left for 2 of 5: training sft lora" in lines and benchmark_gpu.UTILISATION in lines


HANGS = """
import signal, sys, time
import benchmark_gpu
def hang(bench):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(600)
benchmark_gpu.Bench.check = hang
benchmark_gpu.main()
"""


@pytest.mark.timeout(60)
def test_what_hangs_is_ended(tmp_path):
    """What no signal ends: the results so far are written, and the process ends within its time."""
    flags = ["--device", "cpu", "--model", "tiny", "--random_weights", "--minutes", "-1.2", "--output_dir", tmp_path]
    ended = subprocess.run([sys.executable, "-c", HANGS, *map(str, flags)], cwd=ROOT / "tools", timeout=50)
    assert ended.returncode == 1
    assert "- ended by force" in (tmp_path / "gpu-on-cpu.md").read_text()
    assert json.loads((tmp_path / "gpu-on-cpu.json").read_text())["tiny"]["skipped"][-1].startswith("ended by force")
