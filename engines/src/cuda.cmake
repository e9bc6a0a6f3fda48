# The CUDA driver as one fat binary: machine code for each GPU below that the found nvcc knows, and PTX of the newest
# of them for GPUs to come. It is a data file loaded at run time, so nothing here links against CUDA.
set(TSTITCH_NVCC "")
if(NOT TSTITCH_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(TSTITCH_NVCC "${CMAKE_CUDA_COMPILER}")
  elseif(TSTITCH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TSTITCH_CUDA=ON, but no working nvcc was found; put it on PATH, or set CUDACXX to it")
  endif()
endif()
if(NOT TSTITCH_NVCC)
  message(STATUS "CUDA step kernels: not built")
  return()
endif()

execute_process(COMMAND "${TSTITCH_NVCC}" --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
set(gencode)
foreach(arch 75 80 86 89 90 100 120) # Turing, Ampere, Ada, Hopper, Blackwell
  if(known MATCHES "sm_${arch}[^0-9]")
    list(APPEND gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
    set(newest ${arch})
  endif()
endforeach()
list(APPEND gencode "-gencode=arch=compute_${newest},code=compute_${newest}")
message(STATUS "CUDA step kernels: ${TSTITCH_NVCC}, up to sm_${newest}")

set(fatbin "${CMAKE_CURRENT_BINARY_DIR}/step_kernels.fatbin")
add_custom_command(
  OUTPUT "${fatbin}"
  COMMAND "${TSTITCH_NVCC}" --fatbin -std=c++17 -O3 --threads 0 $<$<BOOL:${TSTITCH_WERROR}>:-Werror=all-warnings>
          ${gencode} -o "${fatbin}" "${CMAKE_CURRENT_SOURCE_DIR}/cuda_driver.cu"
  DEPENDS cuda_driver.cu dtypes.hpp step.hpp
  COMMENT "Compiling the CUDA step kernels"
  COMMAND_EXPAND_LISTS VERBATIM)
add_custom_target(step_kernels ALL DEPENDS "${fatbin}")
install(FILES "${fatbin}" DESTINATION tstitch_engines)
