// Products in bfloat16, for processors that multiply pairs of columns in one instruction: activations are rounded to
// bfloat16, sums are float32.
//
// Lane j of a block sums the pairs of columns 2 j, 2 j + 1, then those STEP columns further, and so on. FP8 values are
// bfloat16 numbers: the pairs of GROUP columns are summed first, then added times their scale. As in float32, that order
// does not depend on the number of rows.

#ifndef STEP3_PAIRS_H_
#define STEP3_PAIRS_H_

#include "weights.h"

#if HAS_PAIRS

// With scales each output has two sums, of which one is in use between groups alone. Measured on Zen 4: with four rows, FP8
// takes 0.6 to 0.75 of the time that it takes in float32; with three or six more.
enum { PAIRED_ROWS = TILE_ROWS, PAIRED_SCALED_ROWS = 4 };

// STEP columns of one row. A panel has those of TILE_COLUMNS rows one after the other.
INLINE Pairs widen_to_pairs(Form form, const uint8_t* row, int64_t column) {
  switch (form) {
    case FORM_FP8_PAIRS: return widen_fp8_pairs(row + column);
    case FORM_PANEL_PAIRS: return load_pairs(row + 2 * TILE_COLUMNS * column);
    default: return load_pairs(row + 2 * column);
  }
}

INLINE void add_pairs(
    Form form, int rows, const TileWeights* weights, int64_t column, const void* const* x, int64_t x_column,
    Lanes sums[][TILE_COLUMNS]) {
  UNROLL for (int i = 0; i < TILE_COLUMNS; i++) {
    const Pairs weight = widen_to_pairs(form, weights->rows[i], column);
    UNROLL for (int r = 0; r < rows; r++) {
      sums[r][i] = multiply_pairs(load_pairs((const uint16_t*)x[r] + x_column), weight, sums[r][i]);
    }
  }
}

// The last columns of all, fewer than STEP: both sides with zeros after them.
INLINE void add_last_pairs(
    Form form, int rows, const TileWeights* weights, int64_t column, int64_t stop, int64_t num_columns, int64_t origin,
    const void* const* x, Lanes sums[][TILE_COLUMNS]) {
  uint16_t rest[PAIRED_ROWS][STEP];
  const void* rest_x[PAIRED_ROWS];
  uint8_t bytes[TILE_COLUMNS][STEP * 4];
  TileWeights last = *weights;
  UNROLL for (int r = 0; r < rows; r++) {
    memset(rest[r], 0, sizeof rest[r]);
    memcpy(rest[r], (const uint16_t*)x[r] + column, (size_t)(stop - column) * sizeof(uint16_t));
    rest_x[r] = rest[r];
  }
  if (form == FORM_PANEL_PAIRS) {  // it has zeros there
    add_pairs(form, rows, weights, column - origin, rest_x, 0, sums);
    return;
  }
  UNROLL for (int i = 0; i < TILE_COLUMNS; i++) {
    copy_rest(form, weights->rows[i], column, num_columns, bytes[i]);
    last.rows[i] = bytes[i];
  }
  add_pairs(form, rows, &last, 0, rest_x, 0, sums);
}

// As sum_tile, with `x` in bfloat16.
INLINE void sum_pairs(
    Form form, int rows, const TileWeights* weights, const void* const* x, int64_t start, int64_t stop,
    int64_t num_columns, int64_t prefetch_bytes, float out[][TILE_COLUMNS]) {
  Lanes sums[PAIRED_ROWS][TILE_COLUMNS], parts[PAIRED_ROWS][TILE_COLUMNS];
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int i = 0; i < TILE_COLUMNS; i++) sums[r][i] = parts[r][i] = fill(0.0f);
  }
  const int64_t origin = form == FORM_PANEL_PAIRS ? start : 0;
  for (int64_t group = start; group < stop; group += GROUP) {
    const int64_t end = group + GROUP < stop ? group + GROUP : stop;
    if (form != FORM_PANEL_PAIRS && prefetch_bytes) {
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) prefetch(form, weights->rows[i], group, end, prefetch_bytes);
    }
    int64_t column = group;
    for (; column + STEP <= end; column += STEP) add_pairs(form, rows, weights, column - origin, x, column, parts);
    if (column < end) add_last_pairs(form, rows, weights, column, stop, num_columns, origin, x, parts);
    if (has_scales(form)) {
      UNROLL for (int i = 0; i < TILE_COLUMNS; i++) {
        const Lanes scale = find_scale(form, weights->scales[i], group);
        UNROLL for (int r = 0; r < rows; r++) {
          sums[r][i] = multiply_add(parts[r][i], scale, sums[r][i]);
          parts[r][i] = fill(0.0f);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) sum_lanes(has_scales(form) ? sums[r] : parts[r], out[r]);
}

// The columns [start, stop) of a tile's FP8 rows in bfloat16, zeros after them up to a multiple of STEP; without scales.
static void fill_pairs(
    const TileWeights* weights, int64_t start, int64_t stop, int64_t num_columns, int64_t distance, uint8_t* panel) {
  for (int i = 0; i < TILE_COLUMNS; i++) {
    const uint8_t* row = weights->rows[i];
    uint8_t* to = panel + i * sizeof(Pairs);
    prefetch(FORM_FP8_PAIRS, row, start, stop, distance);
    int64_t column = start;
    for (; column + STEP <= stop; column += STEP) {
      store_pairs(to + 2 * TILE_COLUMNS * (column - start), widen_fp8_pairs(row + column));
    }
    if (column < stop) {
      uint8_t bytes[STEP * 4];
      copy_rest(FORM_FP8_PAIRS, row, column, num_columns, bytes);
      store_pairs(to + 2 * TILE_COLUMNS * (column - start), widen_fp8_pairs(bytes));
    }
  }
}

#endif

#endif
