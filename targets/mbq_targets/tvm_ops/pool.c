/* The threads a decoder's parallel loops run on.
 *
 * TVM's own pool gives every thread a fixed share and waits for all of them: where another program keeps a core, each
 * of a token's hundred loops waits for a thread that does not run.  Here pieces are taken one by one by whoever runs,
 * the calling thread among them, and nobody waits for a thread that has taken none. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { MAX_THREADS = 64, PIECES_PER_THREAD = 3 };

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
enum { SPINS = 3000 }; /* about a tenth of a millisecond: longer than what lies between two loops */
#else
#define PAUSE() __asm__ volatile("yield")
enum { SPINS = 30000 };
#endif

typedef struct Environment {
  void *sync_handle;
  int32_t num_task;
} Environment;
typedef int (*Body)(int task, Environment *environment, void *data);

/* Which loop, how many pieces it has, and how many are taken: one word, so that taking one is one exchange. */
typedef uint64_t Ticket;
#define TICKET(loop, count, next) ((Ticket)(uint32_t)(loop) << 32 | (Ticket)(count) << 16 | (Ticket)(next))
#define COUNT(ticket) ((int)((ticket) >> 16 & 0xffff))
#define NEXT(ticket) ((int)((ticket)&0xffff))

static struct {
  _Atomic Ticket ticket;
  atomic_int done, failed, sleepers, threads;
  Body body; /* with data: of the ticket's loop, and unchanged until all its pieces are done */
  void *data;
  uint32_t loop;
  int started;
  pthread_mutex_t busy, mutex;
  pthread_cond_t wake;
} pool = {.threads = 1, .busy = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

extern void *__TVMBackendParallelLaunch; /* what compiled loops call through; the loader sets it to TVM's */

/* Take a piece and run it; false when there is none. */
static bool run_one(void) {
  Ticket ticket = atomic_load(&pool.ticket);
  do
    if (NEXT(ticket) >= COUNT(ticket)) return false;
  while (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1));
  Environment environment = {NULL, COUNT(ticket)};
  if (pool.body(NEXT(ticket), &environment, pool.data) != 0) atomic_store(&pool.failed, 1);
  atomic_fetch_add(&pool.done, 1);
  return true;
}

static bool waiting(void) {
  const Ticket ticket = atomic_load(&pool.ticket);
  return NEXT(ticket) < COUNT(ticket);
}

static void *work(void *index) {
  for (;;) {
    const bool wanted = (intptr_t)index < atomic_load(&pool.threads);
    if (wanted && run_one()) continue;
    bool found = false;
    for (int spin = 0; wanted && !found && spin < SPINS; ++spin) {
      PAUSE();
      found = waiting();
    }
    if (found) continue;
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleepers, 1);
    if (!waiting() || !wanted) pthread_cond_wait(&pool.wake, &pool.mutex);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.mutex);
  }
  return NULL;
}

static int launch(Body body, void *data, int tasks) {
  (void)tasks;
  const int threads = atomic_load(&pool.threads), count = threads * PIECES_PER_THREAD;
  if (threads == 1 || pthread_mutex_trylock(&pool.busy) != 0) { /* busy: another engine's loop; this one goes alone */
    Environment environment = {NULL, 1};
    return body(0, &environment, data);
  }
  pool.body = body, pool.data = data;
  atomic_store(&pool.done, 0);
  atomic_store(&pool.failed, 0);
  atomic_store(&pool.ticket, TICKET(++pool.loop, count, 0));
  if (atomic_load(&pool.sleepers) > 0) {
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
  }
  while (run_one()) continue;
  while (atomic_load(&pool.done) < count) PAUSE();
  const int failed = atomic_load(&pool.failed);
  pthread_mutex_unlock(&pool.busy);
  return failed ? -1 : 0;
}

/* Run loops on this many threads, the caller's among them: loops that start from now on.  First called once the
 * library is loaded, by one thread; later by any, with no higher number. */
EXPORT void mbq_set_threads(int threads) {
  threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
  for (; pool.started < threads - 1; ++pool.started) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void *)(intptr_t)(pool.started + 1)) != 0) break;
    pthread_detach(thread);
  }
  atomic_store(&pool.threads, pool.started + 1 < threads ? pool.started + 1 : threads);
  __TVMBackendParallelLaunch = (void *)launch;
}
