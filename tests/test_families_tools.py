"""Qwen3-VL and Qwen3.5 beyond the forward pass: what is refused, kept, counted and warned of."""

import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import multivideo as mv

import check_data
import datasets
import preview
import pytest
import torch
import transformers
from merge_lora import merge
from reference import real_template, write_clip
from safetensors.torch import load_file, save_file
from test_train import in_process

import train_cls
import train_dpo
import train_grpo
import train_sft

CLIPS = {"a": (64, 64, 50, 25), "b": (128, 64, 40, 10), "long": (64, 64, 130, 8)}
SIZES = ["--video_resized_width", 64, "--video_resized_height", 64, "--nframes", 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips, and records of two of them in a file per trainer."""
    folder = tmp_path_factory.mktemp("clips")
    for name, (width, height, frames, rate) in CLIPS.items():
        write_clip(folder / f"{name}.mp4", width, height, frames, rate=rate, seed=ord(name[0]))
    clips = {"video": ["a.mp4", "b.mp4"]}
    answer = {"from": "gpt", "value": "The first."}
    rows = [{"id": str(i), **clips, "conversations": [{"from": "human", "value": f"Which {i}?"}, answer]}
            for i in range(8)]  # fmt: skip
    (folder / "sft.json").write_text(json.dumps(rows))
    rows = [{"id": str(i), **clips, "prompt": f"Which {i}?", "label": "ab"[i % 2]} for i in range(8)]
    (folder / "cls.json").write_text(json.dumps(rows))
    return folder


def arguments(model, **flags):
    args = train_sft.SFTArguments(model_id=model, nframes=4, video_resized_width=64, video_resized_height=64, **flags)
    args.video_cache = None
    return args


def test_other_families_are_refused(tiny_qwen3_5, tmp_path, monkeypatch):
    for model_type, why in (
        ("qwen3_vl_moe", "mixture-of-experts models are not supported: take a dense model"),
        ("qwen3_5_moe", "mixture-of-experts"),
        ("qwen2_5_omni", "models that hear and speak"),
        ("qwen4_exp", "its layers are not supported"),
        ("llama", "'llama' model; supported: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5"),
    ):
        transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with pytest.raises(mv.InputError, match=why):
            mv.load_config(str(tmp_path), mv.TrainingArguments())
    monkeypatch.setattr(mv.transformers, "__version__", "5.23.1")
    with pytest.raises(mv.InputError, match=r"'qwen3_5' models need transformers 5.24 or later, installed is 5.23.1"):
        mv.load_config(tiny_qwen3_5, mv.TrainingArguments())


def test_layout_of_another_transformers(tiny_qwen3_vl, tiny_model, folder, tmp_path, monkeypatch, capsys):
    """It is recorded; a run that was trained on the other one is not resumed, its model gives a warning."""
    flags = ["--model_id", tiny_qwen3_vl, "--data_path", folder / "sft.json", "--per_device_train_batch_size", 2,
             "--video_cache", "none", *SIZES, "--output_dir", tmp_path / "out"]  # fmt: skip
    in_process(monkeypatch, *flags, "--max_steps", 1, "--save_steps", 1)
    said = capsys.readouterr().err
    assert "64×64 pixels, 4 tokens per 2 frames; beside each 2 frames 16 tokens of their time stamp" in said
    assert (
        "sample 0   2 videos, 0 images: " in said and "16 visual, 60 of time stamps" in said and "warning" not in said
    )
    layout = json.loads((tmp_path / "out" / "arguments.json").read_text())["video_layout"]
    assert layout.count("<|vision_start|>") == layout.count("<|vision_end|>") == 2 and "<0.0 seconds>" in layout
    encoder = mv.Encoder(tiny_model, arguments(tiny_model))
    assert encoder.video_layout() == "one run of tokens" and encoder.time_tokens([5.0]) == 0

    def as_in_4_57(self, text, images_replacements=(), videos_replacements=()):
        for stamps in videos_replacements:
            text = [part.replace("<|vision_start|><|video_pad|><|vision_end|>", stamps, 1) for part in text]
        return text, None

    monkeypatch.setattr(transformers.Qwen3VLProcessor, "get_text_with_replacements", as_in_4_57)
    with pytest.raises(mv.InputError, match=r"these differ:\n  • video layout: <\|vision_start\|><0.0 seconds>"):
        in_process(monkeypatch, *flags, "--max_steps", 2, "--resume_from_checkpoint", "auto")
    old = mv.Encoder(tiny_qwen3_vl, arguments(tiny_qwen3_vl))
    assert old.video_layout() == layout.removeprefix("<|vision_start|>").removesuffix("<|vision_end|>")
    mv.warn_of_other_layout("model_id", str(tmp_path / "out"), old)
    said = capsys.readouterr().err
    assert f"was trained on videos as {layout!r} (one frame)" in said and f"writes {old.video_layout()!r}" in said


def test_videos_that_the_template_leaves_out(tiny_qwen3_vl, folder):
    """Qwen3-VL's drops those of answers; check_data.py finds them without decoding."""
    shown = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "That."}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": shown}]
    record = train_sft.normalize_record({"id": "seven", "messages": turns}, "record 6")
    encoder = mv.Encoder(tiny_qwen3_vl, arguments(tiny_qwen3_vl))
    with pytest.raises(mv.InputError, match="record seven: the chat template leaves out videos or images in ass"):
        encoder(record, str(folder))
    system = [{"role": "system", "content": [shown[0]]}, turns[0], {"role": "assistant", "content": "That."}]
    refused = {"qwen3_vl": "leaves out videos or images in system turns", "qwen3_5_think": "System message cannot"}
    for template, message in refused.items():
        encoder.chat_template = real_template(template)
        with pytest.raises(mv.InputError, match=f"record seven: the .*chat template .*{message}"):
            encoder(train_sft.normalize_record({"id": "seven", "messages": system}, "record 6"), str(folder))
    encoder.chat_template = real_template("qwen3_vl")
    check_data._worker.update(encoder=encoder, normalize=train_sft.normalize_record)
    found = check_data.read_record(("record 6", {"id": "seven", "messages": turns}, str(folder)))
    assert "the chat template leaves out videos or images in assistant turns" in found["problem"]


def test_what_a_template_refuses_is_found_at_the_start(tiny_qwen3_5, tmp_path):
    """Records that the chat template cannot write are refused before training, all of them; others are read."""
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5))
    shown, said = [{"type": "video", "video": "a.mp4"}], {"role": "assistant", "content": "Yes."}
    good = {"messages": [{"role": "user", "content": shown}, said]}
    bad = {"messages": [{"role": "system", "content": shown}, {"role": "user", "content": "?"}, said]}
    path = tmp_path / "sft.json"
    path.write_text(json.dumps([good, bad, good, bad]))
    with pytest.raises(mv.InputError, match="refuses it: System message cannot contain .*: 2 records, record 1"):
        mv.load_records(str(path), train_sft.normalize_record, encoder=encoder)
    pairs = [{"prompt": "?", "chosen": [{**said, "reasoning": "So."}], "rejected": "No."}]
    path.write_text(json.dumps(pairs))
    load = partial(mv.load_records, str(path), train_dpo.normalize_record, train_dpo.FEATURES)
    with pytest.raises(mv.InputError, match="record 0: the chat template opens the answer with"):
        load(encoder=encoder)
    thinks = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5, chat_template_kwargs='{"enable_thinking": true}'))
    assert len(load(encoder=thinks)) == 1
    with pytest.raises(mv.InputError, match="record 0: the chat template opens the answer with"):
        load(encoder=encoder)  # not the rows of other options


@pytest.mark.parametrize("budget", [None, 120, 60])
def test_tokens_are_those_of_the_encoder(tiny_qwen3_5, folder, budget):
    """check_data.py's visual tokens, time stamps, all tokens and last position; the budget bounds both kinds."""
    args = arguments(tiny_qwen3_5, max_video_tokens=budget)
    args.nframes, args.fps = None, 2.0
    encoder = mv.Encoder(tiny_qwen3_5, args)
    check_data._worker.update(encoder=encoder, normalize=train_sft.normalize_record, args=args, decode=False)
    found = check_data.Findings(encoder)
    records = [
        {"id": "1", "video": ["a.mp4", "long.mp4"]},
        {"id": "2", "video": [{"video": "long.mp4", "start": 8, "end": 12.5}]},
        {"id": "3", "video": ["b.mp4", {"video": "long.mp4", "fps": 0.5}]},
    ]
    for number, record in enumerate(records):
        record["conversations"] = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Yes."}]
        found.add_record("train", number, check_data.read_record((f"record {number}", record, str(folder))))
    for clip, spec in found.distinct():
        found.add_clip(clip, check_data.read_clip((clip, spec)), 32)
    found.add_samples(args, 32)
    for number, record in enumerate(records):
        row = found("SELECT visual, stamps, total, last, whole > fitted FROM good WHERE number = ?", number).fetchone()
        sample = encoder(train_sft.normalize_record(record, "x"), str(folder))
        visual = int((sample["input_ids"] == encoder.config.video_token_id).sum())
        stamps = encoder.stamps_in(sample["input_ids"])
        assert (row[0], row[4]) == (visual, sample["shrunk"])
        assert budget is None or visual + stamps <= budget
        if not sample["shrunk"]:
            assert row[1:4] == (stamps, sample["num_tokens"], int(sample["position_ids"][1:].max()))
        else:  # by the longest stamp of each clip
            assert 0 <= row[1] - stamps <= 8 and row[2] - sample["num_tokens"] == row[1] - stamps
            assert visual + row[1] <= budget


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_memory_with_recurrent_layers(request, folder, tmp_path, monkeypatch, capsys, family):
    """check_data.py predicts a step of both families, and says what it assumes of recurrent layers where there are."""
    model, report = request.getfixturevalue(f"tiny_{family}"), tmp_path / "report.json"
    flags = ["--model_id", model, "--data_path", folder / "sft.json", "--image_folder", folder, *SIZES, "--report",
             report, "--gpu_memory_gb", 80, "--num_workers", 1]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["check_data.py", *map(str, flags)])
    mv.run(check_data.main)  # raises SystemExit if it finds what would stop a run
    assert ("flash-linear-attention on CUDA needs less" in capsys.readouterr().out) is (family == "qwen3_5")
    assert json.loads(report.read_text())["memory"]["parts"]["activations"] > 0


def test_answers_without_thoughts(tiny_qwen3_5, folder):
    """Counted where the template has the model think, not where it is told not to, in prompts, or masked."""
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5))
    encoder.chat_template = real_template("qwen3_6")
    asked = {"role": "user", "content": "?"}

    def skips(*turns, normalize=train_sft.normalize_record, **record):
        row = normalize({"messages": [asked, *turns], **record}, "x")
        return check_data.skips_thinking(row, encoder)

    answer = {"role": "assistant", "content": "Yes."}
    assert skips(answer) and skips({**answer, "reasoning": "So."}, asked, answer)
    assert not skips({**answer, "reasoning": "So."}) and not skips({**answer, "content": "<think>So.</think>Yes."})
    assert not skips(answer, chat_template_kwargs={"enable_thinking": False})
    assert not skips({**answer, "loss": False}, asked, {**answer, "thinking": "So."})
    assert not skips(answer, asked, normalize=train_cls.normalize_record, label="a")
    encoder.chat_template = real_template("qwen3_5_nothink")
    assert not skips(answer)


@pytest.mark.parametrize("thought", [None, "So."])
def test_answers_are_encoded_as_they_are_generated(tiny_qwen3_5, folder, tmp_path, thought):
    """After the tokens of the prompt, also where the prompt's last character and the answer's first are one token."""
    shutil.copytree(tiny_qwen3_5, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    unused = next(key for key in tokenizer["model"]["vocab"] if len(key) > 3 and key.isascii())
    tokenizer["model"]["vocab"]["ĊĊ"] = tokenizer["model"]["vocab"].pop(
        unused
    )  # two newlines, one token, as in Qwen's
    merges = [pair for pair in tokenizer["model"]["merges"] if unused not in ("".join(pair), *pair)]
    tokenizer["model"]["merges"] = [["Ċ", "Ċ"], *merges]
    path.write_text(json.dumps(tokenizer))
    encoder = mv.Encoder(str(tmp_path / "model"), arguments(str(tmp_path / "model")))
    assert len(encoder.tokenizer("\n\n")["input_ids"]) == 1
    encoder.chat_template = real_template("qwen3_5_think")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes.", "reasoning": thought}]
    messages = train_sft.normalize_record({"messages": turns}, "x")["messages"]
    ((ids, labels),) = encoder.tokenize(messages)
    (prompt, _), (answer, learned) = encoder.tokenize(messages[:1], [messages[1:]])
    assert encoder.tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    assert ids == prompt + answer and labels == [-100] * len(prompt) + learned
    text = "So.\n</think>\n\nYes." if thought else "\n</think>\n\nYes."
    assert encoder.tokenizer.decode([token for token in learned if token != -100]) == f"{text}<|im_end|>"


def test_format_reward_sees_the_given_thought(tiny_qwen3_5):
    texts = ["A valve.</think><answer>Open.</answer>", "<think>A valve.</think><answer>Open.</answer>", "Open."]
    assert train_grpo.format_reward(texts) == [0, 1, 0]
    assert train_grpo.format_reward(texts, generation_prefix=["<think>\n"] * 3) == [1, 0, 0]
    assert train_grpo.format_reward(texts, generation_prefix=["<think>\n\n</think>\n\n"] * 3) == [0, 1, 0]
    record = {"id": "1", "prompt": "?", "reference": "Open.", "columns": "{}", "messages": []}
    group = {"record": record, "texts": texts, "ids": [[1]] * 3, "generation_prefix": "<think>\n"}
    rewards = train_grpo.score(train_grpo.load_rewards(["format"]), [group], [])
    assert rewards[0, :, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_memory_of_rollouts(request, family):
    """Bytes of the cache of a plain model, in fp32: by its head size, and by its recurrent states."""
    path = request.getfixturevalue(f"tiny_{family}")
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    token, state = train_grpo.cache_bytes(model.config.get_text_config())
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=True).past_key_values
    keys = states = 0
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            states += layer.conv_states[0].nbytes + layer.recurrent_states[0].nbytes
        else:
            keys += layer.keys.nbytes + layer.values.nbytes
    assert (5 * token, state) == (keys, states) and (states > 0) == (family == "qwen3_5")


def with_mtp(source, target):
    """A copy of a model with two weights of multi-token prediction, which are returned."""
    shutil.copytree(source, target)
    extra = {"mtp.fc.weight": torch.randn(8, 16), "mtp.norm.weight": torch.randn(8)}
    save_file(load_file(target / "model.safetensors") | extra, target / "model.safetensors", {"format": "pt"})
    return extra


def test_weights_of_multi_token_prediction_are_kept(tiny_qwen3_5, folder, tmp_path, monkeypatch):
    """Through training of all weights, with an index, and of an adapter, merged; plain loading sees nothing odd."""
    extra = with_mtp(tiny_qwen3_5, tmp_path / "base")
    flags = ["--data_path", folder / "sft.json", "--per_device_train_batch_size", 2, "--max_steps", 1, *SIZES,
             "--video_cache", "none"]  # fmt: skip
    in_process(monkeypatch, *flags, "--model_id", tmp_path / "base", "--output_dir", tmp_path / "out")
    in_process(monkeypatch, *flags, "--model_id", tmp_path / "out", "--output_dir", tmp_path / "lora", "--lora_enable",
               "True", "--freeze_llm", "True", "--freeze_vision_tower", "True", "--freeze_merger", "True",
               "--lora_namespan_exclude", "['lm_head', 'embed_tokens']")  # fmt: skip
    assert not list((tmp_path / "lora").glob("model*.safetensors*"))
    merge(str(tmp_path / "lora"), str(tmp_path / "merged"))
    for place in ("out", "merged"):
        places = mv.weight_files(str(tmp_path / place))
        assert {name for name in places if name.startswith("mtp.")} == set(extra)
        assert not (tmp_path / place / "model.safetensors").exists()  # plain loading would read it alone
        kept = load_file(tmp_path / place / "model-mtp.safetensors")
        assert all(torch.equal(kept[name], weight) for name, weight in extra.items())
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / place, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        saved = load_file(tmp_path / place / places["lm_head.weight"])
        assert torch.equal(saved["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize(("family", "width"), [("qwen3_vl", 0), ("qwen3_5", 0), ("qwen3_5", 16)])
def test_classifiers(request, family, width, folder, tmp_path, monkeypatch):
    """config.json names the class that loads a classifier: where the library has that class, it gives our logits."""
    path = request.getfixturevalue(f"tiny_{family}")
    argv = ["--model_id", path, "--data_path", folder / "cls.json", "--per_device_train_batch_size", 4,
            "--max_steps", 2, "--video_cache", "none", *SIZES, "--output_dir", tmp_path / "out",
            "--mlp_head_dim", width, "--learning_rate", 1e-2]  # fmt: skip
    in_process(monkeypatch, *argv, trainer="train_cls")
    (name,) = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    known = family == "qwen3_5" and not width
    assert name.endswith("ForSequenceClassification") and hasattr(transformers, name) == known
    args = arguments(str(tmp_path / "out"))
    config = transformers.AutoConfig.from_pretrained(args.model_id)
    model = mv.load_model(args, "cpu", None, train_cls.classifier_class(family, bool(width)), config).eval()
    assert type(model).__name__ == name
    encoder = mv.Encoder(args.model_id, args)
    record = json.loads((folder / "cls.json").read_text())[0]
    sample = encoder(train_cls.normalize_record(record, "x"), str(folder))
    row, _, _ = mv.pack([sample], encoder, "cpu")
    row.pop("logits_to_keep")
    length = len(sample["input_ids"])
    with torch.no_grad():
        ours = model(**row, pool_positions=torch.tensor([length - 1])).logits
    if not known:
        return
    plain, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model_id, output_loading_info=True, attn_implementation="sdpa"
    )
    assert type(plain).__module__.startswith("transformers.") and not any(info.values())
    ids = torch.from_numpy(sample["input_ids"])[None]
    pixels = mv.normalize_patches(torch.from_numpy(sample["patches"]), encoder.image_mean, encoder.image_std)
    with torch.no_grad():
        theirs = plain.eval()(
            input_ids=ids, pixel_values_videos=pixels, video_grid_thw=torch.from_numpy(sample["video_grid_thw"]),
            mm_token_type_ids=2 * (ids == config.video_token_id).int(),
        ).logits  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_quantised_layers_are_named(tiny_qwen3_5, capsys):
    """The banner lists them: matrices of the decoder's layers, by the names in the model."""
    pytest.importorskip("bitsandbytes")
    args = arguments(tiny_qwen3_5, bits=4, lora_enable=True, freeze_llm=True, freeze_vision_tower=True,
                     freeze_merger=True, lora_namespan_exclude="['lm_head', 'embed_tokens']")  # fmt: skip
    model = mv.load_model(args, "cpu")
    encoder = mv.Encoder(tiny_qwen3_5, args)
    first = {"num_videos": 0, "num_images": 0, "num_tokens": 0}
    stream = SimpleNamespace(encoder=encoder, batches=lambda *_: [[first]])
    records = datasets.Dataset.from_dict({"messages": []})
    mv.describe_run(args, model, stream, records, 1, 1)
    expected = "down_proj, gate_proj, in_proj_a, in_proj_b, in_proj_qkv, in_proj_z, k_proj, o_proj, out_proj, q_proj, "
    assert f"  4 bits     31 matrices of the decoder: {expected}up_proj, v_proj" in capsys.readouterr().err


def test_options_of_the_template_are_checked(folder, tiny_qwen3_5, monkeypatch, capsys):
    """--chat_template_kwargs is an object whose names the model's template reads."""
    flags = ["--model_id", tiny_qwen3_5, "--data_path", folder / "sft.json"]
    for words in ("{enable", "[1]"):
        with pytest.raises(SystemExit):
            in_process(monkeypatch, *flags, "--chat_template_kwargs", words)
        assert f"--chat_template_kwargs {words}: expected a JSON object" in capsys.readouterr().err
    for name in ("enable_thinkng", "add_generation_prompt"):
        with pytest.raises(mv.InputError, match=f"the model's chat template does not read {name!r}: remove it"):
            in_process(monkeypatch, *flags, "--chat_template_kwargs", json.dumps({name: True}))


def test_preview_refuses_what_training_refuses(tiny_model, folder, tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes.", "reasoning": "So."}]
    (tmp_path / "thinks.json").write_text(json.dumps([{"id": "1", "messages": turns}]))
    argv = ["--model_id", tiny_model, "--data_path", tmp_path / "thinks.json", "--output", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", ["preview.py", *map(str, argv)])
    with pytest.raises(mv.InputError, match="record 1: turn 1: field 'reasoning'.*chat template has no place for it"):
        preview.main()


def with_template(model, folder, name):
    """A copy of a model with the chat template of this name."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(real_template(name))
    return str(folder)


def test_values_of_options(tiny_qwen3_5, folder, tmp_path):
    """What a template would misread or refuse is an error that names it; words of a template are no options."""
    model = with_template(tiny_qwen3_5, tmp_path / "model", "qwen3_8")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]
    encoder = mv.Encoder(model, arguments(model))
    for options, message in (
        ({"enable_thinking": "false"}, "'enable_thinking' must be true or false, got str 'false'"),
        ({"thinking": False}, "the model's chat template does not read 'thinking'"),  # in its text, though
        ({"reasoning_effort": "high"}, "chat template refuses it: Unexpected reasoning effort high"),
    ):
        with pytest.raises(mv.InputError, match=f"--chat_template_kwargs: .*{message}"):
            mv.Encoder(model, arguments(model, chat_template_kwargs=json.dumps(options)))
        row = train_sft.normalize_record({"id": "1", "messages": turns, "chat_template_kwargs": options}, "x")
        with pytest.raises(ValueError, match=message):
            mv.check_rendered(row, encoder.template_reads(), encoder.chat_template)
            encoder(row, str(folder))


def test_tools_of_all_records_and_of_one(tiny_qwen3_5, folder):
    """Those of --chat_template_kwargs go to records without their own."""
    names = [{"type": "function", "function": {"name": name}} for name in ("of_all", "of_one")]
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5, chat_template_kwargs=json.dumps({"tools": names[:1]})))
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]
    for own, there, missing in (({}, "of_all", "of_one"), ({"tools": names[1:]}, "of_one", "of_all")):
        row = train_sft.normalize_record({"messages": turns, **own}, "x")
        mv.check_rendered(row, encoder.template_reads(), encoder.chat_template)
        text = encoder.tokenizer.decode(encoder(row, str(folder))["input_ids"])
        assert there in text and missing not in text
    with pytest.raises(ValueError, match="'tools' and 'chat_template_kwargs' both have tools"):
        train_sft.normalize_record({"messages": turns, "tools": names, "chat_template_kwargs": {"tools": names}}, "x")


def test_nulls_of_calls():
    """Those of JSON text are the author's; those of objects may be Arrow's."""

    def arguments_of(calls):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        row = train_sft.normalize_record({"messages": turns}, "x")
        return json.loads(row["messages"][1]["tool_calls"])[0]["function"]["arguments"]

    value = {"a": None, "b": 1}
    assert arguments_of([{"name": "f", "arguments": json.dumps(value)}]) == value
    assert arguments_of(json.dumps([{"name": "f", "arguments": value}])) == value
    assert arguments_of([{"name": "f", "arguments": value}]) == {"b": 1}
    assert arguments_of([{"name": "f", "arguments": None}]) == {}


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3_8"])
def test_thoughts_within_the_text(tiny_qwen3_5, folder, template):
    """Also without the <think> that the prompt ends with; text is neither left out nor are there two thoughts."""
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5))
    encoder.chat_template = real_template(template)

    def learned(text, **fields):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text, **fields}]
        sample = encoder(train_sft.normalize_record({"id": "1", "messages": turns}, "x"), str(folder))
        return encoder.tokenizer.decode(sample["labels"][sample["labels"] != -100])

    for text in (
        "<think>So.</think>Yes.",
        "So.\n</think>\n\nYes.",
        "\nSo.</think> Yes.",
        "<think>\nSo.\n</think>\nYes.",
    ):
        assert learned(text) == "So.\n</think>\n\nYes.<|im_end|>"
    with pytest.raises(mv.InputError, match="record 1: text before the <think> of an answer"):
        learned("Hm. <think>So.</think>Yes.")
    with pytest.raises(ValueError, match="turn 1: thoughts both in a field and, as <think>, in the text"):
        learned("<think>So.</think>Yes.", reasoning="So.")


def test_pairs_of_several_turns(tiny_qwen3_5, folder):
    """Results of calls follow one another; where a template rewrites earlier answers, the message says so."""
    call = {"name": "crop", "arguments": {}}
    result, answer = {"role": "tool", "content": "1"}, {"role": "assistant", "content": "Yes."}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call, call]}, result, result, answer]
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5))
    row = train_dpo.normalize_record({"id": "1", "prompt": "?", "chosen": turns, "rejected": "No."}, "x")
    sample = encoder(row, str(folder))
    assert encoder.tokenizer.decode(sample["input_ids"]).count("<tool_response>\n1\n</tool_response>") == 2
    for wrong in ([result, answer], [answer, answer], [answer, {"role": "user", "content": "?"}, result, answer]):
        with pytest.raises(ValueError, match="must alternate"):
            train_dpo.normalize_record({"prompt": "?", "chosen": wrong, "rejected": "No."}, "x")
    pair = {"chosen": [answer, {"role": "user", "content": "Sure?"}, answer], "rejected": "No."}
    row = train_dpo.normalize_record({"id": "1", "prompt": "?", **pair}, "x")
    for template, more in (("qwen3_5_think", "give answers of one turn$"), ("qwen3_6", "or --chat_template_kwargs")):
        encoder.chat_template = real_template(template)
        with pytest.raises(mv.InputError, match=f"thoughts of answers before the last question: .*{more}"):
            encoder(row, str(folder))
    row["chat_template_kwargs"] = '{"preserve_thinking": true}'
    assert len(encoder(row, str(folder))["lengths"]) == 3


def test_answers_that_begin_otherwise(tiny_qwen3_5):
    """Counted: learned thoughts after an empty one, and learned answers whose thoughts the template leaves out."""
    encoder = mv.Encoder(tiny_qwen3_5, arguments(tiny_qwen3_5))

    def found(*answers, normalize=train_sft.normalize_record, **options):
        turns = [turn for answer in answers for turn in ({"role": "user", "content": "?"}, answer)]
        row = normalize({"messages": turns, "chat_template_kwargs": options}, "x")
        return check_data.begins_otherwise(row, encoder)

    plain, thinks = ({"role": "assistant", "content": "Yes.", **more} for more in ({}, {"reasoning": "So."}))
    assert not found(plain) and found(thinks) and not found(thinks, enable_thinking=True)
    assert found(plain, plain) and not found({**plain, "loss": False}, plain)
    last = partial(train_sft.normalize_record, train_on="last")
    assert not found(plain, plain, normalize=last)
    encoder.chat_template = real_template("qwen3_6")
    assert found(thinks, thinks) and not found(thinks, thinks, preserve_thinking=True)
    encoder.chat_template = real_template("qwen3_vl")
    assert not found(plain, plain)


def test_final_answers_behind_given_thoughts():
    """A thought whose <think> the chat template gives is no part of the answer that rewards compare."""
    texts = ["Is it 3 or 4?\n</think>\n\n4", "<think>\n3?\n</think>\n\n4", "4", "\n</think>\n\n4"]
    assert [train_grpo.final_answer(text) for text in texts] == ["4"] * 4
    assert train_grpo.accuracy_reward(texts, ["4"] * 4) == train_grpo.numeric_reward(texts, ["4"] * 4) == [1.0] * 4
    assert train_grpo.choice_reward(["A or B? A\n</think>\n\nB"], ["B"]) == [1.0]
    assert train_grpo.final_answer("So <think>3?</think> 4") == "So  4"


def test_rewards_are_given_the_prefix_and_the_calls(tmp_path):
    """A function may need `generation_prefix`, which no column replaces; prompts have the calls of their turns."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "content": "1"}]  # fmt: skip
    record = train_grpo.normalize_record({"prompt": turns, "solution": "4", "generation_prefix": "own"}, "x")
    with pytest.raises(ValueError, match="x: the first answer calls a tool: write the turns before .* as 'prompt'"):
        train_grpo.normalize_record({"messages": [*turns, {"role": "assistant", "content": "4"}]}, "x")
    path = tmp_path / "rewards.py"
    path.write_text(
        "def given(generation_prefix, **_):\n    return [float(p == '<think>') for p in generation_prefix]\n"
    )
    functions = train_grpo.load_rewards([f"{path}:given"])
    train_grpo.check_parameters("data_path", "a.json", ["solution"], functions)
    group = {"record": record, "texts": ["4"], "ids": [[1]], "generation_prefix": "<think>"}
    inputs = train_grpo.reward_inputs([group], ["solution", "generation_prefix"])
    assert inputs["generation_prefix"] == ["<think>"] and inputs["prompts"][0][1]["tool_calls"] == [call]


def test_a_model_without_a_chat_template(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(mv.InputError, match="has no chat template: copy chat_template.jinja from the model"):
        mv.Encoder(str(tmp_path / "model"), arguments(tiny_model))
