"""What a graph of ONNX gives, checked against the shape that was inferred when the graph was loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError


def first_row(found: NDArray[Any], name: str, dimensions: int) -> NDArray[np.float32]:
    """The first row of an output.

    Args:
        found: the output, float32 of any shape.
        name: its name, for the error.
        dimensions: how many it must have.

    Raises:
        BundleError: it has another number of dimensions, or no elements.
    """
    if found.ndim != dimensions or not found.size:
        raise BundleError(f"the graph gives {name} the shape {list(found.shape)}; export the bundle again")
    row: NDArray[np.float32] = found[0]
    return row
