"""The accelerate configs that come with the package are read by accelerate itself."""

import pytest

from transformers_crosslmm.training_crosslmm import RECIPES

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
