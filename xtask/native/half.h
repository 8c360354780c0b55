// Takes the place of mlx-c's half.h, which knows only ARM's own half types.
// mlx-rs expects a 16-bit float that bindgen renders as its own wrapper, and a plain u16 for bfloat16. C++ sees
// MLX's types, whichever those are on this processor: mlx-c only ever passes pointers to them.
#ifndef MLX_HALF_H
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
#ifdef __cplusplus
#include "mlx/types/half_types.h"
typedef mlx::core::float16_t float16_t;
typedef mlx::core::bfloat16_t bfloat16_t;
#else
typedef __fp16 float16_t;
typedef unsigned short bfloat16_t;
#endif
#endif
