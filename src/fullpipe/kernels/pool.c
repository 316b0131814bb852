/* The threads that share the channels of a product. They wait for the next part of a step for some microseconds, in
   which it mostly comes, and then sleep: a neighbour's stage needs the core. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "native.h"

#define MOST_THREADS 256
#define SPIN_NS 50000

static pthread_mutex_t entered = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t bell = PTHREAD_COND_INITIALIZER;
static atomic_int sleeping, working;
static atomic_ullong call; /* its number, and in the last 16 bits how many threads it is for */
static atomic_long next_part;
static int workers;

static fp_part *part_now;
static void *of_now;
static int64_t count_now;

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void work(int thread) {
    for (long part; (part = atomic_fetch_add(&next_part, 1)) < count_now;) part_now(of_now, part, thread);
}

static unsigned long long call_after(unsigned long long seen) {
    int64_t until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load(&call) != seen) return atomic_load(&call);
            pause_briefly();
        }
    } while (now_ns() < until);
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&sleeping, 1);
    while (atomic_load(&call) == seen) pthread_cond_wait(&bell, &lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&lock);
    return atomic_load(&call);
}

typedef struct { int thread; unsigned long long seen; } beginning;
static beginning beginnings[MOST_THREADS];

static void *worker(void *of) {
    const beginning *own = of;
    for (unsigned long long seen = own->seen;;) {
        seen = call_after(seen);
        if (own->thread >= (int)(seen & 0xffff)) continue;
        work(own->thread);
        atomic_fetch_sub(&working, 1);
    }
    return NULL;
}

/* A child of fork has none of the threads. */
static void forget_all(void) {
    pthread_mutex_init(&entered, NULL), pthread_mutex_init(&lock, NULL), pthread_cond_init(&bell, NULL);
    atomic_store(&sleeping, 0), atomic_store(&working, 0);
    workers = 0;
}

static void grow(int threads) {
    static atomic_int known;
    if (!atomic_exchange(&known, 1)) pthread_atfork(NULL, NULL, forget_all);
    for (; workers < threads - 1; workers++) {
        pthread_t made;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        beginnings[workers] = (beginning){workers + 1, atomic_load(&call)};
        int failed = pthread_create(&made, &attributes, worker, &beginnings[workers]);
        pthread_attr_destroy(&attributes);
        if (failed) return;
    }
}

/* Whoever comes while another's step is under way does its own alone: results are the same. */
int fp_enter(int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&entered)) return 1;
    grow(threads);
    if (workers) return workers + 1 < threads ? workers + 1 : threads;
    pthread_mutex_unlock(&entered);
    return 1;
}

void fp_leave(int threads) {
    if (threads > 1) pthread_mutex_unlock(&entered);
}

void fp_share(int threads, fp_part *part, void *of, int64_t count) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) part(of, i, 0);
        return;
    }
    part_now = part, of_now = of, count_now = count;
    atomic_store(&next_part, 0);
    atomic_store(&working, threads - 1);
    atomic_store(&call, ((atomic_load(&call) >> 16) + 1) << 16 | (unsigned)threads);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&bell);
        pthread_mutex_unlock(&lock);
    }
    work(0);
    for (int tries = 0; atomic_load(&working); tries++) {
        if (tries < 1000) pause_briefly();
        else sched_yield();
    }
}
