"""Options of an export."""

import dataclasses

from ev3_distill.errors import InputError

FORMATS = ("flax", "onnx", "stablehlo")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """How a student is exported."""

    format: str = "flax"
    pick: str = ""  # which student of a search, see `archive.pick`; empty: the delivered one
    layout: str = "nhwc"  # or nchw: the last axis of an example comes first
    softmax: bool = False
    int8: bool = False
    license: str = "unknown"  # of the teacher
    student: str = ""  # MODULE:FACTORY, for a student of the user's own
    latency: bool = False  # whether to measure the latency of the file and of the teacher
    trust_run: bool = False  # whether code that only the run names may be imported, such as its python: teacher

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(
                f"an export's format is one of {', '.join(FORMATS)}; got '{self.format}': use one of these"
            )
        if self.layout not in ("nhwc", "nchw"):
            raise InputError(f"an export's layout is nhwc or nchw; got '{self.layout}': use one of these")
        if self.format == "flax" and (self.layout != "nhwc" or self.softmax):
            raise InputError(
                "--layout and --softmax need a format for other runtimes; got --format flax: add --format onnx or stablehlo"
            )
        if self.int8 and self.format != "onnx":
            raise InputError(f"--int8 writes an ONNX file; got --format {self.format}: add --format onnx")

    @property
    def output(self) -> str:
        """What the file outputs: logits or probabilities."""
        return "probabilities" if self.softmax else "logits"

    def input_shape(self, shape: list[int]) -> tuple[int, ...]:
        """The shape of one example as the file takes it.

        Args:
          shape: of one example in the data set.

        Raises:
          InputError: the layout is nchw and an example has no channel axis.
        """
        if self.layout == "nhwc":
            return tuple(shape)
        if len(shape) < 2:
            raise InputError(f"--layout nchw is for images and sequences; got examples of shape {shape}: omit it")
        return (shape[-1], *shape[:-1])
