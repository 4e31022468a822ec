"""Named variants of EM: each fills a slot."""

from ..latents import Hard
from .step import EM


def hard_em() -> EM:
    """Classification EM: every row goes whole to its likeliest component (Celeux & Govaert 1992)."""
    return EM(expect=Hard())
