"""Runs every ```sh and ```python block of README.md in order, and the steps of a ```yaml workflow, in a copy of the repository.

Standard library only.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(copy: Path) -> None:
    """Copies what git tracks, runs the blocks there, and stops at the first that fails."""
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    blocks = re.findall(r"^```(sh|python|yaml)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    if len(blocks) < 5:
        sys.exit("README.md shows fewer blocks than it is known to: its fences have changed")
    environment = {"EV3_DISTILL_DATA": str(ROOT.parent / "shared" / "data"), **os.environ}
    for language, shown in blocks:
        block = "\n".join(re.findall(r"^ *- run: (.*)$", shown, re.MULTILINE)) if language == "yaml" else shown
        print(f"--- README.md ({language})\n{block}---", flush=True)
        command = [sys.executable, "-c", block] if language == "python" else ["bash", "-euo", "pipefail", "-c", block]
        began = time.monotonic()
        subprocess.run(command, cwd=copy, env=environment, check=True)
        print(f"--- {time.monotonic() - began:.0f} s\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
