"""Students: one module per family; functions to name, build, save and load a network.

    network = students.from_name("mlp:hidden=32-32", input_shape=(64,), num_classes=10)
    students.save(directory, network, network.init(key))
    network, variables = students.load(directory)

`students.growth` makes a network larger or smaller.
"""

from ev3_distill.students.naming import from_name, import_factory, name_of, tiny
from ev3_distill.students.network import count_params, feature_shapes, from_nnx
from ev3_distill.students.registry import FAMILIES, build, growth_spec, with_precision
from ev3_distill.students.saving import load, save
from ev3_distill.students.standardization import offset_of, standardized, standardized_like

__all__ = [
    "FAMILIES",
    "build",
    "count_params",
    "feature_shapes",
    "from_name",
    "from_nnx",
    "growth_spec",
    "import_factory",
    "load",
    "name_of",
    "offset_of",
    "save",
    "standardized",
    "standardized_like",
    "tiny",
    "with_precision",
]
