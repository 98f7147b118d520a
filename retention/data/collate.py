"""Rows of different lengths as one left-padded batch, with everything that is told per token."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad as padded


def left_pad(rows: list[list[int]], fill: int) -> Tensor:
    """Rows as one tensor [batch, tokens], filled on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[fill] * (longest - len(row)) + row for row in rows])


def appended(inputs: Mapping[str, Tensor], more: list[list[int]], pad: int) -> dict[str, Tensor]:
    """A processor's left-padded prompts with further text behind each row.

    What the processor tells per token beside ids and mask (kinds of tokens, by which models find images) is 0 for text.
    """
    mask = inputs["attention_mask"].bool()
    found = dict(inputs)
    for name, values in inputs.items():
        if values.shape == mask.shape:
            fill = {"input_ids": pad}.get(name, 0)
            rows = [values[i][mask[i]].tolist() for i in range(len(mask))]
            behind = {"input_ids": more, "attention_mask": [[1] * len(row) for row in more]}
            tails = behind.get(name, [[0] * len(row) for row in more])
            found[name] = left_pad([row + tail for row, tail in zip(rows, tails, strict=True)], fill)
    return found


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Rows' pixels (or what belongs to them) as one tensor along the first axis; the other axes end in zeros.

    So do processors themselves where images of a batch differ in size, or rows in their number of images or tiles.
    """
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    wide = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        wide.append(padded(part, [x for gap in reversed(missing) for x in (0, gap)]))
    return torch.cat(wide)
