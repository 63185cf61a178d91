// The kernels of src/kernels/, compiled as C++, by their names.

#include "kernels.h"

#include <iterator>
#include <utility>

#include "shim.h"

#include "../../src/kernels/common.cu"

#include "half.h"

#include "../../src/kernels/matmul.cu"
#include "../../src/kernels/matmul_bf16.cu"
#include "../../src/kernels/rows.cu"

#include "../../src/kernels/attention.cu"

#include "../../src/kernels/adapter.cu"

#include "../../src/kernels/group.cu"

#include "../../src/kernels/likeliest.cu"

namespace {

template <auto KERNEL>
struct Call;

// Unpacks the arguments of a launch by the kernel's own signature.
template <typename... A, void (*KERNEL)(A...)>
struct Call<KERNEL> {
    static constexpr size_t SIZES[] = {sizeof(A)...};

    static void call(void* const* arguments) { unpack(arguments, std::index_sequence_for<A...>()); }

    template <size_t... I>
    static void unpack(void* const* arguments, std::index_sequence<I...>) {
        KERNEL(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
    }
};

#define KERNEL(NAME) {#NAME, Call<NAME>::call, Call<NAME>::SIZES, std::size(Call<NAME>::SIZES)}

const Kernel ALL[] = {
    KERNEL(embed_f32),    KERNEL(embed_bf16),    KERNEL(rms_norm),       KERNEL(gate),
    KERNEL(matmul_f32_1), KERNEL(matmul_f32_2),  KERNEL(matmul_f32_4),   KERNEL(matmul_f32_8),
    KERNEL(matmul_bf16_8), KERNEL(matmul_bf16_16), KERNEL(matmul_bf16_32),
    KERNEL(rotate_and_append_f32), KERNEL(rotate_and_append_f16),
    KERNEL(attention_f32_32), KERNEL(attention_f32_64), KERNEL(attention_f32_128), KERNEL(attention_f32_256),
    KERNEL(attention_f16_32), KERNEL(attention_f16_64), KERNEL(attention_f16_128), KERNEL(attention_f16_256),
    KERNEL(adapter_down), KERNEL(adapter_up),    KERNEL(cut),            KERNEL(place),
    KERNEL(list_parts),   KERNEL(list_rows),
};

} // namespace

const Kernel* find_kernel(const char* name) {
    for (const Kernel& kernel : ALL) {
        if (std::strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}
