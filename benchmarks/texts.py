# SPDX-License-Identifier: Apache-2.0
"""Write texts of the README as plain files: two to evaluate on, and Python's language reference to train on.

    python -m benchmarks.texts OUT                 # from the Hugging Face hub (needs the datasets package)
    python -m benchmarks.texts OUT --data FOLDER   # from wikitext2/wiki.test.raw, tasks/lambada_openai/test.jsonl
    python -m benchmarks.texts OUT --sample MODEL  # only sampled.txt: what the model writes by itself

`wikitext2.txt` is WikiText-2 raw test as the hub's data set joins it (lines with their newline, joined by two more);
`lambada.txt` is the test passages of OpenAI's LAMBADA, joined by an empty line. `python_docs.txt` comes with Python.
`sampled.txt` is text to train on where there is none, as `spon sample` makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spon_plugin.calibration.text import offline_text
from spon_transformers.loading import load_model, load_tokenizer
from spon_transformers.samples import sample_documents
from spon_transformers.text_sources import text_sources


def main(
    output: Annotated[Path, typer.Argument(help="The folder to write to.")],
    data: Annotated[Path | None, typer.Option(help="A folder with the raw files; the hub by default.")] = None,
    sample: Annotated[str | None, typer.Option(help="A model to sample from: writes sampled.txt only.")] = None,
    tokens: Annotated[int, typer.Option(help="How many to sample.")] = 32768,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of each sample.")] = 256,
    batch: Annotated[int, typer.Option(help="Samples at a time: hundreds on a GPU.")] = 32,
) -> None:
    """Write wikitext2.txt, lambada.txt and python_docs.txt, or sampled.txt."""
    if sample is not None:
        model, tokenizer = load_model(sample, "auto"), load_tokenizer(sample)
        documents = sample_documents(model, tokenizer, tokens, length, batch, seed, progress=shown)
        write(output, {"sampled.txt": "\n\n".join(documents)})
        return
    if data is None:
        wiki, lambada = (
            source.text
            for source in text_sources(
                None, ["Salesforce/wikitext:wikitext-2-raw-v1@test", "EleutherAI/lambada_openai@test"]
            )
        )
    else:
        raw = (data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
        wiki = "\n\n".join(f"{line}\n" if line.strip() else "" for line in raw.split("\n"))
        rows = (data / "tasks" / "lambada_openai" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        lambada = "\n\n".join(json.loads(row)["text"] for row in rows)
    write(output, {"wikitext2.txt": wiki, "lambada.txt": lambada, "python_docs.txt": offline_text()})


def shown(done: int, _tokens: int) -> None:
    """Say how many tokens have been sampled."""
    print(f"{done} tokens", flush=True)


def write(output: Path, texts: dict[str, str]) -> None:
    """Write each text as a file."""
    output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
        print(output / name, len(text), "characters")


if __name__ == "__main__":
    typer.run(main)
