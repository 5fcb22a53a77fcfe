"""Traced programs (jaxprs): the primitives that call another program, and flat programs without such calls."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

# Primitives that call a program on their own arguments, and the parameter that holds the program.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One application of a primitive. Arrays are identified by numbers."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return str(self.primitive.name)

    def apply(self, values: Sequence[Any]) -> list[Any]:
        """Outputs for these inputs."""
        out = self.primitive.bind(*values, **self.params)
        return list(out) if self.primitive.multiple_results else [out]


@dataclasses.dataclass(frozen=True)
class Program:
    """A flat program: operations in order, and the numbers of its input and output arrays."""

    inputs: tuple[int, ...]
    constants: dict[int, Any]
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]
    avals: dict[int, Any]  # shape and dtype of each array


def is_variable(atom: Any) -> bool:
    """Whether an atom of a jaxpr is a variable; otherwise it is a literal."""
    return not hasattr(atom, "val")


def called(equation: Any) -> Any:
    """The closed program that an equation of CALLS calls; some primitives hold an open one without constants."""
    program = equation.params[CALLS[equation.primitive.name]]
    return program if hasattr(program, "consts") else ClosedJaxpr(program, ())


def flatten(program: Any) -> Program:
    """Inline all calls of a closed jaxpr."""
    numbers, constants, operations, avals = itertools.count(), dict[int, Any](), list[Operation](), dict[int, Any]()
    inputs = tuple(_numbered(program.jaxpr.invars, numbers, avals))

    def constant(value: Any) -> int:
        number = next(numbers)
        constants[number], avals[number] = value, jax.typeof(value)
        return number

    def walk(program: Any, arguments: Sequence[int]) -> list[int]:
        known = dict(zip(program.jaxpr.invars, arguments, strict=True))
        known.update(zip(program.jaxpr.constvars, map(constant, program.consts), strict=True))

        def number(atom: Any) -> int:
            return known[atom] if is_variable(atom) else constant(atom.val)

        for equation in program.jaxpr.eqns:
            operands = [number(atom) for atom in equation.invars]
            if equation.primitive.name in CALLS:
                results = walk(called(equation), operands)
            else:
                results = list(_numbered(equation.outvars, numbers, avals))
                operations.append(Operation(equation.primitive, equation.params, tuple(operands), tuple(results)))
            known.update(zip(equation.outvars, results, strict=True))
        return [number(atom) for atom in program.jaxpr.outvars]

    outputs = tuple(walk(program, inputs))
    return Program(inputs, constants, tuple(operations), outputs, avals)


def _numbered(variables: Sequence[Any], numbers: Iterator[int], avals: dict[int, Any]) -> Iterator[int]:
    for variable in variables:
        number = next(numbers)
        avals[number] = variable.aval
        yield number
