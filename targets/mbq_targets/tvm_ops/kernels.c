/* The kernels as plain C functions, for the operations of this folder. TVM's code generator declares a packed function
 * under a new name at each call, so the linker would find only one of the calls. */
#include "attend.h"
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

#if MBQ_KV_BITS == 8
extern Crew mbq_crew; /* pool.c */

/* Queries are scaled, and with keys they are rotated. v_stride: numbers from the values of one token to the next. */
int mbq_call_attention(P q, P k, P v, N v_stride, P keys, P values, P y, N heads, N kv_heads, N head_dim, N past, N tokens,
                       N window, N room, float cap) {
  const Attend pass = {.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .past = past, .tokens = tokens,
                       .window = window, .scale = 1, .cap = cap, .q = q, .k = k, .v = v, .q_stride = heads * head_dim,
                       .k_stride = kv_heads * head_dim, .v_stride = v_stride, .keys = (uint8_t *)(uintptr_t)keys,
                       .values = (uint8_t *)(uintptr_t)values, .room = room, .y = (float *)(uintptr_t)y};
  return attend_run(&pass, &mbq_crew) ? 0 : -1;
}
#endif

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
