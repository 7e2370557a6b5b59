"""The layout of the package: which folder may import which, and how long a file may be."""

import ast
from pathlib import Path

import pytest

import transformers_crosslmm

PACKAGE = Path(transformers_crosslmm.__file__).parent
WINGS = ["spine", "checkpoints", "asking", "training", "serving", "measuring", "tiny"]
"""From the bottom up: a file imports from its own wing and from those before it."""

SPINE = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "export"))
FILES = SPINE + sorted(path for wing in WINGS[1:] for path in (PACKAGE / wing).rglob("*.py"))
LEAF = PACKAGE / "tiny" / "procedural_videos.py"
"""Draws videos out of nothing and imports nothing of the package, so every wing may use it."""

LONGEST = 800


def wing_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "spine"


def imported_modules(path: Path) -> set[Path]:
    """The files of this package that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            candidates = [folder, *(folder / alias.name for alias in node.names)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            folder = PACKAGE.parent.joinpath(*node.module.split("."))
            candidates = [folder, *(folder / alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            candidates = [PACKAGE.parent.joinpath(*alias.name.split(".")) for alias in node.names]
        else:
            continue
        files = [file for path in candidates for file in (path.with_suffix(".py"), path / "__init__.py")]
        found |= {file for file in files if file.is_file()}
    return {file for file in found if PACKAGE in file.parents}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down_only(path):
    allowed = WINGS[: WINGS.index(wing_of(path)) + 1]
    imported = imported_modules(path) - {LEAF}
    upwards = [str(file.relative_to(PACKAGE)) for file in imported if wing_of(file) not in allowed]
    assert not upwards, f"{path.name} imports from a wing above its own"


def test_the_leaf_imports_nothing_of_the_package():
    assert not imported_modules(LEAF)


@pytest.mark.parametrize("path", SPINE, ids=[path.name for path in SPINE])
def test_what_travels_with_a_checkpoint_imports_its_neighbours_by_name_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}: only `from .name import …` is followed by Transformers"
            assert node.module, f"line {node.lineno}: only `from .name import …` is followed by Transformers"
            assert "." not in node.module, f"line {node.lineno}: the files lie flat in a checkpoint"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
