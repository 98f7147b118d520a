"""An evaluation tells the attention oracle the questions with their answers, and brings words to repeat the context."""

import torch

from retention import Budget, CacheConfig
from retention.data.render import Rendered, Renderer, Turns
from retention.evaluation.arms import Arm
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import Runner, dialogues
from retention.policies.kvzip import KVzip
from retention.policies.oracle import AttentionOracle
from retention.policies.random import Random
from retention.tasks.needles import Needles


def test_answers_are_read_off_the_question_and_all_of_the_answer_but_its_end():
    turns = [Turns([[1, 2], [3]], [[4, 5], [6]]), Turns([[1, 2], [3, 7, 8]], [[4], [6]])]
    told = dialogues(Rendered({}, torch.zeros(2, 0), turns, [], []))
    assert told.ids.tolist() == [[1, 2, 4, 5, 3, 6, 0], [1, 2, 4, 3, 7, 8, 6]]
    assert told.valid.tolist() == [[True] * 6 + [False], [True] * 7]
    assert told.reading.long().tolist() == [[0, 1, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 1, 0]]


def test_knowing_the_answers_is_worth_more_than_chance(embedded_model, embedded_processor):
    ids = embedded_model.config.image_token_id
    runner = Runner(embedded_model, Renderer(embedded_processor, [ids]), "symbolic")
    batch = next(runner.batches(Needles(), "val", 0, 6, 6))
    for words, expected in (("agnostic", True), ("streaming", False)):
        protocol, config = Protocol.parse(words), CacheConfig(Budget(0.05, "fraction"))
        if words == "streaming":
            config.chunk_by_image = True
        arms = [
            Arm(name, policy, config, "5%", protocol, needs_gates=False)
            for name, policy in (("oracle", AttentionOracle()), ("kvzip", KVzip()), ("random", Random()))
        ]
        right = {
            arm.name: torch.tensor([row["score"] for row in rows], dtype=torch.float).mean()
            for arm, cache, rows in runner.run(batch, arms, None)
            if cache.evicted
        }
        assert set(right) == {"oracle", "kvzip", "random"}
        assert right["oracle"] > right["random"] + 0.5 * expected
