// Device functions that kernels call by name. tests/cuda_emulation/ has the same functions for a CPU.
