"""Latency of a run's teacher on the inputs of its student, in a subprocess with as many cores. Milliseconds.

`python -m ev3_distill.export.teacher_latency RUN FOLDER THREADS` reads FOLDER/examples.npy and FOLDER/facts.json, and writes
FOLDER/times.json.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # NumPy counts its cores when it is imported, which must come after `main` has set them
    import numpy as np

    from ev3_distill.data.sources import Dataset
    from ev3_distill.teachers import Teacher

TIME_LIMIT_S = 10.0  # for all passes of one batch size
PROCESS_LIMIT_S = 180.0


def measure_teacher(
    run: Path, dataset: "Dataset", examples: "np.ndarray", *, batch_sizes: Sequence[int], threads: int
) -> dict[int, "np.ndarray"] | str:
    """Times forward passes of a run's teacher, including preprocessing.

    Args:
      run: a finished run.
      dataset: whose classes the teacher predicts.
      examples: inputs [N, ...] as in the data set; repeated to fill a batch.
      batch_sizes: to measure.
      threads: number of cores the teacher may use.

    Returns:
      Times [passes] by batch size, or the reason why there are none.
    """
    import numpy as np

    from ev3_distill.runtime import user_code

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "examples.npy", examples)
        facts = {
            "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names),
            "offset": None if dataset.offset is None else dataset.offset.tolist(),
            "batch_sizes": list(batch_sizes),
            "typed": user_code.typed(),
        }
        (folder / "facts.json").write_text(json.dumps(facts))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", "ev3_distill.export.teacher_latency", str(run), place, str(threads)]
        try:
            done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=PROCESS_LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"it took more than {PROCESS_LIMIT_S:.0f} s"
        if not (folder / "times.json").exists():
            return f"its process ended with exit code {done.returncode}"
        times = json.loads((folder / "times.json").read_text())
    return times if isinstance(times, str) else {int(size): np.array(of) for size, of in times.items()}


def _measure(run: Path, folder: Path) -> dict[int, list[float]] | str:
    import numpy as np

    from ev3_distill.errors import InputError
    from ev3_distill.runtime import user_code
    from ev3_distill.runtime.timing import PASSES, times_ms

    facts, examples = json.loads((folder / "facts.json").read_text()), np.load(folder / "examples.npy")
    try:
        with user_code.only_typed(facts["typed"] or (), trusted=facts["typed"] is None):
            teacher = _load_teacher(run, facts, examples.shape[1:])
        if isinstance(teacher, str):
            return teacher
        times = {}
        for size in facts["batch_sizes"]:
            batch = examples[np.resize(np.arange(len(examples)), size)]
            passes = PASSES if size == 1 else PASSES // 3
            call = functools.partial(teacher.outputs, batch)
            times[size] = times_ms(call, passes=passes, warm_up=3, seconds=TIME_LIMIT_S).tolist()
        return times
    except InputError as error:
        return str(error)


def _load_teacher(run: Path, facts: dict[str, Any], input_shape: tuple[int, ...]) -> "Teacher | str":
    """The teacher of a run, or the reason why it cannot be timed."""
    import numpy as np

    from ev3_distill import students
    from ev3_distill.config import Compress
    from ev3_distill.teachers import load_teacher
    from ev3_distill.training.run_dir import read_json
    from ev3_distill.training.run_reader import config_of

    config = config_of(run, read_json(run / "report.json"))
    if not isinstance(config, Compress):
        return "there is none, the run trained on labels"
    if config.teacher.startswith("logits:"):
        return f"it cannot be timed, its logits were recorded ({config.teacher})"
    load = students.load
    if not config.teacher:
        load = functools.partial(load, factory=students.import_factory(config.teacher_network))
    return load_teacher(
        config.teacher or f"flax:{run / 'teacher'}",
        preprocessing=config.teacher_input,
        input_shape=input_shape,
        num_classes=facts["num_classes"],
        class_names=facts["class_names"],
        load_network=load,
        offset=None if facts["offset"] is None else np.array(facts["offset"]),
    )


def main(run: str, place: str, threads: int) -> None:
    """Entry point of the subprocess."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    with contextlib.redirect_stdout(sys.stderr):
        content = json.dumps(_measure(Path(run), Path(place)))
    (Path(place) / "times.json").write_text(content)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
