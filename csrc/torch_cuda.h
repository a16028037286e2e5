// torch's side of a CUDA launch: device guard, current stream, workspace, and launch errors as
// exceptions.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>

#include "checks.h"
#include "launch_error.h"

// Only CUDA builds of torch have it: weak and tested, so that this module imports on a CPU-only
// one.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace specnorm {

// SPECNORM_EXT_CUDA_STRATEGY forces a strategy of power_iteration_, for tests and benchmarks.
inline Strategy strategy_of_environment(const char* op) {
  const char* name = std::getenv("SPECNORM_EXT_CUDA_STRATEGY");
  if (name == nullptr || *name == '\0') return Strategy::kAuto;
  const char* names[] = {"auto", "block", "cluster", "resident", "stream"};
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(name, names[i]) == 0) return Strategy(i);
  fail("ValueError", op,
       ": expected SPECNORM_EXT_CUDA_STRATEGY to be auto, block, cluster, resident or stream, got ",
       name);
}

// One call on the device of `like`, which outlives it.
class TorchCudaCall {
 public:
  TorchCudaCall(const char* op, const Tensor& like, const Operand& first)
      : op_(op), like_(like), first_(first), guard_(first.device_index) {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      fail("RuntimeError", op,
           ": expected a torch with CUDA, got a CPU-only build; install a CUDA build of torch");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.device_index, &stream));
    call_ = {first.device_index, stream, &TorchCudaCall::workspace, this,
             strategy_of_environment(op)};
  }
  TorchCudaCall(const TorchCudaCall&) = delete;
  TorchCudaCall& operator=(const TorchCudaCall&) = delete;

  const CudaCall& call() const { return call_; }

  void check(CudaStatus status, size_t count) const {
    if (status.code == 0) return;
    if (status.code == kNoWorkspace) status.cause = refusal_.c_str();
    fail("RuntimeError", launch_error(op_, int64_t(count), dtype_name(first_.dtype),
                                      shape_text(first_), first_.device_index, status));
  }

 private:
  // From torch's allocator: freed when this call ends, reused by what is queued on the stream after
  // it. What it says when it has none goes into this op's own message, since torch's names neither
  // the op nor, up to 2.12, the cause.
  static void* workspace(void* self, int64_t bytes) {
    auto* call = static_cast<TorchCudaCall*>(self);
    try {
      call->memory_ = torch::stable::new_empty(call->like_, {bytes}, ScalarType::Byte);
    } catch (const std::exception& error) {
      call->refusal_ = error.what();
      return nullptr;
    }
    return call->memory_->data_ptr();
  }

  const char* op_;
  const Tensor& like_;
  const Operand& first_;
  torch::stable::accelerator::DeviceGuard guard_;
  std::optional<Tensor> memory_;
  std::string refusal_;
  CudaCall call_;
};

}  // namespace specnorm
