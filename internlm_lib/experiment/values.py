"""Scalar types of the schema: text from YAML and papermill is coerced only where it is unambiguous.

YAML 1.1 and papermill hand over `1e-5` as text and `false` from `-p` as the truthy text "false".
"""

import difflib
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator


def parse_number(value: Any) -> float:
    """A finite float from a number, or from text that spells one (`"1e-5"`)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("not a number; write one, e.g. 1.0e-5")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("not a number; write one, e.g. 1.0e-5") from None
    except OverflowError:
        raise ValueError("not a finite number") from None
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def parse_integer(value: Any) -> int:
    """A whole number from an int, a float without fraction, or text that spells either."""
    number = parse_number(value)
    if not number.is_integer():
        raise ValueError("not a whole number; write one without a fraction")
    try:
        return int(value)  # exact; a float rounds from 17 digits on
    except ValueError:
        return int(number)


def parse_flag(value: Any) -> bool:
    """A bool, or the words true and false in any case; never the truth value of other text."""
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else None
    if word not in ("true", "false"):
        raise ValueError("neither true nor false; write true or false")
    return word == "true"


def parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not text; put it in quotes")
    if not value:
        raise ValueError("empty text; write a value, or null where none is meant")
    return value


def parse_setting(value: Any) -> str:
    """Text as an environment variable has it, from any scalar: `true` of True, `1800` of 1800.0."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        number = parse_number(value)
        return str(parse_integer(value)) if number.is_integer() else str(number)
    return parse_text(value)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean …?` of the most similar of the allowed names; "" if none is similar."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


Number = Annotated[float, BeforeValidator(parse_number)]
Integer = Annotated[int, BeforeValidator(parse_integer)]
Flag = Annotated[bool, BeforeValidator(parse_flag)]
Text = Annotated[str, BeforeValidator(parse_text)]
Setting = Annotated[str, BeforeValidator(parse_setting)]
