"""Packed rows against the plain HF model, one unpacked sample at a time through the HF processor (fp32 on a CPU)."""

import copy
import inspect
import math
from types import SimpleNamespace

import multivideo as mv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import hf_inputs, hf_loss, write_clip
from safetensors.torch import load_file
from test_train import demo, in_process, metrics  # noqa: F401
from transformers import AutoModelForImageTextToText, AutoProcessor, vision_utils

from train_sft import normalize_record, sft_loss

SIZES = [(28, 28), (56, 56), (84, 56), (112, 112), (56, 168), (224, 140)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips and images whose sides are multiples of 28: no resize, so pixels are equal to the last bit."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("clips")
    for i in range(30):
        width, height = SIZES[i % 6] if i % 6 < 3 else SIZES[i % 3]
        write_clip(folder / f"{i}.mp4", width, height, 6 + 5 * (i % 3), rate=[8, 25, 30][i % 3], seed=i)
    write_clip(folder / "large.mp4", 224, 140, 12, seed=99)
    write_clip(folder / "middle.mp4", 112, 112, 20, rate=4, seed=98)
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (56 + 28 * i, 84, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def records():
    """Thirty videos, one video, two images, image and video, text only, several turns with videos in each."""

    def talk(*turns, **media):
        roles = ["human", "gpt"] * len(turns)
        return {**media, "conversations": [{"from": r, "value": v} for r, v in zip(roles, turns)]}

    raw = [
        talk("What do these show?", "Thirty clips of moving noise.", video=[f"{i}.mp4" for i in range(30)]),
        talk("Describe <video> now.", "One large clip.", video="large.mp4"),
        talk("<image>\nand\n<image>\ndiffer?", "Yes, they do.", image=["0.png", "1.png"]),
        talk("<image>\nwith\n<video>\nwhat?", "A still and a clip.", image="0.png", video="middle.mp4"),
        talk("No pictures at all. Who are you?", "A model."),
        talk("<video>\nfirst", "One.", "then <video>\n<video>\n", "Two and three.", video=["3.mp4", "4.mp4", "5.mp4"]),
    ]
    return [normalize_record(record, f"record {i}") for i, record in enumerate(raw)]


def arguments(model, **kwargs):
    return mv.TrainingArguments(model_id=model, video_min_pixels=784, image_min_pixels=784, **kwargs)


def packed_row(model_path, records, folder, **kwargs):
    encoder = mv.Encoder(model_path, arguments(model_path, **kwargs))
    samples = [encoder(record, folder) for record in records]
    return encoder, samples


def reference_losses(model_path, records, folder):
    args, processor = arguments(model_path), AutoProcessor.from_pretrained(model_path)
    model = AutoModelForImageTextToText.from_pretrained(model_path, attn_implementation="sdpa")
    losses = [hf_loss(model, *hf_inputs(record, folder, args, processor)) for record in records]
    sum(losses).backward()
    return model, [loss.item() for loss in losses]


def close_gradients(ours, theirs, tolerance=1e-5):
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = theirs[name].grad
        norm = reference.norm() if reference is not None else torch.tensor(0.0)
        if norm > 1e-7:
            assert (parameter.grad - reference).norm() / norm < tolerance, name


@pytest.fixture(scope="module")
def reference(tiny_model, records, clips):
    return reference_losses(tiny_model, records, clips)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_plain_model(tiny_model, records, clips, reference, checkpointing):
    plain, losses = reference
    encoder, samples = packed_row(tiny_model, records, clips)
    assert [sample["num_videos"] for sample in samples] == [30, 1, 0, 1, 0, 3]
    model = mv.load_model(arguments(tiny_model, gradient_checkpointing=checkpointing), "cpu").train()
    inputs, targets, sequences = mv.pack(samples, encoder, "cpu")
    logps = mv.token_logps(model(**inputs).logits, targets)
    ours = -torch.zeros(len(samples)).index_add(0, sequences, logps.detach())
    assert ours.tolist() == pytest.approx(losses, rel=1e-5)
    (-logps.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    close_gradients(model, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_go_through_a_frozen_tower(tiny_model, records, clips, checkpointing):
    """Nothing before the first trained parameter takes part in the backward pass, with checkpointing neither."""
    frozen = arguments(tiny_model, gradient_checkpointing=checkpointing, freeze_vision_tower=True, freeze_merger=True)
    model = mv.load_model(frozen, "cpu").train()
    seen = []
    model.model.visual.merger.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    encoder, samples = packed_row(tiny_model, records, clips)
    inputs, targets, _ = mv.pack(samples, encoder, "cpu")
    sft_loss(model(**inputs).logits, targets).backward()
    assert seen == [False] and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_packed_row_equals_plain_qwen2_vl(tiny_qwen2_vl, records, clips):
    plain, losses = reference_losses(tiny_qwen2_vl, records, clips)
    encoder, samples = packed_row(tiny_qwen2_vl, records, clips)
    model = mv.load_model(arguments(tiny_qwen2_vl), "cpu").train()
    loss = sft_loss(model(**(row := mv.pack(samples, encoder, "cpu"))[0]).logits, row[1])
    assert loss.item() == pytest.approx(sum(losses), rel=1e-5)
    loss.backward()
    close_gradients(model, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_share_their_prompt(tiny_model, records, clips, checkpointing):
    """Prompts with one to three answers behind each, in one row, equal every prompt + answer alone, gradients too."""
    answers, shared, separate = ["Yes.", "It is a longer answer, this one.", "No"], [], []
    for i, record in enumerate(records):
        turns = []
        for answer in answers[: i % 3 + 1]:
            turns.append([{"role": "assistant", "content": [mv._part("text", text=answer)]}])
            separate.append({**record, "messages": record["messages"][:-1] + turns[-1]})
        shared.append({**record, "messages": record["messages"][:-1], "completions": turns})
    alone = [i for i, record in enumerate(separate) if len(record["messages"]) > 2]
    separate = [record for i, record in enumerate(separate) if i not in alone]  # answers in prompts are not learned
    shared = [record for record in shared if len(record["messages"]) == 1]
    plain, losses = reference_losses(tiny_model, separate, clips)
    encoder, samples = packed_row(tiny_model, shared, clips)
    model = mv.load_model(arguments(tiny_model, gradient_checkpointing=checkpointing), "cpu").train()
    inputs, targets, sequences = mv.pack(samples, encoder, "cpu")
    assert len(inputs["video_grid_thw"]) == 35  # of 30, 1, 2, and 2 clips, and no clip twice
    logps = mv.token_logps(model(**inputs).logits, targets)
    ours = -torch.zeros(len(losses)).index_add(0, sequences, logps)
    assert ours.tolist() == pytest.approx(losses, rel=1e-5)
    ours.sum().backward()
    close_gradients(model, plain)


def test_row_without_vision(tiny_model, records, clips):
    """A text-only row carries the one-token dummy: same loss, and every tower parameter gets a zero gradient."""
    encoder, samples = packed_row(tiny_model, [records[4]], clips)
    plain, losses = reference_losses(tiny_model, [records[4]], clips)
    model = mv.load_model(arguments(tiny_model), "cpu").train()
    inputs, targets, _ = mv.pack(samples, encoder, "cpu")
    assert inputs["video_grid_thw"].tolist() == [[1, 2, 2]]
    loss = sft_loss(model(**inputs).logits, targets)
    assert loss.item() == pytest.approx(losses[0], rel=1e-5)
    loss.backward()
    close_gradients(model, plain)
    tower = [parameter.grad for name, parameter in model.named_parameters() if "visual." in name]
    assert all(grad is not None and not grad.any() for grad in tower)
    empty, nothing, _ = mv.pack([], encoder, "cpu")
    model.zero_grad()
    sft_loss(model(**empty).logits, nothing).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def sample_losses(model, samples, encoder):
    inputs, targets, _ = mv.pack(samples, encoder, "cpu")
    with torch.no_grad():
        logps = mv.token_logps(model(**inputs).logits, targets)
    return [part.sum().item() for part in logps.split([int((s["labels"] != -100).sum()) for s in samples])]


def test_poison(tiny_model, records, clips):
    """One sample's pixels move no other sample by one bit; every single video of thirty moves its own."""
    encoder, samples = packed_row(tiny_model, [records[i] for i in (1, 0, 3)], clips)
    model = mv.load_model(arguments(tiny_model), "cpu").eval()
    before = sample_losses(model, samples, encoder)
    patches_per_clip = samples[1]["video_grid_thw"].prod(1)
    starts = [0, *np.cumsum(patches_per_clip).tolist()]
    for k in range(30):
        poisoned = copy.deepcopy(samples)
        patches = poisoned[1]["patches"]
        if k % 2:  # blank
            patches[starts[k] : starts[k + 1]] = 0
        else:  # another picture
            patches[starts[k] : starts[k + 1]] = 255 - patches[starts[k] : starts[k + 1]]
        after = sample_losses(model, poisoned, encoder)
        assert after[1] != before[1], f"video {k} is not used"
        assert (after[0], after[2]) == (before[0], before[2]), f"video {k} leaks into another sample"
    # swap each video with the next one of the same grid
    grids = [tuple(grid) for grid in samples[1]["video_grid_thw"].tolist()]
    swaps = 0
    for k in range(30):
        j = next((j for j in range(k + 1, 30) if grids[j] == grids[k]), None)
        if j is None:
            continue
        swapped = copy.deepcopy(samples)
        a, b = slice(starts[k], starts[k + 1]), slice(starts[j], starts[j + 1])
        swapped[1]["patches"][a], swapped[1]["patches"][b] = samples[1]["patches"][b], samples[1]["patches"][a]
        after = sample_losses(model, swapped, encoder)
        assert after[1] != before[1], f"swapping videos {k} and {j} changes nothing"
        assert (after[0], after[2]) == (before[0], before[2])
        swaps += 1
    assert swaps >= 20


def test_shared_prefix(tiny_model):
    """A prefix with three suffixes that do not see each other equals three separate sequences, gradients too."""
    torch.manual_seed(0)
    plain = AutoModelForImageTextToText.from_pretrained(tiny_model, attn_implementation="sdpa")
    model = mv.load_model(arguments(tiny_model), "cpu").train()
    prefix, suffixes = torch.randint(0, 200, (1, 23)), [torch.randint(0, 200, (1, n)) for n in (7, 12, 5)]
    video = torch.tensor([[model.config.video_token_id]])
    expected = []
    for suffix in suffixes:
        ids = torch.cat([prefix, suffix], 1)
        logps = plain(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        expected.append(logps[22:-1].gather(1, suffix.T).sum())
    row = torch.cat([prefix, *suffixes, video], 1)
    lengths = [23, 7, 12, 5, 1]
    positions = torch.cat([torch.arange(23), *(torch.arange(23, 23 + n) for n in lengths[1:4]), torch.zeros(1).long()])
    plan = mv.AttentionPlan.make(lengths, [None, 0, 0, 0, None])
    logits = model(
        input_ids=row, position_ids=positions.expand(4, 1, -1), plan=plan, use_cache=False,
        pixel_values_videos=torch.zeros(4, 1176), video_grid_thw=torch.tensor([[1, 2, 2]]),
    ).logits[0]  # fmt: skip
    ours, start = [], 23
    for suffix in suffixes:
        n = suffix.shape[1]
        rows = torch.tensor([22, *range(start, start + n - 1)])
        ours.append(logits[rows].log_softmax(-1).gather(1, suffix.T).sum())
        start += n
    assert torch.stack(ours).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-5)
    sum(ours).backward()
    sum(expected).backward()
    close_gradients(model, plain)


def fake_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch documents of varlen_attn, written out: [T, H, D], causal aligned to the last key of each segment."""
    assert key.shape[1] == query.shape[1] or enable_gqa
    assert max_q == int((cu_seq_q[1:] - cu_seq_q[:-1]).max()) and max_k == int((cu_seq_k[1:] - cu_seq_k[:-1]).max())
    outputs = []
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:]):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        left, right = window_size  # keys before and after a query's own place, -1: all of them
        mask = mask.tril((d - c) - (b - a) + right) if right >= 0 else mask
        mask = mask.triu((d - c) - (b - a) - left) if left >= 0 else mask
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def fake_varlen_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same before it had enable_gqa."""
    return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("stand_in", [fake_varlen, fake_varlen_of_2_11])
def test_varlen_arguments(tiny_model, records, clips, monkeypatch, stand_in):
    """The CUDA path's arguments, through stand-ins with torch's own signatures, give the CPU path's numbers."""
    from torch.nn.attention import varlen

    torch_names = set(inspect.signature(varlen.varlen_attn).parameters)
    assert set(inspect.signature(stand_in).parameters) <= torch_names | {"enable_gqa"}
    encoder, samples = packed_row(tiny_model, records, clips)
    model = mv.load_model(arguments(tiny_model), "cpu").eval()
    expected = sample_losses(model, samples, encoder)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    mv.use_packed_attention(model, "varlen")
    assert sample_losses(model, samples, encoder) == pytest.approx(expected, rel=1e-5)
    lengths, prefixes = [9, 4, 6, 3], [None, 0, 0, None]
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 22, 8), torch.randn(1, 2, 22, 8), torch.randn(1, 2, 22, 8)
    module = torch.nn.Module()
    module.is_causal = True
    plan = mv.AttentionPlan.make(lengths, prefixes)
    by_kernel = [
        mv.packed_attention(module, q, k, v, None, plan=plan, kernel=kernel)[0] for kernel in ("sdpa", "varlen")
    ]
    torch.testing.assert_close(*by_kernel, rtol=1e-5, atol=1e-6)


def test_cudnn_attention_is_not_used(tiny_model, monkeypatch):
    """On Hopper torch takes cuDNN where it may: neither sdpa nor varlen_attn may, whatever a tower's frames are."""
    from torch.nn.attention import varlen

    torch.backends.cuda.enable_cudnn_sdp(True)
    mv.use_packed_attention(mv.load_model(arguments(tiny_model), "cpu"), "varlen")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: True)
    query = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(512, 4, 80),
                            size=lambda i: (512, 4, 80)[i])  # fmt: skip
    taken = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), **options):
        taken.append(varlen._can_use_cudnn(query, query, query, max_q, list(window_size)))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, cu = torch.randn(1, 4, 512, 80), torch.tensor([0, 256, 512])
    for causal in (True, False):
        mv._varlen("varlen", q, q, q, cu, cu, 256, 256, causal, None)
    assert taken == [False, False]
    assert varlen._can_use_cudnn(query, query, query, 256, [-1, -1])  # what the window keeps it from


@torch.library.custom_op("multivideo_tests::varlen", mutates_args={})
def opaque_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int,
    max_k: int, scale: float, window: list[int]
) -> torch.Tensor:  # fmt: skip
    """fake_varlen as one operation, as varlen_attn is for the compiler."""
    return fake_varlen(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=tuple(window),
                       enable_gqa=True).contiguous()  # fmt: skip


opaque_varlen.register_fake(lambda query, *rest: query.new_empty(query.shape))


@torch.library.custom_op("multivideo_tests::varlen_backward", mutates_args={})
def opaque_varlen_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor,
    cu_k: torch.Tensor, max_q: int, max_k: int, scale: float, window: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Its gradients, written out: autograd is off inside an operation."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        k, v = (x[c:d].repeat_interleave(groups, 1) for x in (key, value))
        scores = scale * torch.einsum("qhd,khd->hqk", query[a:b], k)
        if window[1] == 0:
            hidden = ~torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
            scores = scores.masked_fill(hidden, -math.inf)
        p, dp = scores.softmax(-1), torch.einsum("qhd,khd->hqk", gradient[a:b], v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        dq[a:b] = torch.einsum("hqk,khd->qhd", ds, k)
        dk[c:d] += torch.einsum("hqk,qhd->khd", ds, query[a:b]).unflatten(1, (-1, groups)).sum(2)
        dv[c:d] += torch.einsum("hqk,qhd->khd", p, gradient[a:b]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


opaque_varlen_backward.register_fake(lambda gradient, *given: tuple(x.new_empty(x.shape) for x in given[:3]))


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


opaque_varlen.register_autograd(
    lambda ctx, gradient: (*opaque_varlen_backward(gradient, *ctx.saved_tensors, *ctx.rest), *[None] * 6),
    setup_context=keep_inputs,
)


def compile_without_inductor(monkeypatch):
    """--torch_compile makes the graphs of a GPU, with varlen attention, and runs them without inductor's compiler."""
    from torch.nn.attention import varlen

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return opaque_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, list(window_size))

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(mv.COMPILE, "backend", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_compiled_blocks(tiny_model, records, clips, monkeypatch):
    """Blocks compiled one by one give eager's losses and gradients; rows of new lengths do not compile again."""
    compile_without_inductor(monkeypatch)
    encoder, samples = packed_row(tiny_model, records, clips)
    options = dict(gradient_checkpointing=True, bf16=True, lora_enable=True, lora_rank=4, lora_dropout=0.0,
                   freeze_llm=True)  # fmt: skip
    outcomes, graphs = {}, []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = mv.load_model(arguments(tiny_model, torch_compile=compiled, **options), "cpu").train()
        mv.use_packed_attention(model, "varlen")
        for row in ([1, 3], [3, 2, 1], [1]):
            inputs, targets, _ = mv.pack([samples[i] for i in row], encoder, "cpu")
            with torch.autocast("cpu", torch.bfloat16):
                loss = sft_loss(model(**inputs).logits, targets)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            outcomes.setdefault(compiled, []).append((loss.item(), norm.item()))
            if compiled:
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for ours, eager in zip(outcomes[True], outcomes[False]):
        assert ours == pytest.approx(eager, rel=2e-2)
    assert 0 < graphs[0] == graphs[-1], graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_run(demo, tmp_path, monkeypatch):  # noqa: F811
    """main() with --torch_compile True: losses, norms and the names in the saved model are those of a run without."""
    compile_without_inductor(monkeypatch)
    monkeypatch.setattr(mv, "attention_kernel", lambda args, device: "varlen")
    for compiled in ("False", "True"):
        in_process(
            monkeypatch, "--model_id", demo / "model", "--data_path", demo / "sft_train.json", "--image_folder",
            demo / "videos", "--video_resized_width", 56, "--video_resized_height", 56, "--nframes", 4, "--max_steps",
            2, "--learning_rate", 1e-3, "--torch_compile", compiled, "--output_dir", tmp_path / compiled,
        )  # fmt: skip
    for ours, eager in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(eager[name], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    saved, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "True", demo / "model"))
    assert saved.keys() == given.keys()


def test_attention_without_plan_is_refused(tiny_model):
    model = mv.load_model(arguments(tiny_model), "cpu")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    model.set_attn_implementation("sdpa")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [16, 50, 1000])
def test_token_logps(monkeypatch, rows, temperature, dtype):
    """Values and gradients, by any number of rows at a time, are those of log_softmax in fp32."""
    monkeypatch.setattr(mv, "LOGPS_BYTES", {"cpu": rows * 31 * 4})
    torch.manual_seed(0)
    logits, targets = (10 * torch.randn(1, 50, 31)).to(dtype).requires_grad_(), torch.randint(0, 31, (50,))
    weights = torch.randn(50)
    ours = mv.token_logps(logits, targets, temperature)
    expected = (logits[0].float() / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad((values * weights).sum(), logits)[0] for values in (ours, expected)]
    torch.testing.assert_close(*gradients)
    assert mv.token_logps(logits[:, :0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("family", ["tiny_model", "tiny_qwen2_vl"])
def test_tower_inputs(family, request):
    """What the tower gets ready-made is what it would compute itself from mixed grids, under the names it takes."""
    encoder = mv.Encoder(model_id := request.getfixturevalue(family), arguments(model_id))
    grids = np.array([[2, 4, 4], [1, 10, 36], [3, 8, 18], [2, 4, 4], [1, 2, 2]])
    ours = mv.tower_inputs(grids, encoder, "cpu")
    model, grid = mv.load_model(arguments(model_id), "cpu").eval(), torch.tensor(grids)
    expected = {"position_ids": vision_utils.get_vision_position_ids(grid, 2)}
    expected["cu_seqlens"], expected["max_seqlen"] = vision_utils.get_vision_attention_seqlens(
        grid, model.config.vision_config
    )
    if family == "tiny_model":
        order, bounds = vision_utils.get_vision_window_index(grid, 2, 112, 14)
        expected |= {"window_index": order, "cu_window_seqlens": bounds, "max_window_seqlen": 64}
    assert ours.keys() == {f"video_{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(ours[f"video_{name}"], value, rtol=0, atol=0)
    pixels = torch.randn(int(grids.prod(1).sum()), encoder.patch_dim)
    outputs = []
    for keywords in (ours, {}):
        left = {name.removeprefix("video_"): value for name, value in keywords.items()}
        with torch.no_grad():
            outputs.append(model.model.visual(pixels, grid_thw=grid, **left).pooler_output)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [(1, 4), (2, 2), (4, 1)])
def test_accumulation(tiny_model, records, clips, rows):
    """1×4, 2×2 and 4×1 samples × rows give the gradients of the plain model over the window's tokens."""
    batch_size, num_rows = rows
    encoder, samples = packed_row(tiny_model, records[2:], clips)
    plain, losses = reference_losses(tiny_model, records[2:], clips)
    tokens = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    for parameter in plain.parameters():
        parameter.grad = parameter.grad / tokens if parameter.grad is not None else None
    model, total = mv.load_model(arguments(tiny_model), "cpu").train(), 0.0
    window = mv.micro_batches([0, 1, 2, 3], batch_size, rank=0, world_size=1)
    assert len(window) == num_rows
    for row in window:
        inputs, targets, _ = mv.pack([samples[i] for i in row], encoder, "cpu")
        loss = sft_loss(model(**inputs).logits, targets) / tokens
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(sum(losses) / tokens, rel=1e-5)
    close_gradients(model, plain)


def test_small_learning_rate_moves_weights(tiny_model):
    """At 2e-6 a weight of 0.02 moves in fp32 (--bf16) and stands still in bf16 (--pure_bf16)."""
    for flags, moves in (({"bf16": True}, True), ({"pure_bf16": True}, False)):
        args = arguments(tiny_model, learning_rate=2e-6, **flags)
        model = mv.load_model(args, "cpu")
        optimizer = mv.make_optimizer(model, args)
        weight = model.model.language_model.layers[0].mlp.up_proj.weight
        big = weight.detach().abs() >= 0.02
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert bool((weight.detach() != before)[big].any()) is moves


def test_adamw_is_fused_on_cuda(tiny_model):
    """The kernel that CUDA gets makes the CPU's steps, and goes on from their state (torch has it for CPUs, too)."""
    args, weights = arguments(tiny_model, learning_rate=1e-3, weight_decay=0.1), []
    for devices in (["cpu", "cpu"], ["cuda", "cuda"], ["cpu", "cuda"]):
        model, state = mv.load_model(args, "cpu"), None
        for device in devices:
            optimizer = mv.make_optimizer(model, args, device)
            assert optimizer.defaults["fused"] is (device == "cuda")
            if state:
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            state = optimizer.state_dict()["state"]
        weights.append([parameter.detach() for parameter in model.parameters()])
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flags", [{"bf16": True}, {"fp16": True}])
def test_frozen_parts_and_types(tiny_model, flags):
    args = arguments(
        tiny_model, freeze_vision_tower=True, unfreeze_topk_vision=1, freeze_llm=True, unfreeze_topk_llm=1, **flags
    )
    model = mv.load_model(args, "cpu")
    low = mv.autocast_dtype(args)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {low}
    places = {".".join(name.split(".")[:4]) for name in trained}
    assert {place for place in places if "merger" not in place} == {
        "model.visual.blocks.1",
        "model.language_model.layers.1",
    }
    assert any("visual.merger" in name for name in trained) and "lm_head.weight" not in trained


def test_learning_rate_per_part(tiny_model):
    args = arguments(tiny_model, learning_rate=1e-4, vision_lr=1e-6, merger_lr=1e-5, weight_decay=0.1)
    model = mv.load_model(args, "cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in mv.make_optimizer(model, args).param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["peak_lr"], group["weight_decay"]
    assert set(seen) == set(names.values())
    assert seen["model.visual.merger.mlp.0.weight"] == (1e-5, 0.1)
    assert seen["model.visual.blocks.0.attn.qkv.bias"] == (1e-6, 0.0)
    assert seen["model.language_model.norm.weight"] == (1e-4, 0.0)
    assert seen["lm_head.weight"] == (1e-4, 0.1)


@pytest.mark.parametrize("name", mv.LR_SCHEDULES)
def test_schedules_equal_transformers(name):
    import transformers

    args = mv.TrainingArguments(lr_scheduler_type=name, warmup_ratio=0.15)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=6, num_training_steps=40)
    for step in range(40):
        assert mv.lr_factor(step, 40, args) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_optimizers_train(tiny_model):
    """Every --optim value takes a step on every kind of parameter."""
    for name in mv.OPTIMIZERS:
        args = arguments(tiny_model, optim=name, learning_rate=1e-3)
        model = mv.load_model(args, "cpu")
        optimizer = mv.make_optimizer(model, args)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved = [n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])]
        assert len(moved) == len(before), name
