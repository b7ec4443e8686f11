/* Divides work among threads, and provides memory for each thread. */
#include <stdatomic.h>
#include <unistd.h>

#include "ops.h"
#include "pool.h"

enum {
  PIECE_BYTES = 24 << 10, /* about a microsecond of work; a launch costs more than a smaller piece */
  SCRATCH_BYTES = 64 << 10 /* activations of one token up to K = 32768, for any group size */
};

static atomic_int in_use, most_in_use; /* threads; 0: not set */

/* Divide work among this many threads from now on: the session's, or for a single token the library's own. The largest
 * number so far counts as all threads that the session has. */
EXPORT void mbq_set_threads(int threads) {
  threads = threads < 1 ? 1 : threads > MBQ_MAX_THREADS ? MBQ_MAX_THREADS : threads;
  if (threads > atomic_load(&most_in_use)) atomic_store(&most_in_use, threads);
  atomic_store(&in_use, threads);
  pool_set_threads(threads);
  if (threads > 1) mbq_wake_threads();
}

size_t threads_if_alone(void) {
  const int most = atomic_load_explicit(&most_in_use, memory_order_relaxed);
  return most > 1 && atomic_load_explicit(&in_use, memory_order_relaxed) == 1 ? (size_t)most : 0;
}

static int64_t most_pieces(void) {
  const int threads = atomic_load_explicit(&in_use, memory_order_relaxed);
  /* With no more pieces than threads, the session's other threads get none. */
  if (threads > 0 && threads < atomic_load_explicit(&most_in_use, memory_order_relaxed)) return threads;
  static int64_t processors; /* simultaneous first calls store the same value */
  if (threads == 0 && processors == 0) {
    const long found = sysconf(_SC_NPROCESSORS_ONLN);
    processors = found < 1 ? 1 : found > MBQ_MAX_THREADS ? MBQ_MAX_THREADS : found;
  }
  return MBQ_PIECES_PER_THREAD * (threads > 0 ? threads : processors);
}

size_t pieces_of(int64_t units, int64_t cost) {
  const int64_t most = most_pieces();
  int64_t pieces = cost / PIECE_BYTES;
  if (pieces > most) pieces = most;
  if (pieces > units) pieces = units;
  return pieces < 1 ? 1 : (size_t)pieces;
}

OrtStatus *parallel(const OrtKernelContext *context, int64_t rows, size_t pieces, void (*run)(void *, size_t), void *data) {
  if (threads_if_alone() > 0) hold_others(context);
  /* ONNX Runtime's threads sleep between the short loops of a token. Those of a prompt share them with its own operators. */
  if (pieces > 1 && (rows > 1 || atomic_load_explicit(&in_use, memory_order_relaxed) == 0))
    return OrtParallelFor(context, run, pieces, 0, data);
  pool_run(pieces, run, data);
  return NULL;
}

void *thread_scratch(size_t bytes) {
  static _Thread_local _Alignas(64) char scratch[SCRATCH_BYTES];
  return bytes <= sizeof scratch ? scratch : NULL;
}
