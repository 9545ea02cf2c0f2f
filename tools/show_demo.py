"""Answer the demo's held-out questions before and after training, with nothing but plain transformers.

    python tools/show_demo.py demo

loads demo/model and demo/out with `from_pretrained`, answers every record of demo/sft_eval.json greedily, prints both
accuracies and some answers, and draws demo/loss.png from demo/out/metrics.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import multivideo as mv

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@torch.no_grad()
def answer(model_path: str, rows: list[dict], folder: str, args, batch_size: int = 10) -> list[str]:
    """Greedy answers of a saved model to the first user turn of each normal record, one string per record."""
    model = AutoModelForImageTextToText.from_pretrained(model_path).eval()
    processor = AutoProcessor.from_pretrained(model_path)
    factor = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    clips, answers = {}, []  # a clip stands in many records and is decoded once
    for start in tqdm(range(0, len(rows), batch_size), desc=f"answers of {model_path}", leave=False):
        texts, videos, metadata = [], [], []
        for row in rows[start : start + batch_size]:
            content = []
            for part in row["messages"][0]["content"]:
                content.append({"type": part["type"], "text": part["text"]})
                if part["type"] == "video":
                    path = part["files"][0]
                    if path not in clips:
                        clips[path] = mv.load_clip(part, folder, args, factor)[:2]
                    frames, fps = clips[path]
                    videos.append(frames)
                    metadata.append(
                        {"fps": fps, "total_num_frames": len(frames), "frames_indices": range(len(frames))}
                    )
            chat = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        inputs = processor(
            text=texts, videos=videos, video_metadata=metadata, do_resize=False, do_sample_frames=False,
            padding=True, padding_side="left", return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def draw_loss(metrics_path: Path, picture: Path):
    """Training and evaluation loss over the optimizer steps, from metrics.jsonl to a PNG."""
    rows = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train), linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out), "o-", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", help="folder that make_demo.py wrote and train_sft.py trained in (demo/out)")
    demo = Path(parser.parse_args().demo)
    settings = json.loads((demo / "out" / "arguments.json").read_text())
    args = mv.TrainingArguments(**{key: settings[key] for key in vars(mv.TrainingArguments()) if key in settings})
    rows = list(mv.load_records(str(demo / "sft_eval.json")))
    truth = ["".join(part["text"] or "" for part in row["messages"][-1]["content"]) for row in rows]
    score = {}
    for name in ("model", "out"):
        answers = answer(str(demo / name), rows, settings["eval_image_folder"], args)
        score[name] = sum(a == t for a, t in zip(answers, truth)) / len(rows)
    question = "".join(part["text"] or "" for part in rows[0]["messages"][0]["content"])
    print(f"\n{len(rows)} held-out records, 30 videos each. Question: {question}")
    for row, said, right in list(zip(rows, answers, truth))[:4]:
        print(f"  {row['id']:>10}  model: {said!r:40} truth: {right!r}")
    draw_loss(demo / "out" / "metrics.jsonl", demo / "loss.png")
    print(f"""
right before training: {score["model"]:.0%}    right after training: {score["out"]:.0%}    (guessing: 17 %)

  {demo}/out           the trained model: AutoModelForImageTextToText.from_pretrained("{demo}/out")
  {demo}/out/metrics.jsonl   one line per optimizer step
  {demo}/loss.png      its curve

Next, your own data: write records like {demo}/sft_train.json and run
  accelerate launch --config_file accelerate_configs/one_gpu.yaml train_sft.py \\
      --model_id Qwen/Qwen2.5-VL-3B-Instruct --data_path data.json --image_folder videos/ \\
      --video_resized_width 64 --video_resized_height 64 --fps 0.25 --bf16 True --output_dir out""")


if __name__ == "__main__":
    main()
