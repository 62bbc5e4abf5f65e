"""What fastattn calls in other libraries is not deprecated: a user's terminal shows no warning of that kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEPRECATED = re.compile(r"FutureWarning|DeprecationWarning|deprecated", re.IGNORECASE)
#: What other libraries do among themselves, and Python shows to nobody who does not ask for it.
AMONG_OTHERS = re.compile(r"site-packages/(?!transformers/|fastattn/)\S+: (Pending)?DeprecationWarning")
TINY = ["--model", "tiny", "-p", "40", "-n", "1", "--device", "cpu"]


def deprecation_lines(*arguments: str, module: str = "fastattn") -> list[str]:
    """The lines about deprecation that the command writes, with every warning shown."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning", "FASTATTN_CUDNN": "0"},
    )
    assert done.returncode == 0, done.stderr
    return [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if DEPRECATED.search(line) and not AMONG_OTHERS.search(line)
    ]


@pytest.mark.parametrize("attn", ["fastattn", "eager"])
def test_generate(saved_model: Path, attn: str) -> None:
    """Through the fused layers, through transformers' modules row by row."""
    options = ["--model", str(saved_model), "--prompt", "a b a", "-g", "4", "--device", "cpu", "--attn", attn]
    assert deprecation_lines("generate", *options) == []


@pytest.mark.slow
def test_benchmark() -> None:
    assert deprecation_lines("benchmark", *TINY, "-g", "4", "--attn", "fastattn,sdpa") == []


@pytest.mark.slow
def test_training_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert deprecation_lines(*TINY, "--gradient-checkpointing", module="benchmarks.train") == []


def test_it_would_be_seen(saved_model: Path, tmp_path: Path) -> None:
    """As if a call of ours used an old name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import warnings\n"
        "import transformers\n"
        "def old(self, *rest, **more):\n"
        "    warnings.warn('`x` is deprecated and will be removed in version 9', FutureWarning, stacklevel=2)\n"
        "    return known(self, *rest, **more)\n"
        "known, transformers.Cache.get_seq_length = transformers.Cache.get_seq_length, old\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        options = ["--model", str(saved_model), "--prompt", "a b a", "-g", "4", "--device", "cpu", "--attn", "eager"]
        assert any("`x` is deprecated" in line for line in deprecation_lines("generate", *options))
