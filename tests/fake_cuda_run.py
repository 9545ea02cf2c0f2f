"""main() of the trainers on the fake CUDA device: two steps and an evaluation, one process.

    LD_PRELOAD=shim.so python tests/fake_cuda_run.py OUT RUN …

A RUN is an objective, or one with a variant of VARIANTS or another family, as in sft+lora, or "benchmark". Random
pixels and random weights of the tiny model stand for files; nothing is saved. OUT gets a JSON object: for each run its
error, or a list with what there is of each row of metrics.jsonl: its kind, how often the host waited for the device
and where, launches, attention backends.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from unittest import mock

warnings.simplefilter("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import multivideo as mv

import accelerate
import benchmark_gpu
import torch
import transformers
from fake_cuda import FakeCuda
from make_demo import build_processor, save_tiny_model

import train_cls
import train_dpo
import train_grpo
import train_sft

VARIANTS = {
    "lora": ["--lora_enable", "True", "--freeze_llm", "True", "--lora_rank", "4", "--freeze_vision_tower", "True",
             "--freeze_merger", "True", "--lora_namespan_exclude", "['lm_head', 'embed_tokens']"],
    "a tensor on the CPU": [],
}  # fmt: skip
TRAINERS = {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo, "cls": train_cls}


def fake_accelerator(kind, **options):
    """An Accelerator of one process on cuda:0, which accelerate would not find."""
    accelerator = kind(cpu=True)
    accelerator.state.device = accelerate.PartialState().device = torch.device("cuda", 0)
    accelerator.device_placement = False
    prepare = accelerator.prepare_optimizer
    accelerator.prepare = lambda model, optimizer: (model, prepare(optimizer, device_placement=False))
    accelerator.reduce = lambda tensor, *args, **kwargs: tensor
    accelerator.gather = lambda tensor: tensor
    return accelerator


def run(objective, variant=None):
    """What there is of each row of metrics.jsonl."""
    trainer, rows, flags = TRAINERS[objective], [], VARIANTS.get(variant, [])
    family, side = (variant, "64") if variant in mv.FAMILIES else ("qwen2_5_vl", "56")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder, saved = Path(folder), tempfile.mkdtemp(dir=folder)
        if family != "qwen2_5_vl":
            save_tiny_model(saved, family)  # on the CPU
        gpu = stack.enter_context(FakeCuda())
        processor = build_processor(family)
        config = benchmark_gpu.make_config("tiny", processor.tokenizer)
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        if family != "qwen2_5_vl":
            config = transformers.AutoConfig.from_pretrained(saved)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        records = [{"id": str(i), **benchmark_gpu.raw_record(objective, 1 + i % 3, i)} for i in range(8)]
        for name, some in (("data", records), ("eval", records[:3])):
            (folder / f"{name}.json").write_text(json.dumps(some))
        for i in range(3):
            (folder / f"{i}.mp4").touch()
        sys.argv = [
            f"train_{objective}.py", "--model_id", str(folder), "--data_path", str(folder / "data.json"),
            "--eval_path", str(folder / "eval.json"), "--output_dir", str(folder / "out"), "--bf16", "True",
            "--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
            "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no", "--dataloader_num_workers", "0",
            "--nframes", "4", "--video_resized_width", side, "--video_resized_height", side, "--video_cache", "none",
            "--gradient_checkpointing", "True", *flags,
        ]  # fmt: skip
        if objective == "grpo":
            sys.argv += ["--num_generations", "2", "--max_completion_length", "9", "--reward_funcs", "format"]
        device = torch.device("cuda", 0)
        for kind in (transformers.AutoModelForImageTextToText, train_cls.classifier_class(family)):
            built = getattr(transformers, config.architectures[0]) if "Auto" in kind.__name__ else kind
            random = benchmark_gpu.RandomWeights(built, device)
            stack.enter_context(mock.patch.object(kind, "from_pretrained", random.from_pretrained))
        append = mv.append_jsonl

        def counted(path, row):
            kind = (
                "evaluation" if any(key.startswith("eval_") for key in row) else "step" if "loss" in row else "other"
            )
            rows.append({"kind": kind, "waits": dict(gpu.waits), "pageable": dict(gpu.pageable),
                         "launches": gpu.launches, "plans": [list(plan) for plan in gpu.plans]})  # fmt: skip
            gpu.reset()
            return append(path, row)

        replaced = {
            "Accelerator": functools.partial(fake_accelerator, accelerate.Accelerator),
            "Encoder": benchmark_gpu.RandomPixels,
            "append_jsonl": counted,
            "publish_model": lambda *args: None,
            "save_checkpoint": lambda *args: None,
        }
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(mv, name, value))
        if variant == "a tensor on the CPU":
            made = mv.tower_inputs
            stack.enter_context(
                mock.patch.object(mv, "tower_inputs", lambda grids, encoder, _: made(grids, encoder, "cpu"))
            )
        query = torch.empty(1, 4, 8, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert [plan[0] for plan in gpu.plans] == ["cudnn"]  # what torch would take, were it not switched off
        gpu.reset()
        trainer.main()
    return rows


def measure(folder):
    """tools/benchmark_gpu.py on the tiny model: its results, one cell of each part; SFT and GRPO as training."""
    every = benchmark_gpu.list_cells

    def few(scale, ways):
        cells = [cell for cell in every(scale, ways) if cell["pixels"] == 56 and cell.get("checkpointing", True)]
        kinds = [("sft", "all"), ("grpo", "lora")]
        steps = [cell for cell in cells if (cell.get("objective"), cell.get("parameters")) in kinds]
        parts = [cell for cell in cells if cell["part"] != "training" and cell.get("way", "ours") == "ours"]
        return steps + parts

    sys.argv = ["benchmark_gpu.py", "--device", "cuda", "--model", "tiny", "--random_weights", "--minutes", "100",
                "--output_dir", folder]  # fmt: skip
    accelerator = functools.partial(fake_accelerator, accelerate.Accelerator)
    with (
        FakeCuda(),
        mock.patch.object(accelerate, "Accelerator", accelerator),
        mock.patch.object(benchmark_gpu, "list_cells", few),
        mock.patch.object(mv, "compile_blocks", lambda model: None),  # inductor would look for the card
        contextlib.suppress(SystemExit),  # checks do not hold: there are no numbers to compare
    ):
        benchmark_gpu.main()
    return json.loads((Path(folder) / "gpu.json").read_text())["tiny"]


def answer(pipe, name):
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(folder) if name == "benchmark" else run(*name.split("+"))
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    pipe.send(result)
    os._exit(0)


def main(out, *runs):
    context, results = multiprocessing.get_context("fork"), {}
    build_processor("qwen2_5_vl")  # what it and the models import is then there for every run
    for name in runs:  # a process for each: accelerate and torch remember devices; forked, since imports take seconds
        ours, theirs = context.Pipe()
        process = context.Process(target=answer, args=(theirs, name))
        process.start()
        theirs.close()
        results[name] = ours.recv()
        process.join()
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
