"""Draws the frames that a model sees and their attention weights.

Shapes: T frames, S pixels along a side.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..video_processing_crosslmm import CrossLMMVideoProcessor, VideoStream

FONT = ImageFont.load_default(13)
LINE = 18
"""Height of a line of text in pixels."""
INK, PAPER, ACCENT = (25, 25, 25), (255, 255, 255), (31, 90, 200)


def frame_pictures(pixels: torch.Tensor, video_processor: CrossLMMVideoProcessor) -> list[Image.Image]:
    """Converts a processor's frames (T, 3, S, S) to pictures; undoes its normalisation and rescaling."""
    plain = pixels.float()
    if video_processor.do_normalize:
        plain = plain * _per_channel(video_processor.image_std) + _per_channel(video_processor.image_mean)
    if video_processor.do_rescale:
        plain = plain / video_processor.rescale_factor
    levels = plain.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(frame) for frame in levels]


def stream_pictures(video: VideoStream, video_processor: CrossLMMVideoProcessor) -> list[Image.Image]:
    """The pictures of all frames of a video; for a skipped, unchanged frame that of the one shown instead."""
    pictures = [picture for chunk in video for picture in frame_pictures(chunk, video_processor)]
    return pictures if video.frame_index is None else [pictures[frame] for frame in video.frame_index]


def _per_channel(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def frame_labels(num_frames: int, times: Sequence[float] | None) -> list[str]:
    """Labels for the frames: their seconds, or their numbers if the clip has no clock."""
    if times is None:
        return [f"#{number}" for number in range(1, num_frames + 1)]
    return [clock_time(seconds) for seconds in times]


def clock_time(seconds: float) -> str:
    """Formats seconds for users: 3.5 s, 2:03.5, 1:02:03.5."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    if not minutes:
        return f"{rest / 10:.1f} s"
    hours, minutes = divmod(minutes, 60)
    clock = f"{rest / 10:04.1f}"
    return f"{hours}:{minutes:02d}:{clock}" if hours else f"{minutes}:{clock}"


def draw_contact_sheet(frames: Sequence[Image.Image], labels: Sequence[str], *, side: int = 160) -> Image.Image:
    """Draws the frames in reading order, `side` pixels each, with their labels below."""
    columns = _sheet_columns(len(frames))
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + LINE)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        left, top = number % columns * side, number // columns * (side + LINE)
        sheet.paste(_fitted(frame, side - 4), (left + 2, top + 2))
        pen.text((left + side // 2, top + side), label, INK, FONT, anchor="ma")
    return sheet


def frame_on_contact_sheet(x: float, y: float, num_frames: int, *, side: int = 160) -> int | None:
    """The frame that `draw_contact_sheet` drew at a point, its label included; None where there is none."""
    columns = _sheet_columns(num_frames)
    column, row = int(x // side), int(y // (side + LINE))
    frame = row * columns + column
    return frame if 0 <= column < columns and 0 <= frame < num_frames else None


def _sheet_columns(num_frames: int) -> int:
    return min(num_frames, max(4, math.ceil(math.sqrt(1.6 * num_frames))))


def draw_timeline(
    frames: Sequence[Image.Image],
    labels: Sequence[str],
    tokens: Sequence[str],
    weights: torch.Tensor,
    *,
    side: int = 72,
) -> Image.Image:
    """Draws the frames from left to right with their labels and, below, a row of frame weights per token of an answer.

    weights: (tokens, T), each row sums to 1. Darker means more; a row's maximum is written as a percentage. From 33
    frames on, adjacent frames share a column, with the picture of the first and the sum of their weights.
    """
    if not len(tokens):
        raise ValueError("A timeline needs an answer with tokens; got none.")
    share = _timeline_share(len(frames))
    weights = torch.stack([part.sum(-1) for part in weights.float().cpu().split(share, dim=1)], dim=1)
    frames, labels = frames[::share], labels[::share]

    pieces, margin = _timeline_margin(tokens)
    head, row_height = side + LINE + 4, LINE + 4
    sheet = Image.new("RGB", (margin + len(frames) * side, head + len(tokens) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        sheet.paste(_fitted(frame, side - 4), (margin + column * side + 2, 2))
        pen.text((margin + column * side + side // 2, side), label, INK, FONT, anchor="ma")
    for row, (piece, looked) in enumerate(zip(pieces, weights, strict=True)):
        top = head + row * row_height
        pen.text((margin - 8, top + row_height // 2), piece, INK, FONT, anchor="rm")
        for column, weight in enumerate(looked.tolist()):
            left = margin + column * side
            shade = tuple(round(paper + (ink - paper) * weight) for paper, ink in zip(PAPER, ACCENT, strict=True))
            pen.rectangle((left + 1, top + 1, left + side - 2, top + row_height - 2), fill=shade)
            if column == int(looked.argmax()):
                ink = PAPER if weight > 0.5 else INK
                centre = (left + side // 2, top + row_height // 2)
                pen.text(centre, f"{weight:.0%}", ink, FONT, anchor="mm")
    return sheet


def frame_on_timeline(x: float, num_frames: int, tokens: Sequence[str], *, side: int = 72) -> int | None:
    """The frame whose column `draw_timeline` drew at `x`, of several the first; None where there is none."""
    frame = int((x - _timeline_margin(tokens)[1]) // side) * _timeline_share(num_frames)
    return frame if 0 <= frame < num_frames else None


def _timeline_share(num_frames: int) -> int:
    return math.ceil(num_frames / 32)


def _timeline_margin(tokens: Sequence[str]) -> tuple[list[str], int]:
    """The words on the left, and how wide they are."""
    pieces = [token.strip() or repr(token) for token in tokens]  # repr makes whitespace visible
    return pieces, 16 + math.ceil(max(FONT.getlength(piece) for piece in pieces))


def _fitted(frame: Image.Image, side: int) -> Image.Image:
    small = max(frame.size) < side
    return frame.resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


__all__ = [
    "clock_time",
    "draw_contact_sheet",
    "draw_timeline",
    "frame_labels",
    "frame_on_contact_sheet",
    "frame_on_timeline",
    "frame_pictures",
    "stream_pictures",
]
