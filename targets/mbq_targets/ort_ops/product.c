/* The sliced product: it rounds the activations to bytes, then runs kernels on pieces of the matrix. */
#include <stdlib.h>
#include <string.h>

#include "ops.h"

#define GEMV(d) __tvm_ffi_mbq_gemv_d##d,
static const Kernel gemv[] = {MBQ_EACH_DEPTH(GEMV)};
#define MANY(d) {MBQ_MANY(d, 1), MBQ_MANY(d, INT64_MAX)},
static const Kernel many[][2] = {MBQ_EACH_DEPTH(MANY)}; /* for few tokens, and for more */
static const int64_t depth_bits[] = MBQ_DEPTH_BITS;

/* One call. Its pieces share it; a piece is a range of row blocks. Tokens of one depth are neighbours in q, step,
 * total and sums, so the place of a token there is not its row. */
typedef struct Job {
  const Weight *weight;
  const Stored *stored;
  float *y;
  size_t pieces;
  int64_t rows;
  int8_t *q;           /* [K / MBQ_TILE_K, bytes of an activation, rows, MBQ_TILE_K] */
  float *step, *total; /* [rows, groups] */
  int32_t *sums;       /* [rows, groups] */
  /* one token */
  Kernel kernel;
  /* many tokens */
  const float *x;
  size_t quantize_pieces;
  const int32_t *tokens; /* the row of each place */
  int64_t count[MBQ_DEPTHS];
  float *tail; /* [rows, 16]: the last block if N is not a multiple of 16 */
} Job;

static void gemv_blocks(const Job *job, int64_t begin, int64_t end, float *y) {
  CALL(job->kernel, PTR(job->q), PTR(job->step), PTR(job->total), WEIGHT(job->stored), PTR(y),
       INT(job->weight->stored_blocks), INT(job->weight->groups), INT(job->weight->first + begin),
       INT(job->weight->first + end));
}

static void gemv_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t blocks = job->weight->blocks, n = job->weight->n;
  const int64_t begin = piece_start(blocks, job->pieces, index);
  int64_t end = piece_start(blocks, job->pieces, index + 1);
  if (end == blocks && n % MBQ_ROW_BLOCK != 0) {
    float last[MBQ_ROW_BLOCK];
    gemv_blocks(job, --end, blocks, last);
    memcpy(job->y + end * MBQ_ROW_BLOCK, last, (size_t)(n % MBQ_ROW_BLOCK) * sizeof(float));
  }
  if (begin < end) gemv_blocks(job, begin, end, job->y + begin * MBQ_ROW_BLOCK);
}

static void gemm_blocks(const Job *job, uint8_t *scratch, int64_t begin, int64_t end, float *y, int64_t stride) {
  const int64_t groups = job->weight->groups;
  for (int64_t d = 0, place = 0; d < MBQ_DEPTHS; place += job->count[d++])
    if (job->count[d] > 0)
      CALL(many[d][job->count[d] > MBQ_FEW_TOKENS], PTR(job->q + place * MBQ_TILE_K),
           PTR(job->step + place * groups), PTR(job->total + place * groups), WEIGHT(job->stored), PTR(y), PTR(scratch),
           PTR(job->tokens + place), PTR(job->sums + place * groups), INT(job->weight->stored_blocks), INT(groups),
           INT(job->rows), INT(job->weight->first + begin), INT(job->weight->first + end), INT(job->count[d]),
           INT(stride));
}

static void gemm_piece(void *data, size_t index) {
  const Job *job = data;
  _Alignas(64) uint8_t scratch[MBQ_SCRATCH_BYTES];
  const int64_t blocks = job->weight->blocks, n = job->weight->n, pairs = (blocks + 1) / 2;
  const int64_t begin = 2 * piece_start(pairs, job->pieces, index);
  int64_t end = 2 * piece_start(pairs, job->pieces, index + 1);
  if (end > blocks) end = blocks;
  if (end == blocks && n % MBQ_ROW_BLOCK != 0) {
    gemm_blocks(job, scratch, --end, blocks, job->tail, MBQ_ROW_BLOCK);
    for (int64_t m = 0; m < job->rows; ++m)
      memcpy(job->y + m * n + end * MBQ_ROW_BLOCK, job->tail + m * MBQ_ROW_BLOCK, (size_t)(n % MBQ_ROW_BLOCK) * sizeof(float));
  }
  if (begin < end) gemm_blocks(job, scratch, begin, end, job->y + begin * MBQ_ROW_BLOCK, n);
}

static void quantize_row(const Job *job, int64_t row, int64_t place) {
  const int64_t groups = job->weight->groups;
  CALL(__tvm_ffi_mbq_quantize, PTR(job->x + row * job->weight->k), PTR(job->q + place * MBQ_TILE_K),
       PTR(job->step + place * groups), PTR(job->total + place * groups), PTR(job->sums + place * groups), INT(groups),
       INT(job->rows));
}

static void quantize_piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = piece_start(job->rows, job->quantize_pieces, index + 1);
  for (int64_t i = piece_start(job->rows, job->quantize_pieces, index); i < end; ++i)
    quantize_row(job, job->tokens[i], i);
}

static OrtStatus *one_token(OrtKernelContext *context, Job *job, int32_t depth) {
  const Weight *w = job->weight;
  job->kernel = gemv[depth - 1];
  quantize_row(job, 0, 0);
  /* Per group and row: the bits of the planes, a scale and a zero. */
  const int64_t bytes = w->blocks * w->groups * MBQ_ROW_BLOCK * (MBQ_GROUP * depth_bits[depth - 1] / 8 + 2);
  job->pieces = pieces_of(w->blocks, bytes);
  return parallel(context, 1, job->pieces, gemv_piece, job);
}

static OrtStatus *many_tokens(OrtKernelContext *context, Job *job, const int32_t *depth, int32_t *tokens) {
  const Weight *w = job->weight;
  for (int64_t m = 0; m < job->rows; ++m) ++job->count[depth[m] - 1];
  int64_t next[MBQ_DEPTHS] = {0};
  for (int d = 1; d < MBQ_DEPTHS; ++d) next[d] = next[d - 1] + job->count[d - 1];
  for (int64_t m = 0; m < job->rows; ++m) tokens[next[depth[m] - 1]++] = (int32_t)m;
  job->tokens = tokens;
  job->quantize_pieces = pieces_of(job->rows, job->rows * w->k);
  TRY(parallel(context, job->rows, job->quantize_pieces, quantize_piece, job));
  /* The kernel handles row blocks in pairs. */
  job->pieces = pieces_of((w->blocks + 1) / 2, w->blocks * MBQ_ROW_BLOCK * w->k * (job->rows / 2 + 1));
  return parallel(context, job->rows, job->pieces, gemm_piece, job);
}

OrtStatus *multiply(const Node *node, OrtKernelContext *context, const Weight *w, const Stored *stored, const float *x,
                    int64_t rows, const int32_t *depth, float *y) {
  if (rows == 0) return NULL;
  if (rows > INT32_MAX) return fail(node, "x has %lld rows, the most is %d", (long long)rows, INT32_MAX);
  for (int64_t m = 0; m < rows; ++m)
    if (depth[m] < 1 || depth[m] > MBQ_DEPTHS)
      return fail(node, "depth[%lld] is %d, slices %s allow 1 to %d", (long long)m, depth[m], MBQ_SLICES_TEXT,
                  MBQ_DEPTHS);
  Job job = {.weight = w, .stored = stored, .x = x, .y = y, .rows = rows};
  /* One allocation. The parts are in the order of their alignment, the largest first: step, total, sums, tail, tokens, q. */
  const size_t groups = (size_t)(rows * w->groups), extra = rows > 1 ? (size_t)rows : 0;
  const size_t tiles = (size_t)((w->k + MBQ_TILE_K - 1) / MBQ_TILE_K);
  const size_t bytes = groups * 12 + extra * (MBQ_ROW_BLOCK * 4 + 4) + tiles * MBQ_ACTIVATION_BYTES * (size_t)rows * MBQ_TILE_K;
  char *own = NULL, *memory = thread_scratch(bytes);
  if (memory == NULL) memory = own = malloc(bytes);
  if (memory == NULL) return fail(node, "no memory: %zu bytes for %lld rows", bytes, (long long)rows);
  job.step = (float *)memory;
  job.total = job.step + groups;
  job.sums = (int32_t *)(job.total + groups);
  job.tail = (float *)(job.sums + groups);
  int32_t *tokens = (int32_t *)(job.tail + extra * MBQ_ROW_BLOCK);
  job.q = (int8_t *)(tokens + extra);
  OrtStatus *status = rows == 1 ? one_token(context, &job, depth[0]) : many_tokens(context, &job, depth, tokens);
  free(own);
  return status;
}
