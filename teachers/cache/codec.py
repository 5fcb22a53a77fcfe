"""Codec: converts one example's teacher outputs to a record on disk, in float32, in float16, or as its top k classes.

float32   The outputs themselves.
float16   Logits as their distance to the row's largest, in float16, and the largest in float32. So no logit overflows, the
          error is 2^-11 of the distance, and a row keeps its offset, which losses on raw logits need. A distance beyond 65,504
          is stored as 65,504; its probability is 0 either way.
top<k>    The same for the k largest logits, their classes, and the log-odds of the residual mass r, log(r / (1 - r)), which
          never underflow. The decoder divides r equally among the other K - k classes: with S the sum of exp(logit) over the
          top k, each gets the logit u = log(r / (1 - r)) + log S - log(K - k), so that the softmax gives them r in total.
Features are stored in float32 with float32, and in float16 otherwise.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from ev3_distill.errors import InputError

HALF_MAX = 65504.0  # largest float16
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "top": 2e-3}  # of a decoded row, relative to its largest magnitude


class Codec:
    """Converts named outputs to records of a fixed size, and back."""

    def __init__(self, precision: str, fields: Mapping[str, tuple[int, ...]]):
        """Initializes a codec.

        Args:
          precision: `float32` or `float16`.
          fields: shape of one example's output by name.

        Raises:
          InputError: the precision is unknown, or does not fit the fields.
        """
        self.fields = {name: tuple(int(n) for n in shape) for name, shape in fields.items()}
        self.kind = self._kind_of(precision)
        self.dtype = np.dtype([part for name in self.fields for part in self._layout(name)])
        """Type of a record; packed."""

    def _kind_of(self, precision: str) -> str:
        if precision not in ("float32", "float16"):
            raise InputError(f"outputs are cached as float32 or float16; got {precision!r}: use one of these")
        return precision

    def _layout(self, name: str) -> list[tuple]:
        """Fields of the record that hold one output."""
        return [(f"feature {name}", "<f4" if self.kind == "float32" else "<f2", self.fields[name])]

    def _has_range(self, name: str) -> bool:
        """Whether an output must lie within the range of float16."""
        return self.kind != "float32"

    @property
    def tolerance(self) -> float:
        """Largest `difference` between a record and the same outputs computed again."""
        return TOLERANCE[self.kind]

    def arrays(self, outputs: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
        """Converts a teacher's outputs on n examples to float32.

        Raises:
          InputError: an output is missing, or has a wrong shape or type.
        """
        arrays = {}
        for name, shape in self.fields.items():
            if name not in outputs:
                raise InputError(f"a teacher must return {name}; got {', '.join(sorted(outputs))}: fix the teacher")
            array = np.asarray(outputs[name])
            if array.shape != (n, *shape) or array.dtype.kind not in "iufV":  # V: bfloat16
                raise InputError(
                    f"a teacher must return {name} as numbers {[n, *shape]} for {n} examples; got {array.dtype} "
                    f"{list(array.shape)}: fix the teacher"
                )
            with np.errstate(over="ignore"):  # float64 may overflow; `fault` finds it
                arrays[name] = array.astype(np.float32)
        return arrays

    def fault(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
        """Index of the first row that cannot be stored, and the first two parts of its error; None if all can."""
        faults = []
        for name, array in arrays.items():
            flat = array.reshape(len(array), -1)
            bad = ~np.isfinite(flat).all(axis=1)
            if bad.any():
                faults.append((int(bad.argmax()), f"{name} must be finite; got nan or infinity"))
            if self._has_range(name):
                with np.errstate(invalid="ignore"):
                    bad = (np.abs(flat) > HALF_MAX).any(axis=1)
                if bad.any():
                    largest = np.abs(flat).max()
                    rule = f"{name} must be within {HALF_MAX:,.0f} to be cached in float16; got {largest:.3g}"
                    faults.append((int(bad.argmax()), rule))
        return min(faults, default=None)

    def encode(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Converts outputs [n, ...] without fault to records [n]."""
        records = np.empty(len(next(iter(arrays.values()))), self.dtype)
        for name, array in arrays.items():
            self._encode(records, name, array)
        return records

    def _encode(self, records: np.ndarray, name: str, array: np.ndarray) -> None:
        records[f"feature {name}"] = array

    def decode(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Converts records [n] to outputs [n, ...] float32."""
        return {name: self._decode(records, name) for name in self.fields}

    def _decode(self, records: np.ndarray, name: str) -> np.ndarray:
        return records[f"feature {name}"].astype(np.float32)

    def difference(self, records: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Largest difference between records [n] and outputs, per row [n], relative to the row's largest magnitude."""
        return self._difference(self.decode(records), arrays)

    def _difference(self, stored: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]) -> np.ndarray:
        least = 1e-6 if self.kind == "float32" else 1e-3  # float16 is coarse near 0
        worst = np.zeros(len(next(iter(fresh.values()))))
        for name, array in fresh.items():
            one, other = stored[name].reshape(len(array), -1), array.reshape(len(array), -1)
            scale = np.maximum(np.abs(other).max(axis=1, initial=0), least)
            with np.errstate(invalid="ignore", over="ignore"):
                difference = np.abs(one - other).max(axis=1, initial=0) / scale
            worst = np.fmax(worst, np.where(np.isfinite(difference), difference, np.inf))
        return worst


class LogitsCodec(Codec):
    """The codec of classification: `logits` [K] in any precision, also as their top k, and features."""

    def __init__(self, precision: str, fields: Mapping[str, tuple[int, ...]]):
        """Initializes a codec.

        Args:
          precision: `float32`, `float16` or `top<k>`, such as `top8`.
          fields: shape of one example's output by name; `logits` is (K,), any other is a feature.

        Raises:
          InputError: the precision is unknown, k is not below K, or there are no logits.
        """
        if len(fields.get("logits", ())) != 1:
            raise InputError(
                f"a teacher's outputs have logits of shape (K,); got {dict(fields)}: name one output logits"
            )
        self.classes, self.top = int(fields["logits"][0]), 0
        super().__init__(precision, {"logits": fields["logits"], **fields})

    def _kind_of(self, precision: str) -> str:
        if precision in ("float32", "float16"):
            return precision
        if not (match := re.fullmatch(r"top([1-9]\d*)", precision)):
            raise InputError(
                f"logits are cached as float32, float16 or top<k>; got {precision!r}: use one of these, such as top8"
            )
        self.top = int(match[1])
        if self.top >= self.classes:
            raise InputError(
                f"top<k> needs k below the number of classes, {self.classes}; got {precision}: use float16"
            )
        return "top"

    def _layout(self, name: str) -> list[tuple]:
        if name != "logits":
            return super()._layout(name)
        if self.kind == "float32":
            return [("logits", "<f4", (self.classes,))]
        if self.kind == "float16":
            return [("largest", "<f4"), ("logits", "<f2", (self.classes,))]
        index = np.min_scalar_type(self.classes - 1).newbyteorder("<")
        return [("largest", "<f4"), ("odds", "<f4"), ("logits", "<f2", (self.top,)), ("index", index, (self.top,))]

    def _has_range(self, name: str) -> bool:
        return name != "logits" and super()._has_range(name)

    def _encode(self, records: np.ndarray, name: str, array: np.ndarray) -> None:
        if name != "logits":
            super()._encode(records, name, array)
        elif self.kind == "float32":
            records["logits"] = array
        else:
            records["largest"] = array.max(axis=1)
            with np.errstate(over="ignore"):
                distance = np.maximum(array - records["largest"][:, None], -HALF_MAX)
            if self.kind == "float16":
                records["logits"] = distance
            else:
                index = np.argpartition(array, self.classes - self.top, axis=1)[:, self.classes - self.top :]
                records["index"] = index
                records["logits"] = np.take_along_axis(distance, index, axis=1)
                records["odds"] = _log_odds(array, index)

    def _decode(self, records: np.ndarray, name: str) -> np.ndarray:
        if name != "logits":
            return super()._decode(records, name)
        if self.kind == "float32":
            return records["logits"].astype(np.float32)
        largest, distance = records["largest"][:, None], records["logits"].astype(np.float32)
        if self.kind == "float16":
            return largest + distance
        sum_top = np.log(np.exp(distance.astype(np.float64)).sum(axis=1))
        u = records["odds"] + sum_top - math.log(self.classes - self.top)
        logits = np.empty((len(records), self.classes), np.float32)
        logits[:] = (largest[:, 0] + u)[:, None]
        np.put_along_axis(logits, records["index"].astype(np.int64), largest + distance, axis=1)
        return logits

    def difference(self, records: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """As `Codec.difference`.

        With top<k>, it compares the logits of the recorded classes and the residual mass: a near tie may change the classes.
        """
        stored, fresh = self.decode(records), dict(arrays)
        if self.kind != "float32":
            with np.errstate(over="ignore"):
                fresh["logits"] = np.maximum(fresh["logits"], fresh["logits"].max(axis=1, keepdims=True) - HALF_MAX)
        if self.kind != "top":
            return self._difference(stored, fresh)
        index = records["index"].astype(np.int64)
        mass = np.abs(_mass(records["odds"]) - _mass(_log_odds(arrays["logits"], index)))
        stored["logits"], fresh["logits"] = (np.take_along_axis(x["logits"], index, axis=1) for x in (stored, fresh))
        return np.fmax(mass, self._difference(stored, fresh))


CODECS: dict[str, type[Codec]] = {"arrays": Codec, "logits": LogitsCodec}  # by `Task.teacher_codec`


def _log_odds(logits: np.ndarray, index: np.ndarray) -> np.ndarray:
    """log(r / (1 - r)), where r is the softmax mass outside the classes `index` [n, k]."""
    rest = logits.astype(np.float64)
    top = np.take_along_axis(rest, index, axis=1)
    np.put_along_axis(rest, index, -np.inf, axis=1)
    return _log_sum_exp(rest) - _log_sum_exp(top)


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    largest = x.max(axis=1, keepdims=True)
    return largest[:, 0] + np.log(np.exp(x - largest).sum(axis=1))


def _mass(odds: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-odds.astype(np.float64)))
