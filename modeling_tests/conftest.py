"""What every test gets: no network, fixed seeds, and the rule for tests that need a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else

import random

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Each test draws the same random numbers alone, in any order and in the whole suite."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def float32_is_float32():
    """Convolutions on a GPU would otherwise round float32 to ten bits, of which no tolerance here knows."""
    torch.backends.cudnn.allow_tf32 = False


def pytest_runtest_setup(item):
    """Skip `gpu` tests without a GPU; with CROSSLMM_EXPECT_GPU=1 a missing GPU is a failure."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("CROSSLMM_EXPECT_GPU") == "1":
        pytest.fail("CROSSLMM_EXPECT_GPU=1 promises a CUDA device; torch sees none.", pytrace=False)
    pytest.skip("needs a CUDA device")
