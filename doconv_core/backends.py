"""Backends: which are registered, whether their framework is here, and what to do if it is not."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.version import Version

GROUP = "doconv.backends"


def available_backends() -> dict[str, metadata.EntryPoint]:
    """Return the registered backends by name, without importing any of them.

    A backend is a package that names itself in the entry-point group `doconv.backends`; `.load()`
    on its entry point imports it, or raises ImportError where its framework is missing.

    >>> "torch" in available_backends()
    True
    """
    return {entry.name: entry for entry in sorted(metadata.entry_points(group=GROUP))}


def require_framework(extra: str, module: str, distribution: str = "overconv") -> None:
    """Raise ImportError unless `module` is installed in a version that the backend supports.

    extra: the extra of `distribution` that installs it; the backend's package is `doconv_<extra>`.
    The message says what is installed, what is supported, and which command installs it. The
    supported versions are those of the distribution's metadata, so they stand in one place.

    >>> require_framework("array", "numpy")
    >>> require_framework("torch", "tensor_library_that_is_not_here")
    Traceback (most recent call last):
        ...
    ImportError: doconv_torch needs tensor_library_that_is_not_here, which is not installed. ...
    """
    requirement = _requirement(extra, module, distribution)
    marker = None if requirement is None else requirement.marker
    needed = module if requirement is None else f"{requirement.name}{requirement.specifier}"
    advice = f'Install it with: python -m pip install "{distribution}[{extra}]"'
    if marker is not None and not marker.evaluate({"extra": extra}):
        supported = str(marker).split(" and extra ==")[0]
        found = ".".join(map(str, sys.version_info[:3]))
        raise ImportError(
            f"doconv_{extra} needs {needed}, which is supported where {supported}; this is Python "
            f"{found}. Use an older Python for this backend."
        )
    if find_spec(module) is None:
        raise ImportError(f"doconv_{extra} needs {needed}, which is not installed. {advice}")
    version = _version(module)
    if requirement is None or version is None:
        return
    # A vendor's build of a release may call itself a pre-release of it, so 2.6.0a0 counts as 2.6.0.
    names = Version(version).public, Version(version).base_version
    if not any(requirement.specifier.contains(name, prereleases=True) for name in names):
        raise ImportError(
            f"doconv_{extra} supports {module} {requirement.specifier}; found {version}. {advice}"
        )


def _requirement(extra: str, module: str, distribution: str) -> Requirement | None:
    """Return what the package metadata asks of `module` for `extra`; None where it is not there."""
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # used from a checkout, without being installed
        return None
    for requirement in map(Requirement, lines):
        asked_by = re.search(r"""extra == ["']([\w-]+)["']""", str(requirement.marker))
        if requirement.name == module and asked_by and asked_by.group(1) == extra:
            return requirement
    return None


def _version(module: str) -> str | None:
    """Return the version of the distribution that `module` comes from, whatever its name."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:  # such as mxnet-cu112
        names = metadata.packages_distributions().get(module)
        return metadata.version(names[0]) if names else None
