// The kernels of one element type, put into the module's table when it is loaded.
#pragma once

#include "custom_all_reduce_pull.cuh"
#include "custom_all_reduce_push.cuh"
#include "params.h"
#include "tp_qknorm.cuh"

namespace extend_attn {

template <typename T>
bool register_kernels() {
  KernelSet& set = kernels_of(kDType<T>);
  const auto address = [](auto kernel) { return reinterpret_cast<const void*>(kernel); };
  set.one_shot_push[0] = address(&one_shot_push<T, 2>);
  set.one_shot_push[1] = address(&one_shot_push<T, 0>);
  set.one_shot_pull[0] = address(&one_shot_pull<T, 2>);
  set.one_shot_pull[1] = address(&one_shot_pull<T, 0>);
  set.two_shot_pull[0] = address(&two_shot_pull<T, 2>);
  set.two_shot_pull[1] = address(&two_shot_pull<T, 0>);
  set.tp_qknorm = address(&tp_qknorm<T>);
  return true;
}

}  // namespace extend_attn
