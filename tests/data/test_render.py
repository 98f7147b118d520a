"""From examples to model inputs, with the embedded processor and with a LLaVA processor of the usual make."""

from itertools import chain
from string import ascii_uppercase, digits
from typing import Any

import numpy as np
import pytest
import torch

from retention.data.example import EvidenceRef, Example, Segment, Turn
from retention.data.render import Renderer
from retention.tasks.needles import Needles

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
SPOKEN = (
    "Which digit is in the cell right of the red green blue letter Answer with one context holds facts USER ASSISTANT"
)
WORDS = list(dict.fromkeys([*SPECIAL, *SPOKEN.split(), *":.,?", *digits, *ascii_uppercase]))


def llava_tokenizer() -> Any:
    """Word-level, but with what Llama's has: a beginning-of-sequence token that the tokenizer adds by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template=LLAVA_TEMPLATE,
    )


def llava_processor() -> Any:
    """48 x 48 pixels in patches of 8: 6 x 6 tokens per image, the class token dropped as LLaVA does."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=llava_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


@pytest.fixture(scope="module")
def renderers(embedded_processor):
    llava = llava_processor()
    return {
        "embedded": Renderer(embedded_processor, [2]),
        "llava": Renderer(llava, [WORDS.index("<image>")]),
    }


STYLES = {"embedded": "symbolic", "llava": "natural"}
PER_IMAGE = {"embedded": 16, "llava": 36}
both = pytest.mark.parametrize("name", ["embedded", "llava"])


def examples(name):
    """A short and a long context."""
    tasks = (Needles(n_images=1, n_needles=3, n_turns=2), Needles(n_images=3, n_needles=9, n_turns=4))
    return [task.example(0, "train", i, style=STYLES[name]) for i, task in enumerate(tasks)]


def conversation(example):
    """The whole example as the messages of a chat."""
    messages = []
    for i, turn in enumerate(example.turns):
        images = [{"type": "image"}] * len(example.images) if i == 0 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def encoded_by_the_processor(processor, example):
    """Ids of the whole chat, the way the processor itself tokenizes a chat: a beginning token exactly once."""
    text = processor.apply_chat_template(conversation(example), tokenize=False)
    bos = processor.tokenizer.bos_token
    out = processor(
        text=[text], images=[example.images], return_tensors="pt", add_special_tokens=not text.startswith(bos)
    )
    return out["input_ids"][0].tolist()


def real(inputs, row):
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


@both
def test_context_and_turns_together_are_the_chat_as_the_processor_writes_it(renderers, name):
    renderer = renderers[name]
    batch = renderer.training_batch(examples(name))
    for row, example in enumerate(examples(name)):
        assert real(batch.inputs, row) == encoded_by_the_processor(renderer.processor, example)


@both
def test_no_word_is_unknown(renderers, name):
    renderer = renderers[name]
    batch = renderer.training_batch(examples(name))
    for row in range(2):
        assert renderer.tokenizer.unk_token_id not in real(batch.inputs, row)


@both
def test_a_context_is_the_same_alone_and_in_a_batch(renderers, name):
    renderer = renderers[name]
    together = renderer.render(examples(name))
    for row, example in enumerate(examples(name)):
        alone = renderer.render([example])
        assert real(alone.inputs, 0) == real(together.inputs, row)
        assert alone.evidence[0] == together.evidence[row]
        assert alone.turns[0] == together.turns[row]


@both
def test_contexts_are_padded_on_the_left(renderers, name):
    rendered = renderers[name].render(examples(name))
    mask = rendered.inputs["attention_mask"]
    assert mask[0].sum() < mask[1].sum() == mask.shape[1]
    assert (mask.diff(dim=1) >= 0).all()
    assert (rendered.inputs["input_ids"][mask == 0] == renderers[name].pad).all()
    assert rendered.lengths == mask.sum(1).tolist()


@both
def test_the_context_holds_all_images_and_ends_before_the_first_question(renderers, name):
    renderer = renderers[name]
    rendered = renderer.render(examples(name))
    for row, example in enumerate(examples(name)):
        ids, turns = real(rendered.inputs, row), rendered.turns[row]
        whole = encoded_by_the_processor(renderer.processor, example)
        assert whole[: len(ids)] == ids
        assert whole[len(ids) :][: len(turns.questions[0])] == turns.questions[0]
        assert rendered.visual[row].sum() == PER_IMAGE[name] * len(example.images)
        letter = example.turns[0].question.split("?")[0].replace("-", " ").split()[-1]
        assert letter not in renderer.tokenizer.decode(ids).replace("USER", "").split()
    assert rendered.inputs["pixel_values"].shape[0] == 4


def test_symbolic_turns_are_a_question_and_one_digit(renderers):
    renderer = renderers["embedded"]
    for example in examples("embedded"):
        turns = renderer.turns(example)
        for turn, question, answer in zip(example.turns, turns.questions, turns.answers, strict=True):
            assert renderer.tokenizer.decode(question).split() == turn.question.split()
            assert [renderer.tokenizer.decode(token) for token in answer] == [turn.answer]


def test_later_questions_begin_with_what_the_template_writes_after_an_answer(renderers):
    renderer = renderers["llava"]
    first, later = renderer.turns(examples("llava")[0]).questions
    words = [renderer.tokenizer.convert_ids_to_tokens(ids) for ids in (first, later)]
    assert words[0][0] == "Which"
    assert words[1][:3] == ["USER", ":", "Which"]
    assert words[0][-2:] == words[1][-2:] == ["ASSISTANT", ":"]


@both
def test_labels_are_on_the_answers_only(renderers, name):
    renderer = renderers[name]
    batch = renderer.training_batch(examples(name))
    assert batch.labels.shape == batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape
    scored = batch.labels != -100
    assert torch.equal(batch.labels[scored], batch.inputs["input_ids"][scored])
    for row, example in enumerate(examples(name)):
        turns = renderer.turns(example)
        assert batch.labels[row][scored[row]].tolist() == list(chain(*turns.answers))
        ids, place = real(batch.inputs, row), len(real(renderer.render([example]).inputs, 0))
        offset = batch.labels.shape[1] - len(ids)
        for question, answer in zip(turns.questions, turns.answers, strict=True):
            place += len(question)
            assert batch.labels[row][offset + place : offset + place + len(answer)].tolist() == answer
            place += len(answer)
        assert place == len(ids)


@both
def test_training_rows_are_padded_on_the_left_and_keep_their_images(renderers, name):
    batch = renderers[name].training_batch(examples(name))
    mask = batch.inputs["attention_mask"]
    assert mask[0].sum() < mask[1].sum() == mask.shape[1]
    assert (mask.diff(dim=1) >= 0).all()
    assert (batch.labels[mask == 0] == -100).all()
    assert (batch.inputs["input_ids"][mask == 0] == renderers[name].pad).all()
    assert batch.inputs["pixel_values"].shape[0] == 4
    assert batch.ids == [example.id for example in examples(name)]


@pytest.mark.parametrize(
    ("cell", "tokens"), [((0, 0), [0, 1, 6, 7]), ((1, 2), [9, 10, 15, 16]), ((3, 3), [28, 29, 34, 35])]
)
def test_evidence_is_every_token_that_overlaps_the_cell(renderers, cell, tokens):
    """6 x 6 tokens under 4 x 4 cells: each cell touches 2 x 2 tokens."""
    images = [Segment("image", np.zeros((48, 48, 3), np.uint8)) for _ in range(2)]
    turn = Turn("Which digit", "3", [EvidenceRef(1, *cell)])
    rendered = renderers["llava"].render([Example("x", images, [turn], "after", {"grid": 4})])
    places = rendered.visual[0].nonzero().flatten().tolist()
    assert [places.index(p) - 36 for p in rendered.evidence[0][0]] == tokens


def test_evidence_is_unknown_where_cells_cannot_be_mapped(renderers):
    image = Segment("image", np.zeros((32, 32, 3), np.uint8))
    turn = Turn("<ask> red-A", "3", [EvidenceRef(0, 0, 0)])
    rendered = renderers["embedded"].render([Example("x", [image], [turn, turn], "deferred_turn")])
    assert rendered.evidence == [[None, None]]


def test_a_tokenizer_alone_renders_texts(renderers):
    turns = [Turn("Which letter", "A"), Turn("Which digit", "7")]
    texts = [Segment("text", "context holds facts"), Segment("text", "A 7")]
    renderer = Renderer(llava_tokenizer(), [])
    pair = [Example("x", texts, turns, "deferred_turn"), Example("y", texts[:1], turns, "deferred_turn")]
    rendered = renderer.render(pair)
    words = [renderer.tokenizer.convert_ids_to_tokens(real(rendered.inputs, row)) for row in range(2)]
    assert [w[-5:] for w in words] == [
        ["context", "holds", "facts", "A", "7"],
        ["USER", ":", "context", "holds", "facts"],
    ]
    assert not rendered.visual.any()
    assert rendered.evidence == [[None, None]] * 2
    batch = renderer.training_batch(pair)
    assert set(batch.inputs) >= {"input_ids", "attention_mask"}
    assert batch.labels[batch.labels != -100].tolist() == [WORDS.index("A"), WORDS.index("7")] * 2


def test_a_segment_of_an_unknown_kind_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="kind 'text' or 'image', got 'sound'"):
        Segment("sound", b"")
