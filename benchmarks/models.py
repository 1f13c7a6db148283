# SPDX-License-Identifier: Apache-2.0
"""Which linears of an architecture are masked and which stay dense: docs/models.md, from tiny random models.

python -m benchmarks.models > docs/models.md
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from spon_plugin import Mask, Site, SponError, find_sites, sparse_inputs
from spon_plugin.decoder.left_dense import left_dense
from spon_plugin.decoder.sites import decoder_blocks, default_modules

TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""What every config is given, as far as it knows the names."""

EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3": ("LlamaForCausalLM", {}),
    "Qwen2, Qwen2.5": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", EXPERTS),
    "Qwen3-Next (gated DeltaNet)": ("Qwen3NextForCausalLM", {**EXPERTS, **LINEAR}),
    "Mistral": ("MistralForCausalLM", {}),
    "Mixtral": ("MixtralForCausalLM", EXPERTS),
    "Gemma 2": ("Gemma2ForCausalLM", {}),
    "Gemma 3, text": ("Gemma3ForCausalLM", {}),
    "Gemma 3n, text": (
        "Gemma3nForCausalLM",
        {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
         "num_kv_shared_layers": 0, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
         "intermediate_size": [48, 48],
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi-2": ("PhiForCausalLM", {}),
    "Phi-3, Phi-4": ("Phi3ForCausalLM", {}),
    "OLMo 2": ("Olmo2ForCausalLM", {}),
    "SmolLM3": ("SmolLM3ForCausalLM", {}),
    "Granite": ("GraniteForCausalLM", {}),
    "GLM-4": ("Glm4ForCausalLM", {}),
    "DeepSeek-V3 (latent attention)": ("DeepseekV3ForCausalLM", {**EXPERTS, **LATENT}),
    "gpt-oss": ("GptOssForCausalLM", EXPERTS),
    "GPT-NeoX, Pythia": ("GPTNeoXForCausalLM", {}),
    "Falcon": ("FalconForCausalLM", {}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "Mamba": ("MambaForCausalLM", {"state_size": 8}),
    "Jamba (Mamba hybrid)": ("JambaForCausalLM", {**EXPERTS, **MAMBA}),
    "Bamba (Mamba-2 hybrid)": ("BambaForCausalLM", {**MAMBA, "mamba_n_heads": 8}),
    "Falcon-H1 (Mamba-2 hybrid)": ("FalconH1ForCausalLM", MAMBA),
    "T5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                                          "decoder_start_token_id": 0}),
    "Gemma 3 (image and text)": ("Gemma3ForConditionalGeneration", {}),
    "Qwen2.5-VL (image and text)": ("Qwen2_5_VLForConditionalGeneration", {}),
}  # fmt: skip

VLLM_TESTED = {"Llama 2, 3", "Qwen2, Qwen2.5", "Qwen3", "Qwen3-MoE", "Phi-3, Phi-4", "OPT"}
"""Those that `tests/vllm` runs."""

HEAD = """# Models

`find_sites` runs a model once and finds which linears read one tensor, so no architecture needs a table: this one is
what it finds in tiny random models of each, written by `python -m benchmarks.models` in a checkout, and a test holds
that. Every command lists what it leaves dense of the model at hand.

- **Masked.** Linears in one bracket read one tensor and share a mask. `lm_head`, embeddings and norms are never masked.
- **Left dense.** What no mask touches, and why. Experts that lie in one tensor are no linears: their input is known
  only behind the router, token by token.
- **By position.** Whether adapters with `tokens: decode` or a `dense_prefix` work, which need the positions that a
  model hands to its blocks. The default, every token masked, works everywhere.
- **vLLM.** *tested*: in the tests. Others that vLLM serves by its own linear layers are found by the names of their
  linears, and refused in words where these do not match.

PEFT and transformers take every row, lm-eval every one but encoder-decoders. On real weights two models were measured
here, SmolLM2-135M (a Llama) and Gemma 3 of 270M ([results](results/frontier.md)); the others on random ones.

| model | class | masked, by input | left dense | by position | vLLM |
| --- | --- | --- | --- | --- | --- |
"""


def tiny(name: str) -> Any:
    """A random model of an architecture, in evaluation mode."""
    cls = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    return cls(_config(cls.config_class, MODELS[name][1])).eval()


def _config(kind: Any, own: dict[str, Any]) -> Any:
    """A small config; that of a multimodal model has a small text config, and a small one for images."""
    parts = getattr(kind, "sub_configs", {}) or {}
    if "text_config" in parts:
        vision = {"depth": 1, "num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                  "patch_size": 14, "out_hidden_size": 32, "fullatt_block_indexes": [0]}  # fmt: skip
        text = _config(parts["text_config"], {**own, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                         "mrope_section": [1, 1, 2]}})  # fmt: skip
        seen = _config(parts["vision_config"], vision)
        return kind(text_config=text.to_dict(), vision_config=seen.to_dict())
    known = inspect.signature(kind.__init__).parameters
    names = set(known) | set(getattr(kind, "__dataclass_fields__", {})) | set(getattr(kind, "attribute_map", {}))
    return kind(**{key: value for key, value in {**TINY, **own}.items() if key in names or key in own})


def example(model: Any) -> dict[str, torch.Tensor]:
    """Token ids for one pass."""
    ids = {"input_ids": torch.arange(3, 8)[None]}
    if getattr(model.config, "is_encoder_decoder", False):
        ids["decoder_input_ids"] = torch.arange(3, 6)[None]
    return ids


def row(name: str) -> str:
    """A line of the table."""
    model = tiny(name)
    text = example(model)
    try:
        sites = find_sites(model, example=text)
        masked = ", ".join(dict.fromkeys(f"[{' '.join(_ends(site, sites))}]" for site in sites))
    except SponError:  # no single stack of blocks: by structure alone
        sites = []
        masked = " ".join(dict.fromkeys(path.rpartition(".")[2] for path in default_modules(model)))
    dense = [f"{_leaves(paths)}: {reason}" for reason, paths in left_dense(model).items()]
    dense += [f"{leaf}: experts in one tensor" for leaf in dict.fromkeys(_stacked(model))]
    positions = "yes" if sites and _knows_positions(model, sites, text) else "no"
    tested = "tested" if name in VLLM_TESTED else ""
    return f"| {name} | `{MODELS[name][0]}` | {masked} | {'; '.join(dense)} | {positions} | {tested} |"


def _ends(site: Site, sites: list[Site]) -> list[str]:
    """The last names of a site's linears, the last two where another site of the block has one of that name."""
    others = {path.rpartition(".")[2] for other in sites if other.block == site.block and other is not site
              for path in other.modules}  # fmt: skip
    parts = {path: path.split(".") for path in site.modules}
    return [".".join(p[-2:]) if p[-1] in others else p[-1] for p in parts.values()]


def _leaves(paths: list[str]) -> str:
    """The last names, the most telling few."""
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return " ".join(leaves[:6]) + (" ..." if len(leaves) > 6 else "")


def _stacked(model: nn.Module) -> Iterator[str]:
    """Names of weights in the blocks that hold a matrix for each expert."""
    blocks = [path for path, _ in decoder_blocks(model)]
    for path, module in model.named_modules():
        if any(path.startswith(block + ".") for block in blocks) and "expert" in path.lower():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield name


def _knows_positions(model: Any, sites: list[Site], text: dict[str, torch.Tensor]) -> bool:
    masks = {path: Mask(torch.tensor([0.1])) for site in sites for path in site.modules}
    try:
        with torch.no_grad(), sparse_inputs(model, masks, dense_prefix=1):
            model(**text)
    except SponError:
        return False
    return True


def page() -> str:
    """docs/models.md."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        return HEAD + "\n".join(row(name) for name in MODELS) + "\n"


if __name__ == "__main__":
    print(page(), end="")
