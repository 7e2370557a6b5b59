"""Records: files and mixtures, and the chat that a record of any form is."""

import json
import math
import re

import pytest
import torch

from factories import mp4_of, random_frames, tiny_processor
from transformers_crosslmm.training.datasets import CrossLMMDataset, find_broken
from transformers_crosslmm.training.records import RecordFile, UnusableSample, chat_of, load_records
from transformers_crosslmm.training.samples import IGNORED, encode_chat


def record(*turns: str, **media) -> dict:
    """A LLaVA record of these turns, the human's first."""
    return {**media, "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}


def video_record(name: str = "three.mp4", question: str = "<image>\nWhat?", answer: str = "A cat.") -> dict:
    return record(question, answer, video=name)


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


# --- records ---------------------------------------------------------------------------------------------------------


def parts_of(record) -> list:
    return [part.get("text", part) for message in chat_of(record) for part in message["content"]]


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        (record("<image>\nWhat?", "A.", image="a.png"), [{"type": "image", "image": "a.png"}, "What?", "A."]),
        (record("<image>\nWhat?", "A.", video="a.mp4"), [{"type": "video", "video": "a.mp4"}, "What?", "A."]),
        (record("What?\n<video>", "A.", video=["a.mp4"]), ["What?", {"type": "video", "video": "a.mp4"}, "A."]),
        (
            record("<video>then<image>", "A.", "and <image>", "B.", image=["a.png", "b.png"], video="c.mp4"),
            [
                {"type": "video", "video": "c.mp4"},
                "then",
                {"type": "image", "image": "a.png"},
                "A.",
                "and ",
                {"type": "image", "image": "b.png"},
                "B.",
            ],
        ),
        (record("Hello", "A <image> is a picture."), ["Hello", "A <image> is a picture."]),
    ],
    ids=["image", "video-written-as-image", "list-and-mark-at-the-end", "several", "text"],
)
def test_llava_marks_become_media_where_they_stand(written, parts):
    assert parts_of(written) == parts


def test_messages_take_media_from_their_parts_or_from_columns_in_order():
    turns = [
        {
            "role": "user",
            "content": [{"type": "video", "text": None}, {"type": "text", "text": "and"}, {"type": "image"}],
        },
        {"role": "assistant", "content": "Yes, <video> indeed."},
    ]
    expected = [{"type": "video", "video": "a.mp4"}, "and", {"type": "image", "image": b"b"}, "Yes, <video> indeed."]
    assert parts_of({"messages": turns, "videos": ["a.mp4"], "image": b"b"}) == expected
    turns[0]["content"][0]["path"], turns[0]["content"][2]["image"] = "a.mp4", b"b"
    expected[0] = {"type": "video", "path": "a.mp4"}
    assert parts_of({"messages": turns, "videos": None}) == expected


def test_marks_in_a_prompt_are_the_places_of_its_media():
    asked = {"prompt": "First <video>\nthen <|image|>.", "response": "A.", "video": "a.mp4", "image": "b.png"}
    parts = ["First ", {"type": "video", "video": "a.mp4"}, "then ", {"type": "image", "image": "b.png"}, ".", "A."]
    assert parts_of(asked) == parts
    assert parts_of({"question": "What does <image> do?", "answer": "A."}) == ["What does <image> do?", "A."]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_begins_the_chat(name):
    for written in (record("What?", "A."), {"prompt": "What?", "response": "A."}):
        assert chat_of(written | {name: "Be brief."})[0] == {
            "role": "system",
            "content": [{"type": "text", "text": "Be brief."}],
        }
        assert [message["role"] for message in chat_of(written | {name: None})] == ["user", "assistant"]


def test_a_table_of_chats_of_both_forms_gives_the_chat_of_either():
    """`datasets` fills in None for the names that the other form has."""
    llava = {"from": "human", "value": "<video>What?", "role": None, "content": None}
    ours = {"from": None, "value": None, "role": "assistant", "content": "A."}
    expected = [{"type": "video", "video": "a.mp4"}, "What?", "A."]
    assert parts_of({"conversations": [llava, ours], "video": "a.mp4", "messages": None}) == expected


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ([], "an object with"),
        ({"id": 1}, "needs `conversations` or `messages`"),
        ({"conversations": "hello"}, "a list of at least one turn"),
        (record("<image>\nWhat?", "A."), "0 images and 0 videos for 1 places"),
        (record("What?", "A.", video="a.mp4"), "1 videos for 0 places"),
        (record("<image><image>", "A.", video="a.mp4"), "1 videos for 0 places of images and 2 of videos"),
        (record("What?", "<image>", image="a.png"), "1 images and 0 videos for 0 places"),
        (record("What?", " \n"), "nothing to learn"),
        (record("What?"), "nothing to learn"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "got 'robot'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "a string or a list of parts; got int"),
        ({"conversations": ["x"]}, "a turn must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "got 'sound'"),
        (record("<image>", "A.", image="a", images=["b"]), "got both"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "0 images and 0 videos for 1 places"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "must be a string; got int"),
        ({"messages": [{"role": "user", "content": [3]}]}, "a string or an object; got int"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates not allowed"),
        ({"messages": [{"role": [], "content": "x"}]}, r"got \[\]"),
        ({"messages": [{"role": "assistant", "content": "x", "loss": False}]}, "`loss` of a turn cannot be False"),
        ({"conversations": [{"from": "gpt", "value": "x", "weight": 0.5}]}, "`weight` of a turn cannot be 0.5"),
        ({"tools": [{"name": "zoom"}], "prompt": "x", "response": "y"}, "`tools` are not put into the chat"),
        ({"system": "A.", "messages": [{"role": "system", "content": "B."}]}, "two system prompts"),
        ({"system": "A.", "system_prompt": "B.", "prompt": "x", "response": "y"}, "two system prompts"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_broken_record_says_what_is_wrong(broken, reason):
    with pytest.raises(UnusableSample, match=reason):
        chat_of(broken)


def test_weights_that_say_what_is_learned_anyway_are_read():
    asked, answered = record("What?", "A.")["conversations"]
    assert parts_of({"conversations": [asked | {"weight": 0}, answered | {"weight": 1.0, "loss": True}]}) == [
        "What?",
        "A.",
    ]


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/hostname", "link.mp4", "folder/../../secret.mp4"])
def test_a_name_that_leads_out_of_the_media_folder_is_refused(name, tmp_path):
    root = tmp_path / "media"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(mp4_of(random_frames(2), fps=1))
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    for written in (
        video_record(name),
        {"messages": [{"role": "user", "content": [{"type": "video", "path": name}]}]},
    ):
        written.setdefault("messages", []).append({"role": "assistant", "content": "A."})
        with pytest.raises(UnusableSample, match="is outside"):
            encode_chat(tiny_processor(), written, media_root=root)


@pytest.mark.parametrize("name", ["https://example.com/a.mp4", "data:video/mp4;base64,AAAA", "a\0b", "x" * 5000, ""])
def test_a_name_is_never_anything_but_a_file(name, tmp_path):
    with pytest.raises(UnusableSample, match=r"no file|not a file's name"):
        encode_chat(tiny_processor(), video_record(name), media_root=tmp_path)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image", "base64": "{media}/picture.png"}, "`base64` of a medium is not base64"),
        ({"type": "video", "base64": "file://{media}/three.mp4"}, "`base64` of a medium is not base64"),
        ({"type": "image", "base64": 3}, "`base64` of a medium is not base64"),
        ({"type": "image", "bytes": "{media}/picture.png"}, "`bytes` of a medium is text"),
        ({"type": "video", "array": "{media}/three.mp4"}, "`array` of a medium is text"),
        ({"type": "video", "url": "file://{media}/three.mp4"}, "a `url` is never fetched"),
        ({"type": "image_url", "image_url": {"url": "{media}/picture.png"}}, "a `url` is never fetched"),
        ({"type": "image", "image": {"base64": "{media}/picture.png"}}, "`base64` of a medium is not base64"),
        ({"type": "image", "image": {"url": "{media}/picture.png"}}, "a `url` is never fetched"),
        ({"type": "video", "video": [{"bytes": "{media}/picture.png"}]}, "`bytes` of a medium is text"),
        ({"type": "video", "video": ["../secret.png", "picture.png"]}, "is outside"),
        ({"type": "video", "video": "file:///etc/hostname"}, "is outside"),
        ({"type": "image", "path": "picture.png", "max_pixels": 9}, "an image has no options; got max_pixels"),
        ({"type": "video", "path": "three.mp4", "resized_height": 9}, "a video takes num_frames.*got resized_height"),
        ({"type": "video", "video": {"path": "three.mp4", "crop": 1}}, "got crop"),
        ({"type": "image", "path": "picture.png", "image": "picture.png"}, "holds one image; got image, path"),
        ({"type": "image", "path": "file://["}, "is not a file's name"),
        ({"type": "image", "path": "file://elsewhere/picture.png"}, "is not a file's name"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_key_of_a_medium_is_read_as_what_it_says_or_the_record_is_named(part, reason, media, tmp_path):
    """Whoever wrote the data must not have other files of this machine trained on."""
    (tmp_path / "media").symlink_to(media)
    part = json.loads(json.dumps(part).replace("{media}", str(media)))
    written = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]}
    with pytest.raises(UnusableSample, match=reason):
        encode_chat(tiny_processor(), written, media_root=tmp_path / "media")
    (problem,) = find_broken([written], tmp_path / "media")
    assert re.search(reason, problem)


@pytest.mark.parametrize(
    "written",
    [
        {"video": "three.mp4", "segments": [[0, 10**400, "A door."]]},
        record("<image>\nWhat?", "A.", video={"video_path": "three.mp4", "segments": [[0, 10**400]]}),
        {"messages": [{"role": "x" * 5000, "content": "What?"}]},
        video_record("x" * 5000),
        video_record("../" + "x" * 200 + "/" + "x" * 200),
    ],
)
def test_a_value_of_any_size_is_an_unusable_sample_and_not_in_its_message(written, tmp_path):
    (problem,) = find_broken([written], tmp_path)
    assert len(problem) < 600


# --- formats as they are out there -----------------------------------------------------------------------------------


def seen(written, media):
    """The videos and pictures of a record's sample, and its words."""
    processor = tiny_processor()
    sample = encode_chat(processor, written, media_root=media)
    words = processor.tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
    assert (sample["labels"] != IGNORED).any()
    return sample.get("video_num_frames", torch.zeros(0)).tolist(), len(sample.get("pixel_values", ())), words


def test_llava_video_178k_is_read_as_it_is(media):
    written = {
        "id": "Ab-12",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat happens in the video?"},
            {"from": "gpt", "value": "A cat sleeps."},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "It wakes."},
        ],
        "data_source": "0_30_s_youtube_v0_1",
        "video": "three.mp4",
    }
    frames, pictures, words = seen(written, media)
    assert (frames, pictures) == ([3], 0)
    assert "What happens in the video?" in words


def test_ms_swift_is_read_as_it_is(media):
    turns = [{"role": "user", "content": "<image><video>What?"}, {"role": "assistant", "content": "A."}]
    written = {"system": "Be brief.", "messages": turns, "images": ["picture.png"], "videos": ["three.mp4"]}
    frames, pictures, words = seen(written, media)
    assert (frames, pictures) == ([3], 1)
    assert words.startswith("system\nBe brief.\nuser\n")


def test_moss_vl_is_read_as_it_is_and_each_segment_is_a_video(media):
    segments = [{"video_path": "five.mp4", "segments": [[0, 2], [2, 5]]}, {"video_path": "three.mp4"}, "three.mp4"]
    written = {"prompt": "Compare.", "response": "A.", "images": ["picture.png"], "videos": segments}
    frames, pictures, words = seen(written | {"system_prompt": "Be brief."}, media)
    assert (frames, pictures) == ([2, 3, 3, 3], 1)
    assert words.startswith("system\nBe brief.\nuser\n")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<|video|>\nFirst.<|video|>Second."},
        {"role": "assistant", "content": "A."},
    ]
    assert seen({"conversations": turns, "videos": segments[:1]}, media)[0] == [2, 3]
    for odd in ([], [[1]], [["a", "b"]], "0-2", 3):
        with pytest.raises(UnusableSample, match="pairs of seconds"):
            chat_of(written | {"videos": [{"video_path": "five.mp4", "segments": odd}]})


SEGMENTS = [[0, 1.25, "A cat sleeps."], {"start": 3.0, "end": 4.5, "text": " It wakes. "}]


def test_segments_become_questions_about_when_and_answers_in_seconds(media):
    record = {"video": "five.mp4", "segments": SEGMENTS}
    said = [(m["role"], [part.get("text") for part in m["content"]]) for m in chat_of(record)]
    assert said == [
        ("user", [None, 'When does this happen: "A cat sleeps."']),
        ("assistant", ["0.0 to 1.2 seconds"]),
        ("user", ['When does this happen: "It wakes."']),
        ("assistant", ["3.0 to 4.5 seconds"]),
    ]
    frames, pictures, words = seen(record, media)
    assert (frames, pictures) == ([5], 0)
    assert words.count("When does this happen") == 2


def test_where_a_record_has_turns_of_its_own_its_segments_are_not_asked_about(media):
    record = {"video": "five.mp4", "segments": SEGMENTS, "question": "What?", "answer": "A cat."}
    assert len(chat_of(record)) == 2


@pytest.mark.parametrize(
    "segment",
    [[1, 2], [2, 1, "x"], [-1, 2, "x"], [0, math.inf, "x"], [math.nan, 1, "x"], [0, 1, " "], [0, 1, 2], ["0", 1, "x"],
     3, {"start": 0, "text": "x"}],
    ids=str,
)  # fmt: skip
def test_a_segment_that_is_none_is_refused(segment):
    with pytest.raises(UnusableSample, match=r"a segment is \[start, end, text\]"):
        chat_of({"video": "five.mp4", "segments": [[0, 1, "x"], segment]})


@pytest.mark.parametrize("more", [{"segments": []}, {"segments": "x"}, {"image": "picture.png"}, {"video": None}])
def test_segments_of_no_video_or_of_several_media_are_refused(more):
    with pytest.raises(UnusableSample, match="about one `video` and no image"):
        chat_of({"video": "five.mp4", "segments": SEGMENTS} | more)


def test_qwens_messages_are_read_with_the_options_of_each_part(media):
    parts = [
        {"type": "video", "video": f"file://{media}/five.mp4", "nframes": 2},
        {"type": "video", "video": "five.mp4", "video_start": 1.0, "video_end": 4.0, "fps": 1.0, "max_frames": 8},
        {"type": "video", "video": ["picture.png"] * 4, "sample_fps": 2.0},
        {"type": "image", "image": "picture.png"},
        {"type": "text", "text": "Describe."},
    ]
    written = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]}
    assert seen(written, media)[:2] == ([2, 3, 4], 1)


def test_sharegpt4video_in_its_training_form_is_read_as_it_is(media):
    written = {
        "id": "clip_7",
        "video": "three.mp4",
        "conversations": [{"from": "human", "value": "<video>\nDescribe."}, {"from": "gpt", "value": "A cat."}],
    }
    assert seen(written, media)[0] == [3]


CAPTIONS = {
    "sharegpt4video": {
        "video_id": "clip_7",
        "video_path": "three.mp4",
        "timestamp": ["00:00:00", "00:00:02"],
        "keyframe": [0, 48],
        "captions": [{"idx": "1", "content": "A cat."}, {"idx": "-1", "content": "A cat sleeps."}],
    },
    "vript": {
        "meta": {"video_id": "x", "num_clips": 1, "integrity": True},
        "data": {"x-Scene-001": {"clip_id": "x-Scene-001", "caption": {"content": "A cat."}, "voiceover": []}},
    },
    "finevideo": {"mp4": b"", "json": {"qAndA": [{"question": "What?", "answer": "A cat."}]}},
}


@pytest.mark.parametrize("written", CAPTIONS.values(), ids=CAPTIONS)
def test_captions_that_answer_no_question_are_named_and_not_guessed_at(written):
    """`docs/fine-tune.md` has the lines that make chats of them."""
    with pytest.raises(UnusableSample, match="needs `conversations` or `messages`"):
        chat_of(written)


ODD_VALUES = (
    *(None, True, 0, -1.5, "", " ", "\ud800", "<image>", "<|im_end|>", "<|video_pad|>" * 3),
    *("three.mp4", "../three.mp4", {"bytes": None}, {"path": "three.mp4"}, {"type": "text"}, {"type": "video"}),
    *([], [None], [[]], [{}], [{"type": []}], [3]),
    *([{"type": "video", "path": 3}], [{"type": "image_url", "image_url": {}}]),
)


def with_odd_values(written):
    """The record with one of its values, at any depth, replaced by each of `ODD_VALUES`."""
    items = written.items() if isinstance(written, dict) else enumerate(written) if isinstance(written, list) else ()
    for key, value in items:
        for odd in (*ODD_VALUES, *with_odd_values(value)):
            changed = written.copy()
            changed[key] = odd
            yield changed


def test_whatever_json_a_record_is_it_becomes_a_sample_or_is_named_as_unusable(media):
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "A cat."}
    processor = tiny_processor()
    usable = []
    for written in (video_record(), {"image": "picture.png", "messages": [picture, answer]}):
        for odd in with_odd_values(written):
            is_broken = bool(list(find_broken([odd], media)))
            try:
                sample = encode_chat(processor, odd, media_root=media)
            except UnusableSample:
                continue
            assert not is_broken, odd
            assert (sample["labels"] != IGNORED).any(), odd
            usable.append(odd)
    assert len(usable) > 20


def test_names_without_a_media_folder_are_a_mistake_of_the_caller_and_never_skipped(media):
    dataset = CrossLMMDataset([video_record()], tiny_processor(), unusable="skip")
    with pytest.raises(ValueError, match="`media_root`") as caught:
        dataset[0]
    assert not isinstance(caught.value, UnusableSample)


# --- files -----------------------------------------------------------------------------------------------------------

WRITTEN = [{"id": "ä€😀"}, {"b": ["],", {"c": '\\" ['}]}, {}, {"d": None}]


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte-order-mark"])
def test_a_json_array_is_read_record_by_record(indent, mark, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(mark + json.dumps(WRITTEN, indent=indent, ensure_ascii=False).encode())
    assert list(RecordFile(path)) == WRITTEN


def test_json_lines_may_have_blank_lines_and_know_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + "\r\n\n".join(map(json.dumps, WRITTEN)))
    file = RecordFile(path)
    assert list(file) == WRITTEN
    assert file.where(2) == f"{path}:6"


@pytest.mark.parametrize("text", ["[]", "", "\n \n"])
def test_a_file_may_hold_nothing_and_is_then_refused_for_training(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    records = load_records(path)
    assert len(records) == 0
    with pytest.raises(ValueError, match="has no records"):
        CrossLMMDataset(records, tiny_processor())


@pytest.mark.parametrize(
    ("text", "line"),
    [("[{},\n{}\n{}]", 3), ("[{},\n{},]", 2), ("[{}\n", 2), ("[\n{'a': 1}]", 2), ("[{}]\n\nmore", 3)],
    ids=["comma", "comma-at-the-end", "cut-off", "quotes", "more"],
)
def test_broken_json_is_refused_with_its_line(text, line, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"a.json:{line}: not JSON"):
        RecordFile(path)


def test_a_mixture_takes_what_its_strategies_say(tmp_path):
    numbered = [record("q", str(i)) for i in range(30)]
    write_lines(tmp_path / "lines.jsonl", numbered)
    (tmp_path / "array.json").write_text(json.dumps(numbered))
    (tmp_path / "mix.yaml").write_text(
        """
        datasets:
        - json_path: lines.jsonl
          sampling_strategy: "first:2"
        - json_path: array.json
          sampling_strategy: "end:7%"   # 2.1 of 30, rounded up
        - json_path: lines.jsonl
          sampling_strategy: "random:20%"
        - json_path: array.json
        """
    )
    answers = [int(r["conversations"][1]["value"]) for r in load_records(tmp_path / "mix.yaml", seed=3)]
    assert answers[:5] == [0, 1, 27, 28, 29]
    drawn = answers[5:11]
    assert len(set(drawn)) == 6
    assert drawn != list(range(6))
    assert answers[11:] == list(range(30))
    again = load_records(tmp_path / "mix.yaml", seed=3)
    assert [int(r["conversations"][1]["value"]) for r in again] == answers
    assert again.where(4).endswith("array.json:1")
    assert again.where(1).endswith("lines.jsonl:2")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: []", "at least one entry"),
        ("- json_path: a.jsonl", "must have a list `datasets`"),
        ("datasets: [{path: a.jsonl}]", "must have `json_path`"),
        ("datasets: [{json_path: 3}]", "must be a file's name; got 3"),
        ("datasets: [{json_path: a.jsonl, sampling_strategy: 'some:3'}]", "first, end or random"),
        ("datasets: [{json_path: a.jsonl, sampling_strategy: 'first:4'}]", "takes 4 of 3"),
        ("datasets: [{json_path: a.jsonl, sampling_strategy: 'first:0'}]", "takes 0 of 3"),
        ("datasets: [{json_path: a.jsonl, sampling_strategy: 'end:101%'}]", "takes 4 of 3"),
    ],
)
def test_a_broken_mixture_says_what_is_wrong(text, reason, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{}] * 3)
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_records(tmp_path / "mix.yaml")


def test_an_alias_bomb_is_refused_in_a_moment_and_in_one_line(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    (tmp_path / "mix.yaml").write_text("\n".join([*lines, "datasets: *a29"]))
    with pytest.raises(ValueError, match=r"mix\.yaml:2: an alias, \*a0\. Write plain lists") as caught:
        load_records(tmp_path / "mix.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["datasets: " + "[" * 100_000, "datasets: [" + "{json_path: " * 3000])
def test_deep_yaml_is_refused(text, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mix\.yaml:1: more than 20 levels") as caught:
        load_records(tmp_path / "mix.yaml")
    assert len(str(caught.value)) < 500


def test_an_entry_of_a_mixture_that_is_wrong_is_not_printed_whole(tmp_path):
    (tmp_path / "mix.yaml").write_text(f"datasets: [{{json_path: a.jsonl, other: {'x' * 100_000}}}]")
    with pytest.raises(ValueError, match="must have `json_path`") as caught:
        load_records(tmp_path / "mix.yaml")
    assert len(str(caught.value)) < 500


def test_broken_records_are_found_with_file_and_line_and_without_decoding(media, tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(video_record("broken.mp4"))  # decoding is not tried
    path.write_text(f"{good}\nnot json\n\n{good}\n" + json.dumps(video_record("lost.mp4") | {"id": "x7"}) + "\n")
    problems = list(find_broken(load_records(path), media))
    assert len(problems) == 2
    assert problems[0].startswith(f"{path}:2: not JSON")
    assert problems[1].startswith(f"{path}:5 (id x7): there is no file")
