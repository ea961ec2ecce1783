"""TVM without PyTorch: it imports PyTorch wherever that is installed, which takes longer than all the rest of TVM, and nothing here needs the two together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGES = {"tvm_ffi", "tvm"}


class _Finder(MetaPathFinder):
    """Hides `torch` from a thread while it imports TVM, and from no other."""

    def __init__(self) -> None:
        self._importing: list[int] = []  # threads, once for each package

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        thread = threading.get_ident()
        if fullname == "torch" and thread in self._importing:
            raise ModuleNotFoundError("TVM is imported without PyTorch", name=fullname)
        if fullname not in _PACKAGES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def alone(module: ModuleType) -> None:
                self._importing.append(thread)
                try:
                    execute(module)
                finally:
                    self._importing.remove(thread)

            spec.loader.exec_module = alone  # type: ignore[method-assign]
        return spec


def import_tvm_alone() -> None:
    """From now on. What has imported PyTorch before keeps it."""
    sys.meta_path.insert(0, _Finder())
