"""Rows in the schemas that data sets really have, and what of a row is bad."""

import base64
import json
import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from retention.data.chat import read_chat
from retention.data.media import BadRow, film, located, opened
from tests.zoo import picture


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate("ab"):
        Image.fromarray(picture(8, 8, seed=i)).save(tmp_path / f"{name}.png")
    return tmp_path


def shape(chat):
    """Roles, with texts and the names of images."""
    return [
        (m["role"], [p["text"] if p["type"] == "text" else getattr(p["image"], "name", "?") for p in m["content"]])
        for m in chat.messages
    ]


ASKED = [("user", ["a.png", "What?"]), ("assistant", ["A cat."])]
SCHEMAS = {
    "llava": (
        {
            "id": "7",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        ASKED,
    ),
    "llava, image behind": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}],
        },
        [("user", ["What?", "a.png"]), ("assistant", ["A cat."])],
    ),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": " A cat.\n"},
            ]
        },
        [("system", ["Be short."]), *ASKED],
    ),
    "hub, every part with every key": (
        {
            "images": ["a.png"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"index": 0, "text": None, "type": "image"},
                        {"index": None, "text": "What?", "type": "text"},
                    ],
                },
                {"role": "assistant", "content": [{"index": None, "text": "A cat.", "type": "text"}]},
            ],
        },
        ASKED,
    ),
    "strings with images beside": (
        {
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}],
            "images": ["a.png", "b.png"],
        },
        [("user", ["a.png", "b.png", "What?"]), ("assistant", ["A cat."])],
    ),
    "several images in places": (
        {
            "images": ["a.png", "b.png"],
            "messages": [
                {"role": "user", "content": "Is <image> like <image>?"},
                {"role": "assistant", "content": "No."},
            ],
        },
        [("user", ["Is ", "a.png", " like ", "b.png", "?"]), ("assistant", ["No."])],
    ),
    "question and answers": ({"question": "What?", "answer": ["A cat.", "A pet."], "image": {"path": "a.png"}}, ASKED),
    "preferences": (
        {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "A cat."}]},
        [("user", ["What?"]), ("assistant", ["A cat."])],
    ),
    "messages as JSON": (
        {"messages": json.dumps([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}])},
        [("user", ["What?"]), ("assistant", ["A cat."])],
    ),
    "caption": ({"image": "a.png", "text": "A cat."}, [("user", ["a.png"]), ("assistant", ["A cat."])]),
    "plain": ({"text": "A cat. "}, [("text", ["A cat. "])]),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_rows_of_every_schema_are_chats(name, folder):
    row, expected = SCHEMAS[name]
    before = json.dumps(row)
    chat = read_chat(row, "x", folder=folder)
    assert shape(chat) == expected
    assert json.dumps(row) == before, "the row itself was changed"
    assert chat.plain == (name == "plain")


def test_columns_may_have_other_names(folder):
    row = {"frage": "What?", "antwort": "A cat.", "bild": "a.png"}
    columns = {"prompt": "frage", "response": "antwort", "image": "bild"}
    assert shape(read_chat(row, "x", columns=columns, folder=folder)) == ASKED
    with pytest.raises(BadRow, match="unknown schema: columns frage, antwort, bild"):
        read_chat(row, "x", folder=folder)


def test_images_are_whatever_holds_pixels(folder):
    pixels = picture(8, 8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    for payload in (
        "a.png",
        folder / "a.png",
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": "a.png"},
        {"url": url},
        Image.fromarray(pixels),
        pixels,
        f"file://{folder / 'a.png'}",
    ):
        chat = read_chat({"image": payload, "text": "A cat."}, "x", folder=folder)
        assert np.array_equal(np.asarray(opened(chat.media[0]["image"])), pixels), payload
    grey = Image.fromarray(pixels).convert("LA")
    assert opened(grey).mode == "RGB"


def test_frames_are_evenly_spaced(folder):
    shown = np.stack([picture(8, 8, seed=i) for i in range(7)])
    assert [np.asarray(x).tolist() for x in film(shown, 3).frames] == [shown[i].tolist() for i in (0, 3, 6)]
    assert len(film(list(shown), 20).frames) == 7
    assert len(film(located(str(folder), None), 8).frames) == 2
    assert len(read_chat({"video": ["a.png", "b.png"], "text": "A cat."}, "x", folder=folder).media) == 1
    (folder / "film.mp4").write_bytes(b"no film")
    with pytest.raises(BadRow, match="unreadable video"):
        film(folder / "film.mp4", 3)


TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
BAD = [
    ({"a": 1}, "unknown schema: columns a"),
    ({}, "unknown schema"),
    ({"messages": []}, "empty text"),
    ({"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": " "}]}, "empty text"),
    ({"prompt": "", "response": "A cat."}, "empty text"),
    ({"text": ""}, "empty text"),
    ({"messages": [{"speaker": "me", "words": "?"}]}, "unknown schema: a message with speaker, words"),
    ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "unknown schema: a part of type sound"),
    ({"messages": "none"}, "unknown schema: messages is no list"),
    ({"messages": TURNS, "image": "c.png"}, "missing image"),
    ({"messages": TURNS, "images": ["a.png", None]}, "missing image: nothing is given"),
    ({"prompt": "<image> What?", "response": "A cat."}, "missing image: 1 places for 0 images"),
    ({"prompt": "<image> What?", "response": "A cat.", "images": ["a.png", "b.png"]}, "1 places for 2 images"),
    ({"messages": TURNS, "image": "https://example.org/a.png"}, "missing image: .* lies on the web"),
    ({"messages": TURNS, "image": "data:image/png;base64,*"}, "unreadable image"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_say_why(row, reason, folder):
    with pytest.raises(BadRow, match=reason):
        read_chat(row, "x", folder=folder)


def test_bad_rows_come_back_from_workers():
    error = pickle.loads(pickle.dumps(BadRow("empty text", "here")))
    assert (error.reason, error.detail, str(error)) == ("empty text", "here", "empty text: here")
