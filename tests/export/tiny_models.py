"""Random checkpoints of every supported family, small enough to export in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Hidden 192 and ffn 320 are multiples of 64 but not of 128; 3 heads read 1 or 3 pairs of keys and values.
COMMON = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 264,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}

# For tests that look at what an export does around the model: it has all parts, and a tenth of the weights.
TINIEST: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

# Every family, and what one family does only in some of its models.
MODELS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 16, "tie_word_embeddings": False},
    # The width of Qwen2.5-0.5B.
    "qwen2": {"hidden_size": 896, "num_attention_heads": 14, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    # A block of one MLP before three of experts.
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    # Experts in every second block, whose weights do not add up to 1.
    "qwen3_moe-sparse": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": True,
        "num_hidden_layers": 2,
        "moe_intermediate_size": 192,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 48,
    },
    "phi3": {"sliding_window": 16, "tie_word_embeddings": False},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layer_interval": 2, "num_hidden_layers": 3},
    "seed_oss": {"tie_word_embeddings": False, "attention_out_bias": True},
    "ministral": {
        "tie_word_embeddings": False,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ministral3": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "granite": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
        "logits_scaling": 8.0,
    },
    "granitemoe": {
        "tie_word_embeddings": True,
        "intermediate_size": 64,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
        "logits_scaling": 6.0,
        "num_local_experts": 10,
        "num_experts_per_tok": 3,
    },
    "granitemoehybrid": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.263,
        "attention_multiplier": 0.03125,
        "logits_scaling": 4.0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 320,
        "position_embedding_type": "rope",
        "layer_types": ["attention", "attention"],
    },
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {
        "tie_word_embeddings": False,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
            },
        },
    },
    "exaone4": {
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "hunyuan_v1_dense": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
    },
    "lfm2": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "block_multiple_of": 64,
    },
    # A convolution with an MLP, attention and a convolution with experts.
    "lfm2_moe": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "routed_scaling_factor": 1.5,
    },
    "lfm3": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "sliding_window": 16,
        "conv_L_cache": 7,
    },
    # Two heads of values to a head of keys, of other widths; rows and channels that are no multiple of 64.
    "qwen3_5_text": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 64,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    },
    # Two kinds of heads; the last two layers share keys and values and have MLPs of twice the width.
    "gemma4_text": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "global_head_dim": 64,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 264,
        "final_logit_softcapping": 4.0,
    },
    # As the larger models: values that are keys and fewer heads of them without a window, no per-layer embeddings.
    "gemma4_text-large": {
        "model_type": "gemma4_text",
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 264,
        "final_logit_softcapping": 4.0,
    },
    # Experts beside an MLP.
    "gemma4_text-experts": {
        "model_type": "gemma4_text",
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 264,
        "enable_moe_block": True,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "top_k_experts": 2,
    },
    "ernie4_5": {"tie_word_embeddings": True, "use_bias": True},
    "helium": {"tie_word_embeddings": False},
    "glm4": {"tie_word_embeddings": False, "partial_rotary_factor": 0.5},
    "phi3-longrope": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "head_dim": 64,
        "hidden_size": 384,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1 + i / 50 for i in range(24)],
            "long_factor": [2 + i for i in range(24)],
        },
    },
}


EXPERTS = ("qwen3_moe", "qwen3_moe-sparse", "granitemoe", "lfm2_moe", "gemma4_text-experts")
"""Those with experts."""

# Those that together have every part of a block, for tests that cost seconds a model.
EVERY_PART = (
    "llama", "mistral-sliding", "qwen2", "qwen3", "gemma3_text", "phi3", "phi3-longrope",
    "smollm3", "granite", "gemma2", "olmo3", "hunyuan_v1_dense", "ministral3", "ernie4_5", "lfm3", "qwen3_5_text",
    "qwen3_moe",
    "gemma4_text",
)  # fmt: skip


def write_checkpoint(folder: Path, name: str, seed: int = 0, **changes: object) -> Path:
    """A Hugging Face folder: safetensors, config, byte-level tokenizer.  name: a key of ``MODELS``."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"model_type": name, **COMMON, **MODELS[name], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms and biases start at one and zero; a lowering that dropped them would go unnoticed.
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
                if config.model_type == "gemma4_text" and "q_norm" in parameter_name:
                    parameter.mul_(0.25)  # it stands for the factor of the scores, which this family does not have
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter_name.endswith(("router.scale", "per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith((".gate.weight", ".router.weight")):
                parameter.mul_(20)  # experts that are clearly chosen
            elif parameter_name.endswith(".router.proj.weight"):
                parameter.mul_(20 * config.hidden_size**0.5)  # the same: scores are divided by this root
            elif parameter_name.endswith("A_log"):
                parameter.uniform_(-4, 0)  # a memory that lasts
            else:
                parameter.mul_(2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("expert_bias"):
                buffer.normal_(0, 0.2)
            if buffer_name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    vocabulary |= {"<bos>": 256, "<eos>": 257}
    of_bytes = Tokenizer(models.BPE(vocabulary, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, bos_token="<bos>", eos_token="<eos>")
