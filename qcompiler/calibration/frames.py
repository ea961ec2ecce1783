"""Frames of a stream as samples: data without the states of a network gets those that its float network has at each frame (of a library that is measured
alone, those that the library has), from the first frame on.

A file, a list or a loader is one stream, in order; each `.npz` of a folder is a stream of its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qcompiler.base.tensor import TensorInfo, first_states
from qcompiler.calibration.arrays import read_headers
from qcompiler.calibration.batches import is_batches
from qcompiler.calibration.data import Preprocessing, Sample, Samples, at_most
from qcompiler.calibration.ports import open_given
from qcompiler.calibration.stored import stored

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def without_states(inputs: Sequence[TensorInfo], state: Mapping[str, str]) -> list[TensorInfo]:
    """The inputs that frames are."""
    return [i for i in inputs if i.name not in state]


def is_frames(source: Any, inputs: Sequence[TensorInfo], state: Mapping[str, str]) -> bool:
    """Does this data hold none of the states (`state`: input -> output)? False for a network without, and for what can't be told, which is checked later."""
    if not state or stored(source):
        return False
    if isinstance(source, (str, os.PathLike)):
        path = Path(streams_of(source)[0])
        if path.is_dir() or path.suffix == ".npy":
            return True  # images, or one input
        return path.is_file() and path.suffix == ".npz" and not set(read_headers(path)) & set(state)
    first = source if isinstance(source, Mapping) else next(iter(source), None) if isinstance(source, Sequence) else None
    if isinstance(first, Mapping):
        return not set(first) & set(state)
    several = len(first) if isinstance(first, (list, tuple)) else 1
    return is_batches(source) and several < len(inputs)


def streams_of(source: Any) -> list[Any]:
    """The files of a folder that are a stream each; else the source itself."""
    files = sorted(Path(source).glob("*.npz")) if isinstance(source, (str, os.PathLike)) and Path(source).is_dir() else []
    return files or [source]


def open_streamed(source: Any, library: Any, preprocess: Preprocessing, count: int | None, start: Callable[[], Run]) -> Samples:
    """`open_given`; of data without the states of `library`, frames with those that a network has (start: makes what runs it)."""
    state, inputs = library.manifest.get("state", {}), library.inputs
    held = list(source) if isinstance(source, Iterator) else source
    if not is_frames(held, inputs, state):
        return open_given(held, library, preprocess, count)
    fed = SimpleNamespace(manifest=library.manifest, inputs=without_states(inputs, state))
    first = first_states(inputs, state, library.manifest.get("initial", {}))
    return at_most(StreamedSamples([open_given(one, fed, preprocess, count) for one in streams_of(held)], first, state, start), count)


def open_kept(source: Any, library: Any, preprocess: Preprocessing, count: int | None = None) -> Samples:
    """`open_given`; of data without the states of `library` (a session), frames with those that the library itself has there."""
    return open_streamed(source, library, preprocess, count, lambda: library.run)


class StreamedSamples:
    """Samples of one stream or several, with the states that a network has. first: the states before the first frame of each. start: makes what runs
    it, once the first sample is wanted."""

    def __init__(self, streams: Sequence[Samples], first: Mapping[str, np.ndarray], state: Mapping[str, str], start: Callable[[], Run]) -> None:
        self._streams, self._first, self._state, self._start = streams, dict(first), state, start
        self.left_out = sum(getattr(s, "left_out", 0) for s in streams)
        self.unit = getattr(streams[0], "unit", "images")

    @property
    def names(self) -> Sequence[str]:
        return [name for stream in self._streams for name in stream.names]

    @property
    def count(self) -> int | None:
        counts = [stream.count for stream in self._streams]
        return None if None in counts else sum(c for c in counts if c is not None)

    @functools.cached_property
    def _states(self) -> list[dict[str, np.ndarray]]:
        """Before each frame."""
        run, found = self._start(), []
        for stream in self._streams:
            states = self._first
            for frame in stream:
                found.append(states)
                results = run({**frame, **states})
                states = {name: results[output] for name, output in self._state.items()}
        return found

    def __iter__(self) -> Iterator[Sample]:
        frames = (frame for stream in self._streams for frame in stream)
        return ({**frame, **states} for frame, states in zip(frames, self._states, strict=False))
