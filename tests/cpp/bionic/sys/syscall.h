#pragma once
#define SYS_futex (sizeof(long) == 8 ? 98 : 240)
