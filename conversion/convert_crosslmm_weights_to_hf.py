"""Take over a CrossLMM that was trained in LLaVA-NeXT's code base, or give one back to it.

    python conversion/convert_crosslmm_weights_to_hf.py TRAINED --name-table names.json --out crosslmm-7b
    python conversion/convert_crosslmm_weights_to_hf.py crosslmm-7b --reverse --name-table names.json --out back

names.json says what the new blocks are called there, {"their name": "our name" or null}, `*` standing for any part:
rows that go before those of `transformers_crosslmm.conversion_mapping.LLAVA_NEXT`. A tensor that no row knows, or that
the model lacks, stops the conversion, and all of them are listed. No bit of any tensor changes in either direction;
what CrossLMM has no place for lies beside the weights, in unused_weights.safetensors, and goes back with them.
"""

import argparse
import sys
from functools import partial

from transformers_crosslmm.conversion_commands import (
    add_config_options,
    add_output_options,
    config_options,
    print_report,
    run,
)
from transformers_crosslmm.conversion_crosslmm import (
    convert_crosslmm_weights,
    crosslmm_to_llava_next,
    read_name_table,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FOLDER_OR_NAME", help="the checkpoint to convert")
    parser.add_argument("--name-table", metavar="JSON", help="names of the new blocks, {theirs: ours or null}")
    parser.add_argument("--reverse", action="store_true", help="from ours to LLaVA-NeXT's layout")
    parser.add_argument("--vision", metavar="FOLDER_OR_NAME", help="the encoder's config, if its name is not known")
    add_output_options(parser)
    add_config_options(parser)
    options = parser.parse_args(arguments)
    if options.reverse and (options.push_to_hub or config_options(options)):
        parser.error("--reverse writes LLaVA-NeXT's layout as it is: no config fields, and nothing for the Hub")
    try:
        name_table = read_name_table(options.name_table) if options.name_table else None
        if options.reverse:
            report = crosslmm_to_llava_next(options.source, options.out, name_table=name_table, force=options.force)
            print_report(report, options.out)
            return
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    plan = partial(
        convert_crosslmm_weights,
        options.source,
        name_table=name_table,
        vision=options.vision,
        **config_options(options),
    )
    run(plan, options, keep_left_out=True, measure_entropy=False)


if __name__ == "__main__":
    main()
