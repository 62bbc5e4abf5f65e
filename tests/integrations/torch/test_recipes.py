"""Code of other libraries with fastattn under it, by `fastattn.drop_in`: inference and a training step give the same.

The drop-in leaves calls on a CPU to torch's kernels; so fastattn's reference is insisted on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import recipes
import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn
import fastattn.drop_in

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")

NAME = "scaled_dot_product_attention"


@pytest.fixture(params=recipes.RECIPES, ids=lambda made: made.__name__)
def recipe(request: pytest.FixtureRequest) -> recipes.Recipe:
    return request.param()


class Calls:
    """Counts the calls of torch's function in a block."""

    count = 0

    def __enter__(self) -> Calls:
        self._function = getattr(F, NAME)
        setattr(F, NAME, self._counted)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(F, NAME, self._function)

    def _counted(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        return self._function(*args, **kwargs)


def served(compute: Callable[[], Tensor]) -> tuple[Tensor, int, int, dict[str, int]]:
    """What it computes with fastattn under it, the forwards and backwards it served, and why torch served others."""
    before = fastattn.stats()
    with fastattn.use_backend("reference"), fastattn.drop_in.patched():
        found = compute()
    after = fastattn.stats()
    calls = {name: n - before["calls"].get(name, 0) for name, n in after["calls"].items()}
    handed = {why: n - before["handed_to_torch"].get(why, 0) for why, n in after["handed_to_torch"].items()}
    return found, calls.get("reference", 0), calls.get("reference.backward", 0), {w: n for w, n in handed.items() if n}


def step(recipe: recipes.Recipe, start: dict[str, Tensor]) -> Tensor:
    """The loss before and after a step of training from these weights, and the gradients of it."""
    recipe.model.load_state_dict(start)
    optimizer = torch.optim.SGD(recipe.model.parameters(), lr=0.05)
    optimizer.zero_grad()
    loss = recipe.loss()
    loss.backward()
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad.clone()) for p in recipe.model.parameters()]
    optimizer.step()
    return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients), recipe.loss().detach()[None]])


def difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


LIMIT = 1e-5


def test_inference(recipe: recipes.Recipe) -> None:
    with torch.no_grad():
        with Calls() as calls:
            want = recipe.infer()
        got, forwards, _, handed = served(recipe.infer)
    assert difference(got, want) < LIMIT
    assert forwards == calls.count > 0 and not handed


def test_a_step_of_training(recipe: recipes.Recipe) -> None:
    start = copy.deepcopy(recipe.model.state_dict())
    with Calls() as calls:
        recipe.loss()
    want = step(recipe, start)
    got, forwards, backwards, handed = served(lambda: step(recipe, start))
    assert difference(got, want) < LIMIT
    assert calls.count > 0 and not handed
    assert backwards == calls.count and forwards == 2 * calls.count


def test_attention_matters(recipe: recipes.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons above would prove nothing: attention to all keys alike is another result."""
    start = copy.deepcopy(recipe.model.state_dict())
    want = step(recipe, start)

    def alike(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return value.mean(-2, keepdim=True).expand(*query.shape[:-1], value.shape[-1])

    monkeypatch.setattr(F, NAME, alike)
    assert difference(step(recipe, start), want) > 100 * LIMIT
