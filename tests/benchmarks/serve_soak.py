"""Many clients at one ``mbq serve``: is every request answered or refused, with its own answer, in flat memory?

Every prompt is first answered alone, greedily and at fixed bits; then clients of the official ``openai``
package ask for the same, whole and streamed, some leaving in mid-stream, and each answer is compared.
Prints the machine and a table, raw JSON on request; ends with status 1 when a request was lost or
mixed up, or memory or descriptors grew.

    python tests/benchmarks/serve_soak.py bundles/smollm2-135m-host [--seconds 120] [--clients 50] [--json FILE]
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import openai
from measured_on import measured_on

PROMPTS = 60
MAX_TOKENS = 12
LEAVING = 0.1  # share of streams left after their first text
GROWTH_BYTES, GROWTH_SHARE = 8 << 20, 0.03  # of resident memory, from the second quarter to the last: noise below


@contextmanager
def serving(bundle: Path, queue: int, bits: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "mbq_runtime.cli", "serve", str(bundle), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--queue", str(queue), "--bits", str(bits), "--cache-mb", "64"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+?:\d+", server.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        yield found[0]
    finally:
        server.terminate()
        server.wait()


def gauges(address: str) -> dict[str, float]:
    """/metrics, without labels."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.partition(" ") for line in lines if line[0] != "#")}


class Soak:
    """The clients, and what they met."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.memory: list[tuple[float, float]] = []  # bytes, descriptors
        self.alone: dict[str, str] = {}

    async def ask(self, prompt: str) -> str:
        found = await self.client.completions.create(**self._options(prompt))
        return str(found.choices[0].text)

    async def ask_in_stream(self, prompt: str, leave: bool) -> str | None:
        stream = await self.client.completions.create(**self._options(prompt), stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if leave:
                await stream.close()
                return None
        return text

    def _options(self, prompt: str) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS}

    async def run(self, clients: int, seconds: float) -> None:
        self.model = (await self.client.models.list()).data[0].id
        for i in range(PROMPTS):
            prompt = f"The story of number {i} begins in the town of {chr(65 + i % 26)}"
            self.alone[prompt] = await self.ask(prompt)
        end_s = time.monotonic() + seconds
        watching = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(random.Random(i), end_s) for i in range(clients)))
        watching.cancel()
        await self.client.close()

    async def _client(self, rng: random.Random, end_s: float) -> None:
        while time.monotonic() < end_s:
            prompt = rng.choice(list(self.alone))
            start_s = time.monotonic()
            try:
                if rng.random() < 0.5:
                    text = await self.ask_in_stream(prompt, rng.random() < LEAVING)
                else:
                    text = await self.ask(prompt)
            except openai.RateLimitError:
                self.counts["refused (429)"] += 1
                await asyncio.sleep(rng.uniform(0.1, 0.5))
            except openai.OpenAIError as error:
                self.counts[f"lost: {type(error).__name__}"] += 1
            else:
                self.counts["left" if text is None else "right" if text == self.alone[prompt] else "mixed up"] += 1
                self.seconds.append(time.monotonic() - start_s)

    async def _watch(self) -> None:
        while True:
            found = await asyncio.to_thread(gauges, self.address)
            self.memory.append((found["process_resident_memory_bytes"], found["process_open_fds"]))
            await asyncio.sleep(1)


def growth(samples: list[float]) -> float:
    """From the second quarter, when all has been used once, to the last."""
    quarter = max(len(samples) // 4, 1)
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter] or samples)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", type=float, default=120.0, show_default=True)
@click.option("--clients", type=int, default=50, show_default=True)
@click.option("--queue", type=int, default=16, show_default=True)
@click.option("--bits", type=float, default=4.0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(bundle: Path, seconds: float, clients: int, queue: int, bits: float, json_path: Path | None) -> None:
    """See the module's text."""
    with serving(bundle, queue, bits) as address:
        before = gauges(address)
        soak = Soak(address)
        asyncio.run(soak.run(clients, seconds))
        time.sleep(2)
        after = gauges(address)
    memory, descriptors = (list(column) for column in zip(*soak.memory, strict=True))
    result = {
        "environment": measured_on(),
        "bundle": bundle.name,
        "clients": clients,
        "queue": queue,
        "seconds": seconds,
        "requests": dict(soak.counts),
        "distinct_answers": len(set(soak.alone.values())),
        "seconds_per_answer_median": statistics.median(soak.seconds) if soak.seconds else None,
        "memory_mib": [round(m / 2**20, 1) for m in memory],
        "memory_growth_mib": growth(memory) / 2**20,
        "descriptors_before": before["process_open_fds"],
        "descriptors_most": max(descriptors),
        "descriptors_after": after["process_open_fds"],
        "waiting_after": after["mbq_requests_waiting"],
        "running_after": after["mbq_replies_running"],
    }
    failures = [
        *(f"{count} {name}" for name, count in soak.counts.items() if name.startswith(("lost", "mixed"))),
        *(["nobody was answered"] if not soak.counts["right"] else []),
        *(["memory grew"] if growth(memory) > max(GROWTH_BYTES, GROWTH_SHARE * memory[-1]) else []),
        *(["requests are left"] if after["mbq_requests_waiting"] or after["mbq_replies_running"] else []),
        *(["descriptors are left"] if after["process_open_fds"] > before["process_open_fds"] + 2 else []),
    ]
    for name, value in result.items():
        if name != "memory_mib":
            print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    print(
        "failed: " + "; ".join(failures) if failures else "all answered or refused, none lost or mixed up, memory flat"
    )
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
