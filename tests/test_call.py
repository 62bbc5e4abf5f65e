"""A call's fields: schema, keys, autograd link and problem follow from them, none forgotten."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastattn.call import CALL, LETTERS, Call, Fields, Gradients, Problem


def ints(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


def base() -> Call:
    return Call(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))


#: For each field another value of it, which makes another kind of call, and for those of one kind two values.
OTHERS: dict[str, Any] = {
    "q": torch.randn(2, 4, 4, 8),
    "k": torch.randn(2, 2, 6, 8),
    "v": torch.randn(2, 2, 5, 16),
    "mask": torch.zeros(1, 1, 3, 5),
    "lo": ints(2, 3),
    "hi": ints(2, 3),
    "sinks": torch.zeros(4),
    "q_lengths": ints(2),
    "kv_lengths": ints(2),
    "segments": ints(3, 2),
    "scale": 0.5,
    "left": 3,
    "right": 0,
    "softcap": 2.0,
    "return_lse": True,
    "grads": "q",
}


def test_every_field_has_a_case_here() -> None:
    assert tuple(OTHERS) == CALL.names == Call._fields


@pytest.mark.parametrize("name", CALL.names)
def test_a_field_that_is_not_data_is_in_the_kind(name: str) -> None:
    call = base()
    other = call._replace(**{name: OTHERS[name]})
    assert (CALL.kind(call) == CALL.kind(other)) == (name in CALL.DATA)
    hash(CALL.kind(other))


@pytest.mark.parametrize("name", CALL.names)
def test_a_field_that_is_not_data_is_in_the_problem(name: str) -> None:
    """Backends see nothing else of a call."""
    changes = {name: OTHERS[name]}
    if name in ("lo", "hi"):
        changes = {"lo": OTHERS["lo"], "hi": OTHERS["hi"]}
    call = base()
    assert (Problem.of(call) == Problem.of(call._replace(**changes))) == (name in CALL.DATA)


@pytest.mark.parametrize("name", CALL.tensor_names)
def test_of_a_tensor_all_but_its_values_is_in_the_kind(name: str) -> None:
    x = OTHERS[name]
    kinds = [
        CALL.kind(base()._replace(**{name: tensor}))
        for tensor in (x, torch.cat([x, x]), torch.stack([x, x], -1)[..., 0], x.double(), x.to("meta"))
    ]
    assert len(set(kinds)) == len(kinds)
    assert CALL.kind(base()._replace(**{name: x + 1})) == kinds[0]


def test_parts_and_whole() -> None:
    call = base()._replace(**OTHERS)
    assert CALL.join(CALL.tensors(call), CALL.options(call)) is not call
    assert all(x is y for x, y in zip(CALL.join(CALL.tensors(call), CALL.options(call)), call, strict=True))
    assert (*CALL.tensors(call), call.scale, *CALL.static(call)) == tuple(call)
    found, rest = CALL.unpack((*call, "names"))
    assert isinstance(found, Call) and rest == ("names",)


def test_gradients_stand_at_their_inputs() -> None:
    found = Gradients(*(torch.zeros(i) for i in range(len(Gradients._fields))))
    for wanted in ("", "q", "kms", "qkvms"):
        aligned = dict(zip(CALL.names, CALL.gradients(found, wanted), strict=True))
        assert {name for name, x in aligned.items() if x is not None} == {n for n, c in LETTERS.items() if c in wanted}
        assert all(aligned[name] is getattr(found, name) for name, letter in LETTERS.items() if letter in wanted)


def test_letters_are_unlike() -> None:
    assert len(set(LETTERS.values())) == len(LETTERS) and set(LETTERS) <= set(CALL.tensor_names)


def test_a_field_out_of_order_or_without_a_type_is_refused() -> None:
    class Late(NamedTuple):
        q: Tensor
        scale: float
        k: Tensor

    class Odd(NamedTuple):
        q: Tensor
        scale: float
        what: complex

    with pytest.raises(TypeError, match="Late: expected tensors"):
        Fields(Late)
    with pytest.raises(TypeError, match=r"what: .*complex"):
        Fields(Odd)


def test_fields_of_the_problem_are_hashable() -> None:
    assert hash(Problem.of(base()._replace(**OTHERS))) is not None
    assert {field.name for field in dataclasses.fields(Problem)} >= {"left", "right", "softcap", "return_lse", "grads"}


#: `Call` with one more tensor and one more option, before anything else of fastattn is imported. Nothing but the
#: three lines is said of them.
ADDED = """
import torch
from typing import NamedTuple
from torch import Tensor
import fastattn.call as call

fields = call.get_type_hints(call.Call)
tensors = {name: kind for name, kind in fields.items() if name in call.CALL.tensor_names}
rest = {name: kind for name, kind in fields.items() if name not in tensors}
every = {**tensors, "extra": Tensor | None, **rest, "option": int}
defaults = {**call.Call._field_defaults, "extra": None, "option": 7}
Longer = NamedTuple("Longer", list(every.items()))
Longer.__new__.__defaults__ = tuple(defaults[name] for name in Longer._fields if name in defaults)
Longer._field_defaults = defaults
call.Call, call.CALL = Longer, call.Fields(Longer)

try:
    from fastattn.dispatch import fast_path
except TypeError as error:
    assert "fast_path._call" in str(error) and "extra" in str(error), error
else:
    raise AssertionError("the fast path forgets a tensor without a word")
from fastattn.dispatch import operators, registry, routes

schema = str(torch.ops.fastattn.attention.default._schema)
backward = str(torch.ops.fastattn.attention_backward.default._schema)
for text in (schema, backward):
    assert "Tensor? extra" in text and "int option" in text, text

seen = []
kernel = registry.backend("reference").bind
def bind(problem, c):
    found = kernel(problem, c)
    class Kernel:
        def forward(self, c):
            seen.append(("forward", c.extra, c.option))
            return found.forward(c)
        def backward(self, c, *rest):
            seen.append(("backward", c.extra, c.option))
            return found.backward(c, *rest)
    return Kernel()
registry.backend("reference").bind = bind

def made(grads="qkv", **changes):
    q, k, v = (torch.randn(1, 2, 3, 8).requires_grad_(bool(grads)) for _ in range(3))
    return Longer(q=q, k=k, v=v, grads=grads, **changes)

extra = torch.zeros(5)
for run in (lambda c: operators.attention(c, ("reference",)),
            lambda c: torch.ops.fastattn.attention(*c, "reference")):
    seen.clear()
    one = made(extra=extra, option=3)
    out, _ = run(one)
    out.sum().backward()
    assert [name for name, *_ in seen] == ["forward", "backward"], seen
    assert all(x is not None and x.shape == (5,) and o == 3 for _, x, o in seen), seen
    assert one.q.grad is not None and one.q.grad.shape == one.q.shape
    assert one.k.grad is not None and one.v.grad is not None

kinds = [call.CALL.kind(made("", **changes)) for changes in ({}, {"extra": extra}, {"option": 3}, {"extra": extra[:4]})]
assert len(set(kinds)) == 4
one, two = made("", extra=extra), made("", option=3)
assert routes.route(one, ("reference",)) is not routes.route(two, ("reference",))
print("every place followed")
"""


def test_a_field_that_is_added_reaches_every_place() -> None:
    """The schemas, the keys, what autograd saves; and the fast path, which is written out for speed, says no."""
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "every place followed" in done.stdout, done.stderr
