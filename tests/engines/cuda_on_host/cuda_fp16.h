// Stands in for CUDA's header when g++ compiles cuda_driver.cu for the host.
#pragma once

#include "dtypes.hpp"

struct __half {
    std::uint16_t bits;
};
inline float __half2float(__half h) { return tstitch::from_float16(h.bits); }
inline __half __float2half_rn(float x) { return {tstitch::to_float16(x)}; }
