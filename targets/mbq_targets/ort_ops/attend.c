/* Attention over a cache of 8 bits, around the compiled kernel.
 *
 * A group is a head of keys and values with up to GROUP_ROWS of the queries that read it. A chunk is CHUNK_BLOCKS blocks of
 * the context, from a multiple of CHUNK_BLOCKS on. A query gets a state from each chunk, and these are added up in the order
 * of the context. So its result has the same bits for any number of threads, and in a pass of several tokens as alone.
 *
 * Pieces of work are whole groups where there are enough of them. Otherwise, as for one token, they are chunks of groups. */
#pragma STDC FP_CONTRACT OFF /* every machine then stores the same codes */

#include "attend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if MBQ_KV_BITS == 8

enum {
  GROUP_ROWS = 64,
  CHUNK_BLOCKS = 8 * MBQ_ATTEND_TILE,
  LINE_BYTES = 64 /* vectors of states and scratch memory then lie in one line of the cache each */
};

/* Adding this rounds a number of less than 2^22 to a whole one, in its lowest bits. */
static const float rounding = 12582912.0f;

static const float log2_e = 1.44269504f;

typedef struct Job {
  Attend a;
  int64_t sharing;    /* query heads that share a head of keys */
  int64_t rows;       /* queries of a head of keys */
  int64_t padded;     /* that many are computed: several are a multiple of MBQ_ATTEND_ROWS */
  int64_t group;      /* rows of a group; the last of a head may have fewer */
  int64_t per_head;   /* groups of a head of keys */
  int64_t groups;     /* of all heads */
  int64_t first_chunk, chunks; /* that some token sees */
  int64_t block_bytes, head_bytes, state_size;
  float unspread; /* 1 over the factor of a product of two spread rows */
  bool whole;     /* a piece has whole groups */
  float *states;  /* [groups + pieces, group, state_size] if whole, else [groups, chunks, group, state_size] */
  float *scratch; /* [pieces, MBQ_ATTEND_SCRATCH] */
  float *steps;   /* [groups, group] */
  int32_t *sums;  /* [groups, group] */
  int32_t *spans; /* [per_head, group, 2] */
  int8_t *queries; /* [groups, group, MBQ_QUERY_BYTES * head_dim] */
  size_t pieces, enter_pieces, finish_pieces;
} Job;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t part(int64_t units, size_t pieces, size_t index) { return units * (int64_t)index / (int64_t)pieces; }
static int64_t first_seen(const Attend *a, int64_t token) {
  return a->window > 0 ? max(a->past + token + 1 - a->window, 0) : 0;
}

static void plan(Job *job) {
  const Attend *a = &job->a;
  job->sharing = a->heads / a->kv_heads;
  job->rows = a->tokens * job->sharing;
  job->padded = job->rows;
  if (job->rows > MBQ_ATTEND_ROWS) job->padded = (job->rows + MBQ_ATTEND_ROWS - 1) / MBQ_ATTEND_ROWS * MBQ_ATTEND_ROWS;
  job->group = min(job->padded, GROUP_ROWS);
  job->per_head = (job->rows + job->group - 1) / job->group;
  job->groups = a->kv_heads * job->per_head;
  job->first_chunk = first_seen(a, 0) / MBQ_KEY_LANES / CHUNK_BLOCKS;
  job->chunks = (a->past + a->tokens - 1) / MBQ_KEY_LANES / CHUNK_BLOCKS + 1 - job->first_chunk;
  job->block_bytes = MBQ_KEY_LANES * (a->head_dim + MBQ_KV_SCALE_BYTES);
  job->head_bytes = a->room / MBQ_KEY_LANES * job->block_bytes;
  job->state_size = MBQ_STATE_NUMBERS + a->head_dim;
  job->unspread = 1 / (float)(a->head_dim & -a->head_dim);
}

static void *reserve(Job *job) {
  const int64_t rows = job->groups * job->group, spans = 2 * job->per_head * job->group;
  const int64_t places = job->whole ? job->groups + (int64_t)job->pieces : job->groups * job->chunks;
  const int64_t states = places * job->group * job->state_size;
  const int64_t scratch = (int64_t)job->pieces * MBQ_ATTEND_SCRATCH, of_queries = MBQ_QUERY_BYTES * job->a.head_dim;
  const size_t bytes = (size_t)(states + scratch + 2 * rows + spans) * sizeof(float) + (size_t)(rows * of_queries);
  float *memory = aligned_alloc(LINE_BYTES, (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES);
  job->states = memory;
  job->scratch = memory + states;
  job->steps = job->scratch + scratch;
  job->sums = (int32_t *)(job->steps + rows);
  job->spans = job->sums + rows;
  job->queries = (int8_t *)(job->spans + spans);
  return memory;
}

/* The spans of all rows. Rows that fill the last group are zeros, and see what the last one sees. */
static void fill(Job *job) {
  const int64_t rows = job->per_head * job->group, more = rows - job->rows, bytes = MBQ_QUERY_BYTES * job->a.head_dim;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = min(row, job->rows - 1) / job->sharing;
    job->spans[2 * row] = (int32_t)first_seen(&job->a, token);
    job->spans[2 * row + 1] = (int32_t)(job->a.past + token);
  }
  for (int64_t head = 0; head < job->a.kv_heads; ++head) {
    const int64_t first = head * rows + job->rows;
    memset(job->queries + first * bytes, 0, (size_t)(more * bytes));
    memset(job->steps + first, 0, (size_t)more * sizeof(float));
    memset(job->sums + first, 0, (size_t)more * sizeof(int32_t));
  }
}

static void rotate(const Attend *a, const float *restrict x, int64_t token, float *restrict y) {
  const int64_t half = a->rotated / 2;
  const float *restrict cos = a->cos + (a->past + token) * half, *restrict sin = a->sin + (a->past + token) * half;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
    y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
  for (int64_t i = a->rotated; i < a->head_dim; ++i) y[i] = x[i];
}

/* The stored bytes of a row, and their scale. */
static void round_row(const float *restrict x, int64_t count, uint8_t *restrict stored, float *scale) {
  uint32_t largest = 0; /* floats without a sign have the order of their bits */
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float peak;
  memcpy(&peak, &largest, sizeof peak);
  if (!(peak >= MBQ_SMALLEST_ACTIVATION)) peak = 0;
  *scale = peak / 127.0f;
  const float inverse = peak > 0 ? 127.0f / peak : 0;
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * inverse + rounding;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    stored[i] = (uint8_t)(bits + 128);
  }
}

static void enter(const Job *job, int64_t token) {
  const Attend *a = &job->a;
  const int64_t d = a->head_dim, position = a->past + token;
  float x[MBQ_MOST_HEAD_DIM];
  uint8_t stored[MBQ_MOST_HEAD_DIM];
  for (int64_t h = 0; h < a->heads; ++h) {
    const int64_t row = h / job->sharing * job->per_head * job->group + token * job->sharing + h % job->sharing;
    rotate(a, a->q + token * a->q_stride + h * d, token, x);
    CALL(__tvm_ffi_mbq_spread, PTR(x), INT(d));
    CALL(__tvm_ffi_mbq_round_queries, PTR(x), PTR(job->queries + row * MBQ_QUERY_BYTES * d), PTR(job->steps + row),
         PTR(job->sums + row), INT(d));
    job->steps[row] *= a->scale * job->unspread * log2_e;
  }
  const int64_t block = position / MBQ_KEY_LANES * job->block_bytes, lane = position % MBQ_KEY_LANES;
  const int64_t bytes = MBQ_KEY_LANES * MBQ_KV_SCALE_BYTES;
  for (int64_t h = 0; h < a->kv_heads; ++h) {
    uint8_t *keys = a->keys + h * job->head_bytes + block, *values = a->values + h * job->head_bytes + block;
    rotate(a, a->k + token * a->k_stride + h * d, token, x);
    CALL(__tvm_ffi_mbq_spread, PTR(x), INT(d));
    round_row(x, d, stored, (float *)keys + lane);
    for (int64_t i = 0; i < d; i += 4) memcpy(keys + bytes + i * MBQ_KEY_LANES + 4 * lane, stored + i, 4);
    memcpy(x, a->v + token * a->v_stride + h * d, (size_t)d * sizeof(float));
    CALL(__tvm_ffi_mbq_spread, PTR(x), INT(d));
    round_row(x, d, stored, (float *)values + lane);
    for (int64_t i = 0; i < d; ++i) values[bytes + lane / 4 * 4 * d + 4 * i + lane % 4] = stored[i];
  }
}

static float *state_at(const Job *job, int64_t place) { return job->states + place * job->group * job->state_size; }

/* The state that a group gets from a chunk. */
static void attend_chunk(const Job *job, size_t piece, int64_t g, int64_t chunk, float *state) {
  const Attend *a = &job->a;
  const int64_t rows = min(job->group, job->padded - g % job->per_head * job->group);
  memset(state, 0, (size_t)(job->group * job->state_size) * sizeof(float));
  for (int64_t r = 0; r < job->group; ++r) {
    for (int i = 0; i < MBQ_LANES / MBQ_ATTEND_ROWS; ++i) state[r * job->state_size + i] = MBQ_NEVER;
  }
  const int32_t *spans = job->spans + g % job->per_head * job->group * 2;
  const int64_t lowest = spans[0] / MBQ_KEY_LANES, highest = spans[2 * rows - 1] / MBQ_KEY_LANES;
  const int64_t begin = max(chunk * CHUNK_BLOCKS, lowest / MBQ_ATTEND_TILE * MBQ_ATTEND_TILE);
  const int64_t end = min((chunk + 1) * CHUNK_BLOCKS, highest + 1);
  if (begin >= end) return;
  const uint8_t *keys = a->keys + g / job->per_head * job->head_bytes;
  const uint8_t *values = a->values + g / job->per_head * job->head_bytes;
  const float cap = a->cap * log2_e, caps[2] = {cap, cap > 0 ? 1 / cap : 0};
  const int64_t row = g * job->group;
  CALL(__tvm_ffi_mbq_attend, PTR(job->queries + row * MBQ_QUERY_BYTES * a->head_dim), PTR(job->steps + row),
       PTR(job->sums + row), PTR(spans), PTR(keys), PTR(keys), PTR(values), PTR(values), PTR(caps), PTR(state),
       PTR(job->scratch + (int64_t)piece * MBQ_ATTEND_SCRATCH), INT(a->head_dim), INT(rows), INT(begin), INT(end));
}

/* Add the states of a group's queries in the next chunk to those in all chunks before. */
static void merge(const Job *job, float *sum, const float *next) {
  CALL(__tvm_ffi_mbq_merge, PTR(sum), PTR(next), INT(job->a.head_dim), INT(job->group));
}

static void finish(const Job *job, int64_t g) {
  float *states = state_at(job, job->whole ? g : g * job->chunks);
  for (int64_t c = 1; c < job->chunks && !job->whole; ++c) merge(job, states, state_at(job, g * job->chunks + c));
  const int64_t begin = g % job->per_head * job->group, d = job->a.head_dim;
  for (int64_t r = 0; r < min(job->group, job->rows - begin); ++r) {
    const int64_t token = (begin + r) / job->sharing;
    const int64_t head = g / job->per_head * job->sharing + (begin + r) % job->sharing;
    const float *restrict state = states + r * job->state_size;
    float *restrict y = job->a.y + (token * job->a.heads + head) * d;
    float sum = 0;
    for (int i = MBQ_STATE_NUMBERS - MBQ_LANES; i < MBQ_STATE_NUMBERS; ++i) sum += state[i];
    memcpy(y, state + MBQ_STATE_NUMBERS, (size_t)d * sizeof(float));
    CALL(__tvm_ffi_mbq_spread, PTR(y), INT(d));
    for (int64_t i = 0; i < d; ++i) y[i] *= job->unspread / sum;
  }
}

static void enter_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = part(job->a.tokens, job->enter_pieces, index + 1);
  for (int64_t token = part(job->a.tokens, job->enter_pieces, index); token < end; ++token) enter(job, token);
}

static void attend_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t units = job->whole ? job->groups : job->groups * job->chunks, last = part(units, job->pieces, index + 1);
  for (int64_t unit = part(units, job->pieces, index); unit < last; ++unit) {
    if (!job->whole) {
      attend_chunk(job, index, unit / job->chunks, job->first_chunk + unit % job->chunks, state_at(job, unit));
      continue;
    }
    float *sum = state_at(job, unit), *next = state_at(job, job->groups + (int64_t)index);
    attend_chunk(job, index, unit, job->first_chunk, sum);
    for (int64_t c = 1; c < job->chunks; ++c) {
      attend_chunk(job, index, unit, job->first_chunk + c, next);
      merge(job, sum, next);
    }
  }
}

static void finish_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = part(job->groups, job->finish_pieces, index + 1);
  for (int64_t g = part(job->groups, job->finish_pieces, index); g < end; ++g) finish(job, g);
}

bool attend_run(const Attend *pass, Crew *crew) {
  Job job = {.a = *pass};
  plan(&job);
  const int64_t units = job.groups * job.chunks, turns = (job.group + MBQ_ATTEND_ROWS - 1) / MBQ_ATTEND_ROWS;
  const int64_t row_bytes = (pass->heads + 2 * pass->kv_heads) * pass->head_dim * (int64_t)sizeof(float);
  job.pieces = crew->pieces(units, units * CHUNK_BLOCKS * 2 * job.block_bytes * turns);
  job.whole = job.groups >= (int64_t)job.pieces;
  job.enter_pieces = crew->pieces(pass->tokens, pass->tokens * row_bytes);
  job.finish_pieces = crew->pieces(job.groups, pass->tokens * row_bytes);
  void *memory = reserve(&job);
  if (memory == NULL) return false;
  fill(&job);
  crew->share(crew, job.enter_pieces, enter_piece, &job);
  crew->share(crew, job.pieces, attend_piece, &job);
  crew->share(crew, job.finish_pieces, finish_piece, &job);
  free(memory);
  return true;
}
#endif
