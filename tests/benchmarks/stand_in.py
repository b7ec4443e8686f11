"""A small model of another family, trained here on packaged text, so that no setting is fitted to one model alone.

    python tests/benchmarks/stand_in.py llama [--steps 1500] [--output FOLDER]
    python tests/benchmarks/stand_in.py qwen3_moe

Random weights have no outliers and no sensitive layers, so they say little about calibration.  Those of 150
steps do not either (docs/log.md).  A stand-in has learned from the calibration parts of Wikipedia and code.  The other
parts are still unseen and can measure it:

    mbq-export --model FOLDER --target host --output bundles/stand-in
    mbq-export compare --model FOLDER --bundle bundles/stand-in --methods bundle --data wikipedia --data code

The folder is by default in the cache, and a finished stand-in is not trained again.  ``stand_in_curves.py`` compares
bundles of several families.  All families have the same width, depth and steps, and nearly as many weights.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mbq_export.data import corpora
from mbq_export.model.blocks import fast_autocast
from mbq_runtime.cache import cache_dir

VOCABULARY = 8192
CONTEXT = 256
BATCH = 8
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 50
COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "lfm2": {
        "layer_types": (["conv", "conv", "full_attention"] * 3)[:8],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_5_text": {
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
    },
    "qwen3": {"layer_types": ["full_attention"] * 8},
    "gemma3_text": {
        "sliding_window": 128,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "query_pre_attn_scalar": 64,
    },
    "gemma4_text": {
        "sliding_window": 128,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "global_head_dim": 64,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 128,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def learning_rate(step: int, steps: int) -> float:
    """A short linear rise, then half a cosine."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> None:
    """Train for a number of steps, so that a busy or slow machine gives the same model, only later."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    began = time.process_time()
    for step in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with fast_autocast(batch.device):
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            took = time.process_time() - began
            print(f"step {step + 1}, {took:.0f} s, loss {float(loss.detach()):.3f} nats a token", flush=True)


@click.command(help=__doc__)
@click.argument("family", type=click.Choice(list(FAMILIES)))
@click.option("--steps", type=click.IntRange(min=1), default=1500, help="Steps of training, each on 2048 tokens.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the checkpoint.")
def main(family: str, steps: int, output: Path | None) -> None:
    folder = output or cache_dir() / "stand-ins" / f"{family}-{steps}"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        text = corpora.wikipedia("calibration") + corpora.code("calibration")
        tokenizer = train_tokenizer(text)
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **COMMON, **FAMILIES[family]), dtype=torch.float32
        )
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(f"{family}: {weights / 1e6:.1f} million weights, {len(tokens)} tokens of text", flush=True)
        train(model, tokens, steps)
        tokenizer.save_pretrained(folder)
        model.eval().save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
