import pytest

from tokenpacker.compare.intervals import Mean, t_quantile


@pytest.mark.parametrize(
    ("degrees", "published"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(degrees, published):
    assert t_quantile(degrees) == pytest.approx(published, abs=5e-4)  # the tables' last digit


def test_a_mean_of_three_seeds_has_the_interval_worked_out_by_hand():
    mean = Mean.of([97.0, 98.0, 99.0])  # standard deviation 1, standard error 1 / sqrt(3)
    assert mean.mean == 98.0
    assert mean.half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert mean.text() == "98.0 ± 2.5"


def test_one_seed_has_no_interval():
    assert Mean.of([98.04]).half is None
    assert Mean.of([98.04]).text() == "98.0"
