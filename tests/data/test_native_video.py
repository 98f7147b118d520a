"""Videos of own data as a model's own processor reads them; what the file says of their time reaches it."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from retention.data.chat import read_chat
from retention.data.encode import Encoder, Rules
from retention.data.media import BadRow, film
from retention.models import family_of
from tests import zoo

VISUAL = {"qwen2_vl": 8, "qwen2_5_vl": 8, "qwen3_vl": 8, "qwen3_vl_moe": 8, "llava_onevision": 17, "internvl": 16}
"""Visual tokens of four frames of 16 x 16 pixels: Qwen's merge two at a time, LLaVA-OneVision's end with a token."""
VISUAL |= {"smolvlm": 16}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="video processors need torchvision")


def encoder(name, **rules):
    model, processor = zoo.loaded(name)
    return Encoder(processor, family_of(model).visual_ids(model.config), Rules(**rules))


def chat(video):
    asked = [{"type": "text", "text": "look "}, {"type": "video", "video": video}, {"type": "text", "text": " what?"}]
    return read_chat({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]}, "x")


def pictures(count):
    return [Image.fromarray(zoo.picture(16, 16, seed=i)) for i in range(count)]


@torchvision
@pytest.mark.parametrize("name", VISUAL)
def test_a_row_with_a_video(name):
    own, model = encoder(name, videos="native", video_frames=4), zoo.loaded(name)[0]
    row, other = own.row(chat(pictures(6))), own.row(chat(pictures(3)))
    assert (row.images, other.images) == (4, 3)
    assert family_of(model).visual_mask(model.config, row.inputs["input_ids"]).sum() == VISUAL[name]
    said = own.template.tokenizer.decode(row.labels[row.labels != -100])
    assert said.startswith("a cat")
    batch = own.batch([row, row])
    alone, both = model(**row.inputs, use_cache=False).logits, model(**batch.inputs, use_cache=False).logits
    assert torch.allclose(both[1], alone[0], atol=1e-4)


@torchvision
def test_seconds_are_those_of_the_film():
    """Qwen3-VL writes when each pair of frames was seen."""
    slow, fast = (encoder("qwen3_vl", videos="native", video_frames=4, video_fps=fps) for fps in (0.5, 2.0))
    texts = [own.template.tokenizer.decode(own.row(chat(pictures(4))).inputs["input_ids"][0]) for own in (slow, fast)]
    assert "<1.0 seconds>" in texts[0]
    assert "<5.0 seconds>" in texts[0]
    assert "<0.2 seconds>" in texts[1]
    assert "<1.2 seconds>" in texts[1]


def test_a_processor_without_videos_is_told():
    name = "llava" if find_spec("torchvision") else "qwen3_vl"
    with pytest.raises(ValueError, match=r"expected a processor that takes videos for data.videos=native, got .*retention\[video\]"):  # fmt: skip
        encoder(name, videos="native")


def test_a_film_file_is_decoded_where_frames_are_taken(tmp_path, monkeypatch):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for i in range(25):
            shade = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8), format="rgb24")
            file.mux(stream.encode(shade))
        file.mux(stream.encode())
    found = film(tmp_path / "a.mp4", 5)
    assert (found.places, found.total, found.rate) == ([0, 6, 12, 18, 24], 25, 10.0)
    assert [abs(np.asarray(x).mean() - 10 * i) < 4 for i, x in zip(found.places, found.frames, strict=True)] == [
        True
    ] * 5
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:900])
    with pytest.raises(BadRow, match="unreadable video"):
        film(tmp_path / "b.mp4", 5)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs the package av; pip install 'retention\[video\]'"):
        film(tmp_path / "a.mp4", 5)


def test_a_film_says_where_its_frames_were(tmp_path):
    first, *rest = pictures(5)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=250)
    found = film(tmp_path / "a.gif", 3)
    assert (found.places, found.total, found.rate) == ([0, 2, 4], 5, 4.0)
    assert len(found.frames) == 3
    found = film(np.zeros((7, 16, 16, 3), np.uint8), 9)
    assert (found.places, found.total, found.rate) == (list(range(7)), 7, None)
