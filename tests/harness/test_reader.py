"""What both adapters share: batched, forked and chunked readings equal a loop over one prompt, one token at a time."""

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.attach.forward import next_logits
from retention.data.render import Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import Runner
from retention.harness.generation import decoding_of
from retention.harness.prompt import batches, divided
from retention.harness.reader import Reader
from retention.harness.records import Records
from retention.harness.settings import Reading, named_policy, read_arguments
from retention.serving.decoding import Decoding
from tests.harness.models import examples, saved_text, words

POLICIES = {"snapkv": {}, "h2o": {"evict_every": 4}, "keydiff": {"prefill_chunk": 16}, "full": {"budget": "100%"}}


def reader_of(policy, **told):
    base = {"pretrained": str(saved_text()), "device": "cpu", "policy": policy, "budget": 12}
    return Reader(read_arguments(base | told)[1])


@pytest.fixture(scope="module", params=POLICIES)
def reader(request):
    return reader_of(request.param, **POLICIES[request.param])


@pytest.fixture(scope="module")
def prompts(reader):
    texts = [words(n, seed=n) + "|" + words(4, seed=n + 1) for n in (5, 9, 6)]
    plain = [text.replace("|", "") for text in texts]
    return [divided(encode(p), t, "|", encode, 500) for t, p in zip(texts, plain, strict=True)]


def encode(text):
    from tests import hub

    return hub.tokenizer({})(text)["input_ids"]


def fed(reader, cache, tokens):
    return next_logits(reader.model, cache, reader.text([tokens]))


def pairs(text):
    """Tokens of two characters."""
    return [int.from_bytes(text[i : i + 2].encode()) for i in range(0, len(text), 2)]


@pytest.mark.parametrize(
    ("text", "longest", "context", "question", "agnostic", "cut"),
    [
        ("ab|cdef", 9, "ab", "cdef", True, 0),
        ("abc|def", 9, "ab", "cdef", True, 0),  # what straddles the marker is the question's
        ("a|b|cdef", 9, "ab", "cdef", True, 0),  # the last marker counts
        ("abcdef", 9, "abcd", "ef", False, 0),
        ("abcdef|", 9, "abcd", "ef", True, 0),
        ("abcd|ef", 2, "cd", "ef", True, 1),
        ("ab|cdef", 2, "", "cdef", True, 1),
        ("abcdef", 1, "", "ef", False, 2),
    ],
)
def test_prompts_are_divided_without_changing_their_tokens(text, longest, context, question, agnostic, cut):
    found = divided(pairs(text.replace("|", "")), text, "|", pairs, longest)
    assert (found.context, found.question) == (tuple(pairs(context)), tuple(pairs(question)))
    assert (found.agnostic, found.cut) == (agnostic, cut)


def test_batches_put_long_rows_first_and_no_context_apart():
    assert batches([3, 9, 0, 5, 9], 2, alike=False) == [[1, 4], [3, 0], [2]]
    assert batches([3, 9, 0, 5, 9, 0], 4, alike=True) == [[1, 4], [3], [0], [2, 5]]


def test_continuations_weigh_as_read_alone_token_by_token(reader, prompts):
    choices = [[encode(" yes"), encode(" n")], [encode(" maybe it is")], [encode("x"), encode("y"), encode(" why not")]]
    with reader.open() as empty:
        if reader.chunked:
            caches = [reader.prefilled(empty, reader.text([p.context])) for p in prompts]
            pairs = zip(caches, prompts, choices, strict=True)
            found = [reader.weigh(cache, [p.question], [own])[0] for cache, p, own in pairs]
        else:
            cache = reader.prefilled(empty, reader.text([p.context for p in prompts]))
            found = reader.weigh(cache, [p.question for p in prompts], choices)
        for prompt, own, answers in zip(prompts, choices, found, strict=True):
            for tokens, (likely, greedy) in zip(own, answers, strict=True):
                cache, total, best = empty.fork(), 0.0, True
                fed(reader, cache, prompt.context)
                with cache.hold():
                    logits = fed(reader, cache, prompt.question)
                    for token in tokens:
                        total += float(torch.log_softmax(logits[0], -1)[token])
                        best = best and int(logits.argmax()) == token
                        logits = fed(reader, cache, [token])
                assert likely == pytest.approx(total, abs=1e-3)
                assert greedy is best


def test_texts_stream_as_read_chunk_by_chunk(reader):
    rows, counts = [[1, *encode(words(9, seed=s))][:41] for s in (1, 2)], [40, 25]
    chunk = reader.config.prefill_chunk or 512
    with reader.open() as empty:
        _, found = reader.stream(empty, rows, counts)
        for row, count, answer in zip(rows, counts, found, strict=True):
            cache, likely = empty.fork(), []
            for start in range(0, len(row) - 1, chunk):
                part = row[start : min(start + chunk, len(row) - 1)]
                cache_before = cache.fork()
                with cache_before.hold():
                    for i, token in enumerate(part):
                        logits = fed(reader, cache_before, [token])
                        likely.append(float(torch.log_softmax(logits[0], -1)[row[start + i + 1]]))
                fed(reader, cache, part)
            assert answer == pytest.approx(sum(likely[-count:]), abs=2e-3)


def test_answers_do_not_depend_on_their_batch_and_end_where_they_are_told(reader, prompts):
    drawn = Decoding(12, temperature=1.0, top_p=0.9)
    with reader.open() as empty:

        def written(chosen, decoding, seeds):
            cache = reader.prefilled(empty, reader.text([p.context for p in chosen]))
            return reader.write(cache, reader.text([p.question for p in chosen]), decoding, seeds)

        alone = [written([p], drawn, [seed])[0] for seed, p in enumerate(prompts)]
        if not reader.chunked:
            assert written(prompts, drawn, [0, 1, 2]) == alone
        assert written(prompts[:1], drawn, [7]) != written(prompts[:1], drawn, [8])
        greedy = written(prompts[:1], Decoding(12), [0])[0]
        text = reader.decode(greedy, [])
        stop = next(c for c in text[3:] if c not in text[:3] and c.isascii())
        short = written(prompts[:1], Decoding(12, stop=[stop]), [0])[0]
        assert len(short) <= len(greedy)
        assert reader.decode(short, [stop]) == text.split(stop)[0]


@pytest.mark.parametrize("policy", ["snapkv", "keydiff", "h2o", "random"])
def test_predictions_are_the_native_runners(policy):
    """The same contexts and questions through `evaluation.runner` and through the adapters' reader."""
    reader = reader_of(policy)
    renderer = Renderer(reader.loaded.processor, [])
    batch = renderer.render(examples())
    config = CacheConfig(reader.config.budget)
    arm = Arm(reader.loaded.name, reader.loaded.policy, config, "12", Protocol(), False)
    rows = [row for *_, rows in Runner(reader.model, renderer, "natural").run(batch, [arm], None) for row in rows]
    with reader.open() as empty:
        for example, row in zip(examples(), rows, strict=True):
            text, asked = example.segments[0].payload, example.turns[0].question
            prompt = divided(encode(text + asked), f"{text}|{asked}", "|", encode, 500)
            cache = reader.prefilled(empty, reader.text([prompt.context]))
            held = Records(Reading(), reader.loaded).held(cache, 1)[0]
            tokens = reader.write(cache, reader.text([prompt.question]), Decoding(8), [0])[0]
            assert reader.decode(tokens, []).strip() == row["prediction"]
            assert (held["seen"], held["kept"]) == (row["seen"], row["kept"])
            assert held["bytes"]["kept_logical"] == row["bytes"]["kept_logical"]


def test_the_model_is_as_it_was_outside_of_a_reading(reader):
    ids = torch.tensor([encode("red and blue")])
    before = reader.model(ids).logits
    with reader.open() as empty:
        reader.prefilled(empty, reader.text([encode(words(20))]))
    assert torch.equal(reader.model(ids).logits, before)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, Decoding(256, stop=[])),
        ({"until": "\n", "max_gen_toks": 8}, Decoding(8, stop=["\n"])),
        ({"until": ["a", "", "b"], "max_new_tokens": 9, "max_tokens": 3}, Decoding(9, stop=["a", "b"])),
        ({"temperature": 0.7, "top_p": 0.9}, Decoding(256, 0.7, 0.9, stop=[])),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 1, "top_p": None}, Decoding(256, stop=[])),
        ({"do_sample": True, "image_aspect_ratio": "pad"}, Decoding(256, 1.0, stop=[])),
    ],
)
def test_generation_arguments_mean_what_the_harnesses_say(told, expected):
    assert decoding_of(told, 256) == expected


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"polcy": "snapkv"}, "expected model arguments among .*policy.*got polcy"),
        ({}, "expected gates=<artefact>, or policy=<name>"),
        ({"policy": "snap"}, "expected a policy among .*snapkv"),
        ({"policy": "snapkv", "policy.windw": 3}, "expected settings of snapkv among window_size"),
        ({"policy": "snapkv", "batch_size": "auto"}, "expected batch_size as a number"),
        ({"policy": "attention_oracle"}, "reads where the answer lies"),
        ({"policy": "oracle"}, "reads where the answer lies"),
        ({"policy": "snapkv", "budget": "much"}, "expected a budget"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(told, message):
    with pytest.raises(ValueError, match=message):
        read_arguments({"pretrained": str(saved_text())} | told)


def test_generation_that_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="got num_beams=4"):
        decoding_of({"num_beams": 4}, 8)


def test_settings_of_a_policy_take_effect():
    assert named_policy("snapkv", {"window_size": 4}).window_size == 4
    assert named_policy("criticalkv", {"base": "keydiff"}).collectors


def test_a_manifest_names_what_was_asked_and_what_came_of_it(tmp_path):
    told = {"pretrained": str(saved_text()), "device": "cpu", "policy": "knorm", "budget": "25%"}
    reading, loaded = read_arguments(told | {"records": str(tmp_path), "context_end": "|"})
    records, reader = Records(reading, loaded), Reader(loaded)
    prompt = divided(encode("one two three four"), "one two| three four", "|", encode, 500)
    with reader.open() as empty:
        held = records.held(reader.prefilled(empty, reader.text([prompt.context])), 1)
    records.add("generate_until", [prompt], held, [{"task": "t", "doc_id": 0, "number": 0}])
    manifest = records.manifest()
    assert manifest["budget"] == {"requested": "25%", "resolved": [2, 2]}
    assert manifest["protocol"]["question"] == {"agnostic": 1}
    assert manifest["model"]["name"] == "text"
    assert manifest["kept_share"] == pytest.approx(2 / 7)
    assert {file.name for file in tmp_path.iterdir()} == {"manifest.json", "requests.jsonl"}


def test_gates_say_which_policy_ranks_by_them(tmp_path):
    from retention.gates import RetentionGates
    from retention.gates.dbtrim import DBTrim

    model = read_arguments({"pretrained": str(saved_text()), "device": "cpu", "policy": "full"})[1].model
    RetentionGates.for_model(DBTrim(), model).save_pretrained(tmp_path / "gates")
    told = {"pretrained": str(saved_text()), "device": "cpu", "gates": str(tmp_path / "gates"), "budget": 8}
    loaded = read_arguments(told)[1]
    assert loaded.name == "db_trim_kv"
    with evicting(loaded.model, loaded.policy, CacheConfig(Budget(8)), gates=loaded.gates) as cache:
        next_logits(loaded.model, cache, Reader(loaded).text([encode(words(20))]))
        assert int(cache.kept().sum()) <= 8 * cache.shape.num_layers * cache.shape.num_kv_heads
