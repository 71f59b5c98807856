// hybrid on a CPU: contiguous tiles where the mask is dense, gathered columns where a block of queries shares keys, and
// single edges for what is left, all within one pass over each block of queries.
#if defined(SX_BACKWARD)
#include "../shared/backward.hpp"

extern "C" void backward(const sx::Arguments* a) { sx::Backward<SX_DTYPE, true, true>(*a).run(); }
#else
#include "../shared/tile_forward.hpp"

extern "C" void forward(const sx::Arguments* a) { sx::TileForward<SX_DTYPE, true>(*a).run(); }
#endif
