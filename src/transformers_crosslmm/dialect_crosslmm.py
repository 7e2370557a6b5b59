"""Differences between the supported releases of Transformers (5.19 to 5.24).

No other file compares a version, tries an import twice or inspects a signature. Every entry says which releases need
it and when it can be removed. Outside this file the package uses the newest names, in which a cache is called `cache`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from transformers.utils import ModelOutput

RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])
TESTED = (5, 19), (5, 24)
"""The first and the last tested minor release."""

CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"
"""The keyword for a cache in Transformers' own models, masks, `generate` and outputs: `cache` from 5.24 on,
`past_key_values` before. Remove when 5.23 is no longer supported."""

CHECKPOINTING = "activation_checkpointing" if RELEASE >= (5, 23) else "gradient_checkpointing"
"""Transformers' name for recomputing activations in the backward pass: an option of `TrainingArguments` and, with
`_enable`, a method of models. From 5.23 on the older name warns. Remove with 5.22."""

CHUNKS_LATER_TURNS = RELEASE >= (5, 23)
"""Whether a chunked prefill can continue a filled cache. Before 5.23 it runs the cached tokens once more, at wrong
positions. Remove with 5.22."""


def warn_of_untested_release() -> None:
    """Warns if the installed Transformers is older or newer than the tested releases."""
    first, last = TESTED
    if not first <= RELEASE <= last:
        oldest, newest = (".".join(map(str, release)) for release in TESTED)
        warnings.warn(
            f"transformers_crosslmm is tested with Transformers {oldest} to {newest}; installed is "
            f'{transformers.__version__}. If something fails, pip install "transformers=={newest}.*".',
            stacklevel=3,
        )


def takes_a_cache(function: Callable) -> Callable:
    """Makes a function with a keyword `cache` accept `past_key_values` too, and show the name that this Transformers
    looks for in signatures. Both together raise ValueError. Remove when `past_key_values` is removed (5.40).
    """

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            old = kwargs.pop("past_key_values")
            if kwargs.get("cache") is not None and old is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one argument; give one of them.")
            kwargs["cache"] = kwargs.get("cache") if old is None else old
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument for functions and outputs of Transformers. Remove with `CACHE`."""
    return {CACHE: cache}


def cache_of(output: ModelOutput) -> Any:
    """The cache in an output of Transformers' own models. Remove with `CACHE`."""
    return output.get(CACHE)


def passes_keywords_on(forward: Callable) -> bool:
    """Whether a forward takes keyword arguments that it does not name. No release needs this function; it is in this
    file because it inspects a signature."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def declare_no_defaults(processor_kwargs: type) -> None:
    """Declares that the keyword arguments of a processor have no defaults of their own.

    5.19 to 5.22 read `_defaults` of the class, and a subclass does not inherit it. Remove with 5.22.
    """
    processor_kwargs._defaults = {}  # type: ignore[attr-defined]
