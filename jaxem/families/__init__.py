"""Observation families: p(observation | component)."""

from .normal import Normal as Normal
from .normal import NormalParams as NormalParams
from .normal import NormalStats as NormalStats
from .normal_prior import NormalInverseWishart as NormalInverseWishart
from .normal_prior import default_prior as default_prior
