"""A model or a processor by the name of its folder or repository, ready to answer."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .. import TINY_CHECKPOINT
from ..configuration_crosslmm import CrossLMMConfig
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from .inspect import load_config

logger = logging.get_logger(__name__)


def caution(name: str | os.PathLike, config: CrossLMMConfig) -> str | None:
    """What a person must know before believing an answer of this checkpoint; None if there is nothing."""
    if Path(name).resolve() == TINY_CHECKPOINT:
        return (
            "The bundled model is a toy: it knows coloured shapes and digits, and its answers about other videos mean "
            "nothing."
        )
    if config.untrained:
        return "This checkpoint was never trained as a CrossLMM: its answers have nothing to do with the video."
    return None


def load_model(name: str | os.PathLike, *, device: str | None = None) -> CrossLMMForConditionalGeneration:
    """The model of a folder or a repository on the Hub, ready to answer.

    device: "cuda", "cpu", …; a GPU where there is one, when not given. On a CPU the weights become float32, which is
        the faster there; elsewhere they keep the type they were saved in.

    Logs the checkpoint's `caution`, once.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`device` must be one of this machine's; got {device!r}, and torch finds no GPU. Use 'cpu'.")
    dtype = torch.float32 if device == "cpu" else "auto"
    if text := caution(name, load_config(name)):
        logger.warning_once(text)
    model: Any = CrossLMMForConditionalGeneration.from_pretrained(name, dtype=dtype)
    return model.to(device).eval()


def load_processor(name: str | os.PathLike) -> CrossLMMProcessor:
    """The processor of a folder or a repository. Raises ValueError for another model's, OSError for none."""
    load_config(name)
    return CrossLMMProcessor.from_pretrained(name)


__all__ = ["caution", "load_model", "load_processor"]
