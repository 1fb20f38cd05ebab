// Attention over int8 keys and values in integers: quads of int8 with int32 sums.
//
// A query is rounded to 16 bits (of its own largest element), a probability, times the scale of its value, to 16 bits
// (of the block's largest). Both are split into two bytes, which the instruction for int8 multiplies without widening
// anything. Every sum is exact; the two are joined in fp32, and what is lost is less than bf16 products lose.
#pragma once

#include "kernels/attention.h"

namespace eightfold::EIGHTFOLD_ISA {

#if EIGHTFOLD_LEVEL >= 3
struct QuadProducts {
  using Stored = int8_t;
  using Lane = uint32_t;
  using Sum = vi;
  static constexpr int kPer = 4, kParts = 2, kGroup = 2, kOrder = 4;
  static constexpr bool kScaled = true;
  static constexpr float kMostQuery = 32639.f;        // 127 · 256 + 127: both bytes are signed
  static constexpr float kMostProbability = 65535.f;  // both bytes are unsigned
  static constexpr int64_t kMostElements = 65536;     // 255 · 128 · elements fits an int32

  static EF_INLINE int64_t left(int64_t dim, int64_t v) { return dim - v / 4 * 64; }
  static EF_INLINE __m512i load_64(const int8_t* p, Whole) { return _mm512_loadu_si512(p); }
  static EF_INLINE __m512i load_64(const int8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : n > 0 ? (1ull << n) - 1ull : 0ull, p);
  }
  // The instruction takes unsigned keys: flipping the sign bit adds 128, for which `query_bias` makes up.
  template <class N>
  static EF_INLINE vf load_key(const int8_t* p, N n) {
    return _mm512_castsi512_ps(_mm512_xor_si512(load_64(p, n), _mm512_set1_epi8(-128)));
  }
  // Half of 64 elements of four rows, 8 of every 16, as quads of positions in two vectors; `in_order` undoes the order.
  template <class N>
  static EF_INLINE void load_values(const int8_t* const* rows, int64_t v, N n, vf* many) {
    const int64_t at = v / 4 * 64;
    const bool high = v & 2;
    __m512i r[4];
    EF_UNROLL
    for (int i = 0; i < 4; i++) r[i] = load_64(rows[i] + at, n);
    const __m512i a = high ? _mm512_unpackhi_epi8(r[0], r[1]) : _mm512_unpacklo_epi8(r[0], r[1]);
    const __m512i b = high ? _mm512_unpackhi_epi8(r[2], r[3]) : _mm512_unpacklo_epi8(r[2], r[3]);
    many[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
    many[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
  }
  static EF_INLINE void in_order(vf* v) {  // blocks of four lanes are transposed
    const vf a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xee),
             c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }

  // A query that is not finite gets a NaN for its factor, so that its answer shows it.
  template <class W>
  static EF_INLINE void put_query(const W& w, int64_t row, const float* q, Lane* to) {
    vf most = zero(), bad = zero();
    for (int64_t d = 0; d < w.dim; d += VL) {
      const vf x = load_part(q + d, w.dim - d);
      most = largest(most, absolute(x));
      bad = fma(x, zero(), bad);
    }
    const float absmax = largest_of(most);
    const bool finite = sum(bad) == 0.f, empty = !finite || absmax < 1e-30f;
    const vf by = set1(empty ? 0.f : kMostQuery / absmax);
    w.query_factor[row] = !finite ? __builtin_nanf("") : empty ? 0.f : absmax / kMostQuery;
    vi sums[kParts] = {set1_int(0), set1_int(0)};
    for (int64_t d = 0; d < 4 * w.steps; d += VL) {
      const vf x = finite ? load_part(q + d, w.dim - d) : zero();
      const __m512i whole = to_int(mul(x, by)).v;
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      const __m512i parts[kParts] = {high, _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8))};
      for (int p = 0; p < kParts; p++) {
        sums[p] = add(sums[p], vi{parts[p]});
        Lane lanes[VL / 4];
        const __m128i bytes = _mm512_cvtepi32_epi8(parts[p]);
        std::memcpy(lanes, &bytes, sizeof lanes);
        for (int i = 0; i < VL / 4; i++) to[(d / 4 + i) * kTileQueries * kParts + p] = lanes[i];
      }
    }
    for (int p = 0; p < kParts; p++) w.query_bias[row * kParts + p] = -128 * sum(sums[p]);
  }

  template <class W>
  static EF_INLINE Sum start(const W& w, int64_t row, int part) {
    return set1_int(w.query_bias[row * kParts + part]);
  }
  static EF_INLINE void dot_key(Sum& acc, const Lane* one, vf many) {
    const __m512i query = _mm512_set1_epi32(static_cast<int>(*one));
    dot8(acc, Quantized{query}, Weights8{_mm512_castps_si512(many)});
  }
  static EF_INLINE void dot_key_at(Sum& acc, const Lane* one, vf many) {
    dot8_set1(acc, one, Weights8{_mm512_castps_si512(many)});
  }
  static EF_INLINE void dot_value(Sum& acc, const Lane* one, vf many) {
    const __m512i probability = _mm512_set1_epi32(static_cast<int>(*one));
    dot8(acc, Quantized{_mm512_castps_si512(many)}, Weights8{probability});
  }
  static EF_INLINE vf joined(vi high, vi low) { return fma(to_float(high), set1(256.f), to_float(low)); }
  template <class W>
  static EF_INLINE vf score(const W& w, int64_t row, const Sum* acc, int64_t j) {
    return mul(mul(joined(acc[0], acc[1]), set1(w.query_factor[row])), load(w.key_scales + j));
  }
};

template <>
EF_INLINE float exponentials(const Work<QuadProducts>& w, const Tile<QuadProducts>& tile, int m, float scale,
                             float now) {  // of all positions, hidden or not
  constexpr int kVectors = kKvBlock / VL;
  const vf by = set1(scale), minus = set1(-now);
  vf x[kVectors], total = zero(), most = zero();
  EF_UNROLL
  for (int i = 0; i < kVectors; i++) {
    x[i] = exp2_to_0(fma(load(w.scores + m * kKvBlock + i * VL), by, minus));
    total = add(total, x[i]);
    x[i] = mul(x[i], load(w.value_scales + i * VL));
    most = largest(most, x[i]);
  }
  const float largest_one = largest_of(most);
  const bool some = largest_one > 1e-30f;
  const vf inverse = set1(some ? QuadProducts::kMostProbability / largest_one : 0.f);
  tile.probability_factor[m] = some ? largest_one / QuadProducts::kMostProbability : 0.f;
  uint32_t* to = tile.probabilities + m * QuadProducts::kParts * (kKvBlock / 4);
  EF_UNROLL
  for (int i = 0; i < kVectors; i++) {
    const __m512i whole = to_int(mul(x[i], inverse)).v;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * VL / 4), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kKvBlock / 4 + i * VL / 4), _mm512_cvtepi32_epi8(whole));
  }
  return sum(total);
}
#endif

}  // namespace eightfold::EIGHTFOLD_ISA
