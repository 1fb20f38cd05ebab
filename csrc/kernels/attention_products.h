// How attention multiplies keys and values: in fp32, or as pairs of bf16.
#pragma once

#include "core/kernels.h"
#include "vec/vec.h"

namespace eightfold::EIGHTFOLD_ISA {

constexpr int kTileQueries = VL == 16 ? 6 : 4;   // query rows of a tile
constexpr int kScoreVectors = VL == 16 ? 4 : 2;  // vectors of positions, and of output elements, in a register tile
constexpr int kLimitStep = 2 * VL;               // positions of a block are looked at in such steps
constexpr float kNothing = -1e30f;               // maximum of no scores; finite, so that differences stay defined

// Compilers keep the addresses of all lanes of a tile, once computed, in memory; so each group starts from its own pointer.
#define EF_APART(pointer) __asm__("" : "+r"(pointer))

template <class T>
EF_INLINE vf load_part(const T* p, int64_t n) {  // the first n elements, as far as they fit
  return n >= VL ? load(p) : load_n(p, larger<int64_t>(0, n));
}

EF_INLINE void store_part(float* p, vf a, int64_t n) {
  if (n >= VL) {
    store(p, a);
  } else {
    store_n(p, a, n);
  }
}

// Loads of a policy take an `int64_t` number of elements, or this where all are there: a test for each row would cost
// more than the load.
struct Whole {};

// Products in fp32 over keys and values of type T.
template <class T>
struct FloatProducts {
  using Stored = T;
  using Lane = float;
  using Sum = vf;
  static constexpr int kPer = 1;                   // elements, or positions, of a lane
  static constexpr int kParts = 1;                 // lanes that make up a query's or probability's value
  static constexpr int kGroup = 1, kOrder = 1;     // vectors of values loaded together; put in order together
  static constexpr bool kScaled = sizeof(T) == 1;  // int8: times a scale of the position
  static EF_INLINE int64_t left(int64_t dim, int64_t v) { return dim - v * VL; }  // of a row at vector v
  static EF_INLINE vf query_lanes(const float* q, int64_t n) { return load_part(q, n); }
  static EF_INLINE vf load_key(const T* p, Whole) { return load(p); }
  static EF_INLINE vf load_key(const T* p, int64_t n) { return load_part(p, n); }
  template <class N>
  static EF_INLINE void load_values(const T* const* rows, int64_t v, N n, vf* many) {
    many[0] = load_key(rows[0] + v * VL, n);
  }
  static EF_INLINE void put_probabilities(Lane* to, vf first, vf second) {
    store(to, first);
    store(to + VL, second);
  }
  template <class W>
  static EF_INLINE Sum start(const W&, int64_t, int) {
    return zero();
  }
  static EF_INLINE void dot_key(Sum& acc, const Lane* one, vf many) { acc = fma(set1(*one), many, acc); }
  static EF_INLINE void dot_key_at(Sum& acc, const Lane* one, vf many) { dot_key(acc, one, many); }
  static EF_INLINE void dot_value(Sum& acc, const Lane* one, vf many) { dot_key(acc, one, many); }
  template <class W>
  static EF_INLINE vf score(const W& w, int64_t, const Sum* acc, int64_t j) {
    return kScaled ? mul(acc[0], load(w.key_scales + j)) : acc[0];
  }
  static EF_INLINE void in_order(vf*) {}
};

#if EIGHTFOLD_LEVEL >= 3
// Products of bf16 pairs with fp32 sums.
struct PairProducts {
  using Stored = bf16;
  using Lane = uint32_t;
  using Sum = vf;
  static constexpr int kPer = 2, kParts = 1, kGroup = 2, kOrder = 2;
  static constexpr bool kScaled = false;
  static EF_INLINE int64_t left(int64_t dim, int64_t v) { return dim - v * VL; }
  static EF_INLINE __m512i load_32(const bf16* p, Whole) { return _mm512_loadu_si512(p); }
  static EF_INLINE __m512i load_32(const bf16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u, p);
  }
  template <class N>
  static EF_INLINE vf load_key(const bf16* p, N n) {
    return _mm512_castsi512_ps(load_32(p, n));
  }
  // 2 · VL elements of two rows → 2 · VL pairs, interleaved within each 128 bits; `in_order` undoes that at the end.
  template <class N>
  static EF_INLINE void load_values(const bf16* const* rows, int64_t v, N n, vf* many) {
    const __m512i even = load_32(rows[0] + v * VL, n), odd = load_32(rows[1] + v * VL, n);
    many[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
    many[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
  }
  static EF_INLINE void in_order(vf* v) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d low = _mm512_castps_pd(v[0]), high = _mm512_castps_pd(v[1]);
    v[0] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high));
    v[1] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high));
  }
  static EF_INLINE vf query_lanes(const float* q, int64_t n) {  // the first n elements, in VL pairs
    const __m256i low = to_bf16(load_part(q, n)), high = to_bf16(load_part(q + (n > VL ? VL : 0), n - VL));
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  static EF_INLINE void put_probabilities(Lane* to, vf first, vf second) {
    const auto both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(to, &both, sizeof both);
  }
  template <class W>
  static EF_INLINE Sum start(const W&, int64_t, int) {
    return zero();
  }
  static EF_INLINE void dot_key(Sum& acc, const Lane* one, vf many) {
    dot_pairs(acc, set1_pair(one), Pairs{_mm512_castps_si512(many)});
  }
  static EF_INLINE void dot_key_at(Sum& acc, const Lane* one, vf many) {  // where nothing else takes this lane
    dot_pairs_set1(acc, one, Pairs{_mm512_castps_si512(many)});
  }
  static EF_INLINE void dot_value(Sum& acc, const Lane* one, vf many) { dot_key(acc, one, many); }
  template <class W>
  static EF_INLINE vf score(const W&, int64_t, const Sum* acc, int64_t) {
    return acc[0];
  }
};
#endif

}  // namespace eightfold::EIGHTFOLD_ISA
