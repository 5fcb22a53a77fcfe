"""HTML pages: one file each, without scripts, that asks for nothing; what they share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def environment(*packages: str) -> "jinja2.Environment":
    """Templates of ours and of `packages`, first found first. Text is escaped; what is missing is an error, not a blank."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, ".") for name in (*packages, "ev3_distill.monitor")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
