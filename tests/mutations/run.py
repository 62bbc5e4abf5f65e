"""Makes each mistake of `mutations.py` in a copy of the tree and runs the tests that are to notice it.

    python tests/mutations/run.py [-j JOBS] [-k WORDS]

Exits with 0 when every mistake is noticed; with 1 when one survives, no longer applies, or breaks more than it says
(a module that cannot be imported proves nothing); and when the tests fail without any mistake.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutation import Mutation
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 400  #: seconds for the tests of one mistake
NOTICED, SURVIVED = "noticed", "SURVIVED"


def copy_tree(folder: Path) -> None:
    """What the tests read, without what was built from it."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("src", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)


def pytest(folder: Path, arguments: tuple[str, ...]) -> tuple[int, str]:
    """Runs tests of a copy on the copy's package. Returns pytest's status and what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "FASTATTN_SHRINK": "0",
        "TRITON_CACHE_DIR": str(folder / ".triton"),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, "timed out"
    return done.returncode, done.stdout + done.stderr


def applied(mutation: Mutation, text: str) -> str | None:
    """The text with the mistake; None unless there is just one place for it."""
    return text.replace(mutation.old, mutation.new) if text.count(mutation.old) == 1 else None


def verdict(mutation: Mutation) -> tuple[str, str]:
    """What became of a mistake, and what pytest said."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_tree(folder)
        path = folder / "src" / "fastattn" / mutation.file
        changed = applied(mutation, path.read_text())
        if changed is None:
            return "DOES NOT APPLY", ""
        path.write_text(changed)
        if path.suffix == ".py":
            compile(changed, str(path), "exec")
        status, output = pytest(folder, mutation.tests)
    if status == 0:
        return SURVIVED, output
    # 1: tests failed. Others: nothing was collected, a module could not be imported, a crash.
    return (NOTICED if status in (1, -1) else f"BROKEN (status {status})"), output


def baseline(mutations: list[Mutation]) -> list[str]:
    """The tests that fail without any mistake."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_tree(folder)
        where = "import fastattn; print(fastattn.__file__)"
        environment = os.environ | {"PYTHONPATH": str(folder / "src")}
        found = subprocess.run(
            [sys.executable, "-c", where], env=environment, capture_output=True, text=True, check=True
        )
        if not Path(found.stdout.strip()).is_relative_to(folder):
            return [f"the copy's package is not the one that is imported, but {found.stdout.strip()}"]
        failed = []
        for tests in dict.fromkeys(mutation.tests for mutation in mutations):
            status, output = pytest(folder, tests)
            if status:
                failed.append(f"{' '.join(tests)} fails without any mistake (status {status}):\n{output[-1500:]}")
        return failed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", "--jobs", type=int, default=2, help="mistakes at a time")
    parser.add_argument("-k", "--words", default="", help="only mistakes whose name or file holds this text")
    chosen = parser.parse_args(arguments)
    mutations = [m for m in MUTATIONS if chosen.words in f"{m.name} {m.file}"]
    start = time.perf_counter()
    failed = baseline(mutations)
    print("\n".join(failed) or f"without mistakes the tests pass ({time.perf_counter() - start:.0f} s)", flush=True)
    if failed or not mutations:
        return 1
    bad = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for mutation, (what, output) in zip(mutations, pool.map(verdict, mutations)):
            print(f"{what:<10} {mutation.file}: {mutation.name}", flush=True)
            if what != NOTICED:
                bad += 1
                print("\n".join(f"    {line}" for line in output.splitlines()[-15:]), flush=True)
    print(f"{len(mutations) - bad} of {len(mutations)} noticed ({time.perf_counter() - start:.0f} s)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
