// Stands for kernels/half.cu: half precision without an instruction for it.
#pragma once

#include <cmath>

inline float widen(f16 number) {
    const unsigned sign = unsigned(number.bits & 0x8000u) << 16, exponent = number.bits >> 10 & 31u, rest = number.bits & 0x3ffu;
    if (exponent == 0) { // a multiple of 2^-24
        const float size = float(rest) * 0x1p-24f;
        return sign ? -size : size;
    }
    const unsigned wide = exponent == 31 ? 255u : exponent + 127 - 15;
    return __uint_as_float(sign | wide << 23 | rest << 13);
}

inline f16 nearest_f16(float number) {
    const unsigned bits = __float_as_uint(number), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    unsigned half;
    if (size > 0x7f800000u) {
        half = 0x7e00u; // no number
    } else if (size < 0x38800000u) { // under 2^-14: a multiple of 2^-24
        half = unsigned(std::nearbyintf(__uint_as_float(size) * 0x1p24f));
    } else { // ties to even; a mantissa that overflows carries into the exponent
        half = (size + 0xfffu + (size >> 13 & 1u) - (unsigned(127 - 15) << 23)) >> 13;
    }
    return f16{static_cast<unsigned short>(sign | half)};
}
