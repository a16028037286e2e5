// A device without hardware: tensors of torch's PrivateUse1 key whose memory is the host's, and
// whose ops run on the CPU.
//
// It is as particular about devices as a GPU: a tensor of it is no CPU tensor, has no numpy(), and
// does not mix with one in an op. A fault of that kind therefore shows on a machine without a GPU.
// It says nothing about kernels.
//
// Each op comes to `on_cpu`, whatever its schema. Its tensors become CPU tensors over the same
// memory, one CPU storage for each of the device's; the op runs; what it returns, and what it did
// to its arguments, is carried back. An argument becomes the tensor that it stands for, with the
// sizes and the storage that it has now; a view of an argument's memory a tensor over that storage;
// fresh memory a storage of the device, which keeps the CPU's alive.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/copy.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::IValue;
using at::Storage;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using Stack = torch::jit::Stack;

const Device kDevice(DeviceType::PrivateUse1, 0);

bool ours(const Tensor& x) {
  return x.defined() && x.device().type() == DeviceType::PrivateUse1;
}

// ---- memory, the current device, random numbers

struct Allocator final : c10::Allocator {
  at::DataPtr allocate(size_t n) override {
    void* data = n ? std::aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    if (n && !data) throw std::bad_alloc();
    return {data, data, &std::free, kDevice};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};

Allocator allocator;

// Autograd's engine gives the device a thread, as it does a GPU.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(kDevice); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

// The CPU's generator under this device's name: the same numbers.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator cpu)
      : GeneratorImpl(kDevice, DispatchKeySet(DispatchKey::PrivateUse1)), cpu(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override { return new Generator(cpu.clone()); }

  at::Generator cpu;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator shared =
        at::make_generator<Generator>(at::detail::getDefaultCPUGenerator());
    return shared;
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<Generator>(at::detail::createCPUGenerator());
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t size) const override {
    at::DataPtr data = allocator.allocate(size);
    const size_t kept = std::min(size, storage.nbytes());
    if (kept) allocator.copy_data(data.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};

// ---- an op, on the CPU

// Memory of `keep`, under another device's name.
at::DataPtr borrow(Storage keep, Device device) {
  void* data = keep.mutable_data();
  auto* context = new Storage(std::move(keep));
  return {data, context, [](void* p) { delete static_cast<Storage*>(p); }, device};
}

class Call {
 public:
  explicit Call(std::string op) : op_(std::move(op)) {}

  Storage to_cpu(const Storage& ours) {
    for (const Pair& pair : storages_) {
      if (pair.ours.is_alias_of(ours)) return pair.cpu;
    }
    Storage cpu(Storage::use_byte_size_t(), ours.nbytes(), borrow(ours, c10::kCPU),
                c10::GetAllocator(c10::kCPU), /*resizable=*/true);
    storages_.push_back({ours, cpu, cpu.data()});
    return cpu;
  }

  Tensor to_cpu(const Tensor& x) {
    if (!ours(x)) return x;
    TORCH_CHECK_NOT_IMPLEMENTED(x.layout() == c10::kStrided, op_, ": only strided tensors live on ",
                                kDevice);
    for (const auto& [mine, cpu] : tensors_) {
      if (mine.is_same(x)) return cpu;
    }
    TORCH_CHECK(!x.numel() || x.storage().data() || op_.find("resize_") != std::string::npos, op_,
                ": the memory of an argument is gone");
    Tensor cpu = over(to_cpu(x.storage()), DispatchKeySet(DispatchKey::CPU), x);
    tensors_.emplace_back(x, cpu);
    return cpu;
  }

  Tensor to_ours(const Tensor& x) {
    if (!x.defined() || ours(x)) return x;
    for (const auto& [mine, cpu] : tensors_) {
      if (cpu.is_same(x)) return mine;
    }
    const Storage storage = to_ours(x.storage());
    for (const auto& [mine, cpu] : tensors_) {
      if (mine.storage().is_alias_of(storage)) return view(mine, x);
    }
    return over(storage, DispatchKeySet(DispatchKey::PrivateUse1), x);
  }

  // What the op did to its arguments: sizes, strides, another storage, a storage that has grown.
  void carry_back() {
    for (Pair& pair : storages_) {
      if (pair.cpu.data() == pair.data && pair.cpu.nbytes() == pair.ours.nbytes()) continue;
      if (pair.cpu.data() != pair.data) pair.ours.set_data_ptr_noswap(borrow(pair.cpu, kDevice));
      pair.ours.set_nbytes(pair.cpu.nbytes());
    }
    for (const auto& [mine, cpu] : tensors_) {
      Storage now = to_ours(cpu.storage());
      if (!mine.storage().is_alias_of(now)) mine.unsafeGetTensorImpl()->set_storage_keep_dtype(now);
      describe(mine, cpu);
    }
  }

 private:
  struct Pair {
    Storage ours, cpu;
    const void* data;  // where it was before the op
  };

  Storage to_ours(const Storage& cpu) {
    for (const Pair& pair : storages_) {
      if (pair.cpu.is_alias_of(cpu)) return pair.ours;
    }
    Storage fresh(Storage::use_byte_size_t(), cpu.nbytes(), borrow(cpu, kDevice), &allocator,
                  /*resizable=*/true);
    storages_.push_back({fresh, cpu, cpu.data()});
    return fresh;
  }

  static void describe(const Tensor& to, const Tensor& from) {
    auto* impl = to.unsafeGetTensorImpl();
    if (to.sizes() == from.sizes() && to.strides() == from.strides() &&
        to.storage_offset() == from.storage_offset()) {
      return;
    }
    impl->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  }

  // A view of an ordinary tensor is one in inference mode, too: its keys are the tensor's.
  static Tensor view(const Tensor& of, const Tensor& like) {
    const DispatchKeySet keys =
        of.key_set() - DispatchKeySet({DispatchKey::Conjugate, DispatchKey::Negative});
    return described(at::detail::make_tensor<c10::TensorImpl>(
                         c10::TensorImpl::VIEW, Storage(of.storage()), keys, like.dtype()),
                     like);
  }

  // `like`'s sizes and type over `storage`.
  static Tensor over(Storage storage, DispatchKeySet keys, const Tensor& like) {
    return described(
        at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype()), like);
  }

  static Tensor described(Tensor x, const Tensor& like) {
    x.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                   like.storage_offset());
    x._set_conj(like.is_conj());
    x._set_neg(like.is_neg());
    return x;
  }

  std::string op_;
  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<Pair> storages_;
};

// f of every tensor in `value`, of which there may be lists.
template <typename F>
IValue each_tensor(const IValue& value, F&& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& x : value.toTensorVector()) out.push_back(f(x));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& x : value.toOptionalTensorVector()) {
      out.push_back(x ? std::optional<Tensor>(f(*x)) : std::nullopt);
    }
    return out;
  }
  return value;
}

// As on a GPU: CPU tensors do not mix with the device's, except numbers (0-dim) that are read, and
// indices.
void check_devices(const c10::OperatorHandle& op, const Stack& stack, size_t begin) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const bool takes_cpu_indices = name.find("aten::index") == 0 || name == "aten::_unsafe_index" ||
                                 name.find("aten::_index_put") == 0;
  const bool takes_numbers = name != "aten::cat" && name != "aten::stack";
  bool any_ours = false;
  for (size_t i = begin; i < stack.size(); ++i) {
    each_tensor(stack[i], [&](const Tensor& x) { return any_ours |= ours(x), x; });
  }
  for (size_t i = begin; any_ours && i < stack.size(); ++i) {
    const auto& argument = schema.arguments()[i - begin];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (takes_cpu_indices && stack[i].isOptionalTensorList()) continue;
    each_tensor(stack[i], [&](const Tensor& x) {
      const bool number = x.defined() && x.dim() == 0 && takes_numbers && !written;
      TORCH_CHECK(!x.defined() || ours(x) || number,
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  kDevice, " and ", x.device(), "! (argument ", argument.name(), " of ", name, ")");
      return x;
    });
  }
}

void run_on_cpu(const c10::OperatorHandle& op, Stack& stack, size_t begin) {
  check_devices(op, stack, begin);
  Call call(op.schema().name());
  for (size_t i = begin; i < stack.size(); ++i) {
    IValue& value = stack[i];
    if (value.isDevice()) {
      if (value.toDevice().type() == DeviceType::PrivateUse1) value = Device(c10::kCPU);
    } else if (value.isGenerator()) {
      auto* generator = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(generator, "Expected a '", kDevice.str(),
                  "' device type for generator but found '", value.toGenerator().device(), "'");
      value = generator->cpu;
    } else if (value.isStorage()) {
      Storage storage = value.toStorage();
      TORCH_CHECK(storage.device_type() == DeviceType::PrivateUse1, op.schema().name(),
                  ": expected a storage on ", kDevice, ", got one on ", storage.device());
      value = call.to_cpu(storage);
    } else {
      value = each_tensor(value, [&](const Tensor& x) { return call.to_cpu(x); });
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(&stack);
  }
  call.carry_back();
  for (size_t i = begin; i < stack.size(); ++i) {
    stack[i] = each_tensor(stack[i], [&](const Tensor& x) { return call.to_ours(x); });
  }
}

void on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  run_on_cpu(op, *stack, stack->size() - op.schema().arguments().size());
}

// ---- what cannot come that way

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           DispatchKeySet(DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The tensors of forward-mode derivatives that are known to be zero: of the CPU they have no
// memory.
Tensor zeros(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::zeros(size, at::TensorOptions(kDevice).dtype(dtype));
}

// Between the devices, or within this one.
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Call call("copy");
  Tensor target = call.to_cpu(to);
  target.copy_(call.to_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

// module.to(device) changes a parameter's device in place.
bool may_become(const Tensor& x, const Tensor& other) {
  return x.layout() == c10::kStrided && other.layout() == c10::kStrided;
}

// The same arguments as aten::convolution's.
void convolution(const c10::OperatorHandle&, Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  on_cpu(op, stack);
}

// aten::convolution_backward has one argument more: the bias's sizes, fourth.
void convolution_backward(const c10::OperatorHandle& from, Stack* stack) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  const size_t begin = stack->size() - from.schema().arguments().size();
  const Tensor& grad = (*stack)[begin].toTensor();
  stack->insert(stack->begin() + begin + 3, IValue(std::vector<int64_t>{grad.size(1)}));
  run_on_cpu(op, *stack, begin);
}

// torch has these on a GPU alone, and asks every device but the CPU for them. The workspace is what
// backward needs.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& hx,
                                    const std::optional<Tensor>& input_bias,
                                    const std::optional<Tensor>& hidden_bias) {
  const auto i = (input_bias && input_bias->defined() ? input + *input_bias : input).chunk(3, 1);
  const auto h =
      (hidden_bias && hidden_bias->defined() ? hidden + *hidden_bias : hidden).chunk(3, 1);
  const Tensor r = (i[0] + h[0]).sigmoid(), z = (i[1] + h[1]).sigmoid(),
               n = (i[2] + r * h[2]).tanh();
  return {(hx - n) * z + n, at::cat({r, z, n, hx, h[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& g,
                                                                     const Tensor& workspace,
                                                                     bool has_bias) {
  const auto w = workspace.chunk(5, 1);
  const Tensor &r = w[0], &z = w[1], &n = w[2], &hx = w[3], &hn = w[4];
  const Tensor gn = g * (1 - z) * (1 - n * n), gz = g * (hx - n) * z * (1 - z),
               gr = gn * hn * r * (1 - r);
  const Tensor gi = at::cat({gr, gz, gn}, 1), gh = at::cat({gr, gz, gn * r}, 1);
  return {gi, gh, g * z, has_bias ? gi.sum(0) : Tensor(), has_bias ? gh.sum(0) : Tensor()};
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

const bool registered = [] {
  static Hooks hooks;
  c10::SetAllocator(DeviceType::PrivateUse1, &allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_efficientzerotensor", &zeros);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_has_compatible_shallow_copy_type", &may_become);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable",
         torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

// A copy takes the conjugate or the negative itself: torch's way of resolving them first is a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// As CUDA's: products and convolutions in 16 bits, what sums in float32.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WIDER_UNLESS_ASKED(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(WIDER)
  AT_FORALL_FP32_SET_OPT_DTYPE(WIDER_UNLESS_ASKED)
}

}  // namespace
