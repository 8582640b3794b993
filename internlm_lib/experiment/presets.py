"""Exact shapes of the InternLM models, and a tiny one for a CPU.

Sources: 7B, config.json of internlm-7b; 20B, config.json of internlm-20b (no attention bias);
65B, never released: shape of AscendSpeed's `pretrain_internlm_65b_ptd_32p.sh`. The epsilon is the
models' 1e-6 everywhere; AscendSpeed's scripts left Megatron's 1e-5 in force.
"""

from typing import Any

_INTERNLM = {
    "vocab_size": 103168,
    "max_position_embeddings": 2048,
    "attention_bias": True,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 10000,
    "init_method_std": 0.02,
    "make_vocab_size_divisible_by": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "internlm-7b": _INTERNLM
    | {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 32,
    },
    "internlm-20b": _INTERNLM
    | {
        "num_layers": 60,
        "hidden_size": 5120,
        "ffn_hidden_size": 13824,
        "num_attention_heads": 40,
        "attention_bias": False,
        "max_position_embeddings": 4096,
    },
    "internlm-65b": _INTERNLM
    | {
        "num_layers": 80,
        "hidden_size": 8192,
        "ffn_hidden_size": 22016,
        "num_attention_heads": 64,
    },
    "internlm-tiny": _INTERNLM
    | {
        "num_layers": 2,
        "hidden_size": 192,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}
