"""Reports from what runs left on disk: one run's written anew, or several pooled into one table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retention.evaluation.config import QUOTA, base_name, prefix_of
from retention.evaluation.equality import named_apart
from retention.evaluation.results import Result, Source, write_results
from retention.evaluation.store import NAME, RowStore
from retention.files import write_json
from retention.policies import POLICIES

Row = dict[str, Any]
_ALIKE = ("split", "cache")
"""Settings that runs have to share to stand in one table; tasks have to where both have them."""
_MODEL = ("dtype", "quantization", "adapter", "adapter_mode", "prompt_style")
"""Settings of the model that change its answers."""
_OWN = ("seed", "validation", "chosen_step")
"""What trainings of the same settings differ in."""


def rebuild(folders: Sequence[Path], out: Path) -> Result:
    """One run's report in its own folder, or several runs' in `out`, without a model.

    Rows of several runs are pooled by their settings; a policy whose settings or gates differ between runs carries the
    name of its run.

    Raises:
        ValueError: for a folder without results, or runs that cannot stand in one table.
    """
    manifests = {folder: _manifest(folder) for folder in folders}
    rows = {folder: _rows(folder) for folder in folders}
    if len(folders) == 1:
        return write_results(
            folders[0], rows[folders[0]], {folders[0].name: manifests[folders[0]]}, [Source(folders[0])]
        )
    names = _names(folders)
    for folder in folders[1:]:
        _check(manifests[folders[0]], manifests[folder], (names[folders[0]], names[folder]))
    held = {folder: list(dict.fromkeys(row["policy"] for row in rows[folder])) for folder in folders}
    renamed = {folder: _renamed(folder, manifests, held, names) for folder in folders}
    pooled: dict[tuple, Row] = {}
    clashes = 0
    for folder in folders:
        for row in rows[folder]:
            own = row | {"policy": renamed[folder].get(row["policy"], row["policy"])}
            before = pooled.setdefault(_key(own), own)
            clashes += before is not own and before["prediction"] != own["prediction"]
    told = {names[folder]: manifests[folder] for folder in folders}
    if clashes:
        line = f"{clashes} answers differ between runs of the same settings; those of the first run are counted."
        last = names[folders[-1]]
        told[last] = told[last] | {"caveats": [*(told[last].get("caveats") or []), line]}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "manifest.json", {"runs": told})
    return write_results(out, list(pooled.values()), told, [Source(folder, renamed[folder]) for folder in folders])


def _rows(folder: Path) -> list[Row]:
    rows = RowStore(folder).rows
    if not rows:
        raise ValueError(f"{folder} holds no answers; let its evaluation go on first")
    return rows


def _manifest(folder: Path) -> Row:
    file = folder / "manifest.json"
    if not file.is_file() and not (folder / f"{NAME}.jsonl").is_file():
        raise ValueError(
            f"expected an evaluation's folder with {NAME}.jsonl, got {folder}; name one that eval.py wrote"
        )
    if not file.is_file():
        raise ValueError(f"{folder} has no manifest.json, its evaluation did not end; run the same command again")
    manifest = json.loads(file.read_text())
    if "runs" in manifest:
        raise ValueError(f"{folder} compares runs itself; name the runs it compares instead")
    return manifest


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each run by the shortest end of its path that no other has."""
    for depth in range(1, 20):
        names = {folder: "/".join(folder.resolve().parts[-depth:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            return names
    raise ValueError(f"expected different runs, got {', '.join(map(str, folders))}; name each once")


def _check(one: Row, other: Row, names: tuple[str, str]) -> None:
    """Refuse runs whose numbers do not belong side by side."""
    pairs = [("the base model", one["base"].get("name"), other["base"].get("name"))]
    hashes = one["base"].get("weight_hash"), other["base"].get("weight_hash")
    pairs += [("the base's weights", *hashes)] if None not in hashes else []
    pairs += [(f"{name}", one["config"].get(name), other["config"].get(name)) for name in _ALIKE]
    models = [manifest["config"].get("model", {}) for manifest in (one, other)]
    pairs += [(f"model.{name}", *(model.get(name) for model in models)) for name in _MODEL]
    for task in one["config"]["tasks"]:
        if task in other["config"]["tasks"]:
            settings = (manifest["config"]["task"].get(task) for manifest in (one, other))
            pairs.append((f"task.{task}", *settings))
    for what, mine, theirs in pairs:
        if mine != theirs:
            told = _first_difference(what, mine, theirs)
            raise ValueError(f"{names[0]} and {names[1]} cannot stand in one table: {told}; compare runs that share it")


def _first_difference(what: str, mine: Any, theirs: Any) -> str:
    """The name and both values of the first thing in which two settings differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        name = next(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
        return _first_difference(f"{what}.{name}", mine.get(name), theirs.get(name))
    return f"{what} is {mine!r} in one and {theirs!r} in the other"


def _renamed(
    folder: Path, manifests: Mapping[Path, Row], held: Mapping[Path, Sequence[str]], names: Mapping[Path, str]
) -> dict[str, str]:
    """Policies that are not the same in all runs that hold rows of them, with the names of the runs that share this one's."""
    found = {}
    for policy in held[folder]:
        told = {run: _identity(manifest, policy) for run, manifest in manifests.items() if policy in held[run]}
        if len(set(told.values())) > 1:
            alike = [names[run] for run, identity in told.items() if identity == told[folder]]
            found[policy] = named_apart(policy, ", ".join(alike))
    return found


def _identity(manifest: Row, policy: str) -> str:
    """What a policy's answers depend on besides the task: its settings, and its gates apart from their seed."""
    base = base_name(policy)
    told = [manifest["config"]["policy"].get(base)]
    kind = POLICIES.get(base)
    if prefix_of(policy) or policy == QUOTA or kind is None or kind().needs_gates:
        for card in manifest["gates"]:
            training = {k: v for k, v in card.get("training", {}).items() if k not in _OWN}
            told.append({"gate": card.get("gate"), "memory": card.get("memory"), "training": training})
        told = [*told[:1], *{json.dumps(x, sort_keys=True): x for x in told[1:]}.values()]
    return json.dumps(told, sort_keys=True)


def _key(row: Row) -> tuple:
    """What makes two rows the same answer."""
    named = ("task", "policy", "scope", "protocol", "seed_train", "seed_data", "example_id", "turn")
    return *(row[name] for name in named), row["budget"]["requested"]
