"""The error tree is drawn as it is, and every member explains itself in one line."""

from __future__ import annotations

import pytest

from localspec import errors
from localspec.errors import LocalspecError, SettingError, UnknownNameError, UsageError


def test_every_error_is_exported_and_drawn() -> None:
    members = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, LocalspecError)
    }
    assert members == set(errors.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in members)


def test_exit_codes_follow_the_tree() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)


def test_the_line_says_got_expected_and_what_to_do() -> None:
    line = str(SettingError("width out of range", got=0, expected="at least 1", fix="Give more\nroom."))
    assert line == "width out of range (got 0, expected at least 1). Give more room."


def test_the_nearest_name_is_suggested() -> None:
    assert "Did you mean 'ngram'?" in str(UnknownNameError.among("drafter", "ngrma", ["ngram", "nothing"]))
    assert "Did you mean" not in str(UnknownNameError.among("drafter", "zzzzz", ["ngram"]))


def test_errors_are_exceptions_of_one_base() -> None:
    with pytest.raises(LocalspecError):
        raise UnknownNameError.among("backend", "x", [])
