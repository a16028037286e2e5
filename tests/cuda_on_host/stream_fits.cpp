// What the launcher of the streaming pass asks of a multiprocessor, for test_cuda_build.py, which
// adds the registers that ptxas reports. On stdin devices and row lengths:
//   name major shared_per_block shared_per_multiprocessor reserved widest length
// and on stdout, for each and each dtype, the row's way and its launch, of one column and of
// several.
#include <iostream>
#include <string>

#include "power_iteration_stream_cuts.cuh"

using namespace specnorm;
using namespace specnorm::cuda;

template <class S>
void tell(const char* dtype, const std::string& name, const StreamDevice& on, int64_t length) {
  DeviceItem item{};
  item.weight = {nullptr, 4096, length, length, 1};
  item.columns = 1;
  const int way = way_of<S>(item, on);
  if (way >= kFew1) {
    std::cout << dtype << " " << name << " " << length << " none\n";
    return;
  }
  const Fit fit = fit_of<S>(way, length, on);
  by_cut<S>(way, [&](auto cut, int cluster) {
    using T = typename decltype(cut)::type;
    std::cout << dtype << " " << name << " " << length << " Cut<" << T::threads << ", " << T::packs
              << ", " << T::rows << ", " << T::kept << ", " << T::buffers << ", " << T::blocks
              << ", " << (T::divided ? "true" : "false") << "> " << T::threads << " " << T::rows
              << " " << T::buffers << " " << cluster << " " << fit.shared << " " << fit.near << " "
              << fit.live << "\n";
  });
}

// Of several columns: the template's most columns, cluster, shared memory and blocks.
template <class S>
void tell_columns(const char* dtype, const std::string& name, const StreamDevice& on,
                  int64_t length) {
  for (int columns : {2, 4, 5, 8}) {
    DeviceItem item{};
    item.weight = {nullptr, 4096, length, length, 1};
    item.columns = columns;
    const int way = way_of<S>(item, on);
    std::cout << "columns " << dtype << " " << name << " " << length << " " << columns;
    if (way >= kFew1 && way < kAny) {
      const Fit fit = fit_of_columns<S>(way, length, columns, on);
      std::cout << " " << (way < kMany1 ? 4 : 8) << " " << cluster_of_columns(way) << " "
                << fit.shared << " " << fit.live;
    }
    std::cout << "\n";
  }
}

int main() {
  std::string name;
  StreamDevice on{};
  int64_t length;
  while (std::cin >> name >> on.info.major >> on.info.shared_per_block >>
         on.info.shared_per_multiprocessor >> on.info.shared_reserved >> on.widest >> length) {
    tell<float>("float", name, on, length);
    tell<double>("double", name, on, length);
    tell<device::bf16>("bf16", name, on, length);
    tell<device::f16>("f16", name, on, length);
    tell_columns<float>("float", name, on, length);
    tell_columns<double>("double", name, on, length);
    tell_columns<device::bf16>("bf16", name, on, length);
    tell_columns<device::f16>("f16", name, on, length);
  }
}
