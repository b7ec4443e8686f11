/* GatedSilu, GatedGelu (x f32 [..., 2 F]) -> y f32 [..., F]: the activation of the first half times
 * the second half. */

#include "ops.h"

typedef struct Gated {
  Node node;
  Kernel kernel;
} Gated;

typedef struct Job {
  Kernel kernel;
  const float *x;
  float *y;
  int64_t rows, f;
  size_t pieces;
} Job;

static void piece(void *data, size_t index) {
  const Job *job = data;
  const int64_t end = piece_start(job->rows, job->pieces, index + 1);
  for (int64_t m = piece_start(job->rows, job->pieces, index); m < end; ++m)
    CALL(job->kernel, PTR(job->x + m * 2 * job->f), PTR(job->y + m * job->f), INT(job->f));
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const Gated *op = state;
  Tensor x;
  TRY(input(&op->node, context, 0, &x));
  const int64_t width = x.shape.rank ? x.shape.dims[x.shape.rank - 1] : 0;
  if (width < 1 || width % (2 * MBQ_LANES) != 0)
    return fail(&op->node, "the last dimension of x is %lld, it must be a multiple of %d", (long long)width, 2 * MBQ_LANES);
  Job job = {.kernel = op->kernel, .x = x.data, .f = width / 2};
  TRY(check_rows(&op->node, "x", &x.shape, width, &job.rows));
  x.shape.dims[x.shape.rank - 1] = job.f;
  void *y;
  TRY(output(context, 0, &x.shape, &y));
  job.y = y;
  job.pieces = pieces_of(job.rows, job.rows * width * (int64_t)sizeof(float));
  return parallel(context, job.rows, job.pieces, piece, &job);
}

static const char *silu_name(const OrtCustomOp *self) { return (void)self, "GatedSilu"; }
static const char *gelu_name(const OrtCustomOp *self) { return (void)self, "GatedGelu"; }

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)api;
  Gated op = {.kernel = self == &mbq_gated_silu_op ? __tvm_ffi_mbq_gate_silu : __tvm_ffi_mbq_gate_gelu_tanh};
  TRY(node_init(&op.node, self->GetName(self), info));
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  return (void)self, infer_shape(context, 0, 0, ORT_FLOAT, HALF, false);
}

static size_t input_count(const OrtCustomOp *self) { return (void)self, 1; }
static int only_float(const OrtCustomOp *self, size_t index) { return (void)self, (void)index, ORT_FLOAT; }

#define GATED(get_name)                                                                                  \
  OP_COMMON, .GetName = get_name, .GetInputTypeCount = input_count, .GetInputType = only_float,          \
             .GetInputCharacteristic = required, .GetOutputTypeCount = one_output, .GetOutputType = only_float, \
             .CreateKernelV2 = create, .KernelComputeV2 = compute, .InferOutputShape = infer
const OrtCustomOp mbq_gated_silu_op = {GATED(silu_name)};
const OrtCustomOp mbq_gated_gelu_op = {GATED(gelu_name)};
