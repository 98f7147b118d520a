"""What a gate checkpoint learned, in one page: half-lives by layer and head, kinds of tokens, sinks, windows, your input.

    python scripts/inspect_gates.py outputs/latest/gates
    python scripts/inspect_gates.py outputs/latest/gates --text letter.txt --out letter.html
    python scripts/inspect_gates.py outputs/latest/gates --image receipt.png --text question.txt

The base is the one that the artefact names; `--model` says where it is instead. Without an input of yours the embedded
model reads pictures of its own, other models pictures or a text that this project draws.
"""

import argparse
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gates_page import write_page
from numpy.typing import NDArray
from PIL import Image

import retention as rt
from retention.attach.hard import evicting
from retention.data.example import Example, Segment
from retention.data.render import Renderer
from retention.evaluation.diagnostics import shown_contexts
from retention.evaluation.looks import Shown
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.load import load_frozen
from retention.ops.decay import half_life
from retention.policies import POLICIES
from retention.tasks.answering import prefill
from retention.tasks.needles import Needles
from retention.tasks.ruler.task import Ruler

SHARE = 0.1
"""Part of every head that tokens compete for."""
SINKS, NEWEST = 4, 0.1
"""Tokens at the start, and part of the context at its end, that are looked at on their own."""
LONGEST = 1e9


@dataclass
class Found:
    """One input through the gates: tokens by layer and head."""

    context: Shown
    value: str
    """What `values` are: half-lives in tokens, or scores of gates that do not decay."""
    values: NDArray[np.float64]
    """[layers, kv_heads, tokens]."""
    kept: NDArray[np.bool_]
    """Whether a token is among the best `SHARE` of its head at the end of the input."""

    @property
    def length(self) -> int:
        """Tokens of the input."""
        return self.values.shape[-1]

    def newest(self) -> NDArray[np.bool_]:
        """The last tokens."""
        return np.arange(self.length) >= self.length - max(1, round(NEWEST * self.length))


def opened(file: Path, model: Any, processor: Any) -> NDArray[np.uint8]:
    """A picture of the user's, resized where the base takes one size and its processor leaves that to others."""
    picture = Image.open(file).convert("RGB")
    if getattr(getattr(processor, "image_processor", None), "do_resize", True) is False:
        picture = picture.resize((model.config.vision_config.image_size,) * 2)
    return np.asarray(picture)


def example(args: argparse.Namespace, model: Any, processor: Any) -> Example:
    """The user's input, or one that the base can read.

    Raises:
        ValueError: for a picture and a base that reads text alone.
    """
    visual = bool(family_of(model).visual_ids(model.config))
    if args.image and not visual:
        raise ValueError(f"{model.config.name_or_path} reads text alone; leave --image out")
    segments = [Segment("image", opened(file, model, processor)) for file in args.image]
    if args.text is not None:
        segments.append(Segment("text", args.text.read_text(encoding="utf-8")))
    if segments:
        return Example("your input", segments, [], "after")
    if model.config.name_or_path == "embedded":
        return Needles(n_needles=24).example(args.seed, "test", 0)
    if visual:
        return Needles(n_images=4, n_needles=12, cell_px=56).example(args.seed, "test", 0, style="natural")
    return Ruler(kind="niah_multikey_1", n_tokens=1024).example(args.seed, "test", 0, style="natural")


def look(model: Any, processor: Any, gates: RetentionGates, shown: Example) -> Found:
    """One forward with the gates beside it."""
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    batch = renderer.render([shown])
    with torch.no_grad(), evicting(model, POLICIES["full"](), gates=gates, extra_collectors=("gate",)) as cache:
        prefill(model, cache, batch)
        log_beta = torch.stack([layer.state().log_beta[0].double().cpu() for layer in cache.evicting_layers])
    length = log_beta.shape[-1]
    if gates.decays:
        log_beta = log_beta.clamp(max=-np.log(2) / LONGEST)
        value, values = "half-life in tokens", half_life(log_beta).double()
        rank = (length - torch.arange(length)) * log_beta
    else:
        value, values = "score", log_beta - torch.log(-torch.expm1(log_beta.clamp(max=-1e-12)))
        rank = values
    best = rank.topk(max(1, round(SHARE * length)), dim=-1).indices
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
    return Found(shown_contexts(model, renderer.tokenizer, batch)[0], value, values.numpy(), kept.numpy())


def kind_of(token: str, special: bool) -> str:
    """What a token is made of."""
    word = token.strip()
    marks = {unicodedata.category(letter)[0] for letter in word}
    named = {"N": "digits", "P": "punctuation", "S": "symbols", "L": "words"}
    if special or not word:
        return "special" if special else "blanks"
    return named.get(next(iter(marks)), "other") if len(marks) == 1 else "mixed"


def kinds(found: Found, special: set[str]) -> list[dict[str, Any]]:
    """Per kind of token, the most retained first: quartiles of its values, and how much of it is kept."""
    named = [
        "image" if seen else kind_of(token, token.strip() in special)
        for token, seen in zip(found.context.tokens, found.context.visual, strict=True)
    ]
    groups = {name: np.array([own == name for own in named]) for name in dict.fromkeys(named)}
    groups |= {f"the first {SINKS}": np.arange(found.length) < SINKS, f"the newest {NEWEST:.0%}": found.newest()}
    rows = []
    for name, mine in groups.items():
        texts = dict.fromkeys(t.strip() for t, m in zip(found.context.tokens, mine, strict=True) if m)
        kept = float(found.kept[..., mine].mean())
        rows.append(
            {
                **{"kind": name, "tokens": int(mine.sum()), "kept": kept, "lift": kept / found.kept.mean()},
                "quartiles": np.quantile(found.values[..., mine], (0.25, 0.5, 0.75)).tolist(),
                "examples": [] if name == "image" else list(texts)[:6],
            }
        )
    return sorted(rows, key=lambda row: -row["lift"])


def extremes(found: Found, count: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """The tokens that live longest in any layer and head, and those that live nowhere, each with its neighbours."""
    most, shown = found.values.max((0, 1)), found.context
    order = np.argsort(most, kind="stable")

    def around(places: range) -> str:
        """Text of neighbours, a run of image tokens as one."""
        parts = ["[image]" if shown.visual[i] else shown.tokens[i] for i in places if 0 <= i < found.length]
        return "".join(part for i, part in enumerate(parts) if part != "[image]" or parts[i - 1 : i] != ["[image]"])

    def named(place: int) -> str:
        if not shown.visual[place]:
            return shown.tokens[place]
        if shown.places is None:
            return "[image token]"
        image, row, column = (int(x) + 1 for x in shown.places[place])
        return f"[image {image}, row {row}, column {column}]"

    def row(place: int) -> dict[str, Any]:
        own = found.values[..., place]
        layer, head = np.unravel_index(int(own.argmax()), own.shape)
        told = {"place": place, "median": float(np.median(own)), "longest": float(own.max()), "layer": int(layer)}
        beside = {"before": around(range(place - 6, place)), "after": around(range(place + 1, place + 7))}
        return told | beside | {"head": int(head), "token": named(place)}

    chosen = (("Longest", order[::-1][:count]), ("Shortest", order[:count]))
    return [(name, [row(int(place)) for place in places]) for name, places in chosen]


def notes(found: Found, gates: RetentionGates) -> list[str]:
    """Sinks, windows and concentration in sentences."""
    sinks, newest = found.kept[..., :SINKS].mean((0, 1)), found.kept[..., found.newest()].sum(-1) / found.kept.sum(-1)
    heads = newest.size
    alive = np.median(found.values, -1)
    said = [
        f"{found.length} tokens, {int(found.context.visual.sum())} of them of images, through gates of {heads} layers x heads "
        f"for {gates.base.get('name_or_path', 'an unnamed base')}; one input, so what is said here is about this input.",
        f"Sinks: the first {SINKS} tokens are kept by {', '.join(f'{100 * x:.0f}%' for x in sinks)} of layers and heads at {SHARE:.0%}.",
        f"Windows: in {int((newest > 0.8).sum())} of {heads} heads over 80% of what is kept is the newest {NEWEST:.0%} of the context, "
        f"in {int((newest < 0.2).sum())} under 20%.",
    ]
    if gates.decays:
        said.append(
            f"A head's median half-life is between {alive.min():,.3g} and {alive.max():,.3g} tokens; in "
            f"{int((alive > found.length).sum())} of {heads} heads it is longer than the context."
        )
    else:
        said.append(
            f"These gates were trained by {gates.objective} and do not decay: scores stand for half-lives here."
        )
    return said


def main(argv: list[str] | None = None) -> None:
    """Load, look, write, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates", help="a gate artefact: a folder, or a hub id")
    parser.add_argument("--text", type=Path, help="a text file to read")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture to look at; may be repeated")
    parser.add_argument("--model", help="where the base is, if not where the artefact says")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--count", type=int, default=15, help="how many of the longest and shortest lives to list")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn input")
    parser.add_argument("--out", type=Path, default=Path("outputs/gates.html"))
    args = parser.parse_args(argv)
    for file in [*args.image, *([args.text] if args.text else [])]:
        if not file.is_file():
            sys.exit(f"error: expected a file, got {file}; name one that is there")
    try:
        gates = rt.RetentionGates.from_pretrained(args.gates)
        name = args.model or gates.base.get("name_or_path")
        if not name:
            raise ValueError(f"{args.gates} does not name its base; give it with --model")
        model, processor = load_frozen(name, dtype=getattr(torch, args.dtype))
        gates.to(model.device).check(model)
        found = look(model, processor, gates, example(args, model, processor))
    except ValueError as error:
        sys.exit(f"error: {error}")
    tokenizer = getattr(processor, "tokenizer", processor)
    told = {"kinds": kinds(found, set(tokenizer.all_special_tokens)), "extremes": extremes(found, args.count)}
    card = {k: v for k, v in gates.card_config().items() if k != "versions"}
    print(write_page(args.out, found, notes=notes(found, gates), card=card, title=f"Gates of {args.gates}", **told))


if __name__ == "__main__":
    main()
