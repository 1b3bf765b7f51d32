// Attention of each sequence's newest tokens over its pages of the KV cache, with one key/value head for all heads.
//
// A unit is HEAD_BLOCK heads of one token. It goes over the tokens that this one sees, TOKEN_BLOCK at a time: scores, then
// a softmax whose largest score so far is subtracted, then the values times their weights. So what a token gives does not
// depend on the others of the call, nor on threads.

#ifndef STEP3_ATTENTION_H_
#define STEP3_ATTENTION_H_

#include "frame.h"
#include "work.h"

enum {
  HEAD_BLOCK = 8,
  TOKEN_BLOCK = 64,
  VALUE_ROWS = LANES == 16 ? 8 : 4,  // heads whose sums stay in registers
};

typedef struct {
  int64_t num_sequences, tokens, heads, head_dim;
  int64_t num_pages, page_size, max_pages, first_page;
  Form form;
  int64_t row_bytes;  // of a stored key or value
  const float* queries;
  const uint8_t *keys, *values;
  const int32_t *table, *lengths;
  float* out;
} Attention;

// How many cached tokens a query sees: those up to itself for which the table has room.
static int64_t count_seen(const Attention* all, int64_t sequence, int64_t token) {
  return least(all->lengths[sequence] - all->tokens + 1 + token, all->max_pages * all->page_size);
}

// Turns the scores of `count` tokens into weights, and adds these to their sum. Returns what earlier sums are to be
// multiplied with.
static float weigh_scores(float scores[TOKEN_BLOCK], int64_t count, float* top, float* norm) {
  float new_top = *top, lanes[LANES], sum = 0.0f;
  for (int64_t s = 0; s < count; s++) new_top = scores[s] > new_top ? scores[s] : new_top;
  for (int64_t s = count; s < TOKEN_BLOCK; s++) scores[s] = new_top;
  Lanes total = fill(0.0f);
  for (int64_t s = 0; s < TOKEN_BLOCK; s += LANES) store(scores + s, exponential(load(scores + s) - fill(new_top)));
  for (int64_t s = count; s < TOKEN_BLOCK; s++) scores[s] = 0.0f;
  for (int64_t s = 0; s < TOKEN_BLOCK; s += LANES) total = total + load(scores + s);
  store(lanes, total);
  for (int i = 0; i < LANES; i++) sum += lanes[i];
  store(lanes, exponential(fill(*top - new_top)));
  *top = new_top;
  *norm = *norm * lanes[0] + sum;
  return lanes[0];
}

// out[r] = out[r] * shrink[r] + the sum of weights[r][s] * value s, for `rows` heads.
INLINE void add_values(
    Form form, int rows, const uint8_t* values, int64_t row_bytes, int64_t count, int64_t head_dim,
    const float* weights, const float* shrink, float* out) {
  for (int64_t column = 0; column < head_dim; column += STEP) {
    Lanes sums[VALUE_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int half = 0; half < 2; half++) {
        sums[r][half] = load(out + r * head_dim + column + half * LANES) * fill(shrink[r]);
      }
    }
    for (int64_t s = 0; s < count; s++) {
      Lanes value[2];
      widen(form, values + s * row_bytes, column, value);
      UNROLL for (int r = 0; r < rows; r++) {
        const Lanes weight = fill(weights[r * TOKEN_BLOCK + s]);
        UNROLL for (int half = 0; half < 2; half++) sums[r][half] = multiply_add(weight, value[half], sums[r][half]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int half = 0; half < 2; half++) store(out + r * head_dim + column + half * LANES, sums[r][half]);
    }
  }
}

static void add_all_values(
    Form form, int rows, const uint8_t* values, int64_t row_bytes, int64_t count, int64_t head_dim,
    const float* weights, const float* shrink, float* out) {
  for (int r = 0; r < rows;) {
    // The same sums for one head as for many.
    const int some = rows - r >= VALUE_ROWS ? VALUE_ROWS : 1;
    const float *w = weights + r * TOKEN_BLOCK, *by = shrink + r;
    float* to = out + r * head_dim;
    if (form == FORM_F32) {
      if (some == 1) add_values(FORM_F32, 1, values, row_bytes, count, head_dim, w, by, to);
      else add_values(FORM_F32, VALUE_ROWS, values, row_bytes, count, head_dim, w, by, to);
    } else {
      if (some == 1) add_values(FORM_BF16, 1, values, row_bytes, count, head_dim, w, by, to);
      else add_values(FORM_BF16, VALUE_ROWS, values, row_bytes, count, head_dim, w, by, to);
    }
    r += some;
  }
}

static void run_attention_unit(const void* job, int phase, int64_t unit) {
  (void)phase;
  const Attention* all = job;
  const int64_t blocks = (all->heads + HEAD_BLOCK - 1) / HEAD_BLOCK;
  const int64_t first = unit % blocks * HEAD_BLOCK, token = unit / blocks % all->tokens;
  const int64_t sequence = unit / blocks / all->tokens, end = count_seen(all, sequence, token);
  const int rows = (int)least(HEAD_BLOCK, all->heads - first);
  const int64_t at = ((sequence * all->tokens + token) * all->heads + first) * all->head_dim;
  float scores[HEAD_BLOCK * TOKEN_BLOCK], top[HEAD_BLOCK], norm[HEAD_BLOCK], shrink[HEAD_BLOCK];
  const void* queries[HEAD_BLOCK];
  float* out = all->out + at;
  for (int r = 0; r < rows; r++) {
    queries[r] = all->queries + at + r * all->head_dim;
    top[r] = -1e30f;
    norm[r] = 0.0f;
  }
  memset(out, 0, (size_t)(rows * all->head_dim) * sizeof(float));
  for (int64_t start = 0; start < end;) {
    const int64_t place = start % all->page_size;
    const int64_t count = least(least(TOKEN_BLOCK, all->page_size - place), end - start);
    int64_t page = all->table[sequence * all->max_pages + start / all->page_size] + all->first_page;
    page = page < 0 ? 0 : least(page, all->num_pages - 1);
    const int64_t offset = (page * all->page_size + place) * all->row_bytes;
    const Matrix keys = {
        .form = all->form, .num_rows = count, .num_columns = all->head_dim, .row_bytes = all->row_bytes,
        .values = all->keys + offset, .rows_per_scale = 1};
    multiply_rows(&keys, 0, count, queries, rows, scores, TOKEN_BLOCK);
    for (int r = 0; r < rows; r++) shrink[r] = weigh_scores(scores + r * TOKEN_BLOCK, count, &top[r], &norm[r]);
    add_all_values(
        all->form, rows, all->values + offset, all->row_bytes, count, all->head_dim, scores, shrink, out);
    start += count;
  }
  for (int r = 0; r < rows && end > 0; r++) {
    for (int64_t i = 0; i < all->head_dim; i++) out[r * all->head_dim + i] /= norm[r];
  }
}

static int has_shape(const XLA_FFI_Buffer* buffer, XLA_FFI_DataType dtype, int64_t rank, const int64_t* dims) {
  if (!buffer || buffer->dtype != dtype || buffer->rank != rank) return 0;
  return rank == 0 || memcmp(buffer->dims, dims, (size_t)rank * sizeof *dims) == 0;
}

// queries [B, T, H, K] with the scale in them, keys and values [P, page, K], table [B, max_pages], lengths [B] and the
// layer's first page [] -> [B, T, H, K]. Pages in bfloat16 may come as integers of the same bits.
static XLA_FFI_Error* run_attend(const XLA_FFI_CallFrame* frame, int rounds) {
  (void)rounds;
  const char* name = "step3_attend";
  const XLA_FFI_Buffer *queries = argument(frame, 0), *keys = argument(frame, 1), *values = argument(frame, 2);
  const XLA_FFI_Buffer *table = argument(frame, 3), *lengths = argument(frame, 4), *first_page = argument(frame, 5);
  XLA_FFI_Buffer* out = result(frame, 0);
  if (!queries || queries->dtype != XLA_FFI_DataType_F32 || queries->rank != 4 || queries->dims[3] % STEP) {
    return refuse(frame, name, 0, "is not float32 [B, T, H, K], K a multiple of 32");
  }
  const int64_t* dims = queries->dims;
  const int is_wide = keys && keys->dtype == XLA_FFI_DataType_F32;
  const int is_half = keys && (keys->dtype == XLA_FFI_DataType_BF16 || keys->dtype == XLA_FFI_DataType_S16);
  if (!(is_wide || is_half) || keys->rank != 3 || keys->dims[2] != dims[3] || keys->dims[0] < 1 || keys->dims[1] < 1) {
    return refuse(frame, name, 1, "is not pages [P, page, K] in float32 or bfloat16");
  }
  if (!has_shape(values, keys->dtype, 3, keys->dims)) return refuse(frame, name, 2, "is not as the keys are");
  if (!table || table->dtype != XLA_FFI_DataType_S32 || table->rank != 2 || table->dims[0] != dims[0]) {
    return refuse(frame, name, 3, "is not a table of pages, int32 [B, max_pages]");
  }
  if (!has_shape(lengths, XLA_FFI_DataType_S32, 1, dims)) return refuse(frame, name, 4, "is not lengths, int32 [B]");
  if (!has_shape(first_page, XLA_FFI_DataType_S32, 0, NULL)) return refuse(frame, name, 5, "is not an int32");
  if (!has_shape(out, XLA_FFI_DataType_F32, 4, dims)) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_attend has an output of another size");
  }
  const Form form = is_wide ? FORM_F32 : FORM_BF16;
  const Attention all = {
      .num_sequences = dims[0], .tokens = dims[1], .heads = dims[2], .head_dim = dims[3],
      .num_pages = keys->dims[0], .page_size = keys->dims[1], .max_pages = table->dims[1],
      .first_page = *(const int32_t*)first_page->data, .form = form, .row_bytes = stored_bytes(form, dims[3]),
      .queries = queries->data, .keys = keys->data, .values = values->data, .table = table->data,
      .lengths = lengths->data, .out = out->data};
  int64_t operations = 0;
  for (int64_t sequence = 0; sequence < all.num_sequences; sequence++) {
    const int64_t seen = count_seen(&all, sequence, all.tokens - 1);
    if (seen > 0) operations += seen * all.tokens * all.heads * all.head_dim * 2;
  }
  const int64_t units = all.num_sequences * all.tokens * ((all.heads + HEAD_BLOCK - 1) / HEAD_BLOCK);
  const int64_t num_threads = operations < MIN_SHARED_OPERATIONS ? 1 : count_threads(frame);
  if (run_units(frame, num_threads, 1, &units, run_attention_unit, &all)) return NULL;
  return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for attention");
}

#endif
