// Matrix products that dot along K: x [m, K] · wᵀ [K, n], both row-major, the weights where they lie in the file.
//
// A result is the sum over blocks of kBlock elements of K, in order; the sum of a block is taken in the lanes of one
// vector, in order, and then over the lanes in a fixed way. That depends on K alone, not on the tile that a result
// happens to fall in, so a token's results are bitwise the same in any batch and on any number of threads. Integer sums
// are exact, and blocks of any length give the same.
#pragma once

#include <type_traits>  // types only: see vec/vec.h

#include "core/kernels.h"
#include "vec/vec.h"

namespace eightfold::EIGHTFOLD_ISA {

constexpr int kStreamRows = 6;           // at most so many tokens, of so many bytes, go past the weights row by row:
constexpr int64_t kStreamBytes = 28672;  // more of them do not stay in the first-level cache while weights stream by
constexpr int64_t kStreamAhead = 8192;   // bytes of the weights that follow, kept on their way meanwhile
constexpr int64_t kMostRows = 144;       // tokens that go through a block of weights together
constexpr int64_t kMostColumns = 96;     // weights of an item of work: whole tiles, whole vectors
constexpr int64_t kScratchSums = kMostRows * kMostColumns;

// A kind of product: how activations X and weights W are loaded, multiplied and summed. `Wide` is the kind that int8
// weights of float activations are widened to, a panel at a time, where many tokens share them; else the kind itself.

// fp32 activations; weights widened in registers.
template <class T>
struct DotFloat {
  using X = float;
  using W = T;
  using Wide = std::conditional_t<std::is_same_v<T, int8_t>, DotFloat<float>, DotFloat>;
  using Vector = vf;
  using Sum = float;
  struct XV {
    vf v;
  };
  struct WV {
    vf v;
  };
  static constexpr int64_t kStep = VL, kBlock = 1024;
  static constexpr bool kExact = false;
  static EF_INLINE Vector start() { return zero(); }
  static EF_INLINE XV load_x(const X* p) { return {load(p)}; }
  static EF_INLINE WV load_w(const W* p) { return {load(p)}; }
  static EF_INLINE WV load_w_n(const W* p, int64_t n) { return {load_n(p, n)}; }
  static EF_INLINE void store_w(float* p, WV w) { store(p, w.v); }
  static EF_INLINE void dot(Vector& acc, XV x, WV w) { acc = fma(x.v, w.v, acc); }
  static EF_INLINE void dot_at(Vector& acc, const X* x, WV w) { dot(acc, load_x(x), w); }
};

struct DotInt8 {
  using X = quantized;
  using W = int8_t;
  using Wide = DotInt8;
  using Vector = vi;
  using Sum = int32_t;
  using XV = Quantized;
  using WV = Weights8;
  static constexpr int64_t kStep = kDot8, kBlock = 4096;
  static constexpr bool kExact = true;  // sums are the same in any order
  static EF_INLINE Vector start() { return set1_int(0); }
  static EF_INLINE XV load_x(const X* p) { return load_quantized(p); }
  static EF_INLINE WV load_w(const W* p) { return load_weights8(p); }
  static EF_INLINE WV load_w_n(const W* p, int64_t n) { return load_weights8_n(p, n); }
  static EF_INLINE void dot(Vector& acc, XV x, WV w) { dot8(acc, x, w); }
  static EF_INLINE void dot_at(Vector& acc, const X* x, WV w) { dot8_at(acc, x, w); }
};

#if EIGHTFOLD_LEVEL >= 3
template <class T>
struct DotBf16 {
  using X = bf16;
  using W = T;
  using Wide = DotBf16<bf16>;
  using Vector = vf;
  using Sum = float;
  using XV = Pairs;
  using WV = Pairs;
  static constexpr int64_t kStep = 32, kBlock = 2048;
  static constexpr bool kExact = false;
  static EF_INLINE Vector start() { return zero(); }
  static EF_INLINE XV load_x(const X* p) { return load_pairs(p); }
  static EF_INLINE WV load_w(const W* p) { return load_pairs(p); }
  static EF_INLINE WV load_w_n(const W* p, int64_t n) { return load_pairs_n(p, n); }
  static EF_INLINE void store_w(bf16* p, WV w) { store_pairs(p, w); }
  static EF_INLINE void dot(Vector& acc, XV x, WV w) { dot_pairs(acc, x, w); }
  static EF_INLINE void dot_at(Vector& acc, const X* x, WV w) { dot_pairs_at(acc, x, w); }
};
#endif

// Weights to bring near while a tile is computed: rows of `row_bytes`, one after the other, `count` times `step` bytes
// at each step. In the order of the file, so that the processor's own prefetcher takes part.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, row_bytes = 0, step = 0;
  int count = 0;
};

EF_INLINE float plus(float a, float b) { return a + b; }
EF_INLINE int32_t plus(int32_t a, int32_t b) {  // sums with 128 added to the weights may wrap, and wrap back
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

#if EIGHTFOLD_LEVEL >= 2
// The last two columns of a tile: four sums at a time, those of two tokens.
template <int M, int N, class V, class T>
EF_INLINE void store_last_two(V (&acc)[M][N], bool add_to, T* c, int64_t ldc) {
  EF_UNROLL
  for (int m = 0; m < M; m += 2) {
    constexpr int last = M - 1;
    const int next = m < last ? m + 1 : m;
    const V pair[4] = {acc[m][N - 2], acc[m][N - 1], acc[next][N - 2], acc[next][N - 1]};
    const auto s = sums_of(pair);
    store_low_sums(c + m * ldc + N - 2, s, add_to);
    if (next != m) store_low_sums(c + next * ldc + N - 2, high_half(s), add_to);
  }
}
#endif

// The lane sums of a tile, stored or added to what is there.
template <int M, int N, class V, class T>
EF_INLINE void store_tile(V (&acc)[M][N], bool add_to, T* c, int64_t ldc) {
#if EIGHTFOLD_LEVEL >= 2
  if constexpr (N == 6) {
    EF_UNROLL
    for (int m = 0; m < M; m++) store_sums(c + m * ldc, sums_of(acc[m]), add_to);
    store_last_two(acc, add_to, c, ldc);
    return;
  }
#endif
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int n = 0; n < N; n++) {
      const T s = sum(acc[m][n]);
      T& to = c[m * ldc + n];
      to = add_to ? plus(to, s) : s;
    }
  }
}

// M tokens × N weights over `length` elements of K; the lane sums go to (or are added to) c[m · ldc + n].
// Rows of x are padded with zeros to whole steps.
template <class D, int M, int N>
EF_INLINE void tile(const typename D::X* x, int64_t x_stride, const typename D::W* w, int64_t w_stride, int64_t length,
                    bool add_to, typename D::Sum* c, int64_t ldc, Ahead ahead) {
  typename D::Vector acc[M][N];
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int n = 0; n < N; n++) acc[m][n] = D::start();
  }
  // A few pointers and strides that the addresses of all rows are made of: there are registers for no more.
  const int64_t w_row = w_stride * static_cast<int64_t>(sizeof *w), x_row = x_stride * static_cast<int64_t>(sizeof *x);
  const typename D::W* w3 = w + 3 * w_stride;
  const auto w_at = [&](int n) EF_LAMBDA {
    return reinterpret_cast<const typename D::W*>(reinterpret_cast<const char*>(n < 3 ? w : w3) + n % 3 * w_row);
  };
  const auto x_at = [&](int m) EF_LAMBDA {
    return reinterpret_cast<const typename D::X*>(reinterpret_cast<const char*>(x) + m * x_row);
  };
  int64_t left = length, line = 0;
  for (; left >= D::kStep; left -= D::kStep) {
    if constexpr (N > 1) {
      for (int i = 0; i < ahead.count; i++) {
        __builtin_prefetch(ahead.at + line, 0, 3);
        line += ahead.step;
        if (line >= ahead.row_bytes) line = 0, ahead.at += ahead.stride;
      }
    }
    typename D::WV wv[N];
    EF_UNROLL
    for (int n = 0; n < N; n++) wv[n] = D::load_w(w_at(n));
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      const typename D::XV xv = D::load_x(x_at(m));
      EF_UNROLL
      for (int n = 0; n < N; n++) D::dot(acc[m][n], xv, wv[n]);
    }
    w += D::kStep, w3 += D::kStep, x += D::kStep;
  }
  if (left > 0) {
    typename D::WV wv[N];
    EF_UNROLL
    for (int n = 0; n < N; n++) wv[n] = D::load_w_n(w_at(n), left);
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      const typename D::XV xv = D::load_x(x_at(m));
      EF_UNROLL
      for (int n = 0; n < N; n++) D::dot(acc[m][n], xv, wv[n]);
    }
  }
  store_tile<M, N>(acc, add_to, c, ldc);
}

template <class D, int N, int M = kTileRows>
EF_INLINE void tile_of(int rows, const typename D::X* x, int64_t x_stride, const typename D::W* w, int64_t w_stride,
                       int64_t length, bool add_to, typename D::Sum* c, int64_t ldc, Ahead ahead) {
  if (rows == M) {
    tile<D, M, N>(x, x_stride, w, w_stride, length, add_to, c, ldc, ahead);
  } else if constexpr (M > 1) {
    tile_of<D, N, M - 1>(rows, x, x_stride, w, w_stride, length, add_to, c, ldc, ahead);
  }
}

// M tokens × one weight row over `length` elements of K, as `tile` would; `ahead` is brought near, as many bytes. How far
// the processor looks ahead is counted in instructions, so there are as few of them for a line of weights as can be.
template <class D, int M>
EF_INLINE void row_tile(const typename D::X* x, int64_t x_stride, const typename D::W* w, int64_t length, bool add_to,
                        typename D::Sum* c, int64_t ldc, const char* ahead) {
  constexpr int kSteps = M <= 4 ? 4 : 1;  // at once; for more tokens there are no registers for the addresses
  typename D::Vector acc[M][1];
  EF_UNROLL
  for (int m = 0; m < M; m++) acc[m][0] = D::start();
  const auto dots = [&](int64_t k, typename D::WV weights) EF_LAMBDA {
    EF_UNROLL
    for (int m = 0; m < M; m++) D::dot_at(acc[m][0], x + m * x_stride + k, weights);
  };
  const auto step = [&](int64_t k) EF_LAMBDA {
    __builtin_prefetch(ahead + k * static_cast<int64_t>(sizeof *w), 0, 3);
    dots(k, D::load_w(w + k));
  };
  int64_t k = 0;
  for (; k + kSteps * D::kStep <= length; k += kSteps * D::kStep) {
    EF_UNROLL
    for (int i = 0; i < kSteps; i++) step(k + i * D::kStep);
  }
  for (; k + D::kStep <= length; k += D::kStep) step(k);
  if (k < length) dots(k, D::load_w_n(w + k, length - k));
  store_tile<M, 1>(acc, add_to, c, ldc);
}

// Where the weights lie that are wanted after those at hand: rows `stride` bytes apart. Null if that is not known.
struct Upcoming {
  const char* at = nullptr;
  int64_t stride = 0;
};

// One weight row after another, each read once at the rate of the memory, for a few tokens at a time.
template <class D, int M>
void stream(const typename D::X* x, int64_t x_stride, const typename D::W* w, int64_t w_stride, int64_t columns,
            int64_t length, typename D::Sum* c, int64_t ldc, Upcoming after) {
  const int64_t size = sizeof *w, row_bytes = length * size;
  // So many whole rows, or so many bytes of a row that is longer.
  const int64_t rows_ahead = kStreamAhead / row_bytes, bytes_ahead = rows_ahead ? 0 : kStreamAhead;
  for (int64_t n = 0; n < columns; n++) {
    const typename D::W* row = w + n * w_stride;
    for (int64_t k = 0; k < length; k += D::kBlock) {
      int64_t next = n + rows_ahead, at = k * size + bytes_ahead;
      if (at >= row_bytes) next++, at -= row_bytes;
      const char* ahead = reinterpret_cast<const char*>(row + k);  // near already: where nothing is known to follow
      if (next < columns) {
        ahead = reinterpret_cast<const char*>(w + next * w_stride) + at;
      } else if (after.at) {
        ahead = after.at + (next - columns) * after.stride + at;
      }
      row_tile<D, M>(x + k, x_stride, row + k, smaller(D::kBlock, length - k), k > 0, c + n, ldc, ahead);
    }
  }
}

template <class D, int M>
EF_INLINE void stream_of(int64_t rows, const typename D::X* x, int64_t x_stride, const typename D::W* w,
                         int64_t w_stride, int64_t columns, int64_t length, typename D::Sum* c, int64_t ldc,
                         Upcoming after) {
  if (rows == M) {
    stream<D, M>(x, x_stride, w, w_stride, columns, length, c, ldc, after);
  } else if constexpr (M > 1) {
    stream_of<D, M - 1>(rows, x, x_stride, w, w_stride, columns, length, c, ldc, after);
  }
}

EF_INLINE Upcoming rows_from(const Matrix& w, int64_t first) {
  const int64_t stride = w.stride * (w.dtype == Dtype::f32 ? 4 : w.dtype == Dtype::i8 ? 1 : 2);
  return {static_cast<const char*>(w.data) + first * stride, stride};
}

// A panel of N weight rows (kTileColumns, or 1 at the end of a matrix) against all tokens; of the panel that comes
// next, `row_bytes` of each row are brought near meanwhile, spread over the tiles.
template <class D, int N>
void panel(const typename D::X* x, int64_t x_stride, int64_t rows, const typename D::W* w, int64_t w_stride,
           int64_t length, bool add_to, typename D::Sum* c, int64_t ldc, Upcoming next, int64_t row_bytes) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, each = rows / tiles, longer = rows % tiles;
  const int64_t step = D::kStep * row_bytes / length;
  int64_t m = 0, fetched = 0;
  for (int64_t t = 0; t < tiles; t++) {
    const int height = static_cast<int>(each + (t < longer));
    // Rows of the next panel that should be near after this tile.
    const int64_t wanted = next.at ? (t + 1) * N / tiles : 0;
    const char* at = next.at + fetched * next.stride;
    const Ahead ahead{at, next.stride, row_bytes, step, static_cast<int>(wanted - fetched)};
    fetched = wanted;
    tile_of<D, N>(height, x + m * x_stride, x_stride, w, w_stride, length, add_to, c + m * ldc, ldc, ahead);
    m += height;
  }
}

// A panel of int8 weights, widened once for all tokens, which is cheaper from the second tile of them on.
template <class D>
void widened_panel(const typename D::X* x, int64_t x_stride, int64_t rows, const typename D::W* w, int64_t w_stride,
                   int64_t length, bool add_to, typename D::Sum* c, int64_t ldc, Upcoming next) {
  using Wide = typename D::Wide;
  static_assert(Wide::kStep == D::kStep && Wide::kBlock == D::kBlock, "the same sums in the same order");
  constexpr int64_t stride = D::kBlock + 32;  // rows apart in the first-level cache
  alignas(64) typename Wide::W wide[kTileColumns * stride];
  for (int n = 0; n < kTileColumns; n++) {
    const typename D::W* from = w + n * w_stride;
    typename Wide::W* to = wide + n * stride;
    int64_t k = 0;
    for (; k + D::kStep <= length; k += D::kStep) D::store_w(to + k, D::load_w(from + k));
    if (k < length) D::store_w(to + k, D::load_w_n(from + k, length - k));
  }
  panel<Wide, kTileColumns>(x, x_stride, rows, wide, stride, length, add_to, c, ldc, next, length);
}

// x [rows, K] · rows [0, columns) of w → c [rows, columns] at stride ldc; rows ≤ kMostRows. `after` follows `w`.
template <class D>
void product(const typename D::X* x, int64_t x_stride, int64_t rows, const typename D::W* w, int64_t w_stride,
             int64_t columns, int64_t length, typename D::Sum* c, int64_t ldc, Upcoming after) {
  // Row by row there is one chain of sums, which for int8 that is widened takes longer than reading does.
  constexpr bool widens = !std::is_same_v<D, typename D::Wide>;
  const int64_t size = sizeof *w, x_bytes = rows * length * static_cast<int64_t>(sizeof *x);
  // Of rows that lie apart (a rank's columns), lines beyond their ends come along into the caches.
  const int64_t most_bytes = w_stride > length ? kStreamBytes / 2 : kStreamBytes;
  if (!widens && (rows == 1 || (rows <= kStreamRows && x_bytes <= most_bytes))) {
    stream_of<D, kStreamRows>(rows, x, x_stride, w, w_stride, columns, length, c, ldc, after);
    return;
  }
  // Blocks of K keep near what several tiles of tokens share; for one tile, memory is read faster in long runs.
  const int64_t block = D::kExact && rows <= kTileRows ? length : D::kBlock;
  for (int64_t k = 0; k < length; k += block) {
    const int64_t part = smaller(block, length - k);
    const bool last_part = k + part == length;
    int64_t n = 0;
    for (; n + kTileColumns <= columns; n += kTileColumns) {
      const typename D::W* here = w + n * w_stride + k;
      const bool last = n + 2 * kTileColumns > columns;
      const Upcoming in_this{reinterpret_cast<const char*>(last ? w + k + part : here + kTileColumns * w_stride),
                             w_stride * size};
      const Upcoming next = last && last_part ? after : in_this;
      if constexpr (widens) {
        if (rows > kTileRows) {
          widened_panel<D>(x + k, x_stride, rows, here, w_stride, part, k > 0, c + n, ldc, next);
          continue;
        }
      }
      panel<D, kTileColumns>(x + k, x_stride, rows, here, w_stride, part, k > 0, c + n, ldc, next, part * size);
    }
    for (; n < columns; n++)
      panel<D, 1>(x + k, x_stride, rows, w + n * w_stride + k, w_stride, part, k > 0, c + n, ldc, {}, 0);
  }
}

// Writes rows [first, first + count) of `w` times `rows` prepared tokens as floats: out [rows, count] at stride
// `out_stride`. Needs `multiply_scratch(w.cols)` bytes of scratch. `after`: the weights of the next call, if known.
void multiply(const Matrix& w, Input input, const Prepared& x, int64_t x_first, int64_t rows, int64_t first,
              int64_t count, float* out, int64_t out_stride, void* scratch, Upcoming after);

int64_t multiply_scratch(int64_t length);

// The same of an int8 matrix as integers, before any scale: what ranks add up that share the columns.
void multiply_integers(const Matrix& w, const Prepared& x, int64_t x_first, int64_t rows, int64_t first, int64_t count,
                       int32_t* out, int64_t out_stride, void* scratch, Upcoming after);

// `multiply` for int4 weights, and activations in the order that the shuffled inputs have.
void multiply_int4(const Matrix& w, Input input, const Prepared& x, int64_t x_first, int64_t rows, int64_t first,
                   int64_t count, float* out, int64_t out_stride, void* scratch, Upcoming after);
void prepare_shuffled(Input input, const float* x, int64_t width, char* to);

// One row of activations → as the product reads it.
void prepare_row(Input input, const float* x, int64_t width, const Prepared& to, int64_t row);

// The largest magnitude of a row as `prepare_row` would quantize it; NaN where it holds an infinity or a NaN.
float absmax_of(Input input, const float* x, int64_t width);

// What a quantized step of a row with this absmax is worth.
float scale_of(float absmax);

// to[n] = from[n] · by · scale[n], as floats, rounded after each product
void scale_row(const int32_t* from, float by, const float* scale, int64_t count, float* to);

}  // namespace eightfold::EIGHTFOLD_ISA
