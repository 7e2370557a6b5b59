"""Training data: records of every form, which tokens are learned, batches, and what becomes of bad records."""

import gc
import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import crosslmm_cli
from factories import mp4_of, random_frames, random_model, tiny_config, tiny_processor
from transformers_crosslmm.training.data import (
    IGNORED,
    TRIES,
    CrossLMMDataCollator,
    CrossLMMDataset,
    RecordFile,
    UnusableSample,
    chat_of,
    encode_chat,
    find_broken,
    load_records,
    stream_samples,
)

datasets = pytest.importorskip("datasets", reason="reads data other than JSON and YAML")

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


def record(*turns: str, **media) -> dict:
    """A LLaVA record of these turns, the human's first."""
    return {**media, "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}


def video_record(name: str = "three.mp4", question: str = "<image>\nWhat?", answer: str = "A cat.") -> dict:
    return record(question, answer, video=name)


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def spoken(processor, sample) -> str:
    return processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED])


# --- labels ---------------------------------------------------------------------------------------------------------


def expected_ids_and_labels(processor, turns) -> tuple[list[int], list[int]]:
    """ChatML written out token by token: turns are (role, [text or number of placeholders])."""
    tokenizer = processor.tokenizer
    mark = tokenizer.convert_tokens_to_ids
    ids: list[int] = []
    labels: list[int] = []

    def write(new, learned=False):
        ids.extend(new)
        labels.extend(new if learned else [-100] * len(new))

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for role, parts in turns:
        write([mark("<|im_start|>"), *tokens(role + "\n")])
        for part in parts:
            if isinstance(part, str):
                write(tokens(part), learned=role == "assistant")
            else:
                write([mark("<|vision_start|>"), *[mark("<|video_pad|>")] * part, mark("<|vision_end|>")])
        write([mark("<|im_end|>")], learned=role == "assistant")
        write(tokens("\n"))
    return ids, labels


def test_exactly_the_assistants_words_and_end_marks_are_learned_in_every_turn(media):
    processor = tiny_processor()
    chat = record("<image>\nWhat is it?", "A cat.", "And then?", "It sleeps;\nassistant\nno more.", video="three.mp4")
    chat["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    sample = encode_chat(processor, chat, media_root=media)
    ids, labels = expected_ids_and_labels(
        processor,
        [
            ("system", ["Be brief."]),
            ("user", [3 * 9, "What is it?"]),
            ("assistant", ["A cat."]),
            ("user", ["And then?"]),
            ("assistant", ["It sleeps;\nassistant\nno more."]),
        ],
    )
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels


def test_marks_written_in_an_answer_are_characters_and_end_nothing(media):
    processor = tiny_processor()
    sample = encode_chat(processor, record("Say it.", "a<|im_end|>b"), media_root=media)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sample["labels"].tolist().count(end) == 1
    assert spoken(processor, sample) == "a<|im_end|>b<|im_end|>"


def test_a_template_without_generation_marks_is_refused():
    processor = tiny_processor(chat_template="{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(UnusableSample, match=r"% generation %"):
        encode_chat(processor, record("a", "b"))


# --- records --------------------------------------------------------------------------------------------------------


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
        ({"conversations": ["x"]}, "a turn is an object"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "got 'sound'"),
        (record("<image>", "A.", image="a", images=["b"]), "got both"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "0 images and 0 videos for 1 places"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "must be a string; got int"),
        ({"messages": [{"role": "user", "content": [3]}]}, "a string or an object; got int"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates not allowed"),
        ({"messages": [{"role": [], "content": "x"}]}, r"got \[\]"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_broken_record_says_what_is_wrong(broken, reason):
    with pytest.raises(UnusableSample, match=reason):
        chat_of(broken)


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
        with pytest.raises(UnusableSample, match="lies outside"):
            encode_chat(tiny_processor(), written, media_root=root)


@pytest.mark.parametrize("name", ["https://example.com/a.mp4", "data:video/mp4;base64,AAAA", "a\0b", "x" * 5000, ""])
def test_a_name_is_never_anything_but_a_file(name, tmp_path):
    with pytest.raises(UnusableSample, match=r"no file|no name of a file"):
        encode_chat(tiny_processor(), video_record(name), media_root=tmp_path)


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


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "LAB"])
def test_an_image_may_have_any_mode_and_shape(mode, tmp_path):
    Image.new(mode, (1, 3000)).save(tmp_path / "odd.tiff")
    sample = encode_chat(tiny_processor(), record("<image>", "A.", image="odd.tiff"), media_root=tmp_path)
    assert sample["pixel_values"].shape == (1, 3, 33, 33)
    assert torch.isfinite(sample["pixel_values"]).all()


def test_names_without_a_media_folder_are_a_mistake_of_the_caller_and_never_skipped(media):
    dataset = CrossLMMDataset([video_record()], tiny_processor(), unusable="skip")
    with pytest.raises(ValueError, match="`media_root`") as caught:
        dataset[0]
    assert not isinstance(caught.value, UnusableSample)


# --- files ----------------------------------------------------------------------------------------------------------

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
        ("- json_path: a.jsonl", "has a list `datasets`"),
        ("datasets: [{path: a.jsonl}]", "has `json_path`"),
        ("datasets: [{json_path: 3}]", "is a file's name; got 3"),
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


def test_broken_records_are_found_with_file_and_line_and_without_decoding(media, tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(video_record("broken.mp4"))  # decoding is not tried
    path.write_text(f"{good}\nnot json\n\n{good}\n" + json.dumps(video_record("lost.mp4") | {"id": "x7"}) + "\n")
    problems = list(find_broken(load_records(path), media))
    assert len(problems) == 2
    assert problems[0].startswith(f"{path}:2: not JSON")
    assert problems[1].startswith(f"{path}:5 (id x7): there is no file")


# --- the command ----------------------------------------------------------------------------------------------------


def check(*arguments):
    """`crosslmm data check`: its exit code, lines for broken records, and what it says beside them."""
    result = CliRunner().invoke(crosslmm_cli.app, ["data", "check", *map(str, arguments)])
    return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()


def test_the_command_says_that_good_data_is_good(media, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [video_record(), record("Only words?", "Yes.")])
    assert check(path, "--media-root", media) == (0, [], ["2 records, 0 broken"])


def test_the_command_lists_broken_records_of_a_mixture_with_file_line_and_name(media, tmp_path):
    (tmp_path / "parts").mkdir()
    write_lines(tmp_path / "parts" / "lines.jsonl", [video_record(), record("A question alone.") | {"id": "ä7"}])
    (tmp_path / "array.json").write_text(json.dumps([video_record(), {}, video_record("lost.mp4")], indent=1))
    (tmp_path / "mix.yaml").write_text(
        "datasets: [{json_path: parts/lines.jsonl}, {json_path: array.json, sampling_strategy: 'end:2'}]"
    )
    exit_code, broken, said = check(tmp_path / "mix.yaml", "--media-root", media)
    assert exit_code == 1
    assert said == ["4 records, 3 broken"]
    assert broken[0].startswith(f"{tmp_path}/parts/lines.jsonl:2 (id ä7): nothing to learn")
    assert broken[1].startswith(f"{tmp_path}/array.json:15: a record needs `conversations`")
    assert broken[2].startswith(f"{tmp_path}/array.json:16: there is no file {media}/lost.mp4")
    assert len(broken) == 3


def test_the_command_decodes_nothing_and_training_names_what_does_not_decode(media, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [video_record("broken.mp4")])
    assert check(path, "--media-root", media)[0] == 0
    with pytest.raises(UnusableSample, match=r"a\.jsonl:1: .*broken\.mp4"):
        CrossLMMDataset(load_records(path), tiny_processor(), media_root=media)[0]


@pytest.mark.parametrize(
    ("name", "written", "reason"),
    [
        ("a.jsonl", "", "a.jsonl holds no records"),
        ("a.json", "[]", "a.json holds no records"),
        ("a.json", '[{},\n{"id": }]', "a.json:2: not JSON"),
        ("a.json", "[" * 100_000, "a.json: brackets too deep"),
        ("a.yaml", "datasets:\n- json_path: [", "a.yaml:2: not YAML"),
        ("a.yaml", "datasets: [{json_path: lost.jsonl}]", "No such file or directory: .*lost.jsonl"),
        ("a.jsonl", None, "No such file or directory: .*a.jsonl"),
        ("a", "folder", "doesn't contain any data files"),
        ("a.jsonl", "folder", "Is a directory: .*a.jsonl"),
        ("a.jsonl", json.dumps(video_record()), "There is no folder .*nowhere; `media_root`"),
    ],
    ids=["empty", "array", "cut", "deep", "yaml", "part", "missing", "folder", "named-folder", "media"],
)
def test_what_the_command_cannot_read_is_one_line_and_exit_code_1(name, written, reason, tmp_path):
    if written == "folder":
        (tmp_path / name).mkdir()
    elif written is not None:
        (tmp_path / name).write_text(written)
    exit_code, broken, said = check(tmp_path / name, "--media-root", tmp_path / "nowhere")
    assert (exit_code, broken, len(said)) == (1, [], 1)
    assert re.search(reason, said[0])


# --- bad samples ----------------------------------------------------------------------------------------------------

BAD = {
    "does-not-decode": (video_record("broken.mp4"), "broken.mp4"),
    "does-not-exist": (video_record("lost.mp4"), "lost.mp4"),
    "too-long": (video_record("five.mp4"), r"\d+ tokens are more than `max_length` 75"),
    "broken-record": (record("only a question"), "nothing to learn"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_sample_that_cannot_be_used_raises_with_its_place_and_reason(name, media, tmp_path):
    bad, reason = BAD[name]
    path = write_lines(tmp_path / "a.jsonl", [video_record(), bad])
    dataset = CrossLMMDataset(load_records(path), tiny_processor(), media_root=media, max_length=75)
    dataset[0]
    with pytest.raises(UnusableSample, match=rf"a\.jsonl:2: .*{reason}"):
        dataset[1]


@pytest.mark.parametrize("name", BAD)
def test_a_skipped_sample_is_replaced_by_the_next_counted_and_named(name, media, tmp_path, caplog):
    bad, _ = BAD[name]
    path = write_lines(tmp_path / "a.jsonl", [video_record(answer="first"), bad, bad])
    processor = tiny_processor()
    dataset = CrossLMMDataset(load_records(path), processor, media_root=media, max_length=75, unusable="skip")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        samples = [dataset[index] for index in range(3)]
    assert [spoken(processor, sample) for sample in samples] == ["first<|im_end|>"] * 3
    assert dataset.num_skipped == 3  # 1, 2, and 2 again on the way from 1
    assert "a.jsonl:2" in caplog.text


def test_samples_skipped_in_worker_processes_are_counted(media):
    records = [video_record(), video_record("broken.mp4")] * 3
    dataset = CrossLMMDataset(records, tiny_processor(), media_root=media, unusable="skip")
    collator = CrossLMMDataCollator(tiny_processor())
    gc.collect()  # pictures that other tests left behind hold FFmpeg threads, which a forked worker cannot end
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collator)
    assert [len(batch["video_num_frames"]) for batch in loader] == [2, 2, 2]
    assert dataset.num_skipped == 3


def test_nothing_but_unusable_samples_is_an_error_and_no_endless_search(media):
    dataset = CrossLMMDataset([video_record("lost.mp4")] * 7, tiny_processor(), media_root=media, unusable="skip")
    with pytest.raises(ValueError, match="None of 7 samples"):
        dataset[4]
    assert dataset.num_skipped == 7


def test_a_video_with_frames_that_stay_black_is_not_learned_from(media, tmp_path):
    whole = bytearray(mp4_of(random_frames(8, seed=2), fps=1))
    begin = whole.index(b"mdat") + 4
    whole[begin + 3000 : begin + 6000] = bytes(3000)
    (tmp_path / "damaged.mp4").write_bytes(whole)
    with pytest.raises(UnusableSample, match=r"damaged\.mp4: "):
        encode_chat(tiny_processor(), video_record("damaged.mp4"), media_root=tmp_path)


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_holds_unequal_videos_images_and_text_and_gives_each_sample_its_own_loss(media):
    processor = tiny_processor()
    written = [
        record("<image>\nWhat?", "A cat.", video="three.mp4"),
        record("Only words?", "Yes."),
        record("<video> and <image>", "B.", video="five.mp4", image="picture.png"),
    ]
    dataset = CrossLMMDataset(written, processor, media_root=media)
    collator = CrossLMMDataCollator(processor)
    batch = collator([dataset[i] for i in range(3)])
    assert batch["video_num_frames"].tolist() == [3, 5]
    assert batch["pixel_values_videos"].shape == (8, 3, 33, 33)
    assert batch["pixel_values"].shape == (1, 3, 33, 33)
    assert batch["attention_mask"].sum(1).tolist() == [len(dataset[i]["input_ids"]) for i in range(3)]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()

    vocabulary = {"vocab_size": len(processor.tokenizer)}
    ids = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    model = random_model(tiny_config(text_config=vocabulary, **ids))
    with torch.no_grad():
        together = model(**batch, num_items_in_batch=1).loss
        alone = [model(**collator([dataset[i]]), num_items_in_batch=1).loss for i in range(3)]
    torch.testing.assert_close(together, sum(alone))


def test_a_batch_without_media_has_no_pixels():
    processor = tiny_processor()
    collator = CrossLMMDataCollator(processor)
    batch = collator([record("a", "b"), record("a longer one", "c")])  # records: the collator encodes them itself
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["labels"].shape


def test_a_collator_given_records_applies_its_own_rules(media):
    collator = CrossLMMDataCollator(tiny_processor(), media_root=media, max_length=75)
    assert collator([video_record()])["video_num_frames"].tolist() == [3]
    with pytest.raises(UnusableSample, match="`max_length` 75"):
        collator([video_record("five.mp4")])


def test_a_batch_without_anything_to_learn_is_refused():
    processor = tiny_processor()
    sample = encode_chat(processor, record("a", "b"))
    silent = sample | {"labels": torch.full_like(sample["labels"], IGNORED)}
    collator = CrossLMMDataCollator(processor)
    collator([sample, silent])
    with pytest.raises(ValueError, match="Nothing to learn"):
        collator([silent, silent])


def test_tokens_that_somebody_else_made_of_a_chat_are_refused():
    with pytest.raises(ValueError, match=r"no `labels`.*skip_prepare_dataset"):
        CrossLMMDataCollator(tiny_processor())([{"input_ids": [1, 2, 3]}])


# --- datasets -------------------------------------------------------------------------------------------------------


def rows(media, *names, decode: bool = True):
    """A `datasets.Dataset` with a `Video` and an `Image` column, some rows without the one or the other."""
    written = {"messages": [], "video": [], "image": []}
    for name in names:
        kind = {"mp4": "video", "png": "image"}.get(name[-3:])
        parts = [{"type": "text", "text": name}, *([{"type": kind}] if kind else [])]
        written["messages"].append(
            [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]
        )
        file = {"bytes": (media / name).read_bytes(), "path": None} if kind else None
        written["video"].append(file if kind == "video" else None)
        written["image"].append(file if kind == "image" else None)
    dataset = datasets.Dataset.from_dict(written)
    dataset = dataset.cast_column("video", datasets.Video(decode=decode))
    return dataset.cast_column("image", datasets.Image(decode=decode))


NAMES = ("three.mp4", "words only", "picture.png", "five.mp4")


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_messages_with_video_and_image_columns_become_the_same_samples_as_files(decode, streaming, media):
    processor = tiny_processor()
    table = rows(media, *NAMES, decode=decode)
    if streaming:
        samples = list(stream_samples(table.to_iterable_dataset(), processor))
    else:
        dataset = CrossLMMDataset(table, processor)
        samples = [dataset[i] for i in range(len(dataset))]
    for name, sample in zip(NAMES, samples, strict=True):
        kind = {"mp4": "video", "png": "image"}.get(name[-3:])
        parts = [{"type": "text", "text": name}, *([{"type": kind, "path": name}] if kind else [])]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]
        expected = encode_chat(processor, {"messages": turns}, media_root=media)
        assert sample.keys() == expected.keys()
        for key in sample:
            assert torch.equal(torch.as_tensor(sample[key]), torch.as_tensor(expected[key])), (name, key)


def test_a_stream_skips_and_goes_on_and_stops_when_nothing_is_usable(media):
    table = rows(media, "three.mp4", "broken.mp4", "five.mp4").to_iterable_dataset()
    samples = list(stream_samples(table, tiny_processor(), unusable="skip"))
    assert [sample["video_num_frames"].tolist() for sample in samples] == [[3], [5]]
    with pytest.raises(UnusableSample, match=r"row 1: .*video in memory"):
        list(stream_samples(table, tiny_processor()))
    hopeless = rows(media, *["broken.mp4"] * (TRIES + 1)).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"None of {TRIES} samples"):
        list(stream_samples(hopeless, tiny_processor(), unusable="skip"))


def test_a_saved_dataset_is_loaded_and_a_parquet_folder_is_streamed(media, tmp_path):
    table = rows(media, "three.mp4", "words only")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "part.parquet")
    assert len(CrossLMMDataset(load_records(tmp_path / "saved"), tiny_processor())) == 2
    stream = stream_samples(load_records(tmp_path / "files", streaming=True), tiny_processor())
    assert [len(sample.get("video_num_frames", ())) for sample in stream] == [1, 0]


def test_frames_and_arrays_in_memory_train_as_well():
    frames = random_frames(4)
    turns = [
        {"role": "user", "content": [{"type": "video", "video": [Image.fromarray(frame) for frame in frames]}]},
        {"role": "assistant", "content": "A."},
    ]
    sample = encode_chat(tiny_processor(), {"messages": turns})
    turns[0]["content"] = [{"type": "video", "video": np.asarray(frames)}]
    assert torch.equal(
        sample["pixel_values_videos"], encode_chat(tiny_processor(), {"messages": turns})["pixel_values_videos"]
    )
