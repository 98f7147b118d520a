"""How deep in its context each piece of evidence lies."""

import numpy as np

from retention.data.example import EvidenceRef, Segment, Turn


def depths(turns: list[Turn], segments: list[Segment]) -> list[list[float]]:
    """Per turn, where each piece of its evidence lies in the context, from 0 to 1: by images, or by characters of text."""
    return [_depth(turn, segments) for turn in turns]


def _depth(turn: Turn, segments: list[Segment]) -> list[float]:
    images = sum(segment.kind == "image" for segment in segments)
    ends = np.cumsum([len(segment.payload) if segment.kind == "text" else 0 for segment in segments])
    return [
        round(ref.image / max(1, images - 1), 4)
        if isinstance(ref, EvidenceRef)
        else round((int(ends[ref.segment]) - len(segments[ref.segment].payload) + ref.start) / max(1, int(ends[-1])), 4)
        for ref in turn.evidence
    ]
