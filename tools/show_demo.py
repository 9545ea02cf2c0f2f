"""Answer the demo's held-out questions before and after training, with nothing but plain transformers.

    python tools/show_demo.py demo
    python tools/show_demo.py demo --before half --after out_grpo
    python tools/show_demo.py demo --pairs

The first loads demo/model and demo/out with `from_pretrained`, answers every record of demo/sft_eval.json greedily,
prints both accuracies and some answers, and draws demo/loss.png from demo/out/metrics.jsonl. The second does the
same with demo/half and demo/out_grpo and draws the reward. The third says how often demo/model and demo/out_dpo find
the right answer of a pair of demo/dpo_eval.json likelier than the wrong one.
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


def load(model_path: str):
    """A saved model and its processor, as anyone would load them."""
    return AutoModelForImageTextToText.from_pretrained(model_path).eval(), AutoProcessor.from_pretrained(model_path)


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
                    clips[path] = mv.load_clip(part, folder, args, 28)[:2]
                frames, fps = clips[path]
                videos.append(frames)
                metadata.append({"fps": fps, "total_num_frames": len(frames), "frames_indices": range(len(frames))})
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
    print(f"""
right one likelier before training: {score["model"]:.0%}    after: {score["out_dpo"]:.0%}    (guessing: 50 %)

  {demo}/out_dpo       the trained model: AutoModelForImageTextToText.from_pretrained("{demo}/out_dpo")
  {demo}/out_dpo/metrics.jsonl   one line per optimizer step, with rewards and log-probabilities""")


def settings_of(folder: Path):
    """(arguments of a run, folder of its held-out videos)."""
    settings = json.loads((folder / "arguments.json").read_text())
    args = mv.TrainingArguments(**{key: settings[key] for key in vars(mv.TrainingArguments()) if key in settings})
    return args, settings["eval_image_folder"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", help="folder that make_demo.py wrote and a trainer trained in (demo/out)")
    parser.add_argument("--pairs", action="store_true", help="show what train_dpo.py did (demo/out_dpo)")
    parser.add_argument("--before", default="model", help="its folder with the untrained model (default: model)")
    parser.add_argument("--after", default="out", help="its folder with the trained one (default: out)")
    options = parser.parse_args()
    demo = Path(options.demo)
    out = demo / options.after
    if options.pairs:
        show_pairs(demo)
        return
    args, folder = settings_of(out)
    rows = list(mv.load_records(str(demo / "sft_eval.json")))
    truth = [text(row["messages"][-1]) for row in rows]
    score = {}
    for name in (options.before, options.after):
        answers = answer(str(demo / name), rows, folder, args)
        score[name] = sum(a == t for a, t in zip(answers, truth)) / len(rows)
    print(f"\n{len(rows)} held-out records, 30 videos each. Question: {text(rows[0]['messages'][0])}")
    for row, said, right in list(zip(rows, answers, truth))[:4]:
        print(f"  {row['id']:>10}  model: {said!r:40} truth: {right!r}")
    before, after, picture = score[options.before], score[options.after], draw_curve(out / "metrics.jsonl", demo)
    print(f"""
right before training: {before:.0%}    right after training: {after:.0%}    (guessing: 17 %)

  {out}           the trained model: AutoModelForImageTextToText.from_pretrained("{out}")
  {out}/metrics.jsonl   one line per optimizer step
  {picture}      its curve

Next, your own data: write records like {demo}/sft_train.json and run
  accelerate launch --config_file accelerate_configs/one_gpu.yaml train_sft.py \\
      --model_id Qwen/Qwen2.5-VL-3B-Instruct --data_path data.json --image_folder videos/ \\
      --video_resized_width 64 --video_resized_height 64 --fps 0.25 --bf16 True --output_dir out""")


if __name__ == "__main__":
    main()
