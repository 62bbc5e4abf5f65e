"""A prompt too long for one GPU, through a whole model, its tokens spread over all of them. Run under torchrun:

    torchrun --nproc-per-node 8 -m benchmarks.parallel_model --model llama-3.1-8b -p 262144 --json FILE

Every rank holds the whole model and its share of the tokens and of the cache (`ContextParallel`). First a short prompt,
whose logits are compared with those of rank 0 alone; then the long one, and some tokens after it. Without GPUs it runs
the tiny preset on gloo, to try the command out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn._compat.transformers import with_cache
from fastattn.bench.loaded import clock, default_model, identity, peak_memory, release
from fastattn.cli.arguments import add_trust_remote_code
from fastattn.common.table import table
from fastattn.lm import Loaded, load
from fastattn.parallel import ContextParallel

from .command import end
from .ranks import meet, rank_parser, relative_error, under_torchrun

METHOD = {
    "prompt": "from a barrier until the slowest rank has its part of the last layer, and the logits of the last token; "
    "once, after a short prompt of the same kind",
    "decode": "tokens one after another, each chosen greedily, by all ranks",
    "peak": "GB of torch's allocator, weights included, for each rank (on a CPU: of the process)",
    "check": "norm of the difference of the last token's logits from those of one rank alone, over their norm",
}
POSITIONS = "the model was made for %d positions: what it computes for this prompt takes as long, but means nothing"


class Spread:
    """A model whose tokens are spread over all ranks."""

    def __init__(self, loaded: Loaded, strategy: str) -> None:
        self.model, self.device = loaded.model, loaded.model.device
        self.cp = ContextParallel(strategy=strategy)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """The logits `[1, V]` of the last token of ids `[1, N]`, the same on every rank; and the sharded cache."""
        cp, length = self.cp, ids.shape[1]
        cache = cp.cache(length)
        positions = cp.positions(length, self.device)
        with cp.model(self.model, length):
            body = self.model.base_model
            hidden = body(
                input_ids=cp.shard(ids, 1), position_ids=positions, **with_cache(body, cache)
            ).last_hidden_state
        # Whoever holds the last token hands it on.
        last = torch.zeros_like(hidden[:, -1]) if not (positions == length - 1).any() else hidden[:, -1].contiguous()
        dist.all_reduce(last)
        return self.model.get_output_embeddings()(last), cache

    def decode(self, logits: Tensor, cache: Any, tokens: int) -> None:
        """Continues a prompt by so many tokens."""
        with self.cp.decoding(self.model, cache):
            for _ in range(tokens):
                token = logits.argmax(-1, keepdim=True)
                logits = self.model(input_ids=token, **with_cache(self.model, cache)).logits[:, -1]


@torch.inference_mode()
def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All figures; the same on every rank. The first prints them."""
    name = arguments.model or (default_model() if device.type == "cuda" else "tiny")
    loaded = load(name, device=device, seed=0, trust_remote_code=arguments.trust_remote_code)
    spread, vocabulary = Spread(loaded, arguments.strategy), loaded.config.vocab_size
    ids = torch.randint(vocabulary, (1, arguments.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)

    short = ids[:, : arguments.check_tokens]
    logits, cache = spread.prefill(short)
    spread.decode(logits, cache, 2)
    error = torch.zeros(1, device=device)
    if dist.get_rank() == 0:
        error += relative_error(logits, loaded.model(input_ids=short, logits_to_keep=1).logits[:, -1])
    dist.broadcast(error, 0)
    del cache
    release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    meet(device)
    begin = clock(device)
    logits, cache = spread.prefill(ids)
    prompt = clock(device) - begin
    meet(device)
    begin = clock(device)
    spread.decode(logits, cache, arguments.generation_tokens)
    generation = clock(device) - begin
    times = torch.tensor([prompt, generation], dtype=torch.float64)
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, {"seconds": times.tolist(), "peak_memory": peak_memory(device) / 1e9})
    prompt, generation = (max(row["seconds"][i] for row in rows) for i in (0, 1))
    positions = getattr(loaded.config, "max_position_embeddings", None)
    report = {
        "ranks": len(rows),
        "method": METHOD,
        "model": identity(loaded),
        "strategy": arguments.strategy,
        "prompt_tokens": arguments.prompt_tokens,
        "generation_tokens": arguments.generation_tokens,
        "prompt_s": prompt,
        "prompt_tps": arguments.prompt_tokens / prompt,
        "generation_tps": arguments.generation_tokens / generation,
        "peak_memory": [row["peak_memory"] for row in rows],
        "check_tokens": short.shape[1],
        "error": float(error),
        "note": POSITIONS % positions if positions and positions < arguments.prompt_tokens else None,
    }
    if dist.get_rank() == 0:
        print(show(report), flush=True)
    return report


def show(report: dict[str, Any]) -> str:
    """The figures as a table."""
    head = ("prompt tokens", "ranks", "seconds", "prompt_tps", "generation_tps", "peak GB per rank", "error")
    peak = ", ".join(f"{x:.2f}" for x in report["peak_memory"])
    row = [str(report["prompt_tokens"]), str(report["ranks"]), f"{report['prompt_s']:.2f}"]
    row += [f"{report['prompt_tps']:.0f}", f"{report['generation_tps']:.2f}", peak, f"{report['error']:.1e}"]
    return table(head, [row]) + (f"\nnote: {report['note']}" if report["note"] else "")


def _parser() -> argparse.ArgumentParser:
    parser = rank_parser("parallel_model", __doc__)
    parser.add_argument("--model", help="a preset or a directory (llama-3.1-8b; tiny on CPUs)")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=262144, help="%(default)s")
    parser.add_argument("-g", "--generation-tokens", type=int, default=8, help="after them (%(default)s)")
    parser.add_argument("--check-tokens", type=int, default=4096, help="of the short prompt (%(default)s)")
    parser.add_argument("--strategy", default="auto", choices=("auto", "ulysses", "ring", "allgather"))
    add_trust_remote_code(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    for field in ("prompt_tokens", "generation_tokens", "check_tokens"):
        if getattr(arguments, field) < 1:
            print(f"parallel_model: {field}: expected at least 1, got {getattr(arguments, field)}", file=sys.stderr)
            return 2
    return under_torchrun("parallel_model", arguments, argv, measure)


if __name__ == "__main__":
    end(main)
