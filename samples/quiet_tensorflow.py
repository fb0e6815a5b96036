"""Imports `doconv_tf` and TensorFlow without the remarks of TensorFlow's C++; errors still appear.

It remarks on the processor and on GPUs that are not there, whatever its log level, before that is
read, and once more where it looks for devices, which is done here, too: not in a progress bar.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Both are read on import. 2 keeps later remarks off the terminal, and lets errors through.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever Keras' own settings say

# Information and warnings, a line that goes on from one, and the "error" that there is no GPU.
REMARK = re.compile(
    r"[IW]\d{4} |WARNING: All log messages before absl::InitializeLog|"
    r"To enable the following instructions: |E\d{4} .*failed call to cuInit"
)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Hold back what C++ writes to standard error, and write it at the end but for remarks."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            os.write(2, "".join(line for line in lines if not REMARK.match(line)).encode())


with without_remarks():
    import doconv_tf  # noqa: F401  first, as it says what to install if Keras lacks

    # isort: split
    import tensorflow

    tensorflow.config.list_logical_devices()
