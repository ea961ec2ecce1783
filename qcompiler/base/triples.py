"""Triples as compilers spell them, brought to the form of targets.yaml: architecture-linux-environment."""

from __future__ import annotations

from qcompiler.base.errors import TargetError

_ARCHITECTURES = {
    **dict.fromkeys(("x86_64", "x86-64", "amd64", "x64"), "x86_64-linux-gnu"),
    **dict.fromkeys(("aarch64", "arm64", "armv8", "armv8a"), "aarch64-linux-gnu"),
    **dict.fromkeys(("armv7a", "armv7", "armv7l", "armhf", "arm"), "armv7a-linux-gnueabihf"),
}
_ENVIRONMENTS = {"", "gnu", "gnueabihf"}


def plain_triple(text: str) -> str | None:
    """`x86_64-pc-linux-gnu`, `aarch64-unknown-linux-gnu`, `arm64` or `amd64` as the triple of targets.yaml; None for what begins with no architecture.

    Raises TargetError for a triple of another system than Linux with the GNU C library.
    """
    for name in sorted(_ARCHITECTURES, key=len, reverse=True):
        if text == name or text.startswith(f"{name}-"):
            break
    else:
        return None
    rest = text[len(name) + 1 :].split("-") if text != name else ["linux"]
    if "linux" not in rest or (rest[-1] if rest[-1] != "linux" else "") not in _ENVIRONMENTS:
        raise TargetError(f"target '{text}': libraries are made for Linux with the GNU C library; the triple of this architecture is {_ARCHITECTURES[name]}")
    return _ARCHITECTURES[name]
