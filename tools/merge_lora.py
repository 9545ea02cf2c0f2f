"""Merge an adapter into its base model: a plain checkpoint that needs neither peft nor the base model any more.

    python tools/merge_lora.py --model_id out --output_path merged

`--model_id` is what train_*.py wrote: LoRA, DoRA or QLoRA, with whatever was trained beside it (tower, merger, head).
A QLoRA adapter goes into the 16-bit base. Layers are merged one after the other in place, so that the weights are held
once. Peak memory beyond the libraries, measured with 0.9 billion parameters in bf16 and a tower trained beside the
adapter: 1.2 times the model with LoRA on all layers, embeddings and head (7B is 17 GB, so about 20 GB), as much with
DoRA on the layers; 1.7 times with DoRA on embeddings and head too. Logits of a text and a video are compared before
and after; nothing is written if they differ by more than the precision of the weights explains.
"""

import argparse
import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multivideo as mv

import torch
import transformers
from tqdm import tqdm

from train_cls import classifier_class

# Largest difference of two logits over their standard deviation: rounding of the merged weights, with room to spare.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"  # peft's name of the rows of new tokens
ROWS = 4096  # of a layer that are merged at a time


@torch.no_grad()
def probe_logits(model, processor) -> torch.Tensor:
    """float32 [T, V]: next-token logits of a fixed text with one video of noise; a classifier's at every token."""
    import peft

    factor = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    video = torch.randint(256, (2, 3, factor, factor), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    content = [{"type": "video"}, {"type": "text", "text": "What does this video show? Answer in one sentence."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    metadata = {"fps": 2.0, "total_num_frames": 2, "frames_indices": [0, 1]}
    inputs = processor(text=[text], videos=[video], video_metadata=[metadata], do_resize=False, do_sample_frames=False,
                       return_tensors="pt")  # fmt: skip
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if hasattr(plain, "score"):
        return plain.score(plain.model(**inputs, use_cache=False).last_hidden_state)[0].float()
    return model(**inputs, use_cache=False).logits[0].float()


@torch.no_grad()
def merge_layer(layer):
    """Add an adapter to the layer that it stands on, in place, ROWS rows at a time.

    peft makes the whole difference at once, in fp32 and twice: 4.4 GB for the head of 7B. What has no rows of its own
    (DoRA on embeddings, layers of other kinds) is left to it.
    """
    from peft.tuners import lora

    (name,) = layer.active_adapters
    dora = name in layer.lora_magnitude_vector
    if isinstance(layer, lora.Embedding) and not dora:
        left, right = layer.lora_embedding_A[name].T, layer.lora_embedding_B[name].T  # [V, r], [r, D]
    elif isinstance(layer, lora.Linear) and not layer.lora_bias[name]:
        left, right = layer.lora_B[name].weight, layer.lora_A[name].weight  # [out, r], [r, in]
    else:
        layer.merge()
        return
    weight = layer.get_base_layer().weight
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        merged = (left[part].float() @ right.float()).mul_(layer.scaling[name]).add_(weight[part])
        if dora:  # rows of the learned lengths
            merged *= (layer.lora_magnitude_vector[name].weight[part] / merged.norm(dim=1))[:, None]
        weight[part] = merged


@torch.no_grad()
def merge_token_rows(model) -> dict[str, list[int]]:
    """Put rows that were trained beside the adapter into their matrix, in place; returns which, by module."""
    import peft

    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.utils.TrainableTokensWrapper):
            layer = module.token_adapter
            (adapter,) = layer.token_indices
            weight = layer.get_base_layer().weight
            weight[layer.token_indices[adapter]] = layer.trainable_tokens_delta[adapter].to(weight)
            rows[name] = layer.token_indices[adapter]
    return rows


def check_loaded(model, weights: dict):
    """Assert that the model's adapter has the values of the file, rounded to the model's type."""
    import peft

    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [name for name, value in weights.items() if name in loaded and not same(loaded[name], value)]
    assert not wrong, f"{len(wrong)} tensors of the adapter were not loaded, first {wrong[0]}"


def check_merged(model, weights: dict, token_rows: dict):
    """Assert that what was trained beside the adapter is in the merged model, rounded to its type."""
    merged = model.state_dict()
    wrong = []
    for name, value in weights.items():
        if ".lora_" in name or ".original_module." in name or name.endswith(".base_layer.weight"):
            continue  # adapted; or frozen weights that peft stores as well
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        plain = plain.replace(".modules_to_save.default.", ".")
        if plain.endswith(TOKEN_ROWS):
            key = plain.removesuffix(TOKEN_ROWS)
            found = merged[f"{key}.weight"][token_rows[key]]
        else:
            found = merged[plain]
        if not same(found, value):
            wrong.append(name)
    assert not wrong, f"{len(wrong)} trained tensors are not in the merged model, first {wrong[0]}"


def same(ours: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a tensor is the stored one, rounded to its own type; NaN is equal to NaN."""
    return torch.equal(ours.nan_to_num(), stored.to(ours.dtype).nan_to_num())


def merge(model_id: str, output_path: str, base_model_id: str | None = None, dtype: str = "auto") -> float:
    """Write the merged model and its processor to `output_path`; returns the largest relative change of a logit.

    Raises:
        InputError: not an adapter, a base model that is not there, an output that exists, or logits that change.
    """
    adapter, final = Path(model_id), Path(output_path)
    config_path = adapter / "adapter_config.json"
    if not config_path.is_file():
        has_model = (adapter / "config.json").is_file()
        found = "a full model, which needs no merging" if has_model else "no adapter_config.json there"
        raise mv.InputError(
            f"--model_id {adapter}: {found}; expected the --output_dir of a run with --lora_enable True"
        )
    if final.exists():
        raise mv.InputError(f"--output_path {final} exists: name a new folder")
    base = base_model_id or json.loads(config_path.read_text())["base_model_name_or_path"]
    if os.path.isabs(base) and not Path(base).is_dir():
        raise mv.InputError(f"the adapter's base model {base} is not there any more: say where with --base_model_id")
    mv.find_model(base)
    model_class, kwargs = transformers.AutoModelForImageTextToText, {}
    if (adapter / "config.json").is_file():  # a classifier's, with its labels
        kwargs["config"] = transformers.AutoConfig.from_pretrained(
            adapter, dtype=transformers.AutoConfig.from_pretrained(base).dtype
        )
        mlp_head = bool(getattr(kwargs["config"], "mlp_head_dim", 0))
        model_class = classifier_class(kwargs["config"].model_type, mlp_head)
    model = model_class.from_pretrained(base, dtype=dtype, **kwargs).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(f"{base}: {size / 1e9:.2f} GB in {str(model.dtype).removeprefix('torch.')}", file=sys.stderr)
    model, weights = mv.put_adapter(model, adapter)
    aside = final.with_name(f".{final.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        change = merge_into(aside, model, weights, adapter, base)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    os.rename(aside, final)
    print(f"{final}: merged; the largest change of a logit is {change:.2g} of their standard deviation")
    return change


def merge_into(aside: Path, model, weights: dict, adapter: Path, base: str) -> float:
    """Merge the PeftModel's adapter, check that all its `weights` arrived, and write the result; see merge."""
    from peft.tuners import lora

    if not mv.processor_files(adapter)[1]:  # another program's: it has none, or only a tokenizer
        mv.save_processor(mv.load_processor(base), aside)
    mv.copy_processor(adapter, aside)
    mv.add_older_files(aside)
    processor = transformers.AutoProcessor.from_pretrained(aside)
    before = probe_logits(model, processor)
    check_loaded(model, weights)
    for layer in tqdm([module for module in model.modules() if isinstance(module, lora.LoraLayer)], desc="merging"):
        merge_layer(layer)
    token_rows = merge_token_rows(model.get_base_model())
    model = model.unload()
    check_merged(model, weights, token_rows)
    after = probe_logits(model, processor)
    change = float((after - before).abs().max() / before.std())
    if not change <= TOLERANCE[model.dtype]:  # NaN is refused too
        raise mv.InputError(f"merging changes a logit by {change:.2g} of their standard deviation, and rounding to "
                            f"{str(model.dtype).removeprefix('torch.')} explains only {TOLERANCE[model.dtype]:g}: "
                            "nothing was written; --dtype float32 rounds less")  # fmt: skip
    model.save_pretrained(aside, max_shard_size="2GB")
    mv.finish_config(aside)
    mv.copy_unused_weights(model, base, aside)
    if facts := mv.own_card(adapter / "README.md"):
        mv.write_card(aside, "merged", model.config, facts)
    for run in (adapter / "arguments.json", adapter.parent / "arguments.json"):
        if run.is_file():  # the sizes and the system prompt that it was trained with, for predict.py
            shutil.copy(run, aside)
            break
    for file in aside.iterdir():
        mv.follow_umask(file)
    return change


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True, help="folder of the adapter: a run's --output_dir")
    parser.add_argument("--output_path", required=True, help="new folder for the merged model")
    parser.add_argument("--base_model_id", help="base model (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="type of the merged weights (default: the base model's)",
    )  # fmt: skip
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    merge(**vars(parser.parse_args()))


if __name__ == "__main__":
    mv.run(main)
