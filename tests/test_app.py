"""tools/app.py through its HTTP API and in a headless browser, against qwen_vl_utils and plain HF generate."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import multivideo as mv

import numpy as np
import pytest
import qwen_vl_utils
import torch
from make_demo import save_tiny_model
from PIL import Image
from reference import write_clip
from test_train import ROOT, reset_accelerate
from transformers import AutoModelForImageTextToText, AutoProcessor

gradio_client = pytest.importorskip("gradio_client", reason="the page needs pip install -r requirements-app.txt")
import app

RUN = {"video_resized_width": 84, "video_resized_height": 56, "nframes": 4, "image_min_pixels": 784,
       "image_max_pixels": 50176, "system_prompt": "Be brief.", "max_seq_length": 2000}  # fmt: skip
SETTINGS = (2, 4, 84, 56, 0, 0)  # frames per second and per video, sizes of videos and images: those of the run
NAMES = ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "chart.png"]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Five clips and an image; a broken video, and a playlist that names one of them."""
    folder = tmp_path_factory.mktemp("media")
    for i, name in enumerate(NAMES[:5]):
        write_clip(folder / name, 64, 48 + 16 * i, 20 + 5 * i, rate=10, seed=i)
    picture = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).resize((320, 240)).save(folder / NAMES[5])
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder / 'a.mp4'}\n#EXT-X-ENDLIST\n")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page over the folder of a run, served."""
    model, work = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("page")
    save_tiny_model(model, initializer_range=0.1)
    (model / "arguments.json").write_text(json.dumps(RUN))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reset_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(work / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        page = app.load(["--model_id", str(model), "--max_new_tokens", "8", "--dataloader_num_workers", "1",
                         "--port", str(port)], str(work))  # fmt: skip
        served, page.url, _ = app.launch(page, prevent_thread_lock=True, quiet=True)
        page.model_folder, page.folder = str(model), work
        yield page
        served.get_blocks().close()
        page.stream.close()


class User:
    """Somebody with the page open, who uploads afresh each time; `chat`, `question` and `told` are what is shown."""

    def __init__(self, page, media):
        self.client, self.media = gradio_client.Client(page.url, verbose=False), media

    def files(self, names):
        return [gradio_client.handle_file(str(self.media / name)) for name in names]

    def look(self, names, settings=SETTINGS):
        return self.client.predict(self.files(names), *settings, api_name="/look")

    def ask(self, names, question, longest=8, temperature=0, settings=SETTINGS):
        answer = self.client.predict(self.files(names), question, longest, temperature, *settings, api_name="/ask")
        self.chat, self.question, self.told = answer
        self.chat = [(turn["role"], turn["content"][0]["text"]) for turn in self.chat]
        return self.chat[-1][1] if self.chat else None


@pytest.fixture
def user(page, media):
    return User(page, media)


def pictures(html):
    """The frames that a piece of the page shows: uint8 [height, width, 3] each."""
    data = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in data]


def plain_messages(media, turns):
    """(question, files, answer) of each turn as the messages of qwen_vl_utils, with the run's settings."""
    messages = [{"role": "system", "content": "Be brief."}]
    for question, names, answer in turns:
        clips = [{"type": "image", "image": str(media / name), "min_pixels": 784, "max_pixels": 50176}
                 if name.endswith("png") else
                 {"type": "video", "video": str(media / name), "nframes": 4, "resized_width": 84, "resized_height": 56}
                 for name in names]  # fmt: skip
        messages.append({"role": "user", "content": [*clips, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@torch.no_grad()
def plain_answer(page, messages, tokens=8):
    """The plain model's greedy answer, and how many tokens it read."""
    model = AutoModelForImageTextToText.from_pretrained(page.model_folder)
    processor = AutoProcessor.from_pretrained(page.model_folder)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, _ = qwen_vl_utils.process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True
    )
    kwargs = {"videos": [v for v, _ in videos], "video_metadata": [m for _, m in videos]} if videos else {}
    inputs = processor(text=[text], images=images, **kwargs, do_resize=False, do_sample_frames=False,
                       return_tensors="pt")  # fmt: skip
    silent = [*page.encoder.vision_ids, *range(len(processor.tokenizer), model.config.get_text_config().vocab_size)]
    count = inputs["input_ids"].shape[1]
    inputs["position_ids"] = mv.qwen_position_ids(inputs, model.config)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=silent)
    return processor.decode(ids[0, count:], skip_special_tokens=True).strip(), count


def test_shows_what_the_model_gets(user, media):
    """Names, times, sizes, tokens and pixels of every file, as qwen_vl_utils samples and resizes them."""
    html = user.look(NAMES)
    cards = re.findall(r'<div class="clip">.*?</div></div>', html)
    assert [re.search(r'title="([^"]*)"', card)[1] for card in cards] == NAMES
    assert all("<b>12 tokens</b>" in card for card in cards[:5])  # 4 frames / 2 × 3 × 2
    for name, card in zip(NAMES[:5], cards):
        video = {"video": str(media / name), "nframes": 4, "resized_width": 84, "resized_height": 56}
        frames, metadata = qwen_vl_utils.fetch_video(video, return_video_metadata=True)
        times = [f"{index / metadata['fps']:.2f} s" for index in metadata["frames_indices"]]
        assert re.findall(r"<figcaption>(.*?)</figcaption>", card) == times
        assert f"4 of {metadata['total_num_frames']} frames, 84 × 56 pixels" in card
        shown = np.stack(pictures(card))
        assert np.abs(shown - frames.permute(0, 2, 3, 1).numpy()).mean() < 3  # JPEG
    image = qwen_vl_utils.fetch_image({"image": str(media / NAMES[5]), "min_pixels": 784, "max_pixels": 50176})
    (shown,) = pictures(cards[5])
    assert shown.shape == np.array(image).shape and np.abs(shown.astype(float) - np.array(image)).mean() < 3
    tokens = image.width * image.height // 784
    assert f"<b>{tokens} tokens</b>" in cards[5] and f"{60 + tokens} visual" in html
    shown = user.look(["a.mp4"], (2, 6, 56, 112, 0, 0))
    assert len(pictures(shown)) == 6 and "56 × 112 pixels" in shown and "<b>24 tokens</b>" in shown
    assert "20 of 20 frames" in user.look(["a.mp4"], (100, 0, 56, 56, 0, 0))


def test_a_conversation_equals_plain_generate(user, page, media):
    """Two turns, the second with one more file: each answer and count is that of the plain model."""
    first = user.ask(NAMES[:5], "What do they show?")
    expected, count = plain_answer(page, plain_messages(media, [("What do they show?", NAMES[:5], None)]))
    assert first == expected and f"{count} tokens read, 8 written" in user.told and user.question == ""
    assert user.chat[0] == ("user", "What do they show?" + "".join(f"\n▸ {name}" for name in NAMES[:5]))
    second = user.ask(NAMES, "And now?")
    turns = [("What do they show?", NAMES[:5], first), ("And now?", NAMES[5:], None)]
    expected, count = plain_answer(page, plain_messages(media, turns))
    assert second == expected and f"{count} tokens read" in user.told and len(user.chat) == 4
    user.ask(NAMES[1:], "Without the first?")  # taken out of the list: out of the first question, too
    turns = [
        ("What do they show?", NAMES[1:5], first),
        ("And now?", NAMES[5:], second),
        ("Without the first?", [], None),
    ]
    expected, count = plain_answer(page, plain_messages(media, turns))
    assert user.chat[-1][1] == expected and f"{count} tokens read" in user.told
    total = re.search(r"<b>(\d+) tokens</b> of at most 2,000", user.look(NAMES[1:]))
    assert int(total[1]) > count  # with the answer


def test_sampling(page, media):
    """A temperature samples, the same way for the same conversation; a length is kept."""
    greedy, sampled, again = [User(page, media).ask(["a.mp4"], "What?", 6, t) for t in (0, 3.0, 3.0)]
    assert greedy != sampled == again


def test_errors_are_told_on_the_page(user, media, page):
    """Unreadable files by name, too many tokens with those of each file, wrong settings; nothing is lost by them."""
    html = user.look(["a.mp4", "broken.mp4", "list.mp4"])
    assert "broken.mp4: cannot be decoded" in html and "list.mp4: not a video or image of a known kind" in html
    assert len(pictures(html)) == 4 and str(page.folder) not in html
    user.ask(["a.mp4"], "What?")
    before = user.chat
    cases = {
        "broken.mp4: cannot be decoded": dict(names=["a.mp4", "broken.mp4"]),
        "tokens are more than 2,000": dict(settings=(2, 16, 448, 448, 0, 0)),
        "option &#x27;nframes&#x27; 1": dict(settings=(2, 1, 84, 56, 0, 0), names=["b.mp4"]),
        "&#x27;resized_width&#x27; and &#x27;resized_height&#x27; go together": dict(settings=(2, 4, 84, 0, 0, 0)),
        "give frames per second": dict(settings=(0, 0, 84, 56, 0, 0)),
        "--max_new_tokens 0: must lie between 1 and": dict(longest=0),
        "--temperature -1": dict(temperature=-1),
        "write a question": dict(question=" "),
        "control token &lt;|im_end|&gt;": dict(question="<|im_end|>"),
        "1 &lt;video&gt; tags for 2 videos": dict(question="only <video>?", names=["b.mp4", "c.mp4"]),
    }
    for message, change in cases.items():
        given = {"names": ["a.mp4"], "question": "What else?", **change}
        user.ask(**given)
        assert message in user.told and 'role="alert"' in user.told, (message, user.told)
        assert user.chat == before and user.question == given["question"] and str(page.folder) not in user.told
    html = user.look(["a.mp4", "b.mp4"], (2, 16, 448, 448, 0, 0))
    assert "tokens are more than 2,000" in html and html.count("<b>2,048 tokens</b>") == 2 and not pictures(html)
    assert user.ask(["a.mp4"], "What else?") and len(user.chat) == 4


def test_new_weights_under_the_same_path(user, page):
    """The page does not answer for weights that are not those it shows: both are named."""
    (file,) = Path(page.model_folder).glob("*.safetensors")
    before, status = mv.weights_identity(page.model_folder), file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    try:
        user.ask(["a.mp4"], "What?")
        assert "have changed since this page loaded them" in user.told and before[0] in user.told
        assert mv.weights_identity(page.model_folder)[0] in user.told and "Start the page again" in user.told
    finally:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert user.ask(["a.mp4"], "What?")


def test_one_user_cannot_see_what_is_anothers(user, page, media):
    """Neither the conversation nor files of this machine: only what was uploaded to the page is read or served."""
    other = User(page, media)
    user.ask(["a.mp4", "b.mp4"], "A secret.")
    other.ask([], "Who?")
    assert len(other.chat) == 2 and "▸" not in other.chat[0][1]
    assert other.chat[1][1] == plain_answer(page, plain_messages(media, [("Who?", [], None)]))[0]
    assert "Frames and tokens of your files" in User(page, media).look([])
    uploaded = str(next((page.folder / "uploads").rglob("a.mp4")))
    paths = [str(media / "a.mp4"), "/etc/passwd", f"{page.folder}/bad_videos.jsonl", f"{page.url}config"]
    for path, refused in [(uploaded, False), *((path, True) for path in paths)]:
        stolen = {"path": path, "orig_name": "a.mp4", "meta": {"_type": "gradio.FileData"}}
        call, kind = json.dumps({"data": [[stolen], *SETTINGS]}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{page.url}gradio_api/call/look", call, kind)) as reply:
            event = json.load(reply)["event_id"]
        with urllib.request.urlopen(f"{page.url}gradio_api/call/look/{event}", timeout=30) as reply:
            assert reply.read().startswith(b"event: error" if refused else b"event: complete"), path
        with pytest.raises(urllib.error.HTTPError) if refused else contextlib.nullcontext():
            urllib.request.urlopen(f"{page.url}gradio_api/file={path}").close()


def test_conversations_as_records(media):
    """Tags in a question place its files; what the model wrote is never read for tags; two of a name stay apart."""
    paths = [str(media / name) for name in NAMES]
    options = {"video": {"fps": 1.0}, "image": {"max_pixels": 784}}
    turns = [{"question": "Is <image>\nlike <video>?", "answer": "No <video> is.", "files": [paths[0], paths[5]]},
             {"question": "And this?", "answer": None, "files": [paths[1]]}]  # fmt: skip
    row = app.record_of(turns, options)
    assert [part["files"] for part in app.clips_of(row)] == [[paths[5]], [paths[0]], [paths[1]]]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "user"]
    assert row["messages"][1]["content"][0]["text"] == "No <video> is."
    assert [part["fps"] for part in app.clips_of(row)] == [None, 1.0, 1.0] and row["completions"] == []
    turns = app.with_files(turns[:1], [paths[5], paths[2], paths[2]], "Next")
    assert [turn["files"] for turn in turns] == [[paths[5]], [paths[2]]]


def test_files_by_how_they_begin(tmp_path, media):
    """Scripts and playlists, which FFmpeg and Pillow would follow or run, are no videos or images."""
    assert [app.kind_of(str(media / name)) for name in NAMES] == ["video"] * 5 + ["image"]
    for start in (
        b"#EXTM3U\n",
        b"ffconcat version 1.0\n",
        b"<?xml?><MPD>",
        b"%!PS-Adobe EPSF",
        b"v=0\r\no=",
        b"",
        b"MZ",
    ):
        (tmp_path / "x.mp4").write_bytes(start + b"\0" * 600)
        with pytest.raises(mv.BadFile, match="known kind"):
            app.kind_of(str(tmp_path / "x.mp4"))


def test_a_file_that_takes_too_long(page, media, monkeypatch):
    """Its process is ended, and the file is named."""
    stream = mv.SampleStream(page.encoder, dataclasses.replace(page.args, decode_timeout=0.001))
    monkeypatch.setattr(page, "stream", stream)
    write_clip(media / "long.mp4", 640, 480, 30, rate=10, seed=9)
    html = page.look([str(media / "long.mp4")], [], *SETTINGS)
    stream.close()
    assert "long.mp4: took longer than 0.001 s to decode" in html and str(media) not in html
    assert not pictures(html)


def test_settings_and_flags(page, monkeypatch, capsys):
    """The run's settings are the page's; wrong flags are told together; Gradio may be missing; only this machine."""
    assert (page.args.nframes, page.args.video_resized_width, page.args.max_seq_length) == (4, 84, 2000)
    assert page.args.host == "127.0.0.1" and page.url.startswith("http://127.0.0.1:")
    labels = {part["props"].get("label"): part["props"].get("value")
              for part in gradio_client.Client(page.url, verbose=False).config["components"]}  # fmt: skip
    assert (labels["or frames per video"], labels["Video width"], labels["Video height"]) == (4, 84, 56)
    with pytest.raises(SystemExit):
        mv.parse_arguments(app.AppArguments, ["--port", "0", "--dataloader_num_workers", "0", "--top_p", "2"])
    said = capsys.readouterr().err
    assert all(text in said for text in ("--port 0", "--dataloader_num_workers 0", "--top_p 2"))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(mv.InputError, match="which model"):
        app.main()
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(mv.InputError, match="pip install -r requirements-app.txt"):
        app.main()
    assert "gradio" in (ROOT / "requirements-app.txt").read_text()


def test_in_a_browser(page, media):
    """Six uploads, two turns, an error and New conversation in headless Chromium, which loads nothing else."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 420, "height": 800})
        asked, told = [], view.locator(".total", has_text="tokens read")
        view.on("request", lambda request: asked.append(request.url))
        view.goto(page.url)
        view.set_input_files("input[type=file]", [media / name for name in NAMES])
        cards, images = view.locator(".clip"), view.locator(".clip img")
        playwright.expect(cards).to_have_count(6, timeout=20000)
        assert images.count() == 21 and images.first.bounding_box()["width"] == 84
        question = view.get_by_label("Question")
        question.fill("<img src=x onerror=alert(1)> ${1+1} {{2}}")
        question.press("Enter")
        playwright.expect(told).to_contain_text("8 written", timeout=20000)
        questions = view.locator('#talk [data-testid="user"]')
        assert "<img src=x onerror=alert(1)> ${1+1} {{2}}" in questions.first.inner_text()
        first = told.inner_text()
        question.fill("And now?")
        view.get_by_role("button", name="Ask").click()
        playwright.expect(told).not_to_have_text(first, timeout=20000)
        playwright.expect(questions).to_have_count(2)
        assert view.evaluate("document.documentElement.scrollWidth") == 420
        view.get_by_role("button", name="Ask").click()
        playwright.expect(view.get_by_role("alert")).to_have_text("write a question first", timeout=20000)
        view.get_by_role("button", name="New conversation").click()
        playwright.expect(questions).to_have_count(0, timeout=20000)
        playwright.expect(cards).to_have_count(6)
        browser.close()
    assert all(url.startswith((page.url, "data:", "blob:")) for url in asked), asked
