/* The part of ONNX Runtime's C interface that a custom-op library needs, at API version 24.
 *
 * The interface is a table of functions whose positions never change. Only the functions used here have a name.
 * ORT_FN(index, type) reads one. ONNX Runtime provides version 24 since 1.24.
 */
#ifndef MBQ_ORT_ABI_H
#define MBQ_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 24
#define ORT_OP_VERSION 17 /* of the layout of OrtCustomOp */

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtShapeInfo OrtShapeInfo; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtInferContext OrtInferContext;
typedef struct OrtOpAttr OrtOpAttr;
typedef struct OrtCustomOp OrtCustomOp;

typedef void *const OrtApi; /* the table, as an array of pointers */

typedef struct OrtApiBase {
  OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT32 = 6, ORT_INT64 = 7, ORT_FLOAT16 = 10 };
enum { ORT_ATTRIBUTE_INT = 1 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  OrtStatus *(*InferOutputShape)(const OrtCustomOp *, OrtInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
  size_t (*GetMayInplace)(int **inputs, int **outputs);
  void (*ReleaseMayInplace)(int *inputs, int *outputs);
  size_t (*GetAliasMap)(int **inputs, int **outputs);
  void (*ReleaseAliasMap)(int *inputs, int *outputs);
};
_Static_assert(sizeof(void *) != 8 || sizeof(OrtCustomOp) == 208, "layout of OrtCustomOp at version 17");

extern OrtApi *ort_api; /* set when the library is registered */

#define ORT_FN(index, result, ...) ((result(*)(__VA_ARGS__))ort_api[index])
#define OrtCreateStatus ORT_FN(0, OrtStatus *, int, const char *)
#define OrtCreateCustomOpDomain ORT_FN(26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define OrtCustomOpDomain_Add ORT_FN(27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)
#define OrtAddCustomOpDomain ORT_FN(28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define OrtGetTensorMutableData ORT_FN(51, OrtStatus *, const OrtValue *, void **)
#define OrtCreateShapeInfo ORT_FN(57, OrtStatus *, OrtShapeInfo **)
#define OrtSetElementType ORT_FN(58, OrtStatus *, OrtShapeInfo *, int)
#define OrtSetDimensions ORT_FN(59, OrtStatus *, OrtShapeInfo *, const int64_t *, size_t)
#define OrtGetDimensionsCount ORT_FN(61, OrtStatus *, const OrtShapeInfo *, size_t *)
#define OrtGetDimensions ORT_FN(62, OrtStatus *, const OrtShapeInfo *, int64_t *, size_t)
#define OrtGetSymbolicDimensions ORT_FN(63, OrtStatus *, const OrtShapeInfo *, const char **, size_t)
#define OrtGetAttribute_float ORT_FN(85, OrtStatus *, const OrtKernelInfo *, const char *, float *)
#define OrtGetAttribute_int64 ORT_FN(86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define OrtGetInput ORT_FN(90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define OrtGetOutput ORT_FN(91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define OrtReleaseStatus ORT_FN(93, void, OrtStatus *)
#define OrtReleaseShapeInfo ORT_FN(99, void, OrtShapeInfo *)
#define OrtGetAttributeArray_int64 ORT_FN(163, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *, size_t *)
#define OrtGetKernelInputCount ORT_FN(230, OrtStatus *, const OrtKernelInfo *, size_t *)
#define OrtGetNodeName ORT_FN(244, OrtStatus *, const OrtKernelInfo *, char *, size_t *)
#define OrtGetConstantInput ORT_FN(249, OrtStatus *, const OrtKernelInfo *, size_t, int *, const OrtValue **)
#define OrtInferGetInputShape ORT_FN(268, OrtStatus *, const OrtInferContext *, size_t, OrtShapeInfo **)
#define OrtInferGetAttribute ORT_FN(269, OrtStatus *, const OrtInferContext *, const char *, const OrtOpAttr **)
#define OrtInferSetOutput ORT_FN(270, OrtStatus *, const OrtInferContext *, size_t, const OrtShapeInfo *)
#define OrtSetSymbolicDimensions ORT_FN(271, OrtStatus *, OrtShapeInfo *, const char **, size_t)
#define OrtReadOpAttr ORT_FN(272, OrtStatus *, const OrtOpAttr *, int, void *, size_t, size_t *)
#define OrtParallelFor \
  ORT_FN(274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t total, size_t batches, void *)
#define OrtGetTypeAndShape ORT_FN(414, OrtStatus *, const OrtValue *, int *, const int64_t **, size_t *)

#endif
