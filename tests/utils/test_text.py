"""Tests for formatting text in messages."""

import pytest

from senet_transfer.utils.text import counted, differences, first_line, first_of


@pytest.mark.parametrize(
    ("limit", "text"),
    [(1, "a, and 2 more"), (2, "a, b, and 1 more"), (3, "a, b, c"), (9, "a, b, c")],
)
def test_as_many_names_are_listed_as_the_limit_allows(limit, text):
    assert first_of(iter("abc"), limit) == text


def test_a_noun_is_in_the_singular_only_after_one():
    assert counted(1, "image") == "1 image"
    assert counted(0, "image") == "0 images"
    assert counted(1200, "class", "classes") == "1,200 classes"


def test_no_names_give_no_text():
    assert first_of([]) == ""


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        ("ab", "ab", ""),
        ("ab", "ba", "0: 'a' instead of 'b'; 1: 'b' instead of 'a'"),
        ("ab", "abc", "'c' is missing"),
        ("abcd", "ab", "'c', 'd' are unexpected"),
        ("xb", "ab", "0: 'x' instead of 'a'; 'a' is missing; 'x' is unexpected"),
    ],
)
def test_lists_that_differ_only_in_length_have_differences(found, expected, text):
    assert differences(found, expected) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such key\nin the file"), "no such key"),
        (RuntimeError("\nOut of range."), "Out of range"),
        (KeyError(), "KeyError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_an_error_is_quoted_by_its_first_line_or_its_class(error, text):
    assert first_line(error) == text
