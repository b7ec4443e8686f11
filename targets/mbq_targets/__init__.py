"""What a machine is, and the kernels it runs."""
