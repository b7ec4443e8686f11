"""The domain of our ONNX ops, and how the text of a body becomes a function.

A body is ONNX's textual form: a node a line, ``output = Op <attributes> (inputs)``, and ``#`` before a comment.
"""

from __future__ import annotations

import onnx
import onnx.parser

DOMAIN = "ai.mbq"
DOMAIN_VERSION = 1
OPSET_IMPORTS = {"": 22, "com.microsoft": 1}
"""Opsets of the bodies.  The model must import the same."""


def function(name: str, attributes: str, inputs: tuple[str, ...], outputs: str, body: str) -> onnx.FunctionProto:
    """Parse a function of our domain.

    Args:
        name: of the op.
        attributes: names of its attributes, "<N, K>", or "" for none.
        inputs: names.
        outputs: names, "y, depth".
        body: nodes.
    """
    versions = {**OPSET_IMPORTS, DOMAIN: DOMAIN_VERSION}
    imports = ", ".join(f'"{domain}" : {version}' for domain, version in versions.items())
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n'
        f"{name} {attributes} ({', '.join(inputs)}) => ({outputs}) {{\n{body}\n}}"
    )


def floats(*values: float) -> str:
    """A node that makes a constant vector.

    Args:
        *values: become float32 [len(values)].
    """
    return f"Constant <value = float[{len(values)}] {{{', '.join(repr(float(value)) for value in values)}}}> ()"


def ints(*values: int) -> str:
    """A node that makes a constant vector.

    Args:
        *values: become int64 [len(values)].
    """
    return f"Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"
