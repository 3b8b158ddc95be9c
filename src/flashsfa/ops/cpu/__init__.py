"""What kernels for the CPU that numba compiles share. numba is optional: `pip install flashsfa[cpu]`."""
