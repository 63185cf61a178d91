// Runs one block of a kernel: its threads are fibers of this thread, which take turns where they meet.
#pragma once

#include "shim.h"

// Calls `kernel(arguments)` once for each of the block's `threads`, a multiple of the warp's 32.
void run_block(Dim3 block, unsigned threads, void (*kernel)(void* const*), void* const* arguments);
