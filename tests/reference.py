"""The usual way, as an independent reference: qwen_vl_utils, HF processor, plain HF model, one sample at a time."""

import os

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"

import av
import numpy as np
import qwen_vl_utils
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from multivideo import qwen_position_ids


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


def qwen_messages(record, folder, args):
    """A normal record as the messages that qwen_vl_utils reads, with the same sampling options."""
    messages = []
    for turn in record["messages"]:
        content = []
        for part in turn["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                bounds = {"min_pixels": args.image_min_pixels, "max_pixels": args.image_max_pixels}
                content.append({"type": "image", "image": os.path.join(folder, part["files"][0]), **bounds})
            else:
                bounds = {"min_pixels": args.video_min_pixels, "max_pixels": args.video_max_pixels, "fps": args.fps}
                content.append({"type": "video", "video": os.path.join(folder, part["files"][0]), **bounds})
        messages.append({"role": turn["role"], "content": content})
    return messages


def hf_inputs(record, folder, args, processor):
    """The HF processor's tensors for one conversation, given true video metadata, Qwen's positions, and its labels."""
    messages = qwen_messages(record, folder, args)
    text = processor.apply_chat_template(messages, tokenize=False)
    images, videos, _ = qwen_vl_utils.process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True
    )
    kwargs = {}
    if videos:
        kwargs = {"videos": [video for video, _ in videos], "video_metadata": [metadata for _, metadata in videos]}
    inputs = processor(
        text=[text], images=images, **kwargs, do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    inputs["position_ids"] = qwen_position_ids(inputs, AutoConfig.from_pretrained(args.model_id))
    return inputs, assistant_labels(inputs["input_ids"][0].tolist(), processor.tokenizer)


def assistant_labels(ids, tokenizer):
    """Labels found in the token stream alone: what follows `<|im_start|>assistant\\n`, up to and with `<|im_end|>`."""
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    vision = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"])
    labels, i = [-100] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(opening)] == opening:
            i += len(opening)
            while ids[i] != end:
                labels[i] = -100 if ids[i] in vision else ids[i]
                i += 1
            labels[i] = end
        i += 1
    return torch.tensor(labels)


def hf_loss(model, inputs, labels):
    """Summed negative log-likelihood of one sample through the plain model."""
    logits = model(**inputs, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum")
