"""Rendering and answering with the processors of every vision-language family, positions of three axes included."""

import copy

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.data.example import Example, Segment, Turn
from retention.data.render import Renderer
from retention.models import family_of
from retention.tasks.answering import answer_turns, prefill, read_on
from tests import hub, zoo
from tests.cache.helpers import small
from tests.data.test_render import conversation

VISION = [name for name in zoo.EVERY if name not in zoo.TEXT]
NEW = 3


def example(number, sizes, *, later=()):
    segments = [Segment("image", zoo.picture(*size, seed=i)) for i, size in enumerate(sizes)]
    turns = [Turn(f"What is {word}?", "it is 7", max_new_tokens=NEW) for word in ("this", "that there", "it")]
    second = [Segment("image", zoo.picture(*size, seed=9 + i)) for i, size in enumerate(later)]
    second += [Segment("text", " and some text ")] if later else []
    return Example(str(number), segments, turns, "deferred_turn", later=second)


def renderer_of(name):
    model, processor = zoo.loaded(name)
    return Renderer(processor, family_of(model).visual_ids(model.config))


PAIR = [example(0, [(16, 16), (24, 32)]), example(1, [(32, 20)])]


@pytest.mark.parametrize("name", VISION)
def test_training_rows_are_what_the_processor_makes_of_the_whole_chat(name):
    """Also what it tells of each token beside the ids."""
    renderer = renderer_of(name)
    batch = renderer.training_batch(PAIR)
    text = [renderer.processor.apply_chat_template(conversation(e), tokenize=False) for e in PAIR]
    images = [e.images for e in PAIR]
    whole = renderer.processor(text=text, images=images, padding=True, padding_side="left", return_tensors="pt")
    for row in range(2):
        last = "".join(renderer.tokenizer.convert_ids_to_tokens(whole["input_ids"][row][-4:].tolist()))
        assert last.endswith(("Ċ", "\n"))  # the template's own end behind the last answer
    mask = batch.inputs["attention_mask"].bool()
    assert set(batch.inputs) == set(whole)
    for key, value in whole.items():
        if value.shape == whole["input_ids"].shape:
            for row in range(2):
                real = value[row][whole["attention_mask"][row].bool()][:-1]
                assert torch.equal(batch.inputs[key][row][mask[row]], real), key
        else:
            assert torch.equal(batch.inputs[key], value), key
    model, _ = zoo.loaded(name)
    assert torch.isfinite(model(**batch.inputs).logits[mask]).all()


APART = [name for name in VISION if name != "llava_onevision"]
"""Families that encode an image the same whatever other images are in its prompt."""


@pytest.mark.parametrize(("name", "later"), [*((n, ()) for n in VISION), *((n, ((20, 32),)) for n in APART)])
def test_answers_over_the_cache_are_those_of_one_forward(name, later, monkeypatch):
    """Prefill, a second prompt with an image, and several turns of a padded batch: positions and masks are right."""
    (model, _), renderer = zoo.loaded(name), renderer_of(name)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    pair = [example(0, [(16, 16), (24, 32)], later=later), example(1, [(32, 20)], later=later)]
    rendered = renderer.render(pair)
    with evicting(model, small("knorm"), CacheConfig(Budget(2000.0))) as cache:
        prefill(model, cache, rendered, pad=renderer.pad)
        read_on(model, cache, rendered)
        answers = answer_turns(model, cache, rendered, pad=renderer.pad)
    for row, one in enumerate(pair):
        said = copy.deepcopy(one)
        for turn in said.turns:
            turn.answer = "no"
        whole = renderer.render([said.whole()])
        ids = whole.inputs["input_ids"][0].tolist()
        inputs = {k: v for k, v in whole.inputs.items() if k != "attention_mask"}
        for turn in range(3):
            ids += whole.turns[0].questions[turn]
            for _ in range(NEW):
                given = inputs | {"input_ids": torch.tensor([ids])}
                for key in ("mm_token_type_ids", "token_type_ids"):
                    if key in inputs:
                        kinds = inputs[key][0].tolist()
                        given[key] = torch.tensor([kinds + [0] * (len(ids) - len(kinds))])
                with torch.no_grad():
                    ids.append(int(model(**given, use_cache=False).logits[0, -1].argmax()))
            assert ids[-NEW:] == answers[row][turn], (row, turn)


@pytest.mark.parametrize("name", VISION)
def test_the_first_question_may_be_read_before_the_eviction(name):
    (model, _), renderer = zoo.loaded(name), renderer_of(name)
    rendered = renderer.render(PAIR)
    with evicting(model, small("snapkv"), CacheConfig(Budget(0.5, "fraction"))) as cache:
        logits = prefill(model, cache, rendered, pad=renderer.pad, first_question=True)
        assert cache.evicted
    with evicting(model, small("knorm"), CacheConfig(Budget(2000.0))) as cache:
        prefill(model, cache, rendered, pad=renderer.pad)
        answers = answer_turns(model, cache, rendered, pad=renderer.pad)
    assert [row[0][0] for row in answers] == logits.argmax(-1).tolist()


TEMPLATES = {
    "strings": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}",
    "none": None,
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_text_models_get_strings_or_plain_lines(kind):
    """Templates of text models take no lists of parts; base models have no template at all."""
    tokenizer = hub.tokenizer({})
    tokenizer.chat_template = TEMPLATES[kind]
    turns = [Turn("When?", "now"), Turn("Where?", "here")]
    one = Example("x", [Segment("text", "A long "), Segment("text", "story. ")], turns, "deferred_turn")
    renderer = Renderer(tokenizer, [])
    batch = renderer.training_batch([one])
    text = tokenizer.decode(batch.inputs["input_ids"][0])
    assert (
        text
        == {
            "strings": "<user>A long story. When?<assistant>now<user>Where?<assistant>here",
            "none": "A long story. When?\nnow\nWhere?\nhere",
        }[kind]
    )
    assert tokenizer.decode(batch.labels[0][batch.labels[0] != -100]) == "nowhere"
