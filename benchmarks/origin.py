"""Where a benchmark's figures come from."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def commit() -> str:
    """The commit of this folder."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def origin(script: str, *arguments: str) -> dict[str, str]:
    """The command, the commit, the machine and torch's version. script: a benchmark's `__file__`."""
    return {
        "command": " ".join([f"python benchmarks/{Path(script).name}", *arguments]),
        "commit": commit(),
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores",
        "torch": version("torch"),
    }
