"""`fastattn sweep` without a name: what it measures, who takes part, and that everybody is asked for the same."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from fastattn.bench import calls, peer_mlx, peers, roof, rows, sweep_op
from fastattn.bench.calls import IMPLEMENTATIONS, Case, Part, Refusal
from fastattn.bench.inputs import make_inputs, torch_mask, without_padding
from fastattn.bench.rows import Sweep

CPU = torch.device("cpu")
CASES = [
    Case(20, 20),
    Case(6, 20, head_major=True),
    Case(1, 20, head_major=True),
    Case(20, 20, left=6),
    Case(20, 20, q_heads=8, kv_heads=2, sinks=True),
    Case(20, 20, q_heads=8, kv_heads=2, sinks=True, left=6),
    Case(20, 20, 3, padding=(0, 5, 12)),
    Case(30, 30, packed=(5, 1, 24)),
    Case(12, 12, 2, additive=True),
    Case(1, 20, 3, head_major=True, lengths=(20, 1, 7)),
    Case(20, 20, softcap=0.7),
]
ids = [case.label() for case in CASES]


def inputs_of(case, count=1):
    return make_inputs(case, CPU, torch.Generator().manual_seed(1), count)


def seen(case):
    """Which keys a query sees, by what the case says in words: bool [B, Sq, Skv]."""
    found = torch.zeros(case.batch, case.q_len, case.kv_len, dtype=torch.bool)
    ends = [sum((case.packed or ())[: n + 1]) for n in range(len(case.packed or ()))]
    for b in range(case.batch):
        total = case.lengths[b] if case.lengths else case.kv_len
        for i in range(case.q_len):
            for j in range(total):
                place = i + total - case.q_len
                ok = j <= place and (case.left < 0 or j >= place - case.left)
                if case.padding:
                    ok = ok and j >= case.padding[b] and i >= case.padding[b]
                if case.packed:
                    ok = ok and sum(i >= end for end in ends) == sum(j >= end for end in ends)
                found[b, i, j] = ok
    return found


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_pairs_are_counted_as_words_say(case):
    assert case.pairs == int(seen(case).sum())
    assert case.useful_flops("inference") == 4.0 * case.pairs * case.q_heads * case.dim
    assert case.useful_flops("step") == case.useful_flops("training") + case.useful_flops("backward")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_torchs_mask_says_the_same(case):
    mask = torch_mask(case, CPU, torch.Generator().manual_seed(1))
    words = seen(case)
    if mask is None:
        plain = torch.ones(case.q_len, case.kv_len, dtype=torch.bool)
        assert bool((words == (plain.tril() if case.q_len > 1 else plain)).all())
        return
    mask = mask if mask.dtype == torch.bool else mask > -torch.inf
    real = words.any(-1)  # what a query of padding sees is nobody's business
    assert torch.equal(mask.expand(case.batch, 1, -1, -1)[:, 0][real], words[real])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_everybody_computes_the_same(case, monkeypatch):
    """Every implementation that runs on a CPU, and flex without its compiler, against the reference in float64."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(peers, "_flex", lambda: flex_attention)
    (x,) = inputs_of(case)
    (expected,) = calls.truth(case, x, False, torch.float64)
    binds = {name: IMPLEMENTATIONS[name].bind for name in ("fastattn", "torch-cudnn", "torch-efficient", "torch-math")}
    done = []
    for name, bind in (binds | {"flex": peers._bind_flex}).items():
        try:
            with torch.inference_mode():
                out = bind(case, x)()
        except Refusal:
            continue
        assert calls.relative_error((without_padding(case, out),), (expected,)) < calls.OUTPUT_LIMIT, name
        done.append(name)
    assert "fastattn" in done and len(done) >= 2


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_part_is_attention_of_its_own(case):
    (x,) = inputs_of(case)
    whole = calls.truth(case, x, True, torch.float64)
    for part in (Part(0, 0), Part(case.batch - 1, case.kv_heads - 1)):
        found = calls.truth(*part.of(case, x), True, torch.float64)
        assert calls.relative_error(found, part.cut(case, whole)) < 1e-12


@pytest.mark.parametrize(
    "more",
    [
        {"padding": (1,)},
        {"padding": (1, 2), "kv_len": 9},
        {"packed": (4, 4)},
        {"packed": (4, 3), "batch": 1},
        {"padding": (1, 2), "additive": True},
    ],
)
def test_cases_that_mean_nothing_are_refused(more):
    with pytest.raises(ValueError, match="expected one"):
        Case(**{"q_len": 8, "kv_len": 8, "batch": 2, **more})


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_case_comes_back_from_a_file(case):
    assert Case.of(json.loads(json.dumps(asdict(case) | {"kind": "inference"}))) == case


def test_a_wrong_part_is_found(monkeypatch):
    """One K/V head of one batch entry is looked at: an error in it is seen, whichever it is."""
    bench = Sweep(CPU, quick=True, seed=0, say=lambda line: None)
    case = Case(9, 9, 2, 4, 2, 16)
    part = bench._drawn(case)

    def wrong(case, x):
        def call():
            out = calls._bind_fastattn(case, x)().clone()
            part.cut(case, (out,))[0].mul_(1.05)
            return out

        return call

    mine = IMPLEMENTATIONS["fastattn-any"]
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-math", replace(mine, name="torch-math", binder=wrong))
    row = bench.compare(case, ("fastattn", "torch-math"), exact=True)
    assert row["check"] == f"reference in float64, batch entry {part.entry}, K/V head {part.head}"
    assert "wrong result" in row["implementations"]["torch-math"]["error"]
    assert row["implementations"]["fastattn"]["relative_error"] < calls.OUTPUT_LIMIT


def test_a_step_is_forward_and_backward():
    bench = Sweep(CPU, quick=True, seed=0, say=lambda line: None)
    row = bench.compare(Case(9, 9, 2, 4, 2, 16), ("fastattn", "torch-math"), kind="step", exact=True)
    for entry in row["implementations"].values():
        assert 0 < entry["relative_error"] < calls.GRADIENT_LIMIT
        assert entry["first_ms"] > 0
    assert row["implementations"]["fastattn"]["served_by"] == "torch"
    assert row["case"]["kind"] == "step"


def test_a_refusal_is_no_failure(monkeypatch):
    bench = Sweep(CPU, quick=True, seed=0, say=lambda line: None)
    bench.add("s", "r", lambda: bench.compare(Case(9, 9, sinks=True), ("fastattn", "torch-math")))
    (row,) = bench.sections["s"]
    assert "expected one query" in row["implementations"]["torch-math"]["refused"]
    assert "torch-math refuses" in rows.summary(row)
    assert not bench.failed


def test_rows_of_every_phase(monkeypatch):
    """The full list, as on a GPU, without measuring it."""
    bench = Sweep(CPU, quick=True, seed=0, say=lambda line: None)
    for which in range(3):
        monkeypatch.setattr(bench, "pick", lambda *given, which=which: given[which])
        found = sweep_op.sections(bench)
        assert set(sweep_op.FLEX) <= set(found)
        assert all(max(rows) < len(found[name]) for name, rows in sweep_op.FLEX.items()) or which
        assert all(any(getattr(case, key) for case in found["masks"]) for key in ("padding", "packed", "lengths"))
        assert any(case.additive for case in found["masks"])
        assert any(case.sinks and case.left < 0 for case in found["windows, sinks, softcap"])
        assert {case.q_len == 1 for case in found["decode"]} == {True}


def test_the_roof_is_measured():
    row = roof.measure(CPU, torch.Generator().manual_seed(0))
    assert set(row["figures"]) == {"copy GB/s", "matmul TFLOP/s"}
    assert all(value > 0 for value in row["figures"].values())


# --- peers


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4", "flashinfer", "xformers"])
@pytest.mark.parametrize("case", CASES, ids=ids)
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
    assert "flex" not in sweep_op.about_peers()


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


@pytest.mark.parametrize("case", CASES, ids=ids)
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
    assert calls.relative_error((out,), calls.truth(case, x, False, torch.float64)) < calls.OUTPUT_LIMIT


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


@pytest.mark.parametrize("case", CASES, ids=ids)
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
    assert calls.relative_error((out,), calls.truth(case, sets[0], False, torch.float64)) < calls.OUTPUT_LIMIT
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


@pytest.mark.gpu
@pytest.mark.slow
def test_the_op_sweep_on_a_gpu(tmp_path):
    """Everything but the full sizes: each implementation of torch that can do a call is right in it."""
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Sweep(device, quick=True, seed=0, say=print)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for case in CASES:
            names = ("fastattn", "fastattn-any", *sweep_op.TORCH)
            bench.add("inference", case.label(), lambda c=case, n=names: sweep_op._measure(bench, c, n, "inference"))
        bench.add("training", "step", lambda: sweep_op._measure(bench, Case(300, 300, 2), ("fastattn", "flex"), "step"))
        for name in ("fastattn", "torch-cudnn"):
            bench.add("fresh lengths", name, lambda n=name: sweep_op._fresh(bench, n))
    assert not bench.failed
    for row in bench.sections["inference"]:
        assert row["implementations"]["fastattn"]["us"] > 0
