"""A long video is encoded while it is decoded: the same features, and never more than a chunk of its pixels."""

import gc
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import video_files
from factories import mp4_of, random_frames, random_model, tiny_config, tiny_processor
from test_video_processing_crosslmm import FakeDecoder
from transformers_crosslmm import CrossLMMProcessor, VideoError, encode_video
from transformers_crosslmm.asking.conversation import VideoConversation, read_video
from transformers_crosslmm.media_crosslmm import join_media
from transformers_crosslmm.pipeline_crosslmm import VideoTextToTextPipeline
from transformers_crosslmm.video_decoding import VideoDecodeError, VideoDecodeWarning, decode_video

FPS, NUM_FRAMES, SIDE, CHUNK = 4, 23, 33, 4


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return mp4_of(random_frames(NUM_FRAMES), fps=FPS)


@pytest.fixture(scope="module")
def processor() -> CrossLMMProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    config = tiny_config(
        text_config={"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_chunk_size=CHUNK,
    )
    return random_model(config)


def chat_of(*videos) -> list[dict]:
    parts = [{"type": "video", "video": video} for video in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Why?"}]}]


def inputs_of(processor, *videos, **processor_kwargs):
    return processor.apply_chat_template(
        chat_of(*videos),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **processor_kwargs},
    )


# -- the pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 23, 100])
@pytest.mark.parametrize("sampling", [{"fps": 4}, {"num_frames": 9}, {"do_sample_frames": False}], ids=str)
@pytest.mark.parametrize("kind", ["file", "frames", "decoder"])
def test_chunks_are_the_pixels_of_one_call(processor, mp4, kind, sampling, chunk_size):
    frames = random_frames(NUM_FRAMES)
    video = {"file": mp4, "frames": frames, "decoder": FakeDecoder(frames)}[kind]
    options = sampling | ({"video_metadata": {"fps": FPS}} if kind == "frames" else {})
    whole = processor.video_processor(video, return_metadata=True, **options)
    [stream] = processor.video_processor.stream(video, chunk_size=chunk_size, **options)
    for _ in range(2):  # each time anew
        chunks = list(stream)
        assert torch.equal(torch.cat(chunks), whole["pixel_values_videos"])
        assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_size}
        assert 1 <= len(chunks[-1]) <= chunk_size
        assert stream.metadata == whole["video_metadata"][0]
        assert stream.num_frames == stream.expected_num_frames == len(whole["pixel_values_videos"])


def test_a_stream_that_has_begun_tells_what_cannot_be_read_and_misses_nothing(processor, mp4):
    [stream] = processor.video_processor.stream(b"no video " * 99, fps=2)
    with pytest.raises(VideoError, match="cannot open"):
        stream.begin()
    [stream] = processor.video_processor.stream(mp4, chunk_size=5, fps=FPS)
    stream.begin()
    assert [len(chunk) for chunk in stream] == [5, 5, 5, 5, 3]
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1; got 0"):
        processor.video_processor.stream(mp4, chunk_size=0)


def test_frames_that_could_not_be_decoded_are_marked_in_the_metadata(processor, model):
    data = video_files.encode(codec_options=video_files.X264)
    begin, end = int(0.45 * len(data)), int(0.47 * len(data))
    damaged = data[:begin] + np.random.default_rng(0).bytes(end - begin) + data[end:]
    with pytest.warns(VideoDecodeWarning):
        expected = decode_video(damaged, num_frames=30).valid.tolist()
    assert True in expected
    assert False in expected
    with pytest.warns(VideoDecodeWarning):
        inputs = inputs_of(processor, damaged, num_frames=30, return_metadata=True)
    assert inputs["video_metadata"][0].frames_valid == expected
    with pytest.warns(VideoDecodeWarning):
        inputs = inputs_of(processor, damaged, num_frames=30, return_metadata=True, encode_with=model)
    assert inputs["video_metadata"][0].frames_valid == expected
    for options in ({}, {"encode_with": model}):
        with pytest.raises(VideoDecodeError, match="strict"):
            inputs_of(processor, damaged, num_frames=30, strict=True, **options)


def test_clean_files_are_valid_and_frames_in_memory_have_no_opinion(processor, mp4):
    def valid(video):
        return processor.video_processor(video, num_frames=3, return_metadata=True)["video_metadata"][0].frames_valid

    assert valid(mp4) == [True] * 3
    assert valid(random_frames(4)) is None


# -- the features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [CHUNK, 3, 16])
@torch.no_grad()
def test_encoding_a_stream_gives_the_features_of_one_call(processor, model, mp4, chunk_size):
    pixels = processor.video_processor(mp4, fps=FPS)["pixel_values_videos"]
    expected = model.get_video_features(pixels)
    [stream] = processor.video_processor.stream(mp4, chunk_size=chunk_size, fps=FPS)
    for encoded in (encode_video(model, stream), encode_video(model, pixels)):
        assert encoded.last_hidden_state.shape == expected.last_hidden_state.shape
        torch.testing.assert_close(encoded.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(encoded.pooler_output[0], expected.pooler_output[0], rtol=1e-4, atol=1e-5)
    if chunk_size == CHUNK:
        assert torch.equal(encode_video(model, stream).last_hidden_state, expected.last_hidden_state)


def test_a_video_that_announces_too_few_frames_is_encoded_whole(processor, model, mp4):
    [stream] = processor.video_processor.stream(mp4, chunk_size=CHUNK, fps=FPS)
    expected = encode_video(model, stream)
    pixels = list(stream)

    class Short(type(stream)):
        expected_num_frames = 2

        def __init__(self):
            pass

        def __iter__(self):
            return iter(pixels)

    counts = []
    encoded = encode_video(model, Short(), on_progress=lambda *seen: counts.append(seen))
    assert torch.equal(encoded.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(encoded.pooler_output[0], expected.pooler_output[0])
    assert counts[-1] == (NUM_FRAMES, NUM_FRAMES)


def test_encoding_keeps_no_gradients(processor, model, mp4):
    [stream] = processor.video_processor.stream(mp4)
    encoded = encode_video(model, stream)
    assert not encoded.last_hidden_state.requires_grad
    assert not encoded.pooler_output[0].requires_grad


def test_the_processor_encodes_with_the_model_in_place_of_pixels(processor, model, mp4):
    videos = (mp4, random_frames(5, seed=3))
    plain = inputs_of(processor, *videos, return_metadata=True)
    inputs = inputs_of(processor, *videos, return_metadata=True, encode_with=model)
    assert set(inputs) == {"input_ids", "attention_mask", "mm_encoder_outputs", "video_metadata"}
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert inputs["video_metadata"] == plain["video_metadata"]
    expected = model.get_video_features(plain["pixel_values_videos"], plain["video_num_frames"])
    encoded = inputs["mm_encoder_outputs"]["video"]
    torch.testing.assert_close(encoded.last_hidden_state, expected.last_hidden_state)
    assert [len(pooled) for pooled in encoded.pooler_output] == [len(pooled) for pooled in expected.pooler_output]
    options = {"max_new_tokens": 5, "do_sample": False}
    del plain["video_metadata"], inputs["video_metadata"]
    answer = model.generate(**inputs, **options)
    assert torch.equal(answer, model.generate(**plain, **options))
    assert torch.equal(answer, model.generate(**inputs.to("cpu"), **options))  # encode once, ask again


@pytest.mark.parametrize("counts", [[1, 4, 2], [3, 3]], ids=str)
@torch.no_grad()
def test_of_unchanged_frames_one_is_kept_and_each_has_its_tokens(processor, model, counts):
    still = np.repeat(random_frames(len(counts)), counts, axis=0)
    videos = (still, random_frames(2, seed=3), still)
    names = ("pixel_values_videos", "video_num_frames", "video_frame_index")
    plain = inputs_of(processor, *videos, skip_unchanged=True)
    expected = model.get_video_features(**{name: plain[name] for name in names})
    encoded = inputs_of(processor, *videos, skip_unchanged=True, encode_with=model)["mm_encoder_outputs"]["video"]
    for tokens, expected_tokens in zip(encoded.pooler_output, expected.pooler_output, strict=True):
        torch.testing.assert_close(tokens, expected_tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.last_hidden_state, expected.last_hidden_state)
    assert list(encoded.frame_index) == plain["video_frame_index"].tolist()


def test_an_image_may_stand_beside_an_encoded_video(processor, model, mp4):
    image = random_frames(1, seed=9)[0]
    text = "<|vision_start|><|image_pad|><|vision_end|> or <|vision_start|><|video_pad|><|vision_end|>?"
    plain = processor(text=text, images=image, videos=mp4, return_tensors="pt")
    inputs = processor(text=text, images=image, videos=mp4, return_tensors="pt", encode_with=model)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**plain, **options))


def test_media_encoded_apart_are_joined_in_order(processor, model, mp4):
    parts = [encode_video(model, stream) for stream in processor.video_processor.stream([mp4, random_frames(2)])]
    joined = join_media(parts)
    assert torch.equal(joined.last_hidden_state, torch.cat([part.last_hidden_state for part in parts]))
    assert [len(pooled) for pooled in joined.pooler_output] == [6 * 9, 2 * 9]
    assert join_media(parts[:1]).last_hidden_state is parts[0].last_hidden_state


# -- how much of it exists at once ------------------------------------------------------------------------------------


def frames_alive() -> float:
    """Frames of the encoder's size that tensors of this process hold, whatever their type and whoever has them."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.ndim >= 3 and thing.shape[-3:] == (3, SIDE, SIDE):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes() / (3 * SIDE * SIDE * thing.element_size())
    return sum(storages.values())


@contextmanager
def most_frames_alive(model) -> Iterator[list[float]]:
    """What `frames_alive` says whenever the encoder begins to work, beyond what there was before."""
    before = frames_alive()
    seen: list[float] = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append(frames_alive() - before))
    yield seen
    hook.remove()


def test_the_count_of_frames_alive_sees_a_whole_video(processor, model, mp4):
    with most_frames_alive(model) as seen:
        inputs = inputs_of(processor, mp4, fps=FPS)
        model.generate(**inputs, max_new_tokens=1)
    assert seen[-1] >= NUM_FRAMES


def encode_by_processor(processor, model, video) -> None:
    inputs_of(processor, video, video, fps=FPS, encode_with=model)


def encode_by_pipeline(processor, model, video) -> None:
    pipe = VideoTextToTextPipeline(model=model, processor=processor, device="cpu")
    pipe(chat_of(video), processor_kwargs={"fps": FPS}, max_new_tokens=1)
    pipe([chat_of(video), chat_of(video)], batch_size=2, processor_kwargs={"fps": FPS}, max_new_tokens=1)


def encode_by_conversation(processor, model, video) -> None:
    conversation = VideoConversation(model, processor, read_video(processor, video, fps=FPS))
    conversation.ask("Why?", max_new_tokens=1)
    assert len(conversation.pictures()) == NUM_FRAMES


@pytest.mark.parametrize("encode", [encode_by_processor, encode_by_pipeline, encode_by_conversation])
def test_no_more_than_a_chunk_of_pixels_exists_while_a_video_is_encoded(processor, model, mp4, encode):
    chunk = 16 if encode is encode_by_conversation else CHUNK  # it is read before there is a model
    with most_frames_alive(model) as seen:
        encode(processor, model, io.BytesIO(mp4))
    assert len(seen) >= NUM_FRAMES // CHUNK
    assert max(seen) <= chunk


def test_no_chunk_is_kept_while_the_next_is_decoded(processor, model, mp4, monkeypatch):
    [stream] = processor.video_processor.stream(mp4, chunk_size=CHUNK, fps=FPS)
    read, seen = stream._read, []

    def watched():
        chunks = read()
        while True:
            seen.append(frames_alive() - before)
            chunk = next(chunks, None)
            if chunk is None:
                return
            held = [chunk]
            del chunk
            yield held.pop()

    monkeypatch.setattr(stream, "_read", watched)
    before = frames_alive()
    encode_video(model, stream)
    assert len(seen) == NUM_FRAMES // CHUNK + 2
    assert max(seen) == 0


# -- ordinary users ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_answers_as_from_pixels(processor, model, mp4, batch_size):
    pipe = VideoTextToTextPipeline(model=model, processor=processor, device="cpu")
    videos = [(mp4,), (random_frames(3), mp4), ()]
    records = pipe(
        [chat_of(*group) for group in videos],
        batch_size=batch_size,
        processor_kwargs={"num_frames": 3},
        return_full_text=False,
        max_new_tokens=4,
        generate_kwargs={"do_sample": False},
    )
    for group, [record] in zip(videos, records, strict=True):
        inputs = inputs_of(processor, *group, num_frames=3)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record["generated_text"] == expected


def test_worker_processes_of_the_pipeline_decode_only(processor, model, mp4, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4)
    pipe = VideoTextToTextPipeline(model=model, processor=processor, device="cpu")
    options = {"processor_kwargs": {"num_frames": 3}, "max_new_tokens": 3, "return_full_text": False}
    options |= {"generate_kwargs": {"do_sample": False}}
    alone = pipe([chat_of(str(path))] * 2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of processes that fork
        gc.collect()  # pictures that other tests left behind hold FFmpeg threads, which a forked worker cannot end
        assert pipe([chat_of(str(path))] * 2, num_workers=1, **options) == alone
