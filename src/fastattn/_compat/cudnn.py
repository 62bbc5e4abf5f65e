"""The cuDNN frontend: what its execute() ends in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class RawExecution(NamedTuple):
    """Executes a built graph from addresses: 13 us instead of execute()'s 25 (1.28, measured)."""

    uids: tuple[int, ...]  #: whose addresses it takes, in order
    plan: int  #: its number
    call: Callable[..., Any]

    def __call__(self, addresses: int, workspace: int, handle: Any) -> None:
        """addresses: the address of `uids`' addresses, 8 bytes each. workspace: an address. handle: the thread's."""
        self.call(addresses, len(self.uids), workspace, handle.backend_handle, self.plan)


def raw_execution(graph: Any) -> RawExecution | None:
    """None where this frontend works in another way: its public execute() has to do."""
    try:
        uids = tuple(int(uid) for uid in graph._variant_pack_uids())
        # A graph from disk has but the one plan.
        index = graph._materialize_backend_plan(graph._plan_index).cpp_index if graph._plans else -1
        call = graph._lowered_graph._execute_with_raw_ptrs
    except (AttributeError, TypeError, ValueError, KeyError, IndexError):
        return None
    return RawExecution(uids, index, call) if isinstance(index, int) else None
