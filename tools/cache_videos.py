"""Fill the video cache before training, where no GPU is paid for: every clip is decoded once, as training will ask.

    python tools/cache_videos.py --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --video_cache /shared/cache --output_dir out

takes the flags of a training command (those that do not concern data are read and ignored) and goes through
--data_path and --eval_path. Stopped and started again it goes on: what is kept, and undamaged, is not decoded again.
Several machines may fill one folder; with --shard 1/4 to 4/4 each has records of its own. Files that cannot be read,
hang or crash are listed in bad_videos.jsonl of --output_dir, where training finds them. Exit code 0: every clip is in
the cache; 1: some are not, and it says why; 2: wrong flags.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import multivideo as mv

from check_data import normalizer
from tqdm import tqdm

# Flags that may have any value here: they concern the machine and the folder of the run itself.
UNCHECKED = ("output_dir", "resume_from_checkpoint", "resume_force", "attn_implementation", "optim", "report_to")
# Flags of training that the cache goes by.
USED = mv.SAMPLE_FLAGS - {"max_seq_length"} | {"eval_path", "eval_image_folder", "video_cache_limit_gb", "output_dir"}


@dataclass
class CacheFlags:
    """Flags of this tool; the trainer's come beside them."""

    objective: str = mv.arg("sft", "Whose records these are: train_OBJECTIVE.py reads them.")
    num_workers: int | None = mv.arg(None, "Decoding processes (default: one per core).")
    shard: str = mv.arg("1/1", "Do one part of the records only: 2/4 is the second of four.")


def read_flags(argv: list[str]):
    """The arguments of the trainer that --objective names, this tool's own, and the shard.

    Raises:
        SystemExit: as mv.parse_arguments.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", default="sft")
    objective = first.parse_known_args(argv)[0].objective
    known = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
    if objective not in known:
        mv.say(f"cache_videos.py: --objective {objective}: known are {', '.join(known)}")
        raise SystemExit(2)
    trainer = importlib.import_module(f"train_{objective}")
    base = next(value for value in vars(trainer).values() if isinstance(value, type)
                and issubclass(value, mv.TrainingArguments) and value is not mv.TrainingArguments)  # fmt: skip
    asked = inspect.signature(trainer.normalize_record).parameters
    used = {*USED, *asked, *(flag.name for flag in dataclasses.fields(CacheFlags))}
    both = mv.parse_arguments(dataclasses.make_dataclass("Flags", [], bases=(base, CacheFlags)), argv, UNCHECKED, used)
    args, own = (kind(**{option.name: getattr(both, option.name) for option in dataclasses.fields(kind)})
                 for kind in (base, CacheFlags))  # fmt: skip
    shard = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", own.shard)
    if not shard or int(shard[1]) > int(shard[2]):
        mv.say(f"cache_videos.py: --shard {own.shard}: expected a part and the number of parts, such as 2/4")
        raise SystemExit(2)
    if args.video_cache is None:
        mv.say("cache_videos.py: --video_cache none: name the folder to fill")
        raise SystemExit(2)
    return args, own, (int(shard[1]), int(shard[2]))


class AsTheyCome:
    """Stands for a dataset whose record number i is asked for: here the numbers are the records themselves."""

    def __getitem__(self, record):
        return record


def media_only(source: str, normalize, shard: tuple[int, int], complaints: list[str]):
    """Yield this shard's records with nothing but their videos and images; count bad records as `complaints`."""
    part, parts = shard
    for i, (where, record) in enumerate(mv.read_records(source)):
        if i % parts != part - 1:
            continue
        try:
            if isinstance(record, ValueError):
                raise ValueError(f"{where}: {record}")
            row = normalize(record, where)
        except ValueError as error:
            complaints.append(str(error))
            continue
        clips = [part for message in row["messages"] for part in message["content"] if part["type"] != "text"]
        if clips:
            yield {"id": row["id"], "messages": [{"role": "user", "content": clips}]}


def main():
    args, own, shard = read_flags(sys.argv[1:])
    normalize = normalizer(own.objective, args)
    # Samples are not wanted back: the encoder leaves out one that is too long, but only after it has its clips.
    args = dataclasses.replace(
        args, on_bad_video="drop_video", on_long_sample="skip", max_seq_length=0,
        dataloader_num_workers=own.num_workers or len(os.sched_getaffinity(0)),
    )  # fmt: skip
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    folder = args.image_folder or mv.data_folder(args.data_path)
    stream = mv.SampleStream(mv.Encoder(args.model_id, args), args)
    complaints, bad, clips, room = [], set(), 0, stream.room.value
    try:
        for source, media_folder in ((args.data_path, folder), (args.eval_path, args.eval_image_folder or folder)):
            if source:
                rows = media_only(source, normalize, shard, complaints)
                bar = tqdm(
                    stream.batches(AsTheyCome(), ([row] for row in rows), media_folder), desc=source, unit=" rec"
                )
                for (sample,) in bar:
                    clips += sample["num_videos"] + sample["num_images"]
                    bad |= {file for file, _ in sample["bad"]}
                    bar.set_postfix_str(
                        f"{clips} clips, {(room - stream.room.value) / 1e9:.2f} GB added, {len(bad)} bad"
                    )
    finally:
        stream.close()
    problems = [f"{len(complaints)} bad records, first: {complaints[0]}"] if complaints else []
    if bad:
        problems.append(f"{len(bad)} files that cannot be read: see {Path(args.output_dir) / 'bad_videos.jsonl'}")
    if stream.room.value <= 0:
        problems.append(f"the cache is full: raise --video_cache_limit_gb {args.video_cache_limit_gb:g} (at most a "
                        "fifth of the disk is taken), or name a larger disk")  # fmt: skip
    print(f"{args.video_cache}: {clips} clips of part {shard[0]} of {shard[1]} done, "
          f"{max(room - stream.room.value, 0) / 1e9:.2f} GB added")  # fmt: skip
    if others := mv.VideoCache.describe_other_versions(args.video_cache):
        print(f"  {others}")
    for problem in problems:
        print(f"  • {problem}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    mv.run(main)
