"""Conversations on one model: what is said equals the model's own loop, whoever else is talking; bounded, saved, ended."""

import threading

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.cache.evicting import EvictingCache
from retention.gates.dbtrim import DBTrim
from retention.policies import POLICIES
from retention.serving.decoding import Decoding
from retention.serving.pipeline import pipeline
from tests import zoo
from tests.serving.models import opened, seen, text_model

NEW = {"max_new_tokens": 8}
SEEING = ["llava", "qwen3_vl", "internvl"]


@pytest.fixture(params=["qwen2", *SEEING])
def pipe(request):
    with opened(request.param) as found:
        found.name = request.param
        yield found


def message(pipe, words, seed=0):
    return seen(words, zoo.picture(16, 16, seed=seed)) if pipe.name != "qwen2" else words


def test_an_answer_is_what_generate_writes(pipe):
    """Prompt by the processor, stock generate() over an evicting cache of the same kind."""
    messages, images = pipe.prompts.read(message(pipe, "What is this?"))
    inputs = pipe.prompts.first([messages], [images])
    with_cache = {"past_key_values": pipe.conversation().cache, "do_sample": False}
    ids = pipe.model.generate(**inputs, **with_cache, **NEW)[0, inputs["input_ids"].shape[1] :]
    said = pipe(message(pipe, "What is this?"), **NEW)
    assert said["generated_text"] == pipe.tokenizer.decode(ids, skip_special_tokens=True)
    assert said["finish_reason"] == "length"


def test_a_conversation_reads_what_the_template_writes(pipe, monkeypatch):
    """First prompt, answer and what comes behind it are the whole chat; the answer's last token is read then."""
    read, encode = [], pipe.prompts._encoded
    monkeypatch.setattr(pipe.prompts, "_encoded", lambda texts, *rest, **more: read.append(texts) or encode(texts, *rest, **more))  # fmt: skip
    talk = pipe.conversation()
    first = talk.stream(message(pipe, "What is this?"), **NEW)
    first.whole()
    seen_before = int(talk.cache.seen())
    second = talk.stream(message(pipe, "And that?", seed=1), max_new_tokens=1)
    second.whole()
    assert talk.messages[1]["content"][0]["text"] == first.text
    whole = pipe.prompts._written(talk.messages[:-1])
    assert read[0][0] + first.text + read[1][0] == whole
    behind = encode(read[1], [pipe.prompts.read(message(pipe, "And that?", seed=1))[1]], special=False)
    assert int(talk.cache.seen()) == seen_before + 1 + behind["input_ids"].shape[1]


def test_turns_go_on_over_one_bounded_cache(pipe):
    talk = pipe.conversation()
    for turn in range(3):
        talk.say(message(pipe, "What is this, and what was that?", seed=turn), max_new_tokens=100)
        kept = talk.cache.kept()
        heads = kept.shape[0] * kept.shape[2]
        assert int(kept.sum()) <= heads * (12 + 64)
    assert int(talk.cache.seen()) > 350
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3
    with pytest.raises(ValueError, match="expected chat messages like"):
        talk.say([{"role": "user", "content": 3}])


def test_answers_do_not_depend_on_who_else_is_talking(pipe):
    questions = [message(pipe, f"What is {word}?", seed=i) for i, word in enumerate(["this", "that", "it all"])]
    alone = [[pipe.conversation().say(q, **NEW)] for q in questions]
    together, talks = [None] * 12, [pipe.conversation() for _ in range(12)]

    def talk(number):
        together[number] = talks[number].say(questions[number % 3], **NEW)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [alone[i % 3][0] for i in range(12)]
    rows = pipe(questions, **NEW)
    assert [row["generated_text"] for row in rows] == [said for (said,) in alone]


def test_a_saved_conversation_goes_on_as_if_it_never_stopped(pipe, tmp_path):
    talk = pipe.conversation()
    talk.say(message(pipe, "What is this?"), **NEW)
    talk.save(tmp_path / "talk")
    talk.save(tmp_path / "talk")  # again, in place of the one before
    assert len(list((tmp_path / "talk").iterdir())) == 2
    other, copy = pipe.resume(tmp_path / "talk"), talk.fork()
    said = talk.say(message(pipe, "And that?", seed=1), **NEW)
    assert other.say(message(pipe, "And that?", seed=1), **NEW) == said
    assert copy.say(message(pipe, "And that?", seed=1), **NEW) == said
    with pytest.raises(ValueError, match=r"expected a saved conversation in .*nowhere"):
        pipe.resume(tmp_path / "nowhere")


def test_text_comes_while_it_is_written_and_may_be_stopped():
    with opened() as pipe:
        answer = pipe.stream("What?", max_new_tokens=100_000)
        next(answer)
        answer.cancel()
        answer.whole()
        assert answer.reason == "cancelled"
        assert 0 < len(answer.tokens) < 10_000
        whole = pipe("What?", max_new_tokens=40)["generated_text"]
        stop = whole[5:7]
        cut = pipe("What?", max_new_tokens=40, stop=[stop])
        assert cut["finish_reason"] == "stop"
        assert whole.startswith(cut["generated_text"])
        assert cut["generated_text"].endswith(stop) or stop in cut["generated_text"]
        drawn = [pipe("What?", temperature=2.0, seed=seed, **NEW)["generated_text"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_the_model_s_own_end_ends_an_answer(monkeypatch):
    with opened() as pipe:
        tokens = pipe.stream("What?", **NEW)
        tokens.whole()
        monkeypatch.setattr(pipe.model.generation_config, "eos_token_id", tokens.tokens[3])
        answer = pipe.stream("What?", **NEW)
        answer.whole()
        assert (answer.tokens, answer.reason) == (tokens.tokens[:4], "stop")


def test_one_answer_at_a_time_and_errors_stay_with_their_conversation(monkeypatch):
    with opened(active=2) as pipe:
        talk, other = pipe.conversation(), pipe.conversation()
        answer = talk.stream("What?", max_new_tokens=500)
        with pytest.raises(ValueError, match="one answer of a conversation at a time"):
            talk.stream("And?")
        update, failing = EvictingCache.after_forward, talk.cache

        def failing_update(self):
            if self is failing:
                raise MemoryError("no room")
            return update(self)

        monkeypatch.setattr(EvictingCache, "after_forward", failing_update)
        assert other.say("What?", **NEW)
        with pytest.raises(MemoryError, match="no room"):
            answer.whole()
        with pytest.raises(ValueError, match="broke off with an error"):
            talk.say("And?")


def test_closing_ends_what_is_under_way_and_restores_the_model():
    model, _ = text_model()
    before = model.config._attn_implementation
    pipe = opened(active=1)
    answers = [pipe.stream("What?", max_new_tokens=100_000) for _ in range(3)]
    next(answers[0])
    pipe.close()
    for answer in answers:
        with pytest.raises(RuntimeError, match="this pipeline was closed"):
            answer.whole()
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="closed; open another"):
        pipe.stream("What?")


def test_gates_choose_their_policy_and_bytes_bound_a_conversation(tmp_path):
    model, processor = text_model()
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8), model)
    gates.save_pretrained(tmp_path / "gates")
    with opened(gates=tmp_path / "gates", policy=None, budget="16KiB") as pipe:
        talk = pipe.conversation()
        assert talk.cache.policy == POLICIES["db_trim_kv"]()
        talk.say("What is it? " * 20, **NEW)
        assert talk.cache.bytes().logical_total < 32 * 1024
    own = CacheConfig(Budget(9.0))
    with pipeline("text-generation", model=model, processor=processor, policy="knorm", cache=own) as pipe:
        assert pipe.conversation().cache.config is own


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"task": "summarization"}, "expected a task among image-text-to-text, text-generation"),
        ({"policy": None}, "expected gates=<artefact>, or policy=<name>"),
        ({"policy": "best"}, "expected a policy among .*got 'best'"),
        ({"processor": None}, "expected a processor"),
        ({"task": "image-text-to-text"}, "expected a model that sees"),
    ],
)
def test_what_does_not_fit_is_told(wrong, told):
    model, processor = text_model()
    given = {"task": "text-generation", "model": model, "processor": processor, "policy": "keydiff"} | wrong
    with pytest.raises(ValueError, match=told):
        pipeline(given.pop("task"), **given)
    with evicting(model, POLICIES["full"]()):  # nothing is left hanging on the model
        pass


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": "word"}])
def test_decoding_is_checked(wrong):
    with pytest.raises(ValueError, match="expected"):
        Decoding(**wrong)


def test_the_embedded_model_in_one_line():
    with pipeline(policy="keydiff", budget="50%") as pipe, torch.no_grad():
        said = pipe(seen("<ask> red-K", zoo.picture(32, 32)), max_new_tokens=1)
        assert len(said["generated_text"]) > 0
