"""Print how long the samples and the comparison take with their defaults, beside what they may.

Run: python benchmarks/run_times.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES = Path(__file__).parents[1] / "samples"
LIMITS = {  # seconds on two CPU cores
    "sample_pt.py": 180,
    "sample_tf.py": 180,
    "sample_gluoncv.py": 180,
    "compare.py": 240,
}


def main() -> None:
    """Run each script once and print a line for it; fails where a script does."""
    print(f"{'script':20} {'seconds':>8} {'allowed':>8}")
    for script, limit in LIMITS.items():
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(SAMPLES / script), "--out", out]
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds = time.perf_counter() - begin
        print(f"{script:20} {seconds:8.0f} {limit:8d}", flush=True)


if __name__ == "__main__":
    main()
