"""Names of a package that are loaded when they are first used, so that the library runs without what they need."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def lazy(package: str, name: str, places: Mapping[str, Sequence[str]], needs: Mapping[str, str]) -> Any:
    """What a package's ``__getattr__`` returns for a name.

    Parameters
    ----------
    package, name : str
    places : mapping
        The names of each module of the package; a name that is the module's own is the module.
    needs : mapping
        The distribution that a module needs beside bpkit's own, where it does.

    Raises
    ------
    AttributeError
        If no module has the name.
    ModuleNotFoundError
        If what the module needs is not installed; it says how to get it.
    """
    module = next((module for module, names in places.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        found = importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != needs.get(module):
            raise
        raise ModuleNotFoundError(f'{package.replace("bpkit", "bp")}.{name} needs {needs[module]}: '
                                  'pip install "bpkit[course]"', name=error.name) from error  # fmt: skip
    return found if module == name else getattr(found, name)
