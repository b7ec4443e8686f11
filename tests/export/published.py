"""Sizes and options of models of the size and kind of published ones, without what says nothing of the decoder.

The rows were written by hand, not downloaded.  The number beside a row is the model's count of weights, the published
one where it is known, which checks the sizes.
"""

from __future__ import annotations

from typing import Any

_QWEN_3_5: dict[str, Any] = {
    "head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "attn_output_gate": True, "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "mlp_only_layers": [], "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
}  # fmt: skip
"""What the configs of all dense Qwen3.5 models have."""

_ROPE_YARN = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def _config(architecture: str, model_type: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """sizes: layers, hidden, ffn, heads, heads of keys and values, vocabulary, context."""
    names = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    shape = dict(zip(names, sizes, strict=True))
    return {"architectures": [architecture], "model_type": model_type, **shape, "eos_token_id": 1, **more}


CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "SmolLM3-3B": (
        _config(
            "SmolLM3ForCausalLM", "smollm3", (36, 2048, 11008, 16, 4, 128256, 65536),
            no_rope_layer_interval=4, rope_theta=5000000.0, tie_word_embeddings=True, max_window_layers=28,
            use_sliding_window=False, rms_norm_eps=1e-06,
        ),
        3.08e9,
    ),
    # config.json of Qwen/Qwen3-30B-A3B: the defaults of transformers' class but for layers, ffn and normed weights.
    "Qwen3-30B-A3B": (
        _config(
            "Qwen3MoeForCausalLM", "qwen3_moe", (48, 2048, 6144, 32, 4, 151936, 40960),
            head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
            decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001, output_router_logits=False,
            rope_theta=1000000.0, rms_norm_eps=1e-06, hidden_act="silu", tie_word_embeddings=False,
            use_sliding_window=False, sliding_window=None, max_window_layers=48, attention_bias=False,
        ),
        30.53e9,
    ),
    "granite-3.3-2b-instruct": (
        _config(
            "GraniteForCausalLM", "granite", (40, 2048, 8192, 32, 8, 49159, 131072),
            attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0,
            rope_theta=10000000.0, tie_word_embeddings=True, rms_norm_eps=1e-05,
        ),
        2.53e9,
    ),
    "granite-4.0-micro": (
        _config(
            "GraniteMoeHybridForCausalLM", "granitemoehybrid", (40, 2560, 8192, 40, 8, 100352, 131072),
            shared_intermediate_size=8192, layer_types=["attention"] * 40, num_local_experts=0, num_experts_per_tok=0,
            attention_multiplier=0.015625, embedding_multiplier=12, residual_multiplier=0.22, logits_scaling=10,
            position_embedding_type="rope", rope_theta=10000000, tie_word_embeddings=True, mamba_n_heads=128,
            mamba_d_state=128, mamba_expand=2, mamba_d_head=40, rms_norm_eps=1e-05,
        ),
        3.4e9,
    ),
    "OLMo-2-0425-1B": (
        _config(
            "Olmo2ForCausalLM", "olmo2", (16, 2048, 8192, 16, 16, 100352, 4096),
            rope_theta=500000, tie_word_embeddings=False, rms_norm_eps=1e-06,
        ),
        1.48e9,
    ),
    "Olmo-3-7B-Instruct": (
        _config(
            "Olmo3ForCausalLM", "olmo3", (32, 4096, 11008, 32, 32, 100278, 65536),
            rope_theta=500000, tie_word_embeddings=False, sliding_window=4096, rms_norm_eps=1e-06,
            rope_scaling={
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            },
        ),
        7.3e9,
    ),
    "EXAONE-4.0-1.2B": (
        _config(
            "Exaone4ForCausalLM", "exaone4", (30, 2048, 4096, 32, 8, 102400, 65536),
            head_dim=64, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, rms_norm_eps=1e-05,
            layer_types=["full_attention"] * 30,
            rope_scaling={
                "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        1.28e9,
    ),
    "Hunyuan-0.5B-Instruct": (
        _config(
            "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", (24, 1024, 3584, 16, 8, 120818, 262144),
            head_dim=128, rope_theta=10000.0, tie_word_embeddings=True, use_qk_norm=True, use_cla=False,
            rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
        ),
        0.54e9,
    ),
    "ERNIE-4.5-0.3B-PT": (
        _config(
            "Ernie4_5ForCausalLM", "ernie4_5", (18, 1024, 3072, 16, 2, 103424, 131072),
            head_dim=128, rope_theta=500000.0, tie_word_embeddings=True, use_bias=False,
        ),
        0.36e9,
    ),
    "LFM2-1.2B": (
        _config(
            "Lfm2ForCausalLM", "lfm2", (16, 2048, 12288, 32, 8, 65536, 128000),
            conv_L_cache=3, conv_bias=False, block_auto_adjust_ff_dim=True, block_multiple_of=256,
            block_ffn_dim_multiplier=1.0, block_dim=2048, full_attn_idxs=[2, 5, 8, 10, 12, 14], norm_eps=1e-05,
            rope_theta=1000000.0, tie_embedding=True,
        ),
        1.17e9,
    ),
    "LFM3-1.7B": (
        _config("Lfm3ForCausalLM", "lfm3", (24, 2048, 7680, 16, 4, 128000, 128000), head_dim=128, norm_eps=1e-05),
        1.72e9,
    ),
    "gemma-2-2b-it": (
        _config(
            "Gemma2ForCausalLM", "gemma2", (26, 2304, 9216, 8, 4, 256000, 8192),
            head_dim=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256,
            sliding_window=4096, hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0,
        ),
        2.61e9,
    ),
    "gemma-2b-it": (
        _config("GemmaForCausalLM", "gemma", (18, 2048, 16384, 8, 1, 256000, 8192), head_dim=256, hidden_act="gelu"),
        2.51e9,
    ),
    "Ministral-3-3B-Instruct-2512": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "eos_token_id": 2,
            "tie_word_embeddings": True, "vision_config": {"model_type": "pixtral"},
            "text_config": _config(
                "Ministral3ForCausalLM", "ministral3", (26, 3072, 9216, 32, 8, 131072, 262144),
                head_dim=128, rope_parameters=_ROPE_YARN, sliding_window=None, tie_word_embeddings=True,
            ),
        },
        3.43e9,
    ),
    "gemma-3-4b-it": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": 1,
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "vocab_size": 262208,
            },
        },
        3.88e9,
    ),
    # Of 5.1 G weights, which are named with it, the rest is for images and sound.  By the sizes; as in other programs'
    # tests of this config.
    "gemma-4-E2B-it": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "eos_token_id": [1, 106],
            "tie_word_embeddings": True,
            "vision_config": {"model_type": "gemma4_vision", "hidden_size": 768},
            "audio_config": {"model_type": "gemma4_audio", "hidden_size": 1024},
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144,
                "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
                "num_global_key_value_heads": None, "attention_k_eq_v": False, "sliding_window": 512,
                "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
                "num_kv_shared_layers": 20, "use_double_wide_mlp": True, "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0,
                "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "enable_moe_block": False,
                "rope_parameters": {
                    "full_attention": {
                        "partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional",
                    },
                    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                },
            },
        },
        4.63e9,
    ),
    "gemma-4-E4B-it": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "eos_token_id": [1, 106],
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240,
                "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
                "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
                "num_kv_shared_layers": 18, "use_double_wide_mlp": False, "attention_k_eq_v": False,
                "max_position_embeddings": 131072, "sliding_window": 512, "final_logit_softcapping": 30.0,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
            },
        },
        7.46e9,
    ),
    # Of these weights 30.7 G are in the files: in each sixth block the values are the keys.
    "gemma-4-31B-it": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "eos_token_id": [1, 106],
            "tie_word_embeddings": True,
            "vision_config": {"model_type": "gemma4_vision", "hidden_size": 1152},
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504,
                "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512,
                "num_global_key_value_heads": 4, "attention_k_eq_v": True, "num_kv_shared_layers": 0,
                "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 0,
                "max_position_embeddings": 262144, "sliding_window": 1024, "final_logit_softcapping": 30.0,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10, "enable_moe_block": False,
            },
        },
        30.8e9,
    ),
    # Of these weights 25.2 G are in the files.
    "gemma-4-26B-A4B-it": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "eos_token_id": [1, 106],
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
                "num_global_key_value_heads": 2, "attention_k_eq_v": True, "num_kv_shared_layers": 0,
                "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 0,
                "max_position_embeddings": 262144, "sliding_window": 1024, "final_logit_softcapping": 30.0,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5, "enable_moe_block": True,
                "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
            },
        },
        25.2e9,
    ),
    "Qwen3-VL-4B-Instruct": (
        {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "eos_token_id": 1,
            "tie_word_embeddings": True, "vision_config": {"model_type": "qwen3_vl"},
            "text_config": {
                "model_type": "qwen3_vl_text", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                "max_position_embeddings": 262144, "rope_theta": 5000000, "rms_norm_eps": 1e-06,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            },
        },
        4.02e9,
    ),
    "Qwen3.5-0.8B": (
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "eos_token_id": 1,
            "tie_word_embeddings": True, "vision_config": {"model_type": "qwen3_5_vision", "depth": 12},
            "text_config": _config(
                "Qwen3_5ForCausalLM", "qwen3_5_text", (24, 1024, 3584, 8, 2, 248320, 262144),
                linear_num_value_heads=16, tie_word_embeddings=True, **_QWEN_3_5,
            ),
        },
        0.752e9,
    ),
    # As a text model alone.  Its head is tied in the published config; nothing else of it was seen.
    "Qwen3.5-4B": (
        _config(
            "Qwen3_5ForCausalLM", "qwen3_5_text", (32, 2560, 9216, 16, 4, 248320, 262144),
            linear_num_value_heads=32, tie_word_embeddings=True, **_QWEN_3_5,
        ),
        4.2e9,
    ),
    # MiniCPM5-1B is named as a Llama.  Its layers, heads and context are as published, its widths are only near.
    "MiniCPM5-1B": (
        _config(
            "LlamaForCausalLM", "llama", (24, 1536, 4608, 16, 2, 130560, 131072),
            head_dim=128, tie_word_embeddings=False, rope_theta=10000.0,
        ),
        1.08e9,
    ),
}  # fmt: skip
"""By name: config.json, and the number of weights of the text model."""
