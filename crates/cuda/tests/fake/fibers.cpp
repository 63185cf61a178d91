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

typedef float EightRows __attribute__((vector_size(8 * sizeof(float))));

// A product of tensor cores in the making: (16 outputs, 8 rows) += (16 outputs, 16 inputs) · (16 inputs, 8 rows).
struct Product {
    float a[16][16];
    EightRows b[16], sums[16];

    // One input after the other; products of two bf16 are exact.
    void multiply() {
        for (int output = 0; output < 16; output++) {
            for (int k = 0; k < 16; k++) sums[output] += a[output][k] * b[k];
        }
    }
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
    std::vector<Product> products; // two of each warp, as of what lanes give
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
    Warp& meet();
    bool arrive(Warp& warp);
    void wait_for(const Warp& warp);
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

// The warp of this fiber, whose lanes are about to meet.
Warp& Block::meet() {
    Warp& warp = warps[current->index / WARP];
    if (warp.left) fail("a warp meets after one of its lanes has returned");
    return warp;
}

// Whether this is the last lane, and nobody has to wait.
bool Block::arrive(Warp& warp) {
    current->meetings++;
    idle_turns = 0;
    return ++warp.arrivals == current->meetings * WARP;
}

void Block::wait_for(const Warp& warp) {
    const uint64_t all = current->meetings * WARP;
    while (warp.arrivals < all) wait_turn();
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
    const Fiber* self = block.current;
    Warp& warp = block.meet();
    const unsigned lane = self->index % WARP;
    uint32_t* given = warp.given[self->meetings % 2];
    given[lane] = bits;
    block.arrive(warp);
    block.wait_for(warp);
    return given[(lane ^ mask) % WARP];
}

// The fragments of mma.m16n8k16 for bf16, as the PTX ISA lays them out.
void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const Fiber* self = block.current;
    Warp& warp = block.meet();
    Product& product = block.products[self->index / WARP * 2 + self->meetings % 2];
    const unsigned group = self->index % WARP / 4, pair = self->index % 4 * 2;
    const auto first = [](unsigned word) { return __uint_as_float(word << 16); };
    const auto second = [](unsigned word) { return __uint_as_float(word & 0xffff0000u); };
    for (unsigned i = 0; i < 4; i++) {
        float* to = &product.a[group + i % 2 * 8][pair + i / 2 * 8];
        to[0] = first(a[i]);
        to[1] = second(a[i]);
        product.sums[group + i / 2 * 8][pair + i % 2] = sums[i];
    }
    for (unsigned i = 0; i < 2; i++) {
        product.b[pair + i * 8][group] = first(b[i]);
        product.b[pair + i * 8 + 1][group] = second(b[i]);
    }
    if (block.arrive(warp)) product.multiply();
    block.wait_for(warp);
    for (unsigned i = 0; i < 4; i++) sums[i] = product.sums[group + i / 2 * 8][pair + i % 2];
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
    if (block.products.size() < threads / WARP * 2) block.products.resize(threads / WARP * 2);
    block.threads = threads;
    block.arrivals = 0;
    block.left = false;
    block.idle_turns = 0;
    blockIdx = at;
    if (!_setjmp(block.caller)) block.turn_to(block.fibers[0].get());
}
