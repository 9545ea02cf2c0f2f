"""What outputs are made of: the base's own files, names that transformers 4.57 and 5 read, modes, cards, new tokens.

`make test-compat` loads such outputs in transformers 4.57 itself.
"""

import json
import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import multivideo as mv

import httpx
import huggingface_hub
import peft
import predict
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from merge_lora import merge
from reference import as_on_the_hub, run_lines, write_clip
from safetensors.torch import load_file, save_file
from test_train import in_process
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import train_cls
import train_dpo
from train_sft import SFTArguments

NO_HEAD = "['lm_head', 'embed_tokens']"
LORA = {"lora_enable": True, "freeze_llm": True, "freeze_vision_tower": True, "lora_rank": 4,
        "lora_namespan_exclude": NO_HEAD}  # fmt: skip
REVISION = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.tensor([[5, 70, 9, 33, 2, 180]])


def hub_cache(folder, base):
    """Put a model into a hub cache, as acme/tiny at REVISION."""
    repository = folder / "models--acme--tiny"
    shutil.copytree(base, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return repository


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_model, tiny_qwen2_vl):
    """Folders of bases: as on the hub, as transformers 5 writes them, and with tokens of the user's own."""
    folder, found = tmp_path_factory.mktemp("bases"), {"five": Path(tiny_model)}
    for name, source in (("hub", tiny_model), ("qwen2_vl", tiny_qwen2_vl), ("tokens", tiny_model), ("tied", None)):
        found[name] = folder / name
        if source:
            shutil.copytree(source, found[name])
        else:
            from make_demo import save_tiny_model

            save_tiny_model(found[name], tie_word_embeddings=True)
        as_on_the_hub(found[name])
    for name in ("tokens", "tied"):
        tokenizer = AutoTokenizer.from_pretrained(found[name])
        tokenizer.add_tokens(["<scan>", "<side>"])
        tokenizer.add_tokens("<report>", special_tokens=True)
        tokenizer.save_pretrained(found[name])
    written = json.loads((found["tokens"] / "tokenizer_config.json").read_text())  # as transformers 4 names them
    written["additional_special_tokens"] = written.pop("extra_special_tokens")
    mv.write_json(found["tokens"] / "tokenizer_config.json", written)
    return found


def trained(args, model=None):
    """The model of `args`, with everything that is trained moved at random."""
    torch.manual_seed(0)
    model = model or mv.load_model(args, "cpu")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def classifier(args):
    config = AutoConfig.from_pretrained(args.model_id, cache_dir=args.cache_dir)
    config.update({"problem_type": train_cls.SINGLE, "num_labels": 2, "mlp_head_dim": 0, "mlp_head_dropout": 0.0})
    config.id2label = {0: "open", 1: "shut"}
    return mv.load_model(args, "cpu", None, train_cls.classifier_class(config.model_type), config)


@torch.no_grad()
def logits(model):
    model.set_attn_implementation("sdpa")
    return model.eval()(input_ids=IDS, use_cache=False).logits


# --------------------------------------------------------------------------------------------------------------- files


def check_config(folder):
    """What transformers 4.57 reads of config.json is there, and says what transformers 5 reads."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 1e6
    assert text["rope_scaling"] == {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    config = AutoConfig.from_pretrained(folder)
    assert {**text["rope_scaling"], "rope_theta": 1e6} == config.text_config.rope_parameters
    assert text["tie_word_embeddings"] == config.tie_word_embeddings


def check_older_files(folder):
    """What transformers 4.57 needs of a processor."""
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    assert tokenizer["tokenizer_class"] in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    assert "<|video_pad|>" in tokenizer["additional_special_tokens"]
    assert "size" in json.loads((folder / "preprocessor_config.json").read_text())


@pytest.mark.parametrize("kind", ["model", "adapter", "merged", "classifier", "classifier adapter"])
@pytest.mark.parametrize("base", ["hub", "qwen2_vl", "tied", "tokens", "five", "hub name"])
def test_outputs_have_the_bases_files(bases, base, kind, tmp_path, monkeypatch):
    """Byte for byte; only what the base lacks for transformers 4.57 is added. The same logits, rope and tokens."""
    source, cache = bases["hub" if base == "hub name" else base], None
    cls = train_cls.ClassificationArguments if "classifier" in kind else SFTArguments
    args = cls(model_id=str(source), **(LORA if kind not in ("model", "classifier") else {}))
    if base == "hub name":
        cache = tmp_path / "cache"
        repository = hub_cache(cache, source)
        args = replace(args, model_id="acme/tiny", cache_dir=str(cache))
    model = trained(args, classifier(args) if "classifier" in kind else None)
    processor = mv.Encoder(args.model_id, args).processor
    if cache:  # the hub has moved on meanwhile
        shutil.copytree(repository / "snapshots" / REVISION, repository / "snapshots" / ("f" * 40))
        (repository / "snapshots" / ("f" * 40) / "merges.txt").write_text("another\n")
        (repository / "refs" / "main").write_text("f" * 40)
    out = tmp_path / "out"
    mv.save_model(model, processor, out, args=args)
    if kind == "merged":
        merge(str(out), str(tmp_path / "merged"), str(source))
        out = tmp_path / "merged"
    same = [name for name in mv.PROCESSOR_FILES if (source / name).is_file()]
    assert "tokenizer.json" in same
    for name in same:
        if name == "tokenizer_config.json" and base in ("five", "tied"):  # which transformers 5 wrote
            ours, theirs = (json.loads((folder / name).read_text()) for folder in (out, source))
            assert ours.pop("additional_special_tokens") == theirs.pop("extra_special_tokens") and ours == theirs
        else:
            assert (out / name).read_bytes() == (source / name).read_bytes(), name
    more = {name for name in mv.PROCESSOR_FILES if (out / name).is_file()} - set(same)
    assert more == ({"preprocessor_config.json", "video_preprocessor_config.json"} if base == "five" else set())
    check_older_files(out)
    ours, theirs = AutoProcessor.from_pretrained(out), AutoProcessor.from_pretrained(source)
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert ours.tokenizer.all_special_tokens == theirs.tokenizer.all_special_tokens
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert ours.video_processor.to_dict() == theirs.video_processor.to_dict()
    assert (ours.chat_template or ours.tokenizer.chat_template) == theirs.tokenizer.chat_template or base == "five"
    if kind != "adapter":
        check_config(out)
    if kind in ("model", "merged"):
        again = AutoModelForImageTextToText.from_pretrained(out)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
        plain = AutoModelForImageTextToText.from_pretrained(source)
        assert torch.equal(again.model.language_model.rotary_emb.inv_freq,
                           plain.model.language_model.rotary_emb.inv_freq)  # fmt: skip


def test_other_rotary_embeddings(bases, tmp_path):
    """A base with YaRN and another base frequency keeps both, under both names."""
    shutil.copytree(bases["hub"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "mrope_section": [2, 3, 3]}
    mv.write_json(tmp_path / "base" / "config.json", config | {"rope_theta": 5e5, "rope_scaling": scaling})
    args = SFTArguments(model_id=str(tmp_path / "base"))
    model = mv.load_model(args, "cpu")
    mv.save_model(model, mv.load_processor(args.model_id), tmp_path / "out", args=args)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 5e5 and scaling.items() <= text["rope_scaling"].items()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    for name in ("inv_freq", "attention_scaling"):
        ours, theirs = (getattr(m.model.language_model.rotary_emb, name) for m in (again, plain))
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_reached_is_one_sentence(bases, tmp_path, monkeypatch, capsys):
    """Mistyped, gated, without a network, with and without a copy in the cache: at once, without retries."""
    hub_cache(tmp_path / "cache", bases["hub"])
    cache = str(tmp_path / "cache")
    mv.find_model.cache_clear()
    response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))

    def answer(error=None):
        def model_info(self, name, timeout):
            assert timeout <= 10
            asked.append(name)
            if error:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    answer()
    mv.find_model("acme/there", cache)
    mv.find_model("acme/there", cache)
    mv.find_model(str(bases["hub"]), cache)
    assert asked == ["acme/there"]  # once, and no folder
    for error, said in (
        (RepositoryNotFoundError("no", response=response), "is neither a folder nor a model on the hub: check its"),
        (GatedRepoError("no", response=response), "is gated: run hf auth login with an account"),
        (HFValidationError("no"), "is neither a folder nor a model on the hub: check its spelling"),
        (ConnectionError("no route"), "the hub cannot be reached (no route), and it is not in the cache: download it"),
    ):
        answer(error)
        with pytest.raises(mv.InputError) as caught:
            mv.find_model("acme/typo", cache)
        assert str(caught.value).startswith(f"model acme/typo: {said}")
        assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    mv.find_model("acme/tiny", cache)  # the network is still away
    assert "the hub cannot be reached (no route): the copy in the cache is used" in capsys.readouterr().err
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    with pytest.raises(mv.InputError, match="model acme/other: HF_HUB_OFFLINE is set, and it is not in the cache"):
        mv.find_model("acme/other", cache)
    mv.find_model.cache_clear()


def test_a_base_that_went_away(bases, tmp_path):
    """Its files are written from memory, those of transformers 4.57 among them."""
    shutil.copytree(bases["five"], tmp_path / "base")
    args = SFTArguments(model_id=str(tmp_path / "base"))
    model, processor = mv.load_model(args, "cpu"), mv.load_processor(args.model_id)
    shutil.rmtree(tmp_path / "base")
    mv.save_model(model, processor, tmp_path / "out", args=args)
    check_older_files(tmp_path / "out")
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("flags", [{}, LORA])
def test_the_umask_decides_on_modes(bases, flags, mask, tmp_path, monkeypatch):
    """Final model, checkpoints with all their pieces, adapter, merged model, tables of the reference."""
    write_clip(tmp_path / "0.mp4", 56, 56, 8)
    record = {"video": "0.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"},
                                                   {"from": "gpt", "value": "This."}]}  # fmt: skip
    mv.write_json(tmp_path / "data.json", [record] * 2)
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    old = os.umask(mask)
    try:
        in_process(monkeypatch, "--model_id", bases["hub"], "--data_path", tmp_path / "data.json", "--nframes", 2,
                   "--video_resized_width", 56, "--video_resized_height", 56, "--max_steps", 1, "--save_steps", 1,
                   "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "out", *words)  # fmt: skip
        if flags:
            merge(str(tmp_path / "out"), str(tmp_path / "out" / "merged"))
        train_dpo.write_tensors(tmp_path / "out" / "table.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(old)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md"}
    assert (tmp_path / "out" / "checkpoint-1" / "random_states_0.safetensors") in files
    wrong = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files
             if stat.S_IMODE(path.stat().st_mode) != 0o666 & ~mask}  # fmt: skip
    assert not wrong


# --------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("kind", ["model", "adapter", "merged", "classifier adapter"])
@pytest.mark.parametrize("base", ["hub", "hub name"])
def test_model_cards(bases, base, kind, tmp_path):
    """Base, trainer, objective; the lines of the card do load the output; no path of this machine."""
    cls = train_cls.ClassificationArguments if "classifier" in kind else train_dpo.DPOArguments
    args = cls(model_id=str(bases["hub"]), **(LORA if kind != "model" else {}))
    if "classifier" in kind:
        args.check(set())
    if base == "hub name":
        hub_cache(tmp_path / "cache", bases["hub"])
        args = replace(args, model_id="acme/tiny", cache_dir=str(tmp_path / "cache"))
    model = trained(args, classifier(args) if "classifier" in kind else None)
    out = tmp_path / "out"
    mv.save_model(model, mv.load_processor(args.model_id, args.cache_dir), out, args=args)
    if kind == "merged":
        merge(str(out), str(tmp_path / "merged"), str(bases["hub"]))
        out = tmp_path / "merged"
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == ("peft" if "adapter" in kind else "transformers")
    assert card.data.base_model == ("acme/tiny" if base == "hub name" else None)
    assert str(bases["hub"].parent) not in card.content and str(tmp_path) not in card.content
    assert "[More Information Needed]" not in card.content
    objective = "single label classification, loss cross_entropy" if "classifier" in kind else (
        "preference tuning (DPO), loss sigmoid, beta 0.1")  # fmt: skip
    trainer = "train_cls.py" if "classifier" in kind else "train_dpo.py"
    assert f"Trained by `{trainer}`: {objective}." in card.text
    assert "one past the\nlargest of the clip's temporal, height and width positions" in card.text
    code, *positions = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for name, there in (("path/to/this/folder", out), ("path/to/the/base/model", bases["hub"]),
                        ("acme/tiny", bases["hub"])):  # fmt: skip
        code = code.replace(name, str(there))
    names = run_lines(code, tmp_path)
    torch.testing.assert_close(logits(names["model"]), logits(model), rtol=0, atol=1e-5)
    assert names["processor"].tokenizer.eos_token == "<|im_end|>"
    assert len(positions) == (0 if "classifier" in kind else 2)
    if positions:  # a prompt with a clip whose largest position is a temporal one
        inputs = names["processor"](
            text=["<|vision_start|><|video_pad|><|vision_end|>What?"], videos=[torch.zeros(4, 3, 56, 56)],
            video_metadata=[{"fps": 0.25, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}], do_resize=False,
            do_sample_frames=False, return_tensors="pt")  # fmt: skip
        use, source = positions
        apart = run_lines(source + use, tmp_path, inputs=inputs, model=names["model"])
        assert torch.equal(inputs["position_ids"], mv.qwen_position_ids(inputs, model.config))
        start = inputs["input_ids"][0].tolist().index(model.config.video_token_id)
        assert inputs["position_ids"][:, 0, start + 8].tolist() == [start + 8] + [start + 17] * 3  # 8 s × 2, and 1
        assert apart["output"].shape[1] > inputs["input_ids"].shape[1]


def test_a_users_own_card_stays(bases, tmp_path, monkeypatch):
    """README.md in --output_dir is replaced only if a run wrote it."""
    write_clip(tmp_path / "0.mp4", 56, 56, 8)
    record = {"video": "0.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"},
                                                   {"from": "gpt", "value": "This."}]}  # fmt: skip
    mv.write_json(tmp_path / "data.json", [record] * 2)
    out = tmp_path / "out"
    line = ["--model_id", bases["hub"], "--data_path", tmp_path / "data.json", "--nframes", 2, "--max_steps", 1,
            "--video_resized_width", 56, "--video_resized_height", 56, "--save_strategy", "no", "--output_dir", out,
            "--per_device_train_batch_size", 2]  # fmt: skip
    in_process(monkeypatch, *line)
    assert mv.own_card(out / "README.md")["trainer"] == "train_sft.py"
    first = (out / "README.md").read_text()
    (out / "README.md").write_text(first.replace("All weights", "Some weights"))
    in_process(monkeypatch, *line)
    assert (out / "README.md").read_text() == first
    for mine in ("# Mine\n", "\n".join(row for row in first.splitlines() if mv.CARD_MARK not in row)):
        (out / "README.md").write_text(mine)
        in_process(monkeypatch, *line)
        assert (out / "README.md").read_text() == mine
    assert not (out / ".model.aside").exists() and (out / "config.json").is_file()


# ------------------------------------------------------------------------------------------------------------ adapters


def old_name(name):
    """A module's name before transformers 4.52."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual", "visual", 1)


def make_old(adapter, folder, targets):
    """The same adapter as peft wrote it before transformers 4.52."""
    shutil.copytree(adapter, folder)
    prefix = "base_model.model."
    weights = load_file(adapter / "adapter_model.safetensors")
    weights = {prefix + old_name(name.removeprefix(prefix)): value for name, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = [old_name(name) for name in config["modules_to_save"] or []]
    config["target_modules"] = targets or [old_name(name) for name in config["target_modules"]]
    mv.write_json(folder / "adapter_config.json", config)
    return weights


@pytest.mark.parametrize("targets", [
    None, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    r"^model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$", r"model.layers.*_proj",
], ids=["full names", "suffixes", "regex", "loose regex"])  # fmt: skip
def test_adapters_with_names_from_before_transformers_4_52(bases, targets, tmp_path):
    """Continued, answered with, merged: the same as under today's names. (peft alone leaves their weights out.)"""
    args = SFTArguments(model_id=str(bases["hub"]), **LORA)
    model = trained(args)
    mv.save_model(model, mv.load_processor(args.model_id), tmp_path / "today", args=args)
    weights = make_old(tmp_path / "today", tmp_path / "old", targets)
    assert any(name.startswith("base_model.model.visual.merger.") for name in weights)
    expected = logits(model)
    args = replace(args, lora_namespan_exclude=None, lora_weight_path=str(tmp_path / "old"), lora_alpha=16)
    assert torch.equal(logits(mv.load_model(args, "cpu")), expected)
    asked = predict.AnswerArguments(model_id=str(tmp_path / "old"))
    torch.testing.assert_close(logits(predict.load_model(asked, "cpu")), expected, rtol=0, atol=1e-6)
    merge(str(tmp_path / "old"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    # what has no place is named
    stray = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    save_file({**weights, stray: torch.zeros(4, 64)}, tmp_path / "old" / "adapter_model.safetensors")
    asked = predict.AnswerArguments(model_id=str(tmp_path / "old"))
    for load in (lambda: merge(str(tmp_path / "old"), str(tmp_path / "again")), lambda: mv.load_model(args, "cpu"),
                 lambda: predict.load_model(asked, "cpu")):  # fmt: skip
        with pytest.raises(mv.InputError, match=r"layers\.7\.mlp\.up_proj\.lora_A"):
            load()


def test_patterns_of_old_names():
    """Ranks and scales may be given per module, by name or pattern."""
    names = {"model.layers.3.mlp": "model.language_model.layers.3.mlp", "visual": "model.visual", "q_proj": "q_proj",
             r"^model\.layers\.1": r"^model.language_model\.layers\.1", "lm_head": "lm_head",
             "visual.blocks.0": "model.visual.blocks.0", "model.visual": "model.visual",
             r"model\.visual\.merger": r"model\.visual\.merger", "visual_head": "visual_head",
             "model.language_model.norm": "model.language_model.norm"}  # fmt: skip
    assert {name: mv.current_name(name) for name in names} == names


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
    """Tensors that are missing or have another shape are named; nothing is loaded in part."""
    args = SFTArguments(model_id=str(bases["hub"]), **LORA)
    mv.save_model(trained(args), mv.load_processor(args.model_id), tmp_path / "out", args=args)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    first = next(name for name in weights if "lora_A" in name)
    for changed, match in (({first: weights[first][:, :8].clone()}, f"{re.escape(first)} has shape"),
                           ({}, f"{re.escape(first)} is not there")):  # fmt: skip
        rest = {name: value for name, value in weights.items() if name != first}
        save_file({**rest, **changed}, tmp_path / "out" / "adapter_model.safetensors")
        with pytest.raises(mv.InputError, match=match):
            predict.load_model(predict.AnswerArguments(model_id=str(tmp_path / "out")), "cpu")


@pytest.mark.parametrize("left", [[], ["tokenizer.json", "tokenizer_config.json"]])
def test_merging_an_adapter_without_processor_files(bases, left, tmp_path):
    """What is not beside the adapter comes from the base."""
    args = SFTArguments(model_id=str(bases["hub"]), **LORA)
    mv.save_model(trained(args), mv.load_processor(args.model_id), tmp_path / "out", args=args)
    for name in mv.PROCESSOR_FILES:
        if name not in left:
            (tmp_path / "out" / name).unlink(missing_ok=True)
    if left:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        tokenizer.add_tokens("<mine>")
        tokenizer.save_pretrained(tmp_path / "out")
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert ("<mine>" in processor.tokenizer.get_vocab()) == bool(left)
    check_older_files(tmp_path / "merged")


@pytest.mark.parametrize("lost", ["model.visual.blocks.1.attn.qkv.weight", "model.visual.merger.mlp.0.bias"])
def test_merging_loses_nothing(bases, lost, tmp_path, monkeypatch):
    """All that was trained beside the adapter is in the merged model; a tensor that is lost stops the merging."""
    args = SFTArguments(model_id=str(bases["hub"]), **{**LORA, "freeze_vision_tower": False})
    model = trained(args)
    mv.save_model(model, mv.load_processor(args.model_id), tmp_path / "out", args=args)
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    base = AutoModelForImageTextToText.from_pretrained(bases["hub"]).state_dict()
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    beside = {name.removeprefix("base_model.model."): value for name, value in stored.items() if ".lora_" not in name}
    assert len(beside) > 20 and lost in beside
    for name, value in beside.items():
        assert torch.equal(merged[name], value) and not torch.equal(base[name], value), name
    adapted = {name.split(".lora_")[0] for name in stored if ".lora_A" in name}
    assert all(not torch.equal(merged[f"{name[17:]}.weight"], base[f"{name[17:]}.weight"]) for name in adapted)

    unload = peft.PeftModel.unload if hasattr(peft.PeftModel, "unload") else peft.LoraModel.unload

    def losing(self):
        plain = unload(self)
        plain.get_parameter(lost).data.copy_(base[lost])
        return plain

    monkeypatch.setattr(peft.LoraModel, "unload", losing)
    with pytest.raises(
        AssertionError, match=f"1 trained tensors are not in the merged model, first .*{re.escape(lost)}"
    ):
        merge(str(tmp_path / "out"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


# ---------------------------------------------------------------------------------------------------------- new tokens

NEW = [348, 349, 350]


def step(model, args):
    """Two optimizer steps on a text with and without new tokens."""
    optimizer = mv.make_optimizer(model, args)
    ids = torch.tensor([[5, 349, 70, 350, 348, 9, 33]])
    model.train().set_attn_implementation("sdpa")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            predicted = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(predicted, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("base, flags", [
    ("tokens", {}), ("tied", {}), ("tokens", {"bits": 4}), ("tokens", {"bf16": True}), ("tokens", {"use_dora": True}),
])  # fmt: skip
def test_rows_of_new_tokens_are_trained(bases, base, flags, tmp_path):
    """They and no others move, in embeddings and head; they are in the adapter, go on, resume and are merged."""
    args = SFTArguments(model_id=str(bases[base]), **LORA, **flags)
    torch.manual_seed(0)
    model, encoder = mv.load_model(args, "cpu"), mv.Encoder(args.model_id, args)
    said = mv.describe_new_tokens(model, encoder)
    assert said.strip().startswith(
        "new tokens 3 (<scan>, <side>, <report>): embeddings: their rows are trained beside"
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, args)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name]) and "lora_" not in name}
    rows = {name for name in moved if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if base == "tied" else 2) and all(".visual.merger." in name for name in moved - rows)
    mv.save_model(model, encoder.processor, tmp_path / "out", args=args)

    ours = dict(model.named_parameters())
    onward = replace(args, lora_weight_path=str(tmp_path / "out"), lora_namespan_exclude=None)
    for again in (mv.load_model(args, "cpu", str(tmp_path / "out")), mv.load_model(onward, "cpu")):
        assert all(torch.equal(value, ours[name]) for name, value in again.named_parameters())
    plain = AutoModelForImageTextToText.from_pretrained(bases[base])
    weights = {name: plain.state_dict()[name].clone() for name in merged_names(base)}
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    for name, value in weights.items():
        changed = (merged.state_dict()[name] != value).any(1).nonzero()[:, 0].tolist()
        assert changed == NEW
        delta = next(
            p for n, p in ours.items() if "tokens_delta" in n and (name.split(".")[-2] in n or base == "tied")
        )
        assert torch.equal(merged.state_dict()[name][NEW], delta)
    torch.testing.assert_close(logits(merged), logits(loaded), rtol=0, atol=1e-5)


def merged_names(base):
    return ["model.language_model.embed_tokens.weight"] + (["lm_head.weight"] if base != "tied" else [])


def test_what_is_said_of_new_tokens_is_true(bases, monkeypatch):
    """Covered by adapters, trained with all rows, or not trained: as the model is."""

    def said(**flags):
        args = SFTArguments(model_id=str(bases["tokens"]), **flags)
        model = mv.load_model(args, "cpu")
        return mv.describe_new_tokens(model, mv.Encoder(args.model_id, args)).split("): ", 1)[1]

    covered, beside = "covered by the module's adapter", "their rows are trained beside the adapter"
    assert said(**{**LORA, "lora_namespan_exclude": None}) == f"embeddings: {covered}; head: {covered}"
    assert said(**{**LORA, "lora_namespan_exclude": "['lm_head']"}) == f"embeddings: {covered}; head: {beside}"
    assert said() == "embeddings: trained like all rows; head: trained like all rows"
    assert said(freeze_llm=True).startswith("embeddings: NOT trained; head: NOT trained: drop --freeze_llm")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert said(**LORA).endswith("launch with ddp.yaml or zero2.yaml")
    args = SFTArguments(model_id=str(bases["hub"]))
    assert mv.describe_new_tokens(mv.load_model(args, "cpu"), mv.Encoder(args.model_id, args)) == ""


def test_new_tokens_that_cannot_be_trained(bases, tmp_path):
    """A token without a row; an adapter to go on from with rows of other tokens."""
    args = SFTArguments(model_id=str(bases["tokens"]), **LORA)
    mv.save_model(mv.load_model(args, "cpu"), mv.load_processor(args.model_id), tmp_path / "out", args=args)
    shutil.copytree(bases["tokens"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens("<fourth>")
    tokenizer.save_pretrained(tmp_path / "base")
    onward = replace(args, model_id=str(tmp_path / "base"), lora_namespan_exclude=None,
                     lora_weight_path=str(tmp_path / "out"))  # fmt: skip
    with pytest.raises(mv.InputError, match=r"has rows of new tokens, .*350\].*351\].*: merge it"):
        mv.load_model(onward, "cpu")
    tokenizer.add_tokens([f"<more{i}>" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(mv.InputError, match="8 new tokens of its tokenizer, first '<more32>', have no row in its 384"):
        mv.load_model(replace(args, model_id=str(tmp_path / "base")), "cpu")


# ---------------------------------------------------------------------------------------- adapters of other programs


def test_plain_pefts_adapter_on_embeddings(bases, tmp_path):
    """peft stores the frozen embeddings beside it: they are loaded, and are not what the merged ones must equal."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(bases["hub"])
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(name.endswith("embed_tokens.base_layer.weight") for name in stored)
    asked = predict.AnswerArguments(model_id=str(tmp_path / "out"))
    torch.testing.assert_close(logits(predict.load_model(asked, "cpu")), logits(model), rtol=0, atol=1e-6)
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    assert not (tmp_path / "merged" / "README.md").exists()  # nothing is known of its training


def test_reference_table_knows_the_revision(bases, tmp_path):
    """DPO's precomputed log-probabilities of a hub model are those of one commit."""
    hub_cache(tmp_path / "cache", bases["hub"])
    mv.write_json(tmp_path / "data.json", [])
    args = train_dpo.DPOArguments(model_id="acme/tiny", cache_dir=str(tmp_path / "cache"))
    encoder = mv.Encoder(args.model_id, args)
    settings = train_dpo.reference_settings(args, str(tmp_path / "data.json"), str(tmp_path), encoder, [])
    assert settings["weights"] == {"acme/tiny": [f"acme/tiny at commit {REVISION}"]}
