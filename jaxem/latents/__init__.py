"""Posteriors of latent variables, by structure."""

from .expect import Exact as Exact
from .expect import Hard as Hard
from .expect import Sample as Sample
from .expect import e_step as e_step
