"""The example server under load: many conversations in bounded memory, none lost, slow and vanishing clients."""

import gc
import json
import threading
import time

import pytest
from fastapi.testclient import TestClient

from examples.server import create
from retention.serving.pool import Pool
from tests.serving.models import opened

NEW = {"max_tokens": 6}


@pytest.fixture
def pipe():
    with opened(active=4) as found:
        yield found


def client_of(pipe, max_bytes=10**9, folder=None):
    pool = Pool(pipe, max_bytes, folder)
    return TestClient(create(pipe, pool)), pool


def ask(client, messages, **more):
    found = client.post("/v1/chat/completions", json={"messages": messages, **NEW, **more})
    assert found.status_code == 200, found.text
    return found.json()


def user(text):
    return {"role": "user", "content": text}


def answer_of(reply):
    return reply["choices"][0]["message"]


def dialogue(client, number, turns=3):
    messages, held = [], []
    for turn in range(turns):
        messages.append(user(f"Question {number}, part {turn}: what is it?"))
        reply = ask(client, messages)
        messages.append(answer_of(reply))
        held.append(reply["usage"]["cache_bytes"])
    return [m["content"] for m in messages[1::2]], held


def test_a_chat_goes_on_over_its_cache(pipe):
    client, pool = client_of(pipe)
    said, _ = dialogue(client, 0)
    talk = pipe.conversation()
    assert said == [talk.say(f"Question 0, part {turn}: what is it?", max_new_tokens=6) for turn in range(3)]
    assert client.get("/health").json() == {"idle_conversations": 1, "idle_bytes": pool.bytes}
    assert client.get("/v1/models").json()["data"][0]["id"] == "retention"


def test_text_is_streamed(pipe):
    client, _ = client_of(pipe)
    whole = answer_of(ask(client, [user("What?")]))["content"]
    with client.stream(
        "POST", "/v1/chat/completions", json={"messages": [user("What?")], "stream": True, **NEW}
    ) as got:
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole
    assert chunks[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("on_disk", [True, False])
def test_many_conversations_in_little_memory(pipe, tmp_path, on_disk):
    """Sixteen at once over room for four: the others wait on disk, or are read anew."""
    alone = [dialogue(client_of(pipe)[0], number) for number in range(4)]
    one = max(alone[0][1])
    client, pool = client_of(pipe, 4 * one, tmp_path if on_disk else None)
    found, most = [None] * 16, [0]

    def talk(number):
        found[number] = dialogue(client, number % 4)[0]
        most[0] = max(most[0], pool.bytes)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if on_disk:
        assert found == [alone[i % 4][0] for i in range(16)]
    assert all(said is not None and len(said) == 3 for said in found)
    assert most[0] <= 4 * one
    assert pool.bytes <= 4 * one


def test_slow_and_vanishing_clients_hold_nobody_up(pipe):
    client, pool = client_of(pipe)
    slow = pipe.stream("What?", max_new_tokens=100_000)  # nobody reads it
    begin = time.perf_counter()
    assert answer_of(ask(client, [user("And what?")]))["content"]
    assert time.perf_counter() - begin < 20
    slow.cancel()
    told = {"messages": [user("Where?")], "stream": True, "max_tokens": 100_000}
    with client.stream("POST", "/v1/chat/completions", json=told) as got:
        next(got.iter_lines())
    assert len(pool) == 1  # what was cut off is not kept
    assert answer_of(ask(client, [user("And what?")]))["content"]


def test_a_stream_that_is_thrown_away_waits_for_no_lock(pipe):
    """It may be collected in a thread that holds the pool's."""
    client, pool = client_of(pipe)
    told = {"messages": [user("Where?")], "stream": True, **NEW}
    for _ in range(3):
        with client.stream("POST", "/v1/chat/completions", json=told) as got:
            next(got.iter_lines())

    def collect():
        with pool._lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_bad_requests_are_told(pipe):
    client, _ = client_of(pipe)
    for wrong in ({"messages": [{"role": "user", "content": 3}]}, {"messages": [user("What?")], "temperature": -1}):
        found = client.post("/v1/chat/completions", json=wrong)
        assert found.status_code == 400
        assert "expected" in found.json()["detail"]
    assert client.post("/v1/chat/completions", json={}).status_code == 422
