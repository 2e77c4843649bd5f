// SPDX-License-Identifier: Apache-2.0
// What torch asks a device: streams, events, guards, generators. And what Python may set and read.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceCapability.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>

#include "memory.h"
#include "operators.h"
#include "streams.h"

namespace emulated {
void bind_clock(pybind11::module_& m);  // in clock_executor.cpp
namespace {

constexpr c10::DeviceIndex kDevices = 2;  // by number; all share one memory and the streams of the process

c10::Stream stream_of(int id, c10::DeviceIndex device) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, device), id);
}
c10::DeviceIndex index_of(c10::Device d) { return d.has_index() ? d.index() : c10::DeviceIndex(current_device()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Device getDevice() const override { return {kType, c10::DeviceIndex(current_device())}; }
  void setDevice(c10::Device d) const override { set_current_device(index_of(d)); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { set_current_device(index_of(d)); }
  c10::Device exchangeDevice(c10::Device d) const override {
    c10::Device before = getDevice();
    setDevice(d);
    return before;
  }

  c10::Stream getStream(c10::Device d) const override { return stream_of(current_stream(), index_of(d)); }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream_of(0, index_of(d)); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    static std::atomic<int> made{0};
    return stream_of(1 + made++ % (kStreams - 1), index_of(d));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    c10::Stream before = stream_of(current_stream(), s.device_index());
    set_current_stream(int(s.id()));
    return before;
  }
  bool queryStream(const c10::Stream& s) const override { return executor().idle(int(s.id())); }
  void synchronizeStream(const c10::Stream& s) const override { synchronize(int(s.id()), "stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronize_all(); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    record_stream(data, int(s.id()));
  }

  static const EventPtr& unwrap(void* event) { return *static_cast<EventPtr*>(event); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<EventPtr*>(event);
  }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new EventPtr(std::make_shared<Event>());
    emulated::record(unwrap(*event), int(s.id()));
  }
  void block(void* event, const c10::Stream& s) const override {
    if (event) wait(unwrap(event), int(s.id()));
  }
  bool queryEvent(void* event) const override { return !event || executor().reached(unwrap(event)); }
  void synchronizeEvent(void* event) const override {
    if (event) synchronize(unwrap(event));
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    TORCH_CHECK(from && to && queryEvent(from) && queryEvent(to), "emulated device: an event is not reached yet");
    return double(unwrap(to)->at_ns - unwrap(from)->at_ns) / 1e6;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return c10::DeviceIndex(current_device()); }
  void setCurrentDevice(c10::DeviceIndex d) const override { set_current_device(d); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    auto before = getCurrentDevice();
    set_current_device(d);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Device getDeviceFromPtr(void*) const override { return {kType, getCurrentDevice()}; }
  // The CPU's: operators draw from it on their stream's thread, so the order across streams decides.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = device_allocator()->allocate(bytes);
    if (size_t kept = std::min(bytes, storage.nbytes()))
      device_allocator()->copy_data(fresh.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// A Python callable that threads without the interpreter's lock may hold and call.
std::function<void()> callable(pybind11::function function) {
  std::shared_ptr<pybind11::function> held(new pybind11::function(std::move(function)), [](pybind11::function* f) {
    pybind11::gil_scoped_acquire gil;
    delete f;
  });
  return [held] {
    pybind11::gil_scoped_acquire gil;
    try {
      (*held)();
    } catch (pybind11::error_already_set& error) {  // which may be dropped by a thread without the lock
      std::string what = error.what();
      throw std::runtime_error(what);
    }
  };
}

}  // namespace
}  // namespace emulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace emulated;
  namespace py = pybind11;
  c10::SetAllocator(kType, device_allocator(), 1);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  on_device(nullptr);  // both windows are there before anything forks

  m.def("set_delay", &set_delay, py::arg("stream"), py::arg("microseconds"));
  m.def("set_lazy", &set_lazy, py::arg("stream"), py::arg("lazy"), py::call_guard<py::gil_scoped_release>());
  m.def("set_one_queue", &set_one_queue, py::arg("one"));
  m.def("unfinished", &unfinished);
  m.def("counts", &counts);
  m.def("reset_counts", &reset_counts);
  m.def("set_poison", &set_poison, py::arg("on"));
  m.def("set_owner", &set_owner, py::arg("owner"));
  m.def("set_capacity", &set_capacity, py::arg("bytes"));
  m.def("reset_peaks", &reset_peaks);
  m.def("device_usage", [] {
    std::map<std::string, std::pair<int64_t, int64_t>> found;
    for (const auto& [owner, of] : device_usage()) found[owner] = {of.now, of.peak};
    return found;
  });
  m.def("pinned_usage", [] { return std::make_pair(pinned_usage().now, pinned_usage().peak); });
  m.def(
      "enqueue",
      [](int stream, py::function function, const std::string& name) {
        submit(stream, {Kind::host, callable(std::move(function)), name});
      },
      py::arg("stream"), py::arg("function"), py::arg("name"));
  bind_clock(m);
  m.def("host_view", &host_view, py::arg("tensor"));
}
