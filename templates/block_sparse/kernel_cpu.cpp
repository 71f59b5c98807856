// block_sparse on a CPU: contiguous tiles, full ones unmasked, partial ones by their dictionary pattern.
#if defined(SX_BACKWARD)
#include "../shared/backward.hpp"

extern "C" void backward(const sx::Arguments* a) { sx::Backward<SX_DTYPE, true, false>(*a).run(); }
#else
#include "../shared/tile_forward.hpp"

extern "C" void forward(const sx::Arguments* a) { sx::TileForward<SX_DTYPE, false>(*a).run(); }
#endif
