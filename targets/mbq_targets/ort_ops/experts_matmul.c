/* ExpertsMatMul(x f32 [..., M, K] or [..., M, J, K], experts i64 [..., M, J], routed_by f32 [..., M, R],
 *               avg_bits f32 [2], table f32 [2, T], bias f32 [D-1], norm_gain f32 [D-1],
 *               planes_1 u8, ..., planes_D u8, scales u8 [, w1 f16 [H, R], b1 f32 [H], w2 f32 [D-1, H]])
 *     -> y f32 [..., M, J, N / E], depth i32 [..., M].
 *
 * Routes each token, and multiplies its row at that depth by the matrices of its J experts. The weight holds the matrices
 * of all E experts, one below the other. A pass reads those that a token takes. */
#include <stdlib.h>
#include <string.h>

#include "ops.h"

enum {
  X,
  EXPERTS,
  ROUTED_BY,
  ROUTING,
  PLANES = 7,
  SCALES = PLANES + MBQ_DEPTHS,
  HIDDEN,
  INPUTS = HIDDEN + 3
};

typedef struct ExpertsMatMul {
  Node node;
  Weight weight; /* of all experts */
  int64_t count;
} ExpertsMatMul;

/* What one pass computes. A pair is a token and one of its experts. */
typedef struct Pass {
  const ExpertsMatMul *op;
  const Stored *stored;
  const float *x;
  const int32_t *depth; /* by token */
  int64_t pairs, used;  /* `used` experts a token */
  int64_t share;        /* pairs that share a row of x: `used`, or 1 */
  float *y;
} Pass;

/* Multiply the pairs of one expert, whose places are `pairs`. */
static OrtStatus *one_expert(OrtKernelContext *context, const Pass *pass, int64_t expert, const int64_t *pairs,
                             int64_t rows) {
  const ExpertsMatMul *op = pass->op;
  Weight part = op->weight;
  part.n /= op->count, part.blocks /= op->count, part.first = expert * part.blocks;
  if (rows == 1) {
    const int64_t pair = pairs[0];
    return multiply(&op->node, context, &part, pass->stored, pass->x + pair / pass->share * part.k, 1,
                    pass->depth + pair / pass->used, pass->y + pair * part.n);
  }
  float *memory = malloc((size_t)rows * (size_t)(part.k + part.n + 1) * sizeof(float));
  if (memory == NULL) return fail(&op->node, "no memory for %lld rows", (long long)rows);
  float *x = memory, *y = x + rows * part.k;
  int32_t *depth = (int32_t *)(y + rows * part.n);
  for (int64_t i = 0; i < rows; ++i) {
    memcpy(x + i * part.k, pass->x + pairs[i] / pass->share * part.k, (size_t)part.k * sizeof(float));
    depth[i] = pass->depth[pairs[i] / pass->used];
  }
  OrtStatus *status = multiply(&op->node, context, &part, pass->stored, x, rows, depth, y);
  for (int64_t i = 0; status == NULL && i < rows; ++i)
    memcpy(pass->y + pairs[i] * part.n, y + i * part.n, (size_t)part.n * sizeof(float));
  free(memory);
  return status;
}

/* Sort the pairs by expert, and multiply those of each expert together. */
static OrtStatus *every_expert(OrtKernelContext *context, const Pass *pass, const int64_t *experts) {
  const int64_t count = pass->op->count;
  int64_t *memory = calloc((size_t)(count + 1 + pass->pairs), sizeof *memory);
  if (memory == NULL) return fail(&pass->op->node, "no memory for %lld rows", (long long)pass->pairs);
  int64_t *ends = memory, *sorted = memory + count + 1; /* ends[e + 1]: of the pairs of expert e */
  for (int64_t p = 0; p < pass->pairs; ++p) ++ends[experts[p] + 1];
  for (int64_t e = 0; e < count; ++e) ends[e + 1] += ends[e];
  for (int64_t p = pass->pairs; p-- > 0;) sorted[--ends[experts[p] + 1]] = p;
  /* Now ends[e + 1] is where the pairs of expert e begin. */
  OrtStatus *status = NULL;
  for (int64_t e = 0; status == NULL && e < count; ++e) {
    const int64_t begin = ends[e + 1], end = e + 1 < count ? ends[e + 2] : pass->pairs;
    if (begin < end) status = one_expert(context, pass, e, sorted + begin, end - begin);
  }
  free(memory);
  return status;
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const ExpertsMatMul *op = state;
  const Node *node = &op->node;
  const Weight *w = &op->weight;
  Tensor x, experts, by;
  Stored stored;
  Routing routing;
  int64_t rows, routed;
  TRY(input(node, context, X, &x));
  TRY(input(node, context, EXPERTS, &experts));
  TRY(input(node, context, ROUTED_BY, &by));
  TRY(routing_open(node, context, ROUTING, HIDDEN, &by.shape, &routing));
  TRY(weight_open(node, context, PLANES, w, &stored));
  TRY(check_rows(node, "x", &x.shape, w->k, &rows));
  TRY(check_rows(node, "routed_by", &by.shape, routing.k, &routed));
  Shape shape = experts.shape;
  const int64_t pairs = elements(&shape), used = shape.rank > 0 ? shape.dims[shape.rank - 1] : 0;
  if (shape.rank == MAX_RANK || used < 1 || pairs != routed * used || (rows != routed && rows != pairs))
    return fail(node, "x has %lld rows, routed_by %lld and experts %lld: needed as many experts for each row of "
                "routed_by, and as many rows of x as of routed_by or as experts", (long long)rows, (long long)routed,
                (long long)pairs);
  const int64_t *chosen = experts.data;
  for (int64_t p = 0; p < pairs; ++p)
    if (chosen[p] < 0 || chosen[p] >= op->count)
      return fail(node, "expert %lld is not one of %lld", (long long)chosen[p], (long long)op->count);
  --by.shape.rank;
  shape.dims[shape.rank++] = w->n / op->count;
  void *y, *depth;
  TRY(output(context, 0, &shape, &y));
  TRY(output(context, 1, &by.shape, &depth));
  TRY(route(context, &routing, by.data, routed, depth));
  const Pass pass = {.op = op, .stored = &stored, .x = x.data, .depth = depth, .pairs = pairs, .used = used,
                     .share = rows == pairs ? 1 : used, .y = y};
  return every_expert(context, &pass, chosen);
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  ExpertsMatMul op = {0};
  TRY(node_init(&op.node, "ExpertsMatMul", info));
  TRY(weight_init(&op.node, info, PLANES, &op.weight));
  TRY(attribute(&op.node, info, "experts", &op.count));
  if (op.count < 1 || op.weight.n % op.count != 0 || op.weight.n / op.count % MBQ_ROW_BLOCK != 0)
    return fail(&op.node, "N=%lld and %lld experts: N must be that many times a multiple of %d",
                (long long)op.weight.n, (long long)op.count, MBQ_ROW_BLOCK);
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  (void)self;
  int64_t n, count;
  TRY(infer_attribute(context, "N", &n));
  TRY(infer_attribute(context, "experts", &count));
  if (count > 0) TRY(infer_shape(context, EXPERTS, 0, ORT_FLOAT, n / count, true));
  return infer_shape(context, ROUTED_BY, 1, ORT_INT32, DROPPED, false);
}

static const char *name(const OrtCustomOp *self) { return (void)self, "ExpertsMatMul"; }
static size_t input_count(const OrtCustomOp *self) { return (void)self, INPUTS; }
static size_t output_count(const OrtCustomOp *self) { return (void)self, 2; }
static int output_type(const OrtCustomOp *self, size_t index) {
  return (void)self, index == 0 ? ORT_FLOAT : ORT_INT32;
}
static int input_type(const OrtCustomOp *self, size_t index) {
  (void)self;
  if (index == EXPERTS) return ORT_INT64;
  return index == HIDDEN ? ORT_FLOAT16 : index >= PLANES && index <= SCALES ? ORT_UINT8 : ORT_FLOAT;
}
static int input_characteristic(const OrtCustomOp *self, size_t index) {
  return (void)self, index < HIDDEN ? ORT_REQUIRED : ORT_OPTIONAL;
}

const OrtCustomOp mbq_experts_matmul_op = {
    OP_COMMON,
    .GetName = name,
    .GetInputTypeCount = input_count,
    .GetInputType = input_type,
    .GetInputCharacteristic = input_characteristic,
    .GetOutputTypeCount = output_count,
    .GetOutputType = output_type,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShape = infer,
};
