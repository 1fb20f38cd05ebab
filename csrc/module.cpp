// eightfold._native: addresses and sizes in, nothing of torch. Every call releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "core/engine.h"
#include "core/shared.h"

namespace nb = nanobind;
using namespace eightfold;

namespace {

using Address = uintptr_t;
using GroupsTuple = std::tuple<Address, int, int64_t, int64_t>;  // scales of int4: data, dtype, group, stride
using MatrixTuple =  // data, scale, rows, cols, stride, dtype, whether int8 takes float activations, int4's scales
    std::tuple<Address, Address, int64_t, int64_t, int64_t, int, bool, GroupsTuple>;
using Strides = std::tuple<int64_t, int64_t, int64_t>;

template <class T = float>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

Dtype dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code");
  return static_cast<Dtype>(code);
}

std::vector<Matrix> matrices(const std::vector<MatrixTuple>& tuples) {
  std::vector<Matrix> result;
  for (const auto& [data, scale, rows, cols, stride, dtype, float_input, groups] : tuples) {
    const auto& [group_scale, group_dtype, group, group_stride] = groups;
    result.push_back({pointer<const void>(data), pointer<const float>(scale), rows, cols, stride, dtype_of(dtype),
                      float_input, {pointer<const void>(group_scale), dtype_of(group_dtype), group, group_stride}});
  }
  return result;
}

void copy_strides(const Strides& from, int64_t* to) {
  to[0] = std::get<0>(from);
  to[1] = std::get<1>(from);
  to[2] = std::get<2>(from);
}

void rms_norm(Engine& engine, Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address weight,
              int weight_dtype, Address out, Address total, int64_t tokens, int64_t width, float eps) {
  engine.rms_norm({pointer(x), pointer(residual), pointer<void>(weight), dtype_of(weight_dtype), pointer(out),
                   pointer(total), tokens, width, x_stride, residual_stride, eps});
}

void rope_write(Engine& engine, Address qkv, int64_t qkv_stride, Address cos, Address sin, int64_t table_rows,
                Address positions, Address slots, Address q, Address k, Address v, Address k_scale,
                Address v_scale, int kv_dtype, const Strides& k_strides, const Strides& v_strides, int64_t tokens,
                int64_t heads, int64_t kv_heads, int64_t dim, int64_t pages, int64_t page_size, bool interleaved) {
  RopeWrite args{};
  args.qkv = pointer(qkv);
  args.qkv_stride = qkv_stride;
  args.cos = pointer(cos);
  args.sin = pointer(sin);
  args.positions = pointer<int32_t>(positions);
  args.slots = pointer<int64_t>(slots);
  args.q = pointer(q);
  args.k = pointer<void>(k);
  args.v = pointer<void>(v);
  args.k_scale = pointer(k_scale);
  args.v_scale = pointer(v_scale);
  args.kv_dtype = dtype_of(kv_dtype);
  args.tokens = tokens;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.dim = dim;
  args.page_size = page_size;
  copy_strides(k_strides, args.k_strides);
  copy_strides(v_strides, args.v_strides);
  args.interleaved = interleaved;
  engine.rope_write(args, table_rows, pages);
}

void attention(Engine& engine, Address q, Address out, Address k, Address v, Address k_scale, Address v_scale,
               int kv_dtype, const Strides& k_strides, const Strides& v_strides, Address query_starts,
               Address kv_lens, Address page_table, int64_t table_stride, int64_t tokens, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
               int64_t pages, int64_t page_size, int64_t window, bool bf16_products) {
  Attention args{};
  args.q = pointer(q);
  args.out = pointer(out);
  args.k = pointer<void>(k);
  args.v = pointer<void>(v);
  args.k_scale = pointer(k_scale);
  args.v_scale = pointer(v_scale);
  args.kv_dtype = dtype_of(kv_dtype);
  copy_strides(k_strides, args.k_strides);
  copy_strides(v_strides, args.v_strides);
  args.query_starts = pointer<int32_t>(query_starts);
  args.kv_lens = pointer<int32_t>(kv_lens);
  args.page_table = pointer<int32_t>(page_table);
  args.table_stride = table_stride;
  args.tokens = tokens;
  args.rows = rows;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.dim = dim;
  args.page_size = page_size;
  args.window = window;
  args.bf16_products = bf16_products;
  engine.attention(args, pages);
}

void route(Engine& engine, Address x, int64_t x_stride, Address gate, int gate_dtype, int64_t gate_stride, Address ids,
           Address weights, int64_t tokens, int64_t width, int experts, int chosen) {
  engine.route({pointer(x), pointer<void>(gate), dtype_of(gate_dtype), pointer<int32_t>(ids), pointer(weights), tokens,
                width, x_stride, gate_stride, experts, chosen});
}

// absmax, sums, parts, what makes them one
using ExchangeTuple = std::tuple<Address, Address, Address, std::function<Address(int, int64_t)>>;

Exchange exchange_of(const ExchangeTuple& tuple) {
  const auto& [absmax, sums, parts, agree] = tuple;
  return {pointer(absmax), pointer<int32_t>(sums), pointer(parts), agree};
}

int64_t round_rows(Address data, int dtype, int64_t rows, int64_t cols, int64_t stride, Address out, Address scales,
                   const std::string& isa) {
  const Dtype kind = dtype_of(dtype);
  if (kind == Dtype::i8) throw std::invalid_argument("rows to round are floats");
  return find_variant(isa)->round_rows(
      {pointer<const void>(data), kind, rows, cols, stride, pointer<int8_t>(out), pointer(scales)});
}

std::vector<std::string> names(bool only_usable) {
  int count;
  const Variant* all = variants(&count);
  std::vector<std::string> result;
  for (int i = 0; i < count; i++)
    if (!only_usable || all[i].usable) result.push_back(all[i].kernels->name);
  return result;
}

// Ranks of one machine. What waits for another rank throws RankLost when that one is gone.
void bind_shared(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  nb::exception<RankLost>(m, "RankLost");
  nb::class_<Segment>(m, "Segment", "The ranks of this machine, in a shared mapping.")
      .def(nb::init<int, int, int, double, int, bool>())
      .def_static("region_start", &Segment::region_start)
      .def("seated", &Segment::seated)
      .def("fail", &Segment::fail)
      .def("end", &Segment::end)
      .def("ended", &Segment::ended)
      .def("begin_step", &Segment::begin_step)
      .def("end_step", &Segment::end_step)
      .def("advance", &Segment::advance)
      .def("still", &Segment::still)
      .def("failure", &Segment::failure);
  nb::class_<SharedGroup>(m, "SharedGroup", "Collectives of some ranks of a segment.")
      .def(nb::init<Segment&, size_t, std::vector<int>, int>(), nb::keep_alive<1, 2>())
      .def_static("region_bytes", &SharedGroup::region_bytes)
      .def(
          "all_reduce",
          [](SharedGroup& g, Address x, int64_t count, int op) { g.all_reduce(pointer<char>(x), count, op); },
          release())
      .def(
          "all_gather",
          [](SharedGroup& g, Address x, Address out, int64_t rows, int64_t width) {
            g.all_gather(pointer<char>(x), pointer<char>(out), rows, width);
          },
          release())
      .def(
          "broadcast",
          [](SharedGroup& g, Address data, int64_t bytes, bool endless) {
            g.broadcast(pointer<char>(data), bytes, endless);
          },
          release());
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // what an unhandled exception still refers to at the end of the program is no leak
  m.doc() = "Eightfold's CPU kernels. Arguments are addresses and sizes; eightfold.ops.cpu is the interface.";
  using release = nb::call_guard<nb::gil_scoped_release>;

  m.def("known_isas", [] { return names(false); }, "Kernel variants of this build, best last.");
  m.def("available_isas", [] { return names(true); }, "Those that this processor can run, best last.");
  m.def("isa", [] { return std::string(find_variant("")->name); }, "The best variant that this processor can run.");
  m.attr("SHARED_ROWS") = kSharedRows;
  m.attr("MOE_TOKENS") = kMoeTokens;
  m.def("num_threads", &usable_cpus, "Processors that this process may use.");
  m.def("keep_freed_memory", &keep_freed_memory, "Lets the C allocator keep some freed memory for the next tensors.");
  m.def(
      "probe_int8_peak",
      [](int threads, double ms, const std::string& isa) { return probe_operations(0, threads, ms, isa); },
      nb::arg("threads") = 0, nb::arg("ms") = 50.0, nb::arg("isa") = "", release(),
      "int8 operations per second (a product and a sum are two) of a loop over registers.");
  m.def(
      "probe_bf16_peak",
      [](int threads, double ms, const std::string& isa) { return probe_operations(1, threads, ms, isa); },
      nb::arg("threads") = 0, nb::arg("ms") = 50.0, nb::arg("isa") = "", release(),
      "The same for bf16 products with fp32 sums; 0 where there is no such instruction.");
  m.def(
      "probe_fp32_peak",
      [](int threads, double ms, const std::string& isa) { return probe_operations(2, threads, ms, isa); },
      nb::arg("threads") = 0, nb::arg("ms") = 50.0, nb::arg("isa") = "", release(), "The same for fp32.");
  m.def("probe_read_bandwidth", &probe_read_bandwidth, nb::arg("nbytes"), nb::arg("threads") = 0, nb::arg("isa") = "",
        release(), "Bytes per second of reading nbytes of huge pages once; the best of four.");

  m.def("round_rows", &round_rows, nb::arg("data"), nb::arg("dtype"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("stride"), nb::arg("out"), nb::arg("scales"), nb::arg("isa") = "", release(),
        "Float rows to int8 and scales, on the calling thread: the first row that is not finite, or -1.");

  nb::class_<Engine>(m, "Engine", "A kernel variant and its threads.")
      .def(nb::init<int, const std::string&>(), nb::arg("threads") = 0, nb::arg("isa") = "")
      .def_prop_ro("isa", [](const Engine& e) { return std::string(e.kernels().name); })
      .def_prop_ro("threads", [](Engine& e) { return e.pool().threads(); })
      .def_prop_ro("bf16_dot", [](const Engine& e) { return e.kernels().bf16_dot; })
      .def("rms_norm", &rms_norm, release())
      .def("rope_write", &rope_write, release())
      .def("attention", &attention, release())
      .def("route", &route, release());

  bind_shared(m);

  nb::class_<LinearWeights>(m, "Linear", "Matrices that are multiplied side by side.")
      .def(
          "__init__",
          [](LinearWeights* self, Engine& engine, const std::vector<MatrixTuple>& weights, bool rounded) {
            new (self) LinearWeights(engine, matrices(weights), rounded);
          },
          nb::keep_alive<1, 2>())
      .def(
          "run",
          [](LinearWeights& self, Address x, int64_t x_stride, int64_t tokens, Address out) {
            self.run(pointer(x), x_stride, tokens, pointer(out));
          },
          release())
      .def(
          "run_shared",
          [](LinearWeights& self, Address x, int64_t x_stride, int64_t tokens, Address out,
             const ExchangeTuple& exchange) {
            self.run_shared(pointer(x), x_stride, tokens, pointer(out), exchange_of(exchange));
          },
          release());

  nb::class_<ExpertSet>(m, "Experts", "The experts of a layer.")
      .def(
          "__init__",
          [](ExpertSet* self, Engine& engine, const std::vector<std::vector<MatrixTuple>>& experts, bool rounded,
             int64_t first, int64_t total) {
            std::vector<std::vector<Matrix>> all;
            for (const auto& e : experts) all.push_back(matrices(e));
            new (self) ExpertSet(engine, all, rounded, first, total);
          },
          nb::keep_alive<1, 2>())
      .def(
          "run",
          [](ExpertSet& self, Address x, int64_t x_stride, int64_t tokens, Address ids, Address weights, int chosen,
             Address out) {
            self.run(pointer(x), x_stride, tokens, pointer<int32_t>(ids), pointer(weights), chosen, pointer(out),
                     nullptr);
          },
          release())
      .def(
          "run_shared",
          [](ExpertSet& self, Address x, int64_t x_stride, int64_t tokens, Address ids, Address weights, int chosen,
             Address out, const ExchangeTuple& exchange) {
            const Exchange all = exchange_of(exchange);
            self.run(pointer(x), x_stride, tokens, pointer<int32_t>(ids), pointer(weights), chosen, pointer(out), &all);
          },
          release());
}
