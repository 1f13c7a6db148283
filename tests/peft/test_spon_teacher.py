# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from spon_models import ids, sparse
from transformers import TrainingArguments

from spon_peft import SponTrainer
from spon_peft.teacher import TeacherStates
from spon_plugin import SponError


def run(model, tmp_path, epochs, **options):
    tokens = ids(4, 10)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        per_device_train_batch_size=2, num_train_epochs=epochs, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = SponTrainer(model, arguments, train_dataset=data, **options)
    trainer.train()
    return {n: p.detach() for n, p in model.named_parameters() if "spon_alpha" in n}, trainer._teacher


@pytest.mark.parametrize("kept", ["all", "half"])
def test_states_that_are_kept_train_the_same_alphas(kept, tmp_path):
    fresh, _ = run(sparse("llama"), tmp_path / "a", 3, teacher_bytes=0)
    _, whole = run(sparse("llama"), tmp_path / "b", 3)
    limit = whole.nbytes if kept == "all" else whole.nbytes // 2
    again, teacher = run(sparse("llama"), tmp_path / "c", 3, teacher_bytes=limit)
    assert 0 < teacher.nbytes <= limit
    for name, alpha in fresh.items():
        # A row's states depend on its batch by rounding alone, and rows come together in other batches.
        torch.testing.assert_close(again[name], alpha, rtol=1e-3, atol=1e-5)


def test_one_epoch_keeps_nothing(tmp_path):
    assert run(sparse("llama"), tmp_path, 1)[1].nbytes == 0


def test_a_dense_model_that_trains_is_not_kept(tmp_path):
    model = sparse("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad_(True)
    assert run(model, tmp_path, 2)[1].nbytes == 0


def test_known_rows_are_not_computed_again():
    teacher, calls = TeacherStates(), []
    tokens, counted = ids(3, 6), torch.ones(3, 5, dtype=torch.bool)

    def states(order):
        def compute():
            calls.append(order)
            return torch.cat([torch.full((5, 2), float(row)) for row in order])

        return teacher.of({"input_ids": tokens[order]}, counted, compute)

    first = states([0, 1, 2])
    torch.testing.assert_close(states([2, 0, 1]).view(3, 5, 2)[:, 0, 0], torch.tensor([2.0, 0.0, 1.0]))
    assert len(calls) == 1 and first.shape == (15, 2)
    teacher.of({"input_ids": tokens}, counted[:, :3], lambda: torch.zeros(9, 2))
    assert len(teacher._kept) == 6, "other tokens that count are other states"


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(2, 4), "text"], ids=["scalar", "of no row", "text"])
def test_inputs_that_belong_to_no_row_are_not_kept(value):
    teacher = TeacherStates()
    for _ in range(2):
        teacher.of(
            {"input_ids": ids(3, 6), "other": value}, torch.ones(3, 5, dtype=torch.bool), lambda: torch.ones(15, 2)
        )
    assert teacher.nbytes == 0


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(SponError, match="teacher_bytes: got -1"):
        run(sparse("llama"), tmp_path, 1, teacher_bytes=-1)
