"""CrossLMM for Hugging Face Transformers."""

from pathlib import Path

from ._version import __version__
from .configuration_crosslmm import CrossLMMConfig, CrossLMMTextConfig
from .modeling_crosslmm import (
    CrossLMMForConditionalGeneration,
    CrossLMMModel,
    CrossLMMPreTrainedModel,
    CrossLMMTextModel,
)

TINY_CHECKPOINT = Path(__file__).parent / "tiny_checkpoint"
