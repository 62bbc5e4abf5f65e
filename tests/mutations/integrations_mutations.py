"""Deliberate mistakes: transformers, torch's function, flash-attn's functions."""

from __future__ import annotations

from mutation import Mutation

_FLASH = ("tests/integrations/flash_attn/test_flash_attn.py",)
_FLASH_CACHE = ("tests/integrations/flash_attn/test_with_kvcache.py",)

MUTATIONS = (
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
)
