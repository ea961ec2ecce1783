#pragma once
double fabs(double);
double floor(double);
double sqrt(double);
double ceil(double);
float fabsf(float);
#define isnan(x) __builtin_isnan(x)
#define isfinite(x) __builtin_isfinite(x)
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
