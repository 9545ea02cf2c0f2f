"""train_sft.py launched for real on a tiny model: what it prints, writes, saves, resumes and refuses."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import multivideo as mv

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = {"step_seconds", "data_wait_seconds", "max_memory_gb"}


def launch(*command, cwd=ROOT, check=True):
    """Run a command of the project with the test environment's Python; returns it with its text output."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, text=True, capture_output=True, timeout=400
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def accelerate(*flags, **kwargs):
    config = ["--config_file", "accelerate_configs/cpu.yaml"]
    return launch(Path(sys.executable).parent / "accelerate", "launch", *config, "train_sft.py", *flags, **kwargs)


def metrics(folder, volatile=False):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if volatile or k not in VOLATILE} for row in rows]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The shortened demo: 24 training and 12 held-out records of 30 real H.264 clips each, and a tiny model."""
    folder = tmp_path_factory.mktemp("demo")
    launch(sys.executable, "tools/make_demo.py", "--small", "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def flags(demo):
    """The flags that all runs of this file share: 20 steps of 2 rows of 2 samples, 24 records, so 4 epochs begin."""
    return [
        "--model_id", demo / "model", "--data_path", demo / "sft_train.json", "--image_folder", demo / "videos",
        "--video_resized_width", 64, "--video_resized_height", 64, "--nframes", 4, "--max_steps", 20,
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 3e-3,
        "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.1, "--dataloader_num_workers", 1,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def straight(demo, flags):
    """20 steps without a break, evaluated and saved on the way, in demo/out."""
    run = accelerate(
        *flags, "--eval_path", demo / "sft_eval.json", "--eval_strategy", "steps", "--eval_steps", 10,
        "--save_strategy", "steps", "--save_steps", 1, "--output_dir", demo / "out", "--report_to", "tensorboard",
        "--logging_steps", 5,
    )  # fmt: skip
    return demo / "out", run.stderr


def test_banner_and_progress(straight):
    _, output = straight
    assert "64×64 asked → 56×56 pixels, 4 tokens per 2 frames" in output
    assert "24, 4 per step = 2 samples × 2 rows × 1 processes" in output
    assert "30 videos, 0 images" in output and "240 visual" in output
    assert "data wait" in output and "samples/s" in output and "videos/s" in output
    assert "saved the last step to" in output


def test_metrics(straight):
    folder, _ = straight
    rows = metrics(folder, volatile=True)
    train, evals = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in train] == list(range(1, 21)) and [row["step"] for row in evals] == [10, 20]
    needed = {"step", "epoch", "loss", "learning_rate", "grad_norm", "samples", "videos", "tokens",
              "supervised_tokens", "step_seconds", "data_wait_seconds", "max_memory_gb"}  # fmt: skip
    assert all(needed <= set(row) for row in train)
    assert all(row["samples"] == 4 and row["videos"] == 120 for row in train)
    assert train[5]["epoch"] == 1 and train[19]["epoch"] == pytest.approx(20 / 6, abs=1e-5)
    assert train[0]["learning_rate"] == 0 and max(row["learning_rate"] for row in train) == pytest.approx(3e-3)
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert evals[0]["eval_samples"] == 12 and evals[1]["eval_loss"] < evals[0]["eval_loss"]
    assert list(folder.rglob("events.out.tfevents*"))
    assert json.loads((folder / "arguments.json").read_text())["learning_rate"] == 3e-3


def test_saved_model_loads_plainly(straight, demo):
    folder, _ = straight
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32 and AutoProcessor.from_pretrained(folder).tokenizer.eos_token == "<|im_end|>"
    trained = load_file(folder / "checkpoint-20" / "model.safetensors")
    before = load_file(demo / "model" / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in load_file(folder / "model.safetensors").items())
    assert all(not torch.equal(value, trained[name]) for name, value in before.items() if value.ndim > 1)
    assert "flash" not in (folder / "config.json").read_text()
    assert (
        not list(folder.rglob("*.aside")) and not list(folder.rglob("*.removed")) and not list(folder.rglob("*.bin"))
    )


def test_loss_equals_plain_model(straight, demo, flags):
    """The first step's loss is that of the plain HF model over the same four records."""
    from reference import assistant_labels, hf_loss

    args = mv.TrainingArguments(
        model_id=str(demo / "model"), video_resized_width=64, video_resized_height=64, nframes=4
    )
    records = mv.load_records(str(demo / "sft_train.json"))
    window, _ = next(mv.step_windows(len(records), 4, seed=42, position=0))
    model = AutoModelForImageTextToText.from_pretrained(demo / "model")
    processor, loss, tokens = AutoProcessor.from_pretrained(demo / "model"), 0.0, 0
    for i in window:
        parts = [part for turn in records[i]["messages"] for part in turn["content"]]
        clips = [mv.load_clip(part, str(demo / "videos"), args, 28)[:2] for part in parts if part["type"] == "video"]
        plain = [{"type": part["type"], "text": part["text"]} for part in parts]
        turns = [{"role": "user", "content": plain[:-1]}, {"role": "assistant", "content": plain[-1:]}]
        text = processor.apply_chat_template(turns, tokenize=False)
        metadata = [{"fps": fps, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]} for _, fps in clips]
        inputs = processor(text=[text], videos=[frames for frames, _ in clips], video_metadata=metadata,
                           do_resize=False, do_sample_frames=False, return_tensors="pt")  # fmt: skip
        labels = assistant_labels(inputs["input_ids"][0].tolist(), processor.tokenizer)
        inputs["position_ids"] = mv.qwen_position_ids(inputs, model.config)
        with torch.no_grad():
            loss += hf_loss(model, inputs, labels).item()
        tokens += int((labels != -100).sum())
    first = metrics(straight[0])[0]
    assert first["supervised_tokens"] == tokens
    assert first["loss"] == pytest.approx(loss / tokens, rel=1e-5)


@pytest.mark.parametrize("step", [7, 13])
def test_resume_is_bit_equal(runner, straight, demo, flags, tmp_path, step):
    """Resumed at a step: the same losses, rates, gradients, records and weights as without the break, bit for bit."""
    folder, _ = straight
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(folder / "metrics.jsonl", tmp_path)  # rows after the checkpoint must be dropped, not doubled
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')  # torn by a kill
    run = runner.run("train_sft.py", [
        *flags[:-1], 0, "--eval_path", demo / "sft_eval.json", "--eval_strategy", "steps", "--eval_steps", 10,
        "--save_strategy", "no", "--resume_from_checkpoint", "auto",
    ], tmp_path)  # fmt: skip
    assert run.codes == [0], run.said[0][-6000:]
    assert metrics(tmp_path) == metrics(folder)
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_demo_is_shown(straight, demo):
    """show_demo.py answers with the trained model and draws the curve (accuracy needs the whole demo)."""
    done = launch(sys.executable, "tools/show_demo.py", demo)
    assert "right before training: " in done.stdout and "accelerate launch" in done.stdout
    assert (demo / "loss.png").stat().st_size > 5000


def reset_accelerate():
    """Forget this process's earlier Accelerator."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()


def in_process(monkeypatch, *flags, trainer="train_sft"):
    """The trainer's main() in this process: no start-up, for runs of a few steps."""
    reset_accelerate()
    monkeypatch.setattr(sys, "argv", [f"{trainer}.py", *map(str, flags), "--dataloader_num_workers", "0"])
    handlers = {number: signal.getsignal(number) for number in mv.STOP_SIGNALS}
    try:
        importlib.import_module(trainer).main()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_early_stopping_and_best_model(demo, flags, tmp_path, monkeypatch):
    """A rate that ruins the model: the best checkpoint survives pruning and becomes the final model."""
    in_process(
        monkeypatch, *flags[:-2], "--max_steps", 12, "--learning_rate", 0.5, "--lr_scheduler_type", "constant",
        "--eval_path", demo / "sft_eval.json", "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1,
        "--save_total_limit", 1, "--load_best_model_at_end", "True", "--early_stopping_patience", 2,
        "--output_dir", tmp_path,
    )  # fmt: skip
    evals = [row for row in metrics(tmp_path) if "eval_loss" in row]
    best = min(evals, key=lambda row: row["eval_loss"])
    assert evals[-1]["step"] == best["step"] + 2 < 12
    names = [path.name for path in mv.list_checkpoints(tmp_path)]
    assert f"checkpoint-{best['step']}" in names and len(names) <= 2
    expected = load_file(tmp_path / f"checkpoint-{best['step']}" / "model.safetensors")
    final = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in final.items())


def test_bad_steps_change_nothing_and_end_the_run(demo, flags, tmp_path, monkeypatch):
    """Infinite weights after one absurd step: the next steps are recorded with their records and update nothing."""
    with pytest.raises(mv.InputError, match="3 steps in a row"):
        in_process(
            monkeypatch, *flags[:-2], "--learning_rate", 1e30, "--lr_scheduler_type", "constant", "--max_bad_steps", 3,
            "--save_strategy", "no", "--output_dir", tmp_path,
        )  # fmt: skip
    rows = metrics(tmp_path)
    assert [(row["not_finite"], row["loss"]) for row in rows[-3:]] == [("loss", None)] * 3
    bad = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in bad] == [row["step"] for row in rows[-3:]]
    records = {record["id"]: record["video"] for record in json.loads((demo / "sft_train.json").read_text())}
    assert all(len(step["records"]) == 4 for step in bad)
    assert all(record["files"] == records[record["id"]] for step in bad for record in step["records"])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_precisions_train_alike(straight, demo, flags, tmp_path, monkeypatch, precision):
    """Three steps under autocast follow the fp32 run; the saved model has the trained parameters' type."""
    in_process(
        monkeypatch, *flags[:-2], f"--{precision}", "True", "--max_steps", 3, "--save_steps", 2,
        "--output_dir", tmp_path,
        "--gradient_checkpointing", "True", "--freeze_vision_tower", "True",
    )  # fmt: skip
    first = metrics(straight[0])[0]["loss"]
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(first, rel=2e-2)
    types = {value.dtype for value in load_file(tmp_path / "model.safetensors").values()}
    expected = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    assert types == {expected} and AutoModelForImageTextToText.from_pretrained(tmp_path).dtype == expected
    in_process(
        monkeypatch, *flags[:-2], f"--{precision}", "True", "--max_steps", 3, "--save_steps", 2,
        "--output_dir", tmp_path,
        "--gradient_checkpointing", "True", "--freeze_vision_tower", "True", "--resume_from_checkpoint",
        tmp_path / "checkpoint-2",
    )  # fmt: skip


def test_long_samples(demo, flags, tmp_path, monkeypatch):
    """Over --max_seq_length: an error with the numbers, or skipped and counted, with the steps unchanged."""
    with pytest.raises(ValueError, match=r"record train-\d+: 3\d\d tokens \(240 visual\), --max_seq_length is 200"):
        in_process(monkeypatch, *flags[:-2], "--max_seq_length", 200, "--output_dir", tmp_path / "a")
    in_process(
        monkeypatch, *flags[:-2], "--max_seq_length", 200, "--on_long_sample", "skip", "--max_steps", 2,
        "--output_dir", tmp_path / "b",
    )  # fmt: skip
    rows = metrics(tmp_path / "b")
    assert [(row["samples"], row["skipped_samples"], row["loss"]) for row in rows] == [(0, 4, None)] * 2
    in_process(
        monkeypatch, *flags[:-2], "--max_video_tokens", 100, "--max_seq_length", 200, "--max_steps", 1,
        "--output_dir", tmp_path / "c",
    )  # fmt: skip
    assert metrics(tmp_path / "c")[0]["shrunk_samples"] == 4


def test_epochs_that_do_not_divide(demo, flags, tmp_path, monkeypatch):
    """24 records in steps of 10: each epoch ends with a step of 4, every record is seen once per epoch."""
    in_process(
        monkeypatch, *flags[:-2], "--max_steps", -1, "--num_train_epochs", 2, "--per_device_train_batch_size", 5,
        "--output_dir", tmp_path, "--save_strategy", "epoch",
    )  # fmt: skip
    rows = metrics(tmp_path)
    assert [row["samples"] for row in rows] == [10, 10, 4] * 2
    assert [path.name for path in mv.list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


def test_damaged_checkpoints_are_skipped(straight, tmp_path, capsys):
    """Torn or truncated ones are named, and the newest complete one is taken."""
    folder, _ = straight
    for step in (5, 6, 7, 8):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "manifest.json").unlink()
    with open(tmp_path / "checkpoint-7" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with open(tmp_path / "checkpoint-6" / "optimizer.safetensors", "r+b") as file:
        file.write(b"\xff" * 8)
    args = mv.TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="auto")
    assert mv.find_checkpoint(args).name == "checkpoint-5"
    said = capsys.readouterr().err
    assert "manifest.json is missing" in said and "model.safetensors has 1000 bytes" in said and "is damaged" in said
    with pytest.raises(ValueError, match="checkpoint-7: model.safetensors has 1000 bytes"):
        mv.find_checkpoint(mv.TrainingArguments(resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_resume_refuses_another_run(straight, demo, flags, tmp_path, monkeypatch):
    folder, _ = straight
    with pytest.raises(ValueError, match=r"samples per step: 4 then, 6 now"):
        in_process(
            monkeypatch, *flags[:-2], "--per_device_train_batch_size", 3, "--output_dir", tmp_path,
            "--resume_from_checkpoint", folder / "checkpoint-7",
        )  # fmt: skip


def test_bad_video_is_one_message(demo, flags, tmp_path, monkeypatch):
    records = json.loads((demo / "sft_train.json").read_text())
    records[5]["video"][17] = "missing.mp4"
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"record train-5: .*missing\.mp4: No such file"):
        in_process(monkeypatch, *flags[:-2], "--data_path", tmp_path / "data.json", "--output_dir", tmp_path / "out")


def test_locks_of_killed_compilations_are_removed(tmp_path, monkeypatch, capsys):
    """DeepSpeed's processes wait for ever for a compilation that was killed; those under way are left alone.

    Not where torch takes the system's locks, whose files stay behind.
    """
    from torch.utils import cpp_extension

    folders = [tmp_path / "py311_cu130" / "cpu_adam", tmp_path / "own", tmp_path / "under_way"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    for folder in folders[:2]:
        os.utime(folder / "lock", (0, time.time() - mv.BUILD_SECONDS - 1))
    monkeypatch.setattr(cpp_extension, "FileLock", None, raising=False)
    mv.remove_dead_locks(str(tmp_path))
    assert len(list(tmp_path.rglob("lock"))) == 3
    monkeypatch.delattr(cpp_extension, "FileLock")
    mv.remove_dead_locks(str(tmp_path))
    assert [folder.name for folder in folders if (folder / "lock").exists()] == ["under_way"]
    assert capsys.readouterr().err.count("was left behind when a compilation was killed") == 2
    mv.remove_dead_locks(str(tmp_path / "missing"))
