# SPDX-License-Identifier: Apache-2.0
"""Ways to call one model on some sequences that give each the logits it has alone, whatever else is in the pass.

A style takes a model and token ids ``[1, length]`` each, and returns logits ``[length, vocabulary]`` for each.
"""

import inspect
import threading

import torch
import transformers
from transformers import DynamicCache, StaticCache

from spon_plugin.decoder.head import OutputHead

SIZES = dict(vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
ROTARY = dict(SIZES, intermediate_size=24, num_key_value_heads=1, head_dim=8, pad_token_id=0)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", ROTARY),
    "qwen2": ("Qwen2ForCausalLM", ROTARY),
    "qwen3": ("Qwen3ForCausalLM", ROTARY),
    "mistral": ("MistralForCausalLM", dict(ROTARY, sliding_window=5)),
    "gemma3_text": ("Gemma3ForCausalLM", dict(ROTARY, sliding_window=5, num_hidden_layers=3, sliding_window_pattern=2)),
    "phi3": ("Phi3ForCausalLM", ROTARY),
    "gpt_neox": ("GPTNeoXForCausalLM", dict(SIZES, intermediate_size=24)),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "opt": ("OPTForCausalLM", dict(SIZES, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0)),
}
_NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, dropout=0.0)


def random_model(kind, seed):
    """A model in float64, in which no rounding moves an entry over a threshold."""
    name, arguments = ARCHITECTURES[kind]
    cls = getattr(transformers, name)
    more = _NO_DROPOUT if kind in ("gpt2", "opt") else {}
    torch.manual_seed(seed)
    model = cls(cls.config_class(**arguments, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.3)
    return model.double()


def alone(model, sequences):
    return [model(input_ids=ids).logits[0] for ids in sequences]


def by_position(model, sequences):
    names = list(inspect.signature(model.forward).parameters)
    more = [torch.ones(1, 64, dtype=torch.long)] if names[1] == "attention_mask" else []
    return [model(ids, *(mask[:, : ids.shape[1]] for mask in more)).logits[0] for ids in sequences]


def _batch(sequences, left):
    longest = max(ids.shape[1] for ids in sequences)
    batch, mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    for row, ids in enumerate(sequences):
        place = slice(longest - ids.shape[1], None) if left else slice(ids.shape[1])
        batch[row, place], mask[row, place] = ids[0], 1
    return batch, mask


def _split(logits, mask):
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


def right_padding(model, sequences):
    ids, mask = _batch(sequences, left=False)
    return _split(model(input_ids=ids, attention_mask=mask).logits, mask)


def left_padding(model, sequences):
    ids, mask = _batch(sequences, left=True)
    return _split(model(input_ids=ids, attention_mask=mask).logits, mask)


def left_padding_with_positions(model, sequences):
    ids, mask = _batch(sequences, left=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return _split(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits, mask)


def left_padding_by_position(model, sequences):
    if list(inspect.signature(model.forward).parameters)[1] != "attention_mask":
        return None
    ids, mask = _batch(sequences, left=True)
    return _split(model(ids, mask).logits, mask)


def left_padding_4d(model, sequences):
    if not _same_mask_everywhere(model):
        return None
    ids, mask = _batch(sequences, left=True)
    open_ = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & mask[:, None, None].bool()
    open_ = open_ | torch.eye(ids.shape[1], dtype=torch.bool)  # padding sees itself, as nobody else does
    full = torch.zeros(open_.shape, dtype=torch.float64).masked_fill(~open_, torch.finfo(torch.float64).min)
    return _split(model(input_ids=ids, attention_mask=full).logits, mask)


def _same_mask_everywhere(model):
    return getattr(model.config, "sliding_window", None) is None


def _packed(sequences):
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])[None]
    return torch.cat(sequences, 1), positions, [ids.shape[1] for ids in sequences]


def packed(model, sequences):
    ids, positions, lengths = _packed(sequences)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].split(lengths)


def packed_4d(model, sequences):
    if not _same_mask_everywhere(model):
        return None
    ids, _, lengths = _packed(sequences)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    open_ = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & (number[:, None] == number)
    return model(input_ids=ids, attention_mask=open_[None, None], use_cache=False).logits[0].split(lengths)


def in_chunks(model, sequences, cache=DynamicCache, size=3):
    return [torch.cat([part[0] for part in _chunks(model, ids, cache, size)]) for ids in sequences]


def _chunks(model, ids, cache, size, first=None):
    config = model.config
    past = cache(config=config) if cache is DynamicCache else cache(config=config, max_cache_len=32)
    begin = 0
    while begin < ids.shape[1]:
        end = begin + (size if first is None or begin else first)
        yield model(input_ids=ids[:, begin:end], past_key_values=past, use_cache=True).logits
        begin = end


def one_at_a_time(model, sequences):
    return [*in_chunks(model, sequences[:1], size=1), *in_chunks(model, sequences[1:], size=5)]


def static_cache(model, sequences):
    return in_chunks(model, sequences, StaticCache)


def left_padding_on_a_cache(model, sequences):
    return _padded_on_a_cache(model, sequences, DynamicCache)


def left_padding_on_a_static_cache(model, sequences):
    return _padded_on_a_cache(model, sequences, StaticCache)


def _padded_on_a_cache(model, sequences, cache, first=3):
    ids, mask = _batch(sequences, left=True)
    past = cache(config=model.config) if cache is DynamicCache else cache(config=model.config, max_cache_len=32)
    positions, parts = (mask.cumsum(-1) - 1).clamp(min=0), []
    for begin, end in ((0, first), *((i, i + 1) for i in range(first, ids.shape[1]))):
        given = dict(attention_mask=mask[:, :end], position_ids=positions[:, begin:end])
        parts.append(model(input_ids=ids[:, begin:end], past_key_values=past, use_cache=True, **given).logits)
    return _split(torch.cat(parts, 1), mask)


def backbone(model, sequences):
    head = OutputHead(model)
    return [head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)[0] for ids in sequences]


def embeddings(model, sequences):
    embed = model.get_input_embeddings()
    return [model(inputs_embeds=embed(ids)).logits[0] for ids in sequences]


def eager_attention(model, sequences):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return left_padding_with_positions(model, sequences)
    finally:
        model.set_attn_implementation(before)


def in_threads(model, sequences):
    first, second, *rest = sequences
    results = beside(
        model,
        lambda: left_padding_with_positions(model, [first, *rest])[0],
        lambda: left_padding_with_positions(model, [second, *rest])[0],
    )
    return [*results, *alone(model, rest)]


def beside(model, first, second):
    """Call `first` and, in another thread, `second` while a pass of the first is in the middle of a block."""
    results, entered, done = {}, threading.Event(), threading.Event()

    def wait(_module, _args):
        if threading.current_thread() is thread:
            entered.set()
            done.wait(20)

    def run():
        with torch.no_grad():
            results["first"] = first()

    # The second block, by the paths: merged layers are no linears to `decoder_blocks`.
    path = next(
        p for p, m in model.named_modules() if ".1." in p and getattr(getattr(m, "weight", None), "ndim", 0) == 2
    )
    handle = model.get_submodule(path).register_forward_pre_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    entered.wait(20)
    try:
        results["second"] = second()
    finally:
        done.set()
        thread.join()
        handle.remove()
    return results["first"], results["second"]


STYLES = {
    style.__name__: style
    for style in (
        by_position,
        right_padding,
        left_padding,
        left_padding_with_positions,
        left_padding_by_position,
        left_padding_4d,
        packed,
        packed_4d,
        in_chunks,
        one_at_a_time,
        static_cache,
        left_padding_on_a_cache,
        left_padding_on_a_static_cache,
        backbone,
        embeddings,
        eager_attention,
        in_threads,
    )
}
