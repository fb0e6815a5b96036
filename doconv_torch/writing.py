"""Writing PyTorch's files: state dicts from NumPy arrays, and what a full disk looks like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

# What PyTorch's writer says, in RuntimeErrors, where the system has refused to take more bytes.
_REFUSED = re.compile(
    r"iostream error|inline_container|PytorchStreamWriter|write\(\): fd \d+ failed"
)


def write_state_dict(path: Path, arrays: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Write arrays as a state dict that `torch.load(path, weights_only=True)` reads.

    dtypes: PyTorch's names of the types in which they are stored; of bfloat16, which NumPy lacks,
    the array is float32. Raises OSError where the file cannot be written whole.
    """
    tensors = {
        name: torch.from_numpy(np.array(array)).to(getattr(torch, dtypes[name]))
        for name, array in arrays.items()
    }
    save(tensors, path)


def save(content: Any, path: Path, **options: Any) -> None:
    """Write as `torch.save` does, which has the options; OSError where the disk takes no more."""
    try:
        torch.save(content, path, **options)
    except RuntimeError as error:
        if not _REFUSED.search(str(error)):
            raise
        raise OSError("the disk takes no more bytes") from error
