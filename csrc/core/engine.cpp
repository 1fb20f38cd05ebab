#include "core/engine.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>

namespace eightfold {
namespace {

// Jobs below about this many elementary steps are done sooner than other threads would wake.
constexpr int64_t kSmall = 1 << 15;
constexpr int64_t kSegmentSlots = kSharedRows;  // of a moe, (token, expert) pairs of an expert that go together
constexpr int64_t kGroupBytes = 15 << 20;       // of inner values that exist at once

// Sizes of several arrays in one piece of memory.
struct Layout {
  int64_t bytes = 0;
  int64_t add(int64_t size) {
    const int64_t at = bytes;
    bytes += round_up(size, 64);
    return at;
  }
};

struct PreparedPlace {
  int64_t data = -1, scale = 0, sum = 0, stride = 0;
};

PreparedPlace place(Layout& layout, Input input, int64_t rows, int64_t width, int64_t i8_bytes) {
  PreparedPlace p;
  p.stride = prepared_stride(input, width, i8_bytes);
  p.data = layout.add(rows * p.stride);
  p.scale = layout.add(rows * 4);
  p.sum = layout.add(rows * 4);
  return p;
}

Prepared at(const PreparedPlace& p, char* memory) {
  if (p.data < 0) return {};
  return {memory + p.data, p.stride, reinterpret_cast<float*>(memory + p.scale),
          reinterpret_cast<int32_t*>(memory + p.sum)};
}

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

}  // namespace

const Kernels* find_variant(const std::string& isa) {
  int count;
  const Variant* all = variants(&count);
  for (int i = count - 1; i >= 0; i--)
    if ((isa.empty() && all[i].usable) || isa == all[i].kernels->name) {
      require(all[i].usable, ("this processor cannot run the kernels for " + isa).c_str());
      return all[i].kernels;
    }
  throw std::invalid_argument("this build has no kernels for " + isa);
}

Engine::Engine(int threads, const std::string& isa)
    : kernels_(find_variant(isa)), pool_(threads > 0 ? threads : usable_cpus()) {}

Input Engine::input_for(const Matrix& w, bool rounded) const {
  if (w.dtype == Dtype::i8 && !w.float_input) return rounded ? Input::i8_rounded : Input::i8;
  if (w.groups.size) {
    if (rounded && kernels_->bf16_dot) return Input::bf16_shuffled;
    const bool single = w.groups.size == w.cols, whole = kernels_->int4_line && w.groups.size % kernels_->int4_line == 0;
    if (single ? kernels_->int4_line : whole) return rounded ? Input::f32_rounded_shuffled : Input::f32_shuffled;
  }
  if (!rounded) return Input::f32;
  if (w.groups.size) return Input::f32_rounded;
  const bool exact_in_bf16 = w.dtype == Dtype::bf16 || w.dtype == Dtype::i8;
  return exact_in_bf16 && kernels_->bf16_dot ? Input::bf16 : Input::f32_rounded;
}

void Engine::rms_norm(const RmsNorm& args) {
  std::lock_guard<std::mutex> lock(pool_.mutex());
  eightfold::run(pool_, kernels_->rms_norm, args, args.tokens * args.width < kSmall);
}

void Engine::rope_write(const RopeWrite& args, int64_t table_rows, int64_t pages) {
  for (int64_t t = 0; t < args.tokens; t++) {
    require(args.positions[t] >= 0 && args.positions[t] < table_rows, "a position is outside the rotation table");
    require(args.slots[t] >= 0 && args.slots[t] / args.page_size < pages, "a slot is outside the pages");
  }
  std::lock_guard<std::mutex> lock(pool_.mutex());
  eightfold::run(pool_, kernels_->rope_write, args, args.tokens * (args.heads + 2 * args.kv_heads) * args.dim < kSmall);
}

void Engine::attention(Attention args, int64_t pages) {
  int64_t work = 0;
  require(args.rows == 0 || (args.query_starts[0] == 0 && args.query_starts[args.rows] == args.tokens),
          "query_starts does not cover the tokens");
  for (int64_t r = 0; r < args.rows; r++) {
    const int64_t count = args.query_starts[r + 1] - args.query_starts[r], length = args.kv_lens[r];
    require(count >= 0 && count <= length, "a row has more tokens than positions");
    const int64_t needed = (length + args.page_size - 1) / args.page_size;
    require(needed <= args.table_stride, "the page table is too narrow for a row");
    for (int64_t p = 0; p < needed; p++) {
      const int32_t page = args.page_table[r * args.table_stride + p];
      require(page >= 0 && page < pages, "the page table names a page that does not exist");
    }
    work += count * length * args.heads;
  }
  plan_attention(args, pool_.threads());
  std::vector<int64_t> starts(args.rows + 1, 0);
  for (int64_t r = 0; r < args.rows; r++) {
    const int64_t count = args.query_starts[r + 1] - args.query_starts[r];
    starts[r + 1] = starts[r] + (count + args.chunk - 1) / args.chunk * (args.kv_heads / item_heads(args, count));
  }
  args.item_starts = starts.data();
  std::lock_guard<std::mutex> lock(pool_.mutex());
  if (args.split) {
    const int64_t floats = args.tokens * args.heads * args.split * partial_stride(args.dim);
    args.partial = reinterpret_cast<float*>(pool_.shared(0, floats * 4));
  }
  eightfold::run(pool_, kernels_->attention, args, work * args.dim < 4 * kSmall);
}

void Engine::route(const Route& args) {
  std::lock_guard<std::mutex> lock(pool_.mutex());
  eightfold::run(pool_, kernels_->route, args, args.tokens * args.width * args.experts < 4 * kSmall);
}

LinearWeights::LinearWeights(Engine& engine, std::vector<Matrix> weights, bool rounded) : engine_(engine) {
  require(!weights.empty() && weights.size() <= kMostMatrices, "a linear takes from one to eight matrices");
  plan_.count = static_cast<int>(weights.size());
  for (int i = 0; i < plan_.count; i++) {
    require(weights[i].cols == weights[0].cols, "matrices side by side need the same width");
    plan_.weights[i] = weights[i];
    plan_.input[i] = engine.input_for(weights[i], rounded);
    rows_ += weights[i].rows;
  }
}

void LinearWeights::run(const float* x, int64_t x_stride, int64_t tokens, float* out) {
  if (tokens == 0) return;
  Linear args = plan_;
  args.x = x;
  args.x_stride = x_stride;
  args.tokens = tokens;
  args.out = out;
  args.out_stride = rows_;
  std::lock_guard<std::mutex> lock(engine_.pool().mutex());
  run_block(args, nullptr);
}

void LinearWeights::run_shared(const float* x, int64_t x_stride, int64_t tokens, float* out, const Exchange& exchange) {
  const Matrix& w = plan_.weights[0];
  const Input input = plan_.input[0];
  require(plan_.count == 1 && (input == Input::i8 || input == Input::i8_rounded),
          "ranks add up integer sums of one int8 matrix");
  const Kernels& kernels = engine_.kernels();
  Pool& pool = engine_.pool();
  std::lock_guard<std::mutex> lock(pool.mutex());
  for (int64_t first = 0; first < tokens; first += kSharedRows) {
    Linear args = plan_;
    args.x = x + first * x_stride;
    args.x_stride = x_stride;
    args.tokens = std::min(kSharedRows, tokens - first);
    args.sums = exchange.sums;
    const RowAbsmax rows{args.x, x_stride, args.tokens, w.cols, input, exchange.absmax};
    eightfold::run(pool, kernels.row_absmax, rows, args.tokens * w.cols < kSmall);
    const float* absmax = exchange.of_all<float>(Exchange::kAbsmax, args.tokens);
    run_block(args, absmax);
    const int32_t* sums = exchange.of_all<int32_t>(Exchange::kSums, args.tokens);
    const ScaleSums scale{sums, absmax, &w, args.tokens, out + first * rows_};
    eightfold::run(pool, kernels.scale_sums, scale, args.tokens * rows_ < kSmall);
  }
}

void LinearWeights::run_block(Linear args, const float* absmax) {
  const int64_t tokens = args.tokens;
  const int64_t width = args.weights[0].cols;
  Layout layout;
  PreparedPlace places[kInputs];
  for (int i = 0; i < args.count; i++) {
    PreparedPlace& p = places[static_cast<int>(args.input[i])];
    if (p.data < 0) p = place(layout, args.input[i], tokens, width, engine_.kernels().i8_bytes);
  }
  Pool& pool = engine_.pool();
  char* memory = pool.shared(0, layout.bytes);
  for (int i = 0; i < kInputs; i++) {
    args.prepared[i] = at(places[i], memory);
    args.prepared[i].absmax = absmax;
  }
  eightfold::run(pool, engine_.kernels().linear, args, tokens * width * rows_ < 4 * kSmall);
}

ExpertSet::ExpertSet(Engine& engine, const std::vector<std::vector<Matrix>>& experts, bool rounded, int64_t first,
                     int64_t total)
    : engine_(engine), first_(first), total_(total) {
  require(!experts.empty(), "there are no experts");
  require(first >= 0 && first + static_cast<int64_t>(experts.size()) <= total, "experts are outside the layer");
  for (const auto& e : experts) {
    require(e.size() == 3, "an expert is three matrices");
    const ExpertWeights w{e[0],
                          e[1],
                          e[2],
                          engine.input_for(e[0], rounded),
                          engine.input_for(e[1], rounded),
                          engine.input_for(e[2], rounded)};
    experts_.push_back(w);
    width_ = experts_[0].w1.cols;
    inner_ = experts_[0].w1.rows;
    require(w.w1.rows == inner_ && w.w3.rows == inner_ && w.w2.cols == inner_ && w.w1.cols == width_ &&
                w.w3.cols == width_ && w.w2.rows == width_,
            "experts of one layer need the same shapes");
    used_[static_cast<int>(w.input1)] = used_[static_cast<int>(w.input3)] = true;
    inner_used_[static_cast<int>(w.input2)] = true;
  }
}

void ExpertSet::run(const float* x, int64_t x_stride, int64_t tokens, const int32_t* ids, const float* weights,
                    int chosen, float* out, const Exchange* exchange) {
  for (int64_t i = 0; i < tokens * chosen; i++)
    require(ids[i] >= 0 && ids[i] < total_, "an expert's number is outside the layer");
  std::lock_guard<std::mutex> lock(engine_.pool().mutex());
  for (int64_t first = 0; first < tokens; first += kMoeTokens) {
    Moe args{};
    args.x = x + first * x_stride;
    args.x_stride = x_stride;
    args.tokens = std::min(kMoeTokens, tokens - first);
    args.width = width_;
    args.inner = inner_;
    args.weights = weights + first * chosen;
    args.chosen = chosen;
    args.out = out + first * width_;
    args.slots = args.tokens * chosen;
    run_block(args, ids + first * chosen, exchange);
  }
}

void ExpertSet::run_block(Moe args, const int32_t* ids, const Exchange* exchange) {
  // Slots sorted by expert, in the order of the tokens within each; those of our experts follow one another.
  const int64_t all_slots = args.slots;
  std::vector<int64_t> starts(total_ + 1, 0);
  for (int64_t i = 0; i < args.slots; i++) starts[ids[i] + 1]++;
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  std::vector<int32_t> slot_token(args.slots), slot_of(args.slots);
  for (int64_t i = 0; i < args.slots; i++) {
    const int64_t slot = next[ids[i]]++;
    slot_of[i] = static_cast<int32_t>(slot);
    slot_token[slot] = static_cast<int32_t>(i / args.chosen);
  }
  const int64_t count = static_cast<int64_t>(experts_.size()), ours = starts[first_], end = starts[first_ + count];
  args.slots = end - ours;
  std::vector<MoeSegment> segments;
  std::vector<int64_t> groups{0};
  const int64_t fit = kGroupBytes / (args.inner * 4) / kSegmentSlots * kSegmentSlots;
  const int64_t group_slots = exchange ? kSharedRows : std::max(kSegmentSlots, fit);
  int64_t in_group = 0, most = 0;
  for (int64_t e = 0; e < count; e++)
    for (int64_t first = starts[first_ + e]; first < starts[first_ + e + 1]; first += kSegmentSlots) {
      const int64_t slots = std::min(kSegmentSlots, starts[first_ + e + 1] - first);
      if (in_group + slots > group_slots) {
        groups.push_back(static_cast<int64_t>(segments.size()));
        in_group = 0;
      }
      segments.push_back({&experts_[e], first - ours, slots});
      in_group += slots;
      most = std::max(most, in_group);
    }
  if (!segments.empty()) groups.push_back(static_cast<int64_t>(segments.size()));

  Layout layout;
  PreparedPlace outer[kInputs], inner[kInputs];
  const int64_t i8_bytes = engine_.kernels().i8_bytes;
  for (int i = 0; i < kInputs; i++) {
    if (used_[i]) outer[i] = place(layout, static_cast<Input>(i), args.slots, args.width, i8_bytes);
    if (inner_used_[i]) inner[i] = place(layout, static_cast<Input>(i), most, args.inner, i8_bytes);
  }
  const bool all_parts = exchange && exchange->parts;
  const int64_t h = layout.add(most * args.inner * 4);
  const int64_t parts = layout.add(all_parts ? 0 : args.slots * args.width * 4);
  Pool& pool = engine_.pool();
  char* memory = pool.shared(0, layout.bytes);
  for (int i = 0; i < kInputs; i++) {
    args.prepared[i] = at(outer[i], memory);
    args.inner_prepared[i] = at(inner[i], memory);
  }
  args.h = reinterpret_cast<float*>(memory + h);
  args.parts = reinterpret_cast<float*>(memory + parts);
  if (all_parts) {
    std::fill(exchange->parts, exchange->parts + all_slots * args.width, 0.f);
    args.parts = exchange->parts + ours * args.width;
  } else {  // combined without those of other ranks
    for (int32_t& slot : slot_of) slot = slot < ours || slot >= end ? -1 : slot - static_cast<int32_t>(ours);
  }
  args.slot_token = slot_token.data() + ours;
  args.slot_of = slot_of.data();
  args.segments = segments.data();
  args.group_starts = groups.data();
  args.groups = static_cast<int64_t>(groups.size()) - 1;
  if (!exchange) {
    eightfold::run(pool, engine_.kernels().moe, args, args.slots * args.width * args.inner < kSmall);
    return;
  }
  run_steps(args, *exchange);
  MoeStep last{args, MoeStage::combine, 0, nullptr, nullptr};
  if (all_parts) last.moe.parts = exchange->of_all<float>(Exchange::kParts, all_slots);
  eightfold::run(pool, engine_.kernels().moe_step, last, args.tokens * args.width < kSmall);
}

void ExpertSet::run_steps(const Moe& args, const Exchange& exchange) {
  const auto run_stage = [&](const MoeStep& step, int64_t work) {
    eightfold::run(engine_.pool(), engine_.kernels().moe_step, step, work < kSmall);
  };
  MoeStep step{args, MoeStage::prepare, 0, nullptr, nullptr};
  run_stage(step, args.slots * args.width);
  for (step.group = 0; step.group < args.groups; step.group++) {
    const MoeSegment &from = args.segments[args.group_starts[step.group]],
                     &to = args.segments[args.group_starts[step.group + 1] - 1];
    const int64_t slots = to.first + to.count - from.first;
    step.absmax = exchange.absmax;
    step.stage = MoeStage::up;
    run_stage(step, slots * args.width * args.inner);
    step.absmax = exchange.of_all<float>(Exchange::kAbsmax, slots);
    for (Prepared& inner : step.moe.inner_prepared) inner.absmax = step.absmax;
    step.sums = exchange.sums;
    step.stage = MoeStage::down;
    run_stage(step, slots * args.width * args.inner);
    step.sums = exchange.of_all<int32_t>(Exchange::kSums, slots);
    step.stage = MoeStage::scale;
    run_stage(step, slots * args.width);
  }
}

namespace {

double seconds_of(Pool& pool, const Kernels& kernels, const ProbeJob& job) {
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  eightfold::run(pool, kernels.probe, job, Pool::Crowd::kEveryone);
  return std::chrono::duration<double>(clock::now() - start).count();
}

}  // namespace

double probe_operations(int which, int threads, double ms, const std::string& isa) {
  const Kernels& kernels = *find_variant(isa);
  const double each = kernels.probe_operations(which);
  if (each == 0.0) return 0.0;
  Pool pool(threads > 0 ? threads : usable_cpus());
  std::vector<int64_t> sink(pool.threads());
  ProbeJob job{which, 20000, nullptr, 0, sink.data()};
  seconds_of(pool, kernels, job);  // wakes the threads
  double seconds = seconds_of(pool, kernels, job);
  job.iterations = std::max<int64_t>(1000, static_cast<int64_t>(20000 * ms / 1000 / seconds));
  seconds = seconds_of(pool, kernels, job);
  return each * static_cast<double>(job.iterations) * pool.threads() / seconds;
}

double probe_read_bandwidth(int64_t bytes, int threads, const std::string& isa) {
  const Kernels& kernels = *find_variant(isa);
  Pool pool(threads > 0 ? threads : usable_cpus());
  std::vector<int64_t> sink(pool.threads());
  Buffer buffer;
  char* data = buffer.get(bytes);
  std::fill(data, data + bytes, 1);
  const ProbeJob job{3, 0, data, bytes, sink.data()};
  double best = seconds_of(pool, kernels, job);
  for (int i = 0; i < 3; i++) best = std::min(best, seconds_of(pool, kernels, job));
  return static_cast<double>(bytes) / best;
}

}  // namespace eightfold
