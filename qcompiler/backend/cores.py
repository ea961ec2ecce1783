"""Types of cores, as people name them: those that targets.yaml lists, and those that LLVM knows."""

from __future__ import annotations

from qcompiler.base.errors import TargetError, closest
from qcompiler.base.targets import Target, load_targets


def cores_of(target: Target) -> list[str]:
    """The names of all cores of a target's architecture, on a GPU of all GPUs, in order."""
    rows = [target, *load_targets().values()]
    names = {name for row in rows if row.architecture == target.architecture for name in row.cpus}
    if not target.gpu:
        import tvm
        from tvm.target.codegen import llvm_get_cpu_archlist

        names |= {str(name) for name in llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm", "mtriple": target.triple}))}
    return sorted(names - {"generic"})


def check_core(core: str | None, target: Target) -> None:
    """Raises TargetError for the name of a core that there is not, with the nearest ones: a slip of the pen would be a core without records."""
    if core and core not in (known := cores_of(target)):
        near = closest(core, known) or f" Known: {', '.join(known)}"
        raise TargetError(f"no core '{core}' is known for {target.name}.{near}")
