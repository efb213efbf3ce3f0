"""Options: every value is checked by the type and the limits of its field, and errors say what is allowed."""

import dataclasses
import typing

import numpy as np
import pytest

from modernbert.checks import Limits, Options, fields_of, option
from modernbert.errors import ConfigError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Options):
    count: int = option(3, "How many.", least=1)
    share: float = option(0.5, "A share.", above=0, most=1)
    switch: bool = option(False, "On or off.")
    way: str = option("slow", "How to go", choices=("slow", "fast"))
    cut: bool | str = option(False, "Whether or how to cut", choices=("left", "right"))
    best: int | str | None = option("best", "How many", choices=("best",), least=1, otherwise="the best")
    words: list[str] = option(["O"], "Words.")
    ids: tuple[int, ...] = option((), "Ids.", least=0)
    more: dict[str, int] = option({}, "More.")


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("count", 2.0, 2), ("count", "7", 7), ("count", np.int64(3), 3), ("count", 10**30, 10**30),
        ("share", "5e-1", 0.5), ("share", 1, 1.0), ("switch", 1, True), ("way", "FAST", "fast"), ("cut", True, True),
        ("cut", "left", "left"), ("best", None, None), ("best", 2, 2), ("best", "best", "best"),
        ("words", "one", ["one"]), ("words", ("a", "b"), ["a", "b"]), ("ids", 4, (4,)), ("more", {"a": 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_values_become_the_type_of_their_field(name, value, taken):
    got = getattr(Example(**{name: value}), name)
    assert got == taken
    assert type(got) is type(taken)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count is 0; it must be a whole number of at least 1"),
        ("count", 1.5, "count is 1.5; it must be a whole number of at least 1"),
        ("count", True, "count is True; it must be a whole number of at least 1"),
        ("count", None, "count is None; it must be a whole number of at least 1"),
        ("share", float("nan"), "share is nan; it must be a number above 0 and at most 1"),
        ("share", [1], "share is [1]; it must be a number above 0 and at most 1"),
        ("switch", "false", "switch is 'false'; choose True or False"),
        ("way", "back", "way is 'back'; choose one of slow, fast"),
        ("cut", "up", "cut is 'up'; choose True, False or one of left, right"),
        ("best", "worst", "best is 'worst'; it must be a whole number of at least 1 or best"),
        ("words", [1], "words is [1]; it must be a string or a list of them"),
        ("ids", [1, -1], "ids is [1, -1]; it must be a whole number of at least 0 or a list of them"),
        ("more", 3, "more is 3; it must be a dict"),
    ],
)
def test_an_error_says_what_was_given_and_what_is_allowed(name, value, message):
    with pytest.raises(InputError) as error:
        Example(**{name: value})
    assert str(error.value) == message


def test_options_of_a_mapping():
    assert Example.of({"count": None, "best": None, "way": "fast"}, "it") == Example(best=None, way="fast")
    with pytest.raises(InputError, match="the task has no option speed; there are count, share, switch"):
        Example.of({"speed": 1}, "the task")
    assert Example().words is not Example().words  # a list of its own


def test_the_error_is_of_the_class_s_own_kind():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Example):
        error: typing.ClassVar[type[ValueError]] = ConfigError

    with pytest.raises(ConfigError, match="count is 0"):
        Other(count=0)


def test_fields_are_described():
    fields = {field.name: field for field in fields_of(Example)}
    assert list(fields) == [field.name for field in dataclasses.fields(Example)]
    assert fields["count"].described == "How many. (default: 3)"
    assert fields["way"].described == "How to go. Choices: slow, fast. (default: slow)"
    assert fields["switch"].described == "On or off. (default: no)"
    assert fields["best"].described == "How many. Choices: best. (default: the best)"
    assert fields["words"].described == "Words. (default: O)"
    assert (fields["best"].kinds, fields["best"].limits) == ((int, str), Limits(least=1))
    assert [name for name, field in fields.items() if field.is_list] == ["words", "ids"]


def test_choices_that_stand_twice_are_the_same():
    from modernbert.nn.pooling import POOLINGS
    from modernbert.pipelines.options import OPTIONS
    from modernbert.text.encoding import TRUNCATIONS

    fields = {field.name: field.choices for field in fields_of(OPTIONS["sentence-embedding"])}
    assert fields["pooling"] == POOLINGS
    assert fields["truncation"] == TRUNCATIONS
