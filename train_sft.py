"""Supervised fine-tuning of Qwen-VL on conversations with many videos.

    loss = − Σ log p(token | everything before it in its own sample) / number of supervised tokens

summed over the assistant turns of the whole accumulation window on all processes. Left out on purpose: padding
(samples are packed into one row and cannot see each other), a Trainer class, logits of tokens without a label.

One record (JSON or JSONL; README.md has the other formats):
    {"id": "1", "video": ["a.mp4", "b.mp4"], "conversations": [
        {"from": "human", "value": "<video>\\n<video>\\nWhat changed?"}, {"from": "gpt", "value": "The colour."}]}

Launch, on a CPU or one GPU:
    accelerate launch --config_file accelerate_configs/cpu.yaml train_sft.py \\
        --model_id demo/model --data_path demo/sft_train.json --output_dir out
    accelerate launch --config_file accelerate_configs/one_gpu.yaml train_sft.py \\
        --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ --bf16 True \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --output_dir out
"""

import itertools
import json
import math
import time
import zlib
from dataclasses import asdict, dataclass
from functools import partial

import multivideo as mv

import torch
from accelerate.utils import set_seed
from tqdm import tqdm


@dataclass
class SFTArguments(mv.TrainingArguments):
    """The shared flags, and which answers are learned."""

    train_on: str = mv.arg(
        "all", "Answers of a conversation that are learned: all, or the last one.", choices=["all", "last"]
    )

    def objective(self) -> str:
        """For the model card."""
        return "supervised fine-tuning, cross-entropy of the assistant turns"


def sft_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood in nats: logits [1, S, V] at the supervised positions, targets [S] → scalar."""
    return -mv.token_logps(logits, targets).sum() if len(targets) else logits.sum() * 0.0


def normalize_record(record: dict, where: str, train_on: str = "all") -> dict:
    """A record with something to learn from: every assistant turn has text, and at least one is learned.

    Beside conversations: `prompt` with `completion` (as in TRL, nothing in the prompt is learned), and the forms of
    mv.rename_fields. With `train_on` "last" only the last answer is learned.

    Raises:
        ValueError: names the record, the field, what was found, what was expected and how to fix it.
    """
    row = mv.normalize_conversation(as_conversation(mv.rename_fields(record, where), where), where)
    learned = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not learned:
        raise ValueError(f"{where}: no assistant ('gpt') turn, so there is nothing to learn; add the answer")
    if not all(mv.says_something(turn) for turn in learned):
        raise ValueError(f"{where}: an assistant ('gpt') turn without text; write the answer or drop the record")
    for turn in learned[:-1] if train_on == "last" else []:
        turn["train"] = False
    if all(turn.get("train") is False for turn in learned):
        raise ValueError(f"{where}: no answer is learned: {'the last one has' if train_on == 'last' else 'all have'} "
                         "'loss': false: drop the record, or let one be learned")  # fmt: skip
    return row


def as_conversation(record, where: str):
    """`prompt` and `completion` as `messages`, of which the completion is learned; other records as they are."""
    if not isinstance(record, dict) or mv.absent(record.get("completion")):
        return record
    if both := [key for key in ("conversations", "messages") if not mv.absent(record.get(key))]:
        raise ValueError(f"{where}: fields 'completion' and {both[0]!r} are both there: keep one of them")
    if mv.absent(record.get("prompt")):
        raise ValueError(
            f"{where}: field 'completion' without 'prompt': give the question, or write both as 'messages'"
        )
    turns = mv.prompt_turns(record["prompt"])
    prompt = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in turns]
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return {**rest, "messages": prompt + mv.completion_turns(record["completion"])}


@torch.no_grad()
def evaluate(engine, stream, records, encoder, args, caught) -> dict | None:
    """Loss per supervised token over all of `records`: `{"eval_loss", "eval_samples", "eval_tokens"}`.

    None if a process was asked to stop meanwhile.
    """
    model, accelerator = engine.model, engine.accelerator
    model.eval()
    rows = mv.micro_batches(list(range(len(records))), args.per_device_eval_batch_size,
                            accelerator.process_index, accelerator.num_processes)  # fmt: skip
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # loss, tokens, samples
    bar = tqdm(total=len(rows), desc="eval", leave=False, disable=not accelerator.is_main_process)
    for samples in stream.batches(records, rows, args.eval_image_folder):
        if mv.stop_asked(accelerator, caught):
            return None
        inputs, targets, _ = mv.pack(samples, encoder, accelerator.device)
        with engine.autocast():
            loss = sft_loss(model(**inputs).logits, targets)
        kept = sum("input_ids" in sample for sample in samples)
        sums += torch.tensor([loss.item(), len(targets), kept], dtype=torch.float64, device=sums.device)
        bar.update()
    bar.close()
    model.train()
    loss, tokens, samples = accelerator.reduce(sums).tolist()
    if not samples:
        return {"eval_samples": 0}
    return {"eval_loss": loss / tokens, "eval_samples": int(samples), "eval_tokens": int(tokens)}


def main():
    args = mv.parse_arguments(SFTArguments)
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = mv.make_accelerator(args)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    output_dir, is_main = mv.make_output_dir(accelerator, args), accelerator.is_main_process
    metrics_path = output_dir / "metrics.jsonl"

    # ---- data: everything that can be wrong with it is said before any weight is loaded
    args.image_folder = args.image_folder or mv.data_folder(args.data_path)
    args.eval_image_folder = args.eval_image_folder or args.image_folder
    encoder = mv.Encoder(args.model_id, args)
    with accelerator.main_process_first():
        normalize = partial(normalize_record, train_on=args.train_on)
        records = mv.load_records(args.data_path, normalize, encoder=encoder)
        eval_records = None
        if args.eval_path:
            eval_records = mv.load_records(args.eval_path, normalize, encoder=encoder)
    mv.check_files(accelerator, "data_path", records, args.image_folder, encoder)
    mv.check_files(accelerator, "eval_path", eval_records, args.eval_image_folder, encoder)
    stream = mv.SampleStream(encoder, args)
    batch_size, world_size = args.per_device_train_batch_size, accelerator.num_processes
    samples_per_step = batch_size * args.gradient_accumulation_steps * world_size
    total_steps = mv.count_steps(len(records), samples_per_step, args)

    # ---- model and optimizer
    resumed = mv.find_checkpoint(args)
    engine = mv.Engine(accelerator, mv.load_model(args, accelerator.device, resumed), args)
    model, raw_model = engine.model, engine.raw_model

    # ---- resume: `state` is everything that is not a tensor
    state = {
        "step": 0, "samples_seen": 0, "bad_steps": 0, "bad_videos": 0, "all_videos": 0, "eval_due": False,
        "save_due": False, "best": None, "best_checkpoint": None, "evals_without_gain": 0,
        "run": mv.run_identity(args, encoder, records, samples_per_step),
    }  # fmt: skip
    if resumed:
        state = mv.restore_checkpoint(resumed, engine, state)
    if is_main:
        for name in ("metrics.jsonl", "bad_steps.jsonl"):
            mv.cut_jsonl(output_dir / name, state)
        mv.write_json(output_dir / "arguments.json", {**asdict(args), **mv.conventions(encoder)})
    if trackers:
        config = {key: value for key, value in asdict(args).items() if isinstance(value, (int, float, str))}
        names = {"wandb": {"name": args.run_name}} if args.run_name else {}
        accelerator.init_trackers(output_dir.name, config, names)
    if is_main:
        mv.describe_run(args, raw_model, stream, records, total_steps, world_size)

    # ---- the loop: evaluation and saving come first, so that a run stopped in one begins with it again
    windows = mv.step_windows(len(records), samples_per_step, args.seed, state["samples_seen"])
    windows = itertools.islice(windows, max(0, total_steps - state["step"]))
    rank = accelerator.process_index
    steps = stream.steps(records, windows, batch_size, rank, world_size, args.image_folder)
    bar = tqdm(total=total_steps, initial=state["step"], desc="train", disable=not is_main)
    model.train()
    caught, saved_step, stop = mv.catch_signals(), None, False
    while True:
        epoch = state["samples_seen"] / len(records)
        if state["eval_due"]:
            result = evaluate(engine, stream, eval_records, encoder, args, caught)
            if stop := result is None:
                break
            if not result["eval_samples"]:
                mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
                mv.stop_unevaluated(accelerator, args, eval_records)
            result = mv.finite_result(result)
            improved = mv.judge(state, result, args)
            state["eval_due"] = False
            state["save_due"] = state["save_due"] or (improved and args.load_best_model_at_end)
            if improved and state["save_due"]:
                state["best_checkpoint"] = f"checkpoint-{state['step']}"
            if is_main:
                mv.append_jsonl(metrics_path, {"step": state["step"], "epoch": round(epoch, 6), **result})
                bar.write(f"step {state['step']}: {mv.result_text(result)}")
            if trackers:
                accelerator.log(mv.numbers(result), state["step"])
        if state["save_due"]:
            state["save_due"], saved_step = False, state["step"]
            mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
        early = 0 < args.early_stopping_patience <= state["evals_without_gain"]
        if early or state["step"] >= total_steps:
            break

        # ---- data, and the exchange that keeps the processes together
        started = time.perf_counter()
        window, samples_seen, rows = next(steps)
        data_wait = time.perf_counter() - started
        encoded = [sample for samples in rows for sample in samples]
        kept = [sample for sample in encoded if "input_ids" in sample]
        counts = {
            "samples": len(kept),
            "skipped_samples": len(encoded) - len(kept),
            "shrunk_samples": sum(sample["shrunk"] for sample in kept),
            "videos": sum(sample["num_videos"] for sample in kept),
            "images": sum(sample["num_images"] for sample in kept),
            "bad_videos": sum(len(sample["bad"]) for sample in encoded),
            "tokens": sum(sample["num_tokens"] for sample in kept),
            "supervised_tokens": sum(int((sample["labels"] != -100).sum()) for sample in kept),
        }
        counts, stop = mv.exchange(accelerator, state, window, counts, caught)
        if stop:
            break
        mv.check_bad_ratio(accelerator, args, state, counts)
        window_tokens = counts["supervised_tokens"]

        # ---- forward, backward, step
        factor = mv.lr_factor(state["step"], total_steps, args)
        engine.set_learning_rate(factor)
        learning = counts["supervised_tokens"] > 0  # if not, no process computes or updates anything
        step_loss = torch.full((), 0.0 if learning else math.nan, device=accelerator.device)
        for k, samples in enumerate(rows if learning else []):
            last = k == len(rows) - 1
            inputs, targets, _ = mv.pack(samples, encoder, accelerator.device)
            with engine.row(last):
                with engine.autocast():
                    # Gradients are averaged over processes: times world_size makes it the sum over the window.
                    loss = sft_loss(model(**inputs).logits, targets) * world_size / window_tokens
                step_loss += loss.detach() / world_size
                if last:
                    step_loss = accelerator.reduce(step_loss)
                    loss_finite = bool(torch.isfinite(step_loss))
                    loss = loss if loss_finite else loss * math.nan  # then no process updates anything
                engine.backward(loss)
        grad_norm, overflow = engine.step() if learning else (math.nan, False)
        bad = learning and (not loss_finite or not (math.isfinite(grad_norm) or overflow))
        state["step"], state["samples_seen"] = state["step"] + 1, samples_seen
        if learning:
            state["bad_steps"] = state["bad_steps"] + 1 if bad else 0

        # ---- log
        seconds = time.perf_counter() - started
        row = {
            "step": state["step"],
            "epoch": round(samples_seen / len(records), 6),
            "loss": float(step_loss),
            "learning_rate": args.learning_rate * factor,
            "grad_norm": grad_norm,
            **counts,
            "records_crc32": zlib.crc32(json.dumps(window).encode()),
            "step_seconds": round(seconds, 4),
            "data_wait_seconds": round(data_wait, 4),
            **mv.peak_memory(),
        }
        if bad or overflow:
            row["not_finite"] = "loss" if not loss_finite else "gradient"
        row = mv.finite_values(row)
        if is_main:
            mv.append_jsonl(metrics_path, row)
            if bad:
                mv.append_jsonl(output_dir / "bad_steps.jsonl", mv.bad_step(row, [records[i] for i in window]))
        if trackers and state["step"] % args.logging_steps == 0:
            accelerator.log(mv.numbers(row), state["step"])
        progress = f"loss {float(step_loss):.4f}" if learning else "nothing to learn"
        bar.set_postfix_str(
            f"{progress}, {counts['samples'] / seconds:.1f} samples/s, "
            f"{counts['videos'] / seconds:.0f} videos/s, data wait {data_wait / seconds:.0%}"
        )
        bar.update()
        if state["bad_steps"] >= args.max_bad_steps:
            mv.stop_all(accelerator, f"{args.max_bad_steps} steps in a row had a loss or gradient that is not finite; "
                        f"the newest checkpoint has the last good weights. Their records and files are in "
                        f"{output_dir / 'bad_steps.jsonl'}")  # fmt: skip

        # ---- what is due now
        ends_epoch, ends = samples_seen % len(records) == 0, state["step"] >= total_steps
        due = {"no": False, "steps": state["step"] % (args.eval_steps or args.logging_steps) == 0, "epoch": ends_epoch}
        state["eval_due"] = args.eval_strategy != "no" and (due[args.eval_strategy] or ends)
        due = {"no": False, "steps": state["step"] % args.save_steps == 0, "epoch": ends_epoch}
        state["save_due"] = due[args.save_strategy]

    # ---- the end: asked to stop, or done
    bar.close()
    steps.close()
    stream.close()
    if stop:
        if state["step"] != saved_step:
            mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
        mv.say(f"stopped by a signal after step {state['step']}: go on with --resume_from_checkpoint auto")
        accelerator.end_training()
        raise SystemExit(143)
    if early:
        mv.say(f"stopped early: {state['evals_without_gain']} evaluations without improvement")
    best = state["best_checkpoint"] if args.load_best_model_at_end else None
    mv.publish_model(args.output_dir, engine, encoder.processor, best)
    mv.say(f"saved {best or 'the last step'} to {output_dir}; every step is in {metrics_path}")
    accelerator.end_training()


if __name__ == "__main__":
    mv.run(main)
