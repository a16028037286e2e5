// csrc/cublas_lt_abi.h against NVIDIA's own header: compiled, not run.
#include <cublasLt.h>

#include <type_traits>

#include "cublas_lt_abi.h"

using namespace specnorm::cublas_lt;

static_assert(kOpN == CUBLAS_OP_N && kOpT == CUBLAS_OP_T, "cublasOperation_t");
static_assert(kReal32 == CUDA_R_32F && kReal64 == CUDA_R_64F && kReal16 == CUDA_R_16F &&
                  kRealB16 == CUDA_R_16BF,
              "cudaDataType_t");
static_assert(kCompute32 == CUBLAS_COMPUTE_32F && kCompute64 == CUBLAS_COMPUTE_64F &&
                  kComputeTf32 == CUBLAS_COMPUTE_32F_FAST_TF32,
              "cublasComputeType_t");
static_assert(kPointersOnDevice == CUBLASLT_POINTER_MODE_DEVICE, "cublasLtPointerMode_t");
static_assert(kEpilogueDefault == CUBLASLT_EPILOGUE_DEFAULT &&
                  kEpilogueBias == CUBLASLT_EPILOGUE_BIAS,
              "cublasLtEpilogue_t");
static_assert(kReduceInComputeType == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
              "cublasLtReductionScheme_t");
static_assert(kDescPointerMode == CUBLASLT_MATMUL_DESC_POINTER_MODE &&
                  kDescTransA == CUBLASLT_MATMUL_DESC_TRANSA &&
                  kDescTransB == CUBLASLT_MATMUL_DESC_TRANSB &&
                  kDescEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE &&
                  kDescBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER,
              "cublasLtMatmulDescAttributes_t");
static_assert(kPrefMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
                  kPrefReductionSchemes == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK &&
                  kPrefAlignA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
                  kPrefAlignB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES &&
                  kPrefAlignC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES &&
                  kPrefAlignD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
              "cublasLtMatmulPreferenceAttributes_t");
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t), "cublasLtMatmulAlgo_t");
static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t) &&
                  offsetof(Heuristic, workspace) ==
                      offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
                  offsetof(Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state),
              "cublasLtMatmulHeuristicResult_t");
static_assert(sizeof(cublasOperation_t) == 4 && sizeof(cublasLtEpilogue_t) == 4 &&
                  sizeof(cublasLtPointerMode_t) == 4 && sizeof(cublasStatus_t) == sizeof(int),
              "attributes are set with 4 bytes");
