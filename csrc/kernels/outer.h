// Matrix products of many tokens in fp32 over a short K, from weights that are packed on the way: widened, and one element
// of 2 · VL weights side by side. A tile then needs no sums over lanes, which take as long as the products where K is short.
//
// The bits are those of `tile` in gemm.h, where lane l of a vector sums the elements l, l + VL, l + 2 · VL, … of K in
// order, and the lanes are then added in pairs (i, i + VL/2), (i, i + VL/4), …. Here a pass sums the elements of the two
// lanes of a pair, and the passes are added in the same pairs: as soon as both are there, so that few are kept.
#pragma once

#include "kernels/gemm.h"

namespace eightfold::EIGHTFOLD_ISA {

constexpr int kOuterHeight = VL == 16 ? 6 : 3;  // tokens of a tile
constexpr int kOuterVectors = 2;                // vectors of weights of a tile
constexpr int64_t kOuterWidth = kOuterVectors * VL;
constexpr int64_t kOuterFrom = 24;   // tokens from which packing pays
constexpr int64_t kOuterMost = 512;  // elements of K up to which it pays
constexpr int kPasses = VL / 2;
constexpr int64_t kOuterFloats = kPasses * (2 * kOuterMost / VL * kOuterWidth + VL);

// The first lane of pass t, its bits in reverse: 0, VL/4, VL/8, … The other one is VL/2 further.
EF_INLINE int lane_of_pass(int t) {
  int lane = 0;
  for (int bit = 1; bit < kPasses; bit *= 2, t >>= 1) lane = 2 * lane + (t & 1);
  return lane;
}

// Floats from one pass to the next; the extra vector keeps them from falling on the same cache sets.
EF_INLINE int64_t pass_stride(int64_t steps) { return 2 * steps * kOuterWidth + VL; }

// `columns` ≤ kOuterWidth weights of `length` elements → [passes, steps, 2, kOuterWidth], zero where there are none.
template <class T>
void pack_weights(const T* w, int64_t w_stride, int64_t columns, int64_t length, float* to) {
  const int64_t steps = (length + VL - 1) / VL;
  float* at[VL];
  for (int t = 0; t < kPasses; t++) {
    at[lane_of_pass(t)] = to + t * pass_stride(steps);
    at[lane_of_pass(t) + VL / 2] = to + t * pass_stride(steps) + kOuterWidth;
  }
  for (int64_t first = 0; first < kOuterWidth; first += VL) {
    const int64_t count = larger<int64_t>(0, smaller<int64_t>(VL, columns - first));
    for (int64_t s = 0; s < steps; s++) {
      const int64_t left = length - s * VL;
      const T* from = w + first * w_stride + s * VL;
      vf r[VL];
      if (count == VL && left >= VL) {
        EF_UNROLL
        for (int i = 0; i < VL; i++) r[i] = load(from + i * w_stride);
      } else {
        for (int i = 0; i < VL; i++)
          r[i] = i >= count ? zero() : left >= VL ? load(from + i * w_stride) : load_n(from + i * w_stride, left);
      }
      transpose(r);
      EF_UNROLL
      for (int i = 0; i < VL; i++) store(at[i] + 2 * s * kOuterWidth + first, r[i]);
    }
  }
}

// M tokens × `columns` packed weights → c[m · ldc + n]. Rows of x are zero up to whole steps.
template <int M>
void outer_tile(const float* x, int64_t x_stride, const float* packed, int64_t steps, int64_t columns, float* c,
                 int64_t ldc) {
  constexpr int V = kOuterVectors;
  alignas(64) float kept[3][M][kOuterWidth];  // sums of 2, 4, 8 lanes that wait for the other half of theirs
  vf acc[2][M][V];
  for (int t = 0;; t++, packed += pass_stride(steps)) {
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < V; v++) acc[0][m][v] = acc[1][m][v] = zero();
    }
    // Few pointers and one stride: the addresses of all rows would not fit the registers.
    const float *row = x + lane_of_pass(t), *row3 = row + 3 * x_stride, *w = packed;
    for (int64_t s = 0; s < steps; s++, w += 2 * kOuterWidth, row += VL, row3 += VL) {
      EF_UNROLL
      for (int half = 0; half < 2; half++) {
        vf many[V];
        EF_UNROLL
        for (int v = 0; v < V; v++) many[v] = load(w + half * kOuterWidth + v * VL);
        const auto rows = [&](int first, const float* from) EF_LAMBDA {
          EF_UNROLL
          for (int i = 0; i < 3; i++) {
            if (first + i >= M) continue;
            const vf one = set1(from[i * x_stride + half * (VL / 2)]);
            EF_UNROLL
            for (int v = 0; v < V; v++) acc[half][first + i][v] = fma(one, many[v], acc[half][first + i][v]);
          }
        };
        rows(0, row);
        if constexpr (M > 3) rows(3, row3);
      }
    }
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < V; v++) acc[0][m][v] = add(acc[0][m][v], acc[1][m][v]);
    }
    int level = 0;
    for (; t >> level & 1; level++) {
      EF_UNROLL
      for (int m = 0; m < M; m++) {
        EF_UNROLL
        for (int v = 0; v < V; v++) acc[0][m][v] = add(load(kept[level][m] + v * VL), acc[0][m][v]);
      }
    }
    if (t == kPasses - 1) break;
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < V; v++) store(kept[level][m] + v * VL, acc[0][m][v]);
    }
  }
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int v = 0; v < V; v++) {
      const int64_t left = columns - v * VL;
      if (left >= VL) {
        store(c + m * ldc + v * VL, acc[0][m][v]);
      } else if (left > 0) {
        store_n(c + m * ldc + v * VL, acc[0][m][v], left);
      }
    }
  }
}

template <int M = kOuterHeight>
EF_INLINE void outer_tile_of(int rows, const float* x, int64_t x_stride, const float* packed, int64_t steps,
                              int64_t columns, float* c, int64_t ldc) {
  if (rows == M) {
    outer_tile<M>(x, x_stride, packed, steps, columns, c, ldc);
  } else if constexpr (M > 1) {
    outer_tile_of<M - 1>(rows, x, x_stride, packed, steps, columns, c, ldc);
  }
}

// x [rows, length] · rows [0, columns) of w → c [rows, columns] at stride ldc, as `product` has it; length ≤ kOuterMost.
template <class T>
void product_by_outer(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t columns,
                    int64_t length, float* c, int64_t ldc) {
  alignas(64) float packed[kOuterFloats];
  const int64_t tiles = (rows + kOuterHeight - 1) / kOuterHeight, each = rows / tiles, longer = rows % tiles;
  const int64_t steps = (length + VL - 1) / VL;
  for (int64_t n = 0; n < columns; n += kOuterWidth) {
    const int64_t count = smaller(kOuterWidth, columns - n);
    pack_weights(w + n * w_stride, w_stride, count, length, packed);
    for (int64_t t = 0, m = 0; t < tiles; t++) {
      const int height = static_cast<int>(each + (t < longer));
      outer_tile_of(height, x + m * x_stride, x_stride, packed, steps, count, c + m * ldc + n, ldc);
      m += height;
    }
  }
}

}  // namespace eightfold::EIGHTFOLD_ISA
