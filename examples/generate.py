# SPDX-License-Identifier: Apache-2.0
"""Generate with a SPON adapter through PEFT. Nothing of spon-plugin is imported: PEFT finds the method by itself.

python examples/generate.py spon-quickstart/model spon-quickstart/adapter "The capital of France is"
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base: str, adapter: str, prompt: str) -> None:
    """Print the continuation of the dense model and of the sparse one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    inputs = tokenizer(prompt, return_tensors="pt")

    def continuation() -> str:
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("sparse:", continuation())
    with model.disable_adapter():
        print("dense: ", continuation())


if __name__ == "__main__":
    main(*sys.argv[1:])
