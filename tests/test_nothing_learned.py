"""Evaluations without a finite result or without a sample, and steps in which nothing is learned: all trainers."""

import importlib
import json
import math
import shutil
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import multivideo as mv

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_survival import SCRIPTS, write_data
from test_train import metrics, reset_accelerate

STEPS = 5
SKIPPED = (1, 3)  # windows (from 0) of which every record is too long
HALF = 2  # and one of which the second is: the other process has something to learn
SAMPLES = [(2, 0), (0, 2), (1, 1), (0, 2), (1, 0)]  # of each window: learned, skipped


def run(monkeypatch, script, *flags):
    """A trainer's main() in this process."""
    reset_accelerate()
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    handlers = {number: signal.getsignal(number) for number in mv.STOP_SIGNALS}
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def value_of(flags, flag):
    return flags[flags.index(flag) + 1]


def read_strictly(path):
    """The rows of a file that is JSON by its standard: no NaN, no Infinity."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    """script → flags: 9 records in steps of 2 rows, over --max_seq_length 200 are both of SKIPPED and one of HALF."""
    folder = tmp_path_factory.mktemp("nothing_learned")
    table = write_data(folder, tiny_model)
    windows = [window for (window, _), _ in zip(mv.step_windows(9, 2, 42, 0), range(STEPS))]
    long = {*windows[SKIPPED[0]], *windows[SKIPPED[1]], windows[HALF][1]}
    assert len(long) == 5
    for own in table.values():
        path = Path(value_of(own, "--data_path"))
        records = json.loads(path.read_text())
        for i in long:
            turn = records[i]["conversations"][0] if "conversations" in records[i] else records[i]
            turn["value" if "conversations" in records[i] else "prompt"] += " word" * 300
        path.write_text(json.dumps(records))
        own += ["--max_steps", STEPS, "--max_seq_length", 200, "--on_long_sample", "skip", "--weight_decay", 0.1]
    table["train_cls.py"] += ["--class_balanced_order", "False"]
    return table


# --------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluations_that_are_not_finite(flags, tmp_path, monkeypatch, capsys, script):
    """NaN, a result, NaN, inf: null in the file, never best, no improvement; trackers get numbers; the run goes on."""
    factors, logged = [math.nan, 1.0, math.nan, math.inf], []
    trainer = importlib.import_module(script.removesuffix(".py"))
    evaluate = trainer.evaluate

    def broken(engine, *rest):
        head = next(module for name, module in engine.raw_model.named_modules() if name.endswith(("lm_head", "score")))
        factor = factors.pop(0)
        hook = head.register_forward_hook(lambda module, inputs, output: output * factor)
        try:
            return evaluate(engine, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer, "evaluate", broken)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    run(monkeypatch, script, *flags[script], "--max_seq_length", 4000, "--eval_steps", 1, "--save_steps", 1,
        "--load_best_model_at_end", "True", "--early_stopping_patience", 2, "--report_to", "tensorboard",
        "--output_dir", tmp_path)  # fmt: skip
    rows = read_strictly(tmp_path / "metrics.jsonl")
    evals = [row for row in rows if "eval_samples" in row]
    assert [row["step"] for row in evals] == [1, 2, 3, 4] and not factors
    name = "eval_reward" if script == "train_grpo.py" else "eval_loss"
    for row in evals:
        bad = row["step"] != 2
        assert row.get("not_finite", False) is bad and (row[name] is None) is bad and row["eval_samples"] == 3
        for key in row.keys() - {"step", "epoch", "eval_samples", "eval_tokens", "not_finite"}:
            assert (row[key] is None) is bad, key
    assert evals[0].keys() - {"not_finite"} == evals[1].keys()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["best"], state["best_checkpoint"]) == (evals[1][name], "checkpoint-2")
    assert state["evals_without_gain"] == 2
    told = capsys.readouterr()
    assert f"step 1: {name} not finite" in told.out and f"step 2: {name} {evals[1][name]:.6g}" in told.out
    assert "stopped early: 2 evaluations" in told.err and "saved checkpoint-2" in told.err
    values = [value for row in logged for value in row.values()]
    assert all(type(value) in (int, float) and math.isfinite(value) for value in values)
    assert sum("eval_samples" in row for row in logged) == 4
    if script == "train_cls.py":
        assert len(read_strictly(tmp_path / "predictions.jsonl")) == 3


@pytest.mark.parametrize("result, best", [
    ({"eval_loss": 0.5, "eval_f1": 0.7}, True),
    ({"eval_loss": math.nan, "eval_f1": 0.7}, False),
    ({"eval_loss": 0.5, "eval_f1": math.inf}, False),
    ({"eval_loss": -math.inf, "eval_f1": -math.inf}, False),
])  # fmt: skip
@pytest.mark.parametrize("metric", ["loss", "f1"])
def test_a_best_is_finite_in_all(result, best, metric):
    """A metric beside a loss that is not finite (or the reverse) is that of a broken model."""
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=metric == "f1", early_stopping_threshold=0)
    for before in (None, 0.6):
        state = {"best": before, "evals_without_gain": 3}
        row = mv.finite_result(result)
        assert mv.judge(state, row, args) is best and ("not_finite" in row) is not best
        expected = {"best": result[f"eval_{metric}"], "evals_without_gain": 0}
        assert state == (expected if best else {"best": before, "evals_without_gain": 4})
        assert all(value is None or math.isfinite(value) for value in row.values())


def test_a_saved_best_that_is_not_finite_is_none(flags, tmp_path, monkeypatch):
    """As earlier versions wrote it: the next finite evaluation is the best, not that one's checkpoint."""
    script, own = (
        "train_sft.py",
        [*flags["train_sft.py"], "--load_best_model_at_end", "True", "--output_dir", tmp_path],
    )
    run(monkeypatch, script, *own, "--max_steps", 2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "best": math.nan, "best_checkpoint": "checkpoint-1"}))
    manifest = path.with_name("manifest.json")
    sizes = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sizes, path.name: path.stat().st_size}))
    run(monkeypatch, script, *own, "--max_steps", 4, "--resume_from_checkpoint", "auto")
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    evals = [row for row in metrics(tmp_path) if "eval_loss" in row]
    assert (state["best"], state["best_checkpoint"]) == (evals[-1]["eval_loss"], "checkpoint-4")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_of_nothing_ends_the_run(flags, tmp_path, monkeypatch, script):
    """All records are too long: no step updates anything, and no loss of 0 becomes the best."""
    with pytest.raises(mv.InputError, match=r"no record was evaluated, all 3 were skipped: those that are too long"):
        run(monkeypatch, script, *flags[script], "--max_seq_length", 10, "--output_dir", tmp_path)
    rows = metrics(tmp_path)
    assert [(row["step"], row["loss"], row["skipped_samples"]) for row in rows] == [(1, None, 2), (2, None, 2)]
    assert mv.checkpoint_problem(tmp_path / "checkpoint-2") is None, "what was trained must not be lost"


def test_an_evaluation_of_bad_files_ends_the_run(flags, tmp_path, monkeypatch):
    own = flags["train_sft.py"]
    records = json.loads(Path(value_of(own, "--eval_path")).read_text())
    (tmp_path / "eval.json").write_text(json.dumps([{**record, "video": "missing.mp4"} for record in records]))
    with pytest.raises(mv.InputError, match=r"all 3 were skipped: .*bad_videos\.jsonl: fix them"):
        run(monkeypatch, "train_sft.py", *own, "--eval_path", tmp_path / "eval.json", "--on_bad_video", "drop_sample",
            "--output_dir", tmp_path)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- steps


def contents(folder):
    """Weights and optimizer state of a checkpoint, DeepSpeed's shards included, and what trainer_state.json has."""
    tensors = {}
    for path in [*folder.glob("*model.safetensors"), folder / "optimizer.safetensors"]:
        tensors |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}

    for path in sorted(folder.glob("deepspeed/*optim_states.pt")):  # a zip archive: tensors are its files data/N
        with zipfile.ZipFile(path) as shard:
            names = [name for name in shard.namelist() if "/data/" in name]
            tensors |= {f"{path.name}/{name}": torch.tensor(list(shard.read(name))) for name in names}
    return tensors, json.loads((folder / "trainer_state.json").read_text())


def assert_only_real_steps_move(folder):
    """Between the checkpoints of a skipped step nothing differs but its number; every other step moves both."""
    before, state = contents(folder / "checkpoint-1")
    assert any("exp_avg" in name or "optim_states" in name for name in before) and len(before) > 10
    for step in range(2, STEPS + 1):
        after, now = contents(folder / f"checkpoint-{step}")
        assert after.keys() == before.keys() and now["optimizer"] == state["optimizer"]
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        kinds = {"optimizer" if "optim" in name else "weights" for name in changed}
        assert kinds == (set() if step - 1 in SKIPPED else {"optimizer", "weights"}), (step, changed[:5])
        assert now["step"] == step and now["bad_steps"] == 0
        before, state = after, now


def assert_rows(folder, own=()):
    """Rows of skipped steps: null for what would be computed; step, schedule and counts go on."""
    rows = [row for row in read_strictly(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * (1 - k / STEPS) for k in range(STEPS)])
    for k, row in enumerate(rows):
        skipped = k in SKIPPED
        assert {row[key] is None for key in ("loss", "grad_norm", *own)} == {skipped}, row
        assert (row["samples"], row["skipped_samples"]) == SAMPLES[k]
        assert (row["supervised_tokens"] == 0) is skipped and "not_finite" not in row
    return rows


OWN = {
    "train_sft.py": [], "train_cls.py": ["accuracy"],
    "train_dpo.py": ["rewards/margins", "rewards/chosen", "rewards/accuracies", "logps/rejected"],
    "train_grpo.py": ["kl", "clip_ratio", "sampling_logp_difference", "reward", "reward_std", "frac_reward_zero_std",
                      "completions/mean_length", "completions/clipped_ratio", "rewards/letters"],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_skipped_steps_change_nothing(flags, tmp_path, monkeypatch, script):
    """With momentum and weight decay; nothing is computed; resumed amid them: the same to the last bit."""
    calls = dict.fromkeys(("row", "backward", "step"), 0)
    with monkeypatch.context() as patched:
        for name in calls:
            inner = getattr(mv.Engine, name)

            def counted(*args, name=name, inner=inner):
                calls[name] += 1
                return inner(*args)

            patched.setattr(mv.Engine, name, counted)
        run(patched, script, *flags[script], "--save_steps", 1, "--eval_steps", STEPS, "--output_dir", tmp_path / "a")
    assert calls == {"row": 5, "backward": 5, "step": 3}  # two rows twice, and one in the epoch's last step
    assert_rows(tmp_path / "a", OWN[script])
    assert_only_real_steps_move(tmp_path / "a")
    for step in (1, 2):
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "a" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "a" / "metrics.jsonl", folder)
        run(monkeypatch, script, *flags[script], "--save_strategy", "no", "--eval_steps", STEPS, "--output_dir",
            folder, "--resume_from_checkpoint", "auto")  # fmt: skip
        expected = load_file(tmp_path / "a" / "adapter_model.safetensors")
        weights = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
        assert [row.get("loss") for row in metrics(folder)] == [row.get("loss") for row in metrics(tmp_path / "a")]


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_skipped_steps_over_processes(runner, flags, tmp_path, config):
    """Two processes decide alike, under DeepSpeed too, whose own step would decay the weights."""
    own = [*flags["train_sft.py"], "--gradient_accumulation_steps", 1, "--save_steps", 1, "--eval_steps", STEPS]
    runner.launch("--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", 2, "train_sft.py", *own,
                  "--output_dir", tmp_path, log=tmp_path / "rank")  # fmt: skip
    assert_rows(tmp_path)
    assert (tmp_path / "checkpoint-1" / "deepspeed").is_dir() is config.startswith("zero")
    assert_only_real_steps_move(tmp_path)


def test_completions_that_are_all_truncated(runner, flags, tmp_path):
    """With --mask_truncated_completions none of them counts: on two processes under ZeRO-3 no step is taken."""
    own = [*flags["train_grpo.py"], "--gradient_accumulation_steps", 1, "--max_completion_length", 1, "--beta", 0.1,
           "--mask_truncated_completions", "True", "--max_seq_length", 4000, "--save_steps", 1,
           "--eval_strategy", "no"]  # fmt: skip
    runner.launch("--config_file", "accelerate_configs/zero3.yaml", "--num_processes", 2, "train_grpo.py", *own,
                  "--output_dir", tmp_path, log=tmp_path / "rank")  # fmt: skip
    rows = read_strictly(tmp_path / "metrics.jsonl")
    assert [row["supervised_tokens"] for row in rows] == [0] * STEPS, "a completion of one token ended by itself"
    for row in rows:
        assert row["completions"] in (6, 3) and row["reward"] > 0 and row["completions/clipped_ratio"] == 1
        assert [row[key] for key in ("loss", "grad_norm", "kl", "clip_ratio")] == [None] * 4
        assert row["update_tokens"] == 0
    first, last = (contents(tmp_path / f"checkpoint-{step}")[0] for step in (1, STEPS))
    assert len(first) > 10 and all(torch.equal(value, last[name]) for name, value in first.items())


def test_skipped_steps_are_neither_good_nor_bad(flags, tmp_path, monkeypatch):
    """An absurd step, and after it bad ones with skipped ones between: they are counted on."""
    with pytest.raises(mv.InputError, match="2 steps in a row had a loss or gradient that is not finite"):
        run(monkeypatch, "train_sft.py", *flags["train_sft.py"], "--learning_rate", 1e30, "--lr_scheduler_type",
            "constant", "--max_bad_steps", 2, "--eval_strategy", "no", "--output_dir", tmp_path)  # fmt: skip
    assert [row.get("not_finite") for row in metrics(tmp_path)] == [None, None, "loss", None, "loss"]


def test_grpo_goes_on_with_weights_that_are_not_finite(flags, tmp_path, monkeypatch):
    """Rollouts and evaluations of such a model are made, and the steps on them recorded as bad."""
    with pytest.raises(mv.InputError, match="2 steps in a row had a loss or gradient that is not finite"):
        run(monkeypatch, "train_grpo.py", *flags["train_grpo.py"], "--learning_rate", 1e30, "--lr_scheduler_type",
            "constant", "--max_seq_length", 4000, "--max_bad_steps", 2, "--eval_steps", 1,
            "--output_dir", tmp_path)  # fmt: skip
    rows = read_strictly(tmp_path / "metrics.jsonl")
    assert [row["not_finite"] for row in rows if row.get("not_finite")] == [True, "loss", True, "loss"]
