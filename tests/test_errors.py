"""Texts of errors and warnings."""

import pytest

from ev3_distill.errors import InputError, check, first_line, summary, warn


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad"), "ValueError: bad"),
        (ValueError("\n  first\nsecond"), "ValueError: first"),
        (KeyError("key"), "KeyError: 'key'"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("x" * 999), "RuntimeError: " + "x" * 200),
    ],
)
def test_a_summary_is_the_type_and_the_first_line(error, text):
    assert summary(error) == text


def test_the_first_line_of_a_text():
    assert [first_line(text) for text in ("", " \n ", "a\nb", "\na")] == ["", "", "a", "a"]


def test_check_raises_an_error_of_three_parts():
    check(True, "x must be 1", 1, "try 1")
    with pytest.raises(InputError, match=r"^x must be 1; got 2: try 1$"):
        check(False, "x must be 1", 2, "try 1")


def test_a_warning_goes_to_stderr(capsys):
    warn("careful")
    assert capsys.readouterr() == ("", "ev3-distill: warning: careful\n")
