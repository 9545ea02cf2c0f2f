"""Show what a demo's training has done to its held-out records, and what comes next.

    python tools/show_demo.py demo --objective sft

sft: demo/model and demo/out are loaded with plain transformers and answer every record of demo/sft_eval.json greedily;
both accuracies and some answers are printed, and demo/loss.png is drawn from demo/out/metrics.jsonl. grpo: the same
with demo/half and demo/out_grpo, and the reward. dpo: how often demo/model and demo/out_dpo find the right answer of
a pair of demo/dpo_eval.json likelier than the wrong one. cls: the last evaluation and predictions of demo/out_cls.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multivideo as mv

import torch
import transformers
from tqdm import tqdm


def load(model_path: str):
    """A saved model and its processor, as anyone would load them."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_path)
    return model.eval(), transformers.AutoProcessor.from_pretrained(model_path)


def prepare(rows: list[dict], endings: list[str], processor, config, folder: str, args, clips: dict):
    """The processor's tensors for the first user turn of each normal record with its ending behind, padded left.

    `clips` keeps what was decoded: a clip stands in many records.
    """
    texts, videos, metadata = [], [], []
    for row, ending in zip(rows, endings):
        content = []
        for part in row["messages"][0]["content"]:
            content.append({"type": part["type"], "text": part["text"]})
            if part["type"] == "video":
                path = part["files"][0]
                if path not in clips:
                    factor = config.vision_config.patch_size * config.vision_config.spatial_merge_size
                    clips[path] = mv.load_clip(part, folder, args, factor)
                frames, fps, times = clips[path]
                videos.append(frames)
                taken = {"fps": fps, "frames_indices": range(len(frames))}
                if mv.FAMILIES[config.model_type] == "text":  # the processor writes index / fps: the true times
                    taken = {"fps": 1.0, "frames_indices": times}
                metadata.append({**taken, "total_num_frames": len(frames)})
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + ending)
    inputs = processor(
        text=texts, videos=videos, video_metadata=metadata, do_resize=False, do_sample_frames=False,
        padding=True, padding_side="left", return_tensors="pt",
    )  # fmt: skip
    inputs["position_ids"] = mv.qwen_position_ids(inputs, config)
    return inputs


@torch.no_grad()
def answer(model_path: str, rows: list[dict], folder: str, args, batch_size: int = 10) -> list[str]:
    """Greedy answers of a saved model to normal records, one string per record."""
    (model, processor), clips, answers = load(model_path), {}, []
    for start in tqdm(range(0, len(rows), batch_size), desc=f"answers of {model_path}", leave=False):
        batch = rows[start : start + batch_size]
        inputs = prepare(batch, [""] * len(batch), processor, model.config, folder, args, clips)
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


@torch.no_grad()
def preferences(model_path: str, rows: list[dict], folder: str, args, batch_size: int = 5) -> list[float]:
    """log p(chosen) − log p(rejected) of each normal pair under a saved model, in nats."""
    (model, processor), clips, differences = load(model_path), {}, []
    for start in tqdm(range(0, len(rows), batch_size), desc=f"preferences of {model_path}", leave=False):
        batch = [row for row in rows[start : start + batch_size] for _ in range(2)]
        endings = [text(row["completions"][i % 2][0]) + "<|im_end|>" for i, row in enumerate(batch)]
        inputs = prepare(batch, endings, processor, model.config, folder, args, clips)
        logps = model(**inputs).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(2, inputs["input_ids"][:, 1:, None])[:, :, 0]
        lengths = [len(processor.tokenizer.encode(ending)) for ending in endings]
        sums = [row[-length:].sum().item() for row, length in zip(logps, lengths)]
        differences += [chosen - rejected for chosen, rejected in zip(sums[::2], sums[1::2])]
    return differences


def text(message: dict) -> str:
    """The text of a normal message, without its videos."""
    return "".join(part["text"] or "" for part in message["content"])


def draw_curve(metrics_path: Path, folder: Path) -> Path:
    """Training and evaluation loss, or reward, over the optimizer steps: from metrics.jsonl to a PNG in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    name = "reward" if "reward" in rows[0] else "loss"
    train = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    held_out = [(row["step"], row[f"eval_{name}"]) for row in rows if f"eval_{name}" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train), linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out), "o-", label="held out")
    label, scale = ("loss per supervised token (nats)", "log") if name == "loss" else ("mean reward", "linear")
    axes.set(xlabel="optimizer step", ylabel=label, yscale=scale)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"{name}.png", dpi=120)
    return folder / f"{name}.png"


def show_answers(demo: Path, before: str, after: str):
    """Print accuracies and some answers of two models, and draw the curve of the second one's training."""
    args, folder = settings_of(demo / after)
    rows = list(mv.load_records(str(demo / "sft_eval.json")))
    truth = [text(row["messages"][-1]) for row in rows]
    answers = {name: answer(str(demo / name), rows, folder, args) for name in (before, after)}
    score = {name: sum(a == t for a, t in zip(answers[name], truth)) / len(rows) for name in answers}
    print(f"\n{len(rows)} held-out records, 30 videos each. Question: {text(rows[0]['messages'][0])}")
    for row, said, right in list(zip(rows, answers[after], truth))[:4]:
        print(f"  {row['id']:>10}  model: {said!r:40} truth: {right!r}")
    print(f"\nright before training: {score[before]:.0%}    right after: {score[after]:.0%}    (guessing: 17 %)\n")
    print(f"  {draw_curve(demo / after / 'metrics.jsonl', demo)}   its curve")


def show_pairs(demo: Path):
    """Print how often the right answer is the likelier one, before and after train_dpo.py."""
    from train_dpo import FEATURES, normalize_record

    args, folder = settings_of(demo / "out_dpo")
    rows = list(mv.load_records(str(demo / "dpo_eval.json"), normalize_record, FEATURES))
    found = {name: preferences(str(demo / name), rows, folder, args) for name in ("model", "out_dpo")}
    score = {name: sum(difference > 0 for difference in differences) / len(rows)
             for name, differences in found.items()}  # fmt: skip
    print(f"\n{len(rows)} held-out pairs of answers, 30 videos each. Question: {text(rows[0]['messages'][0])}")
    for row, difference in list(zip(rows, found["out_dpo"]))[:4]:
        chosen, rejected = (text(completion[0]) for completion in row["completions"])
        print(f"  {row['id']:>10}  {chosen!r} over {rejected!r} by {difference:+.2f} nats")
    print(
        f"\nright one likelier before training: {score['model']:.0%}    after: {score['out_dpo']:.0%}    "
        "(guessing: 50 %)\n"
    )


def show_classes(demo: Path):
    """Print the metrics of the last evaluation of train_cls.py and some of its predictions."""
    rows = [json.loads(line) for line in (demo / "out_cls" / "predictions.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (demo / "out_cls" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in metrics if "eval_accuracy" in row][-1]
    print(f"\n{len(rows)} held-out records, 30 videos each. Which colour is the one clip that is not grey?")
    for row in rows[:4]:
        print(f"  {row['id']:>10}  model: {row['prediction']:10} truth: {row['label']}")
    print(
        f"\nright after training: {last['eval_accuracy']:.0%}    macro F1: {last['eval_f1']:.2f}    (guessing: 17 %)\n"
    )
    print(f"  {demo}/out_cls/predictions.jsonl   every held-out record with the probabilities of all classes")


def settings_of(folder: Path):
    """(arguments of a run, folder of its held-out videos)."""
    settings = json.loads((folder / "arguments.json").read_text())
    args = mv.TrainingArguments(**{key: settings[key] for key in vars(mv.TrainingArguments()) if key in settings})
    return args, settings["eval_image_folder"]


# objective → (its folder, a file of its records, what its command has of its own)
OBJECTIVES = {
    "sft": ("out", "sft_train.json", "--learning_rate 1e-4"),
    "dpo": ("out_dpo", "dpo_train.json", "--learning_rate 5e-6"),
    "cls": ("out_cls", "cls_train.json", "--learning_rate 1e-4 --head_lr 1e-3"),
    "grpo": ("out_grpo", "sft_train.json", "--learning_rate 1e-5 --reward_funcs accuracy"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", help="folder that make_demo.py wrote and a trainer trained in")
    parser.add_argument(
        "--objective", default="sft", choices=OBJECTIVES, help="which training is shown (default: sft)"
    )
    options = parser.parse_args()
    demo, objective = Path(options.demo), options.objective
    folder, records, own = OBJECTIVES[objective]
    if objective == "dpo":
        show_pairs(demo)
    elif objective == "cls":
        show_classes(demo)
    else:
        show_answers(demo, "half" if objective == "grpo" else "model", folder)
    print(f"""  {demo}/{folder}   the trained model, and metrics.jsonl with a line per optimizer step

Next, your own data: write records like {demo}/{records} and run
  accelerate launch --config_file accelerate_configs/one_gpu.yaml train_{objective}.py \\
      --model_id Qwen/Qwen2.5-VL-3B-Instruct --data_path data.json --image_folder videos/ --bf16 True \\
      --lora_enable True --freeze_llm True --freeze_vision_tower True --freeze_merger True \\
      --lora_namespan_exclude "['lm_head', 'embed_tokens']" --gradient_checkpointing True \\
      --per_device_train_batch_size 8 {own} \\
      --video_resized_width 64 --video_resized_height 64 --fps 0.25 --output_dir out""")


if __name__ == "__main__":
    main()
