// A vector of float32 lanes and what each instruction set has for it. The library is compiled once for each set; which of
// them this is follows from the compiler's flags.

#ifndef STEP3_LANES_H_
#define STEP3_LANES_H_

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// ROWS x COLUMNS accumulators of a tile stay in registers: 32 of them with AVX-512, else 16.
enum { TILE_COLUMNS = 4 };

#if defined(__AVX512BW__)

enum { LANES = 16, TILE_ROWS = 6 };
typedef __m512 Lanes;
typedef __m512i Bits;

INLINE Lanes load(const float* from) { return _mm512_loadu_ps(from); }
INLINE void store(float* to, Lanes value) { _mm512_storeu_ps(to, value); }
INLINE Lanes fill(float value) { return _mm512_set1_ps(value); }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }

INLINE void widen_bf16(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + 32 * half)));
    out[half] = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
}

INLINE void widen_int8(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    out[half] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16 * half))));
  }
}

// One unit: the low halves of its 16 bytes, then the high ones.
INLINE void widen_int4(const uint8_t* unit, int column, Lanes out[2]) {
  (void)column;
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)unit));
  const __m512i zero = _mm512_set1_epi32(8);
  const __m512i low = _mm512_and_si512(wide, _mm512_set1_epi32(15));
  out[0] = _mm512_cvtepi32_ps(_mm512_sub_epi32(low, zero));
  out[1] = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(wide, 4), zero));
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAS_PAIRS 1

// STEP columns in bfloat16.
typedef __m512i Pairs;

INLINE Pairs load_pairs(const void* from) { return _mm512_loadu_si512(from); }
INLINE void store_pairs(void* to, Pairs pairs) { _mm512_storeu_si512(to, pairs); }

// Lane j of `sum` with the products of columns 2 j and 2 j + 1 added.
INLINE Lanes multiply_pairs(Pairs a, Pairs b, Lanes sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// `count` values rounded to bfloat16.
INLINE void round_pairs(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    store_pairs(to + i, (__m512i)_mm512_cvtne2ps_pbh(load(from + i + LANES), load(from + i)));
  }
  if (i < count) {
    float rest[2 * LANES] = {0};
    uint16_t rounded[2 * LANES];
    memcpy(rest, from + i, (size_t)(count - i) * sizeof(float));
    store_pairs(rounded, (__m512i)_mm512_cvtne2ps_pbh(load(rest + LANES), load(rest)));
    memcpy(to + i, rounded, (size_t)(count - i) * sizeof(uint16_t));
  }
}

// The bits in bfloat16 of an e4m3 code without its sign; NaN stays NaN.
#define FP8_BITS(CODE) \
  ((CODE) == 0x7F ? 0x7FC0 \
   : (CODE) >= 8 ? ((CODE) << 4) + 0x3C00 \
   : (CODE) >= 4 ? 0x3C00 + ((CODE) - 4) * 0x20 \
   : (CODE) >= 2 ? 0x3B80 + ((CODE) - 2) * 0x40 \
                 : (CODE) * 0x3B00)
#define LOW_BYTE(CODE) FP8_BITS(CODE) & 0xFF
#define HIGH_BYTE(CODE) FP8_BITS(CODE) >> 8
#define LIST_4(WHAT, CODE) WHAT(CODE), WHAT(CODE + 1), WHAT(CODE + 2), WHAT(CODE + 3)
#define LIST_16(WHAT, CODE) \
  LIST_4(WHAT, CODE), LIST_4(WHAT, CODE + 4), LIST_4(WHAT, CODE + 8), LIST_4(WHAT, CODE + 12)
#define LIST_64(WHAT, CODE) \
  LIST_16(WHAT, CODE), LIST_16(WHAT, CODE + 16), LIST_16(WHAT, CODE + 32), LIST_16(WHAT, CODE + 48)
#define TWICE(INDEX) (INDEX) / 2
#define HALF_TWICE(INDEX) (INDEX) / 4 + ((INDEX) & 2) * 8
static const uint8_t fp8_low_bytes[128] __attribute__((aligned(64))) = {LIST_64(LOW_BYTE, 0), LIST_64(LOW_BYTE, 64)};
static const uint8_t fp8_high_bytes[128] __attribute__((aligned(64))) = {LIST_64(HIGH_BYTE, 0), LIST_64(HIGH_BYTE, 64)};
static const uint8_t each_twice[64] __attribute__((aligned(64))) = {LIST_64(TWICE, 0)};
static const uint8_t each_half_twice[64] __attribute__((aligned(64))) = {LIST_64(HALF_TWICE, 0)};

// STEP columns in an order in which each stands twice: the even places become the low bytes, the odd ones the high bytes.
INLINE Pairs find_fp8(const uint8_t* from, __m512i order) {
  const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  const __m512i codes = _mm512_permutexvar_epi8(order, bytes);
  __m512i pairs = _mm512_mask2_permutex2var_epi8(
      load_pairs(fp8_low_bytes), codes, 0x5555555555555555, load_pairs(fp8_low_bytes + 64));
  pairs = _mm512_mask2_permutex2var_epi8(
      load_pairs(fp8_high_bytes), pairs, 0xAAAAAAAAAAAAAAAA, load_pairs(fp8_high_bytes + 64));
  // With the sign of each: a | (b & c).
  return _mm512_ternarylogic_epi32(pairs, codes, _mm512_set1_epi16((short)0x8000), 0xF8);
}

INLINE Pairs widen_fp8_pairs(const uint8_t* from) { return find_fp8(from, load_pairs(each_twice)); }

// The columns come as the low and the high halves of 32 bits: column j, and LANES + j.
INLINE void widen_fp8(const uint8_t* from, Lanes out[2]) {
  const __m512i pairs = find_fp8(from, load_pairs(each_half_twice));
  out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}

#else

// e4m3 as half precision is the value / 256: the sign to bit 15, the others to bits 13 to 7. Subnormals stay exact.
INLINE void widen_fp8(const uint8_t* from, Lanes out[2]) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
  const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xBFFF));
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

#endif

#elif defined(__AVX2__)

enum { LANES = 8, TILE_ROWS = 3 };
typedef __m256 Lanes;
typedef __m256i Bits;

INLINE Lanes load(const float* from) { return _mm256_loadu_ps(from); }
INLINE void store(float* to, Lanes value) { _mm256_storeu_ps(to, value); }
INLINE Lanes fill(float value) { return _mm256_set1_ps(value); }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }

INLINE void widen_bf16(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + 16 * half)));
    out[half] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
}

INLINE void widen_fp8(const uint8_t* from, Lanes out[2]) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xBFFF));
  out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

INLINE void widen_int8(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    out[half] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * half))));
  }
}

INLINE void widen_int4(const uint8_t* unit, int column, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(unit + 8 * half)));
    const __m256i value = column ? _mm256_srli_epi32(wide, 4) : _mm256_and_si256(wide, _mm256_set1_epi32(15));
    out[half] = _mm256_cvtepi32_ps(_mm256_sub_epi32(value, _mm256_set1_epi32(8)));
  }
}

#else

enum { LANES = 8, TILE_ROWS = 2 };
typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Bits __attribute__((vector_size(32)));

INLINE Lanes load(const float* from) {
  Lanes value;
  memcpy(&value, from, sizeof value);
  return value;
}
INLINE void store(float* to, Lanes value) { memcpy(to, &value, sizeof value); }
INLINE Lanes fill(float value) { return (Lanes){value, value, value, value, value, value, value, value}; }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }

INLINE void widen_bf16(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    Bits bits;
    for (int i = 0; i < LANES; i++) {
      const uint8_t* at = from + 2 * (half * LANES + i);
      bits[i] = (int32_t)((uint32_t)at[0] << 16 | (uint32_t)at[1] << 24);
    }
    out[half] = (Lanes)bits;
  }
}

// The same value / 256 as the others, through float32 bits: subnormals are their mantissa times 2^-9.
INLINE void widen_fp8(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < LANES; i++) {
      const uint32_t byte = from[half * LANES + i], rest = byte & 0x7f;
      const uint32_t bits = (rest << 20) + (112u << 23);
      float value;
      memcpy(&value, &bits, sizeof value);
      value = rest < 8 ? (float)rest * 0x1p-17f : value;
      out[half][i] = byte & 0x80 ? -value : value;
    }
  }
}

INLINE void widen_int8(const uint8_t* from, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < LANES; i++) out[half][i] = (float)(int8_t)from[half * LANES + i];
  }
}

INLINE void widen_int4(const uint8_t* unit, int column, Lanes out[2]) {
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < LANES; i++) {
      const int byte = unit[half * LANES + i];
      out[half][i] = (float)((column ? byte >> 4 : byte & 15) - 8);
    }
  }
}

#endif

// Whether pairs of columns in bfloat16 are multiplied in one instruction.
#ifndef HAS_PAIRS
#define HAS_PAIRS 0
#endif

// The sums over the lanes of four vectors, each in the same order.
INLINE void sum_lanes(const Lanes values[TILE_COLUMNS], float sums[TILE_COLUMNS]) {
#if defined(__AVX512BW__)
  const __m512 a = _mm512_unpacklo_ps(values[0], values[1]) + _mm512_unpackhi_ps(values[0], values[1]);
  const __m512 b = _mm512_unpacklo_ps(values[2], values[3]) + _mm512_unpackhi_ps(values[2], values[3]);
  const __m512 both = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xEE);
  const __m256 half = _mm512_castps512_ps256(both) + _mm512_extractf32x8_ps(both, 1);
  _mm_storeu_ps(sums, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps(values[0], values[1]) + _mm256_unpackhi_ps(values[0], values[1]);
  const __m256 b = _mm256_unpacklo_ps(values[2], values[3]) + _mm256_unpackhi_ps(values[2], values[3]);
  const __m256 both = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xEE);
  _mm_storeu_ps(sums, _mm256_castps256_ps128(both) + _mm256_extractf128_ps(both, 1));
#else
  for (int i = 0; i < TILE_COLUMNS; i++) {
    const Lanes v = values[i];
    sums[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
#endif
}

// e^x to about 2 units of the last place: 2^n times a polynomial of the rest (Cephes' coefficients).
INLINE Lanes exponential(Lanes x) {
  const Lanes least = fill(-87.3f), most = fill(88.3f);
#if defined(__AVX512BW__)
  x = _mm512_min_ps(_mm512_max_ps(x, least), most);
#elif defined(__AVX2__)
  x = _mm256_min_ps(_mm256_max_ps(x, least), most);
#else
  for (int i = 0; i < LANES; i++) x[i] = x[i] < least[i] ? least[i] : x[i] > most[i] ? most[i] : x[i];
#endif
  // Adding 1.5 * 2^23 leaves the nearest whole number in the last bits.
  const Lanes magic = fill(12582912.0f);
  const Lanes shifted = multiply_add(x, fill(1.44269504088896341f), magic);
  const Lanes whole = shifted - magic;
  Lanes rest = multiply_add(whole, fill(-0.693359375f), x);
  rest = multiply_add(whole, fill(2.12194440e-4f), rest);
  Lanes sum = fill(1.9875691500e-4f);
  sum = multiply_add(sum, rest, fill(1.3981999507e-3f));
  sum = multiply_add(sum, rest, fill(8.3334519073e-3f));
  sum = multiply_add(sum, rest, fill(4.1665795894e-2f));
  sum = multiply_add(sum, rest, fill(1.6666665459e-1f));
  sum = multiply_add(sum, rest, fill(5.0000001201e-1f));
  sum = multiply_add(sum, rest * rest, rest) + fill(1.0f);
  int32_t bits[LANES];
  float factors[LANES];
  store(factors, shifted);
  memcpy(bits, factors, sizeof bits);
  for (int i = 0; i < LANES; i++) bits[i] = (bits[i] - 0x4B400000 + 127) << 23;
  memcpy(factors, bits, sizeof bits);
  return sum * load(factors);
}

// silu(gate) * up, written over gate.
INLINE void apply_swiglu(float* gate, const float* up) {
  const Lanes g = load(gate);
  store(gate, g / (fill(1.0f) + exponential(-g)) * load(up));
}

#endif
