"""train_cls.py: the model against the plain library, losses and metrics against others', and whole runs."""

import contextlib
import json
import math
import random
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import multivideo as mv

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import torchvision
import upstream_commands
from datasets import Dataset, Features
from PIL import Image
from reference import qwen_messages, write_clip
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics as sk
from test_train import ROOT, metrics
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import train_cls
from train_cls import MULTI, REGRESSION, SINGLE

COLOURS = ["blue", "green", "red"]
NAMES = dict(enumerate(COLOURS))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At these sizes a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of every kind (videos of mixed sizes, an image, text only), one file for each problem type."""
    folder = tmp_path_factory.mktemp("cls")
    for i in range(4):
        write_clip(folder / f"{i}.mp4", 56 + 28 * (i % 3), 56, 8, seed=i)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / "still.png")
    media = [{"video": ["0.mp4", "1.mp4"]}, {"video": "2.mp4"}, {}, {"image": "still.png"},
             {"video": ["3.mp4", "2.mp4", "0.mp4"]}, {"video": ["1.mp4"], "image": ["still.png"]}]  # fmt: skip
    records = [{"id": f"r{i}", **media[i % 6], "prompt": f"Which colour{'?' * (i % 3 + 1)}"} for i in range(13)]
    labels = {
        SINGLE: [COLOURS[i % 3] for i in range(13)],
        MULTI: [[name for k, name in enumerate(COLOURS) if (i >> k) & 1] for i in range(13)],
        REGRESSION: [50 + 10 * math.sin(i) for i in range(13)],
    }
    for kind, values in labels.items():
        mv.write_json(folder / f"{kind}.json", [{**r, "label": v} for r, v in zip(records, values)])
    return folder


def arguments(model, **kwargs):
    args = train_cls.ClassificationArguments(model_id=model, data_path="data.json", video_min_pixels=784, **kwargs)
    args.check(set())
    return args


def load(folder, model_path, problem_type=SINGLE, path=None, **kwargs):
    """(args, records, encoder, config, model) as main() makes them."""
    args = arguments(model_path, problem_type=problem_type, **kwargs)
    source = str(folder / f"{problem_type}.json")
    normalize = train_cls.partial(
        train_cls.normalize_record, problem_type=args.problem_type, default_prompt=None, labels=args.labels
    )
    records = mv.load_records(source, normalize, train_cls.FEATURES)
    encoder = mv.Encoder(model_path, args)
    config = train_cls.make_config(records, args, encoder)
    return args, records, encoder, config, mv.load_model(
        args, "cpu", path, train_cls.classifier_class(config.model_type), config
    )  # fmt: skip


def packed_logits(model, encoder, config, records, folder):
    inputs, targets = train_cls.pack([encoder(record, str(folder)) for record in records], encoder, config, "cpu")
    return model(**inputs).logits, targets


def hf_batch(records, folder, args, processor, padding_side=None):
    """Prompts through qwen_vl_utils and the HF processor, in one padded batch."""
    import qwen_vl_utils

    texts, images, videos = [], [], []
    for record in records:
        messages = qwen_messages(record, folder, args)
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        stills, clips, _ = qwen_vl_utils.process_vision_info(messages, True, return_video_metadata=True)
        images, videos = images + (stills or []), videos + (clips or [])
    kwargs = {}
    if videos:
        kwargs = {"videos": [video for video, _ in videos], "video_metadata": [about for _, about in videos]}
    inputs = processor(text=texts, images=images or None, **kwargs, do_resize=False, do_sample_frames=False,
                       padding=True, padding_side=padding_side or "right", return_tensors="pt")  # fmt: skip
    inputs["position_ids"] = mv.qwen_position_ids(inputs, AutoConfig.from_pretrained(args.model_id))
    return inputs


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family, head", [("qwen2_5_vl", {}), ("qwen2_5_vl", {"mlp_head_dim": 24}), ("qwen2_vl", {})])
def test_packed_equals_plain(family, head, tiny_model, tiny_qwen2_vl, folder, tmp_path):
    """Logits and gradients of a packed row are those of the library's base model and of its classifier, saved."""
    path = tiny_model if family == "qwen2_5_vl" else tiny_qwen2_vl
    args, records, encoder, config, model = load(folder, path, **head)
    records, processor = [records[i] for i in range(6)], encoder.processor
    with torch.no_grad():
        for weight in model.score.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    logits, targets = packed_logits(model.eval(), encoder, config, records, folder)
    F.cross_entropy(logits, targets, reduction="sum").backward()

    # one at a time: the base model as anybody loads it, the head by hand
    base = AutoModel.from_pretrained(path)
    weights = [weight.detach().clone().requires_grad_() for weight in model.score.parameters()]
    for record, ours, target in zip(records, logits.detach(), targets):
        last = base(**hf_batch([record], str(folder), args, processor), use_cache=False).last_hidden_state[0, -1]
        if head:
            last, weight = F.gelu(F.linear(last, weights[0], weights[1])), weights[2]
        else:
            (weight,) = weights
        theirs = F.linear(last, weight)
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-5)
        F.cross_entropy(theirs, target).backward()
    for ours, theirs in zip(model.model.parameters(), base.parameters()):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp_min(1e-3)
    for ours, theirs in zip(model.score.parameters(), weights):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)

    # saved, and loaded by the class alone: padded on either side, with the library's own loss
    mv.save_model(model, processor, tmp_path)
    plain, info = train_cls.classifier_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and "flash" not in plain.config._attn_implementation
    )
    assert plain.config.id2label == NAMES and plain.config.label2id["red"] == 2
    assert plain.config.problem_type == SINGLE
    for side in ("left", "right"):
        inputs = hf_batch(records, str(folder), args, processor, side)
        assert (inputs["attention_mask"] == 0).any()
        with torch.no_grad():
            output = plain.eval()(**inputs, labels=targets)
        torch.testing.assert_close(output.logits, logits.detach(), rtol=0, atol=1e-5)
        del inputs["position_ids"]  # the class counts them itself
        with torch.no_grad():
            assert torch.equal(plain(**inputs, labels=targets).logits, output.logits)
        assert output.loss.item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_classes_are_listed_with_likely_typing_errors():
    """Counts, and names that are rare, differ by spaces, case or one letter, or are numbers among words."""

    def notes(**counts):
        return train_cls.describe_labels(Counter(counts))

    first, *found = train_cls.describe_labels(Counter({"green": 120, "red": 110, "grren": 1, "Green ": 1, "3": 1}))
    assert first == "5 classes: 'green' 120, 'red' 110, 'grren' 1, 'Green ' 1, '3' 1"
    assert found == [
        "rare: '3' (1), 'Green ' (1), 'grren' (1)",
        "mixed types: '3' (1) among 'green' (120), 'red' (110), 'grren' (1), 'Green ' (1)",
        "differ in spaces or case only: 'green' (120), 'Green ' (1)",
        "nearly the same: 'green' (120), 'Green ' (1), 'grren' (1)",
    ]
    assert notes(colour=9, color=9)[1:] == ["nearly the same: 'colour' (9), 'color' (9)"]
    assert notes(opne=9, open=9)[1:] == ["nearly the same: 'opne' (9), 'open' (9)"]
    assert train_cls.describe_labels(Counter({"straße": 5, "STRASSE": 5, "a  b": 5, "a b": 5}))[1:] == [
        "differ in spaces or case only: 'straße' (5), 'STRASSE' (5)",
        "differ in spaces or case only: 'a  b' (5), 'a b' (5)",
    ]
    assert train_cls.describe_labels(Counter({"true": 9, "yes": 9}))[1:] == ["mixed types: 'true' (9) among 'yes' (9)"]
    for sound in (
        {"male": 50, "female": 44},
        {"left": 5, "right": 4},
        {"cat": 9, "car": 9},
        {"true": 5, "false": 3},
        {f"class_{i}": 5 for i in range(30)},
        {str(i): 7 for i in range(4)},
        {"on": 9, "off": 1},
    ):
        lines = train_cls.describe_labels(Counter(sound))
        assert len(lines) == 1 and lines[0].startswith(f"{len(sound)} classes: "), lines
    assert train_cls.describe_labels(Counter({f"class_{i}": 5 for i in range(30)}))[0].endswith(" 5, and 10 more")


def test_samples_do_not_see_each_other(tiny_model, folder):
    """Other pixels in one sample move its own logits only, and every one of its videos counts."""
    _, records, encoder, config, model = load(folder, tiny_model)
    samples = [encoder(records[i], str(folder)) for i in (0, 4, 2)]
    run = lambda rows: model.eval()(**train_cls.pack(rows, encoder, config, "cpu")[0]).logits.detach()
    before = run(samples)
    patches, start = samples[1]["patches"].copy(), 0
    for t, h, w in samples[1]["video_grid_thw"]:
        changed = patches.copy()
        changed[start : start + t * h * w] = 255 - changed[start : start + t * h * w]
        start += t * h * w
        after = run([samples[0], samples[1] | {"patches": changed}, samples[2]])
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.allclose(after[1], before[1], atol=1e-7)


def test_rows_without_samples_reach_every_parameter(tiny_model, folder):
    """A rank without a sample, and a row of text only: all gradients are there, zeros for the former."""
    args, records, encoder, config, model = load(folder, tiny_model)
    for rows in ([], [records[2]]):
        model.zero_grad()
        logits, targets = packed_logits(model, encoder, config, rows, folder)
        assert logits.shape == (len(rows), 3)
        train_cls.objective(logits, targets, args, None).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        moved = {name for name, gradient in gradients.items() if gradient.any()}
        assert moved == ({name for name in gradients if "visual" not in name} if rows else set())


def test_checkpointing_changes_nothing(tiny_model, folder):
    results = []
    for checkpointing in (False, True):
        _, records, encoder, config, model = load(folder, tiny_model, gradient_checkpointing=checkpointing)
        logits, targets = packed_logits(model.train(), encoder, config, [records[i] for i in range(3)], folder)
        F.cross_entropy(logits, targets).backward()
        results.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-8)


def test_loading_gives_all_weights_but_the_head(tiny_model, tiny_qwen2_vl, folder, tmp_path):
    """Names as on the hub and as in the model; a file that lacks anything else is refused."""
    for path in (tiny_model, tiny_qwen2_vl):
        whole = AutoModelForImageTextToText.from_pretrained(path)
        renamed = tmp_path / Path(path).name
        shutil.copytree(path, renamed)
        save_file(dict(whole.named_parameters()), renamed / "model.safetensors", metadata={"format": "pt"})
        assert load_file(renamed / "model.safetensors").keys() != load_file(Path(path) / "model.safetensors").keys()
        for source in (path, str(renamed)):
            model = load(folder, source)[-1]
            expected = dict(whole.model.named_parameters())
            assert all(torch.equal(p, expected[name]) for name, p in model.model.named_parameters())
    weights = load_file(renamed / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(weights, renamed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mv.InputError, match="lacks 2 weights, first 'model.language_model.layers.1.mlp.up_proj"):
        load(folder, str(renamed))


def test_tf32_leaves_the_head_alone():
    """The head's products of a packed row, forward and backward, are in fp64: TF32 is for fp32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    seen, head = [], train_cls.ScoreLinear(8, 3, bias=False)
    hidden = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    with Products(), torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        logits.sum().backward()
    assert logits.dtype == head.weight.grad.dtype == torch.float32 and seen == [torch.float64] * 3


def test_head_begins_near_zero_and_by_seed(tiny_model, folder):
    heads = [load(folder, tiny_model, seed=seed)[-1].score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1e-3, rel=0.2)
    score = load(folder, tiny_model, mlp_head_dim=512)[-1].score
    assert score[0].weight.std().item() == pytest.approx(0.02, rel=0.1) and not score[0].bias.any()
    assert score[3].weight.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("kind", ["own head", "tied", "shards"])
def test_head_from_label_words(kind, folder, tmp_path):
    """With labels of one token, the first logits are the language model's own for these words."""
    from make_demo import save_tiny_model

    save_tiny_model(tmp_path / "model", tie_word_embeddings=kind == "tied", initializer_range=0.1)
    if kind == "shards":
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model").save_pretrained(
            tmp_path / "model", max_shard_size="100KB"
        )
        (tmp_path / "model" / "model.safetensors").unlink()
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "model").tokenizer
    words = [word for word in ("system", "user", "assistant", "You", "one", "is", " red")
             if len(tokenizer.encode(word)) == 1][:3]  # fmt: skip
    records = json.loads((folder / f"{SINGLE}.json").read_text())
    relabelled = [{**r, "label": words[COLOURS.index(r["label"])]} for r in records]
    for record in relabelled:
        for kind in ("video", "image"):
            files = record.get(kind, [])
            record[kind] = [str(folder / name) for name in ([files] if isinstance(files, str) else files)]
    mv.write_json(tmp_path / f"{SINGLE}.json", relabelled)
    args, records, encoder, config, model = load(tmp_path, str(tmp_path / "model"), head_init="label_words")
    with torch.no_grad():
        logits, _ = packed_logits(model, encoder, config, [records[0], records[4]], tmp_path)
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        ids = [tokenizer.encode(config.id2label[i])[0] for i in range(3)]
        for record, ours in zip([records[0], records[4]], logits):
            inputs = hf_batch([record], str(tmp_path), args, encoder.processor)
            torch.testing.assert_close(ours, whole(**inputs).logits[0, -1, ids], rtol=0, atol=1e-5)
        # several tokens: their mean
        names = ["red blue green", "x"]
        expected = whole.lm_head.weight[tokenizer.encode(names[0])].mean(0)
        torch.testing.assert_close(train_cls.label_word_rows(args, names)[0], expected)


def test_the_head_is_a_part_of_its_own(tiny_model, folder):
    """--head_lr is its rate; with everything else frozen it is what is trained."""
    args, *_, model = load(folder, tiny_model, head_lr=1e-2, learning_rate=1e-4, freeze_llm=True,
                           freeze_vision_tower=True, freeze_merger=True, bf16=True)  # fmt: skip
    (group,) = mv.make_optimizer(model, args).param_groups
    assert group["lr"] == 1e-2 and group["params"][0] is model.score.weight
    assert model.score.weight.dtype == torch.float32 and model.model.visual.blocks[0].attn.qkv.weight.dtype == (
        torch.bfloat16
    )
    args = arguments(tiny_model, learning_rate=1e-4, vision_lr=1e-6)
    rates = {mv.part_of(n): g["lr"] for g in mv.make_optimizer(load(folder, tiny_model)[-1], args).param_groups
             for n, p in [("score.weight", None)] if any(q.shape == (3, 64) for q in g["params"])}  # fmt: skip
    assert rates == {"head": 1e-4}


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_logits_are_fp32(tiny_model, folder, precision):
    """Under autocast and with bf16 weights: no bf16 steps."""
    _, records, encoder, config, model = load(folder, tiny_model, **{precision: True})
    low = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.no_grad(), low:
        logits, _ = packed_logits(model, encoder, config, [records[0]], folder)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


# ---------------------------------------------------------------------------------------------------- objectives


def test_losses_against_torch_and_hand_values():
    generator = torch.Generator().manual_seed(0)
    logits, classes = torch.randn(7, 4, generator=generator), torch.tensor([0, 1, 2, 3, 3, 3, 1])
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1])
    assert train_cls.cross_entropy(logits, classes) == pytest.approx(torch.nn.CrossEntropyLoss()(logits, classes) * 7)
    assert train_cls.focal_loss(logits, classes, 0.0) == pytest.approx(train_cls.cross_entropy(logits, classes))
    p = np.exp(logits.double().numpy())
    p = (p / p.sum(1, keepdims=True))[range(7), classes]
    assert train_cls.cross_entropy(logits, classes, weights).item() == pytest.approx(
        (-np.log(p) * weights.numpy()[classes]).sum(), rel=1e-5
    )
    assert train_cls.focal_loss(logits, classes, 1.5, weights).item() == pytest.approx(
        (-np.log(p) * (1 - p) ** 1.5 * weights.numpy()[classes]).sum(), rel=1e-5
    )
    # p = 1/2 and γ = 2: a quarter of log 2
    assert train_cls.focal_loss(torch.zeros(1, 2), torch.tensor([1]), 2.0).item() == pytest.approx(math.log(2) / 4)
    two = torch.stack([torch.zeros(7), logits[:, 0]], 1)
    targets = (classes > 1).float()
    expected = torchvision.ops.sigmoid_focal_loss(logits[:, 0], targets, alpha=-1, gamma=2, reduction="sum")
    assert train_cls.focal_loss(two, targets.long(), 2.0).item() == pytest.approx(expected.item(), rel=1e-5)

    def objective(name, targets, **kwargs):
        return train_cls.objective(logits, targets, SimpleNamespace(loss_type=name, **kwargs), None).item() / 7

    several, numbers = (torch.rand(7, 4, generator=generator) > 0.5).float(), torch.randn(7, 4, generator=generator)
    assert objective("bce", several) == pytest.approx(torch.nn.BCEWithLogitsLoss()(logits, several).item())
    assert objective("mse", numbers) == pytest.approx(torch.nn.MSELoss()(logits, numbers).item())
    assert objective("huber", numbers, huber_delta=0.3) == pytest.approx(
        torch.nn.HuberLoss(delta=0.3)(logits, numbers).item()
    )
    for name in ("class_balanced_focal_loss", "focal_loss"):
        assert objective(name, classes, focal_gamma=2.0) == pytest.approx(
            train_cls.focal_loss(logits, classes, 2.0).item() / 7
        )
    assert objective("class_balanced_cross_entropy", classes) == pytest.approx(F.cross_entropy(logits, classes).item())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradients_are_finite(gamma):
    """Where the model is sure, right or wrong, in fp32: no 0 × ∞."""
    logits = torch.tensor([[200.0, 0], [0, 200], [30, 0], [0.1, 0]], requires_grad=True)
    train_cls.focal_loss(logits, torch.tensor([0, 0, 0, 1]), gamma).backward()
    assert logits.grad.isfinite().all() and logits.grad[1].abs().max() > 0.5
    double = torch.tensor([[3.0, 0.5, -1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: -((1 - x.softmax(1)[0, 0]) ** gamma) * x.log_softmax(1)[0, 0], double
    )  # the formula itself
    assert train_cls.focal_loss(double.detach(), torch.tensor([0]), gamma).item() == pytest.approx(
        (-((1 - double.softmax(1)[0, 0]) ** gamma) * double.log_softmax(1)[0, 0]).item(), rel=1e-5
    )


def test_class_balanced_weights_are_the_papers():
    """(1 − β)/(1 − βⁿ), scaled to the number of classes; β = 0: none, β → 1: inverse frequencies."""
    w = train_cls.class_balanced_weights([1, 2], 0.9)
    assert w == pytest.approx([2 * 1 / (1 + 1 / 1.9), 2 * (1 / 1.9) / (1 + 1 / 1.9)])
    assert train_cls.class_balanced_weights([5, 500, 7], 0.0) == pytest.approx([1, 1, 1])
    inverse = np.array([1 / 5, 1 / 500, 1 / 7])
    assert train_cls.class_balanced_weights([5, 500, 7], 1 - 1e-9) == pytest.approx(
        3 * inverse / inverse.sum(), rel=1e-4
    )
    # effective number of samples by its own definition, 1 + β + β² + …
    effective = [sum(0.99**k for k in range(n)) for n in (3, 40)]
    assert np.divide(*train_cls.class_balanced_weights([3, 40], 0.99)) == pytest.approx(effective[1] / effective[0])


def test_class_balanced_order():
    """Every three draws have one of each class; every record comes; a function of seed and epoch; exact resume."""
    classes = np.array([0] * 20 + [1] * 3 + [2] * 7)
    order = train_cls.partial(train_cls.class_balanced_order, classes)
    epoch = order(7, 0)
    assert len(epoch) == 30 and all(sorted(classes[epoch[i : i + 3]]) == [0, 1, 2] for i in range(0, 30, 3))
    assert np.array_equal(epoch, order(7, 0)) and not np.array_equal(epoch, order(7, 1))
    assert not np.array_equal(epoch, order(8, 0))
    counts = np.bincount(epoch, minlength=30)
    assert set(counts[20:23]) == {3, 4} and set(counts[23:]) == {1, 2} and set(counts[:20]) == {0, 1}
    assert len({int(i) for e in range(20) for i in order(7, e)}) == 30
    assert len({tuple(classes[epoch[i : i + 3]]) for i in range(0, 30, 3)}) > 2  # no fixed order within
    whole = [window for window, _ in train_cls.itertools.islice(mv.step_windows(30, 4, 7, 0, order), 20)]
    resumed = [window for window, _ in train_cls.itertools.islice(mv.step_windows(30, 4, 7, 38, order), 10)]
    assert resumed == whole[10:]
    assert len(order(7, 0)) == 30 and len(train_cls.class_balanced_order(np.array([0, 0, 1, 1, 1]), 1, 1)) == 5


# ---------------------------------------------------------------------------------------------------- metrics


def test_metrics_against_scikit_learn():
    rng = np.random.default_rng(0)
    classes, p = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), 60)
    result, said = train_cls.classification_metrics(classes, p), p.argmax(1)
    assert result["eval_accuracy"] == (classes == said).mean()
    assert result["eval_balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(classes, said))
    assert result["eval_f1"] == pytest.approx(sk.f1_score(classes, said, average="macro"))
    assert result["eval_auroc"] == pytest.approx(sk.roc_auc_score(classes, p, multi_class="ovr"))
    assert result["eval_average_precision"] == pytest.approx(sk.average_precision_score(classes, p))
    assert sum(result["eval_confusion_matrix"][i][i] for i in range(4)) == (classes == said).sum()
    assert result["eval_confusion_matrix"][2][3] == ((classes == 2) & (said == 3)).sum()
    # two classes: the second one's
    two, p = rng.integers(0, 2, 50), rng.dirichlet(np.ones(2), 50)
    result = train_cls.classification_metrics(two, p)
    assert result["eval_auroc"] == pytest.approx(sk.roc_auc_score(two, p[:, 1]))
    assert result["eval_average_precision"] == pytest.approx(sk.average_precision_score(two, p[:, 1]))
    # a class without any sample: means over the others, nothing undefined, the matrix whole
    few, p = np.array([0, 2, 2, 0]), np.eye(3)[[0, 2, 1, 0]] * 0.8 + 0.1
    result = train_cls.classification_metrics(few, p)
    assert result["eval_balanced_accuracy"] == 0.75 and result["eval_auroc"] == pytest.approx(
        np.mean([sk.roc_auc_score(few == c, p[:, c]) for c in (0, 2)])
    )
    assert np.array(result["eval_confusion_matrix"]).shape == (3, 3)
    assert "eval_auroc" not in train_cls.classification_metrics(np.array([1, 1]), np.array([[0.2, 0.8], [0.6, 0.4]]))

    truth, p = (rng.random((40, 3)) > 0.6).astype(int), rng.random((40, 3))
    result = train_cls.multi_label_metrics(truth, p)
    assert result["eval_accuracy"] == ((p > 0.5) == truth).all(1).mean()
    assert result["eval_f1"] == pytest.approx(np.mean([sk.f1_score(truth[:, c], p[:, c] > 0.5) for c in range(3)]))
    assert result["eval_auroc"] == pytest.approx(sk.roc_auc_score(truth, p, average="macro"))
    assert result["eval_average_precision"] == pytest.approx(sk.average_precision_score(truth, p, average="macro"))
    assert result["eval_confusion_matrix"] == sk.multilabel_confusion_matrix(truth, p > 0.5).tolist()
    one = train_cls.multi_label_metrics(truth[:, :1], p[:, :1])
    assert one["eval_f1"] == sk.f1_score(truth[:, 0], p[:, 0] > 0.5)
    assert one["eval_confusion_matrix"] == [sk.confusion_matrix(truth[:, 0], p[:, 0] > 0.5).tolist()]

    true = rng.normal(50, 10, (30, 2))
    said = true + rng.normal(0, 3, (30, 2))
    result = train_cls.regression_metrics(true, said, ["ef", "edv"])
    assert result["eval_mae/ef"] == pytest.approx(np.abs(true - said)[:, 0].mean())
    assert result["eval_rmse"] == pytest.approx(np.sqrt(((true - said) ** 2).mean(0)).mean())
    assert result["eval_r2"] == pytest.approx(sk.r2_score(true, said))
    assert result["eval_pearson/edv"] == pytest.approx(stats.pearsonr(true[:, 1], said[:, 1])[0])
    assert set(train_cls.regression_metrics(true[:1, :1], said[:1, :1], ["ef"])) == {"eval_mae", "eval_rmse"}
    assert train_cls.regression_metrics(true[:, :1], 0 * said[:, :1], ["ef"])["eval_pearson"] == 0


# ---------------------------------------------------------------------------------------------------- records

VIDEO = {"video": ["a.mp4", "b.mp4"]}
ASK = [{"type": "video", "video": "a.mp4"}, {"type": "video", "video": "b.mp4"}, {"type": "text", "text": "Open?"}]


@pytest.mark.parametrize("record", [
    {**VIDEO, "prompt": "<video>\n<video>\nOpen?"},
    {**VIDEO, "prompt": "Open?"},
    {**VIDEO},
    {**VIDEO, "conversations": [{"from": "human", "value": "<video><video>Open?"}]},
    {**VIDEO, "messages": [{"role": "user", "content": "Open?"}]},
    {"prompt": [{"role": "user", "content": ASK}]},
])  # fmt: skip
def test_forms_of_a_prompt(record):
    """All are the same row."""
    row = train_cls.normalize_record({"id": 7, **record, "label": "yes"}, "x", default_prompt="Open?")
    (turn,) = row["messages"]
    assert [part["type"] for part in turn["content"]] == ["video", "video", "text"]
    assert [part["files"] for part in turn["content"]] == [["a.mp4"], ["b.mp4"], []]
    assert turn["content"][2]["text"] == "Open?" and row["completions"] == []
    assert (row["id"], row["label"], row["target"]) == ("7", ["yes"], [])


@pytest.mark.parametrize("name, problem_type, values", [
    ("cls_single_label.json", SINGLE, [(["open"], []), (["closed"], []), (["open"], [])]),
    ("cls_multi_label.jsonl", MULTI, [(["car", "cyclist"], []), ([], []), (["car"], [])]),
    ("cls_regression.jsonl", REGRESSION, [([], [55.5, 120.0]), ([], [38.0, 171.5])]),
])  # fmt: skip
def test_examples(name, problem_type, values):
    normalize = train_cls.partial(train_cls.normalize_record, problem_type=problem_type, default_prompt="Open?")
    rows = mv.load_records(str(ROOT / "examples" / name), normalize, train_cls.FEATURES)
    assert [(row["label"], row["target"]) for row in rows] == values
    assert all(row["messages"][-1]["content"][0]["type"] == "video" for row in rows)
    if problem_type == SINGLE:  # the default prompt is part of what is kept: another one gives other rows
        assert rows[1]["messages"][0]["content"][2]["text"] == "Open?"
        normalize = train_cls.partial(train_cls.normalize_record, problem_type=problem_type, default_prompt="Shut?")
        rows = mv.load_records(str(ROOT / "examples" / name), normalize, train_cls.FEATURES)
        assert rows[1]["messages"][0]["content"][2]["text"] == "Shut?"


def test_odd_records_raise_nothing_else():
    """Random damage to good records: a row of the schema, or a ValueError that begins with its place."""
    rng = random.Random(0)
    odd = [
        None,
        "",
        0,
        3,
        -1.5,
        True,
        math.nan,
        10**400,
        [],
        {},
        [None],
        [[]],
        {"a": None},
        "x",
        ["x"],
        b"x",
        {"x": 1},
    ]
    bases = [(kind, record) for name, kind in (("cls_single_label.json", SINGLE), ("cls_multi_label.jsonl", MULTI),
                                               ("cls_regression.jsonl", REGRESSION))
             for _, record in mv.read_records(str(ROOT / "examples" / name))]  # fmt: skip
    kept = refused = 0
    for _ in range(1500):
        kind, base = rng.choice(bases)
        record = json.loads(json.dumps(base))
        record[rng.choice([*record, "label", "labels", "prompt", "messages"])] = rng.choice(odd)
        try:
            row = train_cls.normalize_record(record, "here", kind, rng.choice([None, "?"]))
        except ValueError as error:
            refused += str(error).startswith("here: ")
        else:
            kept += all(type(x) is str for x in row["label"]) and all(type(x) is float for x in row["target"])
    assert kept + refused == 1500 and kept > 100 and refused > 500


@pytest.mark.parametrize("problem_type, field, label, target", [
    (SINGLE, "a b", ["a b"], []), (SINGLE, 3, ["3"], []), (SINGLE, True, ["true"], []), (SINGLE, -1, ["-1"], []),
    (MULTI, ["a", 2], ["a", "2"], []), (MULTI, [], [], []), (REGRESSION, 55, [], [55.0]),
    (REGRESSION, [55.5, -1], [], [55.5, -1.0]),
])  # fmt: skip
def test_labels(problem_type, field, label, target):
    for name in ("label", "labels"):
        row = train_cls.normalize_record({"prompt": "?", name: field}, "x", problem_type)
        assert (row["label"], row["target"]) == (label, target)


@pytest.mark.parametrize("problem_type, record, message", [
    (SINGLE, {"prompt": "?"}, "no 'label'"),
    (SINGLE, {"prompt": "?", "label": None}, "no 'label'"),
    (SINGLE, {"prompt": "?", "label": 1, "labels": 1}, "both 'label' and 'labels'"),
    (SINGLE, {"prompt": "?", "label": ["a"]}, "is ['a']: several classes: for them give --problem_type multi_label"),
    (SINGLE, {"prompt": "?", "label": 1.5}, "is 1.5: a class is a text or a whole number; for amounts give "),
    (SINGLE, {"prompt": "?", "label": " "}, "is ' ': a class is a text or a whole number"),
    (SINGLE, {"prompt": "?", "label": {"a": 1}}, "a dict of classes: write the names of those"),
    (MULTI, {"prompt": "?", "label": "a"}, "is 'a': one class where a list of them is expected: put it in […]"),
    (MULTI, {"prompt": "?", "label": ["a", "a"]}, "twice"),
    (REGRESSION, {"prompt": "?", "label": "55"}, "is '55': a target is a number, without quotes"),
    (REGRESSION, {"prompt": "?", "label": math.nan}, "is nan: a target must be finite"),
    (REGRESSION, {"prompt": "?", "label": [1, math.inf]}, "must be finite"),
    (REGRESSION, {"prompt": "?", "label": True}, "is True: a target is a number"),
    (REGRESSION, {"prompt": "?", "label": []}, "an empty list"),
    (SINGLE, {"label": 1}, "no 'prompt': add the question, or give --default_prompt"),
    (SINGLE, {"label": 1, "prompt": "?", "messages": [{"role": "user", "content": "?"}]}, "more than one of 'prompt'"),
    (SINGLE, {"label": 1, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
     "the last turn must be the user's: take the answer out"),
    (SINGLE, {"label": 1, "prompt": "<video>"}, "1 <video> tags for 0 videos"),
    (SINGLE, [1], "a record must be an object"),
])  # fmt: skip
def test_bad_records_are_named(problem_type, record, message):
    with pytest.raises(ValueError, match=f"^line 3: .*{re.escape(message)}"):
        train_cls.normalize_record(record, "line 3", problem_type)


@pytest.mark.parametrize("problem_type, label, message", [
    (SINGLE, "c", "field 'label' is 'c': 'c' is unknown; known are 'a', 'b': mend it, or name it in --labels"),
    (MULTI, ["b", "d", "c"], "'d', 'c' is unknown; known are 'a', 'b'"),
    (REGRESSION, 5, "field 'label' is 5: 1 where 2 are expected: a, b"),
])  # fmt: skip
def test_labels_known_beforehand(problem_type, label, message):
    normalize = train_cls.partial(train_cls.normalize_record, problem_type=problem_type)
    record = {"prompt": "?", "label": label}
    with pytest.raises(ValueError, match=f"^line 3: {re.escape(message)}" if problem_type != MULTI else message):
        normalize(record, "line 3", labels=["a", "b"])
    assert normalize(record, "line 3", labels=["b", "c", "d", "a"] if problem_type != REGRESSION else ["a"])


def made(values, tiny_model, problem_type=SINGLE, **kwargs):
    """The config for these labels."""
    args = arguments(tiny_model, problem_type=problem_type, **kwargs)
    rows = [train_cls.normalize_record({"id": f"r{i}", "prompt": "?", "label": label}, "x", problem_type)
            for i, label in enumerate(values)]  # fmt: skip
    records = Dataset.from_list(rows, features=Features.from_arrow_schema(train_cls.FEATURES))
    return records, train_cls.make_config(records, args, mv.Encoder(tiny_model, args))


def test_labels_found_or_given(tiny_model):
    names = lambda *values, **kwargs: list(made(values, tiny_model, **kwargs)[1].id2label.values())
    assert names("b", "a", "b") == ["a", "b"] and names("b", "a", labels=["b", "a"]) == ["b", "a"]
    assert names(10, 9, 2) == ["2", "9", "10"] and names(1, 0, num_labels=2) == ["0", "1"]
    assert names("yes", "no", num_labels=2) == ["no", "yes"] and names("--3", "-3", 2) == ["-3", "2", "--3"]
    assert names(["b"], [], ["a", "b"], problem_type=MULTI) == ["a", "b"]
    assert names(1.0, 2, problem_type=REGRESSION) == ["target"]
    assert names([1, 2], [3, 4], problem_type=REGRESSION) == ["target_0", "target_1"]
    assert names([1, 2], [3, 4], problem_type=REGRESSION, labels=["ef", "edv"]) == ["ef", "edv"]
    _, config = made([[10, 1], [20, 3], [30, 8]], tiny_model, REGRESSION)
    assert config.target_mean == pytest.approx([20, 4])
    assert config.target_std == pytest.approx([np.std([10, 20, 30]), np.std([1, 3, 8])])


@pytest.mark.parametrize("labels, kwargs, message", [
    (["a", "a"], {}, "all 2 records have the label 'a': there is nothing to tell apart"),
    (["a", "b"], {"labels": ["a", "b", "c"]}, "no record has the label 'c'"),
    ([0, 1], {"num_labels": 3}, "no record has the label '2'"),
    (["a", "b", "c"], {"num_labels": 2}, "--num_labels 2, but data.json has 3: a, b, c"),
    ([["a"], ["a", "b"]], {"problem_type": MULTI}, "every record has the label 'a'"),
    ([[], []], {"problem_type": MULTI}, "no record has any label"),
    ([[1, 2], [1], [1, 2, 3]], {"problem_type": REGRESSION},
     "expected 2 targets (target_0, target_1) in every record, 2 have another number:\n  • record r1: 1"),
    ([[5, 2], [5, 3]], {"problem_type": REGRESSION, "labels": ["ef", "edv"]}, "ef is 5 in all 2 records"),
    ([5, 6], {"problem_type": REGRESSION, "labels": ["ef", "edv"]}, "expected 2 targets (ef, edv)"),
    ([5, 6], {"problem_type": REGRESSION, "num_labels": 2}, "--num_labels 2, but data.json has 1: target"),
])  # fmt: skip
def test_bad_data_is_named(tiny_model, labels, kwargs, message):
    with pytest.raises(mv.InputError, match=re.escape(message)):
        made(labels, tiny_model, **kwargs)


def test_held_out_labels(tiny_model, capsys):
    _, config = made(["a", "b", "c"], tiny_model)
    held_out, _ = made(["a", "x", "a", "y", *["x"] * 9], tiny_model)
    with pytest.raises(mv.InputError, match=r"eval.json: unknown labels; known are 'a', 'b', 'c'\n  • 'x' in record "
                       r"r1, r4, r5, r6, r7 and 5 more\n  • 'y' in record r3"):  # fmt: skip
        train_cls.check_records(held_out, config, "eval.json")
    train_cls.check_records(made(["a", "b"], tiny_model)[0], config, "eval.json")
    assert "eval.json: no record has the label 'c': metrics are over the others" in capsys.readouterr().err
    _, config = made([5, 6], tiny_model, REGRESSION)
    with pytest.raises(mv.InputError, match="expected 1 targets"):
        train_cls.check_records(made([[5, 6], [7, 8]], tiny_model, REGRESSION)[0], config, "eval.json")


def test_weights_of_the_loss(tiny_model):
    records, config = made(["a", "b", "b"], tiny_model)
    make = lambda **kwargs: train_cls.make_weights(records, config, arguments(tiny_model, **kwargs), "cpu")
    assert make() is None and make(loss_type="focal_loss") is None
    assert make(loss_type="focal_loss", focal_alpha="1.0,7.5").tolist() == [1.0, 7.5]
    expected = train_cls.class_balanced_weights([1, 2], 0.9)
    for name in ("class_balanced_cross_entropy", "class_balanced_focal_loss"):
        assert make(loss_type=name, class_balanced_beta=0.9).tolist() == pytest.approx(expected)
    with pytest.raises(mv.InputError, match="--focal_alpha has 3 weights, but there are 2 classes: a, b"):
        make(loss_type="focal_loss", focal_alpha="1,2,3")


# ---------------------------------------------------------------------------------------------------- arguments


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
    """Parse flags behind a valid --data_path; problems come back as a list of lines."""
    (tmp_path / "data.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_cls.py"])

    def parse(*flags):
        try:
            return mv.parse_arguments(
                train_cls.ClassificationArguments, ["--data_path", "data.json", *map(str, flags)]
            )
        except SystemExit:
            return capsys.readouterr().err.rstrip("\n").split("\n  • ")[1:]

    return parse


@pytest.mark.parametrize("flags, message", [
    ("--loss_type mse", "--loss_type mse is not for --problem_type single_label_classification: choose cross_entropy"),
    ("--problem_type regression --loss_type focal_loss", "choose mse or huber"),
    ("--labels a b a", "--labels a b a: name each one once"),
    ("--labels a b --num_labels 3", "--num_labels 3, but --labels names 2"),
    ("--num_labels 0", "--num_labels 0: must be above 0"),
    ("--focal_gamma 1", "--focal_gamma needs --loss_type focal_loss"),
    ("--loss_type focal_loss --focal_gamma -1", "--focal_gamma -1.0: must be 0 or more"),
    ("--loss_type focal_loss --focal_alpha 1,x", "--focal_alpha 1,x: expected numbers"),
    ("--loss_type class_balanced_focal_loss --focal_alpha 1,2", "class_balanced_focal_loss has its own"),
    ("--class_balanced_beta 0.9", "--class_balanced_beta needs --loss_type class_balanced_cross_entropy"),
    ("--loss_type class_balanced_focal_loss --class_balanced_beta 1", "--class_balanced_beta 1.0: must be 0 or more"),
    ("--huber_delta 2", "--huber_delta needs --loss_type huber"),
    ("--problem_type regression --loss_type huber --huber_delta 0", "--huber_delta 0.0: must be above 0"),
    ("--problem_type regression --class_balanced_order", "--class_balanced_order needs --problem_type single_label"),
    ("--head_lr -1", "--head_lr -1.0: must be 0 or more"),
    ("--mlp_head_dim -1", "--mlp_head_dim -1: must be 0 or more"),
    ("--mlp_head_dropout 0.5", "--mlp_head_dropout needs --mlp_head_dim"),
    ("--mlp_head_dim 4 --mlp_head_dropout 1", "--mlp_head_dropout 1.0: must be 0 or more and below 1"),
    ("--mlp_head_dim 4 --head_init label_words", "--head_init label_words is for a linear head over classes"),
    ("--problem_type regression --head_init label_words", "--head_init label_words is for a linear head"),
    ("--metric_for_best_model f2", "--metric_for_best_model f2: evaluation gives loss, accuracy"),
    ("--problem_type regression --metric_for_best_model rmse --greater_is_better", "--greater_is_better: with that"),
    ("--default_prompt <|im_end|>", "--default_prompt has a control token"),
])  # fmt: skip
def test_bad_arguments(parse, flags, message):
    (problem,) = parse(*flags.split())
    assert message in problem


def test_arguments(parse):
    args = parse(
        "--freeze_llm", "True", "--freeze_merger", "True", "--freeze_vision_tower", "True", "--labels", "a", "b"
    )
    assert (args.loss_type, args.labels, args.greater_is_better) == ("cross_entropy", ["a", "b"], False)
    assert parse("--problem_type", REGRESSION).loss_type == "mse" and parse("--problem_type", MULTI).loss_type == "bce"
    assert parse("--metric_for_best_model", "eval_f1").greater_is_better
    assert not parse("--problem_type", REGRESSION, "--metric_for_best_model", "mae/ef").greater_is_better
    assert parse("--problem_type", REGRESSION, "--metric_for_best_model", "r2").greater_is_better


def test_upstream_command(parse, tmp_path):
    """2U1's script: each flag is kept with its value or answered; its own defaults hold."""
    command = upstream_commands.CLS_COMMANDS["finetune_cls.sh"]
    pairs = dict(zip(command[::2], command[1::2], strict=True))
    pairs |= {
        "--data_path": "data.json",
        "--eval_path": "data.json",
        "--image_folder": ".",
        "--eval_image_folder": ".",
    }
    fields = {f.name for f in train_cls.ClassificationArguments.__dataclass_fields__.values()}
    foreign = [flag for flag in pairs if flag[2:] not in fields]
    line = [word for pair in pairs.items() for word in pair]
    assert parse(*line) == [f"{flag}: {mv.REPLACED_FLAGS[flag[2:]]}" for flag in foreign] and foreign
    args = parse(*(word for flag, value in pairs.items() if flag not in foreign for word in (flag, value)))
    assert (args.head_lr, args.num_labels, args.loss_type, args.greater_is_better) == (4e-5, 2, "cross_entropy", True)
    for flag in upstream_commands.ACCEPTED_FIELDS["cls"]:
        assert (flag in fields) != (flag in mv.REPLACED_FLAGS), flag
    args = parse()
    assert (args.class_balanced_beta, args.mlp_head_dim, args.mlp_head_dropout) == (0.999, 0, 0.0)


# ---------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A tiny model that learns within a few steps, as the demo's."""
    from make_demo import save_tiny_model

    path = tmp_path_factory.mktemp("models") / "wide"
    save_tiny_model(path, vision_hidden_size=32, initializer_range=0.1)
    return str(path)


@pytest.fixture
def train(wide_model, folder, monkeypatch):
    """train_cls.main() in this process, four samples per step; later flags win."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def train(output_dir, *flags, problem_type=SINGLE):
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
        common = run_flags(wide_model, folder, problem_type)
        monkeypatch.setattr(sys, "argv", ["train_cls.py", *common, "--output_dir", str(output_dir), *map(str, flags)])
        handlers = {number: signal.getsignal(number) for number in mv.STOP_SIGNALS}
        try:
            train_cls.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return metrics(output_dir)

    return train


def run_flags(model, folder, problem_type=SINGLE):
    data = folder / f"{problem_type}.json"
    kind = [] if problem_type == SINGLE else ["--problem_type", problem_type]
    return [str(word) for word in (
        "--model_id", model, "--data_path", data, *kind, "--nframes", 4,
        "--video_resized_width", 56, "--video_resized_height", 56, "--image_resized_width", 84,
        "--image_resized_height", 56, "--max_steps", 8, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--learning_rate", 3e-3, "--dataloader_num_workers", 0,
    )]  # fmt: skip


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_classification_run(train, folder, tmp_path, capsys):
    """Losses fall; the first is the plain mean; metrics, predictions and the saved model agree."""
    data = folder / f"{SINGLE}.json"
    rows = train(tmp_path, "--eval_path", data, "--eval_strategy", "steps", "--eval_steps", 4, "--max_steps", 28,
                 "--mlp_head_dim", 32, "--save_strategy", "no", "--per_device_eval_batch_size", 5)  # fmt: skip
    steps, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["samples"] for r in steps[:4]] == [4, 4, 4, 1] and steps[0]["loss"] == pytest.approx(
        math.log(3), rel=0.05
    )
    assert 0 <= steps[0]["accuracy"] <= 1 and steps[0]["supervised_tokens"] == 4
    assert evals[-1]["eval_loss"] < 0.8 < evals[0]["eval_loss"] and evals[-1]["eval_samples"] == 13
    said = predictions(tmp_path)
    assert [row["id"] for row in said] == [f"r{i}" for i in range(13)]
    assert [row["label"] for row in said] == [COLOURS[i % 3] for i in range(13)]
    p = np.array([[row["probabilities"][name] for name in COLOURS] for row in said])
    classes = np.array([i % 3 for i in range(13)])
    assert [row["prediction"] for row in said] == [COLOURS[i] for i in p.argmax(1)]
    assert evals[-1]["eval_accuracy"] == pytest.approx((p.argmax(1) == classes).mean())
    assert evals[-1]["eval_loss"] == pytest.approx(-np.log(p[range(13), classes]).mean(), rel=1e-4)
    assert np.array(evals[-1]["eval_confusion_matrix"]).sum() == 13
    _, records, encoder, config, model = load(folder, str(tmp_path), mlp_head_dim=32, video_resized_width=56,
                                                 video_resized_height=56, nframes=4, image_resized_width=84,
                                                 image_resized_height=56)  # fmt: skip
    with torch.no_grad():
        logits, _ = packed_logits(model.eval(), encoder, config, records, folder)
    np.testing.assert_allclose(logits.softmax(1).numpy(), p, atol=1e-5)
    assert re.search(r"trained .* head \d+", capsys.readouterr().err)


def test_objective_of_a_step(train, wide_model, folder, tmp_path):
    """The loss of a step over rows is the objective's sum over its samples / samples, as the plain model gives it."""
    for flags in (
        [],
        ["--loss_type", "class_balanced_focal_loss", "--class_balanced_beta", 0.9, "--focal_gamma", 1.5],
    ):
        out = tmp_path / str(len(flags))
        row = train(out, *flags, "--max_steps", 1, "--save_strategy", "no", "--head_init", "label_words")[0]
        kwargs = dict(zip([f[2:] for f in flags[::2]], flags[1::2]))
        sizes = {"video_resized_width": 56, "video_resized_height": 56, "nframes": 4, "image_resized_width": 84,
                 "image_resized_height": 56, "head_init": "label_words"}  # fmt: skip
        _, records, encoder, config, model = load(folder, wide_model, **kwargs, **sizes)
        window, _ = next(mv.step_windows(len(records), 4, 42, 0))
        logits = torch.cat([packed_logits(model, encoder, config, [records[i]], folder)[0] for i in window]).detach()
        targets = torch.tensor([COLOURS.index(records[i]["label"][0]) for i in window])
        p = logits.double().softmax(1)[range(4), targets]
        expected = -p.log()
        if flags:
            counts = torch.tensor([5.0, 4, 4])
            weights = 0.1 / (1 - 0.9**counts)
            expected = (weights * 3 / weights.sum())[targets] * (1 - p) ** 1.5 * expected
        assert row["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert row["accuracy"] == (logits.argmax(1) == targets).double().mean()


def test_multi_label_run(train, folder, tmp_path):
    data = folder / f"{MULTI}.json"
    rows = train(tmp_path, "--eval_path", data, "--eval_strategy", "epoch", "--save_strategy", "no", "--max_steps", 12,
                 problem_type=MULTI)  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=0.05) and rows[-2]["loss"] < rows[0]["loss"]
    said = predictions(tmp_path)
    assert said[5]["label"] == ["blue", "red"] and said[0]["label"] == []
    assert all(row["prediction"] == [n for n in COLOURS if row["probabilities"][n] > 0.5] for row in said)
    right = np.mean([row["prediction"] == row["label"] for row in said])
    assert rows[-1]["eval_accuracy"] == pytest.approx(right)


def test_regression_run(train, folder, tmp_path, wide_model):
    """Standardised in training, in the target's own unit everywhere outside."""
    data = folder / f"{REGRESSION}.json"
    rows = train(tmp_path, "--eval_path", data, "--eval_strategy", "epoch", "--save_strategy", "no", "--max_steps", 24,
                 "--loss_type", "huber", "--labels", "ef", problem_type=REGRESSION)  # fmt: skip
    truth = np.array([record["label"] for record in json.loads(data.read_text())])
    said = predictions(tmp_path)
    assert [row["label"]["ef"] for row in said] == truth.tolist()
    errors = np.array([row["prediction"]["ef"] for row in said]) - truth
    last, first = rows[-1], next(row for row in rows if "eval_loss" in row)
    assert last["eval_mae"] == pytest.approx(np.abs(errors).mean()) and last["eval_mae"] < 5 < first["eval_mae"] + 2
    assert last["eval_r2"] == pytest.approx(1 - (errors**2).mean() / truth.var())
    huber = torch.nn.HuberLoss()(torch.tensor(errors / truth.std()), torch.zeros(13))
    assert last["eval_loss"] == pytest.approx(huber.item(), rel=1e-3)
    assert rows[0]["mae"] == pytest.approx(np.abs(truth - truth.mean()).mean(), rel=0.8) and "accuracy" not in rows[0]
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.target_mean == pytest.approx([truth.mean()]) and config.target_std == pytest.approx([truth.std()])
    # going on from it keeps its name and standardisation, other data or not
    other = [{**record, "label": record["label"] * 2} for record in json.loads(data.read_text())]
    for record in other:
        for kind in ("video", "image"):
            files = record.get(kind, [])
            record[kind] = [str(folder / name) for name in ([files] if isinstance(files, str) else files)]
    mv.write_json(tmp_path / f"{REGRESSION}.json", other)
    config = load(tmp_path, str(tmp_path), REGRESSION)[3]
    assert config.target_mean == pytest.approx([truth.mean()]) and config.id2label == {0: "ef"}


def test_resume_is_bit_equal(train, folder, tmp_path):
    """Class-balanced order, dropout in the head, a stop in the middle of an epoch: the same to the last bit."""
    flags = ["--class_balanced_order", "True", "--mlp_head_dim", 16, "--mlp_head_dropout", 0.3, "--save_steps", 3,
             "--eval_path", folder / f"{SINGLE}.json", "--eval_strategy", "epoch"]  # fmt: skip
    straight = train(tmp_path / "a", *flags)
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    assert train(tmp_path / "b", *flags, "--resume_from_checkpoint", "auto") == straight
    expected = load_file(tmp_path / "a" / "model.safetensors")
    resumed = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b")
    resume = ["--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3"]
    with pytest.raises(mv.InputError, match="trained for something else; these differ:\n  • mlp_head_dim: 16 then"):
        train(tmp_path / "c", *flags, "--mlp_head_dim", 8, *resume)
    with pytest.raises(mv.InputError, match="class-balanced order: True then, False now"):
        train(tmp_path / "d", *flags, "--class_balanced_order", "False", *resume)


def test_best_checkpoint_and_early_stopping(train, folder, tmp_path):
    """A rate that ruins the model: the best one survives, and the predictions are its own."""
    rows = train(tmp_path, "--eval_path", folder / f"{SINGLE}.json", "--eval_strategy", "steps", "--eval_steps", 1,
                 "--save_steps", 1, "--save_total_limit", 1, "--load_best_model_at_end", "True",
                 "--learning_rate", 0.3, "--early_stopping_patience", 2,
                 "--metric_for_best_model", "eval_f1")  # fmt: skip
    evals = [row for row in rows if "eval_loss" in row]
    best = max(evals, key=lambda row: row["eval_f1"])  # the first of equals
    assert evals[-1]["step"] == best["step"] + 2 < 8
    expected = load_file(tmp_path / f"checkpoint-{best['step']}" / "model.safetensors")
    assert all(torch.equal(v, expected[n]) for n, v in load_file(tmp_path / "model.safetensors").items())
    right = np.mean([row["prediction"] == row["label"] for row in predictions(tmp_path)])
    assert best["eval_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("flags", ["", "--bits 4 --freeze_vision_tower True --freeze_merger True --mlp_head_dim 8"])
def test_adapters(train, wide_model, folder, tmp_path, flags):
    """LoRA with the head in modules_to_save: resumed to the bit, read back by plain peft with the labels' names."""
    lora = ["--lora_enable", "True", "--freeze_llm", "True", "--lora_rank", 4, "--save_steps", 4, *flags.split(),
            "--eval_path", folder / f"{SINGLE}.json"]  # fmt: skip
    rows = train(tmp_path / "a", *lora)
    assert rows[-2]["loss"] < rows[0]["loss"]
    adapter = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert "score" in adapter.modules_to_save
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert config.id2label == NAMES and not hasattr(config, "quantization_config")
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    resumed = train(tmp_path / "b", *lora, "--resume_from_checkpoint", "auto")
    assert resumed == [row for row in rows if row["step"] > 4]

    kwargs = mv.quantization(arguments(wide_model, bits=4), None, "cpu") if flags else {}
    base = train_cls.classifier_class("qwen2_5_vl").from_pretrained(wide_model, config=config, **kwargs)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' inference kernel on such CPUs computes in bf16
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    args = arguments(wide_model, video_resized_width=56, video_resized_height=56, nframes=4, image_resized_width=84,
                     image_resized_height=56)  # fmt: skip
    encoder = mv.Encoder(wide_model, args)
    mv.use_packed_attention(model, "sdpa")
    records = mv.load_records(str(folder / f"{SINGLE}.json"), train_cls.normalize_record, train_cls.FEATURES)
    with torch.no_grad():
        logits, _ = packed_logits(model, encoder, config, records, folder)
    p = np.array([[row["probabilities"][name] for name in COLOURS] for row in predictions(tmp_path / "a")])
    np.testing.assert_allclose(logits.softmax(1).numpy(), p, atol=1e-5)
    if not flags:  # merged: a plain classifier with its labels
        from merge_lora import merge

        merge(str(tmp_path / "a"), str(tmp_path / "merged"))
        merged, info = train_cls.classifier_class("qwen2_5_vl").from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and merged.config.id2label == NAMES
        mv.use_packed_attention(merged, "sdpa")
        with torch.no_grad():
            again, _ = packed_logits(merged.eval(), encoder, config, records, folder)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)


LORA = ["--lora_enable", "True", "--freeze_llm", "True", "--lora_dropout", 0]


@pytest.mark.parametrize("problem_type", [SINGLE, REGRESSION])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_going_on_from_a_classifier(train, wide_model, folder, tmp_path, kind, problem_type):
    """Its problem type, order of labels, standardisation and head are the new run's: what it said is the new start."""
    records = json.loads((folder / f"{problem_type}.json").read_text())
    again, held_out = records[1:9], records[1:3]
    if problem_type == REGRESSION:  # of another mean and spread
        again = [{**record, "label": record["label"] * 2} for record in again]
    else:  # of one class less
        again = [record for record in again if record["label"] != "green"]
    mv.write_json(tmp_path / "again.json", again)
    mv.write_json(tmp_path / "eval.json", held_out)
    names = ["ef"] if problem_type == REGRESSION else ["red", "green", "blue"]
    lora = LORA if kind == "adapter" else []
    train(tmp_path / "a", *lora, "--labels", *names, "--mlp_head_dim", 8, "--save_strategy", "no", "--eval_path",
          folder / f"{problem_type}.json", problem_type=problem_type)  # fmt: skip
    said = {row["id"]: row for row in predictions(tmp_path / "a")}
    onward = ["--lora_weight_path" if lora else "--model_id", tmp_path / "a", "--data_path", tmp_path / "again.json",
              "--eval_path", tmp_path / "eval.json", "--image_folder", folder]  # fmt: skip
    rows = train(tmp_path / "b", *lora, *onward, "--save_strategy", "no", "--max_steps", 1)
    window, _ = next(mv.step_windows(len(again), 4, 42, 0))
    if problem_type == REGRESSION:
        spread = np.std([record["label"] for record in records])
        errors = [(said[again[i]["id"]]["prediction"]["ef"] - again[i]["label"]) / spread for i in window]
        expected = np.mean(np.square(errors))
    else:
        expected = np.mean([-math.log(said[again[i]["id"]]["probabilities"][again[i]["label"]]) for i in window])
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4)
    old, new = (AutoConfig.from_pretrained(tmp_path / name) for name in "ab")
    assert list(new.id2label.values()) == names and new.mlp_head_dim == 8 and new.problem_type == problem_type
    assert all(getattr(new, key) == getattr(old, key) for key in train_cls.HEAD)
    args = json.loads((tmp_path / "b" / "arguments.json").read_text())
    assert args["labels"] == names and args["problem_type"] == problem_type

    # what looks at data beforehand takes over the same, and both refuse what the classifier does not know
    import check_data

    again[2]["label"] = [1, 2] if problem_type == REGRESSION else "white"
    mv.write_json(tmp_path / "again.json", again)
    flags = [*run_flags(wide_model, folder), *lora, *onward, "--objective", "cls"]
    args, _ = check_data.read_flags(check_data.CheckFlags, list(map(str, flags)))
    assert (args.problem_type, args.labels, args.mlp_head_dim) == (problem_type, names, 8)
    message = "2 where 1 are expected: ef" if problem_type == REGRESSION else (
        "'white' is unknown; known are 'red', 'green', 'blue': mend it, .*start from its base model")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        check_data.normalizer("cls", args)(again[2], "here")
    with pytest.raises(mv.InputError, match=f"1 bad record\n.*{message}"):
        train(tmp_path / "c", *lora, *onward)


def test_adapters_to_go_on_from(train, parse, wide_model, folder, tmp_path, monkeypatch):
    """Flags that say otherwise; a head without its config; the adapter of a language model, which gets a new head."""
    train(tmp_path / "a", *LORA, "--labels", "red", "green", "blue", "--max_steps", 1, "--save_strategy", "no")
    onward = [*LORA, "--lora_weight_path", tmp_path / "a"]
    source = f"the run goes on from {tmp_path / 'a'}, a classifier with"
    others = ["--problem_type", MULTI, "--labels", "blue", "green", "red", "--num_labels", 3, "--mlp_head_dim", 4,
              "--head_init", "label_words"]  # fmt: skip
    assert parse("--model_id", wide_model, *onward, *others) == [
        f"--problem_type {MULTI}: {source} {SINGLE}: drop it",
        f"--labels ['blue', 'green', 'red']: {source} ['red', 'green', 'blue']: drop it",
        f"--mlp_head_dim 4: {source} 0: drop it",
        f"--head_init label_words: {source} random: drop it",
    ]
    args = parse("--model_id", wide_model, *onward, "--labels", "red", "green", "blue")
    assert args.num_labels == 3 and args.loss_type == "cross_entropy"
    balanced = ["--loss_type", "class_balanced_cross_entropy"]
    mv.write_json(tmp_path / "two.json", [{"prompt": "?", "label": name} for name in ("red", "blue")])
    with pytest.raises(mv.InputError, match="no record has the label 'green': add records of it, or balance no"):
        train(tmp_path / "b", *onward, *balanced, "--data_path", tmp_path / "two.json")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    mv.write_json(tmp_path / "a" / "config.json", {k: v for k, v in config.items() if k != "mlp_head_dim"})
    assert parse("--model_id", wide_model, *onward) == [
        f"{tmp_path / 'a'} is a classifier that train_cls.py did not write: its config.json has no mlp_head_dim; "
        "start from its base model"
    ]
    (tmp_path / "a" / "config.json").unlink()
    assert parse("--model_id", wide_model, *onward) == [
        f"--lora_weight_path {tmp_path / 'a'}: a classifier's adapter without its config.json, which has the labels: "
        "copy it from the --output_dir of its run"
    ]

    import train_sft

    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]
    mv.write_json(tmp_path / "sft.json", [{"conversations": turns}] * 2)
    with monkeypatch.context() as patched:
        patched.setattr(train_cls, "main", train_sft.main)
        train(tmp_path / "sft", *LORA, "--data_path", tmp_path / "sft.json", "--max_steps", 1, "--save_strategy", "no",
              "--lora_namespan_exclude", "['lm_head', 'embed_tokens']")  # fmt: skip
    train(tmp_path / "c", *LORA, "--lora_weight_path", tmp_path / "sft", "--max_steps", 1, "--save_strategy", "no",
          "--learning_rate", 1e-9)  # fmt: skip
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "c"))
    lora = [name for name in before if ".lora_B" in name]
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in lora) and any(before[n].any() for n in lora)
    assert [name for name in after if mv.part_of(name) == "head"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_precisions(train, tmp_path, precision):
    rows = train(tmp_path, f"--{precision}", "True", "--max_steps", 3, "--save_strategy", "no",
                 "--gradient_checkpointing", "True", "--head_lr", 1e-2)  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(math.log(3), rel=0.05) and all(row["grad_norm"] for row in rows)


def test_skipped_samples(train, folder, tmp_path):
    """Long ones are counted in training and left out of the evaluation, by their place."""
    rows = train(tmp_path, "--max_seq_length", 45, "--on_long_sample", "skip",
                 "--eval_path", folder / f"{SINGLE}.json", "--max_steps", 4, "--save_strategy", "no")  # fmt: skip
    kept = [row["id"] for row in predictions(tmp_path)]
    assert 0 < len(kept) < 13 and rows[-1]["eval_samples"] == len(kept)
    assert sum(row.get("samples", 0) for row in rows) == len(kept)
    assert [row["label"] for row in predictions(tmp_path)] == [COLOURS[int(name[1:]) % 3] for name in kept]


def test_outputs_that_are_not_finite(train, folder, tmp_path):
    """An absurd step: evaluations have null for the loss and every metric, predictions stay those of before."""
    (tmp_path / "predictions.jsonl").write_text('{"id": "of before"}\n')
    rows = train(tmp_path, "--learning_rate", 1e30, "--eval_path", folder / f"{SINGLE}.json", "--eval_strategy",
                 "steps", "--eval_steps", 1, "--save_strategy", "no", "--lr_scheduler_type", "constant",
                 "--max_steps", 2)  # fmt: skip
    names = {"eval_loss", "eval_confusion_matrix", *(f"eval_{name}" for name in train_cls.METRICS[SINGLE])}
    for row in (rows[1], rows[3]):
        assert row.keys() == {"step", "epoch", "eval_samples", "not_finite", *names}
        assert row["eval_samples"] == 13 and row["not_finite"] is True and not any(row[name] for name in names)
    assert predictions(tmp_path) == [{"id": "of before"}]


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_two_processes_equal_one(runner, train, wide_model, folder, tmp_path, config):
    """Rows of one sample, of text only and none at all on some ranks: losses, metrics and weights of one process."""
    flags = ["--eval_path", folder / f"{SINGLE}.json", "--eval_strategy", "epoch", "--optim", "sgd", "--learning_rate",
             0.1, "--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 2, "--save_strategy", "no",
             "--max_steps", 3]  # fmt: skip
    one = train(tmp_path / "one", *flags, "--gradient_accumulation_steps", 4)
    done = runner.launch(
        "--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", 2, "train_cls.py",
        *run_flags(wide_model, folder), *flags, "--output_dir", tmp_path / "two", log=tmp_path / "two",
    )  # fmt: skip
    assert "4 per step = 1 samples × 2 rows × 2 processes" in done.said[0]
    for ours, theirs in zip(metrics(tmp_path / "two"), one, strict=True):
        for key, value in theirs.items():
            same = ours[key] == value if isinstance(value, list) else ours[key] == pytest.approx(value, 1e-5, 1e-6)
            assert same, (key, ours["step"])
    expected = load_file(tmp_path / "one" / "model.safetensors")
    weights = load_file(tmp_path / "two" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all((value - expected[name]).abs().max() <= 1e-5 for name, value in weights.items())
    for ours, theirs in zip(predictions(tmp_path / "two"), predictions(tmp_path / "one"), strict=True):
        assert ours["id"] == theirs["id"] and ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-6)
