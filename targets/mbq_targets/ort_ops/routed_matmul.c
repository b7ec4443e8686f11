/* RoutedMatMul(x f32 [..., M', K], routed_by f32 [..., M, R], avg_bits f32 [2], table f32 [2, T], bias f32 [E-1],
 *              norm_gain f32 [E-1], planes_1 u8, ..., planes_E u8, scales u8 [, w1 f16 [H, R], b1 f32 [H], w2 f32 [E-1, H]])
 *     -> y f32 [..., M', N], depth i32 [..., M].
 *
 * Routes each token and multiplies its row at that depth. M' is M, or less if only the last rows are wanted. All M tokens
 * are routed. */

#include "ops.h"

enum { X, ROUTED_BY, ROUTING, PLANES = 6, SCALES = PLANES + MBQ_DEPTHS, HIDDEN, INPUTS = HIDDEN + 3 };

typedef struct RoutedMatMul {
  Node node;
  Weight weight;
} RoutedMatMul;

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const RoutedMatMul *op = state;
  const Node *node = &op->node;
  const Weight *w = &op->weight;
  Tensor x, by;
  Stored stored;
  Routing routing;
  int64_t rows, routed;
  TRY(input(node, context, X, &x));
  TRY(input(node, context, ROUTED_BY, &by));
  TRY(routing_open(node, context, ROUTING, HIDDEN, &by.shape, &routing));
  TRY(weight_open(node, context, PLANES, w, &stored));
  TRY(check_rows(node, "x", &x.shape, w->k, &rows));
  TRY(check_rows(node, "routed_by", &by.shape, routing.k, &routed));
  const int64_t sequence = by.shape.rank > 1 ? by.shape.dims[by.shape.rank - 2] : 1;
  if (rows != routed && (rows > routed || routed != sequence))
    return fail(node, "x has %lld rows and routed_by %lld: needed as many, or fewer in a batch of one", (long long)rows,
                (long long)routed);
  --by.shape.rank;
  x.shape.dims[x.shape.rank - 1] = w->n;
  void *y, *depth;
  TRY(output(context, 0, &x.shape, &y));
  TRY(output(context, 1, &by.shape, &depth));
  TRY(route(context, &routing, by.data, routed, depth));
  return multiply(node, context, w, &stored, x.data, rows, (const int32_t *)depth + (routed - rows), y);
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  RoutedMatMul op = {0};
  TRY(node_init(&op.node, "RoutedMatMul", info));
  TRY(weight_init(&op.node, info, PLANES, &op.weight));
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  (void)self;
  int64_t n;
  TRY(infer_attribute(context, "N", &n));
  TRY(infer_shape(context, X, 0, ORT_FLOAT, n, false));
  return infer_shape(context, ROUTED_BY, 1, ORT_INT32, DROPPED, false);
}

static const char *name(const OrtCustomOp *self) { return (void)self, "RoutedMatMul"; }
static size_t input_count(const OrtCustomOp *self) { return (void)self, INPUTS; }
static size_t output_count(const OrtCustomOp *self) { return (void)self, 2; }
static int output_type(const OrtCustomOp *self, size_t index) {
  return (void)self, index == 0 ? ORT_FLOAT : ORT_INT32;
}
static int input_type(const OrtCustomOp *self, size_t index) {
  return (void)self, index == HIDDEN ? ORT_FLOAT16 : index >= PLANES && index <= SCALES ? ORT_UINT8 : ORT_FLOAT;
}
static int input_characteristic(const OrtCustomOp *self, size_t index) {
  return (void)self, index < HIDDEN ? ORT_REQUIRED : ORT_OPTIONAL;
}

const OrtCustomOp mbq_routed_matmul_op = {
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
