// Paged causal attention of a ragged batch. An item of work is a chunk of one row's tokens with the query heads of one
// key-value head: their rows share every block of keys and values that is packed.
//
// A token's result is the merge, in order, of segments of kSegment positions that start at multiples of kSegment;
// within a segment, blocks of kKvBlock positions follow each other with a running softmax. Blocks that a token cannot
// see leave its sums exactly as they are, so it does not matter whether they are visited.
#include <cmath>

#include "kernels/attention.h"
#include "kernels/attention_int8.h"
#include "kernels/attention_item.h"

namespace eightfold::EIGHTFOLD_ISA {
namespace {

char* carve(char*& from, int64_t count) {
  char* at = from;
  from += round_up(count * 4, 64);
  return at;
}

template <class P>
Work<P> lay_out(const Attention& a, Worker& worker) {
  using Lane = typename P::Lane;
  Work<P> w;
  const int64_t rows = larger(round_up(a.chunk * (a.heads / a.kv_heads), kTileQueries),
                              a.together * round_up(kFewRows, kTileQueries));
  w.dim = a.dim;
  w.steps = round_up((a.dim + P::kPer - 1) / P::kPer, VL);
  w.padded = round_up(a.dim, P::kOrder * VL);
  w.key_step = a.k_strides[2];
  const int64_t sizes[] = {w.steps * kKvBlock,
                           kKvBlock / P::kPer * w.padded,
                           rows * w.steps * P::kParts + VL,
                           a.together * kTileQueries * P::kParts * kKvBlock / P::kPer,
                           rows * P::kParts,
                           kTileQueries * kKvBlock,
                           rows * w.padded,
                           rows * w.padded,
                           rows,
                           rows,
                           rows,
                           rows,
                           rows,
                           a.together * 2 * VL};
  int64_t bytes = 0;
  for (const int64_t size : sizes) bytes += round_up(size * 4, 64);
  char* at = worker.scratch(static_cast<size_t>(bytes));
  w.keys = reinterpret_cast<Lane*>(carve(at, sizes[0]));
  w.values = reinterpret_cast<Lane*>(carve(at, sizes[1]));
  w.queries = reinterpret_cast<Lane*>(carve(at, sizes[2]));
  w.probabilities = reinterpret_cast<Lane*>(carve(at, sizes[3]));
  w.query_bias = reinterpret_cast<int32_t*>(carve(at, sizes[4]));
  float** const floats[] = {&w.scores,     &w.out,          &w.total,       &w.most, &w.weight,
                            &w.total_most, &w.total_weight, &w.query_factor, &w.factors};
  for (int i = 0; i < 9; i++) *floats[i] = reinterpret_cast<float*>(carve(at, sizes[5 + i]));
  return w;
}

// `count` query rows → [steps, kTileQueries], VL steps of each at a time. Writes up to VL lanes beyond, where the next
// tile's will come.
template <class P>
void put_tile(const Work<P>& w, const float* const* rows, int count, float* to) {
  for (int64_t s = 0; s < w.steps; s += VL) {
    vf r[VL];
    EF_UNROLL
    for (int i = 0; i < VL; i++) r[i] = i < count ? P::query_lanes(rows[i] + s * P::kPer, w.dim - s * P::kPer) : zero();
    transpose(r);
    EF_UNROLL
    for (int i = 0; i < VL; i++) store(to + (s + i) * kTileQueries, r[i]);
  }
}

template <class P>
void pack_queries(const Attention& a, const Item& item, Work<P>& w) {
  const QueryRows rows(a, item);
  for (int64_t h = 0; h < item.heads; h++) {
    const float* q = a.q + (item.token * a.heads + (item.head + h) * rows.group) * a.dim;
    const float* tile_rows[kTileQueries];
    for (int64_t i = 0, g = 0; i < rows.count; i++) {
      const int64_t row = h * rows.stride + i;
      auto* tile = w.queries + row / kTileQueries * w.steps * kTileQueries * P::kParts;
      const int in_tile = static_cast<int>(i % kTileQueries);
      if constexpr (P::kParts == 1) {
        tile_rows[in_tile] = q;
        if (in_tile == kTileQueries - 1 || i == rows.count - 1)
          put_tile(w, tile_rows, in_tile + 1, reinterpret_cast<float*>(tile));
      } else {
        P::put_query(w, row, q, tile + in_tile * P::kParts);
      }
      const bool last_of_group = ++g == rows.group;
      if (last_of_group) g = 0;
      q += last_of_group ? (a.heads - rows.group + 1) * a.dim : a.dim;
    }
  }
}

template <class P, int M = kTileQueries>
void tile_scores_of(int rows, const Work<P>& w, const Tile<P>& tile, bool packed, float scale, const Hide<P>& hide) {
  if (rows == M) {
    tile_scores<P, M>(w, tile, packed, scale, hide);
  } else if constexpr (M > 1) {
    tile_scores_of<P, M - 1>(rows, w, tile, packed, scale, hide);
  }
}

template <class P, int M = kTileQueries>
void tile_values_of(int rows, const Work<P>& w, const Tile<P>& tile, bool packed) {
  if (rows == M) {
    tile_values<P, M>(w, tile, packed);
  } else if constexpr (M > 1) {
    tile_values_of<P, M - 1>(rows, w, tile, packed);
  }
}

// A visit to a block of positions: `Visit` knows what of it each tile of query rows sees.
template <class P>
class Visit {
 public:
  Visit(const Attention& a, const Item& item, int64_t block, float scale, Work<P>& w)
      : a_(a), item_(item), block_(block), scale_(scale), w_(w), rows_(a, item) {
    const int64_t end = item.position + item.tokens;
    while (w.found <= block) {
      w.found++;
      find_rows(a, item, w.found, end, w.rows[w.found % 2]);
    }
    w.even = w.rows[block % 2].even;
  }

  void run() {
    if (rows_.count <= kTileQueries) return single_tiles();
    for (int64_t h = 0; h < item_.heads; h++) packed_tiles(h);
  }

 private:
  const Attention& a_;
  const Item& item_;
  const int64_t block_;
  const float scale_;
  Work<P>& w_;
  const QueryRows rows_;

  auto keys(int64_t block, int64_t head) const {
    return HeadRows<typename P::Stored>{w_.rows[block % 2].keys, head * a_.k_strides[1]};
  }
  auto values(int64_t block, int64_t head) const {
    return HeadRows<typename P::Stored>{w_.rows[block % 2].values, head * a_.v_strides[1]};
  }
  void scales(int64_t head) const {
    if (P::kScaled) find_scales(a_, item_, item_.head + head, block_, w_.key_scales, w_.value_scales);
  }

  // Whether rows [first, first + count) of each head see anything of the block; `hide` and `limit` then say what.
  struct Sight {
    bool any, all;
    int64_t limit;
  };
  Sight sight(int64_t first, int64_t count) const {
    const int64_t begin = block_ * kKvBlock, own_first = item_.position + first / rows_.group,
                  own_last = item_.position + (first + count - 1) / rows_.group;
    Sight s;
    s.any = begin <= own_last && !(a_.window && begin + kKvBlock <= own_first - a_.window + 1);
    s.all = begin + kKvBlock - 1 <= own_first && (!a_.window || begin > own_last - a_.window);
    s.limit = smaller(kKvBlock, round_up(own_last - begin + 1, kLimitStep));
    return s;
  }

  Tile<P> tile(int64_t head, int64_t first, int64_t place, int64_t limit) const {
    float* factors = w_.factors + place * 2 * VL;
    return {head * rows_.stride + first, limit,
            w_.probabilities + place * kTileQueries * P::kParts * (kKvBlock / P::kPer), factors, factors + VL};
  }

  // One tile a head. Memory is read in the order of its addresses as far as a block allows, one head's keys or values
  // ahead: the keys of all heads of a page follow each other.
  void single_tiles() {
    const Sight seen = sight(0, rows_.count);
    if (!seen.any) return;
    const int count = static_cast<int>(rows_.count);
    const Hide<P> hide{a_, w_, rows_.group, 0, item_.position, block_, seen.all};
    for (int64_t h = 0; h < item_.heads; h++) {
      w_.keys_of = keys(block_, h);
      w_.ahead = h + 1 < item_.heads ? keys(block_, h + 1) : values(block_, 0);
      scales(h);
      tile_scores_of<P>(count, w_, tile(h, 0, h, seen.limit), false, scale_, hide);
    }
    for (int64_t h = 0; h < item_.heads; h++) {
      w_.values_of = values(block_, h);
      w_.ahead = h + 1 < item_.heads ? values(block_, h + 1) : keys(block_ + 1, 0);
      tile_values_of<P>(count, w_, tile(h, 0, h, seen.limit), false);
    }
  }

  // Many tiles of a head share what is packed once.
  void packed_tiles(int64_t head) {
    w_.keys_of = keys(block_, head), w_.ahead = keys(block_ + 1, head);
    pack_keys(w_);
    w_.values_of = values(block_, head), w_.ahead = values(block_ + 1, head);
    pack_values(w_);
    scales(head);
    for (int64_t first = 0; first < rows_.count; first += kTileQueries) {
      const int64_t count = smaller<int64_t>(kTileQueries, rows_.count - first);
      const Sight seen = sight(first, count);
      if (!seen.any) continue;
      const Hide<P> hide{a_, w_, rows_.group, first, item_.position, block_, seen.all};
      const Tile<P> t = tile(head, first, 0, seen.limit);
      tile_scores_of<P>(static_cast<int>(count), w_, t, true, scale_, hide);
      tile_values_of<P>(static_cast<int>(count), w_, t, true);
    }
  }
};

float power(float x) {
  float lanes[VL];
  store(lanes, exp2_to_0(set1(x)));
  return lanes[0];
}

// total += part, both sums of probabilities relative to their own maximum.
void merge(float* total, float& total_most, float& total_weight, const float* part, float most, float weight,
           int64_t width) {
  const float now = larger(total_most, most), keep = power(total_most - now), take = power(most - now);
  for (int64_t d = 0; d < width; d += VL)
    store(total + d, add(mul(load(total + d), set1(keep)), mul(load(part + d), set1(take))));
  total_weight = total_weight * keep + weight * take;
  total_most = now;
}

// Divides by the weight and writes the elements in their order.
template <class P>
void finish(const float* total, float weight, int64_t dim, float* out) {
  const vf by = set1(weight);
  for (int64_t d = 0; d < dim; d += P::kOrder * VL) {
    vf v[P::kOrder];
    EF_UNROLL
    for (int i = 0; i < P::kOrder; i++)
      v[i] = add(div(load(total + d + i * VL), by), zero());  // 0 for -0, the one thing a skipped block could change
    P::in_order(v);
    for (int i = 0; i < P::kOrder && d + i * VL < dim; i++)
      store_part(out + d + i * VL, v[i], dim - d - i * VL);
  }
}

template <class P>
void clear(Work<P>& w, float* out, float* most, float* weight, int64_t rows) {
  std::memset(out, 0, static_cast<size_t>(rows * w.padded) * sizeof(float));
  for (int64_t i = 0; i < rows; i++) most[i] = kNothing, weight[i] = 0.f;
}

template <class P>
void swap_sums(Work<P>& w) {
  float *out = w.out, *most = w.most, *weight = w.weight;
  w.out = w.total, w.most = w.total_most, w.weight = w.total_weight;
  w.total = out, w.total_most = most, w.total_weight = weight;
}

// Writes an item's sums: to the output, or as a segment's share of it.
template <class P>
void put_sums(const Attention& a, const Item& item, const Work<P>& w) {
  const QueryRows rows(a, item);
  for (int64_t h = 0; h < item.heads; h++) {
    int64_t at = item.token * a.heads + (item.head + h) * rows.group;
    for (int64_t i = h * rows.stride, g = 0; i < h * rows.stride + rows.count; i++, at++) {
      if (g++ == rows.group) g = 1, at += a.heads - rows.group;
      if (!item.partial) {
        finish<P>(w.total + i * w.padded, w.total_weight[i], a.dim, a.out + at * a.dim);
        continue;
      }
      float* to = a.partial + (at * a.split + item.segment_begin) * partial_stride(a.dim);
      to[0] = w.total_most[i];
      to[1] = w.total_weight[i];
      std::memcpy(to + 16, w.total + i * w.padded, static_cast<size_t>(w.padded) * sizeof(float));
    }
  }
}

template <class P>
void run_item(const Attention& a, const Item& item, Work<P>& w) {
  const QueryRows query_rows(a, item);
  const int64_t rows = item.heads * query_rows.stride;
  const int64_t last = item.position + item.tokens - 1;
  const int64_t from = a.window ? larger<int64_t>(0, item.position - a.window + 1) : 0;
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(a.dim));
  constexpr int64_t blocks = kSegment / kKvBlock;
  pack_queries(a, item, w);
  w.found = larger(item.segment_begin * blocks, from / kKvBlock) - 1;
  clear(w, w.out, w.most, w.weight, rows);
  bool first = true;
  for (int64_t segment = larger(item.segment_begin, from / kSegment);
       segment < smaller(item.segment_end, last / kSegment + 1); segment++, first = false) {
    if (!first) clear(w, w.out, w.most, w.weight, rows);
    for (int64_t b = larger(segment * blocks, from / kKvBlock);
         b < smaller((segment + 1) * blocks, last / kKvBlock + 1); b++)
      Visit<P>(a, item, b, scale, w).run();
    if (first) {  // nothing to merge it with: it is the total so far
      swap_sums(w);
      continue;
    }
    for (int64_t i = 0; i < rows; i++)
      merge(w.total + i * w.padded, w.total_most[i], w.total_weight[i], w.out + i * w.padded, w.most[i], w.weight[i],
            w.padded);
  }
  if (first) swap_sums(w);
  put_sums(a, item, w);
}

// Items are numbered row by row, in a row by chunk and then by heads; long ones last, so the count runs backwards.
Item find_item(const Attention& a, int64_t number) {
  int64_t low = 0, high = a.rows - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.item_starts[middle] <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t start = a.query_starts[low], count = a.query_starts[low + 1] - start;
  const int64_t heads = item_heads(a, count), groups = a.kv_heads / heads;
  const int64_t within = number - a.item_starts[low], first = within / groups * a.chunk;
  Item item;
  item.row = low;
  item.head = within % groups * heads;
  item.heads = heads;
  item.token = start + first;
  item.tokens = smaller(a.chunk, count - first);
  item.position = a.kv_lens[low] - count + first;
  return item;
}

template <class P>
void merge_partials(const Attention& a, int64_t at, float* total) {
  const int64_t width = round_up(a.dim, P::kOrder * VL), stride = partial_stride(a.dim);
  float most = kNothing, weight = 0.f;
  std::memset(total, 0, static_cast<size_t>(width) * sizeof(float));
  for (int64_t s = 0; s < a.split; s++) {
    const float* part = a.partial + (at * a.split + s) * stride;
    merge(total, most, weight, part + 16, part[0], part[1], width);
  }
  finish<P>(total, weight, a.dim, a.out + at * a.dim);
}

template <class P>
void all_items(const Attention& a, Worker& worker) {
  Work<P> w = lay_out<P>(a, worker);
  const int64_t chunks = a.item_starts[a.rows], items = a.split ? chunks * a.split : chunks;
  int64_t number;
  while (worker.next(items, &number)) {
    number = items - 1 - number;
    Item item = find_item(a, a.split ? number / a.split : number);
    item.partial = a.split > 0;
    item.segment_begin = a.split ? number % a.split : 0;
    item.segment_end = a.split ? item.segment_begin + 1 : INT64_MAX;
    run_item(a, item, w);
  }
  worker.end_phase(items);
  if (!a.split) return;
  int64_t at;
  while (worker.next(a.tokens * a.heads, &at)) merge_partials<P>(a, at, w.total);
  worker.end_phase(a.tokens * a.heads);
}

}  // namespace

void attention(const Attention& a, Worker& worker) {
#if EIGHTFOLD_LEVEL >= 3
  if (a.kv_dtype == Dtype::bf16 && a.bf16_products) return all_items<PairProducts>(a, worker);
  if (a.kv_dtype == Dtype::i8 && a.bf16_products && a.dim <= QuadProducts::kMostElements)
    return all_items<QuadProducts>(a, worker);
#endif
  switch (a.kv_dtype) {
    case Dtype::f32:
      return all_items<FloatProducts<float>>(a, worker);
    case Dtype::bf16:
      return all_items<FloatProducts<bf16>>(a, worker);
    case Dtype::f16:
      return all_items<FloatProducts<f16>>(a, worker);
    case Dtype::i8:
      return all_items<FloatProducts<int8_t>>(a, worker);
  }
}

}  // namespace eightfold::EIGHTFOLD_ISA
