"""Make positions_4_51.json: 120 random conversations' positions, as get_rope_index of transformers 4.51.3 gives them.

    pip install transformers==4.51.3 torch && python tests/make_positions.py tests/positions_4_51.json

4.49 to 4.51 are as the model's authors have it. 4.52 to about 5.17 first round seconds per temporal patch down to
whole ones; 5.3 and later also let what follows a clip go on at start + max(height, width).
"""

import json
import random
import sys
from types import SimpleNamespace

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL

TEXT, IMAGE, VIDEO, START, END = 9, 5, 6, 7, 8  # tokens
SECONDS = [1.0, 0.5, 8.0, 2 / 3, 0.0667, 2 / 0.9123, 3.3]  # per temporal patch
FAMILIES = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
    "qwen2_vl": (Qwen2VL, Qwen2VLConfig),
}


def make_conversation() -> dict:
    """Text, images and videos in random order: `ids`, grids of `images` and `videos`, and `seconds` of the latter."""
    ids, images, videos, seconds = [TEXT] * random.randint(1, 4), [], [], []
    for _ in range(random.randint(1, 5)):
        h, w = 2 * random.randint(1, 6), 2 * random.randint(1, 6)
        if random.random() < 0.3:
            images.append([1, h, w])
            ids += [START] + [IMAGE] * (h * w // 4) + [END]
        else:
            t = random.choice([1, 2, 3, 5, 9])
            videos.append([t, h, w])
            seconds.append(random.choice(SECONDS))
            ids += [START] + [VIDEO] * (t * h * w // 4) + [END]
        ids += [TEXT] * random.randint(0, 3)
    return {"ids": ids, "images": images, "videos": videos, "seconds": seconds}


random.seed(20)
cases = []
for _ in range(60):
    case = make_conversation()
    for kind, (model_class, config_class) in FAMILIES.items():
        config = config_class(
            image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
        )
        input_ids = torch.tensor([case["ids"]])
        inputs = {
            "image_grid_thw": torch.tensor(case["images"]) if case["images"] else None,
            "video_grid_thw": torch.tensor(case["videos"]) if case["videos"] else None,
            "attention_mask": torch.ones_like(input_ids),
        }
        if kind == "qwen2_5_vl" and case["videos"]:
            inputs["second_per_grid_ts"] = torch.tensor(case["seconds"])
        positions, _ = model_class.get_rope_index(SimpleNamespace(config=config), input_ids, **inputs)
        cases.append({"kind": kind, **case, "positions": positions[:, 0].tolist()})
with open(sys.argv[1], "w") as file:
    file.write("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")
