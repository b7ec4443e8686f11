/* The library's own threads. */
#ifndef MBQ_POOL_H
#define MBQ_POOL_H

#include <stddef.h>

/* Run the loops that start from now on with this many threads, the caller included. Any thread may call it. */
void pool_set_threads(int threads);
/* That number. 1 before the first call. */
int pool_threads(void);
/* Run all pieces of a loop, at most 65535. */
void pool_run(size_t pieces, void (*run)(void *data, size_t index), void *data);
#endif
