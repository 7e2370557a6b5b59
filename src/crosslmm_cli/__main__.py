"""`python -m crosslmm_cli`."""

from . import app

app()
