"""A loaded model: its description, its weights and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.engine.tokenizer import opening

from .experts import tokens_of
from .pieces import pieces
from .shape import Decoder, Unit, stacked
from .source import ModelSource


@dataclass(frozen=True)
class DeltaWeights:
    """What a gated delta net computes with between its two linear layers (``format.delta``).

    taps: float32 [channels, taps], the newest token last; rate: float32 [value heads], below 0, multiplies the steps of
    the decay; step: float32 [value heads], is added to them; gain: float32 [value_dim], of the norm of each head.
    """

    taps: NDArray[np.float32]
    rate: NDArray[np.float32]
    step: NDArray[np.float32]
    gain: NDArray[np.float32]


@dataclass
class Checkpoint:
    """A loaded float32 model.

    source: where it comes from; decoder: its description; model, tokenizer: transformers' objects;
    parameters: number of weights when it was loaded.
    """

    source: ModelSource
    decoder: Decoder
    model: Any
    tokenizer: Any
    parameters: int = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.model.num_parameters()

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return cast(torch.device, self.model.device)

    def on_device(self, array: NDArray[Any]) -> torch.Tensor:
        """The array as a tensor beside the model's weights.

        Args:
            array: any shape and dtype.
        """
        return torch.from_numpy(array).to(self.device)

    @property
    def opening_tokens(self) -> list[int]:
        """The tokens that the tokenizer puts before every text: often [bos], or none."""
        full, plain = (self.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        return opening(full, plain)

    def tokens(self, text: str) -> list[int]:
        """Ids of the tokens of a text, without those that the tokenizer puts around it.

        Args:
            text: of any length.  A long one is tokenized in ``pieces``.
        """
        return [token for piece in self.tokens_in_pieces(text) for token in piece]

    def tokens_in_pieces(self, text: str) -> Iterator[list[int]]:
        """Ids of the tokens of a text, some at a time.

        Args:
            text: of any length.
        """
        return map(self._encoded, pieces(text, self._encoded))

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def linear(self, name: str) -> torch.nn.Linear:
        """A linear layer.

        Args:
            name: the layer's name in the checkpoint.
        """
        module = self.model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear)
        return module

    def downs(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Views of what a block's MLP, and each of its experts, writes to the residual stream with.

        Args:
            layer: index of the block.

        Returns:
            For each, float32 weight [hidden, ffn], and bias [hidden] or None.
        """
        parts = self.decoder.branches(layer)
        experts = self.decoder.expert_layers(layer)[2] if "experts" in parts else ()
        of_mlp = [self.part(layer, "down")] if "mlp" in parts else []
        return [*of_mlp, *((self.linear(name).weight, None) for name in experts)]

    def tokens_of(self, name: str) -> torch.Tensor | None:
        """The tokens of the running pass that a linear layer sees, int64 [rows]: those of an expert, or None for all.

        Args:
            name: the layer's name in the checkpoint.
        """
        return tokens_of(self.model, name)

    def layers(self, unit: Unit) -> list[tuple[torch.nn.Linear, slice]]:
        """A unit's linear layers, each with its rows in the stacked matrix.

        Args:
            unit: one of ``decoder.units()``.
        """
        linears = [self.linear(name) for name in unit.sources]
        return list(zip(linears, stacked(*(linear.out_features for linear in linears)), strict=True))

    def release(self, unit: Unit) -> None:
        """Free the memory of a unit's weights.  Biases stay.

        Args:
            unit: one of ``decoder.units()``, whose weights are not needed any more.
        """
        for name in unit.sources:
            self.linear(name).weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def bias(self, unit: Unit) -> NDArray[np.float32] | None:
        """The stacked biases of a unit, float32 [N], or None when no layer of it has a bias.

        Args:
            unit: one of ``decoder.units()``.
        """
        layers = [self.linear(name) for name in unit.sources]
        if all(layer.bias is None for layer in layers):
            return None
        parts = [
            torch.zeros(layer.out_features, device=self.device) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        return torch.cat(parts).cpu().numpy()

    def embedding(self) -> NDArray[np.float32]:
        """The embedding table, float32 [vocab, hidden], before ``Decoder.embedding_scale``."""
        return np.asarray(self.model.get_input_embeddings().weight.detach().cpu().numpy())

    def per_layer_table(self) -> NDArray[np.float32]:
        """The table of per-layer embeddings, float32 [vocab, layers * size], before ``Decoder.per_layer_scale``."""
        return np.asarray(self.model.model.embed_tokens_per_layer.weight.detach().cpu().numpy())

    def scalar(self, name: str) -> NDArray[np.float32]:
        """A number of the checkpoint that is no weight of a layer, float32 [1].

        Args:
            name: as in the checkpoint.
        """
        return np.asarray(self.model.get_buffer(name).detach().float().cpu().numpy())

    def part(self, layer: int, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A view of one part of a block, to read and to write.

        Args:
            layer: index of the block.
            part: as ``Decoder.parts`` names it.

        Returns:
            float32 weight [rows, K], and bias [rows] or None.
        """
        rows = self.decoder.rows(layer, part)
        linear = self.linear(rows.layer)
        bias = None if linear.bias is None else linear.bias[rows.start : rows.stop]
        return linear.weight[rows.start : rows.stop], bias

    def chooser(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """What scores the experts of a block, and what is added to their shares to choose some.

        Args:
            layer: index of a block with experts.

        Returns:
            float32 [experts, hidden], and float32 [experts] or None.
        """
        name, bias = self.decoder.chooser(layer), self.decoder.expert_bias(layer)
        assert name is not None
        weight = self.model.get_submodule(name).weight.detach().cpu().numpy()
        if bias is None:
            return weight, None
        owner, _, attribute = bias.rpartition(".")
        return weight, getattr(self.model.get_submodule(owner), attribute).detach().float().cpu().numpy()

    def taps(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """What a convolution multiplies the last tokens by.

        Args:
            name: the convolution's name in the checkpoint.

        Returns:
            float32 [hidden, taps], the newest token last; and the bias, float32 [hidden] or None.
        """
        module = self.model.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach().cpu().numpy()
        return module.weight.detach()[:, 0].cpu().numpy(), bias

    def delta_weights(self, layer: int) -> DeltaWeights:
        """What a gated delta net computes with between its two linear layers.

        Args:
            layer: index of the block.
        """
        net = self.model.get_submodule(self.decoder.delta_net(layer))
        found = (-net.A_log.detach().float().exp(), net.dt_bias.detach(), net.norm.weight.detach())
        rate, step, gain = (value.cpu().numpy().astype(np.float32) for value in found)
        return DeltaWeights(self.taps(self.decoder.convolution(layer))[0], rate, step, gain)

    def scale_delta_norm(self, layer: int, factor: torch.Tensor) -> None:
        """Multiply what the norm of a gated delta net multiplies by, in place.

        Args:
            layer: index of the block.
            factor: float32 [value_dim].
        """
        with torch.no_grad():
            self.model.get_submodule(self.decoder.delta_net(layer)).norm.weight.mul_(factor.to(self.device))

    def norm(self, name: str) -> NDArray[np.float32]:
        """What an RMS norm multiplies by, float32 [width].

        Args:
            name: the norm's name in the checkpoint.
        """
        weight = self.model.get_submodule(name).weight.detach()
        return np.asarray((weight + self.decoder.family.norm_offset).cpu().numpy())

    def scale_norm(self, name: str, factor: torch.Tensor) -> None:
        """Multiply what an RMS norm multiplies by, in place.

        Args:
            name: the norm's name in the checkpoint.
            factor: float32 [width].
        """
        offset = self.decoder.family.norm_offset
        with torch.no_grad():
            weight = self.model.get_submodule(name).weight
            weight.copy_((weight + offset) * factor.to(weight.device) - offset)

    def reset_norm(self, name: str) -> None:
        """Make an RMS norm multiply by 1.

        Args:
            name: the norm's name in the checkpoint.
        """
        with torch.no_grad():
            self.model.get_submodule(name).weight.fill_(1 - self.decoder.family.norm_offset)

    def rotary(self, kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The table of rotations, with the model's own frequencies.

        Args:
            kind: the kind of layers, see ``Decoder.rotary_kind``.

        Returns:
            float32 cos and sin [context, rotated / 2].  ``rotated`` is how many of a head's first channels are rotated:
            all of them, except in some Phi-3 models.
        """
        return self.rotary_at(kind, range(self.decoder.context_length))

    def rotary_at(self, kind: str, places: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rows of the table of rotations.

        Args:
            kind: the kind of layers, see ``Decoder.rotary_kind``.
            places: positions in the context.

        Returns:
            float32 cos and sin [places, rotated / 2].
        """
        ids = torch.tensor(places)[None].to(self.device)
        of_kind = {"layer_type": kind} if self.decoder.family.local_rotary else {}
        cos, sin = self.model.get_submodule(self.decoder.family.rotary)(
            torch.zeros(1, device=self.device), ids, **of_kind
        )
        half = cos.shape[-1] // 2
        return cos[0, :, :half].cpu().numpy().copy(), sin[0, :, :half].cpu().numpy().copy()

    def engine_order(self, layer: int) -> NDArray[np.int64]:
        """The order of the rows of q, k and v in which engines take them: a rotation turns channels half a head apart.

        A checkpoint of an ``interleaved`` family has the two channels of a rotation side by side.  One of a family with
        ``channel_gates`` has the gates of a head behind its query; engines take all gates behind v.

        Args:
            layer: index of a block with attention.

        Returns:
            int64 [rows of q, k, v and gates]: for each row of the new order, its row in the checkpoint.
        """
        d = self.decoder
        rows = np.arange(sum(d.attention_sizes(layer).values()))
        if d.family.channel_gates:
            size = d.heads * d.head_dim
            queries, gates = rows[: 2 * size].reshape(d.heads, 2, d.head_dim).swapaxes(0, 1)
            rows = np.concatenate([queries.reshape(-1), rows[2 * size :], gates.reshape(-1)])
        if d.family.interleaved:
            heads = rows[: (d.heads + d.kv_heads) * d.head_dim].reshape(-1, d.head_dim)
            heads[:] = heads[:, self.channel_order(layer)]
        return rows

    def channel_order(self, layer: int) -> NDArray[np.int64]:
        """The order of the channels of a head of q or k in which engines take them, see ``engine_order``.

        Args:
            layer: index of a block with attention.

        Returns:
            int64 [head_dim]: for each channel of the new order, its place in the checkpoint.
        """
        d, kind = self.decoder, self.decoder.rotary_kind(layer)
        channels = np.arange(d.heads_of(layer).head_dim)
        if kind is not None and d.family.interleaved:
            rotated = 2 * self.rotary_at(kind, [0])[0].shape[1]
            channels[:rotated] = channels[:rotated].reshape(-1, 2).T.reshape(-1).copy()
        return channels

    def query_growth(self) -> NDArray[np.float32] | None:
        """What queries are multiplied by at each position, float32 [context], or None for nothing."""
        growth = self.decoder.query_growth
        if growth is None:
            return None
        places = np.arange(self.decoder.context_length)
        return (1 + growth.beta * np.log1p(places // growth.original)).astype(np.float32)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with the model's soft cap.

        Args:
            logits: the head's products, of any shape.
        """
        cap = self.decoder.logits_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
