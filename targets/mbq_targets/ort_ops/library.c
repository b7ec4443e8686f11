/* The entry points of the library, and the fields that all op tables share. */
#include <limits.h>
#include <stdlib.h>

#include "ops.h"

OrtApi *ort_api;

const char *any_provider(const OrtCustomOp *op) { return (void)op, NULL; }
int required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }
int default_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
size_t one_output(const OrtCustomOp *op) { return (void)op, 1; }
int zero(const OrtCustomOp *op) { return (void)op, 0; }
int one(const OrtCustomOp *op) { return (void)op, 1; }
int highest_version(const OrtCustomOp *op) { return (void)op, INT_MAX; }
void free_kernel(void *kernel) { free(kernel); }

OrtStatus *infer_attribute(const OrtInferContext *context, const char *name, int64_t *value) {
  const OrtOpAttr *attr;
  size_t used;
  TRY(OrtInferGetAttribute(context, name, &attr));
  return OrtReadOpAttr(attr, ORT_ATTRIBUTE_INT, value, sizeof *value, &used);
}

OrtStatus *infer_shape(const OrtInferContext *context, size_t from, size_t to, int type, int64_t last, bool append) {
  OrtShapeInfo *in, *out;
  int64_t dims[MAX_RANK + 1];
  const char *names[MAX_RANK + 1];
  size_t rank;
  OrtStatus *unknown = OrtInferGetInputShape(context, from, &in);
  if (unknown != NULL) return OrtReleaseStatus(unknown), NULL;
  TRY(OrtGetDimensionsCount(in, &rank));
  if (rank > MAX_RANK || (rank == 0 && !append)) return NULL;
  TRY(OrtGetDimensions(in, dims, rank));
  TRY(OrtGetSymbolicDimensions(in, names, rank));
  rank = append ? rank + 1 : last == DROPPED ? rank - 1 : rank;
  if (last == HALF) {
    if (dims[rank - 1] < 0) return NULL;
    last = dims[rank - 1] / 2;
  }
  if (last >= 0) dims[rank - 1] = last, names[rank - 1] = "";
  for (size_t i = 0; i < rank; ++i)
    if (dims[i] < 0 && names[i][0] == '\0') return NULL; /* neither a size nor a name: no shape to set */
  TRY(OrtCreateShapeInfo(&out));
  OrtStatus *status = OrtSetElementType(out, type);
  if (status == NULL) status = OrtSetDimensions(out, dims, rank);
  if (status == NULL) status = OrtSetSymbolicDimensions(out, names, rank);
  if (status == NULL) status = OrtInferSetOutput(context, to, out);
  OrtReleaseShapeInfo(out);
  return status;
}

/* The kernels call these for an argument of the wrong type, which this library never passes. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind, (void)parts, (void)count;
}
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { (void)kind, (void)message; }

/* What the library was built for: "key=value" words separated by spaces. */
EXPORT const char *mbq_ops_build_info(void) { return MBQ_BUILD_INFO; }

EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (api == NULL) return NULL; /* ONNX Runtime before 1.24 then reports the ops as unknown */
  ort_api = api;
  static const OrtCustomOp *const ops[] = {&mbq_routed_matmul_op, &mbq_experts_matmul_op, &mbq_gather_op,
                                           &mbq_gated_silu_op, &mbq_gated_gelu_op,
#if MBQ_KV_BITS == 8
                                           &mbq_cached_attention_op,
#endif
  };
  OrtCustomOpDomain *domain; /* ONNX Runtime keeps it until the session ends */
  TRY(OrtCreateCustomOpDomain("ai.mbq", &domain));
  for (size_t i = 0; i < sizeof ops / sizeof ops[0]; ++i) TRY(OrtCustomOpDomain_Add(domain, ops[i]));
  return OrtAddCustomOpDomain(options, domain);
}
