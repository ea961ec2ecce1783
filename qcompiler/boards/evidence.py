"""What a report about a library on a board says of times: both networks on the board, by its own clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import Progress
from qcompiler.boards.session import BoardSession, take_turns
from qcompiler.importers.origin import AnyModel
from qcompiler.runtime.session import bound
from qcompiler.verification.evidence import ITERATIONS, Measured, Measurer
from qcompiler.verification.twin import float_artifact


def measured_there(model: AnyModel) -> Measurer:
    """What times the float network `model` and a library on the library's board."""

    def measure(session: BoardSession, twin: Any, sample: Mapping[str, np.ndarray], seconds: float, progress: Progress) -> Measured:
        shape = bound(session.fitting, session.whole_inputs, sample)[1]
        with temporary_folder() as folder:
            library = float_artifact(model, session).save(folder / "float.so")
            both = {"int8": session.specializations[shape], "float": BoardSession(session.device, library, session.threads).specializations[shape]}
            totals = take_turns(both, seconds)
            steps = {name: at.profile(ITERATIONS) for name, at in both.items()}
        board = session.device.board
        where = (
            f"board {board.name}: {board.target.name}{f', {board.core}' if board.core else ''}, {'emulated' if board.way == 'emulator' else 'by its own clock'}"
        )
        return Measured(totals, steps["int8"], steps["float"], {}, None, where)

    return measure
