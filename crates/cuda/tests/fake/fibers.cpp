// Threads of a block as fibers. A fiber gives its turn away only where it waits for others, to the next one of the block;
// so a round of turns is one meeting of a warp. setjmp costs a tenth of swapcontext, which enters the kernel.

#include "fibers.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

thread_local Dim3 threadIdx, blockIdx;

namespace {

constexpr unsigned WARP = 32;
constexpr unsigned THREADS_MAX = 1024; // as of every real device
// A kernel's registers and small arrays, many times over.
constexpr size_t STACK_BYTES = 128 << 10;
// Turns without progress after which nobody can go on: every fiber has had several.
constexpr unsigned IDLE_TURNS_MAX = 8 * THREADS_MAX;

[[noreturn]] void fail(const char* reason) {
    std::fprintf(stderr, "fake libcuda: %s\n", reason);
    std::abort();
}

struct Warp {
    // Those of the meeting that takes place, and of the one before, which slow lanes still read.
    uint32_t given[2][WARP];
    uint64_t arrivals;
    bool left; // a lane has returned
};

struct Fiber {
    jmp_buf context;
    unsigned index;
    Fiber* next;
    Fiber* previous;
    uint64_t meetings, barriers;
};

// The fibers of one thread of the machine; they are kept from block to block.
struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Fiber* current = nullptr;
    jmp_buf caller;
    unsigned threads = 0;
    uint64_t arrivals = 0;
    bool left = false;
    unsigned idle_turns = 0;
    void (*kernel)(void* const*) = nullptr;
    void* const* arguments = nullptr;

    void add_fiber();
    void turn_to(Fiber* next);
    void wait_turn();
    void live();
};

thread_local Block block;
thread_local ucontext_t starter, started;

void start_fiber() { block.live(); }

// A fiber is born here, and comes back whenever a block begins.
void Block::live() {
    Fiber* self = fibers.back().get();
    if (!_setjmp(self->context)) swapcontext(&started, &starter);
    for (;;) {
        kernel(arguments);
        self = current;
        warps[self->index / WARP].left = left = true;
        idle_turns = 0;
        self->previous->next = self->next;
        self->next->previous = self->previous;
        Fiber* next = self->next;
        // The next block begins behind this line.
        if (!_setjmp(self->context)) {
            if (next == self) _longjmp(caller, 1);
            turn_to(next);
        }
    }
}

void Block::add_fiber() {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->index = unsigned(fibers.size() - 1);
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a fiber");
    getcontext(&started);
    started.uc_stack.ss_sp = stack;
    started.uc_stack.ss_size = STACK_BYTES;
    started.uc_link = nullptr;
    makecontext(&started, start_fiber, 0);
    swapcontext(&starter, &started);
}

void Block::turn_to(Fiber* next) {
    current = next;
    threadIdx = {next->index, 0, 0};
    _longjmp(next->context, 1);
}

void Block::wait_turn() {
    if (++idle_turns > IDLE_TURNS_MAX) fail("threads of a block wait for each other for ever");
    Fiber* self = current;
    if (!_setjmp(self->context)) turn_to(self->next);
}

} // namespace

void __syncthreads() {
    if (block.left) fail("__syncthreads after a thread of the block has returned");
    const uint64_t all = ++block.current->barriers * block.threads;
    block.arrivals++;
    block.idle_turns = 0;
    while (block.arrivals < all) block.wait_turn();
}

uint32_t exchange(uint32_t bits, unsigned mask) {
    Fiber* self = block.current;
    Warp& warp = block.warps[self->index / WARP];
    if (warp.left) fail("a warp meets after one of its lanes has returned");
    const unsigned lane = self->index % WARP;
    uint32_t* given = warp.given[self->meetings % 2];
    given[lane] = bits;
    const uint64_t all = ++self->meetings * WARP;
    warp.arrivals++;
    block.idle_turns = 0;
    while (warp.arrivals < all) block.wait_turn();
    return given[(lane ^ mask) % WARP];
}

void __syncwarp() { exchange(0, 0); }

void run_block(Dim3 at, unsigned threads, void (*kernel)(void* const*), void* const* arguments) {
    if (threads == 0 || threads > THREADS_MAX || threads % WARP != 0) fail("a block of no whole warps");
    block.kernel = kernel;
    block.arguments = arguments;
    while (block.fibers.size() < threads) block.add_fiber();
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = *block.fibers[i];
        fiber.next = block.fibers[(i + 1) % threads].get();
        fiber.previous = block.fibers[(i + threads - 1) % threads].get();
        fiber.meetings = fiber.barriers = 0;
    }
    block.warps.assign(threads / WARP, Warp{});
    block.threads = threads;
    block.arrivals = 0;
    block.left = false;
    block.idle_turns = 0;
    blockIdx = at;
    if (!_setjmp(block.caller)) block.turn_to(block.fibers[0].get());
}
