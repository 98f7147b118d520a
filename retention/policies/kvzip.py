"""KVzip: entries stay that the model needs to write its context out once more (arXiv 2505.23416)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.policies.collect import REPEATED, Repetition
from retention.types import KVState


@dataclass
class KVzip(Policy):
    """`s_j = max over fed queries and the query group of A`, one pool over all layers and heads.

    After the prompt and before anything of it leaves, an instruction to repeat it and the prompt itself are fed behind
    it, `chunk_size` tokens at a time, each chunk on its own behind the cached prompt. For the entries of that chunk A
    is a softmax over the first `sinks` tokens, those entries and what was fed so far; the sinks themselves score 1.
    Nothing that was fed stays, and the next token goes where it would have gone. Images are repeated as the embeddings
    the decoder got. Where something has to leave it costs one prefill more, in which every query sees the whole prompt
    and the attention to its own chunk is computed a second time; the embeddings of the prompt are held until then.

    `plus` is the variant that the gates of `kvzap` predict (arXiv 2601.07891): `A * ||W_O v_j|| / ||x_r||`, x the
    attention input of the fed query. `head_level` ranks whole heads by their largest score, and the others are left
    with sinks and recent entries. The published variant inside each layer is `cache.allocator=head_adaptive` with
    `cache.head_floor=0`.

    Everything since the last decision is repeated, and entries that stay keep their score: with `cache.prefill_chunk`
    each chunk of the prompt as soon as it is in (the paper has the whole context cached), in later turns the new prompt
    and the answers before it. Decoded tokens leave with the next prompt only. The instruction needs a tokenizer
    (`evicting(..., tokenizer=...)`; an evaluation brings its own) that knows its words; without one the prompt is
    repeated right behind itself. Differs from the paper: the system prompt is part of the context.
    """

    collector = REPEATED
    allocator = "global"
    selector = "global"
    evicts_while_decoding = False

    chunk_size: int = 2048
    """Tokens repeated at a time."""
    overlap: int = 8
    """Last tokens of a chunk that open the next one."""
    sinks: int = 4
    """First tokens, which come before everything else."""
    instruction: str = "\n\nNow write out everything above once more, word for word:\n\n"
    """What asks for the first chunk."""
    continuation: str = "\n\nNow write out the text above once more, word for word, from where it says:\n\n"
    """What asks for each later one."""
    plus: bool = False
    """Attention times the norm of the value behind the output projection, by that of the query's input."""
    head_level: bool = False
    """Rank whole heads instead of entries."""
    recent_size: int = 256
    """Newest entries that every head keeps, at most by half of what sinks leave of the budget, for head_level."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.chunk_size:
            raise ValueError(
                f"expected kvzip.chunk_size of at least 1 and kvzip.overlap below it, got {self.chunk_size} and {self.overlap}"
            )
        if min(self.sinks, self.recent_size) < 0:
            raise ValueError(
                f"expected kvzip.sinks and kvzip.recent_size of 0 or more, got {self.sinks} and {self.recent_size}"
            )

    def second_pass(self) -> Repetition:
        """The prompt once more."""
        words = (self.instruction, self.continuation)
        return Repetition(self.chunk_size, self.overlap, self.sinks, words, self.plus)

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """What the repetition heeds, 1 for sinks; of the head that an entry is in, where whole heads are ranked."""
        found, first = self.observed(kv, REPEATED), kv.positions < self.sinks
        if self.head_level:
            inside = kv.valid & ~first
            found = found.masked_fill(~inside, 0.0).amax(-1, keepdim=True).expand(found.shape)
        return found.masked_fill(first, 1.0)

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Sinks before everything else."""
        return (kv.positions < self.sinks).long()

    def recent(self, budget: int) -> int:
        """What heads that are not ranked first are left with, where whole heads are ranked."""
        return min(self.recent_size, max(budget - self.sinks, 0) // 2) if self.head_level else 0
