// What the bindings ask of a kernel variant: plain arguments, and one table of functions for each instruction set.
// Every function is an SPMD job: each thread of the pool calls it with the same arguments and its own Worker.
#pragma once

#include "core/pool.h"
#include "core/types.h"

namespace eightfold {

constexpr int64_t kSegment = 1024;   // attention: positions summed in one go; merged at multiples of this only
constexpr int64_t kKvBlock = 64;     // attention: positions of one softmax step
constexpr int64_t kFewRows = 8;      // attention: query rows up to which a tile's heads may be one item
constexpr int64_t kQueryRows = 256;  // attention: query rows (tokens × heads of a group) that share a packed block

struct RmsNorm {              // x, residual [tokens, width] → out = norm(x + residual) · weight, total = x + residual
  const float *x, *residual;  // residual may be null; then total is not written
  const void* weight;
  Dtype weight_dtype;
  float *out, *total;
  int64_t tokens, width, x_stride, residual_stride;
  float eps;
};

struct RopeWrite {
  const float* qkv;
  int64_t qkv_stride;
  const float *cos, *sin;  // [positions, dim / 2]
  const int32_t* positions;
  const int64_t* slots;
  float* q;  // [tokens, heads, dim]
  void *k, *v;
  Dtype kv_dtype;
  int64_t tokens, heads, kv_heads, dim, page_size;
  int64_t k_strides[3], v_strides[3];  // of page, head, position; in elements
  float *k_scale, *v_scale;            // int8 only: [pages, kv_heads, page_size]
  bool interleaved;
};

struct Attention {
  const float* q;  // [tokens, heads, dim]
  float* out;      // [tokens, heads · dim]
  const void *k, *v;
  Dtype kv_dtype;
  const int32_t *query_starts, *kv_lens, *page_table;
  int64_t tokens, rows, table_stride, heads, kv_heads, dim, page_size;
  int64_t k_strides[3], v_strides[3];
  const float *k_scale, *v_scale;  // int8 only: [pages, kv_heads, page_size]
  int64_t window;      // 0: no limit
  bool bf16_products;  // the compute dtype is bf16: q and the probabilities may be rounded to it
  // The plan, made once by the caller:
  const int64_t* item_starts;  // [rows + 1] first item of each row; an item is a chunk of its tokens for some KV heads
  int64_t chunk;               // tokens of an item
  int64_t together;            // KV heads of an item where few query rows see them, else it is one; divides kv_heads
  int64_t split;               // segments of the longest row if they are items of their own, else 0
  float* partial;              // split: [tokens, heads, split, partial_stride(dim)]
};

// KV heads of an item in a row of `count` tokens.
inline int64_t item_heads(const Attention& a, int64_t count) {
  return count * (a.heads / a.kv_heads) <= kFewRows ? a.together : 1;
}

// Decides on `chunk`, `together` and `split`. Heads of a page that are read one after the other are read fastest; but every
// thread should have work all the time. The bits stay: segments are merged alike.
void plan_attention(Attention& a, int threads);

// Floats of a segment's result: maximum, weight, and from the 16th on the elements in whole groups of vectors.
constexpr int64_t partial_stride(int64_t dim) { return 16 + round_up(dim, 64); }

struct Route {
  const float* x;
  const void* gate;
  Dtype gate_dtype;
  int32_t* ids;
  float* weights;
  int64_t tokens, width, x_stride, gate_stride;
  int experts, chosen;
};

// Activations as a matrix product reads them: fp32, bf16, or int8 with scales; "rounded": to bf16 before;
// "shuffled": in the order in which int4 weights are looked up.
enum class Input : int32_t {
  f32 = 0,
  f32_rounded = 1,
  bf16 = 2,
  i8 = 3,
  i8_rounded = 4,
  bf16_shuffled = 5,
  f32_shuffled = 6,
  f32_rounded_shuffled = 7,
};
constexpr int kInputs = 8;
constexpr int64_t kShuffledBlock = 128;  // inputs whose order is changed among themselves; rows are whole blocks

struct Prepared {
  char* data = nullptr;  // rows `stride` bytes apart, zero beyond the width
  int64_t stride = 0;
  float* scale = nullptr;  // i8: one a row
  int32_t* sum = nullptr;  // i8: 128 × the sum of a row
  const float* absmax = nullptr;  // i8: of each row as all ranks see it, where they share its columns; else null
};

constexpr int kMostMatrices = 8;

struct Linear {
  const float* x;
  int64_t x_stride, tokens;
  float* out;
  int64_t out_stride;
  int count;
  Matrix weights[kMostMatrices];
  Input input[kMostMatrices];
  Prepared prepared[kInputs];  // by Input; data null where no matrix needs it
  int32_t* sums;               // not null: the integer sums of the one matrix go here, [tokens, rows], and none to out
};

// Ranks that share the columns of an int8 product agree on the absmax of its rows and add up its integer sums.

struct RowAbsmax {  // the largest magnitude of each row; NaN where it holds an infinity or a NaN
  const float* x;
  int64_t x_stride, tokens, width;
  Input input;
  float* absmax;
};

struct ScaleSums {
  const int32_t* sums;  // [tokens, rows of w]
  const float* absmax;  // of all ranks
  const Matrix* w;
  int64_t tokens;
  float* out;
};

struct ExpertWeights {
  Matrix w1, w2, w3;
  Input input1, input2, input3;
};

// Slots are (token, choice) pairs sorted by expert. A group is a run of slots that are computed together, so that the
// intermediate values of a long prefill need not all exist at once.
struct MoeSegment {
  const ExpertWeights* expert;
  int64_t first, count;  // slots
};

struct Moe {
  const float* x;
  int64_t x_stride, tokens, width, inner;
  const float* weights;  // [tokens, chosen]
  int chosen;
  float* out;                 // [tokens, width]
  const int32_t* slot_token;  // [slots] the token of each slot in sorted order
  const int32_t* slot_of;     // [tokens · chosen] where a pair went
  const MoeSegment* segments;
  const int64_t* group_starts;  // [groups + 1] into segments
  int64_t groups, slots;
  Prepared prepared[kInputs];  // x by slot
  Prepared inner_prepared[kInputs];
  float* h;      // [slots of the largest group, inner]
  float* parts;  // [slots, width]
};

// What happens between two exchanges with other ranks.
enum class MoeStage { prepare, up, down, scale, combine };

struct MoeStep {
  Moe moe;
  MoeStage stage;
  int64_t group;  // of `up`, `down` and `scale`
  float* absmax;  // [slots of the group]; `up` writes it, then the ranks agree on it
  int32_t* sums;  // [slots of the group, width]; `down` writes it, then the ranks add theirs up
};

constexpr int64_t kRoundBlock = 512;  // elements of a row that are widened at a time

// Float rows of `cols` elements to int8 and a scale each.
struct RoundRows {
  const void* data;
  Dtype dtype;  // not i8
  int64_t rows, cols, stride;
  int8_t* out;    // [rows, cols]
  float* scales;  // [rows]
};

struct ProbeJob {
  int which;
  int64_t iterations;
  const char* data;
  int64_t bytes;
  int64_t* sink;
};

struct Kernels {
  const char* name;
  bool bf16_dot;      // has a kernel for Input::bf16
  int64_t int4_line;  // the shortest group for Input::f32_shuffled; 0 where there is no kernel for it
  int64_t i8_bytes;   // bytes of a quantized activation: 1, or 2 where products need int16
  void (*rms_norm)(const RmsNorm&, Worker&);
  void (*rope_write)(const RopeWrite&, Worker&);
  void (*attention)(const Attention&, Worker&);
  void (*route)(const Route&, Worker&);
  void (*linear)(const Linear&, Worker&);
  void (*moe)(const Moe&, Worker&);
  void (*moe_step)(const MoeStep&, Worker&);
  void (*row_absmax)(const RowAbsmax&, Worker&);
  void (*scale_sums)(const ScaleSums&, Worker&);
  // Operations per iteration of a loop over registers (0: int8, 1: bf16, 2: fp32), and that loop; 3: reading memory.
  double (*probe_operations)(int which);
  void (*probe)(const ProbeJob&, Worker&);
  int64_t (*round_rows)(const RoundRows&);  // the first row that is not finite, or -1; on the calling thread
};

template <class Args>
void run(Pool& pool, void (*function)(const Args&, Worker&), const Args& args, Pool::Crowd crowd) {
  struct Call {
    void (*function)(const Args&, Worker&);
    const Args* args;
  } call{function, &args};
  pool.run(
      [](const void* p, Worker& worker) {
        const Call* c = static_cast<const Call*>(p);
        c->function(*c->args, worker);
      },
      &call, crowd);
}

template <class Args>
void run(Pool& pool, void (*function)(const Args&, Worker&), const Args& args, bool alone = false) {
  run(pool, function, args, alone ? Pool::Crowd::kAlone : Pool::Crowd::kWhoComes);
}

// Bytes between rows of prepared activations of `width`. The extra line keeps rows from falling on the same cache sets.
int64_t prepared_stride(Input input, int64_t width, int64_t i8_bytes);

// The variants in this build, best last, and whether this processor can run them.
struct Variant {
  const Kernels* kernels;
  bool usable;
};
const Variant* variants(int* count);

}  // namespace eightfold
