/* SlicedGather(indices i64 [...], avg_bits f32 [2], planes_1 u8, ..., planes_E u8, scales u8) -> y f32 [..., K]: rows of a
 * table at one depth: that of the attribute, or the deepest one of this pass if it is less. */

#include "ops.h"

typedef struct Gather {
  Node node;
  Weight weight;
  int32_t depth;
} Gather;

enum { INDICES, AVG_BITS, PLANES, INPUTS = PLANES + MBQ_DEPTHS + 1 };

typedef struct Job {
  const Gather *op;
  Kernel kernel;
  const int64_t *indices;
  const Stored *stored;
  float *y;
  int64_t rows;
  size_t pieces;
} Job;

#define GATHER(d) __tvm_ffi_mbq_gather_d##d,
static const Kernel kernels[] = {MBQ_EACH_DEPTH(GATHER)};

static void piece(void *data, size_t index) {
  const Job *job = data;
  const Weight *w = &job->op->weight;
  const int64_t end = piece_start(job->rows, job->pieces, index + 1);
  for (int64_t m = piece_start(job->rows, job->pieces, index); m < end; ++m)
    CALL(job->kernel, WEIGHT(job->stored), PTR(job->y + m * w->k), INT(w->blocks), INT(w->groups),
         INT(job->indices[m]));
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const Gather *op = state;
  const Node *node = &op->node;
  const Weight *w = &op->weight;
  Tensor indices, avg_bits;
  Stored stored;
  TRY(input(node, context, INDICES, &indices));
  TRY(input(node, context, AVG_BITS, &avg_bits));
  TRY(check_budget(node, &avg_bits));
  TRY(weight_open(node, context, PLANES, w, &stored));
  Shape shape = indices.shape;
  if (shape.rank == MAX_RANK) return fail(node, "indices has rank 8, the most is 7");
  const int64_t rows = elements(&shape);
  const int64_t *index = indices.data;
  for (int64_t m = 0; m < rows; ++m)
    if (index[m] < 0 || index[m] >= w->n)
      return fail(node, "index %lld is outside the table's %lld rows", (long long)index[m], (long long)w->n);
  shape.dims[shape.rank++] = w->k;
  void *y;
  TRY(output(context, 0, &shape, &y));
  Job job = {.op = op, .indices = index, .stored = &stored, .y = y, .rows = rows};
  job.kernel = kernels[deepest(&avg_bits, op->depth) - 1];
  job.pieces = pieces_of(rows, rows * w->k * 8);
  return parallel(context, rows, job.pieces, piece, &job);
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  Gather op = {0};
  int64_t depth;
  TRY(node_init(&op.node, "SlicedGather", info));
  TRY(weight_init(&op.node, info, PLANES, &op.weight));
  TRY(attribute(&op.node, info, "depth", &depth));
  if (depth < 1 || depth > MBQ_DEPTHS)
    return fail(&op.node, "depth is %lld, slices %s allow 1 to %d", (long long)depth, MBQ_SLICES_TEXT, MBQ_DEPTHS);
  op.depth = (int32_t)depth;
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  (void)self;
  int64_t k;
  TRY(infer_attribute(context, "K", &k));
  return infer_shape(context, 0, 0, ORT_FLOAT, k, true);
}

static const char *name(const OrtCustomOp *self) { return (void)self, "SlicedGather"; }
static size_t input_count(const OrtCustomOp *self) { return (void)self, INPUTS; }
static int output_type(const OrtCustomOp *self, size_t index) { return (void)self, (void)index, ORT_FLOAT; }
static int input_type(const OrtCustomOp *self, size_t index) {
  return (void)self, index == INDICES ? ORT_INT64 : index == AVG_BITS ? ORT_FLOAT : ORT_UINT8;
}

const OrtCustomOp mbq_gather_op = {
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
