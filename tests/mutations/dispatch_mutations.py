"""Deliberate mistakes: calls, keys, routes, the reference."""

from __future__ import annotations

from mutation import Mutation

_REFERENCE = ("tests/test_reference.py", "-k", "every_feature and dtype0 or every_feature and float64")
_TORCH = ("tests/backends/test_torch.py",)
_EMULATED = ("tests/differential/test_emulated.py",)
_FAST = ("tests/differential/test_problems.py", "-k", "outputs-0")
_NOT_READY = ("tests/dispatch/test_not_ready.py",)

_NATIVE = ("tests/dispatch/test_fast_path.py", "-k", "in_the_native_key and native")

MUTATIONS = (
    Mutation(
        "the native key forgets the strides",
        "dispatch/native/program.h",
        "  for (const auto n : impl->strides()) key.push_back(n);\n",
        "",
        _NATIVE,
    ),
    Mutation(
        "the native key forgets the softcap",
        "dispatch/native/attention.cpp",
        "return number(argument(6), key) && take(",
        "return take(",
        _NATIVE,
    ),
    Mutation(
        "the native module launches over addresses that a kernel cannot read",
        "dispatch/native/program.h",
        "if (x.aligned && address_of(tensor) % kAlignment) return false;",
        "",
        ("tests/dispatch/native/test_launches.py", "-k", "cannot_read"),
    ),
    Mutation(
        "programs are made within a capture",
        "dispatch/native/calls.py",
        "return index == torch_internals.current_device() and may_keep(torch_internals.raw_stream(index))",
        "return True",
        ("tests/dispatch/native/test_table.py", "-k", "in_a_capture"),
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
        "    return x.shape, x.stride(), x.dtype, x.device, wanted\n",
        "    return x.shape, x.dtype, x.device, wanted\n",
        ("tests/dispatch/test_fast_path.py", "-k", "in_the_key or in_the_name or change_places"),
    ),
    Mutation(
        "the fast path's key forgets the strides of the values",
        "dispatch/fast_path.py",
        "v.shape, v.stride(), dtype",
        "v.shape, dtype",
        ("tests/dispatch/test_fast_path.py", "-k", "in_the_key"),
    ),
    Mutation(
        "the fast path's key forgets which inputs want a gradient",
        "dispatch/fast_path.py",
        "wanted if wanted and True in wanted else None",
        "None",
        ("tests/dispatch/test_bound_gradients.py", "-k", "in_the_key"),
    ),
    Mutation(
        "a backward goes on with a kernel that holds no longer",
        "dispatch/eager.py",
        "if bound.generation != routes.generation() or torch",
        "if torch",
        ("tests/dispatch/test_bound_gradients.py", "-k", "holds_no_longer"),
    ),
    Mutation(
        "a backward goes on though hooks have changed a layout",
        "dispatch/eager.py",
        "(q.stride(), k.stride(), v.stride()) == bound.strides",
        "True",
        ("tests/dispatch/test_bound_gradients.py", "-k", "another_layout"),
    ),
    Mutation(
        "autocast reaches a cached call",
        "dispatch/fast_path.py",
        "    torch.set_autocast_enabled(device, False)\n    try:",
        "    try:",
        ("tests/dispatch/test_bound_gradients.py", "-k", "autocast"),
    ),
    Mutation(
        "the fast path's key forgets an argument",
        "dispatch/fast_path.py",
        "_KINDS[type(x)](x) for x in arguments[3:9]])",
        "_KINDS[type(x)](x) for x in arguments[3:8]])",
        ("tests/dispatch/test_fast_path.py", "-k", "in_the_key"),
    ),
    Mutation(
        "a cached call takes the scale of the first one",
        "dispatch/fast_path.py",
        "factor = bound.scale if scale is None else scale",
        "factor = bound.scale",
        _FAST,
    ),
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
    Mutation(
        "a layout that cannot be read is not copied",
        "backends/layout.py",
        "return x if x.data_ptr() % ALIGNMENT == 0 and fits(x) else copied(x)",
        "return x",
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
        "a route that passes over a kernel outlives its coming",
        "dispatch/routes.py",
        "if coming and shape_cache.drops(Reason.BINARY_READY) != seen:",
        "if False:",
        _NOT_READY,
    ),
    Mutation(
        "a kernel that comes while its lack is recorded is never asked for again",
        "dispatch/refusals.py",
        "if shape_cache.drops(Reason.BINARY_READY) != error.seen:",
        "if False:",
        _NOT_READY,
    ),
    Mutation(
        "a backend whose kernel comes before the backward is told no log-sum-exp",
        "dispatch/routes.py",
        "until = min(until or math.inf, late.until)",
        "until = 0.0 if late.coming else min(until or math.inf, late.until)",
        _NOT_READY,
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
        "cached calls stay when a backend has refused",
        "dispatch/fast_path.py",
        "dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY]",
        "dropped_for=[Reason.BINARY_READY]",
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
        "memory that ran out is a refusal for good",
        "backends/errors.py",
        "            return OutOfMemory(_line(error))",
        "            return Refusal(_line(error))",
        ("tests/faults/test_setbacks.py", "-k", "first_one_later"),
    ),
)
