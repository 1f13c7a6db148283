# SPDX-License-Identifier: Apache-2.0
"""`spon-hf` inside one process, on a tiny Llama: what it computes, what it counts, what it refuses."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from masks import make_masks
from torch.nn import functional as F

from spon_plugin import Mask

pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval: pip install 'spon-plugin[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tiny_models import make_byte_tokenizer, make_tiny_llama

import spon_lm_eval
from spon_lm_eval.model import SponHFLM
from spon_plugin import (
    Adapter,
    SparsityCounter,
    SponError,
    SponFields,
    find_sites,
    machine,
    read_adapter,
    sparse_inputs,
)
from spon_plugin import write_adapter as write
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sites import linear_inputs, module_weights, target_names

CONTEXTS = ["The capital of France is", "Two and two", "A much longer question, with more words in it than the others?"]
CHOICES = [" Paris", " four", " no", " a", "."]
REQUESTS = [(context, choice) for context in CONTEXTS for choice in CHOICES]
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # biases are folded in float32
TEXTS = ["One text of some length, for a perplexity.", "Another.", " ".join(str(i * i) for i in range(45))]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama whose tokenizer has an end of sequence, without which lm-eval cannot pad."""
    path = tmp_path_factory.mktemp("lm_eval") / "base"
    make_tiny_llama(eos_token_id=10).save_pretrained(path)
    tokenizer = make_byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(10)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def make_adapter(base: Path, path: Path, threshold: float, alpha: float, **changes) -> Path:
    """An adapter for `base` with random alphas; thresholds differ between sites."""
    inputs = {name: size for name, size in linear_inputs(make_tiny_llama()).items() if name != "lm_head"}
    generator = torch.Generator().manual_seed(0)
    sites = [site.modules for site in find_sites(make_tiny_llama())]
    thresholds = {
        name: torch.tensor([threshold * (1 + 0.1 * index)]) for index, names in enumerate(sites) for name in names
    }
    alphas = {name: alpha * torch.randn(size, generator=generator) for name, size in inputs.items()}
    names = sorted({name.rpartition(".")[2] for name in inputs})
    peft = {"base_model_name_or_path": str(base), "target_modules": names, "task_type": "CAUSAL_LM"}
    return write(Adapter(SponFields(0.5, **changes), make_masks(thresholds, alphas), peft), path)


@pytest.fixture(scope="module")
def spon50(base, tmp_path_factory) -> Path:
    """Masks and alphas that matter."""
    return make_adapter(base, tmp_path_factory.mktemp("lm_eval") / "spon50", 0.3, 0.2)


@pytest.fixture(scope="module")
def vectors(base, spon50, tmp_path_factory) -> Path:
    """The same with thresholds per channel, shared by the linears of a site but for one, and centres."""
    adapter, generator = read_adapter(spon50), torch.Generator().manual_seed(1)
    for site in find_sites(make_tiny_llama()):
        threshold, center = (torch.randn(site.in_features, generator=generator) for _ in range(2))
        for path in site.modules:
            mask = adapter.masks[path]
            own = None if path.endswith("o_proj") else 0.1 * center
            adapter.masks[path] = Mask(mask.threshold * threshold.abs(), own, mask.alpha)
    odd = "model.layers.1.mlp.up_proj"
    adapter.masks[odd] = replace(adapter.masks[odd], threshold=adapter.masks[odd].threshold * 2)
    return write(adapter, tmp_path_factory.mktemp("lm_eval") / "vectors")


@pytest.fixture(scope="module")
def empty(base, tmp_path_factory) -> Path:
    """Threshold 0 and alpha 0: the dense model."""
    return make_adapter(base, tmp_path_factory.mktemp("lm_eval") / "empty", 0.0, 0.0)


def build(cls, pretrained, **arguments):
    # float64, because a rounding difference that moves an activation across its threshold makes a difference at once.
    return cls(pretrained=str(pretrained), device="cpu", **{"dtype": "float64", "batch_size": 4, **arguments})


def dense(base, **arguments) -> HFLM:
    return build(HFLM, base, **arguments)


def sparse(base, adapter, **arguments) -> SponHFLM:
    return build(SponHFLM, base, spon=str(adapter), **arguments)


@pytest.mark.parametrize(("native", "computes"), [(True, "bfloat16"), (False, "float32")], ids=["native", "emulated"])
def test_dtype_auto_follows_the_machine(base, spon50, tmp_path, monkeypatch, caplog, native, computes):
    dtypes = frozenset([torch.bfloat16] if native else [])
    monkeypatch.setattr(machine, "native_dtypes", lambda: dtypes)
    make_tiny_llama(eos_token_id=10).bfloat16().save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "half")
    caplog.set_level(logging.INFO)
    lm = sparse(tmp_path / "half", spon50, dtype="auto")
    assert lm.get_model_info()["model_dtype"] == getattr(torch, computes)
    assert ("This CPU emulates bfloat16: computing in float32." in caplog.text) != native
    assert sparse(tmp_path / "half", spon50, dtype="bfloat16").get_model_info()["model_dtype"] == torch.bfloat16


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def loglikelihood(lm, requests=REQUESTS):
    return lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)


def rolling(lm, texts=TEXTS):
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True)


def generate(lm, contexts=CONTEXTS, **kwargs):
    kwargs = {"until": [], "max_gen_toks": 12, **kwargs}
    return lm.generate_until(instances("generate_until", [(c, dict(kwargs)) for c in contexts]), disable_tqdm=True)


TOKENIZER = make_byte_tokenizer()  # a token for every byte, so that a character of these texts is a token


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER.encode(text)])


def values(results) -> torch.Tensor:
    return torch.tensor([result[0] for result in results], dtype=torch.float64)


def report(lm) -> dict:
    return json.loads(json.dumps(lm.get_model_info()["spon"]))


# --- the function ---


@pytest.mark.parametrize("batch_size", [pytest.param(n, id=f"batch-{n}") for n in (1, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", [loglikelihood, rolling, generate], ids=lambda call: call.__name__)
def test_no_mask_and_no_alpha_is_hf_to_the_last_digit(base, empty, call, dtype, batch_size):
    arguments = {"dtype": dtype, "batch_size": batch_size}
    assert call(sparse(base, empty, **arguments)) == call(dense(base, **arguments))


def by_hand(adapter: Adapter, context: str, continuation: str, dense_tokens: int, alpha=True, dtype=torch.float64):
    """Log-likelihood under masks from `dense_tokens` on, by the core's hooks, whole sequence at once."""
    model, ids = make_tiny_llama().to(dtype), ids_of(context + continuation)
    masks = sparse_inputs(model, (adapter if alpha else adapter.without_alpha()).masks, dense_tokens)
    with masks, torch.no_grad():
        logprobs = F.log_softmax(model(input_ids=ids[:, :-1]).logits[0], dim=-1)
    logprobs, targets = logprobs[-len(continuation) :], ids[0, -len(continuation) :]
    greedy = bool((logprobs.argmax(-1) == targets).all())
    return float(logprobs.gather(1, targets[:, None]).sum()), greedy


def expected(adapter_dir: Path, tokens: str, alpha: bool = True, prefix: int = 0, dtype=torch.float64):
    adapter = read_adapter(adapter_dir)
    return [
        by_hand(adapter, c, t, max(prefix, len(c)) if tokens == "decode" else prefix, alpha, dtype) for c, t in REQUESTS
    ]


@pytest.mark.parametrize("alpha", ["on", "off"])
def test_loglikelihoods_in_float32(base, spon50, alpha):
    lm = sparse(base, spon50, alpha=alpha, dtype="float32", batch_size=1)
    got, want = loglikelihood(lm), expected(spon50, "all", alpha == "on", dtype=torch.float32)
    torch.testing.assert_close(values(got), values(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", ["on", "off"])
@pytest.mark.parametrize("tokens", ["all", "decode"])
@pytest.mark.parametrize("batch_size", [pytest.param(n, id=f"batch-{n}") for n in (1, 3, 4, 64)])
def test_loglikelihoods_are_those_of_a_masked_forward_by_hand(base, spon50, tokens, alpha, batch_size):
    got = loglikelihood(sparse(base, spon50, tokens=tokens, alpha=alpha, batch_size=batch_size))
    want = expected(spon50, tokens, alpha == "on")
    torch.testing.assert_close(values(got), values(want), **CLOSE)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    away = values(loglikelihood(dense(base))) - values(want)
    assert away[[len(t) > 1 for _, t in REQUESTS]].abs().min() > 1e-3, "the masks do not matter; the test says nothing"


@pytest.mark.parametrize("alpha", ["on", "off"])
@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_thresholds_per_channel_and_centres(base, vectors, spon50, tokens, alpha):
    got = loglikelihood(sparse(base, vectors, tokens=tokens, alpha=alpha))
    want = expected(vectors, tokens, alpha == "on")
    torch.testing.assert_close(values(got), values(want), **CLOSE)
    assert (values(got) - values(expected(spon50, tokens, alpha == "on"))).abs().max() > 1e-3


def test_alpha_and_token_mode_change_the_function(base, spon50):
    every = [expected(spon50, tokens, alpha) for tokens in ("all", "decode") for alpha in (True, False)]
    for i, one in enumerate(every):
        for other in every[:i]:
            assert (values(one) - values(other)).abs().max() > 1e-2


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_dense_prefix(base, spon50, prefix):
    got = loglikelihood(sparse(base, spon50, dense_prefix=prefix))
    torch.testing.assert_close(values(got), values(expected(spon50, "all", prefix=prefix)), **CLOSE)


def test_decode_without_a_mask_is_dense(base, empty):
    lm = sparse(base, empty, tokens="decode")
    got, want = loglikelihood(lm), loglikelihood(dense(base))
    torch.testing.assert_close(values(got), values(want), **CLOSE)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert report(lm)["sparsity"]["masked_tokens"] > 0


def test_decode_scores_single_tokens_by_the_dense_model(base, spon50):
    requests = [(context, choice) for context in CONTEXTS for choice in "ABC"]
    lm = sparse(base, spon50, tokens="decode")
    torch.testing.assert_close(
        values(loglikelihood(lm, requests)), values(loglikelihood(dense(base), requests)), atol=1e-5, rtol=1e-5
    )
    assert report(lm)["sparsity"]["measured"] is None and report(lm)["sparsity"]["masked_tokens"] == 0


def test_decode_reads_a_shared_context_once(base, spon50):
    lm, seen = sparse(base, spon50, tokens="decode", batch_size=2), []

    def look(_module, _args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))

    lm.inner.register_forward_pre_hook(look, with_kwargs=True)
    loglikelihood(lm, [(CONTEXTS[0], choice) for choice in CHOICES])
    # five choices, of which one is a single token: the context, then two rows at a time, longest first
    assert seen == [(1, 24), (2, 5), (2, 2)]


def test_decode_cuts_what_is_too_long_as_hf_does(base, empty, caplog):
    long = [("word " * 30, " and more"), ("word " * 30, "!")]
    arguments = {"max_length": 40}
    got = loglikelihood(sparse(base, empty, tokens="decode", **arguments), long)
    torch.testing.assert_close(values(got), values(loglikelihood(dense(base, **arguments), long)), **CLOSE)


def test_decode_generates_with_a_dense_prompt(base, spon50):
    """Token by token against the core's hooks: the prompt dense, what was generated sparse."""
    adapter, context = read_adapter(spon50), CONTEXTS[0]
    (text,) = generate(sparse(base, spon50, tokens="decode"), [context])
    model, ids = make_tiny_llama().double(), ids_of(context)
    with torch.no_grad():
        for _ in range(12):
            with sparse_inputs(model, adapter.masks, len(context)):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    tokens = ids[0, len(context) :].tolist()
    tokens = tokens[: tokens.index(10)] if 10 in tokens else tokens
    assert text == TOKENIZER.decode(tokens)
    assert text != generate(dense(base), [context])[0] != generate(sparse(base, spon50, tokens="all"), [context])[0]


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_rolling_windows(base, spon50, tokens):
    """Each window is a request: what comes before its first scored token is its context."""
    adapter, want = read_adapter(spon50), []
    for text in TEXTS:
        windows = get_rolling_token_windows(TOKENIZER.encode(text), 10, max_seq_len=40, context_len=1)
        parts = [[TOKENIZER.decode(part) for part in make_disjoint_window(window)] for window in windows]
        prefixes = [len(context) if tokens == "decode" else 0 for context, _ in parts]
        want.append(sum(by_hand(adapter, *part, prefix)[0] for part, prefix in zip(parts, prefixes, strict=True)))
    assert len(prefixes) > 2 and (tokens == "all" or max(prefixes) > 1), "the last text takes several windows"
    got = rolling(sparse(base, spon50, tokens=tokens, max_length=40))
    assert got == pytest.approx(want, abs=1e-4)
    assert got != pytest.approx(rolling(dense(base, max_length=40)), abs=1e-2)


@pytest.mark.parametrize("tokens", ["all", "decode"])
@pytest.mark.parametrize("call", [loglikelihood, rolling], ids=lambda call: call.__name__)
def test_batches_with_padding_equal_single_requests(base, spon50, call, tokens):
    one, many = (call(sparse(base, spon50, tokens=tokens, batch_size=n)) for n in (1, 8))
    flat = [r[0] if isinstance(r, tuple) else r for r in one], [r[0] if isinstance(r, tuple) else r for r in many]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5)


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_generation_in_batches_with_padding_equals_single_requests(base, spon50, tokens):
    assert generate(sparse(base, spon50, tokens=tokens, batch_size=1)) == generate(
        sparse(base, spon50, tokens=tokens, batch_size=3)
    )


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_batch_size_auto(base, spon50, tokens):
    auto, fixed = (
        sparse(base, spon50, tokens=tokens, max_length=64, batch_size=size, max_batch_size=8) for size in ("auto", 4)
    )
    torch.testing.assert_close(values(loglikelihood(auto)), values(loglikelihood(fixed)), **CLOSE)
    assert rolling(auto) == pytest.approx(rolling(fixed), abs=1e-5)
    # the passes that look for a batch size are not counted
    counted, expected_counts = (report(lm)["sparsity"] for lm in (auto, fixed))
    assert counted["masked_tokens"] == expected_counts["masked_tokens"] > 0
    assert counted["measured"] == pytest.approx(expected_counts["measured"], abs=1e-9)


def test_a_model_that_is_loaded_already(base, spon50):
    model = make_tiny_llama(eos_token_id=10).double()
    lm = SponHFLM(pretrained=model, tokenizer=str(base), spon=str(spon50), batch_size=4)
    torch.testing.assert_close(values(loglikelihood(lm)), values(expected(spon50, "all")), **CLOSE)


def test_base_model_of_the_adapter_is_the_default(base, spon50):
    lm = SponHFLM(spon=str(spon50), device="cpu", dtype="float32")
    assert lm.pretrained == str(base) == report(lm)["base_model"]


def test_chat_template_and_device_map(base, spon50):
    lm = sparse(base, spon50, device_map="auto")
    chat = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert chat == "<user>Hello"
    (result,) = loglikelihood(lm, [(chat, " you")])
    want, _ = by_hand(read_adapter(spon50), chat, " you", 0)
    assert result[0] == pytest.approx(want, abs=1e-5)


TINY = {"vocab_size": 256, "eos_token_id": 10, "bos_token_id": 10, "pad_token_id": 0}
LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **TINY}
ARCHITECTURES = {
    "learned-positions": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **TINY),
    "positions-from-the-mask": transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, **TINY
    ),
    "no-position-ids": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TINY),
    "sliding-window": transformers.MistralConfig(sliding_window=8, num_key_value_heads=2, head_dim=8, **LLAMA_LIKE),
    "two-kinds-of-layers": transformers.Gemma2Config(
        sliding_window=8, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, **LLAMA_LIKE
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decode_on_other_architectures(base, tmp_path, name):
    """Contexts of different lengths in a batch, longer than a sliding window; against one sequence at a time."""
    torch.manual_seed(0)
    dtype = torch.float32 if name == "no-position-ids" else torch.float64  # Bloom's padding is NaN in float64
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    sites = find_sites(model)
    masks = {path: Mask(torch.tensor([0.2])) for site in sites for path in site.modules}
    peft = {"target_modules": target_names(sites, model), "task_type": "CAUSAL_LM"}
    adapter = Adapter(SponFields(0.5, alpha_modules=[]), masks, peft)
    write(adapter, tmp_path / "adapter")
    want = []
    with torch.no_grad():
        for context, continuation in REQUESTS:
            ids = ids_of(context + continuation)
            with sparse_inputs(model, masks, dense_prefix=len(context)), whole_windows():
                logprobs = F.log_softmax(model(input_ids=ids[:, :-1]).logits[0], dim=-1)[-len(continuation) :]
            want.append((float(logprobs.gather(1, ids[0, -len(continuation) :, None]).sum()), None))
    dense_scores = loglikelihood(HFLM(pretrained=model, tokenizer=str(base), batch_size=16))
    lm = SponHFLM(pretrained=model, tokenizer=str(base), spon=str(tmp_path / "adapter"), tokens="decode", batch_size=16)
    got = values(loglikelihood(lm))
    torch.testing.assert_close(got, values(want), atol=1e-5 if dtype == torch.float64 else 1e-3, rtol=0.0)
    assert (values(dense_scores) - got).abs().max() > 1e-3, "the masks do not matter; the test says nothing"


def in_eight_bits(base):
    """The base by bitsandbytes, which rounds while it loads."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)


def in_four_bits(base):
    """The base as `spon quantize` writes it."""
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    from spon_transformers.quantize import Rounding, quantize, save_quantized

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantize(model, Rounding(4, 16))
    save_quantized(model, base.parent / "w4")
    return transformers.AutoModelForCausalLM.from_pretrained(base.parent / "w4", dtype=torch.float32)


@pytest.mark.parametrize(
    ("rounded", "kernel"),
    [
        (in_eight_bits, "masked dense matmul (torch), quantized weights"),
        (in_four_bits, "spon::sparse_linear_rows ("),
    ],
)
def test_quantized_base(base, spon50, rounded, kernel):
    """Alphas are folded into the biases of quantized layers, which stay inside PEFT's."""
    model = rounded(base)
    adapter, want = read_adapter(spon50), []
    requests = REQUESTS[:5]
    with torch.no_grad(), sparse_inputs(model, adapter.masks):
        for context, continuation in requests:
            ids = ids_of(context + continuation)
            logprobs = F.log_softmax(model(input_ids=ids[:, :-1]).logits[0].float(), dim=-1)[-len(continuation) :]
            want.append((float(logprobs.gather(1, ids[0, -len(continuation) :, None]).sum()), None))
    lm = SponHFLM(pretrained=model, tokenizer=str(base), spon=str(spon50), batch_size=1)
    torch.testing.assert_close(values(loglikelihood(lm, requests)), values(want), atol=0.05, rtol=0.0)
    assert report(lm)["kernel"].startswith(kernel)
    assert 0.2 < report(lm)["sparsity"]["measured"] < 0.9 and len(report(lm)["sparsity"]["sites"]) == 8


# --- what is counted ---


@pytest.mark.parametrize("batch_size", [pytest.param(n, id=f"batch-{n}") for n in (1, 8)])
@pytest.mark.parametrize("tokens", ["all", "decode"])
@pytest.mark.parametrize("kind", ["spon50", "vectors"])
def test_measured_sparsity_is_that_of_the_scored_tokens(base, request, kind, tokens, batch_size):
    directory = request.getfixturevalue(kind)
    lm = sparse(base, directory, tokens=tokens, batch_size=batch_size)
    loglikelihood(lm)
    adapter, model, counter = read_adapter(directory), make_tiny_llama().double(), SparsityCounter()
    sites = find_sites(model)
    tokens_seen = {"masked": 0, "dense": 0}
    contexts = set()
    with torch.no_grad():
        for context, continuation in REQUESTS:
            ids = ids_of(context + continuation)[:, :-1]
            skip = len(context) if tokens == "decode" else 0
            with sparse_inputs(model, adapter.masks, skip, counter):
                model(input_ids=ids)
            tokens_seen["masked"] += ids.shape[1] - skip
            tokens_seen["dense"] += skip if tokens == "all" or context not in contexts else 0
            contexts.add(context)
    got = report(lm)["sparsity"]
    assert (got["masked_tokens"], got["dense_tokens"]) == (tokens_seen["masked"], tokens_seen["dense"])
    assert got["measured"] == pytest.approx(counter.overall(module_weights(sites)), abs=1e-9)
    assert 0.2 < got["measured"] < 0.9
    per_module = counter.per_module()
    for site in sites:
        shares = [per_module[path] * count for path, count in zip(site.modules, site.module_weights, strict=True)]
        assert got["sites"][site.name] == pytest.approx(sum(shares) / site.weights, abs=1e-9)


def test_generated_tokens_are_counted_without_padding(base, spon50):
    lm = sparse(base, spon50, batch_size=3)
    texts = generate(lm)
    counted = report(lm)["sparsity"]["masked_tokens"]
    prompts = sum(len(context) for context in CONTEXTS)
    single = sparse(base, spon50, batch_size=1)
    assert generate(single) == texts
    assert counted == report(single)["sparsity"]["masked_tokens"]
    assert prompts < counted <= prompts + 3 * 11  # the last token of each is not read


def test_counts_of_several_processes_are_added(base, spon50, monkeypatch):
    lm = sparse(base, spon50)

    def gather(parts, own):
        parts[:] = [own, own + own]

    monkeypatch.setattr(SponHFLM, "world_size", 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    lm._gathered(None)
    monkeypatch.undo()
    alone = loglikelihood(lm)
    once = report(lm)["sparsity"]
    monkeypatch.setattr(SponHFLM, "world_size", 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert lm._gathered(alone) is alone
    thrice = report(lm)["sparsity"]
    assert thrice["masked_tokens"] == 3 * once["masked_tokens"] > 0
    assert thrice["sites"] == once["sites"] and thrice["measured"] == once["measured"]


def test_report(base, spon50):
    lm = sparse(base, spon50, alpha="off", tokens="decode", dense_prefix=2)
    spon = report(lm)
    adapter = read_adapter(spon50)
    assert spon["adapter"] == str(spon50) and spon["adapter_sha256"] == adapter.digest
    assert (spon["alpha"], spon["tokens"], spon["dense_prefix"]) == ("off", "decode", 2)
    assert spon["config"]["sparsity"] == spon["sparsity"]["target"] == 0.5
    assert spon["config"]["peft_type"] == "SPON"
    assert spon["sparsity"]["measured"] is None
    assert isinstance(spon["kernel"], str) and spon["kernel"]


# --- what is refused, before a model is loaded ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"spon": None}, "spon: got None, expected an adapter directory", id="spon-missing"),
        pytest.param({"peft": "lora"}, "peft: got 'lora', expected nothing beside spon=", id="peft"),
        pytest.param({"delta": "weights"}, "delta: got 'weights', expected nothing beside spon=", id="delta"),
        pytest.param({"tp_plan": "auto"}, "tp_plan: got 'auto', expected nothing beside spon=", id="tensor-parallel"),
        pytest.param({"tokens": "some"}, "tokens: got 'some', expected one of all, decode", id="tokens"),
        pytest.param({"alpha": "maybe"}, "alpha: got 'maybe', expected on, or off", id="alpha"),
        pytest.param({"alpha": 1}, "alpha: got 1, expected on, or off", id="alpha-number"),
        pytest.param({"dense_prefix": -1}, "dense_prefix: got -1, expected a whole number", id="dense-prefix"),
        pytest.param({"dense_prefix": True}, "dense_prefix: got True, expected a whole number", id="dense-prefix-bool"),
        pytest.param({"spon": "./nowhere"}, "adapter: got 'nowhere', expected a directory", id="no-directory"),
        pytest.param({"spon": "no-such/adapter"}, "spon: got 'no-such/adapter', expected an adapter", id="no-hub-id"),
    ],
)
def test_wrong_arguments(base, spon50, arguments, message):
    with pytest.raises(SponError, match=message):
        build(SponHFLM, base, **{"spon": str(spon50), **arguments})


def test_adapter_for_another_base(spon50, base, tmp_path):
    make_tiny_llama(hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SponError, match=f"The adapter was made for '{base}'; load that model"):
        sparse(tmp_path, spon50)


def test_adapter_that_names_no_base(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", 0.1, 0.0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(SponError, match="base_model_name_or_path: got None, expected the base model's name"):
        SponHFLM(spon=str(adapter), device="cpu")


def test_encoder_decoder(spon50, base, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=256, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SponError, match="a seq2seq model', expected a decoder"):
        sparse(tmp_path, spon50)


def test_alpha_switch_as_yaml_reads_it(base, spon50):
    assert report(sparse(base, spon50, alpha=False))["alpha"] == "off"
    assert report(sparse(base, spon50, alpha=True))["alpha"] == "on"


def test_adapter_without_alphas_is_reported_as_such(base, spon50, tmp_path):
    write(read_adapter(spon50).without_alpha(), tmp_path / "teal")
    lm = sparse(base, tmp_path / "teal")
    assert report(lm)["alpha"] == "off"
    want = expected(spon50, "all", alpha=False)
    torch.testing.assert_close(values(loglikelihood(lm)), values(want), **CLOSE)


# --- registration ---


def test_registered_under_its_name():
    spon_lm_eval.register()
    spon_lm_eval.register()
    assert get_model("spon-hf") is SponHFLM
    assert get_model("hf") is HFLM


def test_another_model_of_that_name(monkeypatch):
    monkeypatch.setattr(model_registry, "_objs", {**model_registry._objs, "spon-hf": "other.package:Model"})
    with pytest.raises(RuntimeError, match="other.package:Model is registered as the lm-eval model spon-hf"):
        spon_lm_eval.register()


def test_adapter_for_a_model_of_another_name_is_logged(base, spon50, tmp_path, caplog):
    (tmp_path / "copy").symlink_to(base)
    with caplog.at_level(logging.INFO, logger="spon_lm_eval"):
        sparse(tmp_path / "copy", spon50)
    assert f"The adapter was made for {base}; it is put on {tmp_path / 'copy'}." in caplog.text
