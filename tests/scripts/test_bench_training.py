"""The training benchmark in miniature: it measures what its page says, never a time."""

import torch

from scripts import bench_training as bench

TINY = bench.Plan(bench.SMALL | {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "vocab_size": 500}, lengths=(96, 192), rounds=1)  # fmt: skip


def test_the_floor_is_the_step_without_gates():
    """With gates that never forget both give the same loss but for the capacity."""
    model = bench.model_of(TINY)
    inputs, labels = bench.batch(TINY, 96)
    floor = bench.floor_step(model, inputs, labels, again=False)
    assert torch.isfinite(floor)
    assert floor.requires_grad
    assert bench.floor_step(model, inputs, labels, again=True).item() == floor.item()


def test_rows_and_page():
    model = bench.model_of(TINY)
    rows, alone, packed = bench.steps(TINY, model), bench.attention(TINY), bench.packing(TINY, model)
    assert [(row["length"], row["recompute"]) for row in rows] == [(96, False), (96, True), (192, False), (192, True)]
    plain, again = rows[2], rows[3]
    assert again["step_bytes"] < plain["step_bytes"] / 3
    assert packed["lengths"] == [24, 48, 72, 96]
    text = bench.page(TINY, rows, alone, packed)
    assert "38% of the padded batch is padding" in text
    assert all(f"| {length:,} |" in text for length in TINY.lengths)
    assert text.count(", met") + text.count(", missed") == 3


def test_aims_are_judged_by_the_worst_row():
    steps = [
        {"length": n, "recompute": False, "step_over_floor": ratio, "step_bytes": held}
        for n, ratio, held in ((1, 1.1, 100), (2, 1.3, 210))
    ]
    lines = bench.verdicts(steps, [{"gated_over_plain_attention": 1.35}, {"gated_over_plain_attention": 1.2}])
    assert [line.split(": ")[1] for line in lines] == ["1.30, missed", "1.35, met", "2.10, met"]
