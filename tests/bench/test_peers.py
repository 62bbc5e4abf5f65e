"""Attention of other packages: every adapter passes on the same call."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from measured_cases import CASES, IDS, inputs_of

from fastattn.bench import check, peer_mlx, peers, sweeps
from fastattn.bench.case import Case
from fastattn.bench.implementations import IMPLEMENTATIONS, Refusal
from fastattn.bench.inputs import without_padding


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_everybody_computes_the_same(case, monkeypatch):
    """Every implementation that runs on a CPU, and flex without its compiler, against the reference in float64."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(peers, "compiled_flex", lambda: flex_attention)
    (x,) = inputs_of(case)
    (expected,) = check.reference(case, x, False, torch.float64)
    binds = {name: IMPLEMENTATIONS[name].bind for name in ("fastattn", "torch-cudnn", "torch-efficient", "torch-math")}
    done = []
    for name, bind in (binds | {"flex": peers._bind_flex}).items():
        try:
            with torch.inference_mode():
                out = bind(case, x)()
        except Refusal:
            continue
        assert check.relative_error((without_padding(case, out),), (expected,)) < check.OUTPUT_LIMIT, name
        done.append(name)
    assert "fastattn" in done and len(done) >= 2


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4", "flashinfer", "xformers"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_peers_refuse_or_are_missed(name, case):
    """None of them is installed where tests run: an adapter gets as far as its import, or says what it cannot do."""
    if peers.present()[name] is not None:
        pytest.skip(f"{name} is installed here")
    (x,) = inputs_of(case)
    with pytest.raises((Refusal, ModuleNotFoundError)):
        peers.PEERS[name].bind(case, x)


def test_present_says_versions(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {"xformers": "0.1"}.get)
    found = peers.present()
    assert found["xformers"] == "0.1"
    assert found["flashinfer"] is None
    assert found["flex"] == torch.__version__
    assert "flex" not in sweeps.about_peers()["peers"]


class Package:
    """A package whose functions compute attention with torch, and remember how they were called."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


def attention(q, k, v, causal, left=-1):
    """[B, S, H, D] as flash-attn takes it."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2).double() for t in (q, k, v))
    scores = q @ k.repeat_interleave(group, 1).mT / q.shape[3] ** 0.5
    offset = k.shape[2] - q.shape[2]
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool)
    keep = keep.tril(offset) if causal else keep
    keep = keep.triu(offset - left) if left >= 0 else keep
    out = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2).bfloat16()


def varlen(q, k, v, starts, left=-1):
    parts = [attention(q[None, a:b], k[None, a:b], v[None, a:b], True, left)[0] for a, b in pairwise(starts)]
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4", "flashinfer", "xformers"])
def test_adapters_hand_over_the_right_tensors(name, case, monkeypatch):
    """Each package's functions, with their own arguments, made of torch."""

    class Packed:
        def __init__(self, memory, layout, use_tensor_cores=False):
            assert memory.dtype == torch.uint8

        def plan(self, *given, causal=False, q_data_type, kv_data_type, window_left):
            self.given, self.left = given, window_left

        def run(self, q, k, v):
            assert self.given[2:] == (case.q_heads, case.kv_heads, case.dim)
            return varlen(q, k, v, self.given[0].tolist(), self.left)

    class Paged(Packed):
        def run(self, q, cache):
            pages, indices, last, *sizes, page = self.given
            assert sizes == [case.q_heads, case.kv_heads, case.dim]
            out = []
            for b in range(case.batch):
                k, v = (t[indices[pages[b]], :, : last[b]].transpose(0, 1)[None] for t in cache)
                assert cache[0].shape[2] == page
                out.append(attention(q[b][None, None], k, v, True, self.left)[0, 0])
            return torch.stack(out)

    def efficient(q, k, v, attn_bias):
        kind, given = attn_bias or ("none", ())
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
        if kind == "packed":
            starts = [0, *torch.tensor(given).cumsum(0).tolist()]
            out = varlen(q[0], k[0], v[0], starts)[None]
        else:
            out = attention(q, k, v, kind != "none", given[0] - 1 if given else -1)
        return out.unflatten(2, (case.kv_heads, -1))

    def with_cache(q, k, v, cache_seqlens, causal, window_size):
        rows = [
            attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal)
            for b, n in enumerate(cache_seqlens.tolist())
        ]
        return torch.cat(rows)

    biases = Package(
        LowerTriangularFromBottomRightMask=lambda: ("causal", ()),
        LowerTriangularFromBottomRightLocalAttentionMask=lambda size: ("window", (size,)),
        BlockDiagonalCausalMask=Package(from_seqlens=lambda lengths: ("packed", lengths)),
    )
    packages = {
        "flash_attn": Package(
            flash_attn_func=lambda q, k, v, causal, window_size: attention(q, k, v, causal, window_size[0]),
            flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, window_size, **rest: varlen(
                q, k, v, cu_seqlens_q.tolist(), window_size[0]
            ),
            flash_attn_with_kvcache=with_cache,
        ),
        "flash_attn.cute": Package(
            flash_attn_func=lambda q, k, v, causal, window_size=(-1, 0), learnable_sink=None: (
                attention(q, k, v, causal, window_size[0]),
                None,
            ),
            flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, **rest: (varlen(q, k, v, cu_seqlens_q.tolist()), None),
        ),
        "flashinfer": Package(
            single_prefill_with_kv_cache=lambda q, k, v, causal, kv_layout, window_left: attention(
                q[None], k[None], v[None], causal, window_left
            )[0],
            BatchPrefillWithRaggedKVCacheWrapper=Packed,
            BatchDecodeWithPagedKVCacheWrapper=Paged,
        ),
        "xformers.ops": Package(memory_efficient_attention=efficient),
        "xformers.ops.fmha.attn_bias": biases,
    }
    monkeypatch.setattr(peers, "import_module", packages.__getitem__)
    (x,) = inputs_of(case)
    try:
        out = peers.PEERS[name].bind(case, x)()
    except Refusal:
        beyond = case.softcap or case.sinks or case.additive or case.padding or case.lengths
        assert beyond or (name, case.batch > 1) == ("flashinfer", True)
        return
    if case.sinks:  # the sinks themselves are the package's business
        assert name == "flash-attn-4"
        case = replace(case, sinks=False)
        x = x._replace(sinks=None)
    assert check.relative_error((out,), check.reference(case, x, False, torch.float64)) < check.OUTPUT_LIMIT


# --- MLX, in its own process

FAKE_MLX = """
import torch
from safetensors.torch import load_file, save_file
class fast:
    @staticmethod
    def scaled_dot_product_attention(q, k, v, *, scale, mask=None, sinks=None):
        group = q.shape[1] // k.shape[1]
        scores = q.double() @ k.double().repeat_interleave(group, 1).mT * scale
        if mask == "causal":
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            scores = scores.masked_fill(~keep, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        if sinks is not None:
            column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        return (scores.softmax(-1)[..., : k.shape[2]] @ v.double().repeat_interleave(group, 1)).to(q.dtype)
load = load_file
contiguous = torch.Tensor.contiguous
def eval(*things): pass
def save_safetensors(path, tensors): save_file(tensors, path)
"""


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_mlx_is_asked_in_a_process_of_its_own(case, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(FAKE_MLX)
    folder = {}
    monkeypatch.syspath_prepend(tmp_path)

    def child(command, **rest):
        assert command[:3] == [sys.executable, "-m", "fastattn.bench.peer_mlx"]
        folder["found"] = peer_mlx.main(command[3])
        return Package(returncode=0, stdout=f"noise\n{json.dumps(folder['found'])}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", child)
    monkeypatch.setattr(peer_mlx, "ROUND_SECONDS", 1e-4)
    sets = inputs_of(case, 2)
    try:
        out, times = peers._measure_mlx(case, sets)
    except Refusal:
        assert case.padding or case.packed or case.lengths or case.left >= 0 or case.softcap
        return
    finally:
        for name in ("mlx", "mlx.core"):
            sys.modules.pop(name, None)
    assert check.relative_error((out,), check.reference(case, sets[0], False, torch.float64)) < check.OUTPUT_LIMIT
    assert 0 < times["min_us"] <= times["us"] <= times["max_us"]
    assert times["method"] == "own process"


def test_mlx_that_fails_says_why(monkeypatch):
    pytest.importorskip("safetensors")
    failed = Package(returncode=1, stdout="", stderr="Traceback\nModuleNotFoundError: No module named 'mlx'\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **rest: failed)
    (x,) = inputs_of(Case(5, 5))
    with pytest.raises(RuntimeError, match="No module named 'mlx'"):
        peer_mlx.measure(x.q, x.k, x.v, "causal", None, 1.0, 1)
    monkeypatch.setattr(peer_mlx, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="too large"):
        peer_mlx.measure(x.q, x.k, x.v, "causal", None, 1.0, 1)
