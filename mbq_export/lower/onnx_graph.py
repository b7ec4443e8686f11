"""An ONNX graph that is being written: its nodes and its constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

Array = NDArray[np.generic]


@dataclass
class Graph:
    """A graph that is being written.

    nodes: in the order in which they run; tensors: constants by name.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)

    def tensor(self, name: str, value: Array) -> str:
        """Add a constant, or replace the one of this name by the same value.

        Args:
            name: of the tensor.
            value: any shape and dtype.

        Returns:
            The name.
        """
        self.tensors[name] = np.ascontiguousarray(value)
        return name

    def numbers(self, name: str, *values: int) -> str:
        """Add a constant vector.

        Args:
            name: of the tensor.
            *values: become int64 [len(values)].

        Returns:
            The name.
        """
        return self.tensor(name, np.array(values, np.int64))

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        domain: str = "",
        outputs: list[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node.

        Args:
            op: type of the node.
            inputs: names; "" for an input that is left out.
            name: of the node.
            domain: of the op.
            outputs: names; the node's own name by default.
            **attributes: of the node.

        Returns:
            The name of the first output.
        """
        outputs = outputs or [name]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]
