# SPDX-License-Identifier: Apache-2.0
"""Train a SPON adapter in your own script: calibrate with the core, train with `SponTrainer`, save with PEFT.

python examples/train_with_trainer.py MODEL TEXT.txt OUTPUT
"""

import sys
import tempfile

from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from spon_peft import SponTrainer
from spon_plugin import find_sites, write_adapter
from spon_plugin.sparsifiers.calibrate import calibrate
from spon_plugin.text import mixed_windows, read_text


def main(base: str, text: str, output: str, sparsity: float = 0.5, steps: int = 20) -> None:
    """Calibrate thresholds, train alphas, save the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    windows = mixed_windows(tokenizer, [read_text(text)], length=128, count=2 * steps + 8)

    adapter = calibrate(
        model, find_sites(model), windows[8:], windows[:8], sparsity=sparsity, alpha="zero", base_model=base
    )
    with tempfile.TemporaryDirectory() as directory:
        start = write_adapter(adapter, f"{directory}/teal")
        sparse = PeftModel.from_pretrained(model, start, is_trainable=True)
        sparse.print_trainable_parameters()
        trainer = SponTrainer(
            model=sparse,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=1.5e-3,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 10),
                logging_steps=max(1, steps // 10),
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=[{"input_ids": row} for row in windows[8:]],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
    sparse.save_pretrained(output)
    print(f"Adapter written to {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
