"""Code generation for NVIDIA GPUs: kernels become one CUDA C source with a `__global__` function each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tvm
import tvm_ffi
from tvm import tirx

from qcompiler import schedules
from qcompiler.base.errors import bugs_named
from qcompiler.base.targets import Target
from qcompiler.schedules.cuda.wgmma import device_functions
from qcompiler.schedules.table import Kernel

DEVICE_KERNEL = 2  # calling convention: launched from the host


def device_header(target: Target) -> str:
    """The device functions that kernels call by name, as CUDA C."""
    functions = (Path(str(schedules.__file__)).parent / "cuda" / "device.cuh").read_text()
    header = f"#define QC_CAPABILITY {target.capability}\n{functions}"
    return header + device_functions() if "cuda-wgmma" in target.rows else header


def cuda_source(kernels: Mapping[str, Kernel], target: Target) -> str:
    """CUDA C with a function `extern "C" __global__ void symbol(pointers...)` per kernel, arguments in the order of `Kernel.func`.

    Needs neither a GPU nor a toolkit. Raises InternalError when TVM's code generator refuses a kernel.
    """
    device = tvm.target.Target(target.tvm)
    functions = {}
    for symbol, kernel in kernels.items():
        assert kernel.launch is not None, f"{kernel.row} is not a GPU kernel"
        attrs = {"target": device, "calling_conv": DEVICE_KERNEL, "global_symbol": symbol, "tirx.is_global_func": True}
        attrs["tirx.kernel_launch_params"] = ["blockIdx.x", "threadIdx.x"]
        functions[symbol] = kernel.func.with_attrs(attrs)
    # Kernels' buffers are flat: FlattenBuffer would add 0 to every index, and a vector's would be no ramp any more, but read element by element.
    passes = [
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.LowerIntrin(),
    ]
    with bugs_named(f"code generation for {target.name}"), device:
        module = tvm.ir.transform.Sequential(passes)(tvm.IRModule(functions))
        code = tvm_ffi.get_global_func("target.build.cuda")(module, device).inspect_source("cuda")
    return f"{device_header(target)}\n{code}"
