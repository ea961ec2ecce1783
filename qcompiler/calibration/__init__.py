"""Samples in, CalibrationTable out."""
