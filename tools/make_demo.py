"""Make a tiny Qwen-VL and a small data set of many-video conversations, without any download.

    python tools/make_demo.py --output_dir demo

writes
    demo/model            random weights, about 1 MB, with a real processor for `AutoProcessor.from_pretrained`;
                          a Qwen2.5-VL unless --family names another
    demo/videos/*.mp4     short H.264 clips: a moving texture, mixed sizes, frame rates and lengths
    demo/sft_train.json   records of 30 videos each; demo/sft_eval.json shares neither a file nor any content with it
    demo/dpo_train.json   the same records as pairs: the right answer is preferred to a wrong one; demo/dpo_eval.json
    demo/cls_train.json   the same with the colour as a label, for train_cls.py; and demo/cls_eval.json
    demo/demo.json        the settings, written last: a directory that has it is complete and is not made again

The question of every record is which colour the one clip has that is not grey. Six colours occur equally often, and
colour says nothing about size, frame rate, length or position, so only the pixels of the right clip hold the answer
(no model sees the file names): guessing gives 17 %. One record:

    {"id": "train-0", "video": ["train-grey-017.mp4", ...], "conversations": [
        {"from": "human", "value": "<video>\n<video>\n...Which colour ...?"}, {"from": "gpt", "value": "... red."}]}
"""

import argparse
import hashlib
import json
import os
import random
import time
from fractions import Fraction
from pathlib import Path

try:
    import numpy as np
except ModuleNotFoundError as error:
    raise SystemExit(f"make_demo.py: no module {error.name!r} in this Python: source .venv/bin/activate") from None

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "cyan": (0, 1, 1),
    "pink": (1, 0, 1),
}
QUESTION = "Which colour is the one clip that is not grey?"
ANSWER = "The one coloured clip is {}."
SYSTEM_PROMPT = "You are a helpful assistant."

SPECIAL_TOKENS = [  # in the order of Qwen's own vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Qwen3-VL and Qwen3.5 have tokens for these as well; they are text, which `skip_special_tokens` keeps.
TAG_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

# ChatML as Qwen2-VL and Qwen2.5-VL write it.
CHAT_TEMPLATE = """\
{%- set pads = {"image": "<|vision_start|><|image_pad|><|vision_end|>",
                "video": "<|vision_start|><|video_pad|><|vision_end|>"} -%}
{%- if messages[0]["role"] != "system" %}{{ "<|im_start|>system\\nSYSTEM_PROMPT<|im_end|>\\n" }}{% endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["content"] is string -%}
        {{- message["content"] -}}
    {%- else -%}
        {%- for part in message["content"] -%}
            {{- part["text"] if part["type"] == "text" else pads[part["type"]] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif -%}
""".replace("SYSTEM_PROMPT", SYSTEM_PROMPT)

# Qwen3-VL's ChatML has no system message of its own.
QWEN3_VL_TEMPLATE = "".join(line for line in CHAT_TEMPLATE.splitlines(True) if SYSTEM_PROMPT not in line)

# Qwen3.5's, without tools: text is trimmed; answers to the last question have a thought, be it an empty one; and the
# generation prompt has the empty one unless `enable_thinking` is true, as in the small models' own template.
QWEN3_5_TEMPLATE = """\
{%- set pads = {"image": "<|vision_start|><|image_pad|><|vision_end|>",
                "video": "<|vision_start|><|video_pad|><|vision_end|>"} -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- part["text"] if part["type"] == "text" else pads[part["type"]] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
    {%- if message["role"] == "user" %}{% set last.question = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["role"] == "assistant" and loop.index0 > last.question -%}
        {{- "<think>\\n" + message["reasoning_content"] | default("", true) | trim + "\\n</think>\\n\\n" -}}
    {%- endif -%}
    {{- text(message["content"]) | trim + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n<think>\\n" + ("" if enable_thinking is true else "\\n</think>\\n\\n") -}}
{%- endif -%}
"""
CHAT_TEMPLATES = {
    "qwen2_vl": CHAT_TEMPLATE,
    "qwen2_5_vl": CHAT_TEMPLATE,
    "qwen3_vl": QWEN3_VL_TEMPLATE,
    "qwen3_5": QWEN3_5_TEMPLATE,
}


def build_processor(family, chat_template=None):
    """A processor of the family whose byte-level BPE knows any text, and the demo's words as one token each.

    `chat_template` (default: the demo's own of the family) may be the model's real one.
    """
    import tokenizers
    import transformers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    sentences = [SYSTEM_PROMPT, QUESTION, "system\nuser\nassistant\n", *(ANSWER.format(colour) for colour in COLOURS)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sentences, trainer)
    learned = json.loads(bpe.to_str())["model"]

    vocab = dict(learned["vocab"])
    vocab.update({token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)})
    tokenizer_class = transformers.Qwen3_5Tokenizer if family == "qwen3_5" else transformers.Qwen2Tokenizer
    tokenizer = tokenizer_class(
        vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]], unk_token=None, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens=SPECIAL_TOKENS[1:], model_max_length=131072,
    )  # fmt: skip
    tokenizer.padding_side = "left"
    chat_template = chat_template or CHAT_TEMPLATES[family]
    if family in ("qwen3_vl", "qwen3_5"):
        tokenizer.add_tokens(TAG_TOKENS)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        image_processor = transformers.Qwen2VLImageProcessor(
            patch_size=16, size={"shortest_edge": 256 * 256, "longest_edge": 32 * 32 * 16384}, **half
        )
        video_processor = transformers.Qwen3VLVideoProcessor(
            size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 24576}, **half
        )
        return transformers.Qwen3VLProcessor(image_processor, tokenizer, video_processor, chat_template=chat_template)
    image_processor = transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    )
    video_processor = transformers.Qwen2VLVideoProcessor()
    processor = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[family]
    return processor(image_processor, tokenizer, video_processor, chat_template=chat_template)


def save_tiny_model(
    path, family="qwen2_5_vl", *, hidden_size=64, intermediate_size=None, num_layers=None, num_heads=None,
    num_kv_heads=None,
    vision_hidden_size=None, vision_intermediate_size=None, vision_num_heads=None, depth=2, fullatt_block_indexes=None,
    vocab_size=None, tie_word_embeddings=False, initializer_range=0.02, chat_template=None, seed=0,
):  # fmt: skip
    """Save a random-weight model of `family` (a key of CHAT_TEMPLATES) and its processor to `path`; return `path`.

    Sizes not given follow from `hidden_size`: heads of 16 (Qwen3-VL and Qwen3.5: 32), half as many key-value heads, a
    tower of the same width; two layers, or for Qwen3.5 three recurrent ones and one of attention. `vocab_size`
    (default: the tokenizer's length, rounded up to 64) may be raised to 151936 to make the head as expensive as the
    real one. What data code depends on (patch 14 or 16, temporal patch 2, merge 2, window 112, 2 positions per second)
    is as in the real models. The weights depend on `seed` alone; torch's own random state is left as it was.
    """
    import torch
    import transformers

    processor = build_processor(family, chat_template)
    tokenizer = processor.tokenizer
    num_layers = num_layers or (4 if family == "qwen3_5" else 2)
    vocab_size = vocab_size or -(-len(tokenizer) // 64) * 64
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the tokenizer has {len(tokenizer)} tokens: give at least as many"
        )
    num_heads = num_heads or max(2, hidden_size // 16)
    vision_hidden_size = vision_hidden_size or hidden_size
    eighth = hidden_size // num_heads // 8  # half the head size is split 2 : 3 : 3 over time, height and width
    text_config = dict(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or num_heads // 2,
        rms_norm_eps=1e-6, initializer_range=initializer_range, tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e6,
            mrope_section=[4 * eighth - 3 * eighth // 2 * 2] + [3 * eighth // 2] * 2,
        ),
    )  # fmt: skip
    vision_config = dict(
        depth=depth, num_heads=vision_num_heads or max(2, vision_hidden_size // 16), in_channels=3, patch_size=14,
        temporal_patch_size=2, spatial_merge_size=2, initializer_range=initializer_range,
    )  # fmt: skip
    vision_intermediate_size = vision_intermediate_size or 2 * vision_hidden_size
    if family == "qwen2_vl":
        config_class, model_class = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
        mlp_ratio = vision_intermediate_size // vision_hidden_size
        vision_config.update(embed_dim=vision_hidden_size, hidden_size=hidden_size, mlp_ratio=mlp_ratio)
    elif family in ("qwen3_vl", "qwen3_5"):
        prefix = {"qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5"}[family]
        config_class = getattr(transformers, f"{prefix}Config")
        model_class = getattr(transformers, f"{prefix}ForConditionalGeneration")
        vision_config.update(
            hidden_size=vision_hidden_size, out_hidden_size=hidden_size, intermediate_size=vision_intermediate_size,
            patch_size=16, num_position_embeddings=64,
        )  # fmt: skip
        head = text_config["head_dim"] = hidden_size // num_heads * 2  # in many real sizes, too, not hidden / heads
        rope = text_config["rope_parameters"]
        if family == "qwen3_vl":
            vision_config["deepstack_visual_indexes"] = list(range(min(depth, num_layers - 1)))
        else:
            rope["partial_rotary_factor"] = 0.5
            text_config.update(
                linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=num_heads // 2,
                linear_num_value_heads=num_heads,
            )  # fmt: skip
        half = int(head * rope.get("partial_rotary_factor", 1)) // 2  # interleaved over time, height and width
        rope.update(mrope_section=[half - half // 3 * 2] + [half // 3] * 2, mrope_interleaved=True, rope_theta=5e6)
    else:
        config_class, model_class = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
        if fullatt_block_indexes is None:
            fullatt_block_indexes = [i for i in range(depth) if i % 8 == 7] or [depth - 1]
        vision_config.update(
            hidden_size=vision_hidden_size, out_hidden_size=hidden_size, intermediate_size=vision_intermediate_size,
            window_size=112, tokens_per_second=2, fullatt_block_indexes=fullatt_block_indexes,
        )  # fmt: skip
    token_ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>", "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
        }.items()
    }  # fmt: skip
    config = config_class(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=tie_word_embeddings, **token_ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would seed a GPU too
        model = model_class(config).float()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, bos_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
    )  # fmt: skip
    model.save_pretrained(path)
    processor.save_pretrained(path)
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(Path(path) / "model.safetensors", 0o666 & ~mask)  # safetensors makes it readable for the owner alone
    return path


def write_clip(path, colour, seed):
    """Write one H.264 clip of 1 to 3 seconds: a moving texture, grey or tinted; all but the tint comes from `seed`."""
    import av

    rng = np.random.default_rng(seed)
    height, width = rng.choice([64, 80, 90, 96, 112, 128], 2).tolist()
    rate = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)][rng.integers(4)]
    num_frames = round(rng.uniform(1, 3) * rate)
    coarse = np.pad(rng.random((6, 6)), (0, 2), mode="wrap")  # the texture: smooth noise, bright and dark spots
    y, x = np.linspace(0, 6, height, endpoint=False), np.linspace(0, 6, width, endpoint=False)
    rows = np.stack([np.interp(y, np.arange(8), column) for column in coarse.T], 1)  # height, 8
    texture = np.stack([np.interp(x, np.arange(8), row) for row in rows])  # height, width
    dark, bright = rng.uniform(0.1, 0.3), rng.uniform(0.7, 1.0)
    down, right = rng.choice([-4, -3, -2, -1, 1, 2, 3, 4], 2).tolist()  # pixels per frame
    pixels = (255 * (dark + (bright - dark) * texture)).astype(np.uint8)  # height, width
    tint = np.array(COLOURS.get(colour, (1, 1, 1)), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=rate, options={"preset": "ultrafast", "crf": "18", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            image = np.roll(pixels, (i * down, i * right), axis=(0, 1))[:, :, None] * tint  # height, width, 3
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def make_split(split, directory, num_records, videos_per_sample, num_grey, num_per_colour, seed):
    """Write the clips of `split` into `directory` and return its records; clips are used again and again."""
    rng = random.Random(f"{split} {seed}")
    clips = {}
    for colour in ("grey", *COLOURS):
        names = [f"{split}-{colour}-{i:03d}.mp4" for i in range(num_grey if colour == "grey" else num_per_colour)]
        for name in names:
            write_clip(directory / name, colour, seed=rng.getrandbits(64))
        clips[colour] = names
    records = []
    for i in range(num_records):
        colour = list(COLOURS)[i % len(COLOURS)]
        videos = rng.sample(clips["grey"], videos_per_sample - 1)
        videos.insert(rng.randrange(videos_per_sample), rng.choice(clips[colour]))
        human = {"from": "human", "value": "<video>\n" * videos_per_sample + QUESTION}
        records.append({"video": videos, "conversations": [human, {"from": "gpt", "value": ANSWER.format(colour)}]})
    rng.shuffle(records)
    return [{"id": f"{split}-{i}", **record} for i, record in enumerate(records)]


def make_pairs(records, seed):
    """The same questions with two answers: the right one is chosen, one of the five wrong ones is rejected."""
    rng = random.Random(f"pairs {seed}")
    pairs = []
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        wrong = rng.choice([other for other in map(ANSWER.format, COLOURS) if other != answer])
        pairs.append({"id": record["id"], "video": record["video"], "prompt": question, "chosen": answer,
                      "rejected": wrong})  # fmt: skip
    return pairs


def labelled(record):
    """A record of make_split for train_cls.py: its question, and the colour as a label."""
    human, answer = (turn["value"] for turn in record["conversations"])
    label = next(colour for colour in COLOURS if answer == ANSWER.format(colour))
    return {"id": record["id"], "video": record["video"], "prompt": human, "label": label}


def write_json(path, value):
    """Write `value` aside and rename, so that a file of that name is always whole."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def make_demo(
    output_dir, *, family="qwen2_5_vl", num_train=None, num_eval=None, videos_per_sample=30, small=False, seed=0
):
    """Make the model and the data set in `output_dir`, unless this script made them there with these settings."""
    output_dir = Path(output_dir)
    num_train = (24 if small else 768) if num_train is None else num_train
    num_eval = (12 if small else 120) if num_eval is None else num_eval
    if min(num_train, num_eval, videos_per_sample) < 1:
        raise ValueError(
            f"num_train {num_train}, num_eval {num_eval}, videos_per_sample {videos_per_sample}: give at least 1"
        )
    settings = dict(
        family=family, num_train=num_train, num_eval=num_eval, videos_per_sample=videos_per_sample, small=small,
        seed=seed,
    )  # fmt: skip
    settings["script"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    done, videos = output_dir / "demo.json", output_dir / "videos"
    if done.exists() and json.loads(done.read_text()) == settings:
        print(f"{output_dir} is already complete for these settings: nothing to do (remove {done} to make it again)")
        return output_dir
    done.unlink(missing_ok=True)
    videos.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # A wide initialisation lets so small a model learn from its vision tower within a few hundred steps.
    save_tiny_model(output_dir / "model", family, vision_hidden_size=32, initializer_range=0.1, seed=seed)
    num_grey, num_per_colour = max(videos_per_sample, 32 if small else 96), 2 if small else 24
    train = make_split("train", videos, num_train, videos_per_sample, num_grey, num_per_colour, seed)
    held_out = make_split("eval", videos, num_eval, videos_per_sample, num_grey, num_per_colour, seed)
    write_json(output_dir / "sft_train.json", train)
    write_json(output_dir / "sft_eval.json", held_out)
    write_json(output_dir / "dpo_train.json", make_pairs(train, seed))
    write_json(output_dir / "dpo_eval.json", make_pairs(held_out, seed))
    write_json(output_dir / "cls_train.json", [labelled(record) for record in train])
    write_json(output_dir / "cls_eval.json", [labelled(record) for record in held_out])
    write_json(done, settings)
    size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    print(
        f"{output_dir}: {len(train)} training and {len(held_out)} held-out records of {videos_per_sample} videos, "
        f"{len(list(videos.glob('*.mp4')))} clips, a tiny model; {size / 1e6:.1f} MB "
        f"in {time.monotonic() - start:.0f} s"
    )
    return output_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="demo", help="directory to write to (default: demo)")
    parser.add_argument(
        "--family", choices=CHAT_TEMPLATES, default="qwen2_5_vl", help="family of the model (default: qwen2_5_vl)"
    )
    parser.add_argument("--num_train", type=int, help="training records (default: 768, with --small 24)")
    parser.add_argument("--num_eval", type=int, help="held-out records (default: 120, with --small 12)")
    parser.add_argument("--videos_per_sample", type=int, default=30, help="videos in each record (default: 30)")
    parser.add_argument("--small", action="store_true", help="fewer records of fewer clips, for tests")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights, the clips and the records (default: 0)"
    )
    make_demo(**vars(parser.parse_args()))
