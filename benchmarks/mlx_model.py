"""MLX's whole model with mlx_lm's loop, in a process of its own, to be read beside `fastattn benchmark`'s figures:

    python -m benchmarks.mlx_model --model llama-3.1-8b -p 2049 -g 128 -n 4 --json FILE [--python PYTHON]

Random weights in bfloat16, batch 1; flags and figures are those of `fastattn benchmark`. PYTHON: the interpreter of an
environment that has mlx and mlx-lm (this one). Run it right before or after `fastattn benchmark`, on the same machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn.bench import output
from fastattn.lm.loading.presets import PRESETS

from .command import end, parser_of, write

KEYS = ("prompt_tps", "generation_tps", "peak_memory")
CHILD = Path(__file__).with_name("mlx_child.py")
SECONDS = 600  #: of the other process


def config_of(name: str) -> dict[str, Any]:
    """A preset's entries as mlx_lm names them. Raises ValueError for what is no preset of a Llama."""
    preset = PRESETS.get(name)
    if preset is None or preset.get("model_type", "llama") != "llama":
        names = [key for key, value in PRESETS.items() if value.get("model_type", "llama") == "llama"]
        raise ValueError(f"--model: expected one of {', '.join(names)}, got {name!r}")
    same = ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    same += ["head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"]
    rope = dict(preset["rope_parameters"])
    found = {key: preset[key] for key in same} | {"rms_norm_eps": preset.get("rms_norm_eps", 1e-6)}
    found["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        found["rope_scaling"] = rope
    return found


def measured(settings: dict[str, Any], python: str) -> dict[str, Any]:
    """What the other process found. Raises RuntimeError with the last line of its errors."""
    command = [python, str(CHILD), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("mlx_model", __doc__)
    parser.add_argument("--model", default="llama-3.1-8b", metavar="PRESET")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("-g", "--generation-tokens", type=int, default=128, metavar="N")
    parser.add_argument("-n", "--num-trials", type=int, default=5, metavar="N")
    parser.add_argument("--prefill-step-size", type=int, default=2048, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--python", default=sys.executable, metavar="PYTHON", help="that has mlx and mlx-lm")
    asked = vars(parser.parse_args(argv))
    path, python, name = asked.pop("json"), asked.pop("python"), asked["model"]
    output.check([path])
    for key in ("prompt_tokens", "generation_tokens", "num_trials", "prefill_step_size"):
        if asked[key] < 1:
            raise ValueError(f"--{key.replace('_', '-')}: expected 1 or more, got {asked[key]}")
    found = measured(asked | {"config": config_of(name)}, python)
    trials = found["trials"]
    for number, trial in enumerate(trials, 1):
        print(f"Trial {number}:  " + ", ".join(f"{key}={value:.3f}" for key, value in trial.items()))
    averages = {key: statistics.fmean(trial[key] for trial in trials) for key in KEYS}
    print("Averages: " + ", ".join(f"{key}={value:.3f}" for key, value in averages.items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = {
        "benchmark": "model",
        "arguments": asked | {"batch_size": 1, "dtype": "bfloat16", "device": found["device"]},
        "model": {"name": name, "parameters": found["parameters"], "random_weights": True},
        "versions": found["versions"],
        "implementations": {"mlx": {"trials": trials, "averages": averages}},
    }
    write(path, "mlx_model", argv, device, content)
    return 0


if __name__ == "__main__":
    end(main)
