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
  set.one_shot_push = reinterpret_cast<const void*>(&one_shot_push<T>);
  set.one_shot_pull = reinterpret_cast<const void*>(&one_shot_pull<T>);
  set.two_shot_pull = reinterpret_cast<const void*>(&two_shot_pull<T>);
  set.tp_qknorm = reinterpret_cast<const void*>(&tp_qknorm<T>);
  return true;
}

}  // namespace extend_attn
