"""Deliberate mistakes: Triton and Gluon kernels, their binaries and launches."""

from __future__ import annotations

from mutation import Mutation

_DECODE = ("tests/backends/triton/decode/test_decode.py", "-k", "splits or layouts")
_WIDE = ("tests/backends/triton/decode/test_wide_heads.py",)
_CHUNKS = ("tests/backends/triton/decode/test_chunks.py",)
_STEPS = ("tests/backends/triton/decode/test_launch.py",)
_BINARIES = ("tests/backends/triton/binaries", "-m", "not slow")
_HOPPER = ("tests/backends/triton/hopper/test_model.py",)
_BACKWARD = ("tests/backends/triton/hopper_backward/test_model.py",)
_ORDER = (*_BACKWARD, "-k", "test_in_order")
_HOPPER_WIDE = ("tests/backends/triton/hopper_wide/test_model.py",)
_BOUNDS = ("tests/backends/triton/test_bounds.py",)
_LAUNCHES = ("tests/backends/triton/hopper/test_launch.py", "tests/backends/triton/hopper_backward/test_run.py")

_BATCH = ("tests/backends/triton/prefill/test_batch.py",)
_STATES = ("tests/backends/triton/prefill/test_block_states.py",)
_PREFILL_MASKS = (
    "tests/backends/triton/prefill/test_prefill.py",
    "-k",
    "blocks and (bool or finfo or additive or keys)",
)

MUTATIONS = (
    Mutation(
        "a window is one key short on the left in the decode kernel",
        "backends/triton/masking.py",
        "lo = tl.maximum(position - left, 0)",
        "lo = tl.maximum(position - left + 1, 0)",
        ("tests/backends/triton/decode/test_decode.py", "-k", "features and window"),
    ),
    Mutation(
        "queries with strided elements are not copied for the decode kernel",
        "backends/triton/binding.py",
        "if x.stride(3) != 1:",
        "if x.stride(3) > 2:",
        _DECODE,
    ),
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
        "return self._apart.forward(call)",
        "return self._same.forward(call)",
        (*_WIDE, "-k", "next_call or elsewhere"),
    ),
    Mutation(
        "a decode call reads the lengths, masks and sinks of the call before",
        "backends/triton/decode/forward.py",
        "            values[i] = call[field].data_ptr()  # type: ignore[union-attr]\n",
        "            pass\n",
        _STEPS,
    ),
    Mutation(
        "a decode call whose values are not aligned takes the binary for those that are",
        "backends/triton/decode/forward.py",
        "(q | k | v) % ALIGNMENT",
        "(q | k) % ALIGNMENT",
        _STEPS,
    ),
    Mutation(
        "threads share the arguments of a decode call",
        "backends/triton/decode/forward.py",
        "class _Rooms(threading.local):",
        "class _Rooms:",
        _STEPS,
    ),
    Mutation(
        "the bounds of segments lie where the decode kernel writes",
        "backends/triton/binding.py",
        "        memory = self._memory()\n",
        "        from ..scratch import scratch\n\n        memory = scratch(call.q.device, self._bounds.size)\n",
        _STEPS,
    ),
    Mutation(
        "values at the keys' address are taken for their first columns, whatever the strides",
        "backends/triton/arguments.py",
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
        "a warmup of the decode kernel forgets other numbers of queries",
        "backends/triton/decode/family.py",
        "for q_len in _numbers_of_queries(p):",
        "for q_len in (p.q_len,):",
        ("tests/backends/triton/decode/test_binaries.py",),
    ),
    Mutation(
        "a warmup of the decode kernel forgets chunks",
        "backends/triton/decode/family.py",
        "    yield from _chunks(p)\n",
        "",
        ("tests/backends/triton/decode/test_binaries.py",),
    ),
    Mutation(
        "the last keys of a tile of 128 rows are not masked",
        "backends/triton/decode/kernel.py",
        " | (step + BLOCK_N > inner_hi)",
        "",
        (*_CHUNKS, "-k", "128_rows and causal"),
    ),
    Mutation(
        "the greatest score of a split stays a power of 2",
        "backends/triton/decode/kernel.py",
        "m *= _LN_2",
        "m *= 1.0",
        (*_CHUNKS, "-k", "128_rows and causal"),
    ),
    Mutation(
        "a chunk goes to a kernel that does not divide its keys",
        "backends/triton/decode/launch_config.py",
        "return many_heads(p) or is_chunk(p)",
        "return many_heads(p)",
        (*_CHUNKS, "-k", "asked_first"),
    ),
    Mutation(
        "a capture takes the kernel that calls before it were served by",
        "dispatch/routes.py",
        "found.coming and _calls_wait()",
        "found.coming and False",
        ("tests/dispatch/test_not_ready.py",),
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
        "the backward's memory has moved, and its kernels do not know",
        "backends/triton/hopper_backward/run.py",
        "if at != room.memory:",
        "if room.memory == 0:",
        _LAUNCHES,
    ),
    Mutation(
        "a backward takes the scale of the one before",
        "backends/triton/hopper_backward/run.py",
        "if call.scale != room.scale:",
        "if room.scale != room.scale:",
        _LAUNCHES,
    ),
    Mutation(
        "threads share the arguments of launches",
        "backends/triton/hopper/launch.py",
        "self._local = threading.local()",
        "self._local = type('Local', (), {})()",
        _LAUNCHES,
    ),
    Mutation(
        "a description stays when memory is used for another shape",
        "backends/triton/hopper/tensors.py",
        "key = address, self",
        "key = address, 0",
        _LAUNCHES,
    ),
    Mutation(
        "bounds of misaligned tensors are found by the binary for aligned ones",
        "backends/triton/bounds.py",
        "if not bits % ALIGNMENT:",
        "if True:",
        _LAUNCHES,
    ),
    Mutation(
        "a kernel of another alignment is launched",
        "backends/triton/binaries/launcher.py",
        "if room is None or bits % ALIGNMENT:",
        "if room is None:",
        _BINARIES,
    ),
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
        "a consumer of wide heads takes probabilities that are not all there yet",
        "backends/triton/hopper_wide/consumer.py",
        "    mbarrier.wait(pipe.p_full.index(owner), turn)\n",
        "",
        _HOPPER_WIDE,
    ),
    Mutation(
        "a consumer of wide heads gives values back while they are multiplied",
        "backends/triton/hopper_wide/consumer.py",
        "    l_i = _times(l_i, decay)\n    acc = warpgroup_mma_wait(0, deps=[acc])\n",
        "    mbarrier.arrive(pipe.empty.index(part))\n    l_i = _times(l_i, decay)\n"
        "    return warpgroup_mma_wait(0, deps=[acc]), new_base, l_i\n",
        _HOPPER_WIDE,
    ),
    Mutation(
        "the output of wide heads is not rescaled to the other consumer's bases",
        "backends/triton/hopper_wide/consumer.py",
        "    acc = _times(acc, decay)\n    mbarrier.wait(pipe.p_full",
        "    mbarrier.wait(pipe.p_full",
        _HOPPER_WIDE,
    ),
    Mutation(
        "a tile of wide heads sees what lies before its first key",
        "backends/triton/hopper_wide/tiles.py",
        "    cut = start < 0\n",
        "    cut = start + KEYS < 0\n",
        _HOPPER_WIDE,
    ),
    Mutation(
        "values that lay in the keys once are taken from there for ever",
        "backends/triton/hopper_wide/launch.py",
        "        found = self._kinds.get(same)\n",
        "        found = next(iter(self._kinds.values()), None)\n",
        ("tests/backends/triton/hopper_wide/test_launch.py",),
    ),
    Mutation(
        "a block does not wait for those before it to add",
        "backends/triton/hopper_backward/order.py",
        "if place > 0:",
        "if place > KEYS:",
        _ORDER,
    ),
    Mutation(
        "a program's block is not by its ticket",
        "backends/triton/hopper_backward/tiles.py",
        "return shape.ticket",
        "return gl.program_id(0)",
        _ORDER,
    ),
    Mutation(
        "consumers say that they have added before they have",
        "backends/triton/hopper_backward/consumer.py",
        "        add(results.dq_sum + at + place(dq_layout, cfg.D // 2), dq)\n"
        "        if cfg.ORDERED:\n"
        "            barrier()  # all four warps have added\n"
        "            mbarrier.arrive(pipe.added.index(slot))\n",
        "        if cfg.ORDERED:\n"
        "            mbarrier.arrive(pipe.added.index(slot))\n"
        "        add(results.dq_sum + at + place(dq_layout, cfg.D // 2), dq)\n",
        _ORDER,
    ),
    Mutation(
        "keys that nobody sees stay in shared memory",
        "backends/triton/hopper_backward/consumer.py",
        "if holes_in_keys(n, b, shape, cfg) != 0:",
        "if holes_in_keys(n, b, shape, cfg) > KEYS:",
        _BACKWARD,
    ),
    Mutation(
        "queries that see nothing are not copied away",
        "backends/triton/hopper_backward/prepare.py",
        "holes = (some <",
        "holes = (some + ROWS <",
        _BACKWARD,
    ),
    Mutation(
        "a tile of queries that all see nothing is not copied away",
        "backends/triton/hopper_backward/prepare.py",
        "holes = (some <",
        "holes = (some > 0) & (some <",
        _BACKWARD,
    ),
    Mutation(
        "consumers do not meet before they multiply dS",
        "backends/triton/hopper_backward/consumer.py",
        "        fence_async_shared()\n        meet()\n        dq",
        "        fence_async_shared()\n        dq",
        _BACKWARD,
    ),
    Mutation(
        "a tile of the next head is where it was before",
        "backends/triton/hopper_backward/consumer.py",
        "tile += shape.tiles - (end - first)",
        "tile += shape.tiles - end",
        _BACKWARD,
    ),
    Mutation(
        "a tile past a block's window is left out",
        "backends/triton/hopper_backward/tiles.py",
        "(gl.maximum(last, -1) + ROWS) // ROWS)",
        "(gl.maximum(last, -1)) // ROWS)",
        _BACKWARD,
    ),
    Mutation(
        "the next head's keys have the biases of the head before",
        "backends/triton/hopper_backward/consumer.py",
        "                    bias_at += shape.bias_h",
        "                    bias_at += 0",
        _BACKWARD,
    ),
    Mutation(
        "beside finfo.min an exponent is greater than 0",
        "backends/triton/hopper_backward/masking.py",
        "return gl.minimum(x + bias[:, None], 0.0)",
        "return x + bias[:, None]",
        _BACKWARD,
    ),
    Mutation(
        "queries of which a mask of keys hides all that their bounds leave count as others",
        "backends/triton/hopper_backward/prepare.py",
        "seeing = seeing & live",
        "seeing = seeing & there",
        _BACKWARD,
    ),
    Mutation(
        "queries that see nothing are those of the first head",
        "backends/triton/hopper_backward/tiles.py",
        "(b * shape.heads + h) * shape.tiles + m",
        "b * shape.heads * shape.tiles + m",
        _BACKWARD,
    ),
    Mutation(
        "a mask of keys with a sink: nobody looks whether the keys weigh something",
        "backends/triton/masking.py",
        "return (size > 0.0) |",
        "return (size >= 0.0) |",
        _BACKWARD,
    ),
    Mutation(
        "gaps between the keys of a tile's rows are not found",
        "backends/triton/bounds_kernel.py",
        "(lo > highest) | (hi < lowest)",
        "(hi < lowest)",
        _BOUNDS,
    ),
    Mutation(
        "a mask of keys with a hole passes for padding",
        "backends/triton/key_bias_kernel.py",
        "(other > 0) | (count != end - first)",
        "(other > 0)",
        _BOUNDS,
    ),
    # the prefill kernel
    Mutation(
        "a run of full blocks goes on behind a gap",
        "backends/triton/prefill/block_lists.py",
        "here = tl.where(ended > 0, 0, tl.maximum(stops - begins, 0))",
        "here = tl.maximum(stops - begins, 0)",
        _PREFILL_MASKS,
    ),
    Mutation(
        "a block whose mask adds something counts as full",
        "backends/triton/prefill/block_states.py",
        'return (entries == float("-inf")) == 0, entries == 0.0',
        'return (entries == float("-inf")) == 0, (entries == float("-inf")) == 0',
        _PREFILL_MASKS,
    ),
    Mutation(
        "a block whose first words are hidden counts as hidden",
        "backends/triton/prefill/block_states.py",
        "left |= (_tile_of_words(words_ptr, i, n, unsure, mask_si, WORDS) ^ flipped) & kept",
        "left |= 0 * i[:, None, None]",
        _STATES,
    ),
    Mutation(
        "rows past a batch entry's queries count where a mask is read in words",
        "backends/triton/prefill/block_states.py",
        "end = tl.minimum(start + BLOCK_M, queries)",
        "end = tl.minimum(start + BLOCK_M, q_len)",
        _STATES,
    ),
    Mutation(
        "a block that the band cuts at its end is left out",
        "backends/triton/prefill/block_states.py",
        "left_over = reached & ((start < first_full) | (start + BLOCK_N > last_full))",
        "left_over = reached & (start < first_full)",
        _STATES,
    ),
    Mutation(
        "a key that a row does not see reaches it where programs walk over the batch",
        "backends/triton/prefill/batch_kernel.py",
        's = tl.where(bias > float("-inf"), s * factor + bias, float("-inf"))',
        "s = s * factor + bias",
        _BATCH,
    ),
    Mutation(
        "a program leaves out its last batch entry",
        "backends/triton/prefill/batch_kernel.py",
        "tl.minimum(entries, batch - begin)",
        "tl.minimum(entries, batch - begin) - 1",
        _BATCH,
    ),
    Mutation(
        "keys that the window hides from all are loaded where programs walk over the batch",
        "backends/triton/prefill/batch_kernel.py",
        "wanted = (j >= first) & (j < last)",
        "wanted = j < kv_len",
        _BATCH,
    ),
    Mutation(
        "keys between the rows' intervals are loaded",
        "backends/triton/prefill/kernel.py",
        "inside = tl.max(seen.to(tl.int32), 0) > 0",
        "inside = (j >= first) & (j < last)",
        ("tests/backends/triton/prefill/test_prefill.py", "-k", "nan"),
    ),
    Mutation(
        "a row that sees nothing is not cleared",
        "backends/triton/prefill/kernel.py",
        "acc = tl.where(sees[:, None], acc * shrink, 0.0)",
        "acc = acc * shrink",
        ("tests/backends/triton/prefill/test_prefill.py", "-k", "blocks and lengths"),
    ),
    Mutation(
        "the least bias times log2(e) is -inf",
        "backends/triton/prefill/kernel.py",
        "p = tl.exp2((s - base[:, None]) * _LOG2_E)",
        "p = tl.exp2(s * _LOG2_E - (base * _LOG2_E)[:, None])",
        _PREFILL_MASKS,
    ),
    Mutation(
        "decode takes many queries with a softcap first",
        "dispatch/preference.py",
        '_many_rows_with_a_softcap,\n            ("hopper", "prefill", "decode"),',
        '_many_rows_with_a_softcap,\n            ("decode", "hopper", "prefill"),',
        ("tests/dispatch/test_preference.py",),
    ),
)
