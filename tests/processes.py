"""What tests need to start processes of their own: the repository's root, quick compilation and a free port."""

import socket
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The flags of conftest.py without the one that turns MLIR fusion off: without that fusion, two processes that share one core
# deadlock. XLA aborts on an unknown flag.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILE += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
