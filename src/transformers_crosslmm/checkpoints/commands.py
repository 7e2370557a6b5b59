"""Implements `crosslmm compose` and `crosslmm convert`: plan a checkpoint, write it, report on it, and publish it."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .compose import CONFIG_FIELDS
from .conversion import Conversion, write_checkpoint
from .folder import check_free, find_folder, stored_tensors
from .llava import convert_crosslmm_weights, convert_llava, fields_in_weights
from .name_tables import LLAVA_NEXT, NameTable
from .publish import push


def config_fields(words: Sequence[str]) -> dict[str, Any]:
    """Parses config fields from arguments such as `--pooled-grid-size 1` or `--v2v-scope=frame`: JSON, or else text.

    Raises ValueError for an argument that is not a config field, or has no value.
    """
    fields: dict[str, Any] = {}
    rest = list(words)
    while rest:
        option, has_value, value = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in CONFIG_FIELDS:
            raise ValueError(f"No such option: {option}. Config fields are {', '.join(map(_option, CONFIG_FIELDS))}.")
        if not has_value:
            if not rest:
                raise ValueError(f"{option} needs a value.")
            value = rest.pop(0)
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def plan_conversion(
    source: str | os.PathLike,
    *,
    name_table: NameTable | None,
    vision: str | os.PathLike | None,
    dtype: str | None,
    seed: int | None,
    **overrides: Any,
) -> Conversion:
    """Plans with `convert_crosslmm_weights` if the source has a trained cross-attention, else with `convert_llava`.

    No trained weights can be lost, because `convert_llava` refuses unknown tensors. dtype, seed: for `convert_llava`;
    raises ValueError if they are given for trained weights, which keep their types.
    """
    table = {**(name_table or {}), **LLAVA_NEXT}
    if name_table is None and "cross_attention_layers" not in fields_in_weights(
        stored_tensors(find_folder(source)), table
    ):
        return convert_llava(source, vision=vision, dtype=dtype, seed=seed or 0, **overrides)
    if dtype is not None or seed is not None:
        raise ValueError("--dtype and --seed are for the new weights of a LLaVA; a trained CrossLMM keeps its own.")
    return convert_crosslmm_weights(source, name_table=name_table, vision=vision, **overrides)


def write(
    plan: Callable[[], Conversion],
    out: str | os.PathLike,
    *,
    force: bool,
    push_to_hub: str | None,
    private: bool,
    untrained: bool,
) -> Iterator[str]:
    """Plans, writes and publishes a checkpoint; yields the lines of the report. Raises before expensive work."""
    check_free(out, force=force)
    conversion = plan()
    if push_to_hub and conversion.config.untrained and not untrained:
        raise ValueError(
            "The new checkpoint was never trained as a CrossLMM. Train it first, or add --untrained; its card and "
            "config then say that it is untrained."
        )
    is_new = bool(conversion.initialised)
    yield from report_lines(
        write_checkpoint(conversion, out, force=force, keep_left_out=not is_new, try_out=is_new), out
    )
    if push_to_hub:
        yield push(out, push_to_hub, private=private, untrained=untrained)


def report_lines(report: dict[str, Any], out: str | os.PathLike) -> Iterator[str]:
    """A summary of the report for the terminal; conversion_report.json has all of it."""
    yield f"{out}: {report['parameters'] / 1e6:,.1f} M parameters, {report['bytes'] / 1e9:.2f} GB"
    for part, source in report["sources"].items():
        yield f"  from {part}: {source}"
    yield f"  all {report['tensors_taken_over'] + report['tensors_initialised']} names and shapes as in the model;"
    yield f"  {report['tensors_taken_over']} tensors taken over, {report['tensors_initialised']} initialised"
    if report["left_out"]:
        yield f"  {len(report['left_out'])} tensors have no place in CrossLMM:"
        for name in report["left_out"]:
            yield f"    {name}"
    for layer, branches in report.get("attention_entropy", {}).items():
        shares = ", ".join(f"{name} {share:.4f}" for name, share in branches.items())
        yield f"  entropy of the attention at layer {layer}, 1 being uniform: {shares}"
    if "rms" in report:
        sizes = ", ".join(f"{part} {size:g}" for part, size in report["rms"].items())
        yield f"  root mean squares: {sizes}; largest activation: {report['largest_activation']:,.0f}"
    for note in report["notes"]:
        yield f"  note: {note}"
