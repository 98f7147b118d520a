"""Several gate sets in one pipeline and behind one server: every conversation is scored by its own, whoever else talks."""

import threading

import pytest
import torch
from fastapi.testclient import TestClient

from examples.server import create
from retention import GateSets, RetentionGates
from retention.gates.trim import Trim
from retention.serving.pool import Pool
from tests.serving.models import opened, text_model
from tests.tiny import tiny_qwen3

QUESTIONS = ["What is it, and where has it been all the time?", "And what was that?"]
NEW = {"max_new_tokens": 6}


def made(seed, model=None):
    """Gates that rank tokens in a way of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = RetentionGates.for_model(Trim(init_half_life=20.0), model or text_model()[0])
        for name, parameter in gates.named_parameters():
            if name.endswith("2.weight"):
                torch.nn.init.normal_(parameter, std=2.0)
    return gates.requires_grad_(False)


@pytest.fixture(scope="module")
def sets():
    return GateSets({"maths": made(1), "chat": made(2)})


@pytest.fixture(scope="module")
def alone(sets):
    """What is said and held where a pipeline has these gates only."""
    found = {}
    for name in sets:
        with opened(gates=sets[name], policy=None) as pipe:
            found[name] = had(pipe.conversation())
    return found


@pytest.fixture
def pipe(sets):
    with opened(gates=sets, policy=None) as found:
        yield found


def held(cache):
    """Positions that every head keeps, in order."""
    states = (layer.state() for layer in cache.evicting_layers)
    return [(state.positions * state.valid).sort(-1).values.tolist() for state in states]


def had(talk):
    """A dialogue, and what its cache holds in the end."""
    return [talk.say(question, **NEW) for question in QUESTIONS], held(talk.cache)


def test_each_conversation_keeps_what_its_own_gates_rank_high(pipe, alone):
    """Eight at once, from threads that begin them too."""
    assert alone["maths"][1] != alone["chat"][1]
    names, found = [None, "maths", "chat", "chat"] * 2, [None] * 8

    def talk(number):
        found[number] = had(pipe.conversation(names[number]))

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone[name or "maths"] for name in names]


def test_batches_streams_forks_and_what_was_saved_stay_with_their_gates(pipe, alone, tmp_path):
    said, kept = alone["chat"]
    assert pipe(QUESTIONS[0], gates="chat", **NEW)["generated_text"] == said[0]
    assert [row["generated_text"] for row in pipe(QUESTIONS[:1] * 2, gates="chat", **NEW)] == said[:1] * 2
    assert pipe.stream(QUESTIONS[0], gates="chat", **NEW).whole() == said[0]
    talk = pipe.conversation("chat")
    talk.say(QUESTIONS[0], **NEW)
    talk.save(tmp_path / "talk")
    for other in (talk.fork(), pipe.resume(tmp_path / "talk")):
        assert (other.say(QUESTIONS[1], **NEW), held(other.cache)) == (said[1], kept)
    pipe.close()
    with (
        opened(gates=made(1), policy=None) as another,
        pytest.raises(ValueError, match="opened without gate sets, got 'chat'"),
    ):
        another.resume(tmp_path / "talk")


def test_a_folder_of_sets_is_read_and_unknown_names_are_told(sets, alone, tmp_path):
    sets.save_pretrained(tmp_path)
    with opened(gates=tmp_path, policy=None) as pipe:
        assert pipe.gate_sets == ["chat", "maths"]  # as they lie in the folder
        assert had(pipe.conversation("maths")) == alone["maths"]
        with pytest.raises(ValueError, match="expected a gate set among chat, maths, got 'art'"):
            pipe.conversation("art")


def test_sets_that_do_not_fit_are_told_before_anybody_talks(sets):
    ranked = made(3)
    ranked.training_record = {"objective": "kvzap"}
    mixed = GateSets({"maths": sets["maths"], "ranked": ranked})
    for wrong, told in ((GateSets({"a": made(1, tiny_qwen3())}), "gates were trained for"), (mixed, "objective")):
        with pytest.raises(ValueError, match=told):
            opened(gates=wrong, policy="db_trim_kv")
    with opened(gates=sets, policy=None) as pipe:  # nothing is left hanging on the model
        assert pipe.gate_sets == ["maths", "chat"]


def test_a_request_names_its_gate_set_as_its_model(pipe, alone):
    client = TestClient(create(pipe, Pool(pipe, 10**9)))
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["retention", "maths", "chat"]
    for model in ("maths", "chat", "retention", None):
        messages = []
        for question, said in zip(QUESTIONS, alone[model if model in alone else "maths"][0], strict=True):
            messages.append({"role": "user", "content": question})
            told = {"model": model, "messages": messages, "max_tokens": 6}
            reply = client.post("/v1/chat/completions", json=told)
            messages.append(reply.json()["choices"][0]["message"])
            assert messages[-1]["content"] == said
    assert client.get("/health").json()["idle_conversations"] == 4  # the same words under other gates are another chat
    wrong = client.post("/v1/chat/completions", json={"model": "art", "messages": messages[:1]})
    assert wrong.status_code == 404
    assert wrong.json()["detail"] == "expected a model among retention, maths, chat, got 'art'"
