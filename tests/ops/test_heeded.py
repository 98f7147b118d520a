"""What queries heed, in blocks, against the whole map."""

import pytest
import torch

from retention.ops import heeded as module
from retention.ops.heeded import heeded, naive_heeded

BATCH, HEADS, KV_HEADS, QUERIES, KEYS = 2, 4, 2, 11, 9


@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_blocks_equal_the_whole_map(block, summed, weighed, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(BATCH, HEADS, QUERIES, 8, generator=g),
        torch.randn(BATCH, KV_HEADS, KEYS, 8, generator=g),
    )
    visible = torch.rand(BATCH, KV_HEADS, QUERIES, KEYS, generator=g) > 0.3
    asking = torch.rand(BATCH, QUERIES, generator=g) > 0.5
    sizes, streams = torch.rand(BATCH, HEADS, KEYS, generator=g), torch.rand(BATCH, QUERIES, generator=g) + 0.1
    options = {"sizes": sizes, "streams": streams} if weighed else {}
    found = heeded(queries, keys, visible, asking, 0.3, summed=summed, **options)
    assert torch.allclose(found, naive_heeded(queries, keys, visible, asking, 0.3, summed=summed, **options), atol=1e-6)
    for row in range(BATCH):
        for head in range(KV_HEADS):
            for key in range(KEYS):
                values = [0.0]
                for query in asking[row].nonzero().flatten().tolist():
                    seen = visible[row, head, query]
                    if not seen[key]:
                        continue
                    for member in (2 * head, 2 * head + 1):
                        logits = 0.3 * keys[row, head] @ queries[row, member, query]
                        weight = logits.masked_fill(~seen, -torch.inf).softmax(0)[key]
                        times = sizes[row, member, key] / streams[row, query] if weighed else 1.0
                        values.append(float(weight * times))
                expected = sum(values) if summed else max(values)
                assert float(found[row, head, key]) == pytest.approx(expected, abs=1e-5)


def test_nobody_asks():
    zeros = torch.zeros(1, 2, 3, 4)
    found = heeded(zeros, zeros[:, :1], torch.ones(1, 1, 3, 3).bool(), torch.zeros(1, 3).bool(), 1.0)
    assert torch.equal(found, torch.zeros(1, 1, 3))
