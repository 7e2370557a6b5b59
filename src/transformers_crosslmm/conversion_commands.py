"""What the commands in conversion/ share: their options, what they print, and publishing when they are done."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .checkpoint_crosslmm import check_free
from .conversion_crosslmm import CONFIG_FIELDS, Conversion, write_checkpoint
from .publishing_crosslmm import push


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for every config field that a conversion leaves open, by its name."""
    group = parser.add_argument_group("config fields", "as in CrossLMMConfig and CrossLMMTextConfig, in JSON or words")
    for name in CONFIG_FIELDS:
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=_json_or_word, default=argparse.SUPPRESS, metavar="VALUE")


def config_options(options: argparse.Namespace) -> dict[str, Any]:
    """The config fields among the parsed options."""
    return {name: value for name, value in vars(options).items() if name in CONFIG_FIELDS}


def _json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where the result goes: a folder, and the Hub if asked."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new checkpoint")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that FOLDER holds")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then publish it, as `crosslmm push` does")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: in a private repository")
    parser.add_argument(
        "--untrained", action="store_true", help="with --push-to-hub: publish weights that were never trained together"
    )


def run(
    plan: Callable[[], Conversion], options: argparse.Namespace, *, keep_left_out: bool, measure_entropy: bool
) -> None:
    """Plans, writes, prints the report and publishes; what goes wrong is printed and ends the process with 1."""
    try:
        check_free(options.out, force=options.force)
        conversion = plan()
        if options.push_to_hub and conversion.config.untrained and not options.untrained:
            raise ValueError(
                "What this writes was never trained as a CrossLMM. Train it before you publish it, or say "
                "--untrained; its card and config then say so too."
            )
        report = write_checkpoint(
            conversion,
            options.out,
            force=options.force,
            keep_left_out=keep_left_out,
            measure_entropy=measure_entropy,
        )
        print_report(report, options.out)
        if options.push_to_hub:
            print(push(options.out, options.push_to_hub, private=options.private, untrained=options.untrained))
    except (ValueError, OSError, RuntimeError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")


def print_report(report: dict[str, Any], out: str) -> None:
    """The report as lines; the whole of it is in conversion_report.json."""
    print(f"{out}: {report['parameters'] / 1e6:,.1f} M parameters, {report['bytes'] / 1e9:.2f} GB")
    for part, source in report["sources"].items():
        print(f"  from {part}: {source}")
    print(f"  all {report['tensors_taken_over'] + report['tensors_initialised']} names and shapes as in the model;")
    print(f"  {report['tensors_taken_over']} tensors taken over, {report['tensors_initialised']} initialised")
    if report["left_out"]:
        print(f"  {len(report['left_out'])} tensors have no place in CrossLMM:")
        for name in report["left_out"]:
            print(f"    {name}")
    for layer, branches in report.get("attention_entropy", {}).items():
        shares = ", ".join(f"{name} {share:.4f}" for name, share in branches.items())
        print(f"  entropy of the attention at layer {layer}, 1 being uniform: {shares}")
    for note in report["notes"]:
        print(f"  note: {note}")
