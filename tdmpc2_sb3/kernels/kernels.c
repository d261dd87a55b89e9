/* The world model's layers: matrix products, LayerNorm with Mish or SimNorm in one pass over rows
 * that stay in the core's first cache, and categorical regression over bins. One file a subject, each
 * of which is included here: one unit of compilation, in which anything may be inlined.
 *
 * All arrays are float32, a "row" is one vector of the last axis; they are contiguous where nothing
 * else is said. Reductions over rows go through one partial sum a thread, added in the order of the
 * threads, so that a result depends on nothing but the input and the number of threads. An entry of
 * a matrix product adds its terms in their order, so it does not even depend on that, nor on the
 * other rows.
 *
 * Only simd reductions are allowed to reassociate; NaN and infinity pass through everywhere.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#include "interface.h"
#include "vectors.h"
#include "activations.h"
#include "threads.h"
#include "norms.h"
#include "products.h"
#include "layers.h"
#include "networks.h"
#include "network_gradients.h"
#include "losses.h"
#include "elementwise.h"
#include "arrays.h"
#include "state_space.h"
#include "policy.h"
#include "planning.h"
#include "search.h"
