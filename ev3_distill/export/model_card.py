"""The model card of an exported student: MODEL_CARD.md, with YAML front matter.

References:
  Mitchell et al., Model cards for model reporting, 2019; arXiv:1810.03993.
"""

import html
import json
import re
from typing import Any

from ev3_distill.certify.certificate import COVERED, COVERED_GROUPS, NOT_COVERED
from ev3_distill.data.sources import describe_offset
from ev3_distill.export.export_config import ExportConfig
from ev3_distill.export.formats.metadata import ModelMetadata
from ev3_distill.monitor.number_format import count, exact_percent, floor_percent, percent
from ev3_distill.monitor.sentences import alarm_of, claim_line, guard_line, units_sentence
from ev3_distill.tasks.base import Task

NAME = "MODEL_CARD.md"
LIBRARIES = {"onnx": "onnx", "stablehlo": "jax", "flax": "flax"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def render(
    run_report: dict[str, Any], evidence: dict[str, Any], about: ModelMetadata, config: ExportConfig, *, task: Task
) -> str:
    """Renders the card; it repeats the certificate only where that is about this file.

    Names that the user chose appear verbatim; Markdown, HTML and YAML in them have no effect.

    Args:
      run_report: content of report.json.
      evidence: content of evidence.json.
      about: metadata of the file.
      config: of the export.
      task: names the pipeline tag and the metric.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ev3_distill.export", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown is not HTML: all text of the user goes through `plain` or `yaml`
    )
    filters = (percent, floor_percent, exact_percent, count)
    environment.filters.update({"plain": plain, "yaml": yaml, **{one.__name__: one for one in filters}})
    certificate = evidence.get("certificate")
    shape, metric = run_report["data"]["input_shape"], task.promise.name
    return environment.get_template("model_card.md.j2").render(
        run=run_report,
        about=about,
        offset=describe_offset(about.data["offset"]) if "offset" in about.data else "",
        config=config,
        library=LIBRARIES[config.format],
        task=task.card_task(tuple(shape)),
        metric=metric,
        metric_value=run_report["student"].get(metric),
        certificate=certificate,
        alarm=None if "decide" in evidence else alarm_of(run_report),
        claims=[claim_line(claim, certificate) for claim in certificate["claims"]] if certificate else [],
        tables=(certificate or {}).get("tables", []),
        guards=[guard_line(guard) for guard in evidence.get("guards", [])],
        decide=evidence.get("decide"),
        checked=evidence.get("export"),
        latency=evidence.get("latency"),
        shape=shape if config.layout == "nhwc" else [shape[-1], *shape[:-1]],
        dtype=run_report["data"].get("dtype", "float32"),
        covered=COVERED_GROUPS if certificate and certificate.get("units") else COVERED,
        units=units_sentence(certificate or {}),
        not_covered=NOT_COVERED,
    )


def plain(text: object) -> str:
    """Escapes text so that Markdown shows it verbatim, on one line."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def yaml(value: object) -> str:
    """Formats a value as YAML, of which JSON is a subset."""
    return json.dumps(value)
