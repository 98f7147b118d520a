"""Boards: pictures of square cells, each cell one word - a coloured letter or shape, a digit, a decoy, or nothing.

The words are what a board shows: `red-K`, `K` (white), `blue-star`, `7`, `<decoy3>`, and the empty word for a blank.
"""

import numpy as np
from jaxtyping import Float, UInt8

from retention.embedded import DECOYS, LETTERS, scans
from retention.tasks.scene import COLOURS, background, digit_tiles, glyph_tiles

PALETTE: dict[str, tuple[float, float, float]] = {
    **COLOURS,
    "yellow": (1.0, 0.9, 0.2),
    "cyan": (0.2, 0.95, 0.95),
    "pink": (1.0, 0.4, 0.85),
    "orange": (1.0, 0.6, 0.1),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
MARKS = [f"{colour}-{shape}" for colour in PALETTE for shape in SHAPES]
"""All coloured shapes."""
PLAIN = 0.12
"""Brightness of a ground without texture."""

Words = np.ndarray
"""Words of boards [boards, rows, columns], or of one [rows, columns]; dtype object."""


def blank(n_boards: int, grid: int) -> Words:
    """Boards that show nothing."""
    return np.full((n_boards, grid, grid), "", dtype=object)


def scatter(rng: np.random.Generator, board: Words, words: list[str]) -> list[tuple[int, int]]:
    """Put words into random blank cells of one board, in place; returns their (row, column)."""
    free = np.flatnonzero(board == "")
    places = rng.permutation(free)[: len(words)]
    assert len(places) == len(words)
    board.flat[places] = words
    return [(int(p) // board.shape[1], int(p) % board.shape[1]) for p in places]


def decoyed(rng: np.random.Generator, board: Words, most: int = 2) -> None:
    """Put up to `most` glyphs that are no letter into blank cells of one board, in place."""
    count = min(int(rng.integers(most + 1)), int((board == "").sum()))
    scatter(rng, board, [f"<decoy{int(i)}>" for i in rng.integers(len(DECOYS), size=count)])


def shape_masks() -> Float[np.ndarray, "shapes 8 8"]:
    """One mask per shape, in the order of `SHAPES`."""
    y, x = np.mgrid[-3.5:4.5, -3.5:4.5]
    reach = np.abs(x) + np.abs(y)
    drawn = (
        x**2 + y**2 <= 3.4**2,
        np.maximum(np.abs(x), np.abs(y)) <= 2.6,
        (np.abs(x) <= (y + 3.6) / 2) & (y <= 3),
        (reach <= 2.6) | ((np.minimum(np.abs(x), np.abs(y)) <= 0.6) & (reach <= 4.1)),
        (np.abs(x) <= 1) | (np.abs(y) <= 1),
    )
    return np.stack(drawn).astype(np.float32)


def paint(
    rng: np.random.Generator, words: Words, *, split: str, textured: bool, still: bool = False
) -> UInt8[np.ndarray, "boards height width 3"]:
    """Boards as pictures of 8 pixels per cell; `still` gives all of them the same ground, as frames of one camera."""
    n, grid, _ = words.shape
    ground = np.full((1, grid, grid, 8, 8, 3), PLAIN, np.float32)
    if textured:
        ground, _ = background(rng, 1 if still else n, grid)
    ground = np.broadcast_to(ground, (n, grid, grid, 8, 8, 3))
    ink = np.zeros((n, grid, grid, 8, 8, 3), np.float32)
    covered = words != ""
    places = np.nonzero(covered)
    shown = [str(word) for word in words[places]]
    kinds = np.array([_kind(word) for word in shown])
    for kind, drawn in (("digit", _digits), ("glyph", _glyphs), ("shape", _shapes)):
        mine = np.flatnonzero(kinds == kind)
        if len(mine):
            where = tuple(axis[mine] for axis in places)
            ink[where] = drawn(rng, [shown[i] for i in mine], split)
    ground = np.where(covered[..., None, None, None], ground * 0.35, ground)
    image = np.maximum(ground, ink).transpose(0, 1, 3, 2, 4, 5).reshape(n, grid * 8, grid * 8, 3)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def scaled(image: UInt8[np.ndarray, "height width 3"], cell_px: int) -> UInt8[np.ndarray, "tall wide 3"]:
    """The picture with `cell_px` instead of 8 pixels per cell."""
    source = np.arange(len(image) // 8 * cell_px) * 8 // cell_px
    return image[source][:, source]


def colour_and_name(word: str) -> tuple[str, str]:
    """Colour and letter or shape of a word; a letter alone is white."""
    colour, _, name = word.rpartition("-")
    return colour or "white", name


def _kind(word: str) -> str:
    if word.isdigit():
        return "digit"
    return "shape" if colour_and_name(word)[1] in SHAPES else "glyph"


def _digits(rng: np.random.Generator, words: list[str], split: str) -> np.ndarray:
    return digit_tiles(rng, np.array([int(word) for word in words]), *scans(split))


def _glyphs(rng: np.random.Generator, words: list[str], split: str) -> np.ndarray:
    which, tints = [], []
    for word in words:
        decoy = word.startswith("<decoy")
        colour, name = list(PALETTE)[int(rng.integers(len(COLOURS)))], word
        if not decoy:
            colour, name = colour_and_name(word)
        which.append(len(LETTERS) + int(word[6:-1]) if decoy else LETTERS.index(name))
        tints.append(PALETTE[colour])
    return glyph_tiles(rng, np.array(which), np.array(tints, np.float32))


def _shapes(rng: np.random.Generator, words: list[str], split: str) -> np.ndarray:
    named = [colour_and_name(word) for word in words]
    masks = shape_masks()[[SHAPES.index(name) for _, name in named]]
    tints = np.array([PALETTE[colour] for colour, _ in named], np.float32)
    bright = rng.uniform(0.8, 1.0, (len(words), 1, 1, 1)).astype(np.float32)
    return masks[..., None] * tints[:, None, None] * bright
