"""CrossLMM in vLLM, on vLLM's CPU build: an environment of its own, `make vllm-environment`."""

import base64
import functools
import http.server
import io
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from factories import mp4_of, random_frames, tiny_config
from loopback import served_by
from pretend_gpu import pretend_gpus

pytest.importorskip("vllm", reason="needs vLLM: `make vllm-environment`")

from vllm.forward_context import override_forward_context
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm_cases import (
    CHECKPOINTS,
    IMAGE,
    MAX_TOKENS,
    VIDEO,
    Request,
    answer_to_chat,
    answers,
    as_messages,
    ask,
    engine,
    margins,
    mixed_requests,
    save,
)

from transformers_crosslmm import CrossLMMProcessor
from transformers_crosslmm.serving.vllm.rules import CrossLMMRules
from transformers_crosslmm.serving.vllm.visual_cache import VisualCache, VisualCacheMetadataBuilder

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save("qwen2", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "clip.mp4").write_bytes(mp4_of(random_frames(6), fps=1))
    Image.fromarray(random_frames(1, seed=5)[0]).save(folder / "picture.png")
    (folder / "hostile.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 40)
    Image.new("1", (6000, 6000)).save(folder / "bomb.png")
    return folder


@pytest.fixture(scope="module")
def server(clips):
    with served_by(functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clips))) as url:
        yield url


@pytest.fixture(scope="module")
def llm(folder, clips):
    with engine(folder, allowed_local_media_path=str(clips)) as llm:
        yield llm


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How many media were encoded, and how many positions the language model was run at."""
    from transformers_crosslmm.serving.vllm.model import CrossLMMForVllm

    counts = {"media": 0, "positions": 0}
    embed, forward = CrossLMMForVllm.embed_multimodal, CrossLMMForVllm.forward

    def counted_embed(self, **kwargs):
        rows = embed(self, **kwargs)
        counts["media"] += len(rows)
        return rows

    def counted_forward(self, input_ids, positions, *args, **kwargs):
        counts["positions"] += positions.shape[-1]
        return forward(self, input_ids, positions, *args, **kwargs)

    monkeypatch.setattr(CrossLMMForVllm, "embed_multimodal", counted_embed)
    monkeypatch.setattr(CrossLMMForVllm, "forward", counted_forward)
    return counts


@pytest.fixture
def encoded(monkeypatch) -> list[torch.Tensor]:
    """The pixels of pictures, and of videos, as they come to the encoder."""
    from transformers_crosslmm.serving.vllm.model import CrossLMMForVllm

    pixels = []
    embed = CrossLMMForVllm.embed_multimodal

    def kept(self, **kwargs):
        pixels.extend(kwargs[name] for name in ("pixel_values_videos", "pixel_values") if name in kwargs)
        return embed(self, **kwargs)

    monkeypatch.setattr(CrossLMMForVllm, "embed_multimodal", kept)
    return pixels


def chat(llm, content, **kwargs) -> tuple[str, list[int]]:
    """The prompt that vLLM made of a message with these parts, or of messages, and what it wrote."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    (output,) = llm.chat(as_messages(content), sampling, use_tqdm=False, **kwargs)
    return output.prompt_token_ids, list(output.outputs[0].token_ids)


# --- Equal to `generate` ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_requests_are_answered_as_generate_does(name, tmp_path):
    """200 mixed requests over five checkpoints: all at once, again from the cache, one by one, with small steps, with
    few blocks, so that requests are preempted, and with n-gram speculation."""
    folder, seed = save(name, tmp_path), list(CHECKPOINTS).index(name)
    requests = mixed_requests(40, seed=seed)
    if name == "qwen2":
        requests.append(Request(f"A long one: {VIDEO} What?", [random_frames(300)]))
    expected = answers(folder, requests)
    with engine(folder) as llm:
        assert ask(llm, requests) == expected
        assert ask(llm, requests) == expected
        assert ask(llm, requests[:12], one_by_one=True) == expected[:12]
    for settings in (
        {"max_num_batched_tokens": 64, "max_num_seqs": 8},
        {"max_num_batched_tokens": 200, "max_num_seqs": 8},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
    ):
        with engine(folder, **settings) as llm:
            assert ask(llm, requests) == expected
    fits = [number for number, request in enumerate(requests) if sum(map(len, request.videos)) < 100]
    with engine(folder, num_gpu_blocks_override=45, max_model_len=1408) as llm:
        assert ask(llm, [requests[number] for number in fits]) == [expected[number] for number in fits]
        preempted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        assert preempted["vllm:num_preemptions"] > 0


@pytest.mark.slow
def test_two_ranks_answer_as_one(folder):
    requests = mixed_requests(24, seed=7)
    expected = answers(folder, requests)
    with engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert ask(llm, requests) == expected


@pytest.mark.slow
def test_in_half_precision_answers_part_only_where_the_reference_is_undecided(folder):
    """Where a token differs, the reference rates both within what bfloat16 rounds away."""
    requests = mixed_requests(24, seed=8)
    expected = answers(folder, requests, dtype=torch.bfloat16)
    with engine(folder, dtype="bfloat16") as llm:
        written = ask(llm, requests)
    parted = [number for number, one in enumerate(written) if one != expected[number]]
    for number in parted:
        gap, rounding = margins(folder, requests[number], expected[number], written[number])
        assert gap <= 2 * rounding, (number, gap, rounding)
    assert len(parted) <= len(requests) // 4


# The end of any other engine ends `llm`, so tests with an engine of their own stand above.


def test_mixed_requests_are_answered_as_generate_does(llm, folder):
    requests = mixed_requests(10, seed=99, longest_video=20)
    expected = answers(folder, requests)
    assert ask(llm, requests) == expected
    assert ask(llm, requests) == expected
    assert ask(llm, requests[:3], one_by_one=True) == expected[:3]


# --- The prefix cache ------------------------------------------------------------------------------------------------


def test_a_second_question_costs_its_own_tokens(llm, folder, counted):
    """The block of the cache that both questions share in part is computed again: 32 tokens at most."""
    begin = f"A video: {VIDEO} and what was said about it before, which is longer than a block is. "
    first, second = Request(begin + "What?", [random_frames(20, seed=50)]), Request(begin + "Where is it?")
    second.videos = first.videos
    ask(llm, [first])
    assert counted["media"] == 1
    assert counted["positions"] > 9 * 20
    for other in (None, *mixed_requests(6, seed=51)):  # at once, and after other traffic
        if other is not None:
            ask(llm, [other])
        counted.update(media=0, positions=0)
        assert ask(llm, [second]) == answers(folder, [second])
        assert counted["media"] == 0
        assert counted["positions"] <= len("Where is it?") + 32 + MAX_TOKENS
        second.text += "?"


def test_a_hit_that_ends_within_a_video_leaves_its_tokens_right(llm, folder, counted):
    """The rest of the video attends to patches of which the cache holds one part and the step the other."""
    video = random_frames(11, seed=60)  # 99 tokens: no multiple of a block
    ask(llm, [Request(f"{VIDEO} What?", [video])])
    second = Request(f"{VIDEO} And now?", [video])
    counted.update(media=0, positions=0)
    assert ask(llm, [second]) == answers(folder, [second])
    assert counted["media"] == 0
    assert counted["positions"] < 99


# --- Media in every form, from anybody -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "data", "url"])
def test_videos_and_images_come_in_every_form(llm, folder, clips, server, form, monkeypatch):
    from transformers_crosslmm.serving.vllm.media import CrossLMMConnector

    video, picture = clips / "clip.mp4", clips / "picture.png"
    names = [path.as_uri() for path in (video, picture)]
    if form == "data":
        kinds = zip(("video/mp4", "image/png"), (video, picture), strict=True)
        names = [f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" for kind, path in kinds]
    if form == "url":
        limits = CrossLMMConnector.limits
        monkeypatch.setattr(CrossLMMConnector, "limits", type(limits)(allow_private_addresses=True))
        names = [f"{server}/{path.name}" for path in (video, picture)]
    parts = [{"type": "text", "text": "Look: "}]
    asked = [
        {"type": "video_url", "video_url": {"url": names[0]}},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": {"url": names[1]}},
        {"type": "text", "text": " What?"},
    ]
    files = [{"type": "video", "path": str(video)}, asked[1], {"type": "image", "path": str(picture)}, asked[3]]
    assert chat(llm, parts + asked) == answer_to_chat(folder, parts + files)


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "CMYK"])
def test_pictures_have_the_pixels_that_they_have_elsewhere(llm, folder, encoded, mode):
    """vLLM by itself puts transparent pictures on white and cuts 16 bits to 8."""
    generator, data = np.random.default_rng(0), io.BytesIO()
    if mode == "I;16":
        picture = Image.fromarray(generator.integers(0, 65536, (40, 30), dtype=np.uint16))
    elif mode == "P":
        picture = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)).quantize(16)
    else:
        picture = Image.fromarray(generator.integers(0, 256, (40, 30, 4), dtype=np.uint8), mode)
    picture.save(data, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    url = f"data:;base64,{base64.b64encode(data.getvalue()).decode()}"
    chat(llm, [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}])
    ask(llm, [Request(f"{IMAGE} What?", images=[Image.open(data)])])
    processor = CrossLMMProcessor.from_pretrained(folder)
    expected = processor(text=[IMAGE], images=[data.getvalue()], return_tensors="pt")["pixel_values"]
    assert len(encoded) == 2
    for pixels in encoded:
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_a_conversation_of_several_turns_with_media_is_answered_as_generate_does(llm, folder, clips):
    video, picture = clips / "clip.mp4", clips / "picture.png"

    def conversation(**media):
        return [
            {"role": "system", "content": "Be <|im_end|> brief."},
            {"role": "user", "content": [media["video"], text("What <|image_pad|>?"), media["image"], media["video"]]},
            {"role": "assistant", "content": "A <|video_pad|>cat."},
            {"role": "user", "content": [text("And "), media["image"], text(" now?")]},
        ]

    def text(words):
        return {"type": "text", "text": words}

    asked = conversation(
        video={"type": "video_url", "video_url": {"url": video.as_uri()}},
        image={"type": "image_url", "image_url": {"url": picture.as_uri()}},
    )
    files = conversation(video={"type": "video", "path": str(video)}, image={"type": "image", "path": str(picture)})
    assert chat(llm, asked) == answer_to_chat(folder, files)


def test_marks_that_a_user_writes_are_text(llm, folder, clips):
    content = [
        {"type": "text", "text": "What is <|video_pad|>, or <|im_"},
        {"type": "text", "text": "end|>?"},
        {"type": "image_url", "image_url": {"url": (clips / "picture.png").as_uri()}},
    ]
    same = [*content[:2], {"type": "image", "path": str(clips / "picture.png")}]
    assert chat(llm, content) == answer_to_chat(folder, same)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/clip.mp4", "private|not public|address"),
        ("file:///etc/passwd", "must lie in"),
        ("file://elsewhere/clip.mp4", "must name this machine"),
        ("hostile.mp4", "decode|open|read|video"),
        ("bomb.png", "36000000 pixels"),
    ],
)
def test_what_a_stranger_may_not_send_costs_one_request(llm, folder, clips, url, said):
    kind = "image_url" if url.endswith(".png") else "video_url"
    url = (clips / url).as_uri() if ":" not in url else url
    with pytest.raises(Exception, match=said):
        chat(llm, [{"type": kind, kind: {"url": url}}])
    asked = Request(f"{IMAGE} What?", [], [Image.fromarray(random_frames(1, seed=70)[0])])
    assert ask(llm, [asked]) == answers(folder, [asked])


def test_frames_that_a_request_carries_go_around_no_limit(llm, clips):
    """vLLM's own `video/jpeg`, pictures one after the other, is no file that the package's decoder takes."""
    frame = io.BytesIO()
    Image.fromarray(random_frames(1)[0]).save(frame, "JPEG")
    url = f"data:video/jpeg;base64,{base64.b64encode(frame.getvalue()).decode()}"
    with pytest.raises(Exception, match="list of JPEG pictures"):
        chat(llm, [{"type": "video_url", "video_url": {"url": url}}])


def test_a_worker_of_a_corpus_answers_as_the_local_one_does(llm, folder, clips, tmp_path, monkeypatch):
    """From the same arguments; it opens no link that leads out of the root."""
    from transformers_crosslmm.serving.corpus import VideoAnswerer
    from transformers_crosslmm.serving.vllm.corpus import VllmVideoAnswerer

    monkeypatch.setattr("vllm.LLM", lambda *arguments, **options: llm)
    (tmp_path / "secret.mp4").write_bytes((clips / "clip.mp4").read_bytes())
    (clips / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "attempts").mkdir()
    options = {"model": str(folder), "root": str(clips), "attempts": str(tmp_path / "attempts"), "device": None}
    options |= {"max_new_tokens": 8, "num_threads": None, "sampling": {"num_frames": 4}}
    rows = []
    for worker in (VideoAnswerer(**options), VllmVideoAnswerer(**options)):
        for video in ("clip.mp4", "hostile.mp4", "link.mp4"):
            asked = [{"id": f"{video} {word}", "video": video, "question": f"{word}?"} for word in ("What", "Where")]
            rows += worker({"path": str(clips / video), "error": None, "questions": asked})
    assert [row["answer"] is not None for row in rows[:6]] == [True] * 2 + [False] * 4
    assert "must lie in" in rows[5]["error"]
    assert rows[6:] == rows[:6]


def test_a_question_that_is_too_long_costs_no_other_answer_and_no_second_look(llm, folder, clips, monkeypatch):
    from transformers_crosslmm.serving.vllm.corpus import CrossLMMVideoLoader, VllmVideoAnswerer

    decoded = []
    load = CrossLMMVideoLoader.load_bytes

    def counted(file, **sampling):
        decoded.append(file)
        return load(file, **sampling)

    monkeypatch.setattr(CrossLMMVideoLoader, "load_bytes", counted)
    monkeypatch.setattr("vllm.LLM", lambda *arguments, **options: llm)
    answerer = VllmVideoAnswerer(str(folder), str(clips), str(clips), max_new_tokens=8)
    # One is too long only with the video: vLLM would notice when it has put the video into its caches.
    texts = {"first": "What?", "almost": "Where? " * 579, "long": "Where? " * 8192, "last": "When?"}
    asked = [{"id": name, "video": "clip.mp4", "question": text} for name, text in texts.items()]
    rows = list(answerer({"path": str(clips / "clip.mp4"), "error": None, "questions": asked}))
    assert [row["id"] for row in rows if row["error"] is None] == ["first", "last"]
    assert all("tokens" in row["error"] for row in rows if row["error"] is not None)
    assert len(decoded) == 1


@pytest.mark.parametrize(
    ("sampling", "frames"),
    [({"num_frames": 4}, 4), ({"max_frames": 400}, 400), ({"times": [0.5 * number for number in range(350)]}, 350)],
    ids=["num_frames", "max_frames", "times"],
)
def test_a_worker_of_a_corpus_has_room_for_the_frames_that_are_asked_for(folder, monkeypatch, sampling, frames):
    """Also for more than the checkpoint samples by itself."""
    from transformers_crosslmm.serving.vllm.corpus import VllmVideoAnswerer

    monkeypatch.setattr("vllm.LLM", lambda *arguments, **options: options)
    answerer = VllmVideoAnswerer(str(folder), "", "", sampling=sampling)
    assert answerer.llm["limit_mm_per_prompt"]["video"]["num_frames"] == frames


def test_a_worker_of_a_corpus_computes_as_precisely_as_the_local_one(folder, monkeypatch):
    """vLLM by itself takes 16 bits."""
    from transformers_crosslmm.serving.corpus import VideoAnswerer
    from transformers_crosslmm.serving.vllm.corpus import VllmVideoAnswerer

    monkeypatch.setattr("vllm.LLM", lambda *arguments, **options: options)
    local = VideoAnswerer(str(folder), "", "", device="cpu")
    assert VllmVideoAnswerer(str(folder), "", "").llm.get("dtype") == str(local.model.dtype).removeprefix("torch.")


def test_no_request_chooses_another_decoder_or_raises_a_limit(llm, clips):
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from transformers_crosslmm.serving.vllm.media import CrossLMMVideoLoader

    assert "opencv" in VIDEO_LOADER_REGISTRY.name2class
    assert set(VIDEO_LOADER_REGISTRY.name2class.values()) == {CrossLMMVideoLoader}
    data = (clips / "clip.mp4").read_bytes()
    with pytest.raises(ValueError, match="limits"):
        CrossLMMVideoLoader.load_bytes(data, limits={"max_frames": 9})
    with pytest.raises(ValueError, match="300 frames; got 301"):
        CrossLMMVideoLoader.load_bytes(data, num_frames=301)


def test_more_frames_than_the_server_takes_are_refused(llm):
    asked = Request(f"{VIDEO} What?", [np.zeros((310, 33, 33, 3), dtype=np.uint8)]).for_vllm()
    with pytest.raises(Exception, match="2709 embedding tokens"):  # of 301 frames
        llm.generate([asked | {"mm_processor_kwargs": {"num_frames": 301}}], use_tqdm=False)


def test_options_of_a_request_say_what_to_look_at_and_nothing_else(llm, folder):
    video = random_frames(12, seed=80)
    asked = Request(f"{VIDEO} What?", [video]).for_vllm()
    with pytest.raises(ValueError, match="got encode_with"):
        llm.generate([asked | {"mm_processor_kwargs": {"encode_with": 1}}], use_tqdm=False)
    (output,) = llm.generate([asked | {"mm_processor_kwargs": {"num_frames": 3}}], use_tqdm=False)
    assert output.prompt_token_ids.count(CrossLMMProcessor.from_pretrained(folder).video_token_id) == 3 * 9


def test_frames_in_memory_have_the_clock_that_a_request_gives_them(llm):
    """The same frames at another rate are another video, also for the caches."""
    frames = random_frames(12, seed=81)
    for fps, count in ((1.0, 6), (2.0, 3)):
        asked = {"prompt": f"{VIDEO} What?", "multi_modal_data": {"video": [(frames, {"fps": fps})]}}
        (output,) = llm.generate([asked | {"mm_processor_kwargs": {"fps": 0.5}}], use_tqdm=False)
        assert output.prompt_token_ids.count(llm.get_tokenizer().convert_tokens_to_ids("<|video_pad|>")) == count * 9


def test_a_file_is_sampled_once_as_the_request_says(llm, clips, monkeypatch):
    """Also if the checkpoint itself samples fewer frames. Options for frames in memory are not ignored: they are
    refused, with the right name."""
    from transformers_crosslmm.serving.vllm.media import CrossLMMVideoLoader

    processor = llm.renderer.get_mm_processor().info.get_hf_processor()
    monkeypatch.setattr(processor.video_processor, "max_frames", 2)
    video = CrossLMMVideoLoader.load_bytes((clips / "clip.mp4").read_bytes(), num_frames=5)
    asked = {"prompt": f"{VIDEO} What?", "multi_modal_data": {"video": [video]}}
    (output,) = llm.generate([asked], use_tqdm=False)
    assert output.prompt_token_ids.count(processor.video_token_id) == 5 * 9
    with pytest.raises(ValueError, match=r"sampled already.*media_io_kwargs.*got num_frames"):
        llm.generate([asked | {"mm_processor_kwargs": {"num_frames": 3}}], use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fps": 1, "num_frames": 2}, "`num_frames`"),
        ({"num_frames": "3"}, "takes numbers; got '3'"),
        ({"num_frames": 2.5}, "takes numbers; got 2.5"),
        ({"num_frames": 0}, "at least 1"),
        ({"times": ["a"]}, "takes numbers"),
        ({"fps": float("nan")}, "positive number"),
    ],
)
def test_options_of_a_file_that_make_no_sense_are_the_clients_mistake(llm, clips, options, said):
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, merge_media_io_kwargs

    defaults = llm.llm_engine.vllm_config.model_config.multimodal_config.media_io_kwargs
    merged = merge_media_io_kwargs(defaults, {"video": options})
    connector = MEDIA_CONNECTOR_REGISTRY.load("crosslmm", merged, allowed_local_media_path=str(clips))
    with pytest.raises(ValueError, match=said):
        connector.fetch_video((clips / "clip.mp4").as_uri())


def test_unchanged_frames_are_left_out_as_elsewhere(llm, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    processor = CrossLMMProcessor.from_pretrained(folder)
    processor.video_processor.skip_unchanged = True
    processor.save_pretrained(tmp_path)
    served = llm.renderer.get_mm_processor().info.get_hf_processor()
    monkeypatch.setattr(served.video_processor, "skip_unchanged", True)
    videos = [random_frames(4, seed=seed).repeat(3, axis=0) for seed in (82, 83)]
    asked = Request(f"{VIDEO} and {VIDEO} What?", videos)
    assert ask(llm, [asked]) == answers(tmp_path, [asked])


def test_a_name_that_a_client_gives_to_its_media_says_nothing_about_anothers(llm, encoded):
    """vLLM would take the `uuid` for the content."""
    shown = []
    for seed in (84, 85):
        data = io.BytesIO()
        Image.fromarray(random_frames(1, seed=seed)[0]).save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        part = {"type": "image_url", "image_url": {"url": url}, "uuid": "mine"}
        chat(llm, [part, {"type": "text", "text": "What?"}])
        shown.append(encoded[-1])
    assert not torch.equal(*shown)
    with pytest.raises(ValueError, match="must be sent"):
        chat(llm, [{"type": "image_url", "image_url": None, "uuid": "mine"}, {"type": "text", "text": "What?"}])


def test_after_a_question_that_is_too_long_the_next_about_the_same_video_is_answered(llm, folder):
    asked = Request(VIDEO + "Where? " * 580, [random_frames(8, seed=89)])
    with pytest.raises(Exception, match="maximum model length"):
        ask(llm, [asked])
    asked.text = f"{VIDEO} Where?"
    assert ask(llm, [asked]) == answers(folder, [asked])


@pytest.mark.parametrize(("marks", "said"), [(0, "got 0 for 1"), (2, "got 2 for 1")])
def test_marks_and_media_that_disagree_are_refused_and_cost_no_other_request(llm, folder, marks, said):
    asked = Request(VIDEO * marks + "What?", [random_frames(3, seed=86 + marks)])
    with pytest.raises(ValueError, match=said):
        ask(llm, [asked])
    asked.text = f"{VIDEO} What?"
    assert ask(llm, [asked]) == answers(folder, [asked])


# --- Ready for a GPU -------------------------------------------------------------------------------------------------


class StepsOnGpu:
    """A cache on a GPU that is not there, and steps of requests that share nothing: the first blocks belong to the
    first, and so on. Block 0 is nobody's."""

    def __init__(self, config, *, num_requests: int, device: str) -> None:
        self.cache = VisualCache(config, fake_vllm_config(), "visual_cache.5")
        self.blocks, self.num_requests, self.device = 8, num_requests, device
        width, count = self.cache.layout.slot_width, 1 + self.blocks * num_requests
        # What was there before looks like patches of media.
        self.cache.kv_cache = torch.ones(count, 1, 16, width, dtype=torch.float32).to(device)
        table = torch.arange(1, count, dtype=torch.int32).view(num_requests, self.blocks)
        self.table = table.to(device)
        self.lengths = torch.zeros(num_requests, dtype=torch.int32)

    def run(self, tokens: list[int], rows=(), is_placeholder=None, *, padding: int = 0, watch=None) -> None:
        """A step with so many new tokens of each request, then padding as CUDA graphs need it."""
        ends = self.lengths + torch.tensor(tokens, dtype=torch.int32)
        starts = [0, *np.cumsum(tokens).tolist()]
        positions = torch.cat([torch.arange(a, b) for a, b in zip(self.lengths.tolist(), ends.tolist(), strict=True)])
        request = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens))
        slots = (1 + request * self.blocks + positions // 16) * 16 + positions % 16
        common = CommonAttentionMetadata(
            query_start_loc=torch.tensor(starts + [starts[-1]] * padding, dtype=torch.int32).to(self.device),
            query_start_loc_cpu=torch.tensor(starts + [starts[-1]] * padding, dtype=torch.int32),
            seq_lens=torch.cat([ends, torch.zeros(padding, dtype=torch.int32)]).to(self.device),
            seq_lens_cpu_upper_bound=torch.cat([ends, torch.zeros(padding, dtype=torch.int32)]),
            num_reqs=len(tokens) + padding,
            num_actual_tokens=len(slots) + padding,
            max_query_len=max(tokens),
            max_seq_len=int(ends.max()),
            block_table_tensor=torch.cat([self.table, self.table[:1].expand(padding, -1) * 0]),
            slot_mapping=torch.cat([slots, torch.full((padding,), -1)]).to(self.device),
        )
        if is_placeholder is not None:
            self.cache.take_media([some.to(self.device) for some in rows], is_placeholder)
        with (
            override_forward_context(SimpleNamespace(attn_metadata={"visual_cache.5": common})),
            watch or nullcontext(),
        ):
            self.cache.begin_step()
        self.lengths = ends


def fake_vllm_config():
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def steps_with_media(num_requests: int, device: str) -> tuple[StepsOnGpu, torch.Tensor]:
    """Requests of which all but the second have a video, of 1, 2, … frames, after three tokens of text; and all
    patches."""
    config = tiny_config(pooled_grid_size=2)
    steps = StepsOnGpu(config, num_requests=num_requests, device=device)
    layout = steps.cache.layout
    patches = torch.randn(num_requests, num_requests, 25, 20)
    frames = [0 if number == 1 else number + 1 for number in range(num_requests)]
    rows = [
        layout.rows(torch.zeros(count * 4, 48), patches[number, :count])
        for number, count in enumerate(frames)
        if count
    ]
    is_placeholder = torch.cat([torch.arange(3 + count * 4) >= 3 for count in frames])
    steps.run([3 + count * 4 for count in frames], rows, is_placeholder)
    return steps, patches


def test_a_decode_step_neither_waits_for_the_gpu_nor_looks_at_requests_one_by_one():
    with pretend_gpus() as traffic:
        operations = []
        for num_requests in (3, 6):
            steps, patches = steps_with_media(num_requests, "cuda:0")
            query = torch.randn(num_requests, 6, 20).to("cuda:0")
            traffic.clear()
            counted = CountedOperations()
            steps.run([1] * num_requests, padding=2, watch=counted)
            with counted:
                attended = steps.cache.step.paged.attend(query, 0.3)
            operations.append(counted.numbers)
            assert not traffic.waits
            assert steps.cache.step.t2v is None
            rows = steps.cache.step.paged.rows.cpu()[:, 0].tolist()
            for place, number in enumerate(rows):
                seen = patches[number, : 0 if number == 1 else number + 1].flatten(0, 1)
                exact = (query[place].cpu() @ seen.T * 0.3).softmax(-1) @ seen
                torch.testing.assert_close(attended[place].cpu(), exact if len(seen) else torch.zeros(6, 20))
        assert operations[0] == operations[1]


def test_padding_of_a_step_touches_no_slot():
    steps, _ = steps_with_media(3, "cpu")
    before = steps.cache.kv_cache.clone()
    steps.run([1, 1, 1], padding=5)
    changed = (steps.cache.kv_cache != before).any(-1)
    own = {
        (1 + number * 8 + (length - 1) // 16, (length - 1) % 16)
        for number, length in enumerate(steps.lengths.tolist())
    }
    assert {(int(block), int(slot)) for block, _, slot in changed.nonzero()} <= own


def test_cross_attention_stays_out_of_cuda_graphs(folder):
    """vLLM cuts its graphs where the operation stands, as it does at self-attention."""
    from vllm.config import CompilationMode

    config = SimpleNamespace(_attention_ops=["vllm::unified_attention"], mode=CompilationMode.VLLM_COMPILE)
    CrossLMMRules.keep_out_of_graphs(config)
    assert config._attention_ops[-1] == "crosslmm::cross_attention"
    assert VisualCacheMetadataBuilder._cudagraph_support is AttentionCGSupport.NEVER


class CountedOperations(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.numbers[str(func)] += 1
        return func(*args, **(kwargs or {}))


# --- Refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism|Pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV transfer"),
        ({"enable_dbo": True}, "dual batch overlap"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "context parallelism"),
        ({"mm_encoder_attn_dtype": "fp8"}, "mm_encoder_attn_dtype"),
        ({"mm_encoder_attn_backend": "TORCH_SDPA"}, "mm_encoder_attn_backend"),
        ({"video_pruning_rate": 0.5}, "video_pruning_rate"),
    ],
)
def test_settings_that_would_change_answers_are_refused(folder, settings, said):
    with pytest.raises(Exception, match=said), engine(folder, **settings):
        pass


def test_speculation_by_a_draft_model_is_refused(folder):
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    with pytest.raises(Exception, match="speculation by 'draft_model'"), engine(folder, speculative_config=draft):
        pass


@pytest.mark.parametrize("setting", ["time_instruction", "add_timestamps"])
def test_processors_that_write_times_into_prompts_are_refused(folder, tmp_path, setting):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CrossLMMProcessor.from_pretrained(folder, **{setting: True}).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=f"`{setting}`.*crosslmm serve"), engine(tmp_path):
        pass


def test_a_language_model_that_the_plugin_does_not_know_is_refused(folder):
    config = SimpleNamespace(hf_config=SimpleNamespace(text_config=SimpleNamespace(model_type="olmo")))
    with pytest.raises(ValueError, match=r"qwen2, qwen3, llama, mistral; got 'olmo'.*crosslmm serve"):
        CrossLMMRules.verify_and_update_model_config(config)
