"""The usual way, as an independent reference: qwen_vl_utils, HF processor, plain HF model, one sample at a time."""

import importlib.util
import json
import os
import runpy
from pathlib import Path

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"

from multivideo import pixel_bounds, qwen_position_ids

import av
import numpy as np
import qwen_vl_utils
import torch
import torch.nn.functional as F
from transformers import AutoConfig


def write_clip(path, width, height, num_frames, rate=8, seed=0):
    """An H.264 clip of smooth, moving, coloured noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((5, 5, 3))
    rows = np.linspace(0, 4, height).astype(int), np.linspace(0, 4, width).astype(int)
    picture = (coarse[rows[0]][:, rows[1]] * 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            image = np.ascontiguousarray(np.roll(picture, 3 * i, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def real_template(name):
    """The chat template of a real model, as TRL keeps it."""
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(folder) / "chat_templates" / f"{name}.jinja").read_text()


def run_lines(code, folder, **names):
    """Run Python lines of a page with these names; returns all names that there are then."""
    path = Path(folder) / "lines.py"
    path.write_text(code)
    return runpy.run_path(str(path), names)


def qwen_messages(record, folder, args, factor=28):
    """A normal record as the messages that qwen_vl_utils reads, with the same sampling options."""
    messages = []
    for turn in record["messages"]:
        content = []
        for part in turn["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
                continue
            least, most = pixel_bounds(args, "image" if part["type"] == "image" else "video", factor)
            item = {"min_pixels": least, "max_pixels": most}
            if part["type"] == "image":
                content.append({"type": "image", "image": os.path.join(folder, part["files"][0]), **item})
            else:
                item |= {"fps": args.fps}
                content.append({"type": "video", "video": os.path.join(folder, part["files"][0]), **item})
        messages.append({"role": turn["role"], "content": content})
    return messages


def hf_inputs(record, folder, args, processor, **template):
    """The HF processor's tensors for one conversation, given true video metadata, and its labels.

    With Qwen2-VL's and Qwen2.5-VL's positions as in their training; newer models count their own. `template`: what
    the chat template is given.
    """
    patch_size = processor.image_processor.patch_size
    messages = qwen_messages(record, folder, args, 2 * patch_size)
    text = processor.apply_chat_template(messages, tokenize=False, **template)
    images, videos, _ = qwen_vl_utils.process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True, image_patch_size=patch_size
    )
    kwargs = {}
    if videos:
        kwargs = {"videos": [video for video, _ in videos], "video_metadata": [metadata for _, metadata in videos]}
    inputs = processor(
        text=[text], images=images, **kwargs, do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    config = AutoConfig.from_pretrained(args.model_id)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        inputs["position_ids"] = qwen_position_ids(inputs, config)
    question = [{"role": "user", "content": "?"}]
    template["add_generation_prompt"] = True
    given = processor.apply_chat_template(question, tokenize=False, **template).rpartition("assistant\n")[2]
    return inputs, assistant_labels(inputs["input_ids"][0].tolist(), processor.tokenizer, given)


def assistant_labels(ids, tokenizer, given=""):
    """Labels found in the token stream alone: what follows `<|im_start|>assistant\n`, up to and with `<|im_end|>`.

    But for `given`, with which the generation prompt begins the answer.
    """
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    given = tokenizer.encode(given, add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    vision = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"])
    labels, i = [-100] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(opening)] == opening:
            i += len(opening)
            i += len(given) if ids[i : i + len(given)] == given else 0
            while i < len(ids) and ids[i] != end:
                labels[i] = -100 if ids[i] in vision else ids[i]
                i += 1
            if i < len(ids):
                labels[i] = end
        i += 1
    return torch.tensor(labels)


def hf_loss(model, inputs, labels):
    """Summed negative log-likelihood of one sample through the plain model."""
    logits = model(**inputs, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum")


def as_on_the_hub(folder):
    """Rewrite what transformers 5 wrote into `folder` the way Qwen's own repositories have it, by hand."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types", "pad_token_id"):
        text.pop(key, None)
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    config["vision_config"] = {key: value for key, value in config["vision_config"].items() if "rope" not in key}
    config["torch_dtype"] = config.pop("dtype")
    config |= {**text, "tie_word_embeddings": config["tie_word_embeddings"], "transformers_version": "4.41.2"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    nested = json.loads((folder / "processor_config.json").read_text())
    image = nested["image_processor"]
    image |= {"min_pixels": image["size"]["shortest_edge"], "max_pixels": image["size"]["longest_edge"],
              "processor_class": nested["processor_class"]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2))
    (folder / "processor_config.json").unlink()

    whole = json.loads((folder / "tokenizer.json").read_text())
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    for key in ("backend", "add_prefix_space"):
        tokenizer.pop(key)
    tokenizer |= {"added_tokens_decoder": added, "chat_template": template, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
