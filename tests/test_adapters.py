"""LoRA, DoRA and QLoRA against plain peft: what is trained, what is written, and what another program reads back."""

import copy
import re
from functools import cache, partial

import multivideo as mv

import bitsandbytes as bnb
import merge_lora
import peft
import pytest
import torch
from merge_lora import merge
from reference import hf_inputs, hf_loss, write_clip
from safetensors.torch import load_file, save_file
from test_train import in_process, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from train_sft import normalize_record, sft_loss

NO_HEAD = "['lm_head', 'embed_tokens']"
LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
LAYERS = [f"model.language_model.layers.{i}.{name}" for i in range(2) for name in LAYER]
TOWER = [f"model.visual.blocks.{i}.{name}" for i in range(2)
         for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
MERGER = ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]
HEAD = ["lm_head", "model.language_model.embed_tokens"]
FROZEN = {"freeze_vision_tower": True, "freeze_merger": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At these sizes a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor(tiny_model):
    return AutoProcessor.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory):
    """A model whose head is its embedding matrix, as in Qwen2.5-VL-3B."""
    from make_demo import save_tiny_model

    path = tmp_path_factory.mktemp("models") / "tied"
    save_tiny_model(path, tie_word_embeddings=True)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with six records of two clips each."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        write_clip(folder / f"{i}.mp4", 56, 56 + 28 * (i % 2), 8, seed=i)
    records = [
        {"id": str(i), "video": [f"{i % 4}.mp4", f"{(i + 1) % 4}.mp4"], "conversations": [
            {"from": "human", "value": "<video>\n<video>\nWhat?"}, {"from": "gpt", "value": f"Number {i}."}]}
        for i in range(6)
    ]  # fmt: skip
    mv.write_json(folder / "data.json", records)
    return folder


@pytest.fixture(scope="module")
def records(data):
    return list(mv.load_records(str(data / "data.json"), normalize_record))


def arguments(model, **kwargs):
    """LoRA without dropout, which would differ between a packed row and single samples."""
    common = {"lora_enable": True, "freeze_llm": True, "lora_rank": 4, "lora_dropout": 0.0,
              "video_min_pixels": 784, "learning_rate": 1e-2}  # fmt: skip
    return mv.TrainingArguments(model_id=model, **{**common, **kwargs})


def plain(args):
    """The base model as anybody loads it."""
    model = AutoModelForImageTextToText.from_pretrained(args.model_id, **mv.quantization(args, None, "cpu"))
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' inference kernel on such CPUs computes in bf16
    return model.eval()


@torch.no_grad()
def plain_loss(model, args, records, data, processor):
    """Summed over the records, one at a time through the HF processor and the HF path."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return sum(hf_loss(model, *hf_inputs(record, str(data), args, processor)).item() for record in records)


@torch.no_grad()
def logits(model, args, records, data, processor):
    """Logits of the first record, two videos, on the HF path."""
    inputs, _ = hf_inputs(records[0], str(data), args, processor)
    return model.eval()(**inputs, use_cache=False).logits


@pytest.fixture(scope="module")
def of_base(records, data, processor):
    """(loss of two records, logits of the first) of a base model, computed once for each."""

    @cache
    def compute(model_path, bits):
        args = arguments(model_path, bits=bits)
        base, rest = plain(args), (args, records[:2], data, processor)
        return plain_loss(base, *rest), logits(base, *rest)

    return compute


def packed_loss(model, args, records, data):
    """Summed over the records, packed into one row."""
    encoder = mv.Encoder(args.model_id, args)
    inputs, targets, _ = mv.pack([encoder(record, str(data)) for record in records], encoder, "cpu")
    return sft_loss(model(**inputs).logits, targets)


def train(model, args, records, data, steps=3):
    """A few steps on one row; returns the losses. Every trainable parameter must get a gradient."""
    optimizer, losses = mv.make_optimizer(model, args), []
    for _ in range(steps):
        loss = packed_loss(model.train(), args, records, data)
        loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert not [name for name, p in trained.items() if not optimizer.state[p]["exp_avg_sq"].any()]
    return losses


def frozen_weights(model):
    """Bits of what must not move, by name in the base model."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


CASES = {  # flags → adapted modules, modules trained in full
    "lora": ({**FROZEN, "lora_namespan_exclude": NO_HEAD}, LAYERS, []),
    "dora": ({**FROZEN, "lora_namespan_exclude": NO_HEAD, "use_dora": True}, LAYERS, []),
    "embeddings with head": (FROZEN, LAYERS + HEAD, []),
    "tower and merger": ({"lora_namespan_exclude": NO_HEAD}, LAYERS, ["model.visual"]),
    "merger": ({"freeze_vision_tower": True}, LAYERS + HEAD, ["model.visual.merger"]),
    "tower": ({"freeze_merger": True, "use_dora": True}, LAYERS + HEAD,
              ["model.visual.patch_embed", "model.visual.blocks.0", "model.visual.blocks.1"]),
    "vision_lora": ({**FROZEN, "vision_lora": True}, LAYERS + HEAD + TOWER + MERGER, []),
    "vision_lora, merger in full": ({"freeze_vision_tower": True, "vision_lora": True}, LAYERS + HEAD + TOWER,
                                    ["model.visual.merger"]),
    "exclusions": ({**FROZEN, "lora_namespan_exclude": '["mlp", "layers.0", "lm_head", "embed"]'}, LAYERS[7:11], []),
    "last modules": ({"freeze_vision_tower": True, "num_lora_modules": 3}, [*LAYERS[12:], "lm_head"],
                     ["model.visual.merger"]),
    "last blocks in full": ({**FROZEN, "unfreeze_topk_vision": 1, "unfreeze_topk_llm": 1}, LAYERS[:7] + HEAD,
                            ["model.visual.blocks.1", "model.language_model.layers.1"]),
    "biases": ({"freeze_vision_tower": True, "lora_bias": "all"}, LAYERS + HEAD, ["model.visual.merger"]),
    "biases of adapted": ({**FROZEN, "lora_bias": "lora_only"}, LAYERS + HEAD, []),
    "tied": ({"lora_namespan_exclude": NO_HEAD}, LAYERS, ["model.visual"]),
    "qwen2_vl": ({"lora_namespan_exclude": NO_HEAD}, LAYERS, ["model.visual"]),
    "4 bits": ({"lora_namespan_exclude": NO_HEAD, "bits": 4}, LAYERS, ["model.visual"]),
    "8 bits": ({**FROZEN, "bits": 8, "vision_lora": True}, LAYERS + HEAD + TOWER + MERGER, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_adapter(case, tiny_model, tied_model, tiny_qwen2_vl, records, data, processor, of_base, tmp_path):
    """Trained packed, written, read by plain peft: equal before, after, merged; nothing frozen moved."""
    flags, targets, whole = CASES[case]
    model_path = {"tied": tied_model, "qwen2_vl": tiny_qwen2_vl}.get(case, tiny_model)
    args, two = arguments(model_path, **flags), records[:2]
    # --bits 8 rounds activations to 8 bits, too: a difference in the last bit may move one of them by a whole step
    close = 1e-5 if args.bits != 8 else 1e-3
    reference = partial(logits, args=args, records=records, data=data, processor=processor)
    torch.manual_seed(0)
    model = mv.load_model(args, "cpu")

    # what is trained
    assert sorted(model.targeted_module_names) == sorted(targets)
    assert model.peft_config["default"].modules_to_save == whole
    quantized = [name for name, module in model.get_base_model().named_modules()
                 if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]  # fmt: skip
    assert quantized == ([] if args.bits == 16 else [f"{name}.base_layer" for name in LAYERS])
    full = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    if args.lora_bias == "none":
        assert all(".modules_to_save.default." in name for name in full) and bool(full) == bool(whole)
    else:
        assert any(name.endswith("q_proj.base_layer.bias") for name in full)
        assert any(".visual.blocks." in name for name in full) == (args.lora_bias == "all")

    # a fresh adapter changes nothing
    base_loss, base_logits = of_base(model_path, args.bits)
    with torch.no_grad():
        assert packed_loss(model, args, two, data).item() == pytest.approx(base_loss, rel=1e-5)
    frozen = frozen_weights(model)
    losses = train(model, args, two, data)
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(value, frozen[name]) for name, value in frozen_weights(model).items())

    # written and read back, by us and by plain peft
    mv.save_model(model, processor, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(value.numel() and value.dtype == torch.float32 for value in saved.values())
    again = mv.load_model(args, "cpu", str(tmp_path))
    ours = dict(model.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in again.named_parameters())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in ours.items() if p.requires_grad
    }
    loaded = peft.PeftModel.from_pretrained(plain(args), tmp_path)
    assert loaded.peft_config["default"].base_model_name_or_path == model_path
    after = plain_loss(loaded.eval(), args, two, data, processor)
    with torch.no_grad():
        assert packed_loss(model.eval(), args, two, data).item() == pytest.approx(after, rel=1e-5)
    model.set_attn_implementation("sdpa")
    expected = reference(model)
    torch.testing.assert_close(reference(loaded), expected, rtol=0, atol=close)
    if args.lora_bias == "none":  # the model without its adapter: what DPO and GRPO take as the reference
        with model.disable_adapter():
            torch.testing.assert_close(reference(model), base_logits, rtol=0, atol=close)
    # merged: a plain checkpoint; a QLoRA adapter goes into the 16-bit base
    unmerged = expected
    if args.bits < 16:
        plain_base = AutoModelForImageTextToText.from_pretrained(model_path)
        unmerged = reference(peft.PeftModel.from_pretrained(plain_base, tmp_path))
    assert merge(str(tmp_path), str(tmp_path / "merged")) < 1e-5
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reference(merged), unmerged, rtol=0, atol=1e-5)
    AutoProcessor.from_pretrained(tmp_path / "merged")


def test_merging_needs_no_second_copy_of_a_layer():
    """What peft merges is the same to rounding; nothing larger than ROWS rows in fp32 is made on the way."""

    class Allocations(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
                new = made.untyped_storage().data_ptr() not in known
                self.largest = max(self.largest, made.untyped_storage().nbytes() * new)
            return made

    many, few = 3 * merge_lora.ROWS + 5, 24
    for kind in ("head", "embeddings", "dora", "dora on embeddings"):
        torch.manual_seed(0)
        module = torch.nn.Embedding(many, few) if "embeddings" in kind else torch.nn.Linear(few, many, bias=False)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False,
                                 use_dora="dora" in kind)  # fmt: skip
        models = [peft.get_peft_model(copy.deepcopy(torch.nn.Sequential(module.bfloat16())), config) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        (layer,) = (part for part in models[0].modules() if isinstance(part, peft.tuners.lora.LoraLayer))
        with Allocations() as made:
            merge_lora.merge_layer(layer)
        ours, theirs = models[0].unload()[0].weight, models[1].merge_and_unload()[0].weight
        assert not torch.equal(ours, module.weight)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)
        assert (0 < made.largest <= merge_lora.ROWS * few * 4) == (kind != "dora on embeddings"), (kind, made.largest)


def test_merge_refuses(tiny_model, tmp_path):
    """A full model, a folder of something else, an output that exists, a base that went away or is another one."""
    for folder, found in ((tiny_model, "a full model"), (tmp_path, "no adapter_config.json")):
        with pytest.raises(mv.InputError, match=f"--model_id {folder}: {found}"):
            merge(folder, str(tmp_path / "merged"))
    model = mv.load_model(arguments(tiny_model, **FROZEN), "cpu")
    mv.save_model(model, AutoProcessor.from_pretrained(tiny_model), tmp_path / "adapter")
    with pytest.raises(mv.InputError, match="exists: name a new folder"):
        merge(str(tmp_path / "adapter"), str(tmp_path))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(tiny_model, "/nowhere"))
    with pytest.raises(mv.InputError, match="/nowhere is not there any more: say where with --base_model_id"):
        merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({k: v + torch.nan for k, v in weights.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(mv.InputError, match="merging changes a logit by nan"):
        merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), base_model_id=tiny_model)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("exclude", [None, "['lm_head']", "['embed_tokens']"])
def test_adapters_on_tied_embeddings_are_refused(tied_model, exclude):
    """peft would train two adapters on one matrix, and merge both into it."""
    with pytest.raises(mv.InputError, match=re.escape(f'give --lora_namespan_exclude "{NO_HEAD}"')):
        mv.load_model(arguments(tied_model, lora_namespan_exclude=exclude), "cpu")


def test_nothing_left_to_adapt(tiny_model):
    with pytest.raises(mv.InputError, match="leaves no module to adapt"):
        mv.load_model(arguments(tiny_model, lora_namespan_exclude="['model', 'lm_head']"), "cpu")


@pytest.mark.parametrize("bits", [16, 4, 8])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_types(tiny_model, precision, bits):
    """What is trained is fp32 under autocast; what is frozen has the low type, the originals of the tower too."""
    model = mv.load_model(arguments(tiny_model, bits=bits, **{precision: True}), "cpu")
    low = torch.float16 if precision == "fp16" else torch.bfloat16
    integers = {16: set(), 4: {torch.uint8}, 8: {torch.int8}}[bits]
    full = low if precision == "pure_bf16" else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {full}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {low} | integers


@pytest.mark.parametrize("quant_type, double_quant, bf16", [("nf4", True, False), ("fp4", False, True)])
def test_quantisation_flags(tiny_model, quant_type, double_quant, bf16):
    args = arguments(tiny_model, bits=4, quant_type=quant_type, double_quant=double_quant, bf16=bf16)
    layer = mv.load_model(args, "cpu").get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested) == (quant_type, double_quant)
    assert layer.compute_dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("dora", [False, True])
def test_inputs_of_adapters_stay_in_half_precision(tiny_model, dora):
    """peft's own cast to fp32 would be undone by autocast; DoRA computes norms in the type of its input."""
    model = mv.load_model(arguments(tiny_model, bf16=True, use_dora=dora, **FROZEN), "cpu")
    layer = next(module for module in model.modules() if hasattr(module, "lora_A") and len(module.lora_A))
    seen = set()
    layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, layer.in_features, dtype=torch.bfloat16))
    assert seen == {torch.float32 if dora else torch.bfloat16}


def test_learning_rates(tiny_model):
    """Adapters in the tower and in the merger, and tower and merger in full, have those parts' rates."""
    rates = {"learning_rate": 1e-4, "vision_lr": 2e-6, "merger_lr": 1e-5}
    for flags in ({}, {**FROZEN, "vision_lora": True}, {"freeze_vision_tower": True, "vision_lora": True}):
        args = arguments(tiny_model, **rates, **flags)
        model = mv.load_model(args, "cpu")
        names = {id(p): name for name, p in model.named_parameters()}
        seen = set()
        for group in mv.make_optimizer(model, args).param_groups:
            for name in (names[id(p)] for p in group["params"]):
                part = "merger_lr" if "merger" in name else "vision_lr" if "visual" in name else "learning_rate"
                assert group["lr"] == rates[part], name
                seen.add(part)
        assert seen == set(rates)


@pytest.mark.parametrize("bits", [16, 4])
def test_checkpointing_changes_nothing(tiny_model, records, data, bits):
    """Recomputed or kept: the same loss and gradients, with frozen embeddings and without any hook on the inputs."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        args = arguments(tiny_model, lora_dropout=0.1, bits=bits, gradient_checkpointing=checkpointing)
        model = mv.load_model(args, "cpu").train()
        loss = packed_loss(model, args, records[:3], data)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (recomputed_loss, recomputed) = results
    assert recomputed_loss == loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_evaluation_leaves_quantised_training_alone(tiny_model, records, data, bits):
    """bitsandbytes repacks 4-bit weights in eval(): the gradients of the next step must not know of it."""
    args, gradients = arguments(tiny_model, bits=bits), []
    for evaluate in (False, True):
        torch.manual_seed(0)
        model = mv.load_model(args, "cpu")
        if evaluate:
            with torch.no_grad():
                packed_loss(model.eval(), args, records[:1], data)
        packed_loss(model.train(), args, records[:2], data).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.fixture(scope="module")
def line(tiny_model, data):
    """Flags of the launched runs: six steps of two samples."""
    return ["--model_id", tiny_model, "--data_path", data / "data.json", "--nframes", 4, "--video_resized_width", 56,
            "--video_resized_height", 56, "--max_steps", 6, "--per_device_train_batch_size", 2, "--learning_rate",
            3e-3, "--save_steps", 3, "--lora_enable", "True", "--freeze_llm", "True", "--lora_rank", 4]  # fmt: skip


@pytest.mark.parametrize("flags", ["", "--bits 4 --bf16 True --freeze_vision_tower True"])
def test_resume_is_bit_equal(line, tmp_path, monkeypatch, capsys, flags):
    """Six steps, or three and three: the same metrics and the same files, with dropout on."""
    in_process(monkeypatch, *line, *flags.split(), "--output_dir", tmp_path / "out")
    assert "; LoRA of rank 4 on 16 modules;" in capsys.readouterr().err
    straight = metrics(tmp_path / "out"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert straight[0][-1]["loss"] < straight[0][0]["loss"] - 0.3
    resume = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3"]
    in_process(monkeypatch, *line, *flags.split(), "--output_dir", tmp_path / "again", *resume)
    assert metrics(tmp_path / "again") == straight[0][3:]
    resumed = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(value, straight[1][name]) for name, value in resumed.items())
    assert not (tmp_path / "again" / "model.safetensors").exists()
    if not flags:
        with pytest.raises(mv.InputError, match="r 4 there, 8 here; 62 tensors|r 4 there, 8 here"):
            in_process(monkeypatch, *line, "--lora_rank", 8, "--output_dir", tmp_path / "other", *resume)
        with pytest.raises(mv.InputError, match="checkpoint-3 was written with --lora_enable True: go on as it began"):
            in_process(monkeypatch, *line[:-6], "--output_dir", tmp_path / "other", *resume)


def test_weight_path(tiny_model, data, records, processor, of_base, tmp_path):
    """An adapter to go on from, plain peft's own included; what it lacks of the tower starts from the base."""
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    other = peft.get_peft_model(base, config)
    other.save_pretrained(tmp_path)
    args = arguments(tiny_model, lora_rank=3, lora_alpha=5, lora_weight_path=str(tmp_path))
    expected = plain_loss(other.eval(), args, records[:2], data, processor)
    assert expected != pytest.approx(of_base(tiny_model, 16)[0], rel=1e-3)
    for flags in (FROZEN, {}):
        model = mv.load_model(
            arguments(tiny_model, lora_rank=3, lora_alpha=5, lora_weight_path=str(tmp_path), **flags), "cpu"
        )
        assert len(model.targeted_module_names) == 4 and model.peft_config["default"].lora_dropout == 0.0
        assert packed_loss(model, args, records[:2], data).item() == pytest.approx(expected, rel=1e-5)
        train(model, args, records[:2], data)
    # now with a trained tower in it: it has no place in a run that freezes the tower
    mv.save_model(model, processor, tmp_path / "tower")
    kwargs = {"lora_rank": 3, "lora_alpha": 5, "lora_weight_path": str(tmp_path / "tower")}
    with pytest.raises(mv.InputError, match=r"\d+ tensors have no place here, first .*visual"):
        mv.load_model(arguments(tiny_model, **kwargs, **FROZEN), "cpu")
    again = mv.load_model(arguments(tiny_model, **kwargs), "cpu")
    ours = dict(model.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in again.named_parameters())
    # a damaged one
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: value for name, value in weights.items() if "layers.1.self_attn.q_proj.lora_A" not in name},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(mv.InputError, match=r"1 tensors are not there, first .*layers\.1\.self_attn\.q_proj\.lora_A"):
        mv.load_model(args, "cpu")
