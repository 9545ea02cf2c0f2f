"""train_dpo.py: losses by hand and against TRL, pairs that share a prompt, records, references, whole runs."""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import multivideo as mv

import numpy as np
import peft
import pytest
import torch
import upstream_commands
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from make_demo import ANSWER, COLOURS, QUESTION, make_pairs
from PIL import Image
from reference import hf_inputs, hf_loss, write_clip
from safetensors import safe_open
from safetensors.torch import load_file
from test_packing import close_gradients
from test_train import ROOT, metrics
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_dpo
from train_dpo import DPO_LOSSES, FEATURES, METRICS, DPOArguments, answer_logps, dpo_loss, normalize_record

# ----------------------------------------------------------------------------------------------------------- losses

# Log-ratios 0.8 (chosen) and −0.4 (rejected) of answers of 4 and 5 tokens, β 0.5, label smoothing 0.1: rewards 0.4 and
# −0.2, a margin of 0.6. By hand with log σ(0.6) = −0.437488, log σ(−0.6) = −1.037488, log σ(0.4) = −0.513015,
# log σ(−0.4) = −0.913015, log σ(0.2) = −0.598139, σ(0.6) = 0.645656, σ(0.4) = 0.598688, σ(−0.2) = 0.450166.
BY_HAND = {
    "sigmoid": 0.497488,  # 0.9 · 0.437488 + 0.1 · 1.037488
    "ipo": 0.5184,  # (0.8 / 4 + 0.4 / 5 − 1)²
    "hinge": 0.4,  # 1 − 0.6
    "robust": 0.362488,  # (0.9 · 0.437488 − 0.1 · 1.037488) / 0.8
    "exo_pair": 0.233839,  # 0.645656 · (−0.437488 − log 0.9) + 0.354344 · (−1.037488 − log 0.1)
    "nca_pair": 1.268592,  # 0.513015 + (0.913015 + 0.598139) / 2
    "sppo_hard": 0.4,  # (0.8 − 1)² + (−0.4 + 1)²
    "apo_zero": 0.851479,  # 1 − 0.598688 + 0.450166
    "apo_down": 0.953031,  # 0.598688 + 1 − 0.645656
    "sft": 7.0,
}
PAIR = torch.tensor([[-7.0, -9.0]]), torch.tensor([[-7.8, -8.6]]), torch.tensor([[4.0, 5.0]])


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_loss_by_hand(name):
    assert dpo_loss(name, *PAIR, 0.5, 0.1).tolist() == pytest.approx([BY_HAND[name]], abs=2e-6)


def test_sigmoid_begins_at_ln_2_and_extremes_are_finite():
    start = (PAIR[0], PAIR[0], PAIR[2])
    assert dpo_loss("sigmoid", *start, 0.1, 0.0).item() == pytest.approx(math.log(2), abs=1e-7)
    for name in DPO_LOSSES:
        for far in (1e4, -1e4):
            logps = torch.tensor([[far, -far]], requires_grad=True)
            loss = dpo_loss(name, logps, *PAIR[1:], 0.5, 0.1)
            (gradient,) = torch.autograd.grad(loss.sum(), logps)
            assert loss.isfinite().all() and gradient.isfinite().all(), name
    with pytest.raises(ValueError, match="no loss 'dpo'"):
        dpo_loss("dpo", *PAIR, 0.5, 0.1)


# ---------------------------------------------------------------------------------------------- pairs and the model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips and images whose sides are multiples of 28: no resize, so pixels are equal to the last bit."""
    folder = tmp_path_factory.mktemp("clips")
    for i, (width, height) in enumerate([(28, 28), (56, 56), (84, 56), (56, 28), (28, 56), (112, 84)]):
        write_clip(folder / f"{i}.mp4", width, height, 5 + 4 * i, rate=[8, 25, 30][i % 3], seed=i)
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (56 + 28 * i, 84, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return str(folder)


def turns(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


RAW = [
    {"prompt": "What do they show?", "video": [f"{i % 6}.mp4" for i in range(30)], "chosen": "Thirty moving clips.",
     "rejected": "One"},
    {"prompt": "Describe <video> now.", "video": "5.mp4", "chosen": "A large clip of moving noise, it is.",
     "rejected": "No idea"},
    {"prompt": turns("<image>\nand\n<image>\ndiffer?"), "images": ["0.png", "1.png"],
     "chosen": turns("Yes, they do.", first="assistant"), "rejected": turns("They are the same.", first="assistant")},
    {"chosen": turns("<image>\nwith\n<video>\nwhat?", "A still.", "And?", "A clip"), "image": "0.png",
     "rejected": turns("<image>\nwith\n<video>\nwhat?", "A cat.", "Sure?", "Yes, yes!"), "video": "4.mp4"},
    {"prompt": "No pictures at all. Who are you?", "chosen": "A model.", "rejected": "A cat, or so I think."},
    {"prompt": turns("<video>\nfirst", "One.", "then <video>\n<video>"), "chosen": "Two and three.",
     "rejected": "Four", "video": ["3.mp4", "4.mp4", "1.mp4"]},
]  # fmt: skip
PAIRS = [normalize_record(raw, f"record {i}") for i, raw in enumerate(RAW)]


def arguments(model, **kwargs):
    return DPOArguments(model_id=model, video_min_pixels=784, image_min_pixels=784, **kwargs)


def plain_logps(model, pairs, folder, args, processor):
    """[pairs, 2] through the plain model, one unpacked conversation at a time."""
    logps = []
    for pair in pairs:
        prompt, _ = hf_inputs(pair, folder, args, processor)
        for completion in pair["completions"]:
            inputs, labels = hf_inputs({"messages": pair["messages"] + completion}, folder, args, processor)
            labels[: prompt["input_ids"].shape[1]] = -100
            logps.append(-hf_loss(model, inputs, labels))
    return torch.stack(logps).view(-1, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_row_equals_separate_sequences(tiny_model, clips, checkpointing):
    """Log-probabilities, loss and gradients of all pairs in one row are those of 12 sequences, the plain way."""
    args = arguments(tiny_model, gradient_checkpointing=checkpointing)
    encoder, processor = mv.Encoder(tiny_model, args), AutoProcessor.from_pretrained(tiny_model)
    samples = [encoder(pair, clips) for pair in PAIRS]
    inputs, targets, sequences = mv.pack(samples, encoder, "cpu")
    assert len(inputs["video_grid_thw"]) == 30 + 1 + 2 + 2 + 3  # no clip twice
    model = mv.load_model(args, "cpu").train()
    logps, lengths = answer_logps(model(**inputs).logits, targets, sequences, len(PAIRS))
    plain = AutoModelForImageTextToText.from_pretrained(tiny_model, attn_implementation="sdpa")
    expected = plain_logps(plain, PAIRS, clips, args, processor)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=0)
    count = [[len(processor.tokenizer.encode(raw[name] + "<|im_end|>")) for name in ("chosen", "rejected")]
             for raw in (RAW[0], RAW[4])]  # fmt: skip
    assert lengths[[0, 4]].tolist() == count
    ref_logps = expected.detach() - torch.tensor([[0.3, -0.2], [-1.0, 0.5], [0.1, 2.0]]).repeat(2, 1)
    scale = 3.0  # beta: a margin that makes every pair's gradient differ
    dpo_loss("sigmoid", logps, ref_logps, lengths, scale, 0.0).sum().backward()
    (-torch.nn.functional.logsigmoid(scale * (expected - ref_logps) @ torch.tensor([1.0, -1.0]))).sum().backward()
    close_gradients(model, plain)


def test_answers_are_blind_to_each_other(tiny_model, clips):
    """Another rejected answer moves neither the chosen one's log-probability nor any other pair's, by one bit."""
    args = arguments(tiny_model)
    encoder, model = mv.Encoder(tiny_model, args), mv.load_model(args, "cpu").eval()

    @torch.no_grad()
    def ask(pairs):
        inputs, *rest = mv.pack([encoder(pair, clips) for pair in pairs], encoder, "cpu")
        return answer_logps(model(**inputs).logits, *rest, len(pairs))[0]

    before = ask(PAIRS[1:4])
    other = normalize_record({**RAW[2], "rejected": turns("They are the SAME.", first="assistant")}, "record")
    after = ask([PAIRS[1], other, PAIRS[3]])
    assert (after != before).nonzero().tolist() == [[1, 1]]


def test_row_without_pairs(tiny_model, clips):
    """A process whose row is empty takes part: a zero gradient for every parameter."""
    args = arguments(tiny_model)
    encoder, model = mv.Encoder(tiny_model, args), mv.load_model(args, "cpu").train()
    inputs, targets, sequences = mv.pack([{"id": "too long"}], encoder, "cpu")
    logps, lengths = answer_logps(model(**inputs).logits, targets, sequences, 0)
    args.dpo_loss, args.label_smoothing = DPO_LOSSES, 0.1
    train_dpo.loss_sums(logps, torch.zeros(0, 2), lengths, args).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert train_dpo.metric_sums(logps, torch.zeros(0, 2), 0.1).tolist() == [0.0] * len(METRICS)


def test_the_reference_is_asked_without_gradients(tiny_model, clips, monkeypatch):
    """No gradient, no checkpointing, no dropout; then the trained model is in training again."""
    args = arguments(tiny_model, lora_enable=True, freeze_llm=True, lora_dropout=0.5, gradient_checkpointing=True,
                     lora_namespan_exclude="['lm_head', 'embed_tokens']")  # fmt: skip
    encoder, model = mv.Encoder(tiny_model, args), mv.load_model(args, "cpu").train()
    layer = model.get_base_model().model.language_model.layers[0]
    seen = []
    layer.self_attn.register_forward_hook(lambda module, inputs, outputs: seen.append(
        (module.training, outputs[0].requires_grad, module.q_proj.disable_adapters)))  # fmt: skip
    samples = [encoder(PAIRS[4], clips)]
    row = mv.pack(samples, encoder, "cpu")
    engine = SimpleNamespace(model=model, raw_model=model, frozen=False, autocast=contextlib.nullcontext)
    logps = train_dpo.reference_logps(engine, row, [0], samples)
    assert seen == [(False, False, True)] and not logps.requires_grad and logps.shape == (1, 2)
    model(**row[0])
    assert seen[1:] == [(True, True, False)]


# ---------------------------------------------------------------------------------------------------------- records


def texts(row):
    """(texts of the prompt's turns, texts of the chosen ones, texts of the rejected ones)."""
    return tuple(["".join(part["text"] or f"<{part['files'][0]}>" for part in turn["content"]) for turn in messages]
                 for messages in (row["messages"], *row["completions"]))  # fmt: skip


ASK, YES, NO = turns("<video>\nSure?"), turns("Yes.", first="assistant"), turns("No.", first="assistant")
SURE = (["<a.mp4>Sure?"], ["Yes."], ["No."])


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "<video>\nSure?", "chosen": "Yes.", "rejected": "No."}, SURE),
        ({"prompt": "Sure?", "chosen": "Yes.", "rejected": "No."}, SURE),
        ({"prompt": ASK, "chosen": YES, "rejected": NO}, SURE),
        ({"prompt": ASK, "chosen": "Yes.", "rejected": NO}, SURE),
        ({"chosen": ASK + YES, "rejected": ASK + NO}, SURE),
        ({"prompt": "<video>\nSure?", "chosen": ASK + YES, "rejected": ASK + NO}, SURE),
        ({"conversations": [{"from": "human", "value": "<video>\nSure?"}], "chosen": {"from": "gpt", "value": "Yes."},
          "rejected": {"from": "gpt", "value": "No."}}, SURE),
        ({"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                                  {"type": "text", "text": "Sure?"}]}],
          "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}], "rejected": NO,
          "video": None}, SURE),
        ({"prompt": [{"role": "system", "content": "Be brief."}, *turns("<video>\nA", "B", "C")],
          "chosen": "D", "rejected": "E"}, (["Be brief.", "<a.mp4>A", "B", "C"], ["D"], ["E"])),
        ({"chosen": turns("<video>\nA", "B", "C", "D"), "rejected": turns("<video>\nA", "B", "C", "E", "F", "G")},
         (["<a.mp4>A", "B", "C"], ["D"], ["E", "F", "G"])),
    ],
)  # fmt: skip
def test_every_format(record, expected):
    row = normalize_record({"id": 7, "video": ["a.mp4"], **record}, "record 3")
    assert texts(row) == expected and row["id"] == "7"
    assert all(turn["role"] == ("user" if i % 2 else "assistant") for i, turn in enumerate(row["completions"][0]))


def test_parquet(tmp_path):
    """TRL's columns as Arrow hands them out: nulls where a record has no prompt or a part has no text."""
    parts = [{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "Sure?"}]}]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in ("Yes.", "No.")]
    explicit = {"prompt": parts, "chosen": answers[0], "rejected": answers[1], "videos": ["a.mp4"]}
    implicit = {**explicit, "prompt": None, "chosen": parts + answers[0], "rejected": parts + answers[1]}
    Dataset.from_list([explicit, implicit]).to_parquet(str(tmp_path / "pairs.parquet"))
    loaded = mv.load_records(str(tmp_path / "pairs.parquet"), normalize_record, FEATURES)
    assert [texts(row) for row in loaded] == [SURE, SURE]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chosen": None}, "field 'chosen': expected the answer, a text or a list of turns, got None"),
        ({"rejected": 3}, "field 'rejected': expected the answer, a text or a list of turns, got 3"),
        ({"chosen": []}, "field 'chosen': expected the answer"),
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"chosen": "No.", "rejected": "No."}, "'chosen' and 'rejected' are the same"),
        ({"chosen": ASK + YES, "rejected": ASK + YES, "prompt": None}, "'chosen' has no turn of its own: all 2 are"),
        ({"chosen": ASK + YES, "rejected": turns("Other?", "No."), "prompt": None}, "do not begin with the same turn"),
        ({"chosen": ASK + YES, "rejected": ASK + NO, "prompt": ASK}, "must begin with an assistant ('gpt') turn, got"),
        ({"chosen": ASK + YES, "rejected": ASK + NO, "prompt": "Else?"}, "'prompt' is not the turn that"),
        ({"chosen": turns("A", "B", "C"), "rejected": turns("A", "B", "D"), "prompt": None},
         "'chosen': turn 0 is of 'user'; assistant and user turns must alternate"),
        ({"chosen": turns("A", "B", first="assistant")}, "the last turn must be the assistant's, got 'user'"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
         "'chosen': turn 0 holds a video or image: they belong in the prompt"),
        ({"chosen": " "}, "'chosen': an assistant ('gpt') turn without text"),
        ({"chosen": "Yes<|im_end|>"}, "'chosen': turn 0: the control token <|im_end|>"),
        ({"chosen": [{"role": "system", "content": "A"}]}, "turn 0 is of 'system'"),
        ({"prompt": turns("A", "B")}, "the prompt must end with a user turn, got 'assistant'"),
        ({"messages": ASK}, "fields 'prompt' and 'messages' are both there"),
        ({"prompt": "<video>\n<video>\nSure?"}, "2 <video> tags for 1 videos"),
        ({"video": None}, "1 <video> tags for 0 videos"),
    ],
)  # fmt: skip
def test_bad_records_are_named(change, message):
    record = {"id": 7, "video": ["a.mp4"], "prompt": "<video>\nSure?", "chosen": "Yes.", "rejected": "No.", **change}
    with pytest.raises(ValueError, match=f"^record 3: .*{re.escape(message)}"):
        normalize_record(record, "record 3")
    with pytest.raises(ValueError, match="record 3: a record must be an object"):
        normalize_record([record], "record 3")


def test_examples():
    """Every file of examples/ that is a trainer of pairs' loads; the formats of one record give one normal form."""
    files = sorted((ROOT / "examples").glob("dpo*"))
    assert len(files) >= 2
    rows = [list(mv.load_records(str(file), normalize_record, FEATURES)) for file in files]
    for row in (row for rows_of_file in rows for row in rows_of_file):
        assert row["messages"][-1]["role"] == "user" and len(row["completions"]) == 2
    named = [{row["id"]: texts(row) for row in rows_of_file} for rows_of_file in rows]
    assert named[0]["study_0001"] == named[1]["study_0001"]


def test_demo_pairs():
    """The right answer is chosen, each wrong colour is rejected somewhere, prompts are those of the SFT records."""
    human = {"from": "human", "value": QUESTION}
    answers = [{"from": "gpt", "value": ANSWER.format(list(COLOURS)[i % 6])} for i in range(60)]
    records = [{"id": i, "video": ["a.mp4"], "conversations": [human, answer]} for i, answer in enumerate(answers)]
    pairs = make_pairs(records, seed=0)
    assert [pair["chosen"] for pair in pairs] == [record["conversations"][1]["value"] for record in records]
    assert all(pair["chosen"] != pair["rejected"] and pair["prompt"] == QUESTION for pair in pairs)
    assert {pair["rejected"] for pair in pairs} == {ANSWER.format(colour) for colour in COLOURS}
    assert pairs == make_pairs(records, seed=0) and pairs != make_pairs(records, seed=1)


# -------------------------------------------------------------------------------------------------------- arguments


def parse(tmp_path, *flags):
    (tmp_path / "data.json").write_text("[]")
    return mv.parse_arguments(DPOArguments, ["--data_path", str(tmp_path / "data.json"), *map(str, flags)])


def test_flags(tmp_path):
    args = parse(tmp_path, "--loss_type", "sigmoid", "sft", "--loss_weights", 1, -0.5)
    assert (args.dpo_loss, args.loss_weights) == (["sigmoid", "sft"], [1.0, -0.5])
    assert (args.beta, args.learning_rate, args.lora_dropout, args.label_smoothing) == (0.1, 1e-6, 0.0, 0.0)


def test_all_problems_at_once(tmp_path, capsys):
    (tmp_path / "a_file").touch()
    with pytest.raises(SystemExit) as stop:
        parse(
            tmp_path, "--beta", 0, "--dpo_loss", "sigmoid", "sigmoid", "exo_pair", "--loss_weights", 1, 2,
            "--label_smoothing", 0.5, "--ref_model_id", "./nowhere", "--ref_log_probs_dir", tmp_path / "a_file",
            "--fps", 0,
        )  # fmt: skip
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "8 problems" in said
    for part in ("--beta 0.0: must be above 0", "name each loss once", "2 numbers for 3 of --dpo_loss",
                 "--label_smoothing 0.5", "--ref_model_id ./nowhere: no such folder", "--fps 0.0",
                 "--ref_log_probs_dir needs --precompute_ref_log_probs True", "is a file: name a folder"):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dpo_loss", "exo_pair"], "takes the log of --label_smoothing"),
        (["--dpo_loss", "hinge", "--label_smoothing", "0.1"], "for sigmoid, robust and exo_pair only"),
        (["--loss_weights", "0"], "must be finite numbers, not all 0"),
        (["--dpo_loss", "orpo"], "invalid choice: 'orpo'"),
        (["--ref_model_id", ROOT / "tests"], "is no model: "),
    ],
)
def test_one_problem(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_upstream_flags(tmp_path, monkeypatch, capsys):
    """Every flag of upstream's DPO script and arguments is known, or answered by what replaces it."""
    words = upstream_commands.DPO_COMMANDS["finetune_dpo.sh"]
    kept = []
    for flag, value in zip(words[::2], words[1::2]):
        kept += [] if flag.lstrip("-") in mv.REPLACED_FLAGS or "path" in flag or "folder" in flag else [flag, value]
    args = parse(tmp_path, *kept)
    assert (args.dpo_loss, args.beta, args.precompute_ref_log_probs) == (["sigmoid"], 0.1, False)
    known = set(vars(DPOArguments())) | set(mv.REPLACED_FLAGS)
    assert set(upstream_commands.ACCEPTED_FIELDS["dpo"]) <= known


# --------------------------------------------------------------------------------------------------------- whole runs


def run(*flags):
    """train_dpo.main() in this process."""
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["train_dpo.py", *map(str, flags), "--dataloader_num_workers", "0"])
        train_dpo.main()


def train_rows(folder):
    return [row for row in metrics(folder) if "loss" in row]


@pytest.fixture(scope="module")
def text_pairs(tiny_model, tmp_path_factory):
    """Twenty pairs of texts: (file, the same in the order of the steps as TRL reads it)."""
    raw = [{"id": i, "prompt": f"What is {i} and {i * 7 % 5}?", "chosen": "Yes it is" + " x" * (i % 4),
            "rejected": "No, " + "never " * (i * 3 % 5) + str(i)} for i in range(20)]  # fmt: skip
    path = tmp_path_factory.mktemp("texts") / "pairs.json"
    path.write_text(json.dumps(raw))
    encoder = mv.Encoder(tiny_model, mv.TrainingArguments())
    prompts = [encoder.render(normalize_record(record, "")["messages"], add_generation_prompt=True) for record in raw]
    order = [i for (window, _), _ in zip(mv.step_windows(20, 2, 42, 0), range(10)) for i in window]
    assert sorted(order) == list(range(20))
    return path, Dataset.from_list([{**raw[i], "prompt": prompts[i]} for i in order])


@pytest.mark.parametrize("name", [*DPO_LOSSES, "several"])
def test_ten_steps_equal_trl(tiny_model, text_pairs, tmp_path, name):
    """Losses, rewards and log-probabilities of ten steps are those of TRL's DPOTrainer on the same order."""
    from trl import DPOConfig, DPOTrainer

    path, data_set = text_pairs
    names = ["robust", "sft", "ipo"] if name == "several" else [name]
    weights = [0.8, 0.2, 0.01] if name == "several" else [1.0]
    smoothing = 0.1 if set(names) & {"robust", "exo_pair"} else 0.0  # TRL's sigmoid has none
    common = dict(max_steps=10, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant")
    run(
        "--model_id", tiny_model, "--data_path", path, "--output_dir", tmp_path, "--save_strategy", "no", "--dpo_loss",
        *names, "--loss_weights", *weights, "--label_smoothing", smoothing, "--beta", 0.2,
        *(word for flag, value in common.items() for word in (f"--{flag}", value)),
    )  # fmt: skip
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type=names, loss_weights=weights, beta=0.2, label_smoothing=smoothing,
        logging_steps=1, report_to=[], gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True, max_length=None, **common,
    )  # fmt: skip
    model, ref_model = (AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoProcessor.from_pretrained(tiny_model).tokenizer
    trainer = DPOTrainer(model, ref_model, config, train_dataset=data_set, processing_class=tokenizer)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "rewards/chosen" in row]
    ours = metrics(tmp_path)
    assert len(theirs) == len(ours) == 10
    if name == "sigmoid":
        assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for row, expected in zip(ours, theirs):
        for key in ("loss", *METRICS):
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-4), (row["step"], key)
    assert abs(ours[-1]["rewards/margins"]) > 0.1  # something was learned, so that there was something to compare


@pytest.fixture(scope="module")
def mixed(tiny_model, clips, tmp_path_factory):
    """Flags of a run over 13 pairs of all kinds, 2 rows of 2 pairs per step, and 3 held-out ones."""
    folder = tmp_path_factory.mktemp("mixed")
    raw = [{**RAW[i % 6], "id": i} for i in range(13)]
    raw[6] = {**RAW[1], "id": 6, "prompt": "Now describe <video>", "video": "2.mp4"}
    (folder / "pairs.json").write_text(json.dumps(raw))
    (folder / "held_out.json").write_text(json.dumps(raw[1:4]))
    return [
        "--model_id", tiny_model, "--image_folder", clips, "--video_min_pixels", 784, "--image_min_pixels", 784,
        "--data_path", folder / "pairs.json", "--eval_path", folder / "held_out.json", "--eval_strategy", "steps",
        "--eval_steps", 3, "--per_device_eval_batch_size", 2, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--max_steps", 6, "--learning_rate", 1e-3, "--beta", 0.5, "--dpo_loss",
        "sigmoid", "sft", "--loss_weights", 1, 0.2, "--save_strategy", "no", "--video_cache", folder / "cache",
    ]  # fmt: skip


ADAPTER = ["--lora_enable", "True", "--freeze_llm", "True", "--lora_rank", 4, "--lora_namespan_exclude",
           "['lm_head', 'embed_tokens']"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(mixed, tmp_path_factory):
    """All weights trained beside a frozen copy."""
    folder = tmp_path_factory.mktemp("straight")
    run(*mixed, "--save_strategy", "steps", "--save_steps", 3, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def adapted(mixed, tmp_path_factory):
    """An adapter on the language model, tower and merger trained in full beside it."""
    folder = tmp_path_factory.mktemp("adapted")
    run(*mixed, *ADAPTER, "--output_dir", folder)
    return folder


def same_runs(ours, theirs, tolerance=1e-5):
    ours, theirs = metrics(ours), metrics(theirs)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            assert value == pytest.approx(expected[key], rel=tolerance, abs=tolerance), (row["step"], key)


def test_run(straight):
    rows, evals = train_rows(straight), [row for row in metrics(straight) if "eval_loss" in row]
    assert [row["samples"] for row in rows] == [4, 4, 4, 1, 4, 4] and [row["step"] for row in evals] == [3, 6]
    assert rows[0]["rewards/margins"] == 0 and abs(rows[-1]["rewards/margins"]) > 1e-3
    assert {f"eval_{name}" for name in ("loss", "samples", "tokens", *METRICS)} < set(evals[0])
    assert evals[0]["eval_samples"] == 3
    for row in rows:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
        assert 0 < row["chosen_tokens"] < row["supervised_tokens"]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_evaluation_equals_plain_models(request, mixed, clips, tiny_model, kind):
    """The last evaluation, from the saved model and the one before training, through plain transformers and peft."""
    folder = request.getfixturevalue("straight" if kind == "full" else "adapted")
    args, processor = arguments(tiny_model), AutoProcessor.from_pretrained(tiny_model)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    with torch.no_grad():
        ref_logps = plain_logps(base, PAIRS[1:4], clips, args, processor)
        if kind == "full":
            trained = AutoModelForImageTextToText.from_pretrained(folder)
        else:
            trained = peft.PeftModel.from_pretrained(base, folder)
            trained = trained.get_base_model()
        logps = plain_logps(trained, PAIRS[1:4], clips, args, processor)
    rewards = 0.5 * (logps - ref_logps)
    assert rewards.abs().min() > 1e-4
    expected = dict(zip(METRICS, [*rewards.mean(0).tolist(), 0, 0, *logps.mean(0).tolist()]))
    margins = rewards[:, 0] - rewards[:, 1]
    expected |= {"rewards/accuracies": (margins > 0).float().mean().item(), "rewards/margins": margins.mean().item()}
    row = metrics(folder)[-1]
    for name, value in expected.items():
        assert row[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    tokens = sum(len(processor.tokenizer.encode(text + "<|im_end|>")) for text in
                 ("A large clip of moving noise, it is.", "Yes, they do.", "A still.", "A clip"))  # fmt: skip
    nll = -logps[:, 0].sum().item() / tokens
    loss = torch.nn.functional.softplus(-margins).mean().item() + 0.2 * nll
    assert row["eval_loss"] == pytest.approx(loss, rel=1e-4)


def test_references_agree(mixed, straight, adapted, tiny_model, tmp_path):
    """The frozen copy or the adapter switched off, the same model by name, and numbers from a file."""
    named = ["--ref_model_id", tiny_model]
    file = ["--precompute_ref_log_probs", "True", "--ref_log_probs_dir", tmp_path / "kept"]
    for expected, own in ((straight, []), (adapted, ADAPTER)):
        for kind, flags in (("named", named), ("file", file)):
            run(*mixed, *own, *flags, "--output_dir", tmp_path / f"{kind}{len(own)}")
            same_runs(tmp_path / f"{kind}{len(own)}", expected)
    # the base model judged in both, so its numbers were computed once, for each of two data sets
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_an_adapter_that_goes_on_is_its_own_reference(mixed, adapted, tmp_path):
    """With --lora_weight_path the reference has that adapter, and what was trained beside it: rewards begin at 0."""
    flags = [*mixed, "--lora_enable", "True", "--freeze_llm", "True", "--lora_weight_path", adapted, "--max_steps", 2]
    run(*flags, "--output_dir", tmp_path / "copy")
    rows = train_rows(tmp_path / "copy")
    assert rows[0]["rewards/chosen"] == rows[0]["rewards/rejected"] == 0 and rows[1]["rewards/chosen"] != 0
    assert rows[0]["logps/chosen"] != train_rows(adapted)[0]["logps/chosen"]
    run(*flags, "--output_dir", tmp_path / "file", "--precompute_ref_log_probs", "True")
    same_runs(tmp_path / "file", tmp_path / "copy")


@pytest.mark.parametrize("own", [["--bf16", "True"], ["--pure_bf16", "True"], [*ADAPTER, "--bf16", "True"]])
def test_rewards_begin_at_0_in_low_precision(mixed, tmp_path, own):
    """The reference computes in the types of the trained model, so that they begin as equals, to the last bit."""
    run(*mixed, *own, "--eval_strategy", "no", "--max_steps", 1, "--output_dir", tmp_path)
    (row,) = metrics(tmp_path)
    assert row["rewards/chosen"] == row["rewards/rejected"] == 0 and row["grad_norm"] > 0


def test_trained_biases_are_not_the_reference_s(mixed, tmp_path):
    """peft does not restore the biases of --lora_bias when it switches the adapter off."""
    flags = [*mixed, *ADAPTER, "--lora_bias", "all", "--eval_strategy", "no", "--max_steps", 3]
    run(*flags, "--output_dir", tmp_path / "copy")
    run(*flags, "--output_dir", tmp_path / "file", "--precompute_ref_log_probs", "True")
    same_runs(tmp_path / "copy", tmp_path / "file")


@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_rows_times_accumulation(mixed, straight, tmp_path, shape):
    """1×4, 2×2 and 4×1 pairs × rows are the same training, in the uneven step too."""
    batch_size, rows = shape
    run(*mixed, "--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", rows,
        "--output_dir", tmp_path)  # fmt: skip
    same_runs(tmp_path, straight)


def test_resume_is_bit_equal(mixed, straight, tmp_path):
    shutil.copytree(straight / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(straight / "metrics.jsonl", tmp_path)
    run(*mixed, "--resume_from_checkpoint", "auto", "--output_dir", tmp_path)
    assert metrics(tmp_path) == metrics(straight)
    expected = load_file(straight / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "model.safetensors").items())
    with pytest.raises(mv.InputError, match="reference: .* then, .* now"):
        run(*mixed, "--resume_from_checkpoint", straight / "checkpoint-3", "--output_dir", tmp_path / "other",
            "--ref_model_id", straight)  # fmt: skip


def test_pairs_that_are_left_out(mixed, straight, tmp_path):
    """Too long ones are counted and weigh nothing: the step's loss is the mean over the other pairs."""
    run(*mixed, "--max_steps", 3, "--max_seq_length", 100, "--on_long_sample", "skip", "--output_dir", tmp_path)
    rows, before = train_rows(tmp_path), train_rows(straight)
    assert sum(row["skipped_samples"] for row in rows) > 0 and all(row["samples"] + row["skipped_samples"] == 4
                                                                   for row in rows)  # fmt: skip
    kept = [row["samples"] for row in rows]
    assert rows[0]["rewards/margins"] == 0 and 0 < min(kept) < 4
    assert rows[0]["logps/chosen"] != before[0]["logps/chosen"] or rows[0]["samples"] == 4


# ---------------------------------------------------------------------------------------------- precomputed references


@pytest.fixture
def precomputing(mixed, tmp_path):
    folder = tmp_path / "kept"
    return [*mixed, "--eval_strategy", "no", "--max_steps", 1, "--precompute_ref_log_probs", "True",
            "--ref_log_probs_dir", folder], folder  # fmt: skip


def count_rows(monkeypatch, fail_after=None):
    """Watches train_dpo.reference_logps: a list that grows by each row that a model was asked for."""
    asked, original = [], train_dpo.reference_logps

    def watched(reference, row, indices, samples):
        if not isinstance(reference, dict):
            if len(asked) == fail_after:
                raise KeyboardInterrupt
            asked.append(indices)
        return original(reference, row, indices, samples)

    monkeypatch.setattr(train_dpo, "reference_logps", watched)
    return asked


def test_a_broken_computation_goes_on(precomputing, straight, tmp_path, monkeypatch):
    """Stopped after two rows, it asks for the others only; a second run asks for none and loads one model."""
    flags, folder = precomputing
    monkeypatch.setattr(train_dpo, "SHARD_SECONDS", 0)
    flags = flags[: flags.index("--eval_path")] + flags[flags.index("--eval_path") + 2 :]
    with monkeypatch.context() as patch:
        asked = count_rows(patch, fail_after=2)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--output_dir", tmp_path / "a")
    (parts,) = folder.iterdir()
    assert parts.suffix == ".parts" and len(list(parts.iterdir())) == 2 and asked == [[0, 1], [2, 3]]
    with monkeypatch.context() as patch:
        asked = count_rows(patch)
        run(*flags, "--output_dir", tmp_path / "a")
    assert asked == [[4, 5], [6, 7], [8, 9], [10, 11], [12]]
    (file,) = folder.iterdir()
    assert re.fullmatch(r"ref_log_probs-pairs-[0-9a-f]{16}\.safetensors", file.name)
    with monkeypatch.context() as patch:
        asked, loaded, load_model = count_rows(patch), [], mv.load_model
        patch.setattr(mv, "load_model", lambda *args: loaded.append(1) or load_model(*args))
        run(*flags, "--output_dir", tmp_path / "b")
    assert asked == [] and loaded == [1]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert train_rows(tmp_path / "a")[0]["loss"] == pytest.approx(train_rows(straight)[0]["loss"], rel=1e-6)


def test_two_runs_share_their_work(precomputing, tmp_path, monkeypatch):
    """One of two runs on the same data is done first, and takes the parts away: the other takes its numbers."""
    flags, folder = precomputing
    run(*flags, "--output_dir", tmp_path / "a")
    monkeypatch.setattr(train_dpo, "find_table", lambda *args: None)
    monkeypatch.setattr(train_dpo, "SHARD_SECONDS", 0)
    write_tensors, written = train_dpo.write_tensors, []

    def taken(path, *args):
        write_tensors(path, *args)
        written.append(path.name)
        if len(written) in (3, 9):  # amid the first data set, and after the last part of the second
            shutil.rmtree(path.parent)

    monkeypatch.setattr(train_dpo, "write_tensors", taken)
    run(*flags, "--output_dir", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and len(list(folder.iterdir())) == 2


def test_another_setting_is_another_file(precomputing, tmp_path, capsys):
    flags, folder = precomputing
    run(*flags, "--output_dir", tmp_path / "a")
    (first, second) = sorted(folder.iterdir())
    capsys.readouterr()
    run(*flags, "--output_dir", tmp_path / "b", "--fps", 1)
    said = capsys.readouterr().err
    assert f"{second} is not for this run; these differ:\n  • fps: 2.0 there, 1.0 here\n" in said
    assert len(list(folder.iterdir())) == 4
    for file in (first, second):
        file.write_bytes(file.read_bytes()[:50])
    shutil.copy(first, folder / "ref_log_probs-pairs-0.safetensors")
    shutil.copy(first, folder / "ref_log_probs-held_out-0.safetensors")
    run(*flags, "--output_dir", tmp_path / "c")
    assert f"{second} is damaged" in capsys.readouterr().err
    assert metrics(tmp_path / "a") == metrics(tmp_path / "c")


def test_numbers_of_other_weights_are_not_reused(precomputing, tiny_model, tmp_path, capsys):
    """The reference's numbers are found again for the same weights only, and a run says which it uses."""
    flags, folder = precomputing
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    run(*flags, "--model_id", model, "--output_dir", tmp_path / "a")
    run(*flags, "--model_id", model, "--output_dir", tmp_path / "b")
    said = capsys.readouterr().err
    assert re.search(r"log-probabilities: 0 pairs reused, \d+ to compute for", said)
    assert re.search(r"log-probabilities: \d+ pairs reused from .*, 0 to compute", said)
    os.utime(model / "model.safetensors")
    run(*flags, "--model_id", model, "--output_dir", tmp_path / "c")
    said = capsys.readouterr().err
    assert re.search(r"is not for this run; these differ:\n  • weights: .* there, .* here\n", said)
    assert (
        re.search(r"log-probabilities: 0 pairs reused, \d+ to compute for", said) and len(list(folder.iterdir())) == 4
    )
    with safe_open(next(folder.iterdir()), "pt") as opened:
        assert json.loads(opened.metadata()["settings"])["position rule"] == mv.POSITION_RULE


def test_a_replaced_video_is_noticed(precomputing, clips, tmp_path):
    """Numbers of other frames are refused; under --on_bad_video a file that has gone bad costs its pairs only."""
    flags, _ = precomputing
    own = tmp_path / "clips"
    shutil.copytree(clips, own)
    flags = [*flags, "--image_folder", own, "--max_steps", 3, "--video_cache", "none"]
    run(*flags, "--output_dir", tmp_path / "a")
    shutil.copy(own / "1.mp4", tmp_path / "1.mp4")
    write_clip(own / "1.mp4", 56, 56, 9, rate=25, seed=77)
    with pytest.raises(mv.InputError, match=r"record \d+: its tokens, positions or frames differ"):
        run(*flags, "--output_dir", tmp_path / "b")
    (own / "1.mp4").write_bytes(b"no video")
    run(*flags, "--output_dir", tmp_path / "c", "--on_bad_video", "drop_video", "--max_bad_ratio", 1)
    ours, theirs = train_rows(tmp_path / "c"), train_rows(tmp_path / "a")
    assert sum(row["skipped_samples"] for row in ours) > 0 and all(row["loss"] is not None for row in ours)
    assert all(row["samples"] + row["skipped_samples"] == full["samples"] for row, full in zip(ours, theirs))


def test_too_many_bad_videos_end_the_computation(precomputing, clips, tmp_path, monkeypatch):
    """--max_bad_ratio counts while the table is made, not only in the training after it."""
    flags, folder = precomputing
    own = tmp_path / "clips"
    shutil.copytree(clips, own)
    for i in range(3):
        (own / f"{i}.mp4").write_bytes(b"no video")
    monkeypatch.setattr(mv, "MIN_VIDEOS", 20)
    flags = [*flags, "--image_folder", own, "--video_cache", "none", "--on_bad_video", "drop_video"]
    with monkeypatch.context() as patch:
        asked = count_rows(patch)
        with pytest.raises(mv.InputError, match="videos and images so far could not be read: more than --max_bad_"):
            run(*flags, "--max_bad_ratio", 0.02, "--output_dir", tmp_path / "a")
    assert 0 < len(asked) < 7 and not list(folder.glob("*.safetensors"))
    run(*flags, "--max_bad_ratio", 1, "--output_dir", tmp_path / "b")


def test_a_reference_of_another_kind_is_refused(mixed, tiny_qwen2_vl, tmp_path):
    with pytest.raises(mv.InputError, match="differs in model_type"):
        run(*mixed, "--ref_model_id", tiny_qwen2_vl, "--output_dir", tmp_path)


# --------------------------------------------------------------------------------------------------- several processes


# train_dpo.py twice in one process, the second time for a step in bf16; notes the types that its engines hold.
TWICE = """
import os, sys
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
sys.path.insert(0, os.getcwd())
import multivideo as mv
import train_dpo

class Noted(mv.Engine):
    def __init__(self, accelerator, model, args, frozen=False):
        super().__init__(accelerator, model, args, frozen)
        types = {str(p.dtype) for weight in self.raw_model.parameters() for p in (weight, weight.ds_tensor)}
        with open(f"{os.path.dirname(__file__)}/types-{accelerator.process_index}", "a") as file:
            print("bf16" if args.bf16 else "fp32", "frozen" if frozen else "trained", *sorted(types), file=file)

mv.Engine = Noted
end, Accelerator.end_training = Accelerator.end_training, lambda self: None
train_dpo.main()
for shared in (AcceleratorState, GradientState, PartialState):
    shared._reset_state()
Accelerator.end_training = end
sys.argv += ["--bf16", "True", "--max_steps", "1", "--eval_strategy", "no", "--output_dir", sys.argv[-1] + "-bf16"]
mv.run(train_dpo.main)
"""


@pytest.mark.parametrize("kind", ["adapter", "file"])
def test_two_processes_under_zero3(runner, mixed, straight, adapted, tmp_path, kind):
    """Split weights: the adapter switched off in each forward; a split frozen copy that fills the file, two by two."""
    own = ADAPTER if kind == "adapter" else ["--precompute_ref_log_probs", "True"]
    (tmp_path / "train_dpo_twice.py").write_text(TWICE)
    done = runner.launch(
        "--config_file", "accelerate_configs/zero3.yaml", "--num_processes", 2,
        "train_dpo.py" if kind == "adapter" else tmp_path / "train_dpo_twice.py", *mixed, *own,
        "--gradient_accumulation_steps", 1, "--per_device_eval_batch_size", 1, "--dataloader_num_workers", 0,
        "--output_dir", tmp_path, log=tmp_path / "rank",
    )  # fmt: skip
    assert "4 per step = 2 samples × 1 rows × 2 processes" in done.said[0]
    same_runs(tmp_path, adapted if kind == "adapter" else straight, 1e-4)
    assert len(list(tmp_path.glob("ref_log_probs-*.safetensors"))) == (0 if kind == "adapter" else 2)
    if kind == "file":  # both models were loaded in the type that the run asked for
        for rank in (0, 1):
            assert (tmp_path / f"types-{rank}").read_text().splitlines() == [
                "fp32 frozen torch.float32", "fp32 trained torch.float32", "bf16 frozen torch.bfloat16",
                "bf16 trained torch.bfloat16",
            ]  # fmt: skip
