# SPDX-License-Identifier: Apache-2.0
"""A long run against `vllm serve` with an adapter on a quantized base: bursts, mixed lengths, cancelled requests.

    spon quantize MODEL --bits 8 -o MODEL-w8
    python -m benchmarks.soak MODEL-w8 --adapter spon50 --requests 10000 --json FILE
    python -m benchmarks.soak MODEL-w8 --adapter spon50 -- --enforce-eager          # the rest goes to `vllm serve`

The server runs in token mode ``all``, in float32, with ``exact``, and in steps of at most as many tokens as the sparse
kernels take on a CPU: there every row is summed in the same order whatever else is in the step, so that an answer does
not depend on what it is batched with. Every prompt is first asked alone, greedily; what the same server says later,
among others, is compared token by token, and at the end every prompt is asked alone again. With other arguments of
`vllm serve` the order of sums changes, and with masks that is enough to change tokens: an answer that differs counts as
parted where the two likeliest tokens were within ``--near`` in the answer alone, and as wrong elsewhere.

Requests come in waves of 1 to ``--concurrency``; one in ten is cancelled, half of those before a token has come. A
request is lost that ends in an error or with another number of tokens than asked for. At the end the server must say
that it holds none, and no key-value block. Memory is what the server's processes hold (RSS), sampled with every wave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoTokenizer

from benchmarks.serve import server_process, split_words
from spon_plugin.calibration.text import offline_text
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.machine import device_name

LENGTHS = (1, 2, 3, 5, 8, 13, 21)
TOKENS = (1, 2, 4, 8)
WAVES = (1, 2, 4, 8, 16, 32)
LONG = 64
"""Tokens that a request asks for which is to be cancelled."""
FIELDS = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


@dataclass
class Answer:
    """What a prompt gets alone: greedy tokens, and the gap in logprob from each to the second-likeliest."""

    tokens: list[int]
    gaps: list[float]


@dataclass
class Counts:
    """What has happened so far.

    Attributes:
        sent: requests, cancelled ones included.
        cancelled: by the client, before their end.
        completed: with as many tokens as asked for.
        parted: of these, answers that part from that of the prompt alone where both tokens are nearly as likely.
        wrong: where they are not.
        gaps: at the tokens where answers part.
        lost: what was wrong with requests that ended otherwise.
        seconds: from sending to the end, of completed requests.
        memory: (requests sent, bytes) over the run.
    """

    sent: int = 0
    cancelled: int = 0
    completed: int = 0
    parted: int = 0
    wrong: int = 0
    gaps: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)


class Client:
    """Sends completions to one server."""

    def __init__(self, session: aiohttp.ClientSession, address: str, model: str) -> None:
        self.session, self.address, self.model = session, address, model

    async def alone(self, prompt: Sequence[int]) -> Answer:
        """Ask for the longest answer to one prompt."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max(TOKENS), "logprobs": 2, **FIELDS}
        async with self.session.post(f"{self.address}/v1/completions", json=body) as response:
            response.raise_for_status()
            choice = (await response.json())["choices"][0]
        likeliest = [sorted(step.values(), reverse=True) for step in choice["logprobs"]["top_logprobs"]]
        return Answer(choice["token_ids"], [values[0] - values[1] for values in likeliest])

    async def among_others(
        self, prompt: Sequence[int], count: int, reference: Answer, counts: Counts, near: float
    ) -> None:
        """Ask for `count` tokens, and compare."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": count, **FIELDS}
        start = time.perf_counter()
        try:
            async with self.session.post(f"{self.address}/v1/completions", json=body) as response:
                response.raise_for_status()
                tokens = (await response.json())["choices"][0]["token_ids"]
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            counts.lost.append(f"{type(error).__name__}: {error}"[:200])
            return
        if len(tokens) != count:
            counts.lost.append(f"{len(tokens)} tokens of {count}")
            return
        counts.completed += 1
        counts.seconds.append(time.perf_counter() - start)
        parts = [gap for own, other, gap in zip(tokens, reference.tokens, reference.gaps, strict=False) if own != other]
        if parts:
            counts.gaps.append(parts[0])
            counts.parted += parts[0] <= near
            counts.wrong += parts[0] > near

    async def cancel(self, prompt: Sequence[int], wait: float | None, counts: Counts) -> None:
        """Ask for many tokens and hang up: after `wait` seconds, or when the first one is there (None)."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": LONG, "stream": True, **FIELDS}
        try:
            async with asyncio.timeout(wait):
                async with self.session.post(f"{self.address}/v1/completions", json=body) as response:
                    response.raise_for_status()
                    await response.content.readline()
                    await asyncio.sleep(0 if wait is None else 3600)
        except TimeoutError:
            pass
        except aiohttp.ClientError as error:
            counts.lost.append(f"{type(error).__name__}: {error}"[:200])
            return
        counts.cancelled += 1

    async def metrics(self) -> dict[str, float]:
        """Sums of the server's figures over their labels, by name."""
        async with self.session.get(f"{self.address}/metrics") as response:
            found: dict[str, float] = {}
            for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", await response.text(), re.M):
                found[name] = found.get(name, 0.0) + float(value)
            return found


def resident(session: int) -> int:
    """Bytes that the processes of a session hold in memory."""
    pages = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
                pages += int((folder / "statm").read_text().split()[1]) if int(after_name[3]) == session else 0
            except (OSError, IndexError):
                continue  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE")


async def soak(address: str, process: int, arguments: argparse.Namespace) -> tuple[Counts, dict[str, Any]]:
    """Run against the server at `address`; its counts, and what was found at the end."""
    choose, counts = random.Random(arguments.seed), Counts()
    text = AutoTokenizer.from_pretrained(arguments.model)(offline_text()[: 500 * arguments.prompts]).input_ids
    starts = range(0, arguments.prompts * max(LENGTHS), max(LENGTHS))
    prompts = [text[start : start + LENGTHS[index % len(LENGTHS)]] for index, start in enumerate(starts)]
    connector, timeout = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = Client(session, address, arguments.model)
        references = [await client.alone(prompt) for prompt in prompts]
        start = shown = time.monotonic()
        end = start + 60 * arguments.minutes
        while counts.sent < arguments.requests and time.monotonic() < end:
            size = min(
                choose.choice([n for n in WAVES if n <= arguments.concurrency]), arguments.requests - counts.sent
            )
            wave = []
            for _ in range(size):
                index = choose.randrange(len(prompts))
                if choose.random() < 0.1:
                    wait = choose.uniform(0, 0.1) if choose.random() < 0.5 else None
                    wave.append(client.cancel(prompts[index], wait, counts))
                else:
                    count = choose.choice(TOKENS)
                    wave.append(client.among_others(prompts[index], count, references[index], counts, arguments.near))
            counts.sent += size
            await asyncio.gather(*wave)
            counts.memory.append((counts.sent, resident(process)))
            if time.monotonic() > shown + 15 or counts.sent >= arguments.requests:
                shown = time.monotonic()
                print(
                    f"{counts.sent} sent in {shown - start:.0f} s: {counts.completed} completed, "
                    f"{counts.parted} parted, {counts.wrong} wrong, {counts.cancelled} cancelled, "
                    f"{len(counts.lost)} lost; {counts.memory[-1][1] / 2**20:.0f} MiB", file=sys.stderr, flush=True,
                )  # fmt: skip
        seconds = time.monotonic() - start
        await asyncio.sleep(2)
        held = {k: v for k, v in (await client.metrics()).items() if k in ("vllm:num_requests_running",
                "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")}  # fmt: skip
        again = [await client.alone(prompt) for prompt in prompts]
    changed = sum(one.tokens != other.tokens for one, other in zip(references, again, strict=True))
    return counts, {"seconds": seconds, "held_at_the_end": held, "alone_again_differs": changed}


def summary(counts: Counts, ends: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run."""
    memory, times = counts.memory, sorted(counts.seconds) or [0.0]
    tenth = max(1, len(memory) // 10)
    first, last = (statistics.mean(size for _, size in part) for part in (memory[:tenth], memory[-tenth:]))
    return {
        "requests": counts.sent, "completed": counts.completed, "cancelled": counts.cancelled, "lost": len(counts.lost),
        "reasons_of_loss": sorted(set(counts.lost))[:10],
        "equal": counts.completed - counts.parted - counts.wrong, "parted_at_a_near_tie": counts.parted,
        "wrong": counts.wrong, "largest_gap_where_parted": max(counts.gaps, default=0.0),
        "median_gap_where_parted": statistics.median(counts.gaps) if counts.gaps else 0.0, **ends,
        "resident_mib_first_tenth": first / 2**20, "resident_mib_last_tenth": last / 2**20,
        "resident_mib": {sent: round(size / 2**20) for sent, size in memory[:: max(1, tenth // 2)]},
        "latency_ms": {f"p{share}": 1e3 * times[int(share / 100 * (len(times) - 1))] for share in (50, 99)},
    }  # fmt: skip


def main() -> None:
    """Run from the command line; the exit status is 1 where something was lost, wrong, held, or memory grew by 5%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="send no more after that")
    parser.add_argument("--prompts", type=int, default=63, help="distinct ones")
    parser.add_argument("--concurrency", type=int, default=32, help="the most requests at once")
    parser.add_argument("--near", type=float, default=0.0, help="logprobs so near may change places by rounding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("serve", nargs="*", help="after --: more arguments of vllm serve")
    own, extra = split_words(sys.argv[1:])
    arguments = parser.parse_args(own)
    settings = {"quant_method": "spon", "adapter": str(arguments.adapter.resolve()), "token_mode": "all", "exact": True}
    command = [arguments.model, "--quantization", "spon", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--max-num-seqs", "8", "--max-num-batched-tokens", str(CPU_ROWS)]
    command += ["--hf-overrides", json.dumps({"quantization_config": settings}), *extra]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SPON_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with server_process(command, environment, log) as (process, address):
            counts, ends = asyncio.run(soak(address, process.pid, arguments))
        said = [line.partition("SPON: ")[2] for line in log.read_text().splitlines() if "SPON: adapter" in line]
    result = summary(counts, ends)
    result = {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "vllm": version("vllm"), "torch": torch.__version__, "model": Path(arguments.model).name,
        "serve_arguments": [*command[1:11], *extra], "settings": {**settings, "adapter": arguments.adapter.name},
        "served": re.sub(r"adapter \S+,", "adapter,", said[0]) if said else "",
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_CPU_", "OMP_"))},
        "prompts": arguments.prompts, "near": arguments.near, **result,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    grown = result["resident_mib_last_tenth"] > 1.05 * result["resident_mib_first_tenth"]
    sys.exit(bool(counts.lost or counts.wrong or grown or any(ends["held_at_the_end"].values())))


if __name__ == "__main__":
    main()
