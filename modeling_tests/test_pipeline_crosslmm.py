"""`pipeline("video-text-to-text")`: chats, questions, batches, parameters, saving."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ImageTextToTextPipeline, TextIteratorStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from factories import mp4_of, random_frames, random_model, tiny_config, tiny_processor
from transformers_crosslmm.pipeline_crosslmm import VideoTextToTextPipeline

GREEDY = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}}


@pytest.fixture(scope="module")
def pipe() -> VideoTextToTextPipeline:
    processor = tiny_processor()
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer)},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    return VideoTextToTextPipeline(model=random_model(config), processor=processor, device="cpu")


def clip(num_frames: int) -> np.ndarray:
    return random_frames(num_frames, seed=num_frames)


def chat_of(*videos, text: str = "What is it?") -> list[dict]:
    parts = [{"type": "video", "video": video} for video in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def answer(pipe, chat: list[dict], **processor_kwargs) -> str:
    """What the model itself says, without the pipeline."""
    inputs = pipe.processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )
    ids = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_importing_the_package_registers_the_task():
    assert PIPELINE_REGISTRY.check_task("video-text-to-text")[1]["impl"] is VideoTextToTextPipeline


def test_a_chat_comes_back_with_the_answer(pipe):
    chat = chat_of(clip(3))
    [record] = pipe(chat, **GREEDY)
    assert record["input_text"] == chat
    assert record["generated_text"] == [*chat, {"role": "assistant", "content": answer(pipe, chat)}]
    [record] = pipe(text=chat, return_full_text=False, **GREEDY)
    assert record["generated_text"] == answer(pipe, chat)
    assert answer(pipe, chat) != answer(pipe, chat_of(clip(4)))  # so that the tests here can tell videos apart


def test_a_question_comes_back_as_an_answer(pipe):
    expected = answer(pipe, chat_of(clip(3)))
    [record] = pipe(videos=clip(3), text="What is it?", **GREEDY)
    assert record == {"input_text": "What is it?", "generated_text": expected}
    [record] = pipe(videos=clip(3), text="What is it?", return_full_text=True, **GREEDY)
    assert record["generated_text"] == "What is it?" + expected
    [record] = pipe({"videos": clip(3), "text": "What is it?"}, **GREEDY)
    assert record["generated_text"] == expected
    [record] = pipe(text="What is it?", **GREEDY)
    assert record["generated_text"] == answer(pipe, chat_of())


def test_questions_have_a_video_each_or_share_a_question(pipe):
    records = pipe(videos=[clip(3), clip(4)], text=["What is it?", "Why?"], **GREEDY)
    expected = [answer(pipe, chat_of(clip(3))), answer(pipe, chat_of(clip(4), text="Why?"))]
    assert [record["generated_text"] for [record] in records] == expected
    both = answer(pipe, chat_of(clip(3), clip(4)))
    [record] = pipe(videos=[clip(3), clip(4)], text="What is it?", **GREEDY)
    assert record["generated_text"] == both
    [[record], [other]] = pipe(videos=[[clip(3), clip(4)], []], text=["What is it?", "Why?"], **GREEDY)
    assert record["generated_text"] == both
    assert other["generated_text"] == answer(pipe, chat_of(text="Why?"))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_answers_as_each_chat_alone(pipe, batch_size):
    chats = [chat_of(clip(3)), chat_of(text="A longer question without a video?"), chat_of(clip(1), clip(5), text="?")]
    records = pipe(chats, batch_size=batch_size, return_full_text=False, **GREEDY)
    assert [record["generated_text"] for [record] in records] == [answer(pipe, chat) for chat in chats]


def test_generators_and_datasets_of_questions_stream(pipe):
    items = [{"videos": clip(count), "text": "What is it?"} for count in (3, 4)]
    expected = [answer(pipe, chat_of(clip(count))) for count in (3, 4)]
    for batch_size in (1, 2):
        records = pipe((item for item in items), batch_size=batch_size, **GREEDY)
        assert [record["generated_text"] for [record] in records] == expected


def test_files_and_processor_options(pipe, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4_of(random_frames(10), fps=4))
    chat = [{"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": "?"}]}]
    [record] = pipe(chat, processor_kwargs={"num_frames": 2}, return_full_text=False, **GREEDY)
    assert record["generated_text"] == answer(pipe, chat, num_frames=2)
    [record] = pipe(videos=str(path), text="?", processor_kwargs={"num_frames": 2}, **GREEDY)
    assert record["generated_text"] == answer(pipe, chat, num_frames=2)


def test_unchanged_frames_change_no_answer(pipe):
    still = np.repeat(clip(2), 3, axis=0)
    expected = answer(pipe, chat_of(still))
    [record] = pipe(chat_of(still), processor_kwargs={"skip_unchanged": True}, return_full_text=False, **GREEDY)
    assert record["generated_text"] == expected


def test_a_batch_counts_the_shown_frames_over_all_its_pixels(pipe):
    stills = [np.repeat(clip(2), 3, axis=0), np.repeat(clip(3), 2, axis=0)]
    texts = ["<|video_pad|>", "longer <|video_pad|>"]
    full = pipe.processor(text=texts, videos=stills, padding=True, return_tensors="pt")["pixel_values_videos"]
    items = [
        {**pipe.processor(text=text, videos=still, skip_unchanged=True, return_tensors="pt"), "text": text}
        for text, still in zip(texts, stills, strict=True)
    ]
    batch = pipe._collate(items)
    assert batch["video_num_frames"].tolist() == [6, 6]
    assert torch.equal(batch["pixel_values_videos"][batch["video_frame_index"]], full)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_sequences_are_returned_for_each_input(pipe, batch_size):
    options = {"max_new_tokens": 3, "generate_kwargs": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}}
    records = pipe([chat_of(clip(3)), chat_of(clip(4))], batch_size=batch_size, return_full_text=False, **options)
    assert [len(sequences) for sequences in records] == [2, 2]
    for sequences, count in zip(records, (3, 4), strict=True):
        alone = pipe(chat_of(clip(count)), return_full_text=False, **options)
        assert [record["generated_text"] for record in sequences] == [record["generated_text"] for record in alone]


def test_tokens_can_be_returned_and_streamed(pipe):
    [record] = pipe(chat_of(clip(3)), return_tensors=True, **GREEDY)
    assert isinstance(record["generated_token_ids"], torch.Tensor)
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    [record] = pipe(
        chat_of(clip(3)),
        return_full_text=False,
        max_new_tokens=4,
        generate_kwargs={"streamer": streamer, "do_sample": False},
    )
    assert "".join(streamer) == record["generated_text"]


@pytest.mark.parametrize("content", ["It is", [{"type": "text", "text": "It is"}]], ids=["string", "parts"])
def test_an_unfinished_answer_is_continued(pipe, content):
    chat = [*chat_of(clip(3)), {"role": "assistant", "content": content}]
    [record] = pipe(chat, **GREEDY)
    [continued] = pipe(chat, return_full_text=False, **GREEDY)
    assert len(record["generated_text"]) == 2
    assert record["generated_text"][-1]["content"][-1]["text"] == "It is" + continued["generated_text"]


def test_the_callers_own_options_are_left_alone(pipe):
    options = {"do_sample": False}
    pipe(chat_of(clip(1)), max_new_tokens=2, generate_kwargs=options)
    assert options == {"do_sample": False}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Nothing to answer"),
        ({"videos": []}, "Nothing to answer"),
        ({"text": [], "videos": None}, "Nothing to answer"),
        ({"images": "a.png", "text": "Why?"}, "`images` is not an argument of this pipeline. Put images into a chat"),
        ({"videos": "data:video/mp4;base64," + "A" * 60_000}, "A question is missing: pass `text`"),
        ({"videos": np.zeros((2, 8, 8, 3), np.uint8)}, "One input is a chat .* got ndarray"),
        ({"videos": ["a.mp4", "b.mp4"], "text": ["Why?"]}, "1 questions for 2 videos"),
        ({"videos": "a.mp4", "text": [{"role": "user", "content": "?"}]}, "Put a chat's videos into it"),
        ({"text": [3]}, "One input is a chat .* got int"),
    ],
    ids=str,
)
def test_mistakes_are_named(pipe, inputs, message):
    with pytest.raises(ValueError, match=message) as raised:
        pipe(**inputs)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_transformers_own_pipeline_answers_a_batch_as_each_chat_alone(pipe, batch_size):
    own = ImageTextToTextPipeline(model=pipe.model, processor=pipe.processor, device="cpu")
    pictures = [Image.fromarray(clip(1)[0]), Image.fromarray(clip(2)[1]), Image.fromarray(clip(3)[2])]
    texts = ["What is it?", "A much longer question than the others: what is to be seen here?", "Why?"]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(pictures, texts, strict=True)
    ]
    greedy = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}}  # which Transformers' own writes into
    records = own(text=chats, batch_size=batch_size, return_full_text=False, **greedy)
    assert [record["generated_text"] for [record] in records] == [answer(pipe, chat) for chat in chats]


def test_a_saved_pipeline_loads_without_trust_in_remote_code(pipe, tmp_path):
    pipe.model.config.custom_pipelines = {"video-text-to-text": {"impl": "pipeline_crosslmm.VideoTextToTextPipeline"}}
    pipe.save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "processor_config.json").exists()
    assert not list(tmp_path.glob("*.py"))
    loaded = pipeline("video-text-to-text", model=str(tmp_path), device="cpu")
    assert isinstance(loaded, VideoTextToTextPipeline)
    expected = pipe(chat_of(clip(3)), return_full_text=False, **GREEDY)
    assert (
        loaded(chat_of(clip(3)), return_full_text=False, **GREEDY)[0]["generated_text"]
        == expected[0]["generated_text"]
    )
