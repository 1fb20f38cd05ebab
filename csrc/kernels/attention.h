// The inner kernels of attention: a block of 64 positions against a tile of query rows.
//
// A vector holds one element (a pair of bf16, a quad of int8) of VL positions: a score is then summed over the head's
// elements in order, and an output over positions in order, whatever else is in the tile. Blocks that many rows share are
// packed that way in memory, those of a single tile in registers; either way the same operations follow each other,
// which is what makes a token's bits independent of how its prompt was cut.
//
// How keys and values are multiplied is a policy P: see attention_products.h, and QuadProducts in attention_int8.h.
#pragma once

#include "core/kernels.h"
#include "kernels/attention_products.h"
#include "vec/vec.h"

namespace eightfold::EIGHTFOLD_ISA {

// Where the keys and values of a block lie, of an item's first head. Positions that do not exist stand at the first
// one's place: their scores are hidden, so that only their being readable matters.
template <class T>
struct Rows {
  const T *keys[kKvBlock], *values[kKvBlock];
  bool even;  // all positions exist, and each VL of them follow each other in one page
};

// The rows of one head in a block: those of the item's first head, and so many elements on.
template <class T>
struct HeadRows {
  const T* const* rows;
  int64_t offset;
  EF_INLINE const T* operator[](int64_t i) const { return rows[i] + offset; }
};

// What a thread keeps of a block of positions and of its query rows. A row of queries or probabilities is P::kParts
// rows of lanes. Rows of an item's heads follow each other, those of a head in whole tiles.
template <class P>
struct Work {
  using Lane = typename P::Lane;
  int64_t dim, steps, padded;  // steps: of kPer elements, in whole vectors; padded: dim in whole groups of vectors
  Lane* keys;                  // [steps, 64]
  Lane* values;                // [64 / kPer, padded]
  Lane* queries;               // [tiles, steps, kTileQueries · kParts]
  Lane* probabilities;         // [kTileQueries · kParts, 64 / kPer] of each head of an item
  float* scores;               // [kTileQueries, 64]
  float* out;                  // [rows, padded] of the segment, elements as P::in_order finds them
  float* total;                // [rows, padded] of all segments before
  float *most, *weight;        // [rows] running maximum and sum of the segment
  float *total_most, *total_weight;
  float* query_factor;                                 // QuadProducts: [rows] of the queries' integers
  int32_t* query_bias;                                 // QuadProducts: [rows, kParts]
  float* factors;                                      // [heads, 2 · VL]: see Tile
  float key_scales[kKvBlock], value_scales[kKvBlock];  // of int8; 0 where there is no position
  Rows<typename P::Stored> rows[2];                    // of block b at b % 2
  int64_t found;                                       // the last block in `rows`
  int64_t key_step;                                    // elements between positions of a page
  bool even;                                           // Rows::even of the block in use
  HeadRows<typename P::Stored> keys_of, values_of;     // of the block and the head in use
  HeadRows<typename P::Stored> ahead;                  // what to fetch meanwhile
};

// A tile of query rows, and what its scores leave for its values.
template <class P>
struct Tile {
  int64_t first;                     // row
  int64_t limit;                     // positions of the block that one of its rows may see
  typename P::Lane* probabilities;   // [kTileQueries · kParts, 64 / kPer]
  float* alpha;                      // [VL] what the sums so far are to be multiplied by
  float* probability_factor;         // [VL] QuadProducts: of the probabilities' integers
};

// Brings a row near. Pages are small pieces far apart, which the processor's own prefetcher follows badly.
template <class T>
EF_INLINE void fetch(const T* row, int64_t dim) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 3);
}

// VL steps of VL positions. Rows that follow each other are found by their distance: sixteen pointers are more than
// there are registers.
template <class P, bool kEven>
EF_INLINE void load_keys(const Work<P>& w, int64_t j, int64_t s, vf* r) {
  const int64_t at = s * P::kPer;
  if (kEven && at + VL * P::kPer <= w.dim) {
    const auto* row = w.keys_of[j] + at;
    EF_UNROLL
    for (int i = 0; i < VL; i += 4, row += 4 * w.key_step) {
      r[i] = P::load_key(row, Whole{});
      r[i + 1] = P::load_key(row + w.key_step, Whole{});
      r[i + 2] = P::load_key(row + 2 * w.key_step, Whole{});
      r[i + 3] = P::load_key(row + 3 * w.key_step, Whole{});
    }
  } else {
    const int64_t n = smaller<int64_t>(VL * P::kPer, w.dim - at);
    EF_UNROLL
    for (int i = 0; i < VL; i++) r[i] = P::load_key(w.keys_of[j + i] + at, n);
  }
  transpose(r);
}

template <class P>
void pack_keys(const Work<P>& w) {
  float* to = reinterpret_cast<float*>(w.keys);
  for (int64_t j = 0; j < kKvBlock; j += VL) {
    for (int64_t s = 0; s < w.steps; s += VL) {
      vf r[VL];
      if (w.even) {
        load_keys<P, true>(w, j, s, r);
      } else {
        load_keys<P, false>(w, j, s, r);
      }
      EF_UNROLL
      for (int i = 0; i < VL; i++) store(to + (s + i) * kKvBlock + j, r[i]);
    }
    for (int64_t i = j; i < j + VL; i++) fetch(w.ahead[i], w.dim);
  }
}

// Vectors of values that need no care for the end of a row.
template <class P>
EF_INLINE int64_t whole_vectors(const Work<P>& w) {
  return w.dim / (P::kOrder * VL) * P::kOrder;
}

// A lane's rows of values from position j on.
template <class P>
EF_INLINE void find_values(const Work<P>& w, int64_t j, const typename P::Stored** rows) {
  EF_UNROLL
  for (int i = 0; i < P::kPer; i++) rows[i] = w.values_of[j + i];
}

template <class P>
void pack_values(const Work<P>& w) {
  const int64_t whole = whole_vectors(w);
  float* to = reinterpret_cast<float*>(w.values);
  for (int64_t j = 0; j < kKvBlock; j += P::kPer, to += w.padded) {
    const typename P::Stored* rows[P::kPer];
    find_values(w, j, rows);
    vf many[P::kGroup];
    int64_t v = 0;
    for (; v < whole; v += P::kGroup) {
      P::load_values(rows, v, Whole{}, many);
      EF_UNROLL
      for (int i = 0; i < P::kGroup; i++) store(to + (v + i) * VL, many[i]);
    }
    for (; v < w.padded / VL; v += P::kGroup) {
      P::load_values(rows, v, P::left(w.dim, v), many);
      EF_UNROLL
      for (int i = 0; i < P::kGroup; i++) store(to + (v + i) * VL, many[i]);
    }
    for (int64_t i = j; i < j + P::kPer; i++) fetch(w.ahead[i], w.dim);
  }
}

// Scores of query rows [first, first + M) from packed keys at positions [j, limit), as far as whole tiles of kVectors go;
// returns how far that is.
template <class P, int M, int kVectors>
int64_t score_packed(const Work<P>& w, int64_t first, int64_t j, int64_t limit) {
  constexpr int kRows = M * P::kParts;
  const float* keys = reinterpret_cast<const float*>(w.keys);
  const auto* queries = w.queries + first * w.steps * P::kParts;
  for (; j + kVectors * VL <= limit; j += kVectors * VL) {
    typename P::Sum acc[kVectors][kRows];
    EF_UNROLL
    for (int r = 0; r < kRows; r++) {
      EF_UNROLL
      for (int v = 0; v < kVectors; v++) acc[v][r] = P::start(w, first + r / P::kParts, r % P::kParts);
    }
    for (int64_t s = 0; s < w.steps; s++) {
      vf many[kVectors];
      EF_UNROLL
      for (int v = 0; v < kVectors; v++) many[v] = load(keys + s * kKvBlock + j + v * VL);
      EF_UNROLL
      for (int r = 0; r < kRows; r++) {
        EF_UNROLL
        for (int v = 0; v < kVectors; v++)
          P::dot_key(acc[v][r], queries + s * kTileQueries * P::kParts + r, many[v]);
      }
    }
    EF_UNROLL
    for (int m = 0; m < M; m++) {
      EF_UNROLL
      for (int v = 0; v < kVectors; v++)
        store(w.scores + m * kKvBlock + j + v * VL, P::score(w, first + m, acc[v] + m * P::kParts, j + v * VL));
    }
  }
  return j;
}

// The same for a tile that has the block for itself: keys go from the page through registers into the sums. Two groups of
// positions take turns, because the sums of one would wait for each other. What comes next is fetched evenly meanwhile,
// in the order of the memory.
template <class P, int M, bool kEven>
void score_rows(const Work<P>& w, int64_t first, int64_t limit) {
  constexpr int kRows = M * P::kParts, kGroups = 2;
  const int64_t each = larger<int64_t>(1, VL * VL / w.steps);  // rows to fetch at a time
  static_assert(kLimitStep % (kGroups * VL) == 0, "the groups end at the limit");
  for (int64_t j = 0; j < limit; j += kGroups * VL) {
    typename P::Sum acc[kGroups][kRows];
    EF_UNROLL
    for (int g = 0; g < kGroups; g++) {
      EF_UNROLL
      for (int r = 0; r < kRows; r++) acc[g][r] = P::start(w, first + r / P::kParts, r % P::kParts);
    }
    int64_t fetched = j;
    for (int64_t s = 0; s < w.steps; s += VL) {
      EF_UNROLL
      for (int g = 0; g < kGroups; g++) {
        const auto* queries = w.queries + (first * w.steps + s * kTileQueries) * P::kParts;
        EF_APART(queries);
        for (int64_t end = smaller(fetched + each, j + kGroups * VL); fetched < end; fetched++)
          fetch(w.ahead[fetched], w.dim);
        vf many[VL];
        load_keys<P, kEven>(w, j + g * VL, s, many);
        EF_UNROLL
        for (int i = 0; i < VL; i++) {
          EF_UNROLL
          for (int r = 0; r < kRows; r++)
            P::dot_key_at(acc[g][r], queries + i * kTileQueries * P::kParts + r, many[i]);
        }
      }
    }
    EF_UNROLL
    for (int g = 0; g < kGroups; g++) {
      EF_UNROLL
      for (int m = 0; m < M; m++)
        store(w.scores + m * kKvBlock + j + g * VL, P::score(w, first + m, acc[g] + m * P::kParts, j + g * VL));
    }
  }
}

// The probabilities of row m of a tile, relative to its maximum `now`; returns their sum.
template <class P>
EF_INLINE float exponentials(const Work<P>& w, const Tile<P>& tile, int m, float scale, float now) {
  const float* scores = w.scores + m * kKvBlock;
  auto* probabilities = tile.probabilities + m * (kKvBlock / P::kPer);
  const vf by = set1(scale), minus = set1(-now);
  vf total = zero();
  for (int i = 0; i < tile.limit / VL; i += 2) {
    vf a = exp2_to_0(fma(load(scores + i * VL), by, minus)), b = exp2_to_0(fma(load(scores + (i + 1) * VL), by, minus));
    total = add(add(total, a), b);
    if (P::kScaled) {
      a = mul(a, load(w.value_scales + i * VL));
      b = mul(b, load(w.value_scales + (i + 1) * VL));
    }
    P::put_probabilities(probabilities + i * VL / P::kPer, a, b);
  }
  return sum(total);
}

// One step of the running softmax of M rows: scores → probabilities. All maxima come first, or each row would wait for
// its own.
template <class P, int M>
EF_INLINE void softmax_rows(const Work<P>& w, const Tile<P>& tile, float scale) {
  static_assert(M <= VL, "a value of each row makes one vector");
  float tops[VL] = {}, now[VL], totals[VL] = {};
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    const float* scores = w.scores + m * kKvBlock;
    vf top = largest(load(scores), load(scores + VL));
    for (int64_t i = kLimitStep; i < tile.limit; i += kLimitStep)
      top = largest(top, largest(load(scores + i), load(scores + i + VL)));
    tops[m] = largest_of(top);
  }
  const vf before = load_part(w.most + tile.first, M), most = largest(before, mul(load(tops), set1(scale)));
  const vf alpha = exp2_to_0(sub(before, most));
  store(now, most);
  store(tile.alpha, alpha);
  EF_UNROLL
  for (int m = 0; m < M; m++) totals[m] = exponentials(w, tile, m, scale, now[m]);
  store_part(w.most + tile.first, most, M);
  float* weight = w.weight + tile.first;
  store_part(weight, add(mul(load_part(weight, M), alpha), load(totals)), M);
}

template <class P>
struct PackedValues {
  const Work<P>& w;
  EF_INLINE void fetch_next(int64_t, int64_t, int) const {}
  EF_INLINE void operator()(int64_t j, int64_t v, vf* many) const {
    const float* from = reinterpret_cast<const float*>(w.values) + j * w.padded + v * VL;
    EF_UNROLL
    for (int i = 0; i < P::kGroup; i++) many[i] = load(from + i * VL);
  }
};

template <class P, bool kWhole>
struct ValueRows {
  const Work<P>& w;
  EF_INLINE void fetch_next(int64_t j, int64_t v0, int vectors) const {
    const int64_t each = larger<int64_t>(1, P::kPer * vectors * VL / w.padded);  // rows
    const int64_t row = (v0 / vectors * (kKvBlock / P::kPer) + j) * each;
    for (int64_t i = row; i < smaller<int64_t>(row + each, kKvBlock); i++) fetch(w.ahead[i], w.dim);
  }
  EF_INLINE void operator()(int64_t j, int64_t v, vf* many) const {
    const typename P::Stored* rows[P::kPer];
    find_values(w, j * P::kPer, rows);
    if constexpr (kWhole) {
      P::load_values(rows, v, Whole{}, many);
    } else {
      P::load_values(rows, v, P::left(w.dim, v), many);
    }
  }
};

// out [M, V vectors from v0] = out · alpha + probabilities · values of the positions that the tile sees
template <class P, int M, int V, class Values>
EF_INLINE void value_tile(const Work<P>& w, const Tile<P>& tile, int64_t v0, const Values& values) {
  constexpr int kRows = M * P::kParts;
  float* out = w.out + tile.first * w.padded + v0 * VL;
  typename P::Sum acc[kRows][V];
  EF_UNROLL
  for (int r = 0; r < kRows; r++) {
    EF_UNROLL
    for (int v = 0; v < V; v++) {
      if constexpr (P::kParts == 1) {
        acc[r][v] = mul(load(out + r * w.padded + v * VL), set1(tile.alpha[r]));
      } else {
        acc[r][v] = set1_int(0);
      }
    }
  }
  for (int64_t j = 0; j < tile.limit / P::kPer; j++) {
    values.fetch_next(j, v0, V);
    vf many[V];
    EF_UNROLL
    for (int v = 0; v < V; v += P::kGroup) values(j, v0 + v, many + v);
    EF_UNROLL
    for (int r = 0; r < kRows; r++) {
      EF_UNROLL
      for (int v = 0; v < V; v++) P::dot_value(acc[r][v], tile.probabilities + r * (kKvBlock / P::kPer) + j, many[v]);
    }
  }
  EF_UNROLL
  for (int m = 0; m < M; m++) {
    EF_UNROLL
    for (int v = 0; v < V; v++) {
      float* to = out + m * w.padded + v * VL;
      if constexpr (P::kParts == 1) {
        store(to, acc[m][v]);
      } else {
        const vf part = P::joined(acc[m * P::kParts][v], acc[m * P::kParts + 1][v]);
        store(to, fma(part, set1(tile.probability_factor[m]), mul(load(to), set1(tile.alpha[m]))));
      }
    }
  }
}

// Vectors [v, end) of M rows; returns where it got to.
template <class P, int M, int V, class Values>
EF_INLINE int64_t value_tiles(const Work<P>& w, const Tile<P>& tile, int64_t v, int64_t end, const Values& values) {
  for (; v + V <= end; v += V) value_tile<P, M, V>(w, tile, v, values);
  return v;
}

// The M rows of a tile against the positions below its limit in the block in use, packed or not: first the
// probabilities, then their products with the values. Positions from the limit on are hidden from all of the rows; `hide`
// masks the scores of others before the softmax.
template <class P, int M, class Hide>
void tile_scores(const Work<P>& w, const Tile<P>& tile, bool packed, float scale, const Hide& hide) {
  constexpr int kVectors = kScoreVectors / P::kParts;
  if (packed) {
    const int64_t j = score_packed<P, M, kVectors>(w, tile.first, 0, tile.limit);
    if constexpr (kVectors > 2) score_packed<P, M, 2>(w, tile.first, j, tile.limit);
  } else if (w.even) {
    score_rows<P, M, true>(w, tile.first, tile.limit);
  } else {
    score_rows<P, M, false>(w, tile.first, tile.limit);
  }
  hide(M);
  softmax_rows<P, M>(w, tile, scale);
}

template <class P, int M>
void tile_values(const Work<P>& w, const Tile<P>& tile, bool packed) {
  constexpr int kVectors = kScoreVectors / P::kParts;
  const int64_t vectors = w.padded / VL;
  if (packed) {
    const PackedValues<P> values{w};
    int64_t v = value_tiles<P, M, kVectors>(w, tile, 0, vectors, values);
    if constexpr (kVectors > 2) v = value_tiles<P, M, 2>(w, tile, v, vectors, values);
    value_tiles<P, M, P::kGroup>(w, tile, v, vectors, values);
  } else {
    const int64_t v = value_tiles<P, M, kVectors>(w, tile, 0, whole_vectors(w), ValueRows<P, true>{w});
    value_tiles<P, M, P::kGroup>(w, tile, v, vectors, ValueRows<P, false>{w});
  }
}

}  // namespace eightfold::EIGHTFOLD_ISA
