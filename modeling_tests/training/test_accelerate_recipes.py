"""The accelerate configs of the package, and the commands that start them, are read by accelerate itself."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from factories import random_model, tiny_config
from test_modeling_crosslmm import make_sample, model_inputs
from transformers_crosslmm.training.trainer import RECIPES

config_args = pytest.importorskip("accelerate.commands.config.config_args")

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_config(name):
    config = config_args.load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == KINDS[name]
    assert config.mixed_precision == "bf16"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config  # the model's `_no_split_modules`
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_launchers_take_the_commands_of_the_page():
    launch = pytest.importorskip("accelerate.commands.launch")
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for start, parser in (("torchrun", get_args_parser()), ("accelerate launch", launch.launch_command_parser())):
        commands = re.findall(rf"^{start} (.*)$", page, re.MULTILINE)
        assert len(commands) == 2  # on one machine and on two
        for command in commands:
            words = parser.parse_args(shlex.split(command))
            assert (words.module, words.training_script) == (True, "transformers_crosslmm.training.trainer")
            assert words.training_script_args[0] == "stage2_instruct"


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_spreading_a_sequence_over_processes_is_refused(name, monkeypatch):
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState

    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**{name: 2}))
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match=rf"{name}=2.*Set it to 1"):
        model(**model_inputs(make_sample(model.config, 3, ("video", 2), 4)))
