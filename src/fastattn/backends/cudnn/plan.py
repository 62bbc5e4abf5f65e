"""A plan: a graph that cuDNN has compiled. One type for every kind of graph."""

from __future__ import annotations

import logging
import math
import struct
from typing import Any

import torch
from torch import Tensor

from ... import debug
from ..._compat import torch as torch_internals
from ..._compat.cudnn import raw_execution
from ..base import Refusal
from ..errors import says_memory, setback_of
from ..scratch import scratch
from . import disk, graphs, runtime
from .graphs import ROLES, PlanKey


class PlanError(Refusal):
    """cuDNN says that it does not support a plan that the support table promises."""


class Plan:
    """A compiled graph. Immutable once built: any thread may execute it, each with its own handle."""

    __slots__ = ("_device", "_launch", "_pack", "_roles", "graph", "key", "workspace")

    def __init__(self, key: PlanKey, graph: Any) -> None:
        self.key = key
        self.graph = graph
        self.workspace: int = max(1, graph.get_workspace_size())  #: bytes
        self._device = torch.device("cuda", key.device)
        self._launch: Any = None
        by_id = {number: role for role, number in ROLES.items()}
        raw = raw_execution(graph)
        if raw is not None and len(raw.uids) <= runtime.MOST_OPERANDS and by_id.keys() >= set(raw.uids):
            self._roles = [by_id[uid] for uid in raw.uids]
            self._pack = struct.Struct(f"{len(self._roles)}q")
            self._launch = raw

    @staticmethod
    def build(key: PlanKey) -> Plan:
        cudnn = runtime.frontend().cudnn
        with torch.cuda.device(key.device):
            try:
                graph = graphs.build(cudnn, key, runtime.context(key.device).handle)
                graph.create_execution_plans([cudnn.heur_mode.A])
                graph.check_support()
                graph.build_plans()
            except (torch.OutOfMemoryError, MemoryError, Refusal):
                raise
            except Exception as error:  # cuDNN's refusals are of several types
                if torch.cuda.is_current_stream_capturing():
                    raise
                unsupported = isinstance(error, cudnn.cudnnGraphNotSupportedError)
                # (Not by a name: the frame would hold its own error, and with it the tensors of the call.)
                raise setback_of(error, key.device, unsupported) or PlanError(
                    f"cuDNN builds no plan: {error}"
                ) from error
        return Plan(key, graph)

    @staticmethod
    def load(key: PlanKey) -> Plan | None:
        """The plan as it was kept on disk, or None."""
        payload = disk.load(key)
        if payload is None:
            return None
        try:
            with torch.cuda.device(key.device):
                graph = runtime.frontend().cudnn.pygraph(handle=runtime.context(key.device).handle)
                graph.deserialize(list(payload))
                return Plan(key, graph)
        except Exception as error:  # whatever cuDNN thinks of it, the plan can be built
            if says_memory(error):  # nothing is wrong with the file
                return None
            logging.getLogger("fastattn").debug("plan from disk discarded: %s", error)
            disk.discard(key)
            return None

    def store(self) -> None:
        """Keeps the plan on disk."""
        try:
            payload = bytes(self.graph.serialize())
        except Exception as error:
            logging.getLogger("fastattn").debug("plan not kept on disk: %s", error)
            return
        disk.store(self.key, payload)

    def execute(self, operands: dict[str, Tensor]) -> None:
        """Launches the plan on torch's current stream. operands: a tensor for each role of the key."""
        if debug.ENABLED:
            self._check(operands)
        if self._launch is None:
            with torch.cuda.device(self.key.device):
                by_id = {ROLES[operand.role]: operands[operand.role] for operand in self.key.operands}
                workspace = scratch(self._device, self.workspace)
                self.graph.execute(by_id, workspace, handle=runtime.context(self.key.device).handle)
            return
        self._execute([operands[role].data_ptr() for role in self._roles])

    def _execute(self, addresses: list[int]) -> None:
        if torch_internals.current_device() != self.key.device:  # cuDNN launches on the current one
            with torch.cuda.device(self.key.device):
                return self._execute(addresses)
        workspace = scratch(self._device, self.workspace)
        context = runtime.context(self.key.device)
        self._pack.pack_into(context.pointers, 0, *addresses)
        self._launch(context.address, workspace.data_ptr(), context.handle)

    def _check(self, operands: dict[str, Tensor]) -> None:
        """That what is executed is what the plan was built for: cuDNN itself would not notice."""
        for operand in self.key.operands:
            x = operands[operand.role]
            text = f"{operand.role}: {tuple(x.shape)} {x.stride()} {x.dtype} for a plan of {operand}"
            assert x.dtype == operand.dtype, text
            if operand.role == "scale":
                continue
            assert x.data_ptr() % 16 == 0 or operand.role.startswith(("ragged_", "seq_")), f"not aligned: {text}"
            if self.key.operand(f"ragged_{operand.role}") is None:
                assert x.numel() == math.prod(operand.dims), text
                if len(x.shape) == 4:
                    apart = [i for i in range(4) if operand.dims[i] > 1 and tuple(x.shape) == operand.dims]
                    assert all(x.stride(i) == operand.strides[i] for i in apart), text
            elif x.shape[2] > 1:
                assert x.stride(2) == operand.strides[2] and x.shape[2] <= operand.dims[2], text
