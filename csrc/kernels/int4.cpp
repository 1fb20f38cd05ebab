// Products with int4 weights (w4a16), used where they lie: eight in an int32, the first in the lowest bits, q + 8 each.
//
// A weight counts as q · scale, rounded to bf16 where activations are bf16. There are sixteen such numbers in a group, so
// they are made once, as a table, and weights are looked up. From there on the sums are those of dense weights.
//
// With AVX-512 BF16 sixteen bits of a row are looked up by their four nibbles in turn: in a block of 128 inputs the
// numbers 4 j + k come out together for k = 0 … 3, and activations are prepared in that order.
#include "kernels/gemm.h"

namespace eightfold::EIGHTFOLD_ISA {
namespace {

constexpr float kNumbers[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr int64_t kSmallestGroup = 32;  // but for that of a whole row

const char* packed_at(const Matrix& w, int64_t row, int64_t k) {
  return static_cast<const char*>(w.data) + row * w.stride + k / 2;
}

template <class T>
void widen_scales(const void* from, int64_t first, int64_t count, float* to) {
  const T* at = static_cast<const T*>(from) + first;
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(to + i, load(at + i));
  if (i < count) store_n(to + i, load_n(at + i, count - i), count - i);
}

// Scales [first, first + count) of a row.
void scales_of(const Matrix& w, int64_t row, int64_t first, int64_t count, float* to) {
  const int64_t at = row * w.groups.stride + first;
  if (w.groups.dtype == Dtype::bf16) return widen_scales<bf16>(w.groups.scale, at, count, to);
  if (w.groups.dtype == Dtype::f16) return widen_scales<f16>(w.groups.scale, at, count, to);
  widen_scales<float>(w.groups.scale, at, count, to);
}

// What a panel leads to: the next one of the same block of K, the first of the next block, or another matrix.
Upcoming after_panel(const Matrix& w, int64_t first, int64_t n, int64_t columns, int64_t k, int64_t part, Upcoming after) {
  const bool last = n + 2 * kTileColumns > columns;
  if (last && k + part == w.cols) return after;
  return {last ? packed_at(w, first, k + part) : packed_at(w, first + n + kTileColumns, k), w.stride};
}

using Wide = DotFloat<float>;

struct Table {
  alignas(64) float value[16];
};

EF_INLINE Table table_of(float scale, bool round) {
  Table table;
  for (int i = 0; i < 16; i += VL) {
    const vf exact = mul(load(kNumbers + i), set1(scale));
    store(table.value + i, round ? rounded_to_bf16(exact) : exact);
  }
  return table;
}

// `count` weights, a multiple of eight, as floats in their order.
EF_INLINE void look_up(const char* packed, int64_t count, const Table& table, float* to) {
#if EIGHTFOLD_LEVEL >= 1
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256 low = _mm256_load_ps(table.value), high = _mm256_load_ps(table.value + 8);
#endif
  for (int64_t i = 0; i < count; i += 8) {
    int32_t word;
    std::memcpy(&word, packed + i / 2, 4);
#if EIGHTFOLD_LEVEL >= 1
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
#if EIGHTFOLD_LEVEL >= 2
    _mm256_storeu_ps(to + i, _mm256_permutex2var_ps(low, index, high));
#else  // of an index three bits are heeded; the fourth becomes the sign, which chooses
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    _mm256_storeu_ps(to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                              _mm256_permutevar8x32_ps(high, index), upper));
#endif
#else
    for (int j = 0; j < 8; j++) to[i + j] = table.value[static_cast<uint32_t>(word) >> 4 * j & 15];
#endif
  }
}

// Elements [k, k + part) of a row as floats.
void widen_row(const Matrix& w, int64_t row, int64_t k, int64_t part, bool round, float* to) {
  float scales[Wide::kBlock / kSmallestGroup];
  const bool single = w.groups.size == w.cols;
  const int64_t group = single ? part : w.groups.size;
  scales_of(w, row, single ? 0 : k / group, single ? 1 : (part + group - 1) / group, scales);
  for (int64_t i = 0; i < part; i += group)
    look_up(packed_at(w, row, k + i), smaller(group, part - i), table_of(scales[i / group], round), to + i);
}

template <int N>
void float_panel(const Matrix& w, int64_t row, bool round, const float* x, int64_t x_stride, int64_t rows, int64_t k,
                 int64_t part, float* c, Upcoming next) {
  constexpr int64_t stride = Wide::kBlock + 32;  // rows apart in the first-level cache
  alignas(64) float wide[N * stride];
  for (int n = 0; n < N; n++) widen_row(w, row + n, k, part, round, wide + n * stride);
  panel<Wide, N>(x + k, x_stride, rows, wide, stride, part, k > 0, c, kMostColumns, next, part / 2);
}

// Any processor, any compute dtype.
void float_product(const Matrix& w, bool round, const float* x, int64_t x_stride, int64_t rows, int64_t first,
                   int64_t columns, float* c, Upcoming after) {
  for (int64_t k = 0; k < w.cols; k += Wide::kBlock) {
    const int64_t part = smaller(Wide::kBlock, w.cols - k);
    int64_t n = 0;
    for (; n + kTileColumns <= columns; n += kTileColumns)
      float_panel<kTileColumns>(w, first + n, round, x, x_stride, rows, k, part, c + n,
                                after_panel(w, first, n, columns, k, part, after));
    for (; n < columns; n++) float_panel<1>(w, first + n, round, x, x_stride, rows, k, part, c + n, {});
  }
}

#if EIGHTFOLD_LEVEL >= 3
using Narrow = DotBf16<bf16>;
constexpr int64_t kLookup = 128;                        // weights of a lookup: a cache line
constexpr int64_t kScales = Narrow::kBlock / kSmallestGroup;  // of a row of a block, at most

// A line of weights as four vectors of bf16, by G tables of sixteen: its groups.
template <int G>
struct Lookup {
  __m512i line, low, high;

  EF_INLINE Lookup(__m512i packed, const float* scales) : line(packed) {
    const vf numbers = load(kNumbers);
    const vf first = mul(numbers, set1(scales[0]));
    low = pairs_of(first, G == 1 ? first : mul(numbers, set1(scales[G > 1]))).v;
    if constexpr (G == 4) high = pairs_of(mul(numbers, set1(scales[2])), mul(numbers, set1(scales[3]))).v;
  }

  template <int K>
  EF_INLINE Pairs get() const {
    const __m512i nibbles = K == 0 ? line : _mm512_srli_epi16(line, 4 * K);
    if constexpr (G == 1) {  // of an index five bits are heeded, and both halves of the table are the same
      return {_mm512_permutexvar_epi16(nibbles, low)};
    } else {
      const __m512i lanes = _mm512_set_epi16(
          G * 31 / 32 << 4, G * 30 / 32 << 4, G * 29 / 32 << 4, G * 28 / 32 << 4, G * 27 / 32 << 4, G * 26 / 32 << 4,
          G * 25 / 32 << 4, G * 24 / 32 << 4, G * 23 / 32 << 4, G * 22 / 32 << 4, G * 21 / 32 << 4, G * 20 / 32 << 4,
          G * 19 / 32 << 4, G * 18 / 32 << 4, G * 17 / 32 << 4, G * 16 / 32 << 4, G * 15 / 32 << 4, G * 14 / 32 << 4,
          G * 13 / 32 << 4, G * 12 / 32 << 4, G * 11 / 32 << 4, G * 10 / 32 << 4, G * 9 / 32 << 4, G * 8 / 32 << 4,
          G * 7 / 32 << 4, G * 6 / 32 << 4, G * 5 / 32 << 4, G * 4 / 32 << 4, G * 3 / 32 << 4, G * 2 / 32 << 4,
          G * 1 / 32 << 4, 0);
      const __m512i index =  // (nibbles & 15) | lanes
          _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), lanes, 0xea);
      if constexpr (G == 2) return {_mm512_permutexvar_epi16(index, low)};
      return {_mm512_permutex2var_epi16(low, index, high)};
    }
  }
};

// A few rows of weights of a block of K, and their scales in floats: G for each line of weights.
template <int N>
struct Rows {
  const char* packed;  // of the first row
  int64_t stride;      // bytes
  int64_t length;      // weights of a row
  float scales[N * kScales];
};

template <int G, int N>
EF_INLINE void rows_of(const Matrix& w, int64_t row, int64_t k, int64_t part, Rows<N>& rows) {
  rows.packed = packed_at(w, row, k);
  rows.stride = w.stride;
  rows.length = part;
  const int64_t lines = (part + kLookup - 1) / kLookup, count = (part + w.groups.size - 1) / w.groups.size;
  for (int n = 0; n < N; n++) {
    float* to = rows.scales + n * kScales;
    if (w.groups.size == w.cols) {
      scales_of(w, row + n, 0, 1, to);
      for (int64_t i = 1; i < lines; i++) to[i] = to[0];
    } else {
      scales_of(w, row + n, k / w.groups.size, count, to);
      for (int64_t i = count; i < lines * G; i++) to[i] = 0.f;  // for activations that are zeros
    }
  }
}

EF_INLINE __m512i load_line(const char* at, int64_t weights) {
  if (weights >= kLookup) return _mm512_loadu_si512(at);
  return _mm512_maskz_loadu_epi8((1ull << weights / 2) - 1, at);
}

// M tokens × N rows of weights, as `tile` has it.
template <int G, int M, int N>
void packed_tile(const bf16* x, int64_t x_stride, const Rows<N>& w, bool add_to, float* c, Upcoming next) {
  vf acc[M][N];
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int n = 0; n < N; n++) acc[m][n] = zero();
  }
  const char* at = w.packed;
  const float* scales = w.scales;
  for (int64_t left = w.length; left > 0; left -= kLookup) {
    EF_UNROLL
    for (int n = 0; n < N; n++) {
      if (N > 1) __builtin_prefetch(next.at + n * next.stride, 0, 3);
      const Lookup<G> look(load_line(at + n * w.stride, left), scales + n * kScales);
      const auto step = [&](int k, Pairs weights) EF_LAMBDA {
        EF_UNROLL
        for (int m = 0; m < M; m++) dot_pairs(acc[m][n], load_pairs(x + m * x_stride + 32 * k), weights);
      };
      step(0, look.template get<0>());
      step(1, look.template get<1>());
      step(2, look.template get<2>());
      step(3, look.template get<3>());
    }
    at += kLookup / 2, next.at += kLookup / 2, x += kLookup, scales += G;
  }
  store_tile<M, N>(acc, add_to, c, kMostColumns);
}

template <int G, int N, int M = kTileRows>
EF_INLINE void packed_tile_of(int64_t rows, const bf16* x, int64_t x_stride, const Rows<N>& w, bool add_to, float* c,
                              Upcoming next) {
  if (rows == M) {
    packed_tile<G, M, N>(x, x_stride, w, add_to, c, next);
  } else if constexpr (M > 1) {
    packed_tile_of<G, N, M - 1>(rows, x, x_stride, w, add_to, c, next);
  }
}

template <int G, int N>
void packed_panel(const Matrix& w, int64_t row, const bf16* x, int64_t x_stride, int64_t rows, int64_t k, int64_t part,
                  float* c, Upcoming next) {
  Rows<N> own;
  rows_of<G>(w, row, k, part, own);
  if (rows <= kTileRows)
    return packed_tile_of<G, N>(rows, x + k, x_stride, own, k > 0, c, next.at ? next : Upcoming{own.packed, own.stride});
  constexpr int64_t stride = Narrow::kBlock + 32;  // rows apart in the first-level cache
  alignas(64) bf16 wide[N * stride];
  for (int n = 0; n < N; n++) {
    for (int64_t i = 0; i < part; i += kLookup) {
      const Lookup<G> look(load_line(own.packed + n * own.stride + i / 2, part - i),
                           own.scales + n * kScales + i / kLookup * G);
      bf16* to = wide + n * stride + i;
      store_pairs(to, look.template get<0>());
      store_pairs(to + 32, look.template get<1>());
      store_pairs(to + 64, look.template get<2>());
      store_pairs(to + 96, look.template get<3>());
    }
  }
  const int64_t length = round_up(part, kLookup);
  panel<Narrow, N>(x + k, x_stride, rows, wide, stride, length, k > 0, c, kMostColumns, next, part / 2);
}

template <int G>
void packed_product(const Matrix& w, const bf16* x, int64_t x_stride, int64_t rows, int64_t first, int64_t columns,
                    float* c, Upcoming after) {
  for (int64_t k = 0; k < w.cols; k += Narrow::kBlock) {
    const int64_t part = smaller(Narrow::kBlock, w.cols - k);
    int64_t n = 0;
    for (; n + kTileColumns <= columns; n += kTileColumns)
      packed_panel<G, kTileColumns>(w, first + n, x, x_stride, rows, k, part, c + n,
                                    after_panel(w, first, n, columns, k, part, after));
    for (; n < columns; n++) packed_panel<G, 1>(w, first + n, x, x_stride, rows, k, part, c + n, {});
  }
}
#endif

}  // namespace

void prepare_packed([[maybe_unused]] const float* x, [[maybe_unused]] int64_t width, [[maybe_unused]] char* to) {
#if EIGHTFOLD_LEVEL >= 3
  bf16* out = reinterpret_cast<bf16*>(to);
  for (int64_t i = 0; i < width; i += kLookup, out += kLookup) {
    alignas(64) uint16_t straight[kLookup] = {}, turned[kLookup];
    const int64_t count = smaller(kLookup, width - i);
    for (int64_t j = 0; j < count; j += VL)
      store(reinterpret_cast<bf16*>(straight + j), load_n(x + i + j, smaller<int64_t>(VL, count - j)));
    for (int j = 0; j < kLookup; j++) turned[j % 4 * 32 + j / 4] = straight[j];
    std::memcpy(out, turned, sizeof turned);
  }
#endif
}

void multiply_int4(const Matrix& w, Input input, const Prepared& x, int64_t x_first, int64_t rows, int64_t first,
                   int64_t count, float* out, int64_t out_stride, void* scratch, Upcoming after) {
  float* c = out_stride == kMostColumns ? out : static_cast<float*>(scratch);
  const char* from = x.data + x_first * x.stride;
#if EIGHTFOLD_LEVEL >= 3
  if (input == Input::bf16_packed) {
    const bf16* bf = reinterpret_cast<const bf16*>(from);
    const int64_t stride = x.stride / 2;
    if (w.groups.size == 32 && w.cols > 32) {
      packed_product<4>(w, bf, stride, rows, first, count, c, after);
    } else if (w.groups.size == 64 && w.cols > 64) {
      packed_product<2>(w, bf, stride, rows, first, count, c, after);
    } else {
      packed_product<1>(w, bf, stride, rows, first, count, c, after);
    }
  } else
#endif
    float_product(w, input == Input::f32_rounded, reinterpret_cast<const float*>(from), x.stride / 4, rows, first,
                  count, c, after);
  if (c == out) return;
  for (int64_t m = 0; m < rows; m++)
    std::memcpy(out + m * out_stride, c + m * kMostColumns, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace eightfold::EIGHTFOLD_ISA
