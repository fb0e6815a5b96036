"""What pyproject.toml cannot say: what is compiled, and the index's text.

The compiled forms, of the composition and of skipped channels, are optional. Where they cannot be
compiled, the package is installed without them, and PyTorch's own operations compute the same.
"""

import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# The limited API, of the oldest Python that is supported, serves all later ones. A Python without
# the global lock does not have it.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class Compiled(build_ext):
    """Compiles the extensions; where one cannot be, the distribution is one without both."""

    def run(self):
        """Compile both at once, as each takes half a minute, and see what came of it."""
        self.parallel = True
        super().run()
        if not all(Path(path).exists() for path in self.get_outputs()):
            self.distribution.ext_modules = self.extensions = []


class Wheel(bdist_wheel):
    """A wheel for one platform where something was compiled, else for every platform."""

    def run(self):
        """Build first, and name the wheel by what came of it."""
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


FILE = r"\((?!https?:|#)([^)#]+)[^)]*\)"  # where a link leads to that is not on an index page


def described():
    """Return README.md with text for each link to a file, and for each picture what it shows."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]" + FILE, r"\1", text)
    return re.sub(r"\[([^][]*)\]" + FILE, lambda m: m[1] + f" ({m[2]})" * (m[1] != m[2]), text)


setup(
    long_description=described(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": Compiled, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310" if LIMITED else False}},
    ext_modules=[
        Extension(
            f"doconv_torch.{name}",
            [f"doconv_torch/{name}.c"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")] if LIMITED else [],
            extra_compile_args=["-O3", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
            py_limited_api=LIMITED,
        )
        for name in ("_composition", "_skipping")
    ],
)
