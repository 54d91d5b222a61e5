"""The Triton kernels and their launch. They run the plan that they are given and choose nothing."""
