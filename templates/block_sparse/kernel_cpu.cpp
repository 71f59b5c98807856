// block_sparse on a CPU: contiguous tiles, full ones unmasked, partial ones by their dictionary pattern.
#include "../shared/tile_forward.hpp"

extern "C" void forward(const sx::Arguments* a) { sx::TileForward<SX_DTYPE>(*a).run(); }
