"""Experts as modules: one gated MLP each, with linear layers as a checkpoint names them.

transformers holds the weights of all experts of a block in two tensors of three dimensions.  Calibration works on one
linear layer at a time, so each expert becomes a module here.  The published files have the experts one by one too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .families import FAMILIES, Family

Activation = Callable[[torch.Tensor], torch.Tensor]


class Expert(torch.nn.Module):
    """One expert: ``down(activation(gate(x)) * up(x))``.

    tokens: int64 [rows], the tokens of the running pass that the rows of its input are.

    Args:
        names: of gate, up and down.
        hidden_size: width of input and output.
        ffn_size: width between.
        activation: of the gate.
    """

    tokens: torch.Tensor

    def __init__(self, names: tuple[str, str, str], hidden_size: int, ffn_size: int, activation: Activation) -> None:
        super().__init__()
        self._names, self._activation = names, activation
        for name in names[:2]:
            setattr(self, name, torch.nn.Linear(hidden_size, ffn_size, bias=False))
        setattr(self, names[2], torch.nn.Linear(ffn_size, hidden_size, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The expert's output, [rows, hidden].

        Args:
            x: [rows, hidden].
        """
        gate, up, down = (getattr(self, name) for name in self._names)
        output: torch.Tensor = down(self._activation(gate(x)) * up(x))
        return output


class ExpertList(torch.nn.ModuleList):
    """The experts of one block.  It is called as transformers calls its own module of all experts."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The sum of the experts' outputs, each times its weight, [tokens, hidden].

        Args:
            hidden: float32 [tokens, hidden].
            chosen: int64 [tokens, used], the experts that a token takes.
            weights: float32 [tokens, used], of these experts.
        """
        total = torch.zeros_like(hidden)
        for at in chosen.unique().tolist():
            expert = self[at]
            expert.tokens, place = torch.where(chosen == at)
            output = expert(hidden[expert.tokens]) * weights[expert.tokens, place, None]
            total = total.index_add(0, expert.tokens, output.to(total.dtype))
        return total


def with_single_experts(model: Any) -> Any:
    """Replace each module of all experts of a block by an ``ExpertList``, in place.  Weights are not carried over.

    Args:
        model: transformers' model without weights.

    Returns:
        The same model.
    """
    names = FAMILIES[model.config.model_type].experts
    if names is None:
        return model
    for block in model.model.layers:
        owner, _, attribute = names.experts.rpartition(".")
        found = getattr(block.get_submodule(owner), attribute, None)
        if found is not None:
            sizes = found.hidden_dim, found.intermediate_dim
            experts = (Expert(names.layers, *sizes, found.act_fn) for _ in range(found.num_experts))
            setattr(block.get_submodule(owner), attribute, ExpertList(experts))
    return model


def single_experts(stored: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint with those of each expert apart, by the names that the model has.

    Args:
        stored: by the names in the files.
        family: of the model.
    """
    names, found = family.experts, dict[str, torch.Tensor]()
    assert names is not None
    both, alone = names.joined or ("", "")
    for name, weight in stored.items():
        block = name.removesuffix(both if both and name.endswith(both) else alone)
        if names.joined is None or block == name or weight.ndim != 3:
            found[name.replace(*names.renamed) if names.renamed else name] = weight
            continue
        parts = names.layers[:2] if name.endswith(both) else names.layers[2:]
        for at, of_one in enumerate(weight):
            for part, rows in zip(parts, of_one.chunk(len(parts)), strict=True):
                found[f"{block}{names.experts}.{at}.{part}.weight"] = rows
    return found


def tokens_of(model: Any, layer: str) -> torch.Tensor | None:
    """The tokens of the running pass that a linear layer sees: those of an expert, or None for all.

    Args:
        model: the model.
        layer: name of the layer in the checkpoint.
    """
    owner = model.get_submodule(layer.rpartition(".")[0])
    return owner.tokens if isinstance(owner, Expert) else None
