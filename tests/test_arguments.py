"""Arguments: everything that is wrong with a command line is said at once, before anything is loaded."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import multivideo as mv

import pytest
import torch
import transformers
import upstream_commands

import train_cls
import train_dpo
import train_grpo
import train_sft

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {field.name: field for field in dataclasses.fields(train_sft.SFTArguments)}


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse argv behind a valid --data_path and --output_dir, as if it had been typed."""
    data = tmp_path / "data.json"
    data.write_text("[]")

    def parse(*argv, required=True):
        first = ["--data_path", str(data), "--output_dir", str(tmp_path / "out")] if required else []
        monkeypatch.setattr(sys, "argv", ["/somewhere/train_sft.py", *first, *map(str, argv)])
        return mv.parse_arguments(train_sft.SFTArguments)

    return parse


@pytest.fixture
def problems(parse, capsys):
    """The problems that a command line is refused for, without the title and the bullets."""

    def problems(*argv, required=True):
        with pytest.raises(SystemExit) as caught:
            parse(*argv, required=required)
        assert caught.value.code == 2
        title, *lines = capsys.readouterr().err.rstrip("\n").split("\n  • ")
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        assert title == f"train_sft.py: {count} with the arguments"
        return lines

    return problems


# ---------------------------------------------------------------------------------------------- what is accepted


def test_values_of_every_spelling(parse):
    args = parse(
        "--fps=0.25", "--video-resized-width", "64", "--video_resized_height=48", "--bf16", "--freeze_llm", "True",
        "--freeze_merger", "False", "--freeze-vision-tower=yes", "--no_tf32", "--learning_rate", "2e-6", "--seed", "7",
        "--max_steps", "-1", "--warmup-ratio=.03", "--run_name=a=b", "--system_prompt", "- be brief",
        "--early_stopping_threshold", "-1e-3",
    )  # fmt: skip
    assert (args.fps, args.video_resized_width, args.video_resized_height) == (0.25, 64, 48)
    assert (args.bf16, args.freeze_llm, args.freeze_merger, args.freeze_vision_tower) == (True, True, False, True)
    assert (args.tf32, args.learning_rate, args.seed, args.max_steps) == (False, 2e-6, 7, -1)
    assert (args.warmup_ratio, args.run_name, args.system_prompt) == (0.03, "a=b", "- be brief")
    assert args.early_stopping_threshold == -1e-3
    assert type(args.fps) is float and type(parse("--fps", "1").fps) is float
    assert parse("--tf32", "False").tf32 is False
    assert parse("--no-tf32").tf32 is False
    assert parse("--learning_rate", "1", "--learning_rate", "2").learning_rate == 2  # the last one wins, as everywhere
    assert parse("--system_prompt", "").system_prompt == ""


def test_aliases(parse, tmp_path):
    for flag in ("--media_root", "--media-root", "--image-folder"):
        assert parse(flag, tmp_path).image_folder == str(tmp_path)
    for flag in ("--evaluation_strategy", "--evaluation-strategy", "--eval-strategy"):
        assert parse(flag, "no").eval_strategy == "no"


def test_derived_values(parse, tmp_path):
    data = tmp_path / "data.json"
    assert parse().eval_strategy == "no"
    assert parse("--eval_path", data).eval_strategy == "epoch"
    assert parse("--eval_path", data, "--eval_strategy", "steps").eval_strategy == "steps"
    for word in ("auto", "True", "true"):
        assert parse("--resume_from_checkpoint", word).resume_from_checkpoint == "auto"
    for word in ("False", "none", ""):
        assert parse("--resume_from_checkpoint", word).resume_from_checkpoint is None
    # upstream's recipes lower only the maximum: at most this many pixels
    args = parse("--video_max_pixels", "4096")
    assert mv.pixel_bounds(args, "video", 28) == mv.pixel_bounds(args, "video", 32) == (4096, 4096)
    assert mv.pixel_bounds(parse("--video_min_pixels", 900000), "video", 28) == (900000, 900000)  # at least as many
    assert mv.pixel_bounds(parse(), "video", 32) == (128 * 1024, 768 * 1024)
    assert mv.pixel_bounds(parse(), "image", 32) == (4 * 1024, 16384 * 1024)
    # as in the HF Trainer: higher is better unless the metric is a loss
    assert parse().greater_is_better is False
    assert parse("--metric_for_best_model", "eval_accuracy").greater_is_better is True
    assert parse("--metric_for_best_model", "eval_errors", "--greater_is_better", "False").greater_is_better is False


def test_an_earlier_run_is_continued_only_on_demand(parse, problems, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (refusal,) = problems()
    assert re.match(r"--output_dir .*/out holds checkpoints of an earlier run: continue it with "
                    r"--resume_from_checkpoint auto, or name another folder", refusal)  # fmt: skip
    assert parse("--resume_from_checkpoint", "auto").resume_from_checkpoint == "auto"
    assert parse("--resume_from_checkpoint", checkpoint).resume_from_checkpoint == str(checkpoint)


def test_adapter_flags_that_are_switched_off(parse):
    """A command that says --lora_enable False may keep the flags of its adapter."""
    args = parse("--lora_enable", "False", "--use_dora", "False", "--lora_rank", 8)
    assert (args.lora_enable, args.lora_rank) == (False, 8)


def test_an_adapter_to_go_on_from_has_its_shape(parse, problems, tmp_path):
    """What --lora_weight_path holds stands for the flags; a flag that was typed and says otherwise is refused."""
    line = ["--lora_enable", "--freeze_llm", "--lora_weight_path", tmp_path]
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_dora": True, "bias": "all"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    args = parse(*line, "--lora_rank", 3)
    assert (args.lora_rank, args.lora_alpha, args.use_dora, args.lora_bias) == (3, 5, True, "all")
    said = problems(*line, "--lora_rank", 8, "--use_dora", "False", "--num_lora_modules", 3)
    assert said == [
        "--lora_rank 8: the adapter of --lora_weight_path has 3",
        "--use_dora False: the adapter of --lora_weight_path has True",
    ]


def test_recipe_flags_may_be_repeated_beside_an_adapter(parse, problems, tmp_path):
    """Those of the adapter's run; each that differs is named with what to change, by the run's arguments.json."""
    line = ["--lora_enable", "--freeze_llm", "--lora_weight_path", tmp_path]
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "target_modules": ["model.layers.0.q_proj", "lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    run = {"freeze_vision_tower": False, "freeze_merger": True, "unfreeze_topk_llm": 2, "num_lora_modules": 7}
    (tmp_path / "arguments.json").write_text(json.dumps(run))
    same = [*line, "--freeze_merger", "True", "--unfreeze_topk_llm", 2, "--num_lora_modules", 7,
            "--lora_namespan_exclude", "['embed_tokens']"]  # fmt: skip
    assert parse(*same).lora_namespan_exclude == "['embed_tokens']"
    assert parse(*line, "--unfreeze_topk_llm", 3).freeze_merger is False  # more is trained now than then
    in_file = "and what it trained is in the adapter's file: give"
    assert problems(*line, "--freeze_vision_tower", "True", "--num_lora_modules", 6, "--lora_namespan_exclude",
                    "['lm_head']") == [
        "--lora_namespan_exclude ['lm_head']: the adapter of --lora_weight_path is on 1 such modules: drop the flag",
        "--num_lora_modules 6: the run of --lora_weight_path had 7: give the same, or drop the flag",
        f"--freeze_vision_tower True: the run of --lora_weight_path had False, {in_file} --freeze_vision_tower False",
        f"--unfreeze_topk_llm 0: the run of --lora_weight_path had 2, {in_file} --unfreeze_topk_llm 2",
    ]  # fmt: skip
    (tmp_path / "arguments.json").unlink()
    assert parse(*line, "--freeze_vision_tower", "True")  # another program's: loading tells


def test_an_adapter_of_another_kind(problems, tmp_path):
    line = ["--lora_enable", "--freeze_llm", "--lora_weight_path", tmp_path]
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert problems(*line) == [f"--lora_weight_path {tmp_path}: not a LoRA adapter"]


@pytest.mark.parametrize("launcher", ["DEEPSPEED", "FSDP"])
def test_quantised_weights_are_not_split(launcher, problems, monkeypatch):
    """Tried with DeepSpeed 0.19.8: ZeRO-2 breaks 4-bit weights and silently changes 8-bit ones."""
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    said = problems("--bits", 8, "--lora_enable", "--freeze_llm")
    assert "--bits 8 runs in one process or under DDP: choose another file of accelerate_configs/" in said


# -------------------------------------------------------------------------------------------------- what is refused

BAD = {
    # one flag of a wrong type or value → what is said (all of these are said together, too, below)
    "--fps two": "--fps two: invalid float value: 'two'",
    "--fps=": "--fps=: invalid float value: ''",
    "--nframes 2.5": "--nframes 2.5: invalid int value: '2.5'",
    "--bf16 maybe": r"--bf16 maybe: .*maybe.*",
    "--optim adam": r"--optim adam: invalid choice: 'adam' \(choose from .*adamw_torch.*",
    "--lr_scheduler_type cosin": r"--lr_scheduler_type cosin: invalid choice: 'cosin' \(choose from .*cosine.*",
    "--save_strategy never": r"--save_strategy never: invalid choice: 'never' .*",
    "--eval_strategy often": r"--eval_strategy often: invalid choice: 'often' .*",
    "--attn_implementation eager": r"--attn_implementation eager: invalid choice: 'eager' .*",
    "--on_long_sample cut": r"--on_long_sample cut: invalid choice: 'cut' .*",
    "--run_name": "--run_name: expected one argument",
    "--report_to": "--report_to: expected at least one argument",
    "--no_tf32=True": r"--no_tf32=True: ignored explicit argument 'True'",
    "--no_tf32 True": r"--no_tf32: 'True' is one too many .*",
    "--weight_decay 0.1 0.2": r"--weight_decay: '0\.2' is one too many \(a value with spaces needs quotes\)",
    "--bf16 True now": "--bf16: 'now' is one too many .*",
    "--learning_rate -1e-5": r"--learning_rate -1e-05: must be 0 or more",
    "--vision_lr -1": r"--vision_lr -1\.0: must be 0 or more",
    "--merger_lr nan": "--merger_lr nan: must be a finite number",
    "--max_grad_norm inf": "--max_grad_norm inf: must be a finite number",
    "--weight_decay -0.1": r"--weight_decay -0\.1: must be 0 or more",
    "--warmup_steps -1": "--warmup_steps -1: must be 0 or more",
    "--warmup_ratio 3": r"--warmup_ratio 3\.0: must lie between 0 and 1",
    "--adam_beta1 1": r"--adam_beta1 1\.0: must be 0 or more and below 1",
    "--adam_beta2 -0.1": r"--adam_beta2 -0\.1: must be 0 or more and below 1",
    "--adam_epsilon 0": r"--adam_epsilon 0\.0: must be above 0",
    "--seed -1": "--seed -1: must be 0 or more and below 2³²",
    "--fps 0": r"--fps 0\.0: must be above 0",
    "--fps -0.5": r"--fps -0\.5: must be above 0",
    "--nframes 0": "--nframes 0: must be above 0",
    "--nframes 1": "--nframes 1: two frames make one temporal patch, the fewest is 2",
    "--min_frames 3": "--min_frames 3: must be a multiple of 2",
    "--max_frames 2": "--max_frames 2 is below --min_frames 4",
    "--max_steps 0": r"--max_steps 0: must be above 0 \(or -1: by epochs\)",
    "--max_steps -5": r"--max_steps -5: must be above 0 .*",
    "--num_train_epochs 0": r"--num_train_epochs 0\.0: must be above 0",
    "--per_device_train_batch_size 0": "--per_device_train_batch_size 0: must be above 0",
    "--per_device_eval_batch_size -1": "--per_device_eval_batch_size -1: must be above 0",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps 0: must be above 0",
    "--save_steps 0": "--save_steps 0: must be above 0",
    "--eval_steps 0": "--eval_steps 0: must be above 0",
    "--logging_steps 0": "--logging_steps 0: must be above 0",
    "--save_total_limit 0": "--save_total_limit 0: must be above 0",
    "--max_bad_steps 0": "--max_bad_steps 0: must be above 0",
    "--max_seq_length 0": "--max_seq_length 0: must be above 0",
    "--max_video_tokens 0": "--max_video_tokens 0: must be above 0",
    "--image_max_pixels 0": "--image_max_pixels 0: must be above 0",
    "--dataloader_num_workers -1": "--dataloader_num_workers -1: must be 0 or more",
    "--early_stopping_threshold nan": "--early_stopping_threshold nan: must be a finite number",
    "--video_resized_width 64": "--video_resized_width 64, --video_resized_height None: give both or none",
    "--image_resized_height 64": "--image_resized_width None, --image_resized_height 64: give both or none",
    "--video_resized_width 64 --video_resized_height 0": "--video_resized_height 0: must be above 0",
    "--video_min_pixels 900 --video_max_pixels 800": "--video_min_pixels 900 is above --video_max_pixels 800: .*",
    "--image_min_pixels 9 --image_max_pixels 8": "--image_min_pixels 9 is above --image_max_pixels 8: .*",
    "--fps 1 --nframes 8": "--fps and --nframes contradict each other: give one",
    "--fps 2.0 --nframes 8": "--fps and --nframes contradict each other: give one",  # its default, but typed
    "--bf16 True --fp16 True": "--bf16, --fp16 and --pure_bf16 exclude each other: give one",
    "--bf16 --pure_bf16": "--bf16, --fp16 and --pure_bf16 exclude each other: give one",
    "--freeze_llm --freeze_merger --freeze_vision_tower": ".* leave nothing to train: drop one",
    "--unfreeze_topk_llm 2": "--unfreeze_topk_llm needs --freeze_llm True",
    "--unfreeze_topk_llm -2 --freeze_llm": "--unfreeze_topk_llm -2: must be 0 or more",
    "--unfreeze_topk_vision 2": "--unfreeze_topk_vision needs --freeze_vision_tower True",
    "--lora_enable": "--lora_enable needs --freeze_llm True: .*",
    "--vision_lora": "--vision_lora needs --lora_enable True and --freeze_vision_tower True",
    "--vision_lora --lora_enable --freeze_llm": "--vision_lora needs .* --freeze_vision_tower True",
    "--lora_rank 8 --use_dora True": "--use_dora, --lora_rank: for adapters, which need --lora_enable True",
    "--lora_enable --freeze_llm --lora_rank 0": "--lora_rank 0: must be above 0",
    "--lora_enable --freeze_llm --lora_dropout 1": r"--lora_dropout 1\.0: must be 0 or more and below 1",
    "--lora_enable --freeze_llm --num_lora_modules 0": r"--num_lora_modules 0: must be above 0 \(or -1: all\)",
    "--lora_enable --freeze_llm --lora_bias some": "--lora_bias some: invalid choice: 'some' .*",
    "--lora_enable --freeze_llm --lora_namespan_exclude lm_head":
        r"""--lora_namespan_exclude lm_head: expected a list of names in quotes, as in "\['lm_head', 'embed_tok.*""",
    "--lora_enable --freeze_llm --lora_namespan_exclude ['']": "--lora_namespan_exclude .*: expected a list .*",
    "--lora_enable --freeze_llm --lora_namespan_exclude {'a':1}": "--lora_namespan_exclude .*: expected a list .*",
    "--lora_enable --freeze_llm --lora_weight_path gone":
        r"--lora_weight_path gone: no adapter_config\.json and no adapter_model\.safetensors there",
    "--bits 5": "--bits 5: invalid choice: 5 .*",
    "--bits 4": "--bits 4 needs --lora_enable True .*",
    "--quant_type int4": "--quant_type int4: invalid choice: 'int4' .*",
    "--bits 8 --lora_enable --freeze_llm --unfreeze_topk_llm 1": "--unfreeze_topk_llm with --bits 8: .*: drop one",
    "--eval_strategy steps": "--eval_strategy steps needs --eval_path",
    "--load_best_model_at_end": "--load_best_model_at_end: needs --eval_path, and no --eval_strategy no",
    "--early_stopping_patience 2": "--early_stopping_patience: needs --eval_path, .*",
    "--greater_is_better True": "--greater_is_better with --metric_for_best_model eval_loss keeps the worst .*",
    "--report_to tensorbord": r"--report_to tensorbord: no such tracker; known: none, all, .*tensorboard.*",
    "--report_to wandb,tensorboard": "--report_to wandb,tensorboard: no such tracker; .*",
    "--report_to none tensorboard": "--report_to none excludes all other trackers",
    "--report_to no_such": "--report_to no_such: no such tracker; .*",
    "--data_path gone.json": r"--data_path gone\.json: no such file",
    "--data_path /gone/data": r"--data_path /gone/data: no such file",
    "--eval_path ./gone.parquet": r"--eval_path gone\.parquet: no such file",
    "--image_folder gone": "--image_folder gone: no such folder",
    "--eval_image_folder gone": "--eval_image_folder gone: no such folder",
    "--model_id ./gone": r"--model_id \./gone: no such folder",
    "--model_id a/b/c": "--model_id a/b/c: no such folder",
    "--resume_from_checkpoint gone": "--resume_from_checkpoint gone: no such folder",
    # flags that do not exist
    "--learning_rte 1": r"--learning_rte: no such flag; did you mean --learning.rate\?",
    "--vidoe_max_pixels=9": r"--vidoe_max_pixels: no such flag; did you mean --video.max.pixels\?",
    "--learning 1": r"--learning: no such flag; .*",  # no abbreviations
    "--xyzzy -1": "--xyzzy: no such flag; --help lists all",
    "-fps 2": r"-fps: no such flag; did you mean --fps\?",
    "--no_bf16": r"--no_bf16: no such flag; did you mean .*bf16\?",
    "--load_in_4bit True": r"--load_in_4bit: no such flag; did you mean --bits 4\?",
    "--load-in-8bit": r"--load-in-8bit: no such flag; did you mean --bits 8\?",
    "--video_fps 1": r"--video_fps: no such flag; did you mean --fps\?",
    "--per_gpu_batch=2": r"--per_gpu_batch: no such flag; did you mean --per_device_train_batch_size\?",
    "--lr 1e-5": r"--lr: no such flag; did you mean --learning_rate\?",
    "--Epochs 3": r"--Epochs: no such flag; did you mean --num_train_epochs\?",
    "--cutoff_len 9": r"--cutoff_len: no such flag; did you mean --max_seq_length\?",
    "--kl_coef 0.1": r"--kl_coef: no such flag; .*",  # --beta is none of this trainer's
    "--deepspeed scripts/zero3.json": "--deepspeed: say it to the launcher: accelerate launch --config_file .*",
    "--use-liger True": "--use-liger: drop it: only supervised positions reach the output head",
    "--disable_flash_attn2=False": "--disable_flash_attn2: use --attn_implementation sdpa",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_one_problem_has_one_message(line, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (said,) = problems(*line.split())
    assert re.fullmatch(BAD[line], said, re.DOTALL)


def test_all_problems_are_said_at_once(problems):
    # one-flag lines, but for those whose message depends on another flag
    apart = ("--max_frames", "--video_min_pixels", "--load_best", "--early_stopping_patience", "--eval_strategy")
    lines = [line for line in BAD if line.count("--") == 1 and not line.startswith(apart)]
    flags = {}
    for line in lines:  # one line per flag
        flags.setdefault(line.split()[0].split("=")[0], line)
    said = problems("stray", *" ".join(flags.values()).split(), required=False)
    assert said[0] == "'stray' belongs to no flag: every value follows its --flag"
    wanted = [BAD[line] for line in flags.values()] + [BAD["--fps 1 --nframes 8"]]  # both were typed
    missing = [pattern for pattern in wanted if not any(re.fullmatch(pattern, one, re.DOTALL) for one in said)]
    assert not missing
    extra = [one for one in said[1:] if not any(re.fullmatch(pattern, one, re.DOTALL) for pattern in wanted)]
    assert not extra
    assert len(said) == len(wanted) + 1
    assert len(said) > 50


def test_other_projects_names_lead_to_real_flags():
    """Every name on the right side is a flag of a trainer, and none on the left."""
    own = (train_cls.ClassificationArguments, train_dpo.DPOArguments, train_grpo.GRPOArguments)
    flags = set().union(FIELDS, *({field.name for field in dataclasses.fields(arguments)} for arguments in own))
    meant = [flag for answer in mv.RENAMED_FLAGS.values() for flag in re.findall(r"--(\w+)", answer)]
    assert meant and set(meant) <= flags
    assert not flags & {*mv.RENAMED_FLAGS, *mv.REPLACED_FLAGS}
    assert not {*mv.RENAMED_FLAGS} & {*mv.REPLACED_FLAGS}


def test_files_that_are_no_records(problems, tmp_path):
    (tmp_path / "table.csv").write_text("")
    (tmp_path / "file").write_text("")
    assert problems("--data_path", tmp_path / "table.csv") == [
        f"--data_path {tmp_path}/table.csv: expected a file whose name ends in .json, .jsonl, .parquet"
    ]
    assert problems("--output_dir", tmp_path / "file") == [f"--output_dir {tmp_path}/file is a file: name a folder"]
    assert problems("--image_folder", tmp_path / "file") == [f"--image_folder {tmp_path}/file: no such folder"]


def test_empty_values_are_unset_shell_variables(problems):
    said = problems("--data_path", "", "--output_dir=", "--model_id", "", "--eval_path", "", "--report_to", "")
    flags = ["--model_id", "--data_path", "--eval_path", "--output_dir", "--report_to"]
    assert said == [f"{flag} is empty (an unset shell variable?): give a value or drop the flag" for flag in flags]


def test_data_path_is_required_and_missed_once(problems):
    assert problems("--fps", 1, required=False) == ["--data_path is missing: the file with the training records"]
    assert problems("--data_path", "--fps", 1, required=False) == ["--data_path: expected at least one argument"]


def test_missing_packages_and_devices(problems, monkeypatch):
    find_spec = mv.importlib.util.find_spec
    hidden = ("bitsandbytes", "flash_attn")
    monkeypatch.setattr(mv.importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mv, "get_available_trackers", list)
    said = problems("--optim", "paged_adamw_8bit", "--attn_implementation", "flash_attn", "--report_to", "wandb",
                    "--bits", 4, "--lora_enable", "--freeze_llm")  # fmt: skip
    assert said == [
        "--report_to wandb needs its package: pip install wandb",
        "--optim paged_adamw_8bit needs bitsandbytes: pip install bitsandbytes",
        "--bits 4 needs bitsandbytes: pip install bitsandbytes",
        "--attn_implementation flash_attn needs the flash-attn package; varlen comes with torch",
        "--attn_implementation flash_attn takes half precision only: add --bf16 True, or use sdpa or auto",
        "--attn_implementation flash_attn needs a CUDA device: use sdpa or auto",
    ]


@pytest.mark.parametrize("capability, kernel", [((7, 5), "sdpa"), ((8, 0), "varlen"), ((9, 0), "varlen")])
def test_kernel_of_a_card(parse, problems, monkeypatch, capability, kernel):
    """Flash kernels need compute capability 8.0 and half precision; auto knows it, and varlen is refused at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for flags, expected in (
        ({"bf16": True}, kernel),
        ({"fp16": True}, kernel),
        ({"pure_bf16": True}, kernel),
        ({}, "sdpa"),
    ):
        assert mv.attention_kernel(mv.TrainingArguments(**flags), "cuda:0") == expected
        assert mv.attention_kernel(mv.TrainingArguments(**flags), "cpu") == "sdpa"
    given = ["--attn_implementation", "varlen", "--bf16", "True"]
    if kernel == "sdpa":
        needed = "needs a GPU of compute capability 8.0 or newer, this one has 7.5: use sdpa or auto"
        assert problems(*given) == [f"--attn_implementation varlen {needed}"]
    else:
        assert parse(*given).attn_implementation == "varlen"


def test_bad_arguments_stop_the_trainer_before_anything_is_loaded(monkeypatch, capsys):
    def loaded(*args, **kwargs):
        raise AssertionError("something was started before the arguments were checked")

    for module, name in ((mv, "make_accelerator"), (mv, "load_records"), (mv, "Encoder"), (mv, "load_model")):
        monkeypatch.setattr(module, name, loaded)
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--fps", "two", "--nframs", "3"])
    with pytest.raises(SystemExit) as caught:
        train_sft.main()
    assert caught.value.code == 2
    assert "3 problems with the arguments" in capsys.readouterr().err


def test_only_the_first_process_speaks(parse, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse("--fps", "two")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------- bare call, help


def test_a_bare_call_says_what_is_required():
    """The one test through a real process: exit code 0, one message, no traceback."""
    done = subprocess.run([sys.executable, "train_sft.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stdout == ""
    for word in ("train_sft.py needs at least --data_path", "--output_dir", "--model_id", "--help", "make demo"):
        assert done.stderr.count(word) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", sorted([*ROOT.glob("train_*.py"), *ROOT.glob("tools/*.py")]), ids=lambda p: p.stem)
def test_outside_the_environment(script):
    """A Python without the packages: one sentence says what to do."""
    run = subprocess.run([sys.executable, "-S", script, "--help"], capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith(f"{script.name}: no module ") and "source .venv/bin/activate" in run.stderr


def test_help_has_a_sentence_for_every_field(parse, capsys):
    for name, field in FIELDS.items():
        assert re.fullmatch(r"\S.{10,}[^. ]\.", field.metadata["help"]), name
    with pytest.raises(SystemExit) as caught:
        parse("--help", required=False)
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert f"--{name}" in shown
        assert re.sub(r"\s", "", field.metadata["help"]) in re.sub(r"\s", "", shown), name
    assert "Frames taken per second of video. [2.0]" in shown
    assert "option_strings" not in shown  # what argparse makes of a bare % in a help text


def test_every_field_is_read_somewhere():
    """No option without an effect: each is read outside its definition and outside the check of the arguments."""
    helper = (ROOT / "multivideo.py").read_text()
    start, end = helper.index("\nclass TrainingArguments"), helper.index("\ndef say(")
    code = helper[:start] + helper[end:] + (ROOT / "train_sft.py").read_text()
    indirect = re.search(r'getattr\(args, f"\{kind\}_\{name\}"\)', code)  # option("max_pixels") in target_size
    for name in FIELDS:
        kind, _, rest = name.partition("_")
        sized = kind in ("image", "video") and indirect and f'option("{rest}")' in code
        sized = sized or f'getattr(args, f"{{kind}}_{rest}")' in code  # in pixel_bounds
        read = re.search(rf'\bargs\.{name}\b(?!\s*=[^=])|"{name}"', code)  # "…": for getattr(args, flag)
        assert sized or read, f"--{name} is read nowhere"


# ------------------------------------------------------------------------------------------- people from upstream


@pytest.mark.parametrize("name", upstream_commands.SFT_COMMANDS)
def test_upstream_command(name, parse, problems, tmp_path, monkeypatch):
    """Each flag is kept, with its value, or answered by what replaces it; no flag is unknown."""
    monkeypatch.chdir(tmp_path)
    command = upstream_commands.SFT_COMMANDS[name]
    pairs = dict(zip(command[::2], command[1::2], strict=True))
    pairs["--data_path"], pairs["--output_dir"] = "data.json", "out"
    pairs["--image_folder"] = "."
    foreign = [flag for flag in pairs if flag[2:] not in FIELDS]
    line = [word for pair in pairs.items() for word in pair]
    assert foreign
    assert problems(*line, required=False) == [f"{flag}: {mv.REPLACED_FLAGS[flag[2:]]}" for flag in foreign]

    kept = {flag: value for flag, value in pairs.items() if flag not in foreign}
    args = parse(*(word for pair in kept.items() for word in pair), required=False)
    for flag, typed in kept.items():
        value = getattr(args, flag[2:])
        if isinstance(value, bool):
            assert value == (typed == "True"), flag
        elif isinstance(value, (int, float)):
            assert value == float(typed), flag
        else:
            assert value in (typed, [typed]), flag
    assert isinstance(args.fps, float)


def test_every_upstream_flag_is_kept_or_answered():
    for flag in upstream_commands.ACCEPTED_FIELDS["sft"]:
        assert (flag in FIELDS) != (flag in mv.REPLACED_FLAGS), flag
    assert not set(FIELDS) & set(mv.REPLACED_FLAGS)


def test_doubtful_settings(parse):
    """Upstream's defaults stay, and the banner says what they mean."""

    def notes(*flags, steps=500):
        return mv.doubtful_settings(parse(*flags), steps)

    assert notes("--warmup_ratio", 0.03) == []
    assert notes("--freeze_llm") == notes("--warmup_steps", 5) == notes("--optim", "sgd") == []
    (warmup,) = notes()
    assert warmup.endswith("give --warmup_ratio 0.03")
    (short,) = notes("--warmup_steps", 5, steps=499)
    assert short.startswith("the run's 499 steps are fewer than --save_steps 500: no checkpoint before its end")
    assert notes("--warmup_steps", 5, "--save_strategy", "epoch", steps=3) == []
    lora = ["--lora_enable", "--freeze_llm"]
    alpha, tower, merger = notes(*lora)
    assert alpha == "--lora_alpha 16 is below --lora_rank 64: the adapter is scaled by 0.25; usual are 1 and 2"
    assert tower.startswith("the vision tower is trained in full") and "--freeze_vision_tower True or" in tower
    assert merger.endswith("at --learning_rate 5e-05: give --freeze_merger True or --merger_lr")
    asked = ["--freeze_vision_tower", "False", "--merger_lr", 1e-5, "--lora_alpha", 64]
    assert notes(*lora, *asked) == notes(*lora, "--freeze_vision_tower", "--freeze_merger", "--lora_alpha", 99) == []


NEWER_UPSTREAM = ["enable_reasoning", "prediction_loss_only", "use_liger_loss", "use_liger_kernel",
                  "generation_max_new_tokens"]  # fmt: skip


def test_every_flag_of_the_hf_trainer_is_kept_or_answered(problems):
    """All that transformers.TrainingArguments takes, and upstream's newest flags: a line each, with a real mend."""
    theirs = [*transformers.TrainingArguments.__dataclass_fields__, *NEWER_UPSTREAM]
    assert [name for name in theirs if name not in FIELDS and name not in mv.REPLACED_FLAGS] == []
    line = [word for name in theirs if name not in FIELDS for word in (f"--{name}", "x")]
    assert problems(*line) == [f"--{name}: {mv.REPLACED_FLAGS[name]}" for name in theirs if name not in FIELDS]
    for answer in mv.REPLACED_FLAGS.values():
        named = set(re.findall(r"--(\w+)", answer)) - {"config_file", "gpu_memory_gb", "max_new_tokens"}  # of others
        assert named <= set(FIELDS), answer


UPSTREAM_DEFAULTS = {
    "model_id": "Qwen/Qwen2.5-VL-3B-Instruct", "freeze_vision_tower": False, "freeze_llm": False,
    "freeze_merger": False, "unfreeze_topk_llm": 0, "unfreeze_topk_vision": 0, "max_seq_length": 32768, "fps": 2.0,
    "nframes": None, "image_min_pixels": 3136, "image_max_pixels": 12845056, "video_min_pixels": 100352,
    "video_max_pixels": 602112, "image_resized_width": None, "image_resized_height": None,
    "video_resized_width": None, "video_resized_height": None, "early_stopping_patience": 0, "vision_lr": None,
    "merger_lr": None, "cache_dir": None, "optim": "adamw_torch", "bf16": False, "fp16": False,
    "lora_enable": False, "vision_lora": False, "use_dora": False, "lora_rank": 64, "lora_alpha": 16,
    "lora_dropout": 0.05, "lora_bias": "none", "num_lora_modules": -1, "lora_namespan_exclude": None, "bits": 16,
    "quant_type": "nf4", "double_quant": True,
}  # fmt: skip


def test_upstream_defaults_hold(parse):
    args = parse("--seed", 1)
    kept = [name for name in UPSTREAM_DEFAULTS if name not in mv.REPLACED_FLAGS]
    assert len(kept) >= 24
    for name in kept:
        value = getattr(args, name)
        if name.endswith("_pixels"):  # which follow the model's pixels per token: 28² in the families upstream knows
            value = mv.pixel_bounds(args, name.split("_")[0], 28)["max" in name]
        assert (type(value), value) == (type(UPSTREAM_DEFAULTS[name]), UPSTREAM_DEFAULTS[name]), name
    # the reference's and the HF Trainer's, where upstream does not set its own
    assert (args.min_frames, args.max_frames) == (4, 768)
    assert (args.learning_rate, args.num_train_epochs, args.weight_decay, args.max_grad_norm) == (5e-5, 3.0, 0.0, 1.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.warmup_ratio) == (0.9, 0.999, 1e-8, 0.0)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.save_steps) == (8, 1, 500)
    assert (args.lr_scheduler_type, args.save_strategy, args.report_to) == ("linear", "steps", ["none"])
