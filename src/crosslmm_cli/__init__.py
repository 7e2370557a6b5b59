"""The `crosslmm` command. It imports the package, which takes seconds, only when a command runs."""

from . import asking, checkpoints, measuring, serving, training
from .base import Steps, app

__all__ = ["Steps", "app", "asking", "checkpoints", "measuring", "serving", "training"]
