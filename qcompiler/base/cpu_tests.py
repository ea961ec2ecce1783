"""How a library asks at run time whether its CPU has a feature: the section `features` of targets.yaml, as C expressions."""

from __future__ import annotations

from typing import Any

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_KINDS = "{supports: NAME}, {cpuid7: [SUBLEAF, eax|ebx|ecx|edx, BIT]}, {hwcap: BIT}, {hwcap2: BIT}"


def read_cpu_tests(section: Any) -> dict[str, dict[str, str]]:
    """{architecture: {feature: C expression}} of a section {architecture: {feature: test}}. `qc_cpuid7(subleaf, register, bit)` is a function of the C runtime
    (`qcompiler/backend/artifact.py` writes it). Raises ValueError, which names what is wrong."""
    if not isinstance(section, dict) or not all(isinstance(tests, dict) for tests in section.values()):
        raise ValueError("features: expected a mapping {architecture: {feature: test}}")
    return {str(a): {str(f): _expression(f"features: {a}: {f}", test) for f, test in tests.items()} for a, tests in section.items()}


def _expression(where: str, test: Any) -> str:
    match test:
        case {"supports": str(name)} if len(test) == 1 and name.replace("_", "").replace(".", "").isalnum():
            return f'__builtin_cpu_supports("{name}")'
        case {"cpuid7": [subleaf, register, bit]} if len(test) == 1 and register in _REGISTERS and _number(subleaf, 256) and _number(bit, 32):
            return f"qc_cpuid7({subleaf}, {_REGISTERS.index(register)}, {bit})"
        case {"hwcap": bit} if len(test) == 1 and _number(bit, 32):
            return f"(getauxval(AT_HWCAP) & {1 << bit}ul)"
        case {"hwcap2": bit} if len(test) == 1 and _number(bit, 32):
            return f"(getauxval(AT_HWCAP2) & {1 << bit}ul)"
    raise ValueError(f"{where}: no test of a CPU: {test}; supported: {_KINDS}")


def _number(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end
