"""Steps that several policies' scores share."""

import torch

from retention.ops.scores import mean_over_heads


def test_means_over_heads_follow_positions():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 5, generator=g)
    same = torch.arange(5).expand(2, 3, 5)
    everything = torch.ones(2, 3, 5, dtype=torch.bool)
    found = mean_over_heads(values, same, everything)
    torch.testing.assert_close(found, values.mean(1, keepdim=True).expand_as(values))
    positions = torch.tensor([[0, 2, 4, 7, 9], [0, 2, 5, 7, 0], [2, 3, 4, 9, 0]]).expand(2, 3, 5)
    valid = everything.clone()
    valid[:, 1:, 4] = False
    dirty = torch.where(valid, values, float("nan"))
    found = mean_over_heads(dirty, positions, valid)
    for row in range(2):
        for head in range(3):
            for key in range(5):
                holders = (positions[row] == positions[row, head, key]) & valid[row]
                expected = values[row][holders].mean() if valid[row, head, key] else torch.tensor(0.0)
                torch.testing.assert_close(found[row, head, key], expected)
