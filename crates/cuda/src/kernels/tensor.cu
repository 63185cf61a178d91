// Products of tensor cores, by an instruction of the device. Only NVRTC compiles this file: for the tests,
// tests/fake/ has a function of the same name, which meets the other lanes of the warp and multiplies what they bring.

// sums += a · b over a warp: sums are 16 outputs × 8 rows, `a` 16 outputs × 16 inputs, `b` 16 inputs × 8 rows. With
// lane = 4 · group + member, a lane has the following; of `a` and `b` two inputs in a word, the first in its lower half:
//     sums: (group, 2 · member), (group, 2 · member + 1), and both 8 outputs further
//     a:    (group, 2 · member…), (group + 8, 2 · member…), and both 8 inputs further
//     b:    (2 · member…, group), (2 · member + 8…, group)
// All lanes of the warp have to come. Devices before 8.0 have no such instruction, and are refused with weights of bf16.
__device__ inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
