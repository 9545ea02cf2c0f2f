"""Outputs written here must load in transformers 4.57 and give the same logits: `make test-compat`.

    .venv/bin/python tests/compat.py write FOLDER           full models, adapters and merged models, logits of a video
    .venv-compat/bin/python tests/compat.py read FOLDER     plain from_pretrained of another version, the same logits

Both versions get the same tokens, pixels, grids and positions, since they compute positions differently.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What does this <scan> show?"}]}]
VIDEO = torch.randint(256, (8, 3, 56, 84), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.no_grad()
def logits_of(model, inputs):
    """float32 [T, V] of inputs with given positions."""
    return model.eval()(**inputs, use_cache=False).logits[0].float()


def video_inputs(model, processor):
    """What the processor makes of one prompt with a video, and this version's positions [3, 1, T]."""
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    metadata = {"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}
    inputs = processor(text=[text], videos=[VIDEO], video_metadata=[metadata], do_resize=False, do_sample_frames=False,
                       return_tensors="pt")  # fmt: skip
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs.get("second_per_grid_ts"), attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    names = ("input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw")
    return {**{name: inputs[name] for name in names}, "position_ids": positions}


def write(root: Path):
    """Bases as on the hub and as transformers 5 writes them; of each a model, an adapter and a merged model."""
    for folder in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[1] / "tools"):
        sys.path.insert(0, str(folder))
    import multivideo as mv

    import merge_lora
    from make_demo import save_tiny_model
    from reference import as_on_the_hub

    kinds = {"qwen2_5_vl": {}, "qwen2_vl": {"family": "qwen2_vl"}, "tied": {"tie_word_embeddings": True}}
    for name, kwargs in kinds.items():
        for style in ("hub", "five"):
            place = root / f"{name}_{style}"
            base = str(save_tiny_model(place / "base", **kwargs))
            if style == "hub":
                as_on_the_hub(base)
            if name == "tied":  # tokens of the user's own
                tokenizer = AutoTokenizer.from_pretrained(base)
                tokenizer.add_tokens(["<scan>", "<side>"])
                tokenizer.save_pretrained(base)
            processor = mv.load_processor(base)
            for kind in ("model", "adapter"):
                args = mv.TrainingArguments(model_id=base)
                if kind == "adapter":
                    args.lora_enable = args.freeze_llm = args.freeze_vision_tower = True
                    args.lora_namespan_exclude = "['lm_head', 'embed_tokens']"
                model = mv.load_model(args, "cpu")
                for parameter in model.parameters():
                    if parameter.requires_grad:  # as if it had been trained
                        parameter.data.add_(torch.randn(parameter.shape), alpha=0.02)
                mv.save_model(model, processor, place / kind, args=args)
            merge_lora.merge(str(place / "adapter"), str(place / "merged"))
            for kind in ("model", "adapter", "merged"):
                model = load(place, kind)
                inputs = video_inputs(model.get_base_model() if kind == "adapter" else model, processor)
                save_file({**inputs, "logits": logits_of(model, inputs)}, place / f"{kind}.safetensors")


def load(place: Path, kind: str):
    """An output as anybody loads it."""
    if kind != "adapter":
        return AutoModelForImageTextToText.from_pretrained(place / kind)
    from peft import PeftModel

    # 4.57 cannot load a base that transformers 5 wrote: there the adapter goes onto the output
    base = place / "base" if "five" not in place.name else place / "model"
    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), place / kind)


def read(root: Path):
    """Load every output, compare its logits, and the tokens and pixels that its processor makes of the prompt."""
    import transformers

    for path in sorted(root.glob("*/*.safetensors")):
        place, kind = path.parent, path.stem
        inputs = load_file(path)
        expected = inputs.pop("logits")
        processor = AutoProcessor.from_pretrained(place / kind)
        text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        found = processor(text=[text], videos=[VIDEO], do_resize=False, do_sample_frames=False, return_tensors="pt")
        assert torch.equal(found["input_ids"], inputs["input_ids"]), f"{path}: other tokens"
        assert torch.equal(found["video_grid_thw"], inputs["video_grid_thw"]), f"{path}: another grid"
        pixels = (found["pixel_values_videos"] - inputs["pixel_values_videos"]).abs().max().item()
        difference = (logits_of(load(place, kind), inputs) - expected).abs().max().item()
        print(f"transformers {transformers.__version__}, {place.name}, {kind}: logits {difference:.1e}, "
              f"pixels {pixels:.1e}, of {expected.std():.2f}")  # fmt: skip
        assert difference <= 1e-5 and pixels <= 1e-5


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
