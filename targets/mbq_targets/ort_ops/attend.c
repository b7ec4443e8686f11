/* Attention over a cache of 8 bits, around the compiled kernel.
 *
 * A group is a head of keys and values with up to GROUP_ROWS of the queries that read it. Pieces divide the blocks of all
 * groups equally, so one token's work is divided along the context. Each piece has states of its own, and the last step adds
 * them up. */
#pragma STDC FP_CONTRACT OFF /* every machine then stores the same codes */

#include "attend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if MBQ_KV_BITS == 8

enum { GROUP_ROWS = 64 };

/* Adding this rounds a number of less than 2^22 to a whole one, in its lowest bits. */
static const float rounding = 12582912.0f;

typedef struct Job {
  Attend a;
  int64_t sharing;    /* query heads that share a head of keys */
  int64_t rows;       /* queries of a head of keys */
  int64_t group;      /* rows of a group, padded */
  int64_t per_head;   /* groups of a head of keys */
  int64_t groups;     /* of all heads */
  int64_t begin, end; /* blocks of positions that some token sees */
  int64_t block_bytes, head_bytes, state_size, tile_size;
  float *queries; /* [groups, group, head_dim] */
  float *states;  /* [pieces + groups - 1, group, state_size] */
  float *tiles;   /* [pieces, tile_size] */
  int32_t *spans; /* [per_head, group, 2] */
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
  const int64_t padded = (a->tokens * a->heads / a->kv_heads + MBQ_ATTEND_ROWS - 1) / MBQ_ATTEND_ROWS * MBQ_ATTEND_ROWS;
  job->sharing = a->heads / a->kv_heads;
  job->rows = a->tokens * job->sharing;
  job->group = job->rows <= MBQ_ATTEND_ROWS ? job->rows : min(padded, GROUP_ROWS);
  job->per_head = (job->rows + job->group - 1) / job->group;
  job->groups = a->kv_heads * job->per_head;
  job->begin = first_seen(a, 0) / MBQ_KEY_LANES;
  job->end = (a->past + a->tokens - 1) / MBQ_KEY_LANES + 1;
  job->block_bytes = MBQ_KEY_LANES * (a->head_dim + MBQ_KV_SCALE_BYTES);
  job->head_bytes = a->room / MBQ_KEY_LANES * job->block_bytes;
  job->state_size = MBQ_STATE_NUMBERS + a->head_dim;
  job->tile_size = job->group > MBQ_ATTEND_ROWS ? 2 * MBQ_TILE_BLOCKS * MBQ_KEY_LANES * a->head_dim : 0;
}

static void *reserve(Job *job) {
  const int64_t queries = job->groups * job->group * job->a.head_dim, tiles = (int64_t)job->pieces * job->tile_size;
  const int64_t states = ((int64_t)job->pieces + job->groups - 1) * job->group * job->state_size;
  const int64_t spans = 2 * job->per_head * job->group;
  float *memory = malloc((size_t)(queries + states + tiles) * sizeof(float) + (size_t)spans * sizeof(int32_t));
  job->queries = memory;
  job->states = memory + queries;
  job->tiles = job->states + states;
  job->spans = (int32_t *)(job->tiles + tiles);
  return memory;
}

/* The spans of all rows. Rows that fill the last group are zeros, and see what the last one sees. */
static void fill(Job *job) {
  const int64_t rows = job->per_head * job->group, d = job->a.head_dim;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = min(row, job->rows - 1) / job->sharing;
    job->spans[2 * row] = (int32_t)first_seen(&job->a, token);
    job->spans[2 * row + 1] = (int32_t)(job->a.past + token);
  }
  for (int64_t head = 0; head < job->a.kv_heads; ++head)
    memset(job->queries + (head * rows + job->rows) * d, 0, (size_t)((rows - job->rows) * d) * sizeof(float));
}

static void rotate(const Attend *a, const float *restrict x, int64_t token, float scale, float *restrict y) {
  const int64_t half = a->rotated / 2;
  const float *restrict cos = a->cos + (a->past + token) * half, *restrict sin = a->sin + (a->past + token) * half;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = (x[i] * cos[i] - x[half + i] * sin[i]) * scale;
    y[half + i] = (x[half + i] * cos[i] + x[i] * sin[i]) * scale;
  }
  for (int64_t i = a->rotated; i < a->head_dim; ++i) y[i] = x[i] * scale;
}

/* Codes of a row, `step` bytes apart, and their scale. */
static void round_row(const float *restrict x, int64_t count, int64_t step, int8_t *restrict codes, float *scale) {
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
    codes[i * step] = (int8_t)(uint8_t)bits;
  }
}

static void enter(const Job *job, int64_t token) {
  const Attend *a = &job->a;
  const int64_t d = a->head_dim, position = a->past + token;
  for (int64_t h = 0; h < a->heads; ++h) {
    const int64_t row = h / job->sharing * job->per_head * job->group + token * job->sharing + h % job->sharing;
    rotate(a, a->q + token * a->q_stride + h * d, token, a->scale, job->queries + row * d);
  }
  const int64_t block = position / MBQ_KEY_LANES * job->block_bytes, lane = position % MBQ_KEY_LANES;
  const int64_t codes = MBQ_KEY_LANES * MBQ_KV_SCALE_BYTES;
  for (int64_t h = 0; h < a->kv_heads; ++h) {
    uint8_t *keys = a->keys + h * job->head_bytes + block, *values = a->values + h * job->head_bytes + block;
    float turned[MBQ_MOST_HEAD_DIM];
    rotate(a, a->k + token * a->k_stride + h * d, token, 1, turned);
    round_row(turned, d, MBQ_KEY_LANES, (int8_t *)keys + codes + lane, (float *)keys + lane);
    round_row(a->v + token * a->v_stride + h * d, d, 1, (int8_t *)values + codes + lane * d, (float *)values + lane);
  }
}

/* Piece p and group g meet at most once, and from one meeting to the next, p or g or both grow. So p + g is a place of its
 * own. */
static float *state_of(const Job *job, size_t piece, int64_t group) {
  return job->states + ((int64_t)piece + group) * job->group * job->state_size;
}

static void attend_group(const Job *job, size_t piece, int64_t g, int64_t begin, int64_t end) {
  const Attend *a = &job->a;
  float *state = state_of(job, piece, g);
  memset(state, 0, (size_t)(job->group * job->state_size) * sizeof(float));
  for (int64_t r = 0; r < job->group; ++r) state[r * job->state_size] = MBQ_NEVER;
  const int32_t *spans = job->spans + g % job->per_head * job->group * 2;
  begin = max(begin, spans[0] / MBQ_KEY_LANES);
  end = min(end, spans[2 * job->group - 1] / MBQ_KEY_LANES + 1);
  if (begin >= end) return;
  const uint8_t *keys = a->keys + g / job->per_head * job->head_bytes;
  const uint8_t *values = a->values + g / job->per_head * job->head_bytes;
  const float caps[2] = {a->cap, a->cap > 0 ? 1 / a->cap : 0};
  CALL(__tvm_ffi_mbq_attend, PTR(job->queries + g * job->group * a->head_dim), PTR(spans), PTR(keys), PTR(keys),
       PTR(values), PTR(values), PTR(caps), PTR(state), PTR(job->tiles + (int64_t)piece * job->tile_size),
       INT(a->head_dim), INT(job->group), INT(begin), INT(end));
}

static void finish(const Job *job, int64_t g) {
  const int64_t blocks = job->end - job->begin, units = job->groups * blocks, d = job->a.head_dim;
  size_t first = 0, last = job->pieces - 1;
  while (part(units, job->pieces, first + 1) <= g * blocks) ++first;
  while (part(units, job->pieces, last) >= (g + 1) * blocks) --last;
  const int64_t begin = g % job->per_head * job->group;
  for (int64_t r = 0; r < min(job->group, job->rows - begin); ++r) {
    const int64_t at = r * job->state_size, token = (begin + r) / job->sharing;
    const int64_t head = g / job->per_head * job->sharing + (begin + r) % job->sharing;
    float *restrict y = job->a.y + (token * job->a.heads + head) * d;
    float peak = MBQ_NEVER, sum = 0;
    for (size_t p = first; p <= last; ++p) peak = fmaxf(peak, state_of(job, p, g)[at]);
    for (size_t p = first; p <= last; ++p) {
      const float *restrict state = state_of(job, p, g) + at;
      const float weight = first == last ? 1 : expf(state[0] - peak);
      for (int i = MBQ_STATE_NUMBERS - MBQ_LANES; i < MBQ_STATE_NUMBERS; ++i) sum += weight * state[i];
      for (int64_t i = 0; i < d; ++i) y[i] = (p == first ? 0 : y[i]) + weight * state[MBQ_STATE_NUMBERS + i];
    }
    for (int64_t i = 0; i < d; ++i) y[i] /= sum;
  }
}

static void enter_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = part(job->a.tokens, job->enter_pieces, index + 1);
  for (int64_t token = part(job->a.tokens, job->enter_pieces, index); token < end; ++token) enter(job, token);
}

static void attend_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t blocks = job->end - job->begin, units = job->groups * blocks, last = part(units, job->pieces, index + 1);
  for (int64_t at = part(units, job->pieces, index); at < last;) {
    const int64_t g = at / blocks, end = min(last, (g + 1) * blocks);
    attend_group(job, index, g, job->begin + at - g * blocks, job->begin + end - g * blocks);
    at = end;
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
  const int64_t units = job.groups * (job.end - job.begin), turns = (job.group + MBQ_ATTEND_ROWS - 1) / MBQ_ATTEND_ROWS;
  const int64_t row_bytes = (pass->heads + 2 * pass->kv_heads) * pass->head_dim * (int64_t)sizeof(float);
  job.pieces = crew->pieces(units, units * 2 * job.block_bytes * turns);
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
