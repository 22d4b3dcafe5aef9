"""Which architectures the builtin engine runs, by the `model_type` of config.json.

Made from transformers `MADE_FOR`: every causal language model whose attention goes through
transformers' attention interface, without a state of its own and with layers of full or sliding
attention only. A test compares the table with the installed library, so an update of it is an
update of this file.
"""

from __future__ import annotations

MADE_FOR = (5, 23)  # transformers
# Kinds of layers whose attention is causal over all tokens or over a sliding window.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
RUNS = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "bitnet", "cohere", "cohere2",
    "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "deepseek_v2", "deepseek_v3",
    "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe",
    "kolibri1", "laguna", "llama", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3",
    "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu",
})  # fmt: skip
# transformers loads these for text, and their shape is right by default, but not as published.
HYBRID = frozenset({"lfm2", "lfm2_moe"})
