"""Runs functions in processes of their own, alone or two that talk through gloo, on the CPU."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def run_alone(function: Callable[..., None], *args) -> int:
    """Calls `function(*args)`, which lives at the top of a module; returns the exit code, -9 after a SIGKILL."""
    preload()
    process = multiprocessing.get_context("forkserver").Process(target=enter_alone, args=(function, args))
    process.start()
    process.join()
    return process.exitcode


def run_on_two_ranks(function: Callable[..., None], folder: Path, *args) -> None:
    """Calls `function(rank, *args)`, which lives at the top of a module, in both; an error in one fails the test."""
    if not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    preload()
    torch.multiprocessing.start_processes(
        enter, args=(function, str(folder / "rendezvous"), args), nprocs=2, start_method="forkserver"
    )


def preload() -> None:
    """The server that all are forked from imports everything slow, once for all tests."""
    modules = ["transformers_crosslmm", "transformers_crosslmm.training.trainer", "torch._dynamo", "accelerate"]
    multiprocessing.set_forkserver_preload(modules)


def enter_alone(function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    function(*args)


def enter(rank: int, function: Callable[..., None], rendezvous: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
