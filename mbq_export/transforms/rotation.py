"""Rotates what flows between a decoder's matrices, so that no channel stands out when they are sliced.

A rotation ``Q`` of the residual stream is fused into every matrix that reads it or writes to it, and
one of each value head into v and o: the model's function stays the same and nothing is computed at
run time (the idea of QuaRot, arXiv 2404.00456, and SpinQuant, arXiv 2405.16406).  A norm's gain
does not commute with a rotation, so it moves into the matrices behind the norm first.  Two cases
differ:

* A head that is tied to the embedding cannot take the last norm's gain ``g``, which the embedding
  must not have.  Its input is multiplied by ``Q.T diag(g) Q`` at run time instead.
* A family with norms on what a block adds to the stream has gains that nothing can take: there the
  residual stream is left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..memory import WEIGHTS_AT_ONCE
from ..model.checkpoint import Checkpoint
from ..model.sliced_linear import row_ranges

_LARGEST_FACTOR = 128


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``Q = diag(sign) @ kron(left, right)``, float64, [n, n] with n = a * b.

    sign: [n] of 1 and -1; left: [a, a]; right: [b, b].  A factored matrix costs n * (a + b)
    multiplications where the full one costs n * n.
    """

    sign: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def random(cls, n: int, seed: int) -> Rotation:
        """Hadamard factors where n has powers of two, a random orthogonal one for the rest of it."""
        generator = torch.Generator().manual_seed(seed)
        b = math.gcd(n, _LARGEST_FACTOR)
        sign = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
        return cls(sign, _orthogonal(n // b, generator), _orthogonal(b, generator))

    @property
    def matrix(self) -> torch.Tensor:
        """float64 [n, n]."""
        return self.sign[:, None] * torch.kron(self.left, self.right)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight @ Q`` for a float64 weight [rows, n]."""
        split = (weight * self.sign).reshape(-1, len(self.left), len(self.right))
        return (self.left.T @ split @ self.right).reshape(weight.shape)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """``Q.T @ weight`` for a float64 weight [n, columns] or bias [n]."""
        if weight.ndim == 1:
            return self.columns(weight[None])[0]
        return self.columns(weight.T.contiguous()).T


def _orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Float64 [n, n]: Sylvester's Hadamard matrix, times a random orthogonal one where n is no power of two."""
    power = n & -n
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    hadamard = hadamard / math.sqrt(power)
    if n == power:
        return hadamard
    rest = torch.linalg.qr(torch.randn(n // power, n // power, generator=generator, dtype=torch.float64))[0]
    return torch.kron(rest.contiguous(), hadamard)


class RotatedNorm(torch.nn.Module):
    """The last norm of a rotated model whose head is tied: ``norm(x) @ kron.T @ diag(gain) @ kron``.

    weight: float32 [n], the norm's own gain, 1 at first; gain: float32 [n], of the norm before the rotation.
    """

    def __init__(self, norm: torch.nn.Module, gain: torch.Tensor, rotation: Rotation) -> None:
        super().__init__()
        self.norm, self.gain = norm, torch.nn.Buffer(gain)
        self.left, self.right = torch.nn.Buffer(rotation.left.float()), torch.nn.Buffer(rotation.right.float())

    @property
    def weight(self) -> torch.Tensor:
        weight = self.norm.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.norm(x).reshape(*x.shape[:-1], len(self.left), len(self.right))
        turned = (self.left @ split @ self.right.T).reshape(x.shape) * self.gain
        back: torch.Tensor = (self.left.T @ turned.reshape(split.shape) @ self.right).reshape(x.shape)
        return back


@dataclass(frozen=True)
class HeadInput:
    """What stands between the last norm and a tied head: ``x @ kron.T * gain @ kron``.

    left: float32 [a, a]; right: float32 [b, b]; gain: float32 [a * b].
    """

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    gain: NDArray[np.float32]


def rotate(checkpoint: Checkpoint, seed: int) -> HeadInput | None:
    """Rotate the checkpoint's weights in place; what a tied head's input goes through, or None.

    The checkpoint's family must not have post norms.
    """
    d, model = checkpoint.decoder, checkpoint.model
    stream, heads = Rotation.random(d.hidden_size, seed), Rotation.random(d.head_dim, seed + 1)
    with torch.no_grad():
        for layer in range(d.layers):
            for role in ("attn_in", "mlp_in"):
                _absorb(checkpoint, d.input_norm(layer, role), d.layer_units(layer)[role].sources, stream)
            v, v_bias = checkpoint.part(layer, "v")
            o, o_bias = checkpoint.part(layer, "o")
            v.copy_(_per_head(_exact(v).T, heads).T)
            if v_bias is not None:
                v_bias.copy_(_per_head(_exact(v_bias)[None], heads)[0])
            o.copy_(stream.rows(_per_head(_exact(o), heads)))
            down, down_bias = checkpoint.part(layer, "down")
            down.copy_(stream.rows(_exact(down)))
            for bias in (o_bias, down_bias):
                if bias is not None:
                    bias.copy_(stream.rows(_exact(bias)))
        table = model.get_input_embeddings().weight
        _rotate_columns(table, torch.ones(d.hidden_size), stream)
        if not d.tied:
            _absorb(checkpoint, d.final_norm, d.head.sources, stream)
            return None
        # Two parameters from here on: the head will be sliced, the embedding is read from its slices.
        model.lm_head.weight = torch.nn.Parameter(table.clone(), requires_grad=False)
        gain = torch.from_numpy(checkpoint.norm(d.final_norm).copy())
        checkpoint.reset_norm(d.final_norm)
        model.model.norm = RotatedNorm(model.model.norm, gain, stream).to(checkpoint.device)
        return HeadInput(stream.left.float().numpy(), stream.right.float().numpy(), gain.numpy())


def _absorb(checkpoint: Checkpoint, norm: str, linears: tuple[str, ...], stream: Rotation) -> None:
    """Move a norm's gain into the matrices that read it, and rotate their columns."""
    gain = torch.from_numpy(checkpoint.norm(norm).copy())
    for name in linears:
        _rotate_columns(checkpoint.linear(name).weight, gain, stream)
    checkpoint.reset_norm(norm)


def _rotate_columns(weight: torch.Tensor, gain: torch.Tensor, stream: Rotation) -> None:
    """float32 [N, K] times diag(gain), then the rotation, in place and in pieces: float64 takes twice the memory."""
    for rows in row_ranges(weight.shape, WEIGHTS_AT_ONCE):
        weight[rows].copy_(stream.columns(_exact(weight[rows]) * gain))


def _exact(weight: torch.Tensor) -> torch.Tensor:
    """float64, on the processor: GPUs are slow at it, or cannot."""
    return weight.cpu().double()


def _per_head(weight: torch.Tensor, heads: Rotation) -> torch.Tensor:
    """Rotate the columns of float64 [rows, heads * head_dim] within each head."""
    width = len(heads.sign)
    return heads.columns(weight.reshape(-1, width)).reshape(weight.shape)
