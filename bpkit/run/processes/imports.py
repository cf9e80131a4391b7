"""Whether the workers run the text of a module that the caller runs: what travels by name, they import themselves."""

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from types import CodeType, FunctionType, ModuleType

Version = tuple[str, int, int]  # a file, when it was changed, and its size
_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})


def version(file: str) -> Version:
    """What tells the present text of a file from another."""
    with contextlib.suppress(OSError):
        state = os.stat(file)
        return file, state.st_mtime_ns, state.st_size
    return file, 0, 0


class Imports:
    """In a worker: what it has imported since it started, other than what is installed and what is bpkit's."""

    def __init__(self) -> None:
        self._seen = set(sys.modules)

    def new(self) -> dict[str, Version]:
        """The modules since the last look, by name."""
        if len(sys.modules) == len(self._seen):
            return {}
        names, self._seen = sys.modules.keys() - self._seen, set(sys.modules)
        files = {name: getattr(sys.modules[name], "__file__", None) or "" for name in names}
        return {name: version(file) for name, file in files.items()
                if file.endswith(".py") and not file.startswith(_INSTALLED) and name.partition(".")[0] != "bpkit"}


def outdated(imported: Mapping[str, Version]) -> bool:
    """In the caller: whether workers that imported these have one as it was, and this program as its file is now."""
    return any(version(file) not in ((file, *state), (file, 0, 0)) and agrees(name)
               for name, (file, *state) in imported.items())  # fmt: skip


def agrees(name: str) -> bool:
    """Whether this program runs a module, if at all, as its file is now, and not as it was before it was edited."""
    module = sys.modules.get(name)
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    if module is None or type(loader) is not SourceFileLoader:
        return True
    try:
        code = loader.get_code(name)
    except (OSError, SyntaxError) as error:  # a file that has gone says nothing, one in the middle of an edit does
        return isinstance(error, OSError)
    return code is None or {function.__code__ for function in _functions(module, code.co_names)} <= set(_within(code))


def _functions(module: ModuleType, names: tuple[str, ...]) -> Iterator[FunctionType]:
    """The functions and methods of a module under these names, as far as they are from its file."""
    own = [vars(module).get(name) for name in names]
    methods = [member for item in own if isinstance(item, type) and item.__module__ == module.__name__
               for member in vars(item).values()]  # fmt: skip
    for item in [*own, *methods]:
        function = getattr(item, "__func__", getattr(item, "fget", item))
        if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
            yield function


def _within(code: CodeType) -> Iterator[CodeType]:
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield item
            yield from _within(item)
