"""The process of `benchmarks.mlx_model`: MLX and mlx-lm alone, in an interpreter that may have nothing else.

    PYTHON benchmarks/mlx_child.py SETTINGS

SETTINGS is JSON: "config" (entries of a Llama's config.json), "prompt_tokens", "generation_tokens", "num_trials",
"prefill_step_size", "seed". Prints JSON: "trials", "versions", "device", "parameters".
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Builds the model with random weights in bfloat16, and runs mlx_lm's own loop over random prompts."""
    mx: Any = import_module("mlx.core")
    utils: Any = import_module("mlx.utils")
    llama: Any = import_module("mlx_lm.models.llama")
    steps: Any = import_module("mlx_lm.generate").generate_step

    mx.random.seed(settings["seed"])
    model = llama.Model(llama.ModelArgs(model_type="llama", **settings["config"]))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    vocabulary = settings["config"]["vocab_size"]

    def trial() -> dict[str, float]:
        """One prompt and its generation, timed as mlx_lm's stream_generate does."""
        prompt = mx.random.randint(0, vocabulary, (settings["prompt_tokens"],))
        mx.eval(prompt)
        mx.reset_peak_memory()
        begin = tic = time.perf_counter()
        count, prompt_time = 0, 0.0
        options = {"max_tokens": settings["generation_tokens"], "prefill_step_size": settings["prefill_step_size"]}
        for count, _ in enumerate(steps(prompt, model, **options), 1):
            if count == 1:
                prompt_time = time.perf_counter() - tic
                tic = time.perf_counter()
        end = time.perf_counter()
        return {
            "prompt_tps": settings["prompt_tokens"] / prompt_time,
            "generation_tps": count / (end - tic),  # as mlx_lm counts
            "peak_memory": mx.get_peak_memory() / 1e9,
            "total_time": end - begin,
        }

    trial()  # warms up
    trials = [trial() for _ in range(settings["num_trials"])]
    return {
        "trials": trials,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "device": str(mx.default_device()),
        "parameters": sum(x.size for _, x in utils.tree_flatten(model.parameters())),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
