/* The column loops of columns.py, compiled.  columns.py says what they compute.
 *
 * Rows are independent.  So a block of rows goes through all columns of a group, one row in each lane of the vector
 * unit, and its data fits the first-level cache. */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

/* columns.py passes MBQ_CODE_BITS and MBQ_LARGEST_GROUP to the compiler. */
enum { LANES = 16, MOST_DEPTHS = MBQ_CODE_BITS, MOST_COLUMNS = MBQ_LARGEST_GROUP };

typedef float Lanes[LANES];

/* The fields of columns.Grid. */
typedef struct Grid {
  int32_t depths, coarse_depths;
  float span; /* number of codes to choose from */
  float coarse_cell, coarse_width;
  float steps[MOST_DEPTHS], cells[MOST_DEPTHS], begins[MOST_DEPTHS], counts[MOST_DEPTHS];
} Grid;

/* The rows of a group to compute. Arrays hold all rows: [depths, columns, rows], codes [columns, rows], scales [rows]. */
typedef struct Part {
  int64_t rows, columns, begin, end;
} Part;

static inline float smaller(float a, float b) { return a < b ? a : b; }
static inline float larger(float a, float b) { return a > b ? a : b; }

static inline float within(float value, float low, float high) { return larger(smaller(value, high), low); }

static inline void in_base_cells(const Grid *grid, int depth, const Lanes codes, Lanes values) {
  const float per_cell = 1 / grid->cells[depth], step = grid->steps[depth], begin = grid->begins[depth];
  if (depth < grid->coarse_depths) {
    for (int l = 0; l < LANES; ++l) values[l] = (floorf(codes[l] * per_cell) + 0.5f) * step;
    return;
  }
  const float per_coarse = 1 / grid->coarse_cell, width = grid->coarse_width;
  for (int l = 0; l < LANES; ++l) {
    const float coarse = floorf(codes[l] * per_coarse), fine = codes[l] - coarse * grid->coarse_cell;
    values[l] = coarse * width + begin + (floorf(fine * per_cell) + 0.5f) * step;
  }
}

/* The code nearest to the deepest depth's wish among `size` codes from `first` on, which lie in one coarse cell. */
static inline float finest_within(const Grid *grid, float wanted, float first, float size) {
  const int deepest = grid->depths - 1;
  if (deepest < grid->coarse_depths) return first;
  const float coarse = floorf(first / grid->coarse_cell);
  const float from = coarse * grid->coarse_width + grid->begins[deepest];
  const float at = coarse * grid->coarse_cell + floorf((wanted - from) / grid->steps[deepest]);
  return within(at, first, first + size - 1);
}

/* First codes of the coarse cells that one depth's wish is in, or is nearest to among the codes to choose from. */
static inline float own_coarse(const Grid *grid, float wanted, float lowest, float cell, float step) {
  const float at = floorf(wanted / step) * cell;
  return within(at, lowest, larger(lowest + grid->span - cell, lowest));
}

/* A candidate: the best code for the deepest depth in the cell that depth `depth` alone would choose. */
static inline float candidate_of(const Grid *grid, int depth, const float *wanted, float lowest) {
  const int deepest = grid->depths - 1;
  const float coarse_cell = grid->coarse_cell;
  const float near = own_coarse(grid, wanted[deepest], lowest, coarse_cell, grid->coarse_width);
  if (depth < grid->coarse_depths) {
    const float cell = grid->cells[depth];
    const float first = own_coarse(grid, wanted[depth], lowest, cell, grid->steps[depth]);
    const float coarse = within(near, first, first + cell - coarse_cell);
    return finest_within(grid, wanted[deepest], larger(coarse, lowest), coarse_cell);
  }
  const float coarse = own_coarse(grid, wanted[depth], lowest, coarse_cell, grid->coarse_width);
  const float from = coarse / coarse_cell * grid->coarse_width + grid->begins[depth], cell = grid->cells[depth];
  const float at = within(floorf((wanted[depth] - from) / grid->steps[depth]) * cell, 0, coarse_cell - cell);
  return finest_within(grid, wanted[deepest], coarse + at, cell);
}

/* code: in, the code of each row so far, a candidate if `candidate`; out, the best code. */
static inline void best_code(const Grid *grid, const Lanes *wanted, bool candidate, Lanes code) {
  const int depths = grid->depths;
  const float per_span = 1 / grid->span;
  Lanes tried, value, cost, least, best;
  for (int i = 0; i < depths + candidate; ++i) {
    for (int l = 0; l < LANES; ++l) {
      if (i < depths) {
        float wish[MOST_DEPTHS];
        for (int e = 0; e < depths; ++e) wish[e] = wanted[e][l];
        tried[l] = candidate_of(grid, i, wish, floorf(code[l] * per_span) * grid->span);
      } else tried[l] = code[l];
    }
    for (int l = 0; l < LANES; ++l) cost[l] = 0;
    for (int e = 0; e < depths; ++e) {
      in_base_cells(grid, e, tried, value);
      for (int l = 0; l < LANES; ++l) {
        const float away = value[l] - wanted[e][l];
        cost[l] += away * away * grid->counts[e];
      }
    }
    for (int l = 0; l < LANES; ++l) {
      const bool better = i == 0 || cost[l] < least[l];
      least[l] = better ? cost[l] : least[l];
      best[l] = better ? tried[l] : best[l];
    }
  }
  for (int l = 0; l < LANES; ++l) code[l] = best[l];
}

/* Subtracts `change`, times the factor of each column after `from`, from that column. */
static inline void pass_on(const Grid *grid, Lanes (*rest)[MOST_COLUMNS], const float *common, int64_t from,
                           int64_t columns, const Lanes *change) {
  for (int e = 0; e < grid->depths; ++e)
    for (int64_t k = from + 1; k < columns; ++k)
      for (int l = 0; l < LANES; ++l) rest[e][k][l] -= common[k] * change[e][l];
}

static inline int lanes_used(int64_t row, int64_t end) { return end - row < LANES ? (int)(end - row) : LANES; }

/* Loads a block of rows.  Lanes without a row hold 0. */
static inline void load_lanes(const float *source, int used, Lanes lanes) {
  for (int l = 0; l < LANES; ++l) lanes[l] = l < used ? source[l] : 0;
}

static inline void store_lanes(const Lanes lanes, int used, float *to) {
  for (int l = 0; l < used; ++l) to[l] = lanes[l];
}

static inline void load_codes(const uint8_t *source, int used, Lanes codes) {
  for (int l = 0; l < LANES; ++l) codes[l] = l < used ? source[l] : 0;
}

static inline void store_codes(const Lanes codes, int used, uint8_t *to) {
  for (int l = 0; l < used; ++l) to[l] = (uint8_t)codes[l];
}

static inline void invert(const Lanes scales, Lanes inverse) {
  for (int l = 0; l < LANES; ++l) inverse[l] = scales[l] > 0 ? 1 / scales[l] : 0;
}

/* depth_stride: of `source`, in floats. */
static inline void load(const Grid *grid, const Part *part, const float *source, int64_t depth_stride, int64_t row,
                        int used, Lanes (*block)[MOST_COLUMNS]) {
  for (int e = 0; e < grid->depths; ++e)
    for (int64_t k = 0; k < part->columns; ++k)
      load_lanes(source + e * depth_stride + k * part->rows + row, used, block[e][k]);
}

/* columns.feed_back.  depth_stride: of `streams`, in floats. */
void mbq_feed_back(const Grid *grid, const Part *part, uint8_t *codes, const float *streams, int64_t depth_stride,
                   const float *factor, const float *scale, const float *offset, float *errors) {
  const int64_t columns = part->columns, rows = part->rows;
  Lanes current[MOST_DEPTHS][MOST_COLUMNS], wanted[MOST_DEPTHS], error[MOST_DEPTHS], code, inverse, width, middle;
  for (int64_t row = part->begin; row < part->end; row += LANES) {
    const int used = lanes_used(row, part->end);
    load(grid, part, streams, depth_stride, row, used, current);
    load_lanes(scale + row, used, width);
    load_lanes(offset + row, used, middle);
    invert(width, inverse);
    for (int64_t j = 0; j < columns; ++j) {
      for (int e = 0; e < grid->depths; ++e)
        for (int l = 0; l < LANES; ++l) wanted[e][l] = (current[e][j][l] - middle[l]) * inverse[l];
      load_codes(codes + j * rows + row, used, code);
      best_code(grid, wanted, false, code);
      for (int e = 0; e < grid->depths; ++e) {
        in_base_cells(grid, e, code, error[e]);
        for (int l = 0; l < LANES; ++l)
          error[e][l] = (current[e][j][l] - (width[l] * error[e][l] + middle[l])) / factor[j * columns + j];
        store_lanes(error[e], used, errors + (e * columns + j) * rows + row);
      }
      store_codes(code, used, codes + j * rows + row);
      pass_on(grid, current, factor + j * columns, j, columns, error);
    }
  }
}

/* columns.settle. */
void mbq_settle(const Grid *grid, const Part *part, uint8_t *codes, const float *own, const float *scale,
                const float *pulls, float *values) {
  const int64_t columns = part->columns, rows = part->rows;
  Lanes pull[MOST_DEPTHS][MOST_COLUMNS], wanted[MOST_DEPTHS], before[MOST_DEPTHS], change[MOST_DEPTHS];
  Lanes code, after, width, inverse;
  for (int64_t row = part->begin; row < part->end; row += LANES) {
    const int used = lanes_used(row, part->end);
    load(grid, part, pulls, columns * rows, row, used, pull);
    load_lanes(scale + row, used, width);
    invert(width, inverse);
    for (int64_t j = 0; j < columns; ++j) {
      for (int e = 0; e < grid->depths; ++e) {
        load_lanes(values + (e * columns + j) * rows + row, used, before[e]);
        for (int l = 0; l < LANES; ++l)
          wanted[e][l] = before[e][l] + pull[e][j][l] * (inverse[l] / own[j * columns + j]);
      }
      load_codes(codes + j * rows + row, used, code);
      best_code(grid, wanted, true, code);
      for (int e = 0; e < grid->depths; ++e) {
        in_base_cells(grid, e, code, after);
        for (int l = 0; l < LANES; ++l) change[e][l] = (after[l] - before[e][l]) * width[l];
        store_lanes(after, used, values + (e * columns + j) * rows + row);
      }
      store_codes(code, used, codes + j * rows + row);
      pass_on(grid, pull, own + j * columns, j, columns, change);
    }
  }
}
