// block_sparse on NVIDIA GPUs: contiguous tiles on matrix units, full ones unmasked, partial ones by their bit pattern.
#include "shared/tiles.cuh"

extern "C" __global__ void __launch_bounds__(sx::kThreads, 1) forward(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  static_assert(sizeof(Arguments) == SX_ARGUMENT_BYTES, "host and device differ in the arguments");
  SX_SHARED_MEMORY(memory);
  unsigned item;
  const Copy copy = copy_of(a.lists, a.lists.n_items, &item);
  State state;
  state.clear();
  attend_all(a, copy, (int)item, memory, state);
  finish(a, copy, (int)item, memory, state);
}

extern "C" __global__ void __launch_bounds__(sx::kMergeWarps * 32) merge(const __grid_constant__ sx::Arguments a) {
  sx::merge_pieces(a);
}
