/* Keeps a session's threads asleep while only one is in use.
 *
 * The runtime has no call for that.  Its own operators share work out to all threads, waking them and letting them spin:
 * beside another program, or under a limit, that takes the time of the one that works.  A thread inside one of our
 * loops is neither woken nor given anything to wait for, so the others are held in one, asleep, until they are wanted.
 * A thread of ours takes them there, for a loop returns to its caller when all of it has run.
 *
 * When no operator has run for a while they are let go, and taken again by the next one.  A session that ends waits for
 * its threads: mbq_wake_threads is for the moment before. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "ops.h"

enum { PATIENCE_NS = 20 * 1000 * 1000 };

static struct {
  atomic_uint calls; /* of hold_others: somebody works */
  atomic_bool held;  /* a loop is under way; changed with `mutex` locked, as all that follows */
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  const OrtKernelContext *context; /* good until somebody is inside */
  size_t threads, inside;
  bool awake; /* those inside leave */
} idle = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void sleep_piece(void *data, size_t index) {
  (void)data, (void)index;
  pthread_mutex_lock(&idle.mutex);
  ++idle.inside;
  pthread_cond_broadcast(&idle.changed);
  while (!idle.awake) {
    const unsigned calls = atomic_load(&idle.calls);
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += PATIENCE_NS;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, ++until.tv_sec;
    if (pthread_cond_timedwait(&idle.changed, &idle.mutex, &until) == ETIMEDOUT && atomic_load(&idle.calls) == calls)
      idle.awake = true;
  }
  pthread_cond_broadcast(&idle.changed);
  pthread_mutex_unlock(&idle.mutex);
}

static void *hold(void *data) {
  OrtStatus *status = OrtParallelFor(idle.context, sleep_piece, idle.threads, 0, data);
  if (status != NULL) OrtReleaseStatus(status);
  pthread_mutex_lock(&idle.mutex);
  atomic_store(&idle.held, false);
  pthread_cond_broadcast(&idle.changed);
  pthread_mutex_unlock(&idle.mutex);
  return NULL;
}

void hold_others(const OrtKernelContext *context) {
  atomic_fetch_add_explicit(&idle.calls, 1, memory_order_relaxed);
  if (atomic_load_explicit(&idle.held, memory_order_relaxed)) return;
  pthread_mutex_lock(&idle.mutex);
  idle.threads = threads_if_alone(); /* asked again: who changes it wakes them afterwards */
  pthread_t holder;
  if (!atomic_load(&idle.held) && idle.threads > 1) {
    idle.context = context, idle.inside = 0, idle.awake = false;
    if (pthread_create(&holder, NULL, hold, NULL) == 0) {
      pthread_detach(holder);
      atomic_store(&idle.held, true);
    }
    while (atomic_load(&idle.held) && idle.inside == 0) pthread_cond_wait(&idle.changed, &idle.mutex);
  }
  pthread_mutex_unlock(&idle.mutex);
}

/* Let the sleeping threads go, and wait until they have gone; the next operator may take them again. */
EXPORT void mbq_wake_threads(void) {
  pthread_mutex_lock(&idle.mutex);
  idle.awake = true;
  pthread_cond_broadcast(&idle.changed);
  while (atomic_load(&idle.held)) pthread_cond_wait(&idle.changed, &idle.mutex);
  pthread_mutex_unlock(&idle.mutex);
}
