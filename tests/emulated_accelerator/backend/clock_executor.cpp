// SPDX-License-Identifier: Apache-2.0
// The clock as an executor: a stream's work takes its time from a profile and is not done, unless whole numbers come
// of it. Those are always right, or programs could not go on: indices, counts, masks. Floating point values are never
// computed; who makes whole numbers of them (topk, comparisons, the host) sees normally distributed noise of a seed.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/SDPBackend.h>
#include <ATen/native/transformers/attention.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <random>
#include <unordered_map>

#include "clock.h"
#include "costs.h"
#include "memory.h"
#include "operators.h"
#include "streams.h"

namespace emulated {
namespace {

using at::Tensor;
using c10::IValue;

// -- values --------------------------------------------------------------------------------------------------------

bool is_whole(const Tensor& t) { return c10::isIntegralType(t.scalar_type(), /*includeBool=*/true); }

// Storages whose last writer was not run: the dtype that it wrote, and a number that each write changes.
struct Uncomputed {
  at::ScalarType dtype;
  uint64_t writes;
};
std::mutex values_guard;
std::unordered_map<const void*, Uncomputed> uncomputed;

const void* storage_of(const Tensor& t) { return t.has_storage() ? t.storage().data() : nullptr; }

void note_written(const Tensor& t, bool computed) {
  if (!ours(t)) return;
  std::lock_guard<std::mutex> lock(values_guard);
  if (computed) {
    uncomputed.erase(storage_of(t));
    return;
  }
  static uint64_t writes = 0;
  uncomputed[storage_of(t)] = {t.scalar_type(), ++writes};
}

// What lay in a block before says nothing of what comes.
void forget_block(const void* address) {
  std::lock_guard<std::mutex> lock(values_guard);
  uncomputed.erase(address);
}

// A CPU tensor of noise in the place of `t`, the same one until `t` is written. One value alone is 1: losses, norms and
// scales that the program looks at.
Tensor noise_for(const Tensor& t, at::ScalarType dtype) {
  static std::mutex guard;
  static std::unordered_map<int, Tensor> tables;
  int64_t count = t.numel();
  if (count == 1) return at::ones(t.sizes(), dtype);
  uint64_t seed = uint64_t(t.storage_offset()) + reinterpret_cast<uint64_t>(storage_of(t)) / 512;
  {
    std::lock_guard<std::mutex> lock(values_guard);
    if (auto found = uncomputed.find(storage_of(t)); found != uncomputed.end()) seed += found->second.writes << 40;
  }
  Tensor table;
  {
    std::lock_guard<std::mutex> lock(guard);
    Tensor& cached = tables[int(dtype)];
    if (!cached.defined()) cached = at::randn({1 << 20}, at::detail::createCPUGenerator(20), at::kFloat).to(dtype);
    table = cached;
  }
  int64_t offset = int64_t(std::mt19937_64(seed)() % uint64_t(table.numel()));
  Tensor out = at::empty({count}, dtype);
  for (int64_t done = 0; done < count; offset = 0) {
    int64_t part = std::min(count - done, table.numel() - offset);
    out.narrow(0, done, part).copy_(table.narrow(0, offset, part));
    done += part;
  }
  return out.view(t.sizes());
}

// -- work ----------------------------------------------------------------------------------------------------------

void each(const IValue& v, const std::function<void(const Tensor&)>& f) {
  if (v.isTensor()) {
    if (v.toTensor().defined()) f(v.toTensor());
  } else if (v.isTensorList()) {
    for (const Tensor& t : v.toTensorVector())
      if (t.defined()) f(t);
  } else if (v.isList()) {
    for (const IValue& e : v.toListRef()) each(e, f);
  }
}

std::string short_name(const std::string& name) { return name.rfind("aten::", 0) == 0 ? name.substr(6) : name; }

class Clock final : public Executor {
 public:
  void submit(int stream, Work work) override {
    Paused paused;
    switch (work.kind) {
      case Kind::op:
        timed(stream, short_name(work.name), work);
        carry_out(work);
        break;
      case Kind::copy:
        kernel(stream, "copy_", seconds_of(Effort{.bytes = double(work.bytes)}));
        copy(work);
        break;
      case Kind::up:
      case Kind::down: {
        bool up = work.kind == Kind::up;
        double speed = up ? (work.pinned ? rates.pinned_up : rates.pageable_up)
                          : (work.pinned ? rates.pinned_down : rates.pageable_down);
        submit_copy(stream, rates.copy_latency + double(work.bytes) / speed, work.blocking);
        copy(work);
        break;
      }
      case Kind::host:
        work.run();
        break;
      case Kind::event:
      case Kind::poison:
        break;
    }
    if (work.finish) work.finish();
  }
  void record(const EventPtr& event, int stream) override {
    std::lock_guard<std::mutex> lock(event->m);
    event->done = ++event->scheduled;
    event->stream = stream;
    event->at_ns = int64_t(event_time(stream) * 1e9);
  }
  void wait(const EventPtr& event, int stream) override { event_wait(stream, at(event)); }
  void synchronize(int stream) override { thread_wait(stream_end(stream), stream == 0); }
  void synchronize(const EventPtr& event) override { thread_wait(at(event), event->stream == 0); }
  bool reached(const EventPtr& event) override { return thread_time() >= at(event); }
  bool idle(int stream) override { return thread_time() >= stream_end(stream); }

 private:
  static double at(const EventPtr& event) {
    std::lock_guard<std::mutex> lock(event->m);
    return double(event->at_ns) * 1e-9;
  }

  static void timed(int stream, const std::string& name, const Work& work) {
    kernel(stream, name, seconds_of(effort_of(name, work.op->schema(), *work.args, *work.outs)));
  }

  static void kernel(int stream, const std::string& name, double seconds) {
    note_kernel(name, seconds);
    submit_kernel(stream, seconds);
  }

  // Runs what makes whole numbers. They go where the operator's outputs are at once: who reads them comes later.
  static void carry_out(const Work& work) {
    bool whole = false;
    for (const IValue& out : *work.outs)
      each(out, [&](const Tensor& t) { whole |= is_whole(t); });
    if (whole) {
      std::vector<IValue> host;
      for (const IValue& arg : *work.args) host.push_back(with_values(arg));
      auto run = host;
      work.op->callBoxed(&run);
      for (size_t i = 0; i < work.outs->size(); i++) {
        const IValue& out = (*work.outs)[i];
        if (!out.isTensor() || !out.toTensor().defined() || !is_whole(out.toTensor())) continue;
        Tensor to = host_view(out.toTensor()), from = run[i].toTensor();
        if (to.data_ptr() != from.data_ptr() && to.sizes() == from.sizes()) to.copy_(from);
      }
    }
    for (const IValue& out : *work.outs) each(out, [](const Tensor& t) { note_written(t, is_whole(t)); });
  }

  static void copy(const Work& work) {
    if (!work.source) {
      work.run();
      return;
    }
    const Tensor &from = *work.source, &to = *work.target;
    if (is_whole(to) || !ours(to)) (ours(to) ? host_view(to) : to).copy_(ours(from) ? values_of(from) : from);
    note_written(to, is_whole(to));
  }

  static IValue with_values(const IValue& v) {
    if (v.isDevice() && v.toDevice().type() == kType) return c10::Device(at::kCPU);
    if (v.isTensor()) return v.toTensor().defined() && ours(v.toTensor()) ? IValue(values_of(v.toTensor())) : v;
    if (v.isTensorList()) {
      std::vector<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(ours(t) ? values_of(t) : t);
      return IValue(out);
    }
    if (v.isList()) {
      auto in = v.toList();
      c10::impl::GenericList out(in.elementType());
      for (const IValue& e : v.toListRef()) out.push_back(with_values(e));
      return IValue(out);
    }
    return v;
  }
};

// -- attention -----------------------------------------------------------------------------------------------------

// One kernel, as on a GPU, of `products` matrix products of all queries and keys; half of them if it is causal.
void charge_attention(const Tensor& q, const Tensor& k, double products, bool causal, double bytes, const char* name) {
  double T = double(q.size(-2)), S = double(k.size(-2)), heads = double(q.size(0) * q.size(1)), d = double(q.size(-1));
  double flops = products * 2 * heads * T * S * d * (causal ? 0.5 : 1.0);
  Effort effort{.bytes = bytes, .flops = flops, .shortest = int64_t(T)};
  double seconds = seconds_of(effort);
  note_kernel(name, seconds);
  submit_kernel(current_stream(), seconds);
}

Tensor as_query(const Tensor& q) {  // heads beside each other in memory, so that joining them is a view
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, double, bool causal, bool,
    std::optional<double>) {
  Paused paused;
  Tensor out = as_query(q);
  Tensor sums = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  double bytes = touched(q) + touched(k) + touched(v) + touched(out) + touched(sums);
  if (bias && bias->defined()) bytes += touched(*bias);
  charge_attention(q, k, 2, causal, bytes, "attention");
  Tensor seed = at::empty({}, at::kLong);
  return {out, sums, Tensor(), Tensor(), q.sym_size(2), k.sym_size(2), seed, seed, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor&, std::array<bool, 4>,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double, bool causal,
    const Tensor&, const Tensor&, std::optional<double>) {
  Paused paused;
  Tensor dq = as_query(q), dk = as_query(k), dv = as_query(v);
  double bytes = 2 * (touched(q) + touched(k) + touched(v)) + touched(grad) + touched(out) + touched(sums);
  charge_attention(q, k, 5, causal, bytes, "attention_backward");
  return {dq, dk, dv, Tensor()};
}

int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return int64_t(clock_on() ? at::SDPBackend::overrideable : at::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", attention_backward);
}

}  // namespace

}  // namespace emulated
namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &emulated::choose_attention)
}
namespace emulated {

// What an operator or the host reads of a device tensor when nothing was computed.
Tensor values_of(const Tensor& t) {
  if (!clock_on()) return host_view(t);
  if (!is_whole(t)) return noise_for(t, t.scalar_type());
  at::ScalarType made = t.scalar_type();
  {
    std::lock_guard<std::mutex> lock(values_guard);
    auto found = uncomputed.find(storage_of(t));
    if (found == uncomputed.end()) return host_view(t);
    made = found->second.dtype;
  }
  // Whole numbers that are the bits of values never computed.
  if (c10::elementSize(made) == t.element_size()) return noise_for(t, made).view(t.scalar_type());
  return at::zeros(t.sizes(), t.scalar_type());
}

void bind_clock(pybind11::module_& m) {
  namespace py = pybind11;
  auto free = py::call_guard<py::gil_scoped_release>();
  py::class_<Pace>(m, "Pace")
      .def(py::init<>())
      .def_readwrite("slowdown", &Pace::slowdown)
      .def_readwrite("launch", &Pace::launch)
      .def_readwrite("python", &Pace::python)
      .def_readwrite("ahead", &Pace::ahead);
  py::class_<Rates>(m, "Rates")
      .def(py::init<>())
      .def_readwrite("matmul_flops", &Rates::matmul_flops)
      .def_readwrite("matmul_half_size", &Rates::matmul_half_size)
      .def_readwrite("fp32_flops", &Rates::fp32_flops)
      .def_readwrite("bytes", &Rates::bytes)
      .def_readwrite("cache_bytes", &Rates::cache_bytes)
      .def_readwrite("kernel", &Rates::kernel)
      .def_readwrite("pinned_down", &Rates::pinned_down)
      .def_readwrite("pinned_up", &Rates::pinned_up)
      .def_readwrite("pageable_down", &Rates::pageable_down)
      .def_readwrite("pageable_up", &Rates::pageable_up)
      .def_readwrite("copy_latency", &Rates::copy_latency);
  m.def("start_clock", [](const Pace& pace, const Rates& chosen) {
    rates = chosen;
    clock_start(pace);
    static Clock clock;
    set_executor(&clock);
    set_poison(false);
    tell_of_blocks(&forget_block);
  });
  m.def("clock_now", &clock_now, free);
  m.def("thread_time", &thread_time, free);
  m.def("clock_sleep", &clock_sleep, py::arg("seconds"), free);
  m.def("note_blocked", [](double begin, double end) { note_blocked(kHost, begin, end); }, free);
  m.def("submit_seconds", [](const std::string& name, double seconds, double launch) {
    note_kernel(name, seconds);
    submit_kernel(current_stream(), seconds, launch);
  }, py::arg("name"), py::arg("seconds"), py::arg("launch") = -1.0, free);
  m.def("clear_times", &clear_times, free);
  m.def("sync_count", &sync_count);
  m.def("lateness", &lateness);
  m.def("seconds_by_kernel", &seconds_by_kernel);
  m.def("stream_times", [](int stream) {
    auto t = stream_times(stream);
    py::dict d;
    d["end"] = t.end;
    d["kernels"] = t.kernels;
    d["copies"] = t.copies;
    d["launches"] = t.launches;
    d["idle"] = py::dict(py::arg("sync") = t.idle[kSync], py::arg("bus") = t.idle[kBus],
                         py::arg("host") = t.idle[kHost], py::arg("launch") = t.idle[kLaunch]);
    return d;
  });
  py::class_<Paused>(m, "Paused").def(py::init<>());
}

}  // namespace emulated
