"""Value ids: the names of the source's tensors, and those of what the compiler puts beside them.

A value that the source has is called as there. One that it doesn't have is `<id>~<what>`, made from or for the value `<id>`: `x~padded`, `x~nhwc~1`. The mark
between them is the shortest run of `~` that no name of the source has in it, so that no name there reads as one of these; a module says which it is.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ATTRIBUTE = "qc.mark"
_PLAIN = "~"


@dataclass(frozen=True)
class Naming:
    """How the ids of one network are made and read.

    >>> plain, careful = Naming.beside(["x", "y"]), Naming.beside(["x", "x~padded"])
    >>> plain.made("x", "padded"), careful.made("x", "padded")
    ('x~padded', 'x~~padded')
    >>> plain.split("x~nhwc~1"), careful.split("x~padded"), careful.split("x~padded~~q")
    (('x~nhwc', '1'), ('x~padded', ''), ('x~padded', 'q'))
    """

    mark: str = _PLAIN

    @staticmethod
    def beside(names: Iterable[str]) -> Naming:
        """For a source with these names."""
        return Naming("~" * (1 + max((len(run) for name in names for run in re.findall("~+", name)), default=0)))

    @staticmethod
    def of(attrs: Mapping[str, Any]) -> Naming:
        """Of a module with these attributes."""
        return Naming(str(attrs.get(ATTRIBUTE, _PLAIN)))

    def attributes(self) -> dict[str, Any]:
        """What a module has to say; nothing for the usual mark."""
        return {} if self.mark == _PLAIN else {ATTRIBUTE: self.mark}

    def made(self, id: str, what: str | int) -> str:
        """The id of `what` (without "~") beside the value `id`."""
        return f"{id}{self.mark}{what}"

    def split(self, id: str) -> tuple[str, str]:
        """(the value beside which `id` was made, what it is); (id, "") for an id of the source."""
        source, mark, what = id.rpartition(self.mark)
        return (source, what) if mark else (id, "")

    def nearest(self, id: str, known: Container[str]) -> str:
        """`id`, or the nearest of those that it was made beside, one after the other, that is `known`; an id of the source where none is."""
        while id not in known and (source := self.split(id)[0]) != id:
            id = source
        return id
