// Streams of both libcudas that tests have: work is done one after the other, by a thread of the stream's own. Plain C, which a
// C++ compiler takes too.
#ifndef STREAM_H
#define STREAM_H
#include <pthread.h>
#include <stdlib.h>

struct task {
    void (*work)(void *);
    // Once the stream counts the task as done; or none.
    void (*after)(void *);
    void *argument;
    struct task *next;
};

struct stream {
    // Puts work behind what is there. A pointer, since the fake libnccl is linked with neither libcuda.
    void (*put)(struct stream *stream, void (*work)(void *), void (*after)(void *), void *argument);
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct task *first, *last;
    // Put and not done.
    int pending;
    int is_closed;
};

static inline void *stream_live(void *argument) {
    struct stream *stream = (struct stream *)argument;
    pthread_mutex_lock(&stream->mutex);
    for (;;) {
        while (!stream->first && !stream->is_closed) {
            pthread_cond_wait(&stream->changed, &stream->mutex);
        }
        struct task *task = stream->first;
        if (!task) {
            break;
        }
        stream->first = task->next;
        pthread_mutex_unlock(&stream->mutex);
        task->work(task->argument);
        pthread_mutex_lock(&stream->mutex);
        stream->pending--;
        pthread_cond_broadcast(&stream->changed);
        if (task->after) {
            pthread_mutex_unlock(&stream->mutex);
            task->after(task->argument);
            pthread_mutex_lock(&stream->mutex);
        }
        free(task);
    }
    pthread_mutex_unlock(&stream->mutex);
    free(stream);
    return NULL;
}

static inline void stream_put(struct stream *stream, void (*work)(void *), void (*after)(void *), void *argument) {
    struct task *task = (struct task *)calloc(1, sizeof *task);
    task->work = work;
    task->after = after;
    task->argument = argument;
    pthread_mutex_lock(&stream->mutex);
    *(stream->first ? &stream->last->next : &stream->first) = task;
    stream->last = task;
    stream->pending++;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->mutex);
}

static inline struct stream *stream_open(void) {
    struct stream *stream = (struct stream *)calloc(1, sizeof *stream);
    stream->put = stream_put;
    pthread_mutex_init(&stream->mutex, NULL);
    pthread_cond_init(&stream->changed, NULL);
    pthread_t worker;
    pthread_create(&worker, NULL, stream_live, stream);
    pthread_detach(worker);
    return stream;
}

// As of a real one, it does not wait: what still works on the stream keeps it.
static inline void stream_close(struct stream *stream) {
    pthread_mutex_lock(&stream->mutex);
    stream->is_closed = 1;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->mutex);
}

static inline int stream_is_idle(struct stream *stream) {
    pthread_mutex_lock(&stream->mutex);
    int pending = stream->pending;
    pthread_mutex_unlock(&stream->mutex);
    return pending == 0;
}

static inline void stream_wait(struct stream *stream) {
    pthread_mutex_lock(&stream->mutex);
    while (stream->pending > 0) {
        pthread_cond_wait(&stream->changed, &stream->mutex);
    }
    pthread_mutex_unlock(&stream->mutex);
}
#endif
