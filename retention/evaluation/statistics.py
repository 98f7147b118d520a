"""Intervals over contexts, and the summary of answer rows into one row per setting."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retention.evaluation.equality import with_equality

Row = dict[str, Any]
Values = NDArray[np.float64]
DRAWN_AT_ONCE, SIGNS_AT_ONCE = 1_000_000, 20_000_000
SETTING = ("task", "policy", "scope", "protocol", "positions")


def _matrix(values: ArrayLike) -> Values:
    """The values as [seeds, clusters]; NaN marks a context that a seed never answered."""
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if matrix.ndim != 2 or not np.isfinite(matrix).any():
        expected = "expected finite scores of shape [clusters] or [seeds, clusters]"
        raise ValueError(f"{expected}, got {matrix.shape}; pass one mean score per context")
    return matrix


def _counts(rng: np.random.Generator, draws: int, units: int) -> Values:
    """How often each unit is drawn with replacement: [draws, units]."""
    picks = rng.integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
    return np.bincount(picks.ravel(), minlength=draws * units).reshape(draws, units).astype(float)


def _resampled(stack: Values, resamples: int, seed: int, member: Values | None = None) -> Values:
    """Means of stack [k, seeds, contexts] under the same draws of seeds, clusters: [k, draws].

    `member` [contexts, clusters] is 1 where a context belongs to a cluster; without it each is one of its own. All draws
    of what rests on a single cluster are alike and tell nothing: they are NaN.
    """
    k, seeds, contexts = stack.shape
    present = np.isfinite(stack)
    flat = np.concatenate([np.where(present, stack, 0.0), present]).reshape(2 * k * seeds, contexts)
    flat = flat if member is None else flat @ member
    clusters = flat.shape[1]
    rng, chunk, parts = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // clusters), []
    for draws in (min(chunk, resamples - start) for start in range(0, resamples, chunk)):
        by_seed = _counts(rng, draws, seeds)[:, None, :]
        sums = (_counts(rng, draws, clusters) @ flat.T).reshape(draws, 2 * k, seeds)
        parts.append((sums * by_seed).sum(axis=-1))
    total = np.concatenate(parts)
    alone = (flat[k * seeds :].reshape(k, seeds, clusters).sum(axis=1) > 0).sum(axis=1) < 2
    return np.where(alone[:, None], np.nan, _ratio(total[:, :k], total[:, k:]).T)


def _ratio(above: Values, below: Values) -> Values:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _interval(draws: Values, level: float = 0.95) -> tuple[float, float]:
    """The central interval of the finite draws; NaN when there is none."""
    finite = draws[np.isfinite(draws)]
    low, high = np.quantile(finite if finite.size else [np.nan], [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def bootstrap_interval(
    per_cluster: ArrayLike, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of [clusters] or [seeds, clusters], seeds first."""
    return _interval(_resampled(_matrix(per_cluster)[None], resamples, seed)[0], level)


def _paired(a: ArrayLike, b: ArrayLike) -> Values:
    """Both matrices with only the cells that both have: [2, seeds, clusters]."""
    stack = np.stack(np.broadcast_arrays(_matrix(a), _matrix(b)))
    return np.where(np.isfinite(stack).all(axis=0), stack, np.nan)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of a - b, [contexts] or [seeds, contexts] in the same order, with its interval.

    `clusters` names what each context belongs to, by default itself.
    """
    first, second = _paired(a, b)
    gap, member = _matrix(first - second), _members(clusters or ())
    return float(np.nanmean(gap)), *_interval(_resampled(gap[None], resamples, seed, member)[0], level)


def paired_p_value(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    flips: int = 20_000,
    seed: int = 0,
) -> float:
    """Two-sided p of a sign-flip test that a - b, averaged over seeds, is 0 on average over contexts.

    Contexts of one cluster flip together. On one right-or-wrong answer per context it is McNemar's exact test, drawn.
    """
    first, second = _paired(a, b)
    gap = first - second
    known, member = np.isfinite(gap).any(axis=0), _members(clusters or ())
    gap = np.nanmean(gap[:, known], axis=0)
    gap = gap if member is None else gap @ member[known]
    extreme = sum(int((sums >= np.abs(gap.sum()) - 1e-9).sum()) for sums in _flipped(gap[None], flips, seed))
    return (1 + extreme) / (1 + flips)


def _flipped(gap: Values, flips: int, seed: int) -> Iterator[Values]:
    """Sizes of the sums over clusters of gap [k, clusters] under the same random signs, in chunks of [draws, k]."""
    rng, chunk = np.random.default_rng(seed), max(1, SIGNS_AT_ONCE // gap.shape[1])
    for count in (min(chunk, flips - start) for start in range(0, flips, chunk)):
        yield np.abs((rng.integers(2, size=(count, gap.shape[1])) * 2.0 - 1.0) @ gap.T)


class Gap(NamedTuple):
    """A mean paired gap: to which of the others, its size, 95% interval (NaN on a single cluster) and two-sided p."""

    other: int
    difference: float
    low: float
    high: float
    p: float


def gap_to_best(
    gaps: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    flips: int = 20_000,
    seed: int = 0,
) -> Gap:
    """The gap of one policy to the best of k others, from its gaps to each, [k, seeds, contexts]: the smallest of the means.

    The best is chosen on these very answers, and interval and p account for that. Who is better than the best is better
    than each: the lower bound is the lowest of the k, and of a gap above 0 p is the largest of the k. Worse than the best
    is worse than any: the upper bound is of simultaneous percentile intervals (Mandel and Betensky 2008), and p is of the
    largest studentised sum under common sign flips (Westfall and Young 1993). For k = 1 it is `paired_difference` with
    `paired_p_value`.

    Raises:
        ValueError: for another that has no gap at all.
    """
    stack, member = np.asarray(gaps, dtype=np.float64), _members(clusters or ())
    for each in stack:
        _matrix(each)
    means = np.nanmean(stack.reshape(len(stack), -1), axis=1)
    other = int(means.argmin())
    draws = _resampled(stack, resamples, seed, member)
    low, high = _best_interval(draws)
    present = np.isfinite(stack)
    sums = _ratio(np.where(present, stack, 0.0).sum(axis=1), present.sum(axis=1, dtype=float))
    sums = np.nan_to_num(sums) if member is None else np.nan_to_num(sums) @ member
    scale = np.sqrt((sums**2).sum(axis=1, keepdims=True))
    sums = np.divide(sums, scale, out=np.zeros_like(sums), where=scale > 0)
    seen, each, largest = np.abs(sums.sum(axis=1)) - 1e-9, np.zeros(len(sums)), 0
    for flipped in _flipped(sums, flips, seed):
        each += (flipped >= seen).sum(axis=0)
        largest += int((flipped.max(axis=1) >= seen[other]).sum())
    extreme = each.max() if means[other] > 0 else largest
    return Gap(other, float(means[other]), low, high, float((1 + extreme) / (1 + flips)))


def _best_interval(draws: Values, level: float = 0.95) -> tuple[float, float]:
    """The interval of the smallest of k means from their joint draws [k, draws]; lower ends one by one, upper ends jointly."""
    joint = draws[:, np.isfinite(draws).all(axis=0)]
    if joint.shape[1] < 2:
        return np.nan, np.nan
    ordered = np.sort(joint, axis=1)
    ranks = [np.searchsorted(own, row) for own, row in zip(ordered, joint, strict=True)]
    highest = np.quantile(np.max(ranks, axis=0), 0.5 + level / 2) / (joint.shape[1] - 1)
    low = np.quantile(ordered, 0.5 - level / 2, axis=1).min()
    return float(low), float(np.quantile(ordered, highest, axis=1).min())


def retention_interval(
    a: ArrayLike, full: ArrayLike, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of mean(a) / mean(full) on the same contexts; draws where full scores 0 are out."""
    return _interval(_ratio(*_resampled(_paired(a, full), resamples, seed)), level)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of comparisons by Holm's step-down, in the given order."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values within [0, 1], got {p_values!r}; pass a flat list")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    return [float(value) for value in np.minimum(stepped, 1.0)[np.argsort(order, kind="stable")]]


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None and not np.isnan(value)]
    return round(float(np.mean(known)), 12) if known else None


def _cube(scores: dict[tuple, float]) -> Values:
    """Scores keyed (seed, cluster, turn), laid out as [turns, seeds, clusters]; NaN is missing."""
    names = [sorted({k[i] for k in scores}, key=lambda n: (n is None, n)) for i in (0, 1)]
    seeds, clusters = ({name: i for i, name in enumerate(axis)} for axis in names)
    cube = np.full((1 + max(key[2] for key in scores), len(seeds), len(clusters)), np.nan)
    for (seed, cluster, turn), score in scores.items():
        cube[turn, seeds[seed], clusters[cluster]] = score
    return cube


def _over_turns(cube: Values) -> Values:
    """Mean over the answered turns of each context: [seeds, clusters]."""
    present = np.isfinite(cube)
    return _ratio(np.where(present, cube, 0.0).sum(axis=0), present.sum(axis=0, dtype=float))


def _bounds(name: str, draws: Values) -> Row:
    low, high = (None if np.isnan(bound) else bound for bound in _interval(draws))
    return {f"{name}_low": low, f"{name}_high": high}


def _members(labels: Sequence[Hashable]) -> Values | None:
    """1 where a context belongs to a cluster, [contexts, clusters], by the cluster's label; None where all are alone."""
    names = {name: i for i, name in enumerate(dict.fromkeys(labels))}
    if len(names) == len(labels):
        return None
    return np.eye(len(names))[[names[label] for label in labels]]


def _membership(answers: dict[tuple, Row]) -> Values | None:
    """Which context belongs to which cluster [contexts, clusters], in the order of a cube; None where all are alone."""
    known = {key[1]: row.get("cluster", key[1]) for key, row in answers.items()}
    contexts = sorted(known, key=lambda n: (n is None, n))
    return _members([known[context] for context in contexts])


def _above_chance(accuracy: float | None, full: float | None, chance: float | None) -> float | None:
    """Share of the full cache's answers beyond guessing; missing where these do not get half the way from chance to 1."""
    if accuracy is None or full is None or chance is None or not full >= (1 + chance) / 2 > chance:
        return None
    return (accuracy - chance) / (full - chance)


def _accuracies(cube: Values, full: Values, chance: float | None, resamples: int, member: Values | None) -> Row:
    """Accuracy, its turns and its comparison with the full cache, each with an interval."""
    own, unpaired = _over_turns(cube), (np.isfinite(cube) & ~np.isfinite(full)).any(axis=0)
    ref = np.where(unpaired, np.nan, _over_turns(full))
    paired = np.where(np.isfinite(ref), own, np.nan)
    stack = np.stack([own, paired, ref, paired - ref, _over_turns(cube[1:]), *cube])
    mean, draws = [_mean(matrix.flat) for matrix in stack], _resampled(stack, resamples, 0, member)
    turns = [_bounds("turn", turn) for turn in draws[5:]]
    above = _above_chance(mean[1], mean[2], chance)
    floor = np.nan if above is None or chance is None else chance
    return {
        **{"accuracy": mean[0], "full_accuracy": mean[2], "diff_full": mean[3]},
        "retention": mean[1] / mean[2] if mean[1] is not None and mean[2] else None,
        **_bounds("ci", draws[0]),
        **_bounds("retention", _ratio(draws[1], draws[2])),
        "retention_above_chance": above,
        **_bounds("retention_above_chance", _ratio(draws[1] - floor, draws[2] - floor)),
        **_bounds("diff_full", draws[3]),
        **{"accuracy_first_turn": mean[5], "accuracy_later_turns": mean[4]},
        **_bounds("later_turns", draws[4]),
        "accuracy_by_turn": mean[5:],
        **{f"by_{bound}": [turn[bound] for turn in turns] for bound in ("turn_low", "turn_high")},
    }


def _counted(answers: dict[tuple, Row]) -> Row:
    """What was answered, with which seeds, and what was kept on average."""
    rows, trained = list(answers.values()), sorted({key[0] for key in answers} - {None})
    seeds = trained or sorted({row["seed_data"] for row in rows})
    budget = {k: _mean(row["budget"][k] for row in rows) for k in ("resolved", "fraction")}
    size = {k: _mean(row["bytes"].get(k) for row in rows) for k in ("full", "kept", "kept_logical", "peak")}
    recall = {k: _mean(row["evidence_recall"].get(k) for row in rows) for k in ("any", "mean", "weighted")}
    mass = {k: _mean((row.get("missing_mass") or {}).get(k) for row in rows) for k in ("mean", "p90")}
    ms = {k: _mean((row.get("ms") or {}).get(k) for row in rows) for k in ("prefill", "decode_per_token")}
    whole = {"budget_tokens": budget["resolved"]} | {f"kv_bytes_{k}": v for k, v in size.items()}
    return {
        **{name: rows[0][name] for name in SETTING},
        **{"budget": rows[0]["budget"]["requested"], "budget_fraction": budget["fraction"]},
        **{"n": len(rows), "n_contexts": len({key[1] for key in answers})},
        "contexts": f"{crc32(repr(sorted({str(key[1]) for key in answers})).encode()):08x}",
        "n_clusters": len({row.get("cluster", key[1]) for key, row in answers.items()}),
        "comparable": all(row.get("comparable", True) for row in rows),
        "judges": ", ".join(dict.fromkeys(row["judge"]["name"] for row in rows if row.get("judge"))),
        **{"seed": seeds, "n_seeds": len(seeds), "chance": _mean(r["chance"] for r in rows)},
        **{f"evidence_recall_{name}": value for name, value in recall.items()},
        **{name: _mean(row.get(name) for row in rows) for name in ("kl_teacher", "top1_agree")},
        **{f"missing_mass_{name}": value for name, value in mass.items()},
        **{f"ms_{name}": value for name, value in ms.items()},
        **{name: None if value is None else round(value) for name, value in whole.items()},
        "kept_fraction": _mean(r["kept"] / r["entries_full"] for r in rows if r["entries_full"]),
    }


def _summary_row(answers: dict[tuple, Row], full: dict, resamples: int) -> Row:
    """The summary of one setting; what is missing is None."""
    row = _counted(answers)
    reference = full.get((row["task"], row["protocol"])) or full.get((row["task"], None), {})
    cube = _cube({key: float(answer["score"]) for key, answer in answers.items()})
    pair = _cube({key: reference.get(key[1:], np.nan) for key in answers})
    trained = sorted({key[0] for key in answers} - {None})
    by_seed = {str(s): _mean(own) for s, own in zip(trained, _over_turns(cube), strict=False)}
    known = [accuracy for accuracy in by_seed.values() if accuracy is not None]
    row |= {"seed_spread": max(known) - min(known) if len(known) > 1 else None}
    found = _accuracies(cube, pair, row["chance"], resamples, _membership(answers))
    return row | {"seed_accuracy": by_seed} | found


def _keyed(rows: Iterable[Row], allowed: int) -> Iterable[tuple[tuple, Row]]:
    """Each scored row without an error beside its key (training seed, context, turn)."""
    rows = list(rows)
    errors = [row["error"] for row in rows if row["error"] is not None]
    if len(errors) > allowed:
        got = f"expected at most {allowed} rows with an error, got {len(errors)}: {errors[0]}"
        raise ValueError(f"{got}; run them again or pass allow_errors={len(errors)}")
    for row in (row for row in rows if row["error"] is None and row.get("scored", True)):
        if not np.isfinite(row["score"]):
            where = f"{row['example_id']} under {row['policy']}"
            raise ValueError(f"expected a finite score, got {row['score']} for {where}; mend the task's scorer")
        yield (row["seed_train"], (row["seed_data"], row["example_id"]), row["turn"]), row


def summarise(rows: Iterable[Row], *, allow_errors: int = 0, resamples: int = 10_000) -> list[Row]:
    """One row of accuracy, intervals and cost per task, policy, scope, protocol and budget.

    A context counts once, by the mean of its turns; rows with an error are left out.
    """
    groups: dict[tuple, dict[tuple, Row]] = defaultdict(dict)
    full: dict[tuple, dict[tuple, float]] = defaultdict(dict)
    for key, row in _keyed(rows, allow_errors):
        groups[*(row[name] for name in SETTING), row["budget"]["requested"]][key] = row
        if row["policy"] == "full":
            full[row["task"], row["protocol"]][key[1:]] = float(row["score"])
            full[row["task"], None].setdefault(key[1:], float(row["score"]))
    summary = [_summary_row(answers, full, resamples) for answers in groups.values()]
    summary.sort(key=itemgetter("policy", "scope"))
    return with_equality(sorted(summary, key=lambda r: (r["task"], r["protocol"], -r["budget_fraction"])))
