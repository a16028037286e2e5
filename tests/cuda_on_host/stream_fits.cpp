// What the launcher of the streaming pass asks of a multiprocessor, for test_cuda_build.py, which
// adds the registers that ptxas reports. On stdin devices and row lengths:
//   name major shared_per_block shared_per_multiprocessor reserved widest length
// and on stdout, for each, each dtype and several numbers of columns, the kernel that the row takes
// and its launch: threads, rows of all groups of a block, buffers, cluster, bytes of shared memory,
// packs of a in them, blocks a multiprocessor.
#include <iostream>
#include <string>

#include "power_iteration_stream_cuts.cuh"

using namespace specnorm;
using namespace specnorm::cuda;

DeviceItem rows_of(int64_t length, int columns) {
  DeviceItem item{};
  item.weight = {nullptr, 4096, length, length, 1};
  item.columns = columns;
  return item;
}

const char* text(bool x) {
  return x ? "true" : "false";
}

template <class S>
void tell(const char* dtype, const std::string& name, const StreamDevice& on, int64_t length,
          int columns) {
  std::cout << dtype << " " << name << " " << length << " " << columns << " ";
  const int way = way_of<S>(rows_of(length, columns), on);
  if (way < kFew1) {
    const Fit fit = fit_of<S>(way, length, on);
    by_cut<S>(way, [&](auto cut, int cluster) {
      using T = typename decltype(cut)::type;
      std::cout << "stream_pass_rows<" << dtype << ", Cut<" << T::threads << ", " << T::packs
                << ", " << T::rows << ", " << T::kept << ", " << T::buffers << ", " << T::blocks
                << ", " << text(T::divided) << ", " << text(T::whole) << ">> " << T::threads << " "
                << T::rows << " " << T::buffers << " " << cluster << " " << fit.shared << " "
                << fit.near << " " << fit.live << "\n";
    });
  } else if (way < kWarp1) {
    const Fit fit = fit_of_columns<S>(way, length, columns, on);
    by_columns_cut<S>(way, [&](auto cut, int cluster) {
      using T = typename decltype(cut)::type;
      std::cout << "stream_pass_rows_columns<" << dtype << ", ColumnsCut<" << dtype << ", "
                << T::most_columns << ", " << text(T::whole) << ", " << text(T::half) << ">> "
                << T::threads << " " << T::rows << " 2 " << cluster << " " << fit.shared << " 0 "
                << fit.live << "\n";
    });
  } else if (way < kWarpFew1) {
    by_warp_cut<S>(way, [&](auto cut) {
      using T = typename decltype(cut)::type;
      std::cout << "stream_pass_warp_rows<" << dtype << ", WarpCut<" << dtype << ", "
                << text(T::whole) << ", " << T::level << ">> " << T::threads << " "
                << T::rows * T::threads / 32 << " 2 1 " << warp_rows_shared<S, T>() << " 0 2\n";
    });
  } else if (way < kAny) {
    by_warp_columns_cut<S>(way, [&](auto cut) {
      using T = typename decltype(cut)::type;
      std::cout << "stream_pass_warp_columns<" << dtype << ", WarpColumnsCut<" << dtype << ", "
                << T::most_columns << ", " << text(T::whole) << ", " << T::level << ">> "
                << T::threads << " " << T::rows * T::threads / 32 << " 2 1 "
                << warp_columns_shared<S, T>(columns) << " 0 2\n";
    });
  } else {
    std::cout << "none\n";
  }
}

int main() {
  std::string name;
  StreamDevice on{};
  int64_t length;
  while (std::cin >> name >> on.info.major >> on.info.shared_per_block >>
         on.info.shared_per_multiprocessor >> on.info.shared_reserved >> on.widest >> length) {
    for (int columns : {1, 2, 4, 5, 8}) {
      tell<float>("float", name, on, length, columns);
      tell<double>("double", name, on, length, columns);
      tell<device::bf16>("bf16", name, on, length, columns);
      tell<device::f16>("f16", name, on, length, columns);
    }
  }
}
