"""`fastattn doctor`: what works on this machine, what does not, and what to install.

Each probe is guarded: a failure becomes a line of the report, not a traceback. The probes import torch and the rest of
the package themselves, for the same reason.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from .._compat.versions import newer_than_tested, numbers
from ..common.machine import ask, cudnn_text, driver_version, switches, version_of

CUDNN_FRONTEND = (1, 28)  #: before it, building a plan held Python's lock and ragged backward graphs did not build
TRANSFORMERS = (5, 4)

SWITCHES = {
    "FASTATTN_BACKENDS": "the backends that may serve calls, in this order",
    "FASTATTN_COMPILE": "our own kernels: wait = a call waits for its own; off = only those on disk are used",
    "FASTATTN_CUDNN": "0 turns the cuDNN backend off",
    "FASTATTN_DEBUG": "1 checks layouts and more at run time, and shows tracebacks on the command line",
    "FASTATTN_INTERPRET": "1 lets the decode backend run on a CPU, with TRITON_INTERPRET=1: for its tests",
    "FASTATTN_PLANS": "cuDNN plans: static = one for each shape, built at once; dynamic = only those for every length",
    "FASTATTN_PLAN_CACHE": "the directory where cuDNN plans and compiled kernels are kept, or off",
    "FASTATTN_TEST_SEED": "other random inputs for the tests",
    "FASTATTN_UNTESTED_TRITON": "1 lets a version of Triton compile our own kernels that was not tested",
    "TRITON_INTERPRET": "1 runs Triton's kernels in Python: right, and very slow",
}

GET_TORCH = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
GET_DRIVER = "install or update the NVIDIA driver: https://www.nvidia.com/drivers"
GET_CUDA = "pip install 'fastattn[cuda]'"
GET_HF = "pip install 'fastattn[hf]'"
EXTRA = "pip install 'fastattn[%s]'"

#: Names in the package registry that differ from those in the report.
PACKAGES = {"cuDNN frontend": "nvidia-cudnn-frontend", "Triton": "triton"}

#: Largest relative error of a working backend, by the dtype in which it is tried.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
_FORWARD_ONLY = ("decode", "hopper", "prefill")  #: other backends compute their gradients


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    state: str  #: "ok", "none" (not there, and not needed), "off", "missing" or "broken"
    text: str
    advice: str = ""  #: what to do, "" when nothing


def main(as_json: bool = False) -> int:
    """Prints the report. Returns the exit status: 1 when torch itself is unusable, else 0."""
    findings = examine()
    print(json.dumps([asdict(f) for f in findings], indent=2) if as_json else render(findings))
    return 1 if any(f.subject == "torch" and f.state in ("missing", "broken") for f in findings) else 0


def render(findings: list[Finding]) -> str:
    """The findings as aligned lines, then each piece of advice once."""
    subject, state = max(len(f.subject) for f in findings), max(len(f.state) for f in findings)
    lines = [f"{f.subject:<{subject}}  {f.state:<{state}}  {f.text}" for f in findings]
    advice = dict.fromkeys(f.advice for f in findings if f.advice)
    if advice:
        lines += ["", "To do:", *(f"- {text}" for text in advice)]
    return "\n".join(lines)


def examine() -> list[Finding]:
    """All findings about this machine. Takes seconds; on a GPU it runs each backend once."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += _guard("fastattn", _fastattn)
    torch = _guard("torch", _torch)
    findings += torch
    if torch[0].state != "ok":
        return findings
    for subject, probe in (
        ("GPU", _gpu),
        ("cuDNN", _cudnn),
        ("cuDNN frontend", _frontend),
        ("Triton", _triton),
        ("transformers", _transformers),
        ("liger-kernel", partial(_extra, "liger-kernel", "the model runs on transformers' own layers", "liger")),
        ("peft", partial(_extra, "peft", "models with adapters are refused", "adapters")),
    ):
        findings += _guard(subject, probe)
    findings = [_untested(finding) for finding in findings]
    for name in _names():
        findings += _guard(f"backend {name}", partial(_backend, name))
    findings += _guard("kernels", _kernels)
    findings += _guard("plans on disk", _plans)
    return findings + _guard("switches", _switches)


def _names() -> tuple[str, ...]:
    from ..dispatch.registry import NAMES

    return NAMES


def _guard(subject: str, probe: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.extend(probe())  # findings from before the failure are kept
    except Exception as error:
        found.append(Finding(subject, "broken", _line(error)))
    return found


def _fastattn() -> Iterator[Finding]:
    from .. import __version__
    from ..common.machine import commit

    where = commit()
    yield Finding("fastattn", "ok", __version__ + (f", commit {where}" if where else ""))


def _torch() -> Iterator[Finding]:
    try:
        import torch

        torch.ones(2).sum().item()
    except ModuleNotFoundError as error:
        yield Finding("torch", "missing", _line(error), "pip install 'torch>=2.11'")
        return
    except Exception as error:
        yield Finding("torch", "broken", _line(error), "reinstall torch: pip install --force-reinstall 'torch>=2.11'")
        return
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {build}")


def _gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            text = f"{p.name}, SM {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            yield Finding(f"GPU {index}", "ok", text)
        driver = driver_version()
        yield Finding("driver", "ok" if driver else "none", driver or "nvidia-smi does not tell its version")
        return
    listed = ask("nvidia-smi", "-L")
    if listed is None or not listed.startswith("GPU"):
        yield Finding("GPU", "none", "no NVIDIA GPU here: everything works, slower, on torch's CPU kernels")
    elif torch.version.cuda is None:
        yield Finding("GPU", "broken", f"{listed} is here, but this torch is built without CUDA", GET_TORCH)
    else:
        yield Finding("GPU", "broken", f"{listed} is here, but torch cannot use it: {_cuda_error()}", GET_DRIVER)


def _cuda_error() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return _line(error)
    return "torch does not say why"


def _cudnn() -> Iterator[Finding]:
    import torch

    version = torch.backends.cudnn.version()
    if version:
        yield Finding("cuDNN", "ok", f"{cudnn_text(version)}, as loaded by torch")
    elif _has_gpu():
        yield Finding("cuDNN", "missing", "torch has loaded none", GET_TORCH)
    else:
        yield Finding("cuDNN", "none", "not part of this torch, not needed without a GPU")


def _frontend() -> Iterator[Finding]:
    version = version_of("nvidia-cudnn-frontend")
    if version is None:
        yield _absent("cuDNN frontend", GET_CUDA)
    elif numbers(version) < CUDNN_FRONTEND:
        text = f"{version}; the cudnn backend needs {_text(CUDNN_FRONTEND)} or later"
        yield Finding("cuDNN frontend", "missing", text, "pip install -U 'nvidia-cudnn-frontend>=1.28'")
    elif not _has_gpu():
        yield Finding("cuDNN frontend", "ok", f"{version}, of no use without a GPU")
    else:
        import cudnn

        yield Finding("cuDNN frontend", "ok", f"{version}, with cuDNN {cudnn_text(cudnn.backend_version())}")


def _triton() -> Iterator[Finding]:
    if version_of("triton") is None:
        yield _absent("Triton", GET_CUDA)
        return
    import triton

    use = "" if _has_gpu() else ", without a GPU only through its interpreter"
    yield Finding("Triton", "ok", f"{triton.__version__}{use}")


def _transformers() -> Iterator[Finding]:
    version = version_of("transformers")
    if version is None:
        yield Finding("transformers", "none", "not installed: no fastattn.hf, no benchmark", GET_HF)
        return
    if numbers(version) < TRANSFORMERS:
        text = f"{version}; fastattn.hf needs {_text(TRANSFORMERS)} or later"
        yield Finding("transformers", "missing", text, "pip install -U 'transformers>=5.4'")
        return
    from ..integrations import transformers as hf  # noqa: F401  (importing it registers the implementation)

    yield Finding("transformers", "ok", f'{version}, with attn_implementation="fastattn"')


def _extra(package: str, without: str, extra: str) -> Iterator[Finding]:
    version = version_of(package)
    yield Finding(package, "ok" if version else "none", version or f"not installed: {without} ({EXTRA % extra})")


def _untested(finding: Finding) -> Finding:
    """The finding, with a note if the version is newer than any that fastattn was tested with."""
    package = PACKAGES.get(finding.subject, finding.subject)
    newest = newer_than_tested(package, version_of(package) or "") if finding.state == "ok" else ""
    return (
        replace(finding, text=f"{finding.text}; newer than the newest version tested, {newest}") if newest else finding
    )


def _backend(name: str) -> Iterator[Finding]:
    """Runs a typical call on the backend and compares it with the float64 reference."""
    subject = f"backend {name}"
    refusals, error = _try(name, gradients=False)
    if refusals:
        missing = _has_gpu() and (name != "hopper" or _is_hopper())
        yield Finding(subject, "missing" if missing else "none", "; ".join(refusals))
        return
    done = "forward"
    if name not in _FORWARD_ONLY:
        refusals, backward = _try(name, gradients=True)
        done = f"forward only ({'; '.join(refusals)})" if refusals else "forward and backward"
        error = max(error, backward)
    if not error < TOLERANCE[_dtype_name()]:
        yield Finding(subject, "broken", f"{done} run, and are wrong: relative error {error:.1e}", "please report this")
    elif name not in _allowed():
        yield Finding(subject, "off", f"{done} would work; switched off by an environment variable")
    else:
        yield Finding(subject, "ok", f"{done}, relative error {error:.1e}")


def _is_hopper() -> bool:
    import torch

    return torch.cuda.get_device_capability() == (9, 0)


def _allowed() -> tuple[str, ...]:
    from ..dispatch import registry

    try:
        return registry.allowed()
    except ValueError:  # a name that does not exist in FASTATTN_BACKENDS: `_switches` says so, once
        return registry.NAMES


def _try(name: str, gradients: bool) -> tuple[list[str], float]:
    """The backend's reasons to refuse a typical call, and its largest relative error if it refuses none."""
    import torch

    from .. import explain, scaled_dot_product_attention

    device = "cuda" if _has_gpu() else "cpu"
    queries = 1 if name == "decode" else 200
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, queries, 64), (2, 2, 200, 64), (2, 2, 200, 64))
    data = [torch.randn(shape, generator=generator).to(getattr(torch, _dtype_name())) for shape in shapes]

    def run(backend: str, dtype: torch.dtype) -> list[Any]:
        q, k, v = (x.to(device, dtype, copy=True).requires_grad_(gradients) for x in data)
        out = scaled_dot_product_attention(q, k, v, mask="causal", backend=backend)
        assert isinstance(out, torch.Tensor)
        if not gradients:
            return [out]
        out.sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    inputs = [x.to(device, copy=True).requires_grad_(gradients) for x in data]
    refusals = explain(*inputs, mask="causal", backend=name).reasons[name]
    if refusals:
        return refusals, 0.0
    expected = run("reference", torch.float64)
    found = run(name, getattr(torch, _dtype_name()))
    return [], max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected))


def _kernels() -> Iterator[Finding]:
    """Whether our own kernels may be compiled here."""
    from ..backends.triton.binaries import policy

    why = policy.hindrance()
    if not why:
        how = {"background": "in the background, other backends serve until then", "wait": "while a call waits"}
        yield Finding("kernels", "ok", f"compiled {how[policy.mode()]}")
    elif policy.mode() == "off":
        yield Finding("kernels", "off", f"{why}: only those on disk are used")
    else:
        needed = "tested" in why or _has_gpu()
        yield Finding("kernels", "missing" if needed else "none", f"those that are not on disk are not compiled: {why}")


def _plans() -> Iterator[Finding]:
    from ..common import disk

    folder, refusal = disk.directory(), disk.refusal()
    if folder is None:
        yield Finding("plans on disk", "off", "none are kept, each process builds its own")
    elif refusal:
        advice = f"give {folder} and what leads to it to this user alone (FASTATTN_PLAN_CACHE names another folder)"
        yield Finding("plans on disk", "broken", f"none are kept: {refusal}", advice)
    else:
        yield Finding("plans on disk", "ok", str(folder))


def _switches() -> Iterator[Finding]:
    from ..backends.cudnn.plan_policy import policy
    from ..backends.triton.binaries.policy import mode
    from ..config import complaint, is_on
    from ..dispatch.registry import listed

    checks: dict[str, Callable[[], object]] = {"FASTATTN_BACKENDS": listed, "FASTATTN_PLANS": policy}
    checks["FASTATTN_COMPILE"] = mode
    on_or_off = ("FASTATTN_CUDNN", "FASTATTN_DEBUG", "FASTATTN_INTERPRET", "FASTATTN_UNTESTED_TRITON")
    checks |= {name: partial(is_on, name, False) for name in on_or_off}
    for name, value in switches().items():
        text = SWITCHES.get(name, "")
        wrong = complaint(checks[name]) if name in checks else ""
        wrong = wrong if text else "no switch of fastattn's: a typing error?"
        yield Finding(f"{name}={value}", "broken" if wrong else "ok", wrong or text)


def _absent(subject: str, advice: str) -> Finding:
    if _has_gpu():
        return Finding(subject, "missing", "not installed", advice)
    return Finding(subject, "none", "not installed, not needed without a GPU")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _dtype_name() -> str:
    return "bfloat16" if _has_gpu() else "float32"


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
