"""Causal attention in blocks of queries, beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mbq_export.model import blocks, causal_attention
from mbq_runtime.bundle.isa import Machine

FLOAT32_STEP = 2.0**-23


def inputs(
    batch: int, heads: int, kv_heads: int, tokens: int, head_dim: int, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query, key and value, which ask for gradients."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, width or head_dim))
    made = (torch.randn(batch, of, tokens, size, generator=generator) for of, size in sizes)
    query, key, value = (x.requires_grad_() for x in made)
    return query, key, value


def module(heads: int, kv_heads: int) -> Any:
    """What attention reads of a module."""
    return SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 9, 3, 512, 64),
        (2, 4, 2, 130, 16),
        (1, 4, 4, 63, 8),
        (1, 6, 1, 65, 32),
        (3, 2, 1, 2, 4),
        (1, 4, 2, 70, 16, 24),
    ],
)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_values_and_gradients_are_those_of_pytorch(shape: tuple[int, ...], scaling: float | None) -> None:
    arguments = inputs(*shape)
    of = module(shape[1], shape[2])
    found, _ = causal_attention.attend(of, *arguments, None, scaling=scaling)
    expected, _ = sdpa_attention_forward(of, *arguments, None, scaling=scaling)
    assert found.shape == expected.shape
    # Scores of up to 30, whose rounding the exponential keeps, and sums of up to 512 products.
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * FLOAT32_STEP)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for of_found, of_expected in zip(
        torch.autograd.grad(found, arguments, gradient), torch.autograd.grad(expected, arguments, gradient), strict=True
    ):
        largest = float(of_expected.detach().abs().max())
        torch.testing.assert_close(of_found, of_expected, rtol=0, atol=100 * FLOAT32_STEP * largest)


def test_in_fast_products_it_is_no_less_exact_than_pytorch() -> None:
    arguments = [x.detach() for x in inputs(1, 9, 3, 256, 64)]
    of = module(9, 3)
    exact, _ = sdpa_attention_forward(of, *(x.double() for x in arguments), None)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = causal_attention.attend(of, *arguments, None)
        of_pytorch, _ = sdpa_attention_forward(of, *arguments, None)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().mean()) <= float((of_pytorch - exact).abs().mean())


@pytest.mark.parametrize("case", ["mask", "one token", "earlier tokens", "not causal"])
def test_what_is_not_causal_over_the_whole_text_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(causal_attention, "_InBlocks", None)
    query, key, value = inputs(1, 4, 2, 8, 16)
    mask, is_causal = None, None
    if case == "mask":
        mask = torch.ones(8, 8, dtype=torch.bool).tril().triu(-3)[None, None]
    if case == "not causal":
        is_causal = False
    if case == "one token":
        query, key, value = query[:, :, :1], key[:, :, :1], value[:, :, :1]
    if case == "earlier tokens":
        query = query[:, :, -1:]
    of = module(4, 2)
    found, _ = causal_attention.attend(of, query, key, value, mask, is_causal=is_causal)
    expected, _ = sdpa_attention_forward(of, query, key, value, mask, is_causal=is_causal)
    assert torch.equal(found, expected)


@pytest.fixture
def products() -> Iterator[Any]:
    """PyTorch's setting of float32 products on the processor, put back behind the test."""
    found: Any = torch.backends.mkldnn.matmul
    before = found.fp32_precision
    yield found
    found.fp32_precision = before


def test_quick_products_of_float32_are_exact(products: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((64, 64, 64), (512, 576, 1536), (3, 1000, 7)):
        a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        with blocks.quick_exact_products():
            product = (a @ b).double()
        # The largest error of a sum of k products, each rounded once; bfloat16 would be 2**16 times as far away.
        bound = k * FLOAT32_STEP * (a.abs().double() @ b.abs().double())
        assert (product - a.double() @ b.double()).abs().le(bound / 8).all()


@pytest.mark.parametrize(
    ("machine", "asked"),
    [
        (Machine("x86_64", frozenset({"avx2"}), 64), "bf16"),
        (Machine("x86_64", frozenset({"avx2", "avx512_bf16"}), 64), "bf16"),
        (Machine("x86_64", frozenset({"avx2", "avx512_bf16", "amx_bf16"}), 64), "none"),
        (Machine("aarch64", frozenset({"bf16"}), 64), "none"),
    ],
)
def test_products_that_would_be_rounded_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, products: Any, machine: Machine, asked: str
) -> None:
    products.fp32_precision = "none"
    monkeypatch.setattr(blocks, "this_machine", lambda: machine)
    with blocks.quick_exact_products():
        assert products.fp32_precision == asked
        with blocks.fast_products(torch.device("cpu")):
            pass
        assert products.fp32_precision == asked
    assert products.fp32_precision == "none"


def test_models_attend_in_blocks_while_an_export_runs() -> None:
    with causal_attention.in_blocks():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is causal_attention.attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
