"""A small model of another family, trained here on packaged text, so that no setting is fitted to one model alone.

    python tests/benchmarks/stand_in.py llama [--steps 1200] [--output FOLDER]
    python tests/benchmarks/stand_in.py qwen3_moe

Random weights have no outliers and no sensitive layers, so they say little about calibration.  A stand-in has learned
from the calibration parts of Wikipedia and code.  The other parts are still unseen and can measure it:

    mbq-export --model FOLDER --target host --output bundles/stand-in
    mbq-export compare --model FOLDER --bundle bundles/stand-in --methods bundle --data wikipedia --data code -o out

The folder is by default in the cache, and a finished stand-in is not trained again.  Its loss on unseen text is printed
beside that of two models without weights: how frequent tokens are, and how frequent pairs of tokens are.  A stand-in
that is no better than these has learned nothing that slices could lose (docs/log.md).  ``stand_in_curves.py`` compares
bundles of several families.  All have the same width and depth, nearly as many weights, and by default as many steps as
they need to be alike on unseen text: what has learned more loses more to slices.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mbq_export.data import corpora
from mbq_export.methods import CONTEXT_TOKENS
from mbq_export.model.blocks import fast_autocast
from mbq_export.model.experts import Expert, with_single_experts
from mbq_export.model.families import FAMILIES as FAMILIES_OF_EXPORT
from mbq_runtime.cache import cache_dir

VOCABULARY = 512
"""Short tokens.  A model of few weights then learns more than which token follows which, and does so in minutes."""
BATCH = 2
"""Windows of a step, each as long as those that an export is calibrated on."""
LEARNING_RATE = 5e-3
WARM_UP_STEPS = 30
HELD_BACK_WINDOWS = 32
STEPS = 1200
FEWER_STEPS = {"lfm2": 500, "qwen3_5_text": 500}
"""Of the families that learn faster, because they see the tokens before without attention."""
PAIR_WEIGHT = 50.0
"""How often a token must have been seen for its pairs to count as much as the frequency of tokens alone."""
COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
WINDOWS: dict[str, Any] = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"layer_types": ["full_attention"] * 4},
    "olmo2": {},
    "exaone4": WINDOWS,
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 64},
    "gemma4_text": {
        **WINDOWS,
        "global_head_dim": 64,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
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


def share_of_rate(step: int, steps: int) -> float:
    """A short linear rise, then a line down to 0."""
    return min((step + 1) / WARM_UP_STEPS, 1.0) * (1 - step / steps)


def new_model(family: str) -> Any:
    """A model with random weights.  Experts are modules of their own, as in published files."""
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = with_single_experts(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if FAMILIES_OF_EXPORT[family].scores_as_they_are:
        for block in model.model.layers:  # the factor that scores of other families have
            block.self_attn.q_norm.weight.data.fill_(config.head_dim**-0.5)
    for module in model.modules():
        if isinstance(module, Expert):
            for weight in module.parameters():
                torch.nn.init.normal_(weight, std=config.initializer_range)
    return model


def optimizers_of(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices; Adam for tables, taps, norms and scalars, and for experts, whose many small matrices Muon
    would take one by one."""
    left_out = {
        id(weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | Expert)
        for weight in module.parameters()
    }
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in left_out]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or id(weight) in left_out]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean nats a token.  windows: int64 [batch, context]."""
    with fast_autocast(windows.device):
        logits = model(windows, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> None:
    """Train for a number of steps, so that a busy or slow machine gives the same model, only later."""
    optimizers = optimizers_of(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(of, partial(share_of_rate, steps=steps)) for of in optimizers]
    generator = torch.Generator().manual_seed(0)
    began = time.process_time()
    for step in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT_TOKENS, (BATCH,), generator=generator)
        loss = loss_of(model, torch.stack([tokens[start : start + CONTEXT_TOKENS] for start in starts.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            took = time.process_time() - began
            print(f"step {step + 1}, {took:.0f} s, loss {float(loss.detach()):.3f} nats a token", flush=True)


def report_losses(model: torch.nn.Module, tokens: torch.Tensor, unseen: torch.Tensor) -> None:
    """Print losses on unseen text, in nats a token: of the model, of frequencies, and of frequencies of pairs.

    tokens: int64 [n], the text that the model has seen; unseen: int64 [windows, context].
    """
    with torch.no_grad():
        of_model = float(torch.stack([loss_of(model, window[None]) for window in unseen]).mean())
    before, after = unseen[:, :-1].flatten(), unseen[:, 1:].flatten()
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    single = (counts + 1) / (counts + 1).sum()
    pairs = torch.bincount(tokens[:-1] * VOCABULARY + tokens[1:], minlength=VOCABULARY**2).double()
    following = (pairs[before * VOCABULARY + after] + PAIR_WEIGHT * single[after]) / (counts[before] + PAIR_WEIGHT)
    of_tokens, of_pairs = (-float(shares.log().mean()) for shares in (single[after], following))
    print(f"nats a token on unseen text: {of_model:.3f}, of frequencies {of_tokens:.3f}, of pairs {of_pairs:.3f}")


def ids(tokenizer: PreTrainedTokenizerFast, part: str) -> torch.Tensor:
    """int64 [n]: tokens of a part of Wikipedia and of code."""
    text = corpora.wikipedia(part) + corpora.code(part)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def spread_windows(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [count, context]: windows that are evenly spread over a text."""
    windows = tokens[: len(tokens) // CONTEXT_TOKENS * CONTEXT_TOKENS].reshape(-1, CONTEXT_TOKENS)
    return windows[torch.arange(count) * len(windows) // count]


@click.command(help=__doc__)
@click.argument("family", type=click.Choice(list(FAMILIES)))
@click.option("--steps", type=click.IntRange(min=1), help="Steps of training, each on 1024 tokens.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the checkpoint.")
def main(family: str, steps: int | None, output: Path | None) -> None:
    steps = steps or FEWER_STEPS.get(family, STEPS)
    folder = output or cache_dir() / "stand-ins" / f"{family}-{steps}"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(corpora.wikipedia("calibration") + corpora.code("calibration"))
        tokens = ids(tokenizer, "calibration")
        model = new_model(family)
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(f"{family}: {weights / 1e6:.2f} million weights, {len(tokens)} tokens of text", flush=True)
        train(model, tokens, steps)
        report_losses(model.eval(), tokens, spread_windows(ids(tokenizer, "validation"), HELD_BACK_WINDOWS))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
