// A libcuda.so.1 without a GPU: one device, whose memory is the host's. It runs no kernels; the only work on a
// stream is what the fake libnccl puts there.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "stream.h"

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_READY = 600 };
enum { MEMORY_BYTES_MAX = 1 << 30 };

typedef unsigned long long Address;

static char context;
static _Thread_local void *current;

int cuInit(unsigned flags) {
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = 1;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    if (ordinal != 0) {
        return INVALID_DEVICE;
    }
    *device = 0;
    return SUCCESS;
}

// Of all attributes, cudarc wants to know whether there are memory pools: there are none.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)attribute;
    (void)device;
    *value = 0;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **retained, int device) {
    (void)device;
    *retained = &context;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return SUCCESS;
}

int cuCtxSetCurrent(void *bound) {
    current = bound;
    return SUCCESS;
}

int cuCtxGetCurrent(void **bound) {
    *bound = current;
    return SUCCESS;
}

int cuStreamCreate(struct stream **stream, unsigned flags) {
    (void)flags;
    *stream = stream_open();
    return SUCCESS;
}

int cuStreamQuery(struct stream *stream) {
    return stream_is_idle(stream) ? SUCCESS : NOT_READY;
}

int cuStreamSynchronize(struct stream *stream) {
    stream_wait(stream);
    return SUCCESS;
}

int cuStreamDestroy_v2(struct stream *stream) {
    stream_close(stream);
    return SUCCESS;
}

int cuMemAlloc_v2(Address *address, size_t bytes) {
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (bytes > MEMORY_BYTES_MAX) {
        return OUT_OF_MEMORY;
    }
    void *memory = malloc(bytes);
    // Nobody may count on zeros.
    memset(memory, 0xa5, bytes);
    *address = (Address)(uintptr_t)memory;
    return SUCCESS;
}

int cuMemFree_v2(Address address) {
    free((void *)(uintptr_t)address);
    return SUCCESS;
}

// Copies of ordinary host memory wait for what the stream has before them.
int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, struct stream *stream) {
    cuStreamSynchronize(stream);
    memcpy((void *)(uintptr_t)to, from, bytes);
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, struct stream *stream) {
    cuStreamSynchronize(stream);
    memcpy(to, (const void *)(uintptr_t)from, bytes);
    return SUCCESS;
}

int cuGetErrorName(int code, const char **name) {
    (void)code;
    *name = "FAKE_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == INVALID_DEVICE ? "invalid device ordinal" : "an error of the fake libcuda";
    return SUCCESS;
}
