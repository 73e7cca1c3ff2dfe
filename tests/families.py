"""The table behind `tests.architectures`: one entry per family, data only.

An entry's keys are settings of the family's config, on top of `BASE`, except those that are fields
of `tests.architectures.Architecture`.
"""

from typing import Any

VOCAB = 128

# No end-of-sequence token: every generation has the length asked for.
GENERATION: dict[str, Any] = {
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 0,
}

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "use_cache": True,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
WINDOW = {"sliding_window": 16}
HALF_WINDOW = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
HALF_CONV = {"layer_types": ["conv", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
# Before 5.23 these default to sdpa, which drops the soft cap: no reference for anything.
SOFTCAP = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "attention": "eager"}
SIDES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
TEXT = {"head": "AutoModelForSeq2SeqLM"}
SPEECH = {"head": "AutoModelForSpeechSeq2Seq"}

# What `ArkCache` is expected to make of families that it does not page, and why.
OWN_ATTENTION = {"mode": "compat", "note": "attends by itself, not through the interface"}
FULL_KEYS = {"mode": "compat", "note": "needs all keys or values back from the cache"}
NOTHING_TO_PAGE = {"mode": "compat", "note": "no layer of the plain kind"}
NO_CACHE = {"mode": "none", "note": "takes no DynamicCache with keys and values"}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "arcee": {},
    "apertus": {},
    "bitnet": {},
    "seed_oss": {},
    "qwen2": {},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
        **WINDOW,
    },
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS},
    "qwen3_next": {**EXPERTS, **DELTA_NET, **HALF_LINEAR, "shared_expert_intermediate_size": 32},
    "qwen3_5": {"model_type": "qwen3_5_text", **DELTA_NET, **HALF_LINEAR},
    "mistral": {"sliding_window": None},
    "mistral-window": {**NOTHING_TO_PAGE, "model_type": "mistral", **WINDOW},
    "ministral": {**NOTHING_TO_PAGE, **WINDOW},
    "mixtral": {**LOCAL_EXPERTS},
    "gemma": {},
    "gemma2": {**HALF_WINDOW, **SOFTCAP, "final_logit_softcapping": 10.0},
    "gemma3": {"model_type": "gemma3_text", **HALF_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3n": {
        "model_type": "gemma3n_text",
        **WINDOW,
        **PER_LAYER_INPUT,
        "num_hidden_layers": 4,
        "layer_types": HALF_WINDOW["layer_types"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4": {
        "model_type": "gemma4_text",
        **HALF_WINDOW,
        **PER_LAYER_INPUT,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "vaultgemma": {**HALF_WINDOW, **SOFTCAP},
    "recurrent_gemma": {
        **NOTHING_TO_PAGE,
        "attention_window_size": 16,
        "lru_width": 64,
        "num_hidden_layers": 3,
    },
    "phi": {},
    "phi3": {"sliding_window": None},
    "phimoe": {**LOCAL_EXPERTS, "sliding_window": None},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_neox_japanese": {**OWN_ATTENTION},
    "gptj": {**OWN_ATTENTION, "rotary_dim": 8},
    "codegen": {**OWN_ATTENTION, "rotary_dim": 8},
    "gpt_neo": {
        **OWN_ATTENTION,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_oss": {**HALF_WINDOW, **LOCAL_EXPERTS},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "biogpt": {},
    "xglm": {**OWN_ATTENTION, "ffn_dim": 96},
    "ctrl": {"dff": 96},
    "falcon": {**OWN_ATTENTION, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-multi-query": {"model_type": "falcon", **OWN_ATTENTION},
    "falcon-alibi": {
        "model_type": "falcon",
        **OWN_ATTENTION,
        "alibi": True,
        "multi_query": False,
    },
    "bloom": {**OWN_ATTENTION},
    "mpt": {**OWN_ATTENTION, "max_seq_len": 512, "expansion_ratio": 2},
    "cohere": {},
    "cohere2": {**HALF_WINDOW},
    "cwm": {**HALF_WINDOW},
    "olmo": {},
    "olmo2": {},
    "olmo3": {**HALF_WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, **ROUTED},
    "deepseek_v3": {**LATENT, **ROUTED},
    "deepseek_v32": {
        **NOTHING_TO_PAGE,
        **LATENT,
        **ROUTED,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 24,
    },
    "glm4_moe_lite": {**LATENT, **ROUTED, "mlp_layer_types": ["dense", "sparse"]},
    "minicpm3": {**LATENT},
    "longcat_flash": {
        **LATENT,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_layers": 1,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
    },
    "dots1": {**ROUTED},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "falcon_h1": {**NOTHING_TO_PAGE, "mamba_d_ssm": 64, **MAMBA2 | {"mamba_n_heads": 4}},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        **MAMBA2,
        **LOCAL_EXPERTS,
        "shared_intermediate_size": 32,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "moe", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "zamba": {
        **NOTHING_TO_PAGE,
        **ZAMBA,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **NOTHING_TO_PAGE,
        **ZAMBA,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "attention_head_dim": 32,
        "chunk_size": 16,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {**HALF_CONV},
    "lfm2_moe": {**HALF_CONV, **EXPERTS, "num_dense_layers": 1},
    "minimax": {**NO_CACHE, **HALF_LINEAR, **LOCAL_EXPERTS, "block_size": 16},
    "minimax_m2": {**LOCAL_EXPERTS},
    "granite": {},
    "granitemoe": {**LOCAL_EXPERTS},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "persimmon": {},
    "nemotron": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    },
    "hunyuan": {"model_type": "hunyuan_v1_dense"},
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": {**HALF_WINDOW},
    "helium": {},
    "llama4": {
        "model_type": "llama4_text",
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        **LOCAL_EXPERTS,
        "intermediate_size_mlp": 96,
    },
    "mimo_v2_flash": {**HALF_WINDOW},
    "afmoe": {**HALF_WINDOW, **EXPERTS, "num_dense_layers": 1},
    "modernbert-decoder": {**HALF_WINDOW},
    "jetmoe": {**FULL_KEYS, "kv_channels": 16, **LOCAL_EXPERTS},
    "diffllama": {
        **FULL_KEYS,
    },
    "doge": {
        **FULL_KEYS,
    },
    "mamba": {**NO_CACHE, "state_size": 8, "time_step_rank": 4},
    "mamba2": {**NO_CACHE, "num_heads": 8, "state_size": 8, "chunk_size": 16, "n_groups": 1},
    "t5": {**TEXT, "d_kv": 16, "d_ff": 96, "num_decoder_layers": 2, **FULL_KEYS},
    "bart": {**TEXT, **SIDES},
    "whisper": {
        **SPEECH,
        **SIDES,
        "num_mel_bins": 16,
        "max_source_positions": 16,
        "max_target_positions": 512,
    },
    "moonshine": {**SPEECH, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
}
