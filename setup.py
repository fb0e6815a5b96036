"""What pyproject.toml cannot say: the compiled form of the composition, which is optional.

Where it cannot be compiled, the package is installed without it, and PyTorch's own matrix products
compute the same.
"""

import sys

from setuptools import Extension, setup

OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

setup(
    ext_modules=[
        Extension(
            "doconv_torch._composition",
            ["doconv_torch/_composition.c"],
            extra_compile_args=["-O3", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        )
    ]
)
