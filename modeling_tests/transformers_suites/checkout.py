"""Transformers' common test suites, from a checkout that `make test-transformers SUITES=…` names.

The checkout is one of the release that is installed; only its `tests/` and `utils/` are used.
"""

import importlib
import os
import re
import sys
import unittest
from collections.abc import Callable
from types import ModuleType

import pytest

VARIABLE = "CROSSLMM_TRANSFORMERS_SUITES"


def suite(name: str) -> ModuleType:
    """A module of the checkout's `tests`; without a checkout the file that asks is skipped."""
    checkout = os.environ.get(VARIABLE)
    if not checkout:
        pytest.skip(f"needs a checkout of Transformers: make test-transformers SUITES=…, or {VARIABLE}", True)
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    return importlib.import_module(f"tests.{name}")


def differing(reasons: dict[str, str]) -> Callable[[type], type]:
    """Skips the tests of a suite that CrossLMM does not take, in all their parametrisations, each with its reason; see
    docs/where-we-differ.md."""

    def skipped(tester: type) -> type:
        for test in dir(tester):
            for name, reason in reasons.items():
                if re.fullmatch(name + r"(_\d+.*)?", test):
                    setattr(tester, test, unittest.skip(reason)(getattr(tester, test)))
        return tester

    return skipped
