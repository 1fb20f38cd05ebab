// `linear` and `moe`: matrix products of all tokens with the weights of a layer.
#include "kernels/gemm.h"

namespace eightfold::EIGHTFOLD_ISA {
namespace {

// Tokens are cut into blocks of about equal size, so that none is left with a few.
struct Blocks {
  explicit Blocks(int64_t rows) : rows(rows), count((rows + kMostRows - 1) / kMostRows) {}
  int64_t start(int64_t block) const { return rows * block / count; }
  int64_t rows, count;
};

int64_t chunks_of(int64_t rows) { return (rows + kMostColumns - 1) / kMostColumns; }

// Quantizing some rows is one item; rows are long, items small.
constexpr int64_t kRowsOfItem = 4;

void prepare_rows(Worker& worker, const float* x, int64_t x_stride, const int32_t* index, int64_t width, int64_t first,
                  int64_t rows, const Prepared* prepared) {
  const int64_t items = (rows + kRowsOfItem - 1) / kRowsOfItem;
  int64_t item;
  while (worker.next(items, &item)) {
    for (int64_t i = item * kRowsOfItem; i < smaller(rows, (item + 1) * kRowsOfItem); i++) {
      const float* from = x + (index ? index[first + i] : i) * x_stride;
      for (int input = 0; input < kInputs; input++)
        if (prepared[input].data) prepare_row(static_cast<Input>(input), from, width, prepared[input], first + i);
    }
  }
  worker.end_phase(items);
}

// h = silu(x · w1ᵀ) · (x · w3ᵀ) for a block of an expert's inner columns
void swiglu_chunk(const Moe& a, const MoeSegment& segment, int64_t chunk, int64_t group_first, char* scratch,
                  Upcoming after) {
  const ExpertWeights& e = *segment.expert;
  const int64_t first = chunk * kMostColumns, count = smaller(kMostColumns, a.inner - first);
  float* gate = reinterpret_cast<float*>(scratch);
  float* up = gate + kScratchSums;
  float* sums = up + kScratchSums;
  const Blocks blocks(segment.count);
  for (int64_t b = 0; b < blocks.count; b++) {
    const int64_t from = segment.first + blocks.start(b), rows = segment.first + blocks.start(b + 1) - from;
    multiply(e.w1, e.input1, a.prepared[static_cast<int>(e.input1)], from, rows, first, count, gate, kMostColumns,
             sums, rows_from(e.w3, first));
    multiply(e.w3, e.input3, a.prepared[static_cast<int>(e.input3)], from, rows, first, count, up, kMostColumns, sums,
             b + 1 < blocks.count ? rows_from(e.w1, first) : after);
    for (int64_t m = 0; m < rows; m++) {
      float* to = a.h + (from - group_first + m) * a.inner + first;
      const float *g = gate + m * kMostColumns, *u = up + m * kMostColumns;
      for (int64_t n = 0; n < count; n += VL) {
        const vf h = mul(silu(load(g + n)), load(u + n));
        if (n + VL <= count) {
          store(to + n, h);
        } else {
          store_n(to + n, h, count - n);
        }
      }
    }
  }
}

void down_chunk(const Moe& a, const MoeSegment& segment, int64_t chunk, int64_t group_first, int32_t* sums,
                char* scratch, Upcoming after) {
  const ExpertWeights& e = *segment.expert;
  const int64_t first = chunk * kMostColumns, count = smaller(kMostColumns, a.width - first);
  const Blocks blocks(segment.count);
  for (int64_t b = 0; b < blocks.count; b++) {
    const int64_t from = segment.first + blocks.start(b), rows = segment.first + blocks.start(b + 1) - from;
    const Prepared& h = a.inner_prepared[static_cast<int>(e.input2)];
    const Upcoming next = b + 1 < blocks.count ? rows_from(e.w2, first) : after;
    if (sums) {
      multiply_integers(e.w2, h, from - group_first, rows, first, count, sums + (from - group_first) * a.width + first,
                        a.width, scratch, next);
    } else {
      multiply(e.w2, e.input2, h, from - group_first, rows, first, count, a.parts + from * a.width + first, a.width,
               scratch, next);
    }
  }
}

// Gates, ups, and what a product needs.
size_t moe_scratch(const Moe& a) {
  return static_cast<size_t>(2 * kScratchSums * static_cast<int64_t>(sizeof(float)) +
                             multiply_scratch(larger(a.width, a.inner)));
}

// The segments [begin, end) of a group and the slots in them.
struct Group {
  Group(const Moe& a, int64_t group)
      : begin(a.group_starts[group]),
        end(a.group_starts[group + 1]),
        first(a.segments[begin].first),
        slots(a.segments[end - 1].first + a.segments[end - 1].count - first) {}
  int64_t begin, end, first, slots;
};

void up(const Moe& a, const Group& group, Worker& worker, char* scratch) {
  const int64_t chunks = chunks_of(a.inner), items = (group.end - group.begin) * chunks;
  int64_t item, next;
  while (worker.next(items, &item)) {
    Upcoming after;
    if (worker.peek(items, &next))
      after = rows_from(a.segments[group.begin + next / chunks].expert->w1, next % chunks * kMostColumns);
    swiglu_chunk(a, a.segments[group.begin + item / chunks], item % chunks, group.first, scratch, after);
  }
  worker.end_phase(items);
}

// To `parts`, or as integers to `sums` where they are given.
void down(const Moe& a, const Group& group, int32_t* sums, Worker& worker, char* scratch) {
  prepare_rows(worker, a.h, a.inner, nullptr, a.inner, 0, group.slots, a.inner_prepared);
  const int64_t chunks = chunks_of(a.width), items = (group.end - group.begin) * chunks;
  int64_t item, next;
  while (worker.next(items, &item)) {
    Upcoming after;
    if (worker.peek(items, &next))
      after = rows_from(a.segments[group.begin + next / chunks].expert->w2, next % chunks * kMostColumns);
    down_chunk(a, a.segments[group.begin + item / chunks], item % chunks, group.first, sums, scratch, after);
  }
  worker.end_phase(items);
}

void absmax_rows(const RowAbsmax& a, Worker& worker) {
  int64_t row;
  while (worker.next(a.tokens, &row)) a.absmax[row] = absmax_of(a.input, a.x + row * a.x_stride, a.width);
  worker.end_phase(a.tokens);
}

// The weighted sum in the order of the token's choices, each product rounded before it is added.
void combine(const Moe& a, int64_t token) {
  float* out = a.out + token * a.width;
  for (int64_t i = 0; i < a.width; i += VL) {
    const int64_t left = smaller<int64_t>(VL, a.width - i);
    vf total = zero();
    for (int c = 0; c < a.chosen; c++) {
      const int32_t slot = a.slot_of[token * a.chosen + c];
      if (slot < 0) continue;  // another rank's
      const float* part = a.parts + slot * a.width + i;
      total = add(total, mul(load_n(part, left), set1(a.weights[token * a.chosen + c])));
    }
    store_n(out + i, total, left);
  }
}

// Which matrix of a linear an item belongs to, its first row there, and its first column of the output.
struct Chunk {
  int which;
  int64_t first, column;
};

Chunk chunk_of(const Linear& a, int64_t item) {
  Chunk chunk{0, 0, 0};
  for (; item >= chunks_of(a.weights[chunk.which].rows); chunk.which++) {
    item -= chunks_of(a.weights[chunk.which].rows);
    chunk.column += a.weights[chunk.which].rows;
  }
  chunk.first = item * kMostColumns;
  chunk.column += chunk.first;
  return chunk;
}

// Where the columns make few items, the tokens are cut too, or threads would wait for the last one.
int64_t parts_of(int64_t chunks, const Blocks& blocks) {
  constexpr int64_t enough = 32;
  return smaller(blocks.count, larger<int64_t>(1, enough / chunks));
}

void combine_tokens(const Moe& a, Worker& worker) {
  int64_t item;
  const int64_t items = (a.tokens + kRowsOfItem - 1) / kRowsOfItem;
  while (worker.next(items, &item))
    for (int64_t t = item * kRowsOfItem; t < smaller(a.tokens, (item + 1) * kRowsOfItem); t++) combine(a, t);
  worker.end_phase(items);
}

void scale_group(const MoeStep& step, const Group& group, Worker& worker) {
  const Moe& a = step.moe;
  int64_t item;
  while (worker.next(group.end - group.begin, &item)) {
    const MoeSegment& segment = a.segments[group.begin + item];
    for (int64_t slot = segment.first; slot < segment.first + segment.count; slot++)
      scale_row(step.sums + (slot - group.first) * a.width, scale_of(step.absmax[slot - group.first]),
                segment.expert->w2.scale, a.width, a.parts + slot * a.width);
  }
  worker.end_phase(group.end - group.begin);
}

}  // namespace

void linear(const Linear& a, Worker& worker) {
  prepare_rows(worker, a.x, a.x_stride, nullptr, a.weights[0].cols, 0, a.tokens, a.prepared);
  char* scratch = worker.scratch(static_cast<size_t>(multiply_scratch(a.weights[0].cols)));
  int64_t items = 0;
  for (int i = 0; i < a.count; i++) items += chunks_of(a.weights[i].rows);
  const Blocks blocks(a.tokens);
  const int64_t parts = parts_of(items, blocks);
  items *= parts;
  int64_t item, next;
  while (worker.next(items, &item)) {
    const Chunk chunk = chunk_of(a, item / parts);
    const int64_t part = item % parts, begin = blocks.count * part / parts, end = blocks.count * (part + 1) / parts;
    Upcoming upcoming;
    if (worker.peek(items, &next)) {
      const Chunk other = chunk_of(a, next / parts);
      upcoming = rows_from(a.weights[other.which], other.first);
    }
    const int which = chunk.which;
    const Matrix& w = a.weights[which];
    const int64_t first = chunk.first, count = smaller(kMostColumns, w.rows - first);
    for (int64_t b = begin; b < end; b++) {
      const int64_t from = blocks.start(b), rows = blocks.start(b + 1) - from;
      const Prepared& x = a.prepared[static_cast<int>(a.input[which])];
      const Upcoming after = b + 1 < end ? rows_from(w, first) : upcoming;
      if (a.sums) {
        multiply_integers(w, x, from, rows, first, count, a.sums + from * w.rows + first, w.rows, scratch, after);
      } else {
        multiply(w, a.input[which], x, from, rows, first, count, a.out + chunk.column + from * a.out_stride,
                 a.out_stride, scratch, after);
      }
    }
  }
  worker.end_phase(items);
}

void moe(const Moe& a, Worker& worker) {
  prepare_rows(worker, a.x, a.x_stride, a.slot_token, a.width, 0, a.slots, a.prepared);
  char* scratch = worker.scratch(moe_scratch(a));
  for (int64_t number = 0; number < a.groups; number++) {
    const Group group(a, number);
    up(a, group, worker, scratch);
    down(a, group, nullptr, worker, scratch);
  }
  combine_tokens(a, worker);
}

void moe_step(const MoeStep& step, Worker& worker) {
  const Moe& a = step.moe;
  char* scratch = worker.scratch(moe_scratch(a));
  switch (step.stage) {
    case MoeStage::prepare:
      return prepare_rows(worker, a.x, a.x_stride, a.slot_token, a.width, 0, a.slots, a.prepared);
    case MoeStage::up: {
      const Group group(a, step.group);
      const Input input = a.segments[group.begin].expert->input2;
      up(a, group, worker, scratch);
      return absmax_rows({a.h, a.inner, group.slots, a.inner, input, step.absmax}, worker);
    }
    case MoeStage::down:
      return down(a, Group(a, step.group), step.sums, worker, scratch);
    case MoeStage::scale:
      return scale_group(step, Group(a, step.group), worker);
    case MoeStage::combine:
      return combine_tokens(a, worker);
  }
}

void row_absmax(const RowAbsmax& a, Worker& worker) { absmax_rows(a, worker); }

void scale_sums(const ScaleSums& a, Worker& worker) {
  const int64_t width = a.w->rows;
  int64_t row;
  while (worker.next(a.tokens, &row))
    scale_row(a.sums + row * width, scale_of(a.absmax[row]), a.w->scale, width, a.out + row * width);
  worker.end_phase(a.tokens);
}

}  // namespace eightfold::EIGHTFOLD_ISA
