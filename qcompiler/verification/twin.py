"""The float network that a library was made from, fed with the library's own inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.base.targets import load_targets
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.ports import library_inputs


class Twin:
    """A session of a float network that takes what `library` takes: pixels and integers become the float32 numbers that they stand for. All else is the
    session's."""

    def __init__(self, network: Any, library: Any) -> None:
        self.network, self.inputs, self._ports = network, library.inputs, library_inputs(library.manifest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def real(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A library's inputs as the float network takes them."""
        return {name: self._ports[name].real(array) if name in self._ports else array for name, array in inputs.items()}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = self.network.run(self.real(inputs))
        return found

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = self.network.trace(self.real(inputs), visit)
        return found

    def profile(self, inputs: Mapping[str, np.ndarray], iterations: int = 50) -> list[tuple[str, str, str, float]]:
        found: list[tuple[str, str, str, float]] = self.network.profile(self.real(inputs), iterations)
        return found


def fed_alike(network: Any, library: Any) -> Any:
    """The session `network`, or a `Twin` of it where `library` takes other inputs."""
    return Twin(network, library) if library_inputs(library.manifest) else network


def float_session(model: str | os.PathLike[str], like: Any, folder: Path, threads: int = 1) -> Any:
    """A session of the float network `model`, compiled into `folder` for the target and input shapes of the session `like`, whose inputs it takes; for
    this CPU, where that target is a GPU's or of another targets file.

    Raises ArtifactError when `like` was compiled from another model: its manifest has the digest of its model, or its inputs or outputs are others.
    """
    from qcompiler.pipeline.stages import compile_float
    from qcompiler.runtime.session import Session

    ports = library_inputs(like.manifest)
    shapes = {i.name: tuple(ports[i.name].model.shape if i.name in ports else i.shape) for i in like.inputs}
    own = like.manifest["target"]
    target = own if own in load_targets() and not like.manifest["triple"].startswith("nvptx64") else "native"
    fixed, wanted = like.manifest.get("fixed_inputs"), like.manifest.get("digests", {}).get("model")
    artifact = compile_float(model, target, shapes, input_values=fixed, wanted=wanted)
    session = Session(artifact.save(folder / "float.so"), threads=threads)
    outputs: Sequence[TensorInfo] = like.outputs
    for kind, theirs in (("inputs", list(shapes.items())), ("outputs", [(o.name, tuple(o.shape)) for o in outputs])):
        mine = [(i.name, tuple(i.shape)) for i in getattr(session, kind)]
        if mine != theirs:
            raise ArtifactError(f"the library was not compiled from {model}: its {kind} are {theirs}, the model's are {mine}")
    return fed_alike(session, like)
