// The kernels name this header and use nothing of it.
