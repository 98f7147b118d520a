"""Budgets as text and as entries, and how they are split."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.budget import Budget, water_fill

SIZES = {"num_layers": 4, "num_kv_heads": 2, "entry_bytes": 256}


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("128", 128, "tokens"),
        (" 128 ", 128, "tokens"),
        ("1.5", 1.5, "tokens"),
        ("10%", 0.1, "fraction"),
        ("2.5%", 0.025, "fraction"),
        (".5 %", 0.005, "fraction"),
        ("100%", 1, "fraction"),
        ("64MiB", 64 * 2**20, "bytes"),
        ("64mib", 64 * 2**20, "bytes"),
        ("1.5 GiB", 1.5 * 2**30, "bytes"),
        ("3KiB", 3 * 2**10, "bytes"),
        ("5kB", 5000, "bytes"),
        ("2MB", 2 * 10**6, "bytes"),
        ("1GB", 10**9, "bytes"),
        ("4096B", 4096, "bytes"),
    ],
)
def test_parse_reads_tokens_fractions_and_bytes(text, amount, unit):
    parsed = Budget.parse(text)
    assert parsed.unit == unit
    assert parsed.amount == pytest.approx(amount)


@pytest.mark.parametrize("text", ["", "many", "-5", "12 tokens", "5%%", "64iB", "64TiB", "1e3", "10% 20%", "%", "nan"])
def test_text_that_is_no_budget_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"expected a budget, got .*128.*10%.*64MiB"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Budget.parse("0"), "budget above 0, got 0 tokens"),
        (lambda: Budget.parse("0%"), "budget above 0, got 0 fraction"),
        (lambda: Budget.parse("150%"), "fraction of at most 1, got 1.5"),
        (lambda: Budget(-1.0), "budget above 0, got -1"),
        (lambda: Budget(float("nan")), "budget above 0, got nan"),
        (lambda: Budget(1.0, "lines"), "unit among tokens, fraction, bytes; got 'lines'"),
    ],
)
def test_budgets_without_meaning_are_refused_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    "text",
    ["128", "1.5", "10%", "2.5%", "0.1%", "7%", "33.333%", "64MiB", "4097B", "100%", "1048577", "1234567", "0.00001%"],
)
def test_str_is_read_back_as_the_same_budget(text):
    budget = Budget.parse(text)
    again = Budget.parse(str(budget))
    assert (again.unit, again.amount) == (budget.unit, pytest.approx(budget.amount, rel=1e-9))


def test_str_is_short():
    assert [str(Budget.parse(x)) for x in ("128", "7%", "2.5%", "64KiB")] == ["128", "7%", "2.5%", "65536B"]


@pytest.mark.parametrize(
    ("text", "seen", "entries"),
    [
        ("128", 1000, 128),
        ("128", 10, 128),
        ("0.3", 10, 1),
        ("10%", 1000, 100),
        ("10%", 1005, 101),
        ("2.5%", 99, 2),
        ("1%", 10, 1),
        ("100%", 37, 37),
        ("64KiB", 5, 32),
        ("65535B", 5, 31),
        ("2048B", 5, 1),
    ],
)
def test_resolve_gives_entries_per_layer_and_head(text, seen, entries):
    assert Budget.parse(text).resolve(seen, **SIZES) == entries


def test_bytes_pay_for_the_state_first():
    budget = Budget.parse("64KiB")
    assert budget.resolve(1, **SIZES, state_bytes=2048) == 31
    assert budget.resolve(1, **SIZES, state_bytes=65536 - 2048) == 1


@pytest.mark.parametrize(("text", "state"), [("2047B", 0), ("64KiB", 65536 - 2047), ("64KiB", 10**6)])
def test_bytes_that_hold_no_entry_are_refused_with_what_one_takes(text, state):
    with pytest.raises(ValueError, match=rf"holds no entry.* takes {2048 + state} bytes"):
        Budget.parse(text).resolve(1, **SIZES, state_bytes=state)


def fill(weights, total, caps, floor=0):
    return water_fill(torch.tensor(weights, dtype=torch.float32), total, torch.tensor(caps), floor).tolist()


def test_water_fill_is_proportional():
    assert fill([1, 2, 5], 16, [99, 99, 99]) == [2, 4, 10]


def test_water_fill_rounds_by_largest_remainder_and_ties_to_the_lower_index():
    assert fill([1, 1, 1], 10, [9, 9, 9]) == [4, 3, 3]
    assert fill([1, 1, 1], 11, [9, 9, 9]) == [4, 4, 3]
    assert fill([0.2, 0.5, 0.3], 9, [9, 9, 9]) == [2, 4, 3]


def test_water_fill_hands_the_surplus_of_full_parts_to_the_others():
    assert fill([8, 1, 1], 10, [2, 9, 9]) == [2, 4, 4]
    assert fill([90, 9, 1], 12, [1, 1, 20]) == [1, 1, 10]


def test_water_fill_gives_to_weightless_parts_only_when_the_others_are_full():
    assert fill([1, 0, 0], 5, [9, 9, 9]) == [5, 0, 0]
    assert fill([1, 0, 0], 5, [1, 9, 9]) == [1, 2, 2]
    assert fill([0, 0], 4, [9, 9]) == [2, 2]


def test_water_fill_stops_at_the_caps():
    assert fill([1, 2], 100, [3, 4]) == [3, 4]
    assert fill([1, 2], 0, [3, 4]) == [0, 0]


def test_water_fill_gives_every_part_its_floor_unless_its_cap_is_lower():
    assert fill([1, 0, 0], 10, [99, 99, 1], floor=2) == [7, 2, 1]


def test_water_fill_is_proportional_where_no_floor_binds():
    assert fill([3, 2, 1], 24, [99, 99, 99], floor=4) == [12, 8, 4]
    assert fill([3, 2, 1], 24, [99, 99, 99], floor=5) == [11, 8, 5]
    assert fill([6, 2, 1], 24, [10, 99, 99], floor=4) == [10, 9, 5]


def test_water_fill_whose_floors_exceed_the_total_gives_no_more_than_the_total():
    assert sum(fill([1, 1, 1], 2, [9, 9, 9], floor=1)) == 2


@st.composite
def fillings(draw):
    parts = draw(st.integers(1, 6))
    weights = draw(st.lists(st.floats(0, 10, width=32), min_size=parts, max_size=parts))
    caps = draw(st.lists(st.integers(0, 12), min_size=parts, max_size=parts))
    floor = draw(st.integers(0, 3))
    least = sum(min(floor, cap) for cap in caps)
    return weights, draw(st.integers(least, 80)), caps, floor


@settings(max_examples=150, deadline=None, derandomize=True)
@given(fillings())
def test_water_fill_sums_exactly_and_stays_between_floor_and_cap(drawn):
    weights, total, caps, floor = drawn
    found = fill(weights, total, caps, floor)
    assert sum(found) == min(total, sum(caps))
    assert all(min(floor, cap) <= n <= cap for n, cap in zip(found, caps, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(fillings())
def test_water_fill_never_gives_a_heavier_part_less(drawn):
    weights, total, caps, _ = drawn
    found = fill(weights, total, [max(caps)] * len(caps))
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    assert all(found[a] <= found[b] + (weights[a] == weights[b]) for a, b in pairwise(order))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(fillings(), min_size=2, max_size=4))
def test_water_fill_of_rows_is_water_fill_of_each(drawn):
    floor = drawn[0][3]
    parts = min(len(weights) for weights, *_ in drawn)
    weights, caps = (torch.tensor([one[at][:parts] for one in drawn]) for at in (0, 2))
    totals = torch.tensor([total for _, total, *_ in drawn])
    found = water_fill(weights, totals, caps, floor)
    for row, total in enumerate(totals.tolist()):
        assert found[row].tolist() == fill(weights[row].tolist(), total, caps[row].tolist(), floor)


def test_water_fill_breaks_ties_of_remainders_that_differ_by_noise():
    noisy = [0.1 + 0.2, 0.3, 0.3]
    assert water_fill(torch.tensor(noisy[::-1], dtype=torch.float64), 10, torch.tensor([9, 9, 9])).tolist() == [4, 3, 3]
