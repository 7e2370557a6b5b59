"""The optional parts: what each extra brings is there and is used by a test, or is skipped with a reason."""

import configparser
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

USES = {
    "flash": "test_attention_backends_crosslmm.py",
    "train": "training/test_trainer.py",
    "ray": "serving/test_corpus.py",
    "eval": "measuring/test_lmms_eval.py",
    "serve": "serving/test_server.py",
    "demo": "asking/test_web_page.py",
    "docs": "test_docs.py",
    "trl": "training/test_trl.py",
    "vllm": "serving/test_vllm.py",
}
"""By extra, the file that does with the real packages what the extra is for."""

MODULES = {
    "flash-attn": "flash_attn",
    "lmms-eval": "lmms_eval",
    "mkdocs-material": "material",
    "prometheus-client": "prometheus_client",
}
"""By package, what is imported of it, where that is not its own name."""


def requirements() -> dict[str, list[Requirement]]:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = settings["options.extras_require"]
    return {name: [Requirement(line) for line in extras[name].split("\n") if line] for name in extras if name != "dev"}


def test_every_extra_is_in_the_tables_and_has_a_test():
    extras = requirements()
    assert set(extras) == set(USES)
    assert all((ROOT / "modeling_tests" / name).exists() for name in USES.values())
    for page in ("README.md", "docs/getting-started.md"):
        rows = set(re.findall(r"^\| `(\w+)`", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
        assert set(extras) <= rows, f"{page} leaves out {set(extras) - rows}"


@pytest.mark.parametrize("extra", USES)
def test_what_an_extra_brings_can_be_imported_and_is_new_enough(extra):
    for requirement in requirements()[extra]:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f'{requirement.name} is missing: pip install "transformers_crosslmm[{extra}]"')
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement.name} {version}"
        importlib.import_module(MODULES.get(requirement.name, requirement.name))
