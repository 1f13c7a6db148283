# SPDX-License-Identifier: Apache-2.0
"""pytest plugin that turns PEFT's own test modules on SPON; `test_peft_own_suite.py` runs pytest with it.

PEFT's tests are parametrized over config classes. Before they are expanded, the plugin replaces these parameters: every
row whose arguments mean something for any method (target modules, task type, ...) becomes a row of `SponConfig`, rows
for other kinds of layers are dropped, and tests that are about one other method are deselected. The tiny models that
the tests load from the hub are made at random here, in a hub cache of our own. What is left out is counted, with why.
"""

import importlib.util
import os
import sys
import types
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

PACKAGE = "peft_tests"  # the directory that PEFT's tests are linked into
CONFIG_NAMES = ("config_cls", "config_class")
GENERIC = {"target_modules", "modules_to_save", "exclude_modules", "task_type"}
OTHER_LAYERS = ("Conv1d", "Conv2d", "Conv3d", "MHA", "MLP_LayerNorm", "MlpUsingParameters")

_ONE_MASK = "that put two masks on one layer, which SPON refuses"
_HUB = "that load an adapter of another method from the hub"
_TABLE = "that fill in another method's table of target modules"
NOT_FOR_SPON = {
    "test_active_adapter": _ONE_MASK,
    "test_merge_layers_multi": _ONE_MASK,
    "test_multiple_active_adapters_with_same_modules_to_save_raises": _ONE_MASK,
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises": _ONE_MASK,
    "test_multiple_active_adapters_with_different_modules_to_save_works": _ONE_MASK,
    "test_from_pretrained": _HUB,
    "test_from_pretrained_cache_dir": _HUB,
    "test_save_pretrained_with_runtime_config": _HUB,
    "test_default_target_modules_list_of_str": _TABLE,
    "test_default_target_modules_str": _TABLE,
}
LEFT = pytest.StashKey()

SMALL = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
LLAMA = dict(SMALL, num_key_value_heads=2, max_position_embeddings=256)
BERT = dict(SMALL, max_position_embeddings=128)
OPT = dict(vocab_size=1024, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)
BART = dict(vocab_size=1024, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4) | dict(
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128
)
DEBERTA2 = dict(
    BERT, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm"
)
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", dict(OPT, word_embed_proj_dim=32)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", dict(GPT2, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", dict(LLAMA, head_dim=8)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        dict(vocab_size=1024, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", dict(BERT, relative_attention=True)),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", DEBERTA2),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        dict(LLAMA, pad_token_id=0),
    ),
}


def pytest_configure(config):
    import spon_peft  # registers

    assert spon_peft.SponConfig().peft_type == "SPON"
    cache = Path(os.environ["HF_HOME"], "hub")
    for repository, (architecture, arguments) in MODELS.items():
        _make_model(cache / f"models--{repository.replace('/', '--')}", architecture, arguments)
    if importlib.util.find_spec("diffusers") is None:  # imported at the top, for tests of other methods
        stub = sys.modules["diffusers"] = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    from peft_tests import testing_common, testing_utils

    # Both reach for the hub, or skip what SPON can do.
    testing_utils.hub_online_once = testing_common.hub_online_once = lambda _model_id: nullcontext()
    testing_common._skip_if_conv1d_not_supported = lambda *_args: None


def _make_model(directory, architecture, arguments):
    snapshot = directory / "snapshots" / ("0" * 40)
    if (directory / "refs" / "main").exists():
        return
    import torch
    import transformers

    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    cls(cls.config_class(**arguments)).save_pretrained(snapshot)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("0" * 40)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names = mark.args[0]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        position = next((names.index(n) for n in CONFIG_NAMES if n in names), None)
        if position is None:
            continue
        rows = _rows(names, position, mark.args[1])
        marks[index] = pytest.mark.parametrize(",".join(names), rows).mark
        metafunc.definition.spon = metafunc.function.__dict__["spon"] = bool(rows)


def _rows(names, position, rows):
    from peft import PromptLearningConfig

    from spon_peft import SponConfig

    found = {}
    for row in rows:
        values = getattr(row, "values", row)
        values = list(values) if isinstance(values, tuple | list) else [values]
        if issubclass(values[position], PromptLearningConfig):
            continue
        arguments = [value for value in values if isinstance(value, dict)]
        targets = str([a.get("target_modules") for a in arguments])
        if "test_name" in names and not any("target_modules" in a for a in arguments):
            continue
        if any(set(a) - GENERIC for a in arguments) or "emb" in targets or "conv2d" in targets:
            continue
        if any(str(value).startswith(OTHER_LAYERS) for value in values if isinstance(value, str)):
            continue
        values[position] = SponConfig
        if "test_name" in names:
            values[names.index("test_name")] = f"SPON {len(found)}"
        key = str([value for name, value in zip(names, values, strict=True) if name != "test_name"])
        found.setdefault(key, tuple(values) if len(names) > 1 else values[0])
    return list(found.values())


def pytest_collection_modifyitems(config, items):
    kept, left = [], Counter()
    for item in items:
        reason = "about one other method" if not item.function.__dict__.get("spon") else _why_not(item)
        if reason is None:
            kept.append(item)
        else:
            left[reason] += 1
    config.stash[LEFT] = left
    items[:] = kept


def _why_not(item):
    return NOT_FOR_SPON.get(item.originalname)


def pytest_terminal_summary(terminalreporter, config):
    for reason, count in config.stash.get(LEFT, {}).items():
        terminalreporter.write_line(f"left out: {count} {reason}")
