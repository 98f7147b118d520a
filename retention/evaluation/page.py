"""Templates of the pages that need nothing but themselves: no request leaves them."""

from pathlib import Path
from typing import TYPE_CHECKING

from retention.evaluation.equality import shown
from retention.evaluation.tables import (
    above_chance_text,
    against_text,
    difference_text,
    interval_text,
    percent_text,
    ratio_text,
    score_text,
    size_text,
)

if TYPE_CHECKING:
    from jinja2 import Template


def template(name: str) -> "Template":
    """One of the templates beside this file, with the filters they share; a name that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.filters |= {"percent": percent_text, "bytes": size_text, "score": score_text, "ratio": ratio_text}
    page.filters |= {"shown": shown, "difference": difference_text, "against": against_text}
    page.filters["above_chance"] = above_chance_text
    page.filters["interval"] = lambda row: interval_text(row["ci_low"], row["ci_high"])
    return page.get_template(name)
