#pragma once
unsigned long getauxval(unsigned long);
enum { AT_HWCAP = 16, AT_HWCAP2 = 26 };
