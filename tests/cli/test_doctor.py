import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn._compat.versions import numbers
from fastattn.backends.triton.binaries import policy
from fastattn.cli import doctor, machine_probes, own_probes
from fastattn.cli.finding import Finding
from fastattn.dispatch import registry


def findings():
    return {f.subject: f for f in doctor.examine()}


def test_it_says_what_is_here():
    found = findings()
    assert torch.__version__ in found["torch"].text
    assert fastattn.__version__ in found["fastattn"].text
    assert {f"backend {name}" for name in registry.NAMES} <= set(found)
    assert found["backend reference"].state == "ok"
    assert found["transformers"].state == "ok"


def test_what_serves_calls_here_is_ok():
    found = findings()
    q = torch.empty(1, 8, 200, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    chosen = fastattn.explain(q, q, q, mask="causal").chosen
    assert found[f"backend {chosen}"].state == "ok"
    assert found[f"backend {chosen}"].text.startswith("forward and backward, relative error")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_needs_doing(monkeypatch):
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN"):
        monkeypatch.delenv(name, raising=False)
    found = findings()
    assert found["GPU"].state == "none"
    assert "everything works, slower" in found["GPU"].text
    assert [f for f in found.values() if f.state in ("missing", "broken") or f.advice] == []


@pytest.mark.parametrize("module", ["triton", "transformers"])
def test_a_package_that_does_not_import_is_a_line(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # what imports find is None: ModuleNotFoundError
    if module == "transformers":  # (else a second copy of the integration would be registered)
        for name in [name for name in sys.modules if name.startswith("fastattn.integrations.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("fastattn.integrations.transformers", raising=False)
    found = {f.subject.lower(): f for f in doctor.examine()}
    assert found[module].state == "broken"
    assert "Error" in found[module].text


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13: cannot open shared object file"), OSError("bad ELF"), RuntimeError("x\ny")]
)
def test_torch_that_does_not_import_is_a_line_and_status_1(monkeypatch, capsys, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise error

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert re.search(rf"^torch +broken +{type(error).__name__}: {str(error).splitlines()[0]}$", out, re.MULTILINE)
    assert "- reinstall torch" in out


def test_torch_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main() == 1
    assert "- pip install 'torch>=2.11'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "package, version, subject, advice",
    [
        ("nvidia-cudnn-frontend", "1.27.0", "cuDNN frontend", "pip install -U 'nvidia-cudnn-frontend>=1.28'"),
        ("transformers", "5.3.1.dev0", "transformers", "pip install -U 'transformers>=5.4'"),
        ("transformers", None, "transformers", "pip install 'fastattn[hf]'"),
    ],
)
def test_what_is_old_or_missing_comes_with_what_to_install(monkeypatch, package, version, subject, advice):
    real = machine_probes.version_of
    monkeypatch.setattr(machine_probes, "version_of", lambda name: version if name == package else real(name))
    found = findings()
    assert found[subject].advice == advice
    assert f"- {advice}" in doctor.render(list(found.values()))


@pytest.mark.parametrize("version", ["1.28", "1.28.0rc1", "1.100.2", "2.0"])
def test_versions_that_are_new_enough(version):
    assert numbers(version) >= machine_probes.CUDNN_FRONTEND


def test_with_a_gpu_what_is_absent_has_to_be_installed(monkeypatch):
    monkeypatch.setattr(machine_probes, "has_gpu", lambda: True)
    monkeypatch.setattr(machine_probes, "version_of", lambda name: None)
    found = [*machine_probes.frontend(), *machine_probes.triton()]
    assert [(f.state, f.advice) for f in found] == [("missing", "pip install 'fastattn[cuda]'")] * 2


@pytest.mark.parametrize(
    "cuda, listed, state, advice",
    [
        ("13.0", "GPU 0: NVIDIA H100 80GB HBM3 (UUID: x)", "broken", machine_probes.GET_DRIVER),
        (None, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: x)", "broken", machine_probes.GET_TORCH),
        (None, "No devices were found", "none", ""),
        (None, None, "none", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use(monkeypatch, cuda, listed, state, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine_probes, "ask", lambda *command: listed)
    (found,) = machine_probes.gpu()
    assert (found.state, found.advice) == (state, advice)


def test_a_backend_that_computes_wrong_numbers_is_broken(monkeypatch, fresh_caches):
    reference = type(registry.backend("reference"))
    real = reference.bind

    class Wrong:
        def __init__(self, kernel):
            self.backward = kernel.backward
            self.right = kernel.forward

        def forward(self, call):
            out, lse = self.right(call)
            return (out if call.q.dtype == torch.float64 else out * 1.1), lse

    monkeypatch.setattr(reference, "bind", lambda self, problem, call: Wrong(real(self, problem, call)))
    found = findings()["backend reference"]
    assert found.state == "broken"
    assert "wrong: relative error 1" in found.text


def test_a_backend_that_crashes_is_a_line(monkeypatch, fresh_caches):
    def crash(self, problem, call):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(type(registry.backend("torch")), "bind", crash)
    found = findings()["backend torch"]
    assert (found.state, found.text) == ("broken", "RuntimeError: no kernel image")


def test_switches_in_force_are_named(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKENDS", "reference")
    monkeypatch.setenv("FASTATTN_CUDN", "0")
    found = findings()
    assert found["FASTATTN_BACKENDS=reference"].state == "ok"
    assert found["FASTATTN_CUDN=0"].state == "broken"
    assert found["backend reference"].state == "ok"
    assert found["backend torch"].state in ("off", "broken")


def test_a_backend_list_with_an_unknown_name_is_a_line(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKENDS", "torch,nope")
    found = findings()
    line = found["FASTATTN_BACKENDS=torch,nope"]
    assert line.state == "broken"
    assert "expected one or more of decode, hopper, cudnn, torch, prefill, reference, got nope" in line.text
    assert found["backend reference"].state == "ok"


def test_a_switch_that_says_nothing_is_a_line(monkeypatch):
    wrong = {"FASTATTN_PLANS": "exakt", "FASTATTN_CUDNN": "never", "FASTATTN_INTERPRET": "2"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    found = findings()
    for name, value in wrong.items():
        line = found[f"{name}={value}"]
        assert line.state == "broken" and f"{name}: expected one of " in line.text and f"got '{value}'" in line.text


def test_every_switch_of_the_source_is_known():
    source = Path(fastattn.__file__).parent
    read = {name for file in source.rglob("*.py") for name in re.findall(r"\"(FASTATTN_[A-Z_]+)\"", file.read_text())}
    assert read - {"FASTATTN_"} <= set(own_probes.SWITCHES)


@pytest.mark.gpu
def test_on_a_gpu_every_backend_works(monkeypatch):
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN"):
        monkeypatch.delenv(name, raising=False)
    found = findings()
    assert found["GPU 0"].state == "ok"
    assert {
        name: found[f"backend {name}"].text for name in registry.NAMES if found[f"backend {name}"].state != "ok"
    } == {}


@pytest.mark.parametrize(
    "subject, package, version, newest",
    [
        ("torch", "torch", "2.13.0+cpu", ""),
        ("torch", "torch", "2.14.0", "2.13"),
        ("Triton", "triton", "3.10.0", "3.9"),
        ("cuDNN frontend", "nvidia-cudnn-frontend", "1.33.0", "1.32"),
        ("transformers", "transformers", "5.24.3", ""),
        ("transformers", "transformers", "6.0.0.dev0", "5.24"),
        ("liger-kernel", "liger-kernel", "0.8.6", "0.8.5"),
        ("peft", "peft", "1.0", "0.21"),
    ],
)
def test_a_version_newer_than_the_newest_tested_is_said(monkeypatch, subject, package, version, newest):
    known = machine_probes.version_of
    monkeypatch.setattr(machine_probes, "version_of", lambda name: version if name == package else known(name))
    found = findings()[subject]
    assert found.state == "ok"
    assert found.text.endswith(f"newer than the newest version tested, {newest}") is bool(newest)


def test_it_says_who_compiles_our_kernels(monkeypatch):
    for name in ("FASTATTN_COMPILE", "FASTATTN_UNTESTED_TRITON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(policy, "compiler", lambda: SimpleNamespace(untested=""))
    assert doctor._guard("kernels", own_probes.kernels) == [
        Finding("kernels", "ok", "compiled in the background, other backends serve until then")
    ]
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    assert findings()["kernels"].state == "off"
    monkeypatch.setenv("FASTATTN_COMPILE", "maybe")
    found = findings()
    assert found["FASTATTN_COMPILE=maybe"].state == "broken" and "expected one of" in found["kernels"].text
    monkeypatch.delenv("FASTATTN_COMPILE")
    monkeypatch.setattr(policy, "compiler", lambda: SimpleNamespace(untested="Triton 9.9 was not tested"))
    (found,) = doctor._guard("kernels", own_probes.kernels)
    assert found.state == "missing" and "FASTATTN_UNTESTED_TRITON=1 lets it" in found.text
    monkeypatch.setenv("FASTATTN_UNTESTED_TRITON", "1")
    assert findings()["kernels"].state == "ok"
