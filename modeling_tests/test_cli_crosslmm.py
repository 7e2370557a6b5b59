"""The `crosslmm` command, and the conversations, pictures and counts behind it."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from PIL import Image
from typer.testing import CliRunner

import crosslmm_cli
from factories import mp4_of, random_frames, save_checkpoint
from transformers_crosslmm import TINY_CHECKPOINT, CrossLMMConfig, CrossLMMProcessor, encode_video
from transformers_crosslmm.asking import conversation
from transformers_crosslmm.asking.answer_text import AnswerText
from transformers_crosslmm.asking.conversation import VideoConversation, read_video
from transformers_crosslmm.asking.pictures import (
    clock_time,
    draw_contact_sheet,
    draw_timeline,
    frame_labels,
    frame_on_contact_sheet,
    frame_on_timeline,
    frame_pictures,
)
from transformers_crosslmm.checkpoints.inspect import count_costs
from transformers_crosslmm.checkpoints.load import load_model, load_processor

SECONDS, FPS = 5, 4
COMMANDS = (
    "ask",
    "batch",
    "bench",
    "chat",
    "compose",
    "convert",
    "demo",
    "info",
    "look",
    "push",
    "serve",
    "train",
    "watch",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, `clip.mp4` of five seconds, one picture each, and a text that is no video."""
    folder = tmp_path_factory.mktemp("cli")
    save_checkpoint(folder / "checkpoint")
    (folder / "clip.mp4").write_bytes(mp4_of(random_frames(SECONDS).repeat(FPS, axis=0), fps=FPS))
    (folder / "notes.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder) -> str:
    return str(folder / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_processor(checkpoint)


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a command in the folder: `run("ask", "clip.mp4", …)`."""
    monkeypatch.chdir(folder)

    def run(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(crosslmm_cli.app, list(arguments), input=stdin)

    return run


# --- help, exit codes, errors ---------------------------------------------------------------------------------------


def test_help_takes_less_than_a_second_and_imports_nothing_heavy():
    code = (
        "import sys, crosslmm_cli\n"
        "try: crosslmm_cli.app(['--help'])\n"
        "finally: assert not {'torch', 'transformers', 'av', 'transformers_crosslmm'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    assert all(command in finished.stdout for command in COMMANDS)
    # Its own time rather than the clock's, which a busy machine stretches.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    "arguments", [["ask", "nothing.mp4", "Why?"], ["chat", "nothing.mp4"], ["look", "nothing.mp4"]]
)
def test_a_missing_file_is_named_before_anything_heavy_is_imported(arguments):
    code = (
        "import sys, crosslmm_cli\n"
        "try: crosslmm_cli.app(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'av', 'transformers_crosslmm'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: No such file or directory: 'nothing.mp4'. Check the path;")
    assert finished.stderr.count("\n") == 1  # no assertion failed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: crosslmm {command}" in result.output


@pytest.mark.parametrize("command", ["ask", "batch", "chat", "demo", "info", "look", "serve"])
def test_every_command_with_a_model_takes_it_as_an_option(run, command):
    assert "--model " in run(command, "--help").output


def test_a_model_is_named_by_an_option_or_an_argument_but_not_by_both(run, checkpoint):
    by_option = run("info", "--model", checkpoint, "--json")
    assert by_option.exit_code == 0
    assert run("info", checkpoint, "--json").stdout == by_option.stdout
    for command in ("info", "serve", "demo"):
        twice = run(command, checkpoint, "--model", "another")
        assert twice.exit_code == 2
        assert "Name one model" in twice.stderr


def test_the_help_documents_the_exit_codes(run):
    assert "Exit codes: 0 done; 1 failed" in run("--help").output


MISTAKES = {
    "no such file": (("ask", "nothing.mp4", "Why?"), 1, "nothing.mp4"),
    "no video": (("ask", "notes.mp4", "Why?"), 1, "cannot open this as a video"),
    "no words": (("ask", "clip.mp4", " "), 2, "needs words"),
    "a folder": (("ask", ".", "Why?"), 1, "is a folder. Name a file in it"),
    "a part behind the end": (("look", "clip.mp4", "--start", "9"), 1, "start_seconds=9.0, end_seconds=None and a"),
    "a part that ends before it begins": (
        ("look", "clip.mp4", "--frames", "2", "--start", "3", "--end", "1"),
        1,
        "got start_seconds=3.0, end_seconds=1.0. ",
    ),
    "two rates": (("look", "clip.mp4", "--frames", "3", "--fps", "2"), 2, "exclude each other"),
    "no frames": (("ask", "clip.mp4", "Why?", "--frames", "0"), 2, "--frames"),
    "a picture nobody can write": (("look", "clip.mp4", "--out", "sheet.what"), 2, ".what"),
    "a picture in no folder": (
        ("ask", "clip.mp4", "Why?", "--timeline", "no/where.png"),
        2,
        "There is no folder 'no'",
    ),
    "no such device": (("ask", "clip.mp4", "Why?", "--device", "cuda:7"), 1, "torch finds no GPU. Use 'cpu'."),
}


@pytest.mark.parametrize(("arguments", "exit_code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_an_error_is_a_line_on_stderr(run, checkpoint, arguments, exit_code, message):
    result = run(*arguments, "--model", checkpoint)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert not result.stdout
    if exit_code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_debug_shows_where_an_error_comes_from(run, checkpoint):
    assert isinstance(run("--debug", "look", "notes.mp4", "--model", checkpoint).exception, ValueError)


def test_another_models_folder_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for arguments in (("look", "clip.mp4", "--model", str(tmp_path)), ("info", str(tmp_path))):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "must be a CrossLMM checkpoint" in result.stderr


def test_a_model_that_is_nowhere_is_named_with_what_to_check(run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # so that nothing is tried again
    for name in ("somebody/nothing", "notes.mp4"):
        for arguments in (("look", "clip.mp4", "--model", name), ("info", "--model", name)):
            result = run(*arguments)
            assert result.exit_code == 1
            assert f"{name!r} is not a folder, and the Hub has no such model" in result.stderr
            assert "Check the name, the connection" in result.stderr
    assert "cannot open this as a video" in run("info", "notes.mp4").stderr


def test_a_folder_without_a_config_is_no_checkpoint(run, tmp_path):
    result = run("info", str(tmp_path))
    assert result.exit_code == 1
    assert "config.json is missing or broken" in result.stderr


def test_ctrl_c_ends_cleanly(folder):
    code = (
        "import signal, crosslmm_cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs in a shell's background inherit none
        "crosslmm_cli.asking.chosen_checkpoint = lambda model: signal.raise_signal(signal.SIGINT)\n"
        "crosslmm_cli.asking.import_package = lambda steps: None\n"
        "crosslmm_cli.app(['look', 'clip.mp4'])"
    )
    # What the command imports is of no interest here, and takes seconds.
    stand_in = folder / "stand_in" / "transformers_crosslmm"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "asking").mkdir()
    (stand_in / "checkpoints").mkdir()
    (stand_in / "asking" / "conversation.py").write_text("read_video = None")
    (stand_in / "asking" / "pictures.py").write_text("draw_contact_sheet = frame_labels = stream_pictures = None")
    (stand_in / "checkpoints" / "load.py").write_text("load_processor = None")
    path = os.pathsep.join([str(stand_in.parent), str(Path(crosslmm_cli.__file__).parents[1])])
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert finished.returncode == 130
    assert finished.stderr.strip() == "Interrupted."


def test_a_reader_who_has_enough_ends_the_command_quietly():
    code = (
        "import crosslmm_cli, typer\n"
        "@crosslmm_cli.app.command()\n"
        "def talk():\n"
        "    while True: typer.echo('word')\n"
        "crosslmm_cli.app(['talk'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as talking:
        assert talking.stdout.readline() == b"word\n"
        talking.stdout.close()
        assert talking.wait(timeout=60) == 141
        assert talking.stderr.read() == b""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_of_libraries_show_on_a_terminal_alone(monkeypatch, is_terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))  # as rich understands it
    monkeypatch.setattr("warnings.formatwarning", None)
    enable_progress_bars()
    with crosslmm_cli.Steps() as steps:
        crosslmm_cli.base.import_package(steps, with_bars=True)
    assert are_progress_bars_disabled() is not is_terminal
    with crosslmm_cli.Steps() as steps:
        crosslmm_cli.base.import_package(steps)
    assert are_progress_bars_disabled()


# --- ask, chat, look, info ------------------------------------------------------------------------------------------


def fresh_answer(
    model, processor, *turns: str, answers: tuple[str, ...] = (), path: str | None = None, **sampling
) -> str:
    """What the pipeline of processor and `generate` answers to the whole chat at once, greedily."""
    chat = []
    for i, question in enumerate(turns):
        media = [{"type": "video", "path": path}] if i == 0 and path else []
        chat.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        chat += [{"role": "assistant", "content": answers[i]}] if i < len(answers) else []
    inputs = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **sampling},
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_ask_answers_as_generate_does(run, model, processor, checkpoint):
    result = run("ask", "clip.mp4", "What is it?", "--model", checkpoint, "--frames", "3", "--max-new-tokens", "6")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == fresh_answer(model, processor, "What is it?", path="clip.mp4", num_frames=3)


def test_a_question_without_a_video_is_answered_by_the_language_model(run, model, processor, checkpoint):
    length = ("--model", checkpoint, "--max-new-tokens", "6")
    result = run("ask", "What is it?", *length, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    first = fresh_answer(model, processor, "What is it?")
    assert (record["answer"], record["video"], record["frame_times"]) == (first, None, None)
    assert run("chat", *length, stdin="What is it?\n").stdout.strip() == first


@pytest.mark.parametrize(
    "words", ["Why? " * 60, "What is https://example.org/?", "Explain main.ts"], ids=["long", "address", "file"]
)
def test_a_question_is_one_whatever_its_length_and_what_it_names(run, checkpoint, words):
    result = run("ask", words, "--model", checkpoint, "--max-new-tokens", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["question"] == words


@pytest.mark.parametrize("words", ["clip.mp4", "gone.mkv", "My Clip.MOV", "https://example.org/watch"])
def test_a_video_without_a_question_is_not_taken_for_a_question(run, words):
    result = run("ask", words)
    assert result.exit_code == 2
    assert "A video needs a question after it" in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize("command", [("ask", "Why?"), ("chat",)])
@pytest.mark.parametrize(
    "option", [("--frames", "3"), ("--fps", "2"), ("--start", "0"), ("--end", "4"), ("--no-add-timestamps",)]
)
def test_options_about_a_video_are_refused_without_one(run, command, option):
    result = run(*command, *option)
    assert result.exit_code == 2
    assert f"{option[0].replace('no-', '')}: only with a video" in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("command", ["ask", "chat", "evaluate"])
def test_the_option_says_whether_frames_have_their_times(run, model, processor, checkpoint, tmp_path, command, saved):
    """Of a checkpoint whose processor says the opposite too."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    copy = load_processor(folder)
    copy.add_timestamps = saved
    copy.save_pretrained(folder)
    sampling = {"num_frames": 3, "add_timestamps": not saved}
    expected = fresh_answer(model, processor, "What is it?", path="clip.mp4", **sampling)
    assert expected != fresh_answer(
        model, processor, "What is it?", path="clip.mp4", **sampling | {"add_timestamps": saved}
    )
    record = {"video": "clip.mp4", "question": "What is it?", "answer": expected}
    Path("questions.jsonl").write_text(json.dumps(record))
    given = {"ask": ["clip.mp4", "What is it?"], "chat": ["clip.mp4"], "evaluate": ["questions.jsonl"]}[command]
    flag = "--no-add-timestamps" if saved else "--add-timestamps"
    options = ["--model", str(folder), "--frames", "3", "--max-new-tokens", "6", flag]
    result = run(command, *given, *options, stdin="What is it?\n")
    assert result.exit_code == 0, result.output
    assert ("1 of 1 right" if command == "evaluate" else expected) in result.stdout


def test_ask_prints_json_with_the_moments_of_the_frames(run, checkpoint, tmp_path):
    picture = tmp_path / "looked.png"
    arguments = ("--start", "1", "--end", "4", "--fps", "1", "--max-new-tokens", "4", "--timeline", str(picture))
    result = run("ask", "clip.mp4", "What?", "--model", checkpoint, "--json", *arguments)
    record = json.loads(result.stdout)
    assert record["frame_times"] == [1.0, 2.0, 3.0]
    assert len(record["tokens"]) == len(record["frame_weights"]) > 0
    assert np.allclose(np.sum(record["frame_weights"], axis=1), 1)
    assert Image.open(picture).size[0] > 3 * 72


def test_an_answer_arrives_word_by_word(processor):
    pieces: list[str] = []
    listener = AnswerText(processor.tokenizer, pieces.append)
    ids = processor.tokenizer("one two three<|im_end|>")["input_ids"]
    for tokens in ([1, 2], *([token_id] for token_id in ids)):  # the prompt first
        listener.put(torch.tensor(tokens))
    assert "".join(pieces) == "one two three"
    assert len(pieces) > 3
    listener.end()
    assert "".join(pieces) == "one two three"


def test_what_streams_is_the_answer(model, processor, folder):
    conversation = VideoConversation(model, processor, read_video(processor, str(folder / "clip.mp4"), num_frames=2))
    pieces: list[str] = []
    answer = conversation.ask("abc def", max_new_tokens=12, on_text=pieces.append)
    assert answer.text
    assert "".join(pieces).strip() == answer.text


def test_chat_answers_every_line_and_survives_a_question_that_is_too_long(run, checkpoint):
    lines = ["What is it?", "", "Why? " * 200, "And now?"]
    arguments = ("--model", checkpoint, "--frames", "2", "--max-new-tokens", "5")
    result = run("chat", "clip.mp4", *arguments, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") >= 3
    assert "error: The sequence must fit the context" in result.stderr
    again = run("chat", "clip.mp4", *arguments, stdin="What is it?\nAnd now?\n")
    assert result.stdout.replace("\n", "") == again.stdout.replace("\n", "")


@pytest.mark.parametrize(("answer", "warns"), [("it stays shut until evening", True), ("red", False)])
def test_a_model_that_spells_the_answers_is_warned_of(run, folder, answer, warns):
    record = {"video": "clip.mp4", "question": "What?", "answer": answer}
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    checked = ("data", "check", "records.jsonl", "--media-root", ".")
    result = run(*checked, "--model", str(TINY_CHECKPOINT))
    assert result.exit_code == 0, result.output
    assert ("byte by byte" in result.stderr) == warns
    assert "byte by byte" not in run(*checked).stderr


def test_too_many_frames_are_told_before_one_is_encoded(run, checkpoint, folder, monkeypatch):
    (folder / "many.mp4").write_bytes(mp4_of(random_frames(60), fps=FPS))
    monkeypatch.setattr(conversation, "encode_video", lambda *_, **__: pytest.fail("encoded"))
    result = run("ask", "many.mp4", "Why?", "--frames", "60", "--model", checkpoint)
    assert result.exit_code == 1
    assert f"must fit the context of 512 positions; got {60 * 9 + 1}. Sample fewer frames" in result.stderr


def test_look_draws_every_frame(run, checkpoint, folder):
    result = run("look", "clip.mp4", "--model", checkpoint, "--frames", "5", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["frame_times"] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert Image.open(folder / record["picture"]).size == (4 * 160, 2 * 178)


def test_info_counts_what_a_real_model_has(run, checkpoint, model):
    record = json.loads(run("info", checkpoint, "--json", "--memory", "1", "--fps", "2").stdout)
    assert sum(record["parameters"].values()) == sum(parameter.numel() for parameter in model.parameters())
    assert record["weight_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert record["tokens_per_frame"] == 9
    assert record["frames_in_context"] == (512 - 128) // 9
    assert record["longest_video_seconds"]["kv"] == record["frames_in_context"] / 2


def test_info_counts_a_videos_distinct_frames_and_what_they_take(run, checkpoint, folder):
    """Five frames, of which the second and third repeat the first."""
    grey = np.array([40, 40, 40, 200, 205], dtype=np.uint8)
    (folder / "still.mp4").write_bytes(mp4_of(np.tile(grey[:, None, None, None], (1, 60, 60, 3)), fps=1))
    record = json.loads(run("info", str(folder / "still.mp4"), "--model", checkpoint, "--json").stdout)
    assert (record["frames"], record["distinct_frames"]) == (5, 3)
    costs = count_costs(CrossLMMConfig.from_pretrained(checkpoint))
    assert record["positions"] == 5 * 9
    for form, size in costs.cache_bytes_per_frame.items():
        assert (record["cache_bytes"][form], record["cache_bytes_skipping"][form]) == (5 * size, 3 * size)
    text = run("info", str(folder / "still.mp4"), "--model", "2B").stdout
    assert "5 frames at 1 fps, the last at 4.0 s" in text
    assert "distinct: 3\n" in text


def test_info_counts_the_words_of_timestamps_as_the_processor_writes_them(run, checkpoint, processor):
    flag = ("--model", checkpoint, "--json", "--add-timestamps")
    record = json.loads(run("info", "clip.mp4", *flag).stdout)
    stamps = sum(len(processor.tokenizer(f"<{second}.0 seconds>")["input_ids"]) for second in range(SECONDS))
    assert record["positions"] == SECONDS * 9 + stamps
    lengths = [
        len(processor(text="<|video_pad|>", videos="clip.mp4", fps=1, add_timestamps=stamped)["input_ids"][0])
        for stamped in (True, False)
    ]
    assert lengths[0] - lengths[1] == stamps
    per_frame = json.loads(run("info", *flag).stdout)["tokens_per_frame"]
    assert per_frame == 9 + len(processor.tokenizer("<512.0 seconds>")["input_ids"])
    assert "is a size without a tokenizer" in run("info", "7B", "--add-timestamps").stderr


def test_info_needs_no_more_than_a_config(run, checkpoint, tmp_path):
    shutil.copy(Path(checkpoint) / "config.json", tmp_path)
    result = run("info", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout == run("info", checkpoint).stdout


@pytest.mark.parametrize("form", ["kv", "features"])
def test_info_counts_the_bytes_that_a_conversation_keeps(model, processor, folder, form):
    video = read_video(processor, str(folder / "clip.mp4"), num_frames=4)
    cache = VideoConversation(model, processor, video).cache
    inputs = processor(text="<|video_pad|>", videos=[str(folder / "clip.mp4")], num_frames=4, return_tensors="pt")
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True, cross_attention_cache=form)
    costs = count_costs(model.config)
    layers = model.config.cross_attention_layer_indices
    kept = [tensor for i in layers for tensor in (cache.layers[i].cross_keys, cache.layers[i].cross_values)]
    kept.append(cache.layers[0].memory.states)
    assert sum(tensor.nbytes for tensor in kept if tensor is not None) == 4 * costs.cache_bytes_per_frame[form]
    own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert own == 4 * costs.language_bytes_per_frame


def test_info_computes_the_longest_video(run):
    """By hand: weights, and per frame and byte of bfloat16 what 28 layers and 7 T2V branches keep of 9 and 729."""
    record = json.loads(run("info", "7B", "--memory", "24", "--context", "20000", "--fps", "2", "--json").stdout)
    room = 24 * 2**30 - (2 * 8_406_544_686 + 14 * 2)  # 14 gates are float32
    language, keys_values, patches = 9 * 28 * 2 * 512 * 2, 7 * 729 * 2 * 512 * 2, 729 * 1152 * 2
    in_memory = {"kv": room // (language + keys_values + patches), "features": room // (language + patches)}
    in_context = (20_000 - 512) // 9
    assert record["frames_in_memory"] == in_memory
    assert record["frames_in_context"] == in_context
    assert in_memory["kv"] < in_context < in_memory["features"]
    assert record["longest_video_seconds"] == {"kv": in_memory["kv"] / 2, "features": in_context / 2}


def test_info_counts_the_language_models_matrices_in_four_bits(run):
    """By hand: q, k, v, o and the MLP of 28 layers take 4.5 bits a weight; all else, cross-attention too, 16."""
    record = json.loads(run("info", "7B", "--quantization", "nf4", "--json").stdout)
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert record["weight_bytes"] == 2 * 8_406_544_686 + 14 * 2 - matrices * (16 - 4.5) / 8
    assert "the language model's linear layers in int8" in run("info", "2B", "--quantization", "int8").stdout


def test_info_knows_the_paper_sizes(run):
    result = run("info", "7B", "--memory", "80")
    assert result.exit_code == 0, result.output
    # 7 layers x 729 patches x 2 x 512 x 2 bytes, and 729 x 1152 x 2 bytes; an hour of 3,600 does not fit 32,768.
    assert "10.5 MB" in result.stdout
    assert "1.68 MB" in result.stdout
    assert "3,584" in result.stdout


def test_info_of_a_paper_size_imports_neither_torch_nor_transformers():
    """Importing them takes ten times as long as the whole command."""
    code = "import sys; from crosslmm_cli import app; app(['info', '7B'], standalone_mode=False); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "8,406,544,686 parameters" in result.stdout
    assert not {"torch", "transformers", "transformers_crosslmm"} & set(result.stdout.splitlines()[-1].split())


def test_normalising_costs_bytes_until_the_prefill_ends_where_keys_are_kept():
    plain, normed = (
        count_costs(CrossLMMConfig.from_preset("2B", flavour=flavour)) for flavour in ("paper", "recommended")
    )
    assert plain.prefill_bytes_per_frame == {"kv": 729 * 1152 * 2, "features": 0}
    assert normed.prefill_bytes_per_frame == {"kv": 2 * 729 * 1152 * 2, "features": 0}


# --- conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_video", [True, False])
def test_a_conversation_answers_as_the_whole_chat_would(model, processor, folder, with_video):
    video = read_video(processor, str(folder / "clip.mp4"), num_frames=3) if with_video else None
    conversation = VideoConversation(model, processor, video)
    questions = ("What is it?", "And <|im_end|> then?", "Why?")
    for turn in range(3):
        asked = conversation.token_ids
        conversation.ask(questions[turn], max_new_tokens=6)
        prompt = torch.tensor([conversation.token_ids])
        assert conversation.token_ids[: len(asked)] == asked
        # Greedy tokens of a fresh forward call over everything said: the cache has lost and added nothing.
        media = {"video": encode_video(model, video.pixels)} if with_video else None
        with torch.no_grad():
            logits = model(input_ids=prompt, mm_encoder_outputs=media, use_cache=False).logits[0]
        logits[:, [processor.image_token_id, processor.video_token_id]] = -torch.inf
        text = processor.decode(logits.argmax(-1)[-7:-1], skip_special_tokens=True).strip()
        said = processor.decode(conversation.token_ids[-6:], skip_special_tokens=True).strip()
        assert text == said


@pytest.mark.parametrize("turns_before", [0, 1])
@pytest.mark.parametrize("interrupted", ["while answering", "between two layers"])
def test_an_interrupted_question_leaves_no_trace(turns_before, interrupted, model, processor, folder, monkeypatch):
    """Ctrl-C, a listener that fails, memory that runs out: in the middle of a prefill or of the answer."""

    class Interruption(BaseException):
        pass

    def interrupt(*_, **__):
        raise Interruption

    def asked(conversation):
        return conversation.ask("What is it?", max_new_tokens=5), list(conversation.token_ids)

    conversations = [
        VideoConversation(model, processor, read_video(processor, str(folder / "clip.mp4"), num_frames=3))
        for _ in "ab"
    ]
    for talk in conversations:
        for turn in range(turns_before):
            talk.ask(f"Turn {turn}?", max_new_tokens=4)
    undisturbed, disturbed = conversations
    with monkeypatch.context() as patched:
        if interrupted == "between two layers":
            patched.setattr(model.model.language_model.layers[2], "forward", interrupt)
        with pytest.raises(Interruption):
            disturbed.ask("A question of quite another length, is it not?", max_new_tokens=6, on_text=interrupt)
    assert asked(disturbed) == asked(undisturbed)


def test_an_end_mark_is_written_once_and_is_no_part_of_the_answer(model, processor, folder):
    video = read_video(processor, str(folder / "clip.mp4"), num_frames=2)
    said = VideoConversation(model, processor, video)
    said.ask("a", max_new_tokens=5)
    tokens = said.token_ids[-5:]
    place = next(i for i in range(1, 5) if tokens[i] not in tokens[:i])
    conversation = VideoConversation(model, processor, video)
    conversation._ends = [tokens[place]]  # this model ends no turn by itself
    answer = conversation.ask("a", max_new_tokens=5)
    assert answer.text == processor.decode(tokens[:place], skip_special_tokens=True).strip()
    assert len(answer.tokens) == place
    assert conversation.token_ids == said.token_ids[: place - 5]
    assert conversation.cache.get_seq_length() == len(conversation.token_ids)
    conversation.ask("b", max_new_tokens=1)
    written = processor.tokenizer.decode(conversation.token_ids)
    assert written.count("<|im_end|>") == 3  # of two questions and one answer


def test_the_prompt_of_a_conversation_is_the_processors(model, processor, folder):
    path = str(folder / "clip.mp4")
    conversation = VideoConversation(model, processor, read_video(processor, path, num_frames=3))
    chat = [{"role": "user", "content": [{"type": "video", "path": path}, {"type": "text", "text": "Why?"}]}]
    expected = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_frames": 3, "return_tensors": "pt"},
    )
    assert conversation._new_ids({"role": "user", "content": chat[0]["content"]}) == expected["input_ids"][0].tolist()
    torch.testing.assert_close(conversation.video.pixels, expected["pixel_values_videos"])


def test_the_video_is_encoded_once(model, processor, folder, monkeypatch):
    calls: list[int] = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    seen: list[tuple[int, int]] = []
    video = read_video(processor, str(folder / "clip.mp4"), fps=2)
    conversation = VideoConversation(model, processor, video, on_progress=lambda *counts: seen.append(counts))
    for question in ("a", "b"):
        conversation.ask(question, max_new_tokens=2)
    assert len(conversation.pictures()) == 10  # decoded once more for them, not encoded
    hook.remove()
    assert calls == [4, 4, 2]  # frames per chunk of 4
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_encoding_in_pieces_is_encoding(model, processor, folder):
    pixels = read_video(processor, str(folder / "clip.mp4"), fps=2).pixels
    with torch.no_grad():
        ours, expected = encode_video(model, pixels), model.get_video_features(pixels)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(ours.pooler_output[0], expected.pooler_output[0], rtol=1e-4, atol=1e-5)


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_are_the_frames_before_normalisation(processor):
    frames = random_frames(3, height=33, width=33)
    pixels = processor.video_processor([frames], return_tensors="pt")["pixel_values_videos"]
    pictures = frame_pictures(pixels, processor.video_processor)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), frames)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00.0"),
        (63.5, "1:03.5"),
        (3600, "1:00:00.0"),
        (4530.25, "1:15:30.2"),
    ],
)
def test_times_are_written_as_people_do(seconds, text):
    assert clock_time(seconds) == text


def test_frames_without_a_clock_are_numbered():
    assert frame_labels(2, None) == ["#1", "#2"]


def test_a_contact_sheet_has_its_frames_in_reading_order():
    frames = [Image.new("RGB", (33, 33), (20 * i, 0, 255 - 20 * i)) for i in range(7)]
    sheet = draw_contact_sheet(frames, frame_labels(7, None), side=40)
    columns = sheet.width // 40
    for i in range(7):
        centre = (i % columns * 40 + 20, i // columns * 58 + 20)
        assert sheet.getpixel(centre) == (20 * i, 0, 255 - 20 * i)


@pytest.mark.parametrize("num_frames", [1, 3, 7, 70])
def test_a_point_of_a_picture_leads_to_the_frame_that_is_drawn_there(num_frames):
    frames = [Image.new("RGB", (33, 33), (3 * i, 0, 255 - 3 * i)) for i in range(num_frames)]
    labels, tokens = frame_labels(num_frames, None), ["a", "words"]
    sheet = draw_contact_sheet(frames, labels)
    line = draw_timeline(frames, labels, tokens, torch.full((2, num_frames), 1 / num_frames))
    found = {"sheet": set(), "line": set()}
    for x in range(0, max(sheet.width, line.width), 13):
        if x < line.width and (colour := line.getpixel((x, 30))) in [frame.getpixel((0, 0)) for frame in frames]:
            assert frame_on_timeline(x, num_frames, tokens) == colour[0] // 3
            found["line"].add(colour[0] // 3)
        for y in range(0, sheet.height, 13):
            if x < sheet.width and (colour := sheet.getpixel((x, y))) in [frame.getpixel((0, 0)) for frame in frames]:
                assert frame_on_contact_sheet(x, y, num_frames) == colour[0] // 3
                found["sheet"].add(colour[0] // 3)
    assert found["sheet"] == set(range(num_frames))
    assert found["line"] == set(range(0, num_frames, 3 if num_frames == 70 else 1))
    assert frame_on_timeline(0, num_frames, tokens) is None  # on a word
    assert frame_on_contact_sheet(sheet.width - 1, sheet.height + 400, num_frames) is None


def test_a_timeline_is_darkest_where_a_token_looked():
    frames = [Image.new("RGB", (33, 33))] * 4
    weights = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.05, 0.05, 0.9]])
    picture = draw_timeline(frames, frame_labels(4, None), ["a", "b"], weights, side=72)
    left = picture.width - 4 * 72
    for row, looked in enumerate(weights):
        top = 72 + 18 + 4 + row * 22
        red = [picture.getpixel((left + column * 72 + 4, top + 4))[0] for column in range(4)]
        assert np.argmin(red) == int(looked.argmax())
        assert sorted(red, reverse=True) == [red[i] for i in looked.argsort()]


def test_a_timeline_of_a_long_video_sums_neighbours():
    frames = [Image.new("RGB", (33, 33))] * 100
    weights = torch.zeros(1, 100)
    weights[0, 48:52] = 0.25
    picture = draw_timeline(frames, frame_labels(100, None), ["a"], weights, side=40)
    left = picture.width - 25 * 40
    red = [picture.getpixel((left + column * 40 + 3, 40 + 18 + 4 + 3))[0] for column in range(25)]
    assert int(np.argmin(red)) == 12
    assert sum(level < 255 for level in red) == 1


@pytest.mark.parametrize(
    ("flag", "given"), [((), None), (("--add-timestamps",), True), (("--no-add-timestamps",), False)]
)
def test_watch_and_demo_pass_timestamps_on(run, monkeypatch, flag, given):
    from transformers_crosslmm.asking import live_source, watch, web_page

    monkeypatch.setattr(live_source, "LiveSource", lambda *_, **__: SimpleNamespace(close=lambda: None))
    seen = []
    monkeypatch.setattr(watch, "watch", lambda live, source, **_: seen.append(live.processor.add_timestamps))
    assert run("watch", "clip.mp4", *flag).exit_code == 0
    saved = load_processor(TINY_CHECKPOINT).add_timestamps
    assert seen == [saved if given is None else given]
    asked = []
    monkeypatch.setattr(web_page, "build_page", lambda *_, add_timestamps, **__: asked.append(add_timestamps))
    monkeypatch.setattr(web_page, "serve_page", lambda *_, **__: None)
    assert run("demo", *flag).exit_code == 0
    assert asked == [given]


def test_where_a_checkpoint_skips_unchanged_frames_the_pictures_are_those_of_all_frames(
    run, processor, checkpoint, tmp_path
):
    copy = tmp_path / "skips"
    shutil.copytree(checkpoint, copy)
    skipping = CrossLMMProcessor.from_pretrained(copy)
    skipping.video_processor.skip_unchanged = 8
    skipping.save_pretrained(copy)
    for name, folder in (("all", checkpoint), ("distinct", str(copy))):
        options = ("--model", folder, "--fps", "2")
        seen = run("look", "clip.mp4", *options, "--out", str(tmp_path / f"look-{name}.png"))
        assert f"{2 * SECONDS} frames, {SECONDS} of them distinct" in seen.output
        written = ("--timeline", str(tmp_path / f"time-{name}.png"))
        assert run("ask", "clip.mp4", "What?", *options, *written).exit_code == 0
    drawn = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")}
    assert np.abs(drawn["look-all"] - drawn["look-distinct"]).max() <= 8
    assert drawn["time-all"].shape == drawn["time-distinct"].shape
