"""Two processes give the numbers of one, with Qwen3.5 and Qwen3-VL, whatever each rank's rows hold."""

import json
from pathlib import Path

import multivideo as mv

import numpy as np
import pytest
from PIL import Image
from reference import write_clip
from safetensors.torch import load_file
from test_distributed import CONFIGS
from test_train import in_process, metrics

REWARD = """
def brevity(completions, **kwargs):
    return [-len(completion) / 10 for completion in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips, two images, and records: in each step one has only images or no media, the other only videos."""
    folder = tmp_path_factory.mktemp("runs")
    for i in range(2):
        write_clip(folder / f"{i}.mp4", 64 + 64 * i, 64, 20 + 10 * i, rate=10, seed=i)
        noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "reward.py").write_text(REWARD)
    still = {"image": ["0.png", "1.png"], "prompt": "<image>\nor\n<image>?"}
    clip = {"video": ["0.mp4", "1.mp4"], "prompt": "<video>\n<video>\nWhich?"}
    text = {"prompt": "Which is red?"}
    windows = mv.step_windows(4, 2, mv.TrainingArguments().seed, 0)
    records = [None] * 4
    for (first, second), other in zip((next(windows)[0], next(windows)[0]), (still, text)):
        records[first], records[second] = other, clip
    answers = ["The second.", "Neither of them, I think."]
    pairs = [{**record, "chosen": answers[i % 2], "rejected": answers[i % 2 - 1]} for i, record in enumerate(records)]
    (folder / "dpo.json").write_text(json.dumps(pairs))
    (folder / "grpo.json").write_text(json.dumps(records))
    return folder


FLAGS = {
    "dpo": ["--beta", 5],
    "grpo": ["--num_generations", 4, "--max_completion_length", 8, "--max_grad_norm", 0],
}


@pytest.mark.parametrize("model, trainer", [("tiny_qwen3_5", "dpo"), ("tiny_qwen3_vl", "grpo")])
def test_two_processes_equal_one(runner, request, folder, tmp_path, monkeypatch, model, trainer):
    """Losses, norms and the model after two steps; under ZeRO-3 no rank waits for a layer that another leaves out."""
    flags = [
        "--model_id", request.getfixturevalue(model), "--data_path", folder / f"{trainer}.json", "--image_folder",
        folder, "--video_resized_width", 64, "--video_resized_height", 64, "--image_resized_width", 64,
        "--image_resized_height", 64, "--max_steps", 2, "--learning_rate", 0.05, "--optim", "sgd",
        "--lr_scheduler_type", "constant", "--save_strategy", "no", "--per_device_train_batch_size", 1,
        "--gradient_checkpointing", "True", "--video_cache", "none", *FLAGS[trainer],
    ]  # fmt: skip
    if trainer == "grpo":
        flags += ["--reward_funcs", f"{folder / 'reward.py'}:brevity"]
    alone = tmp_path / "alone"
    in_process(monkeypatch, *flags, "--gradient_accumulation_steps", 2, "--output_dir", alone,
               trainer=f"train_{trainer}")  # fmt: skip
    expected, before = load_file(alone / "model.safetensors"), load_file(Path(flags[1]) / "model.safetensors")
    moved = max((expected[name] - before[name]).abs().max().item() for name in before)
    assert moved > 1e-3
    for config in ("ddp", "zero3"):
        runner.launch(
            "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", 2, f"train_{trainer}.py", *flags,
            "--dataloader_num_workers", 0, "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / config,
            log=tmp_path / config,
        )  # fmt: skip
        for ours, theirs in zip(metrics(tmp_path / config), metrics(alone), strict=True):
            for name in ("loss", "grad_norm", "reward"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (config, name)
            assert (ours["videos"], ours["images"], ours["tokens"]) == (
                theirs["videos"], theirs["images"], theirs["tokens"],
            )  # fmt: skip
        weights = load_file(tmp_path / config / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert (value - expected[name]).abs().max() < 1e-3 * moved, (config, name)
