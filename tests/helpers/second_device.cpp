// A device with memory of its own, as PyTorch sees it; its memory is the host's, so that the CPU's
// kernels run on it without a copy.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::DispatchKeySet;
using c10::IValue;
using std::optional;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
const c10::Device HERE(KIND, 0);

// -- counts ---------------------------------------------------------------------------------------

std::atomic<int64_t> launches{0}, waits{0}, uploads{0};
pybind11::object* heard = nullptr;  // Python's function that hears of each wait and upload

void note(std::atomic<int64_t>& count, const std::string& name) {
  count++;
  if (heard != nullptr) {
    pybind11::gil_scoped_acquire held;
    (*heard)(name);
  }
}

const std::set<std::string> WAITING{
    "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::multinomial",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount"};
const std::string STORE = "aten::_index_put_impl_";  // of a mask it needs the length
const std::set<std::string> INDEXING{"aten::index", STORE};

// -- memory ---------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

// The same tensor as seen by another device: over the same bytes, which it keeps alive.
Tensor seen_by(const Tensor& tensor, c10::Device device, DispatchKeySet keys, c10::Allocator* by) {
  auto* kept = new c10::Storage(tensor.storage());
  auto forget = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr data(kept->mutable_data(), kept, forget, device);
  c10::Storage storage({}, kept->nbytes(), std::move(data), by, /*resizable=*/true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device() != HERE) return tensor;
  return seen_by(tensor, at::kCPU, DispatchKeySet(c10::DispatchKey::CPU), c10::GetCPUAllocator());
}

Tensor on_device(const Tensor& tensor) {
  return tensor.defined() ? seen_by(tensor, HERE, DispatchKeySet(KEY), &memory) : tensor;
}

// One stream, in which everything is done at once: gradients are handed on by events.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  c10::Stream getStream(c10::Device) const noexcept override { return ONLY; }
  c10::Stream getDefaultStream(c10::Device) const override { return ONLY; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return ONLY; }

  const c10::Stream ONLY{c10::Stream::DEFAULT, c10::Device(KIND, 0)};
};

// -- random numbers -------------------------------------------------------------------------------

// The CPU's generator, which the CPU's kernels take while `lend` is in force.
struct Draws final : at::CPUGeneratorImpl {
  explicit Draws(uint64_t seed) : CPUGeneratorImpl(seed) { device_ = HERE; }
  void lend(bool yes) { device_ = yes ? c10::Device(at::kCPU) : HERE; }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Draws>(c10::detail::getNonDeterministicRandom());
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto kept = getNewGenerator(0);
    return kept;
  }
};
Hooks hooks;

// -- operators ------------------------------------------------------------------------------------

// What a boxed call takes and returns, one operator's arguments at a time.
struct Moved {
  std::vector<std::pair<Tensor, Tensor>> lent;  // of the device, and as the CPU sees it
  std::vector<Tensor> strangers;                // of the CPU
  std::vector<at::Generator> draws;
  bool masks = false;  // whether an index is a mask, whose length the host must know

  Tensor in(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device() != HERE) {
      if (tensor.dim() > 0) strangers.push_back(tensor);
      return tensor;
    }
    lent.emplace_back(tensor, on_cpu(tensor));
    return lent.back().second;
  }

  IValue in(const IValue& given) {
    if (given.isTensor()) return in(given.toTensor());
    if (given.isDevice()) return c10::Device(at::kCPU);
    if (given.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : given.toTensorVector()) made.push_back(in(each));
      return made;
    }
    if (given.isOptionalTensorList()) {
      c10::List<optional<Tensor>> made;
      for (const optional<Tensor>& each : given.toOptionalTensorVector()) {
        made.push_back(each ? optional<Tensor>(in(*each)) : each);
        masks |= each && each->scalar_type() == at::kBool;
      }
      return made;
    }
    if (given.isGenerator() && given.toGenerator().device() == HERE) {
      draws.push_back(given.toGenerator());
      draws.back().get<Draws>()->lend(true);
    }
    return given;
  }

  Tensor out(const Tensor& tensor) {
    for (const auto& [own, seen] : lent) {
      if (tensor.is_same(seen)) return own;
    }
    return on_device(tensor);
  }

  // Outputs that the CPU's kernel resized lie elsewhere now.
  void settle() {
    for (auto& [own, seen] : lent) {
      if (own.sizes() == seen.sizes() && own.strides() == seen.strides()) continue;
      auto* to = own.unsafeGetTensorImpl();
      to->set_storage_keep_dtype(on_device(seen).storage());
      to->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
    }
  }
  ~Moved() {
    for (auto& each : draws) each.get<Draws>()->lend(false);
  }
};

void by_the_cpu(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  Moved moved;
  for (size_t at = stack->size() - schema.arguments().size(); at < stack->size(); at++) {
    (*stack)[at] = moved.in((*stack)[at]);
  }
  if (!moved.lent.empty() && !moved.strangers.empty() && !INDEXING.count(name)) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two ",
                "devices, ", HERE, " and cpu! (when ", name, " was called)");
  }
  launches++;
  if (WAITING.count(name) || (moved.masks && name == STORE)) note(waits, name);
  op.redispatchBoxed(DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t at = stack->size() - schema.returns().size(); at < stack->size(); at++) {
    IValue& made = (*stack)[at];
    if (made.isTensor()) {
      made = moved.out(made.toTensor());
    } else if (made.isTensorList()) {
      c10::List<Tensor> outputs;
      for (const Tensor& each : made.toTensorVector()) outputs.push_back(moved.out(each));
      made = outputs;
    }
  }
  moved.settle();
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>,
             optional<at::Device>, optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, DispatchKeySet(KEY), c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> type,
                     optional<at::Layout>, optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, DispatchKeySet(KEY), c10::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool later) {
  if (from.device() == HERE && to.device() == HERE) launches++;
  else if (from.device() != HERE) note(uploads, "upload");
  else if (!later) note(waits, "copy");
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Scalar item(const Tensor& tensor) {
  note(waits, "item");
  return at::_local_scalar_dense(on_cpu(tensor));
}

Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef more, int64_t groups) {
  launches++;
  TORCH_CHECK(input.device() == weight.device(), "Input type (", input.toString(),
              ") and weight type (", weight.toString(), ") should be the same");
  auto plus = bias ? optional<Tensor>(on_cpu(*bias)) : bias;
  return on_device(at::convolution(on_cpu(input), on_cpu(weight), plus, stride, padding, dilation,
                                   transposed, more, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups,
    std::array<bool, 3> wanted) {
  launches++;
  auto [one, two, three] = at::convolution_backward(
      on_cpu(grad), on_cpu(input), on_cpu(weight), IntArrayRef({weight.size(0)}), stride, padding,
      dilation, transposed, more, groups, wanted);
  return {on_device(one), on_device(two), on_device(three)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // Views, and what changes a tensor's own size, are the same for every device.
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("counts", [] { return std::make_tuple(launches.load(), waits.load(), uploads.load()); });
  m.def("hear", [](pybind11::object each) {
    delete heard;
    heard = each.is_none() ? nullptr : new pybind11::object(each);
  });
}
