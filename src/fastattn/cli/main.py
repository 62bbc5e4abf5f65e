"""The `fastattn` command.

Bad input gives one line on stderr and exit status 2, before anything runs; `terminal` lists the other exit statuses.
Heavy modules are imported by the subcommand that needs them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .arguments import DTYPES, add_dtype_and_device, numbers
from .benchmark import add_command as add_benchmark
from .generate import add_command as add_generate
from .sweep import add_command as add_sweep
from .terminal import complain, guarded
from .warmup import add_command as add_warmup

MASKS = ("none", "causal", "bool", "additive", "intervals")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: sys.argv[1:]) and returns the exit status; `terminal` lists them."""
    given = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _main(given))


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    arguments.argv = argv
    return int(arguments.run(arguments))


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(f"{message} (see {self.prog} --help)", 2))


class _Version(argparse.Action):
    """`--version`; the package is imported only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from .. import __version__

        print(f"fastattn {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastattn", description="Fast attention for PyTorch: measure it, check this machine, ask.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_benchmark(commands)
    add_generate(commands)
    add_sweep(commands)
    add_warmup(commands)
    _add_doctor(commands)
    _add_explain(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    text = "Say what this machine can do and, for everything that it cannot, what to install."
    parser = commands.add_parser("doctor", help="what works here, what does not, what to do", description=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_doctor)


def _add_explain(commands: Any) -> None:
    text = "Say which backend would serve a call of the op here, and why not the others. Nothing is computed."
    parser = commands.add_parser("explain", help="which backend serves a call, and why", description=text)
    add = parser.add_argument
    add("--q", type=numbers(4), required=True, metavar="B,H,S,D", help="shape of the queries")
    add("--kv-heads", type=int, metavar="N", help="heads of keys and values (as q)")
    add("--kv-len", type=int, metavar="N", help="number of keys (as q)")
    add("--value-dim", type=int, metavar="N", help="head dim of the values (as q)")
    add_dtype_and_device(parser, "bf16", "bf16")
    add("--mask", choices=MASKS, default="none", help="kind of mask (%(default)s)")
    add("--window", type=numbers(2), metavar="L,R", help="sliding window; -1 is open: --window=-1,0")
    add("--softcap", type=float, metavar="CAP")
    add("--sinks", action="store_true", help="with attention sinks")
    add("--q-lengths", action="store_true", help="with a length for each batch entry's queries")
    add("--kv-lengths", action="store_true", help="with a length for each batch entry's keys")
    add("--return-lse", action="store_true", help="with the log-sum-exp")
    add("--grad", action="store_true", help="with gradients for q, k and v")
    parser.set_defaults(run=_explain)


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(as_json=arguments.json)


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from .. import Intervals, explain
    from ..lm.loading.device import pick_device

    device = pick_device(arguments.device)
    dtype = getattr(torch, DTYPES[arguments.dtype])
    batch, heads, length, dim = arguments.q
    if min(arguments.q) < 0:
        raise ValueError(f"--q: expected numbers >= 0, got {','.join(map(str, arguments.q))}")
    kv_heads = _size("--kv-heads", arguments.kv_heads, heads)
    kv_len = _size("--kv-len", arguments.kv_len, length)
    value_dim = _size("--value-dim", arguments.value_dim, dim)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        # All indices share one element: explain reads no data, so the shape may be larger than memory.
        return torch.zeros((), dtype=dtype, device=device).expand(shape)

    q, k, v = (
        tensor(*shape)
        for shape in ((batch, heads, length, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim))
    )
    if arguments.grad:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    bounds = tensor(batch, length, dtype=torch.int32)
    masks = {
        "none": None,
        "causal": "causal",
        "bool": tensor(batch, 1, length, kv_len, dtype=torch.bool),
        "additive": tensor(batch, 1, length, kv_len),
        "intervals": Intervals(bounds, bounds),
    }
    lengths = tensor(batch, dtype=torch.int32)
    explanation = explain(
        q,
        k,
        v,
        mask=masks[arguments.mask],
        sinks=tensor(heads) if arguments.sinks else None,
        window=arguments.window,
        softcap=arguments.softcap,
        q_lengths=lengths if arguments.q_lengths else None,
        kv_lengths=lengths if arguments.kv_lengths else None,
        return_lse=arguments.return_lse,
    )
    print(explanation)
    return 0


def _size(name: str, value: int | None, default: int) -> int:
    if value is not None and value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")
    return default if value is None else value
