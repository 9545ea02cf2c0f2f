"""Draw what the model gets of one record: a contact sheet of its clips, and the prompt with the learned text marked.

    python tools/preview.py --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --index 0 -o preview.png

takes the flags of a training command. The frames are cut out of the very arrays that the trainer packs (what they show
has passed decoding, sampling, resizing and patching), each with its time in the video; two frames share one temporal
patch and its position. The prompt is the decoded input_ids; a text of which the loss is taken is green.
"""

import bisect
import itertools
import os
import sys
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import multivideo as mv

import matplotlib
import numpy as np
import torch
from check_data import normalizer, read_flags
from matplotlib import font_manager, ft2font
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, GUTTER = 1600, 48, 40  # pixels
INK, GREY, PALE, RULE = "#1c2024", "#80868e", "#aab0b8", "#dfe3e8"
GREEN, GREEN_INK, BLUE, BLUE_INK = "#cdf3d4", "#0b4a1c", "#e4edfc", "#1d4f9e"
FOLD = 40  # so many lines in a row of one kind are shown whole; of more the first and the last


@dataclass
class PreviewFlags:
    """Flags of this tool; the trainer's come beside them."""

    objective: str = mv.arg("sft", "Whose records these are: train_OBJECTIVE.py says what a good record is.")
    index: int = mv.arg(0, "Which record of --data_path, from 0.")
    id: str | None = mv.arg(None, "The record with this id, instead of --index.")
    output: str = mv.arg("preview.png", "Where the picture goes.", aliases=["-o"])
    shown_frames: int = mv.arg(24, "Most frames drawn of one clip; of more, as many pairs at even distances.")


def find_record(source: str, flags: PreviewFlags, normalize) -> dict:
    """The chosen record in normal form; the others are passed over.

    Raises:
        InputError: there is no such record, or it is a bad one.
    """
    count = 0
    for where, record in mv.read_records(source):
        own = record.get("id") if isinstance(record, dict) else None
        if (str(own if own is not None else where) == flags.id) if flags.id is not None else (count == flags.index):
            try:
                if isinstance(record, ValueError):
                    raise ValueError(f"{where}: {record}")
                return normalize(record, where if own is None else f"{where} (id {own!r})")
            except ValueError as error:
                raise mv.InputError(f"{source}: {error}") from None
        count += 1
    wanted = f"--id {flags.id}" if flags.id is not None else f"--index {flags.index}"
    raise mv.InputError(f"{wanted}: not one of the {count} records of {source} (--index counts from 0)")


def unpatchify(patches: torch.Tensor, grid, patch_size: int, merge_size: int) -> torch.Tensor:
    """Put the patches [P, 3·2·patch²] of a clip with grid (t, h, w) together again: frames [2·t, 3, height, width]."""
    t, h, w = grid
    m, p = merge_size, patch_size
    frames = patches.reshape(t, h // m, w // m, m, m, 3, mv.FRAME_FACTOR, p, p)
    frames = frames.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # t, frame, colour, h', merge, patch, w', merge, patch
    return frames.reshape(t * mv.FRAME_FACTOR, 3, h * p, w * p)


def read_clips(row: dict, sample: dict, encoder, folder: str, args) -> list[dict]:
    """Frames, times, sizes and positions of each clip of an encoded sample, in the order of the prompt."""
    parts, bad = [], [path for path, _ in sample["bad"]]  # left out by --on_bad_video drop_video, in order
    for part in (part for message in row["messages"] for part in message["content"] if part["type"] != "text"):
        if bad and bad[0] in [os.path.join(folder, file) for file in part["files"]]:
            bad.pop(0)
        else:
            parts.append(part)
    visual = np.flatnonzero(sample["input_ids"] == encoder.config.video_token_id)
    clips, patch, token = [], 0, 0
    for part, grid in zip(parts, sample["video_grid_thw"].tolist()):
        t, h, w = grid
        count = t * h * w // encoder.merge_size**2
        frames = unpatchify(torch.from_numpy(sample["patches"][patch : patch + t * h * w]), grid, encoder.patch_size,
                            encoder.merge_size)  # fmt: skip
        first = visual[token : token + count : count // t]  # the first token of each temporal patch
        clip = {"part": part, "frames": frames, "tokens": count, "name": part["files"][0], "times": [None] * 2 * t,
                "positions": sample["position_ids"][1, first].tolist(), "source": "image"}  # fmt: skip
        if part["type"] == "video":
            info = mv.video_info(mv.resolve_path(part["files"][0], folder))
            total, fps = info.num_frames, info.fps
            indices, _ = mv.sample_frames(part, total, fps, args, 2 * t, info.times)
            assert -(-len(indices) // 2) == t, f"{part['files'][0]}: {len(indices)} frames by its container, {t} pairs"
            clip["times"] = info.shown_at(indices)
            clip["source"] = f"{total} frames, {fps:.4g} fps, {total / fps:.4g} s"
        elif part["type"] == "frames":
            taken = torch.linspace(0, len(part["files"]) - 1, min(2 * t, len(part["files"]))).round().tolist()
            clip["times"] = [i / (part["fps"] or args.fps) for i in taken]
            clip["source"] = f"{len(part['files'])} images, {part['fps'] or args.fps:g} fps"
            clip["name"] += f" … {os.path.basename(part['files'][-1])}"
        clips.append(clip)
        patch, token = patch + t * h * w, token + count
    return clips


def kind_of(clip: dict) -> str:
    """ "image" or "video", which frame images are too."""
    return "image" if clip["part"]["type"] == "image" else "video"


def read_expected(row: dict) -> list[tuple[str, str, bool]]:
    """What a record has beside its turns, as pieces: a classifier's label or target, the reference of GRPO."""
    pieces = []
    for name in ("label", "target", "reference"):
        value = row.get(name)
        if value not in (None, []):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            pieces += [(f"{name} (the model does not read it)", "answer", False), (text, "text", False)]
    return pieces


def read_text(sample: dict, clips: list[dict], encoder) -> list[tuple[str, str, bool]]:
    """The tokens as pieces `(text, kind, is it learned)`; kinds: text, control, clip, answer (a new sequence)."""
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    video, special = encoder.config.video_token_id, set(encoder.tokenizer.all_special_ids)
    runs = [len(clip["positions"]) if encoder.timing == "text" else 1 for clip in clips]  # of consecutive tokens
    names = (f"{kind_of(clip)} {i} · {clip['tokens'] // parts:,} tokens"
             for i, (clip, parts) in enumerate(zip(clips, runs), 1) for _ in range(clip["tokens"]))  # fmt: skip
    kinds = [next(names) if token == video else "control" if token in special else "text" for token in ids]
    pieces, start = [], 0
    for number, length in enumerate(sample["lengths"].tolist()):
        if number:
            pieces.append((("chosen", "rejected")[number - 1], "answer", False))  # of train_dpo.py
        span = range(start, start + length)
        for (kind, learned), run in itertools.groupby(span, lambda i: (kinds[i], labels[i] != -100)):
            run = list(run)
            if kind not in ("control", "text"):
                pieces.append((kind, "clip", False))
                continue
            for tokens in [[i] for i in run] if kind == "control" else [run]:
                text = encoder.tokenizer.decode([ids[i] for i in tokens], skip_special_tokens=False)
                pieces.append((text, kind, learned))
        start += length
    return pieces


# ------------------------------------------------------------------------------------------------------------- fonts

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@lru_cache
def font(name: str, size: int):
    """A font by file name of matplotlib's, or by path."""
    return ImageFont.truetype(str(FONTS / name), size)


MONO, SANS, BOLD = "DejaVuSansMono.ttf", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf"


@lru_cache
def has(name: str) -> frozenset:
    """Code points that one of matplotlib's fonts can draw."""
    return frozenset(ft2font.FT2Font(str(FONTS / name)).get_charmap())


def find_fonts(text: str) -> dict[str, str]:
    """A font file of this machine for each character that MONO lacks, in one pass over all fonts; some have none."""
    wanted, found = {c for c in set(text) if ord(c) not in has(MONO)}, {}
    installed = sorted({entry.fname for entry in font_manager.fontManager.ttflist
                        if entry.style == "normal" and entry.weight in (400, "normal", "regular")})  # fmt: skip
    for path in [str(FONTS / SANS), *installed] if wanted else []:
        if "LastResort" in path or "Emoji" in path:  # boxes; bitmaps of a single size
            continue
        try:
            face = ft2font.FT2Font(path)
        except (OSError, RuntimeError):  # a damaged file
            continue
        found |= {c: path for c in wanted - found.keys() if face.get_char_index(ord(c))}
        if len(found) == len(wanted):
            break
    return found


class Canvas:
    """Text with fonts for every character, drawn or only measured."""

    def __init__(self, fonts: dict[str, str], size=(1, 1)):
        self.image = Image.new("RGB", size, "white")
        self.draw, self.fonts, self.missing = ImageDraw.Draw(self.image), fonts, set()

    def runs(self, text: str, name: str, size: int):
        """Split a text into (run, font); None for characters that no font has. Joining marks stay with their base."""
        chosen = []
        for character in text:
            joins = unicodedata.category(character) in ("Mn", "Me", "Cf")
            own = name if ord(character) in has(name) else self.fonts.get(character, "")
            chosen.append(chosen[-1] if joins and chosen else own)
        for path, run in itertools.groupby(zip(text, chosen), lambda pair: pair[1]):
            yield "".join(character for character, _ in run), font(path, size) if path else None

    def width(self, text: str, name: str, size: int) -> float:
        """Width in pixels."""
        return sum(face.getlength(run) if face else size * len(run) for run, face in self.runs(text, name, size))

    def text(
        self, x: float, y: float, text: str, name: str = SANS, size: int = 16, fill: str = INK, anchor: str = "l"
    ):
        """Draw one line whose baseline is `y`; anchor l: from x, m: around x."""
        if anchor == "m":
            x -= self.width(text, name, size) / 2
        for run, face in self.runs(text, name, size):
            if face:
                self.draw.text((x, y), run, fill, face, anchor="ls")
                x += face.getlength(run)
                continue
            for character in run:  # a hollow box, and a remark at the end of the sheet
                self.missing.add(character)
                self.draw.rectangle((x + 2, y - 0.75 * size, x + size - 2, y + 0.1 * size), outline=fill)
                x += size


def many(count: int, what: str) -> str:
    """The count with its noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def fitted(canvas, text, name, size, width):
    """The text, its middle left out where it is wider than `width`."""
    text = text if len(text) <= 600 else f"{text[:300]}…{text[-300:]}"
    if canvas.width(text, name, size) <= width:
        return text
    for keep in range(len(text) - 2, 2, -1):
        short = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
        if canvas.width(short, name, size) <= width:
            return short
    return "…"


# ----------------------------------------------------------------------------------------------------------- drawing

TITLE, CAPTION, POSITION, LINE, TEXT = 52, 20, 30, 28, 17  # heights in pixels; TEXT: size of the prompt's letters
BETWEEN = 14  # pixels between two pairs of frames


def thumbnail(clip: dict, target: int, width: int) -> dict:
    """How a clip is drawn: whole multiples of small frames near `target` pixels of height, large ones made smaller."""
    height_px, width_px = clip["frames"].shape[-2:]
    across = 1 if clip["part"]["type"] == "image" else 2
    scale = min(target / height_px, 2.5 * target / width_px)
    scale = max(1, int(scale)) if scale >= 1 else scale
    scale = min(scale, (width - 4) / (across * width_px))
    size = max(1, round(width_px * scale)), max(1, round(height_px * scale))
    cell = max(size[0], 60)
    return {"size": size, "scale": scale, "cell": cell, "group": across * cell + 4 * (across - 1), "across": across}


def groups_of(clip: dict, shown: int) -> list[int]:
    """Numbers of the temporal patches that are drawn: all, or at even distances."""
    total = len(clip["frames"]) // mv.FRAME_FACTOR
    return sorted({round(i) for i in np.linspace(0, total - 1, max(1, min(total, shown // mv.FRAME_FACTOR)))})


def draw_clip(canvas: Canvas, clip: dict, number: int, x: int, y: int, width: int, target: int, shown: int) -> int:
    """Draw one clip with its title at (x, y), at most `width` wide; returns its height. 1×1 canvases only measure."""
    thumb, groups = thumbnail(clip, target, width), groups_of(clip, shown)
    measure = canvas.image.size == (1, 1)
    per_line = max(1, (width + BETWEEN) // (thumb["group"] + BETWEEN))
    line_height = thumb["size"][1] + CAPTION + POSITION
    height = TITLE + -(-len(groups) // per_line) * line_height + 12
    if measure:
        return height
    frames, times, kind = clip["frames"], clip["times"], clip["part"]["type"]
    count = len(times) if kind != "image" else 1
    name = f"{kind_of(clip)} {number}  "
    canvas.text(x, y + 18, name, BOLD, 16)
    after = x + canvas.width(name, BOLD, 16)
    canvas.text(after, y + 18, fitted(canvas, clip["name"], SANS, 16, width - (after - x)), SANS, 16)
    took = f"{frames.shape[-1]}×{frames.shape[-2]} px"
    took = took if kind == "image" else f"{count} × {took}"
    hidden = f" ({2 * len(groups)} frames shown)" if 2 * len(groups) < len(frames) else ""
    about = f"{clip['source']} → {took}: {many(clip['tokens'], 'token')}{hidden}"
    canvas.text(x, y + 40, fitted(canvas, about, SANS, 13, width), SANS, 13, GREY)
    for k, group in enumerate(groups):
        left = x + k % per_line * (thumb["group"] + BETWEEN)
        top = y + TITLE + k // per_line * line_height
        for side in range(thumb["across"]):
            i = mv.FRAME_FACTOR * group + side
            picture = Image.fromarray(frames[i].permute(1, 2, 0).contiguous().numpy())
            how = Image.Resampling.NEAREST if thumb["scale"] >= 1 else Image.Resampling.LANCZOS
            cell = left + side * (thumb["cell"] + 4)
            at = round(cell + (thumb["cell"] - thumb["size"][0]) / 2)
            canvas.image.paste(picture.resize(thumb["size"], how), (at, top))
            if kind != "image":
                said = f"{times[i]:.2f} s" if i < len(times) else "repeated"
                canvas.text(cell + thumb["cell"] / 2, top + thumb["size"][1] + 15, said, SANS, 12, INK, "m")
        under = top + thumb["size"][1] + (CAPTION if kind != "image" else 4)
        canvas.draw.line((left, under, left + thumb["group"], under), RULE, 2)
        canvas.text(left + thumb["group"] / 2, under + 15, f"position {clip['positions'][group]}", SANS, 11, GREY, "m")
    return height


def draw_clips(canvas: Canvas, clips: list[dict], y: int, shown: int) -> int:
    """Draw all clips from `y` on, top to bottom in up to three columns; returns the height."""
    content = WIDTH - 2 * MARGIN
    target = 224 if len(clips) <= 2 else 168 if len(clips) <= 5 else 112
    columns = 1
    for more in (2, 3):
        width = (content - (more - 1) * GUTTER) // more
        wide = [len(groups_of(clip, shown)) * (thumbnail(clip, target, width)["group"] + BETWEEN) for clip in clips]
        columns = more if len(clips) > 5 and max(wide) <= width + BETWEEN else columns
    width = (content - (columns - 1) * GUTTER) // columns
    per_column, tallest = -(-len(clips) // columns), 0
    for column in range(columns):
        bottom = y
        for i in range(column * per_column, min(len(clips), (column + 1) * per_column)):
            x = MARGIN + column * (width + GUTTER)
            bottom += draw_clip(canvas, clips[i], i + 1, x, bottom, width, target, shown)
        tallest = max(tallest, bottom - y)
    return tallest


def lay_out(canvas: Canvas, pieces: list[tuple], width: int) -> list[list[tuple]]:
    """Break the token stream into lines of atoms `(text, kind, learned, width)`."""
    lines, x = [[]], 0

    def place(text, kind, learned):
        nonlocal x
        size = canvas.width(text, MONO, TEXT) + (16 if kind == "clip" else 0)
        if x + size > width and x and text.strip(" "):
            lines.append([])
            x = 0
        if size > width and len(text) > 1:  # a word longer than a line, as in a script without blanks
            count = bisect.bisect_left(
                range(len(text)), True, 1, key=lambda n: canvas.width(text[:n], MONO, TEXT) > width
            )
            place(text[: max(1, count - 1)], kind, learned)
            place(text[max(1, count - 1) :], kind, learned)
            return
        lines[-1].append((text, kind, learned, size))
        x += size

    for i, (text, kind, learned) in enumerate(pieces):
        if text == "<|vision_start|>":  # stays beside its clip
            whole = "".join(piece[0] for piece in pieces[i : i + 3])
            if x + canvas.width(whole, MONO, TEXT) + 16 > width:
                lines.append([])
                x = 0
        if kind in ("clip", "answer"):
            if kind == "answer" and lines[-1]:
                lines.append([])
                x = 0
            place(text, kind, learned)
            if kind == "answer":
                lines.append([])
                x = 0
            continue
        text = "".join(f"\\x{ord(c):02x}" if ord(c) < 32 and c != "\n" else c for c in text.replace("\t", "    "))
        for newline, words in itertools.groupby(text, lambda c: c == "\n"):
            for word in ("↵" for _ in words) if newline else _words("".join(words)):
                place(word, "newline" if newline else kind, learned)
                if newline:
                    lines.append([])
                    x = 0
    return lines if lines[-1] else lines[:-1]


def _words(text):
    """Words and the blanks between them."""
    return ("".join(part) for _, part in itertools.groupby(text, str.isspace))


def fold(lines: list[list[tuple]]) -> list[list[tuple]]:
    """Leave out the middle of long stretches, of learned and of other lines apart, and say how much is left out."""
    short = []
    for learned, group in itertools.groupby(lines, lambda line: any(atom[2] for atom in line)):
        group = list(group)
        if len(group) > 2 * FOLD:
            out = group[FOLD:-FOLD]
            letters = sum(len(atom[0]) for line in out for atom in line)
            what = "learned " if learned else ""
            remark = (
                f"… {len(out):,} {what}lines, {letters:,} characters, are left out of the picture …",
                "remark",
                False,
                0,
            )
            group = [*group[:FOLD], [remark], *group[-FOLD:]]
        short += group
    return short


def draw_text(canvas: Canvas, lines: list[list[tuple]], y: int):
    """Draw laid-out lines from `y` on: learned text on green, clips in blue, control tokens grey."""
    for number, line in enumerate(lines):
        x, top = MARGIN, y + number * LINE
        for text, kind, learned, width in line:
            baseline = top + 20
            if learned:
                canvas.draw.rectangle((x, top + 2, min(x + width, WIDTH - MARGIN), top + LINE - 3), fill=GREEN)
            if kind == "clip":
                canvas.draw.rounded_rectangle((x + 3, top + 2, x + width - 3, top + LINE - 4), 6, fill=BLUE)
                canvas.text(x + 8, baseline, text, MONO, TEXT, BLUE_INK)
            elif kind in ("answer", "remark"):
                canvas.text(
                    x, baseline, text, BOLD if kind == "answer" else SANS, TEXT, INK if kind == "answer" else GREY
                )
            else:
                fill = PALE if kind in ("control", "newline") and not learned else GREEN_INK if learned else INK
                canvas.text(x, baseline, text, MONO, TEXT, fill)
            x += width


def draw_sheet(row: dict, sample: dict, clips: list[dict], pieces: list[tuple], args, shown: int) -> Image.Image:
    """The whole picture: what the sample is, its clips, its text."""
    pieces = [*pieces, *read_expected(row)]
    names = [str(row["id"]), args.data_path, args.model_id, *(clip["name"] for clip in clips)]
    fonts = find_fonts("↵…" + "".join([*names, *(piece[0] for piece in pieces)]))
    ruler = Canvas(fonts)
    lines = fold(lay_out(ruler, pieces, WIDTH - 2 * MARGIN))
    clips_height = draw_clips(ruler, clips, 0, shown)
    head, between = 150, 74
    canvas = Canvas(fonts, (WIDTH, head + clips_height + between + LINE * len(lines) + 90))
    visual = sum(clip["tokens"] for clip in clips)
    learned = int((sample["labels"] != -100).sum())
    canvas.text(MARGIN, 62, fitted(canvas, mv.record_name(row["id"]), BOLD, 30, WIDTH - 2 * MARGIN), BOLD, 30)
    stamps = sample.get("stamps")
    facts = [f"{sample['num_tokens']:,} tokens = {visual:,} visual + {sample['num_tokens'] - visual:,} of text"
             + (f", {stamps:,} of them time stamps" if stamps else "")]  # fmt: skip
    facts += [f"{learned:,} learned", many(sample["num_videos"], "video"), many(sample["num_images"], "image")]
    facts += [f"made smaller by --max_video_tokens {args.max_video_tokens:,}"] if sample["shrunk"] else []
    facts += [f"{many(len(sample['bad']), 'bad file')} left out"] if sample["bad"] else []
    canvas.text(MARGIN, 96, "   ·   ".join(facts), SANS, 19)
    canvas.text(MARGIN, 122, fitted(canvas, f"{args.data_path}   ·   {args.model_id}", SANS, 14, WIDTH - 2 * MARGIN),
                SANS, 14, GREY)  # fmt: skip
    draw_clips(canvas, clips, head, shown)
    y = head + clips_height
    canvas.draw.line((MARGIN, y + 4, WIDTH - MARGIN, y + 4), RULE, 2)
    canvas.text(MARGIN, y + 42, "What the model reads", BOLD, 19)
    legend = (("learned", GREEN, GREEN_INK), ("a clip's tokens", BLUE, BLUE_INK), ("control tokens, ↵", None, PALE),
              ("other text", None, INK))  # fmt: skip
    x = WIDTH - MARGIN + 30 - sum(canvas.width(text, SANS, 15) + 30 for text, _, _ in legend)
    for text, fill, ink in legend:
        width = canvas.width(text, SANS, 15)
        if fill:
            canvas.draw.rounded_rectangle((x - 6, y + 25, x + width + 6, y + 49), 6, fill=fill)
        canvas.text(x, y + 42, text, SANS, 15, ink)
        x += width + 30
    draw_text(canvas, lines, y + between)
    end = y + between + LINE * len(lines) + 36
    if canvas.missing:
        codes = " ".join([f"U+{ord(c):04X}" for c in sorted(canvas.missing)[:6]] + ["…"] * (len(canvas.missing) > 6))
        remark = f"Boxes: no font on this machine has {many(len(canvas.missing), 'character')} ({codes}), which the "
        canvas.text(
            MARGIN, end, remark + "model gets all the same; the package fonts-noto-cjk has most", SANS, 14, GREY
        )
    return canvas.image


def main():
    args, own = read_flags(PreviewFlags, used=mv.SAMPLE_FLAGS)
    if not Path(own.output).absolute().parent.is_dir():
        raise mv.InputError(f"--output {own.output}: no such folder")
    if Path(own.output).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise mv.InputError(f"--output {own.output}: expected a name that ends in .png or .jpg")
    row = find_record(args.data_path, own, normalizer(own.objective, args))
    encoder = mv.Encoder(args.model_id, args)
    try:
        mv.check_rendered(row, encoder.template_reads(), encoder.chat_template)
    except ValueError as error:
        raise mv.InputError(f"{mv.record_name(row['id'])}: {error}") from None
    sample = encoder(row, args.image_folder)
    if "input_ids" not in sample:
        why = "; ".join(f"{file}: {reason}" for file, reason in sample["bad"])
        why = why or f"{sample['num_tokens']} tokens, --max_seq_length is {args.max_seq_length}"
        raise mv.InputError(f"{mv.record_name(row['id'])} is left out of training: {why}")
    clips = read_clips(row, sample, encoder, args.image_folder, args)
    sample["stamps"] = encoder.stamps_in(sample["input_ids"])
    sheet = draw_sheet(row, sample, clips, read_text(sample, clips, encoder), args, own.shown_frames)
    sheet.save(own.output)
    print(f"{own.output}: {mv.record_name(row['id'])}, {sample['num_tokens']} tokens, "
          f"{int((sample['labels'] != -100).sum())} learned; {sheet.width}×{sheet.height} pixels")  # fmt: skip


if __name__ == "__main__":
    mv.run(main)
