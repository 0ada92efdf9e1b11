"""The native CPU engine: C++ kernels behind a plain C interface, loaded with ctypes."""
