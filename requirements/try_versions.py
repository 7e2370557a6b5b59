"""Runs the tests on each release of Transformers that the package supports, and prints a table.

    python requirements/try_versions.py              # a fast subset on every release (`make test-versions`)
    python requirements/try_versions.py --all        # every test (`make test-versions ALL=1`)
    python requirements/try_versions.py 5.19.0       # one release

Each release has an environment of its own in .versions/, kept between runs: it sees what is installed beside this
interpreter, and has its own Transformers before it. A demo answers first; then pytest runs. The table is kept in
benchmarks/versions.json, from which docs/tables.py makes the page's.
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


def environment(release: str) -> Path:
    """The interpreter of a release's environment, made if it is not there."""
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=False, clear=True)
        paths = {"base": str(folder), "platbase": str(folder)}
        site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        shared = sysconfig.get_path("purelib")
        (site / "shared.pth").write_text(f"{shared}\nimport site; site.addsitedir({shared!r})\n")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, "--target", str(site), f"transformers=={release}"], check=True)
        (folder / ".installed").touch()
    return python


def outcome(release: str, *, everything: bool, workers: str) -> dict[str, object]:
    """What a demo and the tests gave on a release."""
    python, started = str(environment(release)), time.monotonic()
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    demo = subprocess.run(
        [python, "samples/demo.py"], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tests = ["modeling_tests"] if everything else [f"modeling_tests/{name}" for name in SUBSET]
    command = [python, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *tests]
    with open(ENVIRONMENTS / f"{release}.log", "w+", encoding="utf-8") as log:
        run = subprocess.run(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        *_, last = log.read().splitlines() or [""]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {
        "transformers": release,
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
    parser.add_argument("--all", action="store_true", help="every test instead of the fast subset")
    parser.add_argument("--workers", default="auto", help="processes of pytest")
    given = parser.parse_args()
    rows = []
    print(f"{'transformers':>12} {'tests':>7} {'demo':>5} {'passed':>7} {'failed':>7} {'skipped':>8} {'minutes':>8}")
    for release in given.releases:
        row = outcome(release, everything=given.all, workers=given.workers)
        rows.append(row)
        demo = "ok" if row["demo"] else "FAIL"
        print(
            f"{release:>12} {row['tests']:>7} {demo:>5} {row['passed']:>7} {row['failed']:>7} {row['skipped']:>8} "
            f"{row['minutes']:>8}",
            flush=True,
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {
        "command": f"make test-versions{' ALL=1' if given.all else ''}",
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
        ).stdout.strip(),
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [
        row
        for row in kept
        if (row["transformers"], row["tests"]) not in {(r["transformers"], r["tests"]) for r in rows}
    ]
    RESULTS.write_text(json.dumps(sorted(kept + [row | about for row in rows], key=str), indent=1) + "\n")
    bad = [row["transformers"] for row in rows if row["failed"] or not row["demo"]]
    if bad:
        sys.exit(f"Failures on Transformers {', '.join(map(str, bad))}: see {ENVIRONMENTS.name}/RELEASE.log.")


if __name__ == "__main__":
    main()
