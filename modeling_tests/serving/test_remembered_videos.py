"""Several questions about one video share the work."""

import shutil
import threading

import pytest
from served import FPS, QUESTIONS, SECONDS, Server, data_url, openai, user

from transformers_crosslmm import CrossLMMProcessor
from transformers_crosslmm.serving import strangers_videos
from transformers_crosslmm.serving.remembered_videos import BoundedCache


@pytest.fixture
def work(server, forget):
    """Frames through the vision tower, and lengths of what went through the language model at once."""
    frames, lengths = [], []
    model = server.handler.model.model.model
    hooks = [
        model.vision_tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0]))),
        model.language_model.layers[1].mlp.register_forward_pre_hook(
            lambda module, args: lengths.append(args[0].shape[1])
        ),
    ]
    yield frames, lengths
    for hook in hooks:
        hook.remove()


def test_several_questions_encode_and_prefill_their_video_once(server, generated, clip, work):
    frames, lengths = work
    before = server.number("crosslmm_encoded_frames_total")
    for question in (*QUESTIONS, *QUESTIONS):
        assert server.answer(question, clip) == generated([user(question, clip)])
    assert server.answer(QUESTIONS[0], data_url(clip)) == generated([user(QUESTIONS[0], clip)])
    assert sum(frames) == SECONDS
    assert sum(length > SECONDS * 9 for length in lengths) == 1
    assert server.number("crosslmm_encoded_frames_total") == before + SECONDS
    assert server.number('crosslmm_cache_lookups_total{kind="prefix",result="hit"}') >= 4


def test_a_checkpoint_that_skips_unchanged_frames_does_so_in_a_server(root, clip, generated, tmp_path):
    skipping = CrossLMMProcessor.from_pretrained(root / "checkpoint")
    shutil.copytree(root / "checkpoint", tmp_path / "skipping")
    skipping.video_processor.skip_unchanged = 8  # what the codec changes in a picture that stays
    skipping.save_pretrained(tmp_path / "skipping")
    server = Server(tmp_path / "skipping", allowed_folders=(root / "videos",))
    try:
        server.answer(QUESTIONS[0], clip, sampling={"fps": FPS})
        assert server.number("crosslmm_encoded_frames_total") == SECONDS
        [media] = [entry.media for entry, _ in server.handler.cache._entries.values() if hasattr(entry, "media")]
        assert media.frame_index == tuple(second for second in range(SECONDS) for _ in range(FPS))
    finally:
        server.stop()


def test_questions_at_the_same_time_encode_once_too(server, clip, work):
    frames, _ = work
    threads = [threading.Thread(target=server.answer, args=(f"{QUESTIONS[0]} {i}", clip)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(frames) == SECONDS


def test_another_system_prompt_prefills_again_and_encodes_no_more(server, clip, work):
    frames, lengths = work
    for system in ("Be brief.", "Be long."):
        server.answer(QUESTIONS[0], clip, system=system)
    assert sum(frames) == SECONDS
    assert sum(length > SECONDS * 9 for length in lengths) == 2


def test_another_sampling_is_another_video(server, generated, clip, work):
    """Asked in turn, so that an answer made from what the one before remembered would show."""
    samplings = [{"num_frames": 3}, {"num_frames": 5}, {"fps": 2}, {"times": [0.5, 4.5, 6.5]}, {"start_seconds": 4}]
    chat = [user(QUESTIONS[0], clip)]
    expected = [generated(chat, sampling) for sampling in samplings]
    for _ in range(2):
        answers = [server.answer(QUESTIONS[0], clip, sampling=sampling) for sampling in samplings]
        assert answers == expected
        assert len(set(answers)) == len(answers)
    assert sum(work[0]) == 3 + 5 + 2 * SECONDS + 3 + 3


def test_a_file_with_new_content_is_a_new_video(server, generated, root, clip):
    path = root / "videos/changing.mp4"
    answers = []
    for name in ("one.mp4", "two.mp4", "one.mp4"):
        path.write_bytes((root / "videos" / name).read_bytes())
        answers.append(server.answer(QUESTIONS[0], path))
    two = generated([user(QUESTIONS[0], root / "videos/two.mp4")])
    assert answers == [generated([user(QUESTIONS[0], clip)]), two, generated([user(QUESTIONS[0], clip)])]
    assert answers[0] != answers[1]


def test_a_video_that_grows_while_it_is_read_is_refused(server, root, clip, monkeypatch, forget):
    path = root / "videos/growing.mp4"
    path.write_bytes(clip.read_bytes())
    decode = strangers_videos.decode_video

    def grow_and_decode(*arguments, **options):
        with open(path, "ab") as file:
            file.write(b"more")
        return decode(*arguments, **options)

    monkeypatch.setattr(strangers_videos, "decode_video", grow_and_decode)
    with pytest.raises(openai.BadRequestError, match="changed while it was read"):
        server.answer(QUESTIONS[0], path)
    assert len(server.handler.cache) == 0


def test_the_cache_holds_no_more_than_it_may():
    cache = BoundedCache(max_bytes=100, max_entries=3)
    for key, size in (("a", 40), ("b", 40), ("c", 20)):
        cache.put(key, key.upper(), size)
    assert (cache.get("a"), cache.num_bytes, len(cache)) == ("A", 100, 3)
    cache.put("d", "D", 10)  # entries: b was used longest ago
    assert (cache.get("b"), cache.num_bytes, len(cache)) == (None, 70, 3)
    cache.put("e", "E", 90)  # bytes
    assert (cache.get("c"), cache.get("a"), cache.get("d"), cache.get("e")) == (None, None, "D", "E")
    cache.put("e", "E", 30)
    assert cache.num_bytes == 40
    cache.put("f", "F", 101)
    assert (cache.get("f"), cache.num_bytes) == (None, 40)
    cache.clear()
    assert (cache.num_bytes, len(cache)) == (0, 0)


@pytest.mark.parametrize("limits", [{"cache_entries": 1}, {"cache_bytes": 1000}, {"cache_entries": 0}])
def test_a_small_cache_changes_no_answer(started, generated, root, limits):
    server = started(**limits)
    for name in ("one.mp4", "two.mp4", "one.mp4"):
        video = root / "videos" / name
        assert server.answer(QUESTIONS[1], video) == generated([user(QUESTIONS[1], video)])
    assert len(server.handler.cache) <= limits.get("cache_entries", 64)
    assert server.handler.cache.num_bytes <= limits.get("cache_bytes", 4 * 1024**3)


def test_what_the_cache_counts_is_what_it_holds(server, clip, forget):
    """Patches of one video: encoded, and T2V keys and values in each cross-attention layer."""
    server.answer(QUESTIONS[0], clip)
    config = server.handler.model.model.config
    patches, text = SECONDS * 25, config.text_config
    encoded = patches * 20 + SECONDS * 9 * text.hidden_size
    layers = len(config.cross_attention_layer_indices)
    visual = 2 * layers * patches * 2 * config.head_dim
    positions = next(len(key[1]) for key in server.handler.cache._entries if key[0] == "prefix")
    language = 2 * text.num_hidden_layers * positions * 2 * 8
    held = 4 * (encoded + visual + language)
    assert held <= server.handler.cache.num_bytes <= held + 64  # lengths are tensors too
