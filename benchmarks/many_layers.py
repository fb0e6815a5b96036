"""Print the seconds that the command takes for files of many small layers, which should be linear.

    python benchmarks/many_layers.py [--layers 1000 2000 4000] [--formats safetensors pt …]

For each format and number of layers, a file is written of as many 3×3 DO-Conv layers of two
channels, and as many linear ones, and each subcommand runs on it in this process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from click.testing import CliRunner

from doconv_core.cli import doconv
from doconv_core.files.checkpoint import formats
from doconv_core.files.entries import Entry

FORMATS = ("safetensors", "sharded", "pytorch", "gluon")
COMMANDS = (
    ("inspect", "{file}"),
    ("fold", "{file}", "{folder}/folded{suffix}", "--kernel-size", "3x3"),
    ("verify", "{file}", "{file}", "--kernel-size", "3x3"),
    ("verify", "{file}", "{folder}/folded{suffix}"),
    ("convert", "{file}", "{folder}/converted.params", "--kernel-size", "3x3"),
    ("cost", "{file}", "--kernel-size", "3x3"),
)


def arrays_of(layers: int) -> dict[str, np.ndarray]:
    """Return the arrays of so many layers of each kind, by PyTorch's names."""
    rng, arrays = np.random.default_rng(0), {}
    for n in range(layers):
        # S above M, so that the file does not tell the kernel size.
        arrays[f"conv{n}.weight"] = rng.normal(size=(2, 2, 10)).astype("float32")
        arrays[f"conv{n}.depthwise_weight"] = rng.normal(size=(2, 9, 10)).astype("float32")
        arrays[f"fc{n}.weight"] = rng.normal(size=(2, 2)).astype("float32")
    return arrays


def main() -> None:
    """Write the files, run the subcommands, and print how long each took."""
    known = formats()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    options = parser.parse_args()
    for name in options.formats:
        for layers in options.layers:
            with TemporaryDirectory() as folder:
                form, arrays = known[name], arrays_of(layers)
                file = Path(folder, f"model{form.SUFFIXES[0]}")
                entries = [Entry(n, a.shape, str(a.dtype)) for n, a in arrays.items()]
                form.write(file, entries, arrays)
                told = [f"{name:12} {layers:6} layers"]
                for words in COMMANDS:
                    values = {"file": file, "folder": folder, "suffix": form.SUFFIXES[0]}
                    arguments = [word.format(**values) for word in words]
                    begin = time.perf_counter()
                    done = CliRunner().invoke(doconv, arguments, catch_exceptions=False)
                    seconds = time.perf_counter() - begin
                    # Composed kernels may differ by rounding, which is 1 and no failure.
                    failed = "" if done.exit_code in (0, 1) else f" (exit {done.exit_code})"
                    told.append(f"{words[0]} {seconds:.1f} s{failed}")
                print(", ".join(told), flush=True)


if __name__ == "__main__":
    main()
