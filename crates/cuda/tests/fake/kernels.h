// Kernels by name.
#pragma once

struct Kernel {
    const char* name;
    void (*call)(void* const* arguments);
};

// Null where there is none of this name.
const Kernel* find_kernel(const char* name);
