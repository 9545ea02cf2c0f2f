"""The four trainers' main() on a CUDA device that is not there (fake_cuda.py), each in its training and evaluation."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OBJECTIVES = ["sft", "sft+lora", "sft+qwen3_vl", "sft+qwen3_5", "dpo+lora", "cls", "grpo"]
WAITS = 7  # of the host for the device in a step of SFT with two rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{run: what fake_cuda_run.py tells of it}."""
    folder, compiler = tmp_path_factory.mktemp("fake"), shutil.which("cc")
    if not compiler:
        pytest.skip("the stand-in for the driver needs a C compiler: cc")
    shim = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", HERE / "shim.c", "-o", shim], check=True)
    done = subprocess.run(
        [sys.executable, HERE / "fake_cuda_run.py", folder / "out.json", *OBJECTIVES, "sft+a tensor on the CPU",
         "benchmark"],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((folder / "out.json").read_text()), "stderr": done.stderr}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_operation_mixes_devices(runs, name):
    """Two steps and an evaluation, no cuDNN attention: it has a plan for each shape, one per decoded token."""
    rows = runs[name]
    assert isinstance(rows, list), rows
    kinds = [row["kind"] for row in rows]
    assert kinds.count("step") == 2 and kinds.count("evaluation") == 1
    backends = {plan[0] for row in rows for plan in row["plans"]}
    assert backends == {"varlen flash", "efficient"} if "grpo" in name else {"varlen flash"}  # efficient: with masks


def test_a_tensor_left_on_the_cpu_is_found(runs):
    assert "found at least two devices, cpu and cuda:0" in runs["sft+a tensor on the CPU"]


def test_banner(runs):
    """The kernels, and that rows of two tiny samples are too short for a GPU."""
    assert "attention  varlen in the tower, varlen in the decoder" in runs["stderr"]
    assert re.search(r"tokens keep a GPU waiting: give --per_device_train_batch_size \d+ and fewer", runs["stderr"])
    assert runs["stderr"].count("flash-linear-attention and causal-conv1d not installed: recurrent layers are") == 1


def test_host_waits(runs):
    """No step waits more often than is written down, and every copy to the device is from pinned memory.

    The first step of a run has the model's loading in its count. Decoding 9 tokens waits nowhere once per token.
    """
    *_, step = [row for row in runs["sft"] if row["kind"] == "step"]
    assert sum(step["waits"].values()) <= WAITS, step["waits"]
    assert step["pageable"] == {}
    for family, more in (("qwen3_5", 0), ("qwen3_vl", 4)):  # where Qwen3-VL adds the tower's features to its layers
        *_, step = [row for row in runs[f"sft+{family}"] if row["kind"] == "step"]
        assert sum(step["waits"].values()) <= WAITS + more, step["waits"]
        assert step["pageable"] == {}
    *_, step = [row for row in runs["grpo"] if row["kind"] == "step"]
    assert max(count for place, count in step["waits"].items() if "train_grpo.py" in place) < 8, step["waits"]


def test_benchmark_runs_to_its_end(runs):
    """Every check and every part of tools/benchmark_gpu.py comes to its end where kernels have no numbers."""
    results = runs["benchmark"]
    assert {cell["status"] for cell in results["cells"]} == {"measured"}, results["cells"]
    assert {cell["part"] for cell in results["cells"]} == {
        "training", "packing", "rollouts", "optimizer", "tower", "attention", "decoding",
    }  # fmt: skip
    assert len(results["checks"]) == 7
    assert not [figures for figures in results["checks"].values() if {"failed", "skipped"} & figures.keys()]
