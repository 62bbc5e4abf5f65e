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
_WIDE = ("tests/backends/triton/decode/test_wide_heads.py",)
_KEYS = ("tests/backends/cudnn/test_keys.py",)
_FAST = ("tests/differential/test_problems.py", "-k", "outputs-0")
_FILES = ("tests/faults/test_plan_files.py",)
_OTHER_USERS = ("tests/backends/cudnn/test_disk_other_users.py",)
_BINARIES = ("tests/backends/triton/binaries", "-m", "not slow")
_NOT_READY = ("tests/dispatch/test_not_ready.py",)

_FLASH = ("tests/integrations/flash_attn/test_flash_attn.py",)
_FLASH_CACHE = ("tests/integrations/flash_attn/test_with_kvcache.py",)
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
        "bound.scale if scale is None else scale, bound.static",
        "bound.scale, bound.static",
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
        "values are taken from the keys wherever they lie",
        "backends/triton/decode/forward.py",
        "kernel = self._same if call.k.data_ptr() == call.v.data_ptr() else self._apart",
        "kernel = self._same",
        (*_WIDE, "-k", "next_call or elsewhere"),
    ),
    Mutation(
        "values at the keys' address are taken for their first columns, whatever the strides",
        "backends/triton/decode/forward.py",
        "return all(one == other for size, one, other in both if size > 1)",
        "return bool(list(both))",
        (*_WIDE, "-k", "elsewhere"),
    ),
    Mutation(
        "a step whose first keys some rows do not see is not masked in wide heads",
        "backends/triton/decode/kernel.py",
        "if (step < inner_lo) | (",
        "if (",
        (*_WIDE, "-k", "test_features and window"),
    ),
    Mutation(
        "the second part of the head dim is left out of the scores",
        "backends/triton/head_dims.py",
        "product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision=PRECISION)",
        "product += 0.0",
        (*_WIDE, "-k", "test_features and causal"),
    ),
    Mutation(
        "blocks of rows that are neighbours count as tiles",
        "backends/triton/decode/kernel.py",
        "tiles = tl.num_programs(0) // blocks",
        "tiles = tl.num_programs(0)",
        (*_WIDE, "-k", "blocks_of_rows"),
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
        "return lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)",
        "return lse",
        _EMULATED,
    ),
    # binaries
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
        "a binary's label forgets the compiler",
        "backends/triton/binaries/label.py",
        '"triton": found.identity if found else None,',
        "",
        _BINARIES,
    ),
    Mutation(
        "a binary's label forgets the kernels' source",
        "backends/triton/binaries/label.py",
        "{_environment()}\\n{source}\\n",
        "{_environment()}\\n",
        _BINARIES,
    ),
    Mutation(
        "one that waits for a kernel waits for all that were asked for before",
        "backends/triton/binaries/compilers.py",
        "heapq.heappush(self._tasks, (not waiting, self._count, task))",
        "heapq.heappush(self._tasks, (True, self._count, task))",
        _BINARIES,
    ),
    Mutation(
        "a kernel that cannot be compiled is compiled again and again",
        "backends/triton/binaries/store.py",
        "if found is None and self.failed(flags) is None and not hindrance():",
        "if found is None and not hindrance():",
        _BINARIES,
    ),
    Mutation(
        "a kernel of another alignment is launched",
        "backends/triton/binaries/launcher.py",
        "function = None if bits % ALIGNMENT else self._aligned",
        "function = self._aligned",
        _BINARIES,
    ),
    # the rest
    Mutation(
        "a damaged plan file is trusted",
        "common/disk.py",
        'if not hmac.compare_digest(hmac.digest(key, body, "sha256"), data[len(self.magic) : start]):',
        "if False:",
        _FILES,
    ),
    Mutation(
        "a plan of another machine is trusted",
        "common/disk.py",
        "if body[8 : 8 + length] != label:",
        "if False:",
        _FILES,
    ),
    Mutation(
        "a plan file that another user may write is trusted",
        "common/folder.py",
        "if info.st_uid != os.geteuid() or info.st_mode & mode:",
        "if False:",
        _OTHER_USERS,
    ),
    Mutation(
        "the directories above the folder of plans are not checked",
        "common/folder.py",
        "            _check_lead(os.fstat(here), path)\n",
        "",
        _OTHER_USERS,
    ),
    Mutation(
        "a copied folder of plans is trusted",
        "common/folder.py",
        'os.fstat(handle).st_ino.to_bytes(8, "little")',
        "bytes(8)",
        _OTHER_USERS,
    ),
    Mutation(
        "files that are no plans are trimmed",
        "common/disk.py",
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
    # flash-attn's functions
    Mutation(
        "the log-sum-exp lacks what ALiBi's small mask left out",
        "integrations/flash_attn/attend.py",
        "lse = lse + bias.missing",
        "lse = lse + 0.0",
        _FLASH,
    ),
    Mutation(
        "ALiBi's small mask is used beside sinks",
        "integrations/flash_attn/alibi.py",
        " and options.sinks is None and ",
        " and ",
        _FLASH,
    ),
    Mutation(
        "ALiBi counts from the upper left",
        "integrations/flash_attn/alibi.py",
        "position = rows + (end - queries)",
        "position = rows + (end - end)",
        _FLASH,
    ),
    Mutation(
        "keys that are not used are seen",
        "integrations/flash_attn/varlen.py",
        "k_end = torch.minimum(k_end, k_first + self.used_k)",
        "k_end = k_end + 0 * self.used_k",
        _FLASH,
    ),
    Mutation(
        "left padding of a cache is seen",
        "integrations/flash_attn/attend.py",
        "lo = leftpad[:, None]",
        "lo = 0 * leftpad[:, None]",
        _FLASH_CACHE,
    ),
    Mutation(
        "queries are always rotated by their own positions",
        "integrations/flash_attn/kvcache.py",
        "own = step[: q.shape[1]] if chosen.window is not None else",
        "own = step[: q.shape[1]] if True else",
        _FLASH_CACHE,
    ),
    Mutation(
        "new tokens of a page go to the next one",
        "integrations/flash_attn/store.py",
        "// keys.shape[1]",
        "// keys.shape[1] % 2",
        _FLASH_CACHE,
    ),
    Mutation(
        "dropout is causal from the upper left",
        "integrations/flash_attn/dropout.py",
        "(call.right == 0 and square)",
        "call.right == 0",
        ("tests/integrations/flash_attn/test_arguments.py", "-k", "dropout"),
    ),
    Mutation(
        "a deterministic backward is like any other",
        "integrations/flash_attn/attend.py",
        "(_deterministically if deterministic else _at_once)",
        "(_at_once if deterministic else _at_once)",
        ("tests/integrations/flash_attn/test_arguments.py", "-k", "deterministic"),
    ),
    # the drop-in
    Mutation(
        "the drop-in gives the upper-left causal mask keys that nobody sees",
        "integrations/torch/translate.py",
        "        if rows < keys:\n",
        "        if rows > keys:\n",
        (
            "tests/integrations/torch/test_calls.py",
            "-k",
            "upper_left",
        ),
    ),
    Mutation(
        "the drop-in aligns more queries than keys to the lower right",
        "integrations/torch/translate.py",
        "window=(-1, rows - keys)",
        "window=(-1, 0)",
        (
            "tests/integrations/torch/test_calls.py",
            "-k",
            "upper_left",
        ),
    ),
    Mutation(
        "the drop-in lets a mask have the dims of the values",
        "integrations/torch/translate.py",
        "mask.dim() <= max(q.dim(), k.dim()):",
        "mask.dim() <= max(q.dim(), k.dim(), v.dim()):",
        ("tests/integrations/torch/test_drawn_calls.py",),
    ),
    Mutation(
        "the drop-in's mask keeps its dtype under autocast",
        "integrations/torch/decide.py",
        "mask = None if mask is None else _cast(mask, dtype)",
        "mask = None if mask is None else mask",
        (
            "tests/integrations/torch/test_modes.py",
            "-k",
            "rounds_a_mask",
        ),
    ),
    Mutation(
        "the drop-in does not ask for torch's switches",
        "_compat/sdpa.py",
        "        if not enabled():\n",
        "        if not enabled:\n",
        (
            "tests/integrations/torch/test_routing.py",
            "-k",
            "honoured",
        ),
    ),
    Mutation(
        "the drop-in's key forgets that a mask has a gradient",
        "integrations/torch/decide.py",
        "mask.device, grads and mask.requires_grad)",
        "mask.device)",
        (
            "tests/integrations/torch/test_routing.py",
            "-k",
            "told_apart",
        ),
    ),
    Mutation(
        "the drop-in takes sparse tensors for dense ones",
        "integrations/torch/decide.py",
        "if x.is_nested or x.layout is not torch.strided:",
        "if x.is_nested:",
        (
            "tests/integrations/torch/test_errors.py",
            "-k",
            "sparse",
        ),
    ),
    Mutation(
        "the drop-in forgets that the mask alone is mapped by vmap",
        "integrations/torch/sdpa.py",
        "q = q.expand(info.batch_size, *q.shape[1:])",
        "q = q.expand(q.shape)",
        (
            "tests/integrations/torch/test_modes.py",
            "-k",
            "vmap_of_masks",
        ),
    ),
    Mutation(
        "unpatch forgets modules that were imported since",
        "integrations/torch/patching.py",
        "for module, name in [*known, *_holders(self.function)]:",
        "for module, name in known:",
        (
            "tests/integrations/torch/test_patching.py",
            "-k",
            "imported_or_reloaded",
        ),
    ),
    Mutation(
        "unpatch forgets modules that are imported no more",
        "integrations/torch/patching.py",
        "for module, name in [*known, *_holders(self.function)]:",
        "for module, name in _holders(self.function):",
        (
            "tests/integrations/torch/test_patching.py",
            "-k",
            "imported_or_reloaded",
        ),
    ),
    Mutation(
        "a model's forward stays wrapped",
        "integrations/torch/patching.py",
        "            if known.blocks:\n                return\n",
        "            if known.blocks or blocks < 0:\n                return\n",
        (
            "tests/integrations/torch/test_patching.py",
            "-k",
            "model_alone",
        ),
    ),
    Mutation(
        "drop-in calls go to cuDNN with a dense mask on Hopper",
        "integrations/torch/decide.py",
        'return name == "cudnn" and problem.dense_mask and',
        'return name == "none" and problem.dense_mask and',
        (
            "tests/integrations/torch/test_routing.py",
            "-k",
            "as_on_a_gpu",
        ),
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
