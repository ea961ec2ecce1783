"""Quantization as PyTorch's operators state it, in ONNX's operators: scales, zero points and ranges as they are.

    quantize_per_tensor, quantize_per_channel, quantize_per_token         -->    QuantizeLinear [, Clip to a range narrower than the type's]
    dequantize_*                                                          -->    DequantizeLinear
    fake_quantize_per_tensor_affine, fake_quantize_per_channel_affine     -->    both
    quantize_per_channel_group, dequantize_per_channel_group              -->    both, of a row for each group: of weights, which are constants
    choose_qparams*, which finds a scale in every run                     -->    DynamicQuantizeLinear, which the import takes back to a float network

PyTorch's own table has some of these; it leaves out ranges of a tensor's that are narrower than its type, and has none whose numbers are tensors.
Nothing here imports torch before there is a program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper


def _constant(value: int, kind: int) -> Any:
    from onnxscript import opset18 as op

    return op.Constant(value=helper.make_tensor("value", kind, [], [value]))


def _parameters(scale: Any, zero: Any, kind: int) -> tuple[Any, Any]:
    """A scale and a zero point, numbers or tensors, in the types that ONNX wants. A zero point that isn't there stays so."""
    from onnxscript import opset18 as op

    if isinstance(zero, (int, float)):
        return op.Constant(value_float=float(scale)), _constant(int(zero), kind)
    return op.Cast(scale, to=TensorProto.FLOAT), None if zero is None else op.Cast(zero, to=kind)


def _quantize(x: Any, scale: Any, zero: Any, low: int, high: int, kind: int, **axis: int) -> Any:
    from onnxscript import opset18 as op

    y = op.QuantizeLinear(x, *_parameters(scale, zero, kind), **axis)
    whole = np.iinfo(helper.tensor_dtype_to_np_dtype(kind))
    return y if (low, high) == (whole.min, whole.max) else op.Clip(y, _constant(max(low, whole.min), kind), _constant(min(high, whole.max), kind))


def _dequantize(x: Any, scale: Any, zero: Any, kind: int, real: int | None, **axis: int) -> Any:
    from onnxscript import opset18 as op

    y = op.DequantizeLinear(x, *_parameters(scale, zero, kind), **axis)
    return y if real in (None, -1, TensorProto.FLOAT) else op.Cast(y, to=real)


def _flat(numbers: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Reshape(numbers, op.Constant(value_ints=[-1]))


def _rows(x: Any, group_size: int) -> Any:
    """[N, K] -> [N * K / group_size, group_size]"""
    from onnxscript import opset18 as op

    return op.Reshape(x, op.Constant(value_ints=[-1, group_size]))


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator of PyTorch -> what `torch.onnx.export` writes for it, as its `custom_translation_table` takes it."""
    import torch
    import torch.ao.quantization.fx._decomposed
    from onnxscript import opset18 as op

    def quantize_tensor(x: Any, scale: Any, zero: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
        return _quantize(x, scale, zero, quant_min, quant_max, dtype)

    def dequantize_tensor(x: Any, scale: Any, zero: Any, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1) -> Any:
        return _dequantize(x, scale, zero, dtype, out_dtype)

    def quantize_channel(x: Any, scales: Any, zeros: Any, axis: int, quant_min: int, quant_max: int, dtype: int) -> Any:
        return _quantize(x, scales, zeros, quant_min, quant_max, dtype, axis=axis)

    def dequantize_channel(x: Any, scales: Any, zeros: Any, axis: int, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1) -> Any:
        return _dequantize(x, scales, zeros, dtype, out_dtype, axis=axis)

    def quantize_group(x: Any, scales: Any, zeros: Any, quant_min: int, quant_max: int, dtype: int, group_size: int) -> Any:
        rows = _rows(x, group_size)
        return op.Reshape(_quantize(rows, _flat(scales), _flat(zeros), quant_min, quant_max, dtype, axis=0), op.Shape(x))

    def dequantize_group(x: Any, scales: Any, zeros: Any, quant_min: int, quant_max: int, dtype: int, group_size: int, output_dtype: int = -1) -> Any:
        rows, zero = _rows(x, group_size), None if zeros is None else _flat(zeros)
        return op.Reshape(_dequantize(rows, _flat(scales), zero, dtype, output_dtype, axis=0), op.Shape(x))

    def fake_tensor(x: Any, scale: Any, zero: Any, quant_min: int, quant_max: int) -> Any:
        kind = TensorProto.INT8 if quant_min < 0 else TensorProto.UINT8
        return _dequantize(_quantize(x, scale, zero, quant_min, quant_max, kind), scale, zero, kind, None)

    def fake_channel(x: Any, scales: Any, zeros: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        kind = TensorProto.INT8 if quant_min < 0 else TensorProto.UINT8
        return _dequantize(_quantize(x, scales, zeros, quant_min, quant_max, kind, axis=axis), scales, zeros, kind, None, axis=axis)

    def choose(x: Any, *numbers: Any) -> tuple[Any, Any]:
        """The scale and zero point of int8; of 8 bits that start at 0 they were found alike."""
        _, scale, zero = op.DynamicQuantizeLinear(x)
        return scale, op.Sub(op.Cast(zero, to=TensorProto.INT64), _constant(128, TensorProto.INT64))

    q, aten = torch.ops.quantized_decomposed, torch.ops.aten
    found: dict[Any, Callable[..., Any]] = {}
    for overloads, translated in (
        ((q.quantize_per_tensor.default, q.quantize_per_tensor.tensor, q.quantize_per_token.default), quantize_tensor),
        ((q.dequantize_per_tensor.default, q.dequantize_per_tensor.tensor, q.dequantize_per_token.default), dequantize_tensor),
        ((q.quantize_per_channel.default,), quantize_channel),
        ((q.dequantize_per_channel.default,), dequantize_channel),
        ((q.quantize_per_channel_group.default,), quantize_group),
        ((q.dequantize_per_channel_group.default,), dequantize_group),
        ((aten.fake_quantize_per_tensor_affine.default, aten.fake_quantize_per_tensor_affine.tensor_qparams), fake_tensor),
        ((aten.fake_quantize_per_channel_affine.default, q.fake_quant_per_channel.default), fake_channel),
        ((q.choose_qparams.tensor, q.choose_qparams_symmetric.tensor), choose),
        ((q.choose_qparams_per_token.default, q.choose_qparams_per_token_asymmetric.default), choose),
    ):
        found |= dict.fromkeys(overloads, translated)
    return found
