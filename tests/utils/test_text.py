"""Tests of text formatting for messages."""

import pytest

from senet_transfer.utils.text import first_of


@pytest.mark.parametrize(
    ("limit", "text"),
    [(1, "a, and 2 more"), (2, "a, b, and 1 more"), (3, "a, b, c"), (9, "a, b, c")],
)
def test_as_many_names_are_listed_as_the_limit_allows(limit, text):
    assert first_of(iter("abc"), limit) == text


def test_no_names_give_no_text():
    assert first_of([]) == ""
