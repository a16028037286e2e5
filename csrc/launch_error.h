// The message of a CUDA launch that failed, torch-free so that it is tested without a device.
#pragma once

#include <sstream>
#include <string>

#include "cuda_call.h"

namespace specnorm {

// `count` weights of that dtype, the first of that shape.
inline std::string launch_error(const char* op, int64_t count, const char* dtype,
                                const std::string& shape, int device, const CudaStatus& status) {
  std::ostringstream text;
  text << op << ": expected to ";
  if (status.code == kNoWorkspace)
    text << "allocate a workspace of " << status.bytes << " bytes";
  else
    text << "launch the " << status.kernel;
  if (count == 1)
    text << " for a weight of " << dtype << " of shape " << shape;
  else
    text << " for " << count << " weights of " << dtype << ", the first of shape " << shape;
  text << ", on cuda:" << device << ", got ";
  if (status.code == kNoWorkspace)
    text << "no memory: " << status.cause
         << "; pass fewer weights a call, or free memory of the device";
  else
    text << "CUDA error " << status.code << ": " << status.cause;
  return text.str();
}

}  // namespace specnorm
