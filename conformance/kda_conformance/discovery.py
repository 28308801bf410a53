"""Find an implementation by what the user typed after ``--impl``.

Three forms: the name of an installed entry point of the group ``kda.implementations``, ``package.module:callable``, or
``path/to/file.py:callable``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kda_conformance.claims import UsageError
from kda_conformance.implementation import FunctionImplementation, Implementation

if TYPE_CHECKING:
    from types import ModuleType

GROUP = "kda.implementations"


def installed_names() -> list[str]:
    """Return the names that entry points register, in order."""
    return sorted(point.name for point in entry_points(group=GROUP))


def find_implementation(spec: str) -> Implementation:
    """Load the implementation named by ``spec``.

    Raises
    ------
    UsageError
        If nothing of that name is installed, the module or file cannot be imported, or what is found is neither a
        callable nor an implementation; the message lists what is installed.
    """
    if ":" not in spec:
        points = [point for point in entry_points(group=GROUP) if point.name == spec]
        if not points:
            message = f"--impl must name an implementation, got {spec!r}; installed: {installed_names()}, or give module:callable"
            raise UsageError(message)
        try:
            found = points[0].load()
        except ImportError as error:
            message = f"--impl {spec} must be importable, got {error}; install what it needs"
            raise UsageError(message) from error
        distribution = points[0].dist
        return _as_implementation(found, spec, distribution.version if distribution else "unknown")
    place, _, attribute = spec.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        message = f"--impl {spec} must name a callable of {place}, got no attribute {attribute!r}; check the spelling"
        raise UsageError(message) from error
    return _as_implementation(found, spec, _version_of(module))


def _as_implementation(found: Any, name: str, release: str) -> Implementation:  # noqa: ANN401 - whatever the user named
    if isinstance(found, type):
        found = found()
    if hasattr(found, "forward") and hasattr(found, "claims"):
        if not isinstance(found, Implementation):
            lacking = [
                member for member in ("name", "version", "claims", "forward", "vjp") if not hasattr(found, member)
            ]
            message = f"--impl {name} must follow kda_conformance.implementation.Implementation, got an object that lacks {lacking}"
            raise UsageError(message)
        return found
    if not callable(found):
        message = f"--impl {name} must be callable, got {type(found).__name__}; name a function with the signature of chunk_kda"
        raise UsageError(message)
    return FunctionImplementation(found, name, release)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        message = f"--impl must name an existing file, got {path}; check the path"
        raise UsageError(message)
    name = f"kda_implementation_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        message = f"--impl must name a Python file, got {path}; check the path"
        raise UsageError(message)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    # A file may import its neighbours, as it could when run as a script.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        message = f"--impl {path} must be importable, got {type(error).__name__}: {error}; fix the file"
        raise UsageError(message) from error
    finally:
        sys.path.pop(0)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"--impl must name an importable module, got {name!r}: {error}; install it or check the spelling"
        raise UsageError(message) from error


def _version_of(module: ModuleType) -> str:
    package = module.__name__.partition(".")[0]
    try:
        return version(package.replace("_", "-"))
    except ModuleNotFoundError:
        return str(getattr(module, "__version__", "unknown"))
