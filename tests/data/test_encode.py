"""Chats as training rows, with real processors: labels are the answers, a batch is its rows, the whole chat is read."""

import numpy as np
import pytest
import torch
from PIL import Image

from retention.data.chat import read_chat
from retention.data.encode import Encoder, Rules
from retention.data.media import BadRow
from retention.models import family_of
from tests import hub, zoo

VISION = [name for name in zoo.EVERY if name not in zoo.TEXT]


def picture(*size, seed=0):
    return Image.fromarray(zoo.picture(*size, seed=seed))


def encoder_of(name, **rules):
    model, processor = zoo.loaded(name)
    return Encoder(processor, family_of(model).visual_ids(model.config), Rules(**rules))


def two_images():
    """An image in the first question, another after an answer."""
    image = [{"type": "image", "image": picture(16, 16, seed=1)}, {"type": "text", "text": "What is this?"}]
    later = [{"type": "text", "text": "And is it 7?"}, {"type": "image", "image": picture(24, 32, seed=2)}]
    messages = [
        {"role": "user", "content": image},
        {"role": "assistant", "content": "it is 7"},
        {"role": "user", "content": later},
        {"role": "assistant", "content": "it"},
        {"role": "user", "content": "it is 7?"},
        {"role": "assistant", "content": "it is 7, or is it"},
    ]
    return read_chat({"messages": messages}, "two")


def one_image():
    return read_chat({"question": "<image>\nWhat?", "answer": "no", "image": picture(32, 20, seed=3)}, "one")


def no_image():
    return read_chat({"prompt": "What is a cat, then?", "response": "a dog"}, "none")


ANSWERS = {"two": ["it is 7", "it", "it is 7, or is it"], "one": ["no"], "none": ["a dog"]}


def runs(labels):
    """Stretches of labels that are learned."""
    found, before = [], -100
    for label in labels.tolist():
        if label != -100:
            if before == -100:
                found.append([])
            found[-1].append(label)
        before = label
    return found


@pytest.mark.parametrize("name", VISION)
def test_labels_are_exactly_the_answers(name):
    encoder = encoder_of(name)
    tokenizer = encoder.template.tokenizer
    for chat in (two_images(), one_image(), no_image()):
        row = encoder.row(chat)
        assert [tokenizer.decode(ids) for ids in runs(row.labels)] == ANSWERS[chat.id]
        kept = row.labels != -100
        assert torch.equal(row.labels[kept], row.inputs["input_ids"][0][kept])
        before = row.inputs["input_ids"][0][: int(kept.nonzero()[0])].tolist()
        assert tokenizer.decode(before).endswith("assistant: ")


@pytest.mark.parametrize("name", VISION)
def test_a_batch_is_its_rows_and_what_the_processor_makes_of_the_batch(name):
    encoder = encoder_of(name)
    chats = [two_images(), one_image()]
    rows = [encoder.row(chat) for chat in chats]
    batch = encoder.batch(rows)
    mask = batch.inputs["attention_mask"].bool()
    for i, row in enumerate(rows):
        assert torch.equal(batch.labels[i][mask[i]], row.labels)
        assert (batch.labels[i][~mask[i]] == -100).all()
    messages = [
        [{"role": m["role"], "content": [{k: p[k] for k in ("type", "text") if k in p} for p in m["content"]]} for m in c.messages]
        for c in chats
    ]  # fmt: skip
    text = [encoder.template.processor.apply_chat_template(m, tokenize=False) for m in messages]
    images = [[part["image"] for part in chat.media] for chat in chats]
    whole = encoder.template.processor(
        text=text, images=images, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=True
    )
    tensors = {key: value for key, value in whole.items() if isinstance(value, torch.Tensor)}
    assert set(batch.inputs) == set(tensors)
    for key, value in tensors.items():
        assert torch.equal(batch.inputs[key], value), key


@pytest.mark.parametrize("name", VISION)
def test_rows_with_and_without_images_run_together(name):
    """Each row's logits in the batch are those it has alone."""
    model, _ = zoo.loaded(name)
    encoder = encoder_of(name)
    rows = [encoder.row(chat) for chat in (no_image(), two_images(), one_image())]
    batch = encoder.batch(rows)
    mask = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        together = model(**zoo.positioned(name, batch.inputs)).logits
        for i, row in enumerate(rows):
            alone = model(**row.inputs).logits[0]
            assert (together[i][mask[i]] - alone).abs().max() < 1e-3, i


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_all_tokens_are_those_of_text(name):
    model, _ = zoo.loaded(name)
    row = encoder_of(name, loss_on="all").row(two_images())
    visual = family_of(model).visual_mask(model.config, row.inputs["input_ids"])[0]
    assert visual.any()
    assert torch.equal(row.labels == -100, visual)


def test_videos_are_read_as_images_of_their_frames(tmp_path):
    film = np.stack([zoo.picture(16, 16, seed=i) for i in range(9)])
    chat = read_chat({"video": film, "question": "<video>What?", "answer": "no"}, "film")
    encoder = encoder_of("qwen3_vl", video_frames=3)
    row = encoder.row(chat)
    images = [{"type": "image", "image": film[i]} for i in (0, 4, 8)]
    messages = [{"role": "user", "content": [*images, "What?"]}, {"role": "assistant", "content": "no"}]
    same = encoder.row(read_chat({"messages": messages}, "images"))
    assert row.images == 3
    assert all(torch.equal(row.inputs[key], same.inputs[key]) for key in same.inputs)
    picture(16, 16).save(tmp_path / "film.gif", save_all=True, append_images=[picture(16, 16, seed=1)])
    (tmp_path / "shots").mkdir()
    for i in range(5):
        picture(16, 16, seed=i).save(tmp_path / "shots" / f"{i}.png")
    for path, count in (("film.gif", 2), ("shots", 3)):
        row = encoder.row(read_chat({"video": path, "question": "What?", "answer": "no"}, path, folder=tmp_path))
        assert row.images == count


IM = "{% for m in messages %}{{ '<img>' + m['role'] + '\n' + (m['content'] | trim) + '</s>\n' }}{% endfor %}"
TEMPLATES = {"strings": IM, "none": None, "parts": hub.TEMPLATE}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_text_models_of_every_kind_of_template(kind):
    tokenizer = hub.tokenizer({})
    tokenizer.chat_template = TEMPLATES[kind]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "When? now?"},
        {"role": "assistant", "content": " now \n"},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "here"},
    ]
    row = Encoder(tokenizer, []).row(read_chat({"messages": messages}, "x"))
    said = [tokenizer.decode(ids) for ids in runs(row.labels)]
    assert said == (["now</s>", "here</s>"] if kind == "strings" else ["now", "here"])
    with pytest.raises(BadRow, match="images for a text model"):
        Encoder(tokenizer, []).row(one_image())


def test_plain_text_is_read_as_it_is():
    tokenizer = hub.tokenizer({})
    chat = read_chat({"text": "Once upon a time. "}, "x")
    with pytest.raises(BadRow, match="no answer"):
        Encoder(tokenizer, []).row(chat)
    row = Encoder(tokenizer, [], Rules("all")).row(chat)
    assert tokenizer.decode(row.inputs["input_ids"][0]) == "Once upon a time. "
    assert torch.equal(row.labels, row.inputs["input_ids"][0])


def test_long_rows_are_bad_or_cut():
    whole = encoder_of("llava").row(two_images())
    with pytest.raises(BadRow, match=f"too long: {whole.tokens} tokens, at most {whole.tokens - 1}"):
        encoder_of("llava", max_length=whole.tokens - 1).row(two_images())
    assert encoder_of("llava", max_length=whole.tokens).row(two_images()).tokens == whole.tokens
    cut = encoder_of("llava", max_length=whole.tokens - 6, truncate=True).row(two_images())
    assert cut.tokens == whole.tokens - 6
    assert torch.equal(cut.labels, whole.labels[:-6])
    with pytest.raises(BadRow, match="too long"):  # an image would be cut
        encoder_of("llava", max_length=20, truncate=True).row(two_images())
    with pytest.raises(BadRow, match="nothing to learn"):
        encoder_of("llava", max_length=8, truncate=True).row(no_image())


def test_other_bad_rows_say_why(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    chat = read_chat({"image": "a.png", "question": "What?", "answer": "no"}, "x", folder=tmp_path)
    with pytest.raises(BadRow, match="unreadable image"):
        encoder_of("llava").row(chat)
    with pytest.raises(BadRow, match="too many images: 2, at most 1"):
        encoder_of("llava", max_images=1).row(two_images())
    tokenizer = hub.tokenizer({})
    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(BadRow, match="refused by the chat template: roles must"):
        Encoder(tokenizer, []).row(no_image())
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] | upper }}{% endfor %}"
    with pytest.raises(BadRow, match="rewrites an answer"):
        Encoder(tokenizer, []).row(no_image())
