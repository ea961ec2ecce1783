"""The float network that a library was made from, fed with the library's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backend.artifact import Artifact
from qcompiler.base.errors import ArtifactError
from qcompiler.base.targets import load_targets, missing_features
from qcompiler.calibration.padding import ALL, Counted, Padding
from qcompiler.calibration.ports import library_inputs
from qcompiler.calibration.shaped import ShapedSamples
from qcompiler.importers.model import FloatModel
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.runtime.shapes import of_inputs, ports, specializations


class Twin:
    """A session of a float network that takes what `library` takes: pixels and integers become the float32 numbers that they stand for. All else is the
    session's. padding: the positions that the network's masks can hide."""

    def __init__(self, network: Any, library: Any, padding: Padding | None = None) -> None:
        self.network, self.inputs, self._ports = network, library.inputs, library_inputs(library.manifest)
        self._library, self._padding = library, padding

    def another(self) -> Twin:
        """The same, for another thread: a session of its own."""
        from qcompiler.runtime.session import Session

        return Twin(Session(self.network.path, threads=self.network.threads), self._library, self._padding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def real(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A library's inputs as the float network takes them."""
        return {name: self._ports[name].real(array) if name in self._ports else array for name, array in inputs.items()}

    def counted(self, inputs: Mapping[str, np.ndarray]) -> Counted:
        """What counts of a sample. Raises DataError where nothing does."""
        return self._padding.of(self.network, self.real(inputs)) if self._padding else ALL

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = self.network.run(self.real(inputs))
        return found

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = self.network.trace(self.real(inputs), visit)
        return found

    def profile(self, inputs: Mapping[str, np.ndarray], iterations: int = 50) -> list[tuple[str, str, str, float]]:
        found: list[tuple[str, str, str, float]] = self.network.profile(self.real(inputs), iterations)
        return found


def counted(reference: Any, inputs: Mapping[str, np.ndarray]) -> Counted:
    """What counts of a sample; all of it where `reference` does not know its network's masks."""
    return reference.counted(inputs) if isinstance(reference, Twin) else ALL


def fed_alike(network: Any, library: Any) -> Any:
    """The session `network`, or a `Twin` of it where `library` takes other inputs."""
    return Twin(network, library) if library_inputs(library.manifest) else network


def _manifests(like: Any, samples: Any) -> list[dict[str, Any]]:
    """Of the session `like` at each of its shapes, or at those that `samples` have."""
    manifests = specializations(like.manifest)
    return [manifests[i] for i in sorted(samples.shapes)] if isinstance(samples, ShapedSamples) else manifests


def _rows(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [of_inputs(m) | {name: port.model.shape for name, port in library_inputs(m).items()} for m in manifests]


def _models(model: AnyModel, like: Any, samples: Any) -> Sequence[FloatModel]:
    from qcompiler.pipeline.float_library import float_models

    manifests = _manifests(like, samples)
    wanted = [m.get("digests", {}).get("model") for m in manifests]
    return float_models(origin_of(model, like.manifest.get("cut", ())), _rows(manifests), like.manifest.get("fixed_inputs"), wanted)


def _artifact(models: Sequence[FloatModel], like: Any, here: bool) -> Artifact:
    from qcompiler.pipeline.float_library import float_library

    row = load_targets().get(like.manifest["target"])
    return float_library(models, row.name if row is not None and not row.gpu and not (here and missing_features(row)) else "native")


def float_artifact(model: AnyModel, like: Any) -> Artifact:
    """The float network of `float_session` as a library, which may be for another machine."""
    return _artifact(_models(model, like, None), like, here=False)


def float_session(model: AnyModel, like: Any, folder: Path, threads: int = 1, samples: Any = None) -> Twin:
    """A session of the float network `model`, compiled into `folder` for the target and input shapes of the session `like` (of several, those that `samples`
    have), whose inputs it takes; for this CPU, where that target is another machine's, a GPU's or of another targets file.

    Raises ArtifactError when `like` was compiled from another model: its manifest has the digest of its model, or its inputs or outputs are others.
    """
    from qcompiler.runtime.session import Session

    manifests = _manifests(like, samples)
    rows, models = _rows(manifests), _models(model, like, samples)
    session = Session(_artifact(models, like, here=True).save(folder / "float.so"), threads=threads)
    for mine, row, manifest in zip(specializations(session.manifest), rows, manifests, strict=True):
        outputs = [(o.name, o.shape) for o in ports(manifest["outputs"])]
        for kind, theirs in (("inputs", list(row.items())), ("outputs", outputs)):
            found = [(p.name, p.shape) for p in ports(mine[kind])]
            if found != theirs:
                raise ArtifactError(f"the library was not compiled from {origin_of(model).where}: its {kind} are {theirs}, the model's are {found}")
    return Twin(session, like, Padding(*(m.module for m in models)))
