/* CachedAttention(query f32 [1, M, heads * D], key, value f32 [1, M, kv_heads * D], past_key u8 [1, kv_heads, C, D + 4],
 *                 past_value u8 [1, kv_heads, C, D + 4], past_tokens i64 [1] [, cos f32 [T, R / 2], sin f32 [T, R / 2]])
 *     -> y f32 [1, M, heads * D], present_key u8 [1, kv_heads, C', D + 4], present_value u8 [1, kv_heads, C', D + 4].
 *
 * Puts M tokens into a cache of 8 bits behind the past_tokens that it holds, and attends. Without key and value, query has
 * all three, stacked. C is a multiple of 16, and C' is C or, if that has no room for all tokens, the least that has. The
 * cache is written in place where past and present share their memory. */
#include <string.h>

#include "attend.h"
#include "ops.h"

#if MBQ_KV_BITS == 8

enum { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, PAST_TOKENS, COS, SIN, INPUTS };
enum { Y, PRESENT_KEY, PRESENT_VALUE, OUTPUTS };

typedef struct CachedAttention {
  Node node;
  int64_t heads, kv_heads, window;
  float scale, cap;
} CachedAttention;

typedef struct Session {
  Crew crew;
  const OrtKernelContext *context;
  int64_t tokens;
  OrtStatus *status; /* of the first job that failed */
} Session;

static void share(Crew *crew, size_t pieces, void (*run)(void *, size_t), void *data) {
  Session *session = (Session *)crew;
  if (session->status == NULL) session->status = parallel(session->context, session->tokens, pieces, run, data);
}

/* The present form of a cache, with what the past holds. */
static OrtStatus *carry(OrtKernelContext *context, size_t index, const Tensor *past, const Attend *a, uint8_t **present) {
  const int64_t row = a->head_dim + MBQ_KV_SCALE_BYTES, before = past->shape.dims[2];
  const int64_t held = (a->past + MBQ_KEY_LANES - 1) / MBQ_KEY_LANES * MBQ_KEY_LANES;
  Shape shape = past->shape;
  shape.dims[2] = a->room;
  void *data;
  TRY(output(context, index, &shape, &data));
  *present = data;
  if (data == past->data) return NULL;
  for (int64_t h = 0; h < a->kv_heads && held > 0; ++h)
    memcpy(*present + h * a->room * row, (const uint8_t *)past->data + h * before * row, (size_t)(held * row));
  return NULL;
}

static OrtStatus *check_cache(const Node *node, const char *what, const Tensor *past, const Attend *a) {
  const Shape *s = &past->shape;
  if (s->rank == 4 && s->dims[0] == 1 && s->dims[1] == a->kv_heads && s->dims[3] == a->head_dim + MBQ_KV_SCALE_BYTES &&
      s->dims[2] % MBQ_KEY_LANES == 0)
    return NULL;
  return fail(node, "%s holds %lld bytes of rank %zu; needed is [1, %lld, a multiple of %d, %lld]", what,
              (long long)elements(s), s->rank, (long long)a->kv_heads, MBQ_KEY_LANES,
              (long long)(a->head_dim + MBQ_KV_SCALE_BYTES));
}

/* Queries, keys and values, in one tensor or in three. */
static OrtStatus *open_rows(const CachedAttention *op, const OrtKernelContext *context, Attend *a, Shape *shape) {
  const Node *node = &op->node;
  Tensor query, key, value;
  TRY(input(node, context, QUERY, &query));
  TRY(input(node, context, KEY, &key));
  TRY(input(node, context, VALUE, &value));
  const int64_t stacked = key.present ? op->heads : op->heads + 2 * op->kv_heads;
  const int64_t width = query.shape.rank == 3 ? query.shape.dims[2] : 0;
  a->head_dim = width / stacked;
  if (width < 1 || width % stacked != 0 || a->head_dim % MBQ_LANES != 0 || a->head_dim > MBQ_MOST_HEAD_DIM)
    return fail(node, "query has rows of %lld; needed are %lld heads of a multiple of %d, at most %d", (long long)width,
                (long long)stacked, MBQ_LANES, MBQ_MOST_HEAD_DIM);
  if (query.shape.dims[0] != 1) return fail(node, "a batch of %lld; needed is 1", (long long)query.shape.dims[0]);
  TRY(check_rows(node, "query", &query.shape, width, &a->tokens));
  *shape = query.shape;
  shape->dims[2] = op->heads * a->head_dim;
  a->q = query.data, a->q_stride = width;
  a->k = a->q + op->heads * a->head_dim, a->v = a->k + op->kv_heads * a->head_dim;
  a->k_stride = a->v_stride = width;
  if (!key.present) return NULL;
  if (!value.present) return fail(node, "key is there without value");
  int64_t rows[2];
  a->k_stride = a->v_stride = op->kv_heads * a->head_dim;
  TRY(check_rows(node, "key", &key.shape, a->k_stride, &rows[0]));
  TRY(check_rows(node, "value", &value.shape, a->v_stride, &rows[1]));
  if (rows[0] != a->tokens || rows[1] != a->tokens)
    return fail(node, "key and value have %lld and %lld rows; needed are %lld, as query has", (long long)rows[0],
                (long long)rows[1], (long long)a->tokens);
  a->k = key.data, a->v = value.data;
  return NULL;
}

static OrtStatus *open_rotation(const CachedAttention *op, const OrtKernelContext *context, Attend *a) {
  const Node *node = &op->node;
  Tensor cos, sin;
  TRY(input(node, context, COS, &cos));
  TRY(input(node, context, SIN, &sin));
  if (!cos.present) return NULL;
  const Shape *s = &cos.shape;
  if (s->rank != 2 || !sin.present || sin.shape.rank != 2 || memcmp(s->dims, sin.shape.dims, 2 * sizeof s->dims[0]) != 0 ||
      s->dims[0] < a->past + a->tokens || 2 * s->dims[1] > a->head_dim)
    return fail(node, "cos has %lld numbers of rank %zu; needed are tables of %lld positions or more, of at most half a head",
                (long long)elements(s), s->rank, (long long)(a->past + a->tokens));
  a->rotated = 2 * s->dims[1], a->cos = cos.data, a->sin = sin.data;
  return NULL;
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
  const CachedAttention *op = state;
  const Node *node = &op->node;
  Attend pass = {.heads = op->heads, .kv_heads = op->kv_heads, .window = op->window, .scale = op->scale, .cap = op->cap};
  Attend *a = &pass;
  Tensor keys, values, past;
  Shape shape;
  TRY(open_rows(op, context, a, &shape));
  TRY(input(node, context, PAST_KEY, &keys));
  TRY(input(node, context, PAST_VALUE, &values));
  TRY(input(node, context, PAST_TOKENS, &past));
  TRY(check_cache(node, "past_key", &keys, a));
  TRY(check_cache(node, "past_value", &values, a));
  const int64_t room = keys.shape.dims[2];
  if (values.shape.dims[2] != room) return fail(node, "past_key and past_value have room for different numbers of tokens");
  a->past = elements(&past.shape) == 1 ? *(const int64_t *)past.data : -1;
  if (a->past < 0 || a->past > room)
    return fail(node, "past_tokens is %lld; needed is 0 to %lld, the room of past_key", (long long)a->past, (long long)room);
  if (a->past + a->tokens > INT32_MAX) return fail(node, "more than %d tokens", INT32_MAX);
  TRY(open_rotation(op, context, a));
  const int64_t needed = (a->past + a->tokens + MBQ_KEY_LANES - 1) / MBQ_KEY_LANES * MBQ_KEY_LANES;
  a->room = room > needed ? room : needed;
  void *y;
  TRY(output(context, Y, &shape, &y));
  TRY(carry(context, PRESENT_KEY, &keys, a, &a->keys));
  TRY(carry(context, PRESENT_VALUE, &values, a, &a->values));
  a->y = y;
  Session session = {.crew = {pieces_of, share}, .context = context, .tokens = a->tokens};
  if (a->tokens > 0 && !attend_run(a, &session.crew)) return fail(node, "no memory for %lld tokens", (long long)a->tokens);
  return session.status;
}

static OrtStatus *create(const OrtCustomOp *self, OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  (void)self, (void)api;
  CachedAttention op = {0};
  TRY(node_init(&op.node, "CachedAttention", info));
  TRY(attribute(&op.node, info, "num_heads", &op.heads));
  TRY(attribute(&op.node, info, "kv_num_heads", &op.kv_heads));
  TRY(attribute(&op.node, info, "window", &op.window));
  TRY(OrtGetAttribute_float(info, "scale", &op.scale));
  TRY(OrtGetAttribute_float(info, "softcap", &op.cap));
  if (op.kv_heads < 1 || op.heads < 1 || op.heads > INT32_MAX || op.heads % op.kv_heads != 0)
    return fail(&op.node, "num_heads %lld and kv_num_heads %lld: the first must be a multiple of the second",
                (long long)op.heads, (long long)op.kv_heads);
  return keep(&op.node, &op, sizeof op, kernel);
}

static OrtStatus *infer(const OrtCustomOp *self, OrtInferContext *context) {
  (void)self;
  int64_t heads, dims[MAX_RANK];
  OrtShapeInfo *cache;
  size_t rank;
  TRY(infer_attribute(context, "num_heads", &heads));
  TRY(OrtInferGetInputShape(context, PAST_KEY, &cache));
  TRY(OrtGetDimensionsCount(cache, &rank));
  if (rank != 4) return NULL; /* the first pass refuses it */
  TRY(OrtGetDimensions(cache, dims, rank));
  return dims[3] < 0 ? NULL : infer_shape(context, QUERY, Y, ORT_FLOAT, heads * (dims[3] - MBQ_KV_SCALE_BYTES), false);
}

static const char *name(const OrtCustomOp *self) { return (void)self, "CachedAttention"; }
static size_t input_count(const OrtCustomOp *self) { return (void)self, INPUTS; }
static size_t output_count(const OrtCustomOp *self) { return (void)self, OUTPUTS; }
static int output_type(const OrtCustomOp *self, size_t index) { return (void)self, index == Y ? ORT_FLOAT : ORT_UINT8; }
static int input_type(const OrtCustomOp *self, size_t index) {
  return (void)self, index == PAST_KEY || index == PAST_VALUE ? ORT_UINT8 : index == PAST_TOKENS ? ORT_INT64 : ORT_FLOAT;
}
static int input_characteristic(const OrtCustomOp *self, size_t index) {
  return (void)self, index == KEY || index == VALUE || index >= COS ? ORT_OPTIONAL : ORT_REQUIRED;
}

const OrtCustomOp mbq_cached_attention_op = {
    OP_COMMON,
    .GetName = name,
    .GetInputTypeCount = input_count,
    .GetInputType = input_type,
    .GetInputCharacteristic = input_characteristic,
    .GetOutputTypeCount = output_count,
    .GetOutputType = output_type,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShape = infer,
};
#endif
