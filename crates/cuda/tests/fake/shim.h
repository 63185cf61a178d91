// CUDA C++ for a plain C++ compiler: as much of it as the kernels use. Threads of a block are fibers (fibers.cpp).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct Dim3 {
    unsigned x, y, z;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern thread_local Dim3 threadIdx, blockIdx;

#define __global__
#define __device__
#define __launch_bounds__(THREADS)
// Blocks of one thread of the machine run one after the other.
#define __shared__ static thread_local

// Waits for the other threads of the block; for the other lanes of the warp.
void __syncthreads();
void __syncwarp();

// What lane `lane ^ mask` gives in the same meeting of its warp.
uint32_t exchange(uint32_t bits, unsigned mask);

// Stands for the function of kernels/tensor.cu, and lays out fragments as the device does.
void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

inline float __uint_as_float(unsigned bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

inline unsigned __float_as_uint(float number) {
    unsigned bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

inline float __shfl_xor_sync(unsigned, float number, int mask) {
    return __uint_as_float(exchange(__float_as_uint(number), unsigned(mask)));
}

inline int __shfl_xor_sync(unsigned, int number, int mask) { return int(exchange(uint32_t(number), unsigned(mask))); }

inline int min(int a, int b) { return a < b ? a : b; }
