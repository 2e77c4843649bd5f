// SPDX-License-Identifier: Apache-2.0
#include "costs.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <unordered_map>

#include "operators.h"

namespace emulated {
Rates rates;

namespace {
using at::Tensor;
using c10::IValue;
using Args = std::vector<IValue>;
constexpr double kSector = 32;  // bytes of the smallest piece that a gather moves

void each_tensor(const IValue& v, const std::function<void(const Tensor&)>& f) {
  if (v.isTensor()) {
    if (v.toTensor().defined()) f(v.toTensor());
  } else if (v.isTensorList()) {
    for (const Tensor& t : v.toTensorVector())
      if (t.defined()) f(t);
  } else if (v.isList()) {
    for (const IValue& e : v.toListRef()) each_tensor(e, f);
  }
}
double size_of(const IValue& v) {
  double n = 0;
  each_tensor(v, [&](const Tensor& t) { n += touched(t); });
  return n;
}
bool is_fp32(const Tensor& t) { return t.element_size() > 2; }

bool overwrites(const std::string& name) {  // in place, without reading what was there
  return name == "fill_" || name == "zero_" || name == "copy_" || name == "normal_" || name == "uniform_" ||
         name == "random_" || name == "bernoulli_" || name == "arange" || name == "set_";
}

// Everything that is not an output is read, everything that is written is written once.
double plain_bytes(const std::string& name, const c10::FunctionSchema& schema, const Args& args, const Args& outs,
                   size_t first = 0) {
  double n = 0;
  for (size_t i = 0; i < args.size(); i++) {
    const auto& a = schema.arguments()[i];
    bool written = a.alias_info() && a.alias_info()->isWrite();
    if (written) n += size_of(args[i]) * (overwrites(name) || a.is_out() ? 1 : 2);
    else if (i >= first) n += size_of(args[i]);
  }
  for (size_t i = 0; i < outs.size(); i++)
    if (!schema.returns()[i].alias_info()) n += size_of(outs[i]);
  return n;
}

// Bytes that a gather or scatter of `moved` bytes costs, when `index` names rows or single elements of `source` along
// `dim`. Small pieces cost whole sectors, unless the next index lies in the same one.
double gathered(const Tensor& source, int64_t dim, double moved, const Tensor& index) {
  if (dim < 0) dim += source.dim();
  double run = double(source.element_size());
  for (int64_t d = dim + 1; d < source.dim(); d++) run *= double(source.size(d));
  if (run >= kSector || !moved) return moved;
  double elements = double(index.numel()), sectors = elements;
  if (index.dim() == 1 && index.scalar_type() == at::kLong && elements <= 1 << 20) {
    Tensor values = ours(index) ? values_of(index) : index;
    auto at = values.accessor<int64_t, 1>();
    sectors = 0;
    int64_t last = -1;
    for (int64_t i = 0; i < values.size(0); i++) {
      auto sector = int64_t(double(at[i]) * run / kSector);
      sectors += sector != last;
      last = sector;
    }
  }
  return moved / (elements * run) * sectors * kSector;
}

Effort matmul(const Tensor& a, const Tensor& b, double bytes) {
  double batch = a.dim() == 3 ? double(a.size(0)) : 1;
  double m = a.dim() == 1 ? 1 : double(a.size(-2)), k = double(a.size(-1)), n = b.dim() == 1 ? 1 : double(b.size(-1));
  return product(m, n, k, batch, is_fp32(a), bytes);
}

using Rule = std::function<Effort(const std::string&, const c10::FunctionSchema&, const Args&, const Args&)>;

Rule matmul_of(size_t a, size_t b) {
  return [=](const auto& name, const auto& schema, const Args& args, const Args& outs) {
    return matmul(args[a].toTensor(), args[b].toTensor(), plain_bytes(name, schema, args, outs));
  };
}
// The first tensor of whole numbers behind the first argument.
Tensor first_index(const Args& args) {
  Tensor found;
  for (size_t i = 1; i < args.size() && !found.defined(); i++)
    each_tensor(args[i], [&](const Tensor& t) {
      if (!found.defined() && c10::isIntegralType(t.scalar_type(), true)) found = t;
    });
  return found.defined() ? found : args[0].toTensor();
}

// Reads of the first argument are as many bytes as the result has, in the pieces of its layout.
Rule gather_along(int dim_arg) {
  return [=](const auto&, const auto& schema, const Args& args, const Args& outs) {
    const Tensor& source = args[0].toTensor();
    double out = 0, index = 0;
    for (const auto& o : outs) out += size_of(o);
    for (size_t i = 1; i < args.size(); i++)
      if (!schema.arguments()[i].is_out()) index += size_of(args[i]);
    int64_t dim = dim_arg < 0 ? 0 : args[size_t(dim_arg)].toInt();
    return Effort{.bytes = out + index + gathered(source, dim, out, first_index(args))};
  };
}
// The part of `self` that `src` changes is read (where the operator adds) and written.
Rule scatter_into(size_t src_arg, int dim_arg, bool adds) {
  return [=](const auto&, const auto& schema, const Args& args, const Args& outs) {
    const Tensor& target = args[0].toTensor();
    double moved = 0, read = 0;
    if (src_arg < args.size() && args[src_arg].isTensor()) moved = size_of(args[src_arg]);
    for (size_t i = 1; i < args.size(); i++)
      if (!schema.arguments()[i].is_out()) read += size_of(args[i]);  // in place comes as `out=` itself
    if (src_arg >= args.size() || !args[src_arg].isTensor()) {  // a number: as many elements as the index has
      double elements = 0;
      for (size_t i = 1; i < args.size(); i++)
        each_tensor(args[i], [&](const Tensor& t) { elements = std::max(elements, double(t.numel())); });
      moved = elements * double(target.element_size());
    }
    int64_t dim = dim_arg < 0 ? 0 : args[size_t(dim_arg)].toInt();
    double whole = schema.returns().size() && !schema.returns()[0].alias_info() ? 2 * size_of(outs[0]) : 0;
    return Effort{.bytes = whole + read + gathered(target, dim, moved, first_index(args)) * (adds ? 2 : 1)};
  };
}
Rule passes(double times) {
  return [=](const auto& name, const auto& schema, const Args& args, const Args& outs) {
    return Effort{.bytes = times * plain_bytes(name, schema, args, outs)};
  };
}

// By name; an operator in place has the rule of the one that it is named after.
const std::unordered_map<std::string, Rule>& rules() {
  static const auto* all = new std::unordered_map<std::string, Rule>{
      {"mm", matmul_of(0, 1)},
      {"bmm", matmul_of(0, 1)},
      {"mv", matmul_of(0, 1)},
      {"addmm", matmul_of(1, 2)},
      {"addmv", matmul_of(1, 2)},
      {"baddbmm", matmul_of(1, 2)},
      {"addbmm", matmul_of(1, 2)},
      {"index_select", gather_along(1)},
      {"gather", gather_along(1)},
      {"index", gather_along(-1)},
      {"take", gather_along(-1)},
      {"embedding", gather_along(-1)},
      {"index_add", scatter_into(3, 1, true)},
      {"index_copy", scatter_into(3, 1, false)},
      {"index_fill", scatter_into(3, 1, false)},
      {"index_put", scatter_into(2, -1, false)},
      {"_index_put_impl", scatter_into(2, -1, false)},
      {"scatter", scatter_into(3, 1, false)},
      {"scatter_add", scatter_into(3, 1, true)},
      {"embedding_dense_backward",
       [](const auto&, const auto&, const Args& args, const Args& outs) {
         // Zeros everywhere, then sums of rows.
         return Effort{.bytes = 3 * size_of(args[0]) + size_of(args[1]) + size_of(outs[0])};
       }},
      {"_embedding_bag",
       [](const auto&, const auto&, const Args& args, const Args& outs) {
         const Tensor& weight = args[0].toTensor();
         double row = double(weight.size(1)) * double(weight.element_size());
         return Effort{.bytes = double(args[1].toTensor().numel()) * row + size_of(args[1]) + size_of(outs[0])};
       }},
      {"nll_loss_forward",
       [](const auto&, const auto&, const Args& args, const Args&) {
         return Effort{.bytes = double(args[1].toTensor().numel()) * (kSector + 8)};
       }},
      {"nll_loss_backward",
       [](const auto&, const auto&, const Args&, const Args& outs) { return Effort{.bytes = 2 * size_of(outs[0])}; }},
      {"_embedding_bag_forward_only",
       [](const auto&, const auto&, const Args& args, const Args& outs) {
         return Effort{.bytes = size_of(args[1]) + 2 * size_of(outs[0])};
       }},
      {"sort", passes(4)},  // radix passes over keys and positions
      {"topk", passes(3)},
  };
  return *all;
}
}  // namespace

double touched(const Tensor& t) {
  double n = double(t.element_size());
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.stride(d) != 0 || t.size(d) == 0) n *= double(t.size(d));
  return n;
}

Effort product(double m, double n, double k, double batch, bool fp32, double bytes) {
  return {.bytes = bytes, .flops = 2 * batch * m * n * k, .shortest = int64_t(std::min({m, n, k})), .fp32 = fp32};
}

Effort effort_of(const std::string& name, const c10::FunctionSchema& schema, const Args& args, const Args& outs) {
  auto found = rules().find(name);
  if (found == rules().end() && name.size() > 1 && name.back() == '_')
    found = rules().find(name.substr(0, name.size() - 1));
  if (found != rules().end()) return found->second(name, schema, args, outs);
  return {.bytes = plain_bytes(name, schema, args, outs)};
}

double seconds_of(const Effort& w) {
  double filled = double(w.shortest) / (double(w.shortest) + rates.matmul_half_size);
  double rate = w.fp32 ? rates.fp32_flops : rates.matmul_flops * filled;
  double arithmetic = w.flops > 0 ? w.flops / rate : 0;
  return rates.kernel + std::max({arithmetic, w.bytes / rates.bytes, w.cache_bytes / rates.cache_bytes});
}

}  // namespace emulated
