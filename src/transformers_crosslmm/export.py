"""`python -m transformers_crosslmm.export FOLDER OUT`: see `checkpoints/export.py`."""

from .checkpoints.export import main

if __name__ == "__main__":
    main()
