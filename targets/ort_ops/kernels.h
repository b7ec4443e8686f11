/* The compiled kernels, by TVM's packed calling convention. */
#ifndef MBQ_KERNELS_H
#define MBQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "mbq_config.h" /* generated: MBQ_GROUP, MBQ_DEPTHS, MBQ_SLICES, MBQ_DEPTH_BITS, MBQ_TERMS, MBQ_TILE_K, MBQ_SCRATCH_BYTES, ... */

typedef struct Arg {
  int32_t type;
  uint32_t zero;
  union {
    int64_t integer;
    const void *pointer;
  } value;
} Arg;
typedef int (*Kernel)(void *self, const Arg *args, int32_t count, Arg *result);

#define INT(v) ((Arg){1, 0, {.integer = (v)}})
#define PTR(v) ((Arg){4, 0, {.pointer = (v)}})
#define CALL(kernel, ...)                                                                 \
  ((kernel)(NULL, (const Arg[]){__VA_ARGS__}, sizeof((const Arg[]){__VA_ARGS__}) / sizeof(Arg), &(Arg){0}))

int __tvm_ffi_mbq_quantize(void *, const Arg *, int32_t, Arg *);
int __tvm_ffi_mbq_router_sums(void *, const Arg *, int32_t, Arg *);
int __tvm_ffi_mbq_gate_silu(void *, const Arg *, int32_t, Arg *);
int __tvm_ffi_mbq_gate_gelu_tanh(void *, const Arg *, int32_t, Arg *);
#define DECLARE(d)                                                \
  int __tvm_ffi_mbq_gemv_d##d(void *, const Arg *, int32_t, Arg *); \
  int __tvm_ffi_mbq_gemm_d##d(void *, const Arg *, int32_t, Arg *); \
  int __tvm_ffi_mbq_gather_d##d(void *, const Arg *, int32_t, Arg *);
MBQ_EACH_DEPTH(DECLARE)
#undef DECLARE
#endif
