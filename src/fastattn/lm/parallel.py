"""Tensor parallel: the ranks that run one model together, how they start, agree and fail.

transformers spreads the weights over the ranks and runs their collectives. Every rank runs the same engine on the same
requests. The ranks stay in step because they make each decision together: tokens are those of rank 0, and decisions
that depend on the state of a GPU, such as whether a step could be captured, go through the store of the process group.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .loading.device import pick_device

#: How long a rank waits for another one, in a collective or for the store, before it fails.
TIMEOUT = timedelta(minutes=10)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The ranks of the default process group, as one of them sees them.

    All ranks must call `broadcast`, `first_failure` and `from_first` in the same order.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        """store: of torch.distributed, the same for all ranks."""
        self.rank, self.size, self.device = rank, size, device
        self._store = store
        # torchrun may restart all ranks with the same store.
        self._prefix = f"fastattn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._calls = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def broadcast(self, ids: Tensor) -> None:
        """Overwrites the tensor with that of rank 0. On a GPU this is only queued."""
        if self.size > 1:
            dist.broadcast(ids, 0)

    def first_failure(self, mine: str | None) -> str | None:
        """The failure of this rank, or else that of the first rank with one; None if there is none on any rank.

        mine: the failure of this rank. Waits for the ranks on the host, without any GPU work.
        """
        self._calls += 1
        keys = [f"{self._prefix}/{self._calls}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], mine or "")
        self._store.wait(keys, TIMEOUT)
        if mine is not None:
            return mine
        found = ((rank, self._store.get(key).decode()) for rank, key in enumerate(keys))
        return next((f"rank {rank}: {text}" for rank, text in found if text), None)

    def from_first(self, find: Callable[[], Any]) -> Any:
        """The result of `find` on rank 0, the only rank that calls it. It must be a JSON value."""
        self._calls += 1
        key = f"{self._prefix}/{self._calls}/result"
        if self.is_first:
            self._store.set(key, json.dumps(find()))
        self._store.wait([key], TIMEOUT)
        return json.loads(self._store.get(key))

    def end_failed(self, error: BaseException) -> None:
        """Returns on the first rank that fails, which reports the error. Raises SystemExit on the others.

        They failed for the same reason, which is reported once, or because the first one failed, which they print
        instead of their own error.
        """
        text = f"{type(error).__name__}: {error}"
        try:
            first = self._store.compare_set(f"{self._prefix}/failed", "", f"{self.rank} {text}").decode()
        except RuntimeError:
            return  # the process that held the store has ended
        rank, _, reason = first.partition(" ")
        if int(rank) == self.rank:
            return
        if reason != text:
            print(f"fastattn: rank {self.rank} ends because rank {rank} failed", file=sys.stderr)
        raise SystemExit(1) from error


@contextmanager
def join(device: str | torch.device | None = None) -> Generator[Ranks, None, None]:
    """Makes this process one of the ranks that torchrun started, for a block.

        with join() as ranks:
            loaded = load("DIR", ranks=ranks)
            print(generate(loaded, "def main("))

    Within it, ranks other than the first print nothing. After an error in it the process must end, and torchrun ends
    the others. Engines with captured steps must not outlive it.

    Args:
        device: cpu or cuda. Default: a GPU each, cuda:LOCAL_RANK, if there are any. GPUs use NCCL, CPUs gloo.

    Raises:
        ValueError: the process was not started by torchrun; the device does not exist, is not the one that transformers
            spreads models over, or there are more ranks than GPUs.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"tp: expected to be started by torchrun (torchrun --nproc-per-node N -m fastattn ...), but "
            f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set"
        )
    if not dist.is_available():
        raise ValueError("tp: this torch is built without torch.distributed")
    from torch.distributed.rendezvous import rendezvous

    found = _rank_device(device, int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    start_group(found, TIMEOUT, store=store, rank=rank, world_size=size)
    ranks = Ranks(store, rank, size, found)
    try:
        with ExitStack() as stack:
            if not ranks.is_first:
                nowhere = open(os.devnull, "w")  # noqa: SIM115  (loggers made within keep it)
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield ranks
    except Exception as error:
        ranks.end_failed(error)
        raise
    gc.collect()  # destroying NCCL waits for captured graphs that use it
    dist.destroy_process_group()


def start_group(device: torch.device, timeout: timedelta, **where: Any) -> None:
    """Starts torch's default process group, on NCCL for a GPU of this process, on gloo for its CPU.

    where: torch's arguments that identify the ranks; none under torchrun.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        # NVLink multicast needs more of the fabric manager than point-to-point transfers, and hangs without it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None, **where
    )


def _rank_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    found = pick_device(device)
    accelerator = torch.accelerator.current_accelerator()
    used = "cpu" if accelerator is None else accelerator.type
    if found.type != used:
        raise ValueError(
            f"device: expected {used}, over which transformers spreads models with this torch, got {found}"
        )
    if device is not None and found.index is not None:
        raise ValueError(f"device: expected cpu or cuda, each rank takes a GPU of its own, got {found}")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"tp: expected a GPU for each rank of a host, got {local_rank + 1} ranks or more and {count} GPUs"
        )
    return torch.device("cuda", local_rank)
