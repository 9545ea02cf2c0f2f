"""Qwen3-VL and Qwen3.5 against plain HF models and processors, sample by sample; times and learned text by hand.

float64 is used where float32 would hide errors: transformers' own gated delta rule rounds some gradients by up to 1 %.
"""

import contextlib
import importlib
import json
import re
from fractions import Fraction

import multivideo as mv

import numpy as np
import pytest
import qwen_vl_utils
import torch
from make_demo import CHAT_TEMPLATES, build_processor
from PIL import Image
from reference import hf_inputs, hf_loss, real_template, write_clip
from safetensors.torch import load_file
from test_grpo import OneProcess, uniform
from test_packing import compile_without_inductor
from test_reading import TIMES, write_timed
from test_train import in_process
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_grpo as grpo
from train_sft import normalize_record

FAMILIES = ["qwen3_vl", "qwen3_5"]


class Double:
    """torch as a modeling file sees it: float64 where it asks for float32."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def float64(*models):
    """These models, and what transformers and this project cast to float32 in them, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for family in FAMILIES:
            modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            patch.setattr(modeling, "torch", Double())
        for model in models:
            model.double()
        yield


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Clips and images whose sides are multiples of 32: no resize, so pixels are equal to the last bit."""
    folder = tmp_path_factory.mktemp("media")
    for name, width, height, frames, rate in [
        ("a", 64, 64, 50, 25), ("b", 128, 64, 40, 10), ("c", 64, 128, 90, 30),
        ("d", 32, 32, 598, Fraction(30000, 1001)), ("e", 64, 64, 5, 25),
    ]:  # fmt: skip
        write_clip(folder / f"{name}.mp4", width, height, frames, rate=rate, seed=ord(name))
    write_timed(folder / "dropped.mp4", TIMES["dropped"])
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 255, (64, 96 - 32 * (i == 1), 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return str(folder)


def talk(*turns, **record):
    roles = ["human", "gpt"] * len(turns)
    turns = [{"from": role, "value": text} for role, text in zip(roles, turns)]
    return normalize_record({**record, "conversations": turns}, "record")


RECORDS = [  # three videos, an image and a video, two images, text, videos in two turns
    talk("<video>\nand <video>\nthen <video> differ?", "They do.", video=["a.mp4", "b.mp4", "c.mp4"]),
    talk("<image>\nor\n<video>\n?", "The second is red.", image="0.png", video="b.mp4", system="You watch."),
    talk("<image><image>\nSame?", "Yes.", image=["0.png", "1.png"]),
    talk("Who are you?", "A model, I think."),
    talk("<video>\nLook.", "I see.", "<video>\nAnd now?", "Blue.", video=["e.mp4", "c.mp4"]),
]


def arguments(path, **kwargs):
    kwargs = {"video_min_pixels": 1024, "image_min_pixels": 1024, **kwargs}
    return mv.TrainingArguments(model_id=path, **kwargs)


class Family:
    """A tiny model of one family: its folder, processor, encoder and plain HF model."""

    def __init__(self, path):
        self.path, self.args = path, arguments(path)
        self.processor, self.encoder = AutoProcessor.from_pretrained(path), mv.Encoder(path, self.args)

    def plain(self):
        return AutoModelForImageTextToText.from_pretrained(self.path, attn_implementation="sdpa", dtype=torch.float32)

    def packed(self, **kwargs):
        return mv.load_model(arguments(self.path, **kwargs), "cpu").train()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return Family(request.getfixturevalue(f"tiny_{request.param}"))


def logps_of(model, row):
    """Log-probabilities [S] of a packed row's targets, in the precision of the model."""
    inputs, targets, _ = row
    inputs = inputs | {"pixel_values_videos": inputs["pixel_values_videos"].to(next(model.parameters()).dtype)}
    return model(**inputs).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]


def gradient_gap(ours, theirs):
    """The largest distance of a parameter's two gradients, relative to theirs or a millionth of all, and its name."""
    theirs, gaps = dict(theirs.named_parameters()), {}
    total = torch.stack([p.grad.norm() for p in theirs.values()]).norm()
    for name, parameter in ours.named_parameters():
        reference = theirs[name].grad
        gaps[name] = ((parameter.grad - reference).norm() / reference.norm().clamp(min=1e-6 * total)).item()
    assert gaps.keys() == theirs.keys()
    return max((gap, name) for name, gap in gaps.items())


# ------------------------------------------------------------------------------------------------ tokens and pixels


def test_families():
    assert mv.FAMILIES == {"qwen2_vl": None, "qwen2_5_vl": "positions", "qwen3_vl": "text", "qwen3_5": "text"}


def test_parts(family):
    """What the freezing and learning-rate flags call vision, merger and llm."""
    found = {}
    for name, _ in family.packed().named_parameters():
        place = re.match(r"(?:model\.)?(visual\.)?(\w+)", name).group(0).removeprefix("model.")
        found.setdefault(mv.part_of(name), set()).add(place)
    deepstack = {"visual.deepstack_merger_list"} if "qwen3_vl" in family.path else set()
    assert found == {
        "vision": {"visual.patch_embed", "visual.pos_embed", "visual.blocks"},
        "merger": {"visual.merger"} | deepstack,
        "llm": {"language_model", "lm_head"},
    }


def test_samples_equal_processor(family, media):
    """Token ids, labels, grids, pixels and positions of each record are those of the HF processor and model."""
    plain, encoder = family.plain(), family.encoder
    image_pad, video_pad = plain.config.image_token_id, plain.config.video_token_id
    for record in RECORDS:
        sample = encoder(record, media)
        inputs, labels = hf_inputs(record, media, family.args, family.processor)
        ids = inputs["input_ids"][0]
        assert torch.where(ids == image_pad, video_pad, ids).tolist() == sample["input_ids"].tolist()
        assert labels.tolist() == sample["labels"].tolist()
        places = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        if places:
            types = inputs["mm_token_type_ids"]
            positions, _ = plain.model.get_rope_index(inputs["input_ids"], mm_token_type_ids=types, **places)
            assert positions[:, 0].tolist() == sample["position_ids"][1:].tolist()
        else:
            assert (sample["position_ids"] == np.arange(len(ids))).all()
        assert sample["position_ids"][0].tolist() == list(range(len(ids)))
        grids = {kind: iter(inputs.get(f"{kind}_grid_thw", [])) for kind in ("image", "video")}
        pixels = {"image": inputs.get("pixel_values"), "video": inputs.get("pixel_values_videos")}
        parts = [part["type"] for turn in record["messages"] for part in turn["content"] if part["type"] != "text"]
        expected = []
        for kind, ours in zip(parts, sample["video_grid_thw"].tolist(), strict=True):
            assert next(grids[kind]).tolist() == ours
            size = int(np.prod(ours))
            expected.append(pixels[kind][:size])
            pixels[kind] = pixels[kind][size:]
        if parts:
            row, _, _ = mv.pack([sample], encoder, "cpu")
            assert torch.equal(row["pixel_values_videos"], torch.cat(expected))


TIMES_BY_HAND = {
    # 25 per second, 2 s: frames 0, 16, 33, 49 at 0, 0.64, 1.32, 1.96 s
    "a.mp4": ({}, [0.32, 1.64]),
    # frames 13, 21, 29, 37, from 0.5 s to 1.5 s
    "a.mp4 from 0.5": ({"start": 0.5, "end": 1.5}, [0.68, 1.32]),
    # 10 per second, 4 s: frames 0, 6, 11, 17, 22, 28, 33, 39
    "b.mp4": ({}, [0.3, 1.4, 2.5, 3.6]),
    "b.mp4 at 0.5": ({"fps": 0.5, "min_frames": 2}, [1.95]),  # frames 0 and 39
    # 30 per second, 3 s: frames 0, 18, 36, 53, 71, 89
    "c.mp4": ({}, [0.3, 89 / 60, 160 / 60]),
    # 29.97 per second: frames 0 and 597; at 30 it would be 9.95 - 5e-16
    "d.mp4": ({"nframes": 2}, [298.5 * 1.001 / 30]),
    # 25 per second with a gap of 12 s; moments 0, 2.26, 4.53, …, 13.58, 15.84: frames of 0, 1.96 (six times), 15.84 s
    "dropped.mp4": ({"nframes": 8}, [0.98, 1.96, 1.96, 8.9]),
    # moments 1, 5.67, 10.33, 15: frames of 1, 1.96, 1.96 and 15 s
    "dropped.mp4 from 1": ({"nframes": 4, "start": 1, "end": 15}, [1.48, 8.48]),
    # images taken every two seconds; twice a second
    "frames at 0.5": ({"fps": 0.5, "video": [[f"{i}.png" for i in (0, 2, 3, 4)]]}, [1.0, 5.0]),
    "frames": ({"video": [[f"{i}.png" for i in (0, 2, 3, 4)]]}, [0.25, 1.25]),
    # the third image and its copy, which qwen_vl_utils adds: at 2 s and 3 s
    "three frames": ({"fps": 1, "video": [[f"{i}.png" for i in (0, 2, 3)]]}, [0.5, 2.5]),
}


def written_times(encoder, sample):
    text = encoder.tokenizer.decode(sample["input_ids"])
    times = re.findall(r"<([\d.]+) seconds><\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>", text)
    assert len(times) == text.count("seconds>") == text.count("<|vision_start|><|video_pad|>")
    return times


@pytest.mark.parametrize("name", TIMES_BY_HAND)
def test_times(family, media, tmp_path, name):
    """Before each pair of frames stands the mean of their times in the file, from its time stamps or its rate."""
    options, expected = TIMES_BY_HAND[name]
    record = talk("<video>\nWhen?", "Then.", **{"video": name.split()[0], **options})
    args = arguments(family.path, video_cache=str(tmp_path))
    encoder = mv.Encoder(family.path, args)
    for _ in range(2):  # decoded, then from the cache
        sample = encoder(record, media)
        assert written_times(encoder, sample) == [f"{seconds:.1f}" for seconds in expected]
        assert sample["video_grid_thw"][:, 0].tolist() == [len(expected)]


def test_times_of_fewer_frames(family, media):
    """Frames that --max_video_tokens leaves out shift no other frame's time."""
    video = [[f"{i}.png" for i in (0, 2, 3, 4, 5, 6, 7, 0)]]
    for name, options, expected in [
        ("frames", {"video": video, "fps": 1}, [1.0, 6.0]),  # of 8 images, 0, 2, 5 and 7
        ("video", {"video": "b.mp4"}, [0.65, 3.25]),  # of 40 frames at 10 per second, 0, 13, 26 and 39
    ]:
        encoder = mv.Encoder(family.path, arguments(family.path))
        record = talk("<video>\nWhen?", "Then.", **options)
        for budget in range(1, 60):  # the budget may count the times' own tokens
            encoder.args.max_video_tokens = budget
            with contextlib.suppress(ValueError):
                sample = encoder(record, media)
                if sample["video_grid_thw"][0, 0] == 2:
                    assert written_times(encoder, sample) == [f"{seconds:.1f}" for seconds in expected], name
                    break
        else:
            pytest.fail(f"no budget left four frames of the {name}")


def test_pixel_bounds(family, media):
    """Defaults are tokens of 32² (older families: 28²) pixels, given values are pixels; sizes are the reference's."""
    assert family.encoder.factor == 32
    for factor, image, video in [
        (28, (3136, 12845056), (100352, 602112)), (32, (4096, 16777216), (131072, 786432)),
    ]:  # fmt: skip
        args = mv.TrainingArguments()
        assert (mv.pixel_bounds(args, "image", factor), mv.pixel_bounds(args, "video", factor)) == (image, video)
        args = mv.TrainingArguments(video_max_pixels=50000, image_min_pixels=5000, image_max_pixels=6000)
        assert mv.pixel_bounds(args, "image", factor) == (5000, 6000)
        assert mv.pixel_bounds(args, "video", factor) == (50000, 50000)
        args = mv.TrainingArguments(video_min_pixels=900000)
        assert mv.pixel_bounds(args, "video", factor) == (900000, 900000)
    for flags in ({}, {"video_min_pixels": 4000, "video_max_pixels": 20000, "image_min_pixels": 900},
                  {"video_resized_width": 100, "video_resized_height": 60}, {"video_max_pixels": 9000}):  # fmt: skip
        encoder = mv.Encoder(family.path, mv.TrainingArguments(model_id=family.path, **flags))
        for name in ("b.mp4", "dropped.mp4", "c.mp4", "1.png"):
            kind = "image" if name.endswith("png") else "video"
            element = {kind: f"{media}/{name}"}
            least, most = mv.pixel_bounds(encoder.args, kind, 32)
            if any(flag.startswith(kind) and flag.endswith("pixels") for flag in flags):
                element |= {"min_pixels": least, "max_pixels": most}
            if kind == "video" and "video_resized_width" in flags:
                element |= {"resized_width": 100, "resized_height": 60}
            sample = encoder(talk(f"<{kind}>\n?", "A.", **{kind: name}), media)
            if kind == "image":
                width, height = qwen_vl_utils.vision_process.fetch_image(element, image_patch_size=16).size
            else:
                height, width = qwen_vl_utils.vision_process.fetch_video(element, image_patch_size=16).shape[2:]
            assert (sample["video_grid_thw"][0, 1:] * 16).tolist() == [height, width], (flags, name)


# -------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("precision, checkpointing", [("float64", False), ("float64", True), ("float32", False)])
def test_packed_row_equals_plain_model(family, media, precision, checkpointing):
    """Loss and all gradients of one row of mixed samples are those of plain forwards, one per sample."""
    plain, model = family.plain(), family.packed(gradient_checkpointing=checkpointing)
    row = mv.pack([family.encoder(record, media) for record in RECORDS], family.encoder, "cpu")
    references = [hf_inputs(record, media, family.args, family.processor) for record in RECORDS]
    with float64(plain, model) if precision == "float64" else contextlib.nullcontext():
        losses = torch.stack([hf_loss(plain, *reference) for reference in references])
        losses.sum().backward()
        logps = logps_of(model, row)
        ours = -torch.zeros_like(losses).index_add(0, row[2], logps)
        (-logps.sum()).backward()
    torch.testing.assert_close(ours, losses, rtol=1e-9 if precision == "float64" else 1e-5, atol=0)
    gap, name = gradient_gap(model, plain)
    assert gap < (1e-9 if precision == "float64" else 5e-5), name


ANSWERS = [
    ["The colour.", "Nothing at all, I think.", "x"],
    ["So.", "B"],
    None,
    ["Hi!", "Good morning to you, too.", "C"],
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_share_their_prompt(family, media, checkpointing):
    """Three prompts with answers and a record without in one row: each answer as if alone, gradients too."""
    prompts = [
        RECORDS[0],
        talk("<image> or <video>?", "Fine.", "Why?", "-", image="0.png", video="b.mp4"),
        RECORDS[2],
        RECORDS[3],
    ]
    samples, references, counts = [], [], []
    for record, answers in zip(prompts, ANSWERS):
        if answers is None:
            samples.append(family.encoder(record, media))
            references.append(hf_inputs(record, media, family.args, family.processor))
            counts.append(1)
            continue
        prompt = {**record, "messages": record["messages"][:-1]}
        turns = [[{"role": "assistant", "content": [mv._part("text", text=text)]}] for text in answers]
        samples.append(family.encoder({**prompt, "completions": turns}, media))
        begin = hf_inputs(prompt, media, family.args, family.processor, add_generation_prompt=True)
        for turn in turns:
            whole = {**record, "messages": prompt["messages"] + turn}
            inputs, labels = hf_inputs(whole, media, family.args, family.processor)
            labels[: begin[0]["input_ids"].shape[1]] = -100
            references.append((inputs, labels))
        counts.append(len(answers))
    row = mv.pack(samples, family.encoder, "cpu")
    assert len(row[0]["video_grid_thw"]) == 3 + 2 + 2  # no clip twice
    plain, model = family.plain(), family.packed(gradient_checkpointing=checkpointing)
    weights = torch.linspace(-1, 2, sum(counts), dtype=torch.float64)
    with float64(plain, model):
        expected = -torch.stack([hf_loss(plain, *reference) for reference in references])
        (weights * expected).sum().backward()
        logps = torch.zeros_like(expected).index_add(0, row[2], logps_of(model, row))
        (weights * logps).sum().backward()
    torch.testing.assert_close(logps, expected, rtol=1e-9, atol=0)
    gap, name = gradient_gap(model, plain)
    assert gap < 1e-9, name


def test_rows_without_videos(family, media):
    """One call of the tower per row: of images alone; in a row of text or of nothing, of one token of no effect."""
    model, plain, calls = family.packed(), family.plain(), []
    model.model.visual.register_forward_hook(lambda module, given, output: calls.append(given[0].shape[0]))
    for records, patches in (([RECORDS[2]], 24 + 16), ([RECORDS[3]], 4), ([], 4)):
        model.zero_grad()
        calls.clear()
        row = mv.pack([family.encoder(record, media) for record in records], family.encoder, "cpu")
        logps = logps_of(model, row)
        logps.sum().backward()
        assert calls == [patches]
        expected = [hf_loss(plain, *hf_inputs(r, media, family.args, family.processor)).item() for r in records]
        assert -logps.sum().item() == pytest.approx(sum(expected), rel=1e-5)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            seen = bool(parameter.grad.any())
            assert seen is bool(records and (patches != 4 or "visual." not in name)) or "embed_tokens" in name, name


def test_compiled_blocks(tiny_qwen3_5, media, monkeypatch):
    """--torch_compile leaves recurrent layers out, which do not compile: eager's losses and gradients."""
    compile_without_inductor(monkeypatch)
    family = Family(tiny_qwen3_5)
    samples = [family.encoder(record, media) for record in RECORDS]
    outcomes = {}
    for compiled in (False, True):
        model = family.packed(torch_compile=compiled, gradient_checkpointing=True)
        mv.use_packed_attention(model, "varlen")
        for i, row in enumerate(([1, 3], [3, 2, 1])):
            model.zero_grad()
            loss = -logps_of(model, mv.pack([samples[k] for k in row], family.encoder, "cpu")).sum()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            outcomes[compiled, i] = loss.item(), norm.item()
    for i in range(2):
        assert outcomes[True, i] == pytest.approx(outcomes[False, i], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1


# --------------------------------------------------------------------------------------------------- learned text

E, T, R = "<think>\n\n</think>\n\n", "<think>\n", "<think>\nr\n</think>\n\n"
THINKING, SILENT = {"enable_thinking": True}, {"enable_thinking": False}
KEPT = {"enable_thinking": True, "preserve_thinking": True}
# (templates, options, what the generation prompt opens an answer with, and what is learned, in [], of: an answer; an
# answer with the thought "r"; the same followed by a second question and an answer without a thought)
LEARNED = [
    (["qwen3_vl"], {}, "", ["[A1]"], [f"[{R}A1]"], [f"[{R}A1]", "[A2]"]),
    (["qwen3_5_nothink"], {}, E, [f"{E}[A1]"], [f"[{R}A1]"], ["[A1]", f"{E}[A2]"]),
    (["qwen3_5_nothink", "qwen3_5_think", "qwen3_6"], SILENT, E, [f"{E}[A1]"], [f"[{R}A1]"], ["[A1]", f"{E}[A2]"]),
    (["qwen3_5_think", "qwen3_6"], {}, T, [f"{T}[\n</think>\n\nA1]"], [f"{T}[r\n</think>\n\nA1]"],
     ["[A1]", f"{T}[\n</think>\n\nA2]"]),
    (["qwen3_5_nothink", "qwen3_5_think", "qwen3_6"], THINKING, T, [f"{T}[\n</think>\n\nA1]"],
     [f"{T}[r\n</think>\n\nA1]"], ["[A1]", f"{T}[\n</think>\n\nA2]"]),
    (["qwen3_6", "qwen3_8"], KEPT, T, [f"{T}[\n</think>\n\nA1]"], [f"{T}[r\n</think>\n\nA1]"],
     [f"{T}[r\n</think>\n\nA1]", f"{T}[\n</think>\n\nA2]"]),
    (["qwen3_8"], {}, T, [f"{T}[\n</think>\n\nA1]"], [f"{T}[r\n</think>\n\nA1]"],
     [f"{T}[r\n</think>\n\nA1]", f"{T}[\n</think>\n\nA2]"]),
    (["qwen3_8"], SILENT, E, [f"{E}[A1]"], [f"[{R}A1]"], [f"[{R}A1]", f"{E}[A2]"]),
    (["qwen3_8"], {"preserve_thinking": False}, T, [f"{T}[\n</think>\n\nA1]"], [f"{T}[r\n</think>\n\nA1]"],
     ["[A1]", f"{T}[\n</think>\n\nA2]"]),
]  # fmt: skip
LEARNED = [(name, options, opened, learned) for names, options, opened, *learned in LEARNED for name in names]


def learned_turns(encoder, sample):
    """The assistant turns of a sample, what is learned in [], their ends too, which are not written."""
    text, on = "", False
    for token, label in zip(sample["input_ids"], sample["labels"]):
        assert label in (-100, token)
        text += "[" if label != -100 and not on else "]" if label == -100 and on else ""
        text, on = text + encoder.tokenizer.decode([token]), label != -100
    pattern = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\]?)\n", re.DOTALL)
    assert "[" not in pattern.sub("", text)  # nothing else is learned
    return [turn.replace("<|im_end|>]", "]") for turn in pattern.findall(text)]


@pytest.mark.parametrize("name, options, opened, learned", LEARNED)
def test_what_is_learned(tiny_qwen3_5, media, name, options, opened, learned):
    """Answers, thoughts that are not given in generation, and ends of turns; thoughts in the text or in a field."""
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5))
    encoder.chat_template, encoder.template_kwargs = real_template(name), options
    assert encoder.generation_prefix() == opened
    clip = {"type": "video", "video": "e.mp4"}
    user = {"role": "user", "content": [clip, {"type": "text", "text": "Q1"}]}
    plain = {"role": "assistant", "content": "A1"}
    in_text = {"role": "assistant", "content": f"{R}A1"}
    more = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    thoughts = [in_text]
    for field in ("reasoning", "reasoning_content", "thinking"):
        if name == "qwen3_vl":  # whose template would leave it out
            record = normalize_record({"messages": [user, {**plain, field: "r"}]}, "record")
            with pytest.raises(ValueError, match="'reasoning'.*has no place for it"):
                mv.check_rendered(record, encoder.template_reads(), encoder.chat_template)
        else:
            thoughts.append({**plain, field: "r"})
    for answer, kind in [(plain, 0), *((thought, 1) for thought in thoughts)]:
        sample = encoder(normalize_record({"messages": [user, answer]}, "record"), media)
        assert learned_turns(encoder, sample) == learned[kind], answer
    for thought in thoughts:
        sample = encoder(normalize_record({"messages": [user, thought, *more]}, "record"), media)
        assert learned_turns(encoder, sample) == learned[2], thought

    # TRL's training templates learn the prefix of the generation prompt and the newline after the turn as well, and
    # never leave out a thought.
    for answer, expected in ((plain, learned[0]), ({**plain, "reasoning_content": "r"}, learned[1])):
        if name == "qwen3_vl" and answer is not plain:
            answer = in_text
        encoded = encoder.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Q1"}, answer], chat_template=real_template(f"{name}_training"),
            return_dict=True, return_assistant_tokens_mask=True, **options,
        )  # fmt: skip
        trl = [token for token, on in zip(encoded["input_ids"], encoded["assistant_masks"]) if on]
        assert encoder.tokenizer.decode(trl) == expected[0].replace("[", "").rstrip("]") + "<|im_end|>\n"


def test_clips_in_answers(family, media):
    """Qwen3.5's template writes them, and neither their times nor their tokens are learned; Qwen3-VL's does not."""
    clip = {"type": "video", "video": "e.mp4"}
    parts = [{"type": "text", "text": "Here:"}, clip, {"type": "text", "text": "OK"}]
    turns = [{"role": "user", "content": "Show it."}, {"role": "assistant", "content": parts}]
    record = normalize_record({"messages": turns}, "record")
    if "qwen3_vl" in family.path:
        with pytest.raises(ValueError, match="leaves out videos or images in assistant turns"):
            family.encoder(record, media)
        return
    sample = family.encoder(record, media)
    (answer,) = learned_turns(family.encoder, sample)
    assert re.findall(r"\[(.*?)\]", answer) == ["Here:", "OK"]
    inputs, _ = hf_inputs(record, media, family.args, family.processor)
    assert sample["input_ids"].tolist() == inputs["input_ids"][0].tolist()


def test_template_options(tiny_qwen3_5, media):
    """--chat_template_kwargs for all records; a record's own override them."""
    args = arguments(tiny_qwen3_5, chat_template_kwargs='{"enable_thinking": true}')
    encoder = mv.Encoder(tiny_qwen3_5, args)
    assert encoder.template_kwargs == {"enable_thinking": True} and encoder.generation_prefix() == T
    record = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A1"}]}
    for own, expected in (({}, [f"{T}[\n</think>\n\nA1]"]), ({"enable_thinking": False}, [f"{E}[A1]"])):
        sample = encoder(normalize_record({**record, "chat_template_kwargs": own}, "record"), media)
        assert learned_turns(encoder, sample) == expected


TOOL = {"type": "function", "function": {"name": "crop", "description": "Look closer.", "parameters": {
    "type": "object", "properties": {"second": {"type": "number"}}}}}  # fmt: skip
CALL = {"type": "function", "function": {"name": "crop", "arguments": {"second": 3}}}
CALL_TEXTS = {
    "qwen3_vl": '<tool_call>\n{"name": "crop", "arguments": {"second": 3}}\n</tool_call>',
    "qwen3_5": "<tool_call>\n<function=crop>\n<parameter=second>\n3\n</parameter>\n</function>\n</tool_call>",
}


def test_tools(family, media):
    """Definitions, calls and results are rendered as the processor does it; calls are learned, results are not."""
    turns = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
             {"role": "tool", "content": "A dog."}, {"role": "assistant", "content": "At 3 s."}]  # fmt: skip
    sample = family.encoder(normalize_record({"messages": turns, "tools": [TOOL]}, "record"), media)
    expected = family.processor.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert family.encoder.tokenizer.decode(sample["input_ids"]) == expected
    call, answer = learned_turns(family.encoder, sample)
    text = CALL_TEXTS["qwen3_5" if "qwen3_5" in family.path else "qwen3_vl"]
    assert (call, answer) == ((f"{E}[{text}]", f"{E}[At 3 s.]") if "qwen3_5" in family.path
                              else (f"[{text}]", "[At 3 s.]"))  # fmt: skip


@pytest.mark.parametrize("name, real", [("qwen3_vl", "qwen3_vl"), ("qwen3_5", "qwen3_5_nothink")])
def test_demo_template(name, real):
    """The demo's short templates write what the models' own write."""
    tokenizer = build_processor(name).tokenizer
    video, image = {"type": "video"}, {"type": "image"}

    def turn(role, *parts, **fields):
        return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
                **fields}  # fmt: skip

    user, answer = turn("user", video, "\n", image, "Q "), turn("assistant", "A", reasoning_content=" r\n")
    for turns in ([user], [user, answer], [turn("system", " S"), user, answer, turn("user", "Q2"), answer],
                  [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]):  # fmt: skip
        for options in ({}, SILENT, THINKING, {"add_generation_prompt": True},
                        {"add_generation_prompt": True, **THINKING}):  # fmt: skip
            texts = [tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **options)
                     for template in (CHAT_TEMPLATES[name], real_template(real))]  # fmt: skip
            assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------------ rollouts, outputs


def test_rollouts(family, media):
    """Greedy ones are those of HF's generate; sampled ones depend on nothing but their draws; log-probabilities."""
    args = grpo.GRPOArguments(
        model_id=family.path, per_device_train_batch_size=2, num_generations=3, max_completion_length=9, top_k=0,
        temperature=1.0, video_min_pixels=1024, image_min_pixels=1024,
    )  # fmt: skip
    assert args.check(set()) == []
    encoder, model, plain = mv.Encoder(family.path, args), family.packed(), family.plain().eval()
    model.generation_config.eos_token_id = list(range(0, 400, 3))  # completions end at different lengths
    records = [{**record, "messages": record["messages"][:-1]} for record in RECORDS]
    samples = [encoder({**record, "completions": []}, media) for record in records]
    engine = OneProcess(model)

    greedy, _ = grpo.generate(engine, samples, encoder, args)
    given = [hf_inputs(record, media, args, family.processor, add_generation_prompt=True)[0] for record in records]
    silent = [*encoder.vision_ids, *range(len(encoder.tokenizer), model.config.get_text_config().vocab_size)]
    ends = grpo.end_tokens(model, encoder)
    for inputs, ours in zip(given, greedy):
        plain.model.rope_deltas = None
        output = plain.generate(
            **inputs, max_new_tokens=9, do_sample=False, eos_token_id=ends, suppress_tokens=silent,
        )  # fmt: skip
        assert ours == [output[0, inputs["input_ids"].shape[1] :].tolist()]

    draws = uniform(samples, args)
    ids, logps = grpo.generate(engine, samples, encoder, args, draws)
    assert len({len(tokens) for group in ids for tokens in group}) > 3
    order = [2, 0]
    some = grpo.generate(engine, [samples[i] for i in order], encoder, args, [draws[i] for i in order])[0]
    assert some == [ids[i] for i in order]
    args.rollout_cache_gb = 1e-6  # one prompt at a time
    assert grpo.generate(engine, samples, encoder, args, draws)[0] == ids
    assert grpo.generate(engine, samples, encoder, args, uniform(samples, args, seed=1))[0] != ids

    full = [mv.add_suffixes(sample, [(c, c) for c in group]) for sample, group in zip(samples, ids)]
    flat = torch.tensor([x for group in logps for own in group for x in own])
    with torch.no_grad():
        assert (logps_of(model, mv.pack(full, encoder, "cpu")) - flat).abs().max() < 2e-5
        theirs = []
        for inputs, group in zip(given, ids):
            for tokens in group:
                plain.model.rope_deltas = None
                whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)}
                whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(tokens)))
                whole["attention_mask"] = torch.ones_like(whole["input_ids"])
                logits = plain(**whole, use_cache=False).logits[0, -len(tokens) - 1 : -1]
                theirs.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0])
    assert (torch.cat(theirs) - flat).abs().max() < 2e-5


def test_outputs(family, media, tmp_path, monkeypatch):
    """After one step of train_sft.py, transformers finds every weight by its name, each of them trained."""
    turns = [{"from": "human", "value": "<image>\n<video>\nWhat?"}, {"from": "gpt", "value": "Noise, and a clip."}]
    data = [{"image": "0.png", "video": "b.mp4", "conversations": turns}] * 2
    (tmp_path / "data.json").write_text(json.dumps(data))
    in_process(
        monkeypatch, "--model_id", family.path, "--data_path", tmp_path / "data.json", "--image_folder", media,
        "--max_steps", 1, "--learning_rate", 1e-2, "--lr_scheduler_type", "constant", "--video_resized_width", 64,
        "--video_resized_height", 64, "--image_resized_width", 64, "--image_resized_height", 64, "--max_grad_norm", 0,
        "--gradient_checkpointing", "True", "--save_strategy", "no", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    load = AutoModelForImageTextToText.from_pretrained
    trained, info = load(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, saved = load_file(f"{family.path}/model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == before.keys() and "model.visual.patch_embed.proj.bias" in saved
    state = trained.state_dict()
    for name, value in saved.items():
        assert torch.equal(state[name], value) and not torch.equal(value, before[name]), name
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template == family.processor.chat_template and type(processor) is type(family.processor)
    assert (
        processor.tokenizer.decode(processor.tokenizer("<think>")["input_ids"], skip_special_tokens=True) == "<think>"
    )

    model = mv.load_model(arguments(str(tmp_path / "out")), "cpu")  # and so does this project
    mv.save_model(model, processor, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == saved.keys() and all(torch.equal(again[name], value) for name, value in saved.items())
