"""A client's pictures on their way to the model."""

import base64
import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from factories import random_frames, tiny_processor
from transformers_crosslmm.asking.waiting_frames import WaitingFrames

FRAME = random_frames(1)[0]


def sent(picture: Image.Image, form: str = "PNG", **options) -> torch.Tensor:
    """What waits for the model."""
    file, waiting = io.BytesIO(), WaitingFrames(tiny_processor())
    picture.save(file, form, **options)
    waiting.put_file(base64.b64encode(file.getvalue()).decode(), 0.0)
    [frame], _ = waiting.take()
    assert frame.dtype == torch.uint8
    return frame


def expected(frame: np.ndarray) -> torch.Tensor:
    waiting = WaitingFrames(tiny_processor())
    waiting.put(torch.from_numpy(frame).permute(2, 0, 1), 0.0)
    return waiting.take()[0][0]


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turned clockwise
    turned = Image.fromarray(np.rot90(FRAME).copy())
    assert torch.equal(sent(turned, exif=exif), expected(FRAME))


def test_a_picture_of_16_bits_keeps_its_greys():
    grey = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    shown = np.stack([np.rint(grey / 257).astype(np.uint8)] * 3, axis=-1)
    assert (sent(Image.fromarray(grey)).int() - expected(shown).int()).abs().max() <= 1  # rounded twice


@pytest.mark.parametrize("size", [(4096 * 4096, 1), (1, 4096 * 4096), (4097, 1)])
def test_a_picture_that_is_too_long_is_refused_at_once(size):
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"at most 4096 x 4096 pixels; got {size[0]} x {size[1]}"):
        sent(Image.new("L", size))
    assert time.monotonic() - began < 20


def test_a_picture_with_damaged_exif_is_refused_like_any_other_that_cannot_be_read():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a word"
    Image.fromarray(FRAME).save(file, "JPEG", exif=exif)
    data = bytearray(file.getvalue())
    data[data.index(b"Exif") + 17] = 26  # a type that the word has not: PIL raises TypeError
    with pytest.raises(ValueError, match="must be a whole JPEG, PNG, WEBP"):
        WaitingFrames(tiny_processor()).put_file(base64.b64encode(bytes(data)).decode(), 0.0)
