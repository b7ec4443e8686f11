/* What the ops share: errors, tensors, division of work, and the compiled kernels. */
#ifndef MBQ_OPS_H
#define MBQ_OPS_H

#include <stdbool.h>

#include "kernels.h"
#include "ort_abi.h"

#define EXPORT __attribute__((visibility("default")))

enum { MAX_RANK = 8, MAX_INPUTS = 11 + MBQ_DEPTHS, NAME_BYTES = 128 };

#define TRY(call)                     \
  do {                                \
    OrtStatus *status_ = (call);      \
    if (status_ != NULL) return status_; \
  } while (0)

/* ---- tensors and errors (tensor.c) ---- */

typedef struct Shape {
  size_t rank;
  int64_t dims[MAX_RANK];
} Shape;

/* The first part of the state of each op: its name and its constant inputs. To ask ONNX Runtime for them in every call
 * would take longer than some ops do. */
typedef struct Node {
  const char *op;
  char name[NAME_BYTES];
  size_t inputs; /* how many the node has */
  bool known[MAX_INPUTS];
  Shape shapes[MAX_INPUTS];
  void *data[MAX_INPUTS]; /* valid until the session ends */
} Node;

typedef struct Tensor {
  bool present; /* false: an absent optional input */
  void *data;   /* may be NULL for an empty tensor */
  Shape shape;
} Tensor;

/* An error status. Its message starts with the op and the name of the node. */
OrtStatus *fail(const Node *node, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Set the node's name and read its constant inputs. */
OrtStatus *node_init(Node *node, const char *op, const OrtKernelInfo *info);
/* Copy the state of an op, `bytes` at `op`, to new memory. */
OrtStatus *keep(const Node *node, const void *op, size_t bytes, void **kernel);
OrtStatus *attribute(const Node *node, const OrtKernelInfo *info, const char *name, int64_t *value);

OrtStatus *input(const Node *node, const OrtKernelContext *context, size_t index, Tensor *tensor);
OrtStatus *output(OrtKernelContext *context, size_t index, const Shape *shape, void **data);
int64_t elements(const Shape *shape);
/* The last dimension must be k; *rows is the product of the others. */
OrtStatus *check_rows(const Node *node, const char *what, const Shape *shape, int64_t k, int64_t *rows);

/* Sizes of a sliced weight [n, k]: row blocks and groups along K. It may be a part of a stored weight that has
 * `stored_blocks` row blocks; the part begins at row block `first`. */
typedef struct Weight {
  int64_t n, k, blocks, groups, first, stored_blocks;
} Weight;
typedef struct Stored {
  const uint8_t *planes;       /* of the first slice */
  int64_t places[MBQ_DEPTHS]; /* of the slices, in bytes from there */
  const uint8_t *scales;
} Stored;
#define WEIGHT(stored) PTR((stored)->planes), PTR((stored)->places), PTR((stored)->scales)
/* `first`: the input of the first slice's planes; then come those of the other slices, and the scales. weight_init checks
 * constant weights once. */
OrtStatus *weight_init(const Node *node, const OrtKernelInfo *info, size_t first, Weight *weight);
OrtStatus *weight_open(const Node *node, const OrtKernelContext *context, size_t first, const Weight *weight,
                       Stored *stored);

/* ---- routing (routing.c) ---- */

typedef struct Routing {
  const float *bias, *gain, *b1, *w2;
  const void *w1;
  int64_t k, hidden;
  int32_t depths; /* E, or the deepest depth of this pass if it is less */
  int32_t fixed;  /* the depth of all tokens if the budget is at an end of the table, else 0 */
  double threshold;
} Routing;

/* The input avg_bits has two values: average bits, and the deepest depth of this pass. */
OrtStatus *check_budget(const Node *node, const Tensor *avg_bits);
int32_t deepest(const Tensor *avg_bits, int32_t depths);
/* Read and check the inputs from `first` (avg_bits) on, and from `hidden` (w1, may be absent) on.
 * shape: of the rows that are routed. */
OrtStatus *routing_open(const Node *node, const OrtKernelContext *context, size_t first, size_t hidden,
                        const Shape *shape, Routing *by);
OrtStatus *route(const OrtKernelContext *context, const Routing *by, const float *x, int64_t rows, int32_t *depth);

/* ---- the product (product.c) ---- */

/* y f32 [rows, N] = x f32 [rows, K] times the weights at each row's depth. */
OrtStatus *multiply(const Node *node, OrtKernelContext *context, const Weight *weight, const Stored *stored,
                    const float *x, int64_t rows, const int32_t *depth, float *y);

/* ---- division of work (work.c) ---- */

/* The number of pieces for a job of `units` units and `cost` bytes of work. 1: too little work for a launch. */
size_t pieces_of(int64_t units, int64_t cost);
/* Run all pieces of a job with `rows` tokens. */
OrtStatus *parallel(const OrtKernelContext *context, int64_t rows, size_t pieces, void (*run)(void *, size_t), void *data);
static inline int64_t piece_start(int64_t units, size_t pieces, size_t index) {
  return units * (int64_t)index / (int64_t)pieces;
}

/* How many threads the session has, if only one of several is in use; else 0. */
size_t threads_if_alone(void);
/* Put the other threads of the session to sleep; end their sleep (idle.c). */
void hold_others(const OrtKernelContext *context);
void mbq_wake_threads(void);

/* Memory of the calling thread, valid until its next call. NULL if `bytes` exceeds it. */
void *thread_scratch(size_t bytes);

/* ---- the ops ---- */

extern const OrtCustomOp mbq_routed_matmul_op, mbq_experts_matmul_op, mbq_gather_op, mbq_gated_silu_op,
    mbq_gated_gelu_op, mbq_cached_attention_op;

/* Fields that are the same for every op. */
const char *any_provider(const OrtCustomOp *op);
int required(const OrtCustomOp *op, size_t index);
int default_memory(const OrtCustomOp *op, size_t index);
size_t one_output(const OrtCustomOp *op);
int zero(const OrtCustomOp *op);
int one(const OrtCustomOp *op);
int highest_version(const OrtCustomOp *op);
void free_kernel(void *kernel);
enum { DROPPED = -1, HALF = -2 };
/* Set the shape of an output: that of an input with its last dimension replaced (>= 0), appended, DROPPED or halved. */
OrtStatus *infer_shape(const OrtInferContext *context, size_t in, size_t out, int type, int64_t last, bool append);
OrtStatus *infer_attribute(const OrtInferContext *context, const char *name, int64_t *value);

#define OP_COMMON                                                                                        \
  .version = ORT_OP_VERSION, .GetExecutionProviderType = any_provider, .GetOutputCharacteristic = required, \
  .GetInputMemoryType = default_memory, .KernelDestroy = free_kernel, .GetVariadicInputMinArity = zero,  \
  .GetVariadicInputHomogeneity = zero, .GetVariadicOutputMinArity = zero,                                \
  .GetVariadicOutputHomogeneity = zero, .GetStartVersion = one, .GetEndVersion = highest_version
#endif
