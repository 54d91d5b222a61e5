#include "launch.h"

#include <algorithm>
#include <string>

#include "../portability/alignment.h"
#include "../portability/check.h"
#include "../portability/device.h"

namespace extend_attn {
namespace {

constexpr std::int64_t kMaxTokens = 16384;
constexpr std::int64_t kMaxWidth = 8192;
constexpr std::int64_t kMinQWidth = 128;
constexpr std::int64_t kMinKWidth = 64;
constexpr std::int64_t kWidthMultiple = 8;
constexpr std::uint64_t kQkNormBytesPerToken = 8;  // two floats
constexpr int kVectorsPerThread = 2;               // of a token, which decides how many warps share it

const void* as_pointer(std::uint64_t address) { return reinterpret_cast<const void*>(address); }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_width(const char* name, std::int64_t width, std::int64_t least) {
  check_argument(width >= least && width <= kMaxWidth && width % kWidthMultiple == 0, name,
                 "got a width of " + std::to_string(width) + " elements; it must be a multiple of 8 from " +
                     std::to_string(least) + " to " + std::to_string(kMaxWidth));
}

void check_stride(const char* name, std::int64_t stride, std::int64_t width, std::int64_t tokens, DType dtype) {
  if (tokens <= 1) return;
  check_argument(stride >= width, name,
                 "got a row stride of " + std::to_string(stride) + " elements for rows of " + std::to_string(width));
  check_argument(
      stride * element_bytes(dtype) % std::int64_t(kVectorBytes) == 0, name,
      "got a row stride of " + std::to_string(stride * element_bytes(dtype)) + " bytes; it must be a multiple of 16");
}

template <typename Params>
void launch_kernel(const void* kernel, const char* name, const Params& params, LaunchShape shape, bool dependent,
                   cudaStream_t stream) {
  if (kernel == nullptr) throw std::invalid_argument(std::string("dtype: this build has no ") + name + " for it");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  EXTEND_ATTN_CUDA_CHECK(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace

int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void check_call(const AllReduceCall& call, const ControllerOptions& options) {
  check_argument(call.count > 0 && static_cast<std::uint64_t>(call.count) <= kMaxHeaderSize, "count",
                 "got " + std::to_string(call.count));
  check_aligned("x", as_pointer(call.input));
  check_aligned("out", as_pointer(call.output));
  const std::uint64_t bytes = static_cast<std::uint64_t>(call.count) * element_bytes(call.dtype);
  const std::uint64_t room = call.op == Op::kOneShotPush ? options.max_push_bytes : options.max_bytes;
  check_argument(bytes <= room, "x",
                 "got " + std::to_string(bytes) + " bytes; this communicator was made with " +
                     (call.op == Op::kOneShotPush ? "max_push_bytes=" : "max_bytes=") + std::to_string(room));
  const bool apart = call.output + bytes <= call.input || call.input + bytes <= call.output;
  check_argument(call.input == call.output || apart, "out",
                 "overlaps x in part; it must be x itself or disjoint from it");
}

void check_call(const QkNormCall& call, const ControllerOptions& options) {
  check_argument(
      call.tokens > 0 && call.tokens <= kMaxTokens, "q",
      "got " + std::to_string(call.tokens) + " tokens; at most " + std::to_string(kMaxTokens) + " in one call");
  check_argument(options.world == 2 || options.world == 4 || options.world == 8, "comm",
                 "got " + std::to_string(options.world) + " ranks; fused_parallel_qknorm serves 2, 4 and 8");
  check_width("q", call.q_width, kMinQWidth);
  check_width("k", call.k_width, kMinKWidth);
  check_stride("q", call.q_stride, call.q_width, call.tokens, call.dtype);
  check_stride("k", call.k_stride, call.k_width, call.tokens, call.dtype);
  check_aligned("q", as_pointer(call.q));
  check_aligned("k", as_pointer(call.k));
  check_aligned("q_weight", as_pointer(call.q_weight));
  check_aligned("k_weight", as_pointer(call.k_weight));
  const std::uint64_t bytes = static_cast<std::uint64_t>(call.tokens) * kQkNormBytesPerToken;
  check_argument(
      bytes <= options.max_push_bytes, "q",
      "got " + std::to_string(call.tokens) + " tokens, which push " + std::to_string(bytes) +
          " bytes; this communicator was made with max_push_bytes=" + std::to_string(options.max_push_bytes));
}

LaunchShape all_reduce_shape(Op op, DType dtype, std::int64_t count, int world, int max_blocks) {
  const std::int64_t vectors = ceil_div(count * element_bytes(dtype), kVectorBytes);
  int threads = kPullThreads, most = std::min(max_blocks, kMaxPullBlocks);
  if (op == Op::kOneShotPush) {
    most = max_blocks;
    threads = kMinPushThreads;
    while (threads < kMaxPushThreads && std::int64_t(threads) * most < vectors) threads *= 2;
  }
  const std::int64_t work = op == Op::kTwoShotPull ? ceil_div(vectors, world) : vectors;
  return LaunchShape{static_cast<int>(std::min<std::int64_t>(ceil_div(work, threads), most)), threads};
}

int team_warps(DType dtype, std::int64_t q_width, std::int64_t k_width) {
  const std::int64_t vectors = ceil_div((q_width + k_width) * element_bytes(dtype), kVectorBytes);
  int warps = 1;
  while (warps < kNormThreads / kWarp && warps * kWarp * kVectorsPerThread < vectors) warps *= 2;
  return warps;
}

LaunchShape qknorm_shape(DType dtype, std::int64_t tokens, std::int64_t q_width, std::int64_t k_width, int max_blocks) {
  const int teams = kNormThreads / kWarp / team_warps(dtype, q_width, k_width);
  const auto blocks = std::min<std::int64_t>(ceil_div(tokens, teams), max_blocks);
  return LaunchShape{static_cast<int>(blocks), kNormThreads};
}

void launch(Controller& controller, const AllReduceCall& call, const LaunchOptions& options, cudaStream_t stream) {
  const ControllerOptions& o = controller.options();
  check_call(call, o);
  const DeviceGuard guard(o.device);
  controller.order(stream);
  AllReduceParams params{};
  params.comm = controller.view();
  params.input = as_pointer(call.input);
  params.output = reinterpret_cast<void*>(call.output);
  params.count = call.count;
  params.call = pack_call(call.op, static_cast<int>(call.dtype), static_cast<std::uint64_t>(call.count));
  params.slot = call.slot < 0 ? nullptr : static_cast<const InputSlot*>(controller.slot_address(call.slot));
  params.copy_in = call.copy_in;
  const KernelSet& set = kernels_of(call.dtype);
  const auto& kernels = call.op == Op::kOneShotPush   ? set.one_shot_push
                        : call.op == Op::kOneShotPull ? set.one_shot_pull
                                                      : set.two_shot_pull;
  const void* kernel = kernels[o.world == 2 ? 0 : 1];
  launch_kernel(kernel, "all-reduce", params,
                all_reduce_shape(call.op, call.dtype, call.count, o.world, options.max_blocks),
                options.dependent_launch, stream);
}

void launch(Controller& controller, const QkNormCall& call, const LaunchOptions& options, cudaStream_t stream) {
  const ControllerOptions& o = controller.options();
  check_call(call, o);
  const DeviceGuard guard(o.device);
  controller.order(stream);
  QkNormParams params{};
  params.comm = controller.view();
  params.q = reinterpret_cast<void*>(call.q);
  params.k = reinterpret_cast<void*>(call.k);
  params.q_weight = as_pointer(call.q_weight);
  params.k_weight = as_pointer(call.k_weight);
  params.q_stride = call.q_stride;
  params.k_stride = call.k_stride;
  params.call =
      pack_call(Op::kTpQkNorm, static_cast<int>(call.dtype),
                pack_qknorm_size(static_cast<std::uint64_t>(call.tokens), static_cast<std::uint64_t>(call.q_width),
                                 static_cast<std::uint64_t>(call.k_width)));
  params.tokens = static_cast<int>(call.tokens);
  params.q_width = static_cast<int>(call.q_width);
  params.k_width = static_cast<int>(call.k_width);
  params.team_warps = team_warps(call.dtype, call.q_width, call.k_width);
  params.eps = call.eps;
  launch_kernel(kernels_of(call.dtype).tp_qknorm, "tp_qknorm", params,
                qknorm_shape(call.dtype, call.tokens, call.q_width, call.k_width, options.max_blocks),
                options.dependent_launch, stream);
}

int load_kernels(DType dtype, int world) {
  const KernelSet& set = kernels_of(dtype);
  check_argument(set.tp_qknorm != nullptr, "dtypes",
                 "this build of the module lacks type " + std::to_string(static_cast<int>(dtype)));
  int device = 0, processors = 0, fewest = 1 << 30;
  EXTEND_ATTN_CUDA_CHECK(cudaGetDevice(&device));
  EXTEND_ATTN_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const auto load = [&](const void* kernel, int threads) {
    cudaFuncAttributes attributes{};
    EXTEND_ATTN_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));  // loads it
    int resident = 0;
    EXTEND_ATTN_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0));
    fewest = std::min(fewest, resident * processors);
  };
  const int which = world == 2 ? 0 : 1;
  load(set.one_shot_push[which], kMaxPushThreads);
  load(set.one_shot_pull[which], kPullThreads);
  load(set.two_shot_pull[which], kPullThreads);
  load(set.tp_qknorm, kNormThreads);
  return fewest;
}

}  // namespace extend_attn
