/* The column loops of columns.py, compiled.  columns.py says what they compute.
 *
 * Rows are independent.  So a block of rows goes through all columns of a group, one row in each lane of a vector, and
 * its data fits the first-level cache.  The compiler splits a vector where the machine's are shorter. */
#include <stdint.h>
#include <string.h>

/* columns.py passes MBQ_CODE_BITS and MBQ_LARGEST_GROUP to the compiler. */
enum { LANES = 16, MOST_DEPTHS = MBQ_CODE_BITS, MOST_COLUMNS = MBQ_LARGEST_GROUP };

typedef float Lanes __attribute__((ext_vector_type(LANES)));
typedef int32_t Choice __attribute__((ext_vector_type(LANES)));
typedef uint8_t Codes __attribute__((ext_vector_type(LANES)));

/* Inlined, so that the number of depths is a constant where the caller has one. */
#define INLINE static inline __attribute__((always_inline))

/* The fields of columns.Grid. */
typedef struct Grid {
  int32_t depths, coarse_depths;
  float span; /* number of codes to choose from */
  float coarse_cell, coarse_width;
  float steps[MOST_DEPTHS], per_step[MOST_DEPTHS], cells[MOST_DEPTHS], per_cell[MOST_DEPTHS], begins[MOST_DEPTHS],
      counts[MOST_DEPTHS];
} Grid;

/* The rows of a group to compute: from `begin` to before `end`. Arrays hold all rows: [depths, columns, rows], codes [columns, rows], scales [rows]. */
typedef struct Part {
  int64_t rows, columns, begin, end;
} Part;

INLINE Lanes below(Lanes x) { return __builtin_elementwise_floor(x); }
INLINE Lanes smaller(Lanes a, Lanes b) { return __builtin_elementwise_min(a, b); }
INLINE Lanes larger(Lanes a, Lanes b) { return __builtin_elementwise_max(a, b); }
INLINE Lanes within(Lanes value, Lanes low, Lanes high) { return larger(smaller(value, high), low); }
INLINE Lanes chosen(Choice where, Lanes a, Lanes b) { return (Lanes)((where & (Choice)a) | (~where & (Choice)b)); }

/* Values of codes at every depth, in cells of the base quantiser. */
INLINE void in_base_cells(const Grid *grid, Lanes code, Lanes *values) {
  const Lanes coarse = below(code * (1 / grid->coarse_cell)), fine = code - coarse * grid->coarse_cell;
  const Lanes begin = coarse * grid->coarse_width;
  for (int e = 0; e < grid->depths; ++e)
    values[e] = e < grid->coarse_depths
                    ? (below(code * grid->per_cell[e]) + 0.5f) * grid->steps[e]
                    : (below(fine * grid->per_cell[e]) + 0.5f) * grid->steps[e] + (begin + grid->begins[e]);
}

/* First codes of the cells that a wish lies in, or is nearest to among the codes to choose from. */
INLINE Lanes own_cells(const Grid *grid, Lanes wanted, Lanes lowest, float cell, float per_width) {
  const float last = grid->span > cell ? grid->span - cell : 0;
  return within(below(wanted * per_width) * cell, lowest, lowest + last);
}

/* The codes nearest to the deepest depth's wish, among `size` codes of one coarse cell from `first` on. */
INLINE Lanes finest(const Grid *grid, Lanes wanted, float size, Lanes first) {
  const int deepest = grid->depths - 1;
  if (deepest < grid->coarse_depths) return first;
  const Lanes coarse = below(first * (1 / grid->coarse_cell));
  const Lanes begin = coarse * grid->coarse_width + grid->begins[deepest];
  const Lanes at = coarse * grid->coarse_cell + below((wanted - begin) * grid->per_step[deepest]);
  return within(at, first, first + (size - 1));
}

/* The best code for the deepest depth in the cell that depth `depth` alone would choose.
 * near: the coarse cells that the deepest depth would choose. */
INLINE Lanes candidate(const Grid *grid, int depth, const Lanes *wanted, Lanes lowest, Lanes near) {
  const Lanes deepest = wanted[grid->depths - 1];
  const float coarse_cell = grid->coarse_cell, cell = grid->cells[depth], per_step = grid->per_step[depth];
  if (depth < grid->coarse_depths) {
    const Lanes first = own_cells(grid, wanted[depth], lowest, cell, per_step);
    return finest(grid, deepest, coarse_cell, larger(within(near, first, first + (cell - coarse_cell)), lowest));
  }
  const float width = grid->coarse_width;
  const Lanes coarse = own_cells(grid, wanted[depth], lowest, coarse_cell, 1 / width);
  const Lanes from = coarse * (1 / coarse_cell) * width + grid->begins[depth];
  const Lanes at = below((wanted[depth] - from) * per_step) * cell;
  return finest(grid, deepest, cell, coarse + within(at, 0, coarse_cell - cell));
}

/* The best code of each row, and its values.  code: the code so far, a candidate if `candidate_too`. */
INLINE Lanes best_code(const Grid *grid, const Lanes *wanted, int candidate_too, Lanes code, Lanes *values) {
  const int depths = grid->depths;
  const Lanes lowest = below(code * (1 / grid->span)) * grid->span;
  const Lanes near = own_cells(grid, wanted[depths - 1], lowest, grid->coarse_cell, 1 / grid->coarse_width);
  Lanes least = 0, best = 0;
  for (int i = 0; i < depths + candidate_too; ++i) {
    const Lanes tried = i < depths ? candidate(grid, i, wanted, lowest, near) : code;
    Lanes cost = 0;
    in_base_cells(grid, tried, values);
    for (int e = 0; e < depths; ++e) {
      const Lanes away = values[e] - wanted[e];
      cost += away * away * grid->counts[e];
    }
    const Choice better = i == 0 ? (Choice)-1 : cost < least;
    least = chosen(better, cost, least);
    best = chosen(better, tried, best);
  }
  in_base_cells(grid, best, values);
  return best;
}

/* Subtracts `change`, times the factor of each column after `from`, from that column. */
INLINE void pass_on(int depths, Lanes (*rest)[MOST_COLUMNS], const float *common, int64_t from, int64_t columns,
                    const Lanes *change) {
  for (int e = 0; e < depths; ++e)
    for (int64_t k = from + 1; k < columns; ++k) rest[e][k] -= common[k] * change[e];
}

INLINE int lanes_used(int64_t row, int64_t end) { return end - row < LANES ? (int)(end - row) : LANES; }

/* Loads a block of rows.  Lanes without a row hold 0. */
INLINE Lanes load_lanes(const float *source, int used) {
  Lanes lanes = 0;
  if (used == LANES) memcpy(&lanes, source, sizeof lanes);
  else memcpy(&lanes, source, used * sizeof *source);
  return lanes;
}

INLINE void store_lanes(Lanes lanes, int used, float *to) {
  if (used == LANES) memcpy(to, &lanes, sizeof lanes);
  else memcpy(to, &lanes, used * sizeof *to);
}

INLINE Lanes load_codes(const uint8_t *source, int used) {
  Codes codes = 0;
  if (used == LANES) memcpy(&codes, source, sizeof codes);
  else memcpy(&codes, source, used);
  return __builtin_convertvector(codes, Lanes);
}

INLINE void store_codes(Lanes lanes, int used, uint8_t *to) {
  const Codes codes = __builtin_convertvector(lanes, Codes);
  if (used == LANES) memcpy(to, &codes, sizeof codes);
  else memcpy(to, &codes, used);
}

INLINE Lanes inverse_of(Lanes scale) { return chosen(scale > 0, 1 / scale, 0); }

/* depth_stride: of `source`, in floats. */
INLINE void load(int depths, const Part *part, const float *source, int64_t depth_stride, int64_t row, int used,
                 Lanes (*block)[MOST_COLUMNS]) {
  for (int e = 0; e < depths; ++e)
    for (int64_t k = 0; k < part->columns; ++k)
      block[e][k] = load_lanes(source + e * depth_stride + k * part->rows + row, used);
}

INLINE void feed_back(Grid grid, const Part *part, uint8_t *codes, const float *streams, int64_t depth_stride,
                      const float *factor, const float *scale, const float *offset, float *errors) {
  const int64_t columns = part->columns, rows = part->rows;
  Lanes current[MOST_DEPTHS][MOST_COLUMNS], wanted[MOST_DEPTHS], error[MOST_DEPTHS];
  for (int64_t row = part->begin; row < part->end; row += LANES) {
    const int used = lanes_used(row, part->end);
    load(grid.depths, part, streams, depth_stride, row, used, current);
    const Lanes width = load_lanes(scale + row, used), middle = load_lanes(offset + row, used);
    const Lanes inverse = inverse_of(width);
    for (int64_t j = 0; j < columns; ++j) {
      for (int e = 0; e < grid.depths; ++e) wanted[e] = (current[e][j] - middle) * inverse;
      const Lanes code = best_code(&grid, wanted, 0, load_codes(codes + j * rows + row, used), error);
      for (int e = 0; e < grid.depths; ++e) {
        error[e] = (current[e][j] - (width * error[e] + middle)) / factor[j * columns + j];
        store_lanes(error[e], used, errors + (e * columns + j) * rows + row);
      }
      store_codes(code, used, codes + j * rows + row);
      pass_on(grid.depths, current, factor + j * columns, j, columns, error);
    }
  }
}

INLINE void settle(Grid grid, const Part *part, uint8_t *codes, const float *own, const float *scale,
                   const float *pulls, float *values) {
  const int64_t columns = part->columns, rows = part->rows;
  Lanes pull[MOST_DEPTHS][MOST_COLUMNS], wanted[MOST_DEPTHS], before[MOST_DEPTHS], after[MOST_DEPTHS];
  for (int64_t row = part->begin; row < part->end; row += LANES) {
    const int used = lanes_used(row, part->end);
    load(grid.depths, part, pulls, columns * rows, row, used, pull);
    const Lanes width = load_lanes(scale + row, used), inverse = inverse_of(width);
    for (int64_t j = 0; j < columns; ++j) {
      for (int e = 0; e < grid.depths; ++e) {
        before[e] = load_lanes(values + (e * columns + j) * rows + row, used);
        wanted[e] = before[e] + pull[e][j] * (inverse / own[j * columns + j]);
      }
      const Lanes code = best_code(&grid, wanted, 1, load_codes(codes + j * rows + row, used), after);
      for (int e = 0; e < grid.depths; ++e) {
        store_lanes(after[e], used, values + (e * columns + j) * rows + row);
        after[e] = (after[e] - before[e]) * width;
      }
      store_codes(code, used, codes + j * rows + row);
      pass_on(grid.depths, pull, own + j * columns, j, columns, after);
    }
  }
}

/* Runs a loop with a copy of the grid.  The numbers of depths of the default's two walks are constants in it. */
#define WITH_GRID(loop, ...)                                                        \
  do {                                                                              \
    const Part part = {rows, columns, begin, end};                                  \
    Grid own_grid = *grid;                                                          \
    if (grid->depths == 4 && grid->coarse_depths == 2) {                            \
      own_grid.depths = 4, own_grid.coarse_depths = 2, loop(own_grid, &part, __VA_ARGS__); \
    } else if (grid->depths == 2 && grid->coarse_depths == 0) {                     \
      own_grid.depths = 2, own_grid.coarse_depths = 0, loop(own_grid, &part, __VA_ARGS__); \
    } else {                                                                        \
      loop(own_grid, &part, __VA_ARGS__);                                           \
    }                                                                               \
  } while (0)

/* columns.feed_back.  depth_stride: of `streams`, in floats. */
void mbq_feed_back(int64_t begin, int64_t end, const Grid *grid, int64_t rows, int64_t columns, int64_t depth_stride,
                   uint8_t *codes, const float *streams, const float *factor, const float *scale, const float *offset,
                   float *errors) {
  WITH_GRID(feed_back, codes, streams, depth_stride, factor, scale, offset, errors);
}

/* columns.settle. */
void mbq_settle(int64_t begin, int64_t end, const Grid *grid, int64_t rows, int64_t columns, uint8_t *codes,
                const float *own, const float *scale, const float *pulls, float *values) {
  WITH_GRID(settle, codes, own, scale, pulls, values);
}
