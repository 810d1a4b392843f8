// The register tiles and the packing of the tile GEMM, for every instruction set.
#include "common/parallel.h"
#include "common/workspace.h"

#include <utility>

#define FW_KERNEL_FILE "common/gemm_tile_kernel.h"
#include "common/foreach_isa.h"
