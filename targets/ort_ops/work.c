/* Sharing work over the session's own threads, and per-thread memory. */
#include <unistd.h>

#include "ops.h"

enum {
  PIECE_BYTES = 24 << 10, /* below about a microsecond of work a launch does not pay */
  PIECES_PER_THREAD = 3,  /* evens out cores of different speed without many launches */
  MAX_THREADS = 64,
  SCRATCH_BYTES = 64 << 10 /* one token's activations up to K = 32768, whatever the group size */
};

size_t pieces_of(int64_t units, int64_t cost) {
  static int64_t most; /* racing first calls store the same value */
  if (most == 0) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    most = PIECES_PER_THREAD * (cores < 1 ? 1 : cores > MAX_THREADS ? MAX_THREADS : cores);
  }
  int64_t pieces = cost / PIECE_BYTES;
  if (pieces > most) pieces = most;
  if (pieces > units) pieces = units;
  return pieces < 1 ? 1 : (size_t)pieces;
}

OrtStatus *parallel(const OrtKernelContext *context, size_t pieces, void (*run)(void *, size_t), void *data) {
  if (pieces > 1) return OrtParallelFor(context, run, pieces, 0, data);
  run(data, 0);
  return NULL;
}

void *thread_scratch(size_t bytes) {
  static _Thread_local _Alignas(64) char scratch[SCRATCH_BYTES];
  return bytes <= sizeof scratch ? scratch : NULL;
}
