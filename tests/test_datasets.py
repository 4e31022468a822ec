"""The data that ship are the published ones: shapes, and summaries that others print."""

import numpy as np
import pytest

from jaxem import datasets


def test_faithful_has_the_moments_that_r_prints() -> None:
    x = datasets.faithful()
    assert x.shape == (272, 2)
    assert x.dtype == np.float64
    np.testing.assert_allclose(x.mean(0), [3.487783, 70.897059], atol=5e-7)
    np.testing.assert_allclose(np.cov(x.T), [[1.302728, 13.977808], [13.977808, 184.823312]], atol=5e-7)


def test_iris_has_fishers_means_and_ranges() -> None:
    x, species = datasets.iris()
    assert x.shape == (150, 4)
    assert x.dtype == np.float64
    np.testing.assert_allclose(x.mean(0), [5.843333, 3.057333, 3.758, 1.199333], atol=5e-7)
    np.testing.assert_array_equal(x.min(0), [4.3, 2.0, 1.0, 0.1])
    np.testing.assert_array_equal(x.max(0), [7.9, 4.4, 6.9, 2.5])
    np.testing.assert_array_equal(np.bincount(species), [50, 50, 50])
    # Fisher (1936), table 2: mean petal length of the three species.
    np.testing.assert_allclose([x[species == k, 2].mean() for k in range(3)], [1.462, 4.260, 5.552], atol=5e-4)


def test_iris_equals_scikit_learns_copy() -> None:
    theirs = pytest.importorskip("sklearn.datasets").load_iris()
    x, species = datasets.iris()
    np.testing.assert_array_equal(x, theirs.data)
    np.testing.assert_array_equal(species, theirs.target)


def test_galaxies_are_those_of_mass_typo_included() -> None:
    x = datasets.galaxies()
    assert x.shape == (82,)
    assert x.dtype == np.float64
    assert (x.min(), np.median(x), x.max()) == (9172, 20833.5, 34279)
    assert x[77] == 26690
    assert np.all(np.diff(x) > 0)


def test_nile_has_the_mean_and_variance_of_its_century() -> None:
    x = datasets.nile()
    assert x.shape == (100,)
    assert x.dtype == np.float64
    assert (x.min(), np.median(x), x.max()) == (456, 893.5, 1370)
    np.testing.assert_allclose([x.mean(), x.var(ddof=1)], [919.35, 28637.95], atol=5e-3)


def test_earthquakes_have_the_moments_of_zucchini_and_macdonald() -> None:
    x = datasets.earthquakes()
    assert x.shape == (107,)
    assert np.issubdtype(x.dtype, np.integer)
    # Section 1.2: sample mean 19.36 and variance 51.57.
    np.testing.assert_allclose([x.mean(), x.var(ddof=1)], [19.36, 51.57], atol=5e-3)
    assert x.sum() == 2072


def test_lsat6_has_the_totals_of_bock_and_lieberman() -> None:
    answers, counts = datasets.lsat6()
    assert counts.sum() == 1000
    assert len(np.unique(answers, axis=0)) == 32
    np.testing.assert_array_equal(counts @ answers, [924, 709, 553, 763, 870])
    # How many persons had so many right answers.
    np.testing.assert_array_equal(np.bincount(answers.sum(axis=1), counts), [3, 20, 85, 237, 357, 298])


def test_dyestuffs_have_the_published_means() -> None:
    yields, batches = datasets.dyestuff()
    means = [yields[batches == k].mean() for k in range(6)]
    np.testing.assert_array_equal(means, [1505, 1528, 1564, 1498, 1600, 1470])
    # Box & Tiao, section 5.1: the mean squares between and within batches.
    yields, batches = datasets.dyestuff2()
    means = np.array([yields[batches == k].mean() for k in range(6)])
    between = 5 * np.sum((means - yields.mean()) ** 2) / 5
    within = np.sum((yields - means[batches]) ** 2) / 24
    np.testing.assert_allclose([yields.mean(), between, within], [5.6656, 8.3363, 14.9459], atol=5e-4)


def test_every_call_gives_arrays_of_its_own() -> None:
    datasets.nile()[:] = 0
    assert datasets.nile()[0] == 1120
