// What both fakes know of a stream.
#ifndef STREAM_H
#define STREAM_H
#include <stdatomic.h>

struct stream {
    // Work that was put on it and is not done.
    atomic_int pending;
};
#endif
