// How the work of attention is cut into items.
#include <algorithm>

#include "core/kernels.h"

namespace eightfold {
namespace {

constexpr int64_t kMostPartial = int64_t{8} << 20;  // bytes of results of segments

// What a batch costs: positions times KV heads, once for each tile of query rows.
struct Costs {
  int64_t few = 0, others = 0;          // of rows that few query rows see, and of the others
  int64_t longest = 0, dearest = 0;     // the most positions of the first; the most that an item of the others costs
  int64_t few_rows = 0, other_items = 0;
  int64_t positions = 0;  // of the longest row
};

Costs costs_of(const Attention& a) {
  const int64_t group = a.heads / a.kv_heads;
  Costs c;
  for (int64_t r = 0; r < a.rows; r++) {
    const int64_t count = a.query_starts[r + 1] - a.query_starts[r], length = a.kv_lens[r];
    if (count == 0) continue;
    c.positions = std::max(c.positions, length);
    if (count * group <= kFewRows) {
      c.few_rows++;
      c.few += length * a.kv_heads;
      c.longest = std::max(c.longest, length);
    } else {
      const int64_t chunks = (count + a.chunk - 1) / a.chunk;
      const int64_t item = length * (std::min(count, a.chunk) * group + kFewRows - 1) / kFewRows;
      c.other_items += chunks * a.kv_heads;
      c.others += chunks * a.kv_heads * item;
      c.dearest = std::max(c.dearest, item);
    }
  }
  return c;
}

enum class Fit { no, even, many };  // even: every thread gets as many items, of about the same cost

Fit fit(const Costs& c, int64_t kv_heads, int64_t together, int64_t segments, int64_t threads) {
  const int64_t longest = segments ? std::min(c.longest, kSegment) : c.longest;
  const int64_t most = std::max(longest * together, c.dearest / std::max<int64_t>(1, segments));
  const int64_t items = (c.few_rows * (kv_heads / together) + c.other_items) * std::max<int64_t>(1, segments);
  const int64_t all = c.few + c.others, rounds = (items + threads - 1) / threads;
  if (most * threads * 3 <= all) return Fit::many;
  return most * threads * rounds * 9 <= all * 10 ? Fit::even : Fit::no;
}

}  // namespace

void plan_attention(Attention& a, int threads) {
  a.chunk = std::max<int64_t>(1, kQueryRows / (a.heads / a.kv_heads));
  const Costs c = costs_of(a);
  const int64_t bytes = a.tokens * a.heads * partial_stride(a.dim) * static_cast<int64_t>(sizeof(float));
  int64_t segments = (c.positions + kSegment - 1) / kSegment;
  if (threads == 1 || segments == 1 || segments * bytes > kMostPartial) segments = 0;
  a.split = 0;
  for (a.together = c.few_rows ? a.kv_heads : 1; threads > 1; a.together--) {
    if (a.kv_heads % a.together) continue;
    const Fit whole = fit(c, a.kv_heads, a.together, 0, threads);
    if (whole == Fit::many) return;
    const bool last = a.together == 1;
    if (segments && (last || fit(c, a.kv_heads, a.together, segments, threads) != Fit::no)) {
      a.split = segments;
      return;
    }
    if (last || whole == Fit::even) return;
  }
}

}  // namespace eightfold
