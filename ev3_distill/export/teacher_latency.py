"""How long a run's teacher takes for what its student takes, in a process of its own with as many processors. Milliseconds.

`python -m ev3_distill.stopwatch RUN FOLDER THREADS` reads FOLDER/examples.npy and facts.json and writes times.json.
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

if TYPE_CHECKING:  # numpy counts its processors when it is imported
    import numpy as np

    from ev3_distill.data.sources import Dataset
    from ev3_distill.teachers import Teacher

SECONDS = 10.0  # for passes on batches of one size
LONGEST = 180.0  # of the process


def teacher_times(
    run: Path, dataset: "Dataset", examples: "np.ndarray", *, sizes: Sequence[int], threads: int
) -> dict[int, "np.ndarray"] | str:
    """Times [n] of passes of a run's teacher on batches of some sizes, preprocessing among them; a string says why not.

    Args:
      run: a finished one.
      dataset: whose classes the teacher tells apart.
      examples: [N, ...] as the data have them, which come again and again.
      sizes: of batches.
      threads: processors that the teacher may compute with.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "examples.npy", examples)
        facts = {"num_classes": dataset.num_classes, "class_names": list(dataset.class_names), "sizes": list(sizes)}
        (folder / "facts.json").write_text(json.dumps(facts))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", "ev3_distill.export.teacher_latency", str(run), place, str(threads)]
        try:
            done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return f"it took more than {LONGEST:.0f} s"
        if not (folder / "times.json").exists():
            return f"its process ended with exit code {done.returncode}"
        told = json.loads((folder / "times.json").read_text())
    return told if isinstance(told, str) else {int(size): np.array(times) for size, times in told.items()}


def _timed(run: Path, folder: Path) -> dict[int, list[float]] | str:
    import numpy as np

    from ev3_distill.errors import InputError
    from ev3_distill.runtime.timing import PASSES, times_ms

    facts, examples = json.loads((folder / "facts.json").read_text()), np.load(folder / "examples.npy")
    try:
        teacher = _teacher_of(run, facts, examples.shape[1:])
        if isinstance(teacher, str):
            return teacher
        found = {}
        for size in facts["sizes"]:
            batch = examples[np.resize(np.arange(len(examples)), size)]
            passes = PASSES if size == 1 else PASSES // 3
            call = functools.partial(teacher.outputs, batch)
            found[size] = times_ms(call, passes=passes, warm_up=3, seconds=SECONDS).tolist()
        return found
    except InputError as error:
        return str(error)


def _teacher_of(run: Path, facts: dict[str, Any], input_shape: tuple[int, ...]) -> "Teacher | str":
    from ev3_distill import config, students
    from ev3_distill.teachers import load_teacher
    from ev3_distill.training.run_dir import read_json
    from ev3_distill.training.run_reader import config_of

    chosen = config_of(run, read_json(run / "report.json"))
    if not isinstance(chosen, config.Compress):
        return "there is none, the labels taught"
    if chosen.teacher.startswith("logits:"):
        return f"there is none to time, its logits were recorded ({chosen.teacher})"
    load = students.load
    if not chosen.teacher:
        load = functools.partial(load, factory=students.import_factory(chosen.teacher_network))
    return load_teacher(
        chosen.teacher or f"flax:{run / 'teacher'}",
        preprocessing=chosen.teacher_input,
        input_shape=input_shape,
        num_classes=facts["num_classes"],
        class_names=facts["class_names"],
        load_network=load,
    )


def main(run: str, place: str, threads: int) -> None:
    """Times a teacher."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    with contextlib.redirect_stdout(sys.stderr):
        content = json.dumps(_timed(Path(run), Path(place)))
    (Path(place) / "times.json").write_text(content)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
