"""Rotation of the values between a decoder's matrices, so that no channel is an outlier when they are sliced.

A rotation ``Q`` of the residual stream is fused into every matrix that reads it or writes to it.  A rotation of each
value head is fused into v and o.  The function of the model stays the same, and nothing is computed at run time (the
idea of QuaRot, arXiv 2404.00456, and SpinQuant, arXiv 2405.16406).  A norm's gain does not commute with a rotation,
so it first moves into the matrices behind the norm.  Three cases differ:

* A head that is tied to the embedding cannot take the last norm's gain ``g``, because the embedding must not have it.
  Its input is multiplied by ``Q.T diag(g) Q`` at run time instead.
* A family with norms on what a block adds to the stream has gains that no matrix can take.  Such a model is not
  rotated.
* Gates of single channels stand between v and o, and inside a delta net.  There the heads are not rotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..calibrated import HeadInput
from ..memory import WEIGHTS_AT_ONCE
from ..model.checkpoint import Checkpoint
from ..model.sliced_linear import row_ranges

_LARGEST_FACTOR = 128

_WRITES = {"attn": "o", "conv": "y", "delta": "out"}
"""The part of a block's mixer that writes to the residual stream, by mixer."""


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``Q = diag(sign) @ kron(left, right)``, float64 [n, n] with n = a * b.

    The factored matrix costs n * (a + b) multiplications, the full one n * n.

    sign: float64 [n] of 1 and -1.
    left: float64 [a, a].
    right: float64 [b, b].
    """

    sign: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def random(cls, n: int, seed: int) -> Rotation:
        """A random rotation: Hadamard matrices for n's powers of two, a random orthogonal one for its odd factor.

        Args:
            n: width of the rotated vectors.
            seed: of the random parts.
        """
        generator = torch.Generator().manual_seed(seed)
        b = math.gcd(n, _LARGEST_FACTOR)
        sign = torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) * 2 - 1
        return cls(sign, _orthogonal(n // b, generator), _orthogonal(b, generator))

    @property
    def matrix(self) -> torch.Tensor:
        """The whole matrix, float64 [n, n]."""
        return self.sign[:, None] * torch.kron(self.left, self.right)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight @ Q``.

        Args:
            weight: float64 [rows, n].
        """
        split = (weight * self.sign).reshape(-1, len(self.left), len(self.right))
        return (self.left.T @ split @ self.right).reshape(weight.shape)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """``Q.T @ weight``.

        Args:
            weight: float64 [n, columns], or a bias [n].
        """
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

    Args:
        norm: the model's last norm, whose gain is 1.
        gain: float32 [n], the norm's gain before the rotation.
        rotation: of the residual stream.
    """

    def __init__(self, norm: torch.nn.Module, gain: torch.Tensor, rotation: Rotation) -> None:
        super().__init__()
        self.norm, self.gain = norm, torch.nn.Buffer(gain)
        self.left, self.right = torch.nn.Buffer(rotation.left.float()), torch.nn.Buffer(rotation.right.float())

    @property
    def weight(self) -> torch.Tensor:
        """float32 [n]: the norm's own gain, which tuning changes."""
        weight = self.norm.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The head's input.

        Args:
            x: float32 [..., n], the residual stream.
        """
        split = self.norm(x).reshape(*x.shape[:-1], len(self.left), len(self.right))
        turned = (self.left @ split @ self.right.T).reshape(x.shape) * self.gain
        back: torch.Tensor = (self.left.T @ turned.reshape(split.shape) @ self.right).reshape(x.shape)
        return back


def rotate(checkpoint: Checkpoint, seed: int) -> HeadInput | None:
    """Rotate the checkpoint's weights in place.

    Args:
        checkpoint: the model, of a family without norms on what blocks put out.
        seed: of the rotations.

    Returns:
        What the input of a tied head goes through at run time; None for a head that is not tied.
    """
    d, model = checkpoint.decoder, checkpoint.model
    stream, heads = Rotation.random(d.hidden_size, seed), Rotation.random(d.head_dim, seed + 1)
    with torch.no_grad():
        for layer in range(d.layers):
            for norm, readers in d.norm_readers(layer).items():
                _absorb(checkpoint, norm, readers, stream)
            heads_turn = d.mixer(layer) == "attn" and not d.family.channel_gates
            if heads_turn:
                _rotate_values(checkpoint, layer, heads)
            of_mixer = checkpoint.part(layer, _WRITES[d.mixer(layer)])
            for weight, bias in (of_mixer, *checkpoint.downs(layer)):
                exact = _exact(weight)
                weight.copy_(stream.rows(_per_head(exact, heads) if weight is of_mixer[0] and heads_turn else exact))
                if bias is not None:
                    bias.copy_(stream.rows(_exact(bias)))
        table = model.get_input_embeddings().weight
        _rotate_columns(table, torch.ones(d.hidden_size), stream)
        if not d.tied:
            _absorb(checkpoint, d.final_norm, d.head.sources, stream)
            return None
        # Two parameters from here on: the head is sliced, and the embedding is read from its slices.
        model.lm_head.weight = torch.nn.Parameter(table.clone(), requires_grad=False)
        gain = torch.from_numpy(checkpoint.norm(d.final_norm).copy())
        checkpoint.reset_norm(d.final_norm)
        owner, _, attribute = d.final_norm.rpartition(".")
        turned = RotatedNorm(model.get_submodule(d.final_norm), gain, stream).to(checkpoint.device)
        setattr(model.get_submodule(owner), attribute, turned)
        return HeadInput(stream.left.float().numpy(), stream.right.float().numpy(), gain.numpy())


def _rotate_values(checkpoint: Checkpoint, layer: int, heads: Rotation) -> None:
    """Rotate the rows of v within each head."""
    v, v_bias = checkpoint.part(layer, "v")
    v.copy_(_per_head(_exact(v).T, heads).T)
    if v_bias is not None:
        v_bias.copy_(_per_head(_exact(v_bias)[None], heads)[0])


def _absorb(checkpoint: Checkpoint, norm: str, readers: tuple[str, ...], stream: Rotation) -> None:
    """Move a norm's gain into the matrices that read it, and rotate their columns."""
    gain = torch.from_numpy(checkpoint.norm(norm).copy())
    for name in readers:
        _rotate_columns(checkpoint.model.get_submodule(name).weight, gain, stream)
    checkpoint.reset_norm(norm)


def _rotate_columns(weight: torch.Tensor, gain: torch.Tensor, stream: Rotation) -> None:
    """float32 [N, K] times diag(gain), then the rotation, in place and in pieces: float64 takes twice the memory."""
    for rows in row_ranges(weight.shape, WEIGHTS_AT_ONCE):
        weight[rows].copy_(stream.columns(_exact(weight[rows]) * gain))


def _exact(weight: torch.Tensor) -> torch.Tensor:
    """float64, on the processor: GPUs compute it slowly or not at all."""
    return weight.cpu().double()


def _per_head(weight: torch.Tensor, heads: Rotation) -> torch.Tensor:
    """Rotate the columns of float64 [rows, heads * head_dim] within each head."""
    width = len(heads.sign)
    return heads.columns(weight.reshape(-1, width)).reshape(weight.shape)
