// float16 and bfloat16 on the host: branch-free, so loops over them vectorise without special instructions.
// Rounding is to nearest, ties to even, as IEEE 754, numpy and PyTorch have it.
#pragma once

#include "step.hpp"

namespace tstitch {

TSTITCH_HD float from_bfloat16(std::uint16_t h) { return bits_float(static_cast<std::uint32_t>(h) << 16); }

TSTITCH_HD std::uint16_t to_bfloat16(float x) {
    const std::uint32_t bits = float_bits(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

TSTITCH_HD float from_float16(std::uint16_t h) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(h & 0x7fffu) << 13;  // exponent and mantissa in place
    const std::uint32_t exponent = magnitude & 0x0f800000u;
    const std::uint32_t normal = magnitude + (112u << 23);   // bias 127 instead of 15
    const std::uint32_t special = magnitude + (224u << 23);  // infinity and NaN: the largest exponent again
    // A subnormal is mantissa * 2^-24: read it below an implicit one at 2^-14, then take that one off.
    const std::uint32_t subnormal = float_bits(bits_float(magnitude + (113u << 23)) - bits_float(113u << 23));
    const std::uint32_t finite = exponent == 0 ? subnormal : normal;
    return bits_float((exponent == 0x0f800000u ? special : finite) | static_cast<std::uint32_t>(h & 0x8000u) << 16);
}

TSTITCH_HD std::uint16_t to_float16(float x) {
    const std::uint32_t bits = float_bits(x);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    const std::uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + odd) >> 13;  // may carry into infinity, rightly
    // Below 2^-14 the adder rounds: 0.5 has the weight at which a float's last bit is 2^-24.
    const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<std::uint16_t>((magnitude >= (143u << 23) ? special : finite) | (bits >> 16 & 0x8000u));
}

}  // namespace tstitch
