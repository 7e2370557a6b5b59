"""Begin a CrossLMM from a LLaVA-OneVision or LLaVA-Video: its encoder, projector and language model.

    python conversion/convert_llava_to_crosslmm.py llava-hf/llava-onevision-qwen2-0.5b-ov-hf --out crosslmm-ov-0.5b
    python conversion/convert_llava_to_crosslmm.py lmms-lab/LLaVA-Video-7B-Qwen2 --pooled-grid-size 3 --out crosslmm-7b

Both forms are read: Transformers' own (llava-hf) and LLaVA-NeXT's (lmms-lab). Frames are pooled to LLaVA's own grid
unless `--pooled-grid-size` says otherwise, and with the gates at 0 the model then answers as LLaVA does.
"""

import argparse
from functools import partial

from transformers_crosslmm.conversion_commands import add_config_options, add_output_options, config_options, run
from transformers_crosslmm.conversion_crosslmm import convert_llava


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FOLDER_OR_NAME", help="the LLaVA checkpoint")
    parser.add_argument("--vision", metavar="FOLDER_OR_NAME", help="the encoder's config, if its name is not known")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="the language model's unless given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    add_output_options(parser)
    add_config_options(parser)
    options = parser.parse_args(arguments)
    plan = partial(
        convert_llava,
        options.source,
        vision=options.vision,
        dtype=options.dtype,
        seed=options.seed,
        **config_options(options),
    )
    run(plan, options, keep_left_out=False, measure_entropy=True)


if __name__ == "__main__":
    main()
