"""Traced programs, flat: their primitives in order, with the calls among them written out."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
           "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr", "remat": "jaxpr", "remat2": "jaxpr",
           "checkpoint": "jaxpr"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive applied; arrays are numbered."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return str(self.primitive.name)

    def apply(self, values: Sequence[Any]) -> list[Any]:
        """Its results."""
        found = self.primitive.bind(*values, **self.params)
        return list(found) if self.primitive.multiple_results else [found]


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps, and the numbers of the arrays that they begin and end with."""

    inputs: tuple[int, ...]
    constants: dict[int, Any]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    avals: dict[int, Any]  # shape and type of each array


def is_variable(atom: Any) -> bool:
    """Whether an atom of a program is a variable; else it is a literal."""
    return not hasattr(atom, "val")


def closed(program: Any) -> Any:
    """A closed program; one without constants may come open."""
    return program if hasattr(program, "consts") else ClosedJaxpr(program, ())


def flat(program: Any) -> Program:
    """A closed program with all calls written out."""
    numbers, constants, steps, avals = itertools.count(), dict[int, Any](), list[Step](), dict[int, Any]()
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
            taken, name = [number(atom) for atom in equation.invars], equation.primitive.name
            if name in INLINED:
                given = walk(closed(equation.params[INLINED[name]]), taken)
            else:
                given = list(_numbered(equation.outvars, numbers, avals))
                steps.append(Step(equation.primitive, equation.params, tuple(taken), tuple(given)))
            known.update(zip(equation.outvars, given, strict=True))
        return [number(atom) for atom in program.jaxpr.outvars]

    outputs = tuple(walk(program, inputs))
    return Program(inputs, constants, tuple(steps), outputs, avals)


def _numbered(variables: Sequence[Any], numbers: Iterator[int], avals: dict[int, Any]) -> Iterator[int]:
    for variable in variables:
        number = next(numbers)
        avals[number] = variable.aval
        yield number
