"""Convert a CrossLMM trained in LLaVA-NeXT's code base, or convert one back: `crosslmm convert`.

python conversion/convert_crosslmm_weights_to_hf.py TRAINED --name-table names.json --out crosslmm-7b
"""

import sys

from crosslmm_cli import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]], prog_name="crosslmm")
