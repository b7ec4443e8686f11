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
  float steps[MOST_DEPTHS], per_step[MOST_DEPTHS], cells[MOST_DEPTHS], begins[MOST_DEPTHS], counts[MOST_DEPTHS];
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
  const float cell = grid->coarse_cell, per_coarse = 1 / cell, width = grid->coarse_width;
  if (depth < grid->coarse_depths) {
    for (int l = 0; l < LANES; ++l) values[l] = (floorf(codes[l] * per_cell) + 0.5f) * step;
    return;
  }
  for (int l = 0; l < LANES; ++l) {
    const float coarse = floorf(codes[l] * per_coarse), fine = codes[l] - coarse * cell;
    values[l] = (floorf(fine * per_cell) + 0.5f) * step + (coarse * width + begin);
  }
}

/* First codes of the cells that a wish lies in, or is nearest to among the codes to choose from. */
static inline void own_cells(const Grid *grid, const Lanes wanted, const Lanes lowest, float cell, float per_width,
                             Lanes first) {
  const float last = larger(grid->span - cell, 0);
  for (int l = 0; l < LANES; ++l)
    first[l] = within(floorf(wanted[l] * per_width) * cell, lowest[l], lowest[l] + last);
}

/* The codes nearest to the deepest depth's wish, among `size` codes of one coarse cell from `first` on. */
static inline void finest(const Grid *grid, const Lanes wanted, float size, Lanes first) {
  const int deepest = grid->depths - 1;
  const float cell = grid->coarse_cell, per_coarse = 1 / cell, width = grid->coarse_width;
  const float begin = grid->begins[deepest], per_step = grid->per_step[deepest];
  if (deepest < grid->coarse_depths) return;
  for (int l = 0; l < LANES; ++l) {
    const float coarse = floorf(first[l] * per_coarse);
    const float at = coarse * cell + floorf((wanted[l] - (coarse * width + begin)) * per_step);
    first[l] = within(at, first[l], first[l] + (size - 1));
  }
}

/* The best code for the deepest depth in the cell that depth `depth` alone would choose.
 * near: the coarse cells that the deepest depth would choose. */
static inline void candidates(const Grid *grid, int depth, const Lanes *wanted, const Lanes lowest, const Lanes near,
                              Lanes code) {
  const int deepest = grid->depths - 1;
  const float coarse_cell = grid->coarse_cell, cell = grid->cells[depth], per_step = grid->per_step[depth];
  if (depth < grid->coarse_depths) {
    own_cells(grid, wanted[depth], lowest, cell, per_step, code);
    for (int l = 0; l < LANES; ++l) code[l] = larger(within(near[l], code[l], code[l] + (cell - coarse_cell)), lowest[l]);
    finest(grid, wanted[deepest], coarse_cell, code);
    return;
  }
  const float per_coarse = 1 / coarse_cell, width = grid->coarse_width, begin = grid->begins[depth];
  own_cells(grid, wanted[depth], lowest, coarse_cell, 1 / width, code);
  for (int l = 0; l < LANES; ++l) {
    const float from = code[l] * per_coarse * width + begin;
    code[l] += within(floorf((wanted[depth][l] - from) * per_step) * cell, 0, coarse_cell - cell);
  }
  finest(grid, wanted[deepest], cell, code);
}

/* code: in, the code of each row so far, a candidate if `candidate`; out, the best code. */
static inline void best_code(const Grid *grid, const Lanes *wanted, bool candidate, Lanes code) {
  const int depths = grid->depths;
  const float per_span = 1 / grid->span;
  Lanes lowest, near, tried, value, cost, least, best;
  for (int l = 0; l < LANES; ++l) lowest[l] = floorf(code[l] * per_span) * grid->span;
  own_cells(grid, wanted[depths - 1], lowest, grid->coarse_cell, 1 / grid->coarse_width, near);
  for (int i = 0; i < depths + candidate; ++i) {
    if (i < depths) candidates(grid, i, wanted, lowest, near, tried);
    else
      for (int l = 0; l < LANES; ++l) tried[l] = code[l];
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
