# SPDX-License-Identifier: Apache-2.0
"""Attention of one token on a CPU, as blocks' programs compute it, beside torch's, in one run.

    python -m benchmarks.attention --dtype float32,bfloat16

Both read keys and values of `--lengths` tokens; ours turns query and key and writes the latter besides. Microseconds,
the median of calls in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from spon_plugin.kernels.cpu import block
from spon_plugin.kernels.cpu import block_layout as fields
from spon_plugin.kernels.cpu.program import Program
from spon_plugin.machine import DTYPES, device_name

HEADS = {"smollm2": (9, 3, 64), "qwen2.5-0.5b": (14, 2, 64), "llama3-8b": (32, 8, 128)}
"""Model -> heads, heads of keys and values, length of a key."""


def calls(shape: tuple[int, int, int], length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by its name."""
    heads, kv_heads, size = shape
    q, k, v = (torch.randn(n * size, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    cos, sin, out = torch.ones(size, dtype=dtype), torch.zeros(size, dtype=dtype), torch.empty_like(q)
    keys, values = torch.randn(2, 1, kv_heads, length, size).to(dtype)
    scratch = torch.empty(block.attend_words(torch.get_num_threads(), size, length))
    program = Program([block.attend(q, k, v, size, size**-0.5, out)])
    names = (fields.COS, fields.SIN, fields.KEYS, fields.VALUES, fields.SCRATCH, fields.CAPACITY, fields.LENGTH)
    addresses = [tensor.data_ptr() for tensor in (cos, sin, keys, values, scratch)]
    for name, value in zip(names, (*addresses, length, length - 1), strict=True):
        program.words[program.place(0, name)] = value
    row = q.view(1, heads, 1, size)
    # The closure keeps alive what the program knows the addresses of.
    held = (q, k, v, cos, sin, out, keys, values, scratch)
    return {
        "ours": lambda: (program.run(), held),
        "torch": lambda: scaled_dot_product_attention(row, keys, values, enable_gqa=heads != kv_heads),
    }


@torch.no_grad()
def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--lengths", default="64,512,2048,8192", help="comma-separated: tokens")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{device_name(torch.device('cpu'))}\n")
    print("| heads of | dtype | tokens | ours | torch | torch / ours |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for dtype in arguments.dtype.split(","):
        for model, shape in HEADS.items():
            for length in (int(value) for value in arguments.lengths.split(",")):
                timed = calls(shape, length, DTYPES[dtype])
                times: dict[str, list[float]] = {name: [] for name in timed}
                for _ in range(arguments.rounds):
                    for name, call in timed.items():
                        start = time.perf_counter()
                        call()
                        times[name].append(time.perf_counter() - start)
                ours, torchs = (1e6 * statistics.median(values) for values in times.values())
                print(f"| {model} | {dtype} | {length} | {ours:.0f} | {torchs:.0f} | {torchs / ours:.2f} |")


if __name__ == "__main__":
    main()
