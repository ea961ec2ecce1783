"""The parts of benchmarks/cuda.py that touch the GPU, each in a process of its own, because a failed launch makes the driver refuse everything after it.

Needs numpy and the runtime; PyTorch and TensorRT where they are installed. TVM, ONNX and compilers are not needed.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_prepare import WEIGHTS_ALONE, batch_of

from qcompiler.base.cuda_driver import Gpu
from qcompiler.runtime.library import session_bytes
from qcompiler.runtime.session import Session

Call = Callable[[], object]
CANARY = 0xA5
MULTIPROCESSORS, CLOCK = 16, 13  # CUdevice_attribute: count, and kHz
# Dense int8 multiply-accumulates of the tensor cores per multiprocessor and clock (NVIDIA's architecture whitepapers; data sheet TOPS / 2 / SMs / boost clock).
MACS_PER_CLOCK = {75: 1024, 80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 120: 1024}


def peak(gpu: Gpu) -> float:
    """int8 multiply-accumulates per second of the whole card at its boost clock; 0 where the driver doesn't tell."""
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()

    def attribute(which: int) -> int:
        value.value = 0
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, 0)
        return value.value

    known = max(c for c in MACS_PER_CLOCK if c <= gpu.capability)
    return float(MACS_PER_CLOCK[known]) * attribute(MULTIPROCESSORS) * attribute(CLOCK) * 1e3


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


# -- exactness ------------------------------------------------------------------------------------------------------------------------------


def lines_of(results: Path) -> list[dict[str, Any]]:
    """The lines that are whole of a file that `check_rows` writes, which may have been cut off."""
    found = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def check_rows(folder: Path, cases: list[dict[str, Any]], results: Path) -> None:
    """Run the cases that have no line in `results` yet, one line each: {case, row, wrong: elements that differ, outside: whether anything else changed}."""
    done = {line["case"] for line in lines_of(results)}
    arrays, session = np.load(folder / "rows.npz"), Session(folder / "rows.so")
    raw = np.empty(session.manifest["workspace"] + 64, np.uint8)
    start = -raw.ctypes.data % 64
    workspace = raw[start : start + session.manifest["workspace"]]
    ports = (ctypes.c_void_p * 1)()
    with results.open("a") as file:
        for number, case in enumerate(cases):
            if case["case"] in done:
                continue
            workspace[:] = CANARY
            for i, at in enumerate(case["reads"]):
                stored = arrays[f"{number}x{i}"].reshape(-1).view(np.uint8)
                workspace[at : at + stored.size] = stored
            before = workspace.copy()
            session.execute(0, workspace.ctypes.data, ports, ports, number, number + 1)
            output = slice(case["writes"], case["writes"] + case["bytes"])
            got, want = workspace[output].view(case["dtype"])[arrays[f"{number}at"]], arrays[f"{number}y"]
            wrong = ~(np.abs(got - want) <= case["tolerance"] * (1 + np.abs(want))) if case["tolerance"] else got != want
            at, size = case["scratch"]
            for region in (output, slice(at, at + size)):
                before[region] = workspace[region]
            line = {"case": case["case"], "row": case["row"], "wrong": int(wrong.sum()), "outside": not np.array_equal(before, workspace)}
            file.write("\n" + json.dumps(line))  # on a line of its own, also behind one that was cut off
            file.flush()


def library(folder: Path, network: dict[str, Any], target: str) -> Path:
    return folder / f"{network['name']}@{target}.so"


def samples_of(folder: Path, network: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    arrays = np.load(folder / f"{network['name']}.npz")
    return [{port: batch_of(arrays[f"input {port}"], network["batch"], i) for port in network["inputs"]} for i in (0, 1)]


def free_memory() -> Callable[[], int]:
    """A function that says how many bytes of the GPU are free; its context is the process's first, and stays."""
    driver, context, available, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or driver.cuCtxPushCurrent_v2(context):
        raise OSError("the driver makes no context")

    def ask() -> int:
        if driver.cuMemGetInfo_v2(ctypes.byref(available), ctypes.byref(total)):
            raise OSError("the driver does not tell how much memory is free")
        return available.value

    return ask


def check_network(folder: Path, network: dict[str, Any], target: str) -> dict[str, Any]:
    """{outputs: {name: elements that differ from the CPU's}, memory: bytes of the GPU}: two samples in a row, in two sessions, so that what a run leaves behind
    would show. Where float operators are among the steps, they differ by more than a thousandth of the largest. The first session brings code and
    weights along; `left`: what is not free again when both are gone."""
    free, sessions = free_memory(), list[Session]()
    steps = [free()]
    for _ in range(2):
        sessions.append(Session(library(folder, network, target)))
        steps.append(free())
    memory = {"first": steps[0] - steps[1], "second": steps[1] - steps[2], "planned": session_bytes(sessions[0].manifest)}
    outputs = differences(folder, network, sessions)
    sessions.clear()
    gc.collect()
    return {"outputs": outputs, "memory": memory | {"left": steps[0] - free()}}


def differences(folder: Path, network: dict[str, Any], sessions: list[Session]) -> dict[str, int]:
    """Elements of each output that differ from the CPU's, at most."""
    wanted, wrong = np.load(folder / f"{network['name']}.npz"), dict[str, int]()
    for turn in range(2):
        for i, sample in enumerate(samples_of(folder, network)):
            for name, got in sessions[turn].run(sample).items():
                want = wanted[f"{name}-{i}"]
                if network["integer"] or want.dtype.kind != "f":
                    differ = (np.frombuffer(got.tobytes(), np.uint8) != np.frombuffer(want.tobytes(), np.uint8)).reshape(want.size, -1).any(1)
                else:
                    differ = ~(np.abs(got - want) <= 1e-3 * np.abs(want).max())
                wrong[name] = max(wrong.get(name, 0), int(differ.sum()))
    return wrong


# -- speed ----------------------------------------------------------------------------------------------------------------------------------


def measure_steps(folder: Path, network: dict[str, Any], target: str, gpu: Gpu) -> dict[str, Any]:
    """{peak, steps: [{id, op, kernel, macs, seconds, of_peak}]} by the GPU's clock; `of_peak` is 0 where the peak is unknown."""
    session, top = Session(library(folder, network, target)), peak(gpu)
    steps = []
    for step, (*_, took) in zip(session.manifest["steps"], session.profile(samples_of(folder, network)[0], 5), strict=True):
        steps.append({k: step[k] for k in ("id", "op", "kernel", "macs")} | {"seconds": took, "of_peak": step["macs"] / took / top if top and took else 0.0})
    return {"peak": top, "steps": steps}


def measure_speed(folder: Path, network: dict[str, Any], targets: Sequence[str], seconds: float, peers: Sequence[str], *, alone: bool) -> dict[str, Any]:
    """{base, candidates: {name: {minimum, median, ratio}}, left_out: {name: why}}. Seconds; ratios to the first of `peers` (of PEERS) that runs, else to ours
    for the first target. alone: whether ours are measured without any peer; else there are no candidates then."""
    from qcompiler.runtime.bench import interleave, ratios

    inputs, left_out = samples_of(folder, network)[0], dict[str, str]()
    beside_torch = any(name.startswith("torch") for name in peers)
    calls: dict[str, Call] = {f"int8 {target}": our_call(library(folder, network, target), inputs, beside_torch) for target in targets}
    ours = list(calls)
    for name in peers:
        try:
            call = PEERS[name](folder, network, inputs)
            call()
            calls[name] = call
        except Exception as error:  # a peer's failure must not cost our times
            left_out[name] = why(error)
            print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
    if not alone and len(calls) == len(ours):
        return {"base": ours[0], "candidates": {}, "left_out": left_out}
    timings = interleave(calls, seconds=seconds, min_rounds=10 if seconds else 1)
    base = next((name for name in calls if name not in ours), ours[0])
    factors = ratios(timings, base)
    rows = {t.name: {"minimum": t.minimum, "median": t.median, "ratio": factors[t.name]} for t in timings}
    return {"base": base, "candidates": rows, "left_out": left_out}


def our_call(path: Path, inputs: dict[str, np.ndarray], beside_torch: bool) -> Call:
    """A run of ours on device memory (PyTorch's allocations, when that is there; else the session's page-locked buffers)."""
    session = Session(path)
    c, handle = session._library, session._handle

    def checked(status: int) -> None:
        if status:
            session._check(status)

    c.qc_session_bind_input.argtypes = c.qc_session_bind_output.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    c.qc_session_run.argtypes = [ctypes.c_void_p]
    held: list[Any] = [session]
    if beside_torch and (torch := torch_for_gpus()) is not None:
        for info in session.inputs:
            held.append(torch.from_numpy(np.ascontiguousarray(inputs[info.name])).cuda())
            checked(c.qc_session_bind_input(handle, info.name.encode(), held[-1].data_ptr(), held[-1].nbytes))
        for info in session.outputs:
            held.append(torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="cuda"))
            checked(c.qc_session_bind_output(handle, info.name.encode(), held[-1].data_ptr(), held[-1].nbytes))
        torch.cuda.synchronize()
    else:
        c.qc_session_input_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
        for info in session.inputs:
            pointer = ctypes.c_void_p()
            checked(c.qc_session_input_buffer(handle, info.name.encode(), ctypes.byref(pointer)))
            ctypes.memmove(pointer, np.ascontiguousarray(inputs[info.name]).ctypes.data, inputs[info.name].nbytes)
    return lambda held=held: checked(c.qc_session_run(handle))  # type: ignore[misc]


def torch_for_gpus() -> Any:
    """PyTorch, if it is there and a build for GPUs; else None."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch if torch.version.cuda else None


def torch_model(network: str) -> Any:
    """The same architecture with weights of no account."""
    import torch

    if network in ("resnet50", "mobilenet_v2"):
        import torchvision

        return getattr(torchvision.models, network)()
    kind, _, weights = network.partition(", ")
    if "minilm" in kind.lower():
        layers = re.search(r"L(\d+)", kind)
        return text_encoder(int(layers[1]) if layers else 6)
    if weights != WEIGHTS_ALONE:
        import timm

        return timm.create_model(network)
    if kind == "product":
        return torch.nn.Linear(1024, 1024, bias=False)
    sizes = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768), "a": (768, 3072), "b": (3072, 768)}

    class Encoder(torch.nn.ModuleDict):  # type: ignore[misc]
        """As a layer of `encoder` of benchmarks/weight_only.py, whose module needs ONNX."""

        def forward(self, x: Any) -> Any:
            x = x + self["o"](torch.sigmoid(self["q"](x) + self["k"](x)) * self["v"](x))
            return x + self["b"](torch.relu(self["a"](x)))

    return Encoder({n: torch.nn.Linear(*size, bias=False) for n, size in sizes.items()})


def text_encoder(layers: int, width: int = 384, heads: int = 12, inner: int = 1536, words: int = 30522, places: int = 512) -> Any:
    """A BERT of MiniLM's sizes, whose normalizations stand behind sums: module(ids [N, T], mask [N, T], kinds [N, T]) -> [N, T, width]; mask is 1 where a token
    counts."""
    import torch
    from torch import nn

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.first, self.second, self.norms = nn.Linear(width, inner), nn.Linear(inner, width), nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

        def forward(self, x: Any, bias: Any) -> Any:
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
            x = self.norms[0](x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)))
            return self.norms[1](x + self.second(nn.functional.gelu(self.first(x))))

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tables, self.norm = nn.ModuleList(nn.Embedding(rows, width) for rows in (words, places, 2)), nn.LayerNorm(width)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))

        def forward(self, ids: Any, mask: Any, kinds: Any) -> Any:
            word, place, kind = self.tables
            x = self.norm(word(ids) + place(torch.arange(ids.shape[1], device=ids.device)) + kind(kinds))
            bias = ((1 - mask.to(x.dtype)) * torch.finfo(x.dtype).min)[:, None, None]
            for layer in self.layers:
                x = layer(x, bias)
            return x

    return Encoder()


def torch_inputs(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What the same architecture in PyTorch takes: one array in float16, or tokens, a mask of all where a file has none, and their kinds, in int64."""
    if len(inputs) == 1 and all(array.dtype.kind == "f" for array in inputs.values()):
        return [array.astype(np.float16) for array in inputs.values()]

    def named(part: str) -> np.ndarray | None:
        return next((array.astype(np.int64) for name, array in inputs.items() if part in name), None)

    mask, kinds = named("mask"), named("type")
    (ids,) = (array.astype(np.int64) for name, array in inputs.items() if "mask" not in name and "type" not in name)
    return [ids, np.ones_like(ids) if mask is None else mask, np.zeros_like(ids) if kinds is None else kinds]


def torch_call(network: str, inputs: dict[str, np.ndarray], compiled: bool) -> Call:
    """The same architecture in PyTorch: float16, tokens in int64, images in channels_last, as a CUDA graph, through torch.compile or not."""
    import torch

    torch.backends.cudnn.benchmark = True
    arrays = torch_inputs(inputs)
    layout = {"memory_format": torch.channels_last} if arrays[0].ndim == 4 else {}
    model = torch_model(network).eval().half().cuda().to(**layout)
    run = torch.compile(model, options={"triton.cudagraphs": False}) if compiled else model
    given = [torch.from_numpy(array).cuda().to(**layout) for array in arrays]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(5):
            run(*given)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = run(*given)
    held = (model, given, y)  # the graph reads and writes them

    def call(held: Any = held) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def tensorrt_call(model: Path, inputs: dict[str, np.ndarray], int8: bool) -> Call:
    """An engine built from an ONNX file (with quantize and dequantize nodes for int8), run on device memory. Needs PyTorch for the memory."""
    import tensorrt as trt
    import torch

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # the only kind since version 10
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes()):
        raise RuntimeError(f"TensorRT can't read {model}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    for flag in ("FP16", *(["INT8"] if int8 else [])):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    profile = builder.create_optimization_profile()
    for name, array in inputs.items():
        profile.set_shape(name, array.shape, array.shape, array.shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT can't build an engine from {model}")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context, buffers, stream = engine.create_execution_context(), {}, torch.cuda.Stream()
    for name, array in inputs.items():
        context.set_input_shape(name, array.shape)
        buffers[name] = torch.from_numpy(array).cuda()
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if name not in buffers:
            buffers[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float32, device="cuda")
        context.set_tensor_address(name, buffers[name].data_ptr())
    torch.cuda.synchronize()

    def call(held: Any = (runtime, engine, buffers)) -> None:
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()

    return call


PEERS: Mapping[str, Callable[[Path, dict[str, Any], dict[str, np.ndarray]], Call]] = {
    "torch float16": lambda folder, network, inputs: torch_call(network["network"], inputs, False),
    "torch float16 compiled": lambda folder, network, inputs: torch_call(network["network"], inputs, True),
    "tensorrt float16": lambda folder, network, inputs: tensorrt_call(folder / f"{network['network']}.onnx", inputs, False),
    "tensorrt int8": lambda folder, network, inputs: tensorrt_call(folder / f"{network['name']}-qdq.onnx", inputs, True),
}
"""What ours is compared with. The first takes seconds to make, the others up to minutes."""
