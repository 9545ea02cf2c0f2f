"""Runs that are killed, signalled, out of disk or out of step: what they say, and that resumed they are the same.

The trainers are a table: each test of a whole run takes them as a parameter. Processes are real (see survival.py).
"""

import ast
import copy
import errno
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import multivideo as mv

import pytest
import torch
from reference import write_clip
from survival import ROOT, ZERO3, at, differences, metrics

RESUME = ["--resume_from_checkpoint", "auto"]
INTACT = "what was saved before is intact: make room or mend the disk, then --resume_from_checkpoint auto"


def conversation(i, clips):
    turns = [{"from": "human", "value": f"Which of {i}?"}, {"from": "gpt", "value": f"The answer is {i * i}."}]
    return {"id": f"record-{i}", "video": clips, "conversations": turns}


def pair(i, clips):
    return {"id": f"record-{i}", "video": clips, "prompt": f"Which of {i}?", "chosen": f"It is {i * i}.",
            "rejected": "None."}  # fmt: skip


def labelled(i, clips):
    return {"id": f"record-{i}", "video": clips, "prompt": f"Which of {i}?", "label": "ab"[i % 2]}


REWARD = """
def letters(completions, **kwargs):  # differs within a group
    return [len(set(turns[0]["content"])) / 10 for turns in completions]
"""


ADAPTER = ["--lora_enable", "True", "--freeze_llm", "True", "--lora_rank", 4, "--lora_dropout", 0.2,
           "--lora_namespan_exclude", "['lm_head', 'embed_tokens']"]  # fmt: skip
TRAINERS = {  # script → what a record is, and its own flags; dropout makes every random state count
    "train_sft.py": (conversation, ADAPTER),
    "train_dpo.py": (pair, ADAPTER),
    "train_cls.py": (labelled, [*ADAPTER, "--mlp_head_dim", 16, "--mlp_head_dropout", 0.3, "--class_balanced_order",
                                "True"]),
    "train_grpo.py": (conversation, [*ADAPTER, "--num_generations", 3, "--max_completion_length", 5, "--top_k", 0,
                                     "--reward_funcs", "FOLDER/rewards.py:letters", "--logging_steps", 2]),
}  # fmt: skip
SCRIPTS = list(TRAINERS)


def write_data(folder, model):
    """script → its flags, and clips and records for them: 9 records in steps of 2 rows (one in the last of an epoch),
    7 steps, saved and evaluated every second one."""
    for i in range(4):
        write_clip(folder / f"{i}.mp4", 56, 56, 8, seed=i)
    (folder / "rewards.py").write_text(REWARD)
    table = {}
    for script, (record, own) in TRAINERS.items():
        rows = [record(i, [f"{k % 4}.mp4" for k in range(i, i + i % 3)]) for i in range(9)]
        for name, some in (("train", rows), ("eval", rows[:3])):
            (folder / f"{script}.{name}.json").write_text(json.dumps(some))
        table[script] = [
            "--model_id", model, "--data_path", folder / f"{script}.train.json",
            "--eval_path", folder / f"{script}.eval.json", "--nframes", 2, "--video_resized_width", 56,
            "--video_resized_height", 56, "--max_steps", 7, "--per_device_train_batch_size", 1,
            "--gradient_accumulation_steps", 2, "--save_steps", 2, "--eval_strategy", "steps",
            "--eval_steps", 2, "--per_device_eval_batch_size", 1, "--learning_rate", 1e-3,
            "--dataloader_num_workers", 0, *(str(word).replace("FOLDER", str(folder)) for word in own),
        ]  # fmt: skip
    return table


@pytest.fixture(scope="session")
def flags(tiny_model, tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("survival"), tiny_model)


@pytest.fixture(scope="session")
def unbroken(runner, flags, tmp_path_factory):
    """`unbroken(script)`: folder of the run that nothing happened to, and the points that it passed."""
    done = {}

    def run(script):
        if script not in done:
            folder = tmp_path_factory.mktemp("unbroken") / "out"
            attempt = runner.run(script, flags[script], folder, trace=folder.with_name("points"))
            assert attempt.codes == [0], attempt.said[0][-3000:]
            points = [line.replace("out", "OUT", 1) if " " in line else line
                      for line in folder.with_name("points.0").read_text().splitlines()]  # fmt: skip
            done[script] = folder, points
        return done[script]

    return run


def steps_of(folder):
    return [int(path.name.split("-")[1]) for path in mv.list_checkpoints(folder)]


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("script, place", [*((script, "backward") for script in SCRIPTS), ("train_grpo.py", "sample")])
def test_killed_in_a_step_and_in_a_save(runner, flags, unbroken, tmp_path, script, place):
    """SIGKILL amid a step (or its rollout), SIGKILL of the resumed run amid a save, then to the end: bit-equal."""
    straight, points = unbroken(script)
    rng = random.Random(script)
    first_save = points.index("rename OUT/checkpoint-2")
    saved = [i for i, point in enumerate(points) if re.match(r"\w+ OUT/\.checkpoint-6\.aside", point)]
    in_step = rng.choice([i for i, point in enumerate(points) if point == place and first_save + 4 < i < saved[0]])
    in_save = rng.choice([*saved, points.index("rename OUT/checkpoint-6")])
    killed = runner.run(script, flags[script], tmp_path / "out", faults={0: [at(points, in_step, "SIGKILL")]})
    assert killed.codes == [-signal.SIGKILL] and steps_of(tmp_path / "out")
    fault = at(points, in_save, "torn" if points[in_save].startswith("serialize-end") else "SIGKILL")
    killed = runner.run(script, [*flags[script], *RESUME], tmp_path / "out", faults={0: [fault]})
    assert killed.codes == [-signal.SIGKILL] and steps_of(tmp_path / "out") == [2, 4]
    assert runner.run(script, [*flags[script], *RESUME], tmp_path / "out").codes == [0]
    assert not differences(tmp_path / "out", straight)
    assert steps_of(tmp_path / "out") == [2, 4, 6]
    assert not list((tmp_path / "out").glob(".*"))
    rows = metrics(straight)
    assert all("records_crc32" in row for row in rows if "loss" in row) and len(rows) == 7 + 4


def test_weights_lie_aligned(tiny_model):
    """As they lie in a file they would not, and a resumed run, which reads another file, would differ in last bits."""
    model = mv.load_model(mv.TrainingArguments(model_id=tiny_model), "cpu")
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())


def test_what_a_kill_leaves_behind(tmp_path):
    """Half-written and half-deleted folders go; a checkpoint caught between the two renames gets its name back."""
    for name in (".checkpoint-3.aside", ".checkpoint-1.removed", ".model.aside", ".checkpoint-2.replaced", "mine",
                 ".checkpoint-4.replaced", "checkpoint-4", ".mine"):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert [path.name for path in mv.list_checkpoints(tmp_path)] == [
        ".checkpoint-2.replaced", ".checkpoint-4.replaced", "checkpoint-4",
    ]  # fmt: skip
    mv.clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "mine", ".mine"}
    assert (tmp_path / "checkpoint-4" / "file").read_text() == "checkpoint-4"


def test_pruning_past_a_damaged_checkpoint(tmp_path):
    """Resumed from 8 because 10 is damaged, limit 1: the 9 just saved stays, whatever its number."""
    for step in (8, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mv.prune_checkpoints(tmp_path / "checkpoint-9", 2, None)
    assert steps_of(tmp_path) == [8, 9]
    mv.prune_checkpoints(tmp_path / "checkpoint-9", 1, "checkpoint-8")
    assert steps_of(tmp_path) == [8, 9]
    mv.prune_checkpoints(tmp_path / "checkpoint-9", 1, None)
    assert steps_of(tmp_path) == [9]
    mv.prune_checkpoints(tmp_path / "checkpoint-9", None, None)
    assert steps_of(tmp_path) == [9]


def test_metrics_are_cut_where_the_run_goes_on(tmp_path):
    """Rows after the step go, and its evaluation if that is still due; a torn line goes, one without its end stays."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 1}, {"step": 2, "loss": 1}, {"step": 2, "eval_loss": 1}, {"step": 3, "loss": 1}]
    for due, kept in ((False, rows[:3]), (True, rows[:2])):
        path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2, "lo')
        mv.cut_jsonl(path, {"step": 2, "eval_due": due})
        assert [json.loads(line) for line in path.read_text().splitlines()] == kept
    path.write_text("\n".join(map(json.dumps, rows[:3])))
    mv.cut_jsonl(path, {"step": 9, "eval_due": True})
    assert path.read_text().splitlines() == [json.dumps(row) for row in rows[:3]]


def test_an_earlier_model_is_never_mixed_with_a_later_one(tmp_path, monkeypatch):
    """Until its config has come, the last file of all, the published model does not load; old shards are gone."""
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "mine.safetensors",
    ):
        (tmp_path / name).write_text("old")

    def save_model(model, processor, folder, state, args):
        Path(folder).mkdir()
        for name in ("config.json", "model.safetensors", "a.json", "z.json"):
            (Path(folder) / name).write_text("new")

    seen, replace = [], mv.os.replace

    def watched(source, target):
        seen.append({path.name for path in tmp_path.iterdir() if path.is_file()})
        replace(source, target)

    monkeypatch.setattr(mv, "save_model", save_model)
    monkeypatch.setattr(mv.os, "replace", watched)
    accelerator = SimpleNamespace(is_main_process=True, process_index=0, device="cpu", gather=lambda tensor: tensor)
    engine = SimpleNamespace(accelerator=accelerator, full_state=lambda: None, raw_model=None, args=None)
    mv.publish_model(tmp_path, engine, None, None)
    assert seen[0] == {"mine.safetensors"} and all("config.json" not in names for names in seen)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "a.json", "z.json", "mine.safetensors",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_missing_or_torn_piece_is_found(unbroken, tmp_path, capsys, script):
    """Each file of the newest checkpoint, deleted, cut or emptied in turn: named, and the one before is taken."""
    straight, _ = unbroken(script)
    for step in (4, 6):
        shutil.copytree(straight / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    args = mv.TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="auto")
    assert mv.find_checkpoint(args).name == "checkpoint-6"
    files = [path for path in (tmp_path / "checkpoint-6").rglob("*") if path.is_file()]
    assert len(files) >= 8
    for file in files:
        whole = file.read_bytes()
        damages = [None, whole[:-2], b"", b"\0" * len(whole)]
        for damage in damages if file.suffix in (".json", ".safetensors") else damages[:-1]:
            file.unlink(missing_ok=True) if damage is None else file.write_bytes(damage)
            assert mv.find_checkpoint(args).name == "checkpoint-4"
            said = capsys.readouterr().err
            assert f"checkpoint-6 is skipped: {file.name} " in said, said
            with pytest.raises(mv.InputError, match=re.escape(file.name) + " (is missing|is damaged|has .* instead)"):
                named = {"resume_from_checkpoint": str(tmp_path / "checkpoint-6")}
                mv.find_checkpoint(mv.TrainingArguments(output_dir=str(tmp_path), **named))
        file.write_bytes(whole)
    with pytest.raises(mv.InputError, match="checkpoint-6 is later and would be mixed up"):
        named = {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")}
        mv.find_checkpoint(mv.TrainingArguments(output_dir=str(tmp_path), **named))


# --------------------------------------------------------------------------------------------------------- another run


def restored(folder, change=None, state=None, **engine):
    """restore_checkpoint as the main process of a run whose state is the checkpoint's, but for `change`."""
    saved = json.loads((folder / "trainer_state.json").read_text())
    fresh = copy.deepcopy(state or saved)
    fresh["run"].update(change or {})
    values = {"deepspeed": False, "zero_stage": None, "names": [], "args": mv.TrainingArguments(), **engine}
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, process_index=0)
    return mv.restore_checkpoint(folder, SimpleNamespace(accelerator=accelerator, **values), fresh)


def rewritten(checkpoint, state, folder):
    """A copy of a checkpoint in `folder` with another trainer_state.json."""
    copied = folder / checkpoint.name
    shutil.copytree(checkpoint, copied, dirs_exist_ok=True)
    mv.write_json(copied / "trainer_state.json", state)
    manifest = json.loads((copied / "manifest.json").read_text())
    mv.write_json(
        copied / "manifest.json", manifest | {"trainer_state.json": (copied / "trainer_state.json").stat().st_size}
    )
    return copied


DIFFERENT = {
    "model": "another/model", "model config (SHA-256)": "0", "data file (SHA-256)": "1", "records": 10,
    "samples per step": 3, "seed": 1, "optimizer": "sgd", "precision": "bf16", "position rule": "another",
    "video layout": "another",
}  # fmt: skip
OF_A_TRAINER = {
    "train_dpo.py": {"reference": "another/model"},
    "train_cls.py": {"class-balanced order": False},
    "train_grpo.py": {"reference": "another/model", "generations": 4, "iterations": 2},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_run_is_refused_with_each_difference(unbroken, script):
    folder = unbroken(script)[0] / "checkpoint-6"
    run = json.loads((folder / "trainer_state.json").read_text())["run"]
    different = DIFFERENT | OF_A_TRAINER.get(script, {})
    assert run.keys() == different.keys()
    for name, value in different.items():
        with pytest.raises(mv.InputError, match=re.escape(f"• {name}: {run[name]} then, {value} now")):
            restored(folder, {name: value})
    with pytest.raises(mv.InputError) as caught:
        restored(folder, different)
    assert str(caught.value).count("•") == len(different) and "\nGive the same values, or start" in str(caught.value)
    forced = mv.TrainingArguments(resume_force=True)
    with pytest.raises(mv.InputError, match=r"optimizer: adamw_torch then, sgd now\n"):
        restored(folder, {"optimizer": "sgd"}, args=forced)
    with pytest.raises(mv.InputError, match="DeepSpeed: none then, ZeRO-3 now"):
        restored(folder, deepspeed=True, zero_stage=3, args=forced)


def test_forced_and_more(runner, flags, unbroken, tmp_path):
    """--resume_force goes on with other data and precision and says so; a state without a key is another version's; a
    best checkpoint that is gone is told before the training, not after it."""
    script = "train_sft.py"
    straight, _ = unbroken(script)
    shutil.copytree(straight / "checkpoint-6", tmp_path / "out" / "checkpoint-6")
    state = json.loads((straight / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["run"].pop("position rule") == mv.POSITION_RULE  # as before runs recorded it
    old = rewritten(straight / "checkpoint-6", state, tmp_path / "old")
    with pytest.raises(mv.InputError) as caught:
        restored(old, {"position rule": mv.POSITION_RULE})
    assert f"• position rule: {mv.OLD_POSITION_RULE} then, {mv.POSITION_RULE} now (Qwen's own): its" in str(
        caught.value
    )
    rewritten(straight / "checkpoint-6", state, tmp_path / "out")
    forced = [*flags[script], *RESUME, "--seed", 7, "--bf16", "True", "--resume_force", "True"]
    run = runner.run(script, forced, tmp_path / "out")
    assert run.codes == [0], run.said[0][-2000:]
    assert re.search(r"--resume_force goes on although these differ:\n  • position rule: .*\n"
                     r"  • seed: 42 then, 7 now\n  • precision: fp32 then, bf16 now", run.said[0])  # fmt: skip
    folder = straight / "checkpoint-6"
    with pytest.raises(mv.InputError, match="trainer_state.json has no another: another version wrote it"):
        state = json.loads((folder / "trainer_state.json").read_text())
        restored(folder, state={**state, "another": 1})
    shutil.copytree(folder, tmp_path / "best" / "checkpoint-6")
    state = json.loads((folder / "trainer_state.json").read_text())
    changed = json.dumps({**state, "best_checkpoint": "checkpoint-4"})
    (tmp_path / "best" / "checkpoint-6" / "trainer_state.json").write_text(changed)
    args = mv.TrainingArguments(output_dir=str(tmp_path / "best"), load_best_model_at_end=True)
    with pytest.raises(
        mv.InputError, match="checkpoint-4, the best checkpoint so far.* manifest.json is missing; put"
    ):
        restored(tmp_path / "best" / "checkpoint-6", args=args)


# --------------------------------------------------------------------------------------------------------------- disks


FULL = {  # where the disk fails, from which point on, how; which checkpoints are left then
    "weights": (r"serialize OUT/\.checkpoint-4\.aside/\w+", "limit", [2]),
    "optimizer": (r"serialize OUT/\.checkpoint-4\.aside/optimizer", "ENOSPC", [2]),
    "state": (r"open OUT/\.checkpoint-4\.aside/\.trainer_state", "EIO", [2]),
    "rename": (r"rename OUT/checkpoint-4", "EROFS", [2]),
    "metrics": (r"open OUT/metrics", "ENOSPC", []),
    "final model": (r"open OUT/\.model\.aside/", "EROFS", [2, 4, 6]),
    "predictions": (r"open OUT/\.predictions", "ENOSPC", []),
    "completions": (r"open OUT/completions", "ENOSPC", []),
}  # fmt: skip
OWN_FILES = {"predictions": "train_cls.py", "completions": "train_grpo.py"}


@pytest.mark.parametrize("script, place", [
    *((script, place) for script in ("train_sft.py", "train_dpo.py") for place in FULL if place not in OWN_FILES),
    *((script, place) for place, script in OWN_FILES.items()),
])  # fmt: skip
def test_full_and_broken_disks(runner, flags, unbroken, tmp_path, script, place):
    """One message, exit code 1, what was there is intact, no rubbish left; with room again it ends as ever."""
    pattern, do, left = FULL[place]
    fault = {"at": pattern.replace("OUT", "out"), "n": 1, "do": do, "stays": True}
    run = runner.run(script, flags[script], tmp_path / "out", faults={0: [fault]})
    said = run.said[0]
    assert run.codes == [1] and said.count(INTACT) == 1 and "Traceback" not in said, said[-3000:]
    reason = {"limit": "File too large"}.get(do) or f"[Errno {getattr(errno, do)}]"
    assert re.search(rf"\n{script}: .*{re.escape(reason)}.*{INTACT}\n", said), said[-3000:]
    assert steps_of(tmp_path / "out") == left and not list((tmp_path / "out").glob(".checkpoint*"))
    assert all(mv.checkpoint_problem(path) is None for path in mv.list_checkpoints(tmp_path / "out"))
    if place in ("weights", "final model"):
        assert runner.run(script, [*flags[script], *RESUME], tmp_path / "out").codes == [0]
        assert not differences(tmp_path / "out", unbroken(script)[0])


def two(flags):
    """The same for two processes: one row each."""
    flags = list(flags)
    flags[flags.index("--gradient_accumulation_steps") + 1] = 1
    return flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_of_one_process(runner, flags, tmp_path, script):
    """Only the second process cannot write: both stop together, with its message and no other."""
    fault = {"at": "serialize .*random_states_1", "n": 2, "do": "ENOSPC", "stays": True}
    run = runner.run(script, two(flags[script]), tmp_path / "out", world=2, faults={1: [fault]})
    assert run.codes == [1, 1] and run.seconds < 60
    assert run.said[1].count(INTACT) == 1 and "checkpoint-4 cannot be written: [Errno 28]" in run.said[1]
    assert INTACT not in run.said[0] and "Traceback" not in run.said[0] + run.said[1]
    assert steps_of(tmp_path / "out") == [2] and not list((tmp_path / "out").glob(".checkpoint*"))


# ------------------------------------------------------------------------------------------------------------- signals


SIGNALS = {  # at which point which signal; the step that is saved, and why that one
    "between rows": ("backward", 6, "SIGTERM", 3),  # the step is finished
    "in evaluation": ("stop_asked", 5, "SIGINT", 4),  # of step 4: its own checkpoint comes first
    "in a save": (r"open out/\.checkpoint-4\.aside/\.trainer_state", 1, "SIGUSR1", 4),
    "before the first step": ("exchange", 1, "SIGTERM", 0),
}  # fmt: skip


@pytest.mark.parametrize("moment", SIGNALS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_signals(runner, flags, unbroken, tmp_path, script, moment):
    """Saved within one step, exit code 143, and the resumed run is the unbroken one, evaluation rows too."""
    pattern, n, name, step = SIGNALS[moment]
    faults = {0: [{"at": pattern, "n": n, "do": name}]}
    run = runner.run(script, flags[script], tmp_path / "out", faults=faults)
    assert run.codes == [143] and steps_of(tmp_path / "out")[-1] == step, run.said[0][-2000:]
    assert f"stopped by a signal after step {step}: go on with --resume_from_checkpoint auto" in run.said[0]
    assert runner.run(script, [*flags[script], *RESUME], tmp_path / "out").codes == [0]
    shutil.rmtree(tmp_path / "out" / "checkpoint-0", ignore_errors=True)
    assert not differences(tmp_path / "out", unbroken(script)[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_to_one_of_two(runner, flags, tmp_path, script):
    """In an evaluation, to the second process only: both save at the same step and exit 143."""
    faults = {1: [{"at": "stop_asked", "n": 2, "do": "SIGUSR1"}]}
    run = runner.run(script, two(flags[script]), tmp_path / "out", world=2, faults=faults)
    assert run.codes == [143, 143] and steps_of(tmp_path / "out") == [2]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["eval_due"] and state["save_due"] and state["num_processes"] == 2
    assert mv.checkpoint_problem(tmp_path / "out" / "checkpoint-2") is None


def test_a_second_signal_ends_a_process_that_waits_for_another(runner, flags, tmp_path):
    """The second of two processes hangs: the first signal, and its echo, wait for it in vain; a later one does not."""
    faults = {1: [{"at": "pack", "n": 3, "do": "wait"}]}
    run = runner.start("train_sft.py", two(flags["train_sft.py"]), tmp_path / "out", world=2, faults=faults)
    run.until(lambda: (tmp_path / "out" / "metrics.jsonl").exists())
    time.sleep(1)
    for pause in (0.3, mv.ECHO_SECONDS + 0.2):
        run.signal(signal.SIGTERM, rank=0)
        time.sleep(pause)
        assert run.pids[0] not in runner.ends
    run.signal(signal.SIGINT, rank=0)
    run.until(lambda: run.pids[0] in runner.ends, limit=10)
    run.signal(signal.SIGKILL, rank=1)
    assert run.wait().codes == [128 + signal.SIGINT, -signal.SIGKILL]


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_that_fails_alone(runner, flags, tmp_path, script):
    """Its message is there, the other ends without help or a save, both within 60 s (in fact at once)."""
    faults = {1: [{"at": "backward", "n": 3, "do": "fail"}]}
    run = runner.run(script, two(flags[script]), tmp_path / "out", world=2, faults=faults)
    assert run.codes == [1, 1] and run.seconds < 60
    assert "RuntimeError: failed on purpose" in run.said[1] and "Traceback" not in run.said[0]
    assert "process 0 ends because another one has ended: that one says why" in run.said[0]
    assert steps_of(tmp_path / "out") == [2]
    assert (Path(run.logs[1]).stat().st_mtime_ns) < Path(run.logs[0]).stat().st_mtime_ns  # its message came first


@pytest.mark.parametrize("env", [{}, ZERO3], ids=["DDP", "ZeRO-3"])
def test_a_process_without_a_prompt(runner, flags, unbroken, tmp_path, env):
    """The last step of an epoch has one record for two processes: the other has nothing to roll out or to learn."""
    script = "train_grpo.py"
    run = runner.run(script, two(flags[script]), tmp_path / "out", world=2, env=env)
    assert run.codes == [0, 0], run.said[1][-3000:]
    ours, theirs = metrics(tmp_path / "out"), metrics(unbroken(script)[0])
    assert [row["completions"] for row in ours if "loss" in row] == [6, 6, 6, 6, 3, 6, 6]
    for key in ("records_crc32", "reward", "completions"):  # those of the first step before anything is learned
        assert ours[0][key] == pytest.approx(theirs[0][key])
    assert [row.get("records_crc32") for row in ours] == [row.get("records_crc32") for row in theirs]


def test_processes_that_disagree():
    """The exchange names each process's place; nobody waits."""
    own = {"step": 3, "bad_steps": 0}
    other = torch.tensor([[4.0, 0, 0, 0, 5]], dtype=torch.float64)
    accelerator = SimpleNamespace(
        device="cpu", is_main_process=True, gather=lambda row: torch.cat([row, other.to(row.dtype)])
    )
    said = r"disagree on where they are:\n  • process 0: after step 3, records [0-9a-f]{8}, 0 bad steps in a row\n"
    said += r"  • process 1: after step 4, records 00000000, 0 bad steps in a row\nResume from the newest"
    with pytest.raises(mv.InputError, match=said):
        mv.exchange(accelerator, own, [1, 2], {"tokens": 5}, [])
    accelerator.is_main_process = False
    with pytest.raises(SystemExit):
        mv.exchange(accelerator, own, [1, 2], {"tokens": 5}, [])
    accelerator.gather = lambda row: torch.cat([row, row])
    assert mv.exchange(accelerator, own, [1, 2], {"tokens": 5}, []) == ({"tokens": 10}, False)
    assert mv.exchange(accelerator, own, [1, 2], {"tokens": 5}, [15]) == ({"tokens": 10}, True)


# --------------------------------------------------------------------------------------------------- what may run code


# Library paths that unpickle; README's Limits says so.
UNPICKLE = {
    "deepspeed": "reads its own checkpoint shards with torch.load: resume ZeRO runs only from folders you trust",
    "multiprocessing": "pickles records and samples through pipes between a trainer and its own decoding processes",
    "datasets": "names its Arrow files by hashes of pickled functions; it loads no pickle",
}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def violations(source: str) -> list[str]:
    """What in a Python source could run code that comes with data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in modules if name.split(".")[0] in FORBIDDEN_IMPORTS]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [f"import {name}" for name in names if name in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{node.func.id}(")
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
            safe = node.arg == "weights_only"  # and nothing but a plain value shows that it is
            if not (isinstance(node.value, ast.Constant) and node.value.value is safe):
                found.append(f"{node.arg}={ast.unparse(node.value)}")
    return found


def test_nothing_runs_code_that_comes_with_data():
    sources = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".")]
    assert {"multivideo.py", "train_sft.py", "make_demo.py", "test_survival.py"} <= {path.name for path in sources}
    assert {path.name: bad for path in sources if (bad := violations(path.read_text()))} == {}
    for bad in ("torch.load(f)", "import pickle", "from pickle import loads", "import dill as d", "eval('1')",
                "yaml.load(f)", "from yaml import load, unsafe_load", "from torch import load",
                "f(trust_remote_code=True)", "f(trust_remote_code=flag)",
                "read = torch.load", "np.load(f, allow_pickle=True)", "exec(x)",
                "load(f, weights_only=False)"):  # fmt: skip
        assert violations(bad), bad
    for good in ("model.eval()", "ast.literal_eval(x)", "yaml.safe_load(f)", "'torch.load(f)'", "load_file(f)",
                 "f(trust_remote_code=False)"):  # fmt: skip
        assert not violations(good), good
    limits = (ROOT / "README.md").read_text().split("## Limits")[1]
    assert all(name.split()[0] in limits.lower() for name in UNPICKLE)
