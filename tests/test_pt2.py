"""`.pt2` files: read without unpickling or running anything that they say; damaged and hostile ones are refused in a sentence."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import require_module

from qcompiler.base.errors import ModelError
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from qcompiler.importers.pt2_file import read_program

Members = dict[str, bytes]
MODEL, WEIGHTS = "net/models/model.json", "net/data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def torch() -> Any:
    require_module("onnxscript")
    return require_module("torch")


@pytest.fixture(scope="module")
def members(torch: Any) -> Members:
    """A file with a symbolic batch, shared weights, a list and a dictionary among its results, and a part without gradients."""

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                y = self.norm(self.a(x))
            return {"y": y, "all": [self.b(y) * x.shape[0], x[:, ::2]]}

    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.randn(3, 6),), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=8)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    archive = zipfile.ZipFile(file)
    return {"net/" + i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}


def written(path: Path, members: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def changed(members: Members, name: str, change: Any) -> Members:
    held = json.loads(members[name])
    change(held)
    return members | {name: json.dumps(held).encode()}


def nodes(graph: Any) -> Any:
    return graph["graph_module"]["graph"]["nodes"]


def test_a_file(torch: Any, members: Members, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "net.pt2", members)
    model = load(path, {"x": (4, 6)})
    assert "b" in model.sources and model.name == "net"
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    found = origin_of(path).elsewhere().open()[1]({"x": x})
    wanted = torch.export.load(path).module()(torch.from_numpy(x))
    for a, b in zip(found.values(), torch.utils._pytree.tree_leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b.detach().numpy())
    np.save(tmp_path / "x.npy", np.stack([x[:4]] * 4))
    command = f"compile {path} --input-shape x=4,6 --calibration {tmp_path / 'x.npy'} --target x86-avx2 --preset fast --output {tmp_path / 'net.so'}"
    assert main(command.split()) == 0 and "PyTorch" in capsys.readouterr().out
    assert main(["bench", str(tmp_path / "net.so"), "--model", str(path), "--against", "torch", "--seconds", "0.05", "--json"]) == 0
    assert "torch float" in json.loads(capsys.readouterr().out)["seconds"]


def ran(path: Path) -> str:
    return f"__import__('os').mkdir({str(path)!r})"


def hostile(flag: Path) -> Iterator[tuple[str, str, Any]]:
    """(what is refused, the member, what is changed in it); each would make `flag` if it were run."""

    def shape(g: Any) -> None:
        g["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = ran(flag)

    def node(g: Any) -> None:
        nodes(g)[0]["target"] = "torch.hub.os.mkdir"

    def enum(g: Any) -> None:
        signature = g["graph_module"]["module_call_graph"][0]["signature"]
        tree = json.loads(signature["out_spec"])
        tree[1]["context"] = json.dumps([{"__enum__": True, "fqn": "this:d", "name": "x"}])
        signature["out_spec"] = json.dumps(tree)

    def pickled(c: Any) -> None:
        next(iter(c["config"].values()))["use_pickle"] = True

    def large(c: Any) -> None:
        meta = c["config"]["norm.weight"]["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 1 << 40}], [{"as_int": 0}]

    yield "a shape is given as '__import__", MODEL, shape
    yield r"the graph calls 'torch\.hub\.os\.mkdir'", MODEL, node
    yield "", MODEL, enum
    yield "is kept as a pickle", WEIGHTS, pickled
    yield "6 numbers are stored for it", WEIGHTS, large


def test_nothing_in_it_is_run(torch: Any, members: Members, tmp_path: Path) -> None:
    flag, path = tmp_path / "ran", tmp_path / "net.pt2"
    for message, name, change in hostile(flag):
        written(path, changed(members, name, change))
        if message:
            with pytest.raises(ModelError, match=message):
                read_program(path)
        else:
            assert read_program(path) is not None
    written(path, changed(members, MODEL, lambda g: g.update(guards_code=[ran(flag)])))
    read_program(path).module()(torch.ones(3, 6))

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(flag),)

    held = io.BytesIO()
    torch.save(Bomb(), held)
    written(path, members | {"net/data/sample_inputs/model.pt": held.getvalue()})
    read_program(path)
    assert not flag.exists()
    for forms, message in (
        (members | {"net/data/weights/model.pt": held.getvalue()}, "an older PyTorch wrote it, with its weights as a pickle"),
        (members | {"net/byteorder": b"big"}, "big-endian"),
        ({n: c for n, c in members.items() if n != "net/data/weights/weight_0"}, "'data/weights/weight_0' is missing"),
    ):
        with pytest.raises(ModelError, match=message):
            read_program(written(path, forms))
    with pytest.raises(ModelError, match="is compressed, which torch.export.save never does"):
        read_program(written(path, members, zipfile.ZIP_DEFLATED))


VALUES = [None, -1, 0, 1, 1 << 40, -(1 << 63), 1 << 70, "x", "torch.ops.aten.relu.default", [], {}, True, 1.5, [1], {"as_int": 5}, float("inf"), "", {"a": 1}]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if here:
        yield here
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inside, (*here, key))


def damaged(members: Members, chance: random.Random) -> Members:
    kind, name = chance.choice(["value", "value", "value", "bytes", "cut", "gone"]), chance.choice([MODEL, MODEL, WEIGHTS, *members])
    content = bytearray(members[name])
    if kind == "gone" or not content:
        return {n: c for n, c in members.items() if n != name}
    if kind == "value" and name.endswith(".json"):
        held = json.loads(content)
        *path, last = chance.choice(list(places(held)) or [("x",)])
        inside = held
        for key in path:
            inside = inside[key]
        if chance.random() < 0.3 and inside:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(chance.choice(VALUES))
        return members | {name: json.dumps(held).encode()}
    if kind == "cut":
        return members | {name: bytes(content[: chance.randrange(len(content))])}
    for _ in range(chance.choice([1, 5, 50])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return members | {name: bytes(content)}


def test_damaged_files(members: Members, tmp_path: Path) -> None:
    """One sentence, or a program."""
    refused = 0
    for seed in range(50):
        path = written(tmp_path / "net.pt2", damaged(members, random.Random(seed)))
        try:
            read_program(path)
        except ModelError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path)), (seed, str(error))
            refused += 1
    assert 20 < refused < 50
