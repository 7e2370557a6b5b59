"""Start a CrossLMM from a LLaVA-OneVision or LLaVA-Video: `crosslmm convert`.

python conversion/convert_llava_to_crosslmm.py llava-hf/llava-onevision-qwen2-0.5b-ov-hf --out crosslmm-ov-0.5b
"""

import sys

from crosslmm_cli import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]], prog_name="crosslmm")
