"""The float twin of a network as a library, for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.backend.artifact import Artifact
from qcompiler.base.errors import ArtifactError
from qcompiler.base.progress import Progress, silent
from qcompiler.base.shape_table import shape_rows
from qcompiler.importers.model import FloatModel
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.pipeline.float_code import float_code
from qcompiler.pipeline.shapes import load_all


def compile_float(
    model: AnyModel,
    target: str = "native",
    input_shapes: Any = None,
    progress: Progress = silent,
    input_values: Mapping[str, Any] | None = None,
) -> Artifact:
    """The float twin as a library, for comparison. Arguments as `compile`."""
    return float_library(float_models(model, input_shapes, input_values), target, progress)


def float_models(
    model: AnyModel, input_shapes: Any = None, input_values: Mapping[str, Any] | None = None, wanted: Sequence[str | None] = ()
) -> Sequence[FloatModel]:
    """What `compile_float` makes a library of: the network at each shape. wanted: the digest of the model at each, ArtifactError when the file's are others."""
    origin = origin_of(model)
    models = load_all(origin, shape_rows(input_shapes), input_values=input_values)
    for expected, found in zip(wanted, models, strict=False):
        if expected not in (None, found.digest):
            raise ArtifactError(
                f"the library was not compiled from {origin.where}: its manifest says that its model has the digest {expected}, and this one has "
                f"{found.digest} (of all that is read, and the input shapes); give the very model that it was compiled from"
            )
    return models


def float_library(models: Sequence[FloatModel], target: str = "native", progress: Progress = silent) -> Artifact:
    """The float twin of a network at each of its shapes, as a library."""
    first, *others = models
    further = [{"digests": {"model": m.digest}} for m in others]
    return float_code(first, target, progress=progress, others=others).link(**first.account(), digests={"model": first.digest}, further=further)
