/* The depth of each token: the rule, its parameters and their checks.
 *
 * A kernel computes the long sums. This file computes the few scalars of a token in double precision. */
#include <math.h>

#include "ops.h"

typedef struct Job {
  const Routing *routing;
  const float *x;
  int32_t *depth;
  int64_t rows;
  size_t pieces;
} Job;

/* Four sums take turns, which hides the latency of an addition. */
static double row_sum(const float *row) {
  double sum[4] = {0};
  for (int i = 0; i < MBQ_LANES; ++i) sum[i % 4] += row[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static int32_t depth_of(const Routing *by, const float *x) {
  _Alignas(64) float sums[(1 + MBQ_MAX_HIDDEN) * MBQ_LANES];
  double active[MBQ_MAX_HIDDEN];
  CALL(__tvm_ffi_mbq_router_sums, PTR(x), PTR(by->w1), PTR(sums), INT(by->k), INT(by->hidden));
  const double mean_square = row_sum(sums) / (double)by->k + MBQ_MEAN_SQUARE_EPS;
  const double log_ms = log(mean_square), inverse = 1 / sqrt(mean_square);
  for (int64_t h = 0; h < by->hidden; ++h) {
    const double pre = row_sum(sums + (1 + h) * MBQ_LANES) * inverse + by->b1[h];
    active[h] = pre / (1 + (double)expf((float)-pre));
  }
  int32_t depth = 1;
  for (; depth < by->depths; ++depth) {
    const int32_t e = depth - 1;
    double score = by->bias[e] + by->gain[e] * log_ms;
    for (int64_t h = 0; h < by->hidden; ++h) score += by->w2[e * by->hidden + h] * active[h];
    if (!(score > by->threshold)) break;
  }
  return depth;
}

static void piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = piece_start(job->rows, job->pieces, index + 1);
  for (int64_t m = piece_start(job->rows, job->pieces, index); m < end; ++m)
    job->depth[m] = job->routing->fixed ? job->routing->fixed : depth_of(job->routing, job->x + m * job->routing->k);
}

OrtStatus *route(const OrtKernelContext *context, const Routing *routing, const float *x, int64_t rows,
                 int32_t *depth) {
  Job job = {.routing = routing, .x = x, .depth = depth, .rows = rows};
  job.pieces = pieces_of(rows, routing->fixed ? 0 : rows * routing->k * (4 + 2 * routing->hidden));
  return parallel(context, rows, job.pieces, piece, &job);
}

/* The threshold for a budget inside the table, linear between entries. */
static double threshold_at(double bits, const float *budgets, const float *thresholds, int64_t count) {
  int64_t low = 0, high = count - 1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (budgets[middle] <= bits) low = middle;
    else high = middle;
  }
  const double span = (double)budgets[high] - budgets[low];
  return thresholds[low] + ((double)thresholds[high] - thresholds[low]) * ((bits - budgets[low]) / span);
}

static OrtStatus *read_hidden(const Node *node, const OrtKernelContext *context, size_t first, Routing *by) {
  if (node->inputs <= first) return NULL;
  Tensor w1 = {0}, b1 = {0}, w2 = {0};
  TRY(input(node, context, first, &w1));
  TRY(input(node, context, first + 1, &b1));
  TRY(input(node, context, first + 2, &w2));
  if (!w1.present && !b1.present && !w2.present) return NULL;
  if (!w1.present || !b1.present || !w2.present) return fail(node, "w1, b1 and w2 go together");
  const int64_t hidden = w1.shape.rank == 2 ? w1.shape.dims[0] : -1;
  if (hidden < 1 || hidden > MBQ_MAX_HIDDEN || w1.shape.dims[1] != by->k || elements(&b1.shape) != hidden ||
      elements(&w2.shape) != hidden * (by->depths - 1))
    return fail(node, "w1 must be [H, %lld] with H from 1 to %d, b1 [H], w2 [%d, H]; got H=%lld, b1 of %lld, w2 of %lld",
                (long long)by->k, MBQ_MAX_HIDDEN, by->depths - 1, (long long)hidden, (long long)elements(&b1.shape),
                (long long)elements(&w2.shape));
  by->w1 = w1.data, by->b1 = b1.data, by->w2 = w2.data, by->hidden = hidden;
  return NULL;
}

OrtStatus *check_budget(const Node *node, const Tensor *avg_bits) {
  if (elements(&avg_bits->shape) != 2)
    return fail(node, "avg_bits has %lld values, it must have 2", (long long)elements(&avg_bits->shape));
  const double most = ((const float *)avg_bits->data)[1];
  return most >= 1 ? NULL : fail(node, "the deepest depth is %g, it must be at least 1", most);
}

int32_t deepest(const Tensor *avg_bits, int32_t depths) {
  const float most = ((const float *)avg_bits->data)[1];
  return most < (float)depths ? (int32_t)most : depths;
}

OrtStatus *routing_open(const Node *node, const OrtKernelContext *context, size_t first, size_t hidden,
                        const Shape *shape, Routing *by) {
  Tensor avg_bits, table, bias, gain;
  TRY(input(node, context, first, &avg_bits));
  TRY(input(node, context, first + 1, &table));
  TRY(input(node, context, first + 2, &bias));
  TRY(input(node, context, first + 3, &gain));
  *by = (Routing){.bias = bias.data, .gain = gain.data};
  const int64_t more = elements(&bias.shape);
  if (more < 0 || more >= MBQ_CODE_BITS || elements(&gain.shape) != more)
    return fail(node, "bias has %lld values and norm_gain %lld: both must have one per depth after the first, at most 7",
                (long long)more, (long long)elements(&gain.shape));
  by->depths = (int32_t)more + 1;
  TRY(check_budget(node, &avg_bits));
  if (table.shape.rank != 2 || table.shape.dims[0] != 2 || table.shape.dims[1] < 1)
    return fail(node, "table must be [2, T] with T at least 1, it has %lld values", (long long)elements(&table.shape));
  by->k = shape->rank ? shape->dims[shape->rank - 1] : 0;
  if (by->k < 1 || by->k % MBQ_ROUTER_STEP != 0)
    return fail(node, "the last dimension of routed_by is %lld, it must be a multiple of %d", (long long)by->k,
                MBQ_ROUTER_STEP);
  TRY(read_hidden(node, context, hidden, by));
  const double bits = *(const float *)avg_bits.data;
  by->depths = deepest(&avg_bits, by->depths);
  const int64_t count = table.shape.dims[1];
  const float *budgets = table.data;
  if (bits <= budgets[0]) by->fixed = 1;
  else if (bits >= budgets[count - 1]) by->fixed = by->depths;
  else by->threshold = count > 1 ? threshold_at(bits, budgets, budgets + count, count) : NAN;
  return NULL;
}
