"""Compose an untrained CrossLMM from a vision encoder and a language model: `crosslmm compose`.

python conversion/compose_crosslmm_from_backbones.py --preset 2B --out crosslmm-2b
"""

import sys

from crosslmm_cli import app

if __name__ == "__main__":
    app(["compose", *sys.argv[1:]], prog_name="crosslmm")
