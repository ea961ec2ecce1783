"""CUDA on a machine with a GPU: exactness of every kernel row and of whole networks on the device, then speed against PyTorch and TensorRT.

    python benchmarks/cuda.py --data ../shared/data [--network resnet50]... [--batch 1 32] [--seconds 5] [--without rows|torch|tensorrt]... [--json FILE]

Rows: every case of tests/test_kernels_cuda*.py runs on the device and must equal numerics.py bit for bit. Networks: compiled for this CPU and for the GPU
from one plan; outputs must be byte-identical. Speed: inputs and outputs lie in device memory for everyone, candidates take turns, a call returns when
its result is there: ours replays its CUDA graph; PyTorch runs float16, channels_last, compiled, as a CUDA graph; TensorRT runs float16, and int8 from
the network that `export-onnx` writes. Then our steps by the GPU's clock, with the percent of the card's int8 peak that each reaches.

Results go to benchmarks/results/cuda-GPU.json unless --json names a file. Exit status 1 when anything differs by a bit, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np

from qcompiler.cuda_driver import Gpu, find_gpu
from qcompiler.targets import Target, host_architecture, load_targets

Call = Callable[[], object]
HERE = Path(__file__).resolve().parent
GUARD, CANARY = 4096, 0xA5
MULTIPROCESSORS, CLOCK = 16, 13  # CUdevice_attribute: count, and kHz
# Dense int8 multiply-accumulates of the tensor cores per multiprocessor and clock (NVIDIA's architecture whitepapers; data sheet TOPS / 2 / SMs / boost clock).
MACS_PER_CLOCK = {75: 1024, 80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 120: 1024}


def target_of(gpu: Gpu) -> Target:
    """The row of targets.yaml that fits a GPU best."""
    fitting = [t for t in load_targets().values() if t.gpu and t.host_architecture == host_architecture() and t.capability <= gpu.capability]
    if not fitting:
        raise SystemExit(f"no target of targets.yaml runs on {gpu.name} (compute capability {gpu.capability / 10})")
    return max(fitting, key=lambda t: t.capability)


def peak(gpu: Gpu) -> float:
    """int8 multiply-accumulates per second of the whole card at its boost clock."""
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()

    def attribute(which: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, 0)
        return value.value

    known = max(c for c in MACS_PER_CLOCK if c <= gpu.capability)
    return float(MACS_PER_CLOCK[known]) * attribute(MULTIPROCESSORS) * attribute(CLOCK) * 1e3


# -- exactness of rows ----------------------------------------------------------------------------------------------------------------------


def row_cases(target: Target) -> dict[str, Any]:
    """The cases of the test suite, by name, with kernels for `target`: {name: (case, kernel)}."""
    from qcompiler import schedules

    schedules.load(target)
    sys.path.insert(0, str(HERE.parent / "tests"))
    found = {}
    for path in sorted((HERE.parent / "tests").glob("test_kernels_cuda*.py")):
        module = importlib.import_module(path.stem)
        module.TARGET = target
        for name, case in getattr(module, "CASES", {}).items():
            found[f"{path.stem.removeprefix('test_kernels_')}/{name}"] = (case, case.prepare())
    return found


def rows_program(cases: dict[str, Any], target: Target) -> Any:
    """One step per case, every tensor at a place of its own between guards."""
    from qcompiler.lowering import Place, Program, Step, Value, _pack_constants
    from qcompiler.schedules.table import Layout

    values: dict[str, Any] = {}
    steps, at = [], GUARD

    def place(name: str, layout: Any) -> str:
        nonlocal at
        values[name] = Value(name, layout, name, Place("workspace", at))
        at += -(-layout.bytes // 64) * 64 + GUARD
        return name

    for number, (case, kernel) in enumerate(cases.values()):
        reads = [place(f"{number}x{i}", Layout((stored.size,), str(stored.dtype))) for i, stored in enumerate(case.inputs)]
        steps.append(Step(place(f"{number}y", case.output), None, case.name, kernel, reads, scratch=at))
        at += -(-kernel.scratch // 64) * 64
    return Program(target, steps, values, [], [], at, _pack_constants(steps))


def check_rows(target: Target, folder: Path) -> list[dict[str, Any]]:
    """Run every case on the device: [{case, row, wrong: elements that differ, outside: whether anything else changed}]."""
    from qcompiler.codegen import object_code
    from qcompiler.runtime.session import Session
    from qcompiler.schedules.harness import aligned, fetch
    from qcompiler.stages import Built

    cases = row_cases(target)
    program = rows_program(cases, target)
    session = Session(Built(program, object_code(program)).link().save(folder / "rows.so"))
    workspace = aligned(program.workspace, "uint8")
    workspace[:] = CANARY

    def region(value: str) -> Any:
        held = program.values[value]
        return workspace[held.place.offset : held.place.offset + held.layout.bytes]

    for step, (case, _) in zip(program.steps, cases.values(), strict=True):
        for value, stored in zip(step.reads, case.inputs, strict=True):
            region(value)[:] = stored.view(np.uint8)[: region(value).size]
    results = []
    ports = (ctypes.c_void_p * 1)()
    for index, (step, (name, (case, kernel))) in enumerate(zip(program.steps, cases.items(), strict=True)):
        before = workspace.copy()
        session.execute(workspace.ctypes.data, ports, ports, index, index + 1)
        got = fetch(region(step.writes).view(case.output.dtype), case.output)
        wrong = int((~(np.abs(got - case.expected) <= case.tolerance)).sum()) if case.tolerance else int((got != case.expected).sum())
        place = program.values[step.writes].place
        keep = np.ones(workspace.size, bool)
        keep[place.offset : place.offset + case.output.bytes] = False
        keep[step.scratch : step.scratch + kernel.scratch] = False
        outside = not np.array_equal(before[keep], workspace[keep])
        results.append({"case": name, "row": kernel.row, "wrong": wrong, "outside": outside})
    return results


# -- networks -------------------------------------------------------------------------------------------------------------------------------


class Prepared:
    """A network at one batch size, compiled for the GPU and for this CPU from one plan."""

    def __init__(self, network: networks.Network, batch: int, target: Target, folder: Path, progress: Any) -> None:
        import onnx

        from qcompiler.data import open_samples
        from qcompiler.debug import Dumper
        from qcompiler.model import load
        from qcompiler.pipeline import quantize
        from qcompiler.stages import build
        from qcompiler.targets import find_target

        port = onnx.load(str(network.model), load_external_data=False).graph.input[0]
        shape = (batch, *(d.dim_value for d in port.type.tensor_type.shape.dim[1:]))
        singles = open_samples(network.calibration(), load(network.model, {port.name: (1, *shape[1:])}).inputs, network.preprocess)
        images = [sample[port.name] for sample in itertools.islice(singles, max(8, batch))]
        self.samples = [{port.name: np.concatenate([images[(i + k) % len(images)] for k in range(batch)])} for i in (0, 1)]
        self.network, self.batch, self.input = network, batch, port.name
        options: Any = {"preset": "fast", "progress": progress, "input_shapes": {port.name: shape}}
        self.integer = quantize(network.model, target, self.samples, Dumper(), **options).integer
        self.libraries = {}
        for name, row in (("gpu", target), ("cpu", find_target("native"))):
            built = build(self.integer, row, f"generate {name} code", progress=progress)
            self.libraries[name] = built.link().save(folder / f"{network.name}-{batch}-{name}.so")

    def identical(self) -> bool:
        """Whether GPU and CPU give the same bytes for every sample."""
        import qcompiler

        gpu, cpu = (qcompiler.load(self.libraries[name]) for name in ("gpu", "cpu"))
        pairs = [(gpu.run(sample), cpu.run(sample)) for sample in self.samples]
        return all(a[name].tobytes() == b[name].tobytes() for a, b in pairs for name in b)


def our_call(library: Path, inputs: dict[str, np.ndarray]) -> Call:
    """A run of ours on device memory (PyTorch's allocations, when it is there; else the session's page-locked buffers)."""
    import qcompiler

    session = qcompiler.load(library)
    c, handle = session._library, session._handle

    def checked(status: int) -> None:
        session._check(status)

    c.qc_session_bind_input.argtypes = c.qc_session_bind_output.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    c.qc_session_run.argtypes = [ctypes.c_void_p]
    held: list[Any] = [session]
    if _module("torch"):
        import torch

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


def _module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def torch_call(network: str, batch: int) -> Call | None:
    """The same architecture in PyTorch: float16, channels_last, torch.compile, replayed as a CUDA graph. None where its package is missing."""
    import torch

    if network in ("resnet50", "mobilenet_v2") and _module("torchvision"):
        import torchvision

        model = getattr(torchvision.models, network)()
    elif network == "efficientnet_lite0" and _module("timm"):
        import timm

        model = timm.create_model("efficientnet_lite0")
    else:
        return None
    model = model.eval().half().cuda().to(memory_format=torch.channels_last)
    compiled = torch.compile(model, options={"max_autotune": True, "triton.cudagraphs": False})
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(5):
            compiled(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            compiled(x)

    def call() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def tensorrt_call(model: Path, inputs: dict[str, np.ndarray], int8: bool) -> Call:
    """An engine built from an ONNX file (with quantize and dequantize nodes for int8), run on device memory. Needs PyTorch for the memory."""
    import tensorrt as trt
    import torch

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes()):
        raise RuntimeError(f"TensorRT can't read {model}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    if int8:
        config.set_flag(trt.BuilderFlag.INT8)
    profile = builder.create_optimization_profile()
    for name, array in inputs.items():
        profile.set_shape(name, array.shape, array.shape, array.shape)
    config.add_optimization_profile(profile)
    engine = trt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    context, held, stream = engine.create_execution_context(), {}, torch.cuda.Stream()
    for name, array in inputs.items():
        context.set_input_shape(name, array.shape)
        held[name] = torch.from_numpy(array).cuda()
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if name not in held:
            held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float32, device="cuda")
        context.set_tensor_address(name, held[name].data_ptr())

    def call() -> None:
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()

    return call


def candidates(prepared: Prepared, folder: Path, without: set[str]) -> dict[str, Call]:
    """What takes turns: ours, and the peers that are installed."""
    calls = {"int8": our_call(prepared.libraries["gpu"], prepared.samples[0])}
    if _module("torch") and "torch" not in without:
        call = torch_call(prepared.network.name, prepared.batch)
        if call is not None:
            calls["torch float16"] = call
    if _module("tensorrt") and _module("torch") and "tensorrt" not in without:
        from qcompiler.export_onnx import export_onnx

        quantized = folder / f"{prepared.network.name}-{prepared.batch}-qdq.onnx"
        shapes = {prepared.input: prepared.samples[0][prepared.input].shape}
        export_onnx(prepared.network.model, quantized, prepared.samples, preset="fast", input_shapes=shapes)
        calls["tensorrt float16"] = tensorrt_call(prepared.network.model, prepared.samples[0], False)
        calls["tensorrt int8"] = tensorrt_call(quantized, prepared.samples[0], True)
    return calls


def measure(prepared: Prepared, gpu: Gpu, seconds: float, folder: Path, without: set[str], progress: Any) -> dict[str, Any]:
    """{network, batch, identical, candidates: {name: {minimum, median, ratio}}, peak, steps}. Times in seconds, ratios to PyTorch's where it was measured."""
    import qcompiler
    from qcompiler.bench import interleave, ratios

    timings = interleave(candidates(prepared, folder, without), seconds=seconds, progress=progress)
    base = "torch float16" if any(t.name == "torch float16" for t in timings) else "int8"
    factors = ratios(timings, base)
    session, top = qcompiler.load(prepared.libraries["gpu"]), peak(gpu)
    steps = []
    for step, (*_, took) in zip(session.manifest["steps"], session.profile(prepared.samples[0], 5), strict=True):
        steps.append({k: step[k] for k in ("id", "op", "kernel", "macs")} | {"seconds": took, "of_peak": step["macs"] / took / top})
    rows = {t.name: {"minimum": t.minimum, "median": t.median, "ratio": factors[t.name]} for t in timings}
    result = {"network": prepared.network.name, "batch": prepared.batch, "identical": prepared.identical()}
    return result | {"base": base, "candidates": rows, "peak": top, "steps": steps}


def network_text(result: dict[str, Any]) -> str:
    from qcompiler.tables import table

    title = f"{result['network']}, batch {result['batch']}: {'the same bytes as on the CPU' if result['identical'] else 'DIFFERS FROM THE CPU'}"
    rows = [[name, f"{r['minimum'] * 1e3:.3f}", f"{r['median'] * 1e3:.3f}", f"{r['ratio']:.3f}"] for name, r in result["candidates"].items()]
    text = table(title, ("candidate", "minimum ms|", "median ms|", f"ratio to {result['base']}|"), rows)
    steps = sorted(result["steps"], key=lambda s: -s["seconds"])
    cells = [[s["id"], s["op"], s["kernel"], f"{s['seconds'] * 1e6:.1f}", f"{100 * s['of_peak']:.1f} %" if s["macs"] else ""] for s in steps]
    return text + "\n\n" + table("Steps by the GPU's clock", ("value", "operator", "kernel", "us|", "of int8 peak|"), cells, width=160)


def main(arguments: list[str] | None = None) -> int:
    from qcompiler.progress import terminal_progress

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=networks.default_data(), help="folder with models/ and imagenet/")
    parser.add_argument("--network", action="append", choices=[*networks.NAMES, *networks.GENERATED, "none"], help="default: the trained ones")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring per network and batch")
    parser.add_argument("--without", action="append", default=[], choices=["rows", "torch", "tensorrt"])
    parser.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/cuda-GPU.json)")
    options = parser.parse_args(arguments)
    gpu = find_gpu()
    if not isinstance(gpu, Gpu):
        print(f"benchmarks/cuda.py measures on a GPU, and this machine lacks {gpu}", file=sys.stderr)
        return 2
    target, failed = target_of(gpu), False
    document: dict[str, Any] = {"gpu": gpu.name, "capability": gpu.capability, "target": target.name, "rows": [], "networks": []}
    print(f"{gpu.name}, compute capability {gpu.capability / 10}, target {target.name}")
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name, terminal_progress() as progress:
        folder = Path(name)
        if "rows" not in options.without:
            document["rows"] = check_rows(target, folder)
            wrong = [r for r in document["rows"] if r["wrong"] or r["outside"]]
            failed |= bool(wrong)
            print(f"{len(document['rows'])} cases of {len({r['row'] for r in document['rows']})} rows on the device: {len(wrong)} differ")
            for r in wrong:
                print(f"  {r['case']} ({r['row']}): {r['wrong']} elements{', and bytes outside its output' if r['outside'] else ''}")
        for network in filter(None, (networks.find(n, options.data, networks.default_cache()) for n in options.network or networks.NAMES if n != "none")):
            for batch in options.batch:
                result = measure(Prepared(network, batch, target, folder, progress), gpu, options.seconds, folder, set(options.without), progress)
                failed |= not result["identical"]
                document["networks"].append(result)
                print("\n" + network_text(result))
    path = options.json or HERE / "results" / f"cuda-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
