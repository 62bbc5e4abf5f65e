"""What has happened in this process, and how to start over: `stats`, `clear_plans`."""

from __future__ import annotations

from typing import Any

from .shape_cache import shape_cache


def stats() -> dict[str, Any]:
    """Counters of this process.

    Returns a dict:
        "calls": forward calls served, by backend, and backward calls as "<backend>.backward".
        "handed_to_torch": calls of the drop-in (`fastattn.drop_in`) that torch's own function served, by reason.
        "plans": the cuDNN plans: held now, built while a caller waited and in the background (numbers and
            milliseconds), read from disk, evicted; see `backends.cudnn.plan_cache.PlanCache.stats`.
        "binaries": binaries of our own kernels: held now, compiled while a caller waited and in the background (numbers
            and milliseconds), read from disk, failures; see `backends.triton.binaries.store.Binaries.stats`.
        "cache": everything cached per shape or kind of call: "entries" and "bytes" of device memory, "drops" by
            reason, and "sections", each with its entries, bytes and bounds.
    """
    from .backends.cudnn.plans import shared
    from .backends.triton.binaries.store import shared as binaries
    from .dispatch.handed_over import handed_over
    from .dispatch.native.calls import calls_served

    return {
        "calls": calls_served(),
        "handed_to_torch": handed_over(),
        "plans": shared.stats(),
        "binaries": binaries.stats(),
        "cache": shape_cache.stats(),
    }


def clear_plans() -> None:
    """Drops every cuDNN plan of this process, and everything else that is cached per shape or kind of call
    (`stats()["cache"]`): routes, launches, offsets and scratch memory on the GPU, refusals of backends. The next calls
    make it again. Counters go on, and binaries of our own kernels, which depend on no shape, stay."""
    shape_cache.clear()
