"""What a cuDNN attention graph is: the key that names it, and the graph built from the key and from nothing else.

Whatever is baked into a graph is in its `PlanKey`, by construction: `build` sees only the key. What may change from
call to call (pointers, the scale, lengths, ragged offsets) is data and has no place in it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

#: The tensors that may lie at ragged offsets; the offsets of `x` are the tensor `ragged_x`.
RAGGED = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "stats")
KEY_SIDE = ("k", "v", "dk", "dv")  #: those of them that are as long as the keys
#: Every tensor that a graph may have, by role. The number is the tensor's id within the graph and in what is executed.
ROLES = {
    role: number
    for number, role in enumerate(
        (*RAGGED, *(f"ragged_{role}" for role in RAGGED), "scale", "bias", "dbias", "seq_q", "seq_kv"), start=1
    )
}
OUTPUTS = {"forward": ("o", "stats"), "backward": ("dq", "dk", "dv", "dbias")}


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor as a graph knows it."""

    role: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]  #: elements
    dtype: torch.dtype


@dataclass(frozen=True)
class PlanKey:
    """Names one plan. The one key of every graph: forward or backward, static or dynamic.

    Operands `seq_q` and `seq_kv` make the lengths data; operands `ragged_x` make the place of x data.
    """

    direction: str  #: "forward" or "backward"
    device: int  #: device index
    operands: tuple[Operand, ...]
    #: the band, in flash-attention's terms (the query at p sees [p - left, p + right], -1 = open)
    left: int = -1
    right: int = -1
    lower_right: bool = False  #: p = i + Skv - Sq (with lengths: the row's own) rather than p = i
    deterministic: bool = False
    #: ragged backward: queries and keys of all rows together at the most, what the workspace is made for; 0 = as many
    #: as the dims allow
    total: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # looked up on every call; the operands' own hashes take 10 us
        return self._hash

    def operand(self, role: str) -> Operand | None:
        return next((operand for operand in self.operands if operand.role == role), None)


def build(cudnn: Any, key: PlanKey, handle: Any = None, **device: Any) -> Any:
    """The graph that a key names, validated and lowered but not yet planned.

    handle: a cuDNN handle; or, to ask what cuDNN would support on a described device without a GPU, the arguments
    `device_property` and `sm_version` of `cudnn.pygraph`.
    """
    float32 = cudnn.data_type.FLOAT
    q_dtype = next(operand.dtype for operand in key.operands if operand.role == "q")
    graph = cudnn.pygraph(
        io_data_type=data_type(cudnn, q_dtype),
        intermediate_data_type=float32,
        compute_data_type=float32,
        handle=handle,
        **device,
    )
    tensors: dict[str, Any] = {}
    # Offsets first: the tensors that lie at them refer to them.
    for operand in sorted(key.operands, key=lambda operand: not operand.role.startswith("ragged_")):
        if operand.role not in OUTPUTS[key.direction] or operand.role == "dbias":
            tensors[operand.role] = graph.tensor(
                dim=list(operand.dims),
                stride=list(operand.strides),
                data_type=data_type(cudnn, operand.dtype),
                is_pass_by_value=operand.role == "scale",
                ragged_offset=tensors.get(f"ragged_{operand.role}"),
                uid=ROLES[operand.role],
                name=operand.role,
            )
    options = _options(cudnn, key, tensors)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if key.direction == "forward":
        found = graph.sdpa(q, k, v, generate_stats=key.operand("stats") is not None, **options)
        results = dict(zip(("o", "stats"), found, strict=True))
    else:
        options |= {"dBias": tensors["dbias"]} if "dbias" in tensors else {}
        found = graph.sdpa_backward(
            q, k, v, tensors["o"], tensors["do"], tensors["stats"],
            use_deterministic_algorithm=key.deterministic,
            max_total_seq_len_q=key.total or None, max_total_seq_len_kv=key.total or None, **options,
        )  # fmt: skip
        results = dict(zip(("dq", "dk", "dv"), found, strict=True))
    for role, tensor in results.items():
        output = key.operand(role)
        if output is not None:
            tensor.set_output(True).set_dim(list(output.dims)).set_stride(list(output.strides))
            tensor.set_data_type(data_type(cudnn, output.dtype)).set_uid(ROLES[role])
            if f"ragged_{role}" in tensors:
                tensor.set_ragged_offset(tensors[f"ragged_{role}"])
    graph.validate()
    graph.build_operation_graph()
    return graph


def _options(cudnn: Any, key: PlanKey, tensors: dict[str, Any]) -> dict[str, Any]:
    alignment = cudnn.diagonal_alignment
    options = {
        "attn_scale": tensors["scale"],
        "diagonal_alignment": alignment.BOTTOM_RIGHT if key.lower_right else alignment.TOP_LEFT,
    }
    if key.left >= 0:
        options["diagonal_band_left_bound"] = key.left + 1  # cuDNN counts the diagonal itself
    if key.right >= 0:
        options["diagonal_band_right_bound"] = key.right
    if "bias" in tensors:
        options["bias"] = tensors["bias"]
    if "seq_q" in tensors:
        options |= {"use_padding_mask": True, "seq_len_q": tensors["seq_q"], "seq_len_kv": tensors["seq_kv"]}
    return options


def data_type(cudnn: Any, dtype: torch.dtype) -> Any:
    """torch dtype -> cuDNN data type."""
    name = {
        torch.float16: "HALF",
        torch.bfloat16: "BFLOAT16",
        torch.float32: "FLOAT",
        torch.int32: "INT32",
        torch.int64: "INT64",
    }[dtype]
    return getattr(cudnn.data_type, name)
