// Products with int4 weights (w4a16), used where they lie: eight in an int32, the first in the lowest bits, q + 8 each.
//
// A weight counts as q · scale, rounded to bf16 where activations are bf16. There are sixteen such numbers in a group, so
// they are made once, as a table, and weights are looked up. From there on the sums are those of dense weights.
//
// Where groups are long enough for vectors, a vector of words is looked up by its first numbers, then by its second, and
// so on: so activations are prepared in that order. Words are 16 bits with AVX-512 BF16 (in a block of 128 inputs the
// numbers 4 j + k come out together), else 32 bits.
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
Upcoming after_panel(const Matrix& w, int64_t first, int64_t n, int64_t columns, int64_t k, int64_t part,
                     Upcoming after) {
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

#if EIGHTFOLD_LEVEL >= 1
// A lookup takes a line of weights, G groups of them, and gives `kSteps` vectors for the products of D; the order in
// which it gives them is that of activations in blocks of kLine.

// Each int32's number K, in the lane of that int32.
template <bool kRound>
struct FloatLookup {
  using D = Wide;
  static constexpr int64_t kLine = 8 * VL;
  static constexpr int kSteps = 8, kGroups = 1;

  template <int K>
  EF_INLINE D::WV get() const {
#if EIGHTFOLD_LEVEL >= 2  // of an index four bits are heeded
    return {_mm512_permutexvar_ps(K ? _mm512_srli_epi32(line, 4 * K) : line, table)};
#else  // of an index three bits are heeded; the fourth, as the sign, chooses
    const __m256i index = K ? _mm256_srli_epi32(line, 4 * K) : line;
    const __m256 upper = _mm256_castsi256_ps(K < 7 ? _mm256_slli_epi32(line, 28 - 4 * K) : line);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(table, index), _mm256_permutevar8x32_ps(high, index), upper)};
#endif
  }

  static EF_INLINE vf entries(const float* numbers, float scale) {
    const vf exact = mul(load(numbers), set1(scale));
    return kRound ? rounded_to_bf16(exact) : exact;
  }

#if EIGHTFOLD_LEVEL >= 2
  EF_INLINE FloatLookup(const char* at, int64_t weights, const float* scales)
      : line(weights >= kLine ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(first_lanes(weights / 8), at)),
        table(entries(kNumbers, scales[0])) {}
  __m512i line;
  vf table;
#else
  EF_INLINE FloatLookup(const char* at, int64_t weights, const float* scales)
      : table(entries(kNumbers, scales[0])), high(entries(kNumbers + 8, scales[0])) {
    if (weights >= kLine) {
      line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    } else {
      alignas(32) int32_t words[8] = {};
      std::memcpy(words, at, static_cast<size_t>(weights / 2));
      line = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
    }
  }
  __m256i line;
  vf table, high;
#endif
};

#if EIGHTFOLD_LEVEL >= 3
// Of each 16 bits number K, in the lane of these 16 bits; tables of sixteen for G groups of a line.
template <int G>
struct Bf16Lookup {
  using D = DotBf16<bf16>;
  static constexpr int64_t kLine = 128;
  static constexpr int kSteps = 4, kGroups = G;

  EF_INLINE Bf16Lookup(const char* at, int64_t weights, const float* scales)
      : line(weights >= kLine ? _mm512_loadu_si512(at)
                              : _mm512_maskz_loadu_epi32(first_lanes(weights / 8), at)) {
    const vf numbers = load(kNumbers), first = mul(numbers, set1(scales[0]));
    low = pairs_of(first, G == 1 ? first : mul(numbers, set1(scales[G > 1]))).v;
    if constexpr (G == 4) high = pairs_of(mul(numbers, set1(scales[2])), mul(numbers, set1(scales[3]))).v;
  }

  template <int K>
  EF_INLINE D::WV get() const {
    const __m512i nibbles = K ? _mm512_srli_epi16(line, 4 * K) : line;
    if constexpr (G == 1) {  // of an index five bits are heeded, and both halves of the table are the same
      return {_mm512_permutexvar_epi16(nibbles, low)};
    } else {
      static constexpr Lanes lanes;
      const __m512i index =  // (nibbles & 15) | lanes
          _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), _mm512_load_si512(lanes.table), 0xea);
      if constexpr (G == 2) return {_mm512_permutexvar_epi16(index, low)};
      return {_mm512_permutex2var_epi16(low, index, high)};
    }
  }

 private:
  struct Lanes {  // where the table of each lane's group begins
    alignas(64) uint16_t table[32] = {};
    constexpr Lanes() {
      for (int i = 0; i < 32; i++) table[i] = static_cast<uint16_t>(i * G / 32 * 16);
    }
  };
  __m512i line, low, high;
};
#endif

// A few rows of weights of a block of K, and their scales in floats: those of a line after those of the line before.
template <class L, int N>
struct Rows {
  static constexpr int64_t kScales = L::D::kBlock / L::kLine * L::kGroups;  // of a row
  const char* packed;                                                      // of the first row
  int64_t stride;                                                          // bytes
  int64_t length;                                                          // weights of a row
  float scales[N * kScales];

  Rows(const Matrix& w, int64_t row, int64_t k, int64_t part)
      : packed(packed_at(w, row, k)), stride(w.stride), length(part) {
    constexpr int64_t span = L::kLine / L::kGroups;  // weights of each of our scales
    const int64_t all = (part + L::kLine - 1) / L::kLine * L::kGroups;
    const bool single = w.groups.size == w.cols;
    const int64_t group = single ? part : w.groups.size, count = (part + group - 1) / group;
    for (int n = 0; n < N; n++) {
      float* to = scales + n * kScales;
      if (group == span) {
        scales_of(w, row + n, k / group, count, to);
        for (int64_t i = count; i < all; i++) to[i] = 0.f;  // for activations that are zeros
      } else {
        float own[kScales];
        scales_of(w, row + n, single ? 0 : k / group, count, own);
        for (int64_t i = 0; i < all; i++) to[i] = own[smaller(i * span / group, count - 1)];
      }
    }
  }
};

// M tokens × N rows of weights, as `tile` has it.
template <class L, int M, int N>
void packed_tile(const typename L::D::X* x, int64_t x_stride, const Rows<L, N>& w, bool add_to, float* c,
                 Upcoming next) {
  using D = typename L::D;
  vf acc[M][N];
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int n = 0; n < N; n++) acc[m][n] = D::start();
  }
  const char* at = w.packed;
  const float* scales = w.scales;
  for (int64_t left = w.length; left > 0; left -= L::kLine) {
    EF_UNROLL
    for (int n = 0; n < N; n++) {
      if (N > 1) __builtin_prefetch(next.at + n * next.stride, 0, 3);
      const L look(at + n * w.stride, left, scales + n * Rows<L, N>::kScales);
      const auto step = [&](int k, typename D::WV weights) EF_LAMBDA {
        EF_UNROLL
        for (int m = 0; m < M; m++) D::dot(acc[m][n], D::load_x(x + m * x_stride + k * D::kStep), weights);
      };
      step(0, look.template get<0>());
      step(1, look.template get<1>());
      step(2, look.template get<2>());
      step(3, look.template get<3>());
      if constexpr (L::kSteps == 8) {
        step(4, look.template get<4>());
        step(5, look.template get<5>());
        step(6, look.template get<6>());
        step(7, look.template get<7>());
      }
    }
    at += L::kLine / 2, next.at += L::kLine / 2, x += L::kLine, scales += L::kGroups;
  }
  store_tile<M, N>(acc, add_to, c, kMostColumns);
}

template <class L, int N, int M = kTileRows>
EF_INLINE void packed_tile_of(int64_t rows, const typename L::D::X* x, int64_t x_stride, const Rows<L, N>& w,
                              bool add_to, float* c, Upcoming next) {
  if (rows == M) {
    packed_tile<L, M, N>(x, x_stride, w, add_to, c, next);
  } else if constexpr (M > 1) {
    packed_tile_of<L, N, M - 1>(rows, x, x_stride, w, add_to, c, next);
  }
}

EF_INLINE void store_step(float* to, DotFloat<float>::WV w) { store(to, w.v); }
#if EIGHTFOLD_LEVEL >= 3
EF_INLINE void store_step(bf16* to, Pairs w) { store_pairs(to, w); }
#endif

template <class L, int N>
void packed_panel(const Matrix& w, int64_t row, const typename L::D::X* x, int64_t x_stride, int64_t rows, int64_t k,
                  int64_t part, float* c, Upcoming next) {
  using D = typename L::D;
  const Rows<L, N> own(w, row, k, part);
  if (rows <= kTileRows)
    return packed_tile_of<L, N>(rows, x + k, x_stride, own, k > 0, c,
                                next.at ? next : Upcoming{own.packed, own.stride});
  constexpr int64_t stride = D::kBlock + 32;  // rows apart in the first-level cache
  alignas(64) typename D::W wide[N * stride];
  for (int n = 0; n < N; n++) {
    typename D::W* to = wide + n * stride;
    for (int64_t i = 0; i < part; i += L::kLine, to += L::kLine) {
      const L look(own.packed + n * own.stride + i / 2, part - i,
                   own.scales + n * Rows<L, N>::kScales + i / L::kLine * L::kGroups);
      store_step(to, look.template get<0>());
      store_step(to + D::kStep, look.template get<1>());
      store_step(to + 2 * D::kStep, look.template get<2>());
      store_step(to + 3 * D::kStep, look.template get<3>());
      if constexpr (L::kSteps == 8) {
        store_step(to + 4 * D::kStep, look.template get<4>());
        store_step(to + 5 * D::kStep, look.template get<5>());
        store_step(to + 6 * D::kStep, look.template get<6>());
        store_step(to + 7 * D::kStep, look.template get<7>());
      }
    }
  }
  panel<D, N>(x + k, x_stride, rows, wide, stride, round_up(part, L::kLine), k > 0, c, kMostColumns, next, part / 2);
}

template <class L>
void packed_product(const Matrix& w, const char* from, int64_t stride, int64_t rows, int64_t first, int64_t columns,
                    float* c, Upcoming after) {
  using X = typename L::D::X;
  const X* x = reinterpret_cast<const X*>(from);
  const int64_t x_stride = stride / static_cast<int64_t>(sizeof(X));
  for (int64_t k = 0; k < w.cols; k += L::D::kBlock) {
    const int64_t part = smaller(L::D::kBlock, w.cols - k);
    int64_t n = 0;
    for (; n + kTileColumns <= columns; n += kTileColumns)
      packed_panel<L, kTileColumns>(w, first + n, x, x_stride, rows, k, part, c + n,
                                    after_panel(w, first, n, columns, k, part, after));
    for (; n < columns; n++) packed_panel<L, 1>(w, first + n, x, x_stride, rows, k, part, c + n, {});
  }
}
#endif

}  // namespace

void prepare_shuffled([[maybe_unused]] Input input, [[maybe_unused]] const float* x, [[maybe_unused]] int64_t width,
                    [[maybe_unused]] char* to) {
#if EIGHTFOLD_LEVEL >= 1
  const bool narrow = input == Input::bf16_shuffled;
  constexpr int64_t most = 128;
  const int64_t line = narrow ? most : FloatLookup<false>::kLine, numbers = narrow ? 4 : 8, lanes = line / numbers;
  for (int64_t i = 0; i < width; i += line) {
    alignas(64) float turned[most] = {};
    const int64_t count = smaller(line, width - i);
    for (int64_t j = 0; j < count; j++) turned[j % numbers * lanes + j / numbers] = x[i + j];
    for (int64_t j = 0; j < line; j += VL) {
      const vf exact = load(turned + j);
      if (narrow) {
        store(reinterpret_cast<bf16*>(to) + i + j, exact);
      } else {
        const bool round = input == Input::f32_rounded_shuffled;
        store(reinterpret_cast<float*>(to) + i + j, round ? rounded_to_bf16(exact) : exact);
      }
    }
  }
#endif
}

void multiply_int4(const Matrix& w, Input input, const Prepared& x, int64_t x_first, int64_t rows, int64_t first,
                   int64_t count, float* out, int64_t out_stride, void* scratch, Upcoming after) {
  float* c = out_stride == kMostColumns ? out : static_cast<float*>(scratch);
  const char* from = x.data + x_first * x.stride;
  [[maybe_unused]] const auto run = [&](auto function) { function(w, from, x.stride, rows, first, count, c, after); };
  switch (input) {
#if EIGHTFOLD_LEVEL >= 3
    case Input::bf16_shuffled:
      if (w.groups.size == 32 && w.cols > 32) {
        run(packed_product<Bf16Lookup<4>>);
      } else if (w.groups.size == 64 && w.cols > 64) {
        run(packed_product<Bf16Lookup<2>>);
      } else {
        run(packed_product<Bf16Lookup<1>>);
      }
      break;
#endif
#if EIGHTFOLD_LEVEL >= 1
    case Input::f32_shuffled:
      run(packed_product<FloatLookup<false>>);
      break;
    case Input::f32_rounded_shuffled:
      run(packed_product<FloatLookup<true>>);
      break;
#endif
    default:
      float_product(w, input == Input::f32_rounded, reinterpret_cast<const float*>(from), x.stride / 4, rows, first,
                    count, c, after);
  }
  if (c == out) return;
  for (int64_t m = 0; m < rows; m++)
    std::memcpy(out + m * out_stride, c + m * kMostColumns, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace eightfold::EIGHTFOLD_ISA
