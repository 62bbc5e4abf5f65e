"""Whole models on `fastattn.drop_in.patched()` against the same models on torch's own function:

    python -m benchmarks.drop_in [MODEL ...] [--quick] [--json FILE]

One model at a time, with random weights, both ways in one process and in turns: in each round each runs for some time
(the first run is not counted), who goes first changes, and a round's ratio is fastattn's time over torch's. Printed are
medians of milliseconds, the median of the ratios with their quartiles, what served fastattn's calls, which kernel
torch's function chose for its own, and both relative errors against a run in the next larger dtype. A training step is
forward, backward and AdamW with a learning rate of 0. Models whose sizes always change ("fresh") run each size once and
once more: "first" is what a user waits. The rest of the model has met the size before, so that a first time is the
attention's; "torch-cudnn" is torch's function with its kernels in the order that begins with cuDNN's, where that is not
its own order.

Tiny models on a CPU; the status is 1 where something failed or is wrong, not where it is slow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from fastattn.bench import output
from fastattn.bench.loaded import release
from fastattn.bench.timing import text_of
from fastattn.integrations.torch import decide
from fastattn.lm.loading.device import pick_device

from . import drop_in_libraries as libraries
from . import drop_in_models as models
from .command import end, parser_of, write
from .drop_in_models import Made
from .drop_in_runs import Plan, compared, fresh, ready

TARGET = 1.02
BUDGET = 480.0  #: seconds
PLAN, QUICK = Plan(rounds=15, seconds=0.1), Plan(rounds=5, seconds=0.03)


@dataclass(frozen=True)
class Kind:
    """A model of the benchmark. make(tiny): on torch's default device."""

    make: Callable[[bool], Made]
    library: str | None = None  #: whose model it is
    dtype: torch.dtype = torch.bfloat16


MODELS = {
    "vit-l-224": Kind(partial(models.vit, size=224, batch=64)),
    "vit-l-384": Kind(partial(models.vit, size=384, batch=16)),
    "sdxl": Kind(models.sdxl),
    "sd3": Kind(models.sd3),
    "flux-padded": Kind(models.flux),
    "gpt2": Kind(models.gpt2),
    "t5-bias": Kind(partial(models.biased, padded=False)),
    "t5-bias-padded": Kind(partial(models.biased, padded=True)),
    "whisper": Kind(libraries.whisper, "transformers"),
    "t5": Kind(libraries.t5, "transformers"),
    "bert": Kind(libraries.bert, "transformers"),
    "llama-fp32": Kind(libraries.llama, "transformers", torch.float32),
    "llama": Kind(libraries.llama, "transformers"),
    "resolutions": Kind(models.resolutions),
    "tabpfn": Kind(models.tabpfn),
    "sdxl-diffusers": Kind(libraries.sdxl, "diffusers"),
}


def measured(name: str, device: torch.device, tiny: bool, plan: Plan) -> list[dict[str, Any]]:
    """The rows of one model: forward, then training step."""
    kind = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        made = kind.make(tiny)
    rows = []
    for training in (False, True) if made.trains else (False,):
        begin = time.perf_counter()
        row: dict[str, Any] = {"model": name, "what": "training step" if training else "forward"}
        row["dtype"] = str(kind.dtype).removeprefix("torch.")
        try:
            run = ready(made, kind.dtype, training, device)
            row |= compared(run, plan)
            if made.fresh:
                cudnn = device.type == "cuda" and "cudnn" not in row["torch_kernels"]
                row["fresh"] = fresh(run, made.fresh, cudnn)
        except Exception as error:
            row["error"] = text_of(error)
        finally:
            made.model.zero_grad()
            release()
        row["seconds"] = round(time.perf_counter() - begin, 1)
        print("\n".join(lines_of(row)), flush=True)
        rows.append(row)
    return rows


def lines_of(row: dict[str, Any]) -> list[str]:
    """A row as text: one line, and with sizes that come once a second."""
    head = f"{row['model']:<15} {row['what']:<13} {row['dtype']:<9}"
    if "error" in row:
        return [f"{head} {row['error']}"]
    low, high = row["quartiles"]
    errors = ", ".join(f"{what} {x['fastattn']:.1e} / {x['torch']:.1e}" for what, x in row["errors"].items())
    served = ", ".join(f"{n} {key}" for key, n in {**row["calls"], **row["handed_to_torch"]}.items())
    kernels = ", ".join(f"{n} {key}" for key, n in row["torch_kernels"].items())
    lines = [
        f"{head} {row['fastattn_ms']:9.3f} / {row['torch_ms']:9.3f} ms = {row['ratio']:.3f} ({low:.3f}-{high:.3f})  "
        f"error {errors}{'' if row['right'] else ' WRONG'}  by {served or 'nothing'}; torch's: {kernels}"
    ]
    if "fresh" in row:
        firsts = "; ".join(
            f"{who} {x['first_ms']:.2f} (worst {x['worst_first_ms']:.2f}), then {x['second_ms']:.2f}"
            for who, x in row["fresh"]["times"].items()
        )
        lines.append(f"{'':15} {row['fresh']['sizes']} new sizes, first time in ms: {firsts}")
        lines[-1] += f" = {row['fresh']['ratio']:.3f}"
    return lines


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst of all ratios, and who misses the target."""
    found = {f"{row['model']}, {row['what']}": row["ratio"] for row in rows if "error" not in row}
    found |= {f"{row['model']}, {row['what']}, new sizes": row["fresh"]["ratio"] for row in rows if "fresh" in row}
    worst = max(found, key=lambda name: found[name], default=None)
    return {
        "target": TARGET,
        "worst": worst,
        "worst_ratio": None if worst is None else found[worst],
        "slower": {name: ratio for name, ratio in found.items() if ratio > TARGET},
        "faster": {name: ratio for name, ratio in found.items() if ratio < 2 - TARGET},
        "wrong": [f"{row['model']}, {row['what']}" for row in rows if not row.get("right", True)],
        "failed": [f"{row['model']}, {row['what']}" for row in rows if "error" in row],
        # Then torch was compared with itself.
        "bypassed": [
            f"{row['model']}, {row['what']}" for row in rows if decide.CHOSEN in row.get("handed_to_torch", ())
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 where a model failed, its result is wrong, or fastattn was passed by because torch's
    kernels were chosen."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("drop_in", __doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--tiny", action="store_true", help="tiny models, as on a CPU: does everything run?")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: the GPU, if there is one)")
    text = "models that would begin later are left out (%(default)s)"
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=text)
    options = parser.parse_args(argv)
    for name in options.models:
        if name not in MODELS:
            raise ValueError(f"MODEL: expected {', '.join(MODELS)}, got {name!r}")
    output.check([options.json])
    device = pick_device(options.device)
    tiny = options.tiny or device.type != "cuda"
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    try:
        for name in options.models or MODELS:
            library = MODELS[name].library
            if library is not None and find_spec(library) is None:
                left_out[name] = f"{library} is not installed"
            elif time.monotonic() - begun > options.budget:
                left_out[name] = "no time"
            else:
                try:
                    rows += measured(name, device, tiny, QUICK if options.quick else PLAN)
                except ImportError as error:
                    left_out[name] = text_of(error)
                except Exception as error:  # the model could not be made
                    rows.append({"model": name, "what": "making it", "dtype": "", "error": text_of(error)})
                    print("\n".join(lines_of(rows[-1])), flush=True)
                release()
            if name in left_out:
                print(f"{name:<15} left out: {left_out[name]}", flush=True)
    finally:  # what there is, should the GPU fail
        found = summary(rows)
        write(options.json, "drop_in", argv, device, {"tiny": tiny, "rows": rows, "left_out": left_out} | found)
    print(
        f"Worst ratio: {found['worst_ratio']} ({found['worst']}); target {TARGET}; slower: {found['slower'] or 'none'}"
    )
    print(f"Wrong: {found['wrong'] or 'none'}; failed: {found['failed'] or 'none'}; {time.monotonic() - begun:.0f} s")
    if found["bypassed"]:
        print(f"{decide.CHOSEN}, and fastattn passed by: {found['bypassed']}")
    return int(bool(found["wrong"] or found["failed"] or found["bypassed"]))


if __name__ == "__main__":
    end(main)
