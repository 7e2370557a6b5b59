"""Datasets: tables and streams, the command that checks data, and what becomes of samples that cannot be used."""

import gc
import io
import json
import logging
import re

import pytest
import torch
from PIL import Image
from test_records import record, video_record, write_lines
from test_samples import spoken
from typer.testing import CliRunner

import crosslmm_cli
from factories import mp4_of, random_frames, tiny_processor
from transformers_crosslmm.training.datasets import TRIES, CrossLMMDataset, stream_samples
from transformers_crosslmm.training.records import UnusableSample, load_records
from transformers_crosslmm.training.samples import CrossLMMDataCollator, encode_chat

datasets = pytest.importorskip("datasets", reason="reads data other than JSON and YAML")

# --- the command -----------------------------------------------------------------------------------------------------


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


def test_the_command_decodes_when_it_is_told_to(media, tmp_path):
    (tmp_path / "damaged.png").write_bytes(damaged_png())
    for name in ("three.mp4", "broken.mp4", "picture.png"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    written = [video_record("three.mp4"), video_record("broken.mp4"), record("<image>", "A.", image="damaged.png")]
    path = write_lines(tmp_path / "a.jsonl", [*written, record("<image>", "A.", image="picture.png")])
    assert check(path, "--media-root", tmp_path)[0] == 0
    exit_code, broken, said = check(path, "--media-root", tmp_path, "--decode")
    assert (exit_code, said) == (1, ["4 records, 2 broken"])
    assert [line.split(": ")[0] for line in broken] == [f"{path}:2", f"{path}:3"]
    assert "broken.mp4" in broken[0]
    assert "damaged.png" in broken[1]


@pytest.mark.parametrize(
    ("name", "written", "reason"),
    [
        ("a.jsonl", "", "a.jsonl has no records"),
        ("a.json", "[]", "a.json has no records"),
        ("a.json", '[{},\n{"id": }]', "a.json:2: not JSON"),
        ("a.json", "[" * 100_000, "a.json: not readable: brackets"),
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


# --- bad samples -----------------------------------------------------------------------------------------------------

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


def damaged_png() -> bytes:
    """A picture in which a chunk of pixels has a name that is none: Pillow raises SyntaxError."""
    file = io.BytesIO()
    noise = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(file, "png")
    data = bytearray(file.getvalue())
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\0\1\2\3"
    return bytes(data)


def test_whatever_a_decoder_raises_is_an_unusable_sample_with_its_name(media, tmp_path, monkeypatch):
    (tmp_path / "damaged.png").write_bytes(damaged_png())
    with pytest.raises(SyntaxError):
        Image.open(tmp_path / "damaged.png").load()
    (tmp_path / "good.png").write_bytes((media / "picture.png").read_bytes())
    written = [record("<image>", "A.", image=name) for name in ("damaged.png", "good.png")]
    dataset = CrossLMMDataset(written, tiny_processor(), media_root=tmp_path, unusable="skip")
    dataset[0]
    assert dataset.num_skipped == 1
    with pytest.raises(UnusableSample, match=r"row 0: .*damaged\.png: "):
        CrossLMMDataset(written, tiny_processor(), media_root=tmp_path)[0]
    column = {"path": None, "bytes": damaged_png()}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A."}]}
    turns = [[{"role": "user", "content": [{"type": "image"}]}, answer]]
    table = datasets.Dataset.from_dict({"messages": turns, "image": [column]})
    with pytest.raises(UnusableSample, match="row 0: image in memory"):
        CrossLMMDataset(table.cast_column("image", datasets.Image()), tiny_processor())[0]

    class Unusual(Exception):
        pass

    def fail(*args, **kwargs):
        raise Unusual("out of the ordinary")

    processor = tiny_processor()
    monkeypatch.setattr(type(processor.video_processor), "__call__", fail)
    dataset = CrossLMMDataset([video_record()], processor, media_root=media)
    with pytest.raises(UnusableSample, match=r"row 0: .*three\.mp4: out of the ordinary"):
        dataset[0]


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


# --- tables and streams ----------------------------------------------------------------------------------------------


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
