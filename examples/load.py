"""Load the example server with many conversations; write docs/benchmarks/serving.md.

    python examples/load.py                       # 64 conversations of 4 turns from 16 clients, on a small decoder
    python examples/load.py --quick               # the same in miniature, printed
    python examples/load.py --clients 32 --conversations 200

The server runs in this process on a free port of this machine; clients speak HTTP to it. A quarter of the clients read
slowly, and a quarter of the questions is broken off and asked again. Random weights: figures about time and memory.
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from server import create

from retention.files import write_text
from retention.provenance import hardware, package_versions
from retention.serving.pipeline import Pipeline, pipeline
from retention.serving.pool import Pool

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32}
WORDS = 300
"""Of the first question of a conversation."""


@dataclass
class Load:
    """What the clients do, and what they saw."""

    url: str
    turns: int = 4
    new_tokens: int = 32
    waited: list[float] = field(default_factory=list)
    """Seconds to each whole answer of a client that reads at once."""
    tokens: int = 0
    broken_off: int = 0
    lost: int = 0


def model_of() -> tuple[Any, Any]:
    """A small decoder with random weights, and a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<end>", *alphabet])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=40960, **SIZES)
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model, tokenizer


def converse(load: Load, number: int, *, slow: bool) -> None:
    """One conversation, every answer checked to have come whole."""
    chance, messages = random.Random(number), []
    with httpx.Client(base_url=load.url, timeout=600) as client:
        for turn in range(load.turns):
            words = " ".join(
                chance.choice(["a", "cat", "or", "some", "dog"]) for _ in range(WORDS if turn == 0 else 10)
            )
            messages.append({"role": "user", "content": f"{number} {turn}: {words}"})
            if chance.random() < 0.25:
                _asked(load, client, messages, slow=slow, leave=True)
                load.broken_off += 1
            said = _asked(load, client, messages, slow=slow, leave=False)
            messages.append({"role": "assistant", "content": said})


def _asked(load: Load, client: httpx.Client, messages: list[Any], *, slow: bool, leave: bool) -> str:
    """One answer, streamed; `leave` goes away behind its first piece."""
    told = {"messages": messages, "stream": True, "max_tokens": load.new_tokens}
    begin, pieces, reason = time.perf_counter(), [], None
    with client.stream("POST", "/v1/chat/completions", json=told) as got:
        for line in got.iter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            text, reason = choice["delta"].get("content"), choice["finish_reason"]
            if text:
                pieces.append(text)
                if leave:
                    return ""
                time.sleep(0.05 if slow else 0)
    load.lost += reason != "length"
    load.waited += [] if slow else [time.perf_counter() - begin]
    load.tokens += load.new_tokens
    return "".join(pieces)


def measured(pipe: Pipeline, pool: Pool, *, clients: int, conversations: int, turns: int) -> dict[str, Any]:
    """Serve, load, and what came of it."""
    server = uvicorn.Server(uvicorn.Config(create(pipe, pool), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    load = Load(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", turns)
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], pool.bytes)

    watching = threading.Thread(target=watch)
    watching.start()
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as clients_pool:
        jobs = [clients_pool.submit(converse, load, i, slow=i % 4 == 0) for i in range(conversations)]
        for job in jobs:
            job.result()
    spent = time.perf_counter() - begin
    done.set()
    watching.join()
    server.should_exit = True
    thread.join()
    quantiles = statistics.quantiles(load.waited, n=20)
    return {
        "conversations": conversations,
        "clients": clients,
        "turns": turns,
        "seconds": spent,
        "tokens_per_second": load.tokens / spent,
        "answer_median_s": statistics.median(load.waited),
        "answer_p95_s": quantiles[-1],
        "broken_off": load.broken_off,
        "lost": load.lost,
        "pool_limit_bytes": pool.max_bytes,
        "pool_peak_bytes": most[0],
    }


def page(found: dict[str, Any]) -> str:
    """What was measured, and where."""
    rows = "\n".join(f"| {k.replace('_', ' ')} | {v:,.2f} |" if isinstance(v, float) else f"| {k.replace('_', ' ')} | {v:,} |" for k, v in found.items())  # fmt: skip
    machine = "\n".join(f"- {key}: {value}" for key, value in {**package_versions(), **hardware()}.items())
    return (
        "# The example server under load\n\nFrom `python examples/load.py`. A Qwen3 decoder with random weights "
        f"({SIZES['num_hidden_layers']} layers, hidden {SIZES['hidden_size']}), `keydiff` at 64 entries per head, answers of "
        "32 tokens; a quarter of the clients read slowly, about a quarter of the questions is broken off and asked again. "
        "Lost are answers that did not come whole.\n\n| | |\n|---|---:|\n"
        f"{rows}\n\nMachine:\n\n{machine}\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--pool", type=int, default=8 * 2**20, help="bytes that idle conversations hold together")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {"clients": options.clients, "conversations": options.conversations, "turns": options.turns}
    sizes = {"clients": 4, "conversations": 6, "turns": 2} if options.quick else sizes
    model, tokenizer = model_of()
    with (
        tempfile.TemporaryDirectory() as folder,
        pipeline("text-generation", model=model, processor=tokenizer, policy="keydiff", budget=64) as pipe,
    ):
        found = measured(pipe, Pool(pipe, options.pool, Path(folder)), **sizes)
    print(found)
    if not options.quick:
        write_text(Path(__file__).parent.parent / "docs" / "benchmarks" / "serving.md", page(found))


if __name__ == "__main__":
    main()
