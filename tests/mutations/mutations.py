"""Deliberate mistakes, each with the tests that have to notice it. What they are applied to is a copy: `run.py`."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake."""

    name: str
    file: str  #: under src/fastattn
    old: str  #: text that occurs in it once
    new: str
    tests: tuple[str, ...]  #: arguments of pytest


_REFERENCE = ("tests/test_reference.py", "-k", "every_feature and dtype0 or every_feature and float64")
_TORCH = ("tests/backends/test_torch.py",)
_EMULATED = ("tests/differential/test_emulated.py",)
_DECODE = ("tests/backends/triton/decode/test_decode.py", "-k", "splits or layouts")
_KEYS = ("tests/backends/cudnn/test_keys.py",)
_FAST = ("tests/differential/test_problems.py", "-k", "outputs-0")
_FILES = ("tests/faults/test_plan_files.py",)
_OTHER_USERS = ("tests/backends/cudnn/test_disk_other_users.py",)

_HOPPER = ("tests/backends/triton/hopper/test_model.py",)
_BOUNDS = ("tests/backends/triton/test_bounds.py",)

MUTATIONS = (
    # caches and keys
    Mutation(
        "a plan's key forgets the strides of a static operand",
        "backends/cudnn/operands.py",
        "return Operand(role, tuple(x.shape), (*strides, 1), x.dtype)",
        "return Operand(role, tuple(x.shape), (x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3],"
        " x.shape[3], 1), x.dtype)",
        _EMULATED,
    ),
    Mutation(
        "a plan's key forgets the alignment of the causal mask",
        "backends/cudnn/geometry.py",
        "return p.q_len != p.kv_len or p.q_lengths or p.kv_lengths",
        "return False",
        _EMULATED,
    ),
    Mutation(
        "a graph is built without its left bound",
        "backends/cudnn/graphs.py",
        "    if key.left >= 0:\n",
        "    if key.left >= 1 << 30:\n",
        _KEYS,
    ),
    Mutation(
        "the kind of a call forgets the strides",
        "call.py",
        "(x.shape, x.stride(), x.dtype, x.device) for x in call[self._tensors]]",
        "(x.shape, x.dtype, x.device) for x in call[self._tensors]]",
        ("tests/dispatch/test_fast_path.py", "-k", "other_strides"),
    ),
    Mutation(
        "the fast path's key forgets the strides",
        "dispatch/fast_path.py",
        "    return x.shape, x.stride(), x.dtype, x.device\n",
        "    return x.shape, x.dtype, x.device\n",
        ("tests/dispatch/test_fast_path.py", "-k", "in_the_key or in_the_name or change_places"),
    ),
    Mutation(
        "the fast path's key forgets an argument",
        "dispatch/fast_path.py",
        "_KINDS[type(x)](x) for x in arguments])",
        "_KINDS[type(x)](x) for x in arguments[:-1]])",
        ("tests/dispatch/test_fast_path.py", "-k", "in_the_key"),
    ),
    Mutation(
        "a cached call takes the scale of the first one",
        "dispatch/fast_path.py",
        "cached.default_scale if scale is None else scale, cached.static",
        "cached.default_scale, cached.static",
        _FAST,
    ),
    Mutation(
        "lengths of an earlier call are cached as if they were no data",
        "backends/cudnn/ragged_offsets.py",
        "self._static = not (p.q_lengths or p.kv_lengths or",
        "self._static = not (p.q_lengths or",
        _EMULATED,
    ),
    # masks
    Mutation(
        "a bool mask is inverted",
        "masks.py",
        "mask = mask if mask.dtype == torch.bool else mask > -torch.inf\n        seen = mask if",
        "mask = ~mask if mask.dtype == torch.bool else mask > -torch.inf\n        seen = mask if",
        _REFERENCE,
    ),
    Mutation(
        "a window is one key short on the right",
        "masks.py",
        "position + call.right + 1",
        "position + call.right",
        _REFERENCE,
    ),
    Mutation(
        "a window is one key short on the left in the decode kernel",
        "backends/triton/masking.py",
        "lo = tl.maximum(position - left, 0)",
        "lo = tl.maximum(position - left + 1, 0)",
        ("tests/backends/triton/decode/test_decode.py", "-k", "features and window"),
    ),
    Mutation(
        "a window is one key short on the left in a graph",
        "backends/cudnn/graphs.py",
        "= key.left + 1  # cuDNN counts the diagonal itself",
        "= key.left",
        _EMULATED,
    ),
    Mutation(
        "torch's causal mask is taken for the lower-right one",
        "backends/torch.py",
        "p.causal and (p.q_len == p.kv_len or p.q_len == 1)",
        "p.causal",
        _TORCH,
    ),
    Mutation(
        "a token of a segment sees the next one's keys",
        "masks.py",
        "lo, hi = first[n], end[n]",
        "lo, hi = first[n], end[n] + 1",
        ("tests/test_varlen.py",),
    ),
    Mutation(
        "keys beyond a length are let in",
        "masks.py",
        "return total if call.kv_lengths is None else call.kv_lengths.clamp(0, total)",
        "return total if call.kv_lengths is None else call.kv_lengths.add(1).clamp(0, total)",
        _REFERENCE,
    ),
    # memory
    Mutation(
        "a layout that cannot be read is not copied",
        "backends/layout.py",
        "return x if x.data_ptr() % ALIGNMENT == 0 and fits(x) else copied(x)",
        "return x",
        _EMULATED,
    ),
    Mutation(
        "the alignment of the address is not checked",
        "backends/cudnn/forward.py",
        "if not self._in_place or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:",
        "if not self._in_place:",
        _EMULATED,
    ),
    Mutation(
        "the strides of heads and tokens are swapped",
        "backends/cudnn/ragged_offsets.py",
        "strides += [x.stride(0), x.stride(1) * (1 if role in KEY_SIDE else group), x.stride(2)]",
        "strides += [x.stride(0), x.stride(2) * (1 if role in KEY_SIDE else group), x.stride(1)]",
        _EMULATED,
    ),
    Mutation(
        "queries with strided elements are not copied for the decode kernel",
        "backends/triton/decode/forward.py",
        "if x.stride(3) != 1:",
        "if x.stride(3) > 2:",
        _DECODE,
    ),
    Mutation(
        "rows that a plan leaves untouched are not cleared",
        "backends/cudnn/forward.py",
        "                out.zero_()\n",
        "                pass\n",
        _EMULATED,
    ),
    Mutation(
        "fully masked rows keep the output of torch's kernel",
        "backends/torch.py",
        "    return masks.clear(out, fully_masked)",
        "    return out",
        _TORCH,
    ),
    Mutation(
        "keys that no query sees are not cleared",
        "backends/torch.py",
        "        unseen = masks.unseen_keys(c)\n",
        "        unseen = None\n",
        _TORCH,
    ),
    # arithmetic
    Mutation(
        "the sink is forgotten when splits are combined",
        "backends/triton/decode/combine.py",
        "        total += tl.exp(sink - base)\n",
        "        total += 0.0\n",
        _DECODE,
    ),
    Mutation(
        "splits are combined as if they had the same greatest score",
        "backends/triton/decode/combine.py",
        "total = tl.sum(tl.exp(m_s - base) * l_s, 0)",
        "total = tl.sum(l_s, 0)",
        _DECODE,
    ),
    Mutation(
        "the wrong head of a group in the decode kernel",
        "backends/triton/decode/kernel.py",
        "head = kv_head * GROUP + r % GROUP",
        "head = kv_head + (r % GROUP) * KV_HEADS",
        _DECODE,
    ),
    Mutation(
        "the sink has no gradient in the reference",
        "reference.py",
        "dsinks -= (sink * delta).sum((0, 2))",
        "dsinks -= (sink * delta * 0).sum((0, 2))",
        _REFERENCE,
    ),
    Mutation(
        "the derivative of the softcap is forgotten",
        "reference.py",
        "ds = ds * (1 - rows.capped.div(p.softcap).square())",
        "ds = ds * 1",
        _REFERENCE,
    ),
    Mutation(
        "a fully masked row has the statistics of one that is not",
        "backends/cudnn/backward.py",
        "stats = torch.where(lse == -torch.inf, torch.inf, lse) if p.may_have_empty_rows else lse",
        "stats = lse",
        _EMULATED,
    ),
    # the rest
    Mutation(
        "a damaged plan file is trusted",
        "backends/cudnn/disk.py",
        'if not hmac.compare_digest(hmac.digest(key, body, "sha256"), data[len(MAGIC) : start]):',
        "if False:",
        _FILES,
    ),
    Mutation(
        "a plan of another machine is trusted",
        "backends/cudnn/disk.py",
        "if body[8 : 8 + length] != label:",
        "if False:",
        _FILES,
    ),
    Mutation(
        "a plan file that another user may write is trusted",
        "backends/cudnn/folder.py",
        "if info.st_uid != os.geteuid() or info.st_mode & mode:",
        "if False:",
        _OTHER_USERS,
    ),
    Mutation(
        "the directories above the folder of plans are not checked",
        "backends/cudnn/folder.py",
        "            _check_lead(os.fstat(here), path)\n",
        "",
        _OTHER_USERS,
    ),
    Mutation(
        "a copied folder of plans is trusted",
        "backends/cudnn/folder.py",
        'os.fstat(handle).st_ino.to_bytes(8, "little")',
        "bytes(8)",
        _OTHER_USERS,
    ),
    Mutation(
        "files that are no plans are trimmed",
        "backends/cudnn/disk.py",
        "if _OURS.fullmatch(entry.name) else None",
        'if entry.name.endswith((".plan", ".tmp")) else None',
        _OTHER_USERS,
    ),
    Mutation(
        "a result file names files elsewhere",
        "../../benchmarks/report/data.py",
        'r"[^A-Za-z0-9._-]+"',
        'r"[^A-Za-z0-9._/-]+"',
        ("tests/benchmarks/test_hostile_results.py", "-k", "name_no_files"),
    ),
    Mutation(
        "a result file's text is markup in a page",
        "../../benchmarks/report/__main__.py",
        "autoescape=True",
        "autoescape=False",
        ("tests/benchmarks/test_hostile_results.py", "-k", "do_nothing and sweep"),
    ),
    Mutation(
        "a terminal executes a result file",
        "common/printable.py",
        "    if character.isprintable():\n        return character\n",
        "    return character\n",
        ("tests/benchmarks/test_hostile_results.py", "-k", "do_nothing or printable"),
    ),
    Mutation(
        "a file is written over its own input",
        "bench/output.py",
        "if _same(path, Path(source)) or _part_of(path, Path(source)):",
        "if False:",
        ("tests/bench/test_output.py", "-k", "inputs or model"),
    ),
    Mutation(
        "a full disk takes the old file",
        "bench/output.py",
        "    temporary = _temporary(path)\n    handle = os.open(temporary, _NEW, 0o666)  # less the umask\n",
        "    temporary = path\n    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)\n",
        ("tests/bench/test_output.py", "-k", "old_file"),
    ),
    Mutation(
        "v may be shorter than k",
        "validation.py",
        "if v.shape[2] != k.shape[2]:",
        "if v.shape[2] > k.shape[2]:",
        ("tests/faults/test_bad_calls.py", "-k", "each_bad_value"),
    ),
    Mutation(
        "use_backend outlives an exception",
        "dispatch/registry.py",
        "    try:\n        yield\n    finally:\n        _chosen.reset(token)",
        "    yield\n    _chosen.reset(token)",
        ("tests/dispatch/test_use_backend.py",),
    ),
    Mutation(
        "a background failure is tried again for ever",
        "backends/cudnn/plan_policy.py",
        "due = now >= found.retry_at if found.state is State.FAILED else found.occasions >= enough",
        "due = found.occasions >= enough",
        ("tests/faults/test_worker_faults.py", "-k", "reported_once"),
    ),
    Mutation(
        "cached calls stay when a backend has refused",
        "dispatch/fast_path.py",
        "dropped_for=[Reason.BACKEND_REFUSED]",
        "dropped_for=[]",
        ("tests/faults/test_setbacks.py", "-k", "doubles_the_wait"),
    ),
    Mutation(
        "clear_plans leaves what is cached for other reasons",
        "shape_cache.py",
        "if reason is Reason.CLEARED or reason in holder.dropped_for:",
        "if reason in holder.dropped_for:",
        ("tests/test_shape_cache.py",),
    ),
    Mutation(
        "a function imports a higher layer",
        "masks.py",
        "    total = call.k.shape[2]\n    return total if call.kv_lengths is None",
        "    from .dispatch import registry as registry\n\n    total = call.k.shape[2]\n"
        "    return total if call.kv_lengths is None",
        ("tests/test_layers.py",),
    ),
    Mutation(
        "a call with its log-sum-exp is taken to train",
        "backends/cudnn/forward.py",
        "trained=bool(p.grads)",
        "trained=stats",
        ("tests/backends/cudnn/test_plan_choice.py", "-k", "say_whether_they_train"),
    ),
    Mutation(
        "memory that ran out is a refusal for good",
        "backends/errors.py",
        "            return OutOfMemory(_line(error))",
        "            return Refusal(_line(error))",
        ("tests/faults/test_setbacks.py", "-k", "first_one_later"),
    ),
    Mutation(
        "a copied function shares its code",
        "_compat/functions.py",
        'function.__code__.replace(co_name=f"{function.__name__}_with_other_globals")',
        "function.__code__",
        ("tests/lm/fused_ops/test_fused_ops.py", "-k", "other_globals"),
    ),
    Mutation(
        "the table promises what cuDNN refuses",
        "backends/cudnn/support.py",
        "_backward_above(128), GENERIC)",
        "_backward_above(256), GENERIC)",
        ("tests/gpuless/test_support_page.py",),
    ),
    # the Hopper forward
    Mutation(
        "keys before a tile's first one keep their values",
        "backends/triton/hopper/masking.py",
        "visible = keys >= anchor",
        "visible = keys >= start",
        _HOPPER,
    ),
    Mutation(
        "a tile's last block counts keys of the block before twice",
        "backends/triton/hopper/masking.py",
        "gl.minimum(seen.hi - start, end)",
        "(seen.hi - start)",
        _HOPPER,
    ),
    Mutation(
        "a consumer waits for a tile's last values before it gives back the queries",
        "backends/triton/hopper/consumer.py",
        "        mbarrier.arrive(pipe.q_empty.index(q_slot * 2 + group))\n"
        "        _drop_last(pipe, slot, phase, m, b, n, anchor, first, seen, shape, cfg)\n",
        "        _drop_last(pipe, slot, phase, m, b, n, anchor, first, seen, shape, cfg)\n"
        "        mbarrier.arrive(pipe.q_empty.index(q_slot * 2 + group))\n",
        _HOPPER,
    ),
    Mutation(
        "tiles that see no key are left as they are",
        "backends/triton/hopper/output.py",
        "for t in range(total + pid, ",
        "for t in range(total + pid + 1, ",
        _HOPPER,
    ),
    Mutation(
        "gaps between the keys of a tile's rows are not found",
        "backends/triton/bounds.py",
        "(lo > highest) | (hi < lowest)",
        "(hi < lowest)",
        _BOUNDS,
    ),
    Mutation(
        "a mask of keys with a hole passes for padding",
        "backends/triton/key_bias.py",
        "(other > 0) | (count != end - first)",
        "(other > 0)",
        _BOUNDS,
    ),
)
