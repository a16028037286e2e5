// What power_iteration_cuda.cu (the plan) and power_iteration_stream_cuda.cu share on the host
// side.
#pragma once

#include <utility>
#include <vector>

#include "power_iteration_team.cuh"

namespace specnorm {
namespace cuda {

struct List {
  std::vector<device::DeviceItem> items;
};

// Sets item.blocks, into how many tiles of stored rows each matrix is cut, and which dimension
// those rows are.
template <class S>
cudaError_t cut_stream(List* list, const device::DeviceInfo& info);

// All iterations of a list that was cut, and laid out in the workspace with one record a tile.
template <class S>
CudaStatus run_stream(const PowerIterationParams& p, const CudaCall& call,
                      const device::DeviceInfo& info, const List& list, char* workspace);

}  // namespace cuda
}  // namespace specnorm
