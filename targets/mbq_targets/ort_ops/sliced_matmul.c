/* SlicedMatMul(x f32 [..., K], depth i32 [...], planes u8, scales f16) -> y f32 [..., N]. */

#include "ops.h"

typedef struct MatMul {
  Node node;
  Weight weight;
} MatMul;

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const MatMul *op = state;
  const Node *node = &op->node;
  Tensor x, depth;
  Stored stored;
  TRY(input(node, context, 0, &x));
  TRY(input(node, context, 1, &depth));
  TRY(weight_open(node, context, 2, &op->weight, &stored));
  int64_t rows;
  TRY(check_rows(node, "x", &x.shape, op->weight.k, &rows));
  if (elements(&depth.shape) != rows)
    return fail(node, "depth has %lld values, x has %lld rows", (long long)elements(&depth.shape), (long long)rows);
  x.shape.dims[x.shape.rank - 1] = op->weight.n;
  void *y;
  TRY(output(context, 0, &x.shape, &y));
  return multiply(node, context, &op->weight, &stored, x.data, rows, depth.data, y);
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  MatMul op = {0};
  TRY(node_init(&op.node, "SlicedMatMul", info));
  TRY(weight_init(&op.node, info, 2, &op.weight));
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  (void)self;
  int64_t n;
  TRY(infer_attribute(context, "N", &n));
  return infer_shape(context, 0, 0, ORT_FLOAT, n, false);
}

static const char *name(const OrtCustomOp *self) { return (void)self, "SlicedMatMul"; }
static size_t input_count(const OrtCustomOp *self) { return (void)self, 4; }
static int output_type(const OrtCustomOp *self, size_t index) { return (void)self, (void)index, ORT_FLOAT; }
static int input_type(const OrtCustomOp *self, size_t index) {
  static const int types[] = {ORT_FLOAT, ORT_INT32, ORT_UINT8, ORT_FLOAT16};
  return (void)self, types[index];
}

const OrtCustomOp mbq_matmul_op = {
    OP_COMMON,
    .GetName = name,
    .GetInputTypeCount = input_count,
    .GetInputType = input_type,
    .GetInputCharacteristic = required,
    .GetOutputTypeCount = one_output,
    .GetOutputType = output_type,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShape = infer,
};
