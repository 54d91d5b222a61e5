"""What is built: the module's sources and how a selection of GPUs, world sizes and types reaches the compiler.

The convention between csrc/ and this package:

- One pybind11 module, ``_comm`` (imported as ``extend_attn._comm``). Every ``csrc/bindings/*.cpp`` and ``csrc/comm/*.cpp`` is
  compiled by the host compiler, every ``csrc/kernels/*.cu`` and ``csrc/comm/*.cu`` by nvcc; each file is one object, all in parallel.
  The include folder is ``csrc/``.
- A ``.cu`` whose stem ends with ``_fp16``, ``_bf16`` or ``_fp32`` is compiled only if that type is asked for (which is how one build
  spreads over cores). Other files are always compiled.
- ``-DEXTEND_ATTN_WORLD_SIZE_BITS`` (bit n: world size n) and ``-DEXTEND_ATTN_DTYPE_BITS`` (bit 0 float16, 1 bfloat16, 2 float32)
  say what to instantiate; ``csrc/portability/selection.h`` reads them (``has_world_size(n)``, ``has_dtype(DType::kBFloat16)``).
- Two builds may be loaded into one process: a bound class is ``py::module_local()``, an exception is registered with
  ``py::register_local_exception``.
- C++17. No ``std::bit_cast`` or other C++20 library (Debian 11 has gcc 10.2).
- ``build_info.h`` binds ``build_info()``; keep the call in ``bindings/module.cpp``.
"""
