"""`import fastattn` is light: nothing heavy comes along, and nothing optional has to be there."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = ("transformers", "cudnn", "triton", "safetensors", "tqdm", "cutlass")


def run(code: str) -> str:
    """What a fresh interpreter prints for the code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_nothing_optional() -> None:
    """torch's own compiler counts as heavy too: it takes longer than all of torch."""
    code = f"""
import sys, torch
before = set(sys.modules)
import fastattn
print([n for n in {(*OPTIONAL, "torch._dynamo", "torch._inductor")!r} if n in sys.modules and n not in before])
"""
    assert run(code).strip() == "[]"


def test_the_benchmarks_processes_start_without_torchs_compiler() -> None:
    """Each row of `fastattn sweep users` may have one."""
    code = """
import sys, torch
import fastattn.bench.implementations, fastattn.bench.users.summary, fastattn.bench.users.worker, fastattn.cli.main
print([n for n in ("torch._dynamo", "torch._inductor") if n in sys.modules])
"""
    assert run(code).strip() == "[]"


def test_imports_a_backend_when_it_is_asked() -> None:
    code = """
import sys, torch, fastattn
backends = ("torch", "reference", "cudnn", "triton.decode")
loaded = lambda: [name for name in backends if f"fastattn.backends.{name}" in sys.modules]
assert loaded() == [], loaded()
q = torch.randn(1, 2, 3, 8)
fastattn.scaled_dot_product_attention(q, q, q, backend="torch")
print(*loaded())
"""
    assert run(code).split() == ["torch"]


def test_starts_no_cuda() -> None:
    assert run("import torch, fastattn; print(torch.cuda.is_initialized())").strip() == "False"


def test_modules_are_attributes() -> None:
    """What the pages write after `import fastattn` works, without an import of the module."""
    code = """
import fastattn
print(fastattn.drop_in.patch.__name__, fastattn.flash.flash_attn_func.__name__, "drop_in" in dir(fastattn))
print(hasattr(fastattn, "drop_out"))
"""
    assert run(code).split() == ["patch", "flash_attn_func", "True", "False"]


def test_all_names_can_be_looked_at_without_the_extras() -> None:
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import inspect, fastattn
print({{"drop_in", "warmup"}} <= dict(inspect.getmembers(fastattn)).keys())
try:
    fastattn.hf
except ImportError as error:
    print("transformers" in str(error))
"""
    assert run(code).split() == ["True", "True"]


def test_works_without_the_extras() -> None:
    """As if none of them were installed; what needs one says which, and the rest works."""
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # makes `import name` an ImportError
import torch, fastattn
q, k = torch.randn(1, 4, 3, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
fastattn.scaled_dot_product_attention(q, k, k, mask="causal").sum().backward()
fastattn.scaled_dot_product_attention(q, k, k, softcap=1.0).sum().backward()
explanation = fastattn.explain(q.detach(), k, k)
assert explanation.chosen == "torch"
assert explanation.reasons["decode"] and explanation.reasons["cudnn"]
print(explanation)
fastattn.stats()
"""
    table = run(code)
    assert "-> torch" in table
    assert not any(line.startswith("->") for line in table.splitlines() if "cudnn" in line or "decode" in line)


def test_public_names() -> None:
    code = "import fastattn; print(all(hasattr(fastattn, n) for n in fastattn.__all__), fastattn.__version__)"
    ok, version = run(code).split()
    assert ok == "True"
    assert version.count(".") == 2
