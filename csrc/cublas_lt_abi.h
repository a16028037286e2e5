// What this build uses of cuBLASLt's C interface, in NVIDIA's numbers (cublasLt.h, cublas_api.h and
// library_types.h of CUDA 12 and 13, the same in both). A machine that has nvcc may have no cuBLAS
// headers; tests/test_cublas_lt.py compares these with the real ones where they are installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specnorm {
namespace cublas_lt {

constexpr int32_t kOpN = 0, kOpT = 1;                                    // cublasOperation_t
constexpr int32_t kReal32 = 0, kReal64 = 1, kReal16 = 2, kRealB16 = 14;  // cudaDataType_t
constexpr int32_t kCompute32 = 68, kCompute64 = 70, kComputeTf32 = 77;   // cublasComputeType_t
constexpr int32_t kPointersOnDevice = 1;                                 // ..PointerMode_t
constexpr uint32_t kEpilogueDefault = 1, kEpilogueBias = 4;              // ..Epilogue_t
constexpr uint32_t kReduceInComputeType = 2;                             // ..ReductionScheme_t
constexpr int kDescPointerMode = 2, kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7,
              kDescBiasPointer = 8;  // ..MatmulDescAttributes_t
constexpr int kPrefMaxWorkspace = 1, kPrefReductionSchemes = 3, kPrefAlignA = 5, kPrefAlignB = 6,
              kPrefAlignC = 7, kPrefAlignD = 8;  // ..MatmulPreferenceAttributes_t

struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

using Handle =
    void*;  // and so are descriptors, layouts and preferences: pointers to opaque structs
struct Functions {
  int (*cublasLtCreate)(Handle*);
  int (*cublasLtMatmul)(Handle, void* desc, const void* alpha, const void* a, void* a_layout,
                        const void* b, void* b_layout, const void* beta, const void* c,
                        void* c_layout, void* d, void* d_layout, const Algorithm*, void* workspace,
                        size_t workspace_bytes, void* stream);
  int (*cublasLtMatmulAlgoGetHeuristic)(Handle, void* desc, void* a, void* b, void* c, void* d,
                                        void* preference, int asked, Heuristic*, int* found);
  int (*cublasLtMatmulDescCreate)(void**, int compute_type, int scale_type);
  int (*cublasLtMatmulDescSetAttribute)(void*, int attribute, const void*, size_t);
  int (*cublasLtMatmulDescDestroy)(void*);
  int (*cublasLtMatrixLayoutCreate)(void**, int type, uint64_t rows, uint64_t cols, int64_t ld);
  int (*cublasLtMatrixLayoutDestroy)(void*);
  int (*cublasLtMatmulPreferenceCreate)(void**);
  int (*cublasLtMatmulPreferenceSetAttribute)(void*, int attribute, const void*, size_t);
  int (*cublasLtMatmulPreferenceDestroy)(void*);
};

}  // namespace cublas_lt
}  // namespace specnorm
