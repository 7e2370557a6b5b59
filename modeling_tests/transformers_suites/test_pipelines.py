"""Transformers' common tests of pipelines, on a tiny model and media that are made here."""

import os
import unittest

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkout import suite
from factories import mp4_of, random_frames, save_checkpoint

image_text_to_text = suite("pipelines.test_pipelines_image_text_to_text")
any_to_any = suite("pipelines.test_pipelines_any_to_any")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and a picture and a video under the paths that the suites open."""
    folder = tmp_path_factory.mktemp("pipelines")
    save_checkpoint(folder / "checkpoint")
    pictures = folder / "tests/fixtures/tests_samples/COCO"
    pictures.mkdir(parents=True)
    Image.fromarray(random_frames(1)[0]).save(pictures / "000000039769.png")
    (folder / "clip.mp4").write_bytes(mp4_of(random_frames(11), fps=5))
    return folder


def run_suite(tests: unittest.TestCase, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    model = AutoModelForImageTextToText.from_pretrained("checkpoint").eval()
    processor = AutoProcessor.from_pretrained("checkpoint")
    # The suites read the marks of media off the tokenizer; a CrossLMM's are the processor's.
    processor.tokenizer.image_token, processor.tokenizer.video_token = processor.image_token, processor.video_token
    images = processor.image_processor
    pipe, examples = tests.get_test_pipeline(model, processor.tokenizer, processor, image_processor=images)
    tests.run_pipeline_test(pipe, examples)


def test_image_text_to_text(folder, monkeypatch):
    run_suite(image_text_to_text.ImageTextToTextPipelineTests(), folder, monkeypatch)


def test_any_to_any(folder, monkeypatch):
    # The pipeline asks for torchvision, which Transformers' own video processors need, and ours does not.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    monkeypatch.setattr(any_to_any, "url_to_local_path", lambda url: os.fspath(folder / "clip.mp4"))
    # The suite's last step is a chat with parts of type "images", which is refused; see docs/where-we-differ.md.
    with pytest.raises(ValueError, match="must be text, image or video; got 'images'"):
        run_suite(any_to_any.AnyToAnyPipelineTests(), folder, monkeypatch)
