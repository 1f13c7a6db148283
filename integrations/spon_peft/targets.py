# SPDX-License-Identifier: Apache-2.0
"""Which linears are sparsified by default, for each architecture: all that read a hidden state in a decoder block.

Experts of a mixture, routers, embeddings and output heads stay dense.
"""

from __future__ import annotations

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LLAMA = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
_OPT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_GPT2 = ["c_attn", "c_proj", "c_fc"]
_NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]

_LLAMA_LIKE = [
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "stablelm",
    "cohere",
    "cohere2",
    "helium",
    "exaone4",
    "seed_oss",
    "hunyuan_v1_dense",
    "ernie4_5",
]

TARGET_MODULES: dict[str, list[str]] = {
    **dict.fromkeys(_LLAMA_LIKE, _LLAMA),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"], _ATTENTION),
    "arcee": [*_ATTENTION, "up_proj", "down_proj"],
    "apertus": [*_ATTENTION, "up_proj", "down_proj"],
    "nemotron": [*_ATTENTION, "up_proj", "down_proj"],
    "starcoder2": [*_ATTENTION, "c_fc", "c_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm": [*_ATTENTION, "gate_up_proj", "down_proj"],
    "glm4": [*_ATTENTION, "gate_up_proj", "down_proj"],
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
    "codegen": ["qkv_proj", "out_proj", "fc_in", "fc_out"],
    "gpt_neo": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "gpt_neox": _NEOX,
    "falcon": _NEOX,
    "bloom": _NEOX,
    "mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": _OPT,
    "bert": _BERT,
    "roberta": _BERT,
    "deberta": ["intermediate.dense", "output.dense"],  # its attention reads the weight of in_proj
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"],
}
"""Model type of a transformers config -> names for `SponConfig.target_modules`."""
