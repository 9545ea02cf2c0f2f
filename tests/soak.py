"""Kills trainers at many moments and compares what they end with; feeds damaged clips to the decoder, opens good ones.

    make soak                                   # all of it, under an hour on two quiet cores
    python tests/soak.py --rounds 2 --clips 20  # a taste

Each round is one run: one to three SIGKILLs at seeded moments of seeded phases, resumed after each, then compared bit
for bit with a run that nothing happened to. The table goes to the screen and to benchmarks/soak.md.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools", ROOT / "tests"):
    sys.path.insert(0, str(folder))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from survival import ZERO3, Runner, at, differences  # before torch: it only starts processes

WAYS = {  # name → processes, environment, rows per step and process
    "1 process": (1, {}, 2),
    "2 processes, DDP": (2, {}, 1),
    "2 processes, ZeRO-3": (2, ZERO3, 1),
}
PHASES = {  # what the name of a point is in it
    "training": r"^(exchange|pack)$|^open OUT/metrics",
    "mid-accumulation": r"^backward$",
    "rollout": r"^sample$",
    "save: writing": r"^(open|mkdir|rename|serialize|serialize-end|shard|shard-end) OUT/\.checkpoint-\d+\.aside",
    "save: fsync": r"^fsync OUT/\.checkpoint",
    "save: renames": r"^rename OUT/\.?checkpoint-\d+(\.replaced)?$|^fsync OUT$",
    "save: pruning": r"OUT/\.checkpoint-\d+\.removed",
    "evaluation": r"^stop_asked$",
    "final model": r"OUT/\.model\.aside|^rename OUT/[a-z_]+\.\w+$",
    "epoch end": None,  # the last step of an epoch, up to the next
    "by the clock": None,  # any moment, in C code too
}


def candidates(points, phase, start):
    """Numbers of the points of a phase among those after number `start`."""
    numbers = range(start, len(points))
    if phase == "epoch end":
        steps = [i for i, point in enumerate(points) if point == "exchange"]
        return [i for i in numbers if any(steps[k] <= i < steps[k + 1] for k in (4, 9) if k + 1 < len(steps))]
    if phase == "mid-accumulation":  # not the first row of a step
        behind = {i: points[max(k for k in range(i) if points[k] == "exchange") : i]
                  for i in numbers if points[i] == "backward"}  # fmt: skip
        return [i for i, row in behind.items() if "backward" in row]
    return [i for i in numbers if PHASES[phase] and re.search(PHASES[phase], points[i])]


def kill_and_compare(runner, script, flags, way, rounds, rng, folder):
    """`rounds` runs of a trainer in one way: counts of kills, resumes, differences and hangs, and kills per phase."""
    world, env, _ = WAYS[way]
    straight, counts, phases = folder / "straight", collections.Counter(), collections.Counter()
    first = runner.run(script, flags, straight, world=world, env=env, trace=folder / "points")
    assert first.codes == [0] * world, "\n".join(first.said)[-3000:]
    points = [[line.replace("straight", "OUT", 1) if " " in line else line
               for line in (folder / f"points.{rank}").read_text().splitlines()] for rank in range(world)]  # fmt: skip
    seconds = time.monotonic()
    for number in range(rounds):
        out, resume, kills, told = folder / f"round-{number}", [], rng.randint(1, 3), []
        counts["runs"] += 1
        while True:
            fault, rank, after, phase = None, rng.randrange(world), None, None
            if kills > 0:
                saved = max([int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")], default=0)
                begins = [i for i, point in enumerate(points[rank]) if point == "exchange"]
                start = begins[saved] if saved < len(begins) else len(points[rank])
                for phase in sorted(PHASES, key=lambda name: (phases[name], rng.random())):  # the rarest so far
                    numbers = candidates(points[rank], phase, start)
                    if numbers or phase == "by the clock":
                        break
                if phase == "by the clock":
                    after = rng.uniform(0.05, 1.0)
                else:
                    i = rng.choice(numbers)
                    do = "torn" if re.match("(serialize|shard)-end", points[rank][i]) else "SIGKILL"
                    fault = at(points[rank][start:], i - start, do)
            run = runner.start(script, [*flags, *resume], out, world=world, env=env,
                               faults={rank: [fault]} if fault else {})  # fmt: skip
            try:
                if after is not None:
                    run.until_running()
                    time.sleep(after)
                    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                        run.signal(signal.SIGKILL, rank=rank)
                run.wait(kill_others=30)
            except TimeoutError as error:
                counts["hangs"] += 1
                print(f"{way}, round {number}: HANG {error}"[:3000], flush=True)
                break
            if -signal.SIGKILL in run.codes and (fault or after is not None):
                counts["kills"] += 1
                phases[phase] += 1
                kills -= 1
                told.append(phase)
            elif run.codes != [0] * world:
                counts["differences"] += 1
                print(f"{way}, round {number}: ended with {run.codes}\n" + "\n".join(run.said)[-3000:], flush=True)
                break
            else:  # finished, perhaps before its kill came
                wrong = differences(out, straight)
                rest = [path.name for path in out.glob(".*")]
                counts["differences"] += bool(wrong or rest)
                print(f"{script}, {way}, round {number}: killed in {', '.join(told) or 'nothing'}: "
                      + ("; ".join(wrong + rest) or "equal"), flush=True)  # fmt: skip
                break
            if resume:
                counts["resumes"] += 1
            resume = ["--resume_from_checkpoint", "auto"]
        counts["resumes"] += bool(resume)
        shutil.rmtree(out, ignore_errors=True)
    return counts, phases, time.monotonic() - seconds


def mutate(rng, clip: bytes) -> bytes:
    """A clip with flipped bytes, a cut end, a hole, a doubled piece or zeros: at any place, the index too."""
    data, kind = bytearray(clip), rng.randrange(5)
    a, size = rng.randrange(len(data)), rng.choice([1, 8, 100, 2000])
    if kind == 0:
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        del data[a : a + size]
    elif kind == 3:
        data[a:a] = data[a : a + size]
    else:
        data[a : a + size] = bytes(len(data[a : a + size]))
    return bytes(data)


def decode(mv, model, clips, folder, rng, count):
    """`count` damaged clips, each in a record with a good one, through the decoding processes.

    Returns how many were read, reported as bad, and how often the good one beside them came out otherwise than alone.
    """
    import numpy as np

    good = Path(clips[0]).name
    for i in range(count):
        (folder / f"damaged-{i}.mp4").write_bytes(mutate(rng, Path(rng.choice(clips)).read_bytes()))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    records = [{"id": "good", "video": [good], "conversations": turns}]
    records += [{"id": i, "video": [good, f"damaged-{i}.mp4"], "conversations": turns} for i in range(count)]
    (folder / "damaged.json").write_text(json.dumps(records))
    args = mv.parse_arguments(mv.TrainingArguments, [
        "--model_id", model, "--data_path", str(folder / "damaged.json"), "--on_bad_video", "drop_video", "--nframes",
        "4", "--video_resized_width", "56", "--video_resized_height", "56", "--decode_timeout", "30",
        "--dataloader_num_workers", "2", "--video_cache", "none", "--output_dir", str(folder / "damaged"),
    ])  # fmt: skip
    (folder / "damaged").mkdir()
    stream = mv.SampleStream(mv.Encoder(model, args), args)
    table = mv.load_records(args.data_path)
    read = bad = wrong = 0
    for i, (sample,) in enumerate(stream.batches(table, [[i] for i in range(len(table))], str(folder))):
        if i == 0:
            alone = sample["patches"]
        else:
            bad, read = bad + len(sample["bad"]), read + (not sample["bad"])
            wrong += not np.array_equal(sample["patches"][: len(alone)], alone)
    stream.close()
    return read, bad, wrong


def opens(mv, clips, count):
    """Open and decode good clips `count` times: open files and MB of memory that came on top after a tenth of it."""
    args = mv.TrainingArguments(nframes=4, video_resized_width=56, video_resized_height=56, video_cache=None)
    part = {**dict.fromkeys(mv.PART), "type": "video"}
    for i in range(count):
        mv.load_clip({**part, "files": [clips[i % len(clips)]]}, "", args, 28)
        if i == count // 10:
            files, memory = len(os.listdir("/proc/self/fd")), resident()
    return len(os.listdir("/proc/self/fd")) - files, resident() - memory


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="runs per trainer and way, of one to three kills each")
    parser.add_argument("--trainers", nargs="*", help="default: all that tests/test_survival.py knows")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--clips", type=int, default=200, help="damaged clips")
    parser.add_argument("--opens", type=int, default=5000, help="times that a good clip is opened and decoded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run counts as hung")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "soak.md")
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="multivideo-soak-"))
    os.environ |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "MULTIVIDEO_CACHE": str(folder / "cache")}
    import multivideo as mv

    from make_demo import save_tiny_model
    from test_survival import TRAINERS, write_data

    save_tiny_model(folder / "model")
    flags = write_data(folder, folder / "model")
    clips = sorted(map(str, folder.glob("*.mp4")))
    runner = Runner({}, limit=options.limit, preload=("peft", "sklearn.metrics", "deepspeed"))
    lines, all_phases, total = [], collections.Counter(), collections.Counter()
    for script in options.trainers or TRAINERS:
        for way in options.ways:
            here = folder / f"{script}-{way}".replace(" ", "-").replace(",", "")
            here.mkdir()
            rows = ["--gradient_accumulation_steps", WAYS[way][2], "--save_total_limit", 2]
            counts, phases, seconds = kill_and_compare(
                runner, script, [*flags[script], *rows], way, options.rounds, rng, here
            )
            total += counts
            all_phases += phases
            lines.append(f"| `{script}`, {way} | {counts['runs']} | {counts['kills']} | {counts['resumes']} | "
                         f"{counts['differences']} | {counts['hangs']} | {seconds / 60:.0f} min |")  # fmt: skip
    runner.close()
    lines.append(f"| all | {total['runs']} | {total['kills']} | {total['resumes']} | {total['differences']} | "
                 f"{total['hangs']} | {(time.monotonic() - began) / 60:.0f} min |")  # fmt: skip
    read, bad, wrong = decode(mv, str(folder / "model"), clips, folder, rng, options.clips)
    files, memory = opens(mv, clips, options.opens)
    table = "\n".join([
        "| killed with SIGKILL and resumed | runs | kills | resumes | differences | hangs | time |",
        "|---|---|---|---|---|---|---|", *lines, "",
        "Kills by phase: " + ", ".join(f"{phase} {all_phases[phase]}" for phase in PHASES) + ".", "",
        f"{options.clips} damaged clips, each beside a good one: {read} read, {bad} named as bad, none hung or ended "
        f"the run; the good one came out otherwise {wrong} times. {options.opens:,} opens of good clips in one "
        f"process: {files:+d} open files, {memory:+.0f} MB.",
    ])  # fmt: skip
    import torch
    import transformers

    head = (f"Seed {options.seed}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"transformers {transformers.__version__}; every final weight and every line of metrics.jsonl but for "
            "times and memory is compared bit for bit with a run that was not killed.")  # fmt: skip
    print(f"\n{table}")
    options.output.write_text(f"# Soak\n\n`make soak`. {head}\n\n{table}\n")
    shutil.rmtree(folder)
    raise SystemExit(bool(total["differences"] or total["hangs"] or wrong))


if __name__ == "__main__":
    main()
