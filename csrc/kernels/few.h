// int8 products of a few tokens, at most kFewMost, with weights that come from memory, row after row without gaps.
//
// Memory is read fastest in the order of the file, and a core reads ahead while it computes only as long as little else
// misses its first-level cache. So activations go by in parts that stay there, side by side, against panels of a few
// rows that came into the second-level cache, in the file's order and evenly, while the panel before was computed. Sums
// are integers: the order in which they are taken changes nothing.
#pragma once

#include "kernels/gemm.h"

namespace eightfold::EIGHTFOLD_ISA {

constexpr int kFewMost = 12;         // tokens
constexpr int64_t kFewFrom = 2048;   // elements of a row: shorter ones do not pay for setting out activations
constexpr int64_t kFewPanel = 12;    // rows of a panel: two of them, and activations, fit the second-level cache
constexpr int64_t kFewBlock = 2048;  // about so many elements of a row at a time, twice as many for two tokens

// The activations of `rows` tokens as `few_rows` reads them, each step's side by side: so many bytes.
constexpr int64_t few_bytes(int64_t length) {
  return EIGHTFOLD_LEVEL >= 3 ? kFewMost * round_up(length, kDot8) * static_cast<int64_t>(sizeof(quantized)) : 0;
}

#if EIGHTFOLD_LEVEL >= 3

inline void set_side_by_side(const quantized* x, int64_t x_stride, int64_t rows, int64_t length, quantized* to) {
  for (int64_t k = 0; k < length; k += kDot8)
    for (int64_t m = 0; m < rows; m++, to += kDot8) std::memcpy(to, x + m * x_stride + k, kDot8);
}

// M tokens × N weight rows over `length` elements of K. At `near` lie the rows that come next, at `far` what is wanted
// later: N · `length` bytes one after the other. Not inlined: GCC would keep the sums in memory.
template <int M, int N, bool kSideBySide>
__attribute__((noinline)) void few_rows(const quantized* x, int64_t stride, const int8_t* w, int64_t w_stride,
                                        int64_t length, bool add_to, int32_t* c, int64_t ldc, const char* near,
                                        const char* far) {
  vi acc[M][N];
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int n = 0; n < N; n++) acc[m][n] = set1_int(0);
  }
  const int64_t x_stride = kSideBySide ? kDot8 : stride, x_step = kSideBySide ? M * kDot8 : kDot8;
  constexpr int kSteps = 2 / N;
  for (int64_t left = length; left > 0; left -= kSteps * kDot8) {
    EF_UNROLL
    for (int i = 0; i < kSteps; i++) {
      Weights8 weights[N];
      EF_UNROLL
      for (int n = 0; n < N; n++) {
        weights[n] = load_weights8(w + n * w_stride);
        __builtin_prefetch(near + n * w_stride, 0, 3);
        __builtin_prefetch(far + n * kDot8, 0, N == 1 ? 3 : 2);
      }
      EF_UNROLL
      for (int m = 0; m < M; m++) {
        if constexpr (N == 1) {
          dot8_at(acc[m][0], x + m * x_stride, weights[0]);
        } else {
          const Quantized xv = load_quantized(x + m * x_stride);
          EF_UNROLL
          for (int n = 0; n < N; n++) dot8(acc[m][n], xv, weights[n]);
        }
      }
      x += x_step, w += kDot8, near += kDot8, far += N * kDot8;
    }
  }
  if constexpr (N == 2) {
    store_last_two(acc, add_to, c, ldc);
  } else {
    store_tile<M, N>(acc, add_to, c, ldc);
  }
}

// Panels of rows, by parts of K: one panel is computed while the next one comes.
template <int M, int N, bool kSideBySide>
void few_panels(const quantized* x, int64_t x_stride, const int8_t* w, int64_t columns, int64_t length, int32_t* c,
                int64_t ldc, Upcoming after) {
  constexpr int64_t most = M <= 2 ? 2 * kFewBlock : kFewBlock;
  const int64_t parts = (length + most - 1) / most, block = round_up((length + parts - 1) / parts, 2 * kDot8);
  for (int64_t first = 0; first < columns; first += kFewPanel) {
    const int64_t rows = smaller(kFewPanel, columns - first);
    const int8_t* panel = w + first * length;
    const char* following = reinterpret_cast<const char*>(panel);  // near already: where nothing is known to follow
    if (first + rows < columns) {
      following += rows * length;
    } else if (after.at) {
      following = after.at;
    }
    const char* far = following;
    for (int64_t k = 0; k < length; k += block) {
      const int64_t part = smaller(block, length - k);
      for (int64_t n = 0; n < rows; n += N) {
        const char* near = following;
        if (n + N < rows) {
          near = reinterpret_cast<const char*>(panel + (n + N) * length + k);
        } else if (k + part < length) {
          near = reinterpret_cast<const char*>(panel + k + part);
        }
        few_rows<M, N, kSideBySide>(x + k * (kSideBySide ? M : 1), x_stride, panel + n * length + k, length, part,
                                    k > 0, c + first + n, ldc, near, far);
        far += N * part;
      }
    }
  }
}

// Whether that pays. A few tokens whose activations stay near anyway go past the weights row by row; for three and four
// that do not, a tile of six rows is as good.
inline bool is_few(int64_t rows, int64_t w_stride, int64_t length) {
  if (rows > kFewMost || w_stride != length || length < kFewFrom || length % (2 * kDot8)) return false;
  return rows >= kStreamRows || ((rows == 2 || rows == 5) && rows * length >= kStreamBytes);
}

template <int M = kFewMost>
void few_of(int64_t rows, const quantized* x, int64_t x_stride, const int8_t* w, int64_t columns, int64_t length,
            int32_t* c, int64_t ldc, Upcoming after, quantized* scratch) {
  if constexpr (M == 4) {
    few_panels<2, 1, false>(x, x_stride, w, columns, length, c, ldc, after);
  } else {
    if (rows != M) return few_of<M - 1>(rows, x, x_stride, w, columns, length, c, ldc, after, scratch);
    set_side_by_side(x, x_stride, rows, length, scratch);
    few_panels<M, M <= kStreamRows ? 1 : 2, true>(scratch, 0, w, columns, length, c, ldc, after);
  }
}

#endif

// `product` of int8 weights; `scratch` holds few_bytes(length).
inline void product_int8(const quantized* x, int64_t x_stride, int64_t rows, const int8_t* w, int64_t w_stride,
                         int64_t columns, int64_t length, int32_t* c, int64_t ldc, Upcoming after,
                         [[maybe_unused]] void* scratch) {
#if EIGHTFOLD_LEVEL >= 3
  if (is_few(rows, w_stride, length)) {
    const int64_t even = columns / 2 * 2;  // more than kStreamRows tokens take two rows at a time
    few_of(rows, x, x_stride, w, even, length, c, ldc, after, static_cast<quantized*>(scratch));
    if (even == columns) return;
    w += even * w_stride, c += even, columns = 1;
  }
#endif
  product<DotInt8>(x, x_stride, rows, w, w_stride, columns, length, c, ldc, after);
}

}  // namespace eightfold::EIGHTFOLD_ISA
