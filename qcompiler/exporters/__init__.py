"""Quantized networks in the formats of others."""
