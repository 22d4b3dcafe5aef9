"""The search for the highest rate."""

import pytest

from serve_app.loadtest.search import Found, search


def searched(limit, first=1.0):
    tried = []

    def holds_at(rate):
        tried.append(rate)
        return rate <= limit

    return search(holds_at, first=first), tried


@pytest.mark.parametrize("limit", [0.07, 0.9, 1.0, 7.3, 300.0])
def test_the_limit_lies_in_a_narrow_bracket(limit):
    """Between the last rate that held and the first that did not, ten percent apart."""
    found, tried = searched(limit)
    assert found.holds <= limit < found.breaks
    assert found.breaks / found.holds <= 1.1
    assert len(tried) <= 16


def test_a_service_that_holds_nothing_is_told():
    """No rate held."""
    found, _ = searched(0.0)
    assert found.holds is None


def test_a_service_that_holds_everything_is_told():
    """No rate broke it."""
    found, tried = searched(1e9)
    assert found == Found(tried[-1], None)


def test_a_stop_ends_the_search():
    """With what is known."""
    answers = iter([True, True, False, None])
    assert search(lambda _rate: next(answers), first=1.0) == Found(2.0, 4.0)
