"""Where a benchmark's figures come from."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def origin(script: str) -> dict[str, str]:
    """The command, the commit of this folder, the machine and torch's version. script: a benchmark's `__file__`."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    return {
        "command": f"python benchmarks/{Path(script).name}",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
