// A libcuda for tests: a device whose memory is the host's and whose kernels run on the CPU, in the order of their stream. A
// launch returns at once, and so waits for no peer that work of the tests' libnccl before it waits for.
//
// What a real driver would punish late or never is refused at once, with a line on standard error: copies beyond an
// allocation, freed memory, unknown functions, blocks of a wrong size, graphs that are no chain, memory and graphs that are still
// there when the context goes. Fresh memory is filled with NaN, and stands between zones that a kernel must not write.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "fibers.h"
#include "kernels.h"

#include "../../../collective/tests/fakes/stream.h"

using Result = int;
using Address = unsigned long long;
using Handle = void*;
using Stream = struct stream*;

namespace {

constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_READY = 600;
constexpr int ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, ATTRIBUTE_MEMORY_POOLS = 115;
// The same twice, but that the second says that it is of 2018.
constexpr int DEVICES = 2, OLD_DEVICE = 1;
constexpr size_t DEVICE_BYTES = size_t(4) << 30;
constexpr size_t ALIGNMENT = 256, ZONE_BYTES = 256;
constexpr unsigned char FRESH = 0xff, ZONE = 0xa5;
// A grid of fewer threads is not worth sharing out.
constexpr unsigned SHARED_THREADS_MIN = 1 << 14;

std::mutex lock;
std::map<Address, size_t> allocations; // bytes by address
size_t allocated_bytes = 0;
std::atomic<uint64_t> allocations_made = 0, launches_made = 0, bytes_to_host = 0, copies_to_device = 0;
std::atomic<uint64_t> graphs_made = 0, graph_launches_made = 0;
std::atomic<bool> has_room_for_graphs = true;
std::atomic<int> frees_to_come = 0;
std::atomic<int> contexts = 0;
// Pages of the host, and copies of them that are under way.
struct Locked {
    size_t bytes;
    int copies;
};
std::map<uintptr_t, Locked> locked; // by address
char context_handle;
thread_local Handle current_context = nullptr;

Result refuse(const char* what, Result result = INVALID_VALUE) {
    std::fprintf(stderr, "fake libcuda: %s\n", what);
    return result;
}

bool zone_is_whole(const unsigned char* zone) {
    return std::all_of(zone, zone + ZONE_BYTES, [](unsigned char byte) { return byte == ZONE; });
}

// Whether a run of bytes lies in one living allocation.
bool is_inside(Address address, size_t bytes) {
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return false;
    auto [start, size] = *std::prev(after);
    return address - start + bytes <= size;
}

// The locked pages that a run of bytes of the host lies in; null: in none.
Locked* pages_of(const void* address, size_t bytes) {
    auto after = locked.upper_bound(uintptr_t(address));
    if (after == locked.begin()) return nullptr;
    auto& [start, pages] = *std::prev(after);
    return uintptr_t(address) - start + bytes <= pages.bytes ? &pages : nullptr;
}

Result allocate(Address* address, size_t bytes) {
    std::lock_guard guard(lock);
    if (bytes == 0) return refuse("an allocation of no bytes");
    if (allocated_bytes + bytes > DEVICE_BYTES) return OUT_OF_MEMORY;
    size_t room = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + 2 * ZONE_BYTES;
    auto* memory = static_cast<unsigned char*>(std::aligned_alloc(ALIGNMENT, room));
    std::memset(memory, ZONE, room);
    std::memset(memory + ZONE_BYTES, FRESH, bytes);
    *address = Address(uintptr_t(memory + ZONE_BYTES));
    allocations[*address] = bytes;
    allocated_bytes += bytes;
    allocations_made++;
    return SUCCESS;
}

Result release(Address address) {
    std::lock_guard guard(lock);
    auto found = allocations.find(address);
    if (found == allocations.end()) return refuse("memory is freed that is none, or was freed before");
    auto* memory = reinterpret_cast<unsigned char*>(uintptr_t(address)) - ZONE_BYTES;
    if (!zone_is_whole(memory) || !zone_is_whole(memory + ZONE_BYTES + found->second)) {
        refuse("a kernel wrote beside an allocation");
        std::abort();
    }
    allocated_bytes -= found->second;
    allocations.erase(found);
    std::free(memory);
    return SUCCESS;
}

// A thread of the machine, which keeps its fibers from launch to launch and ends with the process.
class Helper {
  public:
    void begin(std::function<void()> task) {
        if (!thread.joinable()) thread = std::thread([this] { live(); });
        std::lock_guard guard(mutex);
        work = std::move(task);
        changed.notify_all();
    }

    void wait() {
        std::unique_lock guard(mutex);
        changed.wait(guard, [this] { return !work; });
    }

  private:
    void live() {
        std::unique_lock guard(mutex);
        for (;;) {
            changed.wait(guard, [this] { return bool(work); });
            guard.unlock();
            work();
            guard.lock();
            work = nullptr;
            changed.notify_all();
        }
    }

    std::thread thread;
    std::mutex mutex;
    std::condition_variable changed;
    std::function<void()> work;
};

// Kernels of all streams take turns.
void run_blocks(const Kernel* kernel, const unsigned (&grid)[3], unsigned threads, void* const* arguments) {
    static std::mutex device;
    static Helper* helpers = new Helper[2]; // never destroyed: their threads wait in them
    std::lock_guard guard(device);
    const uint64_t plane = uint64_t(grid[0]) * grid[1], blocks = plane * grid[2];
    std::atomic<uint64_t> next{0};
    auto work = [&] {
        for (uint64_t i; (i = next++) < blocks;) {
            Dim3 at{unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]), unsigned(i / plane)};
            run_block(at, threads, kernel->call, arguments);
        }
    };
    const bool is_shared = blocks * threads >= SHARED_THREADS_MIN;
    helpers[0].begin(work);
    if (is_shared) helpers[1].begin(work);
    helpers[0].wait();
    if (is_shared) helpers[1].wait();
}

// A kernel on its way through a stream, with the arguments that it was launched with.
struct Launch {
    const Kernel* kernel;
    unsigned grid[3];
    unsigned threads;
    std::vector<std::vector<unsigned char>> values;

    void run() {
        std::vector<void*> arguments;
        for (auto& value : values) arguments.push_back(value.data());
        run_blocks(kernel, grid, threads, arguments.data());
    }
};

// Null, with the reason in `result`, for what no device could run. Arguments are copied.
Launch* make_launch(Handle function, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared_bytes,
                    void* const* arguments, Result* result) {
    *result = INVALID_VALUE;
    if (!current_context) return refuse("a launch without a context"), nullptr;
    if (std::count(grid, grid + 3, 0) > 0 || grid[1] > 65535 || grid[2] > 65535) return refuse("an impossible grid"), nullptr;
    if (block[1] != 1 || block[2] != 1 || shared_bytes != 0) return refuse("a block that the kernels do not know"), nullptr;
    *result = SUCCESS;
    const auto* kernel = static_cast<const Kernel*>(function);
    auto* launch = new Launch{kernel, {grid[0], grid[1], grid[2]}, block[0], {}};
    for (size_t i = 0; i < kernel->count; i++) {
        const auto* bytes = static_cast<const unsigned char*>(arguments[i]);
        launch->values.emplace_back(bytes, bytes + kernel->sizes[i]);
    }
    return launch;
}

// Launches in their order, which is that of a graph whose every node waits for the one before.
using Chain = std::vector<std::shared_ptr<Launch>>;
struct Graph {
    Chain nodes;
};
struct Executable {
    Chain nodes;
};
std::set<Handle> graphs, executables;

void run_chain(void* argument) {
    std::unique_ptr<Chain> chain(static_cast<Chain*>(argument));
    for (auto& launch : *chain) launch->run();
}

bool is_one_of(const std::set<Handle>& handles, Handle handle) {
    std::lock_guard guard(lock);
    return handles.count(handle) > 0;
}

void run_launch(void* launch) { std::unique_ptr<Launch>(static_cast<Launch*>(launch))->run(); }

// A copy from or to locked pages on its way through a stream.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    Locked* pages;
};

void run_copy(void* argument) {
    std::unique_ptr<Copy> copy(static_cast<Copy*>(argument));
    std::memcpy(copy->to, copy->from, copy->bytes);
    std::lock_guard guard(lock);
    copy->pages->copies--;
}

// Locked pages of the host are read and written in their turn. Other memory is at once, when the stream is done with what it has.
void copy(void* to, const void* from, size_t bytes, const void* host, Stream stream) {
    std::unique_lock guard(lock);
    if (Locked* pages = pages_of(host, bytes)) {
        pages->copies++;
        stream_put(stream, run_copy, nullptr, new Copy{to, from, bytes, pages});
        return;
    }
    guard.unlock();
    stream_wait(stream);
    std::memcpy(to, from, bytes);
}

// Whether the device has so many bytes there.
bool is_there(Address address, size_t bytes) {
    std::lock_guard guard(lock);
    return is_inside(address, bytes);
}

void run_release(void* address) {
    if (release(Address(uintptr_t(address))) != SUCCESS) std::abort();
    frees_to_come--;
}

} // namespace

extern "C" {

uint64_t fake_allocations() { return allocations_made; }

uint64_t fake_allocated_bytes() {
    std::lock_guard guard(lock);
    return allocated_bytes;
}

uint64_t fake_launches() { return launches_made; }
uint64_t fake_bytes_to_host() { return bytes_to_host; }
uint64_t fake_copies_to_device() { return copies_to_device; }
uint64_t fake_graphs_made() { return graphs_made; }
uint64_t fake_graph_launches() { return graph_launches_made; }

// Graphs that can be launched.
uint64_t fake_graphs() {
    std::lock_guard guard(lock);
    return executables.size();
}

// From now on there is room for graphs, or there is none, in turn; whether there is.
uint64_t fake_toggle_room_for_graphs() { return has_room_for_graphs = !has_room_for_graphs; }

Result cuInit(unsigned) { return SUCCESS; }

Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

Result cuDeviceGetCount(int* count) {
    *count = DEVICES;
    return SUCCESS;
}

Result cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < DEVICES ? SUCCESS : INVALID_DEVICE;
}

Result cuDeviceGetName(char* name, int bytes, int) {
    std::snprintf(name, size_t(bytes), "a CPU that stands in for a GPU");
    return SUCCESS;
}

Result cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = DEVICE_BYTES;
    return SUCCESS;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    const auto [major, minor] = device == OLD_DEVICE ? std::pair{7, 5} : std::pair{9, 0};
    *value = attribute == ATTRIBUTE_MAJOR ? major : attribute == ATTRIBUTE_MINOR ? minor : attribute == ATTRIBUTE_MEMORY_POOLS;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(Handle* context, int) {
    contexts++;
    *context = &context_handle;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRelease_v2(int) {
    if (--contexts > 0) return SUCCESS;
    while (frees_to_come > 0) std::this_thread::yield();
    std::lock_guard guard(lock);
    // Another thread may have come for it meanwhile, and what is there is its own: it allocates under the lock, later.
    if (contexts > 0) return SUCCESS;
    if (!allocations.empty()) {
        refuse("the context goes, and memory is still there");
        std::abort();
    }
    if (!locked.empty()) {
        refuse("the context goes, and pages of the host are still locked");
        std::abort();
    }
    if (!graphs.empty() || !executables.empty()) {
        refuse("the context goes, and graphs are still there");
        std::abort();
    }
    return SUCCESS;
}

Result cuCtxSetCurrent(Handle context) {
    current_context = context;
    return SUCCESS;
}

Result cuCtxGetCurrent(Handle* context) {
    *context = current_context;
    return SUCCESS;
}

Result cuStreamCreate(Stream* stream, unsigned) {
    *stream = stream_open();
    return SUCCESS;
}

Result cuStreamDestroy_v2(Stream stream) {
    stream_close(stream);
    return SUCCESS;
}

Result cuStreamSynchronize(Stream stream) {
    stream_wait(stream);
    return SUCCESS;
}

Result cuStreamQuery(Stream stream) { return stream_is_idle(stream) ? SUCCESS : NOT_READY; }

Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    *free = DEVICE_BYTES - allocated_bytes;
    *total = DEVICE_BYTES;
    return SUCCESS;
}

Result cuMemAlloc_v2(Address* address, size_t bytes) { return allocate(address, bytes); }
Result cuMemFree_v2(Address address) { return release(address); }
Result cuMemAllocAsync(Address* address, size_t bytes, Stream) { return allocate(address, bytes); }

Result cuMemFreeAsync(Address address, Stream stream) {
    frees_to_come++;
    stream_put(stream, run_release, nullptr, reinterpret_cast<void*>(uintptr_t(address)));
    return SUCCESS;
}

Result cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    std::lock_guard guard(lock);
    if (bytes == 0) return refuse("no bytes to lock");
    *address = std::malloc(bytes);
    std::memset(*address, FRESH, bytes);
    locked[uintptr_t(*address)] = {bytes, 0};
    allocations_made++;
    return SUCCESS;
}

Result cuMemFreeHost(void* address) {
    std::lock_guard guard(lock);
    auto found = locked.find(uintptr_t(address));
    if (found == locked.end()) return refuse("pages are freed that were not locked, or were freed before");
    if (found->second.copies > 0) {
        refuse("pages are freed that a copy is under way from or to");
        std::abort();
    }
    locked.erase(found);
    std::free(address);
    return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream stream) {
    if (!is_there(to, bytes)) return refuse("a copy to the device beyond an allocation");
    copy(reinterpret_cast<void*>(uintptr_t(to)), from, bytes, from, stream);
    copies_to_device++;
    return SUCCESS;
}

Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream stream) {
    if (!is_there(from, bytes)) return refuse("a copy from the device beyond an allocation");
    copy(to, reinterpret_cast<const void*>(uintptr_t(from)), bytes, to, stream);
    bytes_to_host += bytes;
    return SUCCESS;
}

Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream stream) {
    if (!is_there(to, bytes) || !is_there(from, bytes)) return refuse("a copy within the device beyond an allocation");
    stream_wait(stream);
    std::memcpy(reinterpret_cast<void*>(uintptr_t(to)), reinterpret_cast<const void*>(uintptr_t(from)), bytes);
    return SUCCESS;
}

Result cuModuleLoadData(Handle* module, const void*) {
    *module = &context_handle;
    return SUCCESS;
}

Result cuModuleUnload(Handle) { return SUCCESS; }

Result cuModuleGetFunction(Handle* function, Handle, const char* name) {
    const Kernel* kernel = find_kernel(name);
    if (!kernel) return refuse("no kernel of this name", NOT_FOUND);
    *function = const_cast<Kernel*>(kernel);
    return SUCCESS;
}

Result cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments, void**) {
    Result result;
    Launch* launch =
        make_launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, arguments, &result);
    if (!launch) return result;
    launches_made++;
    stream_put(stream, run_launch, nullptr, launch);
    return SUCCESS;
}

Result cuGraphCreate(Handle* graph, unsigned flags) {
    if (flags != 0) return refuse("flags of a graph that must be 0");
    *graph = new Graph;
    std::lock_guard guard(lock);
    graphs.insert(*graph);
    return SUCCESS;
}

// CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h.
struct KernelNode {
    Handle function;
    unsigned grid[3], block[3], shared_bytes;
    void** arguments;
    void** extra;
    Handle kernel, context;
};

Result cuGraphAddKernelNode_v2(Handle* node, Handle graph, const Handle* before, size_t count, const KernelNode* wanted) {
    if (!is_one_of(graphs, graph)) return refuse("a node for no graph");
    Chain& nodes = static_cast<Graph*>(graph)->nodes;
    if (count != (nodes.empty() ? 0 : 1) || (count == 1 && before[0] != nodes.back().get())) {
        return refuse("a node that does not wait for the one before it");
    }
    if (wanted->extra || wanted->kernel || wanted->context) return refuse("a node of a kind that nobody here uses");
    Result result;
    Launch* launch =
        make_launch(wanted->function, wanted->grid, wanted->block, wanted->shared_bytes, wanted->arguments, &result);
    if (!launch) return result;
    nodes.emplace_back(launch);
    *node = launch;
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(Handle* executable, Handle graph, unsigned long long flags) {
    if (!is_one_of(graphs, graph) || flags != 0) return refuse("no graph, or flags that must be 0");
    if (!has_room_for_graphs) return OUT_OF_MEMORY;
    *executable = new Executable{static_cast<Graph*>(graph)->nodes};
    graphs_made++;
    std::lock_guard guard(lock);
    executables.insert(*executable);
    return SUCCESS;
}

Result cuGraphLaunch(Handle executable, Stream stream) {
    if (!current_context) return refuse("a launch without a context");
    if (!is_one_of(executables, executable)) return refuse("a launch of no graph");
    graph_launches_made++;
    stream_put(stream, run_chain, nullptr, new Chain(static_cast<Executable*>(executable)->nodes));
    return SUCCESS;
}

Result cuGraphExecDestroy(Handle executable) {
    std::lock_guard guard(lock);
    if (executables.erase(executable) == 0) return refuse("a graph is destroyed that is none, or was before");
    delete static_cast<Executable*>(executable);
    return SUCCESS;
}

Result cuGraphDestroy(Handle graph) {
    std::lock_guard guard(lock);
    if (graphs.erase(graph) == 0) return refuse("a graph is destroyed that is none, or was before");
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}

Result cuGetErrorName(Result result, const char** name) {
    *name = result == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_FAKE";
    return SUCCESS;
}

Result cuGetErrorString(Result, const char** text) {
    *text = "refused by the tests' libcuda";
    return SUCCESS;
}

} // extern "C"
