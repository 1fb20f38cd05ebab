// The inner kernels of attention: a block of 64 positions against a tile of query rows.
//
// Keys are packed so that a vector holds one element (or one pair of bf16) of VL positions: a score is then summed over
// the head's elements in order, and an output over positions in order, whatever else is in the tile. Prefill and decode
// run the same code, which is what makes a token's bits independent of how its prompt was cut.
#pragma once

#include "core/kernels.h"
#include "vec/vec.h"

namespace eightfold::EIGHTFOLD_ISA {

constexpr int kTileQueries = VL == 16 ? 6 : 4;   // query rows of a tile
constexpr int kScoreVectors = VL == 16 ? 4 : 2;  // vectors of positions, and of output elements, in a register tile
constexpr float kNothing = -1e30f;               // maximum of no scores; finite, so that differences stay defined

// Products in fp32 over keys and values of type T.
template <class T>
struct FloatProducts {
  using Stored = T;
  static constexpr int64_t kPer = 1;  // elements of a step
  using Lane = float;
  static EF_INLINE vf load_key(const T* p, int64_t n) { return load_n(p, larger<int64_t>(0, smaller<int64_t>(n, VL))); }
  static EF_INLINE vf load_values(const T* p, const T*, int64_t n) { return load_n(p, smaller<int64_t>(n, VL)); }
  static EF_INLINE void put(Lane* to, const float* x, int64_t n) { *to = n > 0 ? x[0] : 0.f; }
  static EF_INLINE void put_probabilities(Lane* to, vf p, vf) { store(to, p); }
  static EF_INLINE void dot(vf& acc, const Lane* one, vf many) { acc = fma(set1(*one), many, acc); }
};

#if EIGHTFOLD_LEVEL >= 3
// Products of bf16 pairs with fp32 sums.
struct PairProducts {
  using Stored = bf16;
  static constexpr int64_t kPer = 2;
  using Lane = uint32_t;
  static EF_INLINE vf load_key(const bf16* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
  }
  static EF_INLINE vf load_values(const bf16* p, const bf16* q, int64_t n) {
    n = smaller<int64_t>(n, VL);
    const __m512i even = _mm512_castps_si512(load_n(p, n)), odd = _mm512_castps_si512(load_n(q, n));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
  }
  // 2 · VL elements of two rows → VL pairs and the VL after them.
  static EF_INLINE void interleave(const bf16* p, const bf16* q, float* to) {
    const __m512i even = _mm512_loadu_si512(p), odd = _mm512_loadu_si512(q);
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);  // by 128-bit lanes
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(to + VL, _mm512_permutex2var_epi64(low, second, high));
  }
  static EF_INLINE void put(Lane* to, const float* x, int64_t n) {
    const uint32_t low = n > 0 ? bf16_bits(x[0]) : 0, high = n > 1 ? bf16_bits(x[1]) : 0;
    *to = low | high << 16;
  }
  static EF_INLINE void put_probabilities(Lane* to, vf first, vf second) {
    const auto both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(to, &both, sizeof both);
  }
  static EF_INLINE void dot(vf& acc, const Lane* one, vf many) {
    dot_pairs(acc, set1_pair(one), Pairs{_mm512_castps_si512(many)});
  }
};
#endif

// What a thread keeps of a block of positions and of its query rows.
template <class P>
struct Work {
  using Lane = typename P::Lane;
  int64_t dim, steps, padded;  // steps: of kPer elements, in whole vectors; padded: dim in whole vectors
  Lane* keys;                  // [steps, 64]
  Lane* values;                // [64 / kPer, padded]
  Lane* queries;               // [tiles, steps, kTileQueries]
  Lane* probabilities;         // [kTileQueries, 64 / kPer]
  float* scores;               // [kTileQueries, 64]
  float* out;                  // [rows, padded] of the segment
  float* total;                // [rows, padded] of all segments before
  float *most, *weight;        // [rows] running maximum and sum of the segment
  float *total_most, *total_weight;
  const typename P::Stored *key_rows[kKvBlock], *value_rows[kKvBlock];    // null beyond the end
  const typename P::Stored *next_keys[kKvBlock], *next_values[kKvBlock];  // the same of the block after
};

// Brings a row near. Pages are small pieces far apart, which the processor's own prefetcher follows badly.
template <class T>
EF_INLINE void fetch(const T* row, int64_t dim) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 3);
}

template <class P>
void pack_keys(const Work<P>& w) {
  const int64_t dim = w.dim, steps = w.steps;
  float* to = reinterpret_cast<float*>(w.keys);
  for (int64_t j = 0; j < kKvBlock; j += VL) {
    for (int64_t s = 0; s < steps; s += VL) {
      vf r[VL];
      EF_UNROLL
      for (int i = 0; i < VL; i++) {
        const auto* from = w.key_rows[j + i];
        r[i] = from ? P::load_key(from + s * P::kPer, dim - s * P::kPer) : zero();
      }
      transpose(r);
      EF_UNROLL
      for (int i = 0; i < VL; i++) store(to + (s + i) * kKvBlock + j, r[i]);
    }
    for (int i = 0; i < VL; i++) fetch(w.next_keys[j + i], dim);
  }
}

template <class P>
void pack_values(const Work<P>& w) {
  static const typename P::Stored zeros[VL] = {};
  const int64_t dim = w.dim, padded = w.padded;
  float* to = reinterpret_cast<float*>(w.values);
  for (int64_t j = 0; j < kKvBlock; j += P::kPer, to += padded) {
    const auto *even = w.value_rows[j], *odd = w.value_rows[j + P::kPer - 1];
    int64_t d = 0;
    if (even && odd) {
      if constexpr (P::kPer == 2)
        for (; d + 2 * VL <= dim; d += 2 * VL) P::interleave(even + d, odd + d, to + d);
      for (; d + VL <= dim; d += VL) store(to + d, P::load_values(even + d, odd + d, VL));
    }
    for (; d < padded; d += VL) store(to + d, P::load_values(even ? even + d : zeros, odd ? odd + d : zeros, dim - d));
    for (int i = 0; i < P::kPer; i++) fetch(w.next_values[j + i], dim);
  }
}

template <class P, int M>
void score_tile(const Work<P>& w, const typename P::Lane* queries) {
  const float* keys = reinterpret_cast<const float*>(w.keys);
  for (int64_t j = 0; j < kKvBlock; j += kScoreVectors * VL) {
    vf acc[M][kScoreVectors];
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < kScoreVectors; v++) acc[m][v] = zero();
    }
    for (int64_t s = 0; s < w.steps; s++) {
      vf many[kScoreVectors];
      EF_UNROLL
      for (int v = 0; v < kScoreVectors; v++) many[v] = load(keys + s * kKvBlock + j + v * VL);
      EF_UNROLL
      for (int m = 0; m < M; m++) {
        EF_UNROLL
        for (int v = 0; v < kScoreVectors; v++) P::dot(acc[m][v], queries + s * kTileQueries + m, many[v]);
      }
    }
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < kScoreVectors; v++) store(w.scores + m * kKvBlock + j + v * VL, acc[m][v]);
    }
  }
}

// The probabilities of a row, relative to its maximum `now`; returns their sum.
template <class P>
EF_INLINE float exponentials(const float* scores, typename P::Lane* probabilities, float scale, float now) {
  const vf by = set1(scale), minus = set1(-now);
  vf total = zero();
  EF_UNROLL
  for (int i = 0; i < kKvBlock / VL; i += 2) {
    const vf a = exp2_of(fma(load(scores + i * VL), by, minus)),
             b = exp2_of(fma(load(scores + (i + 1) * VL), by, minus));
    total = add(add(total, a), b);
    if constexpr (P::kPer == 2) {
      P::put_probabilities(probabilities + i * VL / 2, a, b);
    } else {
      P::put_probabilities(probabilities + i * VL, a, a);
      P::put_probabilities(probabilities + (i + 1) * VL, b, b);
    }
  }
  return sum(total);
}

// One step of the running softmax of M rows: scores → probabilities, and in `alpha` what the sums so far are to be
// multiplied by. All maxima come first, or each row would wait for its own.
template <class P, int M>
EF_INLINE void softmax_rows(const Work<P>& w, float scale, float* most, float* weight, float* alpha) {
  static_assert(M <= VL, "the rows' factors are one vector");
  float now[M], change[VL] = {};
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    vf top = load(w.scores + m * kKvBlock);
    EF_UNROLL
    for (int i = 1; i < kKvBlock / VL; i++) top = largest(top, load(w.scores + m * kKvBlock + i * VL));
    now[m] = larger(most[m], largest_of(top) * scale);
    change[m] = most[m] - now[m];
  }
  store(alpha, exp2_of(load(change)));
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    const float total =
        exponentials<P>(w.scores + m * kKvBlock, w.probabilities + m * (kKvBlock / P::kPer), scale, now[m]);
    weight[m] = weight[m] * alpha[m] + total;
    most[m] = now[m];
  }
}

// out [M, V vectors] = out · alpha + probabilities · values
template <class P, int M, int V>
EF_INLINE void value_tile(const Work<P>& w, float* out, const float* alpha, int64_t d) {
  const float* values = reinterpret_cast<const float*>(w.values) + d;
  vf acc[M][V];
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int v = 0; v < V; v++) acc[m][v] = mul(load(out + m * w.padded + d + v * VL), set1(alpha[m]));
  }
  for (int64_t j = 0; j < kKvBlock / P::kPer; j++) {
    vf many[V];
    EF_UNROLL
    for (int v = 0; v < V; v++) many[v] = load(values + j * w.padded + v * VL);
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < V; v++) P::dot(acc[m][v], w.probabilities + m * (kKvBlock / P::kPer) + j, many[v]);
    }
  }
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int v = 0; v < V; v++) store(out + m * w.padded + d + v * VL, acc[m][v]);
  }
}

// Query rows [first, first + M) against the packed block. `hide` masks scores before the softmax.
template <class P, int M, class Hide>
void block_tile(Work<P>& w, int64_t first, float scale, const Hide& hide) {
  score_tile<P, M>(w, w.queries + first * w.steps);
  hide(M);
  float alpha[VL];
  softmax_rows<P, M>(w, scale, w.most + first, w.weight + first, alpha);
  float* out = w.out + first * w.padded;
  int64_t d = 0;
  for (; d + kScoreVectors * VL <= w.padded; d += kScoreVectors * VL) value_tile<P, M, kScoreVectors>(w, out, alpha, d);
  for (; d < w.padded; d += VL) value_tile<P, M, 1>(w, out, alpha, d);
}

}  // namespace eightfold::EIGHTFOLD_ISA
