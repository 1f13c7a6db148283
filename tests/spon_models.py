# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, and adapters for them, that the tests of `spon_peft` share."""

import torch
import transformers
from peft import get_peft_model

from spon_peft import SponConfig, SponLayer

COMMON = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
LLAMA = dict(COMMON, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=64)
KINDS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),  # biases on q, k and v
    "opt": ("OPTForCausalLM", dict(COMMON, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64)),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)),  # Conv1D
}


def tiny(kind="llama", seed=0, dtype=torch.float32):
    """A random model whose activations are large enough for thresholds to matter."""
    architecture, arguments = KINDS[kind]
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.to(dtype)


def sparse(kind="llama", dtype=torch.float32, seed=0, **config):
    """A tiny model with random thresholds and alphas."""
    model = tiny(kind, dtype=dtype)
    torch.manual_seed(seed + 100)
    return get_peft_model(model, SponConfig(init_weights=False, task_type="CAUSAL_LM", **config)).eval()


def ids(batch=2, length=9, seed=1):
    torch.manual_seed(seed)
    return torch.randint(1, 64, (batch, length))


@torch.no_grad()
def logits(model, tokens=None, **kwargs):
    return model(input_ids=ids() if tokens is None else tokens, **kwargs).logits


def layers(model):
    return [m for m in model.modules() if isinstance(m, SponLayer)]
