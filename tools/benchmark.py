"""Ours against the usual way on the same samples: seconds per sample for data and for the training step, peak memory.

    python tools/benchmark.py sft

The usual way: qwen_vl_utils + HF processor in a DataLoader; HF forward with `labels=`, attention sdpa, batch 1 and
padded batch 4. Ours: SampleStream; packed rows. Same clips, same grids, same tiny model with Qwen's vocabulary of
151,936. Both run in one process, in turn, so that a slow moment of the machine hits both; the table shows medians
and the ratios' spread. Peak memory is that of a process of its own for each way. Writes the table and a JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch
import transformers
from make_demo import save_tiny_model

import multivideo as mv
import train_sft

QUESTION = "Which of these clips shows the fastest movement, and what are the colours of the others?"
ANSWER = (
    "The eleventh clip moves fastest; the first ten are grey, and the ones after it change from red to blue and back."
)


def make_samples(folder: Path, num_records: int, num_videos: int, pixels: int) -> Path:
    """A model with Qwen's vocabulary, `num_videos` clips of 3 s (pixels × pixels) per record, and their records."""
    import av
    import numpy as np

    save_tiny_model(folder / "model", vocab_size=151936)
    rng = np.random.default_rng(0)
    for i in range(num_videos * min(num_records, 4)):
        coarse = rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)
        picture = coarse.repeat(pixels // 7, 0).repeat(pixels // 7, 1)
        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt = pixels, pixels, "yuv420p"
            for f in range(72):
                frame = np.ascontiguousarray(np.roll(picture, (f, 2 * f), (0, 1)))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    records = []
    for r in range(num_records):
        first = r % 4 * num_videos
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
        records.append({"id": r, "video": [f"{first + i}.mp4" for i in range(num_videos)], "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


class UsualDataset(torch.utils.data.Dataset):
    """qwen_vl_utils + HF processor, one sample at a time, labels on the answer."""

    def __init__(self, folder, records, size):
        self.folder, self.records, self.size = folder, records, size
        self.processor = transformers.AutoProcessor.from_pretrained(folder / "model")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        import qwen_vl_utils

        sizes = {"resized_height": self.size, "resized_width": self.size, "nframes": 4}
        messages = []
        for turn in self.records[i]["messages"]:
            content = [{"type": "text", "text": part["text"]} if part["type"] == "text" else
                       {"type": "video", "video": str(self.folder / part["files"][0]), **sizes}
                       for part in turn["content"]]  # fmt: skip
            messages.append({"role": turn["role"], "content": content})
        text = self.processor.apply_chat_template(messages, tokenize=False)
        _, videos, _ = qwen_vl_utils.process_vision_info(messages, True, return_video_metadata=True)
        inputs = self.processor(
            text=[text], videos=[v for v, _ in videos], video_metadata=[m for _, m in videos],
            do_resize=False, do_sample_frames=False, return_tensors="pt",
        )  # fmt: skip
        answer = self.processor.tokenizer(ANSWER + "<|im_end|>\n", return_tensors="pt")["input_ids"].shape[1]
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :-answer] = -100
        inputs["labels"][:, -1] = -100
        return inputs


def pad(batch):
    """The usual collation: right-padded ids, one list of patches."""
    longest = max(item["input_ids"].shape[1] for item in batch)

    def padded(name, value):
        return torch.cat(
            [torch.nn.functional.pad(b[name], (0, longest - b[name].shape[1]), value=value) for b in batch]
        )

    joined = {name: torch.cat([torch.as_tensor(b[name]) for b in batch])
              for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}  # fmt: skip
    return {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", -100), "mm_token_type_ids": padded("mm_token_type_ids", 0),
            **joined}  # fmt: skip


class Ways:
    """Both ways to take a training step on the first `batch_size` records, ready to be timed."""

    def __init__(self, folder, records, args):
        self.args = args
        self.encoder = mv.Encoder(args.model_id, args)
        self.ours = [self.encoder(records[i], str(folder)) for i in range(4)]
        usual = UsualDataset(folder, records, 56)
        self.usual = [usual[i] for i in range(4)]
        assert all(int(self.ours[i]["num_tokens"]) == self.usual[i]["input_ids"].shape[1] for i in range(4))

    def load(self, way):
        if way == "usual":
            model = transformers.AutoModelForImageTextToText.from_pretrained(self.args.model_id, dtype=torch.float32)
        else:
            model = mv.load_model(self.args, "cpu")
        return model.train(), mv.make_optimizer(model, self.args)

    def step(self, way, model, optimizer, batch_size):
        """One optimizer step; the loss is the mean over supervised tokens in both."""
        if way == "usual":
            model.model.rope_deltas = None
            loss = model(**pad(self.usual[:batch_size]), use_cache=False).loss
        else:
            inputs, targets, _ = mv.pack(self.ours[:batch_size], self.encoder, "cpu")
            loss = train_sft.sft_loss(model(**inputs).logits, targets) / len(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


def time_steps(ways, rounds):
    """{(way, batch): [seconds per sample]}, ways in turn; the first losses of both must agree."""
    models = {way: ways.load(way) for way in ("usual", "ours")}
    losses = {way: ways.step(way, *models[way], 4) for way in models}
    assert abs(losses["usual"] - losses["ours"]) < 1e-4 * losses["usual"], losses
    times = {}
    for _ in range(rounds):
        for batch_size in (1, 4):
            for way in models:
                started = time.perf_counter()
                ways.step(way, *models[way], batch_size)
                times.setdefault((way, batch_size), []).append((time.perf_counter() - started) / batch_size)
    return times


def time_data(folder, records, args, rounds):
    """{way: [seconds per sample]} with two workers each, started before the clock."""
    stream = mv.SampleStream(mv.Encoder(args.model_id, args), args)
    usual = UsualDataset(folder, records, 56)
    loader = torch.utils.data.DataLoader(
        usual, batch_size=1, num_workers=2, collate_fn=lambda batch: batch[0], persistent_workers=True,
        multiprocessing_context="fork",
    )  # fmt: skip
    times = {"usual": [], "ours": []}
    for r in range(rounds + 1):
        for way in times:
            started = time.perf_counter()
            if way == "usual":
                count = sum(1 for _ in loader)
            else:
                count = sum(
                    len(samples)
                    for samples in stream.batches(records, ([i] for i in range(len(records))), str(folder))
                )
            assert count == len(records)
            if r:  # the first round starts the workers
                times[way].append((time.perf_counter() - started) / count)
    stream.close()
    return times


def peak_memory(folder, way, batch_size):
    """(GiB before, GiB added by three steps) of a process of its own."""
    command = [
        sys.executable,
        __file__,
        "sft",
        "--folder",
        str(folder),
        "--memory_of",
        way,
        "--batch_size",
        str(batch_size),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def spread(values):
    return f"{statistics.median(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def ratio(slow, fast):
    """Median and spread of the pairwise ratios."""
    ratios = sorted(a / b for a, b in zip(slow, fast))
    return f"{statistics.median(ratios):.1f}× ({ratios[0]:.1f}–{ratios[-1]:.1f})", statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sft"], help="which trainer's data and step to measure")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; each runs every way once")
    parser.add_argument("--output_dir", default="benchmarks", help="folder for the table and the JSON")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder) if options.folder else make_samples(Path(temporary), 12, 30, 112)
        args = mv.TrainingArguments(
            model_id=str(folder / "model"), nframes=4, video_resized_width=56, video_resized_height=56,
            dataloader_num_workers=2, output_dir=temporary,
        )  # fmt: skip
        records = mv.load_records(str(folder / "data.json"))
        if options.memory_of:
            ways = Ways(folder, records, args)
            model, optimizer = ways.load(options.memory_of)
            ways.step(options.memory_of, model, optimizer, 1)  # Adam's state and workspace of the libraries
            before = float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
            for _ in range(3):
                ways.step(options.memory_of, model, optimizer, options.batch_size)
            print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
            return
        memory = {(way, b): peak_memory(folder, way, b) for b in (1, 4) for way in ("usual", "ours")}
        data = time_data(folder, records, args, options.rounds)
        steps = time_steps(Ways(folder, records, args), options.rounds)

    lines = ["| 30 videos × 4 frames × 56 px | usual way | ours | ratio |", "|---|---|---|---|"]
    figures = {}

    def add(name, usual, ours):
        text, figures[name] = ratio(usual, ours)
        lines.append(f"| {name} | {spread(usual)} | {spread(ours)} | {text} |")

    add("data, s per sample (112-px clips, 2 workers)", data["usual"], data["ours"])
    for b in (1, 4):
        add(f"training step, batch {b}, s per sample", steps["usual", b], steps["ours", b])
    for b in (1, 4):
        (rest_usual, usual), (rest_ours, ours) = memory["usual", b], memory["ours", b]
        figures[f"memory {b}"] = usual / ours
        lines.append(f"| peak memory, batch {b}, GiB | {usual:.2f} | {ours:.2f} | {usual / ours:.1f}× |")
        usual, ours = usual - rest_usual, ours - rest_ours
        lines.append(f"| … beyond libraries, weights and Adam | {usual:.2f} | {ours:.2f} | {usual / ours:.1f}× |")
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {cpu}, {versions}"
    table = "\n".join([*lines, "", f"Medians of {options.rounds} rounds (fastest–slowest), {where}."])
    print(table)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "sft.md").write_text(table + "\n")
    raw = {"where": where, "ratios": figures, "data": data, "steps": {f"{w} {b}": t for (w, b), t in steps.items()},
           "memory_gib": {f"{w} {b}": m for (w, b), m in memory.items()}}  # fmt: skip
    mv.write_json(output / "sft.json", raw)


if __name__ == "__main__":
    main()
