"""Draws scenes of keyed needles: images of cells, each a glyph, a handwritten digit or background."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from retention.embedded import DECOYS, LETTERS, glyphs, scans

COLOURS = {"red": (1.0, 0.25, 0.2), "green": (0.25, 0.95, 0.3), "blue": (0.35, 0.5, 1.0)}
N_KEYS = len(LETTERS) * len(COLOURS)
BLANK, DIGIT0, KEY0 = 0, 1, 11
DECOY0 = KEY0 + N_KEYS
GROUND0 = DECOY0 + len(DECOYS)
STYLES, TINTS = 3, 6
N_CLASSES = GROUND0 + STYLES * TINTS
GRID = 4
PLACEMENT_TRIES = 50


@dataclass
class Needle:
    """A key glyph at (image, row, column) with its digit in the cell to the right."""

    key: int
    digit: int
    image: int
    row: int
    column: int

    @property
    def name(self) -> tuple[str, str]:
        """Colour and letter of the key glyph."""
        return key_name(self.key)


@dataclass
class Scene:
    """Images with their needles; `cells` holds the class of every cell.

    DIGIT0 + digit, KEY0 + key, DECOY0 + glyph, or GROUND0 + style * TINTS + order of the tint's channels:
    distractors differ among themselves, so that none of them can be told by being alike.
    """

    images: UInt8[np.ndarray, "images height width 3"]
    cells: Int[np.ndarray, "images rows columns"]
    needles: list[Needle]


def key_index(colour: str, letter: str) -> int:
    """Index of a (colour, letter) key in [0, 78)."""
    return list(COLOURS).index(colour) * len(LETTERS) + LETTERS.index(letter)


def key_name(key: int) -> tuple[str, str]:
    """Colour and letter of a key in [0, 78)."""
    colour, letter = divmod(key, len(LETTERS))
    return list(COLOURS)[colour], LETTERS[letter]


def draw_scene(
    rng: np.random.Generator,
    keys: Int[np.ndarray, " keys"],
    *,
    n_images: int,
    split: str,
    orphans: int = 2,
    decoys: int = 2,
    jitter: bool = False,
    digits: Int[np.ndarray, " keys"] | None = None,
) -> Scene:
    """Spread one needle per key round-robin over the images and draw them; `digits` are drawn unless given.

    Each image also holds up to `orphans` digits without a key (never right of a key) and up to `decoys`
    glyphs that are no key. `jitter` moves and roughens the digits, for training a tower on few scans. Needles that do not fit are never dropped: the image is placed again.

    Raises:
        ValueError: when more needles are asked for than the images can hold.
    """
    order = np.arange(len(keys))
    per_image = [order[i::n_images] for i in range(n_images)]
    if len(per_image[0]) > GRID * (GRID // 2):
        raise ValueError(f"{len(keys)} needles do not fit {n_images} images of {GRID} x {GRID} cells")
    cells = np.zeros((n_images, GRID, GRID), np.int64)
    needles: list[Needle] = []
    for image, own in enumerate(per_image):
        places = pair_places(rng, len(own))
        for number, (row, column) in zip(own.tolist(), places, strict=True):
            key = int(keys[number])
            digit = int(rng.integers(10)) if digits is None else int(digits[number])
            cells[image, row, column : column + 2] = KEY0 + key, DIGIT0 + digit
            needles.append(Needle(key, digit, image, row, column))
        _fill(rng, cells[image], orphans, decoys)
    return Scene(_paint(rng, cells, split, jitter), cells, needles)


def draw_cells(
    rng: np.random.Generator, cells: Int[np.ndarray, "images rows columns"], *, split: str, decoys: int = 2
) -> UInt8[np.ndarray, "images height width 3"]:
    """Draw images of the given cell classes, with up to `decoys` glyphs that are no key in blank cells of each."""
    for image in cells:
        _fill(rng, image, 0, decoys)
    return _paint(rng, cells, split, False)


def enlarged(image: UInt8[np.ndarray, "height width 3"], cell_px: int) -> UInt8[np.ndarray, "tall wide 3"]:
    """The picture with `cell_px` instead of 8 pixels per cell."""
    source = np.arange(GRID * cell_px) * 8 // cell_px
    return image[source][:, source]


def pair_places(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Non-overlapping (row, column) of `count` horizontal key-digit pairs."""
    for _ in range(PLACEMENT_TRIES):
        free = np.ones((GRID, GRID), bool)
        places: list[tuple[int, int]] = []
        for slot in rng.permutation(GRID * (GRID - 1))[: 4 * GRID]:
            row, column = divmod(int(slot), GRID - 1)
            if len(places) < count and free[row, column : column + 2].all():
                free[row, column : column + 2] = False
                places.append((row, column))
        if len(places) == count:
            return places
    return [(i // 2, 2 * (i % 2)) for i in range(count)]


def _fill(rng: np.random.Generator, cells: np.ndarray, orphans: int, decoys: int) -> None:
    """Put unkeyed digits and decoy glyphs into blank cells of one image, in place."""
    blank = rng.permutation(np.flatnonzero(cells == BLANK))
    n_orphans = min(int(rng.integers(orphans + 1)), len(blank))
    for slot in blank[:n_orphans]:
        cells.flat[slot] = DIGIT0 + rng.integers(10)
    for slot in blank[n_orphans : n_orphans + int(rng.integers(decoys + 1))]:
        cells.flat[slot] = DECOY0 + rng.integers(len(DECOYS))


def _paint(
    rng: np.random.Generator, cells: np.ndarray, split: str, jitter: bool
) -> UInt8[np.ndarray, "images height width 3"]:
    """Render cells to RGB: glyphs and digits over darkened background; blank cells get their ground's class."""
    n = len(cells)
    pictures, labels = scans(split)
    ground, kind = background(rng, n)
    ink = np.zeros((n, GRID, GRID, 8, 8, 3), np.float32)
    covered = cells != BLANK
    palette = np.array(list(COLOURS.values()), np.float32)

    where = np.nonzero((cells >= DIGIT0) & (cells < KEY0))
    if len(where[0]):
        digits = digit_tiles(rng, cells[where] - DIGIT0, pictures, labels)
        ink[where] = _jitter(rng, digits) if jitter else digits
    where = np.nonzero((cells >= KEY0) & (cells < DECOY0))
    if len(where[0]):
        colour, letter = np.divmod(cells[where] - KEY0, len(LETTERS))
        ink[where] = glyph_tiles(rng, letter, palette[colour])
    where = np.nonzero(cells >= DECOY0)
    if len(where[0]):
        colours = palette[rng.integers(3, size=len(where[0]))]
        ink[where] = glyph_tiles(rng, len(LETTERS) + cells[where] - DECOY0, colours)

    ground = np.where(covered[..., None, None, None], ground * 0.35, ground)
    cells[~covered] = np.broadcast_to(GROUND0 + kind[:, None, None], cells.shape)[~covered]
    image = np.maximum(ground, ink).transpose(0, 1, 3, 2, 4, 5).reshape(n, GRID * 8, GRID * 8, 3)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def digit_tiles(
    rng: np.random.Generator, wanted: np.ndarray, pictures: np.ndarray, labels: np.ndarray
) -> Float[np.ndarray, "n 8 8 3"]:
    """A random scan of each wanted digit, brightness .8 to 1."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], np.arange(11))
    pick = first[wanted] + (rng.random(len(wanted)) * (first[wanted + 1] - first[wanted])).astype(int)
    bright = rng.uniform(0.8, 1.0, (len(wanted), 1, 1))
    return np.repeat((pictures[order[pick]] / 240.0 * bright)[..., None], 3, -1).astype(np.float32)


def _jitter(rng: np.random.Generator, digits: Float[np.ndarray, "n 8 8 3"]) -> Float[np.ndarray, "n 8 8 3"]:
    """Each digit moved by up to one pixel each way (half of the time) and roughened by noise."""
    for axis in (1, 2):
        shift = np.where(rng.random(len(digits)) < 0.5, rng.integers(-1, 2, size=len(digits)), 0)[:, None, None, None]
        wide = np.pad(digits, [(0, 0)] + [(1, 1) if i == axis else (0, 0) for i in (1, 2, 3)])
        moved = {d: np.take(wide, np.arange(8) + 1 - d, axis) for d in (-1, 1)}
        digits = np.where(shift == 1, moved[1], np.where(shift == -1, moved[-1], digits))
    noisy = digits * rng.uniform(0.8, 1.1, (*digits.shape[:3], 1)) + rng.normal(0, 0.05, (*digits.shape[:3], 1))
    return noisy.astype(np.float32)


def glyph_tiles(rng: np.random.Generator, which: np.ndarray, colour: np.ndarray) -> Float[np.ndarray, "n 8 8 3"]:
    """Coloured glyphs, shifted by 0 or 1 pixel each way, brightness .8 to 1."""
    masks = glyphs()[which].astype(np.float32) / 255
    for axis in (1, 2):
        moved = np.roll(masks, 1, axis)
        masks = np.where(rng.integers(2, size=(len(which), 1, 1)) == 1, moved, masks)
    bright = rng.uniform(0.8, 1.0, (len(which), 1, 1, 1))
    return (masks[..., None] * colour[:, None, None] * bright).astype(np.float32)


def background(
    rng: np.random.Generator, n: int, grid: int = GRID
) -> tuple[Float[np.ndarray, "n rows columns 8 8 3"], Int[np.ndarray, " n"]]:
    """A ground per image (coarse texture, near-duplicate tiles or textured noise, in one of six tints) and its class."""
    order = rng.integers(TINTS, size=n)
    levels = np.stack([rng.uniform(0.08, 0.2, n), rng.uniform(0.28, 0.42, n), rng.uniform(0.5, 0.65, n)], -1)
    ranks = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    tint = np.take_along_axis(levels, ranks[order], -1)[:, None, None, None, None]
    coarse = rng.random((n, grid, grid, 2, 2, 1)).repeat(4, 3).repeat(4, 4)
    tile = rng.random((n, 1, 1, 8, 8, 1)) * np.ones((1, grid, grid, 1, 1, 1))
    fine = rng.random((n, grid, grid, 8, 8, 1))
    style = rng.integers(STYLES, size=n)
    mixtures = [0.7 * coarse + 0.3 * fine, 0.9 * tile + 0.1 * fine, 0.4 * coarse + 0.6 * fine]
    texture = np.choose(style[:, None, None, None, None, None], mixtures)
    return (tint * texture * 1.3).astype(np.float32), style * TINTS + order
