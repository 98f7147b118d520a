"""Questions about paragraphs of made-up facts (entity, relation, value), of one step or of two."""

from functools import partial

from retention.tasks.names import coined
from retention.tasks.ruler.draft import Draft, Draw

NEW_TOKENS = 32
RELATIONS = ("home town", "trade", "favourite dish", "instrument")
LEADS = "teacher"
"""The relation that leads from one paragraph's entity to another's."""


def facts(draw: Draw, *, hops: int) -> Draft:
    """Numbered paragraphs, one per entity; the haystack's units are the others."""
    count = hops + 1 + draw.units
    people = [word.title() for word in coined(draw.rng, draw.split, count, 3)]
    values = [coined(draw.rng, draw.split, len(RELATIONS)) for _ in people]
    asked = int(draw.rng.integers(len(RELATIONS)))
    order = draw.rng.permutation(count).tolist()
    follows = {person: order[(i + 1) % count] for i, person in enumerate(order)}
    # the ring of teachers begins with the entity asked about
    start, last = order[0], order[hops - 1]
    places = draw.rng.permutation(count).tolist()
    paragraphs = []
    for number, person in enumerate(places):
        told = [
            f"The {name} of {people[person]} is {value}." for name, value in zip(RELATIONS, values[person], strict=True)
        ]
        told.append(f"The {LEADS} of {people[person]} is {people[follows[person]]}.")
        shuffled = [told[int(i)] for i in draw.rng.permutation(len(told))]
        paragraphs.append(f"Document {number + 1}: " + " ".join(shuffled))
    who = people[start] if hops == 1 else f"the {LEADS} of {people[start]}"
    question = f"What is the {RELATIONS[asked]} of {who}? Answer with the word from the documents. Answer:"
    evidence = [places.index(person) for person in dict.fromkeys((start, last))]
    return Draft(paragraphs, evidence, question, [values[last][asked]], NEW_TOKENS, scorer="contains_any")


QA = {"qa_1": partial(facts, hops=1), "qa_2": partial(facts, hops=2)}
