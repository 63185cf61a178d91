// Half precision, by an instruction of the device each way. Only NVRTC compiles this file: for the tests, tests/fake/half.h
// has functions of the same names.

__device__ inline float widen(f16 number) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(number.bits));
    return wide;
}

// The nearest, of ties the even one, of a number within F16_MAX.
__device__ inline f16 nearest_f16(float number) {
    f16 near;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(near.bits) : "f"(number));
    return near;
}
