"""Chat with a trained model over several videos and images, in a page of the browser.

    python tools/app.py --model_id out

--model_id is a run's folder (a full model or an adapter), a merged model or a hub name. Sizes, frame rate, system
prompt and precision are those of the run's arguments.json, unless given here; sampling and sizes can be changed on the
page, which shows each file's frames as the model gets them, their times, and the tokens they cost.

Needs Gradio: pip install -r requirements-app.txt. Uploads are opened in processes that are ended after
--decode_timeout seconds; uploads and decoded frames lie in a private folder that goes when the page does.
"""

import base64
import importlib.util
import io
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multivideo as mv

import predict
import torch
from PIL import Image

# What files begin with. FFmpeg and Pillow open more than these: playlists and scripts that point at other files.
STARTS = {
    "video": rb"\0.{3}(ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF.{4}AVI |GIF8[79]a|G.{187}G|\0\0\1\xba|FLV\1",
    "image": rb"\xff\xd8\xff|\x89PNG\r\n|BM|RIFF.{4}WEBP|II\*\0|MM\0\*",
}
MAX_NEW_TOKENS = 8192  # answers are made one after the other
KNOWN = "mp4, mov, mkv, webm, avi, mpg, ts, flv or gif; jpg, png, webp, bmp or tiff"


# Of the flags that answering uses, those that are not about files: the page has its own data and cache.
USED = predict.USED - {"data_path", "image_folder", "on_long_sample", "on_bad_video", "video_cache"}
USED |= {"dataloader_num_workers"}  # with a default of its own


@dataclass
class AppArguments(predict.AnswerArguments):
    """Those of answering, and where the page is."""

    host: str = mv.arg("127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's. There is no password.")
    port: int = mv.arg(7860, "Port to listen on.")
    dataloader_num_workers: int = mv.arg(2, "Processes that open and decode uploads.")
    max_upload_mb: int = mv.arg(1000, "Largest file that can be uploaded, in MB.")

    def check(self, given):
        """What is wrong with these flags."""
        wrong = [f"--{flag} {getattr(self, flag)}: must lie between 1 and {most}"
                 for flag, most in {"port": 65535, "max_upload_mb": 10**6, "dataloader_num_workers": 64,
                                    "max_new_tokens": MAX_NEW_TOKENS}.items()
                 if not 1 <= getattr(self, flag) <= most]  # fmt: skip
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            wrong.append("the page is one process: start it with python, not accelerate launch")
        return wrong + [text for text in super().check(given) if not text.startswith("--max_new_tokens")]


def kind_of(path: str) -> str:
    """Whether an upload is a "video" or an "image", by how it begins.

    Raises:
        BadFile: neither.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    for kind, pattern in STARTS.items():
        if re.match(pattern, start, re.DOTALL):
            return kind
    raise mv.BadFile(path, f"not a video or image of a known kind ({KNOWN})")


def media_options(args, fps, nframes, *sizes) -> dict[str, dict]:
    """The page's settings as options of a record's videos and images; without a size it is the file's own, bounded."""
    if not (fps or nframes):
        raise mv.InputError("settings: give frames per second, or frames per video")
    options = {"video": {"nframes": nframes} if nframes else {"fps": fps}, "image": {}}
    for kind, (width, height) in zip(options, (sizes[:2], sizes[2:])):
        bounds = {side: getattr(args, f"{kind}_{side}") for side in ("min_pixels", "max_pixels")}
        fixed = {"resized_width": width or None, "resized_height": height or None}  # an empty field comes as None or 0
        options[kind] |= fixed if width or height else bounds
    return options


def record_of(turns: list[dict], options: dict) -> dict:
    """A conversation as a record of predict.py: a turn's new files stand at the tags in its question, or before it.

    Raises:
        ValueError: a file of no known kind, tags that do not fit the files, control tokens, impossible settings.
    """
    messages, paths = [], {"video": [], "image": []}
    for turn in turns:
        kinds = [kind_of(path) for path in turn["files"]]
        for kind, path in zip(kinds, turn["files"]):
            paths[kind].append(path)
        tags = "" if mv.TAG.search(turn["question"]) else "".join(f"<{kind}>\n" for kind in kinds)
        messages.append({"role": "user", "content": tags + turn["question"]})
    # Names first, paths afterwards: what is wrong is told without this machine's folders.
    media = {kind: [{kind: Path(path).name, **options[kind]} for path in paths[kind]] for kind in paths}
    row = predict.normalize_record({"id": "of this page", "messages": messages, **media}, "this conversation")
    places = {kind: iter(paths[kind]) for kind in paths}
    for part in clips_of(row):
        part["files"] = [next(places[part["type"]])]
    for k, turn in reversed(list(enumerate(turns))):
        if turn["answer"] is not None:  # not read for tags: what the model writes is only text
            part = {**dict.fromkeys(mv.PART), "type": "text", "files": [], "text": turn["answer"]}
            row["messages"].insert(k + 1, {"role": "assistant", "content": [part]})
    return row


def clips_of(row: dict) -> list[dict]:
    """The videos and images of a record, in the order of the prompt."""
    return [part for turn in row["messages"] for part in turn["content"] if part["type"] != "text"]


def clip_frames(patches, grid, encoder) -> torch.Tensor:
    """The tower's patches uint8 [P, 1176] of a clip with grid (t, h, w) as frames again: [2·t, height, width, 3]."""
    (t, h, w), m, p = grid, encoder.merge_size, encoder.patch_size
    frames = torch.from_numpy(patches).reshape(t, h // m, w // m, m, m, 3, mv.FRAME_FACTOR, p, p)
    frames = frames.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)  # t, frame, h', merge, patch, w', merge, patch, colour
    return frames.reshape(t * mv.FRAME_FACTOR, h * p, w * p, 3)


def with_files(turns: list[dict], files: list[str], question: str = "") -> list[dict]:
    """The conversation with the files that are in the list now; new ones belong to the question that comes next."""
    turns = [{**turn, "files": [path for path in turn["files"] if path in files]} for turn in turns]
    known = {path for turn in turns for path in turn["files"]}
    fresh = [path for path in dict.fromkeys(map(str, files)) if path not in known]
    return [*turns, {"question": question, "answer": None, "files": fresh}] if fresh or question else turns


# ------------------------------------------------------------------------------------------------------------- page

CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#head h1 { font-size: 1.45rem; font-weight: 650; margin: 0 0 .15rem; }
#head p, .clip p, .total { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; }
.total { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem 1rem; }
.total b, .clip h3 b { color: var(--body-text-color); font-weight: 600; font-variant-numeric: tabular-nums; }
.meter { height: 6px; border-radius: 3px; margin-top: .35rem; background: var(--border-color-primary); }
.meter i { display: block; height: 100%; min-width: 3px; border-radius: 3px; background: var(--color-accent); }
.clip { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .6rem .75rem; margin-top: .6rem; }
.clip h3 { display: flex; gap: .5rem; font-size: .92rem; font-weight: 600; margin: 0; }
.clip h3 span { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.strip { display: flex; flex-wrap: wrap; gap: 6px; max-height: 360px; overflow: auto; margin-top: .5rem; }
.strip figure { margin: 0; text-align: center; }
.strip img { display: block; margin: 0; width: auto; height: auto; max-height: 96px; border-radius: 3px; }
.strip figcaption { font-size: .7rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.wrong { border-left: 3px solid #dc2626; border-radius: 4px; padding: .5rem .75rem; margin: .3rem 0; font-size: .9rem;
         background: color-mix(in srgb, #dc2626 10%, transparent); overflow-wrap: anywhere; }
@media (min-width: 769px) { #talk { position: sticky; top: 12px; align-self: flex-start; } }
@media (max-width: 768px) { .strip { max-height: none; } #files { max-height: 75vh; overflow-y: auto !important; } }
"""
TOO_LONG = "{:,} tokens are more than {:,} (--max_seq_length): take fewer or smaller frames, or fewer files"


def wrong(*messages: str) -> str:
    """Errors as boxes on the page."""
    return "".join(f'<div class="wrong" role="alert">{escape(message)}</div>' for message in messages)


def unreadable(bad: dict[str, str]) -> list[str]:
    """What is said of files that cannot be read: their names, without the folder they lie in here."""
    return [f"{Path(path).name}: {reason.replace(path, Path(path).name)}. Take it out of the list"
            for path, reason in bad.items()]  # fmt: skip


def picture(frame: torch.Tensor, caption: str) -> str:
    """One frame uint8 [height, width, 3] with its time; shown in its own size, or smaller where it is a high one."""
    file, (height, width, _) = io.BytesIO(), frame.shape
    Image.fromarray(frame.numpy()).save(file, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img width="{width}" height="{height}" alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def card(number: int, part: dict, tokens: int, inside: str) -> str:
    """A file's place on the page."""
    name = escape(Path(part["files"][0]).name)
    return (f'<div class="clip"><h3>{number}<span title="{name}">{name}</span><b>{tokens:,} tokens</b></h3>'
            f"{inside}</div>")  # fmt: skip


def messages_of(turns: list[dict]) -> list[dict]:
    """The conversation as Gradio's chat has it, each question with the names of the files that came with it.

    The chat takes HTML and leaves out what it does not trust: escaped, every text is shown as it is.
    """
    messages = []
    for turn in turns:
        names = "".join(f"\n▸ {Path(path).name}" for path in turn["files"])
        messages.append({"role": "user", "content": escape(turn["question"] + names, quote=False)})
        if turn["answer"] is not None:
            messages.append({"role": "assistant", "content": escape(turn["answer"], quote=False)})
    return messages


@dataclass
class Page:
    """One model, and what the page does with it; nothing of a user is kept here."""

    engine: mv.Engine
    encoder: mv.Encoder
    stream: mv.SampleStream
    args: AppArguments
    weights: dict[str, list[str]]  # of the model, and of an adapter's base: folder → what was loaded from it

    def encode(self, rows: list[dict]) -> list[dict]:
        """Samples of records, decoded in processes that can be killed: uploads are opened there only."""
        return [sample for (sample,) in self.stream.batches(rows, [[i] for i in range(len(rows))], "")]

    def read(self, turns: list[dict], settings) -> tuple[list[dict], dict, dict[str, str]]:
        """A conversation's readable videos and images, its encoded sample, and what is wrong with other files.

        Raises:
            ValueError: see record_of.
        """
        bad = {}
        for path in (path for turn in turns for path in turn["files"]):
            try:
                kind_of(path)
            except mv.BadFile as error:
                bad[path] = error.reason
        turns = [{**turn, "files": [path for path in turn["files"] if path not in bad]} for turn in turns]
        row = record_of(turns, media_options(self.args, *settings))
        (sample,) = self.encode([row])
        bad |= dict(sample["bad"])
        return [part for part in clips_of(row) if part["files"][0] not in bad], sample, bad

    def cards(self, parts: list[dict], sample: dict) -> str:
        """The total, and each file's tokens, frames and times."""
        m, p, cards, start = self.encoder.merge_size, self.encoder.patch_size, "", 0
        for number, (part, grid) in enumerate(zip(parts, sample["video_grid_thw"].tolist()), 1):
            t, h, w = grid
            frames = clip_frames(sample["patches"][start : start + t * h * w], grid, self.encoder)
            start, times, said = start + t * h * w, [""], f"{w * p} × {h * p} pixels"
            if part["type"] == "video":  # what its decoder noted beside its frames
                cache = self.encoder.cache
                if info := cache.info(cache.identity(part["files"][0])):
                    rate = info.num_frames, info.fps
                    taken, _ = mv.sample_frames(part, *rate, self.args, len(frames), info.times)
                    times = [f"{info.times[i] if info.times else i / info.fps:.2f} s" for i in taken]
                    said = (f"{len(taken)} of {info.num_frames} frames, {said}, {info.num_frames / info.fps:.1f} s at "
                            f"{info.fps:.4g} frames per second")  # fmt: skip
                else:
                    times = ["?"] * len(frames)
                    said = f"{len(frames)} frames, {said}; no times, since --video_cache_limit_gb is reached"
            strip = f'<div class="strip">{"".join(map(picture, frames, times))}</div>'
            cards += card(number, part, t * h * w // m**2, f"<p>{said}</p>{strip}")
        return self.total(sample, start // m**2) + cards

    def cards_too_long(self, parts: list[dict], sample: dict) -> str:
        """The total of a sample that is not made, and each file's tokens: by what a sample gains that has only it."""
        messages = [{"role": "user", "content": []}, *({"role": "user", "content": [part]} for part in parts)]
        rows = [{"id": "of this page", "messages": [message], "completions": []} for message in messages]
        empty, *alone = (one["num_tokens"] for one in self.encode(rows))
        tokens = [count - empty - 2 for count in alone]  # the vision's start and end are text
        cards = "".join(card(number, *values, "") for number, values in enumerate(zip(parts, tokens), 1))
        return self.total(sample, sum(tokens)) + cards

    def total(self, sample: dict, visual: int) -> str:
        """The line and bar of all tokens."""
        count, most, fits = sample["num_tokens"], self.args.max_seq_length, "input_ids" in sample
        bar = f"width:{100 * count / most:.2f}%" if fits else "background:#dc2626"
        return (f'<div class="total"><span><b>{count:,} tokens</b> of at most {most:,}</span><span>{visual:,} visual, '
                f'{count - visual:,} text</span></div><div class="meter"><i style="{bar}"></i></div>'
                + ("" if fits else wrong(TOO_LONG.format(count, most))))  # fmt: skip

    def check_weights(self):
        """Make sure that the files the model was loaded from are still the same.

        Raises:
            InputError: shows both.
        """
        for folder, before in self.weights.items():
            now = mv.weights_identity(folder, self.args.cache_dir)
            if now != before:
                raise mv.InputError(f"the weights of {Path(folder).name} have changed since this page loaded them: "
                                    f"{', '.join(before)} then, {', '.join(now) or 'no file'} now. Start the page "
                                    "again")  # fmt: skip

    def look(self, files, turns, *settings) -> str:
        """What the model would get now, as HTML: files or settings have changed, or an answer was given."""
        turns = with_files(turns, files or [])
        if not turns:
            return '<p class="total">Frames and tokens of your files are shown here, as the model gets them.</p>'
        try:
            parts, sample, bad = self.read(turns, settings)
            show = self.cards if "input_ids" in sample else self.cards_too_long
            return wrong(*unreadable(bad)) + (show(parts, sample) if parts or not bad else "")
        except ValueError as error:
            return wrong(str(error))

    def ask(self, files, turns, question, max_new_tokens, temperature, *settings):
        """Yield chat, conversation, question and what is told of it: at the start, and with the answer or an error."""
        before, started = turns, time.perf_counter()
        try:
            if not question.strip():
                raise mv.InputError("write a question first")
            self.check_weights()
            args = replace(self.args, max_new_tokens=max_new_tokens or 0, temperature=temperature or 0.0)
            if problems := args.check(set()):
                raise mv.InputError("settings: " + "; ".join(problems))
            turns = with_files(turns, files or [], question.strip())
            yield messages_of(turns), before, "", '<p class="total">Reading and answering …</p>'
            _, sample, bad = self.read(turns, settings)
            if bad:
                raise mv.InputError("; ".join(unreadable(bad)))
            if "input_ids" not in sample:
                raise mv.InputError(TOO_LONG.format(sample["num_tokens"], args.max_seq_length))
            (told,) = predict.answers(self.engine, [sample], [len(turns)], self.encoder, args)
            if "error" in told:
                raise mv.InputError(told["error"])
        except ValueError as error:
            yield messages_of(before), before, question, wrong(str(error))
            return
        turns[-1]["answer"] = told["prediction"].strip()
        cut = "" if told["ended"] else " (all that were allowed)"
        said = f"{sample['num_tokens']:,} tokens read, {told['new_tokens']:,} written{cut}"
        yield messages_of(turns), turns, "", f'<p class="total">{said}, {time.perf_counter() - started:.1f} s</p>'


def build(page: Page):
    """The page as Gradio has it."""
    import gradio as gr

    args, small = page.args, {"min_width": 120, "precision": 0}
    model = page.engine.raw_model
    about = [" on ".join(Path(folder).name for folder in page.weights), str(model.dtype).removeprefix("torch."),
             str(page.engine.accelerator.device)] + ([f"{args.bits} bits"] if args.bits < 16 else [])  # fmt: skip
    about += [f"system prompt: {args.system_prompt}"] if args.system_prompt else []
    with gr.Blocks(title="Chat over videos and images", fill_width=True, delete_cache=(3600, 86400)) as blocks:
        turns = gr.State([])
        gr.HTML(f'<div id="head"><h1>Chat over videos and images</h1><p>{escape(" · ".join(about))}</p></div>')
        with gr.Row():
            with gr.Column(min_width=340):
                files = gr.File(label="Videos and images", file_count="multiple", height=190)
                with gr.Accordion("Settings", open=False):
                    with gr.Row():
                        fps = gr.Number(args.fps, label="Frames per second", min_width=120)
                        nframes = gr.Number(args.nframes, label="or frames per video", **small)
                    gr.HTML('<p class="total">Pixels, rounded to multiples of 28; 0: the file’s own size, bounded</p>')
                    with gr.Row():
                        sizes = [gr.Number(getattr(args, f"{kind}_resized_{side}"), label=f"{kind.title()} {side}",
                                           **small)
                                 for kind in ("video", "image") for side in ("width", "height")]  # fmt: skip
                    with gr.Row():
                        longest = gr.Number(args.max_new_tokens, label="Most new tokens", **small)
                        temperature = gr.Number(args.temperature, label="Temperature", min_width=120, step=0.1)
                panel = gr.HTML(elem_id="files")
            with gr.Column(min_width=340, elem_id="talk"):
                chat = gr.Chatbot(label="Conversation", height=460, render_markdown=False, buttons=[],
                                  placeholder="Upload videos and images, then ask about them.")  # fmt: skip
                question = gr.Textbox(label="Question", placeholder="Enter sends it", lines=1, max_lines=8)
                with gr.Row():
                    new = gr.Button("New conversation", min_width=120)
                    ask = gr.Button("Ask", variant="primary", min_width=120)
                told = gr.HTML()
        settings = [fps, nframes, *sizes]
        look = {"fn": page.look, "inputs": [files, turns, *settings], "outputs": panel, "show_progress": "minimal",
                "trigger_mode": "always_last", "concurrency_limit": args.dataloader_num_workers}  # fmt: skip
        gr.on([blocks.load, files.change, *(setting.change for setting in settings)], **look, api_name="look")
        gr.on([question.submit, ask.click], page.ask, [files, turns, question, longest, temperature, *settings],
              [chat, turns, question, told], concurrency_limit=1, api_name="ask").then(**look)  # fmt: skip
        gr.on([new.click, chat.clear], lambda: ([], [], ""), None, [chat, turns, told], api_name="new").then(**look)
    return blocks


def launch(page: Page, **options):
    """Serve the page, which loads nothing from elsewhere; returns what Gradio's launch does."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"],
                              font_mono=["ui-monospace", "monospace"])  # fmt: skip
    try:
        return build(page).launch(
            server_name=page.args.host, server_port=page.args.port, max_file_size=page.args.max_upload_mb * 10**6,
            theme=theme, css=CSS, footer_links=[], share=False, ssr_mode=False, **options,
        )  # fmt: skip
    except OSError as error:
        raise mv.InputError(f"--host {page.args.host} --port {page.args.port}: {error}") from None


def load(argv: list[str], folder: str) -> Page:
    """The model of the command line and its decoding processes; `folder` takes all that they write."""
    words, unchecked = predict.inherited_flags(argv) + argv, (*predict.UNCHECKED, "data_path")
    args = mv.parse_arguments(AppArguments, words, unchecked, predict.own_flags(AppArguments) | USED)
    args.output_dir, args.on_long_sample, args.on_bad_video = folder, "skip", "drop_video"
    args.video_cache = tempfile.mkdtemp(dir=folder)
    accelerator = mv.make_accelerator(args)
    weights, run_folder = predict.weights_of(args), args.model_id
    engine = mv.Engine(accelerator, predict.load_model(args, accelerator.device), args, frozen=True)
    encoder = mv.Encoder(args.model_id, args)
    mv.warn_of_other_layout("model_id", run_folder, encoder)
    page = Page(engine, encoder, mv.SampleStream(encoder, args), args, weights)
    page.encode([record_of([{"question": "?", "answer": None, "files": []}], {})])  # the processes are up then
    return page


def main():
    if importlib.util.find_spec("gradio") is None:
        raise mv.InputError("the page needs Gradio: pip install -r requirements-app.txt")
    if not sys.argv[1:]:
        raise mv.InputError("which model? python tools/app.py --model_id out (a run's folder or a hub name)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes, with all uploads
    with tempfile.TemporaryDirectory(prefix="multivideo-page-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": os.path.join(folder, "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"}
        page = load(sys.argv[1:], folder)
        try:
            launch(page)
        finally:
            page.stream.close()


if __name__ == "__main__":
    mv.run(main)
