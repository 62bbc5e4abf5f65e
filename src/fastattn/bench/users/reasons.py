"""Why fastattn is not the quickest in a row, in CUDA graphs: one sentence, with its full stop, for each such row of the
result file that is kept (`benchmarks/results/*/users.json`). `python -m benchmarks.choosing` puts them on the page and
asks for those that are missing; a test finds those whose row has become the quickest.
"""

from __future__ import annotations

_ROUNDS = "640 tiles are 4.85 rounds of 132 multiprocessors: those that are idle in the last one cost 3%."
REASONS: dict[str, str] = {
    "decode B1 2048": (
        "In a graph it is two launches, of which the second combines what the splits left, where cuDNN has one: of 512 "
        "keys the two kernels take 6.1 of the call's 7.4 us."
    ),
    "Whisper cross decode 1500": (
        "Its 160 heads are more than 132 multiprocessors: keys are divided, and a second kernel combines the splits, "
        "where cuDNN has one launch."
    ),
    "SDXL self 4096": _ROUNDS,
    "SDXL fp16 4096": _ROUNDS,
    "fp32 full 1024": "torch's own kernel serves it: 1.02 in this run, less in the one before.",
    "train fp32 1024": (
        "torch's kernels serve it, forward and backward called one by one: 4% more than within torch's own function, "
        "which is not explained yet."
    ),
}
