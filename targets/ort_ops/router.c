/* Router(x f32 [..., K], avg_bits f32 [1], table f32 [2, T], bias f32 [E-1], norm_gain f32 [E-1]
 *        [, w1 f16 [H, K], b1 f32 [H], w2 f32 [E-1, H]]) -> depth i32 [...].
 *
 * The long sums are a kernel's; the few scalars per token are done here in double precision. */
#include <math.h>
#include <stdlib.h>

#include "ops.h"

enum { LANES = 16, MAX_HIDDEN = 512, K_STEP = 32 };

typedef struct Router {
  Node node;
} Router;

typedef struct Job {
  const float *x, *bias, *gain, *b1, *w2;
  const void *w1;
  int32_t *depth;
  int64_t rows, k, hidden;
  int32_t depths; /* E */
  int32_t fixed;  /* every token's depth when the budget is at an end of the table, else 0 */
  double threshold;
  size_t pieces;
} Job;

/* In four chains: the latency of one alone is a third of a router's time. */
static double row_sum(const float *row) {
  double sum[4] = {0};
  for (int i = 0; i < LANES; ++i) sum[i % 4] += row[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static int32_t depth_of(const Job *job, const float *x) {
  _Alignas(64) float sums[(1 + MAX_HIDDEN) * LANES];
  double active[MAX_HIDDEN];
  CALL(__tvm_ffi_mbq_router_sums, PTR(x), PTR(job->w1), PTR(sums), INT(job->k), INT(job->hidden));
  const double mean_square = row_sum(sums) / (double)job->k + 1e-12;
  const double log_ms = log(mean_square), inverse = 1 / sqrt(mean_square);
  for (int64_t h = 0; h < job->hidden; ++h) {
    const double pre = row_sum(sums + (1 + h) * LANES) * inverse + job->b1[h];
    active[h] = pre / (1 + (double)expf((float)-pre));
  }
  int32_t depth = 1;
  for (; depth < job->depths; ++depth) {
    const int32_t e = depth - 1;
    double score = job->bias[e] + job->gain[e] * log_ms;
    for (int64_t h = 0; h < job->hidden; ++h) score += job->w2[e * job->hidden + h] * active[h];
    if (!(score > job->threshold)) break;
  }
  return depth;
}

static void piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = piece_start(job->rows, job->pieces, index + 1);
  for (int64_t m = piece_start(job->rows, job->pieces, index); m < end; ++m)
    job->depth[m] = job->fixed ? job->fixed : depth_of(job, job->x + m * job->k);
}

/* The threshold for a budget between the table's ends, linear between entries. */
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

static OrtStatus *read_hidden(const Node *node, const OrtKernelContext *context, Job *job) {
  size_t count;
  TRY(OrtGetInputCount(context, &count));
  if (count <= 5) return NULL;
  Tensor w1 = {0}, b1 = {0}, w2 = {0};
  TRY(input(node, context, 5, &w1));
  if (count > 6) TRY(input(node, context, 6, &b1));
  if (count > 7) TRY(input(node, context, 7, &w2));
  if (!w1.present && !b1.present && !w2.present) return NULL;
  if (!w1.present || !b1.present || !w2.present) return fail(node, "w1, b1 and w2 go together");
  const int64_t hidden = w1.shape.rank == 2 ? w1.shape.dims[0] : -1;
  if (hidden < 1 || hidden > MAX_HIDDEN || w1.shape.dims[1] != job->k || elements(&b1.shape) != hidden ||
      elements(&w2.shape) != hidden * (job->depths - 1))
    return fail(node, "w1 must be [H, %lld] with H from 1 to %d, b1 [H], w2 [%d, H]; got H=%lld, b1 of %lld, w2 of %lld",
                (long long)job->k, MAX_HIDDEN, job->depths - 1, (long long)hidden, (long long)elements(&b1.shape),
                (long long)elements(&w2.shape));
  job->w1 = w1.data, job->b1 = b1.data, job->w2 = w2.data, job->hidden = hidden;
  return NULL;
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const Node *node = &((const Router *)state)->node;
  Tensor x, avg_bits, table, bias, gain;
  TRY(input(node, context, 0, &x));
  TRY(input(node, context, 1, &avg_bits));
  TRY(input(node, context, 2, &table));
  TRY(input(node, context, 3, &bias));
  TRY(input(node, context, 4, &gain));
  Job job = {.x = x.data, .bias = bias.data, .gain = gain.data};
  const int64_t more = elements(&bias.shape);
  if (more < 0 || more > 7 || elements(&gain.shape) != more)
    return fail(node, "bias has %lld values and norm_gain %lld: both must have one per depth after the first, at most 7",
                (long long)more, (long long)elements(&gain.shape));
  job.depths = (int32_t)more + 1;
  if (elements(&avg_bits.shape) != 1)
    return fail(node, "avg_bits has %lld values, it must have 1", (long long)elements(&avg_bits.shape));
  if (table.shape.rank != 2 || table.shape.dims[0] != 2 || table.shape.dims[1] < 1)
    return fail(node, "table must be [2, T] with T at least 1, it has %lld values", (long long)elements(&table.shape));
  job.k = x.shape.rank ? x.shape.dims[x.shape.rank - 1] : 0;
  if (job.k < 1 || job.k % K_STEP != 0)
    return fail(node, "the last dimension of x is %lld, it must be a multiple of %d", (long long)job.k, K_STEP);
  TRY(check_rows(node, "x", &x.shape, job.k, &job.rows));
  TRY(read_hidden(node, context, &job));
  const double bits = *(const float *)avg_bits.data;
  const int64_t count = table.shape.dims[1];
  const float *budgets = table.data;
  if (bits <= budgets[0]) job.fixed = 1;
  else if (bits >= budgets[count - 1]) job.fixed = job.depths;
  else job.threshold = count > 1 ? threshold_at(bits, budgets, budgets + count, count) : NAN;
  Shape shape = x.shape;
  --shape.rank;
  void *depth;
  TRY(output(context, &shape, &depth));
  job.depth = depth;
  job.pieces = pieces_of(job.rows, job.fixed ? 0 : job.rows * job.k * (4 + 2 * job.hidden));
  return parallel(context, job.pieces, piece, &job);
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  Router op = {0};
  TRY(node_init(&op.node, "Router", info));
  Router *copy = malloc(sizeof op);
  if (copy == NULL) return fail(&op.node, "no memory");
  *copy = op;
  *kernel = copy;
  return NULL;
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  return (void)self, infer_shape(context, ORT_INT32, -1, false);
}

static const char *name(const OrtCustomOp *self) { return (void)self, "Router"; }
static size_t input_count(const OrtCustomOp *self) { return (void)self, 8; }
static int output_type(const OrtCustomOp *self, size_t index) { return (void)self, (void)index, ORT_INT32; }
static int input_type(const OrtCustomOp *self, size_t index) {
  return (void)self, index == 5 ? ORT_FLOAT16 : ORT_FLOAT;
}
static int input_characteristic(const OrtCustomOp *self, size_t index) {
  return (void)self, index < 5 ? ORT_REQUIRED : ORT_OPTIONAL;
}

const OrtCustomOp mbq_router_op = {
    OP_COMMON,
    .GetName = name,
    .GetInputTypeCount = input_count,
    .GetInputType = input_type,
    .GetInputCharacteristic = input_characteristic,
    .GetOutputType = output_type,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShape = infer,
};
