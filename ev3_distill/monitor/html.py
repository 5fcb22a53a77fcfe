"""What all HTML pages share: each is one file without scripts that loads nothing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def environment(*packages: str) -> "jinja2.Environment":
    """Templates from `packages`, then from this room. Text is escaped, and a missing value is an error, not a blank."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, ".") for name in (*packages, "ev3_distill.monitor")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
