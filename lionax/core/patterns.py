"""Regular expressions from a config: only those whose search ends soon.

Python's `re` backtracks, and nothing interrupts it: ``(a|a)*b`` takes 2^n steps on n letters. So a
pattern that a config brings is walked over before it is compiled.
"""

import math
import re
from typing import Any

from lionax.core.table import shown

__all__ = ["check_bounded"]

LONGEST = 1000  # characters of a pattern
MOST_CHOICES = 100_000  # a product over the parts of a pattern
MANY = 30  # choices that a repetition counts as, at most
WIDEST = 256  # characters in a range: without case, `re` looks at each
REMEDY = ("give a simpler one, or make the mask in Python with lionax.matching(...), which takes "
          "any regular expression")


def check_bounded(pattern: Any, owner: str) -> None:
    """Refuses a regular expression that is long or may take long to search for."""
    if not isinstance(pattern, str):
        raise ValueError(f"{owner}: {shown(pattern)} is not a regular expression; give a string")
    if len(pattern) > LONGEST:
        raise ValueError(f"{owner}: a regular expression of {len(pattern):,} characters is not "
                         f"accepted in a config; at most {LONGEST:,} are")
    try:
        choices = _choices(_parsed(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{owner}: {shown(pattern)} is not a regular expression: "
                         f"{error}") from None
    except _RefusedError as error:
        raise ValueError(f"{owner}: {shown(pattern)} holds {error}, which is not accepted in a "
                         f"config: to search for it may take for ever; {REMEDY}") from None
    if choices > MOST_CHOICES:
        raise ValueError(f"{owner}: {shown(pattern)} has too many repetitions and alternatives to "
                         f"be accepted in a config: of each the number of choices, at most {MANY} "
                         f"of a repetition, is multiplied, and may be {MOST_CHOICES:,}; {REMEDY}")


class _RefusedError(Exception):
    """What a pattern holds that is refused."""


def _parsed(pattern: str) -> Any:
    """The tree of a pattern. It is not public, so a test pins what is used of it."""
    return re._parser.parse(pattern)  # pyright: ignore[reportAttributeAccessIssue]


def _choices(nodes: Any, repeated: bool = False) -> int:
    """In how many ways a pattern can match, as long as each repetition has few."""
    return math.prod(_choices_of(str(name), argument, repeated) for name, argument in nodes)


def _choices_of(name: str, argument: Any, repeated: bool) -> int:
    """The same of a part, which may stand in a repetition."""
    match name:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "AT":
            return 1
        case "IN":
            for kind, what in argument:
                if str(kind) == "RANGE" and what[1] - what[0] > WIDEST:
                    raise _RefusedError(f"a range of more than {WIDEST} characters")
            return 1
        case "SUBPATTERN" | "ASSERT" | "ASSERT_NOT":
            return _choices(argument[-1], repeated)
        case "ATOMIC_GROUP":
            return _choices(argument, repeated)
        case "BRANCH" if not repeated:
            return sum(map(_choices, argument[1]))
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT" if not repeated:
            least, most, body = argument
            if most <= 1:  # a choice between it and nothing
                return 1 + _choices(body)
            if body.getwidth()[0] == 0:
                raise _RefusedError("a repetition of what may be empty")
            _choices(body, repeated=True)
            return min(most - least + 1, MANY)
    kinds = {"BRANCH": "alternatives inside of a repetition", "GROUPREF": "a reference to a group",
             "GROUPREF_EXISTS": "a reference to a group"}
    raise _RefusedError(kinds.get(name, "a repetition inside of a repetition"
                                  if "REPEAT" in name else f"a {name}"))
