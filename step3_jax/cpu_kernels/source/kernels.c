// Products from weights as they are stored, called by compiled JAX programs on CPUs.
//
// step3_products: x [N, K] with one or more matrices [O, K] -> one output [N, O] for each matrix.
// step3_experts: the sum of the chosen experts' SwiGLU for each token.
// Activations, sums and outputs are float32. See cpu_kernels/api.py for what may be given.

#include "experts.h"
#include "frame.h"
#include "work.h"

enum { MAX_MATRICES = 8 };

typedef struct {
  int num_matrices;
  int64_t num_x;
  const float** x;
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
      matrix, first, stop, products->x, products->num_x, products->outputs[index] + first, matrix->num_rows);
}

XLA_FFI_Error* step3_products(XLA_FFI_CallFrame* frame) {
  if (answer_metadata(frame)) return NULL;
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL;
  const XLA_FFI_Buffer* x = argument(frame, 0);
  if (!x || x->rank != 2 || x->dtype != XLA_FFI_DataType_F32) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_products takes x as float32 [N, K]");
  }
  Products products = {.num_x = x->dims[0], .num_matrices = (int)frame->rets.size};
  const int64_t num_columns = x->dims[1];
  if (products.num_matrices > MAX_MATRICES) {
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_products was given too many matrices");
  }
  int64_t index = 1, operations = 0, all_rows = 0;
  for (int i = 0; i < products.num_matrices; i++) {
    Matrix* matrix = &products.matrices[i];
    const XLA_FFI_Buffer* out = result(frame, i);
    if (!read_matrix(frame, &index, num_columns, matrix) || out->dtype != XLA_FFI_DataType_F32 || out->rank != 2 ||
        out->dims[0] != products.num_x || out->dims[1] != matrix->num_rows) {
      return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "step3_products was given a matrix of unknown form");
    }
    products.outputs[i] = out->data;
    all_rows += matrix->num_rows;
    operations += matrix->num_rows * num_columns * products.num_x;
  }
  const int64_t num_threads = operations < MIN_SHARED_OPERATIONS ? 1 : count_threads(frame);
  products.unit_rows = choose_unit_rows(all_rows, num_threads);
  for (int i = 0; i < products.num_matrices; i++) {
    const int64_t rows = products.matrices[i].num_rows;
    products.first_unit[i + 1] = products.first_unit[i] + (rows + products.unit_rows - 1) / products.unit_rows;
  }
  products.x = malloc(sizeof *products.x * (size_t)(products.num_x + 1));
  if (!products.x) return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for a product");
  for (int64_t n = 0; n < products.num_x; n++) products.x[n] = (const float*)x->data + n * num_columns;
  const int is_done =
      run_units(frame, num_threads, 1, &products.first_unit[products.num_matrices], run_product, &products);
  free(products.x);
  return is_done ? NULL : fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for a product");
}

XLA_FFI_Error* step3_experts(XLA_FFI_CallFrame* frame) {
  if (answer_metadata(frame)) return NULL;
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL;
  return run_experts(frame);
}

XLA_FFI_Error* step3_swiglu(XLA_FFI_CallFrame* frame) {
  if (answer_metadata(frame)) return NULL;
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL;
  return run_swiglu(frame);
}
