"""tools/predict.py against plain HF generate, one record at a time, and against hand-computed values."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import multivideo as mv

import numpy as np
import predict
import pytest
import qwen_vl_utils
import torch
from make_demo import save_tiny_model
from merge_lora import merge
from PIL import Image
from reference import qwen_messages, write_clip
from test_train import ROOT, reset_accelerate
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_grpo

SIZES = ["--video_min_pixels", "784", "--image_min_pixels", "784"]
KINDS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """54 records: thirty videos, one, two images, image and video, text only, several turns with videos in each."""
    folder = tmp_path_factory.mktemp("predict")
    for i in range(30):
        write_clip(folder / f"{i}.mp4", 28 + 28 * (i % 2), 56, 6 + 5 * (i % 3), rate=[8, 25, 30][i % 3], seed=i)
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (56 + 28 * i, 84, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    records = []
    for i in range(54):
        human, media, before = [
            ("What do these show?", {"video": [f"{(i + k) % 30}.mp4" for k in range(30)]}, []),
            ("Describe <video> now.", {"video": f"{i % 30}.mp4"}, []),
            ("<image>\nand\n<image>\ndiffer?", {"image": ["0.png", "1.png"]}, []),
            ("<image>\nwith\n<video>\nwhat?", {"image": "0.png", "video": f"{i % 30}.mp4"}, []),
            ("No pictures at all. Who are you?", {}, []),
            (
                "then <video>\n<video>\n",
                {"video": [f"{(i + k) % 30}.mp4" for k in range(3)]},
                ["<video>\nfirst", "1."],
            ),
        ][i % KINDS]
        turns = [("human" if k % 2 == 0 else "gpt", text) for k, text in enumerate([*before, f"{i}: {human}", "Yes."])]
        turns = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": f"r{i}", **media, "conversations": turns})
    mv.write_json(folder / "data.json", records)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose weights are wide enough for answers that depend on the videos."""
    path = tmp_path_factory.mktemp("models") / "wide"
    save_tiny_model(path, initializer_range=0.1)
    return str(path)


def run(monkeypatch, *flags):
    reset_accelerate()
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags), "--dataloader_num_workers", "0"])
    predict.main()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def hf_answer(model, processor, row, folder, args, silent, tokens=8):
    """Greedy answer of the plain model to one record; tokens that ours never gives are suppressed here too."""
    messages = qwen_messages(row, str(folder), args)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, _ = qwen_vl_utils.process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True
    )
    kwargs = {"videos": [v for v, _ in videos], "video_metadata": [m for _, m in videos]} if videos else {}
    inputs = processor(text=[text], images=images, **kwargs, do_resize=False, do_sample_frames=False,
                       return_tensors="pt")  # fmt: skip
    inputs["position_ids"] = mv.qwen_position_ids(inputs, model.config)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=silent)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def predicted(data, model, tmp_path_factory):
    """The output of one run over all records, in batches of 7 that mix all kinds."""
    output = tmp_path_factory.mktemp("out") / "predictions.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "--model_id", model, "--data_path", data / "data.json", *SIZES, "--max_new_tokens", 8,
            "--batch_size", 7, "--output_path", output)  # fmt: skip
    return output


def test_answers_equal_plain_generate(data, model, predicted):
    """Greedy answers to all kinds of records, decoded together, are those of the plain model, one at a time."""
    args = mv.TrainingArguments(model_id=model, video_min_pixels=784, image_min_pixels=784)
    plain, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    encoder = mv.Encoder(model, args)
    silent = [*encoder.vision_ids, *range(len(processor.tokenizer), plain.config.get_text_config().vocab_size)]
    rows = lines(predicted)
    records = json.loads((data / "data.json").read_text())
    assert [row["id"] for row in rows] == [record["id"] for record in records] and len(rows) == 54
    for record, row in zip(records, rows):
        normal = predict.normalize_record(record, record["id"])
        assert row["prediction"] == hf_answer(plain, processor, normal, data, args, silent), row["id"]
        assert row["videos"] == len(np.atleast_1d(record.get("video", [])))
    assert len({row["prediction"] for row in rows}) > 30


def test_continues_after_a_kill(data, model, predicted, tmp_path, monkeypatch):
    """Killed in the middle of a line: the same command completes the file, without gaps or duplicates."""
    whole = predicted.read_text()
    output = tmp_path / "predictions.jsonl"
    settings = predicted.with_name("predictions_settings.json")
    (tmp_path / settings.name).write_text(settings.read_text())
    output.write_text(whole[: len(whole) * 2 // 3])
    assert not output.read_text().endswith("\n")
    done, asked = len(output.read_text().splitlines()) - 1, []
    monkeypatch.setattr(predict, "answers", lambda *a, f=predict.answers: asked.extend(a[2]) or f(*a))
    flags = ["--model_id", model, "--data_path", data / "data.json", *SIZES, "--max_new_tokens", 8, "--batch_size", 7]
    run(monkeypatch, *flags, "--output_path", output)
    assert lines(output) == lines(predicted) and asked == list(range(done, 54))
    with pytest.raises(mv.InputError, match="max_new_tokens: 8 then, 9 now"):
        run(monkeypatch, *flags, "--output_path", output, "--max_new_tokens", 9)
    (tmp_path / "notes.jsonl").write_text("mine\n")
    with pytest.raises(mv.InputError, match=r"notes\.jsonl exists and is not of this tool"):
        run(monkeypatch, *flags, "--output_path", tmp_path / "notes.jsonl")


def test_answers_of_other_weights_are_not_reused(data, tmp_path, monkeypatch, capsys):
    """New weights under the same path are refused with both, or overwritten; a replaced video is asked again."""
    for name in ("0.mp4", "1.mp4", "2.mp4"):
        shutil.copy(data / name, tmp_path / name)
    records = [{"id": name, "video": name, "conversations": [{"from": "human", "value": "<video>\nWhat?"}]}
               for name in ("0.mp4", "1.mp4", "2.mp4")]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    model, output = tmp_path / "model", tmp_path / "model" / "predictions.jsonl"
    save_tiny_model(model, initializer_range=0.1, seed=0)
    flags = ["--model_id", model, "--data_path", tmp_path / "data.json", *SIZES, "--max_new_tokens", 8]
    run(monkeypatch, *flags)
    first = lines(output)
    assert "0 reused, 3 new: " in capsys.readouterr().err
    run(monkeypatch, *flags)
    assert "3 reused, 0 new: " in capsys.readouterr().err and lines(output) == first
    shutil.copy(tmp_path / "2.mp4", tmp_path / "1.mp4")
    run(monkeypatch, *flags)
    second = lines(output)
    assert "2 reused, 1 new, 1 of them again: their videos or images have changed: " in capsys.readouterr().err
    assert [first[i] == second[i] for i in range(3)] == [True, False, True]
    assert second[1]["prediction"] == second[2]["prediction"] != first[1]["prediction"]
    before = mv.weights_identity(str(model))
    save_tiny_model(model, initializer_range=0.1, seed=1)
    (now,) = mv.weights_identity(str(model))
    with pytest.raises(mv.InputError) as caught:
        run(monkeypatch, *flags)
    assert before[0] != now and before[0] in str(caught.value) and now in str(caught.value)
    assert "--overwrite True" in str(caught.value) and lines(output) == second
    run(monkeypatch, *flags, "--overwrite", True)
    assert "0 reused, 3 new: " in capsys.readouterr().err
    assert all(new["prediction"] != old["prediction"] for new, old in zip(lines(output), second))


def test_models_of_another_position_rule(data, model, tmp_path, monkeypatch, capsys):
    """A model that a run trained before it recorded its rule is warned of, once; others are not."""
    flags = ["--data_path", data / "data.json", *SIZES, "--max_new_tokens", 2, "--limit", 2]
    warning = "was trained with other positions (text goes on at a clip's start + max(h, w), as in transformers 5.3)"
    for name, rule in (("old", {}), ("new", {"position_rule": mv.POSITION_RULE})):
        shutil.copytree(model, tmp_path / name)
        mv.write_json(tmp_path / name / "arguments.json", {"learning_rate": 1e-5, **rule})
        run(monkeypatch, "--model_id", tmp_path / name, *flags)
        assert capsys.readouterr().err.count(f"warning: --model_id {tmp_path / name} {warning}") == (name == "old")
        args = mv.TrainingArguments(model_id=model, lora_weight_path=str(tmp_path / name))
        mv.warn_of_old_positions("lora_weight_path", args.lora_weight_path)
        assert (f"--lora_weight_path {tmp_path / name} {warning}" in capsys.readouterr().err) == (name == "old")
    run(monkeypatch, "--model_id", model, *flags, "--output_path", tmp_path / "base.jsonl")
    assert "warning" not in capsys.readouterr().err


def running(output):
    """Ids of the processes that have the path in their command."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(output) in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


def rank_of(pid):
    """What torchrun gave the process as its RANK; -1 of the launcher."""
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return int(dict(line.split("=", 1) for line in environment if line).get("RANK", -1))


def waits_for(pid, number):
    """Whether the signal was sent to a process and not yet delivered."""
    pending = re.search(r"ShdPnd:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(pending, 16) & 1 << number - 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_for_real(runner, data, model, predicted, tmp_path, monkeypatch, processes):
    """SIGKILL in the middle: the same command completes the file, every record in it once.

    Of two processes the second is killed, and the first cannot go on: accelerate launch ends it, and fails.
    """
    output = tmp_path / "predictions.jsonl"
    flags = ["--model_id", model, "--data_path", data / "data.json", *SIZES, "--batch_size", 1]
    flags += ["--output_path", output]
    command = [sys.executable, "tools/predict.py", *flags, "--max_new_tokens", 8, "--dataloader_num_workers", 0]
    if processes == 2:
        command[:1] = [Path(sys.executable).parent / "accelerate", "launch", "--config_file",
                       "accelerate_configs/ddp.yaml", "--num_processes", 2]  # fmt: skip
    files = [output] if processes == 1 else [tmp_path / f"predictions.jsonl.part-{rank}" for rank in range(2)]
    counts = lambda: [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.monotonic() + 120
    while min(counts()) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
    if processes == 1:
        process.kill()
    else:
        first, second = (next(pid for pid in running(output) if rank_of(pid) == rank) for rank in range(2))
        os.kill(first, signal.SIGSTOP)  # as if it waited in a collective
        os.kill(second, signal.SIGKILL)
        while not waits_for(first, signal.SIGTERM) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert waits_for(first, signal.SIGTERM)
        os.kill(first, signal.SIGCONT)
    assert process.wait(timeout=60) != 0 and running(output) == []
    assert min(counts()) >= 3 and sum(counts()) < 54 and output.exists() == (processes == 1)
    rows = [row for file in files for row in lines(file)]
    assert len({row["id"] for row in rows}) == len(rows)
    with pytest.raises(mv.InputError, match="max_new_tokens: 8 then, 9 now"):
        run(monkeypatch, *flags, "--max_new_tokens", 9)
    with open(files[-1], "r+b") as file:  # as if it had come amid a line
        file.truncate(file.seek(-5, os.SEEK_END))
    if processes == 2:
        runner.launch(*command[2:], log=tmp_path / "rank")
    else:
        run(monkeypatch, *flags, "--max_new_tokens", 8)
    assert lines(output) == lines(predicted) and all(row in lines(output) for row in rows)
    assert not list(tmp_path.glob("*.part-*"))


def test_failures_are_no_answers(data, model, tmp_path, monkeypatch, capsys):
    """A missing file, a broken one, a sample that is too long: each a record with `error`, the others answered."""
    records = json.loads((data / "data.json").read_text())[:7]
    records[1]["video"] = "missing.mp4"
    (data / "broken.mp4").write_bytes(b"no video")
    records[3]["video"] = "broken.mp4"
    (data / "bad.json").write_text(json.dumps(records))
    flags = ["--model_id", model, "--data_path", data / "bad.json", *SIZES, "--max_new_tokens", 4,
             "--max_seq_length", 100]  # fmt: skip
    run(monkeypatch, *flags, "--output_path", tmp_path / "a.jsonl")
    rows = lines(tmp_path / "a.jsonl")
    assert ["error" in row for row in rows] == [True, True, False, True, False, False, True]
    assert not any("prediction" in row for row in rows if "error" in row)
    assert "missing.mp4: No such file" in rows[1]["error"] and "tokens, --max_seq_length is 100" in rows[0]["error"]
    assert json.loads((tmp_path / "a_metrics.json").read_text())["errors"] == 4
    assert "not answered, 1 records: " in capsys.readouterr().err
    run(monkeypatch, *flags, "--output_path", tmp_path / "b.jsonl", "--on_bad_video", "drop_video")
    row = lines(tmp_path / "b.jsonl")[3]  # the image is left
    assert row["videos"] == 0 and "broken.mp4" in row["left_out"] and row["prediction"]


def test_adapter_and_merged_model_answer_alike(data, model, tmp_path, monkeypatch):
    """The run's folder (adapter, settings from its arguments.json) and the merged model give the same answers."""
    args = mv.TrainingArguments(
        model_id=model, lora_enable=True, freeze_llm=True, lora_rank=4, video_min_pixels=784, image_min_pixels=784,
        nframes=2, system_prompt="Be brief.", output_dir=str(tmp_path),
    )  # fmt: skip
    torch.manual_seed(0)
    adapted = mv.load_model(args, "cpu")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    mv.save_model(adapted, AutoProcessor.from_pretrained(model), tmp_path / "run")
    mv.write_json(tmp_path / "run" / "arguments.json", vars(args))
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    answers = {}
    for name in ("run", "merged"):
        run(monkeypatch, "--model_id", tmp_path / name, "--data_path", data / "data.json", "--limit", 12,
            "--max_new_tokens", 6)  # fmt: skip
        answers[name] = [row["prediction"] for row in lines(tmp_path / name / "predictions.jsonl")]
        settings = json.loads((tmp_path / name / "predictions_settings.json").read_text())
        assert (settings["nframes"], settings["system_prompt"], settings["video_min_pixels"]) == (2, "Be brief.", 784)
    assert answers["run"] == answers["merged"]
    run(monkeypatch, "--model_id", model, "--data_path", data / "data.json", "--limit", 12, "--max_new_tokens", 6,
        *SIZES, "--nframes", 2, "--output_path", tmp_path / "base.jsonl")  # fmt: skip
    assert [row["prediction"] for row in lines(tmp_path / "base.jsonl")] != answers["run"]


def test_sampling(data, model, tmp_path, monkeypatch):
    """One seed gives the same answers in any batch size, another one others."""
    flags = ["--model_id", model, "--data_path", data / "data.json", *SIZES, "--max_new_tokens", 6, "--limit", 6,
             "--temperature", 1.0]  # fmt: skip
    for name, extra in {"a": [], "b": ["--batch_size", 2], "c": ["--seed", 7]}.items():
        run(monkeypatch, *flags, *extra, "--output_path", tmp_path / f"{name}.jsonl")
    a, b, c = ([row["prediction"] for row in lines(tmp_path / f"{name}.jsonl")] for name in "abc")
    assert a == b != c


def test_references_beside_a_conversation(tmp_path):
    """They win over the last answer, which then marks where the prompt ends; ended by a user turn all is prompt."""
    talk = [{"role": role, "content": text} for role, text in
            (("user", "First?"), ("assistant", "One."), ("user", "Then?"), ("assistant", ""))]  # fmt: skip
    records = [
        {"messages": talk, "solution": "Two."}, {"messages": talk[:3], "answer": 2}, {"messages": talk[:3]},
        {"messages": talk[:2], "reference": None}, {"prompt": "First?", "ground_truth": "One."},
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    rows = mv.load_records(str(tmp_path / "data.json"), predict.normalize_record, train_grpo.FEATURES)
    assert [row["reference"] for row in rows] == ["Two.", "2", None, "One.", "One."]
    assert [[turn["role"] for turn in row["messages"]] for row in rows] == [
        ["user", "assistant", "user"], ["user", "assistant", "user"], ["user", "assistant", "user"], ["user"], ["user"]
    ]  # fmt: skip
    (completion,) = predict.normalize_with_answer(records[1], "r")["completions"]
    assert completion[0]["content"][0]["text"] == "2"
    for value, message in (({"text": "a"}, "'answer': the reference answer must be a text"), ("", "answer is empty")):
        with pytest.raises(ValueError, match=f"r: .*{message}"):
            predict.normalize_record({"messages": talk, "answer": value}, "r")


def test_blank_each(data, model, tmp_path, monkeypatch, capsys):
    """Falls equal two plain forwards: the reference after the prompt, with and without a clip of mean grey."""
    flags = ["--model_id", model, "--data_path", data / "data.json", *SIZES, "--blank_each", "True"]
    run(monkeypatch, *flags, "--limit", 6, "--output_path", tmp_path / "falls.jsonl")
    out = capsys.readouterr().out
    assert "mean fall" in out and (tmp_path / "falls.png").stat().st_size > 5000
    rows = lines(tmp_path / "falls.jsonl")
    assert [len(row["falls"]) for row in rows] == [30, 1, 2, 2, 0, 3]
    assert rows[5]["files"] == ["5.mp4", "6.mp4", "7.mp4"]

    args = mv.TrainingArguments(model_id=model, video_min_pixels=784, image_min_pixels=784)
    plain, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    record = json.loads((data / "data.json").read_text())[5]
    normal = predict.normalize_record(record, "r5")
    messages = qwen_messages(normal, str(data), args)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, videos, _ = qwen_vl_utils.process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    answer = processor.tokenizer("Yes.<|im_end|>", return_tensors="pt")["input_ids"][0]

    mean, std = (torch.tensor(getattr(processor.video_processor, f"image_{name}")) for name in ("mean", "std"))
    grey = (((mean * 255).round() / 255 - mean) / std).repeat_interleave(2 * 14 * 14)  # bytes: not quite 0

    @torch.no_grad()
    def logp(blank=None):
        inputs = processor(
            text=[text + "Yes.<|im_end|>"], videos=[v for v, _ in videos], video_metadata=[m for _, m in videos],
            do_resize=False, do_sample_frames=False, return_tensors="pt",
        )  # fmt: skip
        if blank is not None:
            ends = inputs["video_grid_thw"].prod(1).cumsum(0).tolist()
            start = [0, *ends][blank]
            inputs["pixel_values_videos"][start : ends[blank]] = grey
        inputs["position_ids"] = mv.qwen_position_ids(inputs, plain.config)
        logps = plain(**inputs).logits[0].log_softmax(-1)
        n = len(answer)
        return logps[-n - 1 : -1].gather(1, answer[:, None]).sum().item()

    assert rows[5]["logp"] == pytest.approx(logp(), abs=1e-4)
    assert rows[5]["falls"] == pytest.approx([logp() - logp(k) for k in range(3)], abs=1e-4)
    assert max(map(abs, rows[5]["falls"])) > 0.1
    for row in rows:  # the prompt's own tokens, not the reference's
        encoded = mv.Encoder(model, args)({**normal_of(data, row["index"]), "completions": []}, str(data))
        assert row["prompt_tokens"] == encoded["num_tokens"]


def normal_of(data, index):
    record = json.loads((data / "data.json").read_text())[index]
    return predict.normalize_record(record, record["id"])


def test_falls_of_records_of_different_lengths(tmp_path):
    """Each record's falls add up to 1 nat and are alike: every place has 1, whatever share of the records has it."""
    rows = [{"id": str(n), "files": ["a.mp4"] * n, "falls": [1 / n] * n} for n in (1, 2, 30, 30)]
    table = predict.draw_falls(rows, tmp_path / "a.png")
    assert [row["mean_share"] for row in table] == pytest.approx([1] * 30)
    assert [row["records"] for row in table] == [4, 3] + [2] * 28
    assert table[0]["mean_fall"] > 10 * table[29]["mean_fall"]  # nats fall with the place by construction
    assert predict.fall_shares([{"falls": [-3.0, 1.0]}, {"falls": [0.0, 0.0]}]) == [[-1.5, 0.5], [0, 0]]


def test_classifier(data, tmp_path, monkeypatch):
    """Classes and metrics are those of the evaluation in training; records without a label are answered too."""
    import train_cls

    model = save_tiny_model(tmp_path / "model", vision_hidden_size=32, initializer_range=0.1)
    records = json.loads((data / "data.json").read_text())
    labelled = []
    for i, record in enumerate(records):
        if i % KINDS < 5:  # one turn
            media = {key: record.get(key) for key in ("id", "video", "image")}
            labelled.append({**media, "prompt": record["conversations"][-2]["value"], "label": "abc"[i % 3]})
    for name, rows in (("train", labelled), ("test", [*labelled[:9], {**labelled[9], "label": None}])):
        (data / f"{name}.json").write_text(json.dumps(rows))
    reset_accelerate()
    flags = ["--model_id", model, "--data_path", data / "train.json", "--eval_path", data / "train.json", *SIZES,
             "--max_steps", 4, "--per_device_train_batch_size", 8, "--learning_rate", 1e-3, "--save_strategy", "no",
             "--dataloader_num_workers", 0, "--output_dir", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *map(str, flags)])
    handlers = {number: signal.getsignal(number) for number in mv.STOP_SIGNALS}
    train_cls.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    truth = lines(tmp_path / "out" / "predictions.jsonl")
    result = [row for row in lines(tmp_path / "out" / "metrics.jsonl") if "eval_loss" in row][-1]
    run(monkeypatch, "--model_id", tmp_path / "out", "--data_path", data / "train.json", "--batch_size", 7)
    said = lines(tmp_path / "out" / "predictions_train.jsonl")
    assert [(row["id"], row["label"], row["prediction"]) for row in said] == [
        (row["id"], row["label"], row["prediction"]) for row in truth
    ]
    for ours, theirs in zip(said, truth):
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    told = json.loads((tmp_path / "out" / "predictions_train_metrics.json").read_text())
    assert told["labelled"] == told["records"] == 45
    assert (told["accuracy"], told["f1"]) == pytest.approx((result["eval_accuracy"], result["eval_f1"]))
    run(monkeypatch, "--model_id", tmp_path / "out", "--data_path", data / "test.json")
    told = json.loads((tmp_path / "out" / "predictions_test_metrics.json").read_text())
    assert (told["records"], told["labelled"]) == (10, 9)
    assert lines(tmp_path / "out" / "predictions_test.jsonl")[9]["label"] is None
    with pytest.raises(mv.InputError, match="--blank_each is for answers in words"):
        run(monkeypatch, "--model_id", tmp_path / "out", "--data_path", data / "test.json", "--blank_each", "True")


def test_metrics():
    """Against values worked out by hand."""
    rows = [
        {"prediction": "The cat sat.", "reference": "the cat sat"},
        {"prediction": "B", "reference": "B"},
        {"prediction": "The answer is (C).", "reference": "D"},
        {"prediction": "It is 62 %.", "reference": "65 %"},
        {"prediction": "no idea", "reference": "40"},
        {"prediction": "free", "reference": None},
        {"error": "gone", "reference": "40"},
    ]
    told = predict.metrics_of(rows)
    assert (told["records"], told["errors"], told["references"]) == (7, 1, 5)
    assert told["exact_match"] == 1 / 5 and told["normalized_match"] == 2 / 5
    assert told["choice_accuracy"] == 1 / 2
    assert told["numeric_mae"] == 3.0 and told["numeric_missing"] == 1
    # words in common, in order: 3 of 3, 1 of 1, none, 62 against 65: none, none
    assert told["rouge_l"] == pytest.approx((1 + 1 + 0 + 0 + 0) / 5)
    assert predict.metrics_of(rows[-2:]) == {"records": 2, "errors": 1}
    thought = {"prediction": "A valve, 40 of them.\n</think>\n\nOpen.", "reference": "<think>So.</think>Open."}
    told = predict.metrics_of([thought])
    assert (told["exact_match"], told["normalized_match"], told["rouge_l"]) == (1, 1, 1)


def test_flags_of_the_run(tmp_path, capsys):
    """arguments.json stands for what is not given; --nframes replaces --fps; wrong values are told of together."""
    run_flags = {"fps": 0.25, "nframes": None, "bf16": True, "learning_rate": 1.0, "video_resized_width": 64}
    run_flags["video_reader"] = "decord"
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "arguments.json").write_text(json.dumps(run_flags))
    argv = ["--model_id", str(tmp_path / "checkpoint-5")]
    assert predict.inherited_flags(argv) == [
        "--fps=0.25", "--video_resized_width=64", "--bf16=True", "--video_reader=decord"]  # fmt: skip
    others = ["--nframes", "4", "--bf16", "False", "--video_reader", "pyav"]
    assert predict.inherited_flags([*argv, *others]) == ["--video_resized_width=64"]
    assert predict.inherited_flags(["--model_id", "Qwen/Qwen2.5-VL-3B-Instruct"]) == []
    with pytest.raises(SystemExit):
        mv.parse_arguments(predict.PredictArguments, ["--batch_size", "0", "--temperature", "-1", "--top_p", "2"])
    said = capsys.readouterr().err
    assert all(text in said for text in ("--batch_size 0", "--temperature -1", "--top_p 2", "--data_path is missing"))
