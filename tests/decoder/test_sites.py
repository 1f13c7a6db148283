# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from spon_plugin import SponError, find_sites
from spon_plugin.decoder.left_dense import is_expert
from spon_plugin.decoder.sites import decoder_blocks, default_modules, module_weights, names_of, target_names

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
SEVEN = [("attn_in", {"q_proj", "k_proj", "v_proj"}), ("attn_out", {"o_proj"})]
SEVEN += [("mlp_in", {"gate_proj", "up_proj"}), ("mlp_out", {"down_proj"})]


def make(model_type: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def leaves(model: nn.Module) -> list[tuple[str, set[str]]]:
    first = decoder_blocks(model)[0][0]
    sites = [site for site in find_sites(model) if site.block == first]
    return [(site.role, {path.rpartition(".")[2] for path in site.modules}) for site in sites]


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        pytest.param("llama", {}, SEVEN, id="llama"),
        pytest.param("mistral", {}, SEVEN, id="mistral"),
        pytest.param("qwen2", {}, SEVEN, id="qwen2"),
        pytest.param("qwen3", {}, SEVEN, id="qwen3"),
        pytest.param("gemma2", {}, SEVEN, id="gemma2"),
        pytest.param(
            "phi3",
            {},
            [
                ("attn_in", {"qkv_proj"}),
                ("attn_out", {"o_proj"}),
                ("mlp_in", {"gate_up_proj"}),
                ("mlp_out", {"down_proj"}),
            ],
            id="phi3",
        ),
        pytest.param(
            "phi",  # attention and MLP in parallel: they read one tensor
            {"num_key_value_heads": 4},
            [("attn_in", {"q_proj", "k_proj", "v_proj", "fc1"}), ("attn_out", {"dense"}), ("mlp_in", {"fc2"})],
            id="phi",
        ),
        pytest.param(
            "opt",
            {"ffn_dim": 48, "word_embed_proj_dim": 32},
            [
                ("attn_in", {"q_proj", "k_proj", "v_proj"}),
                ("attn_out", {"out_proj"}),
                ("mlp_in", {"fc1"}),
                ("mlp_out", {"fc2"}),
            ],
            id="opt",
        ),
        pytest.param(
            "gpt2",
            {"n_embd": 32, "n_layer": 2, "n_head": 4},
            [("attn_in", {"c_attn"}), ("attn_out", {"c_proj"}), ("mlp_in", {"c_fc"}), ("mlp_out", {"c_proj"})],
            id="gpt2-conv1d",
        ),
        pytest.param(
            "gpt_neox",
            {},
            [
                ("attn_in", {"query_key_value"}),
                ("attn_out", {"dense"}),
                ("mlp_in", {"dense_h_to_4h"}),
                ("mlp_out", {"dense_4h_to_h"}),
            ],
            id="gpt-neox",
        ),
    ],
)
def test_sites_of_known_decoders(model_type, changes, expected):
    assert leaves(make(model_type, **changes)) == expected


def test_experts_routers_and_the_output_head_stay_dense():
    model = make("mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert leaves(model) == SEVEN[:2]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mlp.experts.3.w1", True),
        ("mlp.gate", True),
        ("block_sparse_moe.gate", True),
        ("mlp.shared_expert.up_proj", True),
        ("mlp.router.linear", True),
        ("mlp.gate_proj", False),
        ("self_attn.q_proj", False),
    ],
)
def test_what_belongs_to_a_mixture_of_experts(path, expected):
    assert is_expert(path) is expected


def test_a_site_knows_its_weights_and_width(tiny_llama):
    sites = find_sites(tiny_llama)
    assert [site.name for site in sites[:2]] == ["model.layers.0.attn_in", "model.layers.0.attn_out"]
    assert sites[0].in_features == 48 and sites[3].in_features == 96
    assert sites[0].weights == 48 * (48 + 24 + 24)
    linears = [m for m in tiny_llama.model.layers.modules() if isinstance(m, nn.Linear)]
    assert sum(module_weights(sites).values()) == sum(m.weight.numel() for m in linears)


def test_targets_can_be_chosen_by_name_or_path(tiny_llama):
    names = ["down_proj", "model.layers.0.self_attn.q_proj"]
    modules = {path for site in find_sites(tiny_llama, names) for path in site.modules}
    assert modules == {"model.layers.0.self_attn.q_proj", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        pytest.param(
            "qproj", "target_modules: got 'qproj', expected names of linears in the model: .*q_proj", id="none"
        ),
        pytest.param("input_layernorm", "target_modules: got 'input_layernorm'.* not LlamaRMSNorm", id="not-a-linear"),
        pytest.param("lm_head", "target_modules: got 'lm_head', expected linears of the decoder's blocks", id="head"),
    ],
)
def test_a_wrong_target_is_named(tiny_llama, target, message):
    with pytest.raises(SponError, match=message):
        find_sites(tiny_llama, [target])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(SponError, match="model: got 'Sequential', expected a decoder"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


def test_target_names_are_short_where_they_are_exact(tiny_llama):
    sites = find_sites(tiny_llama)
    assert target_names(sites, tiny_llama) == sorted(set().union(*(names for _, names in SEVEN)))
    first = [site for site in sites if site.block == "model.layers.0"]
    assert all(name.startswith("model.layers.0.") for name in target_names(first, tiny_llama))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["a.0.in", "a.1.in"], ["in"]),
        (["a.0.mid.out", "a.1.mid.out", "a.0.in", "a.1.in"], ["in", "mid.out"]),
        (["a.0.in", "a.0.mid.out"], ["a.0.in", "a.0.mid.out"]),
    ],
    ids=["last names", "last two where one matches more", "paths"],
)
def test_names_match_the_wanted_modules_alone(wanted, expected):
    def block():
        return nn.ModuleDict({"in": nn.Identity(), "mid": nn.ModuleDict({"out": nn.Identity()})})

    model = nn.ModuleDict({"a": nn.ModuleList([block(), block()]), "out": nn.Identity()})
    assert names_of(wanted, model) == expected


@pytest.mark.parametrize("model_type", ["llama", "phi", "qwen2_moe", "mamba", "gpt_neox"])
def test_by_structure_as_by_running(model_type):
    changes = {"num_key_value_heads": 4} if model_type == "phi" else {}
    model = make(model_type, **changes)
    assert set(default_modules(model)) == {path for site in find_sites(model) for path in site.modules}


def test_of_an_encoder_that_hears_the_decoder_alone():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    tokens = dict(vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens))
    paths = default_modules(model)
    assert len(paths) == 10 and all(path.startswith("model.decoder.layers.0.") for path in paths)


def test_finding_sites_leaves_the_model_as_it_was(tiny_llama):
    tiny_llama.train()
    find_sites(tiny_llama)
    assert tiny_llama.training
    assert not any(m._forward_pre_hooks for m in tiny_llama.modules())
