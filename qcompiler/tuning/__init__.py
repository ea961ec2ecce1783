"""`tune`: faster kernels, found on the hardware."""
