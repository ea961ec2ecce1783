"""What a pattern answers when something looks like it and isn't."""

from __future__ import annotations

from dataclasses import dataclass

NEAR_MISSES = "qc.near_misses"


@dataclass(frozen=True)
class Miss:
    """at: value id of the operator that stays as it is. reason: why, as a sentence without full stop."""

    at: str
    reason: str
