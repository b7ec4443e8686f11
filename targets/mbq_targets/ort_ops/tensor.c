/* Tensors, attributes and error messages. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"

OrtStatus *fail(const Node *node, const char *format, ...) {
  char text[768];
  int used = snprintf(text, sizeof text, "%s \"%s\": ", node->op, node->name);
  va_list args;
  va_start(args, format);
  vsnprintf(text + used, sizeof text - (size_t)used, format, args);
  va_end(args);
  return OrtCreateStatus(ORT_INVALID_ARGUMENT, text);
}

static OrtStatus *shape_of(const Node *node, const OrtValue *value, Shape *shape) {
  int type;
  const int64_t *dims; /* the value's own */
  TRY(OrtGetTypeAndShape(value, &type, &dims, &shape->rank));
  if (shape->rank > MAX_RANK) return fail(node, "an input has rank %zu, the most is 8", shape->rank);
  for (size_t i = 0; i < shape->rank; ++i) shape->dims[i] = dims[i];
  return NULL;
}

OrtStatus *node_init(Node *node, const char *op, const OrtKernelInfo *info) {
  node->op = op;
  size_t size = sizeof node->name;
  OrtStatus *status = OrtGetNodeName(info, node->name, &size);
  if (status != NULL) { /* the name is longer than the buffer */
    OrtReleaseStatus(status);
    strcpy(node->name, "?");
  }
  TRY(OrtGetKernelInputCount(info, &node->inputs));
  for (size_t i = 0; i < node->inputs && i < MAX_INPUTS; ++i) {
    int constant = 0;
    const OrtValue *value = NULL;
    status = OrtGetConstantInput(info, i, &constant, &value);
    if (status != NULL) { /* an absent optional input */
      OrtReleaseStatus(status);
      continue;
    }
    if (!constant || value == NULL) continue;
    TRY(shape_of(node, value, &node->shapes[i]));
    TRY(OrtGetTensorMutableData(value, &node->data[i]));
    node->known[i] = true;
  }
  return NULL;
}

OrtStatus *keep(const Node *node, const void *op, size_t bytes, void **kernel) {
  *kernel = malloc(bytes);
  if (*kernel == NULL) return fail(node, "no memory");
  memcpy(*kernel, op, bytes);
  return NULL;
}

OrtStatus *attribute(const Node *node, const OrtKernelInfo *info, const char *name, int64_t *value) {
  OrtStatus *status = OrtGetAttribute_int64(info, name, value);
  if (status == NULL) return NULL;
  OrtReleaseStatus(status);
  return fail(node, "attribute %s is missing or not an integer", name);
}

static const int64_t slice_bits[] = MBQ_SLICES;

/* Refuse a node whose slices or group_size differ from those that the kernels were compiled for. */
static OrtStatus *check_format(const Node *node, const OrtKernelInfo *info) {
  int64_t group, slices[MBQ_CODE_BITS];
  TRY(attribute(node, info, "group_size", &group));
  if (group != MBQ_GROUP)
    return fail(node, "group_size is %lld, this library was built for %d; build one for the model's group size",
                (long long)group, MBQ_GROUP);
  size_t count = sizeof slices / sizeof slices[0];
  OrtStatus *status = OrtGetAttributeArray_int64(info, "slices", slices, &count);
  if (status != NULL) OrtReleaseStatus(status);
  if (status == NULL && count == MBQ_DEPTHS && memcmp(slices, slice_bits, sizeof slice_bits) == 0) return NULL;
  char seen[64] = "missing or too long";
  for (size_t i = 0, used = 0; status == NULL && i < count; ++i)
    used += (size_t)snprintf(seen + used, sizeof seen - used, "%s%d", i ? "," : "", (int)(int16_t)slices[i]);
  return fail(node, "attribute slices is %s, this library was built for %s; build one for the model's slices", seen,
              MBQ_SLICES_TEXT);
}

OrtStatus *input(const Node *node, const OrtKernelContext *context, size_t index, Tensor *tensor) {
  if (index >= node->inputs) { /* an absent optional input at the end */
    *tensor = (Tensor){0};
    return NULL;
  }
  if (node->known[index]) {
    *tensor = (Tensor){true, node->data[index], node->shapes[index]};
    return NULL;
  }
  const OrtValue *value = NULL;
  TRY(OrtGetInput(context, index, &value));
  tensor->present = value != NULL;
  if (value == NULL) return NULL;
  TRY(OrtGetTensorMutableData(value, &tensor->data));
  return shape_of(node, value, &tensor->shape);
}

OrtStatus *output(OrtKernelContext *context, size_t index, const Shape *shape, void **data) {
  OrtValue *value;
  TRY(OrtGetOutput(context, index, shape->dims, shape->rank, &value));
  return OrtGetTensorMutableData(value, data);
}

int64_t elements(const Shape *shape) {
  int64_t count = 1;
  for (size_t i = 0; i < shape->rank; ++i) count *= shape->dims[i];
  return count;
}

OrtStatus *check_rows(const Node *node, const char *what, const Shape *shape, int64_t k, int64_t *rows) {
  if (shape->rank == 0 || shape->dims[shape->rank - 1] != k)
    return fail(node, "the last dimension of %s is %lld, it must be %lld", what,
                shape->rank ? (long long)shape->dims[shape->rank - 1] : 0LL, (long long)k);
  *rows = 1;
  for (size_t i = 0; i + 1 < shape->rank; ++i) *rows *= shape->dims[i];
  return NULL;
}

static OrtStatus *check_planes(const Node *node, const Weight *weight, size_t slice, const Shape *planes) {
  const int64_t bytes = weight->blocks * MBQ_ROW_BLOCK * weight->k / MBQ_CODE_BITS * slice_bits[slice];
  if (elements(planes) == bytes) return NULL;
  return fail(node, "planes_%zu holds %lld bytes, N=%lld and K=%lld need %lld; export the model again", slice + 1,
              (long long)elements(planes), (long long)weight->n, (long long)weight->k, (long long)bytes);
}

static OrtStatus *check_scales(const Node *node, const Weight *weight, const Shape *scales) {
  const int64_t want[] = {weight->blocks, MBQ_DEPTHS + weight->groups, 2 * MBQ_ROW_BLOCK};
  if (scales->rank == 3 && memcmp(scales->dims, want, sizeof want) == 0) return NULL;
  return fail(node, "scales holds %lld values of rank %zu, N=%lld and K=%lld need [%lld, %lld, %d]; export the "
              "model again", (long long)elements(scales), scales->rank, (long long)weight->n, (long long)weight->k,
              (long long)want[0], (long long)want[1], 2 * MBQ_ROW_BLOCK);
}

OrtStatus *weight_init(const Node *node, const OrtKernelInfo *info, size_t first, Weight *weight) {
  TRY(check_format(node, info));
  TRY(attribute(node, info, "N", &weight->n));
  TRY(attribute(node, info, "K", &weight->k));
  /* With these limits every byte offset fits 64 bits. */
  if (weight->n < 1 || weight->n > INT32_MAX || weight->k < MBQ_GROUP || weight->k > INT32_MAX ||
      weight->k % MBQ_GROUP != 0)
    return fail(node, "N=%lld, K=%lld: N must be at least 1 and K a multiple of the group size %d",
                (long long)weight->n, (long long)weight->k, MBQ_GROUP);
  weight->blocks = (weight->n + MBQ_ROW_BLOCK - 1) / MBQ_ROW_BLOCK;
  weight->groups = weight->k / MBQ_GROUP;
  weight->first = 0, weight->stored_blocks = weight->blocks;
  for (size_t e = 0; e < MBQ_DEPTHS; ++e)
    if (node->known[first + e]) TRY(check_planes(node, weight, e, &node->shapes[first + e]));
  const size_t scales = first + MBQ_DEPTHS;
  return node->known[scales] ? check_scales(node, weight, &node->shapes[scales]) : NULL;
}

OrtStatus *weight_open(const Node *node, const OrtKernelContext *context, size_t first, const Weight *weight,
                       Stored *stored) {
  /* weight_init has checked constant weights. */
  Tensor tensor;
  for (size_t e = 0; e < MBQ_DEPTHS; ++e) {
    TRY(input(node, context, first + e, &tensor));
    if (!node->known[first + e]) TRY(check_planes(node, weight, e, &tensor.shape));
    if (e == 0) stored->planes = tensor.data;
    stored->places[e] = (int64_t)((uintptr_t)tensor.data - (uintptr_t)stored->planes);
  }
  const size_t scales = first + MBQ_DEPTHS;
  TRY(input(node, context, scales, &tensor));
  if (!node->known[scales]) TRY(check_scales(node, weight, &tensor.shape));
  stored->scales = tensor.data;
  return NULL;
}
