"""A stand-in for the cuDNN frontend that writes down what a graph is built from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class _Tensor:
    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, attribute: str) -> Any:
        if not attribute.startswith("set_"):
            raise AttributeError(attribute)

        def record(value: Any) -> _Tensor:
            self.log.append((self.name, attribute, repr(value)))
            return self

        return record


class _Graph:
    def __init__(self, **options: Any) -> None:
        self.log: list[Any] = [("graph", repr(sorted(options.items(), key=str)))]

    def tensor(self, **options: Any) -> _Tensor:
        self.log.append(("tensor", repr(sorted(options.items(), key=str))))
        return _Tensor(self.log, options["name"])

    def sdpa(self, *inputs: Any, **options: Any) -> list[_Tensor]:
        self.log.append(("sdpa", repr(inputs), repr(sorted(options.items(), key=str))))
        return [_Tensor(self.log, name) for name in ("o", "stats")]

    def sdpa_backward(self, *inputs: Any, **options: Any) -> list[_Tensor]:
        self.log.append(("sdpa_backward", repr(inputs), repr(sorted(options.items(), key=str))))
        return [_Tensor(self.log, name) for name in ("dq", "dk", "dv")]

    def validate(self) -> None: ...

    def build_operation_graph(self) -> None: ...


class _Names:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __getattr__(self, name: str) -> str:
        return f"{self.prefix}.{name}"


cudnn = SimpleNamespace(pygraph=_Graph, data_type=_Names("data_type"), diagonal_alignment=_Names("alignment"))
