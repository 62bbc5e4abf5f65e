"""Probes of `fastattn doctor`: the machine, and the libraries that are installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .._compat.versions import newer_than_tested, numbers
from ..common.machine import ask, cudnn_text, driver_version, version_of
from .finding import Finding, has_gpu, line

CUDNN_FRONTEND = (1, 28)  #: before it, building a plan held Python's lock and ragged backward graphs did not build
TRANSFORMERS = (5, 4)

GET_TORCH = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
GET_DRIVER = "install or update the NVIDIA driver: https://www.nvidia.com/drivers"
GET_CUDA = "pip install 'fastattn[cuda]'"
GET_HF = "pip install 'fastattn[hf]'"
EXTRA = "pip install 'fastattn[%s]'"

#: Optional packages, what is missing without each, and the extra that brings it.
EXTRAS = (
    ("liger-kernel", "the model runs on transformers' own layers", "liger"),
    ("peft", "models with adapters are refused", "adapters"),
)
#: Names in the package registry that differ from those in the report.
PACKAGES = {"cuDNN frontend": "nvidia-cudnn-frontend", "Triton": "triton"}


def fastattn() -> Iterator[Finding]:
    from .. import __version__
    from ..common.machine import commit

    where = commit()
    yield Finding("fastattn", "ok", __version__ + (f", commit {where}" if where else ""))


def torch() -> Iterator[Finding]:
    try:
        import torch

        torch.ones(2).sum().item()
    except ModuleNotFoundError as error:
        yield Finding("torch", "missing", line(error), "pip install 'torch>=2.11'")
        return
    except Exception as error:
        yield Finding("torch", "broken", line(error), "reinstall torch: pip install --force-reinstall 'torch>=2.11'")
        return
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {build}")


def gpu() -> Iterator[Finding]:
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
        return line(error)
    return "torch does not say why"


def cudnn() -> Iterator[Finding]:
    import torch

    version = torch.backends.cudnn.version()
    if version:
        yield Finding("cuDNN", "ok", f"{cudnn_text(version)}, as loaded by torch")
    elif has_gpu():
        yield Finding("cuDNN", "missing", "torch has loaded none", GET_TORCH)
    else:
        yield Finding("cuDNN", "none", "not part of this torch, not needed without a GPU")


def frontend() -> Iterator[Finding]:
    version = version_of("nvidia-cudnn-frontend")
    if version is None:
        yield _absent("cuDNN frontend", GET_CUDA)
    elif numbers(version) < CUDNN_FRONTEND:
        text = f"{version}; the cudnn backend needs {_text(CUDNN_FRONTEND)} or later"
        yield Finding("cuDNN frontend", "missing", text, "pip install -U 'nvidia-cudnn-frontend>=1.28'")
    elif not has_gpu():
        yield Finding("cuDNN frontend", "ok", f"{version}, of no use without a GPU")
    else:
        import cudnn

        yield Finding("cuDNN frontend", "ok", f"{version}, with cuDNN {cudnn_text(cudnn.backend_version())}")


def triton() -> Iterator[Finding]:
    if version_of("triton") is None:
        yield _absent("Triton", GET_CUDA)
        return
    import triton

    use = "" if has_gpu() else ", without a GPU only through its interpreter"
    yield Finding("Triton", "ok", f"{triton.__version__}{use}")


def transformers() -> Iterator[Finding]:
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


def extra(package: str, without: str, extra: str) -> Iterator[Finding]:
    version = version_of(package)
    yield Finding(package, "ok" if version else "none", version or f"not installed: {without} ({EXTRA % extra})")


def untested(finding: Finding) -> Finding:
    """The finding, with a note if the version is newer than any that fastattn was tested with."""
    package = PACKAGES.get(finding.subject, finding.subject)
    newest = newer_than_tested(package, version_of(package) or "") if finding.state == "ok" else ""
    return (
        replace(finding, text=f"{finding.text}; newer than the newest version tested, {newest}") if newest else finding
    )


def _absent(subject: str, advice: str) -> Finding:
    if has_gpu():
        return Finding(subject, "missing", "not installed", advice)
    return Finding(subject, "none", "not installed, not needed without a GPU")


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
