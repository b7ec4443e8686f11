/* Attention over a cache of 8 bits. mbq_export.format.attention defines it. */
#ifndef MBQ_ATTEND_H
#define MBQ_ATTEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Attend {
  int64_t heads, kv_heads, head_dim;
  int64_t past, tokens;                 /* tokens that the cache holds, and those of the pass */
  int64_t window;                       /* tokens that a token sees, itself included; 0: all */
  int64_t rotated;                      /* first numbers of a head that are rotated; 0: none */
  float scale, cap;                     /* of the scores; cap 0: none */
  const float *q, *k, *v;               /* of the first token */
  int64_t q_stride, k_stride, v_stride; /* numbers from token to token */
  const float *cos, *sin;               /* [context, rotated / 2] */
  uint8_t *keys, *values;               /* [kv_heads, room, head_dim + MBQ_KV_SCALE_BYTES] */
  int64_t room;                         /* a multiple of MBQ_KEY_LANES */
  float *y;                             /* [tokens, heads, head_dim] */
} Attend;

/* The threads of an engine. */
typedef struct Crew {
  /* The number of pieces for a job of `units` units and `cost` bytes of work. */
  size_t (*pieces)(int64_t units, int64_t cost);
  /* Run all pieces of a job. */
  void (*share)(struct Crew *crew, size_t pieces, void (*run)(void *data, size_t index), void *data);
} Crew;

/* Put the tokens into the cache, and attend. false: no memory. */
bool attend_run(const Attend *pass, Crew *crew);
#endif
