"""Real cuDNN on a machine without a GPU: stand-ins for the driver's libraries, and described devices.

cuDNN says of a described device whether it would serve a graph (`check_support`), without ever touching one. Its
libraries want the driver's to be there, so small ones are compiled whose functions do nothing and return success.
`build_plans()` would load device code and crash: stop before it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

#: Read off an H100 (multiProcessorCount and below differ between devices); memoryBusWidth is asked for from 9.28 on.
H100 = {
    "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536,
    "multiProcessorCount": 132, "smCountOrigin": 0, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "oversizedSharedMemoryPerBlock": 0, "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048,
    "pciDeviceId": 6, "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 85017493504,
    "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "l2CacheSize": 52428800, "cudaDeviceId": 0,
    "deviceVer": 900, "driverVer": 13000, "deviceName": "NVIDIA H100 80GB HBM3", "memoryBusWidth": 5120,
}  # fmt: skip

#: What differs on other devices, from the vendor's tables: not read off one.
DEVICES: dict[tuple[int, int], dict[str, Any]] = {
    (8, 0): {"deviceVer": 800, "multiProcessorCount": 108, "maxSharedMemoryPerBlockOptin": 166912,
             "l2CacheSize": 41943040, "deviceName": "NVIDIA A100-SXM4-80GB"},
    (8, 9): {"deviceVer": 890, "multiProcessorCount": 142, "maxSharedMemoryPerBlockOptin": 101376,
             "maxCtasPerSM": 24, "maxThreadsPerSM": 1536, "l2CacheSize": 100663296, "deviceName": "NVIDIA L40S"},
    (9, 0): {},
    (10, 0): {"deviceVer": 1000, "multiProcessorCount": 148, "l2CacheSize": 132644864, "deviceName": "NVIDIA B200"},
    (12, 0): {"deviceVer": 1200, "multiProcessorCount": 170, "maxSharedMemoryPerBlockOptin": 101376,
              "maxCtasPerSM": 24, "maxThreadsPerSM": 1536, "l2CacheSize": 100663296,
              "deviceName": "NVIDIA GeForce RTX 5090"},
}  # fmt: skip

_NVRTC = (
    "Version AddNameExpression CompileProgram CreateProgram DestroyProgram GetCUBIN GetCUBINSize GetErrorString "
    "GetLTOIR GetLTOIRSize GetLoweredName GetNumSupportedArchs GetPTX GetPTXSize GetProgramLog GetProgramLogSize "
    "GetSupportedArchs"
)


def library() -> Path | None:
    """The folder of libcudnn.so.9, or None: where FASTATTN_GPULESS_CUDNN says, or where `make gpuless` puts it."""
    chosen = os.environ.get("FASTATTN_GPULESS_CUDNN")
    found = Path(chosen) if chosen else HERE.parents[1] / ".venv" / "gpuless" / "nvidia" / "cudnn" / "lib"
    return found if (found / "libcudnn.so.9").exists() else None


def load_cudnn() -> Any:
    """The module `cudnn` over the real library and the stand-ins. Once per process, before cudnn is imported."""
    folder = library()
    assert folder is not None
    text = 'int {name}(int e, const char **s){{ if(s) *s = "none"; return 0; }}'
    _load_stand_in(
        "libcuda.so.1",
        (HERE / "libcuda-symbols.txt").read_text().split(),
        {
            "cuDriverGetVersion": "int cuDriverGetVersion(int *v){ if(v) *v = 13000; return 0; }",
            "cuDeviceGetCount": "int cuDeviceGetCount(int *n){ if(n) *n = 1; return 0; }",
            "cuGetErrorString": text.format(name="cuGetErrorString"),
            "cuGetErrorName": text.format(name="cuGetErrorName"),
        },
    )
    _load_stand_in(
        "libcublasLt.so.13",
        ["cublasLtGetVersion", "cublasLtCreate", "cublasLtDestroy"],
        {"cublasLtGetVersion": "unsigned long cublasLtGetVersion(void){ return 130100; }"},
    )
    _load_stand_in(
        "libnvrtc.so.13",
        ["__nvrtcCPEx", *(f"nvrtc{name}" for name in _NVRTC.split())],
        {"nvrtcVersion": "int nvrtcVersion(int *a, int *b){ *a = 13; *b = 1; return 0; }"},
    )
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    import cudnn

    return cudnn


def device(cudnn: Any, capability: tuple[int, int]) -> dict[str, Any]:
    """Arguments of `graphs.build` that describe a device of that compute capability."""
    properties = cudnn.create_device_properties(json.dumps(H100 | DEVICES[capability]))
    return {"device_property": properties, "sm_version": 10 * capability[0] + capability[1]}


def _load_stand_in(name: str, symbols: list[str], special: dict[str, str]) -> None:
    """Compiles and loads a library; cuDNN's own dlopen then finds it by its name."""
    folder = Path(tempfile.mkdtemp(prefix="stand-in-"))
    source = folder / "stand_in.c"
    source.write_text("\n".join(special.get(symbol, f"int {symbol}(void){{ return 0; }}") for symbol in symbols))
    target = folder / name
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", target, source], check=True)
    ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
