/* The threads that share the parts of a step with the one that calls.

   Nobody waits for a thread that has taken nothing: where the system has no core for it, the caller does all the parts.
   A thread that finds none looks again for some microseconds, in which the next ones mostly come, and lets others run
   meanwhile; then it sleeps, for a neighbour's stage needs the core. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "native.h"

#define MOST_THREADS 256
#define MOST_PARTS 0xffffff
#define LOOKS_NS 50000
#define WORTH_NS 15000 /* less work than this is done before anybody has woken up */

static pthread_mutex_t entered = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t bell = PTHREAD_COND_INITIALIZER;
static int workers;
static atomic_int sleeping;

/* Calls come one after the other. In one word, so that a thread that comes late takes nothing of another call: number
   of the call, threads that it is for, and parts that nobody has taken. The rest changes only while no part is left. */
static atomic_ullong call;
static atomic_llong done;
static fp_part *part_now;
static void *of_now;
static int64_t count_now;

static void pause_briefly(void) {
#if defined(__x86_64__)
    for (int i = 0; i < 16; i++) __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int is_for(unsigned long long of, int thread) { return (of & MOST_PARTS) && thread < (int)(of >> 24 & 0xff) + 1; }

static void work(int thread) {
    for (unsigned long long now = atomic_load(&call); is_for(now, thread);) {
        if (!atomic_compare_exchange_weak(&call, &now, now - 1)) continue;
        part_now(of_now, count_now - (int64_t)(now & MOST_PARTS), thread);
        atomic_fetch_add(&done, 1);
        now = atomic_load(&call);
    }
}

static void wait_for_parts(int thread) {
    int64_t until = now_ns() + LOOKS_NS;
    do {
        for (int i = 0; i < 4; i++) {
            if (is_for(atomic_load(&call), thread)) return;
            pause_briefly();
        }
        sched_yield();
    } while (now_ns() < until);
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&sleeping, 1);
    while (!is_for(atomic_load(&call), thread)) pthread_cond_wait(&bell, &lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&lock);
}

static void *worker(void *number) {
    for (int thread = (int)(intptr_t)number;;) {
        wait_for_parts(thread);
        work(thread);
    }
    return NULL;
}

/* A child of fork has none of the threads. */
static void forget_all(void) {
    pthread_mutex_init(&entered, NULL), pthread_mutex_init(&lock, NULL), pthread_cond_init(&bell, NULL);
    atomic_store(&sleeping, 0);
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
        int failed = pthread_create(&made, &attributes, worker, (void *)(intptr_t)(workers + 1));
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

void fp_share(int threads, fp_part *part, void *of, int64_t count, double ns) {
    if (threads <= 1 || count <= 1 || count > MOST_PARTS || ns < WORTH_NS) {
        for (int64_t i = 0; i < count; i++) part(of, i, 0);
        return;
    }
    part_now = part, of_now = of, count_now = count;
    atomic_store(&done, 0);
    unsigned long long next = (atomic_load(&call) >> 32) + 1;
    atomic_store(&call, next << 32 | (unsigned long long)(threads - 1) << 24 | (unsigned long long)count);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&bell);
        pthread_mutex_unlock(&lock);
    }
    work(0);
    for (int looks = 0; atomic_load(&done) < count; looks++) {
        pause_briefly();
        if (looks > 20) sched_yield();
    }
}
