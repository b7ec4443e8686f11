/* Keeps the threads of a session asleep while only one is in use.
 *
 * ONNX Runtime has no call for that. Its own operators divide work among all threads, so all of them wake and spin. Beside
 * another program, or under a limit of processor time, they then slow down the thread that works. ONNX Runtime does not
 * wake a thread that is inside one of our parallel loops. So the other threads run such a loop, which sleeps until they
 * are needed. A thread of this library starts the loop, because a loop returns only when all of its pieces are done.
 *
 * When no operator has run for PATIENCE_NS, the loop ends. The next operator starts it again. A session waits for its
 * threads when it ends: call mbq_wake_threads before that. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "ops.h"

enum { PATIENCE_NS = 20 * 1000 * 1000 };

static struct {
  atomic_uint calls; /* counts calls of hold_others */
  atomic_bool held;  /* the loop runs; changed only with `mutex` locked, as all fields below */
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  const OrtKernelContext *context; /* valid until a thread is inside the loop */
  size_t threads, inside;
  bool awake; /* the threads inside must leave */
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
  idle.threads = threads_if_alone(); /* read with the lock: a thread that changes it calls mbq_wake_threads after */
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

/* End the loop, and wait until its threads have left. The next operator may start it again. */
EXPORT void mbq_wake_threads(void) {
  pthread_mutex_lock(&idle.mutex);
  idle.awake = true;
  pthread_cond_broadcast(&idle.changed);
  while (atomic_load(&idle.held)) pthread_cond_wait(&idle.changed, &idle.mutex);
  pthread_mutex_unlock(&idle.mutex);
}
