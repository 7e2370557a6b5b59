"""What differs between the releases of Transformers that the package runs on (5.19 to 5.24).

Nothing else in the package compares a version, tries an import twice or inspects a signature. Every entry says which
releases need it and when it can go. Outside this file the package speaks the newest dialect, in which a cache is
called `cache`.
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
"""The first and the last minor release that are tested."""

CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"
"""The keyword by which Transformers' own models, masks, `generate` and outputs know a cache: `cache` from 5.24 on,
`past_key_values` before. Can go when 5.23 is no longer supported."""

CHECKPOINTING = "activation_checkpointing" if RELEASE >= (5, 23) else "gradient_checkpointing"
"""What Transformers calls recomputing activations in the backward pass: an option of `TrainingArguments`, and with
`_enable` a method of models. From 5.23 on the older name warns. Can go with 5.22."""

CHUNKS_LATER_TURNS = RELEASE >= (5, 23)
"""Whether a chunked prefill continues a filled cache. Before 5.23 it runs what the cache holds once more, at wrong
positions. Can go with 5.22."""


def warn_of_untested_release() -> None:
    """One warning when this Transformers is older or newer than what the package is tested with."""
    first, last = TESTED
    if not first <= RELEASE <= last:
        oldest, newest = (".".join(map(str, release)) for release in TESTED)
        warnings.warn(
            f"transformers_crosslmm is tested with Transformers {oldest} to {newest}, and this is "
            f'{transformers.__version__}: if something breaks, pip install "transformers=={newest}.*".',
            stacklevel=3,
        )


def takes_a_cache(function: Callable) -> Callable:
    """Makes a function with a keyword `cache` answer to both names of it, and show the one that this Transformers
    looks for in signatures. Giving both is a ValueError. Can go when `past_key_values` does (5.40).
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
    """The keyword arguments by which Transformers' functions, and outputs, get a cache. Goes with `CACHE`."""
    return {CACHE: cache}


def cache_of(output: ModelOutput) -> Any:
    """The cache in an output of Transformers' own models. Goes with `CACHE`."""
    return output.get(CACHE)


def passes_keywords_on(forward: Callable) -> bool:
    """Whether a forward takes keyword arguments that it does not name. No release needs it; it is here because it
    inspects a signature."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def declare_no_defaults(processor_kwargs: type) -> None:
    """Say that the keyword arguments of a processor have no defaults of their own.

    5.19 to 5.22 read `_defaults` of the class, which a subclass does not inherit; later releases do without. Can go
    with 5.22.
    """
    processor_kwargs._defaults = {}  # type: ignore[attr-defined]
