# The CUDA driver as one fat binary: machine code for each GPU that make_fatbin.py lists and the compiler knows, and PTX
# of the newest of them for GPUs to come. By nvcc, or where there is none by NVRTC from NVIDIA's Python packages. It is a
# data file loaded at run time, so nothing here links against CUDA. Sets TSTITCH_FATBIN to its path, or to nothing.
set(TSTITCH_FATBIN "")
if(TSTITCH_CUDA STREQUAL "OFF")
  message(STATUS "CUDA step kernels: not built")
  return()
endif()

set(fatbin "${CMAKE_CURRENT_BINARY_DIR}/step_kernels.fatbin")
set(sources cuda_driver.cu dtypes.hpp step.hpp)
set(make_fatbin "${CMAKE_CURRENT_SOURCE_DIR}/../tstitch_engines/make_fatbin.py")
file(STRINGS "${make_fatbin}" architectures REGEX "^ARCHITECTURES")
string(REGEX MATCHALL "[0-9]+" architectures "${architectures}")

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
  execute_process(COMMAND "${nvcc}" --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(gencode)
  foreach(arch ${architectures})
    if(known MATCHES "sm_${arch}[^0-9]")
      list(APPEND gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
      set(newest ${arch})
    endif()
  endforeach()
  list(APPEND gencode "-gencode=arch=compute_${newest},code=compute_${newest}")
  message(STATUS "CUDA step kernels: ${nvcc}, up to sm_${newest}")
  set(command "${nvcc}" --fatbin -std=c++17 -O3 --threads 0 $<$<BOOL:${TSTITCH_WERROR}>:-Werror=all-warnings> ${gencode}
              -o "${fatbin}" "${CMAKE_CURRENT_SOURCE_DIR}/cuda_driver.cu")
else()
  set(nvrtc "no Python to run it")
  set(found 1)
  if(Python_EXECUTABLE)
    execute_process(COMMAND "${Python_EXECUTABLE}" "${make_fatbin}" --check RESULT_VARIABLE found OUTPUT_VARIABLE nvrtc
                    ERROR_VARIABLE nvrtc OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  endif()
  if(NOT found EQUAL 0)
    if(TSTITCH_CUDA STREQUAL "ON")
      message(FATAL_ERROR "TSTITCH_CUDA=ON, but there is no working nvcc (put it on PATH, or set CUDACXX to it) and no "
                          "NVRTC: ${nvrtc}")
    endif()
    message(STATUS "CUDA step kernels: not built, there is neither nvcc nor NVRTC")
    return()
  endif()
  message(STATUS "CUDA step kernels: ${nvrtc}")
  set(command "${Python_EXECUTABLE}" "${make_fatbin}" --source "${CMAKE_CURRENT_SOURCE_DIR}" --output "${fatbin}")
endif()

add_custom_command(OUTPUT "${fatbin}" COMMAND ${command} DEPENDS ${sources} "${make_fatbin}"
                   COMMENT "Compiling the CUDA step kernels" COMMAND_EXPAND_LISTS VERBATIM)
add_custom_target(step_kernels ALL DEPENDS "${fatbin}")
set(TSTITCH_FATBIN "${fatbin}")
