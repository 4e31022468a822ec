"""Posteriors of latent variables, by structure."""

from .categorical import Exact as Exact
from .categorical import Hard as Hard
