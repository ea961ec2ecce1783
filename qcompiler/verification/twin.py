"""The float network that a library was made from, fed with the library's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backend.artifact import Artifact
from qcompiler.base.errors import ArtifactError
from qcompiler.base.targets import load_targets, missing_features
from qcompiler.calibration.ports import library_inputs
from qcompiler.calibration.shaped import ShapedSamples
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.runtime.shapes import of_inputs, ports, specializations


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


def _manifests(like: Any, samples: Any) -> list[dict[str, Any]]:
    """Of the session `like` at each of its shapes, or at those that `samples` have."""
    manifests = specializations(like.manifest)
    return [manifests[i] for i in sorted(samples.shapes)] if isinstance(samples, ShapedSamples) else manifests


def _rows(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [of_inputs(m) | {name: port.model.shape for name, port in library_inputs(m).items()} for m in manifests]


def float_artifact(model: AnyModel, like: Any, here: bool, samples: Any = None) -> Artifact:
    """The float network of `float_session` before it is opened. here: it must run on this machine."""
    from qcompiler.pipeline.stages import compile_float

    model = origin_of(model, like.manifest.get("cut", ()))
    row, manifests = load_targets().get(like.manifest["target"]), _manifests(like, samples)
    target = row.name if row is not None and not row.gpu and not (here and missing_features(row)) else "native"
    wanted = [m.get("digests", {}).get("model") for m in manifests]
    return compile_float(model, target, _rows(manifests), input_values=like.manifest.get("fixed_inputs"), wanted=wanted)


def float_session(model: AnyModel, like: Any, folder: Path, threads: int = 1, samples: Any = None) -> Any:
    """A session of the float network `model`, compiled into `folder` for the target and input shapes of the session `like` (of several, those that `samples`
    have), whose inputs it takes; for this CPU, where that target is another machine's, a GPU's or of another targets file.

    Raises ArtifactError when `like` was compiled from another model: its manifest has the digest of its model, or its inputs or outputs are others.
    """
    from qcompiler.runtime.session import Session

    manifests = _manifests(like, samples)
    rows, artifact = _rows(manifests), float_artifact(model, like, True, samples)
    session = Session(artifact.save(folder / "float.so"), threads=threads)
    for mine, row, manifest in zip(specializations(session.manifest), rows, manifests, strict=True):
        outputs = [(o.name, o.shape) for o in ports(manifest["outputs"])]
        for kind, theirs in (("inputs", list(row.items())), ("outputs", outputs)):
            found = [(p.name, p.shape) for p in ports(mine[kind])]
            if found != theirs:
                raise ArtifactError(f"the library was not compiled from {origin_of(model).where}: its {kind} are {theirs}, the model's are {found}")
    return fed_alike(session, like)
