// What the kernels share. The files of this folder are one program, compiled by NVRTC when a model is loaded, and by a
// plain C++ compiler for the tests: no headers, and no inline assembly but in half.cu and tensor.cu, which the tests replace.
//
// Every sum has one order, which follows from the model's shape alone: no atomics, no split that depends on the number
// of rows. Multiply-adds are written as fmaf, and the compiler is told to fuse nothing by itself, or two instances of one
// template could differ in the last bit.

// The upper half of an f32.
struct bf16 {
    unsigned short bits;
};

// IEEE half precision.
struct f16 {
    unsigned short bits;
};

constexpr float F16_MAX = 65504.0f;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float widen(float number) { return number; }

__device__ inline float widen(bf16 number) { return __uint_as_float(unsigned(number.bits) << 16); }

__device__ inline void load(const float* from, float (&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
}

// Sums COUNT values of each lane over a warp. Lane l returns the sum of value l / (32 / COUNT). In every round a lane gives
// away half of what it has, where a butterfly for each value would exchange all of it; the tree of each sum is that of
// the butterfly, whatever COUNT is.
template <int COUNT>
__device__ inline float warp_sums(float (&values)[COUNT]) {
    const int lane = threadIdx.x % WARP;
    int mask = WARP / 2;
#pragma unroll
    for (int count = COUNT / 2; count > 0; count /= 2) {
        const bool upper = (lane & mask) != 0;
#pragma unroll
        for (int i = 0; i < count; i++) {
            const float kept = upper ? values[i + count] : values[i];
            const float given = upper ? values[i] : values[i + count];
            values[i] = kept + __shfl_xor_sync(ALL_LANES, given, mask);
        }
        mask /= 2;
    }
    for (; mask > 0; mask /= 2) values[0] += __shfl_xor_sync(ALL_LANES, values[0], mask);
    return values[0];
}

__device__ inline float warp_sum(float value) {
    float values[1] = {value};
    return warp_sums(values);
}

__device__ inline float warp_max(float value) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, mask));
    }
    return value;
}
