// An item of attention's work: which query rows it has, where its keys and values lie, and which of them a row may see.
#pragma once

#include <cmath>

#include "kernels/attention.h"

namespace eightfold::EIGHTFOLD_ISA {

struct Item {
  int64_t row;
  int64_t head, heads;    // of keys and values: first, and how many
  int64_t token, tokens;  // first token of the batch, and how many
  int64_t position;       // of the first token
  int64_t segment_begin, segment_end;
  bool partial;
};

// Query rows of each head of an item, and how far apart the heads' rows are.
struct QueryRows {
  int64_t group, count, stride;
  QueryRows(const Attention& a, const Item& item)
      : group(a.heads / a.kv_heads), count(item.tokens * group), stride(round_up(count, kTileQueries)) {}
};

// Where the keys and values of a block lie; those from `end` on do not exist.
template <class T>
void find_rows(const Attention& a, const Item& item, int64_t block, int64_t end, Rows<T>& rows) {
  const int32_t* table = a.page_table + item.row * a.table_stride;
  const int64_t size = a.page_size, key_step = a.k_strides[2], value_step = a.v_strides[2];
  const int64_t count = larger<int64_t>(0, smaller(kKvBlock, end - block * kKvBlock));
  const T* k = static_cast<const T*>(a.k) + item.head * a.k_strides[1];
  const T* v = static_cast<const T*>(a.v) + item.head * a.v_strides[1];
  int64_t page = block * kKvBlock / size, slot = block * kKvBlock % size;
  for (int64_t j = 0; j < count; page++, slot = 0) {
    const T* key = k + table[page] * a.k_strides[0] + slot * key_step;
    const T* value = v + table[page] * a.v_strides[0] + slot * value_step;
    const int64_t run = smaller(count - j, size - slot);
    for (int64_t i = 0; i < run; i++) rows.keys[j + i] = key + i * key_step;
    for (int64_t i = 0; i < run; i++) rows.values[j + i] = value + i * value_step;
    j += run;
  }
  rows.even = count == kKvBlock && size % VL == 0;
  const T *key = count ? rows.keys[0] : k, *value = count ? rows.values[0] : v;
  for (int64_t j = count; j < kKvBlock; j++) rows.keys[j] = key, rows.values[j] = value;
}

// The scales of a block's positions side by side.
inline void find_scales(const Attention& a, const Item& item, int64_t head, int64_t block, float* keys, float* values) {
  const int32_t* table = a.page_table + item.row * a.table_stride;
  int64_t page = block * kKvBlock / a.page_size, slot = block * kKvBlock % a.page_size;
  const int64_t count = smaller(kKvBlock, item.position + item.tokens - block * kKvBlock);
  for (int64_t j = 0; j < count; page++, slot = 0) {
    const int64_t at = (table[page] * a.kv_heads + head) * a.page_size + slot;
    const int64_t run = smaller(count - j, a.page_size - slot);
    std::memcpy(keys + j, a.k_scale + at, static_cast<size_t>(run) * sizeof(float));
    std::memcpy(values + j, a.v_scale + at, static_cast<size_t>(run) * sizeof(float));
    j += run;
  }
  for (int64_t j = count; j < kKvBlock; j++) keys[j] = values[j] = 0.f;
}

// What scores are bounded by: kKvBlock positions that are hidden, as many that are seen, and hidden ones again. A NaN
// becomes its bound: it is hidden where it may not be seen, and an infinity elsewhere, whose probability is a NaN again.
struct Bounds {
  float at[3 * kKvBlock];
  constexpr Bounds() : at() {
    for (int64_t j = 0; j < 3 * kKvBlock; j++) at[j] = j / kKvBlock == 1 ? INFINITY : -INFINITY;
  }
};
inline constexpr Bounds bounds;

// Scores of positions that a query row may not see: ahead of it, or further back than the window.
template <class P>
struct Hide {
  const Attention& a;
  const Work<P>& w;
  int64_t group, first_row, position, block;  // position: of row 0 of the item
  bool nothing;
  void operator()(int rows) const {
    if (nothing) return;
    for (int m = 0; m < rows; m++) {
      const int64_t own = position + (first_row + m) / group - block * kKvBlock;  // within the block
      const int64_t seen = smaller<int64_t>(kKvBlock, larger<int64_t>(0, own + 1));
      const int64_t low = a.window ? smaller<int64_t>(kKvBlock, larger<int64_t>(0, own - a.window + 1)) : 0;
      float* scores = w.scores + m * kKvBlock;
      for (int64_t j = 0; j < kKvBlock; j += VL) {
        const vf ahead = load(bounds.at + 2 * kKvBlock - seen + j), behind = load(bounds.at + kKvBlock - low + j);
        store(scores + j, smallest(smallest(load(scores + j), ahead), behind));
      }
    }
  }
};

}  // namespace eightfold::EIGHTFOLD_ISA
