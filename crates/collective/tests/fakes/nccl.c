// A libnccl.so.2 whose ranks are threads of one process, and whose device memory is the host's. Non-blocking communicators
// only. It is as unforgiving as the real one, or more: what is begun is on no stream until its result was asked for,
// functions refuse a communicator that is not ready, and messages of different lengths wait for ever.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stream.h"

enum { SUCCESS = 0, INTERNAL = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };
enum { RANKS_MAX = 8, ID_BYTES = 128, UINT8 = 1 };
// So many answers say "in progress" before anything begins.
enum { SLOW_ANSWERS = 2 };

// Settings of fake_nccl_set.
enum { QUIET_ABORTS, HANG_LAUNCH, FAIL_LAUNCH, LIVING, SETTINGS };

struct id {
    char bytes[ID_BYTES];
};

struct config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

struct letter {
    const void *bytes;
    size_t count;
    int there;
};

// The ranks that share an id. Worlds stay until the process ends.
struct world {
    char id[ID_BYTES];
    int size, present, finalized, quiet;
    int gone[RANKS_MAX];
    struct letter letters[RANKS_MAX][RANKS_MAX];
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct world *next;
};

struct transfer {
    int peer, is_send, is_posted, is_done;
    void *address;
    size_t count;
};

enum phase { JOINING, READY, STARTING, LEAVING };

struct comm {
    struct world *world;
    int rank, answers, error, aborted, launches;
    enum phase phase;
    // What is begun, and on no stream yet.
    struct launch *begun;
    // On the stream, and not done.
    int open;
    struct stream *stream;
};

// What a group of calls began, as one.
struct launch {
    struct comm *comm;
    int number, count;
    struct transfer transfers[2 * RANKS_MAX];
};

static struct world *worlds;
static pthread_mutex_t worlds_mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_int settings[SETTINGS];
static _Thread_local int depth;
static _Thread_local struct launch *grouped;

// What tests may ask for; returns what the setting was.
int fake_nccl_set(int setting, int value) {
    return atomic_exchange(&settings[setting], value);
}

// Communicators that were neither aborted nor destroyed.
int fake_nccl_living(void) {
    return atomic_load(&settings[LIVING]);
}

int ncclGetVersion(int *version) {
    *version = 22809;
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    return code == REMOTE ? "remote process exited or there was a network error" : "an error of the fake libnccl";
}

const char *ncclGetLastError(struct comm *comm) {
    return comm && comm->error == INTERNAL ? "injected by a test" : "";
}

int ncclGetUniqueId(struct id *id) {
    static atomic_int ids;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, ID_BYTES, "fake %d", atomic_fetch_add(&ids, 1));
    return SUCCESS;
}

static struct world *find_world(const struct id *id, int size) {
    pthread_mutex_lock(&worlds_mutex);
    struct world *world = worlds;
    while (world && memcmp(world->id, id->bytes, ID_BYTES) != 0) {
        world = world->next;
    }
    if (!world) {
        world = calloc(1, sizeof *world);
        memcpy(world->id, id->bytes, ID_BYTES);
        world->size = size;
        world->quiet = atomic_load(&settings[QUIET_ABORTS]);
        pthread_mutex_init(&world->mutex, NULL);
        pthread_cond_init(&world->changed, NULL);
        world->next = worlds;
        worlds = world;
    }
    pthread_mutex_unlock(&worlds_mutex);
    return world;
}

int ncclCommInitRankConfig(struct comm **made, int size, struct id id, int rank, const struct config *config) {
    if (size < 1 || size > RANKS_MAX || rank < 0 || rank >= size) {
        return INVALID_ARGUMENT;
    }
    if (config->size < sizeof *config || config->magic != 0xcafebeef || config->version < 21400 || config->blocking) {
        return INVALID_ARGUMENT;
    }
    struct world *world = find_world(&id, size);
    if (world->size != size) {
        return INVALID_USAGE;
    }
    struct comm *comm = calloc(1, sizeof *comm);
    comm->world = world;
    comm->rank = rank;
    comm->answers = SLOW_ANSWERS;
    pthread_mutex_lock(&world->mutex);
    world->present++;
    pthread_mutex_unlock(&world->mutex);
    atomic_fetch_add(&settings[LIVING], 1);
    *made = comm;
    return IN_PROGRESS;
}

// One step of a send or receive, under the world's mutex; whether there was one to make.
static int advance(struct comm *comm, struct transfer *transfer) {
    struct world *world = comm->world;
    if (transfer->is_send) {
        struct letter *letter = &world->letters[comm->rank][transfer->peer];
        if (!transfer->is_posted && !letter->there) {
            *letter = (struct letter){transfer->address, transfer->count, 1};
            transfer->is_posted = 1;
            pthread_cond_broadcast(&world->changed);
            return 1;
        }
        if (transfer->is_posted && !letter->there) {
            transfer->is_done = 1;
            return 1;
        }
    } else {
        struct letter *letter = &world->letters[transfer->peer][comm->rank];
        if (letter->there && letter->count == transfer->count) {
            memcpy(transfer->address, letter->bytes, letter->count);
            letter->there = 0;
            transfer->is_done = 1;
            pthread_cond_broadcast(&world->changed);
            return 1;
        }
    }
    return 0;
}

// The "kernel": ends when all transfers are done, or with an abort.
static void work(void *argument) {
    struct launch *launch = argument;
    struct comm *comm = launch->comm;
    struct world *world = comm->world;
    int hangs = launch->number == atomic_load(&settings[HANG_LAUNCH]);
    pthread_mutex_lock(&world->mutex);
    while (!comm->aborted) {
        int waits = hangs, moved = 0;
        for (int index = 0; index < launch->count && !hangs; index++) {
            struct transfer *transfer = &launch->transfers[index];
            if (!transfer->is_done) {
                moved |= advance(comm, transfer);
            }
            if (!transfer->is_done) {
                waits = 1;
                if (world->gone[transfer->peer] && !world->quiet) {
                    comm->error = REMOTE;
                }
            }
        }
        if (!waits) {
            break;
        }
        if (!moved) {
            pthread_cond_wait(&world->changed, &world->mutex);
        }
    }
    pthread_mutex_unlock(&world->mutex);
}

static void count_down(void *argument) {
    struct launch *launch = argument;
    // The communicator may be gone as soon as the count is; worlds stay.
    struct world *world = launch->comm->world;
    pthread_mutex_lock(&world->mutex);
    launch->comm->open--;
    pthread_cond_broadcast(&world->changed);
    pthread_mutex_unlock(&world->mutex);
    free(launch);
}

static void start_work(struct comm *comm) {
    struct launch *launch = comm->begun;
    comm->begun = NULL;
    launch->number = ++comm->launches;
    pthread_mutex_lock(&comm->world->mutex);
    if (launch->number == atomic_load(&settings[FAIL_LAUNCH])) {
        comm->error = INTERNAL;
    }
    comm->open++;
    pthread_mutex_unlock(&comm->world->mutex);
    comm->stream->put(comm->stream, work, count_down, launch);
}

int ncclCommGetAsyncError(struct comm *comm, int *status) {
    struct world *world = comm->world;
    *status = IN_PROGRESS;
    if (comm->answers > 0) {
        comm->answers--;
        return SUCCESS;
    }
    if (comm->phase == STARTING) {
        start_work(comm);
        comm->phase = READY;
    }
    pthread_mutex_lock(&world->mutex);
    int waits = (comm->phase == JOINING && world->present < world->size) ||
                (comm->phase == LEAVING && (world->finalized < world->size || comm->open > 0));
    *status = comm->error ? comm->error : waits ? IN_PROGRESS : SUCCESS;
    if (comm->phase == JOINING && !waits) {
        comm->phase = READY;
    }
    pthread_mutex_unlock(&world->mutex);
    return SUCCESS;
}

int ncclGroupStart(void) {
    depth++;
    grouped = NULL;
    return SUCCESS;
}

static int add(int is_send, void *address, size_t count, int type, int peer, struct comm *comm, struct stream *stream) {
    if (depth == 0 || comm->phase != READY || type != UINT8) {
        return INVALID_USAGE;
    }
    if (peer < 0 || peer >= comm->world->size || !address || count == 0) {
        return INVALID_ARGUMENT;
    }
    if (!grouped) {
        grouped = calloc(1, sizeof *grouped);
        grouped->comm = comm;
    }
    comm->stream = stream;
    grouped->transfers[grouped->count++] =
        (struct transfer){.peer = peer, .is_send = is_send, .address = address, .count = count};
    return SUCCESS;
}

int ncclSend(const void *address, size_t count, int type, int peer, struct comm *comm, struct stream *stream) {
    return add(1, (void *)address, count, type, peer, comm, stream);
}

int ncclRecv(void *address, size_t count, int type, int peer, struct comm *comm, struct stream *stream) {
    return add(0, address, count, type, peer, comm, stream);
}

int ncclGroupEnd(void) {
    if (--depth != 0 || !grouped) {
        return depth < 0 ? INVALID_USAGE : SUCCESS;
    }
    struct comm *comm = grouped->comm;
    comm->begun = grouped;
    comm->phase = STARTING;
    comm->answers = SLOW_ANSWERS;
    grouped = NULL;
    return IN_PROGRESS;
}

// Nothing of the rank is left for the others.
static void go(struct comm *comm) {
    struct world *world = comm->world;
    pthread_mutex_lock(&world->mutex);
    comm->aborted = 1;
    pthread_cond_broadcast(&world->changed);
    while (comm->open > 0) {
        pthread_cond_wait(&world->changed, &world->mutex);
    }
    for (int peer = 0; peer < world->size; peer++) {
        world->letters[comm->rank][peer].there = 0;
    }
    world->gone[comm->rank] = 1;
    pthread_cond_broadcast(&world->changed);
    pthread_mutex_unlock(&world->mutex);
    free(comm->begun);
    free(comm);
    atomic_fetch_sub(&settings[LIVING], 1);
}

int ncclCommFinalize(struct comm *comm) {
    if (comm->phase != READY) {
        return INVALID_USAGE;
    }
    pthread_mutex_lock(&comm->world->mutex);
    comm->world->finalized++;
    comm->phase = LEAVING;
    pthread_mutex_unlock(&comm->world->mutex);
    return IN_PROGRESS;
}

int ncclCommDestroy(struct comm *comm) {
    if (comm->phase != LEAVING) {
        return INVALID_USAGE;
    }
    go(comm);
    return SUCCESS;
}

int ncclCommAbort(struct comm *comm) {
    go(comm);
    return SUCCESS;
}
