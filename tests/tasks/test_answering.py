"""Answers that are drawn, turns that do not see each other, and a budget that holds while an answer is written."""

import pytest
import torch

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.data.example import Example, Sampling, Segment, Turn
from retention.data.render import Renderer
from retention.models import family_of
from retention.policies import POLICIES
from retention.tasks.answering import answer_turns, prefill
from retention.tasks.sampling import Sampler, nucleus
from tests.zoo import loaded


def answers(examples, *, config=None):
    """Tokens answered by a tiny model, and entries kept per head at the end."""
    model, processor = loaded("qwen2_vl")
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    policy = POLICIES["streaming_llm" if config else "full"]()
    with evicting(model, policy, config or CacheConfig(budget=Budget(1.0, "fraction"))) as cache:
        rendered = renderer.render(examples)
        prefill(model, cache, rendered, pad=renderer.pad)
        return answer_turns(model, cache, rendered, pad=renderer.pad), cache.kept().max().item()


def example(turns=2, new=5, **more):
    asked = [Turn(f"question {i}?", "a", max_new_tokens=new) for i in range(turns)]
    return Example("x", [Segment("text", "A mill by the lake. " * 4)], asked, "after", **more)


def test_independent_turns_answer_as_each_would_alone():
    whole, _ = answers([example(turns=3, independent=True)])
    for i in range(3):
        alone = example(turns=3)
        alone.turns = alone.turns[i : i + 1]
        assert answers([alone])[0][0][0] == whole[0][i]
    assert answers([example(turns=3)])[0][0][1:] != whole[0][1:]


def test_the_budget_holds_while_answers_are_written_where_an_example_is_about_that():
    config = CacheConfig(budget=Budget(24, "tokens"), evict_every=4)
    assert answers([example(turns=1, new=40, evicts_answers=True)], config=config)[1] < 24 + 5
    assert answers([example(turns=1, new=40)], config=config)[1] > 24 + 40


def test_drawn_tokens_are_the_seeds_whatever_stands_beside_them():
    drawn = [example(new=8, sampling=Sampling(2.0, 0.95, seed)) for seed in (1, 2)]
    together, _ = answers([drawn[0], drawn[1], example(new=8)])
    assert together[0] == answers([drawn[0]])[0][0]
    assert together[0] != together[1]
    assert together[2] == answers([example(new=8)])[0][0]
    assert answers([example(new=8, sampling=Sampling(1e-6))])[0][0] == together[2]


def test_the_nucleus_is_the_smallest_set_with_its_share():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert torch.allclose(nucleus(shares.log(), Sampling(1.0, 0.75)), torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert torch.allclose(nucleus(shares.log(), Sampling(1.0, 1.0)), shares)
    hot = nucleus(shares.log(), Sampling(2.0, 1.0))
    assert torch.allclose(hot, shares.sqrt() / shares.sqrt().sum())
    sampler = Sampler([example(sampling=Sampling(1.0, 0.75, seed)) for seed in range(400)])
    picked = sampler(shares.log().expand(400, -1)).bincount(minlength=4) / 400
    assert picked[0].item() == pytest.approx(0.625, abs=0.08)
    assert picked[2:].sum() == 0
