"""Shared fixtures: everything is made once per session, on the spot, without any download."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools", ROOT / "tests"):
    sys.path.insert(0, str(folder))

import pytest
import torch
from survival import Runner

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


LONGEST = ["survival", "faults", "distributed", "packing", "fake_cuda", "benchmark", "tools_data", "predict", "train",
           "families_runs", "readme", "families", "nothing_learned", "dpo", "grpo", "data", "records", "app", "cls",
           "adapters"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that no worker of --dist loadfile ends with one while others are idle."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory):
    """Arrow files go to a folder of this session, so that every run converts anew."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    os.environ["MULTIVIDEO_CACHE"] = str(tmp_path_factory.mktemp("video_cache"))


@pytest.fixture(scope="session")
def runner(private_caches):
    """Starts trainers, of one or several processes, as forks of one process that has imported everything."""
    runner = Runner({}, preload=("peft", "sklearn.metrics", "deepspeed"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random Qwen2.5-VL with its processor."""
    from make_demo import save_tiny_model

    path = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    save_tiny_model(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory):
    """Folder of a tiny random Qwen2-VL with its processor."""
    from make_demo import save_tiny_model

    path = tmp_path_factory.mktemp("models") / "qwen2_vl"
    save_tiny_model(path, family="qwen2_vl")
    return str(path)


def save_distinct(path, family, template, **sizes):
    """Save a tiny model with the real chat template, and with norms and biases that are neither 1 nor 0.

    Whatever a forward leaves out then shows. Recurrent layers remember for up to 50 tokens: as initialized, they
    forget a prompt within the tokens that open the answer.
    """
    from make_demo import save_tiny_model
    from reference import real_template
    from safetensors.torch import load_file, save_file

    save_tiny_model(path, family, initializer_range=0.08, chat_template=real_template(template), **sizes)
    weights, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith("A_log"):
            weight.copy_(torch.linspace(-4, 0, len(weight)))  # a state fades by exp(-1.3 × 0.02 … 1) per token
        if weight.ndim == 1:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory):
    """Folder of a tiny random Qwen3-VL with its processor; what the tower adds to two of three layers has effects."""
    return save_distinct(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl", "qwen3_vl", num_layers=3)


@pytest.fixture(scope="session")
def tiny_qwen3_5(tmp_path_factory):
    """Folder of a tiny random Qwen3.5 with its processor; its template does not think unless asked."""
    return save_distinct(tmp_path_factory.mktemp("models") / "qwen3_5", "qwen3_5", "qwen3_5_nothink")
