"""Put a trainable CrossLMM together from a SigLIP or SigLIP2 encoder and a Qwen2 or Qwen2.5: `crosslmm compose`.

python conversion/compose_crosslmm_from_backbones.py --preset 2B --out crosslmm-2b
"""

import sys

from crosslmm_cli import app

if __name__ == "__main__":
    app(["compose", *sys.argv[1:]], prog_name="crosslmm")
