"""What goes wrong on GPUs alone: tensors on another device than the current one, a capture before anything is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BF16, Case, assert_right, make, reference_results, refusals, run

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")]

BASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=129, kv_len=129, head_dim=128, dtype=BF16, mask="causal")
CASES = {
    "decode": BASE.but(q_len=1, kv_len=700, kv_lengths=(700, 33), sinks=torch.float32),
    "prefill": BASE,
    "training": BASE.but(grads="qkv"),
    "padded": BASE.but(mask="segments:pc", grads="qkv"),
    "mask": BASE.but(mask="additive:b1qk", grads="qkvm"),
}


#: What each backend has to serve of them.
SERVES = {
    "decode": {"decode"},
    "cudnn": set(CASES),
    "torch": {"prefill", "training", "padded"},
    "reference": set(CASES),
}
#: An error of ours, which is no clear one.
BUGS = ("AttributeError", "NameError", "TypeError", "KeyError", "IndexError")


@pytest.mark.parametrize("backend", ["decode", "hopper", "cudnn", "torch", "prefill", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_tensors_on_another_device_than_the_current_one(name: str, backend: str, seed: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = CASES[name]
    with torch.cuda.device(0):
        for turn, device in enumerate(("cuda:1", "cuda:0", "cuda:1")):  # the second time it is remembered
            inputs = make(case, device, seed + turn)
            if refusals(inputs, backend):
                assert name not in SERVES[backend]
                pytest.skip(f"{backend} refuses it")
            assert_right(case, inputs, run(inputs, backend), reference_results(inputs))
            assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)


#: Captures a call in a process that has made none. Prints what came of the capture and of calls after it.
PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
from cases import assert_right, make, run, reference_results
from test_gpu_faults import CASES
name, backend = sys.argv[2:]
case, found = CASES[name], {}
inputs = make(case, "cuda", 7)
want = reference_results(inputs)
torch.cuda.synchronize()

def attempt():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(inputs, backend, poison=False)
    for x in results.values():
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(case, inputs, results, want)

try:
    attempt()
    found["cold"] = "right"
except AssertionError as error:
    found["cold"] = "wrong"
except Exception as error:
    found["cold"] = f"{type(error).__name__}: {error}"[:300]
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    assert_right(case, inputs, run(inputs, backend, poison=False), want)
torch.cuda.current_stream().wait_stream(stream)
assert_right(case, inputs, run(inputs, backend, poison=False), want)
attempt()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "name, backend", [("decode", "decode"), ("decode", "cudnn"), ("training", "cudnn"), ("mask", "cudnn")]
)
def test_a_capture_before_anything_is_built(name: str, backend: str, tmp_path: Path) -> None:
    """It gives what is right when it is replayed, or an error; and then calls and captures are right."""
    environment = os.environ | {"FASTATTN_PLAN_CACHE": "off", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([str(Path(__file__).parent), *sys.path]), name, backend],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cold = json.loads(done.stdout.splitlines()[-1])["cold"]
    assert (cold == "right" or "Error" in cold) and not cold.startswith(BUGS), cold
