// The streaming passes that keep rows in registers from dot to axpy, and their launch: a warp a
// row, a block or a cluster a row, of one column and of several. A file of its own so that it
// is compiled beside power_iteration_stream_cuda.cu.
#include "power_iteration_stream_cuts.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

// Asked of one kernel: a cluster must find room with two blocks on each multiprocessor.
template <class S>
cudaError_t stream_device(const DeviceInfo& info, StreamDevice* on) {
  using D = typename CutsOf<S, true>::D;
  static int known[kDevices];
  on->info = info;
  return largest_cluster(info, &stream_pass_rows<S, D>, D::threads, info.shared_of_two(), known,
                         &on->widest);
}

template <class S>
cudaError_t launch_rows_pass(int way, StreamParams* p, int64_t grid, int64_t length, int columns,
                             const StreamDevice& on, const CudaCall& call) {
  LaunchConfig c{};
  c.grid = unsigned(grid);
  c.stream = static_cast<cudaStream_t>(call.stream);
  c.cluster = 1;
  c.most_shared = true;
  if (way >= kWarpFew1)
    return by_warp_columns_cut<S>(way, [&](auto cut) {
      using T = typename decltype(cut)::type;
      c.block = unsigned(T::threads);
      c.shared = size_t(warp_columns_shared<S, T>(columns));
      return launch(c, &stream_pass_warp_columns<S, T>, *p);
    });
  if (way >= kWarp1)
    return by_warp_cut<S>(way, [&](auto cut) {
      using T = typename decltype(cut)::type;
      c.block = unsigned(T::threads);
      c.shared = size_t(warp_rows_shared<S, T>());
      return launch(c, &stream_pass_warp_rows<S, T>, *p);
    });
  if (way >= kFew1)
    return by_columns_cut<S>(way, [&](auto cut, int cluster) {
      using T = typename decltype(cut)::type;
      p->cluster = cluster;
      c.block = unsigned(T::threads);
      c.shared = size_t(fit_of_columns<S, T>(length, columns, cluster, on.info).shared);
      c.cluster = unsigned(cluster);
      return launch(c, &stream_pass_rows_columns<S, T>, *p);
    });
  return by_cut<S>(way, [&](auto cut, int cluster) {
    using T = typename decltype(cut)::type;
    const Fit fit = fit_of<S, T>(length, cluster, on.info);
    p->cluster = cluster;
    p->near = fit.near;
    c.block = unsigned(T::threads);
    c.shared = size_t(fit.shared);
    c.cluster = unsigned(cluster);
    return launch(c, &stream_pass_rows<S, T>, *p);
  });
}

#define SPECNORM_ROWS_PASS(S)                                                         \
  template cudaError_t stream_device<S>(const DeviceInfo&, StreamDevice*);            \
  template cudaError_t launch_rows_pass<S>(int, StreamParams*, int64_t, int64_t, int, \
                                           const StreamDevice&, const CudaCall&);
SPECNORM_ROWS_PASS(float)
SPECNORM_ROWS_PASS(double)
SPECNORM_ROWS_PASS(bf16)
SPECNORM_ROWS_PASS(f16)
#undef SPECNORM_ROWS_PASS

}  // namespace cuda
}  // namespace specnorm
