// Weights as they are stored, and the product of rows of activations with some of their rows.
//
// The sum of an output goes over blocks of COLUMN_BLOCK columns. In a block, lane j sums columns j, j + LANES, ... one after
// the other; then the lanes are summed, and the block's sum is added to the output. That order is the same for one row of
// activations and for many, whatever is computed beside it and by how many threads: only blocking and the order of outputs
// change. A weight is value * scale rounded to float32, as the reference has it.

#ifndef STEP3_MATRIX_H_
#define STEP3_MATRIX_H_

#include "lanes.h"

// FORM_PANEL is what other forms are widened to: TILE_COLUMNS rows of float32, interleaved vector by vector.
typedef enum { FORM_F32, FORM_BF16, FORM_FP8, FORM_INT8, FORM_INT4, FORM_PANEL } Form;

enum {
  STEP = 2 * LANES,     // columns that are widened at once
  GROUP = 128,          // columns that share a scale
  INT4_UNIT = 32,       // columns of 16 packed bytes
  COLUMN_BLOCK = 1024,  // widened weights of a tile stay in the first cache
  MAX_DIRECT_ROWS = 2 * TILE_ROWS,
  ROW_BLOCK = 96,       // activations of so many rows and COLUMN_BLOCK columns stay in the second cache
};

typedef struct {
  Form form;
  int64_t num_rows, num_columns;
  int64_t row_bytes;
  const uint8_t* values;
  const float* scales;  // NULL for FORM_F32 and FORM_BF16
  int64_t scale_columns;
  int64_t rows_per_scale;
} Matrix;

// Bytes of `columns` stored columns.
INLINE int64_t stored_bytes(Form form, int64_t columns) {
  switch (form) {
    case FORM_F32: return 4 * columns;
    case FORM_BF16: return 2 * columns;
    case FORM_INT4: return (columns + INT4_UNIT - 1) / INT4_UNIT * (INT4_UNIT / 2);
    default: return columns;
  }
}

// STEP columns of one row from `column` on, a multiple of STEP; without the scale.
INLINE void widen(Form form, const uint8_t* row, int64_t column, Lanes out[2]) {
  switch (form) {
    case FORM_F32:
      out[0] = load((const float*)row + column);
      out[1] = load((const float*)row + column + LANES);
      break;
    case FORM_PANEL: break;  // see add_step
    case FORM_BF16: widen_bf16(row + 2 * column, out); break;
    case FORM_FP8: widen_fp8(row + column, out); break;
    case FORM_INT8: widen_int8(row + column, out); break;
    case FORM_INT4:
      widen_int4(row + column / INT4_UNIT * (INT4_UNIT / 2), column % INT4_UNIT != 0, out);
      break;
  }
}

INLINE int has_scales(Form form) { return form == FORM_FP8 || form == FORM_INT8 || form == FORM_INT4; }

// The factor of a stored value in the group of `column`. FP8 is widened to value / 256.
INLINE Lanes find_scale(Form form, const float* scales, int64_t column) {
  return fill(form == FORM_FP8 ? scales[column / GROUP] * 256.0f : scales[column / GROUP]);
}

// Rows of weights that a tile multiplies with: where each one starts, and its scales.
typedef struct {
  const uint8_t* rows[TILE_COLUMNS];
  const float* scales[TILE_COLUMNS];
} TileWeights;

INLINE TileWeights pick_weights(const Matrix* matrix, int64_t first, int64_t stop) {
  TileWeights picked;
  for (int i = 0; i < TILE_COLUMNS; i++) {
    // After the last row it is repeated, and the output dropped.
    const int64_t row = first + i < stop ? first + i : stop - 1;
    picked.rows[i] = matrix->values + row * matrix->row_bytes;
    picked.scales[i] = matrix->scales ? matrix->scales + row / matrix->rows_per_scale * matrix->scale_columns : NULL;
  }
  return picked;
}

// The stored bytes of the columns from `column` on, fewer than STEP, and zeros after them. `widen` takes it as column 0.
INLINE void copy_rest(Form form, const uint8_t* row, int64_t column, int64_t num_columns, uint8_t out[STEP * 4]) {
  memset(out, 0, STEP * 4);
  const int64_t from = stored_bytes(form, column);
  memcpy(out, row + from, (size_t)(stored_bytes(form, num_columns) - from));
}

// Adds STEP columns to the accumulators.
INLINE void add_step(
    Form form, int rows, const TileWeights* weights, int64_t column, const float* const* x, int64_t x_column,
    const Lanes scales[TILE_COLUMNS], Lanes sums[][TILE_COLUMNS]) {
  if (form == FORM_PANEL) {
    // Vector by vector, so that what all columns are multiplied with stays in registers.
    UNROLL for (int half = 0; half < 2; half++) {
      Lanes values[TILE_ROWS];
      UNROLL for (int r = 0; r < rows; r++) values[r] = load(x[r] + x_column + half * LANES);
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) {
        const Lanes weight = load((const float*)weights->rows[i] + (column + half * LANES) * TILE_COLUMNS);
        UNROLL for (int r = 0; r < rows; r++) sums[r][i] = multiply_add(values[r], weight, sums[r][i]);
      }
    }
    return;
  }
  UNROLL for (int i = 0; i < TILE_COLUMNS; i++) {
    Lanes wide[2];
    widen(form, weights->rows[i], column, wide);
    if (has_scales(form)) {
      wide[0] = wide[0] * scales[i];
      wide[1] = wide[1] * scales[i];
    }
    UNROLL for (int r = 0; r < rows; r++) {
      sums[r][i] = multiply_add(load(x[r] + x_column), wide[0], sums[r][i]);
      sums[r][i] = multiply_add(load(x[r] + x_column + LANES), wide[1], sums[r][i]);
    }
  }
}

// Fetches the next tile's columns ahead: rows of narrow weights are too short for the processor to see where they lead. Wide
// ones are read best without (measured on Zen 5: 0.97 of a plain sum's rate against 0.65).
INLINE void prefetch(Form form, const uint8_t* row, int64_t column, int64_t stop, int64_t distance) {
  if (form == FORM_F32) return;
  for (int64_t byte = stored_bytes(form, column); byte < stored_bytes(form, stop); byte += 64) {
    __builtin_prefetch(row + byte + distance, 0, 2);
  }
}

// The sums of `rows` rows with TILE_COLUMNS rows of weights over the columns [start, stop) of one block. With FORM_PANEL
// the weights' column 0 is `start`.
INLINE void sum_tile(
    Form form, int rows, const TileWeights* weights, const float* const* x, int64_t start, int64_t stop,
    int64_t num_columns, int64_t prefetch_bytes, float out[][TILE_COLUMNS]) {
  Lanes sums[TILE_ROWS][TILE_COLUMNS], scales[TILE_COLUMNS];
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int i = 0; i < TILE_COLUMNS; i++) sums[r][i] = fill(0.0f);
  }
  const int64_t whole = start + (stop - start) / STEP * STEP;
  const int64_t origin = form == FORM_PANEL ? start : 0;
  for (int64_t group = start; group < whole; group += GROUP) {
    if (has_scales(form)) {
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) scales[i] = find_scale(form, weights->scales[i], group);
    }
    const int64_t end = group + GROUP < whole ? group + GROUP : whole;
    if (form != FORM_PANEL && prefetch_bytes) {
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) prefetch(form, weights->rows[i], group, end, prefetch_bytes);
    }
    for (int64_t column = group; column < end; column += STEP) {
      add_step(form, rows, weights, column - origin, x, column, scales, sums);
    }
  }
  if (whole < stop) {
    // The last columns of all: both sides with zeros after them.
    float rest[TILE_ROWS][STEP];
    const float* rest_x[TILE_ROWS];
    uint8_t bytes[TILE_COLUMNS][STEP * 4];
    TileWeights last = *weights;
    UNROLL for (int r = 0; r < rows; r++) {
      memset(rest[r], 0, sizeof rest[r]);
      memcpy(rest[r], x[r] + whole, (size_t)(stop - whole) * sizeof(float));
      rest_x[r] = rest[r];
    }
    if (form == FORM_PANEL) {  // it has zeros there
      add_step(form, rows, weights, whole - origin, rest_x, 0, scales, sums);
    } else {
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) {
        // Packed values have zeros there too, and a half of a unit is not a place of its own.
        if (form != FORM_INT4) {
          copy_rest(form, weights->rows[i], whole, num_columns, bytes[i]);
          last.rows[i] = bytes[i];
        }
        if (has_scales(form)) scales[i] = find_scale(form, weights->scales[i], whole);
      }
      add_step(form, rows, &last, form == FORM_INT4 ? whole : 0, rest_x, 0, scales, sums);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) sum_lanes(sums[r], out[r]);
}

// A tile of up to TILE_ROWS rows.
static void sum_rows(
    Form form, int rows, const TileWeights* weights, const float* const* x, int64_t start, int64_t stop,
    int64_t num_columns, int64_t prefetch_bytes, float out[][TILE_COLUMNS]);

#define SUM_ROWS(FORM, ROWS) \
  case ROWS: sum_tile(FORM, ROWS, weights, x, start, stop, num_columns, prefetch_bytes, out); break;
#if defined(__AVX512BW__)
#define SUM_ALL_ROWS(FORM) \
  SUM_ROWS(FORM, 1) SUM_ROWS(FORM, 2) SUM_ROWS(FORM, 3) SUM_ROWS(FORM, 4) SUM_ROWS(FORM, 5) SUM_ROWS(FORM, 6)
#elif defined(__AVX2__)
#define SUM_ALL_ROWS(FORM) SUM_ROWS(FORM, 1) SUM_ROWS(FORM, 2) SUM_ROWS(FORM, 3)
#else
#define SUM_ALL_ROWS(FORM) SUM_ROWS(FORM, 1) SUM_ROWS(FORM, 2)
#endif
#define SUM_FORM(FORM) \
  case FORM: \
    switch (rows) { SUM_ALL_ROWS(FORM) } \
    break;

static void sum_rows(
    Form form, int rows, const TileWeights* weights, const float* const* x, int64_t start, int64_t stop,
    int64_t num_columns, int64_t prefetch_bytes, float out[][TILE_COLUMNS]) {
  switch (form) {
    SUM_FORM(FORM_F32)
    SUM_FORM(FORM_BF16)
    SUM_FORM(FORM_FP8)
    SUM_FORM(FORM_INT8)
    SUM_FORM(FORM_INT4)
    SUM_FORM(FORM_PANEL)
  }
}

INLINE void store_panel(Form form, const uint8_t* row, int64_t column, Lanes scale, float* to) {
  Lanes wide[2];
  widen(form, row, column, wide);
  if (has_scales(form)) {
    wide[0] = wide[0] * scale;
    wide[1] = wide[1] * scale;
  }
  store(to, wide[0]);
  store(to + LANES * TILE_COLUMNS, wide[1]);
}

// Widens the columns [start, stop) of a tile's rows, zeros after them up to a multiple of STEP.
INLINE void fill_panel_of(
    Form form, const TileWeights* weights, int64_t start, int64_t stop, int64_t num_columns, int64_t distance,
    float* panel) {
  for (int i = 0; i < TILE_COLUMNS; i++) {
    const uint8_t* row = weights->rows[i];
    float* to = panel + i * LANES;
    for (int64_t group = start; group < stop; group += GROUP) {
      const int64_t end = group + GROUP < stop ? group + GROUP : stop;
      const Lanes scale = has_scales(form) ? find_scale(form, weights->scales[i], group) : fill(1.0f);
      prefetch(form, row, group, end, distance);
      int64_t column = group;
      for (; column + STEP <= end; column += STEP) {
        store_panel(form, row, column, scale, to + (column - start) * TILE_COLUMNS);
      }
      if (column < end) {
        uint8_t bytes[STEP * 4];
        if (form != FORM_INT4) copy_rest(form, row, column, num_columns, bytes);
        store_panel(
            form, form == FORM_INT4 ? row : bytes, form == FORM_INT4 ? column : 0, scale,
            to + (column - start) * TILE_COLUMNS);
      }
    }
  }
}

static void fill_panel(
    Form form, const TileWeights* weights, int64_t start, int64_t stop, int64_t num_columns, int64_t distance,
    float* panel) {
  switch (form) {
    case FORM_F32: fill_panel_of(FORM_F32, weights, start, stop, num_columns, distance, panel); break;
    case FORM_BF16: fill_panel_of(FORM_BF16, weights, start, stop, num_columns, distance, panel); break;
    case FORM_FP8: fill_panel_of(FORM_FP8, weights, start, stop, num_columns, distance, panel); break;
    case FORM_INT8: fill_panel_of(FORM_INT8, weights, start, stop, num_columns, distance, panel); break;
    case FORM_INT4: fill_panel_of(FORM_INT4, weights, start, stop, num_columns, distance, panel); break;
    case FORM_PANEL: break;
  }
}

// Adds the sums of one tile over the columns [start, end) to the outputs; the first block overwrites them.
INLINE void add_tile(
    Form form, const Matrix* matrix, const TileWeights* weights, const float* const* x, int rows, int64_t start,
    int64_t end, int64_t prefetch_bytes, int valid, float* out, int64_t out_stride) {
  float sums[TILE_ROWS][TILE_COLUMNS];
  sum_rows(form, rows, weights, x, start, end, matrix->num_columns, prefetch_bytes, sums);
  for (int r = 0; r < rows; r++) {
    float* to = out + r * out_stride;
    if (valid == TILE_COLUMNS) {
      for (int i = 0; i < TILE_COLUMNS; i++) to[i] = start == 0 ? sums[r][i] : to[i] + sums[r][i];
    } else {
      for (int i = 0; i < valid; i++) to[i] = start == 0 ? sums[r][i] : to[i] + sums[r][i];
    }
  }
}

// out[n][row - first] = the product of x[n] with the matrix's rows [first, stop).
//
// Up to MAX_DIRECT_ROWS rows are multiplied while the weights are widened, TILE_ROWS at a time: a tile's weights come from
// memory once, then from the first cache. For more, the weights of a tile are widened once for ROW_BLOCK rows, to a panel
// that stays in the first cache.
static void multiply_rows(
    const Matrix* matrix, int64_t first, int64_t stop, const float* const* x, int64_t num_x, float* out,
    int64_t out_stride) {
  const int64_t columns = matrix->num_columns, distance = TILE_COLUMNS * matrix->row_bytes;
  if (num_x <= MAX_DIRECT_ROWS) {
    for (int64_t row = first; row < stop; row += TILE_COLUMNS) {
      const TileWeights weights = pick_weights(matrix, row, stop);
      const int valid = stop - row < TILE_COLUMNS ? (int)(stop - row) : TILE_COLUMNS;
      for (int64_t start = 0; start < columns; start += COLUMN_BLOCK) {
        const int64_t end = start + COLUMN_BLOCK < columns ? start + COLUMN_BLOCK : columns;
        for (int64_t n = 0; n < num_x; n += TILE_ROWS) {
          const int rows = num_x - n < TILE_ROWS ? (int)(num_x - n) : TILE_ROWS;
          add_tile(
              matrix->form, matrix, &weights, x + n, rows, start, end, n == 0 ? distance : 0, valid,
              out + n * out_stride + (row - first), out_stride);
        }
      }
    }
    return;
  }
  float panel[(COLUMN_BLOCK + STEP) * TILE_COLUMNS] __attribute__((aligned(64)));
  for (int64_t start = 0; start < columns; start += COLUMN_BLOCK) {
    const int64_t end = start + COLUMN_BLOCK < columns ? start + COLUMN_BLOCK : columns;
    for (int64_t block = 0; block < num_x; block += ROW_BLOCK) {
      const int64_t block_end = block + ROW_BLOCK < num_x ? block + ROW_BLOCK : num_x;
      for (int64_t row = first; row < stop; row += TILE_COLUMNS) {
        TileWeights weights = pick_weights(matrix, row, stop);
        const int valid = stop - row < TILE_COLUMNS ? (int)(stop - row) : TILE_COLUMNS;
        fill_panel(matrix->form, &weights, start, end, columns, distance, panel);
        for (int i = 0; i < TILE_COLUMNS; i++) weights.rows[i] = (const uint8_t*)(panel + i * LANES);
        for (int64_t n = block; n < block_end; n += TILE_ROWS) {
          const int rows = block_end - n < TILE_ROWS ? (int)(block_end - n) : TILE_ROWS;
          add_tile(
              FORM_PANEL, matrix, &weights, x + n, rows, start, end, 0, valid, out + n * out_stride + (row - first),
              out_stride);
        }
      }
    }
  }
}

#endif
