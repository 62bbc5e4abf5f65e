"""Why fastattn is not the quickest in a row, in CUDA graphs: one sentence, with its full stop, for each such row of the
result file that is kept (`benchmarks/results/*/users.json`). `python -m benchmarks.choosing` puts them on the page and
asks for those that are missing; a test finds those whose row has become the quickest.
"""

from __future__ import annotations

_SPLITS = (
    "At the commit of this file the decode kernel's tiles were fitted to times of an H100. They are to this GPU's now "
    "(benchmarks/results/h200/tune-chunks.json)."
)
_ROUNDS = "640 tiles are 4.85 rounds of 132 multiprocessors: those that are idle in the last one cost 3%."
REASONS: dict[str, str] = {
    "chunk 32/4096": (
        "The Hopper kernel served it at the commit of this file, and does not split keys: 32 of 132 multiprocessors "
        "worked. The decode kernel serves it now, which does."
    ),
    "decode B1 2048": _SPLITS,
    "decode B1 32768": _SPLITS,
    "decode B8 8192": _SPLITS,
    "decode B32 2048": _SPLITS,
    "decode MHA B8 2048": _SPLITS,
    "Whisper cross decode 1500": (
        "At the commit of this file the keys of its 160 heads were not divided: 28 of 132 multiprocessors had two of "
        "them, the others one. They are now."
    ),
    "Swin B1024 49": (
        "Rows of 49 keys are not 16 bytes apart, which the copy engine needs: the portable kernel loaded each entry of "
        "the bias, anew for each window. A kernel that keeps it takes 47 us now (benchmarks/results/h200/kernels.json)."
    ),
    "SDXL self 4096": _ROUNDS,
    "SDXL fp16 4096": _ROUNDS,
    "train fp32 1024": (
        "torch's kernels serve it, whose forward ran once more for the gradients at the commit of this file; it does "
        "not any more."
    ),
}
