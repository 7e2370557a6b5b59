"""The one file in which releases of Transformers differ."""

import ast
import inspect
import re
import warnings
from pathlib import Path

import pytest

import transformers_crosslmm
from factories import random_model, tiny_config
from transformers_crosslmm import dialect_crosslmm as dialect

PACKAGE = Path(transformers_crosslmm.__file__).parent


@dialect.takes_a_cache
def called(first, cache=None, **kwargs):
    return first, cache, kwargs


def test_both_names_of_a_cache_are_one_argument():
    assert called(1, cache="it") == called(1, past_key_values="it") == called(1, "it") == (1, "it", {})
    assert called(1, cache=None, past_key_values="it") == called(1, cache="it", past_key_values=None)
    with pytest.raises(ValueError, match="two names of one argument; give one"):
        called(1, cache="this", past_key_values="that")


def test_signatures_show_the_name_that_transformers_looks_for():
    assert list(inspect.signature(called).parameters) == ["first", dialect.CACHE, "kwargs"]
    model = random_model(tiny_config())
    for function in (model.forward, model.model.forward, model.prepare_inputs_for_generation):
        parameters = inspect.signature(function).parameters
        assert dialect.CACHE in parameters
        assert ({"cache", "past_key_values"} - {dialect.CACHE}).isdisjoint(parameters)


@pytest.mark.parametrize(
    ("release", "warned"), [((5, 18), True), ((5, 19), False), ((5, 24), False), ((5, 25), True), ((6, 0), True)]
)
def test_an_untested_release_is_told_in_one_sentence_with_the_remedy(monkeypatch, release, warned):
    monkeypatch.setattr(dialect, "RELEASE", release)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dialect.warn_of_untested_release()
    assert [str(warning.message).count("pip install") for warning in caught] == [1] * warned


def test_the_range_that_installs_is_the_one_that_is_tested():
    (line,) = [row for row in (PACKAGE.parents[1] / "setup.cfg").read_text().splitlines() if "  transformers>=" in row]
    first, last = dialect.TESTED
    assert line.strip() == f"transformers>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_asks_for_a_version_or_inspects_a_signature(path):
    if path.name == "dialect_crosslmm.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            assert not re.search(r"__version__|\bversion\(|\bVersion\(", ast.unparse(node)), (
                f"line {node.lineno} compares a version"
            )
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "inspect.signature", f"line {node.lineno} inspects a signature"
        if isinstance(node, ast.Try) and any(isinstance(part, ast.Import | ast.ImportFrom) for part in node.body):
            again = [part for handler in node.handlers for part in ast.walk(handler)]
            assert not any(isinstance(part, ast.Import | ast.ImportFrom) for part in again), f"line {node.lineno}"
