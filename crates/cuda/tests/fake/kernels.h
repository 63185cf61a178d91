// Kernels by name.
#pragma once

#include <cstddef>

struct Kernel {
    const char* name;
    void (*call)(void* const* arguments);
    // Bytes of each argument.
    const size_t* sizes;
    size_t count;
};

// Null where there is none of this name.
const Kernel* find_kernel(const char* name);
