// SPDX-License-Identifier: Apache-2.0
// Operators: one boxed fallback runs each CPU kernel later, on the stream that was current. Shapes come from meta tensors.
#include "operators.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <unordered_map>

#include "clock.h"
#include "memory.h"
#include "streams.h"

namespace emulated {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

// `v` with `f` of every tensor in it.
template <class F>
IValue mapped(const IValue& v, const F& f) {
  if (v.isTensor()) return v.toTensor().defined() ? IValue(f(v.toTensor())) : v;
  if (v.isTensorList()) {
    std::vector<Tensor> out;
    for (const Tensor& t : v.toTensorVector()) out.push_back(t.defined() ? f(t) : t);
    return IValue(out);
  }
  if (v.isList()) {
    auto in = v.toList();
    c10::impl::GenericList out(in.elementType());
    for (const IValue& e : v.toListRef()) out.push_back(mapped(e, f));
    return IValue(out);
  }
  return v;
}

IValue elsewhere(const IValue& v, c10::Device device) {
  return v.isDevice() && v.toDevice().type() == kType ? IValue(device) : v;
}

Tensor like_on(const Tensor& t, c10::Device device) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(device).requires_grad(false));
}

// One call of an operator on the device.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), name_(op.operator_name().name), device_(kType, current_device()) {
    size_t count = schema_.arguments().size();
    args_.assign(stack->end() - count, stack->end());
    torch::jit::drop(*stack, count);
    for (const IValue& arg : args_)
      mapped(arg, [&](const Tensor& t) {
        check_place(t);
        return t;
      });
  }

  void run(Stack* stack) {
    Stack host;
    bool known = infer();
    auto on_host = [&](const Tensor& t) { return !ours(t) ? t.clone() : known ? host_view(t) : values_of(t); };
    for (const IValue& arg : args_) host.push_back(elsewhere(mapped(arg, on_host), c10::Device(at::kCPU)));
    known ? later(std::move(host), stack) : now(std::move(host), stack);
  }

 private:
  // CUDA takes numbers from the host, and indices.
  void check_place(const Tensor& t) {
    if (ours(t)) device_ = t.device();
    bool indexes = name_.rfind("aten::index", 0) == 0 || name_.rfind("aten::_index_put", 0) == 0 ||
                   name_.rfind("aten::_unsafe_index", 0) == 0;
    TORCH_CHECK(!t.device().is_cpu() || t.dim() == 0 || t.numel() == 0 || indexes, "emulated device: ", name_,
                " was given a tensor on the CPU, ", t.sizes(), ", beside tensors on the device");
  }

  bool writes(size_t argument) const {
    const auto* alias = schema_.arguments()[argument].alias_info();
    return alias && alias->isWrite();
  }

  // The argument that output `i` is, if it is one.
  std::optional<IValue> written(size_t i) const {
    const auto* alias = schema_.returns()[i].alias_info();
    if (!alias) return std::nullopt;
    TORCH_CHECK(alias->isWrite(), "emulated device: the view ", name_, " needs an implementation");
    for (size_t k = 0; k < args_.size(); k++)
      if (writes(k) && schema_.arguments()[k].alias_info()->beforeSets() == alias->beforeSets()) return args_[k];
    TORCH_CHECK(false, "emulated device: ", name_, " returns an argument that it does not have");
  }

  // Shapes of the outputs, if they do not depend on values. Grows arguments of the kind `out=`.
  bool infer() {
    std::string key = op_.operator_name().name + "." + op_.operator_name().overload_name;
    bool keeps = true;
    for (const IValue& arg : args_) keeps = keeps && describe(arg, key);
    if (keeps)
      if (auto found = kept(key)) {
        shapes_ = std::move(*found);
        return true;
      }
    Stack meta;
    for (const IValue& arg : args_)
      meta.push_back(elsewhere(mapped(arg,
                                      [](const Tensor& t) {
                                        return t.device().is_cpu() && t.dim() == 0 ? t : like_on(t, at::kMeta);
                                      }),
                               c10::Device(at::kMeta)));
    Stack before = meta;
    try {
      op_.callBoxed(&meta);
    } catch (const std::exception&) {
      return false;
    }
    for (size_t i = 0; i < args_.size(); i++)
      if (writes(i) && args_[i].isTensor() && ours(args_[i].toTensor())) {
        auto wanted = before[i].toTensor().sizes();
        if (wanted == args_[i].toTensor().sizes()) continue;
        args_[i].toTensor().resize_(wanted);
        keeps = false;
      }
    shapes_.assign(meta.begin(), meta.end());
    for (const IValue& v : shapes_)
      if (!v.isTensor() && !v.isTensorList() && !v.isNone()) return false;
    if (keeps) keep(key, shapes_);
    return true;
  }

  // Adds to `key` what shapes can depend on; false if that cannot be said.
  static bool describe(const IValue& v, std::string& key) {
    auto raw = [&key](auto value) { key.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
    key.push_back('|');
    if (v.isTensor() && v.toTensor().defined()) {
      const Tensor& t = v.toTensor();
      raw(t.scalar_type());
      raw(t.device().is_cpu());
      raw(t.unsafeGetTensorImpl()->is_wrapped_number());
      raw(t.dim());
      for (int64_t size : t.sizes()) raw(size);
      for (int64_t stride : t.strides()) raw(stride);
    } else if (v.isNone() || v.isTensor()) {
      key.push_back('n');
    } else if (v.isInt()) {
      raw(v.toInt());
    } else if (v.isDouble()) {
      raw(v.toDouble());
    } else if (v.isBool()) {
      raw(v.toBool());
    } else if (v.isString()) {
      key += v.toStringRef();
    } else if (v.isDevice()) {
      raw(v.toDevice().type());
    } else if (v.isList()) {
      raw(v.toListRef().size());
      for (const IValue& e : v.toListRef())
        if (!describe(e, key)) return false;
    } else {
      return false;
    }
    return true;
  }

  // torch computes shapes in Python, which takes longer than a small operator. Training asks for the same ones again.
  static std::optional<std::vector<IValue>> kept(const std::string& key) {
    std::lock_guard<std::mutex> lock(shapes_guard());
    auto found = shapes_kept().find(key);
    if (found == shapes_kept().end()) return std::nullopt;
    return found->second;
  }
  static void keep(const std::string& key, const std::vector<IValue>& shapes) {
    std::lock_guard<std::mutex> lock(shapes_guard());
    if (shapes_kept().size() > 20'000) shapes_kept().clear();
    shapes_kept()[key] = shapes;
  }
  static std::unordered_map<std::string, std::vector<IValue>>& shapes_kept() {
    static auto* kept = new std::unordered_map<std::string, std::vector<IValue>>();
    return *kept;
  }
  static std::mutex& shapes_guard() {
    static std::mutex guard;
    return guard;
  }

  // Shapes depend on values, as of nonzero: the host waits, as on CUDA.
  void now(Stack host, Stack* stack) {
    int stream = current_stream();
    count("launch", name_);
    synchronize(stream, name_.c_str());
    op_.callBoxed(&host);
    for (size_t i = 0; i < schema_.returns().size(); i++) {
      if (auto argument = written(i)) {
        stack->push_back(*argument);
        continue;
      }
      stack->push_back(mapped(host[i], [&](const Tensor& t) {
        Tensor out = like_on(t, device_);
        Work work{Kind::copy, [to = host_view(out), from = t]() mutable { to.copy_(from); }, name_};
        work.source = &t, work.target = &out;
        submit(stream, std::move(work));
        return out;
      }));
    }
    executor().synchronize(stream);
  }

  void later(Stack host, Stack* stack) {
    std::vector<IValue> outs, targets;
    for (size_t i = 0; i < schema_.returns().size(); i++) {
      auto argument = written(i);
      outs.push_back(argument ? *argument : mapped(shapes_[i], [&](const Tensor& t) { return like_on(t, device_); }));
      targets.push_back(argument ? IValue() : mapped(outs[i], [](const Tensor& t) { return host_view(t); }));
    }
    count("launch", name_);
    auto run = [op = op_, name = name_, host = std::move(host), targets = std::move(targets)]() mutable {
      try {
        op.callBoxed(&host);
      } catch (const c10::Error& error) {
        TORCH_CHECK(false, "emulated device, asynchronous error of ", name, ": ", error.what_without_backtrace());
      }
      for (size_t i = 0; i < targets.size(); i++) deliver(host[i], targets[i], i, name);
    };
    submit(current_stream(), Work{Kind::op, std::move(run), name_, 0, false, {}, &op_, &args_, &outs});
    for (IValue& out : outs) stack->push_back(std::move(out));
  }

  static void deliver(const IValue& from, const IValue& to, size_t i, const std::string& name) {
    if (to.isTensorList()) {
      auto sources = from.toTensorVector(), targets = to.toTensorVector();
      for (size_t k = 0; k < targets.size(); k++)
        if (targets[k].defined()) targets[k].copy_(sources[k]);
    } else if (to.isTensor() && to.toTensor().defined()) {
      // What an operator gives beside its result may differ in size between the CPU and others (_embedding_bag).
      if (from.toTensor().sizes() == to.toTensor().sizes())
        to.toTensor().copy_(from.toTensor());
      else
        TORCH_CHECK(i > 0, "emulated device: ", name, " gave ", from.toTensor().sizes(), ", not ",
                    to.toTensor().sizes());
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  std::string name_;
  c10::Device device_;
  std::vector<IValue> args_, shapes_;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Paused paused;
  at::AutoDispatchBelowADInplaceOrView below;
  Call(op, stack).run(stack);
}

// -- memory and views ----------------------------------------------------------------------------------------------

// Allocates on the device that is asked for.
class On {
 public:
  explicit On(std::optional<c10::Device> device) : before_(current_device()) {
    if (device && device->has_index()) set_current_device(device->index());
  }
  ~On() { set_current_device(before_); }

 private:
  int before_;
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty_memory_format(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                           std::optional<c10::Device> device, std::optional<bool> pin,
                           std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "only host memory can be page-locked");
  On on(device);
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "only host memory can be page-locked");
  On on(device);
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}
Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}
Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}
const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t bytes = size_t(impl->numel() + impl->storage_offset()) * self.dtype().itemsize();
  if (bytes > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}
Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }
Tensor& set_storage(Tensor& self, c10::Storage source) { return at::native::set_(self, source); }
Tensor& set_storage_offset(Tensor& self, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                           c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  auto dense = c10::TensorType::contiguousStridesOf(sizes);
  bool is_dense = strides.empty() && !sizes.empty();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(sizes, is_dense ? c10::IntArrayRef(dense) : strides, offset.expect_int());
  return self;
}
void record_on(Tensor& self, c10::Stream stream) { record_stream(self.storage().data_ptr(), int(stream.id())); }

// -- copies --------------------------------------------------------------------------------------------------------

// As on CUDA: page-locked memory that needs no conversion is read or written when the copy's turn comes. All other host
// memory is read before the call returns, and written before it returns.
Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  if (!dst.numel()) return dst;
  Paused paused;
  int stream = current_stream();
  const Tensor source = self.sizes() == dst.sizes() ? self : self.expand(dst.sizes());
  if (ours(source) && ours(dst)) {
    int64_t bytes = int64_t(source.nbytes() + dst.nbytes());
    count("launch", "aten::copy_");
    Work work{Kind::copy, [from = host_view(source), to = host_view(dst)]() mutable { to.copy_(from); }, "copy", bytes};
    work.source = &source, work.target = &dst;
    submit(stream, std::move(work));
    return dst;
  }
  bool up = ours(dst);
  const Tensor& host = up ? source : dst;
  bool plain = source.scalar_type() == dst.scalar_type() && source.strides() == dst.strides() &&
               host.is_non_overlapping_and_dense();
  bool direct = plain && host.is_pinned(), returns_early = non_blocking && (direct || up);
  const char* name = up ? "copy up" : "copy down";
  count("launch", name);
  if (!direct) count("pageable", name);
  Tensor from = !up ? host_view(source) : returns_early && !direct ? source.clone() : source.detach();
  Tensor to = up ? host_view(dst) : dst.detach();
  int64_t bytes = int64_t(up ? dst.nbytes() : source.nbytes());
  Work work{up ? Kind::up : Kind::down, [from, to]() mutable { to.copy_(from); }, name, bytes, direct};
  work.source = &source, work.target = &dst, work.blocking = !returns_early;
  submit(stream, std::move(work));
  if (!returns_early) synchronize(stream, name);
  return dst;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}
at::Scalar local_scalar_dense(const Tensor& self) {
  Paused paused;
  synchronize(current_stream(), "item");
  return at::_local_scalar_dense(values_of(self));
}

int64_t math_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                       std::optional<double>, bool) {
  return 0;
}
// `p.data = p.data.to(device)` keeps the parameter, as on CUDA.
bool swaps_in_place(const Tensor& a, const Tensor& b) {
  return (a.device().is_cpu() || ours(a)) && (b.device().is_cpu() || ours(b));
}

}  // namespace

bool ours(const Tensor& t) { return t.defined() && t.device().type() == kType; }

Tensor host_view(const Tensor& tensor) {
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  if (!tensor.numel() || !tensor.has_storage()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  void* at = device_view(tensor.unsafeGetTensorImpl()->mutable_data());
  return at::from_blob(at, tensor.sizes(), tensor.strides(), options);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_memory_format);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("record_stream", record_on);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("_fused_sdp_choice", math_attention);
  m.impl("_has_compatible_shallow_copy_type", swaps_in_place);
}
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_has_compatible_shallow_copy_type", swaps_in_place); }
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_has_compatible_shallow_copy_type", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) {
  m.impl("_has_compatible_shallow_copy_type", torch::CppFunction::makeFallthrough());
}

// -- autocast: torch's own lists -----------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at;
  using namespace at::autocast;
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_IF_UNSET(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_IF_UNSET)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
}

}  // namespace emulated
