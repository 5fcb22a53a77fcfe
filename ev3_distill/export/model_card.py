"""The model card of an exported student: MODEL_CARD.md, in the usual form with YAML front matter.

References:
  Mitchell et al., Model cards for model reporting, 2019; arXiv:1810.03993.
"""

import html
import json
import re
from typing import TYPE_CHECKING, Any

from ev3_distill.certify.certificate import COVERED, NOT_COVERED
from ev3_distill.monitor import report

if TYPE_CHECKING:
    from ev3_distill.export.export import Wanted

NAME = "MODEL_CARD.md"
LIBRARIES = {"onnx": "onnx", "stablehlo": "jax", "flax": "flax"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def render(finished: dict[str, Any], evidence: dict[str, Any], wanted: "Wanted", *, network: str) -> str:
    """The card's text; names of the user's are shown as they are, and never read as Markdown, HTML or YAML.

    Args:
      finished: content of report.json.
      evidence: content of evidence.json.
      wanted: how the student was exported.
      network: what the student is called.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ev3_distill.export", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown is no HTML: every text of the user's goes through `plain` or `yaml`
    )
    shown = (report.percent, report.floor_percent, report.exact_percent, report.count)
    environment.filters.update({"plain": plain, "yaml": yaml, **{one.__name__: one for one in shown}})
    of_student = evidence.get("float32", evidence)
    certificate = of_student.get("certificate")
    shape = finished["data"]["input_shape"]
    return environment.get_template("model_card.md.j2").render(
        run=finished,
        network=network,
        wanted=wanted,
        library=LIBRARIES[wanted.format],
        task="image-classification" if len(shape) == 3 else "tabular-classification" if len(shape) == 1 else "other",
        certificate=certificate,
        promise=report.promise(finished) if certificate else "",
        claims=[report.claim_line(claim, certificate["confidence"]) for claim in (certificate or {}).get("claims", [])],
        tables=(certificate or {}).get("tables", []),
        guards=[report.verdict(guard) for guard in of_student.get("guards", [])],
        decide=of_student.get("decide"),
        checked=evidence.get("export"),
        latency=evidence.get("latency"),
        shape=shape if wanted.layout == "nhwc" else [shape[-1], *shape[:-1]],
        dtype=finished["data"].get("dtype", "float32"),
        covered=COVERED,
        not_covered=NOT_COVERED,
    )


def plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def yaml(value: object) -> str:
    """A value as YAML; JSON is such."""
    return json.dumps(value)
