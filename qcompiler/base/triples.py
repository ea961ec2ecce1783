"""Triples as compilers spell them, brought to the form of targets.yaml: architecture-linux-environment."""

from __future__ import annotations

import re

from qcompiler.base.errors import TargetError

_ARCHITECTURES = {
    **dict.fromkeys(("x86_64", "x86-64", "amd64", "x64"), "x86_64-linux-gnu"),
    **dict.fromkeys(("aarch64", "arm64", "armv8", "armv8a"), "aarch64-linux-gnu"),
    **dict.fromkeys(("armv7a", "armv7", "armv7l", "armhf", "arm"), "armv7a-linux-gnueabihf"),
}
_ENVIRONMENTS = {"", "gnu", "gnueabihf"}
_ANDROID = {"aarch64-linux-gnu": "aarch64-linux-android", "armv7a-linux-gnueabihf": "armv7a-linux-androideabi"}
_ABIS = {"arm64-v8a": "aarch64-linux-android", "armeabi-v7a": "armv7a-linux-androideabi"}  # as Android's tools name architectures


def plain_triple(text: str) -> str | None:
    """`x86_64-pc-linux-gnu`, `aarch64-unknown-linux-gnu`, `arm64`, `amd64`, `aarch64-linux-android24` or `arm64-v8a` as the triple of targets.yaml; None for
    what begins with no architecture.

    Raises TargetError for a triple of another system than Linux with the GNU C library, and Android on Arm.
    """
    if text in _ABIS:
        return _ABIS[text]
    for name in sorted(_ARCHITECTURES, key=len, reverse=True):
        if text == name or text.startswith(f"{name}-"):
            break
    else:
        return None
    plain, rest = _ARCHITECTURES[name], text[len(name) + 1 :].split("-") if text != name else ["linux"]
    if "linux" in rest and re.fullmatch(r"android(eabi)?\d*", rest[-1]) and plain in _ANDROID:
        return _ANDROID[plain]
    if "linux" not in rest or (rest[-1] if rest[-1] != "linux" else "") not in _ENVIRONMENTS:
        raise TargetError(
            f"target '{text}': libraries are made for Linux with the GNU C library, and for Android on Arm; the triple of this architecture is {plain}"
        )
    return plain
