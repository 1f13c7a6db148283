# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from spon_models import ids, logits, sparse, tiny
from transformers import TrainingArguments

from spon_peft import SponConfig, SponLayer, SponTrainer, collect_adapter
from spon_plugin import SponError, sparse_inputs
from spon_plugin.training.distillation import kl_reference


def student(dtype=torch.float32, kind="llama", **config):
    """Thresholds that bite, alphas that train."""
    model = sparse(kind, dtype, **config)
    model.train()
    return model


def example(labels=None, mask=None, rows=slice(None)):
    tokens = ids(4, 10)
    batch = {"input_ids": tokens, "labels": tokens.clone() if labels is None else labels}
    if mask is not None:
        batch["attention_mask"] = mask
    return {name: value[rows] for name, value in batch.items()}


def trainer(model, tmp_path, temperature=1.0, data=(), **arguments):
    defaults = dict(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=1, max_steps=1,
        logging_strategy="no",
    )  # fmt: skip
    return SponTrainer(
        model, TrainingArguments(**defaults | arguments), train_dataset=list(data), temperature=temperature
    )


def alphas_grad(model):
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "spon_alpha" in n])


def by_hand(model, batch, temperature=1.0, prefix=0, kind="llama"):
    """The loss from whole logits and the core's hooks, with gradients from a copy of the alphas."""
    adapter, base = collect_adapter(model), tiny(kind)
    keep = batch["labels"][:, 1:] != -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        dense = base(**inputs).logits[:, :-1][keep]
        with sparse_inputs(base, adapter.masks, prefix):
            masked = base(**inputs).logits[:, :-1][keep]
    return kl_reference(masked, dense, temperature) / keep.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_loss_is_the_divergence_written_out(kind, prefix, temperature, tmp_path):
    model = student(kind=kind, dense_prefix=prefix)
    model.eval()  # GPT-2 has dropout
    labels = ids(4, 10)
    labels[0, :5] = labels[2, 7:] = -100
    batch = example(labels)
    loss = trainer(model, tmp_path, temperature).compute_loss(model, batch)
    torch.testing.assert_close(loss, by_hand(model, batch, temperature, prefix, kind))
    assert loss > 0.01


def test_padding_on_the_left(tmp_path):
    model = student(dense_prefix=1)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, :4] = 0
    labels = ids(4, 10)
    labels[mask == 0] = -100
    batch = example(labels, mask)
    torch.testing.assert_close(trainer(model, tmp_path).compute_loss(model, batch), by_hand(model, batch, prefix=1))


def test_gradient_is_the_loss_gradient(tmp_path):
    model = student(dense_prefix=0)
    run = trainer(model, tmp_path)
    run.compute_loss(model, example()).backward()
    layer = next(m for m in model.modules() if isinstance(m, SponLayer))
    alpha = layer.spon_alpha["default"]
    gradient, step = alpha.grad[3].item(), 1e-2
    values = []
    for sign in (1, -1):
        alpha.data[3] += sign * step
        values.append(run.compute_loss(model, example()).item())
        alpha.data[3] -= sign * step
    assert gradient == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=1e-4)


def test_only_alphas_train_and_the_model_is_left_as_it_was(tmp_path):
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = logits(tiny())
    trainer(model, tmp_path, data=[example(rows=0)] * 4, max_steps=2).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("spon_alpha" in name for name in changed)
    assert all(m.training for m in model.modules())
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), dense)


def test_frozen_training_modes_survive_the_teacher(tmp_path):
    model = student()
    frozen = model.base_model.model.lm_head
    frozen.eval()
    trainer(model, tmp_path).compute_loss(model, example())
    assert not frozen.training and model.training


def test_only_the_student_has_dropout(tmp_path):
    model, seen = student(kind="gpt2"), set()
    dropout = model.get_base_model().transformer.drop
    run = trainer(model, tmp_path)
    dropout.register_forward_hook(lambda m, *_: seen.add((torch.is_grad_enabled(), m.training)))
    run.compute_loss(model, example())
    assert seen == {(False, False), (True, True)}


@pytest.mark.parametrize("ragged", [False, True])
def test_accumulated_batches_are_one_batch(ragged, tmp_path):
    labels = ids(4, 10)
    if ragged:
        labels[0, 3:], labels[3, :8] = -100, -100
    rows = [{k: v[i] for k, v in example(labels).items()} for i in range(4)]
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = student()
        run = trainer(
            model, tmp_path, data=rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        gradients = []
        run.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        run.optimizer.register_step_pre_hook(lambda *_, m=model, g=gradients: g.append(alphas_grad(m).clone()))
        run.train()
        results.append((gradients[0], run.state.log_history[0]["loss"]))
    for gradient, loss in results[1:]:
        torch.testing.assert_close(gradient, results[0][0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(results[0][1], rel=1e-4)
    assert results[0][1] == pytest.approx(
        by_hand(student(), example(labels), prefix=SponConfig().dense_prefix).item(), rel=1e-3
    )


def test_decode_adapters_see_their_prompt_dense(tmp_path):
    model = student(tokens="decode", dense_prefix=0)
    labels = ids(4, 10)
    labels[:, :6] = -100
    loss = trainer(model, tmp_path).compute_loss(model, example(labels))
    # What serving does: the prompt in one pass, then token by token on the cache.
    tokens, base = ids(4, 10), tiny()
    model.eval()
    with torch.no_grad():
        out = model(input_ids=tokens[:, :6], use_cache=True)
        steps, cache = [out.logits[:, -1:]], out.past_key_values
        for i in range(6, 9):
            out = model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
        served, dense = torch.cat(steps, 1), logits(base, tokens)[:, 5:9]
    torch.testing.assert_close(loss, kl_reference(served.flatten(0, 1), dense.flatten(0, 1)) / 16)


@pytest.mark.parametrize("tokens", ["all", "decode"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, tokens, tmp_path):
    results = []
    labels = ids(4, 10)
    labels[:, :4] = -100
    for checkpointing in (False, True):
        model = student(tokens=tokens, dense_prefix=2)
        run = trainer(
            model, tmp_path, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )  # fmt: skip
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is checkpointing
        run.compute_loss(model, example(labels)).backward()
        results.append(alphas_grad(model))
    assert torch.equal(*results)


def test_bfloat16_base_trains_float32_alphas(tmp_path):
    model = student(torch.bfloat16)
    before = collect_adapter(model)
    trainer(model, tmp_path, data=[example(rows=0)] * 2, learning_rate=1e-5).train()
    after = collect_adapter(model)
    moved = [(after.masks[name].alpha - mask.alpha).abs().max() for name, mask in before.masks.items()]
    assert all(0 < step < 2e-5 for step in moved)  # a step this small would vanish in bfloat16


def test_autocast(tmp_path):
    model = student()
    run = trainer(model, tmp_path, bf16=True)
    loss = run.compute_loss(model, example())
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(model, example(), prefix=SponConfig().dense_prefix).item(), rel=0.5)
    assert alphas_grad(model).isfinite().all() and alphas_grad(model).dtype == torch.float32


def test_resumed_training_is_the_same_training(tmp_path):
    rows = [{k: v[i] for k, v in example().items()} for i in range(4)]
    model = student()
    trainer(model, tmp_path / "a", data=rows, max_steps=4, save_strategy="steps", save_steps=2).train()
    again = student(seed=50)
    run = trainer(again, tmp_path / "b", data=rows, max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert collect_adapter(again).digest == collect_adapter(model).digest


def test_evaluation_gives_the_same_loss(tmp_path):
    model = student()
    rows = [{k: v[i] for k, v in example().items()} for i in range(4)]
    run = trainer(model, tmp_path, per_device_eval_batch_size=4)
    metrics = run.evaluate(rows)
    expected = by_hand(model, example(), prefix=SponConfig().dense_prefix)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_unknown_heads_use_full_logits(tmp_path, monkeypatch):
    model = student(dense_prefix=0)
    base = model.get_base_model()
    forward = type(base).forward

    def odd(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * torch.arange(1, 65)
        return out

    monkeypatch.setattr(type(base), "forward", odd)
    with pytest.warns(UserWarning, match="full logits"):
        loss = trainer(model, tmp_path).compute_loss(model, example())
    torch.testing.assert_close(loss, by_hand(model, example()))


def test_trained_heads_use_full_logits(tmp_path):
    model = student(modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="output head is trained"):
        trainer(model, tmp_path).compute_loss(model, example()).backward()
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.grad.abs().sum() > 0


def test_wrong_use_is_said(tmp_path):
    with pytest.raises(SponError, match="SPON adapter"):
        trainer(get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    with pytest.raises(SponError, match="temperature"):
        trainer(student(), tmp_path, temperature=0.0)
    model = student()
    with pytest.raises(SponError, match="labels"):
        trainer(model, tmp_path).compute_loss(model, {"input_ids": ids()})
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(SponError, match="a decoder"):
        trainer(get_peft_model(transformers.T5ForConditionalGeneration(config), SponConfig()), tmp_path)


def test_no_tokens_give_no_loss(tmp_path):
    model = student()
    loss = trainer(model, tmp_path).compute_loss(model, example(torch.full((4, 10), -100)))
    loss.backward()
    assert loss == 0 and not alphas_grad(model).any()
