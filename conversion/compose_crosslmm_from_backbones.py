"""Put a trainable CrossLMM together from a SigLIP or SigLIP2 encoder and a Qwen2 or Qwen2.5 language model.

    python conversion/compose_crosslmm_from_backbones.py --preset 2B --out crosslmm-2b
    python conversion/compose_crosslmm_from_backbones.py --vision google/siglip2-so400m-patch14-384 \\
        --text Qwen/Qwen2.5-1.5B-Instruct --pooled-grid-size 1 --cross-attention-interval 2 --out mine

The gates are 0 at first, so what comes out answers as its language model does, and nothing it says is about the video
before it is trained.
"""

import argparse
from functools import partial

from transformers_crosslmm.configuration_crosslmm import FLAVOURS, PRESETS
from transformers_crosslmm.conversion_commands import add_config_options, add_output_options, config_options, run
from transformers_crosslmm.conversion_crosslmm import compose


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="a size of the paper: its backbones and pooled grid")
    parser.add_argument("--flavour", choices=FLAVOURS, default="paper", help="options that the paper has, or ours too")
    parser.add_argument("--long-context", action="store_true", help="131,072 positions by YaRN instead of 32,768")
    parser.add_argument("--vision", metavar="FOLDER_OR_NAME", help="vision encoder; the preset's unless given")
    parser.add_argument("--text", metavar="FOLDER_OR_NAME", help="language model; the preset's unless given")
    parser.add_argument("--tokenizer", metavar="FOLDER_OR_NAME", help="if it is not with the language model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="the language model's unless given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    add_output_options(parser)
    add_config_options(parser)
    options = parser.parse_args(arguments)
    plan = partial(
        compose,
        options.vision,
        options.text,
        preset=options.preset,
        flavour=options.flavour,
        long_context=options.long_context,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        seed=options.seed,
        **config_options(options),
    )
    run(plan, options, keep_left_out=False, measure_entropy=True)


if __name__ == "__main__":
    main()
