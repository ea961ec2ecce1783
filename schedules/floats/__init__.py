"""Float operators on CPUs, in vectors of 16 elements whatever the target, so that sums have one order. Importing this package registers them."""

from qcompiler.schedules.floats import attention, pointwise, product, recurrence, rows

__all__ = ["attention", "pointwise", "product", "recurrence", "rows"]
