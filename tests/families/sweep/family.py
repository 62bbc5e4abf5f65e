"""The whole sweep of one model class: build it twice, run every check on both, say what came of it."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel

import fastattn.hf

from . import compare, models, registry
from .checks import Check, checks, outputs
from .inputs import candidates
from .media import amid_text, media_checks
from .overrides import CHANGES
from .shrink import LEVELS, shrink

PATIENCE = 4.0  #: seconds of work spent looking for inputs


class NotBuilt(Exception):
    pass


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def listening(texts: list[str]) -> Iterator[None]:
    """Collects warnings and what transformers logs."""
    handler = _Messages()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logger.removeHandler(handler)
        texts += [str(w.message) for w in caught] + handler.texts


class Counter:
    """Stands in for the attention function that is registered, and counts its calls.

    bools: those with a bool mask, which eager adds to the scores as 0 and 1. adding: do so too.
    """

    def __init__(self) -> None:
        self.calls = self.bools = 0
        self.adding = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(fastattn.hf.attention_forward).bind(*args, **kwargs)
        mask = call.arguments["attention_mask"]
        self.calls += 1
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            self.bools += 1
            if self.adding:
                call.arguments["attention_mask"] = mask.to(call.arguments["query"].dtype)
        return fastattn.hf.attention_forward(*call.args, **call.kwargs)


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    registered = transformers.AttentionInterface()[fastattn.hf.NAME]
    AttentionInterface.register(fastattn.hf.NAME, counter)
    try:
        yield
    finally:
        AttentionInterface.register(fastattn.hf.NAME, registered)


def sweep(unit: registry.Unit) -> dict[str, Any]:
    """family, kind, model, result, level, checks (by name: result, error, where), calls, warnings, notes."""
    report: dict[str, Any] = {**unit._asdict(), "checks": {}, "notes": {}, "warnings": []}
    try:
        config, eager, inputs, level = find(unit)
    except NotBuilt as e:
        return {**report, "result": "not built", "why": str(e)}
    report |= {"level": level, "inputs": {name: list(value.shape) for name, value in inputs.items()}}
    report["attention"] = models.has_attention(eager)
    counter = Counter()
    texts: list[str] = []
    with listening(texts), counting(counter):
        try:
            fast = models.build(unit.model, config, fastattn.hf.NAME)
            models.copy_state(eager, fast)
        except Exception as e:
            return {**report, "result": _kind_of(e), "why": _short(e), "trace": traceback.format_exc()[-1500:]}
        sdpa = functools.cache(lambda: _with_sdpa(unit, config, eager))
        todo = {**checks(eager, inputs), **media_checks(eager, report["notes"])}
        for name, check in todo.items():
            calls, bools = counter.calls, counter.bools
            report["checks"][name] = outcome = _run(check, eager, fast, sdpa)
            outcome["calls"] = counter.calls - calls
            if outcome["result"] == "differs" and counter.bools > bools:
                least = max(compare.TOLERANCE, outcome["error"] / 100)
                for way, difference in (("adding bools", _in_float32), ("adding bools in float64", _in_float64)):
                    left = _measure(lambda check=check, of=difference: _adding(of, check, eager, fast, counter), 1.0)
                    outcome[way] = left
                    if left <= least:
                        outcome["result"] = "bool mask"
                        break
    report["calls"] = counter.calls
    report["warnings"] = list(dict.fromkeys(t[:400] for t in texts if "fastattn" in t))
    report["result"] = verdict(report)
    return report


def _with_sdpa(unit: registry.Unit, config: Any, eager: PreTrainedModel) -> PreTrainedModel:
    model = models.build(unit.model, config, "sdpa")
    models.copy_state(eager, model)
    return model


def verdict(report: dict[str, Any]) -> str:
    results = {check["result"] for check in report["checks"].values()}
    for bad in ("differs", "crashes", "refused", "bool mask"):
        if bad in results:
            return bad
    if not results - {"not run"}:
        return "not built"
    if report["calls"]:
        return "equal"
    if report["warnings"]:
        return "falls back"
    return "falls back in silence" if report["attention"] else "no attention"


def find(unit: registry.Unit) -> tuple[Any, PreTrainedModel, dict[str, Any], str]:
    """The first config and inputs that eager attention runs on."""
    why: list[str] = []
    try:
        default = unit.default_config()
    except Exception as e:
        default = None
        why.append(_short(e))
    for level in LEVELS if default is not None else ():
        try:
            config = shrink(default, level, {} if unit.part else CHANGES.get(unit.family))
            models.refuse_large(unit.model, config, models.LARGEST if level.startswith("tiny") else models.LARGEST // 3)
            eager = models.build(unit.model, config, "eager")
        except Exception as e:
            why.append(f"{level}: {_short(e)}")
            continue
        problems: list[str] = []
        start = time.process_time()
        for inputs in itertools.chain(candidates(eager), amid_text(eager)):
            try:
                result = outputs(eager, **inputs)
            except Exception as e:
                problems.append(f"{_short(e)} ({', '.join(inputs)})")
                if time.process_time() - start > PATIENCE:
                    break
                continue
            if result and not all(value.isnan().all() for value in result.values()):
                return config, eager, inputs, level
        why.append(f"{level}: {' / '.join(list(dict.fromkeys(problems))[:3]) or 'no inputs'}")
    raise NotBuilt("; ".join(why)[:900])


def _run(check: Check, eager: PreTrainedModel, fast: PreTrainedModel, sdpa: Callable[[], Any]) -> dict[str, Any]:
    try:
        expected = check(eager)
    except Exception as e:
        return {"result": "not run", "why": _short(e)}
    if not expected:
        return {"result": "not run", "why": "nothing to compare"}
    try:
        found = check(fast)
    except Exception as e:
        return {"result": _kind_of(e), "why": _short(e), "trace": traceback.format_exc()[-1500:]}
    error, where = _difference(expected, found)
    outcome: dict[str, Any] = {"result": "equal", "error": error}
    if error <= compare.TOLERANCE:
        return outcome
    again = _measure(lambda: _difference(expected, check(eager))[0])  # what is drawn at random in a forward
    outcome |= {"where": where, "rounding": again}
    if compare.ROUNDING * again < error < compare.LARGE:
        moved = lambda model: _until_they_part(expected, check(model))[1]  # noqa: E731
        outcome["rounding"] = max(again, _measure(lambda: compare.rounding(moved, eager, expected)))
    if error <= compare.ROUNDING * outcome["rounding"]:
        return outcome
    if error < compare.LARGE:
        outcome["in float64"] = _measure(lambda: _in_float64(check, eager, fast), float("inf"))
        if outcome["in float64"] < compare.DOUBLE:
            return outcome
    # Who else differs from eager: a model may mean something else with "sdpa", or with eager alone.
    outcome |= {"result": "differs", "sdpa": float("nan"), "from sdpa": float("nan")}
    with suppress(Exception):
        other = check(sdpa())
        outcome |= {"sdpa": _difference(expected, other)[0], "from sdpa": _difference(other, found)[0]}
    return outcome


def _adding(
    difference: Callable[[Check, PreTrainedModel, PreTrainedModel], float],
    check: Check,
    eager: PreTrainedModel,
    fast: PreTrainedModel,
    counter: Counter,
) -> float:
    """What is left of a difference when bool masks are added to the scores, as eager does."""
    counter.adding = True
    try:
        return difference(check, eager, fast)
    finally:
        counter.adding = False


def _difference(expected: compare.Result, found: compare.Result) -> tuple[float, str]:
    return compare.difference(*_until_they_part(expected, found))


def _measure(measure: Callable[[], float], otherwise: float = 0.0) -> float:
    try:
        return measure()
    except Exception:
        return otherwise


def _in_float32(check: Check, eager: PreTrainedModel, fast: PreTrainedModel) -> float:
    return _difference(check(eager), check(fast))[0]


def _in_float64(check: Check, eager: PreTrainedModel, fast: PreTrainedModel) -> float:
    return _difference(check(compare.in_float64(eager)), check(compare.in_float64(fast)))[0]


def _until_they_part(expected: compare.Result, found: compare.Result) -> tuple[compare.Result, compare.Result]:
    """Generated: the steps whose tokens so far are the same."""
    if "tokens" not in expected or "tokens" not in found:
        return expected, {name: found[name] for name in expected if name in found}
    steps = sum(name.startswith("step ") for name in expected)
    right, other = expected["tokens"], found["tokens"]
    for step in range(steps):
        stop = right.shape[-1] - steps + step
        if right.shape != other.shape or bool((right[..., :stop] != other[..., :stop]).any()):
            steps = step
            break
    names = [f"step {i}" for i in range(max(steps, 1))]
    return {name: expected[name] for name in names}, {name: found[name] for name in names if name in found}


def _kind_of(error: Exception) -> str:
    return "refused" if isinstance(error, ValueError) and "fastattn" in str(error) else "crashes"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".replace("\n", " ")[:300]


transformers.logging.set_verbosity_warning()
