// The product of rows of activations with some rows of a matrix.
//
// The sum of an output goes over blocks of COLUMN_BLOCK columns. In a block, lane j sums columns j, j + LANES, ... one after
// the other; then the lanes are summed, and the block's sum is added to the output. That order is the same for one row of
// activations and for many, whatever is computed beside it and by how many threads: only blocking and the order of outputs
// change. Rows of activations are float32, or bfloat16 for the forms that are multiplied in pairs.

#ifndef STEP3_MATRIX_H_
#define STEP3_MATRIX_H_

#include "pairs.h"
#include "weights.h"

// Adds STEP columns to the accumulators.
INLINE void add_step(
    Form form, int rows, const TileWeights* weights, int64_t column, const void* const* x, int64_t x_column,
    const Lanes scales[TILE_COLUMNS], Lanes sums[][TILE_COLUMNS]) {
  if (form == FORM_PANEL) {
    // Vector by vector, so that what all columns are multiplied with stays in registers.
    UNROLL for (int half = 0; half < 2; half++) {
      Lanes values[TILE_ROWS];
      UNROLL for (int r = 0; r < rows; r++) values[r] = load((const float*)x[r] + x_column + half * LANES);
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
      sums[r][i] = multiply_add(load((const float*)x[r] + x_column), wide[0], sums[r][i]);
      sums[r][i] = multiply_add(load((const float*)x[r] + x_column + LANES), wide[1], sums[r][i]);
    }
  }
}

// The sums of `rows` rows with TILE_COLUMNS rows of weights over the columns [start, stop) of one block. With FORM_PANEL
// the weights' column 0 is `start`.
INLINE void sum_tile(
    Form form, int rows, const TileWeights* weights, const void* const* x, int64_t start, int64_t stop,
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
    // Float32 is read best without (measured on Zen 5: 0.97 of a plain sum's rate against 0.65).
    if (form != FORM_PANEL && form != FORM_F32 && prefetch_bytes) {
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) prefetch(form, weights->rows[i], group, end, prefetch_bytes);
    }
    for (int64_t column = group; column < end; column += STEP) {
      add_step(form, rows, weights, column - origin, x, column, scales, sums);
    }
  }
  if (whole < stop) {
    // The last columns of all: both sides with zeros after them.
    float rest[TILE_ROWS][STEP];
    const void* rest_x[TILE_ROWS];
    uint8_t bytes[TILE_COLUMNS][STEP * 4];
    TileWeights last = *weights;
    UNROLL for (int r = 0; r < rows; r++) {
      memset(rest[r], 0, sizeof rest[r]);
      memcpy(rest[r], (const float*)x[r] + whole, (size_t)(stop - whole) * sizeof(float));
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

#define SUM_ROWS(SUM, FORM, ROWS) \
  case ROWS: SUM(FORM, ROWS, weights, x, start, stop, num_columns, prefetch_bytes, out); break;
#define SUM_THREE_ROWS(SUM, FORM) SUM_ROWS(SUM, FORM, 1) SUM_ROWS(SUM, FORM, 2) SUM_ROWS(SUM, FORM, 3)
#define SUM_FOUR_ROWS(SUM, FORM) SUM_THREE_ROWS(SUM, FORM) SUM_ROWS(SUM, FORM, 4)
#define SUM_SIX_ROWS(SUM, FORM) SUM_FOUR_ROWS(SUM, FORM) SUM_ROWS(SUM, FORM, 5) SUM_ROWS(SUM, FORM, 6)
#if defined(__AVX512BW__)
#define SUM_ALL_ROWS(FORM) SUM_SIX_ROWS(sum_tile, FORM)
#elif defined(__AVX2__)
#define SUM_ALL_ROWS(FORM) SUM_THREE_ROWS(sum_tile, FORM)
#else
#define SUM_ALL_ROWS(FORM) SUM_ROWS(sum_tile, FORM, 1) SUM_ROWS(sum_tile, FORM, 2)
#endif
#define SUM_FORM(FORM, ALL_ROWS) \
  case FORM: \
    switch (rows) { ALL_ROWS } \
    break;

// A tile of up to `count_tile_rows` rows.
static void sum_rows(
    Form form, int rows, const TileWeights* weights, const void* const* x, int64_t start, int64_t stop,
    int64_t num_columns, int64_t prefetch_bytes, float out[][TILE_COLUMNS]) {
  switch (form) {
    SUM_FORM(FORM_F32, SUM_ALL_ROWS(FORM_F32))
    SUM_FORM(FORM_BF16, SUM_ALL_ROWS(FORM_BF16))
    SUM_FORM(FORM_FP8, SUM_ALL_ROWS(FORM_FP8))
    SUM_FORM(FORM_INT8, SUM_ALL_ROWS(FORM_INT8))
    SUM_FORM(FORM_INT4, SUM_ALL_ROWS(FORM_INT4))
    SUM_FORM(FORM_PANEL, SUM_ALL_ROWS(FORM_PANEL))
#if HAS_PAIRS
    SUM_FORM(FORM_BF16_PAIRS, SUM_SIX_ROWS(sum_pairs, FORM_BF16_PAIRS))
    SUM_FORM(FORM_FP8_PAIRS, SUM_FOUR_ROWS(sum_pairs, FORM_FP8_PAIRS))
    SUM_FORM(FORM_PANEL_PAIRS, SUM_FOUR_ROWS(sum_pairs, FORM_PANEL_PAIRS))
#endif
    default: break;
  }
}

// Rows of activations whose sums with TILE_COLUMNS rows of weights stay in registers.
static int count_tile_rows(Form form) {
#if HAS_PAIRS
  if (is_paired(form)) return form == FORM_BF16_PAIRS ? PAIRED_ROWS : PAIRED_SCALED_ROWS;
#else
  (void)form;
#endif
  return TILE_ROWS;
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

// Widens a tile's columns [start, stop) to `panel`, and points the tile there. Returns the form that they have then. Columns
// that are multiplied in their own form stay where they are.
static Form fill_panel(
    Form form, TileWeights* weights, int64_t start, int64_t stop, int64_t num_columns, int64_t distance, float* panel) {
  Form made = FORM_PANEL;
  int64_t row_bytes = sizeof(Lanes);
  switch (form) {
    case FORM_F32: fill_panel_of(FORM_F32, weights, start, stop, num_columns, distance, panel); break;
    case FORM_BF16: fill_panel_of(FORM_BF16, weights, start, stop, num_columns, distance, panel); break;
    case FORM_FP8: fill_panel_of(FORM_FP8, weights, start, stop, num_columns, distance, panel); break;
    case FORM_INT8: fill_panel_of(FORM_INT8, weights, start, stop, num_columns, distance, panel); break;
    case FORM_INT4: fill_panel_of(FORM_INT4, weights, start, stop, num_columns, distance, panel); break;
#if HAS_PAIRS
    case FORM_FP8_PAIRS:
      fill_pairs(weights, start, stop, num_columns, distance, (uint8_t*)panel);
      made = FORM_PANEL_PAIRS;
      row_bytes = sizeof(Pairs);
      break;
#endif
    default: return form;
  }
  for (int i = 0; i < TILE_COLUMNS; i++) weights->rows[i] = (const uint8_t*)panel + i * row_bytes;
  return made;
}

// Adds the sums of one tile over the columns [start, end) to the outputs, `apart` from each other for one row of
// activations; the first block overwrites them.
INLINE void add_tile(
    Form form, const Matrix* matrix, const TileWeights* weights, const void* const* x, int rows, int64_t start,
    int64_t end, int64_t prefetch_bytes, int valid, float* out, int64_t out_stride, int64_t apart) {
  float sums[TILE_ROWS][TILE_COLUMNS];
  sum_rows(form, rows, weights, x, start, end, matrix->num_columns, prefetch_bytes, sums);
  for (int r = 0; r < rows; r++) {
    float* to = out + r * out_stride;
    for (int i = 0; i < valid; i++, to += apart) *to = start == 0 ? sums[r][i] : *to + sums[r][i];
  }
}

// out[n][row - first] = the product of x[n] with the matrix's rows [first, stop). `x` has rows of bfloat16 where the form
// is one of pairs, else of float32.
//
// Two tiles of rows are multiplied while the weights are widened: a tile's weights come from memory once, then from the
// first cache. Its rows of weights lie a quarter of [first, stop) apart, so that memory is read in TILE_COLUMNS long
// streams, which the processor fetches ahead; from tiles of neighbours it sees short rows in turns (measured on Zen 4: 1.2
// to 1.6 times the rate for rows of 512 to 1,024 bytes).
//
// For more, the weights of a tile are widened once for ROW_BLOCK rows, to a panel that stays in the first cache.
static void multiply_rows(
    const Matrix* matrix, int64_t first, int64_t stop, const void* const* x, int64_t num_x, float* out,
    int64_t out_stride) {
  const int64_t columns = matrix->num_columns;
  const int tile_rows = count_tile_rows(matrix->form);
  if (num_x <= 2 * tile_rows) {
    const int64_t apart = (stop - first + TILE_COLUMNS - 1) / TILE_COLUMNS;
    for (int64_t row = first; row < first + apart; row++) {
      const TileWeights weights = pick_weights(matrix, row, stop, apart);
      const int valid = count_valid(row, stop, apart);
      for (int64_t start = 0; start < columns; start += COLUMN_BLOCK) {
        const int64_t end = start + COLUMN_BLOCK < columns ? start + COLUMN_BLOCK : columns;
        for (int64_t n = 0; n < num_x; n += tile_rows) {
          const int rows = num_x - n < tile_rows ? (int)(num_x - n) : tile_rows;
          add_tile(
              matrix->form, matrix, &weights, x + n, rows, start, end, n == 0 ? STREAM_AHEAD : 0, valid,
              out + n * out_stride + (row - first), out_stride, apart);
        }
      }
    }
    return;
  }
  const int64_t distance = TILE_COLUMNS * matrix->row_bytes;
  float panel[(COLUMN_BLOCK + STEP) * TILE_COLUMNS] __attribute__((aligned(64)));
  for (int64_t start = 0; start < columns; start += COLUMN_BLOCK) {
    const int64_t end = start + COLUMN_BLOCK < columns ? start + COLUMN_BLOCK : columns;
    for (int64_t block = 0; block < num_x; block += ROW_BLOCK) {
      const int64_t block_end = block + ROW_BLOCK < num_x ? block + ROW_BLOCK : num_x;
      for (int64_t row = first; row < stop; row += TILE_COLUMNS) {
        TileWeights weights = pick_weights(matrix, row, stop, 1);
        const int valid = count_valid(row, stop, 1);
        const Form form = fill_panel(matrix->form, &weights, start, end, columns, distance, panel);
        for (int64_t n = block; n < block_end; n += tile_rows) {
          const int rows = block_end - n < tile_rows ? (int)(block_end - n) : tile_rows;
          add_tile(
              form, matrix, &weights, x + n, rows, start, end, form == matrix->form && n == block ? distance : 0, valid,
              out + n * out_stride + (row - first), out_stride, 1);
        }
      }
    }
  }
}

#endif
