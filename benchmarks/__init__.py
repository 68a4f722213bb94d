"""Speed and memory, measured beside the PyTorch peers in one run. Needs the `test` extra: pip install -e '.[test]'."""

import os

# Several processes share one accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
