"""Training that is killed goes on with the losses that it would have had, whatever it was doing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import TrainerCallback

from factories import save_checkpoint, save_training_data
from transformers_crosslmm.training.trainer import (
    CrossLMMTrainer,
    is_complete,
    last_complete_checkpoint,
    main,
    parse_recipe,
    train,
)
from two_processes import run_alone

STEPS = 7  # of two samples: the data is begun again at step 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of several threads come in any order, and so do their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`, `media`, `data.jsonl`, and `stream`, the same records for `datasets` to stream."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "model")
    save_training_data(folder)
    (folder / "stream").mkdir()
    shutil.copy(folder / "data.jsonl", folder / "stream")
    (folder / "recipe.yaml").write_text("{report_to: none, use_cpu: true, disable_tqdm: true}")
    return folder


def command_line(folder, out, *, streaming: bool = False, **options) -> list[str]:
    options = {
        "model": folder / "model",
        "train_data": folder / ("stream" if streaming else "data.jsonl"),
        "streaming": streaming,
        "media_root": folder / "media",
        "output_dir": out,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_steps": 2,
        "save_total_limit": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
    } | options
    return [
        str(folder / "recipe.yaml"),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_until(event: str, ending: str, times: int, argv: list[str]) -> None:
    """The command, killed when Python is about to touch a file whose name ends so, the so-manieth time."""
    seen = 0

    def kill(name: str, args: tuple) -> None:
        nonlocal seen
        if name == event and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).endswith(ending):
            seen += 1
            if seen == times:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    main(argv)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_run_killed_again_and_again_has_the_losses_of_an_unbroken_one(streaming, folder, tmp_path, caplog):
    whole = losses(train(parse_recipe(command_line(folder, tmp_path / "whole", streaming=streaming))))
    assert len(set(whole)) == STEPS
    out = tmp_path / "out"
    argv = command_line(folder, out, streaming=streaming)
    clip = random.Random(f"streaming={streaming}").randint(6, 8)  # there are five, so it is read for the second time
    for event, ending, times, newest in [
        ("open", "checkpoint-2/trainer_state.json", 1, None),  # weights and optimiser are there, the step is not
        ("open", ".mp4", clip, "checkpoint-4"),
        ("os.rename", "checkpoint-7/checkpoint-is-complete.json.tmp", 1, "checkpoint-6"),
    ]:
        assert run_alone(train_until, event, ending, times, argv) == -signal.SIGKILL
        assert last_complete_checkpoint(out) == (newest and str(out / newest))
    caplog.clear()
    trainer = train(parse_recipe(argv))
    assert f"{out}/checkpoint-{STEPS} is incomplete or damaged" in caplog.text
    assert losses(trainer) == whole
    assert is_complete(out / f"checkpoint-{STEPS}")
    for name, tensor in torch.load(out / f"checkpoint-{STEPS}" / "optimizer.pt")["state"][0].items():
        saved = torch.load(tmp_path / "whole" / f"checkpoint-{STEPS}" / "optimizer.pt")["state"][0][name]
        assert torch.equal(tensor, saved), name
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def train_until_terminated(argv: list[str]) -> None:
    """The command, which a SIGTERM reaches at step 3."""

    class Terminate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(4)  # Transformers waits for three seconds whether a SIGKILL follows

    add_callback = CrossLMMTrainer.add_callback
    CrossLMMTrainer.add_callback = lambda trainer, callback: [
        add_callback(trainer, c) for c in (callback, Terminate())
    ]
    main(argv)


def test_what_is_saved_because_of_a_sigterm_is_complete_and_is_gone_on_with(folder, tmp_path):
    whole = losses(train(parse_recipe(command_line(folder, tmp_path / "whole"))))
    argv = [*command_line(folder, tmp_path / "out", save_steps=STEPS), "--enable_jit_checkpoint", "True"]
    assert run_alone(train_until_terminated, argv) == 0
    newest = last_complete_checkpoint(tmp_path / "out")
    assert newest is not None
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [os.path.basename(newest)]
    assert losses(train(parse_recipe(argv))) == whole


@pytest.mark.slow  # because three processes start
def test_the_command_killed_from_outside_while_it_saves_goes_on_when_it_is_given_again(folder, tmp_path):
    whole = losses(train(parse_recipe(command_line(folder, tmp_path / "whole"))))
    out = tmp_path / "out"
    words = [*command_line(folder, out), "--dataloader_num_workers", "2"]
    command = [sys.executable, "-c", "from crosslmm_cli import app; app()", "train", *words]
    for step in (2, 4):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and not (out / f"checkpoint-{step}" / "config.json").exists():
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in history if "loss" in entry] == whole
