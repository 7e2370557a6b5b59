"""FSDP2 on two ranks whose batches differ: neither hangs, and gradients are those of one process."""

import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from factories import random_model, tiny_config
from test_training_crosslmm import TEXT_ONLY, gradients, labelled
from two_processes import run_on_two_ranks

LONG = (6, ("video", 9), 5)  # three chunks of the encoder
SHORT = (4, ("video", 2), 7)
IMAGE = (5, ("image", 1), 3, ("video", 2), 4)
BATCHES = {"text": (LONG, TEXT_ONLY), "unequal chunks": (SHORT, LONG), "an image more": (IMAGE, SHORT)}


def sharded(model):
    """As accelerate does it: every class of `_no_split_modules`, which must exist, and the rest together."""
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def compare_with_one_process(rank: int) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60), dist.group.WORLD)
    model = random_model(tiny_config()).train()
    parallel = sharded(copy.deepcopy(model))
    for name, layouts in BATCHES.items():
        batches = [labelled(model.config, layout, first_seed=seed) for seed, layout in enumerate(layouts)]
        alone = [gradients(model, batch) for batch in batches]
        parallel.train()(**batches[rank]).loss.backward()
        means = {key: (alone[0][key] + alone[1][key]) / 2 for key in alone[0]}
        largest = max(mean.norm() for mean in means.values())
        for key, parameter in parallel.named_parameters():
            error = (parameter.grad.full_tensor() - means[key]).norm()
            assert error <= 1e-3 * means[key].norm() + 1e-5 * largest, f"{name}: {key}"
        parallel.zero_grad()
        with torch.no_grad():  # evaluation gathers weights just the same
            expected_loss = model.eval()(**batches[rank]).loss
            torch.testing.assert_close(parallel.eval()(**batches[rank]).loss, expected_loss, rtol=1e-4, atol=1e-5)
        model.train()


def test_ranks_with_different_media_stay_in_step_under_fsdp2(tmp_path):
    run_on_two_ranks(compare_with_one_process, tmp_path)
