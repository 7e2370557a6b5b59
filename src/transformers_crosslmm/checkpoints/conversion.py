"""Conversion of checkpoints: every tensor is planned by name and shape before any is written."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .._version import __version__
from ..configuration_crosslmm import CrossLMMConfig
from ..processing_crosslmm import CrossLMMProcessor
from .first_run import first_run
from .folder import (
    SHARD_BYTES,
    UNUSED_WEIGHTS,
    StoredTensor,
    new_folder,
    save_tensors,
    split_into_shards,
    write_weights,
)
from .name_tables import NameTable, rename
from .network import expected_shapes, names_in_class, network_of

REPORT = "conversion_report.json"
HALF_PRECISION = (
    "float16 overflows at 65,504, which activations of some language models come near (largest_activation is that of "
    "a short text); bfloat16 has the range of float32"
)


class ConversionError(ValueError):
    """A checkpoint does not fit. The message lists every name and shape that is wrong."""


@dataclass
class Conversion:
    """The plan of a new checkpoint.

    tensors: under our names. initialised: names of tensors with new values.
    left_out: tensors of the source that CrossLMM has no place for, under their old names.
    sources: the parts' sources, as the user named them.
    image_options: resampling and normalisation of the vision encoder's own image processor.
    """

    config: CrossLMMConfig
    tensors: dict[str, StoredTensor]
    sources: dict[str, str]
    initialised: list[str] = field(default_factory=list)
    left_out: dict[str, StoredTensor] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    chat_template: str | dict[str, str] | None = None
    image_options: dict[str, Any] = field(default_factory=dict)
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def peak_bytes(self, shard_bytes: int = SHARD_BYTES) -> int:
        """Peak memory of writing: the largest shard. The libraries' own memory is not counted."""
        shards = split_into_shards(self.tensors, shard_bytes)
        return max(sum(self.tensors[name].num_bytes for name in shard) for shard in shards)

    def report(self) -> dict[str, Any]:
        """The content of conversion_report.json, also used by the model card."""
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()})
        return {
            "sources": self.sources,
            "versions": {"transformers_crosslmm": __version__, "transformers": transformers.__version__},
            "parameters": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
            "bytes": self.num_bytes,
            "largest_shard_bytes": self.peak_bytes(),
            "dtypes": dtypes,
            "tensors_taken_over": len(self.tensors) - len(self.initialised),
            "tensors_initialised": len(self.initialised),
            "left_out": sorted(self.left_out),
            "notes": [*self.notes, *[HALF_PRECISION] * ("float16" in dtypes)],
        }


def renamed_tensors(
    theirs: Mapping[str, StoredTensor], table: NameTable, config: CrossLMMConfig
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Renames tensors; returns those under our names, and those without a place under their own.

    Raises ConversionError for names without a row, with all of them, for two tensors with one name, and for an
    `lm_head` that differs from the embeddings that the config ties it to.
    """
    model, expected = network_of(config), expected_shapes(config)
    in_class = names_in_class(model)
    unbuilt = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    ours: dict[str, StoredTensor] = {}
    left_out: dict[str, StoredTensor] = {}
    tied: list[str] = []
    unknown: list[str] = []
    for name, tensor in theirs.items():
        try:
            target = rename(name, table)
        except KeyError:
            unknown.append(name)
            continue
        if target == "lm_head.weight" and config.tie_word_embeddings:
            tied.append(name)
        elif target is None or (target not in expected and unbuilt.search(in_class(target) or target)):
            left_out[name] = tensor
        elif target in ours:
            raise ConversionError(f"Two tensors become {target}; the second one is {name}. Correct the name table.")
        else:
            ours[target] = tensor
    if unknown:
        raise ConversionError(
            _listed("The name table has no row for these tensors of the checkpoint:", unknown)
            + "\nAdd rows with --name-table: our name, or null for a tensor that CrossLMM has no place for."
        )
    embeddings = ours.get("model.language_model.embed_tokens.weight")
    for name in tied:
        if embeddings is not None and not torch.equal(theirs[name].read(), embeddings.read()):
            raise ConversionError(
                f"The config ties {name} to the embeddings, but they differ. Set `tie_word_embeddings` to false in it."
            )
        left_out[name] = theirs[name]
    return ours, left_out


def check_complete(tensors: Mapping[str, StoredTensor], config: CrossLMMConfig) -> None:
    """Raises ConversionError with every missing or surplus name and every wrong shape."""
    expected = expected_shapes(config)
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(_listed("The model has these tensors, the checkpoint does not:", missing))
    if superfluous := [name for name in tensors if name not in expected]:
        problems.append(_listed("The checkpoint has these tensors, the model does not:", superfluous))
    if wrong := [
        f"{name}: {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]:
        problems.append(_listed("These shapes contradict the config:", wrong))
    if problems:
        raise ConversionError("\n".join(problems) + "\nCheck the config fields and the name table.")


def _listed(title: str, names: list[str]) -> str:
    return "\n  ".join([title, *names])


def write_checkpoint(
    conversion: Conversion,
    out: str | os.PathLike,
    *,
    force: bool = False,
    keep_left_out: bool = False,
    try_out: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes model, processor and report, one shard in memory at a time; returns the report.

    `out` appears only when everything is written. keep_left_out: keep left-out tensors in a file of their own, so that
    `--reverse` is exact. try_out: report the measurements of `first_run`.
    """
    config = conversion.config
    config.architectures = ["CrossLMMForConditionalGeneration"]
    report = conversion.report()
    with new_folder(out, force=force, num_bytes=conversion.num_bytes) as folder:
        if conversion.tokenizer is not None:
            processor = CrossLMMProcessor.from_config(
                config, conversion.tokenizer, chat_template=conversion.chat_template, **conversion.image_options
            )
            processor.save_pretrained(folder)
        else:
            report["notes"].append("no processor, because no tokenizer was found: name one with --tokenizer")
        conversion.generation_config.suppress_tokens = [config.image_token_id, config.video_token_id]
        conversion.generation_config.save_pretrained(folder)
        config.save_pretrained(folder)
        if keep_left_out and conversion.left_out:
            save_tensors(
                {name: tensor.read() for name, tensor in conversion.left_out.items()}, folder / UNUSED_WEIGHTS
            )
        write_weights(folder, conversion.tensors, shard_bytes)
        if try_out:
            # After the weights, because the allocator does not return the memory of the network's run.
            report |= first_run(config, conversion.tensors, conversion.tokenizer)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report
