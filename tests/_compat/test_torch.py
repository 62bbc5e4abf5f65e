"""torch's private names, and what is done without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn._compat import torch as torch_internals
from fastattn._compat.versions import Gone
from fastattn.backends.torch import TorchBackend
from fastattn.dispatch import eager, fast_path, routes


def gradients() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    out = fastattn.scaled_dot_product_attention(q, k, v, mask="causal")
    assert isinstance(out, Tensor)
    return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.parametrize(
    "name, instead",
    [("_modes", None), ("_transforms", None), ("_keys", None), ("HAS_AUTOGRAD_WITHIN", False)],
)
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # the reference serves gradients then
def test_without_a_name_it_is_as_right(name: str, instead: object, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients()
    for memory in (routes._routes, fast_path._cached):
        memory.clear()
    monkeypatch.setattr(torch_internals, name, instead)
    torch.testing.assert_close(gradients(), expected)
    for memory in (routes._routes, fast_path._cached):
        memory.clear()


def test_who_might_be_watched_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert eager.plain(x)
    monkeypatch.setattr(torch_internals, "_modes", None)
    assert not eager.plain(x)


def test_forward_mode_gradients_watch() -> None:
    x = torch.zeros(1)
    assert not torch_internals.forward_ad_active()
    with torch.autograd.forward_ad.dual_level():
        assert torch_internals.forward_ad_active()
        assert not eager.plain(x)
    assert eager.plain(x)


def test_torch_serves_no_gradients_without_its_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 2, 8, requires_grad=True)
    assert fastattn.explain(q, q, q).chosen == "torch"
    monkeypatch.setattr(torch_internals, "HAS_AUTOGRAD_WITHIN", False)
    problem = fastattn.explain(q, q, q).problem
    assert "this torch does not let an operator compute gradients with autograd" in TorchBackend().reasons(problem)
    with pytest.raises(
        Gone, match=r"^torch 2\.\S+ has no torch\._C\._ForceDispatchKeyGuard.*: pip install (-U )?'torch"
    ):
        torch_internals.autograd_within()


def test_every_private_name_is_there() -> None:
    """In the version that the tests run on: a fallback that is not noticed stays slow."""
    assert torch_internals.HAS_AUTOGRAD_WITHIN
    for found in (torch_internals._modes, torch_internals._transforms, torch_internals._keys):
        assert found is not None
    with torch_internals.allow_recompiling(77):
        assert torch._dynamo.config.recompile_limit == 77


@pytest.mark.parametrize("there", [True, False])
def test_allocation(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.empty_strided, with torch's private function and without it."""
    device = torch.device("cpu")
    if there:
        assert torch_internals.allocator(device) is torch._C._dynamo.guards._empty_strided_cpu
    else:
        monkeypatch.setattr(torch_internals, "_private", lambda name: None)
    make = torch_internals.allocator(device)
    for dtype in torch.bfloat16, torch.float32, torch.uint8:
        x = make((2, 3, 4), (1, 8, 2), dtype)
        assert (x.shape, x.stride(), x.dtype, x.device) == ((2, 3, 4), (1, 8, 2), dtype, device)
        assert type(x) is Tensor and not x.requires_grad and x.untyped_storage().nbytes() == 24 * dtype.itemsize
    with torch.inference_mode():
        assert make((2,), (1,), torch.float32).is_inference()
    assert torch_internals.allocator(torch.device("meta"))((2,), (1,), torch.float32).is_meta


@pytest.mark.parametrize("there", [True, False])
def test_views(there: bool) -> None:
    """As torch.as_strided gives them, with torch's private function and without it; autograd does not follow them."""
    if there:
        assert torch_internals.strided_view is torch._C._dynamo.guards._reinterpret_tensor
    make = torch_internals.strided_view if there else torch_internals._strided_view
    x = torch.arange(60.0).view(5, 3, 4)[1:].requires_grad_()
    view = make(x, (1, 3, 4, 4), (48, 4, 12, 1), 0)
    assert type(view) is Tensor and view.stride() == (48, 4, 12, 1) and not view.requires_grad
    assert torch.equal(view, x.transpose(0, 1)[None]) and view.data_ptr() == x.data_ptr()
    assert make(x, (2, 3), (1, 1), 5).tolist() == [[17.0, 18.0, 19.0], [18.0, 19.0, 20.0]]
    assert make(x[:0], (1, 3, 0, 4), (0, 4, 12, 1), 0).shape == (1, 3, 0, 4)
    with torch.inference_mode():
        assert torch.equal(make(x.clone(), (4, 12), (12, 1), 0), x.view(4, 12))


@pytest.mark.gpu
def test_streams_and_devices() -> None:
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            x = torch_internals.allocator(torch.device("cuda", index))((2, 3), (3, 1), torch.bfloat16)
            assert x.device == torch.device("cuda", index)
            assert torch_internals.allocator(x.device) is torch._C._dynamo.guards._empty_strided_cuda
    assert torch_internals.raw_stream is torch._C._cuda_getCurrentRawStream
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        index = torch.cuda.current_device()
        assert torch_internals.raw_stream(index) == torch_internals._raw_stream(index)
        assert torch_internals.current_device() == index
    assert torch_internals.driver_version() > 12000
    torch_internals.spin(1000)
