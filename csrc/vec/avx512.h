// AVX-512 (F, BW, DQ, VL), and with EIGHTFOLD_LEVEL 3 also VNNI and BF16: vectors of sixteen.
#pragma once

#include <immintrin.h>

namespace eightfold::EIGHTFOLD_ISA {

constexpr int VL = 16;
constexpr int kTileRows = 4,
              kTileColumns = 6;  // 24 accumulators, 6 weights, 1 activation and a constant: all 32 registers
using vf = __m512;
struct vi {
  __m512i v;
};

EF_INLINE vf zero() { return _mm512_setzero_ps(); }
EF_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
EF_INLINE vi set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
EF_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
EF_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
EF_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
EF_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
EF_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
EF_INLINE vf largest(vf a, vf b) { return _mm512_max_ps(a, b); }
EF_INLINE vf smallest(vf a, vf b) { return _mm512_min_ps(a, b); }
EF_INLINE vf absolute(vf a) { return _mm512_abs_ps(a); }
EF_INLINE vi add(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }

EF_INLINE float sum(vf a) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
EF_INLINE int32_t sum(vi a) {  // wraps, as the other operations do; GCC's own reduction is undefined where it overflows
  const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
EF_INLINE float largest_of(vf a) {
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
// Halves of two vectors side by side are added at once: 9 shuffles for four sums.
EF_INLINE __m128 sums_of(const vf* a) {
  const vf p = add(_mm512_shuffle_f32x4(a[0], a[1], 0x44), _mm512_shuffle_f32x4(a[0], a[1], 0xee));
  const vf q = add(_mm512_shuffle_f32x4(a[2], a[3], 0x44), _mm512_shuffle_f32x4(a[2], a[3], 0xee));
  vf t = add(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
  t = add(t, _mm512_permute_ps(t, 0x4e));
  t = add(t, _mm512_permute_ps(t, 0xb1));
  const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, t));
}
EF_INLINE __m128i sums_of(const vi* a) {
  const __m512i p =
      _mm512_add_epi32(_mm512_shuffle_i32x4(a[0].v, a[1].v, 0x44), _mm512_shuffle_i32x4(a[0].v, a[1].v, 0xee));
  const __m512i q =
      _mm512_add_epi32(_mm512_shuffle_i32x4(a[2].v, a[3].v, 0x44), _mm512_shuffle_i32x4(a[2].v, a[3].v, 0xee));
  __m512i t = _mm512_add_epi32(_mm512_shuffle_i32x4(p, q, 0x88), _mm512_shuffle_i32x4(p, q, 0xdd));
  t = _mm512_add_epi32(t, _mm512_shuffle_epi32(t, _MM_PERM_ENUM(0x4e)));
  t = _mm512_add_epi32(t, _mm512_shuffle_epi32(t, _MM_PERM_ENUM(0xb1)));
  const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  return _mm512_castsi512_si128(_mm512_permutexvar_epi32(first, t));
}
EF_INLINE void store_sums(float* to, __m128 s, bool add_to) {
  _mm_storeu_ps(to, add_to ? _mm_add_ps(_mm_loadu_ps(to), s) : s);
}
EF_INLINE void store_sums(int32_t* to, __m128i s, bool add_to) {
  __m128i* at = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(at, add_to ? _mm_add_epi32(_mm_loadu_si128(at), s) : s);
}
EF_INLINE void store_low_sums(float* to, __m128 s, bool add_to) {
  __m64* at = reinterpret_cast<__m64*>(to);
  _mm_storel_pi(at, add_to ? _mm_add_ps(_mm_loadl_pi(_mm_setzero_ps(), at), s) : s);
}
EF_INLINE void store_low_sums(int32_t* to, __m128i s, bool add_to) {
  __m128i* at = reinterpret_cast<__m128i*>(to);
  _mm_storel_epi64(at, add_to ? _mm_add_epi32(_mm_loadl_epi64(at), s) : s);
}
EF_INLINE __m128 high_half(__m128 s) { return _mm_movehl_ps(s, s); }
EF_INLINE __m128i high_half(__m128i s) { return _mm_unpackhi_epi64(s, s); }

EF_INLINE vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
EF_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a)}; }
EF_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a.v); }
constexpr float kLeastPower = -200.f;  // times_power gives 0 there
EF_INLINE vf times_power(vf p, vf whole) { return _mm512_scalef_ps(p, whole); }

EF_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
EF_INLINE vi load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
EF_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
EF_INLINE vf load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
EF_INLINE vf load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
EF_INLINE vf load_n(const int8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
EF_INLINE vf widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
EF_INLINE vf load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
EF_INLINE vf load_n(const bf16* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
EF_INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
EF_INLINE vf load_n(const f16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

EF_INLINE __m512i bf16_in_high_half(vf a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
}
EF_INLINE vf rounded_to_bf16(vf a) {
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_in_high_half(a), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
EF_INLINE __m256i to_bf16(vf a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_in_high_half(a), 16)); }
EF_INLINE __m256i to_f16(vf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
EF_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
EF_INLINE void store_n(float* p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
EF_INLINE void store(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
EF_INLINE void store_n(bf16* p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }
EF_INLINE void store(f16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }
EF_INLINE void store_n(f16* p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16(a)); }

// VL rows of VL become VL columns.
EF_INLINE void transpose(vf* r) {
  vf t[16];
  EF_UNROLL
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  EF_UNROLL
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  EF_UNROLL
  for (int i = 0; i < 4; i++) {  // now blocks of four lanes are transposed among themselves
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  EF_UNROLL
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

struct Weights8 {
  __m512i v;
};
struct Quantized {
  __m512i v;
};

#if EIGHTFOLD_LEVEL >= 3
// vpdpbusd multiplies unsigned by signed. Flipping the sign bit of a weight adds 128 to it; the caller takes
// 128 · Σ x away, so that nothing is stored beside the weights. Inline assembly, because GCC keeps the
// intrinsics' accumulators in memory, which halves the speed.
typedef int8_t quantized;
constexpr int kDot8 = 64;  // elements of one step
EF_INLINE void store_quantized(quantized* p, vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
EF_INLINE Weights8 load_weights8(const int8_t* p) {
  return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
EF_INLINE Weights8 load_weights8_n(const int8_t* p, int64_t n) {  // beyond n the activations are 0
  return {_mm512_xor_si512(_mm512_maskz_loadu_epi8((1ull << n) - 1, p), _mm512_set1_epi8(-128))};
}
EF_INLINE Quantized load_quantized(const quantized* p) { return {_mm512_loadu_si512(p)}; }
EF_INLINE void dot8(vi& acc, Quantized x, Weights8 w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
}
EF_INLINE void dot8_at(vi& acc, const quantized* x, Weights8 w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*reinterpret_cast<const __m512i_u*>(x)));
}

EF_INLINE void dot8_set1(vi& acc, const uint32_t* x, Weights8 w) {  // the same four activations for all lanes
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*x));
}

// Pairs of bf16: acc[i] += a[2i] · b[2i] + a[2i + 1] · b[2i + 1]
struct Pairs {
  __m512i v;
};
EF_INLINE Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
EF_INLINE Pairs load_pairs_n(const bf16* p, int64_t n) { return {_mm512_maskz_loadu_epi16((1u << n) - 1u, p)}; }
// int8 is exact in bf16; 32 of them widened.
EF_INLINE Pairs pairs_of(vf low, vf high) { return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))}; }
EF_INLINE Pairs load_pairs(const int8_t* p) { return pairs_of(load(p), load(p + VL)); }
EF_INLINE Pairs load_pairs_n(const int8_t* p, int64_t n) {
  return n < VL ? pairs_of(load_n(p, n), zero()) : pairs_of(load(p), load_n(p + VL, n - VL));
}
EF_INLINE void store_pairs(bf16* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
EF_INLINE Pairs set1_pair(const uint32_t* p) { return {_mm512_set1_epi32(static_cast<int>(*p))}; }
EF_INLINE void dot_pairs(vf& acc, Pairs a, Pairs b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a.v), "v"(b.v));
}
EF_INLINE void dot_pairs_set1(vf& acc, const uint32_t* a, Pairs b) {  // the same pair for all lanes
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b.v), "m"(*a));
}
EF_INLINE void dot_pairs_at(vf& acc, const bf16* a, Pairs b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b.v), "m"(*reinterpret_cast<const __m512i_u*>(a)));
}
#else
typedef int16_t quantized;
constexpr int kDot8 = 32;
EF_INLINE void store_quantized(quantized* p, vi a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
EF_INLINE Weights8 load_weights8(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
EF_INLINE Weights8 load_weights8_n(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << n) - 1u, p))};
}
EF_INLINE Quantized load_quantized(const quantized* p) { return {_mm512_loadu_si512(p)}; }
EF_INLINE void dot8(vi& acc, Quantized x, Weights8 w) { acc.v = _mm512_add_epi32(acc.v, _mm512_madd_epi16(x.v, w.v)); }
EF_INLINE void dot8_at(vi& acc, const quantized* x, Weights8 w) { dot8(acc, load_quantized(x), w); }
#endif

}  // namespace eightfold::EIGHTFOLD_ISA
