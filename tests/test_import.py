"""Importing the library has no side effects."""

import subprocess
import sys

import jaxem

CODE = """
import jax
before = dict(jax.config.values)
import jaxem, jaxem.testing, jaxem.datasets
after = dict(jax.config.values)
assert before == after, {name for name in after if after[name] != before.get(name)}
import jax._src.xla_bridge as bridge
assert not bridge._backends, "importing jaxem started a backend"
"""


def test_import_changes_no_configuration_and_starts_no_backend():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)


def test_public_names_exist():
    names = """Mixture Normal NormalInverseWishart Dirichlet EM Exact Full Blocks ClosedForm em_fit fit_restarts Result
    Restarts Screen Status EMError from_functions default_prior params_from_responsibilities aic bic icl"""
    assert all(hasattr(jaxem, name) for name in names.split())
    assert jaxem.__version__
