"""Positions by the rule that the models were trained with, held against transformers 4.51.3 and counted by hand."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import multivideo as mv

import numpy as np
import pytest
import torch
from reference import run_lines
from test_grpo import OneProcess, arguments, prompts, reference_inputs  # noqa: F401
from test_packing import clips  # noqa: F401
from transformers import AutoModelForImageTextToText

import train_grpo

CASES = json.loads((Path(__file__).parent / "positions_4_51.json").read_text())  # see make_positions.py
IMAGE, VIDEO = 5, 6


def config_of(kind, tokens_per_second=4):
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    return SimpleNamespace(model_type=kind, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)


def hf_inputs(case):
    """A case as an HF processor hands it over."""
    inputs = {"input_ids": torch.tensor([case["ids"]]), "attention_mask": torch.ones(1, len(case["ids"])).long()}
    inputs |= {f"{kind}_grid_thw": torch.tensor(case[f"{kind}s"]) for kind in ("image", "video") if case[f"{kind}s"]}
    return inputs | ({"second_per_grid_ts": case["seconds"]} if case["kind"] == "qwen2_5_vl" else {})


def test_positions_equal_transformers_4_51():
    assert len(CASES) == 120
    for i, case in enumerate(CASES):
        positions = mv.qwen_position_ids(hf_inputs(case), config_of(case["kind"]))
        assert positions[0, 0].tolist() == list(range(len(case["ids"])))
        assert positions[1:, 0].tolist() == case["positions"], f"case {i}"


def test_a_long_clip_pushes_the_text_behind_it():
    """10 s at 64 px and fps 0.25: 4 frames, 2 × 2 × 2 tokens; the second patch is at 2.5 × 2 × 2 = 10 positions."""
    ids = [9, 7, *[VIDEO] * 8, 8, 9]
    positions = mv.qwen_positions(ids, {VIDEO: iter([((2, 4, 4), 5.0)])}, config_of("qwen2_5_vl", 2))
    assert positions[1].tolist() == [0, 1, 2, 2, 2, 2, 12, 12, 12, 12, 13, 14]
    assert positions[2].tolist() == [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 13, 14]
    assert positions[3].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 13, 14]
    positions = mv.qwen_positions(ids, {VIDEO: iter([((2, 4, 4), 5.0)])}, config_of("qwen2_vl"))
    assert positions[1].tolist()[-2:] == [4, 5]


def test_clips_side_by_side_and_at_the_ends():
    """No token has to stand between two clips, before the first or after the last."""
    grids = {VIDEO: iter([((1, 2, 4), 1.0), ((2, 2, 2), 1.0)]), IMAGE: iter([((1, 4, 2), 1.0)])}
    positions = mv.qwen_positions([VIDEO] * 4 + [IMAGE] * 2, grids, config_of("qwen2_vl"))
    assert positions[1:].tolist() == [[0, 0, 2, 3, 4, 4], [0, 0, 2, 2, 4, 5], [0, 1, 2, 2, 4, 4]]
    assert mv.qwen_positions([9, 9], {}, config_of("qwen2_vl")).tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side):
    """Each row of a padded batch has the positions it has alone; grids are taken row after row."""
    pair = [CASES[0], CASES[2]]
    longest = max(len(case["ids"]) for case in pair)
    batch = {"input_ids": torch.zeros(2, longest).long(), "attention_mask": torch.zeros(2, longest).long()}
    rows = [slice(longest - len(c["ids"]), longest) if side == "left" else slice(len(c["ids"])) for c in pair]
    for b, (case, row) in enumerate(zip(pair, rows)):
        batch["input_ids"][b, row], batch["attention_mask"][b, row] = torch.tensor(case["ids"]), 1
    for kind in ("image", "video"):
        batch[f"{kind}_grid_thw"] = torch.tensor(pair[0][f"{kind}s"] + pair[1][f"{kind}s"])
    batch["second_per_grid_ts"] = pair[0]["seconds"] + pair[1]["seconds"]
    positions = mv.qwen_position_ids(batch, config_of("qwen2_5_vl"))
    for b, (case, row) in enumerate(zip(pair, rows)):
        assert positions[1:, b, row].tolist() == case["positions"]
        assert not positions[:, b][:, ~batch["attention_mask"][b].bool()].any()


def test_answers_behind_a_prompt_go_on_as_in_one_conversation():
    """DPO's and GRPO's answers have the positions that the same tokens have in SFT."""
    for case in CASES[::7]:
        config, length = config_of(case["kind"]), len(case["ids"])
        grids = [(grid, second) for grid, second in zip(case["videos"], case["seconds"])]
        stills = [(grid, 1.0) for grid in case["images"]]
        whole = mv.qwen_positions([*case["ids"], *[9] * 5], {IMAGE: iter(stills), VIDEO: iter(grids)}, config)
        prompt = mv.qwen_positions(case["ids"], {IMAGE: iter(stills), VIDEO: iter(grids)}, config)
        sample = {"input_ids": np.array(case["ids"]), "labels": np.full(length, -100), "lengths": np.array([length]),
                  "position_ids": prompt}  # fmt: skip
        both = mv.add_suffixes(sample, [([9] * 5, [9] * 5)] * 2)["position_ids"]
        assert both[:, : length + 5].tolist() == whole.tolist()
        assert both[:, length + 5 :].tolist() == whole[:, length:].tolist()


def test_documented_lines(tiny_model, prompts, clips, tmp_path):  # noqa: F811
    """The lines of README.md and docs/positions.md make plain `generate` answer as ours does; without it differs."""
    blocks = [block for page in ("README.md", "docs/positions.md")
              for block in re.findall(r"```python\n(.*?)```", (mv.Path(mv.__file__).parent / page).read_text(), re.S)
              if "qwen_position_ids" in block]  # fmt: skip
    assert len(blocks) == 2
    args = arguments(tiny_model, max_completion_length=8)
    encoder = mv.Encoder(tiny_model, args)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    model.generation_config.suppress_tokens = [
        *encoder.vision_ids, *range(len(encoder.tokenizer), model.config.text_config.vocab_size)]  # fmt: skip
    ours = mv.load_model(args, "cpu")
    ((expected,),), _ = train_grpo.generate(OneProcess(ours), [encoder(prompts[2], clips)], encoder, args)
    for block in blocks:
        inputs, length = reference_inputs(tiny_model, prompts[2], clips, [])
        del inputs["position_ids"]
        names = run_lines(block, tmp_path, inputs=inputs, model=model)
        assert names["output"][0, length:].tolist()[: len(expected)] == expected
    del inputs["position_ids"]
    model.model.rope_deltas = None
    with torch.no_grad():
        plain = model(**inputs).logits[0, -1]
        handed = model(**inputs, position_ids=mv.qwen_position_ids(inputs, model.config)).logits[0, -1]
    assert (plain - handed).abs().max() > 1e-3


def test_a_run_warns_once_of_a_sample_beyond_the_models_positions(tiny_model, prompts, clips, tmp_path, capsys):  # noqa: F811
    """And names its record."""
    args = arguments(tiny_model, output_dir=str(tmp_path), dataloader_num_workers=0)
    encoder = mv.Encoder(tiny_model, args)
    rows = [{**prompts[2], "id": name} for name in ("first", "second")]
    last = int(encoder(rows[0], clips)["position_ids"].max())
    for most, warned in ((last + 1, 0), (last, 1)):
        encoder.max_positions = most
        for samples in mv.SampleStream(encoder, args).batches(rows, [[0], [1]], clips):
            assert len(samples) == 1
        said = capsys.readouterr().err
        assert said.count(f"record first ends at position {last}, and the model was made for {most}") == warned
        assert "second" not in said
