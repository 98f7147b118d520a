"""Write the picture sheets that ship with the package: digit scans and glyphs.

Digits are scikit-learn's bundled handwritten scans (1,797 of 8 x 8 pixels, 17 grey levels, times 15);
glyphs are Pillow's built-in bitmap font, cropped to 7 x 7. Both are lossless PNG sheets of 8 x 8 tiles.
Needs scikit-learn. Usage: python scripts/draw_embedded_images.py [--out retention/embedded/images]
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retention.embedded import DECOYS, IMAGES, LETTERS, SHEET_COLUMNS


def sheet(tiles: np.ndarray) -> Image.Image:
    """Lay 8 x 8 grey tiles out in rows of `SHEET_COLUMNS`."""
    rows = -(-len(tiles) // SHEET_COLUMNS)
    canvas = np.zeros((rows * SHEET_COLUMNS, 8, 8), np.uint8)
    canvas[: len(tiles)] = tiles
    grid = canvas.reshape(rows, SHEET_COLUMNS, 8, 8).transpose(0, 2, 1, 3)
    return Image.fromarray(grid.reshape(rows * 8, SHEET_COLUMNS * 8))


def glyph(character: str) -> np.ndarray:
    """One character of the bitmap font, cropped to its ink and centred in 7 x 7 of an 8 x 8 tile."""
    picture = Image.new("L", (16, 16))
    ImageDraw.Draw(picture).text((4, 2), character, fill=255, font=ImageFont.load_default_imagefont())
    ink = picture.crop(picture.getbbox())
    if max(ink.size) > 7:
        ink = ink.resize((min(ink.width, 7), min(ink.height, 7)))
    tile = Image.new("L", (8, 8))
    tile.paste(ink, ((7 - ink.width) // 2, (7 - ink.height) // 2))
    return np.asarray(tile)


def main() -> None:
    """Draw both sheets and the labels."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out = parser.parse_args().out
    digits = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    sheet((digits.images * 15).astype(np.uint8)).save(out / "digits.png", optimize=True)
    (out / "digits.txt").write_text("".join(map(str, digits.target)) + "\n")
    sheet(np.stack([glyph(c) for c in LETTERS + DECOYS])).save(out / "glyphs.png", optimize=True)
    print(f"wrote digits.png, digits.txt and glyphs.png to {out}")


if __name__ == "__main__":
    main()
