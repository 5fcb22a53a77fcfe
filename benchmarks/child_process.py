"""Runs a command in a process of its own and measures its memory."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Starts the command from a small process: a fork of this one would count this one's pages.
_WRAPPER = (
    "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
    "print(json.dumps([done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))"
)


def peak_memory(
    command: Sequence[str], *, directory: Path, environment: Mapping[str, str] | None = None, quiet: bool = False
) -> int:
    """The peak resident set of a command, in bytes, with all its libraries.

    Args:
      command: the program and its arguments.
      directory: where it runs.
      environment: variables that are set for it, beside those of this process.
      quiet: whether its output is shown only if it fails.

    Raises:
      RuntimeError: the command fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", _WRAPPER, *command],
        cwd=directory,
        env={**os.environ, **(environment or {})},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
    )
    code, peak = json.loads(done.stdout)
    if code:
        shown = f":\n{done.stderr.decode(errors='replace')}" if quiet else ": see above"
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}{shown}")
    unit = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss
    return int(peak) * unit
