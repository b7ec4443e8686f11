/* The loops of sliced_linear.py over all weights of a matrix, compiled.  sliced_linear.py says what they compute.
 *
 * A weight is a level of its depth, in cells of the base quantiser, times a scale and plus an offset of its group. */
#include <stdint.h>
#include <string.h>

/* Weights at once.  A group has a multiple of them. */
enum { LANES = 16 };

typedef float Lanes __attribute__((ext_vector_type(LANES)));
typedef int32_t Levels __attribute__((ext_vector_type(LANES)));
typedef uint8_t Codes __attribute__((ext_vector_type(LANES)));
typedef uint32_t Bits __attribute__((ext_vector_type(LANES)));
typedef uint16_t Rounded __attribute__((ext_vector_type(LANES)));

/* The fields of sliced_linear._Depth: how a code becomes a level, (code >> high) * stride + ((code & mask) >> low). */
typedef struct Depth {
  int32_t high, stride, mask, low;
  float middle, step;
} Depth;

static inline Lanes cells(const Depth *depth, const uint8_t *source) {
  Codes codes;
  memcpy(&codes, source, sizeof codes);
  const Levels code = __builtin_convertvector(codes, Levels);
  const Levels level = (code >> depth->high) * depth->stride + ((code & depth->mask) >> depth->low);
  return __builtin_convertvector(level, Lanes) + depth->middle;
}

/* Rounds to bfloat16, to the nearest, of two to the even one.  Weights are finite. */
static inline Rounded rounded(Lanes values) {
  const Bits bits = (Bits)values;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Rounded);
}

static inline void weights(Depth depth, int64_t begin, int64_t end, int64_t columns, int64_t size, const uint8_t *codes,
                           const float *scale, const float *offset, float *whole, uint16_t *half) {
  const int64_t groups = columns / size;
  for (int64_t g = begin * groups; g < end * groups; ++g) {
    const float width = scale[g] * depth.step, start = offset[g];
    for (int64_t k = g * size; k < (g + 1) * size; k += LANES) {
      const Lanes values = cells(&depth, codes + k) * width + start;
      if (whole) {
        memcpy(whole + k, &values, sizeof values);
      } else {
        const Rounded short_values = rounded(values);
        memcpy(half + k, &short_values, sizeof short_values);
      }
    }
  }
}

/* sliced_linear.weights, float32 [rows, columns]. */
void mbq_weights_float32(int64_t begin, int64_t end, const Depth *depth, int64_t columns, int64_t size,
                         const uint8_t *codes, const float *scale, const float *offset, float *found) {
  weights(*depth, begin, end, columns, size, codes, scale, offset, found, 0);
}

/* The same in bfloat16. */
void mbq_weights_bfloat16(int64_t begin, int64_t end, const Depth *depth, int64_t columns, int64_t size,
                          const uint8_t *codes, const float *scale, const float *offset, uint16_t *found) {
  weights(*depth, begin, end, columns, size, codes, scale, offset, 0, found);
}

static inline float sum(Lanes values) {
  float total = 0;
  for (int l = 0; l < LANES; ++l) total += values[l];
  return total;
}

static inline void add_gradients(Depth depth, int64_t begin, int64_t end, int64_t columns, int64_t size,
                                 const uint8_t *codes, const float *whole, const uint16_t *half, float *to_scale,
                                 float *to_offset) {
  const int64_t groups = columns / size;
  for (int64_t g = begin * groups; g < end * groups; ++g) {
    Lanes of_scale = 0, of_offset = 0;
    for (int64_t k = g * size; k < (g + 1) * size; k += LANES) {
      Lanes gradient;
      if (whole) {
        memcpy(&gradient, whole + k, sizeof gradient);
      } else {
        Rounded short_values;
        memcpy(&short_values, half + k, sizeof short_values);
        gradient = (Lanes)(__builtin_convertvector(short_values, Bits) << 16);
      }
      of_scale += cells(&depth, codes + k) * gradient;
      of_offset += gradient;
    }
    to_scale[g] += sum(of_scale) * depth.step;
    to_offset[g] += sum(of_offset);
  }
}

/* sliced_linear._add_gradients for a gradient in float32. */
void mbq_add_gradients_float32(int64_t begin, int64_t end, const Depth *depth, int64_t columns, int64_t size,
                               const uint8_t *codes, const float *gradient, float *to_scale, float *to_offset) {
  add_gradients(*depth, begin, end, columns, size, codes, gradient, 0, to_scale, to_offset);
}

/* The same in bfloat16. */
void mbq_add_gradients_bfloat16(int64_t begin, int64_t end, const Depth *depth, int64_t columns, int64_t size,
                                const uint8_t *codes, const uint16_t *gradient, float *to_scale, float *to_offset) {
  add_gradients(*depth, begin, end, columns, size, codes, 0, gradient, to_scale, to_offset);
}
