"""Records: every accepted format gives one exact normal form, and every wrong one is named with its mend."""

import copy
import hashlib
import importlib
import json
import random
import re
import sys
from pathlib import Path

import multivideo as mv

import datasets
import pytest

import train_cls
import train_dpo
import train_grpo
import train_sft

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTHING = dict.fromkeys(["text", "fps", "nframes", "min_frames", "max_frames", "start", "end", "min_pixels",
                         "max_pixels", "total_pixels", "resized_width", "resized_height"]) | {"files": []}  # fmt: skip


def text(value):
    return {"type": "text", **NOTHING, "text": value}


def video(path, **options):
    return {"type": "video", **NOTHING, "files": [path], **options}


def frames(*paths, **options):
    return {"type": "frames", **NOTHING, "files": list(paths), **options}


def image(path, **options):
    return {"type": "image", **NOTHING, "files": [path], **options}


NO_TURN_FIELDS = {"train": None, "reasoning": None, "tool_calls": None}


def messages(*turns):
    return [{"role": role, "content": list(content), **NO_TURN_FIELDS} for role, content in turns]


def llava(question="Why?", answer="So.", **fields):
    return {**fields, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def clip(**options):
    return llava(video={"video": "a.mp4", **options})


def trl(question="Why?", answer="So.", **fields):
    return {
        **fields,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def user_content(record):
    """The normal form of the first user turn."""
    rows = train_sft.normalize_record(record, "record 0")["messages"]
    return next(turn["content"] for turn in rows if turn["role"] == "user")


def write(path, records):
    """JSON or JSONL, by the suffix."""
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))
    return str(path)


def load(source):
    return mv.load_records(str(source), train_sft.normalize_record)


# ------------------------------------------------------------------------------------------------ one normal form

STUDY_0002 = messages(
    ("system", [text("You compare two recordings.")]),
    ("user", [text("Before: "), video("study_0002/before.mp4"), text("What do you see?")]),
    ("assistant", [text("A closed valve.")]),
    ("user", [text("After: "), video("study_0002/after.mp4"), text("What changed?")]),
    ("assistant", [text("It is open.")]),
)
FRAMES = messages(
    ("user", [frames("scan/0001.png", "scan/0002.png", "scan/0003.png", "scan/0004.png"),
              frames("walk/1.jpg", "walk/2.jpg", fps=4.0), text("Each list of images is one video. What moves?")]),
    ("assistant", [text("A shadow, then a man.")]),
)  # fmt: skip
IMAGES = messages(
    ("user", [image("left.jpg"), image("right.jpg", max_pixels=200704), text("Find the difference.")]),
    ("assistant", [text("The clock.")]),
)
IMAGE_AND_VIDEO = messages(
    ("user", [text("Plan: "), image("plan.png"), text("Tour: "), video("tour.mp4"), text("Where does the tour end?")]),
    ("assistant", [text("In the kitchen.")]),
)
TEXT_ONLY = messages(
    ("user", [text("What is a valve?")]), ("assistant", [text("A part that opens and closes a passage.")])
)
EXPECTED = {
    "llava.json": {
        "study_0001": messages(
            ("user", [*[video(f"study_0001/view_{i:02}.mp4") for i in range(1, 31)],
                      text("Which views show the valve?")]),
            ("assistant", [text("Views 4, 9 and 17.")]),
        ),
        "study_0002": STUDY_0002,
        "without_tags": messages(
            ("user", [video("a.mp4"), video("b.mp4"), text("All videos come first, in this order. What differs?")]),
            ("assistant", [text("The second one is brighter.")]),
        ),
        "one_video": messages(
            ("user", [video("a.mp4"), text("What happens?")]), ("assistant", [text("A door opens.")])
        ),
    },
    "options_and_frames.json": {
        "own_options": messages(
            ("user", [video("long.mp4", fps=0.5, start=60.0, end=90.5),
                      video("short.mp4", nframes=8, resized_width=112, resized_height=84),
                      video("sharp.mp4", min_pixels=3136, max_pixels=50176),
                      video("as_the_flags_say.mp4"), text("Which one is the longest?")]),
            ("assistant", [text("The first.")]),
        ),
        "frames": FRAMES,
    },
    "images_and_text.json": {"image_and_video": IMAGE_AND_VIDEO, "images": IMAGES, "text_only": TEXT_ONLY},
    "messages.jsonl": {"study_0002": STUDY_0002, "images": IMAGES, "text_only": TEXT_ONLY},
    "messages_parts.jsonl": {"study_0002": STUDY_0002, "frames": FRAMES, "image_and_video": IMAGE_AND_VIDEO},
}  # fmt: skip


def test_every_example_is_expected():
    others = ("dpo", "grpo", "cls")  # these trainers' own formats
    assert {path.name for path in EXAMPLES.iterdir() if not path.name.startswith(others)} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example_loads_to_its_exact_normal_form(name):
    loaded = load(EXAMPLES / name)
    assert {row["id"]: row["messages"] for row in loaded} == EXPECTED[name]


def test_seed_readme_record():
    """The record of the seed's README, its comment and "..." filled in as it says: up to 30 videos, as many tags."""
    names = [f"video{i}.mp4" for i in range(1, 31)]
    record = [
        {
            "id": "sample_1",
            "video": names,
            "conversations": [
                {"from": "human", "value": "<video>\n" * 30 + "Describe these videos."},
                {"from": "gpt", "value": "In these videos, I can see..."},
            ],
        }
    ]
    row = train_sft.normalize_record(record[0], "record 0")
    assert row["id"] == "sample_1"
    assert row["messages"] == messages(
        ("user", [*map(video, names), text("Describe these videos.")]),
        ("assistant", [text("In these videos, I can see...")]),
    )
    # as it stands there, three tags and four entries, it is an error that says so
    record[0]["video"] = ["video1.mp4", "video2.mp4", "video3.mp4", "..."]
    record[0]["conversations"][0]["value"] = "<video>\n<video>\n<video>\nDescribe these videos."
    with pytest.raises(ValueError, match=r"3 <video> tags for 4 videos"):
        train_sft.normalize_record(record[0], "record 0")


@pytest.mark.parametrize(
    "record",
    [
        llava("<video>\n<video>\nWhy?", video=["a.mp4", "b.mp4"]),
        llava("Why?", video=["a.mp4", "b.mp4"]),
        llava("<video>\n<video>\nWhy?", videos=["a.mp4", "b.mp4"]),
        llava("<video>\n<video>\nWhy?", video=("a.mp4", {"path": "b.mp4"})),
        llava("<video><video>Why?", video=[{"video": "a.mp4"}, {"url": "b.mp4", "fps": None}]),
        llava("<video>\r\n<video>\r\nWhy?", video=["a.mp4", "b.mp4"]),
        trl("<video>\n<video>\nWhy?", videos=["a.mp4", "b.mp4"]),
        trl("Why?", videos=["a.mp4", "b.mp4"], images=[], image=None),
        trl([{"type": "video"}, {"type": "video"}, {"type": "text", "text": "Why?"}], videos=["a.mp4", "b.mp4"]),
        trl([{"type": "video", "video": "a.mp4"}, {"type": "video", "path": "b.mp4"}, {"text": "Why?"}]),
        trl([{"video": "a.mp4"}, {"type": None, "video": "b.mp4", "text": None}, "Why?"], videos=[], video=None),
        trl(
            [
                {"type": "video", "video": "a.mp4", "text": None, "image": None},
                {"type": "video", "video": "b.mp4", "text": None, "image": None},
                {"type": "text", "text": "Why?", "video": None, "image": None},
            ],
            "So.",
            image={"path": None, "bytes": None},
        ),
        {"video": ["a.mp4", "b.mp4"], "conversations": [{"role": "user", "content": "<video>\n<video>\nWhy?"},
                                                        {"role": "assistant", "content": [{"text": "So."}]}]},
        {"video": ["a.mp4", "b.mp4"], "messages": [{"from": "human", "value": "<video>\n<video>\nWhy?", "role": None},
                                                   {"from": "assistant", "value": "So.", "content": None}]},
        {"video": ["a.mp4", "b.mp4"], "conversations": [
            {"from": "human", "value": "Why?", "thinking": "of a user"},
            {"from": "gpt", "value": "So.", "reasoning": None, "reasoning_content": " ", "thinking": []}]},
    ],
)  # fmt: skip
def test_equivalent_records_have_one_normal_form(record):
    expected = messages(("user", [video("a.mp4"), video("b.mp4"), text("Why?")]), ("assistant", [text("So.")]))
    before = copy.deepcopy(record)
    row = train_sft.normalize_record(record, "record 0")
    assert row == {"id": "record 0", "messages": expected, "chat_template_kwargs": None}
    assert record == before


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        # \n?<video>\n?: one newline on each side goes with the tag, a second one stays
        ("<video>\nWhy?", [video("a.mp4"), text("Why?")]),
        ("<video>\n\nWhy?", [video("a.mp4"), text("\nWhy?")]),
        ("<video> Why?", [video("a.mp4"), text(" Why?")]),
        ("See:\n<video>\nWhy?", [text("See:"), video("a.mp4"), text("Why?")]),
        ("See:\n\n<video>Why?", [text("See:\n"), video("a.mp4"), text("Why?")]),
        ("Why?\n<video>", [text("Why?"), video("a.mp4")]),
        ("<video>", [video("a.mp4")]),
        ("See:\r\n<video>\r\nWhy?\r\n", [text("See:"), video("a.mp4"), text("Why?\r\n")]),
    ],
)
def test_a_tag_takes_one_newline_on_each_side(question, expected):
    assert user_content(llava(question, video="a.mp4")) == expected
    if "\r" not in question:  # upstream's own pattern, where it applies
        around = re.split(r"\n?<video>\n?", question)
        assert [part["text"] for part in expected if part["type"] == "text"] == [piece for piece in around if piece]


def test_tags_in_any_turn_are_filled_in_order_of_appearance():
    record = {
        "video": ["1.mp4", "2.mp4", "3.mp4"],
        "image": ["i.png"],
        "conversations": [
            {"from": "system", "value": "Like <video>"},
            {"from": "human", "value": "<image>\n<video>\nWhy?"},
            {"from": "gpt", "value": "Because of <video>"},
        ],
    }
    assert train_sft.normalize_record(record, "x")["messages"] == messages(
        ("system", [text("Like "), video("1.mp4")]),
        ("user", [image("i.png"), video("2.mp4"), text("Why?")]),
        ("assistant", [text("Because of "), video("3.mp4")]),
    )


def test_without_tags_all_go_first_after_the_system_turn():
    record = {
        "video": ["1.mp4", "2.mp4"],
        "image": "i.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "Why?"},
            {"from": "assistant", "value": "So."},
        ],
    }
    assert train_sft.normalize_record(record, "x")["messages"] == messages(
        ("system", [text("Be brief.")]),
        ("user", [video("1.mp4"), video("2.mp4"), image("i.png"), text("Why?")]),
        ("assistant", [text("So.")]),
    )


def test_text_that_only_looks_like_tags_is_text_where_there_is_nothing_to_place():
    jsx = "What does <Image /> do, </video> and <videos>?"
    assert user_content(llava(jsx)) == [text(jsx)]
    assert user_content(llava("<video>\n" + jsx, video="a.mp4")) == [video("a.mp4"), text(jsx)]


def test_numbers_and_texts_keep_their_types(tmp_path):
    """Written to Arrow and read again: "3" is no 3, "1e5", "null" and "true" are texts, an id 7 has the text "7"."""
    texts = ["3", "007", "1e5", "null", "true", "NaN", "2024-01-01", " 3 ", "½", "a\u2028b", "🙂"]
    records = [llava(value, value, id=i) for i, value in enumerate(texts)]
    records.append(llava("<video>", "1", video={"video": "3", "nframes": 8.0, "fps": None, "start": 1}, id="x"))
    for name in ("n.json", "n.jsonl"):
        loaded = load(write(tmp_path / name, records))
        assert [row["id"] for row in loaded] == [str(i) for i in range(len(texts))] + ["x"]
        for value, row in zip(texts, loaded):
            assert row["messages"] == messages(("user", [text(value)]), ("assistant", [text(value)]))
        direct = train_sft.normalize_record(records[-1], "x")
        for row in (loaded[-1], direct):  # types are right already before Arrow casts them
            part = row["messages"][0]["content"][0]
            assert part == video("3", nframes=8, start=1.0)
            assert (type(part["nframes"]), type(part["start"])) == (int, float)


# ------------------------------------------------------------------------------------------------------ containers


def test_every_container_gives_the_same_rows(tmp_path):
    """JSON, JSONL, JSONL named .json, no suffix, BOMs, CRLF, Parquet, a datasets folder: all alike."""
    records = [
        llava("<video>\n<video>\nWhy?", video=["a.mp4", "b.mp4"], id="1", note="n"),
        llava("Why?", video=None, id="2", note=None),
        llava("Why?", video=["a.mp4"], id="3", note="x"),
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    bom = b"\xef\xbb\xbf"
    files = {
        "a.json": json.dumps(records).encode(),
        "pretty.json": json.dumps(records, indent=2).encode(),
        "bom.json": bom + json.dumps(records).encode(),
        "a.jsonl": lines.encode(),
        "lines.json": lines.encode(),
        "bom.jsonl": bom + lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n").encode(),
        "blank.jsonl": ("\n \n" + lines.replace("\n", "\n\n").rstrip()).encode(),
        "upper.JSONL": lines.encode(),
        "no_suffix": lines.encode(),
        "\ufeffindent.json": b"\n\n   " + json.dumps(records).encode(),
    }
    sources = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        sources.append(tmp_path / name)
    table = datasets.Dataset.from_list(records)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "folder")
    table.with_format("numpy").save_to_disk(tmp_path / "numpy_folder")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "split_folder")
    sources += [tmp_path / name for name in ("a.parquet", "folder", "numpy_folder", "split_folder")]
    expected = [train_sft.normalize_record(record, "x") for record in records]
    for source in sources:
        loaded = load(source)
        assert list(loaded) == expected, source
        assert loaded.features == datasets.Features.from_arrow_schema(mv.CONVERSATION), source


def test_parquet_structs_with_absent_fields(tmp_path):
    """Arrow gives every struct all fields, null where a record lacks them; image columns give paths, not pixels."""
    records = [
        trl([{"type": "text", "text": "Why?"}, {"type": "video", "video": "a.mp4", "fps": 1}], [{"text": "So."}]),
        trl([{"type": "image", "image": "i.png"}, {"type": "text", "text": "<b>?"}], [{"text": "So."}]),
    ]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "parts.parquet")
    first, second = load(tmp_path / "parts.parquet")
    assert first["messages"][0]["content"] == [text("Why?"), video("a.mp4", fps=1.0)]
    assert second["messages"][0]["content"] == [image("i.png"), text("<b>?")]
    options = [llava("Why?", video=[{"video": "a.mp4", "nframes": 4}]), llava("Why?", video=[{"video": "b.mp4"}])]
    datasets.Dataset.from_list(options).to_parquet(tmp_path / "options.parquet")
    assert [row["messages"][0]["content"][0] for row in load(tmp_path / "options.parquet")] == [
        video("a.mp4", nframes=4), video("b.mp4")]  # fmt: skip


def test_media_columns_give_paths_and_are_not_decoded(monkeypatch):
    table = datasets.Dataset.from_list([trl("<image><video>Why?", image=None, images=["/i.png"], video="/v.mp4")])
    table = table.cast_column("images", datasets.List(datasets.Image())).cast_column("image", datasets.Image())
    table = table.cast_column("video", datasets.Video())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    assert load("someone/media")[0]["messages"][0]["content"] == [image("/i.png"), video("/v.mp4"), text("Why?")]


def test_options_may_come_late(tmp_path):
    """Ordinary inference takes its types from the first rows: a text, then a list, then options, then frames."""
    records = [llava("Why?", video="a.mp4", id=i) for i in range(2000)]
    records += [
        llava("Why?", video=["a.mp4", "b.mp4"], id="list"),
        llava("Why?", video={"video": "a.mp4", "fps": 0.25}, id=None),
        llava("Why?", video=[["1.png", "2.png"]], id=2.5),
    ]
    loaded = load(write(tmp_path / "late.jsonl", records))
    assert [row["messages"][0]["content"][:-1] for row in loaded.select(range(1999, 2003))] == [
        [video("a.mp4")], [video("a.mp4"), video("b.mp4")], [video("a.mp4", fps=0.25)], [frames("1.png", "2.png")],
    ]  # fmt: skip
    assert loaded[2001]["id"] == "line 2002"


def test_a_list_after_12_000_strings_in_10_mb(tmp_path):
    line = json.dumps(llava("?", "!" * 900, video="a.mp4"))
    path = tmp_path / "long.json"
    path.write_text("[" + (line + ",\n") * 12_000 + json.dumps(llava("?", "!", video=["a.mp4", "b.mp4"])) + "]")
    assert path.stat().st_size > 10 << 20
    loaded = load(path)
    assert len(loaded) == 12_001
    assert loaded[11_999]["messages"][0]["content"] == [video("a.mp4"), text("?")]
    assert loaded[12_000]["messages"][0]["content"] == [video("a.mp4"), video("b.mp4"), text("?")]


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(tmp_path, monkeypatch):
    reads = []
    read_records = mv.read_records
    monkeypatch.setattr(mv, "read_records", lambda source: reads.append(source) or read_records(source))
    path = tmp_path / "data.json"
    for answers, conversions in ((["One."], 1), (["One."], 1), (["Two."], 2), (["Two.", "Three."], 3)):
        if conversions > len(reads):
            write(path, [llava("Why?", answer) for answer in answers])
        loaded = load(path)
        assert [row["messages"][1]["content"][0]["text"] for row in loaded] == answers
        assert len(reads) == conversions
    mv.load_records(str(path))  # other rules, other rows
    assert len(reads) == 4

    table = tmp_path / "data.parquet"
    for number, answer in enumerate(["One.", "Two."], 5):
        datasets.Dataset.from_list([llava("Why?", answer)]).to_parquet(table)
        assert [row["messages"][1]["content"][0]["text"] for row in load(table)] == [answer]
        assert len(reads) == number


def test_rows_of_other_code_are_not_reused(tmp_path, monkeypatch):
    """Every project file that can change a row is part of the key: the normalizer's, what it imports, and on."""
    files = {
        "mine.py": "import multivideo as mv\nfrom answers import answer\n\ndef normalize(record, where):\n"
                   "    from words.text import tidy\n    record['conversations'][1]['value'] = tidy(answer())\n"
                   "    return mv.normalize_conversation(record, where)\n",
        "answers.py": "def answer():\n    return 'One'\n",
        "words/__init__.py": "",
        "words/text.py": "from . import ends\nfrom .more import ends as more\n\ndef tidy(text):\n"
                         "    return text + ends.END\n",
        "words/ends.py": "END = '.'\n",
        "words/more/__init__.py": "",
        "words/more/ends.py": "END = '?'\n",
        "beside.py": "nobody_imports = 'this'\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    reads = []
    read_records = mv.read_records
    monkeypatch.setattr(mv, "read_records", lambda source: reads.append(source) or read_records(source))
    path = write(tmp_path / "data.json", [llava("Why?", "x")])

    def answer():
        for name in ("mine", "answers", "words", "words.text", "words.ends", "words.more", "words.more.ends"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        (row,) = mv.load_records(path, importlib.import_module("mine").normalize)
        return row["messages"][1]["content"][0]["text"]

    assert [answer(), answer(), len(reads)] == ["One.", "One.", 1]
    (tmp_path / "answers.py").write_text(files["answers.py"].replace("One", "Another"))
    assert [answer(), len(reads)] == ["Another.", 2]
    (tmp_path / "words/ends.py").write_text("END = '!!'\n")
    assert [answer(), len(reads)] == ["Another!!", 3]
    for count, name in enumerate(("mine.py", "words/__init__.py", "words/more/ends.py"), 4):
        (tmp_path / name).write_text(files[name] + "# edited\n")
        assert [answer(), len(reads)] == ["Another!!", count], name
    (tmp_path / "beside.py").write_text("")
    assert [answer(), len(reads)] == ["Another!!", 6]
    digests = dict(mv.project_sources(mv.__file__, str(tmp_path / "mine.py")))
    assert digests["multivideo.py"] == hashlib.sha256(Path(mv.__file__).read_bytes()).hexdigest()


def test_a_hub_dataset_is_read_again_when_its_fingerprint_changes(monkeypatch):
    for answer in ("One.", "Two."):
        table = datasets.Dataset.from_list([llava("Why?", answer)])
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, table=table: table)
        assert [row["messages"][1]["content"][0]["text"] for row in load("someone/conversations")] == [answer]


# ------------------------------------------------------------------------------------------------------ bad records

CONTENT = {"type": "text", "text": "Why?"}
ASKED, ANSWERED = trl()["messages"]
BAD_RECORDS = {
    # the record
    "no object": ("Why?", r"a record must be an object with named fields, got str 'Why\?'"),
    "list": ([llava()], "a record must be an object with named fields, got list"),
    "null": (None, "a record must be an object with named fields, got NoneType"),
    "no turns": ({"video": "a.mp4", "text": "Why?"}, r"no 'conversations' or 'messages' \(its fields: video, text\): "
                 "add one of them, with the turns"),
    "both": ({**llava(), **trl()}, "'conversations' and 'messages' are both there: keep exactly one of them"),
    "nothing": ({}, r"its fields: \(none\)"),
    "turns are text": ({"conversations": "Why?"}, "field 'conversations': expected a list of turns, got str 'Why"),
    "turns are columns": ({"messages": {"role": ["user"]}}, "field 'messages': expected a list of turns, got dict"),
    "no turn": ({"messages": []}, "field 'messages': expected a list of turns, got list"),
    # turns
    "turn": ({"messages": ["Why?"]}, "turn 0: expected an object, got str"),
    "role": ({"messages": [{"role": "bot", "content": "Why?"}]}, "turn 0: 'role' must be one of human, user, gpt, "
             "assistant, system, tool, got str 'bot'"),
    "role list": ({"conversations": [{"from": ["human"], "value": "?"}]}, "turn 0: 'from' must be one of .* got list"),
    "no role": ({"messages": [{"content": "Why?"}]}, "turn 0: 'from' must be one of"),
    "late system": ({"messages": [*llava()["conversations"], {"from": "system", "value": "x"}]},
                    "turn 2: the system turn must come first: move it there"),
    "answer first": ({"messages": llava()["conversations"][::-1]},
                     "the first turn after any system turn must be the user's, got 'assistant'"),
    "system only": ({"messages": [{"role": "system", "content": "x"}]}, "must be the user's, got 'system'"),
    "number": (llava(3), "turn 0: 'value' must be text, got int 3: put numbers in quotes"),
    "truth": (llava("?", True), "turn 1: 'value' must be text, got bool True"),
    "null text": (trl("?", None), "turn 1: 'value' must be text, got NoneType None: write the text or drop the turn"),
    "null part": (trl([{"type": "text", "text": None}]), "turn 0: 'content' must be text, got NoneType None"),
    "number part": (trl([{"type": "text", "text": 3}]), "turn 0: 'content' must be text, got int 3"),
    "part type": (trl([{"type": "audio", "audio": "a.wav"}]), "turn 0: the type of a part must be text, video or "
                  "image, got str 'audio'"),
    "openai part": (trl([{"type": "image_url", "image_url": {"url": "a"}}]), "must be text, video or image, got str"),
    "text and video": (trl([{"type": "text", "text": "?", "video": "a.mp4"}]), "turn 0: a text part with the field "
                       "'video': make that a part of its own"),
    "video and text": (trl([{"type": "video", "video": "a.mp4", "text": "?"}]), "unknown option 'text'"),
    "pad": (llava("<|video_pad|>?"), r"turn 0: the control token <\|video_pad\|> stands in the text: take it out"),
    "end": (llava("?", "a<|im_end|>"), r"turn 1: the control token <\|im_end\|> stands in the text"),
    "start": (trl([{"type": "text", "text": "<|im_start|>"}]), r"turn 0: the control token <\|im_start\|>"),
    "end of text": (llava("?", "a<|endoftext|>"), r"turn 1: the control token <\|endoftext\|>"),
    "surrogate": (llava("\ud83d"), "turn 0: the text has half a character"),
    "no answer": ({"conversations": llava()["conversations"][:1]}, r"no assistant \('gpt'\) turn"),
    "empty answer": (llava("?", " \n"), r"an assistant \('gpt'\) turn without text"),
    "answer is a video": (trl("?", [{"type": "video", "video": "a.mp4"}]), r"an assistant \('gpt'\) turn without"),
    "thoughts in a part": (trl("?", [{"type": "text", "text": "Yes.", "thinking": "So."}]),
                           "turn 1: field 'thinking' of a part: make it a field of the turn"),
    "thoughts twice": ({"messages": [ASKED, {**ANSWERED, "reasoning": "a", "thinking": "b"}]},
                       "turn 1: fields 'reasoning' and 'thinking' are both there: keep one of them"),
    "thoughts as a list": ({"messages": [ASKED, {**ANSWERED, "reasoning": ["a"]}]},
                           "turn 1: field 'reasoning' must be a text, got list"),
    "thoughts end the turn": ({"messages": [ASKED, {**ANSWERED, "thinking": "<|im_end|>"}]},
                              r"turn 1: the control token <\|im_end\|>"),
    "thoughts alone": ({"messages": [ASKED, {"role": "assistant", "content": None, "reasoning": "a"}]},
                       r"an assistant \('gpt'\) turn without text"),
    "call without a name": ({"messages": [ASKED, {**ANSWERED, "tool_calls": [{"id": "1"}]}]},
                            "turn 1: field 'tool_calls': a call must have a name and arguments, got dict"),
    "arguments as a list": ({"messages": [ASKED, {**ANSWERED, "tool_calls": [
                            {"name": "look", "arguments": [1]}]}]}, "field 'arguments' must be an object"),
    "a result as an object": ({"messages": [ASKED, ANSWERED, {"role": "tool", "content": {"open": True}}, ANSWERED]},
                              "turn 2: 'content' must be text, got dict {'open': True}: give an object as its JSON"),
    "the user calls": ({"messages": [{**ASKED, "tool_calls": [{"name": "x"}]}, ANSWERED]},
                       "turn 0: field 'tool_calls' on a user turn: only the assistant calls tools"),
    "tools as words": (trl(tools="look"), "field 'tools' must be a list of function definitions"),
    "names of tools": (trl(tools=["look"]), "field 'tools' must be a list of function definitions"),
    "options as a list": (trl(chat_template_kwargs=[1]), "field 'chat_template_kwargs' must be an object"),
    # tags
    "more tags": (llava("<video><video>", video="a.mp4"), "2 <video> tags for 1 videos: write one tag per video, or "
                  "no tag at all"),
    "fewer tags": (llava("<video>", video=["a.mp4", "b.mp4"]), "1 <video> tags for 2 videos: write one tag per video"),
    "other kind": (llava("<image>?", video="a.mp4"), "0 <video> tags for 1 videos"),
    "no video": (llava("<video>\n?"), "1 <video> tags for 0 videos: name the videos under 'video', or "
                 "take the tag out"),
    "empty videos": (llava("<video>?", video=[]), "1 <video> tags for 0 videos"),
    "empty images": (llava("<image>?", image=None, images=[]), "1 <image> tags for 0 images"),
    "placeholder": (trl([{"type": "video"}, CONTENT]), "1 <video> tags for 0 videos"),
    "capital tag": (llava("<Video>\n?", video="a.mp4"), "the text has <Video>, which is no tag: write <video>"),
    "numbered tags": (llava("<video1> <video2>", video=["a.mp4", "b.mp4"]), "the text has <video1>, which is no tag"),
    "one odd tag": (llava("<video><VIDEO>", video=["a.mp4", "b.mp4"]), r"1 <video> tags .*\(<VIDEO> is no tag\)"),
    "twice": (trl([{"type": "video", "video": "a.mp4"}, CONTENT], videos=["a.mp4"]),
              "there are videos in the turns and under 'video' of the record: keep one of them"),
    "frames twice": (trl([{"type": "video", "video": ["1.png"]}, CONTENT], videos=["a.mp4"]), "keep one of them"),
    # media
    "both fields": (llava(video="a.mp4", videos=["b.mp4"]), "fields 'video' and 'videos' are both there: keep one"),
    "misspelt": (llava(vidoe="a.mp4"), r"field 'vidoe' is not one that is read: did you mean 'video'\? Rename it, or "
                 "drop it if it is something else"),
    "misspelt with a tag": (llava("<video>?", vidoes=["a.mp4"]), "field 'vidoes' is not .* did you mean 'videos'"),
    "misspelt beside the other": (llava("?", image="a.png", vedio="a.mp4"), "'vedio' is .* did you mean 'video'"),
    "misspelt image": (llava("?", video="a.mp4", imgae="a.png"), "field 'imgae' is .* did you mean 'image'"),
    "misspelt turns": ({"conversatons": llava()["conversations"]}, "'conversatons' .* did you mean 'conversations'"),
    "numbered": (llava(video_1="a.mp4", video_2="b.mp4"), "field 'video_1' is not one that is read: name it 'video'"),
    "upstream of upstream": (llava(video_path=["a.mp4"]), "field 'video_path' is not one that is read"),
    "capital": (llava(Video="a.mp4"), "field 'Video' is not one that is read"),
    "empty path": (llava(video=""), "video: expected a file path, got str ''; where there is none, leave it out"),
    "null path": (llava(video=["a.mp4", None]), "video: expected a file path, got NoneType None"),
    "number path": (llava(image=3), "image: expected a file path, got int 3"),
    "nan path": (llava(video=float("nan")), "video: expected a file path, got float nan"),
    "no frames": (llava(video=[[]]), "video: an empty list of frame images; give at least one"),
    "image list": (llava(image=[["a.png", "b.png"]]), "image: expected a file path, got list"),
    "deep list": (llava(video=[[["a.png"]]]), "video: expected a file path, got list"),
    "clips as frames": (llava(video=[["a.mp4", "b.MP4"]]), "video 'a.mp4': a video file where an image is expected: "
                        "put it under 'video', in one flat list"),
    "clip as image": (llava(image="a.webm"), "image 'a.webm': a video file where an image is expected"),
    "frames as clips": (llava(video=["1.jpg", "2.jpg"]), r"video '1.jpg': a still image; frames of one video are a "
                        r"list within the list, \[\[…\]\], and an image goes under 'image'"),
    "no path": (llava(video={"fps": 2}), r"video: expected one path under 'video', got the fields fps"),
    "no path in a part": (trl([{"type": "video", "fps": 2}, CONTENT]), "video: expected one path under 'video'"),
    "two paths": (clip(path="b.mp4"), "expected one path under 'video', got the fields"),
    "bytes": (llava(image={"bytes": "x", "path": None}), "field 'bytes' must be the bytes of the file, as in Parquet"),
    "http": (llava(video="https://x.org/a.mp4"), "video 'https://x.org/a.mp4': addresses are not read: download"),
    "s3": (llava(video=[["s3://b/1.png"]]), "addresses are not read: download first"),
    "file": (trl([{"type": "image", "image": "file://server/a.png"}]), "addresses are not read"),
    "data": (llava(image="data:image/png;base64,AAAA"), "addresses are not read"),
    "climb": (llava(video="../a.mp4"), "video '../a.mp4': a relative path may not climb out of --image_folder"),
    "hidden climb": (llava(image={"image": "a/b/../../../c.png"}), "image 'a/b/../../../c.png': a relative path"),
    "climb of a frame": (llava(video=[["1.png", "x/../../2.png"]]), "video 'x/../../2.png': a relative path may not"),
    # options
    "unknown option": (clip(stride=2), "unknown option 'stride'; known: fps, nframes, min_frames, max_frames, "
                       "start, end, min_pixels, max_pixels, total_pixels, resized_width, resized_height"),
    "text option": (clip(fps="2"), "option 'fps' must be a number, got str '2'"),
    "truth option": (clip(fps=True), "option 'fps' must be a number, got bool True"),
    "negative": (clip(start=-1), r"option 'start' must be above 0 \(and finite\), got -1"),
    "nan": (clip(fps=float("nan")), "option 'fps' must be above 0"),
    "infinite": (clip(end=float("inf")), "option 'end' must be above 0"),
    "zero fps": (clip(fps=0), "option 'fps' must be above 0"),
    "zero width": (clip(resized_width=0, resized_height=56), "option 'resized_width'"),
    "huge": (clip(max_pixels=10**18), "option 'max_pixels' must be above 0"),
    "fraction": (clip(nframes=2.5), "option 'nframes' must be a whole number, got 2.5"),
    "one frame": (clip(nframes=1), "option 'nframes' 1: the fewest is 2"),
    "contradiction": (clip(nframes=4, fps=1), "'fps' and 'nframes' contradict each "),
    "half a size": (clip(resized_width=56), "'resized_width' and 'resized_height' go tog"),
    "backwards": (clip(start=2, end=2), "'end' 2.0 s is not after 'start'"),
    "ends at once": (clip(video_end=0), "'end' 0.0 s is not after 'start'"),
    "bounds": (clip(min_pixels=9, max_pixels=8), "'min_pixels' is above 'max_pixels'"),
    "image option": (llava(image={"image": "a.png", "fps": 1}), "option 'fps' means nothing for an image: drop it"),
    "frames option": (llava(video={"video": ["1.png"], "start": 1}), "option 'start' means nothing for a list of fr"),
}  # fmt: skip


UNRENDERED = {
    "reasoning": ({"reasoning": "Because."}, {}), "reasoning_content": ({"reasoning_content": "Because."}, {}),
    "thinking": ({"thinking": "Because."}, {}),
    "tool_calls": ({"tool_calls": [{"name": "look", "arguments": {}}]}, {}),
    "tools": ({}, {"tools": [{"type": "function", "function": {"name": "look"}}]}),
    "chat_template_kwargs": ({}, {"chat_template_kwargs": {"enable_thinking": False}}),
}  # fmt: skip


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "cls"])
def test_what_the_chat_template_leaves_out_is_refused(trainer, tiny_model, tmp_path):
    """In answers that are learned and in prompts: Qwen2.5-VL's template has a place for none of it."""
    module = importlib.import_module(f"train_{trainer}")
    schema = getattr(module, "FEATURES", mv.CONVERSATION)
    encoder = mv.Encoder(tiny_model, mv.TrainingArguments(model_id=tiny_model))
    for key, (own, beside) in UNRENDERED.items():
        talk = [{"from": "human", "value": "First?"}, {"from": "gpt", "value": "Yes.", **own}]
        more = [*talk, {"from": "human", "value": "Then?"}]
        records = {
            "sft": [{"conversations": talk}],
            "dpo": [{"prompt": "?", "chosen": talk[1:], "rejected": "No."},
                    {"prompt": "?", "chosen": "No.", "rejected": talk[1:]},
                    {"prompt": more, "chosen": "Yes.", "rejected": "No."}],
            "grpo": [{"prompt": more, "solution": "Yes."}],
            "cls": [{"conversations": more, "label": "open"}, {"messages": more, "label": "open"}],
        }[trainer]  # fmt: skip
        (tmp_path / f"{key}.json").write_text(json.dumps([{**record, **beside} for record in records]))
        with pytest.raises(mv.InputError) as caught:
            mv.load_records(str(tmp_path / f"{key}.json"), module.normalize_record, schema, encoder=encoder)
        many = "1 bad record\n" if len(records) == 1 else f"{len(records)} bad records\n"
        assert many in str(caught.value) and "the model's chat template " in str(caught.value), key


def test_thoughts_and_calls_have_one_normal_form():
    """Objects, JSON text, and Arrow's structs, which have nulls for the fields of the others."""
    function = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "number"}}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 2.5}}}
    tool = {"type": "function", "function": function}
    expected = json.dumps([call])
    before, after = {"role": "user", "content": "?"}, {"role": "tool", "content": "A valve."}
    for calls in ([call], json.dumps([call]), [{"name": "look", "arguments": '{"at": 2.5}'}],
                  [{"id": None, "function": {"name": "look", "arguments": {"at": 2.5, "until": None}}}]):  # fmt: skip
        for thoughts in ("reasoning", "reasoning_content", "thinking"):
            for tools in ([tool], json.dumps([tool])):
                turn = {"role": "assistant", "content": "", "tool_calls": calls, thoughts: "First look."}
                record = {"messages": [before, turn, after, ANSWERED], "tools": tools,
                          "chat_template_kwargs": '{"enable_thinking": true}'}  # fmt: skip
                row = train_sft.normalize_record(record, "here")
                assert row["messages"][1]["tool_calls"] == expected and row["messages"][1]["content"] == []
                assert row["messages"][1]["reasoning"] == "First look." and row["messages"][2]["role"] == "tool"
                assert json.loads(row["chat_template_kwargs"]) == {"enable_thinking": True, "tools": [tool]}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record(name):
    record, message = BAD_RECORDS[name]
    with pytest.raises(ValueError, match=message) as caught:
        train_sft.normalize_record(record, "line 7 (id 'x')")
    assert str(caught.value).startswith("line 7 (id 'x'): ")


MISSPELT = {
    "video": "vidoe vedio Video VIDEO vidio viedo vide", "videos": "vidoes Videos vedios", "image": "imgae imge Image",
    "images": "imags Images imgaes", "chosen": "choosen Chosen chosn", "rejected": "rejcted rejeted Rejected rejectd",
    "label": "lable Label labl lebel", "labels": "lables Labels", "prompt": "promt Prompt prompts propmt",
    "conversations": "conversatons conversation Conversations coversations convesation converstaions",
    "messages": "mesages message Messages massages", "solution": "soluton Solution sloution solutoin",
    "answer": "anwser Answer answr", "ground_truth": "groundtruth ground-truth Ground_Truth ground_thruth",
    "reference": "refrence referance Reference",
}  # fmt: skip
HARMLESS = """
    video_id image_id videoid imageid label_name label_id labeler labelled video_length video_2 num_videos title
    video_title video_url_id audio radio level table stage usage imagery id_2 question question_id answer_type
    answer_a answer_2 answers solutions references ground_truths reference_id resolution preference inference
    deference prompt_id prompt_length message_id conversation_id conv_id turns history source dataset task score
    chosen_score rejected_by chosen_model rejected_score index idx tags text caption options choices choice solver
    category split meta metadata width height fps duration start end system model created_at lang
"""


def test_misspelt_names_are_near_and_harmless_ones_are_not():
    for name, misspelt in MISSPELT.items():
        for key in misspelt.split():
            with pytest.raises(ValueError, match=f"here: field {key!r} is not one .* did you mean {name!r}"):
                mv.check_fields({"id": "1", key: "x"}, (name,), where="here")
            mv.check_fields({"id": "1", key: "x", name: "y"}, (name,))  # what is needed is there
            mv.check_fields({"id": "1", key: None}, (name,))
    names = [*MISSPELT]
    for key in HARMLESS.split():
        if key[:-1] not in ("answer", "solution", "reference", "ground_truth"):  # plurals are train_grpo's to pass
            mv.check_fields({"id": "1", key: "x"}, *zip(names))
        if key in {*mv.REFUSED_FIELDS, *mv.OPTIONS, "system"}:
            continue
        mv.normalize_conversation({**llava("<video>?", video="a.mp4"), key: "x"}, "here")
        train_grpo.normalize_record({"prompt": "?", "video": "a.mp4", key: "x"}, "here")
        train_dpo.normalize_record({"prompt": "?", "video": "a.mp4", "chosen": "a", "rejected": "b", key: "x"}, "here")
        train_cls.normalize_record({"prompt": "?", "video": "a.mp4", "label": "a", key: "x"}, "here")
    mv.normalize_conversation(llava(Images=0, Video=3), "here")  # how many


@pytest.mark.parametrize(
    ("normalize", "record", "message"),
    [
        (train_dpo.normalize_record, {"prompt": "?", "choosen": "a", "rejected": "b"}, "'choosen' .* 'chosen'"),
        (train_dpo.normalize_record, {"prompt": "?", "chosen": "a", "rejcted": "b"}, "'rejcted' .* 'rejected'"),
        (train_dpo.normalize_record, {"promt": "?", "chosen": "a", "rejected": "b"}, "'promt' .* 'prompt'"),
        (train_cls.normalize_record, {"prompt": "?", "lable": "a"}, "'lable' .* 'label'"),
        (train_cls.normalize_record, {"Prompt": "?", "label": "a"}, "'Prompt' .* 'prompt'"),
        (train_grpo.normalize_record, {"promt": "?", "solution": "a"}, "'promt' .* 'prompt'"),
        (train_grpo.normalize_record, {"prompt": "?", "soluton": "a"}, "'soluton' .* 'solution'"),
        (train_grpo.normalize_record, {"prompt": "?", "solution": "a", "vidoe": "a.mp4"}, "'vidoe' .* 'video'"),
    ],
)  # fmt: skip
def test_misspelt_fields_of_each_trainer(normalize, record, message):
    with pytest.raises(ValueError, match=f"^line 3: field {message}"):
        normalize(record, "line 3")


def test_bad_records_are_collected_with_their_places(tmp_path):
    """All of a file's bad records in one ValueError that names file, place, id: no error of the datasets library."""
    records = [llava(id=5), llava(3, id=6), llava("<video>", id="seven"), llava(video="http://x"), {"id": 9}]
    for name, place in (("bad.json", "record {}"), ("bad.jsonl", "line {}")):
        shift = 0 if name == "bad.json" else 1
        source = write(tmp_path / name, records)
        with pytest.raises(ValueError) as caught:
            load(source)
        title, *complaints = str(caught.value).split("\n  • ")
        assert title == f"{source}: 4 bad records"
        starts = [" (id 6): turn 0: 'value' must be text", " (id 'seven'): 1 <video> tags for 0", ": video 'http",
                  " (id 9): no 'conversations'"]  # fmt: skip
        for i, (complaint, start) in enumerate(zip(complaints, starts, strict=True), 1 + shift):
            assert complaint.startswith(place.format(i) + start)


def test_the_id_is_named_in_what_the_trainer_finds(tmp_path):
    with pytest.raises(ValueError, match=r"1 bad record\n  • record 0 \(id 'e'\): an assistant"):
        load(write(tmp_path / "e.json", [llava("?", "", id="e")]))


def test_no_more_than_twenty_problems_are_listed(tmp_path):
    path = write(tmp_path / "bad.jsonl", [*(llava(i) for i in range(30)), llava(0), llava()])
    with pytest.raises(ValueError, match=r"31 bad records\n") as caught:
        load(path)
    _, *lines = str(caught.value).split("\n  • ")
    assert len(lines) == 21 and lines[20] == "… and 10 more with other problems"
    assert "got int 0: put numbers in quotes: 2 records, line 1, line 31" in lines[0] and "line 20: " in lines[19]


def test_the_same_problem_is_one_line_with_a_true_count(tmp_path):
    records = [*[llava("<video>", id=i) for i in "ab"], *[llava("<video>")] * 1500, llava(), llava(3, id="z")]
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path / "bad.json", records))
    title, *lines = str(caught.value).split("\n  • ")
    assert title.endswith("bad.json: 1,503 bad records")
    assert lines[0].startswith("1 <video> tags for 0 videos: ")
    assert lines[0].endswith(": 1,502 records, first record 0 (id 'a'), record 1 (id 'b'), record 2")
    assert lines[1:] == ["record 1503 (id 'z'): turn 0: 'value' must be text, got int 3: put numbers in quotes"]


def test_a_record_without_an_id_is_not_called_a_record_twice(tmp_path):
    """Its id is "record 3" or "line 3"; an id of the user's own stands behind the word."""
    names = {"record 3": "record 3", "line 3": "line 3", "record_3": "record_3", "7": "record 7"}
    for name, shown in names.items():
        assert mv.record_name(name) == shown
        assert str(mv.BadVideo(name, "a.mp4", "gone")).startswith(f"{shown}: a.mp4: gone")


GOOD = json.dumps(llava())
BAD_FILES = {
    "empty.json": ("", "no records in it; expected at least one"),
    "empty.jsonl": ("\n \n", "no records in it"),
    "empty_list.json": ("[]", "no records in it"),
    "cut.json": (f"[{GOOD},\n{GOOD[:-9]}", r"1 bad record\n  • record 1, line 2: not valid JSON: it ends too early: "
                 r"is the file cut off\? Copy or write it again \(nothing after it was read\)"),
    "cut_letter.json": (f'[{GOOD},\n{{"id": "é'.encode()[:-1], "record 1, line 2: not valid JSON: it ends too early"),
    "unclosed.json": (f"[{GOOD},\n{GOOD}\n", "record 2, line 3: not valid JSON: it ends too early"),
    "comma.json": (f"[{GOOD},\n{GOOD},\n\n]", r"record 2, line 4: not valid JSON: a comma before \]: remove it"),
    "comma_far.json": ("[" + f"{GOOD},\n" * 30_000 + f"{GOOD[:-1]},}}]", "line 30001: not valid JSON: a comma before"),
    "comma.jsonl": (f"{GOOD}\n{GOOD[:-1]},}}", "line 2: not valid JSON: a comma before }: remove it"),
    "commas.jsonl": (f"{GOOD},\n" * 9, "a comma after the object: remove it: 9 records, first line 1, line 2, line 3"),
    "no_comma.json": (f"[{GOOD}\n{GOOD}]", 'line 2: not valid JSON: no comma before {"conversations'),
    "bracket.json": (f"[{GOOD}}}]", "line 1: not valid JSON: } where it does not fit"),
    "quotes.json": (f"[\n{GOOD},\n{{'id': 1}}]", 'record 1, line 3: not valid JSON: the quote \' where JSON needs'),
    "quotes.jsonl": ("{'id': 1}\n" * 5, r"5 bad records\n.* the quote ' .*: 5 records, first line 1, line 2, line 3$"),
    "curly.json": ("[\n{“id”: 1}]", "line 2: not valid JSON: the quote “ where"),
    "python.json": (f'[{GOOD[:-1]},\n"x": True}}]', "line 2: not valid JSON: True, which is no JSON value"),
    "nan.json": (f'[{GOOD[:-1]}, "x": "\\"NaN",\n"y": NaN}}]', "line 2: not valid JSON: NaN, which is no JSON value"),
    "nan.jsonl": (f'{GOOD}\n{GOOD[:-1]}, "x": -Infinity}}', "line 2: not valid JSON: -Infinity, which is no"),
    "comment.json": (f'[{GOOD[:-1]}, "video": ["a.mp4", "..."  // up to 30+ videos\n]}}]', r"record 0, line 1: not "
                     r"valid JSON: a comment \(// up to 30\+ videos\), which JSON does not have: remove it"),
    "comment_first.json": (f"\n# ours\n[{GOOD}]", r"1 bad record\n  • line 2: not valid JSON: a comment \(# ours\)"),
    "comment.jsonl": (f"{GOOD} // mine\n{GOOD}", r"1 bad record\n  • line 1: not valid JSON: a comment \(// mine\)"),
    "backslash.jsonl": (GOOD.replace("Why?", r"C:\videos"), r"line 1: not valid JSON: a single backslash in a text"),
    "line_break.json": (f"[\n{GOOD}]".replace("Why?", "a\nb"), "line 2: not valid JSON: a line break or tab in"),
    "name.json": ("[\n{id: 1}]", r"line 2: not valid JSON: a name without quotes \(id: 1}\]\)"),
    "two.jsonl": (GOOD + GOOD, r"line 1: not valid JSON: more after its end \({.*\): a file is one list"),
    "garbage.json": (f"[{GOOD}]\nx", r"record 1, line 2: not valid JSON: more after its end \(x\)"),
    "wide.json": (f"[{GOOD}]".encode("utf-16"), r"line 1: not UTF-8 text \(UTF-16\): save the file as UTF-8 \(iconv"),
    "wide.jsonl": (GOOD.encode("utf-16-be"), r"line 1: not UTF-8 text \(UTF-16\)"),
    "archive.json": (b"PK\3\4\0\0", r"line 1: not UTF-8 text \(it has the byte 0x00\): is this a JSON file\?"),
    "one_object.json": (json.dumps(llava(), indent=2), r"1 bad record\n  • line 1: one object over several lines: "
                        r"expected a list \[{…}, …\] of records, or one object per line"),
    "wrapped.json": (json.dumps({"data": [llava()]}), r"line 1: no 'conversations' .*\(its fields: data\)"),
    "bad_lines.jsonl": (f"{GOOD}\n{GOOD[:-9]}\n{GOOD}\nWhy?\n", r"2 bad records\n  • line 2: not valid JSON: it ends "
                        r"too early.*\n  • line 4: not valid JSON: Expecting value at Why\?"),
    "latin1.jsonl": (json.dumps(llava("é"), ensure_ascii=False).encode("latin-1"), r"line 1: not UTF-8 \(byte 0xe9\): "
                     r"save the file as UTF-8 \(from Latin-1: iconv -f latin1 -t utf-8\)"),
    "latin1.json": (f"[{GOOD},\n{GOOD.replace('Why', 'é')}]".encode("latin-1"), "line 2: not UTF-8 .byte 0xe9"),
    "bytes.parquet": ("garbage", r"bytes.parquet: cannot be read as a dataset: .*[Pp]arquet"),
    "table.csv": ("a,b\n", "table.csv: cannot be read as a dataset: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_bad_sources(tmp_path):
    write(tmp_path / "train.json", [llava()])
    with pytest.raises(ValueError, match=r"a folder with JSON files \(train.json\): name the file itself"):
        load(tmp_path)
    with pytest.raises(ValueError, match="nobody/nothing: cannot be read as a dataset"):
        load("nobody/nothing")
    with pytest.raises(ValueError, match=r"gone\.json: cannot be read as a dataset"):
        load(tmp_path / "gone.json")


def test_anything_else_in_a_record_is_a_value_error_too():
    """Whatever stands where: a normal row that Arrow takes, or a ValueError; never another error, never other text."""
    rng = random.Random(0)
    odd = [None, "", 0, 3, -1.5, True, float("nan"), 10**400, [], {}, [None], [[]], {"a": None}, "x", "<video>", ["x"],
           [{"x": 1}], {"video": "a.mp4"}, {"type": "video"}, b"x", ("a.mp4",), {"from": "human"}]  # fmt: skip
    bases = [record for name in EXPECTED for _, record in mv.read_records(str(EXAMPLES / name))]
    kept = refused = 0
    for _ in range(4000):
        record = copy.deepcopy(rng.choice(bases))
        for _ in range(rng.randint(1, 2)):
            place = record
            while isinstance(place, (dict, list)) and place:
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if rng.random() < 0.3 or not isinstance(place[key], (dict, list)):
                    place[key] = copy.deepcopy(rng.choice(odd))
                    break
                place = place[key]
        try:
            row = train_sft.normalize_record(record, "here")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("here: ")
        else:
            kept += 1
            datasets.Features.from_arrow_schema(mv.CONVERSATION).encode_example(row)
            texts = [part["text"] for turn in row["messages"] for part in turn["content"] if part["type"] == "text"]
            assert all(isinstance(value, str) and value in json.dumps(record, default=str, ensure_ascii=False)
                       .replace("\\n", "\n") for value in texts)  # fmt: skip
    assert min(kept, refused) > 500
