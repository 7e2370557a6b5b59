"""Runs the tests on each release of Transformers that the package supports, and prints a table.

    python requirements/try_versions.py              # a fast subset on every release (`make test-versions`)
    python requirements/try_versions.py --all        # every test (`make test-versions ALL=1`)
    python requirements/try_versions.py 5.19.0       # one release
    python requirements/try_versions.py 5.24.0 --torch 2.15.0

Each release has an environment of its own in .versions/, kept between runs: it sees what is installed beside this
interpreter, and has its own Transformers before it, and its own torch where one is named (5 GB, the build with CUDA).
A demo answers first; then pytest runs. The table is kept in benchmarks/versions.json, from which docs/tables.py makes
the page's.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".versions"
RESULTS = ROOT / "benchmarks" / "versions.json"
RELEASES = ["5.19.0", "5.20.2", "5.22.2", "5.23.0", "5.24.0"]
SUBSET = [
    "test_configuration_crosslmm.py",
    "test_generation_crosslmm.py",
    "test_modeling_crosslmm.py",
    "test_pipeline_crosslmm.py",
    "test_processing_crosslmm.py",
    "test_remote_code_crosslmm.py",
    "test_saving_crosslmm.py",
    "training/test_resume.py",
]
"""What depends most on Transformers, in a few minutes."""


def environment(release: str, torch: str | None) -> Path:
    """The folder of the environment of a release, and of a torch if one is named; made if it is not there."""
    folder = ENVIRONMENTS / (f"{release}-torch{torch}" if torch else release)
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=False, clear=True)
        paths = {"base": str(folder), "platbase": str(folder)}
        site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        shared = sysconfig.get_path("purelib")
        (site / "shared.pth").write_text(f"{shared}\nimport site; site.addsitedir({shared!r})\n")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--target", str(site)]
        if torch:  # before Transformers: its dependencies come along
            subprocess.run([*install, f"torch=={torch}"], check=True)
        subprocess.run([*install, "--no-deps", f"transformers=={release}"], check=True)
        (folder / ".installed").touch()
    return folder


def outcome(release: str, torch: str | None, *, everything: bool, workers: str) -> dict[str, object]:
    """What a demo and the tests gave on a release."""
    folder, started = environment(release, torch), time.monotonic()
    python = str(folder / "bin" / "python")
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    installed = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    demo = subprocess.run(
        [python, "samples/demo.py"], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tests = ["modeling_tests"] if everything else [f"modeling_tests/{name}" for name in SUBSET]
    command = [python, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *tests]
    with open(ENVIRONMENTS / f"{folder.name}.log", "w+", encoding="utf-8") as log:
        run = subprocess.run(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        *_, last = log.read().splitlines() or [""]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {
        "transformers": release,
        "torch": installed.stdout.strip(),
        "tests": "all" if everything else "subset",
        "demo": demo.returncode == 0,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + (run.returncode not in (0, 1)),
        "skipped": counts.get("skipped", 0),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("releases", nargs="*", default=RELEASES, help="releases of Transformers; all when left out")
    parser.add_argument("--torch", help="a release of torch; the one beside this interpreter when left out")
    parser.add_argument("--all", action="store_true", help="every test instead of the fast subset")
    parser.add_argument("--workers", default="auto", help="processes of pytest")
    given = parser.parse_args()
    columns = "{transformers:>12} {torch:>12} {tests:>7} {demo:>5} {passed:>7} {failed:>7} {skipped:>8} {minutes:>8}"
    names = re.findall(r"\{(\w+)", columns)
    print(columns.format(**{name: name for name in names}))
    rows = []
    for release in given.releases:
        row = outcome(release, given.torch, everything=given.all, workers=given.workers)
        rows.append(row)
        print(columns.format(**row | {"demo": "ok" if row["demo"] else "FAIL"}), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {
        "command": f"python requirements/try_versions.py {' '.join(sys.argv[1:])}".strip(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    tried = {(row["transformers"], row["torch"]) for row in rows}
    kept = [row for row in kept if (row["transformers"], row["torch"]) not in tried]
    rows_by_release = sorted(kept + [row | about for row in rows], key=lambda row: (row["transformers"], row["torch"]))
    RESULTS.write_text(json.dumps(rows_by_release, indent=1) + "\n")
    bad = [row["transformers"] for row in rows if row["failed"] or not row["demo"]]
    if bad:
        sys.exit(f"Failures on Transformers {', '.join(map(str, bad))}: see the logs in {ENVIRONMENTS.name}/.")


if __name__ == "__main__":
    main()
