"""The next token of every row: the likeliest, or drawn from the likeliest ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.data.example import Example, Sampling


class Sampler:
    """Chooses tokens as each example says, every row from its own seed: whatever is answered beside it."""

    def __init__(self, examples: list[Example]) -> None:
        self.rules = [example.sampling for example in examples]
        self.generators = [None if x is None else torch.Generator().manual_seed(x.seed) for x in self.rules]

    def __call__(self, logits: Float[Tensor, "batch vocabulary"]) -> Int[Tensor, " batch"]:
        """One token per row."""
        chosen = logits.argmax(-1)
        for row, (rule, generator) in enumerate(zip(self.rules, self.generators, strict=True)):
            if rule is not None:
                shares = nucleus(logits[row].float().cpu(), rule)
                chosen[row] = torch.multinomial(shares, 1, generator=generator)[0]
        return chosen


def nucleus(logits: Float[Tensor, " vocabulary"], rule: Sampling) -> Float[Tensor, " vocabulary"]:
    """Probabilities at a temperature, 0 outside the smallest set that has `top_p` (Holtzman et al., 2020)."""
    shares, order = torch.softmax(logits / rule.temperature, -1).sort(descending=True)
    shares = shares * (shares.cumsum(-1) - shares < rule.top_p)
    return torch.zeros_like(shares).scatter(0, order, shares / shares.sum())
