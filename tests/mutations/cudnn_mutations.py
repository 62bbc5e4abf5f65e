"""Deliberate mistakes: the cuDNN backend."""

from __future__ import annotations

from mutation import Mutation

_EMULATED = ("tests/differential/test_emulated.py",)
_KEYS = ("tests/backends/cudnn/test_keys.py",)

MUTATIONS = (
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
        "lengths of an earlier call are cached as if they were no data",
        "backends/cudnn/ragged_offsets.py",
        "self._static = not (p.q_lengths or p.kv_lengths or",
        "self._static = not (p.q_lengths or",
        _EMULATED,
    ),
    Mutation(
        "a window is one key short on the left in a graph",
        "backends/cudnn/graphs.py",
        "= key.left + 1  # cuDNN counts the diagonal itself",
        "= key.left",
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
        "rows that a plan leaves untouched are not cleared",
        "backends/cudnn/forward.py",
        "                out.zero_()\n",
        "                pass\n",
        _EMULATED,
    ),
    Mutation(
        "a fully masked row has the statistics of one that is not",
        "backends/cudnn/backward.py",
        "return lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)",
        "return lse",
        _EMULATED,
    ),
    Mutation(
        "a background failure is tried again for ever",
        "backends/cudnn/plan_policy.py",
        "due = now >= found.retry_at if found.state is State.FAILED else found.occasions >= enough",
        "due = found.occasions >= enough",
        ("tests/faults/test_worker_faults.py", "-k", "reported_once"),
    ),
    Mutation(
        "a call with its log-sum-exp is taken to train",
        "backends/cudnn/forward.py",
        "trained=bool(p.grads)",
        "trained=stats",
        ("tests/backends/cudnn/test_plan_choice.py", "-k", "say_whether_they_train"),
    ),
    Mutation(
        "the table promises what cuDNN refuses",
        "backends/cudnn/support.py",
        "_backward_above(128), GENERIC)",
        "_backward_above(256), GENERIC)",
        ("tests/gpuless/test_support_page.py",),
    ),
)
