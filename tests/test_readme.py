"""The README's commands parse, and its files exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from test_train import ROOT

import multivideo as mv
import train_cls
import train_dpo
import train_grpo
import train_sft

SCRIPTS = {"train_sft.py": train_sft.SFTArguments, "train_dpo.py": train_dpo.DPOArguments,
           "train_cls.py": train_cls.ClassificationArguments, "train_grpo.py": train_grpo.GRPOArguments}  # fmt: skip
README = (ROOT / "README.md").read_text()
COMMANDS = [command.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for command in re.findall(r"accelerate launch(?:[^\n]*\\\n)*[^\n]*", block)]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch, capsys):
    """Every flag is real and nothing conflicts; the data is a stand-in."""
    words = shlex.split(command)
    config = words[words.index("--config_file") + 1]
    assert (ROOT / config).is_file()
    script = next(word for word in words if word in SCRIPTS)
    argv = words[words.index(script) + 1 :]
    for flag in {"--data_path", "--eval_path"} & set(argv):
        (tmp_path / argv[argv.index(flag) + 1]).write_text("[]")
    (tmp_path / "videos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script])
    mv.parse_arguments(SCRIPTS[script], argv)


def test_there_are_commands():
    assert len(COMMANDS) >= 5


def test_files_exist():
    tree = README.split("## Files")[1].split("```")[1]
    names = re.findall(r"^(\S+)  ", tree, re.M)
    assert len(names) >= 9
    assert all((ROOT / name).exists() for name in names)
    shipped = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]}
    assert all(name in tree for name in shipped), "a script is missing in the file tree"
    configs = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert all(config in tree for config in configs)


def test_metrics_are_explained():
    source = "".join(Path(ROOT / script).read_text() for script in SCRIPTS)
    counted = "".join(re.findall(r"(?:counts|row) = \{\n(.*?)\n +\}", source, re.S))
    table = README.split("## What the metrics mean")[1].split("## ")[0]
    names = ["reward", "rewards/NAME", "completions/mean_length", "eval_reward", *train_dpo.METRICS]
    for name in [*names, *re.findall(r'"([\w/]+)":', counted)]:
        assert f"`{name}`" in table, name
