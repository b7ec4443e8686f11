"""Smoothing: moves the spread of input channels into the weights, where it costs nothing at run time.

A few channels of an LLM's activations are far larger than the rest.  Each linear layer's input is divided by
``s = (rms of the channel / mean rms)**ALPHA``, and the columns of its weight are multiplied by ``s``.  Then int8
activations lose less, and the columns that matter more get finer steps (the idea of SmoothQuant, arXiv 2211.10438,
and AWQ, arXiv 2306.00978).  The division is folded into what makes the input: a norm's weight, the rows of v (through
attention), the rows of up (through the gate), the rows of c (behind a convolution), the norm of a delta net's heads.
The function of the model stays the same.

A unit that reads the residual stream without a norm is left as it is: the stream has other readers.  So are what is
between the layers of one expert, because few tokens tell of it; attention whose values are normed, because the norm
would take the division back; and the last projection of per-layer embeddings, because all blocks share the norm and
the table that make its input.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .. import processes
from ..model.blocks import require_finite, watching_inputs
from ..model.checkpoint import Checkpoint
from ..progress import StageReport

ALPHA = 0.5
"""Share of the spread, on a logarithmic scale, that moves into the weights."""

_SMALLEST = 1e-6


def _input_rms(checkpoint: Checkpoint, windows: NDArray[np.int64], progress: StageReport) -> dict[str, torch.Tensor]:
    """Root mean square of every unit's input channels, float32 [K] by unit name."""
    squares: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0) + (x**2).sum(0)

    first_layers = {unit.name: unit.sources[0] for unit in checkpoint.decoder.units() if unit.experts is None}
    for layer in range(checkpoint.decoder.layers):
        # All tokens go through what scores experts.
        if (chooser := checkpoint.decoder.chooser(layer)) is not None:
            first_layers[checkpoint.decoder.layer_units(layer)["experts_in"].name] = chooser
    with watching_inputs(checkpoint, first_layers, add), torch.no_grad():
        own = windows[processes.share(len(windows))]
        for i, window in enumerate(own):
            checkpoint.model(checkpoint.on_device(window)[None], use_cache=False)
            progress(i + 1, len(own))
    for name, total in squares.items():
        require_finite(name, processes.summed(total))
    return {name: (total / windows.size).sqrt() for name, total in squares.items()}


def _spread(rms: torch.Tensor) -> torch.Tensor:
    rms = rms.clamp(min=_SMALLEST)
    return (rms / rms.mean()) ** ALPHA


def _shared_by_value_heads(rms: torch.Tensor, checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of o's input channels, and of the rows of v.  The query heads of a group share one v."""
    d = checkpoint.decoder
    grouped = rms.reshape(d.kv_heads, d.heads // d.kv_heads, d.head_dim)
    per_value = _spread((grouped**2).mean(1).sqrt().reshape(-1))
    per_query = per_value.reshape(d.kv_heads, 1, d.head_dim).expand(grouped.shape).reshape(-1)
    return per_query, per_value


def smooth(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    progress: StageReport = lambda done, total: None,
) -> NDArray[np.float32]:
    """Smooth the checkpoint's weights in place.

    Args:
        checkpoint: the model.
        windows: int64 [windows, context] tokens to measure activations on.
        progress: called with the windows done and their total.

    Returns:
        float32 [hidden]: what a row of the head is divided by to serve as a row of the embedding.

    Raises:
        ModelError: an activation is not finite.
    """
    d, model = checkpoint.decoder, checkpoint.model
    rms = _input_rms(checkpoint, windows, progress)
    with torch.no_grad():
        for layer in range(d.layers):
            units = d.layer_units(layer)
            readers = d.norm_readers(layer)
            for norm, unit in d.normed_units(layer).values():
                scale = _spread(rms[unit.name])
                checkpoint.scale_norm(norm, 1 / scale)
                for name in readers[norm]:
                    checkpoint.model.get_submodule(name).weight *= scale
            of_mixer = rms[units[f"{d.mixer(layer)}_out"].name]
            if d.mixer(layer) == "attn":
                # Norms of values stand between v and o.
                if not d.family.value_norms:
                    per_query, per_value = _shared_by_value_heads(of_mixer, checkpoint)
                    _rescale(checkpoint, layer, "v", per_value, "o", per_query)
            elif d.delta is not None and d.mixer(layer) == "delta":
                scale = _spread(of_mixer.reshape(-1, d.delta.value_dim).square().mean(0).sqrt())
                checkpoint.scale_delta_norm(layer, 1 / scale)
                checkpoint.part(layer, "out")[0].mul_(scale.repeat(d.delta.value_heads))
            else:
                scale = _spread(of_mixer)
                _rescale(checkpoint, layer, "c", scale, "y", scale)
            if "mlp" in d.branches(layer):
                scale = _spread(rms[units["mlp_out"].name])
                _rescale(checkpoint, layer, "up", scale, "down", scale)
        scale = _spread(rms[d.head.name])
        checkpoint.scale_norm(d.final_norm, 1 / scale)
        # The head gets weights of its own.  A tied embedding keeps the old ones here; in the bundle it is read from
        # the head's rows, divided by the scale.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * scale, requires_grad=False)
    return np.asarray(scale.cpu().numpy())


def _rescale(
    checkpoint: Checkpoint, layer: int, before: str, rows: torch.Tensor, after: str, columns: torch.Tensor
) -> None:
    weight, bias = checkpoint.part(layer, before)
    weight.div_(rows[:, None])
    if bias is not None:
        bias.div_(rows)
    checkpoint.part(layer, after)[0].mul_(columns)
