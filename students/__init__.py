"""Students: one file per family, smallest first, and the ways to name, build, save and load one."""

from ev3_distill.students.registry import (
    FAMILIES,
    build,
    deployed,
    factory_of,
    layout_of,
    load,
    mlp,
    named,
    save,
    text_of,
    tiny,
)

__all__ = [
    "FAMILIES",
    "build",
    "deployed",
    "factory_of",
    "layout_of",
    "load",
    "mlp",
    "named",
    "save",
    "text_of",
    "tiny",
]
