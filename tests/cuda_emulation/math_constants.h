// What CUDA's header of that name has, as far as TVM's code generator writes it.
#pragma once
#include <cmath>
#define CUDART_INF_F INFINITY
#define CUDART_INF static_cast<double>(INFINITY)
#define CUDART_NAN_F NAN
#define CUDART_NAN static_cast<double>(NAN)
