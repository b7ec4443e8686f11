/* The kernels as plain C functions, for the operations of this folder. TVM's code generator declares a packed function
 * under a new name at each call, so the linker would find only one of the calls. */
#include "kernels.h"

typedef const void *P;
typedef int64_t N;

int mbq_call_quantize(P x, P q, P step, P total, P sums, N groups, N rows) {
  return CALL(__tvm_ffi_mbq_quantize, PTR(x), PTR(q), PTR(step), PTR(total), PTR(sums), INT(groups), INT(rows));
}

int mbq_call_router_sums(P x, P w1, P out, N k, N h) {
  return CALL(__tvm_ffi_mbq_router_sums, PTR(x), PTR(w1), PTR(out), INT(k), INT(h));
}

int mbq_call_gate_silu(P x, P y, N f) { return CALL(__tvm_ffi_mbq_gate_silu, PTR(x), PTR(y), INT(f)); }

int mbq_call_gate_gelu_tanh(P x, P y, N f) { return CALL(__tvm_ffi_mbq_gate_gelu_tanh, PTR(x), PTR(y), INT(f)); }

#define DEFINE_MANY(d)                                                                                                \
  int mbq_call_many_d##d(P q, P step, P total, P planes, P places, P scales, P y, P scratch, P tokens, P sums,        \
                         N blocks, N groups, N rows, N begin, N end, N count, N y_stride) {                           \
    return CALL(MBQ_MANY(d, count), PTR(q), PTR(step), PTR(total), PTR(planes), PTR(places), PTR(scales), PTR(y),     \
                PTR(scratch), PTR(tokens), PTR(sums), INT(blocks), INT(groups), INT(rows), INT(begin), INT(end),      \
                INT(count), INT(y_stride));                                                                           \
  }

#define DEFINE(d)                                                                                                     \
  int mbq_call_gemv_d##d(P q, P step, P total, P planes, P places, P scales, P y, N blocks, N groups, N begin,        \
                         N end) {                                                                                     \
    return CALL(__tvm_ffi_mbq_gemv_d##d, PTR(q), PTR(step), PTR(total), PTR(planes), PTR(places), PTR(scales),        \
                PTR(y), INT(blocks), INT(groups), INT(begin), INT(end));                                              \
  }                                                                                                                   \
  DEFINE_MANY(d)                                                                                                      \
  int mbq_call_gather_d##d(P planes, P places, P scales, P y, N blocks, N groups, N row) {                            \
    return CALL(__tvm_ffi_mbq_gather_d##d, PTR(planes), PTR(places), PTR(scales), PTR(y), INT(blocks), INT(groups),   \
                INT(row));                                                                                            \
  }
MBQ_EACH_DEPTH(DEFINE)
