"""What is known of a network's values, as node data of Model Explorer (a JSON file that its viewer lays over the graph of the same model file)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qcompiler.base.files import check_writable, replacing
from qcompiler.cli.arguments import read_files

EXACT = 100.0  # dB: what a value without any error counts as
COLOURS = ("#b3261e", "#f6c26b", "#f4f6f8")  # from what loses most to what loses least


def add_node_data(p: argparse.ArgumentParser, what: str) -> None:
    """The option --node-data. what: is shown of each value."""
    p.add_argument("--node-data", metavar="FILE.json", help=f"write {what} as node data for Model Explorer, which shows it on the graph of MODEL")


def node_data_path(options: argparse.Namespace) -> Path | None:
    """The file that was asked for. Raises OutputError, before any work, where it can't be written."""
    return None if options.node_data is None else check_writable(options.node_data, read_files(options))


def node_data(values: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Of (tensor of the model file, dB). A node is found by the name of any of its outputs; what is no number is left out."""
    known = {name: {"value": round(min(db, EXACT), 2)} for name, db in values if not math.isnan(db) and db > -math.inf}
    gradient = [{"stop": i / (len(COLOURS) - 1), "bgColor": colour} for i, colour in enumerate(COLOURS)]
    return {"results": known, "gradient": gradient}


def write_node_data(path: Path | None, values: Iterable[tuple[str, float]] | Mapping[str, float]) -> None:
    """Write it; nothing for no path."""
    if path is not None:
        pairs = values.items() if isinstance(values, Mapping) else values
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(node_data(pairs), indent=1))
