"""Variable tracking: one variable gets a number, four more copy it in turn; which hold it?"""

from itertools import pairwise

from retention.tasks.names import number
from retention.tasks.ruler.draft import Draft, Draw, haystack, hidden

HOPS, NEW_TOKENS = 4, 30
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def tracked(draw: Draw) -> Draft:
    """A chain of assignments, in order, at random depths of the noise."""
    codes = draw.rng.choice(26**5, 1 + HOPS, replace=False).tolist()
    names = ["".join(LETTERS[code // 26**i % 26] for i in range(5)) for code in codes]
    value = number(draw.rng, draw.split, 5)
    needles = [f"Let {names[0]} be {value}."]
    needles += [f"Let {new} be what {old} is." for old, new in pairwise(names)]
    units, places = hidden(draw, haystack(draw, "noise"), needles, in_order=True)
    question = (
        f"Which {len(names)} variables of the text are {value}, told so or by way of others? "
        f"The variables that are {value} are"
    )
    return Draft(units, places, question, names, NEW_TOKENS)
