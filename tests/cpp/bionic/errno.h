#pragma once
int* __errno(void);
#define errno (*__errno())
enum { EINTR = 4, EAGAIN = 11, ENOMEM = 12, EEXIST = 17 };
