"""Loads models and processors from a folder or from the Hub."""

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
    """A warning for checkpoints whose answers mean nothing, the tiny one and untrained ones; None for others."""
    if Path(name).resolve() == TINY_CHECKPOINT:
        return (
            "The bundled model is a toy: it knows coloured shapes and digits, and its answers about other videos mean "
            "nothing."
        )
    if config.untrained:
        return "This checkpoint was never trained as a CrossLMM: its answers have nothing to do with the video."
    return None


def load_model(name: str | os.PathLike, *, device: str | None = None) -> CrossLMMForConditionalGeneration:
    """Loads a model for inference from a folder or a repository on the Hub.

    device: "cuda", "cpu", …; None for a GPU if there is one. On a CPU the weights become float32, which is faster
        there; elsewhere they keep their saved type.

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


def load_processor(name: str | os.PathLike, *, add_timestamps: bool | None = None) -> CrossLMMProcessor:
    """Loads a processor from a folder or a repository. Raises ValueError for another model's, OSError for none.

    add_timestamps: write each frame's time before it; None: as the checkpoint's processor does.
    """
    load_config(name)
    try:
        processor = CrossLMMProcessor.from_pretrained(name)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # a field of another type raises any class
        raise ValueError(
            f"{os.fspath(name)!r} must be a CrossLMM checkpoint; its processor's files are broken: {str(error)[:300]}"
        ) from error
    if add_timestamps is not None:
        processor.add_timestamps = add_timestamps
    return processor


__all__ = ["caution", "load_model", "load_processor"]
