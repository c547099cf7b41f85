# What nvcc makes of kernels/cuda/: code for the GPUs below, and PTX for those that come after them. The runtime is
# linked statically, so that the binary starts where there is no driver. tests/kernels/cuda_compile_test.py reads
# the flags here.
set(ATP_CUDA_FLAGS
  --expt-relaxed-constexpr
  -Werror=all-warnings
  -Xcompiler=-Wall,-Wextra
  -gencode=arch=compute_80,code=sm_80
  -gencode=arch=compute_89,code=sm_89
  -gencode=arch=compute_90a,code=sm_90a)
set(ATP_CUDA_PTX -gencode=arch=compute_90,code=compute_90)

if(ATP_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # they are among the flags
  enable_language(CUDA)
  # CMake 3.25 does not know that nvcc has C++20.
  foreach(kind STANDARD EXTENSION)
    set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)
  endforeach()
  find_package(CUDAToolkit 12 REQUIRED)
endif()
