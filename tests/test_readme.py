"""What the README says is there: its commands parse, its files, flags, records, sizes, metrics and messages exist."""

import argparse
import ast
import inspect
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import multivideo as mv

import pytest
from accelerate.commands.launch import launch_command_parser
from test_train import demo, in_process  # noqa: F401
from transformers import HfArgumentParser

import train_cls
import train_dpo
import train_grpo
import train_sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
BLOCKS = {
    kind: [text for other, text in FENCED.findall(README) if other == kind] for kind in ("bash", "sh", "json", "")
}
PROSE = FENCED.sub("", README)
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]  # a code span may go over two lines
PROGRAMS = ("make", "pip", "python", "accelerate", "source")
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("train_*.py"), *ROOT.glob("tools/*.py")]
                 if '__name__ == "__main__"' in path.read_text())  # fmt: skip


def words_of(blocks: list[str]) -> list[list[str]]:
    """The commands that bash would run for the blocks, one shell for all, as lists of words; nothing is run."""
    told = "".join(f'{name}() {{ printf "%s\\0" {name} "$@"; printf "\\0"; }}\n' for name in PROGRAMS)
    shell = subprocess.run(["bash", "-eu", "-c", told + "PATH=\n" + "".join(blocks)], capture_output=True, text=True)
    assert (shell.returncode, shell.stderr) == (0, ""), shell.stderr
    return [command.split("\0") for command in shell.stdout.split("\0\0")[:-1]]


COMMANDS = [*words_of(BLOCKS["bash"]), *(shlex.split(code) for code in INLINE
                                         if code.startswith(PROGRAMS) and " " in code)]  # fmt: skip


class Parsed(BaseException):
    """Ends a script where its arguments have been read; no handler of errors takes it."""


def run_until_parsed(script: str, argv: list[str], monkeypatch, parse: bool = True) -> set[str]:
    """Run a script as it is run from the command line until it has read `argv`; return the flags that it knows.

    Without `parse` it ends just before, whatever `argv` is.
    """

    def ended(action):
        def end(first, *rest, **kwargs):
            if parse:
                action(first, *rest, **kwargs)
            parser = first if isinstance(first, argparse.ArgumentParser) else HfArgumentParser(first)
            raise Parsed({option for option in parser._option_string_actions if option.startswith("-")})

        return end

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", ended(argparse.ArgumentParser.parse_args))
        patch.setattr(mv, "parse_arguments", ended(mv.parse_arguments))
        patch.setattr(sys, "argv", [str(ROOT / script), *argv])
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr("signal.signal", lambda *handler: None)
        with pytest.raises(Parsed) as told:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return told.value.args[0]


def script_of(command: list[str]) -> list[str]:
    """The Python script that a command runs, and the script's arguments."""
    program, *words = command
    if program == "accelerate":
        launch = launch_command_parser().parse_args(words[1:])
        assert words[0] == "launch" and (ROOT / launch.config_file).is_file()
        words = [launch.training_script, *launch.training_script_args]
    return words


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:70])
def test_commands_parse(command, tmp_path, monkeypatch):
    """Files exist, every flag is real, nothing conflicts; the data and the trained model are stand-ins."""
    program, *words = command
    monkeypatch.chdir(ROOT)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip":
        assert words[:2] == ["install", "-r"] and Path(words[2]).is_file()
    elif program == "source":
        assert words == [".venv/bin/activate"] and ".venv" in (ROOT / "Makefile").read_text()
    else:
        script, *argv = script_of(command)
        (tmp_path / "videos").mkdir()
        (tmp_path / "out").mkdir()
        if "--lora_weight_path" in argv:
            (tmp_path / "out" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64}')
            (tmp_path / "out" / "adapter_model.safetensors").touch()
        for flag in {"--data_path", "--eval_path"} & set(argv):
            (tmp_path / argv[argv.index(flag) + 1]).write_text("[]")
        monkeypatch.chdir(tmp_path)
        run_until_parsed(script, argv, monkeypatch)


def test_there_are_commands():
    """Every trainer and all that a person does with data of their own is among them."""
    told = {word for command in COMMANDS for word in command}
    assert told > {f"train_{name}.py" for name in ("sft", "dpo", "grpo", "cls")} | {"accelerate_configs/ddp.yaml"}
    tools = ["check_data", "preview", "cache_videos", "plot_metrics", "predict", "merge_lora", "app", "benchmark"]
    assert told > {f"tools/{name}.py" for name in tools} | {"demo", "test", "soak"}


def test_wrong_commands_fail(tmp_path, monkeypatch):
    """A flag that does not exist is noticed, in argparse's scripts and in ours."""
    for script, argv in (("tools/merge_lora.py", ["--model_id", "x", "--output_path", "y"]),
                         ("tools/plot_metrics.py", ["out"])):  # fmt: skip
        run_until_parsed(script, argv, monkeypatch)
        with pytest.raises(SystemExit):
            run_until_parsed(script, [*argv, "--no_such_flag", "1"], monkeypatch)
    (tmp_path / "data.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    for script in ("train_sft.py", "tools/preview.py", "tools/predict.py"):
        run_until_parsed(script, ["--data_path", "data.json"], monkeypatch)
        with pytest.raises(SystemExit):
            run_until_parsed(script, ["--data_path", "data.json", "--no_such_flag", "1"], monkeypatch)


def test_shell_scripts_are_valid():
    for block in BLOCKS["sh"]:
        subprocess.run(["bash", "-n", "-c", block], check=True)


FOREIGN_FLAGS = {"--signal"}  # SLURM's


def test_flags_exist(monkeypatch):
    """Every flag that the README or docs/ name anywhere is one of a trainer, a tool or the launcher."""
    known = FOREIGN_FLAGS | {"--help"}
    commands = [script_of(command) for command in COMMANDS if command[0] in ("python", "accelerate")]
    for script, *argv in [*([script, "--data_path", "data.json"] for script in SCRIPTS), *commands]:
        known |= run_until_parsed(script, argv, monkeypatch, parse=False)
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", "".join([README, *DOCS])))
    launchers = launch_command_parser()._option_string_actions.keys()
    assert len(named) > 50
    assert {flag for flag in named - known if flag not in launchers} == set()


def test_with_data_of_ones_own(demo, tmp_path):  # noqa: F811
    """The README's commands from check to predict, run by bash as they stand but for the model and the length."""
    (block,) = (block for block in BLOCKS["bash"] if "check_data.py" in block)
    for old, new in (
        ("Qwen/Qwen2.5-VL-3B-Instruct", str(demo / "model")),
        ("source .venv/bin/activate", "true"),
        ("--output_dir out", "--output_dir out --max_steps 2 --dataloader_num_workers 1"),
    ):
        assert old in block
        block = block.replace(old, new, 1)
    for name in ("tools", "accelerate_configs", "train_sft.py", "multivideo.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, source, count in (("data", "sft_train", 2), ("test", "sft_eval", 3)):
        records = json.loads((demo / f"{source}.json").read_text())[:count]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "videos").symlink_to(demo / "videos")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(["bash", "-eu", "-c", block], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PATH": path})  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "preview.png").stat().st_size > 10_000 and (tmp_path / "out" / "metrics.png").is_file()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] > 0 for row in rows)
    answers = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and all("prediction" in answer for answer in answers)


def test_sft_then_dpo(demo, tmp_path, monkeypatch):  # noqa: F811
    """The README's chain of SFT and DPO, its commands as they are but for model, data, folders and length."""
    (sft,) = (c for c in COMMANDS if "train_sft.py" in c and "--bits" in c)
    (dpo,) = (c for c in COMMANDS if "train_dpo.py" in c and "--lora_weight_path" in c)
    for command, data in ((sft, "sft_train.json"), (dpo, "dpo_train.json")):
        script = next(word for word in command if word.startswith("train_"))
        words = command[command.index(script) + 1 :]
        flags = dict(zip(words[::2], words[1::2]))  # the last of a flag stands
        out = tmp_path / flags["--output_dir"]
        flags |= {"--model_id": demo / "model", "--data_path": demo / data, "--image_folder": demo / "videos",
                  "--output_dir": out, "--max_steps": 1, "--gradient_accumulation_steps": 1}  # fmt: skip
        if "--lora_weight_path" in flags:
            flags["--lora_weight_path"] = tmp_path / flags["--lora_weight_path"]
        words = [word for pair in flags.items() for word in pair]
        in_process(monkeypatch, *words, trainer=script.removesuffix(".py"))
        (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert row["loss"] > 0 and (out / "adapter_model.safetensors").is_file()
    assert abs(row["rewards/margins"]) < 1e-4  # the reference is the adapter that it began with


def test_job_script(demo, tmp_path):  # noqa: F811
    """USR1 to the shell of the README's job script saves and ends its own run, and no other of the same name."""
    (block,) = (block for block in BLOCKS["sh"] if "SBATCH" in block)
    command = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml",
               "train_sft.py", "--model_id", demo / "model", "--data_path", demo / "sft_train.json", "--image_folder",
               demo / "videos", "--nframes", 2, "--video_resized_width", 56, "--video_resized_height", 56,
               "--per_device_train_batch_size", 1, "--num_train_epochs", 1000, "--dataloader_num_workers", 0,
               "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "auto"]  # fmt: skip
    (words,) = re.findall(r"accelerate launch .*?--resume_from_checkpoint auto", block)
    (tmp_path / "job.sh").write_text(block.replace(words, shlex.join(map(str, command))))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "train_sft.py"])
    job = subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=120)
    assert "stopped by a signal after step" in said and other.poll() is None, said[-2000:]
    other.kill()
    (checkpoint,) = mv.list_checkpoints(str(tmp_path / "out"))
    assert mv.checkpoint_problem(checkpoint) is None


def test_files_exist():
    tree = BLOCKS[""][0]
    names = re.findall(r"^(\S+)  ", tree, re.M)
    assert len(names) >= 15
    assert [name for name in names if not (ROOT / name).exists()] == []
    files = re.findall(r"\w+\.py", tree)
    assert [name for name in files if not (ROOT / name).exists() and not (ROOT / "tools" / name).exists()] == []
    shipped = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]}
    assert [name for name in shipped if name not in tree] == [], "a script is missing in the file tree"
    configs = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert configs == set(re.search(r"^accelerate_configs/ +(.*)$", tree, re.M)[1].split(", "))
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."} & {
        "examples", "benchmarks", "tests"} <= set(re.findall(r"(\w+)/", tree))  # fmt: skip


def test_named_files_exist():
    """Python files of the prose are the project's, or what a run writes; so are JSON files."""
    written = {"file.py", "a.mp4", "metrics.jsonl", "arguments.json", "predictions.jsonl", "completions.jsonl",
               "bad_videos.jsonl", "bad_steps.jsonl"}  # fmt: skip
    shipped = {path.name for path in [*ROOT.glob("*.*"), *ROOT.glob("tools/*"), *ROOT.glob("benchmarks/*")]}
    named = set(re.findall(r"[\w-]+\.(?:py|jsonl?|md|txt|mp4|yaml)\b", " ".join(i for i in INLINE if " " not in i)))
    assert len(named) > 8
    assert named - shipped - written - {"soak.md"} == set()  # make soak writes it
    source = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("t*/*.py")])
    assert [name for name in {*written, "soak.md"} - {"file.py", "a.mp4"} if name not in source] == []


NORMALIZE = {"sft": train_sft.normalize_record, "dpo": train_dpo.normalize_record, "cls": train_cls.normalize_record,
             "grpo": train_grpo.normalize_record}  # fmt: skip


def read_objects(text: str) -> list:
    """JSON objects one after another."""
    decoder, objects = json.JSONDecoder(), []
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        objects.append(value)
        text = text[end:]
    return objects


def shape(record: dict) -> frozenset:
    """The fields of a record: what makes its format."""
    return frozenset(record) - {"id"}


def test_records_are_read():
    """Each is one of its trainer's, has several videos, and examples/ has a record of the same fields."""
    (block,) = BLOCKS["json"]
    records = read_objects(block)
    assert len(records) == 5
    examples = {shape(record) for path in (ROOT / "examples").iterdir() for _, record in mv.read_records(str(path))}
    for record, name in zip(records, ["sft", "sft", "dpo", "grpo", "cls"]):
        row = NORMALIZE[name](record, "README")
        assert len(mv.record_files(row)) > 1, record
        assert shape(record) in examples, record
    (video,) = (json.loads(code) for code in INLINE if code.startswith('{"video"'))
    row = train_sft.normalize_record({**records[0], "video": [video] * 3}, "README")
    assert row["messages"][0]["content"][0]["end"] == 9


def test_every_field_is_documented():
    """docs/data.md has all that is read, refused or an option; the README links it."""
    page = (ROOT / "docs" / "data.md").read_text()
    fields = {*mv.OPTIONS, *mv.OPTION_ALIASES, "sample_fps", *mv.TRAIN_FIELDS, "system", "completion", "query",
              "instruction", "problem", "rejected_response", *train_grpo.REFERENCES, *train_grpo.COLUMNS}  # fmt: skip
    assert {field for field in fields if f"`{field}`" not in page} == set()
    refused = page.split("## Refused by name")[1]
    named = {*mv.REFUSED_FIELDS, *mv.REFUSED_TURN_FIELDS, *mv.REASONING_FIELDS}
    assert {field for field in named if f"`{field}`" not in refused} == set() and "(docs/data.md)" in README


@pytest.mark.parametrize("path", sorted((ROOT / "examples").iterdir()), ids=lambda path: path.name)
def test_examples_are_read(path):
    """Every file of examples/ is read by the trainer of its name, the shared ones by train_sft.py."""
    name = path.name.split("_")[0].split(".")[0]
    options = {}
    if name == "cls":
        kinds = {"single_label": train_cls.SINGLE, "multi_label": train_cls.MULTI, "regression": train_cls.REGRESSION}
        options = {"problem_type": kinds[path.stem.removeprefix("cls_")], "default_prompt": "Open?"}
    rows = [NORMALIZE.get(name, train_sft.normalize_record)(record, where, **options)
            for where, record in mv.read_records(str(path))]  # fmt: skip
    assert len(rows) > 1


def test_sizes(tmp_path, monkeypatch):
    """The table's frames, sizes and tokens are what its flags make of its video."""
    table = README.split("| flags |")[1].split("\n\n")[0].splitlines()
    seconds, width, height = map(int, re.search(r"(\d+)-s video of (\d+)×(\d+)", table[0]).groups())
    assert len(table) >= 4
    part = dict.fromkeys(mv.PART) | {"type": "video"}
    (tmp_path / "data.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    first = None
    for line in table[2:]:
        flags, one, thirty = line.strip("| ").split(" | ")
        asked = re.search("`(--.*?)`", flags)
        words = shlex.split(asked[1]) if asked else first if "first" in flags else []
        first = first or words
        args = mv.parse_arguments(train_sft.SFTArguments, ["--data_path", "data.json", *words])
        factor = 32 if "Qwen3-VL" in flags else 28
        if "none" in flags:
            bounds = "{:,} to {:,} pixels".format(*mv.pixel_bounds(args, "video", factor))
            assert bounds in flags and args.fps == mv.TrainingArguments.fps
        indices = mv.sample_frames(part, seconds * 30, 30.0, args)[0]
        sides = mv.target_size(part, height, width, len(indices), args, factor)
        tokens, stamps = mv.visual_tokens(len(indices), *sides, factor), 0
        expected = f"{len(indices)} frames of {sides[1]}×{sides[0]}: {tokens:,} tokens"
        if factor == 32:  # <, digits, ., digit, " seconds", > are a token each in Qwen's vocabulary, and two borders
            times = [(a + b) / 60 for a, b in zip(indices[::2], indices[1::2])]
            stamps = sum(len(f"{time:.1f}") + 3 + 2 for time in times)
            expected += f", {stamps} of time stamps"
        assert one == expected and thirty == f"{30 * (tokens + stamps):,} tokens", (expected, one)


def test_families_page():
    """Every family and refused kind is named; the table of sizes is arithmetic."""
    page = (ROOT / "docs" / "families.md").read_text()
    assert [name for name in mv.FAMILIES if f"`{name}`" not in page] == []
    table = page.split("| a clip of 10 s |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 3
    for line in table:
        clip, visual, stamps, thirty = line.strip("| ").split(" | ")
        frames, width, height = map(int, re.findall(r"\d+", clip))
        assert int(visual.replace(",", "")) == mv.visual_tokens(frames, height, width, 32)
        assert int(stamps) == frames // 2 * 8  # see test_sizes; all are below 10 seconds
        assert int(thirty.replace(",", "")) == 30 * (int(visual.replace(",", "")) + int(stamps))


def test_metrics_are_explained():
    source = "".join((ROOT / f"train_{name}.py").read_text() for name in NORMALIZE)
    memory = inspect.getsource(mv.peak_memory)
    counted = "".join(re.findall(r"(?:counts|row) = \{\n(.*?)\n +\}", source, re.S)) + memory
    source += memory
    table = (ROOT / "docs" / "metrics.md").read_text()
    names = ["reward", "rewards/NAME", "completions/mean_length", "eval_reward", "eval_loss", "not_finite",
             *train_dpo.METRICS, *re.findall(r'"(completions/\w+)":', source),
             *(f"eval_{name}" for kind in train_cls.METRICS.values() for name in kind),
             *re.findall(r'"([\w/]+)":', counted)]  # fmt: skip
    assert [name for name in names if f"`{name}`" not in table] == []
    named = set(re.findall(r"`([\w/]+)`(?=[^|]*\|[^|]*\|$)", table, re.M))
    parts = {name.removeprefix("eval_").removesuffix("/NAME") for name in named}
    assert len(named) > 40 and [part for part in parts if part not in source] == []


ELSEWHERE = {"unsupported operand type(s)", "The length of fps (1)", "CUDA out of memory"}  # other projects' messages


def test_messages_are_ours():
    """The messages under Trouble, with … for what varies, are in the source."""
    texts = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    with pytest.raises(ValueError) as told:
        turn = {"from": "human", "value": "<video><video>What happens?"}
        mv.normalize_conversation({"video": ["a.mp4"], "conversations": [turn]}, "record 0")
    texts.append(str(told.value))  # its "video" is one of two
    table = README.split("| message |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 5
    for line in table:
        message = re.match(r"\| `(.*?)` \|", line)[1]
        parts = re.sub(r"--\w+", "--…", message).split("…")  # flags are often filled in
        pattern = re.compile(".+?".join(re.escape(part.strip()) for part in parts), re.S)
        known = any(message.startswith(start) for start in ELSEWHERE)
        assert known or any(pattern.search(re.sub(r"--\w+", "--…", f"… {text} …")) for text in texts), message


def test_length():
    assert len(README.splitlines()) <= 250
    assert [line for page in (README, *DOCS) for line in page.splitlines() if len(line) > 119] == []


def test_links():
    """Files that a page links to exist, and every page of docs/ is linked from the README."""
    for folder, page in ((ROOT, README), *((ROOT / "docs", page) for page in DOCS)):
        linked = [link for link in re.findall(r"\]\(([^)#]+)", page) if not link.startswith("http")]
        assert [link for link in linked if not (folder / link).exists()] == []
    assert {path.name for path in (ROOT / "docs").iterdir()} <= set(re.findall(r"\(docs/([\w.]+)\)", README))
