"""Every code block of README.md and docs/ runs, and prints what the page says it prints.

What the pages keep to, and may use:
- `python` blocks run in order, in one namespace per page, in a temporary folder that looks like the repository's root.
  Comments right behind a statement that prints are its output.
- `bash` blocks run there too, in turn with them. A `text` block right behind one is what it prints.
- In outputs `…` stands for anything, and for any lines where it is a line.
- A block with a comment that begins "needs" (the network, a GPU, a checkpoint of yours) is not run. It is parsed, as
  all blocks are: imported names exist, and every command of ours takes its arguments.
- A block with a comment that begins "takes" (a minute, say), and what follows it on its page, runs with `-m slow`.
- `json` and `yaml` blocks are read.
- Tables between `<!-- table … -->` and `<!-- end -->` are what docs/tables.py makes of the kept results.
"""

import argparse
import ast
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import crosslmm_cli
from transformers_crosslmm.checkpoints.commands import config_fields

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PARSED_ONLY = [ROOT / "conversion" / "README.md"]  # its commands are about gigabytes of other people's weights

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<source>.*?)^(?P=indent)```$", re.S | re.M)
OPERATORS = ";&|<>()\n"


@dataclass(frozen=True)
class Block:
    """A fenced block. line: its first, counted on the page. is_output: a `text` block right behind a `bash` one."""

    page: str
    line: int
    language: str
    source: str
    is_output: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @cached_property
    def comments(self) -> list[str]:
        return re.findall(r"(?:^|\s)# *(.*)", self.source)

    @property
    def needs_more_than_a_test_has(self) -> bool:
        return any(comment.startswith("needs ") for comment in self.comments)

    @property
    def is_slow(self) -> bool:
        return any(comment.startswith("takes ") for comment in self.comments)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    end_before = 0
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        source = "".join(line[indent:] or "\n" for line in match["source"].splitlines(keepends=True))
        is_next = bool(blocks) and not text[end_before : match.start()].strip()
        is_output = match["language"] == "text" and is_next and blocks[-1].language == "bash"
        line = text[: match.start("source")].count("\n") + 1
        blocks.append(Block(page.name, line, match["language"], source, is_output))
        end_before = match.end()
    return blocks


def id_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- parsing --------------------------------------------------------------------------------------------------------


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of every simple command; redirections cut one short."""
    assert "<<" not in block.source, f"{block}: a here-document; write the file in a python block"
    source = re.sub(r"(^|\s)#.*", r"\1", block.source).replace("\\\n", " ")
    lexer = shlex.shlex(source, posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if not word.strip(OPERATORS):
            if words:
                yield words
            words = []
        elif words or not re.match(r"\w+=", word):
            words.append(word)


def check_command(words: Sequence[str]) -> None:
    """Raises AssertionError where a command of ours would not take these words."""
    words = list(words)
    for ours in (["crosslmm"], ["-m", "crosslmm_cli"]):
        places = [i for i in range(len(words)) if words[i : i + len(ours)] == ours]
        if places:  # by itself or behind a launcher
            return check_crosslmm(words[places[0] + len(ours) :])
    if re.fullmatch(r"python[\d.]*", words[0]) and len(words) > 1:
        if words[1] == "-m":
            return check_script(words[2], words[3:])
        if words[1].endswith(".py"):
            return check_script(words[1], words[2:])
    if "-m" in words[:-1] and words[words.index("-m") + 1].startswith("transformers_crosslmm"):  # behind a launcher
        return check_script(words[words.index("-m") + 1], words[words.index("-m") + 2 :])
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if word not in targets]
        assert not unknown, f"make has no {unknown}"
    return None


def check_crosslmm(words: list[str]) -> None:
    group = typer.main.get_command(crosslmm_cli.app)
    try:
        context = group.make_context("crosslmm", list(words))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        inner = command.make_context(name, rest, parent=context)
        if name == "train":  # its options are those of a dataclass
            from transformers_crosslmm.training.trainer import CrossLMMTrainingArguments

            known = {field.name for field in fields(CrossLMMTrainingArguments)}
            unknown = [word for word in inner.args if word.startswith("--") and word[2:] not in known]
            assert not unknown, f"crosslmm train does not know {unknown}"
        elif name in ("compose", "convert"):  # config fields by their names
            config_fields(inner.args)
    except typer.Exit:  # --help
        pass
    except typer.TyperException as error:
        raise AssertionError(f"crosslmm {shlex.join(words)}: {error.format_message()}") from error


class Parsed(BaseException):
    """The script took its arguments; nothing more is wanted of it."""


def check_script(script: str, arguments: list[str]) -> None:
    """Runs a script of ours up to the moment where its own parser has taken these arguments."""
    if script.endswith(".py"):
        path = ROOT / script
        if not path.is_file():
            assert not (ROOT / Path(script).parts[0]).is_dir() or Path(script).parent == Path(), f"no {script}"
            return
        source = path.read_text(encoding="utf-8")
    else:
        if not script.startswith("transformers_crosslmm"):
            return
        spec = importlib.util.find_spec(script)
        assert spec is not None, f"no module {script}"
        source = Path(spec.origin).read_text(encoding="utf-8")
    if "argparse" not in source and "HfArgumentParser" not in source:
        return

    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        _, unknown = parse_known_args(self, *args, **kwargs)
        if unknown:
            self.error(f"unknown: {unknown}")
        raise Parsed

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said), redirect_stdout(said):
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        try:
            if script.endswith(".py"):
                patch.syspath_prepend(str(path.parent))  # as Python does for a script
                runpy.run_path(str(path), run_name="__main__")
            else:
                patch.delitem(sys.modules, script, raising=False)  # until the block is read
                runpy.run_module(script, run_name="__main__")
        except Parsed:
            return
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{script} {shlex.join(arguments)}: {said.getvalue()}") from end


def check_imports(tree: ast.Module) -> None:
    """Raises where what a block imports does not exist, packages that are not installed aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {node.module: [alias.name for alias in node.names]}
        elif isinstance(node, ast.Import):
            names = {alias.name: [] for alias in node.names}
        else:
            continue
        for module, attributes in names.items():
            if importlib.util.find_spec(module.partition(".")[0]) is not None:
                imported = importlib.import_module(module)
                for name in attributes:
                    assert hasattr(imported, name), f"{module} has no {name}"


@pytest.mark.parametrize("page", [*PAGES, *PARSED_ONLY], ids=id_of)
def test_all_blocks_parse_and_every_option_exists(page):
    for block in blocks_of(page):
        try:
            match block.language:
                case "python":
                    check_imports(ast.parse(block.source))
                case "bash":
                    subprocess.run(["bash", "-n"], input=block.source, text=True, check=True)
                    for words in commands_of(block):
                        check_command(words)
                case "json":
                    json.loads(block.source)
                case "yaml":
                    yaml.safe_load(block.source)
                case "text" | "bibtex" | "":
                    pass
                case other:
                    raise AssertionError(f"blocks in {other!r} have no test")
        except (AssertionError, SyntaxError, ValueError, ImportError, subprocess.CalledProcessError) as error:
            pytest.fail(f"{block}: {error}", pytrace=False)


# --- running --------------------------------------------------------------------------------------------------------


def check_output(block: Block, where: int, printed: str, expected: str) -> None:
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*") + "\n"
        for line in expected.strip("\n").splitlines()
    )
    if not re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)):
        pytest.fail(
            f"{block.page}:{where} prints\n{printed}\nThe page says\n{expected}\nOne of the two is stale.",
            pytrace=False,
        )


def run_python(block: Block, namespace: dict) -> None:
    lines = block.source.splitlines()
    for statement in ast.parse(block.source).body:
        ast.increment_lineno(statement, block.line - 1)
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(ast.Module([statement], []), block.page, "exec"), namespace)
        comments = comments_behind(statement, lines, first_line=block.line)
        is_print = isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("print(")
        if comments and (is_print or printed.getvalue()):
            check_output(block, statement.end_lineno + 1, printed.getvalue(), "\n".join(comments))


def comments_behind(statement: ast.stmt, lines: list[str], *, first_line: int) -> list[str]:
    """The text of the comments on the statement's last line, or else on the lines that follow it without a gap."""
    end = statement.end_lineno - first_line  # index of its last line
    rest = lines[end].encode()[statement.end_col_offset :].decode().strip()
    if rest.startswith("#"):
        return [rest.removeprefix("#").removeprefix(" ")]
    behind = []
    for line in lines[end + 1 :]:
        if not line.startswith("#"):
            break
        behind.append(line.removeprefix("#").removeprefix(" "))
    return behind


def run_bash(block: Block) -> str:
    """Runs the block and returns its standard output. Plain lines of `crosslmm` run in this process, whose imports are
    done; anything else is bash's."""
    commands = list(commands_of(block))
    plain = not re.search(rf"[{re.escape(OPERATORS.strip())}$]", re.sub(r"(^|\s)#.*", "", block.source))
    if plain and all(words[0] == "crosslmm" for words in commands):
        printed = ""
        for words in commands:
            result = CliRunner().invoke(crosslmm_cli.app, words[1:])
            if result.exit_code:
                pytest.fail(
                    f"{block}: {shlex.join(words)} ended with {result.exit_code}:\n{result.output}", pytrace=False
                )
            printed += result.stdout
        return printed
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", "-euo", "pipefail", "-c", block.source]
    done = subprocess.run(script, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{block} ended with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def run_page(blocks: Sequence[Block]) -> None:
    namespace = {"__name__": "__main__"}
    printed: str | None = None  # by the bash block before
    for block in blocks:
        if block.is_output and printed is not None:
            check_output(block, block.line, printed, block.source)
        printed = None
        if block.needs_more_than_a_test_has:
            continue
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "bash":
            printed = run_bash(block)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The working folder: like the repository's root, as far as the pages use it, and theirs to write in."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    for folder in ("benchmarks", "conversion"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quick(page: Path) -> list[Block]:
    """The blocks up to the first slow one."""
    blocks = blocks_of(page)
    return blocks[: next((i for i, block in enumerate(blocks) if block.is_slow), len(blocks))]


@pytest.mark.parametrize("page", [page for page in PAGES if quick(page)], ids=id_of)
def test_quick_blocks_run_and_print_what_the_page_says(page, checkout):
    run_page(quick(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if quick(page) != blocks_of(page)], ids=id_of)
def test_pages_with_slow_blocks_run_from_beginning_to_end(page, checkout):
    run_page(blocks_of(page))


# --- what is not in blocks ------------------------------------------------------------------------------------------


def test_files_that_the_pages_name_exist():
    named = re.compile(
        r"\b(?:benchmarks|docs|examples|modeling_tests|conversion|requirements)/[\w/-]+\.\w+|\btest_\w+\.py"
    )
    tests = {path.name for path in (ROOT / "modeling_tests").rglob("test_*.py")}
    missing = {
        (page.name, name)
        for page in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        for name in named.findall(page.read_text(encoding="utf-8"))
        if name not in tests and not (ROOT / name).exists()
    }
    assert not missing


def test_the_counts_that_info_keeps_are_what_the_networks_count_to():
    tables = runpy.run_path(str(DOCS / "tables.py"))
    kept = json.loads(tables["PRESET_COSTS"].read_text(encoding="utf-8"))
    assert kept == tables["preset_costs"](), "`python docs/tables.py` counts them anew"


def test_tables_are_what_the_kept_results_say():
    tables = runpy.run_path(str(DOCS / "tables.py"))
    pages = {path: path.read_text(encoding="utf-8") for path in tables["PAGES"]}
    assert {match[2] for page in pages.values() for match in tables["TABLE"].finditer(page)} == set(tables["TABLES"])
    for path, page in pages.items():
        assert tables["with_tables"](page) == page, f"{path.name} is stale: `python docs/tables.py` writes it anew"


def test_the_picture_of_memory_has_the_counted_figures():
    picture, page = (DOCS / "memory.svg").read_text(encoding="utf-8"), (DOCS / "how-it-works.md").read_text("utf-8")
    for label in runpy.run_path(str(DOCS / "draw_memory.py"))["labels"]():
        assert label in picture, "docs/memory.svg is stale: `python docs/draw_memory.py` draws it anew"
        assert label.removeprefix("+ ") in page


@pytest.mark.parametrize("page", [*PAGES, *PARSED_ONLY, ROOT / "CONTRIBUTING.md"], ids=id_of)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_what_the_api_page_names_exists():
    names = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert names
    for name in names:
        pkgutil.resolve_name(name)


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason='needs pip install "transformers_crosslmm[docs]"')
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?([^\" >]+)", html)
        loaded += re.findall(r"<link[^>]*\brel=\"?(?:stylesheet|preconnect|preload)[^>]*\bhref=\"?([^\" >]+)", html)
        assert loaded
        assert not [source for source in loaded if re.match(r"(https?:)?//", source)], page
