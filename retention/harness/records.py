"""What every answer was given from, by request, and the manifest of a harness's run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retention.cache.evicting import EvictingCache
from retention.files import write_json, write_text
from retention.harness.prompt import Prompt
from retention.harness.settings import Loaded, Reading
from retention.models.family import fingerprint
from retention.provenance import hardware, package_versions

Row = dict[str, Any]


class Records:
    """One row per request: its task and document, what its cache had seen and kept, and under which protocol."""

    def __init__(self, reading: Reading, loaded: Loaded) -> None:
        self.reading, self.loaded = reading, loaded
        self.rows: list[Row] = []

    def held(self, cache: EvictingCache, count: int) -> list[Row | None]:
        """What a cache holds of each of its rows right now, and the most it held; nothing where there is no context."""
        heads = cache.shape.num_layers * cache.shape.num_kv_heads
        if not cache.columns:
            return [None] * count
        seen, kept = cache.seen().tolist(), cache.kept().sum((0, 2)).tolist()
        budgets, ledger = cache.resolved or seen, cache.bytes()
        return [
            {
                "seen": seen[row],
                "kept": kept[row],
                "entries_full": seen[row] * heads,
                "budget": {"requested": str(self.loaded.cache.budget), "resolved": budgets[row]},
                "bytes": {
                    "full": cache.entry_bytes * heads * seen[row],
                    "kept": ledger.total // count,
                    "kept_logical": ledger.logical_total // count,
                    "peak": ledger.peak // count,
                },
            }
            for row in range(count)
        ]

    def add(self, kind: str, prompts: Sequence[Prompt], held: Sequence[Row | None], names: Sequence[Row]) -> None:
        """Rows of requests in their order; `names` say task, document and number of the request there."""
        for prompt, own, name in zip(prompts, held, names, strict=True):
            told = {"kind": kind, "question": prompt.label, "cut": prompt.cut, "question_tokens": len(prompt.question)}
            self.rows.append(name | told | (own or {}))
        self.write()

    def manifest(self) -> dict[str, Any]:
        """Model, policy, budget as asked and as resolved, protocol and versions; no host, user or path of a machine."""
        loaded, cache = self.loaded, self.loaded.cache
        counted = [row for row in self.rows if "seen" in row]
        trigger = f"chunked({cache.prefill_chunk})" if cache.prefill_chunk else "after_prefill"
        decodes = cache.evict_every is not None or loaded.policy.steps
        base = fingerprint(loaded.model)
        return {
            "model": asdict(loaded.source)
            | {"name": _named(loaded.source.name), "adapter": _named(loaded.source.adapter)},
            "base": base,
            "policy": loaded.name,
            "policy_settings": asdict(loaded.policy),
            "budget": {
                "requested": str(cache.budget),
                "resolved": _span([row["budget"]["resolved"] for row in counted]),
            },
            "cache": asdict(cache),
            "gates": None if loaded.gates is None else loaded.gates.card_config() | {"versions": None},
            "protocol": {
                "question": _counts([row["question"] for row in self.rows if row["kind"] != "loglikelihood_rolling"]),
                "turns": "multi" if self.reading.dialogue else "single",
                "trigger": f"{trigger} + decode({cache.evict_every or 1})" if decodes else trigger,
                "positions": cache.positions,
            },
            "requests": len(self.rows),
            "cut": sum(bool(row["cut"]) for row in self.rows),
            "kept_share": _share(counted),
            "max_length": self.reading.max_length,
            "context_end": self.reading.context_end,
            "attention": "sdpa",
            "cache_class": "retention.EvictingCache",
            "versions": package_versions(),
            "hardware": hardware(),
        }

    def write(self) -> None:
        """Bring the folder of records up to date, where there is one."""
        if self.reading.records is None:
            return
        folder = Path(self.reading.records)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "requests.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        write_json(folder / "manifest.json", self.manifest())


def _named(source: str | None) -> str | None:
    """A hub id as it is, a folder by its name."""
    return Path(source).name if source is not None and Path(source).is_absolute() else source


def _counts(labels: list[str]) -> dict[str, int]:
    return {label: labels.count(label) for label in sorted(set(labels))}


def _span(numbers: list[int]) -> list[int] | None:
    """The least and the most."""
    return [min(numbers), max(numbers)] if numbers else None


def _share(rows: list[Row]) -> float | None:
    """Kept entries of all that were seen."""
    entries = sum(row["entries_full"] for row in rows)
    return sum(row["kept"] for row in rows) / entries if entries else None
