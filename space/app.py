"""A Hugging Face Space: the page of `crosslmm demo`. The variable CROSSLMM_MODEL names another checkpoint."""

import os

from transformers_crosslmm import TINY_CHECKPOINT
from transformers_crosslmm.asking.web_page import build_page, serve_page

serve_page(build_page(os.environ.get("CROSSLMM_MODEL", TINY_CHECKPOINT)), host="0.0.0.0", port=7860)
