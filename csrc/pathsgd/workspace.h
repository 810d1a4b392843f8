// The names of Path-SGD's slots of scratch memory (common/workspace.h).
#pragma once

#include "common/workspace.h"

namespace finite_width::pathsgd {

// The slots before are those of the tile GEMM and of other kernels that nest it.
enum Slot : int {
  kPlacesSlot = 8,  // where positions and taps stand in a padded input
  kStripsSlot,      // a convolution's products, before they are added up
  kMassesSlot,      // a strip of the masses of a convolution's weights
  kSumsSlot,        // the path sums below a convolution
  kPaddedSlot,      // a padded copy of an input
  kUnfoldedSlot,    // an unfolded input of few positions
  kSweepSlot,       // a dense layer's factors, sources and sums
  kEndOfSlots,
};
static_assert(kEndOfSlots <= kWorkspaceSlots);

}  // namespace finite_width::pathsgd
