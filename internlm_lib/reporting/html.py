"""What the kit's HTML pages share: their templates, and how numbers are written."""

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> Any:
    """jinja2 with the templates of this room and `number`, `format_number` as a filter."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    return environment


def format_number(value: Any) -> str:
    """Numbers as people read them: grouped thousands, four significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
