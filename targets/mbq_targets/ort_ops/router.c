/* Router(x f32 [..., K], avg_bits f32 [1], table f32 [2, T], bias f32 [E-1], norm_gain f32 [E-1]
 *        [, w1 f16 [H, K], b1 f32 [H], w2 f32 [E-1, H]]) -> depth i32 [...]. */

#include "ops.h"

typedef struct Router {
  Node node;
} Router;

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const Node *node = &((const Router *)state)->node;
  Tensor x;
  Routing routing;
  int64_t rows;
  TRY(input(node, context, 0, &x));
  TRY(routing_open(node, context, 1, 5, "x", &x.shape, &routing));
  TRY(check_rows(node, "x", &x.shape, routing.k, &rows));
  Shape shape = x.shape;
  --shape.rank;
  void *depth;
  TRY(output(context, 0, &shape, &depth));
  return route(context, &routing, x.data, rows, depth);
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  Router op = {0};
  TRY(node_init(&op.node, "Router", info));
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  return (void)self, infer_shape(context, 0, 0, ORT_INT32, DROPPED, false);
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
    .GetOutputTypeCount = one_output,
    .GetOutputType = output_type,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShape = infer,
};
