"""Run the notebooks of docs/notebooks and write what their cells print and draw into them.

    python scripts/run_notebooks.py                          # all of them, about a minute
    python scripts/run_notebooks.py docs/notebooks/own_policy.ipynb

Cells are run as plain Python, without Jupyter. A notebook notes which code its outputs are of; a test refuses outputs of
other code.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def code(book: dict[str, Any]) -> list[str]:
    """Sources of the code cells."""
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def digest(book: dict[str, Any]) -> str:
    """Of the code; outputs belong to the code of the same digest."""
    return hashlib.sha256("\n\n".join(code(book)).encode()).hexdigest()


def outputs(book: dict[str, Any], name: str) -> Iterator[list[dict[str, Any]]]:
    """What each code cell prints and draws, in one namespace, as a notebook stores it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "notebook"}
    for number, source in enumerate(code(book)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
            exec(compile(source, f"{name}, cell {number}", "exec"), names)
        found: list[dict[str, Any]] = []
        if said.getvalue():
            # a progress bar rewrites its line; only the last state of it is kept
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in said.getvalue().split("\n")]
            text = "\n".join(lines).splitlines(keepends=True)
            found.append({"name": "stdout", "output_type": "stream", "text": text})
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            picture = io.BytesIO()
            figure.savefig(picture, dpi=80, metadata={"Software": None})
            data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["a picture"]}
            found.append({"data": data, "metadata": {}, "output_type": "display_data"})
        pyplot.close("all")
        yield found


def renew(file: Path) -> None:
    """Run one notebook in an empty folder and store its outputs."""
    book = json.loads(file.read_text())
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            found = list(outputs(book, file.name))
        finally:
            os.chdir(here)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for number, (cell, shown) in enumerate(zip(cells, found, strict=True), start=1):
        cell |= {"execution_count": number, "outputs": shown}
    book["metadata"]["retention"] = {"outputs_of": digest(book)}
    file.write_text(json.dumps(book, indent=1) + "\n")
    print(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """The notebooks named, or all."""
    for name in sys.argv[1:] or sorted(FOLDER.glob("*.ipynb")):
        renew(Path(name).resolve())


if __name__ == "__main__":
    main()
