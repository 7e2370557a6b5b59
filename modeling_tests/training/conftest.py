"""What tests of training data share: a media folder."""

import pytest
from PIL import Image

from factories import mp4_of, random_frames

CLIPS = {"three.mp4": 3, "five.mp4": 5}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A media folder: clips of 3 and 5 seconds at 1 fps, a picture, a file that is no video."""
    folder = tmp_path_factory.mktemp("media")
    for name, seconds in CLIPS.items():
        (folder / name).write_bytes(mp4_of(random_frames(seconds, seed=seconds), fps=1))
    Image.fromarray(random_frames(1)[0]).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder
