// Products from weights as they are stored, called by compiled JAX programs on CPUs.
//
// step3_products: x [N, K] with one or more matrices [O, K] -> one output [N, O] for each matrix.
// step3_swiglu: down(silu(gate x) * up x) for x [N, D], in one call.
// step3_experts: the sum of the chosen experts' SwiGLU for each token.
// step3_attend: attention of the newest tokens over pages of the KV cache.
// step3_rows: rows of a table [V, K] by ids [N], as they are stored.
// Activations, sums and outputs are float32. The first three are also given how many leading rows of x to compute: the
// outputs of the others, which are padding, are 0. Those named _rounded round activations to bfloat16 before they meet
// weights in bfloat16 or FP8. See cpu_kernels/api.py for what may be given.

#include "attention.h"
#include "experts.h"
#include "frame.h"
#include "work.h"

enum { MAX_MATRICES = 8 };

typedef struct {
  int num_matrices;
  int64_t num_x;
  const void** x[2];  // rows in float32, and rounded
  int64_t unit_rows;
  int64_t first_unit[MAX_MATRICES + 1];
  Matrix matrices[MAX_MATRICES];
  float* outputs[MAX_MATRICES];
} Products;

static void run_product(const void* job, int phase, int64_t unit) {
  (void)phase;
  const Products* products = job;
  int index = 0;
  while (unit >= products->first_unit[index + 1]) index++;
  const Matrix* matrix = &products->matrices[index];
  const int64_t first = (unit - products->first_unit[index]) * products->unit_rows;
  const int64_t stop = first + products->unit_rows < matrix->num_rows ? first + products->unit_rows : matrix->num_rows;
  multiply_rows(
      matrix, first, stop, products->x[is_paired(matrix->form)], products->num_x, products->outputs[index] + first,
      matrix->num_rows);
}

// Runs products that were read. Returns 0 without memory.
static int share_products(const XLA_FFI_CallFrame* frame, Products* products, int64_t operations) {
  const XLA_FFI_Buffer* x = argument(frame, 0);
  const int64_t num_columns = x->dims[1];
  int64_t all_rows = 0;
  int has_pairs = 0;
  for (int i = 0; i < products->num_matrices; i++) {
    all_rows += products->matrices[i].num_rows;
    has_pairs |= is_paired(products->matrices[i].form);
  }
  const int64_t num_threads = operations < MIN_SHARED_OPERATIONS ? 1 : count_threads(frame);
  products->unit_rows = choose_unit_rows(all_rows, num_threads);
  for (int i = 0; i < products->num_matrices; i++) {
    const int64_t rows = products->matrices[i].num_rows;
    products->first_unit[i + 1] = products->first_unit[i] + (rows + products->unit_rows - 1) / products->unit_rows;
  }
  Activations read;
  int is_done = read_activations(x, products->num_x, has_pairs, &read);
  const void** rows = malloc(2 * sizeof *rows * (size_t)(products->num_x + 1));
  is_done = is_done && rows;
  if (is_done) {
    for (int paired = 0; paired <= has_pairs; paired++) {
      products->x[paired] = rows + paired * products->num_x;
      for (int64_t n = 0; n < products->num_x; n++) {
        products->x[paired][n] = activation_row(&read, paired, n, num_columns);
      }
    }
    is_done =
        run_units(frame, num_threads, 1, &products->first_unit[products->num_matrices], run_product, products);
  }
  free(rows);
  free(read.rounded);
  return is_done;
}

static XLA_FFI_Error* run_products(const XLA_FFI_CallFrame* frame, int rounds) {
  const char* name = "step3_products";
  const XLA_FFI_Buffer* x = argument(frame, 0);
  if (!x || x->rank != 2 || x->dtype != XLA_FFI_DataType_F32) return refuse(frame, name, 0, "is not float32 [N, K]");
  Products products = {.num_matrices = (int)frame->rets.size};
  const char* problem = read_num_rows(argument(frame, 1), x, &products.num_x);
  if (problem) return refuse(frame, name, 1, problem);
  const int64_t num_columns = x->dims[1];
  if (products.num_matrices > MAX_MATRICES) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_products was given too many matrices");
  }
  Reader reader = {.frame = frame, .rounds = rounds, .index = 2};
  int64_t operations = 0;
  for (int i = 0; i < products.num_matrices; i++) {
    Matrix* matrix = &products.matrices[i];
    const XLA_FFI_Buffer* out = result(frame, i);
    problem = read_matrix(&reader, 0, num_columns, matrix);
    if (problem) return refuse(frame, name, reader.index, problem);
    if (out->dtype != XLA_FFI_DataType_F32 || out->rank != 2 || out->dims[0] != x->dims[0] ||
        out->dims[1] != matrix->num_rows) {
      return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_products has outputs of other sizes");
    }
    products.outputs[i] = out->data;
    clear_rows(out->data, products.num_x, x->dims[0], matrix->num_rows);
    operations += matrix->num_rows * num_columns * products.num_x;
  }
  if (share_products(frame, &products, operations)) return NULL;
  return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for a product");
}

// table [V, K], ids [N] -> [N, K]. An id below or above all rows takes the first or the last one.
static XLA_FFI_Error* run_rows(const XLA_FFI_CallFrame* frame, int rounds) {
  (void)rounds;
  const XLA_FFI_Buffer *table = argument(frame, 0), *ids = argument(frame, 1);
  const XLA_FFI_Buffer* out = result(frame, 0);
  const int64_t value_bytes = table ? count_value_bytes(table->dtype) : 0;
  if (!value_bytes || table->rank != 2 || table->dims[0] < 1) return refuse(frame, "step3_rows", 0, "is not a table [V, K]");
  if (!ids || ids->rank != 1 || ids->dtype != XLA_FFI_DataType_S32) return refuse(frame, "step3_rows", 1, "is not int32 [N]");
  if (!out || out->rank != 2 || out->dtype != table->dtype || out->dims[0] != ids->dims[0] ||
      out->dims[1] != table->dims[1]) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_rows has an output of another size");
  }
  const int64_t row_bytes = table->dims[1] * value_bytes;
  for (int64_t n = 0; n < ids->dims[0]; n++) {
    int64_t row = ((const int32_t*)ids->data)[n];
    row = row < 0 ? 0 : row < table->dims[0] ? row : table->dims[0] - 1;
    memcpy((uint8_t*)out->data + n * row_bytes, (const uint8_t*)table->data + row * row_bytes, (size_t)row_bytes);
  }
  return NULL;
}

#define OPERATION(NAME, RUN, ROUNDS) \
  XLA_FFI_Error* NAME(XLA_FFI_CallFrame* frame) { \
    if (answer_metadata(frame)) return NULL; \
    if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL; \
    return RUN(frame, ROUNDS); \
  }

OPERATION(step3_products, run_products, 0)
OPERATION(step3_swiglu, run_swiglu, 0)
OPERATION(step3_experts, run_experts, 0)
OPERATION(step3_attend, run_attend, 0)
OPERATION(step3_rows, run_rows, 0)
#if HAS_PAIRS
OPERATION(step3_products_rounded, run_products, 1)
OPERATION(step3_swiglu_rounded, run_swiglu, 1)
OPERATION(step3_experts_rounded, run_experts, 1)
OPERATION(step3_attend_rounded, run_attend, 1)
OPERATION(step3_rows_rounded, run_rows, 1)
#endif
