# SPDX-License-Identifier: Apache-2.0
"""What a token takes where several processes want the same cores, beside another checkout in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.contention MERGED
    OMP_NUM_THREADS=2 python -m benchmarks.contention MERGED --processes 1,2 --against ../before

Processes decode the same model, each with all of ``OMP_NUM_THREADS`` threads, and begin together; the figures are those
of all their tokens. A mean far above the median is time in which threads wait for one that does not run. Runs end after
``--seconds``, however few tokens that gave.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

PROMPT, WARM_UP = 32, 4


@torch.no_grad()
def decode(model: str, dtype: str, seconds: float) -> list[float]:
    """Seconds of each token of a merged checkpoint; begins once a line can be read from standard input."""
    from transformers import AutoModelForCausalLM

    from spon_plugin.machine import DTYPES

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    ids = torch.randint(0, loaded.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    out = loaded(ids, use_cache=True)

    def step() -> None:
        nonlocal out
        out = loaded(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

    for _ in range(WARM_UP):  # compiles what there is to compile
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    ends = [time.perf_counter()]
    while len(ends) == 1 or ends[-1] - ends[0] < seconds:
        step()
        ends.append(time.perf_counter())
    return [end - start for start, end in pairwise(ends)]


def together(checkout: Path, arguments: argparse.Namespace, count: int) -> list[float]:
    """Seconds of the tokens of `count` processes that import the packages of a checkout."""
    # Not at the top: a process of another checkout would look for it there.
    from benchmarks.checkouts import environment

    command, env = [sys.executable, __file__, *sys.argv[1:], "--decode"], environment(checkout)
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    processes = [
        subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=nothing, text=True) for _ in range(count)
    ]
    for process in processes:
        if process.stdout is None or process.stdout.readline().strip() != "ready":
            sys.exit(f"{checkout}: a process could not load {arguments.model}")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    spent: list[float] = []
    for process in processes:
        spent += json.loads(process.communicate()[0].splitlines()[-1])
    return spent


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("model", help="a merged checkpoint")
    own.add_argument("--processes", default="1,2", help="at a time, comma-separated")
    own.add_argument("--against", type=Path, action="append", default=[], help="another checkout; may repeat")
    own.add_argument("--dtype", default="bfloat16")
    own.add_argument("--seconds", type=float, default=8.0, help="of decoding")
    own.add_argument("--json", type=Path, help="where to write the figures")
    own.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    return own


def main() -> None:
    """Run the command line."""
    arguments = parser().parse_args()
    if arguments.decode:
        print(json.dumps(decode(arguments.model, arguments.dtype, arguments.seconds)))
        return
    from benchmarks.checkouts import checkouts
    from spon_plugin.machine import device_name

    rows = []
    device = device_name(torch.device("cpu"))
    print(f"{device}; {torch.get_num_threads()} threads a process, {arguments.dtype}\n")
    print("| checkout | processes | tokens | median ms | mean ms |\n|---|---:|---:|---:|---:|")
    for count in map(int, arguments.processes.split(",")):
        for name, checkout in checkouts(arguments.against).items():
            spent = together(checkout, arguments, count)
            median, mean = 1e3 * statistics.median(spent), 1e3 * statistics.fmean(spent)
            rows.append({"checkout": name, "processes": count, "tokens": len(spent), "median": median, "mean": mean})
            print(f"| {name} | {count} | {len(spent)} | {median:.1f} | {mean:.1f} |", flush=True)
    if arguments.json:
        found = {"device": device, "torch": torch.__version__, "dtype": arguments.dtype, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
