"""Fields that change what is learned: each is honoured, or refused by name with what to do; other columns pass."""

import json
from pathlib import Path

import multivideo as mv

import datasets
import predict
import pytest
from PIL import Image
from qwen_vl_utils import vision_process
from reference import write_clip
from test_records import frames, image, llava, messages, text, trl, video
from test_train import demo, in_process  # noqa: F401

import train_cls
import train_dpo
import train_grpo
import train_sft

TRAINERS = {
    "sft": (train_sft, llava("<video>\nWhy?", video="a.mp4")),
    "dpo": (train_dpo, {"video": "a.mp4", "prompt": "<video>\nWhy?", "chosen": "So.", "rejected": "No."}),
    "grpo": (train_grpo, llava("<video>\nWhy?", video="a.mp4")),
    "cls": (train_cls, {"video": "a.mp4", "prompt": "<video>\nWhy?", "label": "a"}),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_refused_fields(trainer):
    """Each is named with what to do; null and [] are not there; GRPO hands some on to reward functions."""
    module, record = TRAINERS[trainer]
    for key, fix in mv.REFUSED_FIELDS.items():
        module.normalize_record({**record, key: None}, "here")
        module.normalize_record({**record, key: []}, "here")
        if trainer == "grpo" and key in train_grpo.COLUMNS:
            assert key in module.normalize_record({**record, key: 0.5}, "here")["column_names"]
            continue
        with pytest.raises(ValueError, match=f"^here: field '{key}' is not read, got float 0.5: ") as caught:
            module.normalize_record({**record, key: 0.5}, "here")
        assert str(caught.value).endswith(fix)
    beside = {**record, "image_paths": ["a.png"]}
    with pytest.raises(ValueError, match="field 'image_paths' is not one that is read: name it 'video' or 'image'"):
        module.normalize_record(beside, "here")
    module.normalize_record({**record, "video_path": "a.mp4", "source": "x", "score": 0.5}, "here")


@pytest.mark.parametrize("key", [*mv.REFUSED_TURN_FIELDS, *mv.TRAIN_FIELDS])
def test_refused_turn_fields(key):
    """In conversations, prompts and both answers of a pair."""
    answer = {"from": "gpt", "value": "So.", key: 0.5}
    talk = [{"from": "human", "value": "Why?"}, answer]
    more = [*talk, {"from": "human", "value": "And?"}]
    records = [(train_sft, {"conversations": talk}), (train_grpo, {"conversations": talk}),
               (train_dpo, {"prompt": "Why?", "chosen": [answer], "rejected": "No."}),
               (train_dpo, {"prompt": "Why?", "chosen": "Yes.", "rejected": [answer]}),
               (train_dpo, {"prompt": more, "chosen": "Yes.", "rejected": "No."}),
               (train_cls, {"conversations": more, "label": "a"})]  # fmt: skip
    for module, record in records:
        with pytest.raises(ValueError, match=f"turn [01]: field '{key}' .*, got float 0.5: "):
            module.normalize_record(record, "here")


def test_answers_that_are_not_learned(tiny_model):
    """`loss` and its like, `--train_on last` and TRL's prompts: labelled are the tokens of the others, as decoded."""

    def learned(record, **options):
        row = train_sft.normalize_record(record, "here", **options)
        ((_, labels),) = encoder.tokenize(row["messages"])
        return encoder.tokenizer.decode([label for label in labels if label != -100])

    encoder = mv.Encoder(tiny_model, train_sft.SFTArguments(model_id=tiny_model))
    one, two = "One.<|im_end|>", "Two.<|im_end|>"
    for key in mv.TRAIN_FIELDS:
        for value in (False, 0, 0.0, True, 1, None):
            talk = trl("1?", "One.")["messages"] + trl("2?", "Two.")["messages"]
            talk[0][key], talk[1][key] = False, value
            assert learned({"messages": talk}) == (one + two if value in (True, None) else two)
    talk = [{k: v for k, v in turn.items() if k != key} for turn in talk]
    assert learned({"messages": talk}, train_on="last") == two
    assert learned({"prompt": talk[:3], "completion": "Two."}) == two
    assert learned({"prompt": talk[:1], "completion": talk[1:]}) == one + two
    masked = [talk[0], {**talk[1], "loss": False}, talk[2], {**talk[3], "loss": False}]
    with pytest.raises(ValueError, match="^here: no answer is learned: all have 'loss': false"):
        learned({"messages": masked})
    with pytest.raises(ValueError, match="^here: no answer is learned: the last one has 'loss': false"):
        learned({"messages": [*talk[:3], masked[3]]}, train_on="last")
    with pytest.raises(ValueError, match="turn 0: field 'loss' is true on a user turn"):
        learned({"messages": [{**talk[0], "loss": True}, *talk[1:]]})
    with pytest.raises(ValueError, match="turn 1: fields 'loss' and 'train' contradict each other"):
        learned({"messages": [talk[0], {**talk[1], "loss": True, "train": False}]})
    with pytest.raises(ValueError, match="'chosen': no answer in it is learned"):
        pair = {"prompt": "?", "chosen": [{**talk[1], "loss": 0}], "rejected": "No."}
        train_dpo.normalize_record(pair, "here")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_system(trainer):
    """`system` of a record is its system turn, however the record is written."""
    module, record = TRAINERS[trainer]
    turn = module.normalize_record({**record, "system": "Be brief."}, "here")["messages"][0]
    assert turn == messages(("system", [text("Be brief.")]))[0]
    assert module.normalize_record({**record, "system": ""}, "here")["messages"][0]["role"] == "user"
    with pytest.raises(ValueError, match="field 'system' must be a text, got list"):
        module.normalize_record({**record, "system": ["Be brief."]}, "here")


def test_system_beside_a_system_turn():
    record = llava()
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert train_sft.normalize_record({**record, "system": "Be brief."}, "x") == train_sft.normalize_record(
        record, "x"
    )
    with pytest.raises(ValueError, match="a field 'system' and a system turn, which differ"):
        train_sft.normalize_record({**record, "system": "Be long."}, "x")


OPTIONS = {"fps": 0.5, "nframes": 8, "start": 1.0, "end": 2.0, "min_pixels": 3136, "max_pixels": 6272,
           "min_frames": 2, "max_frames": 6, "total_pixels": 100352, "video_start": 1.0, "video_end": 2.0}  # fmt: skip


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_options_of_a_record(trainer, key):
    """Beside the turns they go to every video, in `video` and in the turns, and to no image."""
    module, record = TRAINERS[trainer]
    expected = video("a.mp4", **{mv.OPTION_ALIASES.get(key, key): OPTIONS[key]})
    row = module.normalize_record({**record, key: OPTIONS[key]}, "here")
    assert row["messages"][0]["content"][0] == expected
    parts = [
        {"type": "video", "video": "a.mp4"},
        {"type": "image", "image": "i.png"},
        {"type": "text", "text": "Why?"},
    ]
    row = train_sft.normalize_record(trl(parts, **{key: OPTIONS[key]}), "here")
    assert row["messages"][0]["content"][:2] == [expected, image("i.png")]
    both = {**record, "video": {"video": "a.mp4", key: OPTIONS[key]}, key: OPTIONS[key]}
    with pytest.raises(ValueError, match=f"option '{key}' is given for all the record's videos and for this one"):
        module.normalize_record(both, "here")
    with pytest.raises(ValueError, match=f"field '{key}' is an option of the record's videos, but it has none"):
        train_sft.normalize_record(llava(**{key: OPTIONS[key]}), "here")
    with pytest.raises(ValueError, match="must be a number, got str '1'"):
        module.normalize_record({**record, key: "1"}, "here")


def test_options_of_frame_lists_and_contradictions():
    listed = {"video": ["1.png", "2.png"], "sample_fps": 0.5}
    row = train_sft.normalize_record(llava("<video>?", video=[listed]), "here")
    assert row["messages"][0]["content"][0] == frames("1.png", "2.png", fps=0.5)
    for record, message in (
        (
            llava(video={"video": "a.mp4", "sample_fps": 1}),
            "'sample_fps' is the rate of a list of frame images",
        ),
        (llava(video="a.mp4", fps=1, nframes=4), "options 'fps' and 'nframes' contradict each other"),
        (llava(video="a.mp4", max_frames=4, nframes=4), "options 'max_frames' and 'nframes' contradict each other"),
        (llava(video={"video": "a.mp4", "nframes": 4}, fps=1), "options 'fps' and 'nframes' contradict each other"),
        (llava(video="a.mp4", min_frames=8, max_frames=4), "'min_frames' is above 'max_frames'"),
        (llava(video="a.mp4", max_frames=1), "option 'max_frames' 1: the fewest is 2"),
        (llava(video={"video": "a.mp4", "start": 1, "video_start": 1}), "option 'video_start' is given twice"),
        (llava(video="a.mp4", resized_width=56), "'resized_width' and 'resized_height' go together"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sft.normalize_record(record, "here")


@pytest.mark.parametrize("options", [{"min_frames": 3}, {"max_frames": 5}, {"min_frames": 30}, {"max_frames": 9},
                                     {"min_frames": 6, "max_frames": 7}], ids=str)  # fmt: skip
def test_frame_bounds_equal_reference(tiny_model, options):
    """min_frames and max_frames of a video, as smart_nframes of qwen_vl_utils reads them."""
    part, args = video("a.mp4", **options), train_sft.SFTArguments(model_id=tiny_model)
    for total, fps in ((40, 8.0), (300, 25.0), (100, 30.0)):
        expected = vision_process.smart_nframes({"fps": 2.0, **options}, total, fps)
        assert len(mv.sample_frames(part, total, fps, args)[0]) == expected


def test_total_pixels_equal_reference(tiny_model):
    """Of one video, over all its frames: max(min(768 tokens, total / frames · 2), 1.05 · min_pixels), as there."""
    args = train_sft.SFTArguments(model_id=tiny_model)
    for total, count in ((16 * 28 * 28 * 8, 16), (10**7, 16), (200_000, 4), (1, 4)):
        part = video("a.mp4", total_pixels=total, min_pixels=3136)
        most = max(min(768 * 28 * 28, total / count * 2), int(3136 * 1.05))
        expected = vision_process.smart_resize(480, 640, 28, 3136, min(most, 768 * 28 * 28))
        assert mv.target_size(part, 480, 640, count, args, 28) == expected


# ------------------------------------------------------------------------------------------------------------ tags


def test_tags_in_answers():
    """Text where the other turns have placed all clips, where there is none, and where no other turn has a tag."""
    both = [text("See "), text("\n<video>\n"), text("it.")]
    for record in (
        llava("<video>\nWhy?", "See \n<video>\nit.", video="a.mp4"),
        llava("Why?", "See \n<video>\nit.", video="a.mp4"),
        llava("Why?", "See \n<video>\nit."),
    ):
        row = train_sft.normalize_record(record, "here")
        assert row["messages"][1]["content"] == both
        clips = [part for part in row["messages"][0]["content"] if part["type"] == "video"]
        assert len(clips) == ("video" in record)
    for answer in ("chosen", "rejected"):
        pair = {"video": "a.mp4", "prompt": "<video>\nWhy?", "chosen": "So.", "rejected": "No.", answer: "A <video>."}
        row = train_dpo.normalize_record(pair, "here")
        (turn,) = row["completions"][answer == "rejected"]
        assert turn["content"] == [text("A "), text("<video>"), text(".")]
    row = train_grpo.normalize_record(llava("<video>\nWhy?", "A <video>.", video="a.mp4"), "here")
    assert row["reference"] == "A <video>."


def test_escaped_tags():
    row = train_sft.normalize_record(
        llava("<video>\nWhat is \\<video> or \\<image>?", "\\<video>", video="a.mp4"), "x"
    )
    assert row["messages"] == messages(
        ("user", [video("a.mp4"), text("What is <video> or <image>?")]), ("assistant", [text("<video>")])
    )
    row = train_sft.normalize_record(llava("What is \\<video>?", video="a.mp4"), "x")
    assert row["messages"][0]["content"] == [video("a.mp4"), text("What is <video>?")]
    with pytest.raises(ValueError, match="turn 0: the tag <audio> in the text: these models do not hear"):
        train_sft.normalize_record(llava("<audio>\nWhat?"), "x")
    assert train_sft.normalize_record(llava("\\<audio>", "<audio>"), "x")["messages"] == messages(
        ("user", [text("<audio>")]), ("assistant", [text("<audio>")])
    )


# --------------------------------------------------------------------------------------------- others' record forms

SWIFT = {"query": "<video>\nWhy?", "response": "So.", "videos": ["a.mp4"]}
ALPACA = {"instruction": "<video>\nWhy?", "input": "", "output": "So.", "videos": ["a.mp4"]}
VIDEO_R1 = {"problem_id": 2, "problem": "Why?", "data_type": "video", "problem_type": "free-form", "options": [],
            "process": "", "solution": "So.", "path": "a.mp4", "data_source": "x"}  # fmt: skip
TRL = {"prompt": [{"role": "user", "content": "<video>\nWhy?"}], "videos": ["a.mp4"],
       "completion": [{"role": "assistant", "content": "So."}]}  # fmt: skip


@pytest.mark.parametrize("record", [SWIFT, ALPACA, VIDEO_R1, TRL], ids=["swift", "alpaca", "video-r1", "trl"])
def test_other_forms(record):
    """The same rows as LLaVA's, for SFT, GRPO and classification."""
    plain = llava("<video>\nWhy?", "So.", video="a.mp4")
    assert train_sft.normalize_record(record, "x")["messages"] == train_sft.normalize_record(plain, "x")["messages"]
    row = train_grpo.normalize_record(record, "x")
    assert row["messages"] == messages(("user", [video("a.mp4"), text("Why?")])) and row["reference"] == "So."
    assert predict.normalize_record(record, "x")["messages"] == row["messages"]
    assert predict.normalize_record(record, "x")["reference"] == "So."
    row = train_cls.normalize_record({**{k: v for k, v in record.items() if k != "completion"}, "label": "a"}, "x")
    assert row["messages"] == messages(("user", [video("a.mp4"), text("Why?")]))


def test_parts_of_other_forms():
    """Alpaca's input, Video-R1's options, process and images."""
    row = train_sft.normalize_record({**ALPACA, "input": "In short."}, "x")
    assert row["messages"][0]["content"] == [video("a.mp4"), text("Why?\nIn short.")]
    choice = {**VIDEO_R1, "options": ["A. rain", "B. sun"], "process": "<think>Wet.</think>", "path": "a.png",
              "data_type": "image", "solution": "<answer>A</answer>"}  # fmt: skip
    row = train_sft.normalize_record(choice, "x")
    assert row["messages"] == messages(
        ("user", [image("a.png"), text("Why?\nOptions:\nA. rain\nB. sun")]),
        ("assistant", [text("<think>Wet.</think>\n<answer>A</answer>")]),
    )
    assert train_grpo.normalize_record(choice, "x")["reference"] == "<answer>A</answer>"
    number = {**VIDEO_R1, "solution": 4}
    assert train_sft.normalize_record(number, "x")["messages"][1]["content"] == [text("4")]
    assert train_grpo.normalize_record(number, "x")["reference"] == "4"
    for change, message in (
        ({"options": "A. rain"}, "field 'options' must be a list of texts, got str 'A. rain'"),
        ({"data_type": "audio"}, "field 'data_type' must be video or image, got str 'audio'"),
        ({"data_type": ["video"]}, "field 'data_type' must be video or image, got list"),
        ({"videos": ["b.mp4"]}, "fields 'path' and 'videos' are both there"),
    ):
        for module in (train_sft, train_grpo):
            with pytest.raises(ValueError, match=f"^x: {message}"):
                module.normalize_record({**VIDEO_R1, **change}, "x")


def test_rejected_response():
    """ms-swift's pairs are TRL's: beside `response`, and beside turns that end with the chosen answer."""
    plain = {"video": "a.mp4", "prompt": "<video>\nWhy?", "chosen": "So.", "rejected": "No."}
    expected = train_dpo.normalize_record(plain, "x")
    turns = trl("<video>\nWhy?", "So.", videos=["a.mp4"])
    for record in ({**SWIFT, "rejected_response": "No."}, {**turns, "rejected_response": "No."},
                   {**ALPACA, "output": None, "chosen": "So.", "rejected": "No."}):  # fmt: skip
        assert train_dpo.normalize_record(record, "x") == expected
    with pytest.raises(ValueError, match="'rejected_response' and 'chosen' are both there"):
        train_dpo.normalize_record({**plain, "rejected_response": "No."}, "x")
    with pytest.raises(ValueError, match="'rejected_response' without the chosen answer"):
        train_dpo.normalize_record({"prompt": "Why?", "rejected_response": "No."}, "x")


@pytest.mark.parametrize("module", [train_sft, train_grpo], ids=["sft", "grpo"])
def test_unknown_forms(module):
    """Refused with the rewrite in one line."""
    for record, message in (
        ({"question": "Why?", "answer": "So."}, "rename 'question' to 'prompt', rename 'answer' to 'completion'"),
        ({"query": "Why?", "instruction": "Say."}, "fields 'query' and 'instruction' are both there"),
        ({"instruction": 3, "output": "So."}, "field 'instruction' must be a text, got int 3"),
        (
            {"prompt": "Why?", "reward_model": {"ground_truth": "So."}},
            "write its ground_truth as a field .* 'solution'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module.normalize_record(record, "here")
    with pytest.raises(ValueError, match="'completion' .*'prompt'|no 'prompt'|'conversations'"):
        module.normalize_record({"completion": "So."}, "here")


# ---------------------------------------------------------------------------------------------------- where data is


def test_embedded_media(tmp_path, monkeypatch):
    """Bytes in Parquet become files of the cache folder, each content once, and are read like any other file."""
    monkeypatch.setenv("MULTIVIDEO_CACHE", str(tmp_path / "cache"))
    write_clip(tmp_path / "a.mp4", 64, 48, 8)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "i.png")
    movie, still = (tmp_path / "a.mp4").read_bytes(), (tmp_path / "i.png").read_bytes()
    videos = [{"bytes": movie, "path": "a.mp4"}, {"bytes": movie, "path": None}]
    row = trl(videos=videos, images=[{"bytes": still, "path": None}])
    datasets.Dataset.from_list([row] * 2).to_parquet(str(tmp_path / "data.parquet"))
    for _ in range(2):
        records = mv.load_records(str(tmp_path / "data.parquet"), train_sft.normalize_record)
        clips = [part for row in records for part in row["messages"][0]["content"] if part["type"] != "text"]
        paths = [Path(part["files"][0]) for part in clips]
        assert [path.read_bytes() for path in paths] == [movie, movie, still] * 2
        assert {path.parent for path in paths} == {tmp_path / "cache" / "media"}
        assert sorted(path.suffix for path in (tmp_path / "cache" / "media").iterdir()) == [".mp4", ".png"]
    assert mv.video_info(str(paths[0])).num_frames == 8
    with pytest.raises(ValueError, match="field 'bytes' must be the bytes of the file, as in Parquet, got str"):
        train_sft.normalize_record(llava(video={"bytes": "AAAA"}), "x")


def test_splits(tmp_path):
    """FOLDER:SPLIT of a dataset that was saved with several."""
    tables = {name: datasets.Dataset.from_list([trl(name)]) for name in ("train", "val")}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "data"))
    for source, expected in ((tmp_path / "data", "train"), (f"{tmp_path}/data:val", "val")):
        (record,) = mv.load_records(str(source), train_sft.normalize_record)
        assert record["messages"][0]["content"] == [text(expected)]
    with pytest.raises(ValueError, match="no split 'test' in it, but train, val: name one"):
        mv.load_records(f"{tmp_path}/data:test", train_sft.normalize_record)


def test_labels_of_other_forms():
    """One sentence says how to write dicts and multi-hot lists."""
    cases = (
        ({"red": 1, "blue": 0}, r"a dict of classes: write the names .*, \['red'\], with --problem_type"),
        ([0, 1, 1], r"\(multi-hot\): write the names of those that apply, such as \['b', 'c'\]"),
    )
    for problem_type in ("single_label_classification", "multi_label_classification"):
        for value, message in cases:
            with pytest.raises(ValueError, match=message):
                train_cls.normalize_record({"prompt": "?", "label": value}, "x", problem_type)
    with pytest.raises(ValueError, match=r"such as \['green'\]"):
        names = ["red", "green", "blue"]
        train_cls.normalize_record({"prompt": "?", "label": [0, 1, 0]}, "x", "multi_label_classification", None, names)


def test_several_files(tiny_model, demo, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Read one after the other into one schema; the banner counts them; places and messages name the file."""
    clip = str(next((demo / "videos").rglob("*.mp4")))
    rows = [llava("<video>\nWhy?", str(i), video=clip) for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    source = f"{tmp_path / 'a.json'} + {tmp_path / 'b.jsonl'}"
    records = mv.load_records(source, train_sft.normalize_record)
    assert [row["messages"][1]["content"][0]["text"] for row in records] == list("01234")
    places = ["a.json record 0", "a.json record 1", "b.jsonl line 1", "b.jsonl line 2", "b.jsonl line 3"]
    assert [row["id"] for row in records] == [place for place, _ in mv.read_records(source)] == places
    files = ["--data_path", tmp_path / "a.json", tmp_path / "b.jsonl"]
    flags = ["--model_id", tiny_model, "--nframes", 2, "--video_resized_width", 56, "--video_resized_height", 56]
    in_process(monkeypatch, *flags, *files, "--max_steps", 1, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().err
    assert "records    5 (2 of a.json, 3 of b.jsonl), 8 per step" in said
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text())["samples"] == 5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.json").write_text(json.dumps([{**rows[0], "objects": ["x"]}]))
    with pytest.raises(SystemExit):
        in_process(
            monkeypatch, *flags, *files, tmp_path / "other" / "c.json", tmp_path / "a.json", tmp_path / "no.json"
        )
    said = capsys.readouterr().err
    assert (
        f"--data_path names {tmp_path / 'a.json'} twice" in said
        and f"--data_path {tmp_path / 'no.json'}: no such" in said
    )
    assert f"files of the folders {tmp_path}, {tmp_path / 'other'}: say with --image_folder where" in said
    with pytest.raises(ValueError, match="c.json record 0: field 'objects' is not read"):
        mv.load_records(f"{source} + {tmp_path / 'other' / 'c.json'}", train_sft.normalize_record)
