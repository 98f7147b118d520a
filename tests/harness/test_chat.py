"""Chats with images in two parts: the tokens are those of the native renderer, and of the whole chat."""

import pytest
import torch

from retention.data.render import Renderer
from retention.harness.chat import Chats, prompts_of
from retention.models import family_of
from retention.tasks import TASKS
from tests import zoo

MARK = "|||"


def message(example, mark=MARK):
    shown = [
        {"type": "image", "image": s.payload} if s.kind == "image" else {"type": "text", "text": s.payload}
        for s in example.segments
    ]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": mark + example.turns[0].question}]}]


def test_contexts_and_questions_are_the_renderers(embedded_model, embedded_processor):
    examples = [TASKS["needles"]().example(0, "test", i) for i in range(2)]
    visual_ids = family_of(embedded_model).visual_ids(embedded_model.config)
    rendered = Renderer(embedded_processor, visual_ids).render(examples)
    chats = Chats(embedded_processor, MARK)
    written = [chats.written(*chats.read(message(example))) for example in examples]
    contexts, questions = chats.inputs(written)
    assert {name: value.shape for name, value in contexts.items()} == {n: v.shape for n, v in rendered.inputs.items()}
    assert all(torch.equal(value, rendered.inputs[name]) for name, value in contexts.items())
    found = prompts_of(written, contexts, questions)
    assert [list(prompt.question) for prompt in found] == [turns.questions[0] for turns in rendered.turns]
    assert all(prompt.agnostic for prompt in found)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_a_chat_in_two_parts_is_the_whole_chat(family):
    _, processor = zoo.loaded(family)
    content = [
        {"type": "image", "image": zoo.picture(16, 16)},
        {"type": "text", "text": f"a{MARK}b"},
        {"type": "image", "image": zoo.picture(16, 16, seed=1)},
        {"type": "text", "text": "What?"},
    ]
    chat = [{"role": "user", "content": content}]
    marked, plain = Chats(processor, MARK), Chats(processor, None)
    one = marked.written(*marked.read(chat))
    assert (len(one.images), len(one.later)) == (1, 1)
    context, question = marked.inputs([one])
    unmarked = [{"role": "user", "content": [*content[:1], {"type": "text", "text": "ab"}, *content[2:]]}]
    whole, last = plain.inputs([plain.written(*plain.read(unmarked))])
    rows = [torch.cat([a["input_ids"], b["input_ids"]], 1) for a, b in ((context, question), (whole, last))]
    assert torch.equal(*rows)
    assert last["input_ids"].shape == (1, 1)
    assert whole["attention_mask"].shape == whole["input_ids"].shape


def test_later_rounds_begin_with_the_token_that_no_cache_has_seen():
    _, processor = zoo.loaded("llava")
    chats = Chats(processor, MARK)
    asked, _ = chats.read([{"role": "user", "content": f"one{MARK} two"}])
    said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    new, images = chats.read([{"role": "user", "content": f"and{MARK} three?"}])
    behind = chats.following([*asked, said], new, images, 77, ended=False)["input_ids"][0].tolist()
    assert behind[0] == 77
    assert MARK not in processor.tokenizer.decode(behind)
    first = behind[1]
    again = {ended: chats.following([*asked, said], new, images, first, ended=ended) for ended in (True, False)}
    assert again[True]["input_ids"][0].tolist() == behind[1:]
    assert again[False]["input_ids"][0].tolist() == [first, *behind[1:]]
