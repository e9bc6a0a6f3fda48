// Stands in for CUDA's header when g++ compiles cuda_driver.cu for the host.
#pragma once

#include "dtypes.hpp"

struct __nv_bfloat16 {
    std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) { return tstitch::from_bfloat16(h.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {tstitch::to_bfloat16(x)}; }
